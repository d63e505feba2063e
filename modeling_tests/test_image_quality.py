"""Claims about FID, IS, precision and recall: equal to torchmetrics and to oracles, and named by who judged."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from evaluated import CARD, OF_SETTINGS, evaluate, killed_and_resumed, same_result
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from mdm_hf.evaluation import image_quality
from mdm_hf.evaluation.image_quality import (
    InceptionExtractor,
    as_batch,
    frechet_distance,
    inception_score,
    precision_and_recall,
    score_features,
)
from mdm_hf.evaluation.results import file_hash
from mdm_hf.training.digits import load_digits_split


class Network(torch.nn.Module):
    """A stand-in for the Inception network's file, with its calling convention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.features = torch.nn.Linear(3 * 16, 8)
        self.classes = torch.nn.Linear(8, 5)

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        small = torch.nn.functional.adaptive_avg_pool2d(images.float() / 128 - 1, [4, 4]).flatten(1)
        features = torch.nn.functional.gelu(self.features(small))
        if return_features:
            return features
        logits = features @ self.classes.weight.t()
        return (logits if no_output_bias else logits + self.classes.bias).softmax(1)


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "network.pt"
    torch.jit.script(Network()).save(str(path))
    return path


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6))
    return rng.normal(size=(400, 6)) @ mix, rng.normal(0.3, 1.2, size=(300, 6)) @ mix


def test_the_frechet_distance_is_that_of_torchmetrics_and_of_a_matrix_root(clouds):
    a, b = clouds

    class Given(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)

    judge = FrechetInceptionDistance(Given(), normalize=True, input_img_size=(1, 1, 6)).set_dtype(torch.float64)
    for cloud, is_real in zip(clouds, (True, False), strict=True):
        judge.update(torch.from_numpy(cloud)[:, None, None], real=is_real)
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    truth = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(judge.compute().item(), rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    flat = np.concatenate([a, a[:, :3]], axis=1)  # features that say the same twice
    assert frechet_distance(flat, flat + 1) == pytest.approx(9, rel=1e-6)


def test_the_inception_score_is_that_of_torchmetrics():
    pixels = torch.randint(0, 256, (500, 7, 1, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    class Given(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1).double() / 40

    judge = InceptionScore(Given(), splits=5)
    judge.update(pixels)
    torch.manual_seed(3)
    mean, _ = judge.compute()
    torch.manual_seed(3)
    shuffled = Given()(pixels)[torch.randperm(500)].softmax(1)  # torchmetrics shuffles before it splits
    ours, spread = inception_score(shuffled.numpy(), splits=5)
    assert ours == pytest.approx(mean.item(), rel=1e-6)
    assert spread > 0
    assert inception_score(np.full((50, 4), 0.25))[0] == pytest.approx(1)
    assert inception_score(np.tile(np.eye(4), (25, 1)), splits=1)[0] == pytest.approx(4)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_those_of_an_oracle_that_asks_every_pair(clouds, k):
    real, made = clouds[0][:60], clouds[1][:40]

    def inside(point, manifold):
        for centre in manifold:
            radius = sorted(math.dist(centre, other) for other in manifold)[k]
            if math.dist(point, centre) <= radius:
                return True
        return False

    precision, recall = precision_and_recall(real, made, k)
    assert precision.tolist() == [inside(point, real) for point in made]
    assert recall.tolist() == [inside(point, made) for point in real]
    assert precision_and_recall(real, real, k)[0].all()
    far = precision_and_recall(real, made + 100, k)
    assert not far[0].any()
    assert not far[1].any()
    with pytest.raises(ValueError, match=f"Got 60 real and 1 made pictures; need more than k = {k} of each"):
        precision_and_recall(real, made[:1], k)


def test_intervals_of_distance_and_inception_score_cover_them_as_often_as_they_say():
    def made(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        return rng.normal(0.3, 1.1, (300, 6)), rng.dirichlet(np.full(8, 0.3), 300)

    rng = np.random.default_rng(0)
    real = rng.normal(size=(400, 6)), rng.dirichlet(np.ones(8), 400)
    found = [score_features(real, made(seed), "distance") for seed in range(1, 81)]
    for name in ("distance", "inception_score"):
        values = np.array([scores[name] for scores, _ in found])
        ends = np.array([intervals[name] for _, intervals in found])
        assert ((ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])).mean() > 0.91, name
        assert 1.9 < np.diff(ends).mean() / 2 / values.std() < 2.8, name


def test_an_extractor_gives_features_and_classes_and_is_known_by_its_file(inception):
    images, _ = load_digits_split("train")
    extractor = InceptionExtractor(inception)
    features, classes = extractor(as_batch(images[:5]))
    assert features.shape == (5, 8)
    np.testing.assert_allclose(classes.sum(1), 1, atol=1e-6)
    assert extractor.id == file_hash(inception)
    assert not extractor.is_inception
    with pytest.raises(ValueError, match=r"Got no Inception network \(None\); need its TorchScript file"):
        InceptionExtractor(None)
    with pytest.raises(ValueError, match="which torch.jit cannot load .*; need a TorchScript file"):
        InceptionExtractor(CARD / "config.json")
    with pytest.raises(ValueError, match=r"Got pictures of sizes \[\(4, 4\), \(8, 8\)\]; need one size"):
        as_batch([images[0], images[0].resize((4, 4))])


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for i, image in enumerate(load_digits_split("heldout")[0][:20]):
        image.save(folder / f"{i:03d}.png")
    return folder


class Other(torch.nn.Module):
    def forward(self, images: torch.Tensor):
        return images


class Broken(torch.nn.Module):
    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        return images.float().flatten(1) / 0


@pytest.mark.parametrize(("network", "why"), [(Other, "which cannot be called"), (Broken, "or are not finite")])
def test_another_kind_of_network_is_refused_by_name(network, why, tmp_path):
    path = tmp_path / "network.pt"
    torch.jit.script(network()).save(str(path))
    with pytest.raises(ValueError, match=rf"Got --inception {path}.*{why}.*need a network that is called like"):
        InceptionExtractor(path)(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))


def test_only_the_known_networks_distance_is_called_fid(inception, real, tmp_path, monkeypatch):
    given = "--images", str(real), "--inception", str(inception), "--limit", "20", "--batch-size", "10"
    other = evaluate(tmp_path, "fid", *given)
    assert set(other["scores"]) == {"frechet_distance_of_another_extractor", "inception_score", "precision", "recall"}
    assert other["settings"]["extractor"] == file_hash(inception)
    assert (other["settings"]["num_real"], other["num_samples"]) == (20, 20)
    monkeypatch.setitem(image_quality.KNOWN_EXTRACTORS, file_hash(inception), "inception-2015-12-05")
    assert "fid" in (found := evaluate(tmp_path, "fid", *given))["scores"]
    assert set(found["settings"]) >= OF_SETTINGS
    assert set(found["intervals"]) == set(found["scores"]) - {"recall"}
    low, high = found["intervals"]["fid"]
    assert low < found["scores"]["fid"] < high


def test_a_killed_run_of_fid_ends_as_a_whole_one(inception, real, tmp_path, monkeypatch):
    given = "--images", str(real), "--inception", str(inception), "--limit", "8", "--batch-size", "4"
    whole = evaluate(tmp_path / "whole", "fid", *given)
    again = killed_and_resumed(monkeypatch, tmp_path / "killed", 2, "fid", *given)
    assert same_result(whole, again)


def test_pictures_of_prompts_are_drawn_from_a_text_file(inception, real, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten three\n\na handwritten four\n")
    given = "--images", str(real), "--inception", str(inception), "--limit", "6", "--data", str(prompts)
    found = evaluate(tmp_path, "fid", *given)
    assert found["settings"]["data"] == file_hash(prompts)
    assert json.dumps(found)


def test_a_file_without_prompts_is_refused_and_not_taken_for_classes(inception, real, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n \n")
    given = "--images", str(real), "--inception", str(inception), "--limit", "6", "--data", str(prompts)
    evaluate(tmp_path, "fid", *given, status=2)
    assert "prompts.txt without a prompt; need one a line" in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(inception, tmp_path, capsys):
    evaluate(tmp_path, "fid", "--inception", str(inception), "--images", str(tmp_path), status=2)
    assert "without a picture; need the folder of the real ones" in capsys.readouterr().err
