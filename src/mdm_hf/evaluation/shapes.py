"""Scores of a model on the shapes world, in the shape of the paper's tables.

| paper | here |
|---|---|
| ImageNet: FID, IS, precision, recall (Table 1) | class to image: the same statistics by our own small classifier |
| COCO: GenEval (Table 1) | text to image by GenEval's categories: all that is named, and nothing else |
| Flickr30K, COCO: CIDEr (Table 2) | captions: CIDEr, and whether the whole scene is told right |
| VQAv2, VizWiz, OKVQA (Table 2) | answers to eight sorts of question |
| HellaSwag ... (Table 2) | riddles without a picture: the likeliest of four answers, and the answer written out |
| image and text at once (Fig. 3-4) | whether a picture and the caption made with it agree |

Anything called like an MDMPipeline can be scored; what has no `score` has no likeliest answer.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import numpy as np
from PIL import Image

from ..choice_scores import score_choices
from ..pipeline_mdm import MDMPipeline
from .captioning import cider
from .image_quality import distance_interval, frechet_distance, inception_score, precision_and_recall
from .pictures import picture_grid
from .results import SAMPLING, bootstrap_interval, result
from .shapes_classifier import FEATURES, ShapesClassifier
from .shapes_judge import agree, describes, read_pictures, read_text, same_answer
from .shapes_world import CLASSES, PROMPTS, SPLITS, caption, prompts, questions, render, riddle, scene_of


TASKS = ("class_to_image", "text_to_image", "image_to_text", "question_answering", "text_only", "image_and_text")
VERSION = 2  # of what is asked and how it is judged: scores of one do not compare with those of another
BATCH = 64
FLOOR_SETS = 8  # of training pictures, whose distances to real ones are what a perfect model would have
SCORE_SAMPLES = 8  # draws of an answer's likelihood


class ShapesBenchmark:
    """One model on the six tasks.

    Args:
        pipe: Called like [`MDMPipeline`].
        num_samples: Samples a task, and a category of text to image.
        sampling: `num_inference_steps`, `guidance_scale`, ...; what is None or left out is the model's default.
        seed: Of the samples, and of what is said of a scene.
        split: "test", or "validation" to choose settings by.
    """

    def __init__(self, pipe, num_samples: int = 200, sampling: dict | None = None, seed: int = 0, split: str = "test"):
        if num_samples <= FEATURES:
            raise ValueError(
                f"Got num_samples {num_samples}; need more than {FEATURES}, the features that the Frechet distance is "
                "over."
            )
        self.pipe, self.num_samples, self.seed, self.split = pipe, num_samples, seed, split
        self.sampling = {name: value for name, value in (sampling or {}).items() if value is not None}
        self.scores: dict[str, float] = {}
        self.intervals: dict[str, list[float]] = {}
        self.examples: dict[str, list[tuple[Image.Image | None, str, bool]]] = {}

    def run(self, tasks: Sequence[str] = TASKS) -> dict:
        """The result of `tasks`; `examples` then has the first of each task: picture, text, whether it is right."""
        if unknown := sorted(set(tasks) - set(TASKS)):
            raise ValueError(f"Got tasks {', '.join(unknown)}; need some of {', '.join(TASKS)}.")
        started = time.perf_counter()
        for task in tasks:
            getattr(self, task)()
        defaults = getattr(getattr(self.pipe, "model", None), "generation_config", None)
        names = ("num_inference_steps", *SAMPLING, "modality_lag")
        settings = {
            "benchmark": "shapes",
            "benchmark_version": VERSION,
            "split": self.split,
            "tasks": list(tasks),
            "num_samples": self.num_samples,
        }
        settings |= {name: getattr(defaults, name, None) for name in names} | self.sampling | {"seed": self.seed}
        settings["solver"] = _solver(getattr(self.pipe, "scheduler", None))
        return result(self.scores, self.intervals, settings, started, num_samples=self.num_samples)

    def class_to_image(self) -> None:
        """Pictures of the 24 classes in turn; the real ones are scenes of this split as they are with one class."""
        labels = np.arange(self.num_samples) % len(CLASSES)
        images = [r["images"][0] for r in self._sample("class_to_image", class_ids=labels.tolist(), generate="image")]
        read = read_pictures(images)
        fits = [
            bool(shapes) and {f"{s.colour} {s.kind}" for s in shapes} == {CLASSES[label]}
            for shapes, label in zip(read, labels, strict=True)
        ]
        self._share("class_to_image", fits)
        self._show("class_to_image", images, [CLASSES[label] for label in labels], fits)
        real = [render(scene) for scene, _ in self._scenes(1000, likeness=0.0)]
        training = [render(scene_of("classes", i)[0]) for i in range(FLOOR_SETS * self.num_samples)]
        classifier = ShapesClassifier.from_pretrained()
        (of_real, real_classes), (of_made, classes), (floor, _) = map(classifier.of_pictures, (real, images, training))
        floors = [frechet_distance(some, of_real) for some in np.split(floor, FLOOR_SETS)]
        inside, covered = precision_and_recall(of_real, of_made)
        self.scores |= {
            "shapes_frechet_distance": frechet_distance(of_made, of_real),
            "shapes_frechet_distance_of_training_images": float(np.mean(floors)),
            "shapes_classifier_score": inception_score(classes, splits=1)[0],
            "shapes_classifier_score_of_real_images": inception_score(real_classes, splits=1)[0],
        }
        self.intervals["shapes_classifier_score"] = bootstrap_interval(
            classes, lambda p: inception_score(p, 1)[0], 200, is_biased=True
        )
        self.intervals["shapes_frechet_distance"] = distance_interval(of_made, of_real)
        self.intervals["shapes_frechet_distance_of_training_images"] = [min(floors), max(floors)]
        self._share("shapes_precision", inside)
        self.scores["shapes_recall"] = float(covered.mean())  # made pictures drawn twice are their own neighbours

    def text_to_image(self) -> None:
        """Every category of `PROMPTS`, and whole captions, which are not part of the mean."""
        said: dict[str, list[str]] = {category: [] for category in (*PROMPTS, "description")}
        for scene, rng in self._scenes():
            possible = prompts(scene, rng) | {"description": caption(scene, rng)}
            for category, text in possible.items():
                if len(said[category]) < self.num_samples:
                    said[category].append(text)
            if all(len(texts) == self.num_samples for texts in said.values()):
                break
        texts = [text for category in said for text in said[category]]
        images = [r["images"][0] for r in self._sample("text_to_image", text=texts, generate="image")]
        right = [agree(read_text(t), s) for t, s in zip(texts, read_pictures(images), strict=True)]
        for i, category in enumerate(said):
            part = slice(i * self.num_samples, (i + 1) * self.num_samples)
            name = f"text_to_image_{category.replace(' ', '_')}"
            self._share(name, right[part])
            self._show(name, images[part], texts[part], right[part])
        by_category = np.array(right[: len(PROMPTS) * self.num_samples]).reshape(len(PROMPTS), -1).T
        self._share("text_to_image", by_category)

    def image_to_text(self) -> None:
        """Captions of pictures: the share that is right, their parts, and CIDEr."""
        scenes = [next_one for next_one, _ in self._scenes(self.num_samples)]
        images = [render(scene) for scene in scenes]
        written = [r["text"][0] for r in self._sample("image_to_text", images=images, generate="text")]
        right = [describes(read_text(t), scene.shapes) for t, scene in zip(written, scenes, strict=True)]
        self._share("image_to_text", right)
        self._show("image_to_text", images, written, right)
        rng = np.random.default_rng((SPLITS[self.split], self.seed))
        references = [[caption(scene, rng) for _ in range(5)] for scene in scenes]
        each, _ = cider(written, references, with_java=False)
        self.scores["image_to_text_cider"] = float(each.mean())
        self.intervals["image_to_text_cider"] = bootstrap_interval(each)
        of_true, _ = cider([caption(scene, rng) for scene in scenes], references, with_java=False)
        self.scores["image_to_text_cider_of_true_captions"] = float(of_true.mean())

    def question_answering(self) -> None:
        """One question of a scene, the sorts in turn. Beside it what the commonest answer to each sort would get."""
        asked: list[tuple[str, str, str, Image.Image]] = []
        count: dict[str, int] = defaultdict(int)
        for scene, rng in self._scenes(self.num_samples):
            possible = questions(scene, rng)
            sort = min(possible, key=lambda name: (count[name], name))
            count[sort] += 1
            asked.append((sort, *possible[sort], render(scene)))
        sorts, texts, answers, images = (list(column) for column in zip(*asked, strict=True))
        written = [
            r["text"][0] for r in self._sample("question_answering", images=images, text=texts, generate="text")
        ]
        right = [same_answer(w, a) for w, a in zip(written, answers, strict=True)]
        self._share("question_answering", right)
        shown = [f"{question} {said}" for question, said in zip(texts, written, strict=True)]
        self._show("question_answering", images, shown, right)
        guessed = 0
        for sort in count:
            of_sort = [i for i, one in enumerate(sorts) if one == sort]
            self._share(f"question_answering_{sort.replace(' ', '_')}", [right[i] for i in of_sort])
            here = [answers[i] for i in of_sort]
            guessed += max(map(here.count, here))
        self.scores["question_answering_by_commonest_answer"] = guessed / len(asked)

    def text_only(self) -> None:
        """Riddles in words: which of four answers `score` finds likeliest, and what is written out. Beside it what
        those get who choose among the answers that are told of and not asked about."""
        rng = np.random.default_rng((SPLITS[self.split], self.seed, 1))
        riddles = [riddle(rng) for _ in range(self.num_samples)]
        asked = [question for question, _, _ in riddles]
        written = [r["text"][0] for r in self._sample("text_only", text=asked, generate="text")]
        right = [same_answer(w, answer) for w, (_, answer, _) in zip(written, riddles, strict=True)]
        self._share("text_only_written", right)
        shown = [f"{question} {said}" for question, said in zip(asked, written, strict=True)]
        self._show("text_only_written", [None] * len(shown), shown, right)
        guessed = [_by_elimination(question, choices, answer) for question, answer, choices in riddles]
        self.scores["text_only_by_elimination"] = float(np.mean(guessed))
        model = getattr(self.pipe, "model", None)
        if hasattr(model, "score"):
            messages = [[{"role": "user", "content": question}] for question in asked]
            scored = score_choices(
                model, self.pipe.processor, messages, [c for _, _, c in riddles], SCORE_SAMPLES, self.seed
            )
            best = [some.choices[some.best] == answer for some, (_, answer, _) in zip(scored, riddles, strict=True)]
            self._share("text_only", best)

    def image_and_text(self) -> None:
        """Pictures and captions made of nothing: whether they agree; whether they do, and no pair before had the same
        shapes in the same places; and whether a picture has shapes, all of them whole."""
        made = self._sample("image_and_text", text=[None] * self.num_samples, generate=("image", "text"))
        images, written = [r["images"][0] for r in made], [r["text"][0] for r in made]
        read = read_pictures(images)
        right = [describes(read_text(t), s) for t, s in zip(written, read, strict=True)]
        self._share("image_and_text", right)
        layouts = [
            frozenset((s.kind, s.colour, s.place) for s in shapes) if agrees and shapes else None
            for shapes, agrees in zip(read, right, strict=True)
        ]
        self._share(
            "image_and_text_distinct", [one is not None and one not in layouts[:i] for i, one in enumerate(layouts)]
        )
        self._show("image_and_text", images, written, right)
        self._share("image_and_text_pictures_read", [bool(shapes) for shapes in read])

    def _scenes(self, number: int | None = None, likeness: float | None = None) -> Iterator[tuple]:
        """Scenes of the split, from a place that the seed says, with a generator each."""
        for i in itertools.islice(itertools.count(1_000_000 * self.seed), number):
            yield scene_of(self.split, i, likeness)

    def _sample(self, task: str, **conditions: Any) -> list[dict]:
        seed = (self.seed * len(TASKS) + TASKS.index(task)) * 1_000_000
        return self.pipe(**conditions, **self.sampling, seed=seed, batch_size=BATCH)

    def _share(self, name: str, values: Sequence | np.ndarray) -> None:
        self.scores[name] = float(np.mean(values))
        self.intervals[name] = bootstrap_interval(values)

    def _show(self, name: str, images: Sequence, texts: Sequence[str], right: Sequence[bool]) -> None:
        self.examples[name] = list(zip(images, texts, right, strict=True))[:16]


def _by_elimination(riddle: str, choices: list[str], answer: str) -> float:
    """The chance of `answer` for one who knows that what a riddle tells of is likelier than what it does not, and that
    what it asks about is not the answer."""
    told, _, question = riddle.rpartition(". ")
    likely = [c for c in choices if c in told and c not in question] or [c for c in choices if c in told] or choices
    return (answer in likely) / len(likely)


def _solver(scheduler: Any) -> str | None:
    """The name of a solver of diffusers, and its order where it has a choice."""
    if scheduler is None:
        return None
    has_order = "solver_order" in signature(type(scheduler)).parameters
    return type(scheduler).__name__ + (f", order {scheduler.config.solver_order}" if has_order else "")


def examples_sheet(examples: dict[str, list[tuple[Image.Image | None, str, bool]]], columns: int = 8) -> Image.Image:
    """The first of each task that made or saw pictures: one row each, with what was asked or said and "+" if right."""
    shown = {name: rows[:columns] for name, rows in examples.items() if rows[0][0] is not None}
    cells = [(image, f"{'+' if right else '-'} {text}") for rows in shown.values() for image, text, right in rows]
    names = {row: name.replace("_", " ") for row, name in enumerate(shown)}
    return picture_grid(cells, columns, caption_lines=5, headings=names)


def run(options) -> dict:
    """The benchmark "shapes" of the command line."""
    pipe = MDMPipeline.from_pretrained(options.model)
    sampling = {"num_inference_steps": options.steps} | {name: getattr(options, name) for name in SAMPLING}
    benchmark = ShapesBenchmark(pipe, options.num_samples, sampling, options.seed[0], options.split)
    return benchmark.run(options.tasks or TASKS)
