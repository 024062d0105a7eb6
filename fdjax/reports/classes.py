"""Tables of a network's accuracy on each class, and of its confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.reports import html

# A matrix of more classes is too wide for a table.
_MATRIX_CLASSES = 30
_NONE = "–"


def classes_section(summary: Mapping[str, Any]) -> list[str]:
    """Makes the tables of a run's test images by class.

    Args:
      summary: the run's summary, with `class_names` and `confusion`, whose rows are the classes of images and whose
        columns the predicted classes.

    Returns:
      HTML; empty if the summary has no confusion matrix.
    """
    confusion, names = _matrix(summary)
    if confusion is None:
        return []
    parts = [html.element("h3", "Classes"), html.table(*_by_class(confusion, names))]
    if len(names) <= _MATRIX_CLASSES:
        parts.append(html.paragraph("A row for each class of test images, a column for each predicted class."))
        rows = [[name, *(f"{count:,}" for count in row)] for name, row in zip(names, confusion.tolist(), strict=True)]
        parts.append(html.table(["class", *names], rows))
    return parts


def class_lines(summary: Mapping[str, Any]) -> list[str]:
    """Makes a table of the accuracy on each class, as text.

    Args:
      summary: as in `classes_section`.

    Returns:
      The lines of the table; empty if the summary has no confusion matrix.
    """
    confusion, names = _matrix(summary)
    if confusion is None:
        return []
    headings, rows = _by_class(confusion, names, "images")
    widths = [max(len(cell) for cell in column) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if at in (0, 3) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [headings, *rows]
    ]


def _matrix(summary: Mapping[str, Any]) -> tuple[np.ndarray | None, list[str]]:
    """Returns the confusion matrix of a summary and the names of its classes; None if it has none or an invalid one."""
    try:
        confusion = np.array(summary["confusion"], np.int64)
    except (KeyError, TypeError, ValueError):
        return None, []
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or not confusion.size:
        return None, []
    names = [str(name) for name in summary.get("class_names") or range(len(confusion))]
    return (confusion, names) if len(names) == len(confusion) else (None, [])


def _by_class(
    confusion: np.ndarray, names: Sequence[str], what: str = "test images"
) -> tuple[list[str], list[list[str]]]:
    rows = []
    for at, (name, row) in enumerate(zip(names, confusion, strict=True)):
        count, right = int(row.sum()), int(row[at])
        others = np.where(np.arange(len(row)) == at, 0, row)
        worst = int(others.argmax())
        mistaken = f"{names[worst]} ({others[worst]:,})" if others[worst] else _NONE
        rows.append([name, f"{count:,}", f"{100 * right / count:.2f}%" if count else _NONE, mistaken])
    return ["class", what, "right", "most often taken for"], rows
