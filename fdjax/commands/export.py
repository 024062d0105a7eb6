"""`fdjax export`: a frozen network for other programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.output_files import check_file_target


@dataclasses.dataclass(kw_only=True)
class ExportArguments:
    """Writes a frozen network for other programs: StableHLO (cpu, cuda and tpu, any batch size), ONNX, or C++."""

    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    out: str
    """File to write; its suffix says the format: .stablehlo, .onnx or .cc (C++17, one file)."""
    time: bool = True
    """Time the network beside its dense self, one image at once, on an engine for such files, where it has not been
    timed there yet, and say so where it is slower."""


def export_command(arguments: Sequence[str]) -> int:
    """`fdjax export`."""
    parsed = parse_arguments(ExportArguments, "fdjax export", arguments)
    out = Path(parsed.out)
    check_file_target("--out", parsed.out, (".stablehlo", ".onnx", ".cc"))
    from fdjax.experiments.bench import remarks
    from fdjax.frozen import load
    from fdjax.frozen.export import export

    network = load(parsed.frozen)
    export(network.frozen, out, network.network)
    print(f"{out}: {out.stat().st_size:,} bytes")
    for line in remarks(network, out, measure=parsed.time):
        print(line)
    return 0
