"""`fdjax`: the table of its commands. Nothing here imports jax before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from fdjax import runtime
from fdjax.commands.bench import bench_command
from fdjax.commands.blocks import blocks_command
from fdjax.commands.data import data_command
from fdjax.commands.export import export_command
from fdjax.commands.freeze import freeze_command
from fdjax.commands.import_weights import import_command
from fdjax.commands.macs import macs_command
from fdjax.commands.predict import predict_command
from fdjax.commands.profile import profile_command
from fdjax.commands.prune import prune_command
from fdjax.commands.report import report_command
from fdjax.commands.results import results_command
from fdjax.commands.sweep import sweep_command
from fdjax.errors import UserError, reports_user_errors, suggestion

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "macs": (macs_command, "count the MACs of a config or a checkpoint, layer by layer"),
    "import": (import_command, "make a checkpoint of weights trained elsewhere"),
    "blocks": (blocks_command, "choose the block of each layer of a pretrained network"),
    "profile": (profile_command, "measure what pruning by profiled energies leaves of a network's accuracy"),
    "prune": (prune_command, "prune a trained network by profiled energies, for refinement"),
    "freeze": (freeze_command, "compile a checkpoint into a dense network that needs no training code"),
    "export": (export_command, "write a frozen network as StableHLO or ONNX"),
    "bench": (bench_command, "time a frozen network beside the dense one"),
    "predict": (predict_command, "name the classes of pictures by a frozen network"),
    "data": (data_command, "prepare or inspect a data set"),
    "sweep": (sweep_command, "do many runs from one description, several at a time, with a table and plots"),
    "report": (report_command, "write one HTML page of a run, or of several side by side"),
    "results": (results_command, "record finished runs in one folder, with a table and a plot of them"),
}


@reports_user_errors
def fdjax_command(arguments: Sequence[str] | None = None) -> int:
    """`fdjax COMMAND ...`."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    listing = "\n".join(f"  {name:10} {text}" for name, (_, text) in COMMANDS.items())
    usage = f"usage: fdjax COMMAND [OPTIONS]; fdjax COMMAND --help tells more\n\n{listing}"
    if not given or given[0] in ("-h", "--help"):
        print(usage)
        return 0 if given else 2
    if given[0] not in COMMANDS:
        raise UserError(f"no command {given[0]!r}{suggestion(given[0], COMMANDS)}; accepted are {', '.join(COMMANDS)}")
    return COMMANDS[given[0]][0](given[1:])


def main() -> int:
    """Entry point of the installed `fdjax` command."""
    runtime.setup()
    return fdjax_command()
