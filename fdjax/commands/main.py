"""`fdjax`: the table of its commands. Nothing here imports jax before it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fdjax import runtime
from fdjax.commands.arguments import Commands, dispatch
from fdjax.commands.bench import bench_command
from fdjax.commands.blocks import blocks_command
from fdjax.commands.check import check_command
from fdjax.commands.compile_for import compile_command
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
from fdjax.errors import reports_user_errors

COMMANDS: Commands = {
    "macs": (macs_command, "count the MACs of a config or a checkpoint, layer by layer"),
    "import": (import_command, "make a checkpoint of weights trained elsewhere"),
    "blocks": (blocks_command, "choose the block of each layer of a pretrained network"),
    "profile": (profile_command, "measure what pruning by profiled energies leaves of a network's accuracy"),
    "prune": (prune_command, "prune a trained network by profiled energies, for refinement"),
    "freeze": (freeze_command, "compile a checkpoint into a dense network that needs no training code"),
    "export": (export_command, "write a frozen network as StableHLO or ONNX"),
    "compile": (compile_command, "compile for a TPU or GPU that is not here, and say what its compiler expects"),
    "bench": (bench_command, "time a frozen network beside the dense one"),
    "predict": (predict_command, "name the classes of pictures by a frozen network"),
    "check": (check_command, "say what of a run's files, or of a frozen network's, is sound"),
    "data": (data_command, "prepare or inspect a data set"),
    "sweep": (sweep_command, "do many runs from one description, several at a time, with a table and plots"),
    "report": (report_command, "write one HTML page of a run, or of several side by side"),
    "results": (results_command, "record finished runs in one folder, with a table and a plot of them"),
}


@reports_user_errors
def fdjax_command(arguments: Sequence[str] | None = None) -> int:
    """`fdjax COMMAND ...`."""
    return dispatch(COMMANDS, sys.argv[1:] if arguments is None else arguments)


def main() -> int:
    """Entry point of the installed `fdjax` command."""
    runtime.setup()
    return fdjax_command()
