"""The README is true: its code runs, and every command, target and file it names exists.

A block fenced as `python` runs here, so one that needs the network or weights that are not in the repository is fenced
as `text`. The blocks do not share names: each is what a reader would paste.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
SHELL = {"", "bash", "console", "shell", "sh", "text"}


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    code: str


def fenced_blocks(markdown: str) -> list[Block]:
    blocks, opened = [], None
    for number, line in enumerate(markdown.splitlines(), start=1):
        if opened is None and (fence := re.match(r"\s*(`{3,}|~{3,})\s*([\w+-]*)", line)):
            opened = (fence[1], number, fence[2].lower(), [])
        elif opened is not None and line.strip() == opened[0]:
            blocks.append(Block(opened[1], opened[2], "\n".join(opened[3]) + "\n"))
            opened = None
        elif opened is not None:
            opened[3].append(line)
    assert opened is None, f"the block opened in line {opened[1]} is never closed"
    return blocks


def commands(markdown: str) -> Iterator[list[str]]:
    """Every shell command the text shows, in a block or as `inline code`, as its words."""
    blocks = fenced_blocks(markdown)
    shown = [line for block in blocks if block.language in SHELL for line in block.code.splitlines()]
    without_blocks = re.sub(r"^\s*(`{3,}|~{3,}).*?^\s*\1\s*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    shown += re.findall(r"`([^`\n]+)`", without_blocks)
    for line in shown:
        for command in re.split(r"&&|\|\||[;|]", re.sub(r"(^|\s)#.*", "", line)):
            words = command.strip().removeprefix("$").split()
            yield list(dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))


def make_targets_named(markdown: str) -> set[str]:
    words = [command[1:] for command in commands(markdown) if command[:1] == ["make"]]
    return {word for command in words for word in command if re.fullmatch(r"[a-z][\w-]*", word)}


def subcommands_named(markdown: str) -> set[str]:
    words = [command[1:2] for command in commands(markdown) if command and command[0].rpartition("/")[2] == "mdm"]
    return {word for command in words for word in command if re.fullmatch(r"[a-z][\w-]*", word)}


def files_named(markdown: str) -> set[str]:
    """The targets of links and pictures that lie in the repository."""
    targets = re.findall(r"\]\(([^)\s]+)", markdown) + re.findall(r"(?:src|href)=\"([^\"]+)\"", markdown)
    return {target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)}


def readme() -> str:
    return README.read_text(encoding="utf-8") if README.is_file() else ""


def python_blocks(markdown: str) -> list[Block]:
    return [block for block in fenced_blocks(markdown) if block.language in {"python", "py"}]


def test_the_readme_shows_python() -> None:
    assert python_blocks(readme()), "README.md is missing or has no ```python block"


@pytest.mark.parametrize("block", python_blocks(readme()), ids=lambda block: f"line_{block.line}")
def test_the_python_block_runs(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    padding = "\n" * block.line  # so that a traceback gives the README's own line numbers
    exec(compile(padding + block.code, str(README), "exec"), {"__name__": "__main__"})


def test_the_environment_is_activated_once_and_before_the_first_python_block() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count(".venv/bin/activate") == 1
    assert text.index("make demo") < text.index(". .venv/bin/activate") < text.index("```python")


def test_every_make_target_named_exists() -> None:
    rules = re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert "help" in rules
    assert make_targets_named(readme()) - set(rules) == set()


def exit_code_of_help(subcommand: str, monkeypatch: pytest.MonkeyPatch) -> object:
    from mdm_hf.cli import main

    monkeypatch.setattr(sys, "argv", ["mdm", subcommand, "--help"])
    try:
        return main() or 0
    except SystemExit as stop:
        return stop.code or 0


def test_every_mdm_subcommand_named_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exit_code_of_help("no-such-subcommand", monkeypatch) != 0
    missing = [name for name in subcommands_named(readme()) if exit_code_of_help(name, monkeypatch) != 0]
    assert missing == []


def test_every_file_the_readme_links_to_exists() -> None:
    assert [name for name in files_named(readme()) if not (ROOT / name).exists()] == []


EXAMPLE = """
Run `make demo OUT=x` or `mdm generate --text "a three"`, and make sure of [the log](docs/LOG.md#top).

```bash
$ OMP_NUM_THREADS=1 make -j setup test && .venv/bin/mdm demo  # make coffee
```
```python
make = "make nothing; mdm nothing"
```
~~~text
mdm push --to org/name
~~~
"""


def test_commands_are_read_from_code_and_never_from_prose_comments_or_python() -> None:
    assert make_targets_named(EXAMPLE) == {"demo", "setup", "test"}
    assert subcommands_named(EXAMPLE) == {"generate", "demo", "push"}
    assert files_named(EXAMPLE) == {"docs/LOG.md"}
    assert [block.code for block in python_blocks(EXAMPLE)] == ['make = "make nothing; mdm nothing"\n']
