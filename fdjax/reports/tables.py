"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("dense", "pruned", "full_transforms", "paper_total", "total")
_HEADINGS = ("dense", "pruned", "full DCT+IDCT", "paper total", "total")


def macs_table(macs: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """A row per layer and one of totals, in multiply-accumulates.

    Args:
      macs: the `macs` object of `summary.json`.
      layers: its `layers`.
    """
    width = max(len("layer"), *(len(layer["name"]) for layer in layers))
    heading = " ".join([f"{'layer':{width}}", "block", *(f"{title:>13}" for title in _HEADINGS), " ratio", "form"])
    rows = [heading, "-" * len(heading)]
    for layer in layers:
        counts = " ".join(f"{layer[column]:13,}" for column in _COLUMNS)
        form = layer["form"] + (", released" if layer["released"] else "")
        rows.append(f"{layer['name']:{width}} {layer['block'] or '-':>5} {counts} {layer['ratio']:6.3f} {form}")
    totals = " ".join(f"{macs[column]:13,}" for column in _COLUMNS)
    rows += ["-" * len(heading), f"{'all':{width}} {'':5} {totals} {macs['ratio']:6.3f}"]
    rows.append(f"total / dense {macs['ratio']:.4f}, by the paper's count {macs['paper_ratio']:.4f}")
    return "\n".join(rows)


def blocks_table(report: Mapping[str, Any]) -> str:
    """A row per unit: its map, what each block loses of its energy and costs at one price of a MAC, the block chosen.

    Args:
      report: of `fdjax blocks`.
    """
    units = report["units"]
    blocks = sorted({option["block"] for unit in units for option in unit["options"]})
    width = max(len("layer"), *(len(unit["name"]) for unit in units))
    columns = [f"{f'lost, K={block}':>10}" for block in blocks] + [f"{f'MACs, K={block}':>12}" for block in blocks]
    heading = " ".join([f"{'layer':{width}} {'map':>7}", *columns, "block"])
    rows = [heading, "-" * len(heading)]
    for unit in units:
        by_block = {option["block"]: option for option in unit["options"]}
        losses = (f"{by_block[block]['lost']:10.1%}" if block in by_block else f"{'-':>10}" for block in blocks)
        macs = (f"{by_block[block]['macs']:12,}" if block in by_block else f"{'-':>12}" for block in blocks)
        size = "x".join(map(str, unit["maps"][0]))
        rows.append(" ".join([f"{unit['name']:{width}} {size:>7}", *losses, *macs, f"{unit['block']:5}"]))
    return "\n".join(rows)
