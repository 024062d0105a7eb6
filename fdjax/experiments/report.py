"""Reads runs, their test images and their benchmarks, and writes the page of `fdjax report`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax import __version__
from fdjax.config import Config, DataConfig
from fdjax.data import FASHION_MNIST_SUBSET, describe_source, open_dataset
from fdjax.errors import UserError
from fdjax.experiments.collect import FinishedRun, read_run
from fdjax.reports.run_page import ExampleImages, RunFigures, report_page
from fdjax.training.workdir import METRICS_FILE, SUMMARY_FILE, read_config

SOFT_MASKS_FILE, FCMASK_PICTURE = "soft_masks.npz", "fcmask.png"
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Reported:
    """The result of `write_report_page`.

    Attributes:
      names: names of the runs on the page.
      left_out: workdir -> why it is not on the page.
    """

    names: list[str]
    left_out: dict[str, str]


def write_report_page(workdirs: Sequence[str], out: Path, benches: Sequence[str] = ()) -> Reported:
    """Writes one HTML page of finished runs.

    Args:
      workdirs: workdirs of runs; the page lists those without a result.
      out: the file to write; an existing one is replaced.
      benches: files of `fdjax bench --json`; each is shown with the run whose frozen network it timed.

    Raises:
      UserError: if no workdir has a result, or a file is no benchmark. Nothing has been written then.
    """
    folders = list(dict.fromkeys(Path(workdir).expanduser().resolve() for workdir in workdirs))
    found, left_out = [], {}
    for folder, name in zip(folders, _names(folders), strict=True):
        try:
            run = read_run(folder, "it", "")
        except UserError as error:
            left_out[name] = str(error).removesuffix("; ")
            continue
        found.append(dataclasses.replace(run, result=dataclasses.replace(run.result, name=name)))
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "none was given"
        raise UserError(f"--workdir: there is no finished run to report ({reasons})")
    files = list(dict.fromkeys(Path(file).expanduser().resolve() for file in benches))
    measured = {name: _read_bench(file) for file, name in zip(files, _names(files), strict=True)}
    images: dict[DataConfig, ExampleImages] = {}
    runs, placed = [], set()
    for run in found:
        own = {name: bench for name, bench in measured.items() if _is_of(bench, run)}
        placed |= own.keys()
        runs.append(_figures_of(run, own, images))
    others = {name: bench for name, bench in measured.items() if name not in placed}
    text = report_page(runs, left_out, others, __version__)
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; give a file that can be written") from error
    return Reported([run.result.name for run in runs], left_out)


def _names(folders: Sequence[Path]) -> list[str]:
    """Returns the folders' names, with as many of their parents as are needed to make them different."""
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
        depth += 1


def _figures_of(
    run: FinishedRun, benches: Mapping[str, Mapping[str, Any]], images: dict[DataConfig, ExampleImages]
) -> RunFigures:
    summary = json.loads(run.files[SUMMARY_FILE])
    # The config of a row has no path of the data set; the run's own config has it.
    config = read_config(run.folder) or run.result.config
    if config.data not in images:
        images[config.data] = _example_images(config)
    drawn = run.folder / FCMASK_PICTURE
    fcmask = _widest_fcmask(run.folder / SOFT_MASKS_FILE, summary["layers"])
    return RunFigures(
        result=run.result,
        summary=summary,
        records=[json.loads(line) for line in run.files[METRICS_FILE].splitlines()],
        fcmask=fcmask,
        fcmask_png=drawn.read_bytes() if fcmask is None and drawn.is_file() else None,
        images=images[config.data],
        benches=benches,
    )


def _widest_fcmask(file: Path, layers: Sequence[Mapping[str, Any]]) -> tuple[str, np.ndarray, None, int] | None:
    """Returns the learned FCMask whose values differ most, as `plot_run` does; None if none was stored."""
    if not file.is_file():
        return None
    with np.load(file) as arrays:
        masks = {path: arrays[path] for path in arrays.files}
    named = []
    for path, values in masks.items():
        # Masks are named after their layer and side, or after the module whose layers share them: block01/wide.
        owner = path.rpartition("/")[0]
        owned = [layer for layer in layers if layer["name"] == owner or layer["name"].startswith(f"{owner}/")]
        coefs = [layer["num_coefs"] for layer in owned if layer.get("num_coefs")]
        if values.size and coefs:
            named.append((path, values, None, int(coefs[0])))
    return max(named, key=lambda entry: float(np.std(entry[1]))) if named else None


def _example_images(config: Config) -> ExampleImages:
    """Returns a few test images of a run's data set; if it cannot be opened, none and the reason."""
    data = config.data
    try:
        size = data.image_size
        if data.name == FASHION_MNIST_SUBSET:
            dataset = open_dataset(data.name, data.path, size, data.grayscale)
        else:
            if size is None:
                size = describe_source(data.name, data.path, None, data.grayscale)[0][:2]
            # With streaming only these few images are decoded.
            how = {"stream": True, "crop_share": data.eval_crop, "background": data.background}
            dataset = open_dataset(data.name, data.path, size, data.grayscale, **how)
        count = len(dataset.test_labels)
        rows = np.unique(np.linspace(0, count - 1, _EXAMPLES + 2).round().astype(int)[1:-1])
        pixels = dataset.test_images[rows]
    except (UserError, OSError) as error:
        return ExampleImages(pixels=np.zeros((0, 1, 1, 1), np.uint8), missing=str(error))
    names = [dataset.class_names[label] for label in dataset.test_labels[rows]]
    return ExampleImages(pixels=pixels, names=names)


def _read_bench(file: Path) -> dict[str, Any]:
    wanted = "give a file that fdjax bench --json has written"
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--bench {file} cannot be read ({error}); {wanted}") from error
    rows = found.get("rows") if isinstance(found, dict) else None
    if isinstance(rows, list) and rows and all(isinstance(row, dict) and "engine" in row for row in rows):
        rows = _beside_dense(rows)
    if not isinstance(rows, list) or not rows or not all(map(_is_bench_row, rows)):
        raise UserError(f"--bench {file} holds no rows of a benchmark; {wanted}")
    return {**found, "rows": rows}


def _beside_dense(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Makes rows as `fdjax bench` writes them without --engine of those with it.

    An engine that has not taken both networks has no row. A row has `mask_ratio` beside `mac_ratio`, which is of the
    program that was timed.
    """
    dense = {(row["engine"], row.get("batch")): row.get("ms") for row in rows if row.get("form") == "dense"}
    same = ("engine", "batch", "threads", "time_ratio", "mac_ratio", "mask_ratio", "paper_ratio")
    return [
        {
            **{key: row.get(key) for key in same},
            "dense_ms": dense.get((row["engine"], row.get("batch"))),
            "frozen_ms": row["ms"],
            "frozen_ms_quartiles": row.get("ms_quartiles"),
        }
        for row in rows
        if row.get("form") != "dense" and row.get("time_ratio") is not None and "ms" in row
    ]


def _is_bench_row(row: Any) -> bool:
    """Whether a row has the fields that the page shows."""
    names = ("batch", "dense_ms", "frozen_ms", "time_ratio", "mac_ratio")
    if not isinstance(row, dict) or not all(isinstance(row.get(name), int | float) for name in names):
        return False
    quartiles = row.get("frozen_ms_quartiles")
    return isinstance(quartiles, list) and len(quartiles) == 2 and row["dense_ms"] > 0


def _is_of(bench: Mapping[str, Any], run: FinishedRun) -> bool:
    """Whether the timed network has the MACs of the run's network by both counts."""
    macs = json.loads(run.files[SUMMARY_FILE])["macs"]
    return all(
        abs(ratio - macs[name]) < 1e-9
        for row in bench["rows"]
        for ratio, name in (
            (row.get("mask_ratio") or row["mac_ratio"], "ratio"),
            (row.get("paper_ratio"), "paper_ratio"),
        )
        if ratio is not None
    )
