"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("dense", "pruned", "full_transforms", "paper_total", "total")
_HEADINGS = ("dense", "pruned", "full DCT+IDCT", "paper total", "total")
# A frozen network that computes as many times the MACs of its masks says so.
_MANY_MORE = 1.1


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Formats cells [rows][columns] as lines; a column is as wide as its widest cell."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in table)


def macs_table(macs: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of MACs, with a row for each layer and one of totals.

    Args:
      macs: the `macs` object of `summary.json`.
      layers: its `layers`.
    """
    width = max([len("layer"), *(len(layer["name"]) for layer in layers)])
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
    """Returns a table of block sizes: for each unit its map, lost energy and MACs of each block size, and the choice.

    Args:
      report: the report of `fdjax blocks`.
    """
    units = report["units"]
    blocks = sorted({option["block"] for unit in units for option in unit["options"]})
    width = max([len("layer"), *(len(unit["name"]) for unit in units)])
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


def frozen_table(manifest: Mapping[str, Any]) -> str:
    """Describes a frozen network in a few lines: the form of each run and layer, MACs and accuracy.

    Args:
      manifest: the manifest that `fdjax freeze` wrote.
    """
    units, macs, choice = manifest["units"], manifest["macs"], manifest["choice"]
    width = max([len("block"), *(len(unit["name"]) for unit in units)])
    rows = [f"{'block':{width}} {'MACs':>13} form", "-" * (width + 24)]
    for unit in units:
        times = unit["milliseconds"] or {}
        measured = f" ({', '.join(f'{form} {ms:.3f} ms' for form, ms in times.items())})" if times else ""
        rows.append(f"{unit['name']:{width}} {unit['macs']:13,} {unit['form']}{measured}")
    plain = [unit["name"] for unit in units if unit["form"] == "dense"]
    rows.append(f"dense as before: {', '.join(plain) or 'none'}")
    if choice["released_at_freezing"]:
        rows.append(f"released because they are faster without masks: {', '.join(choice['released_at_freezing'])}")
    expected = choice.get("expected")
    if expected:
        rows.append(
            f"estimated cycles on {choice['target']}, batches of {choice['batch']}: {expected['cycles']:,}, "
            f"{expected['ratio']:.2f} of the dense network's"
        )
    rows.append(f"MACs: {macs['total']:,}, {macs['ratio']:.3f} of the dense network's")
    computed = manifest.get("program_macs", 0)  # Manifests of 0.1 lack it.
    if computed > _MANY_MORE * macs["total"]:
        rows[-1] += (
            f", by the masks. The frozen network computes {computed:,}, {computed / macs['dense']:.3f} of the dense "
            "network's, because bands are merged into few products"
        )
    accuracy = manifest["accuracy"]
    if accuracy is None:
        problem = manifest.get("accuracy_problem", "the test set is not there")
        rows.append(f"accuracy: not measured: {problem} (--data-path says where the data are)")
        return "\n".join(rows)
    masked = accuracy["masked"]
    rows.append(
        f"top-1: {100 * accuracy['top1']:.2f}% of {accuracy['num_examples']:,} test images; the masked network has "
        f"{100 * masked['top1']:.2f}%, the same class for {100 * masked['same_top1']:.2f}%, logits within "
        f"{masked['relative_error']:.1e}"
    )
    if "before_release" in accuracy:
        rows.append(f"top-1 before layers were released: {100 * accuracy['before_release']['top1']:.2f}%")
    return "\n".join(rows)
