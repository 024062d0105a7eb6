"""Writes one HTML page in one file, with figures as data URIs and a style sheet; it needs no network."""

from __future__ import annotations

import base64
import io
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# With this policy a browser loads nothing from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 0 1rem 3rem; background: #fff; color: #1a1a1a;
  font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 2.5rem 0 .5rem; border-top: 2px solid #0072b2; padding-top: .75rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
a { color: #005a8f; }
nav ul { columns: 16rem; padding-left: 1.2rem; }
.note { border-left: 4px solid #e69f00; padding: .25rem .75rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.facts div { border: 1px solid #ccc; border-radius: 4px; padding: .5rem .7rem; }
.facts dt { font-size: .85rem; color: #444; }
.facts dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.facts small { display: block; font-size: .8rem; color: #444; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; overflow-wrap: normal; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { background: #f3f3f3; vertical-align: bottom; }
.text th, .text td { text-align: left; white-space: normal; vertical-align: top; }
.text th { width: 9rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th:first-child, .text th { background: #f3f3f3; }
.wide th { white-space: normal; min-width: 4.5rem; }
.text td { overflow-wrap: anywhere; }
.strong td { font-weight: 600; }
figure { margin: 1rem 0 1.5rem; }
figure img { display: block; max-width: 100%; height: auto; }
.closer .choices { display: flex; flex-wrap: wrap; gap: .4rem 1rem; align-items: center; margin: .6rem 0; }
.closer .choices i { display: inline-block; width: .8rem; height: .8rem; margin: 0 .3rem; }
.closer .choices select { font: inherit; min-height: 2rem; }
.closer .choices label { display: flex; align-items: center; }
.closer .choices input[type=range] { flex: 1 1 10rem; min-height: 2rem; }
.closer button { font: inherit; text-align: left; border: 0; background: none; color: inherit; cursor: pointer; }
.closer .bars button { display: grid; grid-template-columns: minmax(6rem, 13rem) 1fr; gap: .6rem; width: 100%;
  padding: .2rem .3rem; font-size: .875rem; align-items: center; }
.closer .bars button.here { background: #eaf3fa; }
.closer button:focus-visible { outline: 2px solid #0072b2; }
.closer .tracks i { display: block; height: .3rem; margin: 1px 0; min-width: 1px; }
.closer i.dense { background: #999; } .closer i.pruned { background: #009e73; }
.closer i.paper_total { background: #e69f00; } .closer i.total { background: #0072b2; }
.closer .without-dense i.dense, .closer .without-pruned i.pruned, .closer .without-paper_total i.paper_total,
.closer .without-total i.total { display: none; }
.closer .bars button[aria-pressed=true] { box-shadow: inset 3px 0 #0072b2; }
.closer .beside { display: grid; grid-template-columns: 1fr minmax(18rem, 26rem); gap: 1rem; align-items: start; }
.closer .told { border: 1px solid #ccc; border-radius: 4px; padding: .3rem .7rem; min-height: 11rem; background: #fff;
  position: sticky; top: .5rem; font-size: .9rem; }
.closer .strip { display: flex; height: 2rem; gap: 1px; background: #555; border: 1px solid #555; margin: .3rem 0; }
.closer .strip button { min-width: 3px; padding: 0; flex-basis: 0; }
.closer .canvases { display: flex; flex-wrap: wrap; gap: 1rem; }
.closer .canvases figure { margin: 0; flex: 1 1 6rem; max-width: 20rem; }
.closer canvas { width: 100%; image-rendering: pixelated; border: 1px solid #ccc; }
figcaption { font-size: .9rem; color: #333; max-width: 46rem; margin-top: .3rem; }
@media (max-width: 45rem) {
  .closer .beside { grid-template-columns: 1fr; }
  .closer .told { top: auto; bottom: 0; min-height: 0; }
  figure.wide img { max-width: none; width: var(--width, 44rem); }
  th:first-child, td:first-child { white-space: normal; min-width: 5rem; max-width: 42vw;
    overflow-wrap: break-word; }
}
@media print {
  @page { size: A4; margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .scroll { overflow: visible; }
  table { font-size: 6.5pt; }
  th, td { padding: .15rem .3rem; white-space: normal; position: static !important; }
  .wide th { min-width: 0; }
  figure, .facts, tr { break-inside: avoid; }
  figure.wide img { width: auto; max-width: 100%; max-height: 22cm; }
  h2, h3 { break-after: avoid; }
  .closer { display: none; }
  thead { display: table-header-group; }
  nav { display: none; }
}
"""


def element(name: str, *inside: str, **attributes: str) -> str:
    """Returns `<name attributes>inside</name>`; `inside` is HTML, attributes are plain text (`class_` for class)."""
    said = "".join(f' {key.rstrip("_")}="{escape(value)}"' for key, value in attributes.items())
    return f"<{name}{said}>{''.join(inside)}</{name}>"


def paragraph(text: str, class_: str | None = None) -> str:
    """Returns a paragraph of plain text."""
    return element("p", escape(text), **({"class_": class_} if class_ else {}))


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], strong: Collection[int] = ()) -> str:
    """Returns a table of plain text, in a box that scrolls if it is too wide.

    Args:
      headings: headings of the columns.
      rows: the cells of each row, as many as headings.
      strong: numbers of the rows in bold.
    """
    head = element("tr", *(element("th", escape(heading), scope="col") for heading in headings))
    body = [
        element("tr", *(element("td", escape(cell)) for cell in cells), **({"class_": "strong"} if i in strong else {}))
        for i, cells in enumerate(rows)
    ]
    whole = element("table", element("thead", head), element("tbody", *body), class_="wide")
    return element("div", whole, class_="scroll", tabindex="0", role="region", **{"aria-label": "table"})


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """Returns a table of headings and texts."""
    lines = [
        element("tr", element("th", escape(name), scope="row"), element("td", escape(text))) for name, text in rows
    ]
    return element("table", element("tbody", *lines), class_="text")


def facts(items: Iterable[tuple[str, str, str]]) -> str:
    """Returns cards of the main figures: name, value, and a note below it, which may be empty."""
    cards = [
        element(
            "div",
            element("dt", escape(name)),
            element("dd", escape(value), element("small", escape(note)) if note else ""),
        )
        for name, value, note in items
    ]
    return element("dl", *cards, class_="facts")


def picture(figure: Figure, text: str, caption: str = "", *, wide: bool = False, pixels: bool = False) -> str:
    """Returns a figure as a data URI.

    Args:
      figure: a figure of matplotlib.
      text: alternative text, for screen readers.
      caption: plain text below the figure.
      wide: whether it scrolls on a narrow screen instead of shrinking, so that its letters stay readable.
      pixels: whether to store a PNG instead of an SVG; for images.
    """
    # At this width the letters of a figure of 9 inches have about 10 pixels.
    width = f"{max(20.0, 4.9 * figure.get_figwidth()):.1f}rem" if wide else None
    return image(_data_uri(figure, "png" if pixels else "svg"), text, caption, width)


def image(uri: str, text: str, caption: str = "", width: str | None = None) -> str:
    """Returns a figure with a data URI, as `picture` does; `width` is its width on a narrow screen, in CSS."""
    shown = f'<img src="{escape(uri)}" alt="{escape(text)}">'
    box = element("div", shown, class_="scroll", tabindex="0", role="region", **{"aria-label": text})
    below = element("figcaption", escape(caption)) if caption else ""
    return element("figure", box, below, **({"class_": "wide", "style": f"--width: {width}"} if width else {}))


def png_uri(content: bytes) -> str:
    """Returns a PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _data_uri(figure: Figure, form: str) -> str:
    from matplotlib import rc_context

    out = io.BytesIO()
    # Without a date, and with fixed names in the SVG, the same numbers give the same page.
    with rc_context({"svg.hashsalt": "fdjax"}):
        metadata = {"Date": None} if form == "svg" else None
        figure.savefig(out, format=form, dpi=130, bbox_inches="tight", metadata=metadata)
    if form == "png":
        return png_uri(out.getvalue())
    return f"data:image/svg+xml;base64,{base64.b64encode(out.getvalue()).decode()}"


def page(title: str, body: str, scripts: str = "") -> str:
    """Returns the whole document.

    Args:
      title: plain text.
      body: HTML.
      scripts: directive of the security policy about scripts; if empty, a browser executes none.
    """
    policy = f"{_POLICY}; {scripts}" if scripts else _POLICY
    head = (
        '<meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'
