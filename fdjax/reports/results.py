"""Finished runs side by side: a row for each, and the rows as Markdown and CSV.

Runs that differ only by their seed make a group; the Markdown table gives its mean and spread.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PureWindowsPath
from statistics import mean
from typing import Any, NamedTuple

from fdjax.config import MASK_PHASES, Config

_SIDES = {"both": "both sides", "input": "input side", "output": "output side"}
# Settings that columns show, or that bear on no figure.
_SHOWN = {
    "model.name", "model.width", "data.name", "data.path", "data.train_limit", "learn.sides", "learn.tied",
    "learn.levels", "learn.penalty", "learn.block", "learn.block_by_map", "learn.block_by_layer", "learn.target_macs",
    "learn.target_convention", "distill.weight", "model.octave", "model.octave_maps",
}  # fmt: skip
_NONE = "–"

Cell = Callable[["Result"], str | None]
Figure = Callable[["Result"], float | None]
# Attributes of a row that its table does not have.
_UNTABLED = ("config", "dense_macs", "num_classes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run. Shares and top-1 are from 0 to 1; None stands for what a run does not have or did not record.

    Attributes:
      config: of the run.
      dense_macs: of the dense network, by count.
      num_classes: of the data; None in summaries that do not say.
      name: of its workdir.
      network: architecture.
      width: its multiplier.
      data: name of the data set; of a folder, its name too.
      train_limit: training images that were used, where not all.
      phases: in order; those in brackets were done by the run given by --init, and are not in `seconds`.
      block: in words.
      masks: in words: sides, levels, penalty, and the weight of distillation if there was any.
      target_macs: the MAC ratio asked for.
      target_convention: what it and the gate speak of: `macs_ratio` (total) or `paper_ratio` (paper).
      lambda_: the penalty's weight, where there was no target.
      seed: of the run.
      commit: of the code; + where tracked files were changed.
      fdjax, jax, python: versions.
      device: as JAX names it.
      processor: name and cores.
      seconds: wall time, compilations, evaluations and checkpoints included.
      test_images: how many.
      dense_top1: at the end of pretraining; of a run without masks, at its end.
      soft_top1: with masks as learned, just before they were rounded.
      rounded_top1: just after.
      pruned_top1: at the end.
      loss_points: 100 * (dense_top1 - pruned_top1).
      macs_ratio: MACs over dense MACs, transforms included.
      paper_ratio: likewise by the paper's convention.
      bare_ratio: likewise without transforms.
      removed, only_mean, partial, whole: shares of the channels of all masked layer sides that keep 0, 1, 2 to N-1
        and N coefficients.
    """

    config: Config = dataclasses.field(repr=False)
    dense_macs: float
    num_classes: int | None
    name: str
    network: str
    width: float
    data: str
    train_limit: int | None
    phases: str
    block: str | None
    masks: str | None
    target_macs: float | None
    target_convention: str | None
    lambda_: float | None
    seed: int
    commit: str | None
    fdjax: str | None
    jax: str | None
    python: str | None
    device: str | None
    processor: str | None
    seconds: float
    test_images: int
    dense_top1: float | None
    soft_top1: float | None
    rounded_top1: float | None
    pruned_top1: float | None
    loss_points: float | None
    macs_ratio: float
    paper_ratio: float | None
    bare_ratio: float
    removed: float | None
    only_mean: float | None
    partial: float | None
    whole: float | None

    def columns(self) -> dict[str, Any]:
        """The row as plain JSON types."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _UNTABLED]
        return {name.rstrip("_"): getattr(self, name) for name in names}

    @property
    def is_pruned(self) -> bool:
        """Whether the run has masks."""
        return self.masks is not None

    @property
    def macs(self) -> float:
        """MACs of the network as it stands, by count, transforms included."""
        return self.macs_ratio * self.dense_macs

    @property
    def task(self) -> str:
        """The network and the data, in words."""
        return f"{self.network_words} on {self.data_words}"

    @property
    def network_words(self) -> str:
        """The network, its width, and its share of low channels if there are any."""
        words, model = f"{self.network} at width {self.width:g}", self.config.model
        if not model.octave:
            return words
        return f"{words}, octave {model.octave:g}{' in all maps' if model.octave_maps == 'all' else ''}"

    @property
    def data_words(self) -> str:
        """The data, and how many training images if not all."""
        return self.data if self.train_limit is None else f"{self.data}, {self.train_limit:,} training images"

    @property
    def own_phases(self) -> tuple[str, ...]:
        """The phases that the run did itself; settings of the others say nothing of it."""
        return tuple(phase for phase in self.phases.split(", ") if not phase.startswith("("))


def read_result(name: str, config: Config, summary: Mapping[str, Any]) -> Result:
    """Makes the row of a run.

    Args:
      name: of the run.
      config: its config.
      summary: the object in its `summary.json`.

    Raises:
      ValueError: the summary lacks something, or holds something else in its place.
    """
    phases = _history(summary)
    inherited = [phase for phase in config.phases if phase not in phases]
    shares = _kept_shares(summary)
    pruned = any(phase in MASK_PHASES for phase in config.phases) or (shares is not None and shares["whole"] < 1)
    top1, macs_ratio = _number(summary, "top1"), _number(summary, "macs", "ratio")
    dense = _number(summary, "dense_top1") if summary.get("dense_top1") is not None else None
    if not pruned:
        dense = top1
    rounding = next((entry for phase, entry in reversed(phases.items()) if phase in MASK_PHASES), None)
    soft = rounding is not None and rounding.get("soft_top1") is not None
    learn, target = config.learn, config.learn.target_macs
    return Result(
        config=config,
        dense_macs=_number(summary, "macs", "dense", above=0),
        num_classes=int(_number(summary, "num_classes")) if "num_classes" in summary else None,
        name=name,
        network=config.model.name,
        width=config.model.width,
        data=_data_words(config),
        train_limit=config.data.train_limit,
        phases=", ".join(f"({phase})" if phase in inherited else phase for phase in config.phases),
        block=_block_words(config) if pruned else None,
        masks=", ".join(mask_words(config)) if pruned else None,
        target_macs=target if pruned else None,
        target_convention=learn.target_convention if pruned else None,
        lambda_=learn.lambda_ if pruned and target is None else None,
        seed=config.seed,
        commit=_version(summary, "commit"),
        fdjax=_version(summary, "fdjax"),
        jax=_version(summary, "jax"),
        python=_version(summary, "python"),
        device=_version(summary, "device"),
        processor=_version(summary, "processor"),
        seconds=_number(summary, "seconds"),
        test_images=int(_number(summary, "num_examples")),
        dense_top1=dense,
        soft_top1=_number(rounding, "soft_top1") if rounding is not None and soft else None,
        rounded_top1=_number(rounding, "top1") if rounding is not None else None,
        pruned_top1=top1 if pruned else None,
        loss_points=100 * (dense - top1) if pruned and dense is not None else None,
        macs_ratio=macs_ratio,
        paper_ratio=_number(summary, "macs", "paper_ratio") if pruned else None,
        bare_ratio=_number(summary, "macs", "pruned") / _number(summary, "macs", "dense", above=0),
        removed=shares["removed"] if pruned and shares else None,
        only_mean=shares["only_mean"] if pruned and shares else None,
        partial=shares["partial"] if pruned and shares else None,
        whole=shares["whole"] if pruned and shares else None,
    )


def _number(value: Any, *path: str, above: float = -math.inf) -> float:
    """The number that lies at `path`."""
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"it has no {'.'.join(path)}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        raise ValueError(f"its {'.'.join(path)} is {value!r}, which cannot be")
    return value


def _history(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The phases that the run did itself, in order."""
    try:
        phases = {str(entry["name"]): entry for entry in summary["phases"]}
    except (KeyError, TypeError) as error:
        raise ValueError("it has no list of phases with their names") from error
    if not phases:
        raise ValueError("its list of phases is empty")
    for entry in phases.values():
        _number(entry, "steps")
    return phases


def _version(summary: Mapping[str, Any], key: str) -> str | None:
    versions = summary.get("versions")
    value = versions.get(key) if isinstance(versions, Mapping) else None
    return None if value is None else str(value)


def _kept_shares(summary: Mapping[str, Any]) -> dict[str, float] | None:
    """The shares of channels by what they keep, over all masked layer sides; None where there is none."""
    sums = {"removed": 0, "only_mean": 0, "partial": 0, "whole": 0}
    if not isinstance(summary.get("layers"), list):
        raise ValueError("it has no list of layers")
    try:
        for layer in summary["layers"]:
            for counts in filter(None, layer["kept_counts"].values()):
                removed, *some, whole = counts
                for key, number in zip(sums, (removed, sum(some[:1]), sum(some[1:]), whole), strict=True):
                    sums[key] += number
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError("it has no kept_counts of every layer") from error
    total = sum(sums.values())
    return {key: number / total for key, number in sums.items()} if total else None


def _data_words(config: Config) -> str:
    if config.data.name != "folder" or config.data.path is None:
        return config.data.name
    return f"folder {PureWindowsPath(config.data.path).name}"  # Splits at both kinds of slash.


def _block_words(config: Config) -> str:
    learn = config.learn
    maps = [f"{block} on {side}x{side} maps" for side, block in learn.block_by_map]
    layers = [f"{block} in {layer}" for layer, block in learn.block_by_layer]
    return f"{learn.block} ({', '.join([*maps, *layers])})" if maps or layers else str(learn.block)


def mask_words(config: Config) -> list[str]:
    """The masks of a config: sides, levels, penalty, and the weight of distillation if there is any."""
    learn, distillation = config.learn, config.distill.weight
    sides = _SIDES[learn.sides]
    if learn.tied:  # The sides are then those of the head only.
        sides = "tied" if learn.sides == "both" else f"tied, head {sides}"
    levels = "all levels" if learn.levels == "all" else f"levels {learn.levels}"
    words = [sides, levels, f"penalty {learn.penalty}"]
    return [*words, f"distillation {distillation:g}"] if distillation else words


def _target_words(result: Result) -> str | None:
    if not result.is_pruned:
        return None
    words = f"lambda {result.lambda_:g}" if result.target_macs is None else f"{result.target_macs:g}x"
    return f"{words} by the paper's count" if result.target_convention == "paper" else words


def _hardware_words(result: Result) -> str | None:
    on_cpu = result.device is None or result.device.lower() == "cpu"
    return result.processor or result.device if on_cpu else result.device


def flat_settings(config: Config) -> dict[str, Any]:
    """Every setting of a config by the name that its flag has: "learn.block"."""
    flat = {}
    for field, value in config.to_dict().items():
        flat |= {f"{field}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {field: value}
    return flat


def _settings(result: Result) -> dict[str, Any]:
    """The settings that bear on the figures of a run, but for its seed."""
    config, masked = result.config, result.is_pruned
    fields = {"data", "model", *result.own_phases} | ({"learn", "distill"} if masked else set())
    unused = {"data.path"}
    if "learn" not in result.own_phases:
        unused |= {"learn.epochs", "learn.steps"}
    if not config.distill.weight:
        unused.add("distill.temperature")
    settings = {name: value for name, value in flat_settings(config).items() if name.partition(".")[0] in fields}
    return {"phases": result.phases, "data": result.data} | {k: v for k, v in settings.items() if k not in unused}


def settings_key(result: Result, *left_out: str) -> str:
    """Equal for two runs if they differ in nothing that bears on their figures but the seed and what is left out."""
    return json.dumps({name: value for name, value in _settings(result).items() if name not in left_out})


def seed_groups(results: Sequence[Result]) -> list[list[Result]]:
    """The runs in the order of the table, those that differ only by their seed together."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(settings_key(result), []).append(result)
    ordered = [sorted(group, key=lambda result: (result.seed, result.name)) for group in groups.values()]

    def place(group: list[Result]) -> tuple:
        first = group[0]
        share = mean(result.macs_ratio for result in group)
        return first.task, first.is_pruned, first.masks or "", -round(share, 3), first.name

    return sorted(ordered, key=place)


def _other_settings(results: Sequence[Result]) -> dict[str, str | None]:
    """By run: the settings in which runs differ and that no column shows, such as "refine.epochs 20"."""
    settings = {result.name: _settings(result) for result in results}
    for result in results:
        if result.target_macs is None:  # Lambda is then no starting point but the setting, and stands under target.
            settings[result.name].pop("learn.lambda_", None)
    values: dict[str, set[str]] = {}
    for of_run in settings.values():
        for name, value in of_run.items():
            values.setdefault(name, set()).add(json.dumps(value))
    differ = {name for name, found in values.items() if len(found) > 1} - _SHOWN - {"phases", "data"}
    words = {}
    for result in results:
        mine = settings[result.name]
        told = [f"{name.rstrip('_')} {_setting_words(mine[name])}" for name in sorted(differ & mine.keys())]
        words[result.name] = ", ".join(told) or None
    return words


def _setting_words(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value).replace('"', "")


def csv_text(results: Sequence[Result]) -> str:
    """The rows as CSV, figures unrounded; None is an empty cell."""
    text = io.StringIO()
    rows = [result.columns() for group in seed_groups(results) for result in group]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class _Form(NamedTuple):
    """How a figure is written: times `factor`, by `spec`, with `unit` behind it."""

    factor: float
    spec: str
    unit: str

    def number(self, value: float) -> str:
        """Without the unit; zero has no minus sign."""
        text = format(self.factor * value, self.spec)
        return format(0.0, self.spec) if float(text) == 0 else text


_PERCENT, _POINTS = _Form(100, ".2f", "%"), _Form(1, "+.2f", "")
_TIMES, _MINUTES = _Form(1, ".3f", "x"), _Form(1 / 60, ".1f", " min")
# Heading, value and format of the columns with figures.
_FIGURES: tuple[tuple[str, Figure, _Form], ...] = (
    ("dense top-1", lambda r: r.dense_top1, _PERCENT),
    ("soft masks", lambda r: r.soft_top1, _PERCENT),
    ("rounded", lambda r: r.rounded_top1, _PERCENT),
    ("pruned top-1", lambda r: r.pruned_top1, _PERCENT),
    ("loss", lambda r: r.loss_points, _POINTS),
    ("MACs", lambda r: r.macs_ratio, _TIMES),
    ("by the paper's count", lambda r: r.paper_ratio, _TIMES),
    ("without transforms", lambda r: r.bare_ratio, _TIMES),
    ("time", lambda r: r.seconds, _MINUTES),
)
_KEPT = "removed / mean / partial / whole"
# A dense run has none of these; that alone is no difference to name in every row.
_OF_MASKS = ("block", "masks", "target")
_LEGEND = (
    "Dense: at the end of pretraining, or of a run without masks. Soft masks, rounded: just before and just after "
    "masks are rounded. Pruned: at the end. Loss: dense less pruned, in points. MACs: of hard masks after the gate, "
    f"transforms included, over those of the dense network. {_KEPT.capitalize()}: shares of the channels of all masked "
    "layer sides by what they keep: nothing, the mean, more, all. Means stand with the smallest and the largest value."
)


class ResultsTable(NamedTuple):
    """Runs side by side in words, as Markdown and pages show them.

    Attributes:
      same: what is the same in all rows, in words.
      headings: of the columns: the run's name, settings that are not the same in all rows, figures.
      num_settings: how many of the columns are settings.
      rows: cells, as many as headings; of each group of runs that differ by their seed only, the last is its mean.
      means: for each row whether it is a mean.
      legend: what the columns mean.
    """

    same: str
    headings: list[str]
    num_settings: int
    rows: list[list[str]]
    means: list[bool]
    legend: str


def results_table(results: Sequence[Result]) -> ResultsTable:
    """The table for readers: rounded figures; what is the same in all rows stands apart.

    Args:
      results: of the runs, with different names.
    """
    groups = seed_groups(results)
    other = _other_settings(results)
    settings: tuple[tuple[str, Cell], ...] = (
        ("network", lambda r: r.network_words),
        ("dense MACs", lambda r: f"{r.dense_macs / 1e6:,.2f} M"),
        ("data", lambda r: r.data_words),
        ("phases", lambda r: r.phases),
        ("block", lambda r: r.block),
        ("masks", lambda r: r.masks),
        ("target", _target_words),
        ("other settings", lambda r: other[r.name]),
        ("test images", lambda r: f"{r.test_images:,}"),
        ("hardware", _hardware_words),
        ("jax", lambda r: r.jax),
        ("commit", lambda r: r.commit),
        ("seed", lambda r: str(r.seed)),
    )
    same, shown = [], []
    for heading, cell in settings:
        found = {cell(result) for result in results if result.is_pruned or heading not in _OF_MASKS}
        if len(found) > 1:
            shown.append((heading, cell))
        elif found - {None}:
            same.append(f"{heading} {found.pop()}")
    figures = [entry for entry in _FIGURES if any(entry[1](result) is not None for result in results)]
    headings = [heading for heading, *_ in figures]
    kept = any(result.whole is not None for result in results)
    if kept:
        headings.insert(-1, _KEPT)

    def row(name: str, group: Sequence[Result]) -> list[str]:
        cells = [name]
        for _, cell in shown:
            found = {cell(result) for result in group}
            # What differs within a group says nothing of its mean.
            cells.append((found.pop() or _NONE) if len(found) == 1 else "")
        cells += [_spread([figure(result) for result in group], form) for _, figure, form in figures]
        if kept:
            cells.insert(-1, _kept_words(group))
        return cells

    rows, means = [], []
    for group in groups:
        rows += [row(result.name, [result]) for result in group]
        means += [False] * len(group)
        if len({result.seed for result in group}) > 1:
            rows.append(row(f"mean of {len(group)}", group))
            means.append(True)
    everywhere = "Same in all rows: " if len(results) > 1 else "Settings: "
    return ResultsTable(
        same=f"{everywhere}{'; '.join(same)}.",
        headings=["run", *(heading for heading, _ in shown), *headings],
        num_settings=len(shown),
        rows=rows,
        means=means,
        legend=_LEGEND,
    )


def markdown(results: Sequence[Result], picture: str | None = None) -> str:
    """`results_table` as Markdown.

    Args:
      results: of the runs, with different names.
      picture: a file to show below the table.
    """
    table = results_table(results)
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    for row, is_mean in zip(rows, table.means, strict=True):
        row[0] = f"**{row[0]}**" if is_mean else row[0]
    written = [table.headings, ["---"] * len(table.headings), *rows]
    lines = [table.same, "", *(f"| {' | '.join(cells)} |" for cells in written), "", table.legend]
    if picture:
        lines += ["", f"![Top-1 of the pruned networks against their MACs]({picture})"]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float | None], form: _Form) -> str:
    """The mean, with the smallest and the largest value where they read differently; of all values or of none."""
    there = [value for value in values if value is not None]
    if len(there) < len(values):
        return _NONE
    low, high = form.number(min(there)), form.number(max(there))
    return f"{form.number(mean(there))}{form.unit}" + (f" ({low}..{high})" if low != high else "")


def _kept_words(group: Sequence[Result]) -> str:
    """The shares by kept count in percent, means over several runs."""
    if any(result.whole is None for result in group):
        return _NONE
    shares = [mean(getattr(result, key) for result in group) for key in ("removed", "only_mean", "partial", "whole")]
    return " / ".join(f"{100 * share:.0f}" for share in shares) + "%"
