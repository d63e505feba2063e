"""Builds a tokenizer from a file of text, or the whole processor of mdm-digits; see `mdm_hf.training.tokenizer`.

python -m mdm_hf.conversion.build_tokenizer --corpus text.txt --vocab-size 32000 --output tokenizer/
python -m mdm_hf.conversion.build_tokenizer --digits --output model_cards/mdm-digits/
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from mdm_hf import MDMImageProcessorPil, MDMProcessor
from mdm_hf.training.digits import all_captions, all_questions_and_answers
from mdm_hf.training.tokenizer import build_tokenizer


DIGITS_VOCAB_SIZE = 384
DIGITS_MAX_NEW_TOKENS = 8
DIGITS_CHARACTERS = "jq!'-:;"  # with the corpus: the letters and marks of a simple sentence


def digits_corpus() -> list[str]:
    """Every caption, question and answer of the digits data, and every word before a comma and before a full stop:
    SentencePiece considers a piece only if it stands in two different words."""
    sentences = [*all_captions(), *(text for pair in all_questions_and_answers() for text in pair)]
    words = sorted({word.strip(",?") for sentence in sentences for word in sentence.split()})
    return sentences + [word + mark for word in words for mark in ",."]


def build_digits_tokenizer(output: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of mdm-digits: each word of its captions, questions and answers is one piece."""
    return build_tokenizer(digits_corpus(), DIGITS_VOCAB_SIZE, output, DIGITS_CHARACTERS, num_threads=1)


def build_digits_processor(output: str | Path):
    """The whole processor of mdm-digits: the tokenizer, and 8x8 grey images in patches of 2x2."""
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
