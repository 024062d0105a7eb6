"""The compiled programs of a phase, and which of them does which steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import numpy as np

from fdjax.config import Config, WeightPhaseConfig
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning.timed import TimeTable
from fdjax.training.build import counts_of, hard_network
from fdjax.training.feed import Dispatch, Feed
from fdjax.training.optimizers import optimizers_for
from fdjax.training.own_network import Network
from fdjax.training.phases import Phase, has_teacher, phase_settings
from fdjax.training.state import TrainState
from fdjax.training.steps import (
    balancing_weights,
    labels_alone,
    make_distillation,
    make_mask_step,
    make_prepare,
    make_weight_step,
    skip_nonfinite,
    with_class_weights,
)


class Chunk(NamedTuple):
    """Steps that one dispatch does: from step `first` of the phase on, all by the program `key`."""

    first: int
    steps: int
    key: Hashable


def chunks_of(
    config: Config,
    phase: Phase,
    phase_step: int,
    stops: Callable[[int], bool],
    longest: int,
    rows: Callable[[int], np.ndarray],
) -> Iterator[tuple[Chunk, np.ndarray]]:
    """The rest of a phase as chunks, with their examples; no chunk goes on after a step at which it `stops`.

    Args:
      config: of the run.
      phase: which.
      phase_step: how many of its steps are done.
      stops: whether a dispatch ends with so many steps of the phase.
      longest: how many steps a dispatch may do.
      rows: step of the run, from 0 -> the indices of its examples [batch].
    """
    while phase_step < phase.steps:
        first, key, taken = phase_step, _key_of(config, phase, phase_step), []
        while not taken or (
            len(taken) < longest and not stops(phase_step) and _key_of(config, phase, phase_step) == key
        ):
            taken.append(rows(phase.start + phase_step))
            phase_step += 1
        yield Chunk(first, len(taken), key), np.stack(taken)


def _key_of(config: Config, phase: Phase, step: int) -> Hashable:
    kind = phase.kind(config, step)
    return kind, kind == "weights" and phase.trains_batch_norm(config, step)


def make_programs(
    config: Config,
    network: Network,
    graph: MaskedGraph,
    phase: Phase,
    state: TrainState,
    feed: Feed,
    labels: np.ndarray,
    table: TimeTable | None = None,
) -> dict[Hashable, Dispatch]:
    """The programs of a phase by the keys of its chunks; each is compiled when it is first called.

    Args:
      config: of the run.
      network: with soft masks.
      graph: channel graph of the network.
      phase: which.
      state: at the beginning of the phase; its masks are built into the programs of hard phases.
      feed: of the run's examples.
      labels: of the examples that are trained on.
      table: of times, where the masks' target is one of time.
    """
    trained = _network_for(network, graph, phase, state)
    data, settings = config.data, phase_settings(config, phase.name)
    prepare = make_prepare(
        graph,
        data.crop_padding,
        data.flip,
        config.model.precision,
        jitter=data.jitter,
        cutout=data.cutout,
        erase=data.erase,
        crop_area=0.0 if data.loading == "stream" else data.crop_area,  # a stream cuts while it decodes
    )
    weight_opt, mask_opt = optimizers_for(config, phase)
    objective = labels_alone
    if has_teacher(config, phase):
        objective = make_distillation(dataclasses.replace(network, mode="off"), config.distill)
    if data.class_weights == "balanced":
        objective = with_class_weights(objective, balancing_weights(labels, graph.num_classes))
    guarded = skip_nonfinite if config.skip_nonfinite else lambda step: step
    programs: dict[Hashable, Dispatch] = {}
    if phase.learns_masks:
        step = make_mask_step(
            trained, graph, mask_opt, prepare, config.learn, objective, mixup_alpha=data.mixup, table=table
        )
        programs["masks", False] = feed.compile(guarded(step))
    if isinstance(settings, WeightPhaseConfig):
        for train_batch_norm in (True, False):
            step = make_weight_step(
                trained,
                weight_opt,
                prepare,
                objective,
                train_batch_norm=train_batch_norm,
                label_smoothing=settings.label_smoothing,
                mixup_alpha=data.mixup,
            )
            programs["weights", train_batch_norm] = feed.compile(guarded(step))
    return programs


def _network_for(network: Network, graph: MaskedGraph, phase: Phase, state: TrainState) -> Network:
    if phase.learns_masks:
        return dataclasses.replace(network, mode="soft")
    if phase.hard:
        return hard_network(network, graph, counts_of(graph, state.fcmask))
    return dataclasses.replace(network, mode="off")
