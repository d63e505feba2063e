"""Scores of mdm-digits, judged by a classifier that the model never saw.

The judge is an RBF support vector machine trained on the training digits' pixels. Image i is held out if i % 6 == 5;
neither the model nor the judge is trained on those.
"""

import time
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from ..pipeline_mdm import MDMPipeline
from ..training.digits import caption, digit_named_in, is_well_formed, load_digits_split, question_and_answer
from .results import settings_hash


class DigitJudge:
    """Names the digit in an 8x8 picture."""

    def __init__(self):
        images, labels = load_digits_split("train")
        self.classifier = SVC(C=1.0, gamma="scale").fit(as_pixels(images), labels)

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """The digits (n,) of n `images`."""
        return self.classifier.predict(as_pixels(images))

    def accuracy(self) -> float:
        """Share of the held-out digits that the judge names right."""
        images, labels = load_digits_split("heldout")
        return float((self(images) == labels).mean())


def as_pixels(images: list[Image.Image]) -> np.ndarray:
    """Grey 8x8 images -> (n, 64) in [0, 16], the data set's own scale."""
    return (
        np.stack([np.asarray(image.convert("L").resize((8, 8)), dtype=np.float64).ravel() for image in images])
        / 255
        * 16
    )


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians fitted to pixel vectors (n, 64) in [0, 16], on the scale [-1, 1]."""
    a, b = a / 8 - 1, b / 8 - 1
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real.clip(min=0)  # of the product; tr sqrt is their roots' sum
    trace_of_root = np.sqrt(eigenvalues).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * trace_of_root)


def evaluate_digits(
    pipe,
    num_samples: int = 500,
    num_inference_steps: int = 20,
    guidance_scale: float | None = None,
    text_guidance_scale: float | None = None,
    guidance_interval: Sequence[float] | None = None,
    text_temperature: float | None = None,
    text_selection_tolerance: float | None = None,
    seed: int = 0,
) -> dict:
    """Runs the six tasks and scores them.

    Args:
        pipe: [`MDMPipeline`] of a model trained on the digits.
        num_samples: Samples per task.
        num_inference_steps: Solver steps of each.
        guidance_scale, text_guidance_scale, guidance_interval, text_temperature, text_selection_tolerance: The model's
            defaults if None.
        seed: Of samples, captions and questions; no two seeds share a sample.

    Returns:
        A dict of scores in [0, 1], two Frechet distances, and the settings with their hash.
    """
    if num_samples < 65:
        raise ValueError(f"`num_samples` is {num_samples}; the Frechet distance over 64 pixels needs at least 65.")
    rng = np.random.default_rng(seed)
    judge = DigitJudge()
    held_images, held_labels = load_digits_split("heldout")
    train_images, _ = load_digits_split("train")
    labels = np.arange(num_samples) % 10
    which = np.arange(num_samples) % len(held_images)
    held = [held_images[i] for i in which]
    held_digits = np.asarray(held_labels)[which]
    settings = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "text_guidance_scale": text_guidance_scale,
        "guidance_interval": guidance_interval,
        "text_temperature": text_temperature,
        "text_selection_tolerance": text_selection_tolerance,
    }
    started = time.perf_counter()

    def sample(offset: int, **conditions) -> list[dict]:
        return pipe(**conditions, **settings, seed=(6 * seed + offset) * num_samples, batch_size=100)

    def share(values) -> float:
        return round(float(np.mean(list(values))), 4)

    by_class = [r["images"][0] for r in sample(0, class_ids=labels.tolist(), generate="image")]
    by_text = [r["images"][0] for r in sample(1, text=[caption(int(d), rng) for d in labels], generate="image")]
    captions = [r["text"][0] for r in sample(2, images=held, generate="text")]
    pairs = [question_and_answer(int(d), rng) for d in held_digits]
    answers = [r["text"][0] for r in sample(3, images=held, text=[q for q, _ in pairs], generate="text")]
    both = sample(4, text=[None] * num_samples, generate=("image", "text"))
    joint_digits = judge([r["images"][0] for r in both])
    joint_captions = [r["text"][0] for r in both]

    texts = [None if i % 2 else caption(int(d), rng) for i, d in enumerate(labels)]
    classes = [int(d) if i % 2 else None for i, d in enumerate(labels)]
    prompted = sample(5, text=texts, class_ids=classes, generate=("image", "text"))
    drawn, written = judge([r["images"][0] for r in prompted]), [digit_named_in(r["text"][0]) for r in prompted]

    held_pixels = as_pixels(held_images)
    distance, floor = (
        frechet_distance(as_pixels(by_class), held_pixels),
        frechet_distance(as_pixels(train_images), held_pixels),
    )
    scores = {
        "judge_accuracy": round(judge.accuracy(), 4),
        "class_to_image": share(judge(by_class) == labels),
        "text_to_image": share(judge(by_text) == labels),
        "image_to_text": share(digit_named_in(c) == d for c, d in zip(captions, held_digits, strict=True)),
        "question_answering": share(a == right for a, (_, right) in zip(answers, pairs, strict=True)),
        "image_and_text_agree": share(
            digit_named_in(c) == d for c, d in zip(joint_captions, joint_digits, strict=True)
        ),
        "prompt_to_image_and_text": share(
            d == image and d == text for d, image, text in zip(labels, drawn, written, strict=True)
        ),
        "captions_well_formed": share(is_well_formed(c) for c in captions + joint_captions),
        "captions_well_formed_joint_alone": share(is_well_formed(c) for c in joint_captions),
        "pixel_frechet_distance": round(distance, 4),
        "pixel_frechet_distance_of_training_images": round(floor, 4),
        "pixel_frechet_ratio": round(distance / floor, 3),
    }
    if getattr(getattr(pipe, "model", None), "modality_gate", None) is not None:
        kinds: list[tuple[dict, tuple[str, ...]]] = [
            ({"class_ids": labels.tolist()}, ("image",)),
            ({"text": [caption(int(d), rng) for d in labels]}, ("image",)),
            ({"images": held}, ("text",)),
            ({"images": held, "text": [question for question, _ in pairs]}, ("text",)),
            ({"text": [None]}, ("image", "text")),
        ]
        decided = [(one, right) for given, right in kinds for one in pipe.predict_modalities(**given)]
        scores["modalities_decided"] = share(one == right for one, right in decided)
    if hasattr(pipe, "model"):
        defaults = pipe.model.generation_config
        settings = {k: getattr(defaults, k) if v is None else v for k, v in settings.items()}
    settings |= {"num_samples": num_samples, "seed": seed}
    return {
        "scores": scores,
        "settings": settings | {"hash": settings_hash(settings)},
        "seconds": round(time.perf_counter() - started, 1),
    }


def over_seeds(results: list[dict]) -> dict:
    """The results of several seeds as one: mean, lowest and highest of every score."""
    scores = {name: [result["scores"][name] for result in results] for name in results[0]["scores"]}
    settings = results[0]["settings"] | {"seed": [result["settings"]["seed"] for result in results]}
    del settings["hash"]
    return {
        "scores": {name: round(float(np.mean(values)), 4) for name, values in scores.items()},
        "lowest": {name: min(values) for name, values in scores.items()},
        "highest": {name: max(values) for name, values in scores.items()},
        "settings": settings | {"hash": settings_hash(settings)},
        "seconds": round(sum(result["seconds"] for result in results), 1),
    }


def run(options) -> dict:
    """The benchmark "digits" of the command line."""
    pipe = MDMPipeline.from_pretrained(options.model)
    steps = pipe.model.generation_config.num_inference_steps if options.steps is None else options.steps
    results = [
        evaluate_digits(
            pipe,
            num_samples=options.num_samples,
            num_inference_steps=steps,
            guidance_scale=options.guidance_scale,
            text_guidance_scale=options.text_guidance_scale,
            guidance_interval=options.guidance_interval,
            text_temperature=options.text_temperature,
            text_selection_tolerance=options.text_selection_tolerance,
            seed=seed,
        )
        for seed in options.seed
    ]
    return results[0] if len(results) == 1 else over_seeds(results)
