"""MDM passes transformers' own test mixins; they run in a process of their own, since they patch global tables.

`python modeling_tests/test_upstream.py` runs them and writes what passed and what was skipped
into docs/conformance.md.
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers


FOLDER = Path(__file__).parent / "upstream"
DOCUMENT = FOLDER.parents[1] / "docs" / "conformance.md"
DOCUMENTED = "5.23.0"  # with it, on a machine without an accelerator, the tables have to be right
LEAST_PASSED = {
    "5.17": 102,
    "5.23": 120,
}  # that many pass; of versions between and after, as many as of the one before

MIXINS = {
    "MDMModelTest": ("`ModelTesterMixin`, `ConfigTester`", "`MDMModel`, `MDMForMultiModalGeneration`, `MDMConfig`"),
    "MDMImageProcessingTest": ("`ImageProcessingTestMixin`", "`MDMImageProcessorPil`"),
    "MDMProcessorTest": ("`ProcessorTesterMixin`", "`MDMProcessor`"),
}
# The mixins' own reasons by kind; what is in none of them stands as it is.
KINDS = {
    "there is no attention": r"[Aa]ttention|sdpa",
    "there is no RoPE and no table of positions": r"RoPE|position embeddings",
    "there are no experts and no tensor-parallel plan": r"expert|router|grouped_mm|TP plan",
    "no audio, no video: neither input nor package": r"audio|video|feature_extractor|librosa|Torchcodec",
    "one backend of the image processor, that of Pillow": r"2 backends|torchvision backend is not available",
    "transformers' own slow tests, which wait for `RUN_SLOW`": r"test is slow",
    "needs an accelerator, deepspeed or kernels, which this machine lacks": r"accelerator|deepspeed|MPS|kernels",
}


def run_mixins() -> str:
    """What pytest prints of them, with a line for each test that passed and each reason to skip."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "-rsp"]
    command += ["-o", "addopts=", str(FOLDER)]  # without --strict-markers: transformers has marks of its own
    folders = [str(FOLDER.parent), str(FOLDER.parents[1] / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    found = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    if "cannot fetch the source of transformers" in found.stdout + found.stderr:
        complaint = "pip cannot fetch transformers' source distribution here, which holds the mixins"
        pytest.fail(complaint) if os.environ.get("CI") else pytest.skip(complaint)
    assert found.returncode == 0, found.stdout[-6000:] + found.stderr[-2000:]
    return found.stdout


def least_passed(version: str) -> int:
    """How many have to pass under a version of transformers."""
    given = tuple(map(int, version.split(".")[:2]))
    known = {tuple(map(int, name.split("."))): least for name, least in LEAST_PASSED.items()}
    return known[max(name for name in known if name <= given)]


def tables(printed: str) -> str:
    """What passed, by mixin, and what was skipped, by reason, as two tables of Markdown."""
    passed = Counter(re.findall(r"^PASSED \S+::(\w+)::", printed, flags=re.MULTILINE))
    lines = [f"| mixin of transformers {transformers.__version__} | on | passed |", "|---|---|---|"]
    lines += [f"| {mixin} | {on} | {passed[name]} |" for name, (mixin, on) in MIXINS.items()]
    ours: Counter[str] = Counter()
    theirs: Counter[str] = Counter()
    for count, place, reason in re.findall(r"^SKIPPED \[(\d+)\] (\S+): (.*)$", printed, flags=re.MULTILINE):
        if "test_conformance.py" in place:
            ours[reason] += int(count)
        else:
            theirs[next((kind for kind, pattern in KINDS.items() if re.search(pattern, reason)), reason)] += int(count)
    for title, reasons in (("left out by us", ours), ("skipped by the mixins themselves", theirs)):
        lines += ["", f"| {title}: {reasons.total()} | tests |", "|---|---|"]
        lines += [f"| {reason} | {count} |" for reason, count in sorted(reasons.items(), key=lambda one: -one[1])]
    return "\n".join(lines)


def with_tables(document: str, printed: str) -> str:
    """The document with its tables as of this run."""
    start, end = "<!-- by modeling_tests/test_upstream.py -->\n", "<!-- until here -->\n"
    return f"{document.partition(start)[0]}{start}{tables(printed)}\n{end}{document.partition(end)[2]}"


def test_as_many_of_transformers_own_tests_pass_as_ever_and_the_document_lists_every_skip():
    printed = run_mixins()
    passed = int(re.findall(r"(\d+) passed", printed)[-1])
    assert passed >= least_passed(transformers.__version__), printed[-2000:]
    if transformers.__version__ == DOCUMENTED and not torch.accelerator.is_available():
        document = DOCUMENT.read_text(encoding="utf-8")
        assert with_tables(document, printed) == document, "run: python modeling_tests/test_upstream.py"


@pytest.mark.parametrize(("version", "least"), [("5.17.0", 102), ("5.20.1", 102), ("5.23.0", 120), ("5.24.0", 120)])
def test_each_version_has_its_least_number_of_passes(version, least):
    assert least_passed(version) == least


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_without_the_mixins_continuous_integration_fails_where_others_skip(monkeypatch, ci, outcome):
    printed = "RuntimeError: pip cannot fetch the source of transformers 5.23.0"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 4, printed, ""))
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match="pip cannot fetch transformers' source distribution here"):
        run_mixins()


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), run_mixins()), encoding="utf-8")
