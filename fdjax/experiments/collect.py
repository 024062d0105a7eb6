"""Records finished runs in one folder, with a table and a plot of all runs that are there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.reports import (
    MACS,
    TIME,
    NoDataError,
    Result,
    csv_text,
    flat_settings,
    markdown,
    plot_tradeoff,
    read_result,
    seed_groups,
)
from fdjax.training.workdir import CONFIG_FILE, IMPORT_FILE, METRICS_FILE, SUMMARY_FILE, check_folder

RUNS_FOLDER, LOG_FILE = "runs", "log.txt"
# The file of each plot, and the quantity that accuracy is drawn against.
_PICTURES = {"tradeoff.png": MACS, "tradeoff_time.png": TIME}
PICTURE_FILES = tuple(_PICTURES)
TABLE_FILES = ("table.md", "table.csv", "table.json")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
      folder: its folder.
      files: contents of its files, by their names in a record.
      result: its row.
    """

    folder: Path
    files: dict[str, bytes]
    result: Result


@dataclasses.dataclass(frozen=True)
class Collected:
    """The result of `collect`.

    Attributes:
      results: all runs that are recorded now.
      added: names of the runs that are new.
      replaced: names of the runs whose files have changed.
      written: paths of the tables and plots.
    """

    results: list[Result]
    added: list[str]
    replaced: list[str]
    written: list[Path]


def collect(workdirs: Sequence[str | Path], out: str | Path) -> Collected:
    """Records finished runs in `out`, and writes the tables and plots of all runs that are recorded there.

    `out/runs/NAME/` gets each run's config, summary, metrics and log; NAME is the name of the workdir. The tables are
    made from these folders. Files are replaced atomically, so that an interruption leaves each table old or new, and
    the next call makes all of them again.

    Args:
      workdirs: workdirs of finished runs, or folders that `collect` has made.
      out: a directory; it is made if it does not exist.

    Raises:
      UserError: if a run is not finished or is damaged, or another run of its name is recorded. Nothing has been
        written then.
    """
    out = Path(out).expanduser().resolve()
    given: dict[str, FinishedRun] = {}
    # Each workdir once, in the given order.
    for folder in dict.fromkeys(Path(workdir).expanduser().resolve() for workdir in workdirs):
        run = read_run(folder, f"--workdir {folder}", "give the workdirs of finished runs")
        if folder.name in given:
            raise UserError(
                f"--workdir {given[folder.name].folder} and {folder} have one name, {folder.name!r}, under which they "
                "would be recorded; rename one of the folders"
            )
        given[folder.name] = run
    if not given:
        raise UserError("--workdir is empty; give the workdirs of one or more finished runs")
    check_folder(out, "--out")
    check_folder(out / RUNS_FOLDER, "--out")
    for name in (*TABLE_FILES, *PICTURE_FILES):
        if (out / name).is_dir():
            raise UserError(f"--out {out}: {name} there is a directory; give another one")
    recorded = {
        folder.name: read_run(folder, f"--out {out}: {folder.relative_to(out)} there", "remove it, or give another one")
        for folder in _subfolders(out / RUNS_FOLDER)
    }
    changed = {}
    for name, run in given.items():
        if name not in recorded:
            changed[name] = run
            continue
        _check_same(run, recorded[name])
        # A run whose log has been removed since has not changed.
        if not run.files.items() <= recorded[name].files.items():
            changed[name] = run
    results = [run.result for run in {**recorded, **given}.values()]
    try:
        written = _write(out, changed, results)
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: {error.filename}; give another one, or make room") from error
    return Collected(
        results,
        added=[name for name in changed if name not in recorded],
        replaced=[name for name in changed if name in recorded],
        written=written,
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


# -- reading


def read_run(folder: Path, called: str, advice: str) -> FinishedRun:
    """Reads and checks a finished run.

    Args:
      folder: its workdir, or the folder in which `collect` has recorded it.
      called: name of the folder in error messages.
      advice: end of the error messages.

    Raises:
      UserError: if the run is not finished, or is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{called} is no directory; {advice}")
    if (folder / IMPORT_FILE).is_file() and not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"{called} holds imported weights, which no run has trained or pruned yet: python eval.py --checkpoint "
            f"{folder} says how accurate they are; {advice}"
        )
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"{called} holds no run (no {CONFIG_FILE}); {advice}")
    if not (folder / SUMMARY_FILE).is_file():
        raise UserError(
            f"{called} holds a run that is not finished (no {SUMMARY_FILE}): the command that began it finishes it; "
            f"{advice}"
        )
    files = {name: _read(folder / name) for name in (CONFIG_FILE, METRICS_FILE, SUMMARY_FILE)}
    summary = _parse(folder / SUMMARY_FILE, files[SUMMARY_FILE])
    try:
        config = Config.from_dict(_parse(folder / CONFIG_FILE, files[CONFIG_FILE]))
    except UserError as error:
        raise UserError(f"{folder / CONFIG_FILE} is no config of this fdjax: {error}") from error
    if config.data.path is not None:
        # The record keeps the name of the data's folder, but not its path on the run's machine.
        data = dataclasses.replace(config.data, path=PureWindowsPath(config.data.path).name)
        config = dataclasses.replace(config, data=data)
        files[CONFIG_FILE] = f"{json.dumps(config.to_dict(), indent=1)}\n".encode()
    try:
        result = read_result(folder.name, config, summary)
    except ValueError as error:
        raise UserError(
            f"{folder / SUMMARY_FILE} is not the summary of a finished run: {error}; remove it and give the training "
            "command again, which writes it anew"
        ) from error
    _check_finished(folder, config, summary, files[METRICS_FILE])
    # A log can be beside the workdir, because a new workdir has to be empty.
    for log in (folder / LOG_FILE, folder.with_name(f"{folder.name}.txt")):
        if log.is_file():
            return FinishedRun(folder, {**files, LOG_FILE: _read(log)}, result)
    return FinishedRun(folder, files, result)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); give the workdir of a finished run") from error


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    """Returns the JSON object in a file."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); restore it, or leave the run out") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds no JSON object; restore it, or leave the run out")
    return value


def _check_finished(folder: Path, config: Config, summary: dict[str, Any], metrics: bytes) -> None:
    """Raises `UserError` if the metrics are damaged, or the run has gone on after its summary was written."""
    last = 0
    for number, line in enumerate(metrics.splitlines(), 1):
        try:
            last = max(last, json.loads(line)["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{folder / METRICS_FILE} is damaged (line {number}: {error!r}); restore it, or leave the run out"
            ) from error
    steps = sum(phase["steps"] for phase in summary["phases"])
    if summary["phases"][-1]["name"] != config.phases[-1] or last > steps:
        raise UserError(
            f"the run in {folder} has gone on after its {SUMMARY_FILE} was written, and is not finished again; finish "
            "it by the command that it goes on with, or leave it out"
        )


def _check_same(run: FinishedRun, recorded: FinishedRun) -> None:
    """Raises `UserError` if another run is recorded under the name of `run`."""
    old, new = flat_settings(recorded.result.config), flat_settings(run.result.config)
    different = [name.rstrip("_") for name in old if old[name] != new[name]]
    if different:
        shown = ", ".join(different[:3]) + (f" and {len(different) - 3} more" if len(different) > 3 else "")
        raise UserError(
            f"--workdir {run.folder} is another run than {recorded.folder} (different: {shown}), and a name can only "
            "stand for one run; rename the workdir, or remove that folder"
        )


# -- writing


def _write(out: Path, changed: dict[str, FinishedRun], results: list[Result]) -> list[Path]:
    """Writes everything into a draft folder first, and then moves it to its place."""
    with _new_folder(out), tempfile.TemporaryDirectory(prefix=".draft-", dir=out) as draft_name:
        draft = Path(draft_name)
        for name, run in changed.items():
            (draft / RUNS_FOLDER / name).mkdir(parents=True)
            for file, content in run.files.items():
                (draft / RUNS_FOLDER / name / file).write_bytes(content)
        tables = _draft_tables(results, draft)
        for name, run in changed.items():
            _move_run(draft / RUNS_FOLDER / name, out / RUNS_FOLDER / name, run)
        return _move_tables(tables, draft, out)


def write_tables(results: Sequence[Result], out: Path) -> list[Path]:
    """Writes the tables and plots of runs into `out`; each file is replaced atomically.

    Args:
      results: the runs, at least one; their names differ.
      out: a directory that exists.

    Returns:
      Paths of the tables and plots.
    """
    with tempfile.TemporaryDirectory(prefix=".draft-", dir=out) as draft_name:
        draft = Path(draft_name)
        return _move_tables(_draft_tables(results, draft), draft, out)


def _draft_tables(results: Sequence[Result], draft: Path) -> list[str]:
    """Writes the tables, and plots if the runs have masks (and times); returns the names of the files."""
    pictures: dict[str, str] = {}
    for file, against in _PICTURES.items():
        with contextlib.suppress(NoDataError):
            plot_tradeoff(results, draft / file, against)
            pictures[f"Top-1 of the pruned networks against their {against.word}"] = file
    rows = [result.columns() for group in seed_groups(results) for result in group]
    contents = (
        markdown(results, pictures),
        csv_text(results),
        json.dumps(rows, indent=1) + "\n",
    )
    for name, content in zip(TABLE_FILES, contents, strict=True):
        (draft / name).write_text(content, encoding="utf-8")
    return [*TABLE_FILES, *pictures.values()]


def _move_tables(tables: Sequence[str], draft: Path, out: Path) -> list[Path]:
    for name in tables:
        os.replace(draft / name, out / name)
    for name in PICTURE_FILES:
        if name not in tables:
            (out / name).unlink(missing_ok=True)
    return [out / name for name in tables]


def _move_run(source: Path, target: Path, run: FinishedRun) -> None:
    """Moves a run to its place in the record; a new run is moved as a whole."""
    target.parent.mkdir(exist_ok=True)
    if not target.exists():
        os.rename(source, target)
        return
    # The summary comes last, because the row is made from it.
    for name in sorted(run.files, key=lambda name: name == SUMMARY_FILE):
        os.replace(source / name, target / name)
    if LOG_FILE not in run.files:
        (target / LOG_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and its parents, and removes the new ones if an exception is raised."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # The folder is not empty.
                path.rmdir()
        raise
