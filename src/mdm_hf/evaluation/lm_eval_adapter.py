"""MDM in lm-eval-harness: `score` answers its loglikelihood requests, `generate` its generate_until requests.

- The context is the user's message, the continuation the assistant's. A diffusion model has no place inside a text
  where one ends and the other starts: the space between them is no part of either.
- log p is the bound of `score`. All choices of one question share times and noise, and a canvas long enough for the
  longest of them.
- Answers are kept in a file as they come: a run that was killed goes on where it was.
- Data sets come from the Hub by their own names, or from JSON lines in a folder, for machines without a network.
"""

import hashlib
import importlib.util
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets.exceptions import DatasetsError
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from ..choice_scores import score_conversations
from ..pipeline_mdm import MDMPipeline
from .results import (
    ResultCache,
    batches,
    bootstrap_interval,
    file_hash,
    result,
    sampling_of,
    settings_hash,
    settings_of,
)


# Benchmark -> the folder that lm-eval has it in. Reading one takes a moment, reading all of them half a minute.
TASK_FOLDERS = {
    "hellaswag": "hellaswag",
    "openbookqa": "openbookqa",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "gsm8k": "gsm8k",
    "hendrycks_math": "hendrycks_math",
    "mmlu": "mmlu/default",
}

# The columns of each that are read of a row.
COLUMNS = {
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "boolq": ("passage", "question", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "gsm8k": ("question", "answer"),
    "hendrycks_math": ("problem", "solution"),
    "mmlu": ("question", "choices", "answer"),
}


@register_model("mdm")
class MDMForLMEval(LM):
    """An [`MDMPipeline`] as a model of lm-eval.

    Args:
        pipe: Model and processor.
        cache: File for what has been answered; None keeps nothing.
        model_id: Part of a kept answer's key, beside the request and all that is named below.
        sampling: Options of `generate`.
        num_draws: Of `score`, for each choice.
        seed: Of all draws.
        batch_size: Requests at once, and rows of a network call.
    """

    def __init__(
        self,
        pipe: MDMPipeline,
        cache: Path | None = None,
        model_id: str = "",
        sampling: dict | None = None,
        num_draws: int = 32,
        seed: int = 0,
        batch_size: int = 64,
    ):
        super().__init__()
        self.pipe, self.processor, self.sampling = pipe, pipe.processor, sampling or {}
        self.num_draws, self.seed, self.batch_size = num_draws, seed, batch_size
        self.told = settings_hash({"model": model_id, "sampling": sampling, "num_draws": num_draws, "seed": seed})
        self.cache = None if cache is None else ResultCache(cache)
        self.known: dict[str, Any] = {} if self.cache is None else self.cache.values
        self.truncated: set[str] = set()  # contexts that were too long

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """[(bound on log p(continuation | context), False)]: whether sampling would give just the continuation is not
        looked into, so that metrics of greedy matches read 0."""
        canvas: dict[tuple, int] = {}
        for one in requests:
            question, needed = _question(one), len(self._ids(one.args[1]))
            canvas[question] = max(canvas.get(question, self.processor.max_new_tokens), needed)
        jobs = [(canvas[_question(one)], one.args, _question(one)) for one in requests]

        def answer(size: int, batch: list) -> list[float]:
            asked = [[*self._messages(context), _said("assistant", said)] for (context, said), _ in batch]
            seeds = [self._seed_of(question) for _, question in batch]
            draws, _, _ = score_conversations(
                self.pipe.model, self.processor, asked, seeds, self.num_draws, self.batch_size, size
            )
            return draws.mean(1).tolist()

        return [(value, False) for value in self._answers("score", jobs, answer)]

    def loglikelihood_rolling(self, requests: list) -> list[float]:
        raise ValueError(
            f"Got {len(requests)} requests for the rolling log-likelihood of documents; MDM bounds the probability of "
            "a whole answer on one canvas and has no next-token probabilities to roll over a document; need tasks of "
            "loglikelihood or generate_until; for a text that fits a canvas, call model.score."
        )

    def generate_until(self, requests: list) -> list[str]:
        """Texts on a canvas of `max_gen_toks` tokens, cut where the first of `until` begins. All tokens are drawn at
        once, from a seed of the request's own: temperature and do_sample have no effect."""
        jobs = []
        for one in requests:
            context, options = one.args
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            canvas = int(options.get("max_gen_toks", self.processor.max_new_tokens))
            jobs.append((canvas, (context, until), _question(one)))

        def answer(size: int, batch: list) -> list[str]:
            asked = [self._messages(context) or [_said("user", "")] for (context, _), _ in batch]
            inputs = self.processor.apply_chat_template(asked, generate="text", max_new_tokens=size)
            generators = [torch.Generator().manual_seed(self._seed_of(question)) for _, question in batch]
            model = self.pipe.model
            outputs = model.generate(**inputs.to(model.device), generator=generators, **self.sampling)
            texts = self.processor.post_process_image_text_to_text(outputs)
            return [_cut(text, until) for text, ((_, until), _) in zip(texts, batch, strict=True)]

        return self._answers("generate", jobs, answer)

    def _answers(self, kind: str, jobs: list[tuple], answer) -> list:
        """The answer to each of `jobs`, (canvas, request, question): kept ones, and the others a batch at a time, of
        one canvas and similar lengths each. `answer(canvas, batch)` answers a batch of (request, question)."""
        keys = [f"{kind} {self.told} {_digest(job)}" for job in jobs]
        left = [i for i in range(len(jobs)) if keys[i] not in self.known]
        left.sort(key=lambda i: (jobs[i][0], sum(map(len, jobs[i][1])), jobs[i][2]))
        for part in batches(len(left), self.batch_size, kind, lambda _: False):
            chosen = [left[i] for i in part]
            for canvas in sorted({jobs[i][0] for i in chosen}):
                same = [i for i in chosen if jobs[i][0] == canvas]
                answers = answer(canvas, [jobs[i][1:] for i in same])
                found = {keys[i]: one for i, one in zip(same, answers, strict=True)}
                self.known |= found
                if self.cache is not None:
                    self.cache.put(found)
        return [self.known[key] for key in keys]

    def _ids(self, text: str) -> list[int]:
        return self.processor.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _messages(self, context: str) -> list[dict]:
        """The context as a message, without its beginning where it is longer than the model takes."""
        ids, most = self._ids(context), self.processor.tokenizer.model_max_length
        while len(ids) > most:
            self.truncated.add(context)
            ids = self._ids(text := self.processor.tokenizer.decode(ids[len(ids) - most + 1 :]))
            context = text
        return [_said("user", context)] if context.strip() else []

    def _seed_of(self, question: tuple) -> int:
        return int(_digest((self.seed, question))[:12], 16)


def _said(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _question(request) -> tuple:
    """What the choices of one question have in common."""
    return ("", request.args[0]) if request.doc_id is None else (request.task_name, request.doc_id)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _cut(text: str, until: Sequence[str]) -> str:
    found = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(found)] if found else text


def leaves(index: dict, name: str) -> list[str]:
    """The tasks of a task, group or tag."""
    entry = index[name]
    parts = {"GROUP": lambda: entry.cfg["task"], "TAG": lambda: sorted(entry.tags)}.get(entry.kind.name)
    return [name] if parts is None else [leaf for part in parts() for leaf in leaves(index, part)]


def check_rows(path: Path, columns: Sequence[str]) -> None:
    """Looks through a file of JSON lines before it is scored on.

    Raises:
        ValueError: a line that is no JSON object, or lacks one of `columns`.
    """
    remedy = "need one row of the Hub's data set a line; write them with datasets' Dataset.to_json."
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.strip())
            except ValueError as error:
                why = getattr(error, "msg", error)  # the place it names is one of the line alone
                raise ValueError(
                    f"Got --data with {path}, whose line {number} is not whole JSON ({why}); {remedy}"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"Got --data with {path}, whose line {number} is no JSON object; {remedy}")
            if lacking := [name for name in columns if row.get(name) is None]:
                raise ValueError(
                    f"Got --data with {path}, whose line {number} has no {', '.join(map(repr, lacking))}; {remedy}"
                )


def write_local_tasks(
    index: dict, names: list[str], data: Path, folder: Path, columns: Sequence[str] = ()
) -> list[str]:
    """Copies of the tasks that read JSON lines instead of the Hub's data sets, written to `folder`: their names.

    Args:
        data: Folder with <split>.jsonl, or of a group with a folder of those for each subset that is to be run.
        columns: What every row has to have.

    Raises:
        ValueError: there is no such file, or one that `check_rows` refuses.
    """
    found = []
    for name in names:
        subset = index[name].cfg.get("dataset_name")
        of_task = data if len(names) == 1 else data / str(subset)
        files = {path.stem: str(path.resolve()) for path in sorted(of_task.glob("*.jsonl"))}
        for path in files.values():
            check_rows(Path(path), columns)
        if files:
            change = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
            text = yaml.safe_dump({"include": str(index[name].yaml_path), "task": name, **change})
            (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
            found.append(name)
    if not found:
        subsets = (
            "" if len(names) == 1 else " in folders " + ", ".join(str(index[n].cfg["dataset_name"]) for n in names)
        )
        raise ValueError(
            f"Got --data {data} without a file; need <split>.jsonl{subsets}, one row of the Hub's data set a line, "
            "such as validation.jsonl; write them with datasets' Dataset.to_json."
        )
    return found


def data_hash(data: Path) -> str:
    """A hash of the names and contents of a folder's files of JSON lines."""
    return settings_hash({path.relative_to(data).as_posix(): file_hash(path) for path in data.rglob("*.jsonl")})


def pooled(samples: dict[str, list[dict]]) -> dict[str, list[float]]:
    """Every metric's value of every question, those of all tasks together."""
    values: dict[str, list[float]] = {}
    for sample in (one for of_task in samples.values() for one in of_task):
        kind = "" if sample.get("filter", "none") == "none" else f" ({sample['filter']})"
        for metric in sample["metrics"]:
            values.setdefault(metric + kind, []).append(float(sample[metric]))
    return values


def run(options) -> dict:
    """The benchmarks of lm-eval on the command line.

    Raises:
        ValueError: the data cannot be had.
    """
    started, name = time.perf_counter(), options.benchmark
    pipe = MDMPipeline.from_pretrained(options.model)
    sampling = sampling_of(options, pipe)
    of_draws = {"num_draws": options.num_draws, "seed": options.seed[0]}
    cache = options.work_dir / f"{name}.jsonl"
    of_model = settings_of(options, pipe)
    lm = MDMForLMEval(pipe, cache, settings_hash(of_model), sampling, **of_draws, batch_size=options.batch_size)
    own = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    manager = TaskManager(include_path=str(own / TASK_FOLDERS[name]), include_defaults=False)
    with tempfile.TemporaryDirectory() as folder:
        names = leaves(manager.task_index, name)
        if options.data is not None:
            names = write_local_tasks(manager.task_index, names, options.data, Path(folder), COLUMNS[name])
            manager = TaskManager(include_path=folder, include_defaults=False)
        try:
            found = simple_evaluate(
                lm,
                tasks=list(names),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                task_manager=manager,
                bootstrap_iters=0,
            )
        except DatasetsError as error:
            where = "no --data" if options.data is None else f"--data {options.data}"
            raise ValueError(
                f"Got {where} for {name}, of which datasets makes no table ({error.__cause__ or error}); need rows of "
                "the Hub's data set, each column of one type; write them with datasets' Dataset.to_json."
            ) from error
        except OSError as error:  # of datasets and huggingface_hub, where there is no network and no cache
            raise ValueError(
                f"Got no data for {name} ({error}); need the network, to fetch from the Hub, once, what lm-eval "
                "scores on, or the same rows as --data FOLDER with <split>.jsonl."
            ) from error
    values = pooled(found["samples"])
    settings = {
        "benchmark": name,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "tasks": {task: found["versions"].get(task) for task in names},
        "data": None if options.data is None else data_hash(options.data),
        **of_draws,
        **of_model,
    }
    return result(
        {metric: float(np.mean(v)) for metric, v in values.items()},
        {metric: bootstrap_interval(v) for metric, v in values.items()},
        settings,
        started,
        num_samples=len(next(iter(values.values()))),
        num_truncated_contexts=len(lm.truncated),
    )
