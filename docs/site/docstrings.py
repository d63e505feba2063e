"""Docstrings as this project writes them, made into what Griffe and Markdown read; the site alone uses this.

- `[`MDMModel`]` and `[`~MDMModel.score`]`, transformers' spelling of a reference, become links.
- "a, b: text" may be wrapped before its colon; what is returned is prose, in which a colon ends no type.
- A block that is indented below a line, a table of symbols say, is shown as it stands.
- The fields of a `@strict` configuration are its parameters, with types and defaults.
"""

import re
from typing import Any

from griffe import (
    Class,
    Extension,
    Function,
    GriffeLoader,
    Module,
    Object,
    Parameter,
    ParameterKind,
    Parameters,
    logger,
)


REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")
SECTION = re.compile(r"^(Args|Raises|Examples|Attributes):$")


def as_markdown(text: str, targets: dict[str, str]) -> str:
    """A docstring, its indentation removed, as Griffe's Google style and Markdown have it.

    Args:
        text: The docstring.
        targets: Short name -> full name of all that can be linked to.
    """
    text = re.sub(r"^( +)([\w, ]+,)\n +(?=[\w, ]+: )", r"\1\2 ", text, flags=re.MULTILINE)
    text = REFERENCE.sub(lambda found: _linked(*found.groups(), targets), text)
    lines: list[str] = []
    section, in_prose = False, False
    for line in text.splitlines():
        if line and not line.startswith(" "):
            section = bool(SECTION.match(line))
            in_prose = line in ("Returns:", "Yields:")
            if in_prose:
                line = f"**{line}** "
        elif in_prose and line:
            line = line.removeprefix("    ")
            if lines[-1].endswith(":** "):
                line = lines.pop() + line
        elif line.startswith("    ") and not section and lines and lines[-1] and not lines[-1].startswith(" "):
            lines.append("")  # what is indented below a line is a block to Markdown only after an empty one
        lines.append(line)
    return "\n".join(lines)


def _linked(short: str, name: str, targets: dict[str, str]) -> str:
    shown = name.rpartition(".")[2] if short else name
    if name.startswith("transformers."):
        return f"`{shown}`"
    if name not in targets:
        logger.warning(f"A docstring refers to [`{short}{name}`], which names nothing public.")
        return f"`{shown}`"
    # Optional: what no API page shows stays text.
    return f'<autoref identifier="{targets[name]}" optional><code>{shown}</code></autoref>'


def _names(module: Module) -> dict[str, str]:
    """Short name -> full name of all public classes and functions of a package, and of their methods."""
    found: dict[str, str] = {}
    for member in list(module.members.values()):
        if member.is_alias or member.name.startswith("_"):
            continue
        if member.is_module:
            inner = _names(member)
            found = inner | {f"{member.name}.{name}": path for name, path in inner.items()} | found
        elif member.is_class or member.is_function:
            found[member.name] = member.path
            for name in member.all_members if member.is_class else ():
                if not name.startswith("_") or name == "__call__":
                    found[f"{member.name}.{name}"] = f"{member.path}.{name}"
    return found


class HouseDocstrings(Extension):
    """Rewrites every docstring of a package when all of it is loaded."""

    def on_package(self, *, pkg: Module, loader: GriffeLoader, **kwargs: Any) -> None:
        self._rewrite(pkg, _names(pkg))

    def _rewrite(self, obj: Object, targets: dict[str, str]) -> None:
        if isinstance(obj, Module):  # two modules may have a function of one name
            targets = targets | _names(obj)
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value, targets)
        if isinstance(obj, Class) and any(str(decorator.value) == "strict" for decorator in obj.decorators):
            _give_parameters(obj)
        for member in list(obj.members.values()):
            if not member.is_alias:
                self._rewrite(member, targets)


def _give_parameters(cls: Class) -> None:
    fields = [
        Parameter(name, annotation=field.annotation, kind=ParameterKind.keyword_only, default=field.value)
        for name, field in cls.members.items()
        if field.is_attribute and field.annotation is not None and "property" not in field.labels
    ]
    cls.set_member("__init__", Function("__init__", parameters=Parameters(*fields), parent=cls))
