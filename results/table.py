"""Makes the tables of results, and the figures in their text, from table.toml and the files beside the runs.

    python results/table.py            # rewrites the pages that are named in PAGES
    python results/table.py --check    # only says, by its exit status, whether they are up to date

In a page, the table stands between `<!-- table -->` and `<!-- end of table -->`. A figure in its text is a comment with
a row's name and a column, and what follows up to the next space: `<!-- narrow.tied_native06 pruned -->77.05%`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NOT_MEASURED, NOT_THERE = "not measured", "–"
# Key of each column's figure in a summary.json.
KEYS = {"dense": "dense_top1", "control": "top1", "pruned": "top1", "macs": "macs.ratio"}
TIMES = ("native", "onnxruntime")
_TABLE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)
_FIGURE = re.compile(r"(<!-- (\w+\.[^>]+) (\w+) -->)(?:not measured|[^ \n:,;)]*?)(?=[.]?(?:[ \n:,;)]|$))")


class Row(NamedTuple):
    """A row of the tables.

    Attributes:
      name: of its network and of the row: "narrow.tied_native06".
      lines: what table.toml says of it, with its network's lines.
      figures: column -> the figure of each seed, None where it is not measured; columns that do not exist are missing.
    """

    name: str
    lines: Mapping[str, Any]
    figures: Mapping[str, list[float | None]]

    def words(self, column: str) -> str:
        """Returns a cell: the mean over the seeds that are there, and with several the standard deviation."""
        if column == "loss":
            return self._loss()
        if column not in self.figures:
            return NOT_THERE
        found = [figure for figure in self.figures[column] if figure is not None]
        if not found:
            return NOT_MEASURED
        if column in ("macs", *TIMES):
            return f"{mean(found):.3f}x" if column == "macs" else f"{mean(found):.2f}x"
        spread = f"±{100 * stdev(found):.2f}" if len(set(found)) > 1 else ""
        return f"{100 * mean(found):.2f}{spread}%"

    def _loss(self) -> str:
        """Returns the pruned network's points beside the control, over the seeds that have both."""
        pairs = zip(self.figures.get("pruned", []), self.figures.get("control", []), strict=False)
        found = [100 * (pruned - control) for pruned, control in pairs if pruned is not None and control is not None]
        return f"{mean(found):+.2f}" if found else NOT_THERE

    def seeds(self) -> str:
        """Returns how many seeds have been measured."""
        counts = [sum(figure is not None for figure in figures) for figures in self.figures.values()]
        return str(max(counts)) if any(counts) else NOT_THERE

    def is_measured(self) -> bool:
        """Returns whether there is any figure of the pruned network."""
        return any(figure is not None for name in ("pruned", *TIMES) for figure in self.figures.get(name, []))


def load() -> list[Row]:
    """Reads table.toml and the figures that it names; rows without a figure come last."""
    rows = []
    for network, lines in tomllib.loads((HERE / "table.toml").read_text()).items():
        for name, own in lines["rows"].items():
            merged = {**{key: value for key, value in lines.items() if key != "rows"}, **own}
            figures = {
                column: [_figure(spec, column, name, seed) for seed in merged["seeds"]]
                for column in (*KEYS, *TIMES)
                if (spec := _spec(merged, column))
            }
            rows.append(Row(f"{network}.{name}", merged, figures))
    return sorted(rows, key=lambda row: not row.is_measured())


def _spec(lines: Mapping[str, Any], column: str) -> Mapping[str, Any] | None:
    """Returns the file, key and choice of rows of a column's figure."""
    given = lines.get(column, lines.get("run") if column in KEYS and column != "control" else None)
    if not isinstance(given, str) or not given:
        return given or None
    if column in KEYS:
        return {"file": f"{given}/summary.json", "key": KEYS[column]}
    run = str(lines["run"]).rpartition("/")[2]
    return {"file": given, "where": {"network": run, "engine": column, "batch": 1}}


def _figure(spec: Mapping[str, Any], column: str, row: str, seed: int) -> float | None:
    key = spec.get("key", KEYS.get(column, "time_ratio"))
    filled = {name: _fill(value, row, seed) for name, value in spec.get("where", {}).items()}
    found = _read(_fill(spec["file"], row, seed), key, filled)
    if found is None or "over" not in spec:
        return found
    over = _read(_fill(spec["over"], row, seed), key, {})
    return None if over is None else found / over


def _fill(value: Any, row: str, seed: int) -> Any:
    return value.replace("{row}", row).replace("{seed}", str(seed)) if isinstance(value, str) else value


def _read(file: str, key: str, where: Mapping[str, Any]) -> float | None:
    """Returns a number of a JSON file, of the one row that has all values of `where`; None if it is not there."""
    path = HERE / file
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if where:
        rows = [row for row in content["rows"] if all(row.get(name) == value for name, value in where.items())]
        if not rows:
            return None
        if len(rows) > 1:
            raise ValueError(f"{file}: {len(rows)} rows have {dict(where)}; name more of their values")
        content = rows[0]
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return None if content is None else float(content)


def _network(rows: list[Row], place: int) -> str:
    """Returns the network's words, or "the same" under a row of the same network."""
    return "the same" if place and _group(rows[place]) == _group(rows[place - 1]) else rows[place].lines["network"]


def _group(row: Row) -> str:
    return row.name.partition(".")[0]


def full_table(rows: list[Row], links: bool = True) -> str:
    """Makes the table of results/README.md; rows of one network that have no figure are one line."""
    head = ["network; data", "pruned", "MACs", "dense", "control", "pruned top-1", "beside the control"]
    head += ["native code", "ONNX Runtime", "seeds", "the paper, or the record"]
    measured, lines = [row for row in rows if row.is_measured()], [head]

    def masks(group: list[Row]) -> str:
        lines_of = group[0].lines
        known = any(_group(row) == _group(group[0]) for row in measured)
        words = "; ".join(row.lines["masks"] for row in group) if known else lines_of.get("planned", lines_of["masks"])
        return f"[{words}]({lines_of['page']})" if links and "page" in lines_of else words

    for place, row in enumerate(measured):
        columns = [row.words(name) for name in ("macs", "dense", "control", "pruned", "loss", *TIMES)]
        reference = row.lines.get("reference", NOT_THERE)
        lines.append([_network(measured, place), masks([row]), *columns, row.seeds(), reference])
    for _, same in itertools.groupby(rows[len(measured) :], _group):
        group = list(same)
        references = "; ".join(row.lines["reference"] for row in group if "reference" in row.lines)
        columns = [NOT_MEASURED if name == "pruned top-1" else NOT_THERE for name in head[2:-1]]
        lines.append([group[0].lines["network"], masks(group), *columns, references or NOT_THERE])
    return _markdown(lines)


def short_table(rows: list[Row]) -> str:
    """Makes the table of the project's README."""
    shown = [row for row in rows if row.lines.get("readme") and row.is_measured()]
    lines = [["network; data", "pruned", "MACs", "top-1", "dense, trained as long", "native code", "ONNX Runtime"]]
    for place, row in enumerate(shown):
        columns = [row.words(name) for name in ("macs", "pruned", "control", *TIMES)]
        lines.append([_network(shown, place), f"[{row.lines['masks']}](results/{row.lines['page']})", *columns])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"|{'|'.join(line)}|\n" if line[0] == "---" else f"| {' | '.join(line)} |\n" for line in lines)


def renewed(text: str, rows: list[Row], table: Callable[[list[Row]], str]) -> str:
    """Returns a page with its table and its marked figures as the files have them."""
    by_name = {row.name: row for row in rows}
    text = _TABLE.sub(lambda found: found[1] + table(rows) + found[2], text)
    return _FIGURE.sub(lambda found: found[1] + by_name[found[2]].words(found[3]), text)


def table_of(*networks: str) -> Callable[[list[Row]], str]:
    """Returns what makes the table of a page about some of the networks."""
    return lambda rows: full_table([row for row in rows if _group(row) in networks], links=False)


# Runs of results/int8 -> what they are.
INT8_NAMES = {
    "control_s0": "narrow, CIFAR-10: dense",
    "channels_ort07_s0": "narrow: whole channels, 0.592x",
    "dense0": "1.0-160, clothes: dense",
    "old/pruned0": "1.0-160: whole channels, 0.500x",
    "dense160_seed0": "1.0-160, clothes, no VNNI: dense",
    "channels160_seed0": "1.0-160, no VNNI: whole channels, 0.500x",
}


def int8_table(rows: list[Row]) -> str:
    """Makes the table of results/int8: a row for each file, with its times at 1 and 8 images."""
    lines = [["network", "numbers", "top-1", "file", "1 image", "", "8 images", ""]]
    for name in ("narrow.json", "clothes.json", "clothes160.json"):
        path = HERE / "int8" / name
        found = json.loads(path.read_text())["rows"] if path.is_file() else []
        for one, eight in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
            times = [words for row in (one, eight) for words in (f"{row['ms']:.2f} ms", f"{row['time_ratio']:.2f}x")]
            size = f"{one['bytes'] / 1000:,.0f} kB"
            kind = one["kind"].replace("_signed", ", signed activations").replace("_7_bits", ", weights of 7 bits")
            lines.append([INT8_NAMES[one["network"]], kind, f"{100 * one['top1']:.2f}%", size, *times])
    return _markdown(lines)


PAGES = {
    HERE / "README.md": full_table,
    ROOT / "README.md": short_table,
    HERE / "clothes" / "README.md": table_of("clothes160", "clothes192"),
    HERE / "cifar10_transfer" / "README.md": table_of("transfer"),
    HERE / "cifar10_lossless" / "README.md": table_of("half_width"),
    HERE / "filters_lossless" / "README.md": table_of("resnet20", "resnet56"),
    HERE / "int8" / "README.md": int8_table,
}


def main() -> int:
    """Rewrites the pages, or checks them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is not up to date")
    check = parser.parse_args().check
    rows, stale = load(), []
    for page, table in PAGES.items():
        old = page.read_text()
        new = renewed(old, rows, table)
        if old != new:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new)
    print(f"rewritten: {', '.join(stale)}" if stale else "up to date")
    return int(bool(stale) and check)


if __name__ == "__main__":
    sys.exit(main())
