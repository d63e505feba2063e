"""What `mdm evaluate --benchmark NAME` runs: one line a benchmark.

A benchmark is a function of the parsed command line that returns a dict with `scores` ({name: number}), `settings`
with their `hash`, `seconds`, and, where it has them, `intervals` ({name: [low, high]}, 95%).
"""

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's function is, "file:function" in this folder, and what it measures.

    It is imported when it runs: what one benchmark needs, no other has to have.
    """

    function: str
    help: str


BENCHMARKS = {
    "digits": Benchmark("digits:run", "the six tasks of mdm-digits, judged by a classifier"),
    "digits-editing": Benchmark("digits_editing:run", "parts of digits and captions, and pictures of several digits"),
    "shapes": Benchmark("shapes:run", "the paper's tasks on the shapes world, judged by a program"),
    "fid": Benchmark("image_quality:run", "FID, IS, precision and recall of pictures"),
    "coco-captions": Benchmark("captioning:run", "CIDEr of captions, COCO's files"),
    "flickr30k-captions": Benchmark("captioning:run", "CIDEr of captions, Karpathy's split of Flickr30K"),
    "vqav2": Benchmark("visual_questions:run", "soft accuracy of answers"),
    "vizwiz": Benchmark("visual_questions:run", "soft accuracy of answers, unanswerable ones among them"),
    "okvqa": Benchmark("visual_questions:run", "soft accuracy of answers that take knowledge"),
    "geneval": Benchmark("geneval:run", "draws pictures for GenEval's own scorer"),
    # lm-eval's, by its own names
    "hellaswag": Benchmark("lm_eval_adapter:run", "which ending follows"),
    "openbookqa": Benchmark("lm_eval_adapter:run", "science questions"),
    "winogrande": Benchmark("lm_eval_adapter:run", "whom a pronoun means"),
    "arc_easy": Benchmark("lm_eval_adapter:run", "science questions"),
    "arc_challenge": Benchmark("lm_eval_adapter:run", "harder science questions"),
    "boolq": Benchmark("lm_eval_adapter:run", "yes or no, from a passage"),
    "piqa": Benchmark("lm_eval_adapter:run", "how things are done"),
    "gsm8k": Benchmark("lm_eval_adapter:run", "school mathematics in words"),
    "hendrycks_math": Benchmark("lm_eval_adapter:run", "MATH: competition problems"),
    "mmlu": Benchmark("lm_eval_adapter:run", "57 subjects"),
}


def run_benchmark(name: str, options) -> dict:
    """The result of benchmark `name` with the command line's `options`.

    Raises:
        ValueError: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"Got --benchmark {name}; need one of {', '.join(BENCHMARKS)}; check the spelling.")
    if name != "digits" and len(options.seed) > 1:
        raise ValueError(
            f"Got --seed with {len(options.seed)} seeds for {name}, which takes one and gives intervals; need one; "
            "only digits averages over several."
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
