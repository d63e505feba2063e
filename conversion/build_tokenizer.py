"""A tokenizer from text: SentencePiece (unigram) by the recipe of Appendix D, saved as a standard fast tokenizer.

- The control tokens take ids 0 to 16, the 256 bytes follow, then the pieces. All ids lie inside `--vocab-size`.
- The output is `tokenizer.json` and `tokenizer_config.json`: no `.model`, no custom class, nothing to install.
- Text is normalised (NFKC) and white space folded: runs of it, newlines too, become one space, and ends are stripped.
  Every other string comes back as it went in, unknown characters as their bytes.
- The same corpus and settings give the same bytes.

    python conversion/build_tokenizer.py --corpus text.txt --vocab-size 32000 --output tokenizer/
    python conversion/build_tokenizer.py --digits --output model_cards/mdm-digits/
"""

import argparse
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast


PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
# Name of the tokenizer's attribute -> token, in the order of the ids from 4 on.
CONTROL_TOKENS = {
    "class_token": "<|class|>",
    "time_image_token": "<|time_image|>",
    "time_text_token": "<|time_text|>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "text_start_token": "<|text_start|>",
    "text_end_token": "<|text_end|>",
    "image_token": "<|image|>",
    "image_target_token": "<|image_target|>",
    "text_target_token": "<|text_target|>",
    "user_token": "<|user|>",
    "assistant_token": "<|assistant|>",
    "system_token": "<|system|>",
}
# Spelled out by its characters, text such as "<0x4F>" is never mistaken for the byte piece of that name.
BYTE_NAME_CHARACTERS = "<>x0123456789ABCDEF"

MAX_LENGTH = 512  # of a text in tokens (paper, Appendix C)
DIGITS_VOCAB_SIZE = 384
DIGITS_MAX_NEW_TOKENS = 8
DIGITS_CHARACTERS = "jq!'-:;"  # with the corpus: the letters and marks of a simple sentence


def train_sentencepiece(
    sentences: Iterable[str], vocab_size: int, required_characters: str = "", num_threads: int = 8
) -> bytes:
    """The serialised SentencePiece model of Appendix D, with our control tokens and bytes for unknown characters.

    Raises:
        ValueError: `vocab_size` does not suit the corpus.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # which million sentences of a larger corpus are read
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="unigram",
            character_coverage=0.9995,
            num_threads=num_threads,
            input_sentence_size=1_000_000,
            shuffle_input_sentence=True,
            byte_fallback=True,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            control_symbols=list(CONTROL_TOKENS.values()),
            required_chars="".join(sorted(set(BYTE_NAME_CHARACTERS + required_characters))),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"Got vocab_size {vocab_size}, which SentencePiece cannot fit to this corpus ({error}); need room for 17 "
            "control tokens, 256 bytes and every character, and no more pieces than the corpus offers; change "
            "--vocab-size or give more text."
        ) from error
    return model.getvalue()


def to_fast_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """A serialised SentencePiece unigram model as a fast tokenizer that gives the same ids and the same text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    lowest = min(piece.score for piece in proto.pieces if piece.type == kinds.NORMAL)
    # SentencePiece never matches a byte piece in text; here its score loses to its name's characters, one by one.
    scores = [10 * lowest - 100 if piece.type == kinds.BYTE else piece.score for piece in proto.pieces]
    vocabulary = [(piece.piece, score) for piece, score in zip(proto.pieces, scores, strict=True)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", prepend_scheme="always")])
    special = [PAD, BOS, EOS, UNK, *CONTROL_TOKENS.values()]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        extra_special_tokens=CONTROL_TOKENS,
        padding_side="right",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_tokenizer(
    sentences: Iterable[str],
    vocab_size: int,
    output: str | Path,
    required_characters: str = "",
    num_threads: int = 8,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on `sentences` and saves it in the folder `output`."""
    tokenizer = to_fast_tokenizer(train_sentencepiece(sentences, vocab_size, required_characters, num_threads))
    tokenizer.save_pretrained(output)
    return tokenizer


def digits_corpus() -> list[str]:
    """Every caption, question and answer of the digits data, and every word before a comma and before a full stop:
    SentencePiece considers a piece only if it stands in two different words."""
    from mdm_hf.training.digits import all_captions, all_questions_and_answers

    sentences = [*all_captions(), *(text for pair in all_questions_and_answers() for text in pair)]
    words = sorted({word.strip(",?") for sentence in sentences for word in sentence.split()})
    return sentences + [word + mark for word in words for mark in ",."]


def build_digits_tokenizer(output: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of mdm-digits: each word of its captions, questions and answers is one piece."""
    return build_tokenizer(digits_corpus(), DIGITS_VOCAB_SIZE, output, DIGITS_CHARACTERS, num_threads=1)


def build_digits_processor(output: str | Path):
    """The whole processor of mdm-digits: the tokenizer, and 8x8 grey images in patches of 2x2."""
    from mdm_hf.image_processing_mdm import MDMImageProcessorPil
    from mdm_hf.processing_mdm import MDMProcessor

    image_processor = MDMImageProcessorPil(size={"height": 8, "width": 8}, patch_size=2, num_channels=1)
    processor = MDMProcessor(
        image_processor, build_digits_tokenizer(output), max_new_tokens=DIGITS_MAX_NEW_TOKENS, num_classes=10
    )
    processor.save_pretrained(output)
    return processor


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, empty ones left out."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield line.rstrip("\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--corpus", type=Path, help="UTF-8 text, one sentence a line, shuffled or not")
    source.add_argument("--digits", action="store_true", help="build the whole processor of mdm-digits instead")
    parser.add_argument("--vocab-size", type=int, default=32000, help="number of ids (default: the paper's 32000)")
    parser.add_argument("--num-threads", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    try:
        if options.digits:
            size = len(build_digits_processor(options.output).tokenizer)
        else:
            lines = read_lines(options.corpus)
            size = len(build_tokenizer(lines, options.vocab_size, options.output, num_threads=options.num_threads))
    except (ValueError, OSError) as error:
        print(f"build_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {options.output.resolve()}: {size} ids.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
