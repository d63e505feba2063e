"""Who may import whom. The arrows, and why they hold:

- ops know tensors and scalars, never a config: they can be read, tested and reused alone
- processing knows no model, so that a data loader or a server's front end need not build one
- nothing at runtime needs training, evaluation or the command line: what travels to the Hub is what samples
- the Hub exporter of transformers finds a file's companions by reading the lines `from .name import x`, one folder
  deep; any other spelling is silently left behind, or crashes the save

All checks read the source with `ast` and import nothing of the package: a file that fails to import is checked too.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "mdm_hf"

OPS = {
    "noise_schedule",
    "seeded_noise",
    "custom_ops",
    "scan_switch",
    "causal_conv",
    "ssd_chunks",
    "ssd",
    "fused_scan",
    "score_entropy",
}
CONFIGURATION = {"configuration_mdm"}
LAYOUT = {"sequence_layout", "input_checks"}  # how a row of token ids is read: between the ops and the models
MODELS = {"modeling_mdm_vae", "modeling_mdm_block", "modeling_mdm_attention", "modeling_mdm"}
PROCESSING = {
    "image_reading",
    "image_processing_mdm",
    "conversations",
    "known_images",
    "processing_mdm",
    "processing_options",
}

# Each runtime file and the siblings it may import. A new file takes its place here, and in the house's plan.
ARROWS: dict[str, set[str]] = {
    "allocator": set(),  # of a process as a whole: no file of a model may set it
    "pixel_autoencoder": set(),
    "configuration_mdm": {"pixel_autoencoder"},  # what stands in a config, it says itself
    "noise_schedule": set(),
    "seeded_noise": set(),
    "custom_ops": set(),
    "scan_switch": {"custom_ops"},
    "causal_conv": {"custom_ops"},
    "ssd_chunks": set(),
    "ssd_kernels": {"custom_ops"},
    "ssd": {"custom_ops", "ssd_chunks", "ssd_kernels"},
    "fused_scan": {"custom_ops", "causal_conv", "scan_switch", "ssd_kernels"},
    "score_entropy": {"noise_schedule"},
    "sequence_layout": CONFIGURATION | OPS,
    "input_checks": CONFIGURATION | {"prompts", "sequence_layout"},
    "checkpoints": set(),
    "prompts": set(),
    "watching": {"input_checks"},
    "fingerprint": set(),
    "solvers": CONFIGURATION | {"checkpoints"},
    "step_calibration": CONFIGURATION | {"sequence_layout", "scan_switch"},
    "generation_configuration_mdm": {"prompts", "step_calibration"},
    "generation_mdm": CONFIGURATION
    | OPS
    | LAYOUT
    | {
        "fingerprint",
        "checkpoints",
        "denoiser",
        "generation_configuration_mdm",
        "solvers",
        "step_calibration",
    },  # called on self, so it never names the model
    "denoiser": OPS | LAYOUT,
    "scoring_mdm": CONFIGURATION | OPS | LAYOUT | {"modeling_mdm_vae"},  # called on self, as generation is
    "modeling_mdm_vae": CONFIGURATION | OPS | {"checkpoints"},
    "modeling_mdm_block": CONFIGURATION | OPS | LAYOUT | {"checkpoints"},
    "conversation_state": CONFIGURATION | LAYOUT | {"fingerprint", "modeling_mdm_block"},
    "modality_gate": CONFIGURATION | LAYOUT,
    "modeling_mdm_attention": CONFIGURATION | LAYOUT | {"modeling_mdm_block"},
    "modeling_mdm": CONFIGURATION
    | OPS
    | LAYOUT
    | {
        "checkpoints",
        "generation_mdm",
        "generation_configuration_mdm",
        "modeling_mdm_vae",
        "modeling_mdm_block",
        "modeling_mdm_attention",
    }
    | {"conversation_state", "modality_gate", "pixel_autoencoder", "scoring_mdm"},
    "image_reading": set(),
    "image_processing_mdm": {"image_reading"},
    "token_rows": set(),
    "conversations": {"prompts"},
    "processing_options": {"image_processing_mdm", "prompts"},
    "known_images": {"conversations", "image_processing_mdm"},
    "processing_mdm": {"conversations", "known_images", "processing_options", "prompts", "token_rows"},
    "choice_scores": {"prompts", "scoring_mdm"},
    "dialogue": {"conversation_state", "conversations", "input_checks", "prompts", "watching"},
    "pipeline_loading": PROCESSING | MODELS | {"checkpoints", "generation_configuration_mdm", "solvers"},
    "pipeline_mdm": PROCESSING
    | {"checkpoints", "choice_scores", "conversation_state", "dialogue", "generation_configuration_mdm"}
    | {"pipeline_loading", "prompts", "solvers", "watching"},
}
ARROWS["__init__"] = set(ARROWS)
CORE = set(ARROWS) - {"__init__", "ssd_kernels"} - LAYOUT
NEVER_AT_RUNTIME = {"cli"}  # stays at home, beside the folders training/ and evaluation/

# The files of training/: the siblings each may import, beside anything at runtime. Only readers.py reads data sets.
TRAINING_ARROWS: dict[str, set[str]] = {
    "allocator": set(),  # of a process as a whole: no file of a model may set it
    "__init__": set(),
    "blocks": set(),
    "gaps": set(),
    "records": {"blocks", "gaps"},
    "adapters": {"records"},
    "readers": {"records", "adapters"},
    "mix": {"records"},
    "digits": {"gaps", "records"},
    "measures": set(),
    "latent_cache": set(),
    "tokenizer": set(),
    "recipe": {"records", "gate"},  # how few conversations a gate is fitted to
    "memory": set(),
    "muon": set(),
    "gate": set(),
    "trainer": {"measures"},
    "pictures": {"mix"},
    "assembly": {"blocks", "records", "latent_cache", "readers", "mix", "digits", "tokenizer", "recipe", "muon"},
    "stages": {"recipe", "assembly", "gate", "trainer", "pictures"},
    "dry_run": {"memory", "recipe", "trainer", "pictures", "assembly"},
}
NEEDS_NO_MODEL = {"records", "adapters", "readers", "mix", "digits"}  # a DataLoader's worker imports these

KERNEL_PACKAGES = {"mamba_ssm", "causal_conv1d", "triton"}
OPS_MAY_IMPORT = {"torch", "einops", "math", "typing", "collections", "dataclasses", "functools", "itertools"}
DISTRIBUTION_TO_MODULE = {"pillow": "PIL"}


@dataclass(frozen=True)
class Import:
    line: int
    level: int  # how many dots
    module: str  # "" in `from . import x`
    names: tuple[str, ...]
    optional: bool  # inside `try`; all others, in functions too, transformers demands when it loads from the Hub

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def read_imports(tree: ast.AST, optional: bool = False) -> Iterator[Import]:
    """Every import of a file, lazy ones inside functions too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, 0, alias.name, (), optional)
        elif isinstance(node, ast.ImportFrom):
            names = tuple(alias.name for alias in node.names)
            yield Import(node.lineno, node.level, node.module or "", names, optional)
        yield from read_imports(node, optional or isinstance(node, ast.Try))


def names_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every identifier and every string with its line, docstrings aside: they may speak of anything."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def calls_at_import(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """Statements that only call something while the file is being imported: (line, name of what is called)."""
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            called = node.value.func
            yield node.lineno, called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        elif isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.Try):
            for field in ("body", "orelse", "finalbody"):
                yield from calls_at_import(getattr(node, field, []))


def declared_dependencies() -> set[str]:
    with open(ROOT / "pyproject.toml", "rb") as file:
        requirements = tomllib.load(file)["project"]["dependencies"]
    names = [re.match(r"[\w-]+", requirement)[0].lower().replace("-", "_") for requirement in requirements]
    return {DISTRIBUTION_TO_MODULE.get(name, name) for name in names}


def broken_arrows(name: str, source: str) -> list[str]:
    """What is wrong with the imports of the runtime file `name`.py, one sentence each."""
    tree = ast.parse(source)
    imports = list(read_imports(tree))
    faults = []

    def fault(line: int, sentence: str) -> None:
        faults.append(f"{name}.py:{line}: {sentence}")

    for found in imports:
        if found.level:
            if found.level > 1 or not found.module or "." in found.module:
                spelled = "." * found.level + found.module
                fault(found.line, f"got `from {spelled} import ...`; the Hub exporter needs `from .name import x`")
            elif found.module not in ARROWS[name]:
                allowed = ", ".join(sorted(ARROWS[name])) or "no sibling"
                fault(found.line, f"got an import of .{found.module}; this file may import {allowed}")
        elif found.top == "mdm_hf":
            fault(found.line, f"got an absolute import of {found.module}; write `from .name import x`")
        elif found.top in KERNEL_PACKAGES and name != "ssd_kernels":
            fault(found.line, f"got an import of {found.module}; only ssd_kernels.py may name a kernel package")
        elif name in OPS and found.top not in OPS_MAY_IMPORT:
            fault(found.line, f"got an import of {found.module}; ops import only torch, einops and plain Python")
        elif not found.optional and found.top not in sys.stdlib_module_names | declared_dependencies():
            fault(found.line, f"got an import of {found.module}, no dependency; put it in `try` or in pyproject.toml")

    # What the exporter reads as an import must be one: a docstring line that looks like one makes it copy, or crash.
    exporter_reads = re.findall(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)\s*$", source, flags=re.MULTILINE)
    for extra in {a or b for a, b in exporter_reads} - {found.module for found in imports if found.level}:
        fault(1, f"text that looks like an import of .{extra}; reword it, the Hub exporter would follow it")

    if name != "ssd_kernels":
        for line, word in names_in(tree):
            if word.partition(".")[0] in KERNEL_PACKAGES:
                fault(line, f"names {word}; only ssd_kernels.py may name a kernel package")

    if name in OPS:
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and "config" in node.arg:
                fault(node.lineno, f"takes an argument {node.arg}; ops take tensors and scalars, never a config")

    for line, called in calls_at_import(tree.body):
        if not called.startswith("register"):
            fault(line, f"calls {called} at import; nothing but registration may act at import")
    return faults


def runtime_files() -> list[Path]:
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem not in NEVER_AT_RUNTIME)


@pytest.mark.parametrize("name", sorted(CORE))
def test_the_core_file_exists(name: str) -> None:
    assert (PACKAGE / f"{name}.py").is_file()


@pytest.mark.parametrize("path", runtime_files(), ids=lambda path: path.stem)
def test_every_arrow_of_the_runtime_file_holds(path: Path) -> None:
    assert path.stem in ARROWS, f"{path.name} has no place in ARROWS: say there which siblings it may import"
    assert broken_arrows(path.stem, path.read_text(encoding="utf-8")) == []


def test_the_arrows_form_no_cycle() -> None:
    pending = {name: set(targets) for name, targets in ARROWS.items() if name != "__init__"}
    while leaves := {name for name, targets in pending.items() if not targets & pending.keys()}:
        pending = {name: targets for name, targets in pending.items() if name not in leaves}
    assert not pending


def test_runtime_files_lie_flat() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders <= {"training", "evaluation", "publishing", "conversion"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "training").glob("*.py")), ids=lambda path: path.stem)
def test_every_arrow_of_the_training_file_holds(path: Path) -> None:
    assert path.stem in TRAINING_ARROWS, f"{path.name} has no place in TRAINING_ARROWS"
    imports = list(read_imports(ast.parse(path.read_text(encoding="utf-8"))))
    assert {found.module for found in imports if found.level == 1} <= TRAINING_ARROWS[path.stem]
    if path.stem in NEEDS_NO_MODEL:
        assert not [found.module for found in imports if found.level > 1]
    if path.stem != "readers":
        assert not [found.module for found in imports if not found.level and found.top == "datasets"]


def test_no_file_of_the_repository_imports_torchvision() -> None:
    folders = ["src", "examples", "benchmarks", "model_cards", "modeling_tests"]
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > len(CORE)
    importers = [
        f"{path.relative_to(ROOT)}:{found.line}"
        for path in sources
        for found in read_imports(ast.parse(path.read_text(encoding="utf-8")))
        if found.top == "torchvision"
    ]
    assert importers == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ssd", "from .configuration_mdm import MDMConfig"),
        ("ssd", "import numpy"),
        ("ssd", "def ssd(x, config): ..."),
        ("ssd", "if find_spec('mamba_ssm.ops'): ..."),
        ("ssd", "def f():\n    import triton"),
        ("ssd_kernels", "def f():\n    import triton"),
        ("score_entropy", "def f():\n    from .modeling_mdm import MDMModel"),
        ("scan_switch", "print('loaded')"),
        ("modeling_mdm", "from . import ssd"),
        ("modeling_mdm", "from .ops.ssd import ssd"),
        ("modeling_mdm", "from ..mdm_hf.ssd import ssd"),
        ("modeling_mdm", "from mdm_hf.ssd import ssd"),
        ("modeling_mdm", "import mdm_hf.ssd"),
        ("modeling_mdm", "from .training import Trainer"),
        ("modeling_mdm", "from .processing_mdm import MDMProcessor"),
        ("modeling_mdm", "import sklearn"),
        ("modeling_mdm", "try:\n    from mamba_ssm import Mamba2\nexcept ImportError:\n    pass"),
        ("modeling_mdm", "try:\n    download()\nexcept OSError:\n    pass"),
        ("modeling_mdm", '"""\nfrom .elsewhere import x\n"""'),
        ("generation_mdm", "from .modeling_mdm import MDMModel"),
        ("processing_mdm", "from .modeling_mdm import MDMModel"),
        ("processing_mdm", "from .generation_mdm import MDMGenerationConfig"),
        ("image_processing_mdm", "import torchvision"),
        ("pipeline_mdm", "from .cli import main"),
        ("__init__", "from .evaluation import fid"),
    ],
)
def test_a_broken_arrow_is_seen(name: str, source: str) -> None:
    assert len(broken_arrows(name, source)) >= 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ssd", '"""Falls back from mamba_ssm."""\nimport math\nimport torch\nfrom .ssd_kernels import fused_scan'),
        ("ssd_kernels", "def f():\n    try:\n        import triton\n    except ImportError:\n        return None"),
        ("ssd_kernels", "import importlib\nscan = importlib.import_module('mamba_ssm.ops.triton.ssd_combined')"),
        ("modeling_mdm", "from .ssd import ssd\ntry:\n    import peft\nexcept ImportError:\n    peft = None"),
        ("image_processing_mdm", "from PIL import Image\nimport numpy as np"),
        ("__init__", "from .modeling_mdm import MDMModel\nAutoModel.register(1, 2)"),
    ],
)
def test_an_arrow_that_holds_is_let_through(name: str, source: str) -> None:
    assert broken_arrows(name, source) == []
