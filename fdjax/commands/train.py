"""`train.py` and `fdjax train`: train and prune a network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from fdjax.commands.arguments import flag_value, parse_with_config
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.config import Config
from fdjax.errors import UserError, reports_user_errors


@dataclasses.dataclass(kw_only=True)
class TrainArguments:
    """Trains and prunes a network as a config file describes; flags can set every field of the config."""

    config: str
    """Config file, such as configs/quickstart.py, or the name of one that comes with fdjax, such as quickstart."""
    workdir: str
    """Directory of the run: new or empty, or that of a run to resume."""
    init: str | None = None
    """Checkpoint of another run to start from: its weights, and its masks if it learned any. The phases that it has
    done are skipped."""
    json: str | None = None
    """File to write the summary to as JSON."""
    devices: int | None = None
    """Number of this machine's devices to use (None: all); each batch is sharded evenly over them."""
    coordinator: str | None = None
    """Address HOST:PORT of process 0, for a run of several processes (None: JAX_COORDINATOR_ADDRESS); auto: as Slurm,
    MPI or the TPU pod says."""
    num_processes: int | None = None
    """Number of processes of the run (None: JAX_NUM_PROCESSES)."""
    process_id: int | None = None
    """Number of this process, from 0 (None: JAX_PROCESS_ID)."""
    connect_timeout: float = 120.0
    """Seconds to wait for the other processes."""
    profile: int = 0
    """Number of steps of each phase to trace with jax.profiler, into WORKDIR/profile."""
    time_limit: float | None = None
    """Seconds after which the run saves and stops with status 124 (None: no limit); the same command resumes it."""
    compilation_cache: bool = True
    """Keep compiled programs in the user's cache directory, or in FDJAX_CACHE_DIR (if that is empty, nowhere)."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


class Asked(NamedTuple):
    """What the flags ask for, and the time by `time.monotonic` until which the run may last (None: no limit)."""

    flags: TrainArguments
    until: float | None


def read_flags(arguments: Sequence[str] | None = None, program: str = "train.py") -> Asked:
    """Parses and checks the flags of `train.py` or `fdjax train`.

    Args:
      arguments: the arguments; None: those of the process.
      program: what the command is called.

    Returns:
      What they ask for.

    Raises:
      UserError: if a flag is unknown, missing, or has a value that is not accepted.
    """
    given, began = list(sys.argv[1:] if arguments is None else arguments), time.monotonic()
    asks_for_help = bool({"-h", "--help"} & set(given))
    if flag_value(given, program) is None and not asks_for_help:
        began_by, example = (
            ("python train.py", "configs/quickstart.py") if program == "train.py" else (program, "quickstart")
        )
        raise UserError(f"--config FILE is missing: {began_by} --config {example} --workdir DIR")
    flags = parse_with_config(TrainArguments, program, given)
    check_json_target(flags.json)
    for name, value in (("profile", flags.profile), ("connect-timeout", flags.connect_timeout)):
        if value < 0:
            raise UserError(f"--{name} must be 0 or more, got {value:g}")
    if flags.time_limit is not None and not 0 < flags.time_limit < math.inf:
        raise UserError(f"--time-limit must be a number of seconds above 0, got {flags.time_limit:g}")
    return Asked(flags, None if flags.time_limit is None else began + flags.time_limit)


def carry_out(asked: Asked, train: Callable[..., dict[str, Any]]) -> int:
    """Calls `train` with what was asked for, in one process or in one of several that have found each other.

    Args:
      asked: what `read_flags` returned.
      train: `fdjax.training.run.train`.

    Returns:
      The exit status.
    """
    from fdjax.training.compilation import disable_compilation_cache
    from fdjax.training.distributed import ends_with_its_peers, join
    from fdjax.training.stopping import Stopping

    flags = asked.flags
    if not flags.compilation_cache:
        disable_compilation_cache()
    run = json.dumps([flags.settings.to_dict(), flags.workdir, flags.init], sort_keys=True)
    join(
        flags.coordinator,
        flags.num_processes,
        flags.process_id,
        flags.connect_timeout,
        hashlib.sha256(run.encode()).hexdigest(),
    )
    try:
        with Stopping(asked.until) as stopping, ends_with_its_peers():
            summary = train(
                flags.settings,
                flags.workdir,
                flags.init,
                local_devices=flags.devices,
                profile=flags.profile,
                stopping=stopping,
            )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    write_report(flags.json, summary)
    return 0


@reports_user_errors
def train_command(arguments: Sequence[str] | None = None, program: str = "train.py") -> int:
    """Runs `fdjax train` as `train.py` runs, and returns its exit status."""
    asked = read_flags(arguments, program)
    from fdjax.training.run import train

    return carry_out(asked, train)
