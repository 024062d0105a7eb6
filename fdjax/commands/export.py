"""`fdjax export`: writes a frozen network for other programs."""

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
    """Directory of a frozen network, as fdjax freeze writes it."""
    out: str
    """File to write; its suffix chooses the format: .stablehlo, .onnx or .cc (C++17, one file)."""
    any_engine: bool = False
    """Also export a network that was made for an engine that does not read such files (freeze --choose time)."""
    time: bool = True
    """Time the network beside its dense network with one image, on an engine that runs such files, unless the manifest
    has that time already; warn if the pruned network is slower."""


def export_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax export` and returns its exit status."""
    parsed = parse_arguments(ExportArguments, "fdjax export", arguments)
    out = Path(parsed.out)
    check_file_target("--out", parsed.out, (".stablehlo", ".onnx", ".cc"))
    from fdjax.experiments.bench import slower_remarks
    from fdjax.frozen import load
    from fdjax.frozen.export import export
    from fdjax.frozen.speed import check_made_for, engines_of_file

    network = load(parsed.frozen)
    remarks = check_made_for(network.manifest, engines_of_file(out), anyway=parsed.any_engine)
    export(network.frozen, out, network.network, network.manifest.get("data"))
    print(f"{out}: {out.stat().st_size:,} bytes")
    for line in [*remarks, *slower_remarks(network, out, measure=parsed.time)]:
        print(line)
    return 0
