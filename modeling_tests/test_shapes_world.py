"""The shapes world, and its judge: what is rendered and said reads back exactly."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mdm_hf.evaluation.shapes_judge import agree, describes, read_pictures, read_text, same_answer
from mdm_hf.evaluation.shapes_world import (
    CLASSES,
    COLOURS,
    NUMBERS,
    PROMPTS,
    Scene,
    Shape,
    caption,
    dataset_row,
    noun,
    plural,
    prompts,
    questions,
    relations,
    render,
    riddle,
    scene_of,
    write_dataset,
)
from mdm_hf.training.readers import read_source


COUNT = 400


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [scene_of("test", i)[0] for i in range(COUNT)]


@pytest.fixture(scope="module")
def pictures(scenes) -> list[Image.Image]:
    return [render(scene) for scene in scenes]


def unshifted(shapes) -> tuple[Shape, ...]:
    return tuple(replace(shape, shift=(0, 0)) for shape in shapes)


def accuracy(images, scenes) -> float:
    read = read_pictures(images)
    return float(np.mean([r == unshifted(scene.shapes) for r, scene in zip(read, scenes, strict=True)]))


def noisy(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    pixels = np.asarray(image) + np.random.default_rng(seed).normal(0, sigma, (32, 32, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_the_judge_reads_kind_colour_size_and_place_of_every_rendered_shape(pictures, scenes) -> None:
    assert accuracy(pictures, scenes) >= 0.995


@pytest.mark.parametrize("blur", [0.5, 0.8, 1.0])
def test_the_judge_reads_blurred_pictures(pictures, scenes, blur: float) -> None:
    assert accuracy([image.filter(ImageFilter.GaussianBlur(blur)) for image in pictures], scenes) >= 0.99


@pytest.mark.parametrize("sigma", [5, 10])
def test_the_judge_reads_noisy_pictures(pictures, scenes, sigma: float) -> None:
    assert accuracy([noisy(image, sigma, i) for i, image in enumerate(pictures)], scenes) >= 0.99


def test_the_judge_does_not_guess_what_it_cannot_read() -> None:
    stain = np.full((32, 32, 3), 128, np.uint8)
    stain[3:12:2, 3:12:2] = (225, 30, 30)  # red dots: no shape
    faint = np.asarray(render(Scene((Shape("circle", "red", "small", 3),)))) // 3 + 85  # a third of its colour
    assert read_pictures([Image.fromarray(stain), Image.fromarray(faint)]) == [None, None]
    assert read_pictures([Image.new("RGB", (32, 32), "white")]) == [()]
    assert not agree(read_text("a red circle"), None)


SHIFTS = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]


def drawn(*shapes: Shape) -> np.ndarray:
    return np.array(render(Scene(shapes)))


def are_unreadable(pictures: list[np.ndarray]) -> bool:
    return read_pictures(Image.fromarray(pixels) for pixels in pictures) == [None] * len(pictures)


def test_a_shape_of_two_colours_or_with_anything_of_another_beside_it_cannot_be_read() -> None:
    block, rows, beside, dots = (drawn(Shape("square", "red", "large", 0)) for _ in range(4))
    block[5:9, 4:11] = COLOURS["blue"]
    rows[5:9, :16][np.ptp(rows[5:9, :16], axis=-1) > 100] = COLOURS["green"]
    beside[0:2, 0:2] = COLOURS["blue"]
    for x, colour in ((4, "blue"), (9, "green"), (13, "yellow")):
        dots[22:24, x : x + 2] = COLOURS[colour]
    assert are_unreadable([block, rows, beside, dots])
    halves = drawn(Shape("square", "red", "large", 0))
    halves[:8, :16][np.ptp(halves[:8, :16], axis=-1) > 100] = COLOURS["blue"]
    assert are_unreadable([halves])


@pytest.mark.parametrize(
    ("kind", "size"), [("circle", "large"), ("triangle", "large"), ("triangle", "small"), ("square", "large")]
)
def test_a_shape_without_one_of_its_halves_is_not_read_as_whole(kind: str, size: str) -> None:
    whole = Shape(kind, "red", size, 0)
    for x, y in SHIFTS:
        for half in (np.s_[: 8 + y, :16], np.s_[8 + y : 16, :16], np.s_[:16, : 8 + x], np.s_[:16, 8 + x : 16]):
            pixels = drawn(replace(whole, shift=(x, y)))
            pixels[half] = pixels[20, 20]
            assert read_pictures([Image.fromarray(pixels)]) != [(whole,)], (x, y, half)


def test_a_faint_shape_cannot_be_read() -> None:
    for kind in ("square", "circle"):
        shape, ground = drawn(Shape(kind, "red", "large", 0)), drawn()
        assert are_unreadable([(opacity * shape + (1 - opacity) * ground).astype(np.uint8) for opacity in (0.3, 0.5)])


def test_every_caption_describes_its_scene_and_no_changed_one(scenes) -> None:
    rng = np.random.default_rng(0)
    for scene in scenes:
        said = caption(scene, rng)
        assert describes(read_text(said), scene.shapes), said
        first, *rest = scene.shapes
        other = next(colour for colour in COLOURS if colour not in {s.colour for s in scene.shapes})
        assert not agree(read_text(said), (replace(first, colour=other), *rest)), said
        assert not agree(read_text(said), tuple(rest)), said


def test_every_prompt_agrees_with_its_scene_and_all_categories_occur(scenes) -> None:
    rng, seen = np.random.default_rng(0), Counter()
    for scene in scenes:
        for category, said in prompts(scene, rng).items():
            seen[category] += 1
            assert agree(read_text(said), scene.shapes), said
    assert set(seen) == set(PROMPTS)
    assert min(seen.values()) > 15


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ("a red circle left of a blue square", True),
        ("a circle above a square", True),
        ("a blue square right of a red circle", True),
        ("a red circle right of a blue square", False),
        ("a red square left of a blue circle", False),  # attributes bound the other way round
        ("a blue square and a red circle", True),
        ("A picture of two shapes: a red circle, a blue square.", True),
        ("a red circle", False),
        ("a red circle, a blue square and a green cross", False),
        ("two red circles", False),
        ("a large red circle and a small blue square bottom right", True),
        ("a small red circle and a blue square", False),
        ("a red circle top right and a blue square", False),
        ("a red and a blue square", False),
        ("a red blue circle and a square", False),
        ("red circle a blue", False),
        ("", False),
    ],
)
def test_texts_are_read_by_meaning(said: str, holds: bool) -> None:
    shapes = (Shape("circle", "red", "large", 0), Shape("square", "blue", "small", 3))
    assert agree(read_text(said), shapes) is holds


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ("two red circles", True),
        ("2 red circles", True),
        ("there are two red circles.", True),
        *((f"{number} red circles", False) for number in ("no", "zero", "many", "some", "five", "1", "3", "12")),
        ("no two red circles", False),
        ("two red circles are not there", False),
        ("there aren't two red circles", False),
        ("a scene without two red circles", False),
        ("a red circle or a red circle", False),
        ("red circles", False),
    ],
)
def test_what_a_text_denies_or_counts_otherwise_is_not_held_for_said(said: str, holds: bool) -> None:
    red = Shape("circle", "red", "small", 0)
    assert describes(read_text(said), (red, replace(red, place=3))) is holds
    if not holds and not said.startswith(("1", "a")):
        assert not describes(read_text(said), (red,))


@pytest.mark.parametrize(
    ("said", "holds"),
    [
        ("a small red circle and a big blue square", True),
        ("a tiny red circle over a huge blue square", True),
        ("1 red circle on top of 1 blue square", True),
        ("in this picture there is a red circle to the left of a blue square.", True),
        ("we see a red circle upper left and a blue square in the lower right corner on a grey background", True),
        ("The image contains 2 shapes: a little red circle placed at the top left, a blue square", True),
        ("a big red circle and a blue square", False),
        ("a red circle under a blue square", False),
        ("a red circle beneath a blue square", False),
        ("a red circle lower right and a blue square", False),
        ("a red circle to the right of a blue square", False),
        ("a blue square to the left and a red circle to the right", False),
        ("a red circle and a blue square on its left", False),
        ("a red circle and above it a blue square", False),
        ("a red circle, a blue square above", False),
        ("a red circle and top left a blue square", False),
        ("a red circle in a blue square", False),
        ("a red circle on a blue square", False),
        ("a red circle in the middle and a blue square", False),
        ("a red circle and star and a blue square", False),
        ("a red circle, a blue square and other shapes", False),
        ("everything except a red circle and a blue square", False),
        ("only a red circle, but a blue square", False),
        ("orange red circle and a purple blue square", False),
        ("a grey red circle and a blue square", False),
        ("a red circle and a blue square on a green background", False),
        ("three shapes: a red circle and a blue square", False),
        ("two a red circle and a blue square", False),
        ("a red circle and a blue square \u043d\u0435\u0442", False),
    ],
)
def test_synonyms_are_judged_and_what_is_not_understood_is_never_true(said: str, holds: bool) -> None:
    shapes = (Shape("circle", "red", "small", 0), Shape("square", "blue", "large", 3))
    assert describes(read_text(said), shapes) is holds


@pytest.mark.parametrize(
    ("said", "places", "holds"),
    [
        ("two red circles left of a blue square", (0, 2, 3), True),
        ("two red circles left of a blue square", (0, 3, 2), False),  # the second of them is right of it
        ("two red circles left of a blue square", (0, 3, 1), False),
        ("a blue square right of two red circles", (0, 2, 1), True),
        ("a blue square right of two red circles", (0, 3, 1), False),
        ("a blue square above two red circles", (2, 3, 0), True),
        ("two red circles below a blue square", (1, 3, 0), False),
    ],
)
def test_a_relation_with_a_number_holds_for_each_of_them(said: str, places: tuple, holds: bool) -> None:
    first, second, third = places
    shapes = [Shape("circle", "red", "small", first), Shape("circle", "red", "large", second)]
    shapes.append(Shape("square", "blue", "small", third))
    assert agree(read_text(said), tuple(sorted(shapes, key=lambda shape: shape.place))) is holds


def test_a_caption_has_to_name_kinds_and_colours_where_a_prompt_need_not() -> None:
    shapes = (Shape("circle", "red", "large", 0),)
    assert agree(read_text("a circle"), shapes)
    assert not describes(read_text("a circle"), shapes)


def test_relations_are_read_off_the_places() -> None:
    def at(place):
        return Shape("circle", "red", "small", place)

    assert relations(at(0), at(1)) == ["left of"]
    assert relations(at(3), at(1)) == ["below"]
    assert relations(at(1), at(2)) == ["right of", "above"]


def test_answers_are_true_of_the_scene(scenes) -> None:
    rng, seen, yes = np.random.default_rng(0), Counter(), Counter()
    for scene in scenes:
        nouns = [noun(shape) for shape in scene.shapes]
        for sort, (question, answer) in questions(scene, rng).items():
            seen[sort] += 1
            if sort == "is there":
                yes[answer] += 1
                asked = question.removeprefix("is there ").removesuffix("?")
                assert answer == ("yes" if asked in nouns else "no")
            elif sort == "what is there" and answer != "nothing":
                assert answer in nouns
            elif sort == "which shape":
                assert question.startswith("which shape is ")
                colour = question.split()[-1].removesuffix("?")
                assert [s.kind for s in scene.shapes if s.colour == colour] == [answer]
            elif sort == "how many":
                assert answer == {1: "one", 2: "two", 3: "three", 4: "four"}[len(nouns)]
    assert len(seen) == 8
    assert 0.4 < yes["yes"] / yes.total() < 0.6


def test_answers_are_compared_by_meaning() -> None:
    assert same_answer("The red circle.", "a red circle")
    assert same_answer("3", "three")
    assert not same_answer("four", "three")
    assert not same_answer("red", "red circle")


@pytest.mark.parametrize(
    ("given", "right", "same"),
    [
        *((word, "none", True) for word in ("nothing", "no", "zero", "0", "there are none", "no circles")),
        ("big", "large", True),
        ("upper left", "top left", True),
        ("In the top left corner.", "top left", True),
        ("it is red", "red", True),
        ("the colour is red", "red", True),
        ("one circle", "one", True),
        ("there are 2 shapes", "two", True),
        ("1", "one", True),
        ("yes, there is", "yes", True),
        *(("", right, False) for right in ("a", "the", "none", "red")),
        ("a", "the", False),
        ("there is", "yes", False),
        ("none", "no", False),
        ("yes red", "yes", False),
        ("yes no", "yes", False),
        ("red blue", "red", False),
        ("two circles three", "two", False),
        ("one red circle", "one", False),
        ("circle", "one", False),
        ("red circle", "red", False),
        ("top right", "top left", False),
        ("grey red", "red", False),
    ],
)
def test_an_answer_may_be_put_otherwise_but_not_be_another_nor_more(given: str, right: str, same: bool) -> None:
    assert same_answer(given, right) is same


def solved(question: str) -> str:
    """The answer to a riddle, from what it tells."""
    told, asked = question.split(". ")
    said = read_text(told)
    names = [f"{mention.colour} {mention.kind}" for mention in said.mentions]
    words = asked.removesuffix("?").split()
    if asked.startswith("what is"):
        first, second = names
        relation = asked.removeprefix("what is ").split(" the ")[0]
        opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[said.relation]
        return {(said.relation, second): first, (opposite, first): second}[relation, " ".join(words[-2:])]
    if asked.startswith("what colour"):
        return next(m.colour for m in said.mentions if m.kind == words[-1])
    if asked.startswith("which shape"):
        return next(m.kind for m in said.mentions if m.colour == words[-1])
    numbers = {f"{m.colour} {plural(m.kind)}": m.number for m in said.mentions}
    return NUMBERS[numbers[" ".join(words[2:4])]]


def test_the_answer_of_a_riddle_follows_from_what_it_tells() -> None:
    rng = np.random.default_rng(0)
    for question, answer, _ in (riddle(rng) for _ in range(400)):
        assert solved(question) == answer, question


def test_riddles_have_one_right_answer_among_unlike_choices() -> None:
    rng, at = np.random.default_rng(0), Counter()
    for _ in range(300):
        question, answer, choices = riddle(rng)
        assert answer in choices
        assert len(set(choices)) == len(choices) == 4, (question, choices)
        at[choices.index(answer)] += 1
    assert min(at.values()) > 50  # no place among the choices gives it away


def test_a_scene_follows_from_split_and_index_alone() -> None:
    row, again = dataset_row("test", 7), dataset_row("test", 7)
    assert row["image"].tobytes() == again["image"].tobytes()
    del row["image"], again["image"]
    assert row == again
    assert dataset_row("train", 7)["scene"] != row["scene"]
    scene = scene_of("test", 7)[0]
    assert Scene.from_json(scene.to_json()) == scene
    with pytest.raises(ValueError, match=r"Got split 'dev'; need one of train, validation, test, classes"):
        scene_of("dev", 0)


def test_no_test_scene_is_a_training_scene() -> None:
    train = {scene_of("train", i)[0].shapes for i in range(3000)}
    several = [s for s in (scene_of("test", i)[0].shapes for i in range(500)) if len(s) > 1]
    assert sum(shapes in train for shapes in several) / len(several) < 0.02


def test_a_class_is_the_kind_and_colour_that_all_shapes_share(scenes) -> None:
    alike = [scene for scene in scenes if scene.class_id is not None]
    assert len(alike) > 50
    for scene in alike:
        assert {f"{s.colour} {s.kind}" for s in scene.shapes} == {CLASSES[scene.class_id]}


def test_the_data_set_is_written_whole_and_read_by_its_adapter(tmp_path) -> None:
    folder = write_dataset(tmp_path / "shapes", {"train": 20, "classes": 10, "test": 5})
    labels = read_source(folder, "shapes", split="classes").rows["label"]
    assert None not in labels.to_pylist()
    source = read_source(folder, "shapes", split="test")
    assert len(source) == 5
    rng = np.random.default_rng(0)
    for task in source.tasks:
        messages = source.sample(0, task, rng)["messages"]
        assert messages[-1]["role"] == "assistant"
    [shown] = [p["image"] for p in source.sample(0, "image_to_text", rng)["messages"][0]["content"]]
    assert read_pictures([shown])[0] == unshifted(scene_of("test", 0)[0].shapes)
    with pytest.raises(ValueError, match="which is not empty; need a new folder, or remove it first"):
        write_dataset(folder, {"train": 1})
    with pytest.raises(ValueError, match="which is a file; need a new folder, or remove it first"):
        write_dataset(next(folder.glob("**/*.parquet")), {"train": 1})
