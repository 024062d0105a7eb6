"""`fdjax`: the table of its commands. Nothing here imports jax before it is needed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from fdjax import __version__, runtime
from fdjax.commands.arguments import Commands, dispatch
from fdjax.commands.bench import bench_command
from fdjax.commands.blocks import blocks_command
from fdjax.commands.check import check_command
from fdjax.commands.compile_for import compile_command
from fdjax.commands.data import data_command
from fdjax.commands.evaluate import eval_command
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
from fdjax.commands.train import train_command
from fdjax.errors import reports_user_errors

COMMANDS: Commands = {
    "train": (
        functools.partial(train_command, program="fdjax train"),
        "train and prune a network as a config file says, as train.py does",
    ),
    "eval": (
        functools.partial(eval_command, program="fdjax eval"),
        "evaluate a checkpoint or a frozen network, as eval.py does",
    ),
    "macs": (macs_command, "count the MACs of a config or a checkpoint, layer by layer"),
    "import": (import_command, "make a checkpoint from weights that were trained elsewhere"),
    "blocks": (blocks_command, "choose the block size of each layer of a pretrained network"),
    "profile": (profile_command, "measure the accuracy of a network pruned by profiled energies, before refinement"),
    "prune": (prune_command, "prune a trained network by profiled energies, ready for refinement"),
    "freeze": (freeze_command, "compile a checkpoint into a dense network that needs no training code"),
    "export": (export_command, "write a frozen network as StableHLO, ONNX or C++"),
    "compile": (compile_command, "compile for a TPU or GPU that is not here, and report its compiler's estimates"),
    "bench": (bench_command, "time a frozen network beside its dense network"),
    "predict": (predict_command, "classify pictures with a frozen network"),
    "check": (check_command, "look for damage in the files of a run or of a frozen network"),
    "data": (data_command, "prepare or inspect a data set"),
    "sweep": (sweep_command, "train many runs from one description, several at a time, with a table and plots"),
    "report": (report_command, "write one HTML page about a run, or about several side by side"),
    "results": (results_command, "record finished runs in one folder, with a table and a plot"),
}


@reports_user_errors
def fdjax_command(arguments: Sequence[str] | None = None) -> int:
    """Runs `fdjax COMMAND ...`, or `fdjax --version`, and returns its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given == ["--version"]:
        print(f"fdjax {__version__}")
        return 0
    return dispatch(COMMANDS, given)


def main() -> int:
    """Sets up the process and runs `fdjax`: the entry point of the installed command."""
    runtime.setup()
    return fdjax_command()
