"""The chunks of steps that a phase is divided into: each is one dispatch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple

import numpy as np

from fdjax.config import Config
from fdjax.training.phases import Phase


class Chunk(NamedTuple):
    """Steps of one dispatch: `first` is the first of them in the phase; `key` says which of the phase's steps it is."""

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
