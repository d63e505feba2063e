"""Claims about VQA accuracy and CIDEr: the benchmarks' own files and rules, and nothing lost to a kill."""

import json
import shutil
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from evaluated import OF_SETTINGS, evaluate, killed_and_resumed, same_result
from PIL import Image
from pycocoevalcap.cider.cider import Cider

from mdm_hf.evaluation.captioning import cider, plain_tokens, read_captions
from mdm_hf.evaluation.visual_questions import normal_form, read_questions, soft_accuracy
from mdm_hf.training.digits import DIGIT_WORDS, load_digits_split


HUMANS = [*["three"] * 6, "a 3", "eight", "3.", "it's three"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The digits in the folders and files of every benchmark of pictures and words."""
    folder = tmp_path_factory.mktemp("data")
    pictures, labels = (part[:6] for part in load_digits_split("heldout"))
    (folder / "images").mkdir()
    asked, answered, vizwiz, captions, karpathy = [], [], [], [], []
    for i, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        word, name = DIGIT_WORDS[label], f"COCO_val2014_{i:012d}.jpg"
        picture.convert("RGB").resize((32, 32)).save(folder / "images" / name)
        question = "which digit is this?"
        humans = [f"it is a {word}"] * 7 + [word] * 3
        answers = [{"answer": one, "answer_confidence": "yes", "answer_id": n + 1} for n, one in enumerate(humans)]
        asked.append({"image_id": i, "question": question, "question_id": 10 * i})
        answered.append(
            {
                "question_type": "which",
                "multiple_choice_answer": word,
                "answers": answers,
                "image_id": i,
                "answer_type": "number" if i % 2 else "other",
                "question_id": 10 * i,
            }
        )
        kind = "unanswerable" if i == 5 else "other"
        vizwiz.append(
            {"image": name, "question": question, "answers": answers, "answer_type": kind, "answerable": int(i != 5)}
        )
        said = [f"A handwritten {word}.", f"the digit {word}", f"this is the number {word}"]
        captions += [{"image_id": i, "id": 3 * i + n, "caption": one} for n, one in enumerate(said)]
        sentences = [{"tokens": one.lower().strip(".").split(), "raw": one, "sentid": n} for n, one in enumerate(said)]
        karpathy.append(
            {"sentids": [0, 1, 2], "imgid": i, "sentences": sentences, "split": "test", "filename": name}
            if i < 4
            else {"sentids": [0], "imgid": i, "sentences": sentences[:1], "split": "train", "filename": name}
        )

    def write(name, content):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))

    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014", "task_type": "Open-Ended"}
    for prefix, of in (("v2_", "vqav2"), ("", "okvqa")):
        write(f"{of}/{prefix}OpenEnded_mscoco_val2014_questions.json", head | {"questions": asked})
        write(f"{of}/{prefix}mscoco_val2014_annotations.json", head | {"annotations": answered})
    write("val.json", vizwiz)
    images = [{"id": i, "file_name": f"COCO_val2014_{i:012d}.jpg", "height": 32, "width": 32} for i in range(6)]
    write("captions_val2014.json", {"info": {}, "images": images, "licenses": [], "annotations": captions})
    write("dataset_flickr30k.json", {"images": karpathy, "dataset": "flickr30k"})
    return folder


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("Three", "3"),
        ("none", "0"),
        ("the red, white and blue", "red white and blue"),
        ("a 1,000", "1000"),
        ("black/white", "black white"),
        ("dont know?", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("lets", "lets"),
        ("somebody'd", "somebodyd"),
        ("3.5", "3.5"),
        ("yes.", "yes"),
        ("t-shirt", "t shirt"),
        ("an  apple ", "apple"),
        ("The", ""),
    ],
)
def test_answers_have_the_normal_form_of_the_challenge(given, normal):
    assert normal_form(given) == normal


def by_the_published_rules(answer: str) -> str:
    """The challenge's rules once more, a character and a word at a time: those of https://visualqa.org/evaluation.html,
    and where a space takes a mark's place, of its script.

    - Punctuation becomes a space; it is dropped where that mark stands beside a space anywhere in the answer, and all
      is where a comma stands between two digits. Apostrophes and colons stay.
    - A period goes unless a digit follows it.
    - Words: lower case, no articles, zero to ten and "none" as digits, contractions with their apostrophe.
    """
    between = any(
        a.isdecimal() and b == "," and c.isdecimal() for a, b, c in zip(answer, answer[1:], answer[2:], strict=False)
    )
    neighbours: dict[str, set[str]] = {}
    for before, mark, after in zip(f"#{answer}", answer, f"{answer}#"[1:], strict=False):
        neighbours.setdefault(mark, set()).update((before, after))
    spaced = ""
    for mark in answer:
        if mark in ';/[]"{}()=+\\_-><@`,?!':
            spaced += "" if between or " " in neighbours[mark] else " "
        else:
            spaced += mark
    kept = [mark for mark, after in zip(spaced, f"{spaced}#"[1:], strict=True) if mark != "." or after.isdecimal()]
    names = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    contractions = {"dont": "don't", "isnt": "isn't", "youre": "you're", "thered": "there'd"}  # of those made below
    words = []
    for word in "".join(kept).lower().split():
        if word in {"a", "an", "the"}:
            continue
        if word in names:
            word = str(names.index(word))
        words.append("0" if word == "zero" else contractions.get(word, word))
    return " ".join(words)


def test_the_normal_form_is_that_of_a_second_implementation_of_the_published_rules():
    rng = np.random.default_rng(0)
    words = ["a", "an", "the", "The", "none", "zero", "one", "Two", "ten", "eleven", "red", "cat", "cat's"]
    words += ["dont", "isn't", "isnt", "youre", "3", "12", "0.5", "1,000", "10:30"]
    joints = [" ", " ", " ", "  ", ", ", ",", "-", " - ", "/", "?", "! ", ".", ". ", ";", "(", ") ", "_", "'s "]
    joints += ["\\", '"']
    strings = {
        "".join(f"{rng.choice(words)}{rng.choice(joints)}" for _ in range(rng.integers(1, 6))) for _ in range(800)
    }
    strings |= {f"{a}{mark}{b}" for mark in ";/[]\"{}()=+\\_-><@`,?!.:'" for a, b in ("12", "ab", "1 ", " 2", "a1")}
    assert len(strings) > 700
    assert {one: normal_form(one) for one in strings} == {one: by_the_published_rules(one) for one in strings}


def test_accuracy_is_the_mean_over_every_nine_of_ten_humans():
    """The oracle takes the rule at its word: exact fractions, every subset of nine."""

    def oracle(answer, humans):
        normal = [normal_form(one) for one in humans] if len(set(humans)) > 1 else humans
        answer = normal_form(answer) if len(set(humans)) > 1 else answer
        nines = [list(nine).count(answer) for nine in combinations(normal, 9)]
        return sum(min(Fraction(1), Fraction(n, 3)) for n in nines) / len(nines)

    for answer in ("3", "three", "Eight", "a  three!", "it's 3", "seven"):
        assert soft_accuracy(answer, HUMANS) == pytest.approx(float(oracle(answer, HUMANS)))
    assert [soft_accuracy("x", ["x"] * n + ["y"] * (10 - n)) for n in (0, 1, 2, 3, 4)] == pytest.approx(
        [0, 0.3, 0.6, 0.9, 1]
    )
    assert soft_accuracy("Two", ["two"] * 10) == 0  # where all agree to the letter, the challenge compares letters
    with pytest.raises(ValueError, match="Got 1 answers to a question; need two or more"):
        soft_accuracy("x", ["x"])


@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_questions_are_read_from_the_benchmarks_own_files(data, name):
    questions = read_questions(name, data / name, data / "images")
    assert len(questions) == 6
    assert questions[1].image.is_file()
    assert questions[1].kind == "number"
    assert len(questions[1].answers) == 10
    with pytest.raises(ValueError, match=r"with 0 files \*questions.json; need the one of the split to score"):
        read_questions(name, data / "images", data / "images")


@pytest.mark.parametrize(("name", "at"), [("vqav2", "vqav2"), ("okvqa", "okvqa"), ("vizwiz", "val.json")])
def test_a_killed_run_of_questions_ends_as_a_whole_one(data, name, at, tmp_path, monkeypatch):
    given = "--data", str(data / at), "--images", str(data / "images"), "--batch-size", "2", "--limit", "5"
    again = killed_and_resumed(monkeypatch, tmp_path / "killed", 2, name, *given)
    if name == "vqav2":
        assert same_result(evaluate(tmp_path / "whole", name, *given), again)
    assert again["num_samples"] == len(again["answers"]) == 5
    assert set(again["settings"]) >= OF_SETTINGS
    assert again["scores"]["accuracy"] > 0
    low, high = again["intervals"]["accuracy"]
    assert low <= again["scores"]["accuracy"] <= high
    truth = [
        soft_accuracy(a["answer"], q.answers)
        for a, q in zip(again["answers"], read_questions(name, data / at, data), strict=False)
    ]
    assert again["scores"]["accuracy"] == pytest.approx(np.mean(truth), abs=1e-4)


def test_pictures_that_are_not_there_are_named(data, tmp_path, capsys):
    evaluate(tmp_path, "vqav2", "--data", str(data / "vqav2"), "--images", str(tmp_path), status=2)
    assert "Got --images without" in (error := capsys.readouterr().err)
    assert "and 5 more; need all pictures of the split" in error
    evaluate(tmp_path, "vqav2", "--data", str(data / "vqav2"), status=2)
    assert "Got no --images; vqav2 needs the folder of its pictures" in capsys.readouterr().err


def test_a_picture_that_changed_is_asked_about_again(data, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    given = "vqav2", "--data", str(data / "vqav2"), "--images", str(images), "--limit", "1"
    evaluate(tmp_path, *given)
    kept = tmp_path / "work" / "vqav2.jsonl"
    evaluate(tmp_path, *given)
    assert len(kept.read_text().splitlines()) == 1
    Image.new("RGB", (32, 32)).save(images / "COCO_val2014_000000000000.jpg")
    evaluate(tmp_path, *given)
    assert len(kept.read_text().splitlines()) == 2


def test_a_picture_that_cannot_be_read_is_named(data, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(data / "images", images)
    picture = images / "COCO_val2014_000000000000.jpg"
    for content in (picture.read_bytes()[:400], b""):
        picture.write_bytes(content)
        evaluate(tmp_path, "vqav2", "--data", str(data / "vqav2"), "--images", str(images), status=2)
        assert f"Got --images with {picture}, which is no whole picture" in capsys.readouterr().err


QUESTION = {"image_id": 0, "question": "what?", "question_id": 1}
ANSWERED = {"annotations": [{"question_id": 1, "answers": [{"answer": "a"}] * 10}]}


@pytest.mark.parametrize(
    ("asked", "answered", "why"),
    [
        ({"questions": [QUESTION]}, ANSWERED, None),
        ("{", ANSWERED, r"which is not whole JSON \(.*need the questions of vqav2 as they were published"),
        ([1], ANSWERED, "which is built otherwise"),
        ({}, ANSWERED, "no field 'questions'"),
        ({"questions": []}, ANSWERED, "without a question"),
        ({"questions": [{"question": "what?", "question_id": 1}]}, ANSWERED, "no field 'image_id'"),
        ({"questions": [QUESTION | {"image_id": "one"}]}, ANSWERED, "picture 'one'; need a whole number"),
        ({"questions": [QUESTION | {"question": None}]}, ANSWERED, "question 1 has the text None; need words"),
        ({"questions": [QUESTION]}, "", r"annotations.json, which is not whole JSON"),
        ({"questions": [QUESTION]}, {}, r"annotations.json, which is built otherwise \(no field 'annotations'"),
        ({"questions": [QUESTION]}, {"annotations": [{"question_id": 1, "answers": []}]}, "question 1 has 0 answers"),
    ],
)
def test_broken_files_of_questions_are_named_with_what_is_wrong(asked, answered, why, tmp_path):
    for name, content in (("questions", asked), ("annotations", answered)):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_text(text)
    if why is None:
        assert len(read_questions("vqav2", tmp_path, tmp_path)) == 1
    else:
        with pytest.raises(ValueError, match=why):
            read_questions("vqav2", tmp_path, tmp_path)


@pytest.mark.parametrize("answer", [None, 3])
@pytest.mark.parametrize("name", ["vqav2", "okvqa", "vizwiz"])
def test_an_answer_that_is_no_text_is_named_with_its_file_and_question(data, name, answer, tmp_path, capsys):
    where = data / "val.json" if name == "vizwiz" else next((data / name).glob("*annotations.json"))
    content = json.loads(where.read_text())
    row = content[1] if name == "vizwiz" else content["annotations"][1]
    row["answers"][2]["answer"] = answer
    for file in [where] if name == "vizwiz" else (data / name).iterdir():
        shutil.copy(file, tmp_path)
    broken = tmp_path / where.name
    broken.write_text(json.dumps(content))
    given = "--data", str(broken if name == "vizwiz" else tmp_path), "--images", str(data / "images")
    evaluate(tmp_path, name, *given, status=2)
    question = "COCO_val2014_000000000001.jpg" if name == "vizwiz" else 10
    said = f"Got {broken} whose question {question!r} has the answer {answer}; need a text from every human; leave"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "count"), [("coco-captions", 6), ("flickr30k-captions", 4)])
def test_captions_are_scored_from_the_benchmarks_own_file_and_a_kill_loses_nothing(
    data, name, count, tmp_path, monkeypatch
):
    file = data / {"coco-captions": "captions_val2014.json", "flickr30k-captions": "dataset_flickr30k.json"}[name]
    given = "--data", str(file), "--images", str(data / "images"), "--batch-size", "2"
    monkeypatch.setattr(shutil, "which", lambda _: None)  # starting Java takes seconds
    again = killed_and_resumed(monkeypatch, tmp_path / "killed", 2, name, *given)
    items = read_captions(name, file, data / "images")
    assert again["num_samples"] == len(again["captions"]) == len(items) == count
    truth, _ = cider([one["caption"] for one in again["captions"]], [one.captions for one in items], with_java=False)
    assert again["scores"]["cider"] == pytest.approx(truth.mean(), abs=1e-4)
    assert again["scores"]["cider"] > 0.1
    assert set(again["settings"]) >= OF_SETTINGS
    assert again["settings"]["tokenizer"] == "plain (no Java here)"


SAID = ["A man rides a bike.", "two dogs, playing in the snow", "a man rides a bike"]
TRUTH = [
    ("A man is riding a bike.", "The man rides his bike!"),
    ("Two dogs play in snow", "dogs in the snow"),
    ("a red bus on the street", "A bus."),
]


def test_cider_is_that_of_pycocoevalcap_and_its_mean_the_corpus():
    ours, tokenizer = cider(SAID, TRUTH, with_java=False)
    references = {i: [plain_tokens(one) for one in some] for i, some in enumerate(TRUTH)}
    corpus, scores = Cider().compute_score(references, {i: [plain_tokens(one)] for i, one in enumerate(SAID)})
    np.testing.assert_allclose(ours, scores)
    assert ours.mean() == pytest.approx(corpus)
    assert min(ours[:2]) > 5 * ours[2]
    assert tokenizer == "plain (no Java here)"


@pytest.mark.skipif(shutil.which("java") is None, reason="CoreNLP's tokenizer runs in Java")
def test_the_plain_tokenizer_scores_ordinary_sentences_as_corenlp_does():
    with_java, name = cider(SAID, TRUTH)
    np.testing.assert_allclose(with_java, cider(SAID, TRUTH, with_java=False)[0])
    assert name == "ptb (CoreNLP 3.4.1)"


def test_a_file_that_is_no_caption_file_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="which is no file; coco-captions needs captions_val2014.json"):
        read_captions("coco-captions", None, data)
    with pytest.raises(ValueError, match="without a list of `images`"):
        read_captions("coco-captions", data / "val.json", data)
    for content, why in (
        ("[", "which is not whole JSON"),
        ('{"images": [{"id": 0}], "annotations": [{"image_id": 0}]}', "no field 'caption'"),
        ('{"images": [{"id": 0}], "annotations": [{"image_id": 0, "caption": "."}]}', "nobody said a word of"),
        ('{"images": [{"filename": "a.jpg", "sentences": []}]}', "no field 'split'"),
        ('{"images": [{"filename": "a.jpg", "sentences": [], "split": "test"}]}', "nobody said a word of a.jpg"),
        ('{"images": [1]}', "which is built otherwise"),
    ):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(ValueError, match=why):
            read_captions("coco-captions", tmp_path / "broken.json", data)
