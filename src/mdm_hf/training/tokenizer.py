"""A tokenizer from text: SentencePiece (unigram) by the recipe of Appendix D, as a standard fast tokenizer.

- The control tokens take ids 0 to 16, the 256 bytes follow, then the pieces. All ids lie inside `vocab_size`.
- What is saved is `tokenizer.json` and `tokenizer_config.json`: no `.model`, no custom class, nothing to install.
- Text is normalised (NFKC) and white space folded: runs of it, newlines too, become one space, and ends are stripped.
  Every other string comes back as it went in, unknown characters as their bytes.
- The same corpus and settings give the same bytes.
"""

import io
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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

FEW_WORDS = 10_000  # distinct ones, of a corpus small enough to list every part of every word
PIECE_LENGTH = 16  # letters at most, SentencePiece's own limit
LONGEST = 4192  # bytes of a text, SentencePiece's own limit
MAX_LENGTH = 512  # of a text in tokens (paper, Appendix C)


def train_sentencepiece(
    sentences: Iterable[str],
    vocab_size: int,
    required_characters: str = "",
    num_threads: int = 8,
    is_size_exact: bool = True,
    keeps_words: bool = False,
) -> bytes:
    """The serialised SentencePiece model of Appendix D, with our control tokens and bytes for unknown characters.

    Args:
        is_size_exact: Refuse a corpus that offers fewer pieces than `vocab_size`; else take what it offers.
        keeps_words: Of a corpus of fewer than 10,000 distinct words, let whole words be pieces. SentencePiece looks
            for pieces in the list of distinct words: one that is no part of another, "and", it never finds.

    Raises:
        ValueError: `vocab_size` does not suit the corpus.
    """
    sentences = list(sentences)
    with TemporaryDirectory() as folder:
        seeds = Path(folder) / "seeds.tsv"
        candidates = _parts_of_words(sentences) if keeps_words else {}
        seeds.write_text("".join(f"{piece}\t{count}\n" for piece, count in candidates.items()), encoding="utf-8")
        options: dict[str, Any] = {"seed_sentencepieces_file": str(seeds)} if candidates else {}
        return _trained(sentences, vocab_size, required_characters, num_threads, is_size_exact, options)


def _parts_of_words(sentences: list[str]) -> dict[str, int]:
    """Every part of two letters or more of every word -> how often it occurs; nothing of too many words."""
    words = Counter(f"▁{word}" for sentence in sentences for word in sentence.split())
    parts: Counter[str] = Counter()
    for word, count in words.items() if len(words) < FEW_WORDS else ():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + PIECE_LENGTH) + 1):
                parts[word[start:end]] += count
    return dict(sorted(parts.items(), key=lambda part: (-part[1] * len(part[0]), part[0])))


def _in_pieces(sentences: list[str]) -> Iterator[str]:
    """Texts of more than `LONGEST` bytes cut, at white space where they have some: SentencePiece would drop them."""
    for sentence in sentences:
        is_long = len(sentence.encode()) > LONGEST
        yield from textwrap.wrap(sentence, LONGEST // 4, break_on_hyphens=False) if is_long else [sentence]


def _trained(
    sentences: list[str],
    vocab_size: int,
    required_characters: str,
    num_threads: int,
    is_size_exact: bool,
    options: dict[str, Any],
) -> bytes:
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)  # which million sentences of a larger corpus are read
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_in_pieces(sentences),
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
            hard_vocab_limit=is_size_exact,
            minloglevel=2,
            **options,
        )
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"Got vocab_size {vocab_size}, which SentencePiece cannot fit to this corpus ({error}); need room for 17 "
            "control tokens, 256 bytes and every character, and no more pieces than the corpus offers; change "
            "vocab_size or give more text."
        ) from error
    return model.getvalue()


def to_fast_tokenizer(model: bytes) -> PreTrainedTokenizerFast:
    """A serialised SentencePiece unigram model as a fast tokenizer that gives the same ids and the same text.

    Of a letter with several marks, or a ligature with one, `Precompiled` would normalise the first of them and drop
    the rest. So letters take their marks before (NFC), and a control character, which it removes, stands before each
    mark that is left: nothing is lost, though marks of one letter may come in another order than SentencePiece's.
    """
    format: Any = sentencepiece_model_pb2  # made by protobuf, opaque to type checkers
    proto = format.ModelProto.FromString(model)
    kinds = format.ModelProto.SentencePiece
    lowest = min(piece.score for piece in proto.pieces if piece.type == kinds.NORMAL)
    # SentencePiece never matches a byte piece in text; here its score loses to its name's characters, one by one.
    scores = [10 * lowest - 100 if piece.type == kinds.BYTE else piece.score for piece in proto.pieces]
    vocabulary = [(piece.piece, score) for piece, score in zip(proto.pieces, scores, strict=True)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=proto.trainer_spec.unk_id, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"(?<=.)(?=\p{M})"), "\u0001"),
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
    is_size_exact: bool = True,
    keeps_words: bool = False,
) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on `sentences` and saves it in the folder `output`.

    Args:
        sentences: Texts to learn from, read once.
        vocab_size: Number of tokens, control tokens and bytes included.
        output: Folder to write.
        required_characters: Characters that are pieces however rare they are.
        num_threads: Of SentencePiece.
        is_size_exact, keeps_words: See `train_sentencepiece`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `vocab_size` does not suit the corpus.
    """
    model = train_sentencepiece(sentences, vocab_size, required_characters, num_threads, is_size_exact, keeps_words)
    tokenizer = to_fast_tokenizer(model)
    tokenizer.save_pretrained(output)
    return tokenizer
