"""What the studies here share: calls that can be interrupted and given again, times of many networks, and pictures."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(1, str(ROOT))

from fdjax.reports.figures import BLUE, GREEN, ORANGE, PURPLE, VERMILION, new_figure, save_figure  # noqa: E402

# First word of a network's name -> label, colour and marker in the pictures.
LOOKS = {
    "control": ("dense, trained as long", "black", "*"),
    "channels": ("whole channels", BLUE, "o"),
    "distilled": ("whole channels, distilled", PURPLE, "P"),
    "tied": ("tied 0, 1, N", ORANGE, "s"),
    "paper": ("the paper's masks", VERMILION, "^"),
    "random": ("random", "0.5", "x"),
    "width025": ("narrower network", GREEN, "v"),
    "pixels24": ("smaller picture", PURPLE, "D"),
}


def call(command: Sequence[str], log: Path) -> int:
    """Runs a command in the project's root, its output behind what the log has; a termination is passed on to it.

    Returns:
      Its exit status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    ended = False

    def end(number: int, frame: Any) -> None:
        nonlocal ended
        ended = True
        process.send_signal(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if ended:
        sys.exit("interrupted; the same command goes on")
    if status:
        print(f"failed with exit status {status}: see {log}", flush=True)
    return status


def is_finished(workdir: Path) -> bool:
    """Returns whether a run has its result."""
    summary = workdir / "summary.json"
    return summary.is_file() and "top1" in json.loads(summary.read_text())


def prune_then_refine(workdir: Path, prune: Sequence[str], refine: Sequence[str]) -> bool:
    """Prunes a checkpoint by `fdjax prune`, then refines it; what is done is not done again.

    Args:
      workdir: of the refinement; the pruned checkpoint is in the folder `pruned` beside it, and the logs beside both.
      prune: flags of `fdjax prune`, without --out and --json.
      refine: flags of train.py, without --workdir, --init and those that `fdjax prune` prints.

    Returns:
      Whether there is a result.
    """
    if is_finished(workdir):
        return True
    pruned, log = workdir.parent / "pruned" / workdir.name, workdir.with_name(f"{workdir.name}.txt")
    report = pruned.with_name(f"{pruned.name}.json")
    if not report.is_file():
        shutil.rmtree(pruned, ignore_errors=True)  # Of an interrupted call.
        report.parent.mkdir(parents=True, exist_ok=True)
        if call(["-m", "fdjax", "prune", *prune, "--out", str(pruned), "--json", str(report)], log):
            return False
    flags = json.loads(report.read_text())["flags"]
    call(["train.py", *refine, "--workdir", str(workdir), "--init", str(pruned), *flags], log)
    return is_finished(workdir)


def time_networks(
    runs: Path, dense: str, names: Sequence[str], engine: str, batch: int, rounds: int, repeats: int
) -> list[dict[str, Any]]:
    """Times the networks of finished runs on an engine, one thread, all in turn.

    Args:
      runs: folder of the runs.
      dense: name of the dense run, whose time the ratios are over.
      names: names of the others.
      engine: the engine, whose clock also chooses their schedules.
      batch: images at once.
      rounds: timed executions of each network.
      repeats: how often all of that is done; times are medians over it.

    Returns:
      A row for each network: top-1, MACs, milliseconds, time over the dense network's, and its range.
    """
    from fdjax import runtime
    from fdjax.frozen.assemble import freeze
    from fdjax.frozen.bench import dense_network, seeded_variables
    from fdjax.frozen.choice import Stopwatch
    from fdjax.frozen.engine_bench import bench_engines
    from fdjax.training.restore import open_checkpoint

    stopwatch, forms = Stopwatch(batch, runtime.times_cache_dir(), engine), {}
    for name in (dense, *names):
        restored = open_checkpoint(str(runs / name))[2]
        if restored.hard is None:
            forms[name] = dense_network(restored.graph)
        else:
            weights = seeded_variables(restored.graph)
            forms[name] = freeze(restored.graph, weights, restored.hard.counts, stopwatch.choose)
    found = [bench_engines(forms, [engine], batch=batch, threads=1, rounds=rounds) for _ in range(repeats)]
    rows = []
    for rank, name in enumerate(forms):
        ratios = sorted(run[rank]["time_ratio"] for run in found)
        summary = json.loads((runs / name / "summary.json").read_text())
        row = {"network": name, "engine": engine, "batch": batch, "top1": summary["top1"]}
        row |= {"ms": median(run[rank]["ms"] for run in found), "macs": summary["macs"]["total"]}
        rows.append({**row, "time_ratio": median(ratios), "time_ratio_range": [ratios[0], ratios[-1]]})
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Point(NamedTuple):
    """A network in a picture: its kind (of `LOOKS`), x, top-1 in percent, and the deviation of both over seeds."""

    kind: str
    x: float
    top1: float
    x_error: float = 0.0
    top1_error: float = 0.0


def draw(panels: Mapping[str, Sequence[Point]], file: Path, x_label: str) -> None:
    """Draws top-1 in panels, a point with its error bars for each network.

    Args:
      panels: title -> its points.
      file: the picture.
      x_label: what x is.
    """
    figure = new_figure(1 + 4 * len(panels), 4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    handles = {}
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for kind, (label, colour, marker) in LOOKS.items():
            own = sorted(point for point in points if point.kind == kind)
            if own:
                _, x, top1, x_errors, errors = zip(*own, strict=True)
                size = 10 if kind == "control" else 7
                looks = {"color": colour, "marker": marker, "markersize": size, "linestyle": "", "capsize": 3}
                bars = [of if any(of) else None for of in (errors, x_errors)]
                handles[label] = axis.errorbar(x, top1, *bars, label=label, **looks)
        axis.set_title(title)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test top-1 (%)")
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, file)
