"""Describes a run in words: its settings, and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fdjax.config import Config
from fdjax.reports.results import Result, epochs_words, mask_words


def asked_words(result: Result, phases: list[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Describes the settings of a run in pairs of a heading and a text.

    Args:
      result: the run's row.
      phases: the phases of its summary.
    """
    config = result.config
    steps = {phase["name"]: phase["steps"] for phase in phases}
    padding = [f"{config.model.padding.upper()} padding"] if config.model.factory is None else []
    lines = [
        ("Network", ", ".join([result.network_words, *padding, config.model.precision])),
        ("Data", _data_words(result)),
        *((f"Phase {phase}", _phase_words(config, phase, steps.get(phase))) for phase in config.phases),
    ]
    if result.filters is not None:
        lines.append(("Filters", f"removed by {result.filters}, before the phases of this run"))
    if result.has_masks:
        learn = config.learn
        lines.append(("Masks", f"{', '.join(mask_words(config))}; blocks: {result.block}"))
        goal = (
            f"lambda {learn.lambda_ or 0:g}, no target"
            if learn.target_macs is None
            else f"{learn.target_macs:g} of the dense network's MACs, transforms included"
        )
        if learn.target_time is not None:
            goal = f"{learn.target_time:g} of the dense network's time on {learn.engine}, batch {learn.engine_batch}"
        if learn.target_convention == "paper":
            goal += ", by the paper's count"
        lines.append(("Target", goal))
        gate = {"none": "none: every layer stays pruned", "macs": "layers that need no fewer MACs pruned are released"}
        lines.append(("Gate", gate.get(learn.gate, "layers that are slower pruned are released")))
    return [*lines, ("Seed", str(config.seed))]


def outcome_words(result: Result) -> str:
    """Describes the results of a run in one or two sentences."""
    top1 = result.pruned_top1 if result.pruned_top1 is not None else result.dense_top1 or 0.0
    # The standard error of a share of independent test images.
    error = 100 * math.sqrt(top1 * (1 - top1) / result.test_images)
    right = f"{100 * top1:.2f}% of {result.test_images:,} test images right (standard error {error:.2f} points)"
    origin = ""
    if result.imported is not None:
        then = "taken as they are"
        if result.fine_tuned:
            here = "pretrain" in result.own_phases
            then = "fine-tuned here" if here else "fine-tuned by a run that this one started from"
        origin = f" Its weights were imported from {result.imported} and {then}."
    if not result.is_pruned:
        return f"The dense network has {right} and {count_words(result.dense_macs)} MACs.{origin}"
    text = (
        f"The pruned network has {right} with {count_words(result.macs)} MACs, transforms included: "
        f"{result.macs_ratio:.3f} of the dense network's {count_words(result.dense_macs)}."
    )
    if result.dense_top1 is None or result.loss_points is None:
        return text + origin
    change = -result.loss_points
    words = "as many" if round(change, 2) == 0 else f"{abs(change):.2f} points {'more' if change > 0 else 'less'}"
    return f"{text} The dense network has {100 * result.dense_top1:.2f}%: the pruned one has {words}.{origin}"


def count_words(count: float) -> str:
    """Formats a count, such as 7.90 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.2f}{name}"
    return f"{count:g}"


def _data_words(result: Result) -> str:
    data = result.config.data
    augmentation = [
        f"random crop with {data.crop_padding} pixels of padding" if data.crop_padding else "",
        "random resized crop" if data.random_resized_crop else "",
        f"random parts of at least {data.crop_area:.0%} of the area" if data.crop_area else "",
        "flips" if data.flip else "",
        f"colour jitter {data.jitter:g}" if data.jitter else "",
        f"cutout {data.cutout}" if data.cutout else "",
        f"random erasing {data.erase:g}" if data.erase else "",
        f"mixup {data.mixup:g}" if data.mixup else "",
        "classes balanced in the loss" if data.class_weights == "balanced" else "",
    ]
    size = f", {data.size[0]}x{data.size[1]} pixels" if data.size else ""
    held = f", {data.validation:.0%} held out for validation" if data.validation else ""
    words = ", ".join(filter(None, augmentation)) or "no augmentation"
    return f"{result.data_words}{size}{held}; batches of {data.batch_size}, {words}"


def _phase_words(config: Config, phase: str, steps: int | None) -> str:
    if steps is None:
        return "done by the run that this one started from"
    settings = getattr(config, phase)
    epochs = f" ({epochs_words(settings.epochs)})" if settings.steps is None else ""
    what = {"learn": "masks", "alternate": "masks and weights in turn", "scratch": "new weights under rounded masks"}
    under = "weights under rounded masks" if phase == "refine" else "weights"
    schedule = "constant" if phase == "learn" else settings.schedule
    rate = f"{settings.optimizer}, learning rate {settings.learning_rate:g}, {schedule}"
    taught = config.distill.weight and phase != "pretrain"
    teacher = f"; taught by the unpruned network, weight {config.distill.weight:g}" if taught else ""
    kind, way = what.get(phase, under), ""
    if phase in ("learn", "alternate"):
        way += "; along an aim" if config.learn.approach == "aim" else ""
        way += f"; drawn to their levels, {config.learn.sharpen:g} of the way" if config.learn.sharpen else ""
    return f"{steps:,} steps{epochs} of {kind}: {rate}{way}{teacher}"
