"""The digits data: the split, the grammar of captions and questions, and the stream of training examples."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from mdm_hf.training.digits import (
    DIGIT_WORDS,
    TASKS,
    DigitsSource,
    all_captions,
    all_questions_and_answers,
    augmented,
    caption,
    conversation,
    digit_named_in,
    is_well_formed,
    load_digits_split,
    question_and_answer,
)
from mdm_hf.training.mix import ConversationMix
from mdm_hf.training.recipe import load_recipe


WEIGHTS = {"class_to_image": 1.0, "text_to_image": 2.0, "image_to_text": 1.0, "question_answering": 1.0}


def dataset(
    num_samples: int = 4000,
    batch_size: int = 20,
    weights: dict | None = None,
    seed: int = 0,
    task_starts: dict[str, int] | None = None,
    **options,
) -> ConversationMix:
    source = DigitsSource("train", weights or WEIGHTS, **options)
    return ConversationMix({"digits": source}, num_samples, batch_size, seed, task_starts=task_starts)


def parts(example: dict, role: str) -> list[dict]:
    return [part for message in example["messages"] if message["role"] == role for part in message["content"]]


def task_seen_in(example: dict) -> str:
    """The task, told from the example's form alone (captions name a digit, questions end in ? or are known)."""
    kinds = [part["type"] for part in parts(example, "assistant")]
    given = [part["type"] for part in parts(example, "user")]
    if kinds == ["image", "text"]:
        return "prompt_to_image_and_text" if given else "image_and_text"
    if kinds == ["image"]:
        return "text_to_image" if "text" in given else "class_to_image"
    return "question_answering" if "text" in given else "image_to_text"


def as_bytes(example: dict) -> list:
    return [
        (
            message["role"],
            part["type"],
            part[part["type"]].tobytes() if part["type"] == "image" else part[part["type"]],
        )
        for message in example["messages"]
        for part in message["content"]
    ]


def pinned(value):
    return hashlib.sha256(value).hexdigest()[:12] if isinstance(value, bytes) else value


def test_the_split_holds_out_every_sixth_image_and_trains_on_all_others() -> None:
    data = load_digits()
    for split, chosen in (
        ("train", [i for i in range(1797) if i % 6 != 5]),
        ("heldout", [i for i in range(1797) if i % 6 == 5]),
    ):
        images, labels = load_digits_split(split)
        assert labels.tolist() == data.target[chosen].tolist()
        assert [image.size for image in images] == [(8, 8)] * len(chosen)
        assert {image.mode for image in images} == {"L"}
        expected = [[round(value * 255 / 16) for value in data.data[i]] for i in chosen]
        assert [np.asarray(image).ravel().tolist() for image in images] == expected


def test_every_caption_names_its_digit_once_and_no_two_are_alike() -> None:
    captions = all_captions()
    assert len(set(captions)) == len(captions) >= 200
    for text in captions:
        names = [word for word in text.split() if word in DIGIT_WORDS or word.isdigit()]
        assert len(names) == 1
        digit = DIGIT_WORDS.index(names[0]) if names[0] in DIGIT_WORDS else int(names[0])
        assert digit_named_in(text) == digit


def test_drawn_captions_are_well_formed_varied_and_name_the_label() -> None:
    rng = np.random.default_rng(0)
    for label in range(10):
        drawn = {caption(label, rng) for _ in range(300)}
        assert {digit_named_in(text) for text in drawn} == {label}
        assert all(is_well_formed(text) for text in drawn)
        assert len(drawn) == len(all_captions()) // 10


def test_an_stands_before_eight_and_nowhere_else() -> None:
    texts = [*all_captions(), *(text for pair in all_questions_and_answers() for text in pair)]
    for text in texts:
        words = text.replace("?", "").split()
        for article, noun in zip(words, words[1:], strict=False):
            if article in ("a", "an"):
                assert (article == "an") == (noun in ("eight", "8")), text


@pytest.mark.parametrize("text", ["", "a three ", "A three", "a threee", "an three", "a three a three", "the digit"])
def test_what_is_not_exactly_a_caption_is_not_well_formed(text: str) -> None:
    assert not is_well_formed(text)


@pytest.mark.parametrize(
    ("text", "digit"),
    [
        ("a handwritten three", 3),
        ("THE DIGIT NINE.", 9),
        ("this is an 8", 8),
        ("no, it is a seven", 7),
        ("no, this is not a three, it is a seven", 7),
        ("a drawing", None),
        ("a three and a four", None),
        ("a three, yes, a three", None),
        ("somebody wrote a threee", None),
        ("the number 33", None),
        ("someone phoned", None),
        ("", None),
    ],
)
def test_the_digit_named_is_the_one_that_is_asserted(text: str, digit: int | None) -> None:
    assert digit_named_in(text) == digit


def test_a_question_and_a_digit_determine_the_answer_and_the_answer_is_true() -> None:
    rng = np.random.default_rng(1)
    answers: dict[tuple[str, int], set[str]] = {}
    for i in range(6000):
        question, answer = question_and_answer(i % 10, rng)
        answers.setdefault((question, i % 10), set()).add(answer)
        assert digit_named_in(answer) == i % 10
        if question.startswith("is this"):
            assert answer.startswith("yes" if digit_named_in(question) == i % 10 else "no")
    assert {len(found) for found in answers.values()} == {1}
    pairs = {(question, found.pop()) for (question, _), found in answers.items()}
    assert pairs == set(all_questions_and_answers())


def test_yes_and_no_are_equally_likely() -> None:
    rng = np.random.default_rng(2)
    drawn = [question_and_answer(4, rng) for _ in range(4000)]
    said = [answer[:2] for question, answer in drawn if question.startswith("is this")]
    assert 0.45 < said.count("ye") / len(said) < 0.55


@pytest.mark.parametrize("task", TASKS)
def test_the_conversation_of_a_task_has_the_parts_of_that_task(task: str) -> None:
    image, label = load_digits_split("train")[0][3], 3
    example = conversation(task, image, label, np.random.default_rng(0))
    given, targets = parts(example, "user"), parts(example, "assistant")
    assert example["messages"][-1]["role"] == "assistant"
    assert task_seen_in(example) == task
    assert ([p["class"] for p in given if p["type"] == "class"] == [label]) == (task == "class_to_image")
    texts = [p["text"] for p in targets if p["type"] == "text"]
    assert all(digit_named_in(text) == label for text in texts)
    assert all(p["image"].tobytes() == image.tobytes() for p in given + targets if p["type"] == "image")


def test_an_unknown_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Got task 'video'; choose one of class_to_image"):
        conversation("video", load_digits_split("train")[0][0], 0, np.random.default_rng(0))


def test_each_batch_has_one_task_and_tasks_come_in_proportion_to_their_weights() -> None:
    data = dataset(40_000, 20)
    tasks = [data.task_of(i) for i in range(0, 40_000, 20)]
    for start, task in list(zip(range(0, 40_000, 20), tasks, strict=True))[:50]:
        assert {data.task_of(start + i) for i in range(20)} == {task}
    shares = {task: tasks.count(task) / len(tasks) for task in WEIGHTS}
    assert shares == pytest.approx(
        {"text_to_image": 0.4} | dict.fromkeys(set(WEIGHTS) - {"text_to_image"}, 0.2), abs=0.04
    )


def test_the_examples_of_a_batch_are_of_the_batches_task() -> None:
    data = dataset(600, 20, dict.fromkeys(TASKS, 1.0), condition_dropout=0.0)
    for start in range(0, 600, 20):
        assert {task_seen_in(data[start + i]) for i in range(20)} == {data.task_of(start)}


def test_a_task_comes_in_where_it_starts_and_changes_nothing_before() -> None:
    late = dataset(weights=WEIGHTS | {"image_and_text": 2.0}, task_starts={"image_and_text": 2000})
    plain = dataset()
    assert [as_bytes(late[i]) for i in range(0, 2000, 40)] == [as_bytes(plain[i]) for i in range(0, 2000, 40)]
    tasks = [late.task_of(i) for i in range(2000, 4000, 20)]
    assert 0.15 < tasks.count("image_and_text") / len(tasks) < 0.45


def test_a_prompt_for_both_is_a_class_or_a_caption_of_the_same_digit() -> None:
    rng = np.random.default_rng(0)
    made = [conversation("prompt_to_image_and_text", Image.new("L", (8, 8)), 5, rng) for _ in range(200)]
    prompts = [parts(one, "user")[0] for one in made]
    assert 60 < sum(prompt["type"] == "class" for prompt in prompts) < 140
    assert all(p.get("class", 5) == 5 and digit_named_in(p.get("text", "five")) == 5 for p in prompts)
    assert [part["type"] for part in parts(made[0], "assistant")] == ["image", "text"]


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, again = dataset(seed=7), dataset(seed=7)
    in_order = [as_bytes(first[i]) for i in range(200)]
    resumed = {i: as_bytes(again[i]) for i in reversed(range(200))}
    assert in_order == [resumed[i] for i in range(200)]
    shorter = dataset(num_samples=200, seed=7)
    assert in_order == [as_bytes(shorter[i]) for i in range(200)]


def test_the_stream_is_the_one_that_the_shipped_weights_were_trained_on() -> None:
    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "digits.yaml")
    source = DigitsSource("train", recipe["data"]["digits"]["tasks"])
    data = ConversationMix({"digits": source}, 128_000, 64, 3, task_starts={"prompt_to_image_and_text": 64 * 950})
    seen = hashlib.sha256()
    for i in range(0, 128_000, 61):
        parts_seen = [(role, kind, pinned(value)) for role, kind, value in as_bytes(data[i])]
        seen.update(repr((data.task_of(i), parts_seen)).encode())
    assert seen.hexdigest() == "98a2ec088c1debd447a1a741ac81976a9e54ddcffe32b31ba0b7a98b5510def6"


def test_another_seed_gives_other_tasks_and_other_samples() -> None:
    one, other = dataset(seed=7), dataset(seed=8)
    assert [one.task_of(i) for i in range(4000)] != [other.task_of(i) for i in range(4000)]
    one, other = (dataset(weights={"class_to_image": 1.0}, seed=seed) for seed in (7, 8))
    assert [as_bytes(one[i]) for i in range(20)] != [as_bytes(other[i]) for i in range(20)]


def test_no_held_out_image_ever_appears_in_training() -> None:
    held_out = {image.tobytes() for image in load_digits_split("heldout")[0]}
    train = {image.tobytes() for image in load_digits_split("train")[0]}
    data = dataset(3000, 20, dict.fromkeys(TASKS, 1.0), augment=False)
    shown = {
        p["image"].tobytes() for i in range(3000) for m in data[i]["messages"] for p in m["content"] if "image" in p
    }
    assert not held_out & train
    assert shown <= train
    assert len(shown) > 1000


def test_condition_images_vary_and_target_images_never_do() -> None:
    train = {image.tobytes() for image in load_digits_split("train")[0]}
    data = dataset(1000, 20, dict.fromkeys(TASKS, 1.0))
    for i in range(1000):
        example = data[i]
        assert all(p["image"].tobytes() in train for p in parts(example, "assistant") if p["type"] == "image")
        assert not any(p["image"].tobytes() in train for p in parts(example, "user") if p["type"] == "image")


def test_an_augmented_image_is_the_digit_shifted_by_at_most_a_pixel() -> None:
    image = load_digits_split("train")[0][0]
    pixels = np.asarray(image, dtype=float)
    padded = np.pad(pixels, 1)
    shifts = {(y, x): padded[1 + y : 9 + y, 1 + x : 9 + x] for y in (-1, 0, 1) for x in (-1, 0, 1)}
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        varied = augmented(image, rng)
        assert (varied.mode, varied.size) == ("L", (8, 8))
        distances = {shift: np.abs(np.asarray(varied, dtype=float) - ideal).mean() for shift, ideal in shifts.items()}
        found.append(min(distances, key=distances.get))
        assert distances[found[-1]] < 25
    assert set(found) == set(shifts)
    assert 0.2 < found.count((0, 0)) / 400 < 0.3


def test_conditions_are_dropped_and_classes_told_as_often_as_asked() -> None:
    rng = np.random.default_rng(0)
    image = Image.new("L", (8, 8))

    def share(task: str, kind: str, **options) -> float:
        made = [conversation(task, image, 5, rng, **options) for _ in range(2000)]
        return sum(any(p["type"] == kind for p in parts(one, "user")) for one in made) / 2000

    assert share("class_to_image", "class", condition_dropout=0.1) == pytest.approx(0.9, abs=0.03)
    assert share("text_to_image", "text", condition_dropout=0.1) == pytest.approx(0.9, abs=0.03)
    assert share("image_to_text", "image", condition_dropout=0.1) == 1
    assert share("image_to_text", "class", class_probability=0.1) == pytest.approx(0.1, abs=0.03)
    assert share("text_to_image", "class", class_probability=0.1) == pytest.approx(0.1, abs=0.03)
    assert share("class_to_image", "class", class_probability=0.1) == 1
    assert share("image_and_text", "class", class_probability=1.0) == 0


def test_a_dropped_condition_leaves_no_user_turn() -> None:
    example = conversation("text_to_image", Image.new("L", (8, 8)), 5, np.random.default_rng(0), condition_dropout=1.0)
    assert [message["role"] for message in example["messages"]] == ["assistant"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"video": 1.0}}, "Got task weights for video; choose among class_to_image"),
        ({"weights": {"image_to_text": 0.0}}, "one of them positive"),
        ({"weights": {"image_to_text": -1.0, "text_to_image": 2.0}}, "weights of 0 or more"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"task_starts": {"video": 1}}, "Got task weights or starts for video"),
        ({"task_starts": dict.fromkeys(WEIGHTS, 5)}, "need a task of positive weight that starts at 0"),
    ],
)
def test_a_data_set_that_cannot_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataset(**options)


def test_an_unknown_split_and_an_index_past_the_end_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Got split 'test'; there are 'train' and 'heldout'\."):
        load_digits_split("test")
    with pytest.raises(IndexError):
        dataset(num_samples=10)[10]


def test_mosaics_are_of_the_sizes_asked_for_and_of_one_kind_of_digit() -> None:
    source = DigitsSource("train", {"class_to_image": 1.0}, condition_dropout=0.0, mosaics=[[1, 2], [3, 1]])
    label_of = {np.asarray(i).tobytes(): n for i, n in zip(source.images, source.labels, strict=True)}
    sizes, pairs = set(), set()
    for n in range(40):
        example = source.sample(0, "class_to_image", np.random.default_rng(n))
        [kind], [picture] = parts(example, "user"), parts(example, "assistant")
        whole = np.asarray(picture["image"])
        sizes.add(whole.shape)
        tiles = [whole[y : y + 8, x : x + 8] for y in range(0, len(whole), 8) for x in range(0, whole.shape[1], 8)]
        assert {label_of[tile.tobytes()] for tile in tiles} == {kind["class"]}
        pairs.add(tiles[0].tobytes() == tiles[1].tobytes())
    assert sizes == {(8, 16), (24, 8)}
    assert False in pairs


@pytest.mark.parametrize("mosaics", [[], [[1]], [[0, 2]], [1, 2], [[1, "2"]]])
def test_mosaics_that_cannot_be_are_refused(mosaics: list) -> None:
    with pytest.raises(ValueError, match=r"need a list of \[rows, columns\], each 1 or more, such as \[\[2, 1\]\]"):
        DigitsSource("train", {"class_to_image": 1.0}, mosaics=mosaics)
