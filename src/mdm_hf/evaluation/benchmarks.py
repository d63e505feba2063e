"""What `mdm evaluate --benchmark NAME` runs: one line a benchmark.

A benchmark is a function of the parsed command line that returns a dict with `scores` ({name: number}), `settings`
with their `hash`, `seconds`, and, where it has them, `intervals` ({name: [low, high]}, 95%).
"""

from dataclasses import dataclass
from importlib import import_module


OF_FILES = ("data", "limit", "batch_size", "work_dir")
OF_PICTURES = ("images", *OF_FILES)
OF_LM_EVAL = ("num_draws", "num_fewshot", *OF_FILES)


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's function is, "file:function" in this folder, what it measures, and what it reads of the
    command line beside what all do.

    It is imported when it runs: what one benchmark needs, no other has to have.
    """

    function: str
    help: str
    options: tuple[str, ...]


BENCHMARKS = {
    "digits": Benchmark("digits:run", "the six tasks of mdm-digits, judged by a classifier", ("num_samples",)),
    "digits-editing": Benchmark(
        "digits_editing:run",
        "parts of digits and captions, and pictures of several digits",
        ("num_samples", "work_dir"),
    ),
    "shapes": Benchmark(
        "shapes:run", "the paper's tasks on the shapes world, judged by a program", ("num_samples", "tasks", "split")
    ),
    "fid": Benchmark("image_quality:run", "FID, IS, precision and recall of pictures", ("inception", *OF_PICTURES)),
    "coco-captions": Benchmark("captioning:run", "CIDEr of captions, COCO's files", ("prompt", *OF_PICTURES)),
    "flickr30k-captions": Benchmark(
        "captioning:run", "CIDEr of captions, Karpathy's split of Flickr30K", ("prompt", *OF_PICTURES)
    ),
    "vqav2": Benchmark("visual_questions:run", "soft accuracy of answers", OF_PICTURES),
    "vizwiz": Benchmark("visual_questions:run", "soft accuracy of answers, unanswerable ones among them", OF_PICTURES),
    "okvqa": Benchmark("visual_questions:run", "soft accuracy of answers that take knowledge", OF_PICTURES),
    "geneval": Benchmark("geneval:run", "draws pictures for GenEval's own scorer", OF_FILES),
    # lm-eval's, by its own names
    "hellaswag": Benchmark("lm_eval_adapter:run", "which ending follows", OF_LM_EVAL),
    "openbookqa": Benchmark("lm_eval_adapter:run", "science questions", OF_LM_EVAL),
    "winogrande": Benchmark("lm_eval_adapter:run", "whom a pronoun means", OF_LM_EVAL),
    "arc_easy": Benchmark("lm_eval_adapter:run", "science questions", OF_LM_EVAL),
    "arc_challenge": Benchmark("lm_eval_adapter:run", "harder science questions", OF_LM_EVAL),
    "boolq": Benchmark("lm_eval_adapter:run", "yes or no, from a passage", OF_LM_EVAL),
    "piqa": Benchmark("lm_eval_adapter:run", "how things are done", OF_LM_EVAL),
    "gsm8k": Benchmark("lm_eval_adapter:run", "school mathematics in words", OF_LM_EVAL),
    "hendrycks_math": Benchmark("lm_eval_adapter:run", "MATH: competition problems", OF_LM_EVAL),
    "mmlu": Benchmark("lm_eval_adapter:run", "57 subjects", OF_LM_EVAL),
}
OPTIONS = {option for benchmark in BENCHMARKS.values() for option in benchmark.options}


def run_benchmark(name: str, options) -> dict:
    """The result of benchmark `name` with the command line's `options`, whose `default_of` tells what was not given.

    Raises:
        ValueError: no such benchmark; an option that it does not read.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"Got --benchmark {name}; need one of {', '.join(BENCHMARKS)}; check the spelling.")
    if name != "digits" and len(options.seed) > 1:
        raise ValueError(
            f"Got --seed with {len(options.seed)} seeds for {name}, which takes one and gives intervals; need one; "
            "only digits averages over several."
        )
    others = sorted(OPTIONS.difference(BENCHMARKS[name].options))
    idle = [option for option in others if getattr(options, option) != options.default_of(option)]
    if idle:
        flags, read = (
            ", ".join(f"--{option.replace('_', '-')}" for option in some) for some in (idle, BENCHMARKS[name].options)
        )
        raise ValueError(
            f"Got {flags} for {name}, which reads no such option; need {read} at most; leave the others out."
        )
    file, _, function = BENCHMARKS[name].function.partition(":")
    try:
        module = import_module(f".{file}", __package__)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Got --benchmark {name} without {error.name} installed; need the extra `eval`; run: pip install "
            '"mdm-hf[eval]"'
        ) from error
    return getattr(module, function)(options)
