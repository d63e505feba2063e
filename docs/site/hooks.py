"""Makes the repository's own pages into a site: README.md and the model cards as they are, links to files, formulas.

- A page stands in the site where it stands in the repository, README.md as the home page.
- A link to a page leads to that page, one to a module of an API page there, one to a picture to a copy, and one to any
  other file or folder to a page that shows it.
- Lists, tables and formulas are as GitHub reads them: two spaces indent, and no empty line has to stand before them.
- $...$ becomes MathML, which browsers draw without scripts or fonts.
"""

import html
import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert
from properdocs.config.defaults import MkDocsConfig
from properdocs.structure.files import File, Files
from properdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound


ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CARDS = sorted((ROOT / "model_cards").glob("*/README.md"))
LINK = re.compile(r"(\]\()([^)\s]+)(\))|((?:src|href)=\")([^\"]+)(\")")
LETTERS = {r"\mathcal N": "𝒩", r"\mathbb E": "𝔼"}  # browsers know MathML's alphabets by their letters alone
PICTURES = {".png", ".jpg", ".svg", ".gif"}
DIRECTIVE = re.compile(r"^::: (mdm_hf[\w.]*)$", re.MULTILINE)


def _place(path: Path) -> str:
    """Where a page of the repository stands in the site."""
    inside = path.relative_to(DOCS) if path.is_relative_to(DOCS) else path.relative_to(ROOT)
    return inside.with_name("index.md").as_posix() if path.name == "README.md" else inside.as_posix()


def _documented() -> dict[Path, str]:
    """The modules that an API page shows whole: file -> name."""
    names = [name for page in sorted((DOCS / "api").glob("*.md")) for name in DIRECTIVE.findall(page.read_text())]
    files = {ROOT / "src" / (name.replace(".", "/") + ".py"): name for name in names}
    return {path: name for path, name in files.items() if path.is_file()}


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """`change` applied to all but fenced blocks and inline code."""
    parts = re.split(r"(^ *(`{3,}|~{3,}).*?^ *\2 *$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 3 else change(part) for i, part in enumerate(parts) if i % 3 != 2)


def _target(link: str, page: Path) -> Path | None:
    """The file or folder of the repository that a link names; None if it names none."""
    path = link.partition("#")[0]
    if not path or re.match(r"[a-z][a-z0-9+.-]*:", path):
        return None
    target = Path(posixpath.normpath((page.parent / path).as_posix()))
    return target if target.exists() and target.is_relative_to(ROOT) else None


def _uri(target: Path) -> str:
    """Where the site has a file or folder of the repository."""
    if target.is_dir() and target / "README.md" in CARDS:
        return _place(target / "README.md")
    if target.suffix == ".md" or target.is_relative_to(DOCS) and target.is_file():
        return _place(target)
    inside = target.relative_to(ROOT).as_posix()
    if target.suffix.lower() in PICTURES:
        return inside
    return f"source/{inside}/index.html" if target.is_dir() else f"source/{inside}.html"


def _texts_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix not in {".safetensors", ".pyc"})


def _shown(target: Path) -> str:
    """A page that shows a file with its lines numbered, or what a folder holds."""
    title = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        names = [html.escape(path.name) for path in _texts_in(target)]
        items = "".join(f'<li><a href="{name}.html">{name}</a></li>' for name in names)
        body, style = f"<ul>{items}</ul>", ""
    else:
        try:
            lexer = get_lexer_for_filename(target.name)
        except ClassNotFound:
            lexer = TextLexer()
        formatter = HtmlFormatter(linenos="table", lineanchors="L", anchorlinenos=True)
        body, style = highlight(target.read_text(encoding="utf-8"), lexer, formatter), formatter.get_style_defs()
    home = "../" * (title.count("/") + (2 if target.is_dir() else 1)) + "index.html"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}\n'
        "body { margin: 2em; font-family: sans-serif } pre { line-height: 1.35 } .linenos { padding-right: 1em }"
        "</style></head>"
        f'<body><p><a href="{home}">mdm-hf</a> / <code>{html.escape(title)}</code></p>{body}</body></html>'
    )


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside `docs/`, and all that any page links to."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *CARDS]
    for path in pages:
        files.append(File.generated(config, _place(path), abs_src_path=str(path)))
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    files.append(File.generated(config, "site/pygments.css", content=css))

    wanted: set[Path] = set()
    for page in [*pages, *DOCS.rglob("*.md")]:
        links = [found[2] or found[5] for found in LINK.finditer(page.read_text(encoding="utf-8"))]
        wanted |= {target for link in links if (target := _target(link, page))}
    for folder in [path for path in wanted if path.is_dir() and path / "README.md" not in CARDS]:
        wanted |= set(_texts_in(folder))
    for target in sorted(wanted):
        uri = _uri(target)
        if files.get_file_from_path(uri) is not None:
            continue
        if target.suffix.lower() in PICTURES:
            files.append(File.generated(config, uri, abs_src_path=str(target)))
        elif uri.startswith("source/"):
            files.append(File.generated(config, uri, content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site has them, lists and tables as Python-Markdown reads them."""
    source, modules = Path(page.file.abs_src_path), _documented()

    def relinked(found: re.Match) -> str:
        before, link, after = found.groups()[:3] if found[2] else found.groups()[3:]
        target = _target(link, source)
        if target is None:
            return found[0]
        if target in modules and before == "](":
            return f"][{modules[target]}]"
        anchor = link[len(link.partition("#")[0]) :]
        return before + posixpath.relpath(_uri(target), posixpath.dirname(page.file.src_uri) or ".") + anchor + after

    return _as_python_markdown(_outside_code(markdown, lambda text: LINK.sub(relinked, text)))


def _as_python_markdown(markdown: str) -> str:
    """Lists whose inner blocks are indented by four, with an empty line before each list and table."""
    formulas = r"^( *)\$\$(.*?)\$\$ *$"  # each a paragraph of its own, in one line
    markdown = re.sub(formulas, _in_one_line, markdown, flags=re.MULTILINE | re.DOTALL)
    lines: list[str] = []
    in_list, is_loose, fence, base = False, False, "", 0
    for line in markdown.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        opens = re.match(r" *(`{3,}|~{3,})", line)
        if fence:
            line = line if not in_list or not line else " " * base + line
            fence = "" if line.strip() == fence else fence
        elif opens:
            in_list = in_list and indent > 0
            fence, base = opens[1], indent if in_list else 0
            line = " " * base + line
        elif line:
            is_item, is_row = re.match(r" *([-*]|\d+\.) ", line), line.startswith("|")
            follows = bool(lines and lines[-1])
            if indent == 0 and is_item and follows and (is_loose or not in_list):
                lines.append("")
            if is_row and follows and not lines[-1].lstrip().startswith("|"):
                lines.append("")
            if indent == 0:
                in_list = bool(is_item) or in_list and follows and not is_row
            line, is_loose = (" " * indent + line if in_list else line), is_loose and not is_item
        else:
            is_loose = True  # an item may go on after it, and Python-Markdown then wants another before the next one
        lines.append(line)
    return "\n".join(lines)


def _in_one_line(found: re.Match) -> str:
    return f"\n{found[1]}$${' '.join(found[2].split())}$$\n"


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML; wide tables in a frame of their own, which scrolls."""
    content = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _mathml, content, flags=re.DOTALL)
    return re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', content, flags=re.DOTALL)


def _mathml(found: re.Match) -> str:
    formula = re.sub(r"\\tag\{(.*?)\}", r"\\qquad \\text{(\1)}", html.unescape(found[2]).strip())
    for written, letter in LETTERS.items():
        formula = formula.replace(written, letter)
    return convert(formula, display="inline" if found[1] == "span" else "block")
