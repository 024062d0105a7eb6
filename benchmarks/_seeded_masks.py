"""Random hard masks for networks that were not trained, at a given share of the MACs by the paper's count.

The severity s of pruning grows with depth, as for learned masks: nothing is pruned in the first tenth of the blocks,
where maps are large and channels few. It is scaled by a factor, found by bisection, with which the paper's count meets
the target.

- "tied": of a block's wide channels, and of the head's outputs, 30% times s are removed, 50% times s keep only the
  mean, and the others keep everything; group sizes are multiples of 16. Narrow sides have no masks.
- "channels": as "tied", but channels that would keep the mean are removed as well.
- "paper": each side of each layer has its own masks, and a channel keeps round(N * m) coefficients, where m is uniform
  between 1 - 1.4 s and 1, but at least 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np

from fdjax.graph.counting import NetworkMacs, network_macs
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.pruning import gate_counts

MASKS = ("tied", "channels", "paper")
_REMOVED, _MEANS, _MULTIPLE = 0.3, 0.5, 16
_SPREAD = 1.4
_UNPRUNED, _MOST_SEVERE, _STEPS = 0.1, 1.25, 24


@dataclasses.dataclass(frozen=True)
class SeededMasks:
    """Hard masks after the gate.

    Attributes:
      counts: path of each FCMask -> kept counts, int [C].
      released: the layers that keep all coefficients of their channels.
      macs: MACs of the network with these masks.
    """

    counts: Counts
    released: tuple[str, ...]
    macs: NetworkMacs


def severity_at(depth: float) -> float:
    """Returns the severity at a depth from 0 (the first block) to 1 (the head), before it is scaled."""
    return 0.0 if depth < _UNPRUNED else min(1.0, 0.25 + 1.5 * depth)


def seeded_masks(
    graph: MaskedGraph, masks: str, target: float, seed: int, released: Collection[str] = ()
) -> SeededMasks:
    """Makes masks whose `macs.paper_ratio` comes nearest to `target`.

    Args:
      graph: the network; its masks are tied for all but "paper".
      masks: one of `MASKS`.
      target: above 0, at most 1.
      seed: the seed.
      released: layers to release; the others meet the target, if they can.
    """
    low, high, best = 0.0, _MOST_SEVERE, _at(graph, masks, 0.0, seed, released)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        found = _at(graph, masks, middle, seed, released)
        if abs(found.macs.paper_ratio - target) < abs(best.macs.paper_ratio - target):
            best = found
        low, high = (middle, high) if found.macs.paper_ratio > target else (low, middle)
    return best


def _blocks_in_order(graph: MaskedGraph) -> list[str]:
    """Returns the inverted residual blocks, which are the modules with a depthwise layer."""
    depthwise = (name for name, layer in graph.layers.items() if layer.kind == "depthwise")
    return list(dict.fromkeys(name.rpartition("/")[0] for name in depthwise))


def _at(graph: MaskedGraph, masks: str, severity: float, seed: int, released: Collection[str]) -> SeededMasks:
    rng = np.random.default_rng(seed)
    modules = _blocks_in_order(graph)
    draw = {"tied": _tied_counts, "channels": _channel_counts, "paper": _paper_counts}[masks]
    counts: dict[str, np.ndarray] = {}
    for path, mask in graph.masks.items():
        layer, side = mask.sides[0]
        module = layer.rpartition("/")[0]
        depth = modules.index(module) / len(modules) if module in modules else 1.0
        narrow = masks != "paper" and side == "input" and module not in modules
        counts[path] = draw(rng, mask.channels, mask.num_coefs, 0.0 if narrow else severity * severity_at(depth))
        if any(layer in released for layer, _ in mask.sides):
            counts[path] = np.where(counts[path] > 0, mask.num_coefs, 0)
    gated, names = gate_counts(graph, counts, "paper")
    return SeededMasks(gated, names, network_macs(graph, gated, names))


def _tied_counts(rng: np.random.Generator, channels: int, num_coefs: int, severity: float) -> np.ndarray:
    severity = min(severity, 1 / (_REMOVED + _MEANS))
    removed, means = (_MULTIPLE * round(channels * share * severity / _MULTIPLE) for share in (_REMOVED, _MEANS))
    counts = np.full(channels, num_coefs)
    counts[:removed] = 0
    counts[removed : removed + means] = 1
    return rng.permutation(counts)


def _channel_counts(rng: np.random.Generator, channels: int, num_coefs: int, severity: float) -> np.ndarray:
    counts = _tied_counts(rng, channels, num_coefs, severity)
    return np.where(counts == 1, 0, counts)


def _paper_counts(rng: np.random.Generator, channels: int, num_coefs: int, severity: float) -> np.ndarray:
    fcmask = np.clip(1 - _SPREAD * severity * rng.uniform(size=channels), 0, 1)
    return np.round(num_coefs * fcmask).astype(np.int64)
