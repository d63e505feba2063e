"""A small classifier of the shapes world, whose features and classes the distances between sets of pictures are by.

It stands where Inception stands in FID, Inception Score, precision and recall, and is no substitute: what it gives is
called by its name, and compares with nothing but itself. Its weights ship beside this file; to make them anew:

    python -m mdm_hf.evaluation.shapes_classifier
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange

from .shapes_world import CLASSES, COLOURS, KINDS, SIZE, Scene, render, scene_of


WEIGHTS = Path(__file__).with_suffix(".safetensors")
FEATURES = 64
QUARTER = len(KINDS) + len(COLOURS) + 2  # logits of a quarter: its kind or none, its colour or none


class ShapesClassifier(nn.Module):
    """Pictures -> 64 features, the class (the last one is "mixed"), kind and colour in every quarter."""

    def __init__(self):
        super().__init__()
        sizes = (3, 24, 48, 64)
        self.convolutions = nn.Sequential(
            *(
                m
                for a, b in zip(sizes, sizes[1:], strict=False)
                for m in (nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.ReLU())
            )
        )
        self.features = nn.Linear(sizes[-1] * (SIZE // 8) ** 2, FEATURES)
        self.classes = nn.Linear(FEATURES, len(CLASSES) + 1)
        self.quarters = nn.Linear(FEATURES, 4 * QUARTER)
        self.register_buffer("mean", torch.zeros(FEATURES))  # of the features over training scenes,
        self.register_buffer("scale", torch.ones(FEATURES))  # and one over their standard deviation

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(n, 3, 32, 32) in [0, 1] -> features (n, 64), class logits (n, 25), logits of quarters (n, 4, 12)."""
        features = self.features(self.convolutions(images).flatten(1))
        active = F.relu(features)
        return features, self.classes(active), self.quarters(active).unflatten(1, (4, QUARTER))

    @classmethod
    def from_pretrained(cls) -> "ShapesClassifier":
        """The shipped one."""
        model = cls()
        model.load_state_dict(load_file(WEIGHTS))
        return model.eval()

    @torch.no_grad()
    def of_pictures(self, images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Features (n, 64), scaled to variance 1 over training scenes, and class probabilities (n, 25); float64."""
        parts = [self(as_tensor(images[i : i + 256]))[:2] for i in range(0, len(images), 256)]
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return ((features - self.mean) * self.scale).double().numpy(), logits.double().softmax(-1).numpy()


def as_tensor(images: list[Image.Image]) -> Tensor:
    """Pictures -> (n, 3, 32, 32) in [0, 1]."""
    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def truth(scene: Scene) -> tuple[int, np.ndarray]:
    """The class of a scene, and kind and colour in each of its quarters (4, 2)."""
    quarters = np.tile([len(KINDS), len(COLOURS)], (4, 1))
    for shape in scene.shapes:
        quarters[shape.place] = KINDS.index(shape.kind), list(COLOURS).index(shape.colour)
    return len(CLASSES) if scene.class_id is None else scene.class_id, quarters


def accuracy(model: ShapesClassifier, scenes: list[Scene]) -> float:
    """Share of scenes with the right kind and colour in every quarter."""
    images, right = (
        as_tensor([render(scene) for scene in scenes]),
        torch.tensor(np.array([truth(s)[1] for s in scenes])),
    )
    with torch.no_grad():
        kinds, colours = model(images)[2].split([len(KINDS) + 1, len(COLOURS) + 1], -1)
    return float((torch.stack([kinds.argmax(-1), colours.argmax(-1)], -1) == right).all((1, 2)).float().mean())


def train(num_scenes: int = 12_000, steps: int = 1_600, batch_size: int = 64, seed: int = 0) -> ShapesClassifier:
    """Trains a classifier on rendered training scenes, half of them of one class, with a little noise."""
    torch.manual_seed(seed)
    scenes = [scene_of(("train", "classes")[i % 2], i)[0] for i in range(num_scenes)]
    images = as_tensor([render(scene) for scene in scenes])
    classes, quarters = (torch.tensor(np.array(column)) for column in zip(*map(truth, scenes), strict=True))
    model = ShapesClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in (bar := trange(steps, desc="classifier")):
        some = torch.randint(num_scenes, (batch_size,))
        shown = images[some] + 0.03 * torch.randn(batch_size, 3, SIZE, SIZE)
        _, logits, parts = model(shown)
        kinds, colours = parts.split([len(KINDS) + 1, len(COLOURS) + 1], -1)
        of_quarters = F.cross_entropy(kinds.flatten(0, 1), quarters[some, :, 0].flatten())
        of_quarters = of_quarters + F.cross_entropy(colours.flatten(0, 1), quarters[some, :, 1].flatten())
        loss = F.cross_entropy(logits, classes[some]) + of_quarters
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.eval()
    with torch.no_grad():
        features = torch.cat([model(part)[0] for part in images.split(256)])
    model.mean.copy_(features.mean(0))
    model.scale.copy_(1 / features.std(0).clamp(min=1e-3))
    return model


if __name__ == "__main__":
    trained = train()
    print(f"right in all quarters: {accuracy(trained, [scene_of('test', i)[0] for i in range(2000)]):.4f}")
    save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, WEIGHTS)
