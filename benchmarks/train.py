"""Measures images per second of fdjax's training steps beside PyTorch eager on the same network (docs/benchmarks.md).

python benchmarks/train.py --width 0.35 --batch 128 --threads 2 --json FILE
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import _contest as contest
from _worker import Case

from fdjax.commands.output_files import write_report
from fdjax.errors import UserError, reports_user_errors


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags; every combination of their values is measured."""
    parser = contest.Parser("Measures images per second of a training step, fdjax beside PyTorch eager.")

    def several(flag: str, help_text: str, default: Sequence, **accepted) -> None:
        parser.add_argument(flag, nargs="+", default=list(default), help=help_text, **accepted)

    parser.add_argument("--network", choices=contest.NETWORKS, default=contest.NETWORKS[0], help="network")
    several("--width", "width multipliers", [0.35], type=contest.width_multiplier)
    several("--batch", "batch sizes in images", [128], type=contest.integer(1))
    several("--resolution", "sides of the images in pixels", [32], type=contest.integer(contest.MIN_RESOLUTION))
    several("--block", "block sizes of mask steps in pixels", [4], type=contest.integer(1, 16))
    several("--dtype", "types to compute in", ["float32"], choices=contest.DTYPES)
    several("--allocator", "allocator settings: the C library's, or fdjax's", contest.ALLOCATORS,
            choices=contest.ALLOCATORS)  # fmt: skip
    several("--step", "training steps", contest.STEPS, choices=contest.STEPS)
    parser.add_argument("--no-torch", dest="torch", action="store_false", help="leave PyTorch out")
    contest.add_shared_flags(parser)
    return parser.parse_args(arguments)


def plan(flags: argparse.Namespace) -> Iterator[Case]:
    """Yields the case of every row."""
    for width, batch, resolution, dtype, allocator, step in itertools.product(
        flags.width, flags.batch, flags.resolution, flags.dtype, flags.allocator, flags.step
    ):
        for block in flags.block[:1] if step == "weights" else flags.block:
            yield Case(
                engine="fdjax",
                network=flags.network,
                width=width,
                batch=batch,
                resolution=resolution,
                block=block,
                threads=flags.threads,
                dtype=dtype,
                allocator=allocator,
                step=step,
                seed=flags.seed,
            )


def measure(case: Case, rounds: int, with_torch: bool) -> contest.Row:
    """Measures a case beside the weight step and PyTorch's; more workers would need more memory."""
    weights = dataclasses.replace(case, step="weights")
    torch = dataclasses.replace(weights, engine="torch")
    contestants = [case] if case == weights else [case, weights]
    results = contest.run_contest([*contestants, torch] if with_torch else contestants, rounds)
    return contest.make_row(results[case], results[weights], results.get(torch))


@reports_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures every row; prints each and rewrites the JSON file after it."""
    flags = parse(arguments)
    if flags.network.startswith("resnet") and {*flags.step} != {"weights"}:
        raise UserError(f"--network {flags.network} has no pointwise layer to mask; --step weights is accepted")
    with_torch = flags.torch and importlib.util.find_spec("torch") is not None
    report = contest.new_report(flags)
    contest.print_heading()
    for case in plan(flags):
        row = measure(case, flags.rounds, with_torch)
        contest.print_row(row)
        report["rows"].append(row)
        write_report(flags.json, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
