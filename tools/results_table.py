"""Prints finished runs as a Markdown table, from their summaries: python tools/results_table.py DIR/*/summary.json"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean


def main() -> int:
    """Reads the summaries named on the command line."""
    runs = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    if not runs:
        print("usage: python tools/results_table.py DIR/*/summary.json", file=sys.stderr)
        return 2
    rows = [
        (str(run["seed"]), run["dense_top1"], run["top1"], run["macs"]["ratio"], run["macs"]["paper_ratio"],
         run["macs"]["pruned"] / run["macs"]["dense"], run["seconds"] / 60)
        for run in runs
    ]  # fmt: skip
    if len(rows) > 1:
        rows.append(("mean", *(mean(row[column] for row in rows) for column in range(1, 7))))  # type: ignore[arg-type]
    print(
        "| seed | dense top-1 | pruned top-1 | difference | MACs | by the paper's count | without transforms | time |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for seed, dense, pruned, ratio, paper, bare, minutes in rows:
        print(
            f"| {seed} | {100 * dense:.2f}% | {100 * pruned:.2f}% | {100 * (pruned - dense):+.2f} | {ratio:.3f}x "
            f"| {paper:.3f}x | {bare:.3f}x | {minutes:.1f} min |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
