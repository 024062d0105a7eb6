"""The compiled programs of a phase, and the chunks of steps that they do."""

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
    """Steps of one dispatch, by the program `key`; `first` is the first of them in the phase."""

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
    """Divides the rest of a phase into chunks.

    Args:
      config: the run's config.
      phase: the phase.
      phase_step: number of the phase's steps that are done.
      stops: whether a dispatch has to end after this many steps of the phase.
      longest: the most steps in a dispatch.
      rows: step of the run, from 0 -> the indices of its examples, int [B].

    Yields:
      Each chunk, and the indices of its examples, int [steps, B].
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
    """Makes the programs of a phase; each is compiled when it is first called.

    Args:
      config: the run's config.
      network: with soft masks.
      graph: channel graph of the network.
      phase: the phase.
      state: the state at the beginning of the phase; in hard phases its masks are constants of the programs.
      feed: the feed of the run's examples.
      labels: labels of the training examples, int [n].
      table: measured times, if the target is a time.

    Returns:
      The programs by the keys of the phase's chunks.
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
