"""VQAv2, OK-VQA and VizWiz: answers about pictures, scored by the VQA challenge's own rule.

An answer's accuracy is min(1, n / 3) of the n humans who said the same, averaged over leaving out each of the ten in
turn (Antol et al. 2015). Answers are compared in the challenge's normal form, unless all humans agree to the letter:
`vqaEval.py` of github.com/GT-Vision-Lab/VQA compares as they stand then, and so do we.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..pipeline_mdm import MDMPipeline
from .results import (
    ResultCache,
    batches,
    bootstrap_interval,
    file_hash,
    reading,
    result,
    sampling_of,
    settings_hash,
    settings_of,
)


NUMBERS = ("none", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that get an apostrophe back if one of theirs is missing. The challenge's list has oddities, which are part of
# its rule: "lets" and "shes" are left as they are, and "somebody'd" loses its apostrophe.
CONTRACTIONS = """'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've
    hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's
    there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"""
NORMAL_WORDS = {w[:i] + w[i + 1 :]: w for w in CONTRACTIONS.split() for i, mark in enumerate(w) if mark == "'"}
NORMAL_WORDS |= {"somebody'd": "somebodyd"}
DIGITS = {word: str(max(i - 1, 0)) for i, word in enumerate(NUMBERS)}
MOST_PERIODS = 32  # of one answer are dropped: the challenge's script passes a flag where re.sub takes a count


@dataclass(frozen=True)
class Question:
    """A question about a picture, and what the humans answered; no answers in a test split."""

    id: Any
    image: Path
    text: str
    answers: tuple[str, ...]
    kind: str  # "yes/no", "number", "other", "unanswerable"


def normal_form(answer: str) -> str:
    """The challenge's: lower case, without punctuation and articles, numbers up to ten as digits, apostrophes back."""
    plain, has_comma = answer, re.search(r"\d,\d", answer)
    for mark in PUNCTUATION:
        at_an_end = mark + " " in answer or " " + mark in answer
        plain = plain.replace(mark, "" if at_an_end or has_comma else " ")
    plain = re.sub(r"\.(?!\d)", "", plain, count=MOST_PERIODS)
    words = (DIGITS.get(word, word) for word in plain.lower().split())
    return " ".join(NORMAL_WORDS.get(word, word) for word in words if word not in ARTICLES)


def _stripped(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def soft_accuracy(answer: str, humans: Sequence[str]) -> float:
    """min(1, n / 3) of n `humans` whose answer `answer` is, averaged over leaving out each human in turn.

    Raises:
        ValueError: fewer than two humans.
    """
    if len(humans) < 2:
        raise ValueError(
            f"Got {len(humans)} answers to a question; need two or more to leave one out; use a split with answers."
        )
    answer, said = _stripped(answer), [_stripped(one) for one in humans]
    if len(set(said)) > 1:
        answer, said = normal_form(answer), [normal_form(one) for one in said]
    same = [one == answer for one in said]
    return float(np.mean([min(1.0, (sum(same) - own) / 3) for own in same]))


def read_questions(benchmark: str, data: Path, images: Path) -> list[Question]:
    """The questions of a benchmark's own files.

    Args:
        data: VQAv2 and OK-VQA: a folder with one `*questions.json` and one `*annotations.json`, such as
            v2_OpenEnded_mscoco_val2014_questions.json. VizWiz: its val.json.
        images: Folder of the pictures, COCO_val2014_000000000042.jpg or 000000000042.jpg; VizWiz's by their names.

    Raises:
        ValueError: files that are not there, cannot be read or do not belong together; a question without words or
            answers, or with an answer that is no text.
    """
    file = questions_file(benchmark, data)
    with reading(file, f"the questions of {benchmark} as they were published"):
        questions = _vizwiz(file, images) if benchmark == "vizwiz" else _of_coco(file, data, images)
    if bad := [one for one in questions if not isinstance(one.text, str) or not one.text.strip()]:
        raise ValueError(
            f"Got {file} whose question {bad[0].id!r} has the text {bad[0].text!r}; need words; leave it out."
        )
    if bad := [one for one in questions if len(one.answers) < 2]:
        raise ValueError(
            f"Got {file} whose question {bad[0].id!r} has {len(bad[0].answers)} answers; need two or more to leave "
            "one out; use a split with answers."
        )
    if not questions:
        raise ValueError(f"Got {file} without a question; need the questions of {benchmark} as they were published.")
    return questions


def _vizwiz(file: Path, images: Path) -> list[Question]:
    return [
        Question(
            id=row["image"],
            image=images / row["image"],
            text=row["question"],
            answers=_answers(file, row["image"], row.get("answers", ())),
            kind=row.get("answer_type", "other"),
        )
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]


def _of_coco(file: Path, data: Path, images: Path) -> list[Question]:
    asked = json.loads(file.read_text(encoding="utf-8"))
    annotations = _only(data, "*annotations.json")
    with reading(annotations, "the annotations of the same split as they were published"):
        of_question = {
            row["question_id"]: (
                _answers(annotations, row["question_id"], row["answers"]),
                row.get("answer_type", "other"),
            )
            for row in json.loads(annotations.read_text(encoding="utf-8"))["annotations"]
        }
    subtype = asked.get("data_subtype", "val2014")
    questions = []
    for row in asked["questions"]:
        if row["question_id"] not in of_question:
            raise ValueError(
                f"Got question {row['question_id']} without annotation in {data}; need both files of one split."
            )
        answers, kind = of_question[row["question_id"]]
        image = coco_image(images, subtype, row["image_id"])
        questions.append(
            Question(id=row["question_id"], image=image, text=row["question"], answers=answers, kind=kind)
        )
    return questions


def _answers(file: Path, question: Any, rows: Sequence[dict]) -> tuple[str, ...]:
    """What the humans answered to a question.

    Raises:
        ValueError: one of the answers is no text.
    """
    answers = tuple(one["answer"] for one in rows)
    if bad := [one for one in answers if not isinstance(one, str)]:
        raise ValueError(
            f"Got {file} whose question {question!r} has the answer {bad[0]!r}; need a text from every human; leave "
            "the answer or the question out."
        )
    return answers


def coco_image(folder: Path, subtype: str, image_id: int) -> Path:
    """COCO's name of a picture in 2014, or if there is none in 2017.

    Raises:
        ValueError: the number of the picture is none.
    """
    if not isinstance(image_id, int):
        raise ValueError(f"Got --data with picture {image_id!r}; need a whole number, COCO's image_id.")
    old = folder / f"COCO_{subtype}_{image_id:012d}.jpg"
    return old if old.is_file() else folder / f"{image_id:012d}.jpg"


def questions_file(benchmark: str, data: Path | None) -> Path:
    if benchmark == "vizwiz":
        return data if data is not None and data.is_file() else _only(data, "*.json")
    return _only(data, "*questions.json")


def _only(data: Path | None, pattern: str) -> Path:
    """The one file of a folder with such a name."""
    found = [] if data is None else sorted(data.glob(pattern))
    if len(found) != 1:
        raise ValueError(
            f"Got --data {data} with {len(found)} files {pattern}; need the one of the split to score; download the "
            "benchmark's files and give their folder."
        )
    return found[0]


def shown_picture(path: Path) -> Image.Image:
    """A picture of `--images`, whole.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # the latter is how Pillow reports a broken PNG
        raise ValueError(
            f"Got --images with {path}, which is no whole picture ({error}); need all of the split; extract it again."
        ) from error


def ask(pipe: MDMPipeline, pictures: Sequence[Path], texts: Sequence[str | None], cache: ResultCache, options) -> list:
    """What the model says to each picture and text, a batch at a time; what `cache` has is not asked again.

    Raises:
        ValueError: a picture that is not there or cannot be read.
    """
    if missing := [path for path in pictures if not path.is_file()]:
        raise ValueError(
            f"Got --images without {missing[0]} and {len(missing) - 1} more; need all pictures of the split; extract "
            "them there, or lower --limit."
        )
    sampling, seed, size = sampling_of(options, pipe), options.seed[0], options.batch_size
    told = settings_hash({"seed": seed, "size": size, **settings_of(options, pipe)})
    states = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in pictures]
    keys = [f"{told} {i} {state} {text}" for i, (state, text) in enumerate(zip(states, texts, strict=True))]
    pipe.set_progress_bar_config(disable=True)
    for part in batches(len(keys), size, "asking", lambda part: all(keys[i] in cache for i in part)):
        shown = [shown_picture(pictures[i]) for i in part]
        said = None if texts[part[0]] is None else [texts[i] for i in part]
        found = pipe(images=shown, text=said, generate="text", seed=seed + part[0], batch_size=len(part), **sampling)
        cache.put({keys[i]: " ".join(one["text"]) for i, one in zip(part, found, strict=True)})
    return [cache[key] for key in keys]


def run(options) -> dict:
    """The benchmarks "vqav2", "okvqa" and "vizwiz" of the command line."""
    started = time.perf_counter()
    name = options.benchmark
    if options.images is None:
        raise ValueError(f"Got no --images; {name} needs the folder of its pictures.")
    questions = read_questions(name, options.data, options.images)[: options.limit]
    pipe = MDMPipeline.from_pretrained(options.model)
    cache = ResultCache(options.work_dir / f"{name}.jsonl")
    answers = ask(pipe, [one.image for one in questions], [one.text for one in questions], cache, options)
    points = np.array([soft_accuracy(a, one.answers) for a, one in zip(answers, questions, strict=True)])
    kinds = np.array([one.kind for one in questions])
    parts = {"accuracy": points} | {f"accuracy ({kind})": points[kinds == kind] for kind in sorted(set(kinds))}
    settings = {
        "benchmark": name,
        "limit": options.limit,
        "seed": options.seed[0],
        "batch_size": options.batch_size,
        "data": file_hash(questions_file(name, options.data)),
        **settings_of(options, pipe),
    }
    return result(
        {part: float(values.mean()) for part, values in parts.items()},
        {part: bootstrap_interval(values) for part, values in parts.items()},
        settings,
        started,
        num_samples=len(questions),
        answers=[{"id": one.id, "answer": a} for one, a in zip(questions, answers, strict=True)],
    )
