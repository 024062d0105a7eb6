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


def export_command(arguments: Sequence[str]) -> int:
    """`fdjax export`."""
    parsed = parse_arguments(ExportArguments, "fdjax export", arguments)
    out = Path(parsed.out)
    check_file_target("--out", parsed.out, (".stablehlo", ".onnx", ".cc"))
    from fdjax.frozen import load
    from fdjax.frozen.export import export

    export(load(parsed.frozen).frozen, out)
    print(f"{out}: {out.stat().st_size:,} bytes")
    return 0
