"""Compiles training steps and frozen networks for accelerators that are not here (results/ahead).

python benchmarks/ahead.py --target tpu:v5e tpu:v6e cuda:h100 --json FILE --page FILE

Compiling takes minutes. Rows that the JSON file already has are not compiled again, and `--limit` ends compilations
that take too long; a later call with a higher limit tries them again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest

from fdjax.commands.output_files import write_report
from fdjax.errors import UserError, reports_user_errors
from fdjax.provenance import commit

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
# The configs that take longest to compile come last.
CONFIGS = sorted(
    (str(f.relative_to(ROOT)) for f in (ROOT / "configs").glob("*.py")), key=lambda f: ("imagenet" in f, f)
)
NETWORKS = ("mobilenet_v2_small", "mobilenet_v2_192")
ESTIMATED = ", by estimate"
# Masks of the frozen networks, and their share of the MACs by the paper's count; the dense network comes first.
FORMS = {"dense": 1.0, "channels": 0.5, "tied": 0.5, "paper": 0.8}
FORMS |= {f"{masks}{ESTIMATED}": FORMS[masks] for masks in ("channels", "tied")}
# The side of images and the number of classes that are assumed for folders that are not here.
_SIDE, _CLASSES = 32, 10
_TARGETS = ("cuda:h100", "tpu:v5e", "tpu:v6e")
_COMMAND = "python benchmarks/ahead.py --target cuda:h100 tpu:v5e tpu:v6e --json ahead.json --page README.md"
_KEY = ("what", "form", "batch", "target")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags."""
    parser = contest.Parser("Compiles training steps and frozen networks for accelerators that are not here.")
    targets = "accelerators, tpu:v5e, tpu:v6e or cuda:h100"
    parser.add_argument("--target", nargs="*", default=["tpu:v5e"], help=f"{targets}; none: write the page only")
    parser.add_argument("--config", nargs="*", default=CONFIGS, metavar="FILE", help="configs to compile the steps of")
    parser.add_argument("--network", nargs="*", default=list(NETWORKS), help="networks to freeze with all masks")
    parser.add_argument("--batch", nargs="+", type=contest.integer(1), default=[1, 64], help="batch sizes, in images")
    parser.add_argument("--limit", type=contest.integer(1), default=900, help="seconds of processor time for each")
    parser.add_argument("--page", type=contest.output_file, metavar="FILE", help="Markdown page of all rows to write")
    parser.add_argument(
        "--json", type=contest.output_file, required=True, metavar="FILE", help="file of the rows; new ones are added"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def key_of(row: Row) -> tuple[Any, ...]:
    """Returns the values that identify a row."""
    return tuple(row[name] for name in _KEY)


def read_rows(file: str) -> list[Row]:
    """Reads the rows that have been written."""
    return json.loads(Path(file).read_text())["rows"] if Path(file).is_file() else []


# The worker: one config or network, for one target


def config_rows(config_file: str, target: str) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """Yields the facts of each of a config's training steps, and the function that lowers it."""
    from fdjax.config import load_config
    from fdjax.data import FOLDER, describe_source
    from fdjax.data.decode import sides
    from fdjax.experiments.ahead import training_steps
    from fdjax.frozen.targets import lower_ahead

    config = load_config(config_file)
    data = config.data
    if data.name == FOLDER:
        shape, classes = (*sides(data.image_size or _SIDE), 3), _CLASSES
    else:
        shape, names = describe_source(data.name, data.path, data.image_size, data.grayscale)
        classes = len(names)
    facts = {"what": config_file, "target": target, "batch": data.batch_size, "dtype": config.model.precision}
    for step in training_steps(config, shape, classes):
        yield {**facts, "form": step.form}, lambda step=step: lower_ahead(target, step.function, *step.arguments)


def network_rows(name: str, target: str, batches: Sequence[int]) -> Iterator[tuple[Row, Callable[[], Any]]]:
    """Yields the facts of a network with random masks of each form, and the function that lowers it."""
    from fdjax.frozen.bench import dense_network
    from fdjax.frozen.targets import lower_frozen

    dense: Any = None
    for form, batch in itertools.product(FORMS, batches):
        if form.endswith(ESTIMATED) and target.startswith("cuda"):
            continue
        facts: Row = {"what": name, "form": form, "target": target, "batch": batch, "dtype": "bfloat16", "macs": None}

        def lower(facts: Row = facts) -> Any:
            nonlocal dense
            if facts["form"] == "dense":
                dense = dense or dense_network(_graph(name, "channels"), 0)
                frozen = dense
            else:
                frozen = _frozen(name, facts["form"], target, facts["batch"])
            facts["macs"] = frozen.program.macs()
            return lower_frozen(target, frozen.program, frozen.arrays, facts["batch"])

        yield facts, lower


def _graph(name: str, masks: str) -> Any:
    from frozen_mobilenet_v2 import build_graph

    return build_graph(name, masks != "paper", None)


def _frozen(name: str, form: str, target: str, batch: int) -> Any:
    """Freezes a network with random masks; forms are chosen by MACs, or by the estimates of the target's compiler."""
    from _seeded_masks import seeded_masks

    from fdjax.frozen import freeze, release_slower
    from fdjax.frozen.bench import seeded_variables
    from fdjax.frozen.targets import Estimate

    masks = form.removesuffix(ESTIMATED)
    graph = _graph(name, masks)
    counts, weights = seeded_masks(graph, masks, FORMS[form], 0).counts, seeded_variables(graph, 0)
    if not form.endswith(ESTIMATED):
        return freeze(graph, weights, counts)
    estimate = Estimate(target, batch)
    return freeze(graph, weights, release_slower(graph, weights, counts, estimate)[0], estimate.choose)


def work(flags: argparse.Namespace) -> None:
    """Compiles the rows that the JSON file lacks; prints a line when one begins and when it is done.

    The system ends the process when a compilation takes more processor time than its limit.
    """
    from fdjax.frozen.targets import compute_on_the_cpu, find_target

    compute_on_the_cpu()
    (target,) = flags.target
    find_target(target)
    rows = read_rows(flags.json)
    done = {key_of(row) for row in rows if row.get("limit", flags.limit) >= flags.limit}
    same = {(row.get("digest"), row["target"]): row for row in rows}
    found = (
        config_rows(flags.config[0], target) if flags.config else network_rows(flags.network[0], target, flags.batch)
    )
    for facts, lower in found:
        if key_of(facts) in done:
            continue
        print(json.dumps(facts), flush=True)
        signal.setitimer(signal.ITIMER_PROF, flags.limit)
        row = _compiled(facts, lower, same)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(row), flush=True)
        same[row.get("digest"), target] = row


def _compiled(facts: Row, lower: Callable[[], Any], same: dict[tuple[Any, str], Row]) -> Row:
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        lowered = lower()
        known = same.get((lowered.digest, facts["target"]))
        if known is not None and "memory_mb" in known:
            figures = ("digest", "compile_seconds", "processor_seconds", "memory_mb", "cycles", "commit", "jax")
            return {**facts, **{name: known[name] for name in figures}, "as": f"{known['what']}, {known['form']}"}
        made = lowered.compile()
    except UserError as error:
        return {**facts, "problem": str(error), "commit": commit()}
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **facts,
        "digest": lowered.digest,
        "compile_seconds": time.perf_counter() - start,
        "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "memory_mb": made.memory_mb,
        "cycles": made.cycles,
        "commit": commit(),
        "jax": contest.describe_machine()["jax"],
    }


# The parent: a worker after the other


def compile_all(flags: argparse.Namespace, what: Sequence[str], target: str, report: dict[str, Any]) -> None:
    """Lets workers compile one config or network; when the system has ended one, another goes on."""
    limit = ["--limit", str(flags.limit), "--batch", *map(str, flags.batch)]
    command = [sys.executable, __file__, "--worker", *what, "--target", target, "--json", flags.json, *limit]
    while True:
        begun: Row | None = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            for line in worker.stdout:
                row = json.loads(line)
                begun = row if begun is None else None
                if begun is None:
                    _add(report, row, flags)
        if worker.returncode == 0:
            return
        if begun is None:
            raise UserError(f"the worker for {' '.join(what)} and {target} ended with status {worker.returncode}")
        late = worker.returncode == -signal.SIGPROF
        why = f"not finished in {flags.limit} s" if late else f"the compiler ended with status {worker.returncode}"
        _add(report, {**begun, "problem": why, "limit": flags.limit, "commit": commit()}, flags)


def _add(report: dict[str, Any], row: Row, flags: argparse.Namespace) -> None:
    report["rows"] = [*(other for other in report["rows"] if key_of(other) != key_of(row)), row]
    write_report(flags.json, report)
    said = row.get("problem") or f"{row['processor_seconds']:.0f} s, {row['memory_mb']:.1f} MB, {row['cycles']} cycles"
    print(f"{row['target']}  {row['what']}  {row['form']}  {row['batch']}: {said}", flush=True)
    write_page(flags, report)


# The page


def write_page(flags: argparse.Namespace, report: dict[str, Any]) -> None:
    """Writes the page of all rows, if --page is given."""
    if flags.page is None:
        return
    rows = {key_of(row): row for row in report["rows"]}
    targets = list(dict.fromkeys([*_TARGETS, *(row["target"] for row in rows.values())]))
    lines = [*_heading(report, rows), "", "## Frozen networks", "", *_table(rows, targets, False)]
    lines += ["", "## Training steps", "", *_table(rows, targets, True)]
    Path(flags.page).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _heading(report: dict[str, Any], rows: dict[tuple[Any, ...], Row]) -> list[str]:
    commits = sorted({str(row.get("commit"))[:12] for row in rows.values()})
    machine = report["machine"]
    return [
        "# Ahead of time: what compiles for accelerators that are not here",
        "",
        f"    {_COMMAND}",
        "",
        f"The command wrote this page, on one core of an {machine['cpu']}; jax {machine['jax']}; commit "
        f"{', '.join(commits)}.",
        "Seconds are processor time of tracing and compiling. Memory is what arguments, results and temporaries take",
        "on the device. Cycles are what the compiler expects, in all and over the dense network's; for GPUs it expects",
        "none. Nothing here has run on these devices. What was not compiled when the page was written is not measured.",
        '"By estimate": schedules by `--choose estimate`, without the masks it removes; seconds include all parts.',
    ]


def _table(rows: dict[tuple[Any, ...], Row], targets: Sequence[str], steps: bool) -> list[str]:
    own: dict[tuple[Any, ...], Row] = {key[:3]: row for key, row in rows.items() if ("macs" in row) != steps}
    seen = {what for what, *_ in own}
    own |= {
        missing: {"dtype": "-"}
        for missing in (
            ((config, "every step", "-") for config in CONFIGS if config not in seen)
            if steps
            else itertools.product(NETWORKS, FORMS, (1, 64))
        )
        if missing not in own
    }
    head = ["config", "step"] if steps else ["network", "masks", "MACs"]
    heads = [*head, "images", "type", *(f"{t}: s, MB{'' if t.startswith('cuda') else ', cycles'}" for t in targets)]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for (what, form, batch), row in own.items():
        dense = own.get((what, "dense", batch), row)
        macs = row.get("macs") and dense.get("macs")
        share = [] if steps else [f"{row['macs'] / dense['macs']:.2f}x" if macs else "-"]
        cells = [Path(what).stem, form, *share, str(batch), row["dtype"]]
        for target in targets:
            whole = None if steps else rows.get((what, "dense", batch, target))
            nothing = form.endswith(ESTIMATED) and target.startswith("cuda")
            cells.append("-" if nothing else _cell(rows.get((what, form, batch, target)), whole))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cell(row: Row | None, dense: Row | None) -> str:
    if row is None:
        return "not measured"
    if "problem" in row:
        return row["problem"]
    parts = [f"{row['processor_seconds']:.0f}", f"{row['memory_mb']:,.1f}"]
    if row["cycles"] is not None:
        over = f" ({row['cycles'] / dense['cycles']:.2f}x)" if dense and dense.get("cycles") and dense != row else ""
        parts.append(f"{row['cycles']:,}{over}")
    return ", ".join(parts)


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles everything for every target; prints each row and rewrites the files after it."""
    flags = parse(arguments)
    if flags.worker:
        work(flags)
        return 0
    report = {"machine": contest.describe_machine(), "rows": read_rows(flags.json)}
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    works = [("--network", name) for name in flags.network] + [("--config", file) for file in flags.config]
    for target, (kind, name) in itertools.product(flags.target, works):
        compile_all(flags, (kind, name, "--config" if kind == "--network" else "--network"), target, report)
    write_page(flags, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
