"""Claims about the lm-eval adapter: it asks `score` and `generate`, loses nothing to a kill, reads true formats."""

import json
import math
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from evaluated import CARD, OF_SETTINGS, evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import aggregate_subtask_metrics
from lm_eval.api.registry import get_model

from mdm_hf import MDMPipeline
from mdm_hf.cli import main
from mdm_hf.evaluation import lm_eval_adapter
from mdm_hf.evaluation.benchmarks import BENCHMARKS
from mdm_hf.evaluation.lm_eval_adapter import COLUMNS, TASK_FOLDERS, MDMForLMEval, check_rows, data_hash


CHOICES = ["the sun", "a stone", "the moon", "a tree"]
# Rows as the data sets on the Hub have them, one task after another: of each split, and which option is right.
HELLASWAG = {
    "ind": 4,
    "activity_label": "Removing ice from car",
    "ctx_a": "Then, the man writes over the snow.",
    "ctx_b": "then",
    "ctx": "Then, the man writes over the snow. then",
    "endings": [", he adds wax.", ", he gets in. [title] Drive", ", he sings.", ", he sleeps."],
    "source_id": "activitynet~v_-1IBHYS3L-Y",
    "split": "train",
    "split_type": "indomain",
    "label": "1",
}
LETTERED = {"text": CHOICES, "label": ["A", "B", "C", "D"]}
ROWS = {
    "hellaswag": HELLASWAG,
    "openbookqa": {"id": "7-980", "question_stem": "What shines?", "choices": LETTERED, "answerKey": "A"},
    "winogrande": {
        "sentence": "The digit did not fit the box because _ was too large.",
        "option1": "digit",
        "option2": "box",
        "answer": "1",
    },
    "arc_easy": {"id": "Mercury_417466", "question": "What shines by day?", "choices": LETTERED, "answerKey": "A"},
    "arc_challenge": {"id": "ACTAAP_1", "question": "What shines by night?", "choices": LETTERED, "answerKey": "C"},
    "boolq": {"question": "is a three a digit", "passage": "A three is a digit.", "idx": 0, "label": 1},
    "piqa": {"goal": "draw a three", "sol1": "Use a pen.", "sol2": "Use a stone.", "label": 0},
    "gsm8k": {"question": "Two and one?", "answer": "Two and one is <<2+1=3>>3.\n#### 3"},
    "hendrycks_math": {
        "problem": "What is $1+1$?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "It is $\\boxed{2}$.",
    },
    "mmlu": {"question": "What shines?", "subject": "anatomy", "choices": CHOICES, "answer": 0},
}
FOLDERS = {"hendrycks_math": "algebra", "mmlu": "anatomy"}  # groups: one subset of many


TEXT = {"hellaswag": "ctx_a", "openbookqa": "question_stem", "winogrande": "sentence", "piqa": "goal"}


def write(folder: Path, name: str) -> Path:
    of_task = folder / FOLDERS.get(name, "")
    of_task.mkdir(parents=True, exist_ok=True)
    row, text_of = ROWS[name], TEXT.get(name, "problem" if name == "hendrycks_math" else "question")
    for split in ("train", "validation", "test", "dev"):
        text = "".join(json.dumps(row | {text_of: f"{row[text_of]} {i}"}) + "\n" for i in range(2))
        (of_task / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def pipe():
    made = MDMPipeline.from_pretrained(CARD, device="cpu")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(autouse=True)
def _no_list_of_packages(monkeypatch):
    """lm-eval lists what is installed in every result, by running pip: two seconds a test."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def request(kind: str, *arguments, doc: int = 0) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("digits", doc, 1))


@pytest.mark.parametrize("name", list(TASK_FOLDERS))
def test_the_task_runs_on_its_data_sets_own_rows(name, tmp_path):
    given = "--data", str(write(tmp_path / "data", name)), "--num-fewshot", "1", "--num-draws", "4", "--limit", "2"
    found = evaluate(tmp_path, name, *given)
    assert found["num_samples"] in (2, 4)  # gsm8k reads an answer in two ways
    for score, (low, high) in zip(found["scores"].values(), found["intervals"].values(), strict=True):
        assert 0 <= low <= score <= high <= 1
    assert found["settings"]["benchmark"] == name
    assert len(found["settings"]["hash"]) == 12


def test_scores_are_the_aggregates_of_lm_eval_of_one_task_and_of_a_group_of_unequal_subsets(tmp_path, monkeypatch):
    """The oracle is lm-eval's own: what it says of each task, and of a group that weighs by size as mmlu does."""
    results: list[dict] = []
    evaluated = lm_eval_adapter.simple_evaluate

    def keeps(*args, **options):
        results.append(evaluated(*args, **options))
        return results[-1]

    monkeypatch.setattr(lm_eval_adapter, "simple_evaluate", keeps)
    sizes = {"anatomy": 5, "virology": 2}
    for subset, size in sizes.items():
        (folder := tmp_path / "data" / subset).mkdir(parents=True)
        for split, count in (("dev", 1), ("test", size)):
            rows = [ROWS["mmlu"] | {"question": f"What is {i}?", "answer": i % 4} for i in range(count)]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = evaluate(tmp_path, "mmlu", "--data", str(tmp_path / "data"), "--num-fewshot", "0", "--num-draws", "4")
    [theirs] = results
    assert set(ours["settings"]) >= OF_SETTINGS
    assert {one["effective"] for one in theirs["n-samples"].values()} == set(sizes.values())
    values = {task: [one["acc"] for one in some] for task, some in theirs["samples"].items()}
    for task, some in values.items():
        assert theirs["results"][task]["acc,none"] == pytest.approx(sum(some) / len(some))
    parts = [theirs["results"][task]["acc,none"] for task in values]
    assert ours["scores"]["acc"] == pytest.approx(
        aggregate_subtask_metrics(parts, [len(some) for some in values.values()], weight_by_size=True), abs=1e-4
    )
    for group in ("mmlu/default/_mmlu.yaml", "hendrycks_math/hendrycks_math.yaml"):
        text = (Path(lm_eval.__file__).parent / "tasks" / group).read_text()
        assert all(one["weight_by_size"] for one in yaml.safe_load(text)["aggregate_metric_list"])

    evaluate(tmp_path, "piqa", "--data", str(write(tmp_path / "one", "piqa")), "--num-draws", "4")
    assert json.loads((tmp_path / "result.json").read_text())["scores"] == {
        metric: pytest.approx(results[-1]["results"]["piqa"][f"{metric},none"], abs=1e-4)
        for metric in ("acc", "acc_norm")
    }


def test_the_hash_of_the_data_is_that_of_its_content_wherever_it_lies(tmp_path):
    here, there = (write(tmp_path / name, "mmlu") for name in ("here", "there"))
    assert data_hash(here) == data_hash(there)
    (there / "anatomy" / "test.jsonl").write_text("{}")
    assert data_hash(here) != data_hash(there)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ('{"goal": "draw', "whose line 2 is not whole JSON (Unterminated string starting at); need"),
        ("[1]", "whose line 2 is no JSON object; need one row of the Hub's data set a line"),
        ('{"goal": "draw", "sol2": null, "label": 0}', "whose line 2 has no 'sol1', 'sol2'; need one row"),
    ],
)
def test_a_broken_line_of_the_data_is_named_with_its_file_and_columns(line, why, tmp_path, capsys):
    file = write(tmp_path / "data", "piqa") / "validation.jsonl"
    file.write_text(json.dumps(ROWS["piqa"]) + "\n" + line + "\n")
    evaluate(tmp_path, "piqa", "--data", str(file.parent), status=2)
    assert f"Got --data with {file}, {why}" in (error := capsys.readouterr().err)
    assert "Traceback" not in error


def test_rows_that_datasets_makes_no_table_of_are_said_of_the_data(tmp_path, monkeypatch, capsys):
    def fails(*args, **options):
        raise DatasetGenerationError("An error occurred") from TypeError("Couldn't cast")

    monkeypatch.setattr("mdm_hf.evaluation.lm_eval_adapter.simple_evaluate", fails)
    folder = write(tmp_path / "data", "piqa")
    evaluate(tmp_path, "piqa", "--data", str(folder), status=2)
    said = f"Got --data {folder} for piqa, of which datasets makes no table (Couldn't cast); need rows of the Hub's"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", list(ROWS))
def test_no_column_of_a_row_is_asked_for_that_the_data_set_lacks_and_each_that_is_lacking_is_named(name, tmp_path):
    assert set(COLUMNS[name]) <= set(ROWS[name])
    for column in COLUMNS[name]:
        (path := tmp_path / "test.jsonl").write_text(json.dumps({k: v for k, v in ROWS[name].items() if k != column}))
        with pytest.raises(ValueError, match=f"{path}, whose line 1 has no '{column}'; need one row"):
            check_rows(path, COLUMNS[name])


def test_every_benchmark_of_lm_eval_is_on_the_command_line():
    assert set(ROWS) == set(TASK_FOLDERS)
    assert set(TASK_FOLDERS) <= set(BENCHMARKS)
    assert get_model("mdm") is MDMForLMEval


def test_a_log_likelihood_is_the_score_of_context_and_continuation_as_messages(pipe):
    lm = MDMForLMEval(pipe, num_draws=16)
    asked = [request("loglikelihood", "draw a digit", said) for said in ("this is a three", "zzqx ;;")]
    right, wrong = lm.loglikelihood(asked)
    assert right[0] > wrong[0] + 10
    assert not right[1]
    inputs = pipe.processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "text", "text": "draw a digit"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "this is a three"}]},
        ]
    )
    own = pipe.model.score(**inputs, num_samples=512, seeds=torch.tensor([0]))
    assert right[0] == pytest.approx(own.log_likelihood.item(), abs=4 * math.sqrt(32) * own.standard_error.item())


def test_choices_of_one_question_share_their_noise_and_batches_change_nothing(pipe):
    asked = [request("loglikelihood", "a digit", "it is a one", doc=doc) for doc in (0, 0, 1)]
    alone = MDMForLMEval(pipe, num_draws=4, batch_size=1).loglikelihood(asked)
    assert alone[0] == alone[1]
    assert alone[0] != alone[2]
    together = MDMForLMEval(pipe, num_draws=4).loglikelihood(asked)
    assert [a for a, _ in together] == pytest.approx([a for a, _ in alone], abs=1e-3)


def test_an_answer_longer_than_the_canvas_gets_a_longer_one_and_a_long_context_loses_its_start(pipe):
    lm = MDMForLMEval(pipe, num_draws=4)
    long = "it is a one " * 200
    found = lm.loglikelihood([request("loglikelihood", long + " and a nine", "it is a one " * 8)])
    assert math.isfinite(found[0][0])
    assert len(lm.truncated) == 1
    assert lm._messages(long + " and a nine")[0]["content"][0]["text"].endswith("and a nine")
    assert lm._messages("") == []


def test_generated_text_ends_where_a_stop_begins(pipe):
    options = {"until": ["is", "zzz"], "max_gen_toks": 8, "do_sample": False}
    whole = request("generate_until", "which digit?", {"until": [], "max_gen_toks": 8})
    cut = request("generate_until", "which digit?", options)
    lm = MDMForLMEval(pipe, sampling={"num_inference_steps": 8})
    full, short = lm.generate_until([whole, cut])
    assert full
    assert short == full.partition("is")[0]


def test_a_killed_run_asks_only_what_it_has_not_answered(pipe, tmp_path, monkeypatch):
    asked = [request("loglikelihood", "a digit", f"it is a {n}", doc=n) for n in range(6)]
    whole = MDMForLMEval(pipe, num_draws=4, batch_size=2).loglikelihood(asked)
    kept, calls = tmp_path / "answers.jsonl", []
    score = type(pipe.model).score

    def dies(self, *args, **kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe.model), "score", dies)
    with pytest.raises(KeyboardInterrupt):
        MDMForLMEval(pipe, kept, num_draws=4, batch_size=2).loglikelihood(asked)
    with open(kept, "a") as file:
        file.write('["score torn')
    again = MDMForLMEval(pipe, kept, num_draws=4, batch_size=2).loglikelihood(asked)
    assert calls == [2, 2, 2, 2]
    assert [a for a, _ in again] == pytest.approx([a for a, _ in whole], abs=1e-3)
    MDMForLMEval(pipe, kept, num_draws=4, batch_size=2).loglikelihood(asked)
    assert len(calls) == 4
    MDMForLMEval(pipe, kept, model_id="another", num_draws=4, batch_size=2).loglikelihood(asked[:2])
    assert len(calls) == 5


def test_rolling_requests_are_refused_with_the_reason(pipe):
    with pytest.raises(ValueError, match="no next-token probabilities to roll over a document; need tasks of"):
        MDMForLMEval(pipe).loglikelihood_rolling([request("loglikelihood_rolling", "a text")])


def test_without_network_and_without_data_the_remedy_is_said(tmp_path, capsys):
    arguments = ["--model", str(CARD), "--work-dir", str(tmp_path), "--benchmark", "piqa", "--limit", "1"]
    assert main(["evaluate", *arguments]) == 2
    assert "Got no data for piqa" in (error := capsys.readouterr().err)
    assert "or the same rows as --data FOLDER with <split>.jsonl" in error
    assert main(["evaluate", *arguments, "--data", str(tmp_path)]) == 2
    assert "without a file; need <split>.jsonl, one row of the Hub's data set a line" in capsys.readouterr().err
