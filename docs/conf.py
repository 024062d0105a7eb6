"""The site: `sphinx-build -W -c docs . build/site` in the root of the project, after `pip install ".[docs]"`.

Its source is the project's own root, so that the links between README, docs/ and results/ are the same on the site as
for those who read the Markdown. Navigation is the lists of docs/index.md. No page needs a network: fonts are the
system's, and the search is a script of the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import fdjax  # noqa: E402
from tools import docs_reference  # noqa: E402

project, author, copyright = "fdjax", "The fdjax developers", "The fdjax developers, Apache-2.0"
version = release = fdjax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = [
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md"),
    *("docs/**.md", "results/**README.md", "results/**/table.md"),
]
# In docstrings `x` is code, as in Markdown.
default_role = "code"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False

html_theme = "furo"
html_title = f"fdjax {version}"
html_static_path, html_css_files = ["site.css"], ["site.css"]
smartquotes = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}

_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+\.md)\)")


def navigation(index: str) -> str:
    """The tables of contents that the lists of docs/index.md are, one for each section."""
    _, *sections = _SECTION.split(index)
    made = []
    for title, text in zip(sections[::2], sections[1::2], strict=True):
        pages = dict.fromkeys(
            (Path("docs") / page).as_posix().removeprefix("docs/../").removesuffix(".md")
            for page in _LINK.findall(text)
        )
        made.append(
            "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", "", *(f"/{page}" for page in pages), "```"])
        )
    results = sorted((ROOT / "results").rglob("README.md"), key=lambda file: (len(file.parts), file))
    entries = [f"/{file.relative_to(ROOT).with_suffix('')}" for file in results]
    made.append("\n".join(["```{toctree}", ":hidden:", ":caption: Results", "", "/README", *entries, "```"]))
    return "\n\n".join(made)


def api() -> str:
    """The docstrings of the public functions, in the order of the page's tables."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    names = [name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    parts = []
    for name in names:
        kind = "autoclass" if isinstance(getattr(fdjax, name), type) else "autofunction"
        parts.append(f"## {name}\n\n```{{eval-rst}}\n.. {kind}:: fdjax.{name}\n```")
    return "\n\n".join(parts)


def _extend(app: Any, name: str, source: list[str]) -> None:
    """Adds what is made of the code; a link to a folder, which has no page, becomes its name."""
    added = {
        "docs/index": lambda: navigation(source[0]),
        "docs/reference/flags": docs_reference.markdown,
        "docs/reference/api": api,
    }
    if name in added:
        source[0] += "\n\n" + added[name]() + "\n"
    if name.endswith("/table"):
        source[0] = "---\norphan: true\n---\n\n" + source[0]
    here = (ROOT / name).parent
    source[0] = re.sub(
        r"\[([^]]+)\]\(([^)#:]+)\)", lambda link: f"`{link[1]}`" if (here / link[2]).is_dir() else link[0], source[0]
    )


def _plain_bars(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """|m| is an absolute value in a docstring, and no substitution of reStructuredText's."""
    lines[:] = [re.sub(r"(?<![`\\])\|(?!`)", r"\\|", line) for line in lines]


def _front_door(app: Any, error: Exception | None) -> None:
    """index.html at the root of the site leads to the index of docs/."""
    if error is None and app.builder.format == "html":
        text = '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">'
        (Path(app.outdir) / "index.html").write_text(f'{text}<a href="docs/index.html">fdjax</a>\n')


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _extend)
    app.connect("autodoc-process-docstring", _plain_bars)
    app.connect("build-finished", _front_door)
