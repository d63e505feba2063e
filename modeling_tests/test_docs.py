"""The documentation is whole and true: what is public is described, examples print what they say, pages build.

What an API page shows stands in its lines `::: name`, with `members: [...]` where it shows a module in part; they are
read here, so that all but the last test need nothing that builds the site.

A block fenced as `python` in a page of `docs/` runs here, in a folder of its own that has the model cards. Two kinds
do not: one below a comment `<!-- not run: why -->`, and one that names `org/...`, a repository of the reader's.
"""

import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image
from test_readme import (
    ROOT,
    Block,
    exit_code_of_help,
    files_named,
    make_targets_named,
    python_blocks,
    subcommands_named,
)

import mdm_hf


DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SOURCES = sorted((ROOT / "src" / "mdm_hf").rglob("*.py"))
DIRECTIVE = re.compile(r"^::: (mdm_hf[\w.]*)$(?:\n    options: \{.*?(?:members: (\[.*?\]|false))?\})?", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![\[(])")
PLACEHOLDER = re.compile(r"[\"']org/")
NEEDS = {"mdm_hf.publishing.space.": "gradio"}  # what is not in every environment: `make test-space` has it
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
# Where a newcomer looks first: each has an example that is run.
SHOWN = {
    "causal_conv.causal_conv",
    "configuration_mdm.MDMConfig",
    "noise_schedule.add_noise",
    "noise_schedule.alpha_bar_table",
    "pipeline_mdm.MDMPipeline",
    "processing_mdm.MDMProcessor",
    "scan_switch.image_scan_order",
    "scan_switch.scan",
    "score_entropy.score_entropy",
    "ssd.ssd",
}


def named(name: str) -> Any:
    """The object of a dotted name."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        if importlib.util.find_spec(parts[0]) and (size == 1 or _is_module(module)):
            found = importlib.import_module(module)
            for part in parts[size:]:
                found = getattr(found, part)
            return found
    raise ImportError(name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def shown_on_pages() -> dict[str, list[str] | None]:
    """What the API pages show: name -> which of its members, None for all."""
    found: dict[str, list[str] | None] = {}
    for page in PAGES:
        for name, members in DIRECTIVE.findall(page.read_text(encoding="utf-8")):
            assert name not in found, f"{name} stands on two pages"
            shown = None if not members else [] if members == "false" else re.findall(r"\w+", members)
            found[name] = shown
    return found


def directives() -> dict[str, list[str] | None]:
    """What the API pages show and can be looked at here: some modules need an extra."""
    missing = tuple(module for module, extra in NEEDS.items() if not _is_module(extra))
    return {name: members for name, members in shown_on_pages().items() if not name.startswith(missing)}


def documented() -> dict[str, Any]:
    """Name -> the classes and functions that the API pages show, those of whole modules too."""
    found = {}
    for name, members in directives().items():
        thing = named(name)
        if not inspect.ismodule(thing):
            found[name] = thing
            continue
        own = [key for key, value in vars(thing).items() if getattr(value, "__module__", None) == name]
        for member in [key for key in own if not key.startswith("_")] if members is None else members:
            if inspect.isroutine(vars(thing)[member]) or inspect.isclass(vars(thing)[member]):
                found[f"{name}.{member}"] = vars(thing)[member]
    return found


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that the package adds to a class, and what a call does."""
    outside = [other for other in cls.__mro__ if not other.__module__.startswith("mdm_hf")]
    for base in [base for base in cls.__mro__ if base.__module__.startswith("mdm_hf")]:
        for name, value in vars(base).items():
            inherited = any(name in vars(other) for other in outside) or name.startswith("validate_")
            if name != "__call__" and (name.startswith("_") or inherited):
                continue
            plain = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if inspect.isfunction(plain) or isinstance(plain, property):
                yield name, plain


def docstring_of(thing: Any) -> str:
    """Its own docstring, that of a class with that of `__init__`; a dataclass's made-up one counts as none."""
    text = inspect.cleandoc(thing.__doc__ or "")
    if inspect.isclass(thing):
        text = "" if text.startswith(f"{thing.__name__}(") else text
        text += "\n" + inspect.cleandoc(vars(thing).get("__init__", thing).__doc__ or "")
    return text.strip()


def parameters_of(thing: Any) -> list[str]:
    """Of a class those that the package itself names: transformers' own fields are not for us to describe."""
    if inspect.isclass(thing):
        own = vars(thing).get("__init__")
        fields = [name for name in vars(thing).get("__annotations__", {}) if not name.startswith("_")]
        is_ours = own is not None and own.__module__.startswith("mdm_hf")
        if not is_ours or hasattr(thing, "__dataclass_fields__"):
            return fields
        thing = own
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(thing).parameters.values()
    return [p.name for p in parameters if p.name not in ("self", "cls") and p.kind not in kinds]


def unsaid(name: str, thing: Any) -> list[str]:
    """What a docstring leaves out."""
    text = docstring_of(thing)
    if not text:
        return [f"{name} has no docstring"]
    if isinstance(thing, property):
        return []
    wildcards = "|".join(rf"\w+{end}" for end in re.findall(r"^\s+\*(\w+):", text, flags=re.MULTILINE)) or r"(?!)"
    missing = [
        f"{name} says nothing of {parameter}"
        for parameter in parameters_of(thing)
        if not re.search(rf"(?<!\w){parameter}(?!\w)", text) and not re.fullmatch(wildcards, parameter)
    ]
    if not inspect.isclass(thing):
        given = inspect.signature(thing).return_annotation
        is_doing = re.match(r"(?!This|As|Its)\w+s\b", text) and given not in (inspect.Signature.empty, None, "None")
        if is_doing and "->" not in text.splitlines()[0] and not re.search(r"Returns|Yields|returns", text):
            missing.append(f"{name} says nothing of what it returns")
    return missing


def public() -> dict[str, Any]:
    """All that has to be described in full: what the API pages show, and what a call of a class does."""
    found = documented()
    calls = {
        f"{name}.__call__": call
        for name, thing in found.items()
        if inspect.isclass(thing)
        for key, call in methods(thing)
        if key == "__call__"
    }
    return found | calls


def test_every_exported_name_has_a_place_on_an_api_page() -> None:
    assert [name for name in mdm_hf.__all__ if f"mdm_hf.{name}" not in directives()] == []


def names_imported(code: str) -> set[str]:
    """The classes and functions of the package that a piece of code imports."""
    imports = re.findall(r"^from (mdm_hf[\w.]*) import (\([^)]+\)|.+)", code, flags=re.MULTILINE)
    names = {f"{module}.{name}" for module, listed in imports for name in re.findall(r"\w+", listed.partition("#")[0])}
    return {name for name in names if callable(named(name))}


def test_what_pages_and_examples_import_is_on_an_api_page() -> None:
    pages = [ROOT / "README.md", *PAGES, *(ROOT / "model_cards").glob("*/README.md")]
    code = [block.code for page in pages for block in python_blocks(page.read_text(encoding="utf-8"))]
    code += [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    wanted = set().union(*map(names_imported, code))
    assert len(wanted) > 10
    assert sorted(wanted - set(documented())) == []


def test_what_an_api_page_shows_exists() -> None:
    assert len(directives()) > 50
    for name, members in directives().items():
        thing = named(name)
        assert [member for member in members or [] if not hasattr(thing, member)] == []


@pytest.mark.parametrize("name", sorted(public()))
def test_a_public_name_says_what_it_is_takes_and_returns(name) -> None:
    assert unsaid(name, public()[name]) == []


def test_every_method_of_a_public_class_says_what_it_does() -> None:
    silent = [
        f"{name}.{method}"
        for name, thing in documented().items()
        if inspect.isclass(thing)
        for method, function in methods(thing)
        if not function.__doc__
    ]
    assert silent == []


def undescribable(thing: Any) -> list[str]:
    """What stands in `Args:` and is no parameter."""
    text = docstring_of(thing)
    section = re.search(r"^Args:\n((?: .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
    if section is None:
        return []
    joined = re.sub(r",\n\s+(?=[\w, ]+: )", ", ", section[1])
    said = re.findall(r"^    ([\w, ]+): ", joined, flags=re.MULTILINE)
    signature = inspect.signature(thing.__init__ if inspect.isclass(thing) else thing)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    known = set(signature.parameters) | set(parameters_of(thing))
    return [] if takes_any else [name for names in said for name in names.split(", ") if name not in known]


def test_no_docstring_describes_a_parameter_that_is_not_there() -> None:
    assert {name: undescribable(thing) for name, thing in public().items() if undescribable(thing)} == {}


def test_references_in_docstrings_name_something() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    known = {name for text in texts.values() for name in re.findall(r"^\s*(?:def|class) (\w+)", text, re.MULTILINE)}
    lost = [
        f"{path.name}: {name}"
        for path, text in texts.items()
        for name in REFERENCE.findall(text)
        if not name.startswith("transformers.") and not _names_something(name, known)
    ]
    assert lost == []


def _names_something(name: str, known: set[str]) -> bool:
    """A class's attribute is looked up in the class, so that one in a wrong place is found out."""
    owner, _, last = name.rpartition(".")
    if owner and owner in mdm_hf.__all__:
        return hasattr(getattr(mdm_hf, owner), last)
    return last in known


def examples() -> list[doctest.DocTest]:
    """Every docstring of the package with a `>>>` in it."""
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for path in SOURCES:
        if ">>> " in path.read_text(encoding="utf-8"):
            name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
            found += [test for test in finder.find(importlib.import_module(name)) if test.examples]
    return found


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.name.removeprefix("mdm_hf."))
def test_an_example_in_a_docstring_prints_what_it_says(example, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    report: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=report.append)
    assert result.attempted == len(example.examples)
    assert result.failed == 0, "".join(report)


def test_where_a_newcomer_looks_there_is_an_example() -> None:
    assert SHOWN - {example.name.removeprefix("mdm_hf.") for example in examples()} == set()


@dataclass(frozen=True)
class Shown:
    page: Path
    block: Block
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(DOCS).as_posix()}_line_{self.block.line}"


def blocks() -> list[Shown]:
    """Every python block of the pages, with the reason why it is not run."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = text.splitlines()
        for block in python_blocks(text):
            above = lines[block.line - 2].strip() if block.line > 1 else ""
            reason = "it names a reader's repository" if PLACEHOLDER.search(block.code) else None
            found.append(Shown(page, block, above if NOT_RUN.fullmatch(above) else reason))
    return found


def given(shown: Shown, folder: Path) -> dict[str, Any]:
    """What a page takes for granted: my_images is a folder of the reader's, and hub.md has a pipeline by then."""
    if "my_images" in shown.block.code:
        (folder / "my_images").mkdir()
        for i in range(2):
            Image.new("RGB", (8, 8), (120 * i, 0, 0)).save(folder / "my_images" / f"{i}.png")
        (folder / "my_images" / "metadata.csv").write_text("file_name,text\n0.png,a dark square\n1.png,a red square\n")
    if not re.search(r"\bpipe\(", shown.block.code) or re.search(r"^pipe = ", shown.block.code, re.MULTILINE):
        return {}
    (folder / "prompts.txt").write_text("a three\na four\n")
    pipe = mdm_hf.MDMPipeline.from_pretrained(ROOT / "model_cards" / "mdm-digits")
    return {"pipe": pipe, "dataset": Dataset.from_list([{"text": "a handwritten three"}])}


@pytest.mark.parametrize("shown", [shown for shown in blocks() if shown.not_run is None], ids=str)
def test_a_python_block_of_the_docs_runs(shown, tmp_path, monkeypatch) -> None:
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    names = given(shown, tmp_path) | {"__name__": "__main__"}
    exec(compile("\n" * shown.block.line + shown.block.code, str(shown.page), "exec"), names)


def test_most_blocks_run_and_the_others_are_these(record_property) -> None:
    left = [str(shown) for shown in blocks() if shown.not_run is not None]
    record_property("blocks_run", len(blocks()) - len(left))
    record_property("blocks_not_run", ", ".join(left))
    pages = [re.sub(r"_line_\d+$", "", name) for name in left]
    assert len(blocks()) - len(left) > len(left)
    assert pages == ["data.md", *["hub.md"] * 5, *["pixel_autoencoder.md"] * 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_what_a_page_names_exists(page, monkeypatch) -> None:
    text = page.read_text(encoding="utf-8")
    assert [name for name in files_named(text) if not (page.parent / name).exists()] == []
    rules = re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert make_targets_named(text) - set(rules) == set()
    assert [name for name in subcommands_named(text) if exit_code_of_help(name, monkeypatch) != 0] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for module in ("properdocs", "mkdocstrings_handlers.python", "latex2mathml"):
        if not _is_module(module):
            pytest.skip(f"{module} is not installed: pip install -c constraints.txt -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(folder)]
    result = subprocess.run([*command, "-f", str(ROOT / "properdocs.yml")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_the_site_builds_without_a_warning_and_shows_what_the_pages_name(site) -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    assert [name for name in shown_on_pages() if f'id="{name}"' not in shown] == []
    assert (site / "index.html").is_file()


def test_the_site_needs_no_other_host(site) -> None:
    loaded = r"<(?:script|img|iframe)[^>]+src=\"(?:https?:)?//|<link[^>]+href=\"(?:https?:)?//|@import|url\(.?https?:"
    files = [path for path in site.rglob("*") if path.suffix in {".html", ".css"} and "source" not in path.parts]
    assert len(files) > 30
    assert [path.name for path in files if re.search(loaded, path.read_text(encoding="utf-8"))] == []


def test_formulas_and_links_leave_no_markup_behind(site) -> None:
    for path in [path for path in site.rglob("*.html") if "source" not in path.relative_to(site).parts]:
        text = re.sub(
            r"<(pre|code|math|script|title)\b.*?</\1>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
        )
        assert not re.search(r"\$\S|\]\(\S|\]\[\w|^[-|] |<p>\| ", text, flags=re.MULTILINE), path.name
    assert (site / "mathematics.html").read_text(encoding="utf-8").count("<math ") > 100
