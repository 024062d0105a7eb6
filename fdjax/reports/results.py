"""Reads finished runs, each as a row: its settings, where it ran, and its figures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from fdjax.config import MASK_PHASES, Config

_SIDES = {"both": "both sides", "input": "input side", "output": "output side"}
# Attributes of a row that are not in the table.
_UNTABLED = ("config", "dense_macs", "num_classes", "imported", "fine_tuned")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One finished run. Shares and top-1 are from 0 to 1; None stands for what a run does not have or did not record.

    Attributes:
      config: the run's config.
      dense_macs: MACs of the dense network, before filters were removed.
      num_classes: number of classes; None if the summary does not say.
      imported: the file from which its weights were imported.
      fine_tuned: whether imported weights were trained before pruning, in this run or one before it.
      name: name of the workdir.
      network: the architecture.
      width: the width multiplier.
      data: name of the data set, with the name of its folder if it is one.
      train_limit: number of training images that were used; None: all.
      phases: phases in order; those in brackets were done by the run of --init and are not in `seconds`.
      block: the blocks, in words.
      masks: sides, levels, penalty and weight of distillation, in words.
      filters: the method by which filters were removed.
      target_macs: the target MAC ratio; None if the target was a time.
      target_time: the target time, over the dense network's.
      target_convention: convention of the target and the gate: `macs_ratio` (total) or `paper_ratio` (paper).
      lambda_: weight of the penalty, if there was no target.
      seed: the run's seed.
      commit: commit of the code, with + if tracked files were changed.
      fdjax, jax, python: versions.
      device: the device's name in JAX.
      processor: name and number of cores.
      seconds: wall time, with compilations, evaluations and checkpoints.
      test_images: number of test images.
      dense_top1: top-1 at the end of pretraining; for a run that is not pruned, at its end.
      soft_top1: top-1 with soft masks, before rounding.
      rounded_top1: top-1 after rounding.
      pruned_top1: top-1 at the end of the run.
      loss_points: 100 * (dense_top1 - pruned_top1).
      macs_ratio: MACs over dense MACs, with transforms.
      paper_ratio: MACs over dense MACs by the paper's convention.
      bare_ratio: MACs over dense MACs, without transforms.
      time_ratio: time of the frozen network over the dense one's, measured at the end of the run.
      time_engine, time_batch, time_threads: the engine, batch size and number of threads (None: no CPU) of the time.
      frozen_ms, time_dense_ms: the two times in milliseconds.
      removed, only_mean, partial, whole: shares of the channels of all masked layer sides that keep 0, 1, 2 to N-1
        and N coefficients.
    """

    config: Config = dataclasses.field(repr=False)
    dense_macs: float
    num_classes: int | None
    imported: str | None
    fine_tuned: bool
    name: str
    network: str
    width: float
    data: str
    train_limit: int | None
    phases: str
    block: str | None
    masks: str | None
    filters: str | None
    target_macs: float | None
    target_time: float | None
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
    time_ratio: float | None
    time_engine: str | None
    time_batch: int | None
    time_threads: int | None
    frozen_ms: float | None
    time_dense_ms: float | None
    removed: float | None
    only_mean: float | None
    partial: float | None
    whole: float | None

    def columns(self) -> dict[str, Any]:
        """Returns the row as JSON types."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in _UNTABLED]
        return {name.rstrip("_"): getattr(self, name) for name in names}

    @property
    def has_masks(self) -> bool:
        """Whether the run has masks."""
        return self.masks is not None

    @property
    def is_pruned(self) -> bool:
        """Whether the run has masks, or fewer filters than the network that was pretrained."""
        return self.has_masks or self.filters is not None

    @property
    def macs(self) -> float:
        """MACs of the network at the end of the run, with transforms."""
        return self.macs_ratio * self.dense_macs

    @property
    def timed_on(self) -> str | None:
        """Engine, batch size and threads of its time, in words; only ratios with the same can be compared."""
        if self.time_ratio is None or self.time_engine is None or self.time_batch is None:
            return None
        words = f"{self.time_engine}, {'1 image' if self.time_batch == 1 else f'{self.time_batch:,} images'}"
        if self.time_threads is None:
            return words
        return f"{words}, {'1 thread' if self.time_threads == 1 else f'{self.time_threads} threads'}"

    @property
    def task(self) -> str:
        """The network and the data, in words."""
        return f"{self.network_words} on {self.data_words}"

    @property
    def network_words(self) -> str:
        """The network, its width and its share of low channels if it has any, in words; of a factory, its arguments."""
        words, model = f"{self.network} at width {self.width:g}", self.config.model
        if model.factory is not None:
            given = ", ".join(f"{name}={value}" for name, value in model.arguments)
            return f"{self.network}({given})"
        if not model.octave:
            return words
        return f"{words}, octave {model.octave:g}{' in all maps' if model.octave_maps == 'all' else ''}"

    @property
    def data_words(self) -> str:
        """The data set, and the number of training images if not all were used, in words."""
        return self.data if self.train_limit is None else f"{self.data}, {self.train_limit:,} training images"

    @property
    def dense_origin(self) -> str:
        """The origin of the dense network's weights, in words."""
        if self.imported is None:
            return "at the end of pretraining"
        return "imported, after fine-tuning" if self.fine_tuned else "as imported"

    @property
    def own_phases(self) -> tuple[str, ...]:
        """The phases that the run did itself; the settings of other phases do not matter for it."""
        return tuple(phase for phase in self.phases.split(", ") if not phase.startswith("("))


def read_result(name: str, config: Config, summary: Mapping[str, Any]) -> Result:
    """Makes the row of a run.

    Args:
      name: the run's name.
      config: its config.
      summary: the object in its `summary.json`.

    Raises:
      ValueError: if an entry of the summary is missing or wrong.
    """
    phases = _history(summary)
    inherited = [phase for phase in config.phases if phase not in phases]
    shares = _kept_shares(summary)
    masked = any(phase in MASK_PHASES for phase in config.phases) or (shares is not None and shares["whole"] < 1)
    filters = str(summary.get("pruned_by")) if summary.get("unpruned_macs") is not None else None
    pruned = masked or filters is not None
    top1, macs = _number(summary, "top1"), unpruned_macs(summary)
    dense = _number(summary, "dense_top1") if summary.get("dense_top1") is not None else None
    if not pruned:
        dense = top1
    rounding = next((entry for phase, entry in reversed(phases.items()) if phase in MASK_PHASES), None)
    soft = rounding is not None and rounding.get("soft_top1") is not None
    learn, by_time = config.learn, config.learn.target_time is not None
    target = None if by_time else learn.target_macs
    return Result(
        config=config,
        dense_macs=macs["dense"],
        num_classes=int(_number(summary, "num_classes")) if "num_classes" in summary else None,
        imported=_imported(summary),
        fine_tuned=_imported(summary) is not None
        and ("pretrain" in phases or summary["imported"].get("fine_tuned") is True),
        name=name,
        network=config.model.factory or config.model.name,
        width=config.model.width if config.model.factory is None else 1.0,
        data=_data_words(config),
        train_limit=config.data.train_limit,
        phases=", ".join(_phase_words(config.phases, inherited, summary.get("pruned_by"))),
        block=_block_words(config) if masked else None,
        masks=", ".join(mask_words(config)) if masked else None,
        filters=filters,
        target_macs=target if masked else None,
        target_time=learn.target_time if masked else None,
        target_convention=learn.target_convention if masked else None,
        lambda_=learn.lambda_ if masked and target is None and not by_time else None,
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
        macs_ratio=macs["ratio"],
        paper_ratio=macs["paper_ratio"] if masked else None,
        bare_ratio=_number(summary, "macs", "pruned") / macs["dense"],
        **_time(summary),
        removed=shares["removed"] if masked and shares else None,
        only_mean=shares["only_mean"] if masked and shares else None,
        partial=shares["partial"] if masked and shares else None,
        whole=shares["whole"] if masked and shares else None,
    )


def unpruned_macs(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns a summary's dense MACs and its two ratios to them, of the network from which no filter is removed yet.

    Args:
      summary: the object in `summary.json`.

    Returns:
      The MACs `dense`, and `ratio` and `paper_ratio` as in `fdjax.ops.NetworkMacs`.

    Raises:
      ValueError: an entry is missing or wrong.
    """
    dense = _number(summary, "macs", "dense", above=0)
    unpruned = dense if summary.get("unpruned_macs") is None else _number(summary, "unpruned_macs", above=0)
    ratios = {key: _number(summary, "macs", key) * dense / unpruned for key in ("ratio", "paper_ratio")}
    return {"dense": unpruned, **ratios}


def _number(value: Any, *path: str, above: float = -math.inf) -> float:
    """Returns the number at `path`."""
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"it has no {'.'.join(path)}")
        value = value[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
        raise ValueError(f"its {'.'.join(path)} is {value!r}, which cannot be")
    return value


def _time(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `Result` about time; they are None if no time was recorded."""
    found: dict[str, Any] = dict.fromkeys(
        ("time_ratio", "time_engine", "time_batch", "time_threads", "frozen_ms", "time_dense_ms")
    )
    time = summary.get("time")
    if not isinstance(time, Mapping) or time.get("ratio") is None:
        return found
    found["time_ratio"] = _number(summary, "time", "ratio", above=0)
    if time.get("engine") is not None:
        found["time_engine"] = str(time["engine"])
    for name, key in (("time_batch", "batch"), ("time_threads", "threads")):
        if time.get(key) is not None:
            found[name] = int(_number(summary, "time", key, above=0))
    for name, key in (("frozen_ms", "pruned_ms"), ("time_dense_ms", "dense_ms")):
        if time.get(key) is not None:
            found[name] = _number(summary, "time", key, above=0)
    return found


def _history(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Returns the phases that the run did itself, in order."""
    try:
        phases = {str(entry["name"]): entry for entry in summary["phases"]}
    except (KeyError, TypeError) as error:
        raise ValueError("it has no list of phases with their names") from error
    if not phases:
        raise ValueError("its list of phases is empty")
    for entry in phases.values():
        _number(entry, "steps")
    return phases


def _phase_words(phases: Sequence[str], inherited: Sequence[str], pruned_by: Any) -> list[str]:
    """Returns the phases, those of --init in parentheses, and what `fdjax prune` did before the run's own."""
    words = [f"({phase})" for phase in phases if phase in inherited]
    words += [f"(pruned by {pruned_by})"] if isinstance(pruned_by, str) else []
    return [*words, *(phase for phase in phases if phase not in inherited)]


def _imported(summary: Mapping[str, Any]) -> str | None:
    origin = summary.get("imported")
    return str(origin["weights"]) if isinstance(origin, Mapping) and "weights" in origin else None


def _version(summary: Mapping[str, Any], key: str) -> str | None:
    versions = summary.get("versions")
    value = versions.get(key) if isinstance(versions, Mapping) else None
    return None if value is None else str(value)


def _kept_shares(summary: Mapping[str, Any]) -> dict[str, float] | None:
    """Returns the shares of channels by what they keep, over all masked layer sides; None if there is none."""
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


def epochs_words(epochs: float) -> str:
    """Returns a length in words, such as "1 epoch" or "2.5 epochs"."""
    rounded = f"{round(epochs, 2):g}" if epochs >= 1 else f"{epochs:.3g}"
    return f"{rounded} epoch{'' if rounded == '1' else 's'}"


def mask_words(config: Config) -> list[str]:
    """Describes the masks of a config: sides, levels, penalty, and the weight of distillation if there is any."""
    learn, distillation = config.learn, config.distill.weight
    sides = _SIDES[learn.sides]
    if learn.tied:  # With tied masks the sides apply only to layers that share no mask.
        sides = "tied" if learn.sides == "both" else f"tied, elsewhere {sides}"
    levels = "all levels" if learn.levels == "all" else f"levels {learn.levels}"
    words = [sides, levels, f"penalty {learn.penalty}"]
    return [*words, f"distillation {distillation:g}"] if distillation else words
