"""The tokenizer: the recipe of Appendix D, SentencePiece as the oracle of its export, and the one that ships."""

import pydoc_data.topics
import string
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from mdm_hf.configuration_mdm import MDMConfig
from mdm_hf.conversion.build_tokenizer import (
    DIGITS_CHARACTERS,
    DIGITS_MAX_NEW_TOKENS,
    DIGITS_VOCAB_SIZE,
    build_digits_tokenizer,
    digits_corpus,
    main,
)
from mdm_hf.training.digits import DIGIT_WORDS, all_captions, all_questions_and_answers
from mdm_hf.training.tokenizer import (
    CONTROL_TOKENS,
    LONGEST,
    _in_pieces,
    build_tokenizer,
    to_fast_tokenizer,
    train_sentencepiece,
)


SHIPPED = Path(__file__).resolve().parents[1] / "model_cards" / "mdm-digits"
ODD_STRINGS = (
    "héllo wörld 🙂",
    "日本語のテキスト",
    "naïve café, e\u0301",
    "🙂🙂 👩‍👩‍👧",
    "A THREE?",
    "<0x4F> and <0x0A>",
    "x<0x41>y",
    "ﬁne ½ ™",
    "a\u00a0b\tc",
    "مرحبا",
    "zzqqjj!!",
    "\u200b",
    "",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return build_digits_tokenizer(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def english() -> list[str]:
    lines = [line.strip() for topic in pydoc_data.topics.topics.values() for line in topic.splitlines()]
    return [line for line in lines if len(line) > 20][:2000]


def test_control_tokens_have_the_ids_of_the_configuration(digits) -> None:
    config = MDMConfig()
    for name in ("pad", "bos", "eos", "unk", *(token.removesuffix("_token") for token in CONTROL_TOKENS)):
        assert getattr(digits, f"{name}_token_id") == getattr(config, f"{name}_token_id"), name
    assert sorted(digits.all_special_ids) == list(range(17))
    assert len(digits) == DIGITS_VOCAB_SIZE == MDMConfig.from_preset("mdm-digits").vocab_size


def test_every_caption_question_and_answer_comes_back_and_fits_the_canvas(digits) -> None:
    for text in [*all_captions(), *(text for pair in all_questions_and_answers() for text in pair)]:
        ids = digits(text)["input_ids"]
        assert digits.decode(ids) == text
        assert len(ids) < DIGITS_MAX_NEW_TOKENS, text


@pytest.mark.parametrize("name", [*DIGIT_WORDS, *string.digits])
def test_the_name_of_a_digit_is_one_piece(digits, name: str) -> None:
    assert len(digits(name)["input_ids"]) == 1


@pytest.mark.parametrize(
    ("text", "returned"),
    [
        ("a  three", "a three"),
        ("  a three ", "a three"),
        ("a\nthree\tor four", "a three or four"),
        ("ﬁve ½", "five 1⁄2"),
        ("e\u0301", "é"),
        ("🙂 日本語", "🙂 日本語"),
        ("<0x4F>", "<0x4F>"),
    ],
)
def test_text_comes_back_normalised_with_white_space_folded(digits, text: str, returned: str) -> None:
    assert digits.decode(digits(text)["input_ids"]) == returned


def test_no_text_is_unknown(digits) -> None:
    for text in ODD_STRINGS:
        assert digits.unk_token_id not in digits(text)["input_ids"]


@pytest.mark.parametrize("corpus", ["digits", "english"])
def test_the_fast_tokenizer_gives_the_ids_of_sentencepiece(corpus: str, english: list[str]) -> None:
    if corpus == "digits":
        model, texts = train_sentencepiece(digits_corpus(), DIGITS_VOCAB_SIZE, DIGITS_CHARACTERS, 1), digits_corpus()
    else:
        model, texts = train_sentencepiece(english, 1000), english[::10]
    oracle, tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model), to_fast_tokenizer(model)
    for text in [*texts, *ODD_STRINGS]:
        ids = oracle.encode(text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == oracle.decode(ids), text


def test_two_builds_are_equal_byte_for_byte(english: list[str], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        build_tokenizer(english, 800, tmp_path / folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_shipped_tokenizer_is_what_the_script_builds(digits) -> None:
    shipped = AutoTokenizer.from_pretrained(SHIPPED)
    assert shipped.get_vocab() == digits.get_vocab()
    assert shipped.backend_tokenizer.to_str() == digits.backend_tokenizer.to_str()


def test_a_saved_tokenizer_needs_no_sentencepiece_model_and_keeps_its_names(digits, tmp_path: Path) -> None:
    digits.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for name, token in CONTROL_TOKENS.items():
        assert getattr(loaded, name) == token
    for text in [*all_captions()[:20], *ODD_STRINGS]:
        assert loaded(text)["input_ids"] == digits(text)["input_ids"]


def test_control_tokens_are_single_ids_left_out_of_decoded_text(digits) -> None:
    row = "<|class|><|user|><|text_start|>a three<|text_end|>"
    ids = digits(row, add_special_tokens=False)["input_ids"]
    assert ids[:3] == [4, 14, 9]
    assert ids[-1] == 10
    assert digits.decode(ids, skip_special_tokens=True).strip() == "a three"


def test_the_command_line_builds_from_a_corpus_file(english: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n\n".join(english), encoding="utf-8")
    assert main(["--corpus", str(corpus), "--vocab-size", "700", "--output", str(tmp_path / "out")]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 700


@pytest.mark.parametrize("vocab_size", [100, 30_000])
def test_a_vocabulary_that_does_not_suit_the_corpus_is_refused(
    vocab_size: int, english: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(english[:200]), encoding="utf-8")
    assert main(["--corpus", str(corpus), "--vocab-size", str(vocab_size), "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"Got vocab_size {vocab_size}" in message
    assert "change vocab_size or give more text" in message


def test_a_missing_corpus_is_reported_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--corpus", str(tmp_path / "none.txt"), "--output", str(tmp_path)]) == 2
    assert "none.txt" in capsys.readouterr().err


def test_whole_words_are_pieces_of_a_small_corpus() -> None:
    corpus = [f"a {colour} {kind} and no more" for colour in ("red", "blue") for kind in ("circle", "square")] * 20
    plain = to_fast_tokenizer(train_sentencepiece(corpus, 340, is_size_exact=False))
    kept = to_fast_tokenizer(train_sentencepiece(corpus, 340, is_size_exact=False, keeps_words=True))
    assert "▁and" not in plain.tokenize("a red circle and no more")
    assert kept.tokenize("a red circle and no more") == ["▁a", "▁red", "▁circle", "▁and", "▁no", "▁more"]
    assert kept.decode(kept("a blue fox, and 7 more!")["input_ids"]) == "a blue fox, and 7 more!"


@pytest.mark.parametrize("between", [" ", ""], ids=["words", "one word"])
def test_a_text_beyond_sentencepiece_s_limit_is_learnt_from(between: str, english: list[str]) -> None:
    long = between.join(["мир"] * 1000)  # 6 kB and more, the only Cyrillic here
    tokenizer = to_fast_tokenizer(train_sentencepiece([*english, long], 1000))
    assert "м" in "".join(tokenizer.tokenize("мир"))
    assert list(_in_pieces([long, "short  one "])) == [*list(_in_pieces([long])), "short  one "]
    assert between.join(_in_pieces([long])) == long
    assert all(len(piece.encode()) <= LONGEST for piece in _in_pieces([long]))


MARKS = "\u0301\u0302\u0323\u0307\u0327\u0308"


@pytest.mark.parametrize("letter", [*"aeqx", "가", "ﷺ", "ẛ", "ﬁ", "½", "क"])
def test_no_mark_is_lost_however_many_stand_on_a_letter(english: list[str], letter: str) -> None:
    model = train_sentencepiece(english, 2000)
    oracle, fast = sentencepiece.SentencePieceProcessor(model_proto=model), to_fast_tokenizer(model)
    for marks in [*MARKS, *(one + other for one in MARKS for other in MARKS)]:
        ids = fast(f"so {letter}{marks} and on", add_special_tokens=False)["input_ids"]
        expected = oracle.decode(oracle.encode(f"so {letter}{marks} and on"))
        assert unicodedata.normalize("NFKC", fast.decode(ids)) == unicodedata.normalize("NFKC", expected), ascii(marks)
