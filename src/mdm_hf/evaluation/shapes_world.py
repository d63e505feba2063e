"""The shapes world: 32x32 scenes of one to four shapes, and all that can be said about them, with exact answers.

- A scene has at most one shape in each quarter of the picture, shifted by up to a pixel, on a grey ground, plain or
  textured. There are over ten billion scenes: nothing that is tested was seen in training.
- What is said of a scene is made here; `shapes_judge.py` reads pictures and texts back without looking at this.
- Everything follows from a seed: scene i of a split is the same on every machine.
"""

import json
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm


SIZE = 32
KINDS = ("circle", "square", "triangle", "cross")
COLOURS = {  # none of them grey, and their hues 60 degrees apart
    "red": (225, 30, 30),
    "yellow": (225, 225, 30),
    "green": (30, 200, 30),
    "cyan": (30, 215, 215),
    "blue": (40, 40, 230),
    "pink": (225, 30, 225),
}
RADII = {"small": 4.0, "large": 6.0}  # pixels, from the middle to the far end
PLACES = ("top left", "top right", "bottom left", "bottom right")
GROUNDS = ("plain", "rows", "columns", "checks")
NUMBERS = ("none", "one", "two", "three", "four")
SPLITS = {"train": 0, "validation": 1, "test": 2, "classes": 3}  # the last: training scenes that have a class
CLASSES = tuple(f"{colour} {kind}" for kind in KINDS for colour in COLOURS)  # scenes whose shapes are all alike

FRAMES = ("{}", "a picture of {}", "a scene with {}", "i see {}", "you can see {}", "this shows {}")
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PROMPTS = ("single object", "two objects", "counting", "colours", "position", "attribute binding")


@dataclass(frozen=True)
class Shape:
    """Kind, colour and size by name, the quarter 0 to 3 in reading order, the shift (x, y) in pixels."""

    kind: str
    colour: str
    size: str
    place: int
    shift: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Scene:
    """One picture's content: shapes on a textured ground.

    Args:
        shapes: In reading order.
        ground: Its texture.
        level, contrast, phase: Its grey level from 0 to 255, its contrast and its phase.
    """

    shapes: tuple[Shape, ...]
    ground: str = "plain"
    level: int = 128
    contrast: int = 16
    phase: int = 0

    @property
    def class_id(self) -> int | None:
        """Index in `CLASSES` where all shapes have one kind and colour."""
        alike = {f"{shape.colour} {shape.kind}" for shape in self.shapes}
        return CLASSES.index(alike.pop()) if len(alike) == 1 else None

    def to_json(self) -> str:
        """The scene as text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """The scene whose `text` `to_json` wrote."""
        fields = json.loads(text)
        shapes = tuple(Shape(**(one | {"shift": tuple(one["shift"])})) for one in fields.pop("shapes"))
        return cls(shapes, **fields)


def draw_scene(rng: np.random.Generator, likeness: float | None = None) -> Scene:
    """A scene at random: 1 to 4 shapes; below a likeness of 0.4 all of one kind, below 0.2 of one colour too."""
    number = int(rng.integers(1, 5))
    places = sorted(rng.choice(4, number, replace=False).tolist())
    kinds, colours = rng.choice(KINDS, number).tolist(), rng.choice(tuple(COLOURS), number).tolist()
    likeness = rng.random() if likeness is None else likeness
    if likeness < 0.4:
        kinds = kinds[:1] * number
    if likeness < 0.2:
        colours = colours[:1] * number
    shapes = tuple(
        Shape(kind, colour, str(rng.choice(tuple(RADII))), place, tuple(rng.integers(-1, 2, 2).tolist()))
        for kind, colour, place in zip(kinds, colours, places, strict=True)
    )
    level, contrast = int(rng.integers(30, 220)), int(rng.integers(10, 25))
    return Scene(shapes, str(rng.choice(GROUNDS)), level, contrast, int(rng.integers(0, 4)))


def scene_of(split: str, index: int, likeness: float | None = None) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of a split, and the generator from which to draw what is said of it; `likeness` as in
    `draw_scene`, 0 where all are to have a class."""
    if split not in SPLITS:
        raise ValueError(f"Got split {split!r}; need one of {', '.join(SPLITS)}.")
    rng = np.random.default_rng((SPLITS[split], index))
    return draw_scene(rng, 0.0 if split == "classes" else likeness), rng


def render(scene: Scene) -> Image.Image:
    """The scene as a 32x32 RGB picture, its edges smoothed by four samples a pixel side."""
    samples, half = 4, SIZE // 2
    at = (np.arange(half * samples) + 0.5) / samples - half / 2  # seen from the middle of a quarter
    pixels = np.repeat(_ground(scene)[..., None], 3, axis=2)
    for shape in scene.shapes:
        (dx, dy), top, left = shape.shift, shape.place // 2 * half, shape.place % 2 * half
        inside = covers(shape.kind, at[None, :] - dx, at[:, None] - dy, RADII[shape.size])
        alpha = inside.reshape(half, samples, half, samples).mean((1, 3))[..., None]
        quarter = pixels[top : top + half, left : left + half]
        quarter += alpha * (np.array(COLOURS[shape.colour]) - quarter)
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def covers(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Whether a shape of `radius` around the origin covers the points (x, y), y downwards."""
    if kind == "circle":
        return x**2 + y**2 <= radius**2
    if kind == "square":
        return np.maximum(np.abs(x), np.abs(y)) <= 0.85 * radius
    if kind == "triangle":  # its tip at the top
        return (np.abs(x) <= (y + radius) / 2) & (y <= 0.8 * radius)
    if kind == "cross":
        return (np.minimum(np.abs(x), np.abs(y)) <= radius / 3) & (np.maximum(np.abs(x), np.abs(y)) <= radius)
    raise ValueError(f"Got kind {kind!r}; need one of {', '.join(KINDS)}.")


def _ground(scene: Scene) -> np.ndarray:
    """Grey levels (32, 32): bands four pixels wide."""
    band = (np.arange(SIZE) + scene.phase) // 4 % 2
    textures = {
        "plain": np.zeros((SIZE, SIZE)),
        "rows": np.broadcast_to(band[:, None], (SIZE, SIZE)),
        "columns": np.broadcast_to(band[None, :], (SIZE, SIZE)),
        "checks": (band[:, None] + band[None, :]) % 2,
    }
    return scene.level + scene.contrast * (2.0 * textures[scene.ground] - 1)


def noun(shape: Shape, colour: bool = True, size: bool = False, place: bool = False) -> str:
    """ "a small red circle top left" """
    words = ["a", shape.size * size, shape.colour * colour, shape.kind, PLACES[shape.place] * place]
    return " ".join(word for word in words if word)


def listed(nouns: list[str]) -> str:
    """ "a, b and c" """
    return " and ".join([", ".join(nouns[:-1]), nouns[-1]] if len(nouns) > 1 else nouns)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A description that names every shape with its colour; sizes or places, where there is room, sometimes."""
    number, manner = len(scene.shapes), rng.random()
    if manner < 0.3 and number <= 3:
        nouns = [noun(shape, place=True) for shape in scene.shapes]
    elif manner < 0.5 and number <= 2:
        nouns = [noun(shape, size=True) for shape in scene.shapes]
    else:
        nouns = [_counted(n, words) for words, n in Counter(noun(s) for s in scene.shapes).items()]
    return str(rng.choice(FRAMES)).format(listed(nouns))


def _counted(number: int, words: str) -> str:
    return words if number == 1 else f"{NUMBERS[number]} {plural(words.removeprefix('a '))}"


def plural(words: str) -> str:
    return words + ("es" if words.endswith("s") else "s")


def prompts(scene: Scene, rng: np.random.Generator) -> dict[str, str]:
    """What may be asked for so that `scene` fulfils it to the letter: category of `PROMPTS` -> text."""
    shapes = scene.shapes
    kinds = [shape.kind for shape in shapes]
    said: dict[str, str] = {}
    if len(shapes) == 1:
        said["single object"] = noun(shapes[0], colour=False)
        said["colours"] = noun(shapes[0])
        said["position"] = noun(shapes[0], colour=False, place=True)
    elif len(set(kinds)) == 1:
        said["counting"] = _counted(len(shapes), f"a {kinds[0]}")
    if len(shapes) == 2 and len(set(kinds)) == 2:
        first, second = (shapes[i] for i in rng.permutation(2))
        said["two objects"] = listed([noun(first, colour=False), noun(second, colour=False)])
        relation = rng.choice(relations(first, second))
        said["position"] = f"{noun(first, colour=False)} {relation} {noun(second, colour=False)}"
        if first.colour != second.colour:
            said["attribute binding"] = listed([noun(first), noun(second)])
    return said


def relations(first: Shape, second: Shape) -> list[str]:
    """Where the first of two shapes lies, seen from the second; on a diagonal two of `RELATIONS` hold."""
    columns, rows = (first.place % 2, second.place % 2), (first.place // 2, second.place // 2)
    across = [] if columns[0] == columns[1] else ["left of" if columns[0] < columns[1] else "right of"]
    down = [] if rows[0] == rows[1] else ["above" if rows[0] < rows[1] else "below"]
    return across + down


def questions(scene: Scene, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """A question of each sort that the scene has one right answer to: sort -> (question, answer)."""
    shapes = scene.shapes
    kinds, colours = Counter(s.kind for s in shapes), Counter(s.colour for s in shapes)
    nouns = Counter(noun(s) for s in shapes)
    asked = {"how many": ("how many shapes are there?", NUMBERS[len(shapes)])}
    kind = str(rng.choice(KINDS)) if rng.random() < 0.5 else shapes[0].kind
    asked["how many of a kind"] = (f"how many {plural(kind)} are there?", NUMBERS[kinds[kind]])
    place = int(rng.integers(4))
    there = {s.place: noun(s) for s in shapes}.get(place, "nothing")
    asked["what is there"] = (f"what is {PLACES[place]}?", there)
    some = shapes[int(rng.integers(len(shapes)))]
    other = noun(draw_scene(rng).shapes[0])
    wanted = noun(some) if rng.random() < 0.5 else other
    asked["is there"] = (f"is there {wanted}?", "yes" if wanted in nouns else "no")
    if single := [s for s in shapes if kinds[s.kind] == 1]:
        some = single[int(rng.integers(len(single)))]
        asked["what colour"] = (f"what colour is the {some.kind}?", some.colour)
    if single := [s for s in shapes if colours[s.colour] == 1]:
        some = single[int(rng.integers(len(single)))]
        asked["which shape"] = (f"which shape is {some.colour}?", some.kind)
    if single := [s for s in shapes if nouns[noun(s)] == 1]:
        some = single[int(rng.integers(len(single)))]
        named = noun(some).removeprefix("a ")
        asked["where"] = (f"where is the {named}?", PLACES[some.place])
        asked["how big"] = (f"how big is the {named}?", some.size)
    return asked


def riddle(rng: np.random.Generator) -> tuple[str, str, list[str]]:
    """A question that needs no picture, its answer, and the choices, the answer among them, in random order."""
    while True:
        scene = draw_scene(rng)
        if len(scene.shapes) == 2 and scene.class_id is None:
            break
    first, second = scene.shapes
    names = [noun(s).removeprefix("a ") for s in (first, second)]
    told, sort = listed([noun(first), noun(second)]), int(rng.integers(4))
    if sort == 0:
        relation = str(rng.choice(relations(first, second)))
        told = f"a {names[0]} {relation} a {names[1]}"
        which = int(rng.integers(2))
        question = f"what is {relation if which == 0 else RELATIONS[relation]} the {names[1 - which]}?"
        others = [
            " ".join(pair) for pair in zip(rng.permutation(tuple(COLOURS)), rng.permutation(KINDS), strict=False)
        ]
        choices = [names[which], names[1 - which], *[name for name in others if name not in names][:2]]
    elif sort == 1 and first.kind != second.kind:
        which = int(rng.integers(2))
        question, right = f"what colour is the {scene.shapes[which].kind}?", scene.shapes[which].colour
        choices = [right, *[c for c in dict.fromkeys([scene.shapes[1 - which].colour, *COLOURS]) if c != right][:3]]
    elif sort == 2 and first.colour != second.colour:
        which = int(rng.integers(2))
        question, right = f"which shape is {scene.shapes[which].colour}?", scene.shapes[which].kind
        choices = [right, *[kind for kind in KINDS if kind != right]]
    else:
        counts = rng.integers(1, 4, 2).tolist()
        told = listed([_counted(n, f"a {name}") for n, name in zip(counts, names, strict=True)])
        which = int(rng.integers(2))
        question, right = f"how many {plural(names[which])} are there?", NUMBERS[counts[which]]
        choices = [right, *[n for n in NUMBERS[1:] if n != right]]
    return f"{told}. {question}", choices[0], [choices[i] for i in rng.permutation(len(choices))]


def dataset_row(split: str, index: int) -> dict:
    """Row `index` of a split: image, captions, prompts, questions with answers, label, and the scene itself as JSON.

    `messages` are a riddle and its answer, which have nothing to do with the image.
    """
    scene, rng = scene_of(split, index)
    captions = list(dict.fromkeys(caption(scene, rng) for _ in range(6)))
    asked = list(questions(scene, rng).values())
    question, answer, _ = riddle(rng)
    return {
        "image": render(scene),
        "captions": captions,
        "prompts": list(prompts(scene, rng).values()),
        "questions": [question for question, _ in asked],
        "answers": [answer for _, answer in asked],
        "label": scene.class_id,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "scene": scene.to_json(),
    }


def write_dataset(folder: str | Path, sizes: dict[str, int]) -> Path:
    """Writes the splits as parquet files that `datasets.load_dataset(folder)` reads, `sizes[split]` rows each.

    Returns the folder.

    Raises:
        ValueError: `folder` holds something already.
    """
    folder = Path(folder)
    if folder.exists() and (folder.is_file() or any(folder.iterdir())):
        what = "a file" if folder.is_file() else "not empty"
        raise ValueError(f"Got {str(folder)!r}, which is {what}; need a new folder, or remove it first.")
    text, texts = datasets.Value("string"), datasets.List(datasets.Value("string"))
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **dict.fromkeys(("captions", "prompts", "questions", "answers"), texts),
            "label": datasets.Value("int64"),
            "messages": datasets.List({"role": text, "content": text}),
            "scene": text,
        }
    )
    unfinished = folder.with_name(f".unfinished-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "data").mkdir(parents=True)
    for split, number in sizes.items():
        rows = [dataset_row(split, i) for i in tqdm(range(number), desc=split, unit="scenes")]
        columns = {name: [row[name] for row in rows] for name in features}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(
            unfinished / "data" / f"{split}-00000-of-00001.parquet"
        )
    if folder.exists():
        folder.rmdir()
    unfinished.rename(folder)
    return folder
