"""FID, Inception Score, precision and recall of pictures, by a local Inception network.

- The network is a TorchScript file, given by its path; nothing is downloaded, and torchvision is not needed.
  StyleGAN's `inception-2015-12-05.pt` is TensorFlow's of 2015, with which FIDs are comparable: called with (images in
  0..255, return_features=True) it gives 2,048 features, with no_output_bias=True class probabilities.
- Which network a distance is by is told by the hash of its file. Only the known one's is called FID: another extractor
  gives a Frechet distance of another scale.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import t
from torch import Tensor

from ..pipeline_mdm import MDMPipeline
from .results import batches, bootstrap_interval, file_hash, result, sampling_of, settings_hash, settings_of
from .visual_questions import shown_picture


# The first 16 digits of the SHA-256 of the file: the name its distances may bear.
KNOWN_EXTRACTORS = {"f58cb9b6ec323ed6": "inception-2015-12-05"}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class InceptionExtractor:
    """Features and class probabilities of pictures, by a TorchScript network.

    Args:
        path: Its file.
        device: Where it runs.

    Raises:
        ValueError: the file is not there, or no TorchScript.
    """

    def __init__(self, path: Path | None, device: str | torch.device = "cpu"):
        if path is None or not path.is_file():
            raise ValueError(
                f"Got no Inception network ({path}); need its TorchScript file, which is not shipped; download "
                "StyleGAN3's inception-2015-12-05.pt and give its path as --inception."
            )
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(
                f"Got {path}, which torch.jit cannot load ({str(error).splitlines()[0]}); need a TorchScript file, "
                "such as StyleGAN3's inception-2015-12-05.pt."
            ) from error
        self.id, self.device, self.path = file_hash(path), device, path
        self.is_inception = self.id in KNOWN_EXTRACTORS

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images (n, 3, h, w) -> features (n, d), class probabilities (n, c), both float64.

        Raises:
            ValueError: the network is not called like StyleGAN3's, or gives something else.
        """
        images = images.to(self.device)
        remedy = "need a network that is called like StyleGAN3's inception-2015-12-05.pt, and gives what it does"
        try:
            features = self.network(images, return_features=True)
            classes = self.network(images, no_output_bias=True)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1]
            raise ValueError(f"Got --inception {self.path}, which cannot be called ({why}); {remedy}.") from error
        for name, found in (("features", features), ("class probabilities", classes)):
            if found.ndim != 2 or len(found) != len(images) or not found.isfinite().all():
                raise ValueError(
                    f"Got --inception {self.path}, whose {name} of {len(images)} pictures have the shape "
                    f"{tuple(found.shape)} or are not finite; {remedy}."
                )
        return features.double().cpu().numpy(), classes.double().cpu().numpy()


def as_batch(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size -> uint8 (n, 3, h, w).

    Raises:
        ValueError: they are of different sizes.
    """
    if len(sizes := {image.size for image in images}) > 1:
        raise ValueError(
            f"Got pictures of sizes {sorted(sizes)}; need one size; crop and resize them as the paper did."
        )
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of features `a` and `b` (n, d) (Heusel et al. 2017).

    The root's trace is the sum of the roots of the eigenvalues of C_a^1/2 C_b C_a^1/2, which is symmetric.
    """
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    of_product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b) - 2 * np.sqrt(of_product).sum())


def inception_score(probabilities: np.ndarray, splits: int = 10) -> tuple[float, float]:
    """exp(mean KL(p(y | x) || p(y))) of `probabilities`: mean, deviation over `splits` parts (Salimans, 2016)."""
    scores = []
    for part in np.array_split(probabilities, min(splits, len(probabilities))):
        log_ratio = np.log(part.clip(min=1e-30)) - np.log(part.mean(0, keepdims=True).clip(min=1e-30))
        scores.append(np.exp((part * log_ratio).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_and_recall(real: np.ndarray, made: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Kynkaanniemi et al. 2019: which of the made pictures (m,) lie in the real ones' manifold, the union of the balls
    around each that reach its k-th neighbour, and which real ones (n,) in that of the made ones.

    Raises:
        ValueError: fewer than k + 1 of either.
    """
    if min(len(real), len(made)) <= k:
        raise ValueError(f"Got {len(real)} real and {len(made)} made pictures; need more than k = {k} of each.")
    return _inside(made, real, k), _inside(real, made, k)


def _inside(points: np.ndarray, manifold: np.ndarray, k: int) -> np.ndarray:
    rows = torch.from_numpy(manifold)
    radius = torch.cat([_distances(part, rows).kthvalue(k + 1, dim=1).values for part in rows.split(1024)])
    parts = torch.from_numpy(points).split(1024)
    return torch.cat([(_distances(part, rows) <= radius).any(1) for part in parts]).numpy()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")  # a point is at 0 from itself


def distance_interval(made: np.ndarray, real: np.ndarray, draws: int = 20) -> list[float]:
    """95% interval of the Frechet distance of features (n, d) over the made ones.

    A distance's bootstrap is biased, as drawing twice narrows a cloud, and its draws are few: the interval is the
    distance and, to both sides, the deviation of the draws times Student's quantile for so many."""
    distance, rng = frechet_distance(made, real), np.random.default_rng(0)
    drawn = [frechet_distance(made[rng.integers(len(made), size=len(made))], real) for _ in range(draws)]
    spread = t.ppf(0.975, draws - 1) * float(np.std(drawn, ddof=1))
    return [distance - spread, distance + spread]


def score_features(real: tuple, made: tuple, name: str, splits: int = 10, draws: int = 20) -> tuple[dict, dict]:
    """All four scores of (features, probabilities) of real and of made pictures, and 95% intervals over the made ones.

    That of the Inception Score is by its parts, as a distance's is by its draws. Recall has none. It asks which real
    pictures lie near made ones, so that what varies is the set of made ones: one drawn twice would be its own
    neighbour, and shrink the manifold that is asked about. Over the real ones alone the bootstrap covers too seldom:
    in 80% of 200 draws of 300 Gaussian points beside 400, in six dimensions, not in 95%."""
    inside, covered = precision_and_recall(real[0], made[0])
    score, spread = inception_score(made[1], splits)
    parts = min(splits, len(made[1]))
    of_score = t.ppf(0.975, max(parts - 1, 1)) * spread / max(parts - 1, 1) ** 0.5
    scores = {
        name: frechet_distance(made[0], real[0]),
        "inception_score": score,
        "precision": inside.mean(),
        "recall": covered.mean(),
    }
    scores = {one: float(value) for one, value in scores.items()}
    intervals = {
        name: distance_interval(made[0], real[0], draws),
        "inception_score": [score - of_score, score + of_score],
        "precision": bootstrap_interval(inside),
    }
    return scores, intervals


def run(options) -> dict:
    """The benchmark "fid": `--images` are the real pictures, `--limit` or 50,000 are drawn of the model's classes in
    turn, or, with `--data`, of the prompts in a text file, one a line."""
    started = time.perf_counter()
    pipe = MDMPipeline.from_pretrained(options.model)
    pipe.set_progress_bar_config(disable=True)
    extractor = InceptionExtractor(options.inception, pipe.model.device)
    paths = pictures_in(options.images)
    prompts = None if options.data is None else options.data.read_text(encoding="utf-8").split("\n")
    prompts = prompts and [line.strip() for line in prompts if line.strip()]
    if prompts == []:
        raise ValueError(f"Got --data {options.data} without a prompt; need one a line; leave it out for the classes.")
    if prompts is None and not pipe.model.config.num_classes:
        raise ValueError(
            f"Got no --data for {options.model}, which has no classes; need a text file, a prompt a line."
        )
    count, sampling, seed = options.limit or 50_000, sampling_of(options, pipe), options.seed[0]
    settings = {"benchmark": "fid", "seed": seed, "classes": pipe.model.config.num_classes}
    settings |= settings_of(options, pipe) | {"data": None if prompts is None else file_hash(options.data)}
    folder = options.work_dir / "fid" / settings_hash(settings)

    def draw(part: range) -> list[Image.Image]:
        conditions: dict = {"text": [prompts[i % len(prompts)] for i in part]} if prompts else {}
        conditions = conditions or {"class_ids": [i % pipe.model.config.num_classes for i in part]}
        results = pipe(**conditions, **sampling, generate="image", seed=seed + part[0], batch_size=len(part))
        return [one["images"][0] for one in results]

    size = options.batch_size
    made = features_of(extractor, count, size, "drawing", folder / "made", draw)
    real = features_of(
        extractor,
        len(paths),
        size,
        "reading",
        options.work_dir / "fid" / settings_hash({"images": [[str(p), p.stat().st_mtime_ns] for p in paths]}),
        lambda part: [shown_picture(paths[i]) for i in part],
    )
    name = "fid" if extractor.is_inception else "frechet_distance_of_another_extractor"
    scores, intervals = score_features(real, made, name)
    settings |= {"extractor": extractor.id, "num_real": len(paths), "num_made": count}
    return result(scores, intervals, settings, started, num_samples=count)


def pictures_in(folder: Path | None) -> list[Path]:
    """The pictures of a folder and those below it, by name.

    Raises:
        ValueError: there are none.
    """
    paths = [] if folder is None else sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
    if not paths:
        raise ValueError(f"Got --images {folder} without a picture; need the folder of the real ones, {PICTURES}.")
    return paths


def features_of(extractor: InceptionExtractor, count: int, size: int, name: str, folder: Path, pictures) -> tuple:
    """Features and probabilities of `count` pictures, kept in `folder`, a file a batch; a killed run reads them."""
    folder = folder / extractor.id

    def file(part: range) -> Path:
        return folder / f"{part[0]:07d}-{part[-1]:07d}.npz"

    folder.mkdir(parents=True, exist_ok=True)
    for part in batches(count, size, name, lambda part: file(part).is_file()):
        features, classes = extractor(as_batch(pictures(part)))
        unfinished = file(part).with_suffix(".part")
        with open(unfinished, "wb") as target:
            np.savez(target, features=features, classes=classes)
        unfinished.replace(file(part))
    parts = []
    for start in range(0, count, size):
        with np.load(file(range(start, min(start + size, count)))) as kept:
            parts.append((kept["features"], kept["classes"]))
    features, classes = (np.concatenate(column) for column in zip(*parts, strict=True))
    return features, classes
