"""Sweeps: many runs from one description, all of which are checked before the first one starts.

A sweep file is Python with `get_sweep() -> Sweep`:

    Sweep(
        config="../quickstart.py",
        runs=(SweepRun(name="dense", settings={"phases": ("pretrain",)}),),
        grid={"learn.target_macs": (0.5, 0.33), "seed": (0, 1)},
        init="dense",
    )
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdjax.config import (
    CheckpointConfig,
    ComputeConfig,
    Config,
    continuation_problem,
    load_config,
    with_absolute_paths,
)
from fdjax.config.settings import as_flags, with_settings
from fdjax.errors import UserError, suggestion
from fdjax.python_file import load_made
from fdjax.training.workdir import CONFIG_FILE, INIT_FILE, SUMMARY_FILE, check_folder, read_config, read_json

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
# Suffixes of the files beside the runs.
_FILE_SUFFIXES = (".txt", ".md", ".csv", ".json", ".png", ".html", ".lock")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRun:
    """One named run of a sweep.

    Attributes:
      name: name of its workdir in the sweep's directory: letters, digits and _ . + = -.
      settings: settings that differ from the sweep's config, by the names of their flags: {"learn.target_macs": 0.5}.
      init: what it starts from: the name of another run of the sweep, or a checkpoint's path, relative to the sweep
        file.
    """

    name: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    init: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Runs of one config with different settings: those in `runs`, and one for each combination of the grid's values.

    Attributes:
      config: path of a config file, relative to the sweep file.
      settings: settings of all runs, such as {"data.path": "data/cifar10"}; a run's own settings override them.
      grid: field -> values to try. A run is named after its fields and values: target_macs0.5_seed0.
      init: `SweepRun.init` of the runs of the grid; it may contain the grid's values: "dense_seed{seed}".
      runs: other runs.
    """

    config: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = dataclasses.field(default_factory=dict)
    init: str | None = None
    runs: Sequence[SweepRun] = ()


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of a sweep that has been checked.

    Attributes:
      name: the run's name.
      workdir: its workdir, absolute.
      config: its config.
      arguments: arguments of train.py.
      after: name of the run that has to be finished first, or None.
    """

    name: str
    workdir: Path
    config: Config
    arguments: tuple[str, ...]
    after: str | None

    @property
    def log(self) -> Path:
        """The log of the run's output; it is beside the workdir, where `fdjax results` looks for it."""
        return self.workdir.with_name(f"{self.name}.txt")

    def is_begun(self) -> bool:
        """Whether the run has been started before."""
        return (self.workdir / CONFIG_FILE).is_file()

    def is_finished(self) -> bool:
        """Whether its workdir has the result of this config."""
        files = [self.workdir / name for name in (CONFIG_FILE, SUMMARY_FILE)]
        summary = read_json(files[1])
        if summary is None or "top1" not in summary:
            return False
        try:
            saved = read_config(self.workdir)
        except UserError:
            return False
        # A finished run that goes on with longer phases writes its config at once, and its summary only at the end.
        written = [file.stat().st_mtime_ns for file in files]
        return saved is not None and written[0] <= written[1] and _figures(saved) == _figures(self.config)


def _figures(config: Config) -> Config:
    """Returns the settings that figures depend on; the others have their defaults."""
    data = dataclasses.replace(config.data, path=str(config.data.path is not None), workers=None)
    return dataclasses.replace(config, data=data, checkpoint=CheckpointConfig(), compute=ComputeConfig())


def load_sweep(path: str) -> Sweep:
    """Executes a sweep file and returns what its `get_sweep()` returns.

    Raises:
      UserError: if the file is missing or has an error, or no `get_sweep` that returns a `Sweep`.
    """
    return load_made(path, "sweep", "get_sweep", Sweep, "fdjax.experiments.sweep.Sweep")


def plan_sweep(sweep: Sweep, workdir: str | Path, base: str | Path = ".") -> tuple[PlannedRun, ...]:
    """Names and checks all runs, in the order in which they start; writes nothing.

    Args:
      sweep: the description.
      workdir: directory of the runs' workdirs.
      base: directory to which the description's paths are relative.

    Raises:
      UserError: if there is no run, two have one name, a field, value or init does not exist, or a workdir has another
        run.
    """
    runs = [*_named(sweep.runs), *_combinations(sweep)]
    if not runs:
        raise UserError("the sweep has no runs; give runs, or a grid with at least one value for each field")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{names.count(name)} runs are called {name!r}; give each run a name of its own (in runs)")
    _check_mapping("settings", sweep.settings)
    folder = Path(workdir).expanduser().resolve()
    check_folder(folder, "--workdir")
    file = Path(base, Path(sweep.config).expanduser()).resolve()
    default = load_config(str(file))
    planned = []
    for run in runs:
        try:
            settings = {**sweep.settings, **run.settings}
            config = with_absolute_paths(with_settings(default, settings))
            after, init = _source(run, names, folder, base)
            if init is None and config.phases[0] != "pretrain":
                raise UserError(
                    f"its phases begin with {config.phases[0]!r}, which needs trained weights: give it an init"
                )
            here = folder / run.name
            _check_workdir(here, config, init)
        except UserError as error:
            raise UserError(f"run {run.name!r}: {error}") from error
        start = ["--init", str(init)] if init else []
        flags = ["--config", str(file), "--workdir", str(here), *start, *as_flags(settings)]
        planned.append(PlannedRun(run.name, here, config, tuple(flags), after))
    _check_order(planned)
    return tuple(planned)


def _named(runs: Any) -> list[SweepRun]:
    if not isinstance(runs, Sequence) or not all(isinstance(run, SweepRun) for run in runs):
        raise UserError("runs must be a tuple of SweepRun(name=..., settings={...}, init=...)")
    for run in runs:
        _check_name(run.name)
        _check_mapping(f"run {run.name!r}: settings", run.settings)
    return list(runs)


def _combinations(sweep: Sweep) -> list[SweepRun]:
    """Returns the runs of the grid; the last field changes fastest."""
    _check_mapping("grid", sweep.grid)
    for field, values in sweep.grid.items():
        if not isinstance(values, tuple | list | range):
            raise UserError(f"grid: {field} must have a tuple of values to try, got {values!r}")
        if not values:
            raise UserError(f"grid: {field} has no values to try; give at least one, or leave {field} out")
    if not sweep.grid:
        return []
    ends = [field.rpartition(".")[2].rstrip("_") for field in sweep.grid]
    short = [end if ends.count(end) == 1 else field for field, end in zip(sweep.grid, ends, strict=True)]
    runs = []
    for values in itertools.product(*sweep.grid.values()):
        name = "_".join(_value_name(*pair) for pair in zip(short, values, strict=True))
        _check_name(name)
        init = sweep.init
        if init is not None:
            # Not str.format, to which a name with a dot is an attribute.
            for name_of_field, value in zip(short, values, strict=True):
                init = init.replace(f"{{{name_of_field}}}", str(value))
            if "{" in init or "}" in init:
                raise UserError(
                    f"init {sweep.init!r} cannot be filled in; between braces it may have {', '.join(short)}"
                )
        runs.append(SweepRun(name=name, settings=dict(zip(sweep.grid, values, strict=True)), init=init))
    return runs


def _value_name(field: str, value: Any) -> str:
    """Returns the part of a run's name for a field and its value."""
    if isinstance(value, bool):
        return field if value else f"no_{field}"
    words = [str(item) for item in value] if isinstance(value, tuple | list) else [str(value)]
    return field + re.sub(r"[^A-Za-z0-9_.+=-]", "-", "-".join(words))


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith("."):
        raise UserError(f"a run cannot be called {name!r}: its name is a folder's; use letters, digits and _ . + = -")
    if name.endswith(_FILE_SUFFIXES):
        raise UserError(f"a run cannot be called {name!r}: files of this kind lie beside the runs")


def _check_mapping(what: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise UserError(f'{what} must be a dictionary with names of fields, such as {{"seed": ...}}, got {value!r}')


def _source(run: SweepRun, names: Sequence[str], folder: Path, base: str | Path) -> tuple[str | None, Path | None]:
    """Returns the run that `run` waits for, and the checkpoint that it starts from."""
    if run.init is None:
        return None, None
    if run.init in names:
        return run.init, folder / run.init
    path = Path(base, Path(run.init).expanduser()).resolve()
    if not path.is_dir():
        raise UserError(
            f"init {run.init!r} is no run of the sweep{suggestion(run.init, names)} and no directory; the runs are "
            f"{', '.join(names)}"
        )
    return None, path


def _check_workdir(folder: Path, config: Config, init: Path | None) -> None:
    """Raises `UserError` if a workdir has another run, as far as its files show."""
    check_folder(folder, "--workdir")
    saved = read_config(folder)
    if saved is None:
        return
    # The settings of phases that an unfinished run has not begun may change; train.py checks that later.
    finished = (folder / SUMMARY_FILE).is_file()
    problem = continuation_problem(saved, config, saved.phases[-1 if finished else 0])
    began = (read_json(folder / INIT_FILE) or {}).get("checkpoint")
    if not problem and began != (str(init) if init else None):
        problem = f"it was begun with {f'init {began}' if began else 'no init'}"
    if problem:
        raise UserError(f"{folder} holds another run ({problem}); give another --workdir, or remove it")


def _check_order(runs: Sequence[PlannedRun]) -> None:
    """Raises `UserError` if runs wait for each other."""
    after = {run.name: run.after for run in runs}
    for name in after:
        chain, at = [name], after[name]
        while at is not None and at not in chain:
            chain.append(at)
            at = after[at]
        if at is not None:
            raise UserError(f"runs start from each other: {' from '.join([*chain[chain.index(at) :], at])}")
