"""Pruning by profiling: measurements of a trained network decide what it can do without (the paper, section 3.2).

All methods have one signature and differ only in their scores. A method scores every masked side by an array that
broadcasts to [N, channels], and the shape of that array decides what is pruned as one piece: [1, channels] for whole
channels, [N, 1] for the same coefficients of all channels, [N, channels] for single coefficients of single channels.
The pieces with the lowest scores are removed, per side or over the whole network; the strongest piece of a side always
stays.

The masks here are explicit, path of an FCMask -> bool [N, channels], because not all of them are low-frequency
prefixes.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from scipy.optimize import isotonic_regression

from fdjax.errors import UserError, suggestion
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.dct import zigzag_order
from fdjax.ops.macs import explicit_mask_macs
from fdjax.pruning.block_choice import Energies
from fdjax.pruning.harden import gate_counts, sharing_layers

Masks = Mapping[str, np.ndarray]
Scores = Mapping[str, np.ndarray]
Scope = Literal["layer", "global"]
Convention = Literal["bare", "paper", "total"]
SCOPES: tuple[Scope, ...] = ("layer", "global")

_NO_DENSE_FORM = "its masks are not low-frequency prefixes, and only those have a dense form, whose MACs can be counted"
# Bisections of the share: finer than one piece of the widest layers.
_HALVINGS = 18


def mask_energies(network: MaskedGraph, energies: Energies) -> dict[str, np.ndarray]:
    """Computes the energy that each FCMask multiplies, as a share of its side's total.

    If several sides share a mask, the result is the mean over them.

    Args:
      network: the graph with its masks.
      energies: mean squared coefficients of every masked side, for the side's block.

    Returns:
      Path of every FCMask -> float64 [N, channels], with sum 1, or 0 if the side has no energy.
    """
    found: dict[str, list[np.ndarray]] = {}
    for path, mask in network.masks.items():
        for side in mask.sides:
            energy = np.asarray(energies[side][mask.block], np.float64)
            found.setdefault(path, []).append(energy / (energy.sum() or 1.0))
    return {path: np.mean(sides, axis=0) for path, sides in found.items()}


def band_scores(energy: np.ndarray) -> np.ndarray:
    """Computes scores for which the pieces above any threshold form a low-frequency prefix in each channel.

    Each channel's energies are replaced by the nearest non-increasing sequence. What lies above a threshold t is then
    the prefix that maximises its energy minus t per coefficient. Among all choices of prefixes with as many
    coefficients, this one keeps the most energy.

    Args:
      energy: [N, channels], 0 or more.

    Returns:
      [N, channels], non-increasing along the coefficients.
    """
    fitted = [isotonic_regression(channel, increasing=False).x for channel in np.asarray(energy, np.float64).T]
    # Rounding errors may leave an upward step in the last digit.
    return np.minimum.accumulate(np.stack(fitted, axis=1), axis=0)


def random_channel_scores(energy: np.ndarray) -> np.ndarray:
    """Draws a score for every channel: the baseline that a criterion for whole channels has to beat.

    Args:
      energy: [N, channels]; its bytes seed the draw, so that a network has the same scores each time.

    Returns:
      [1, channels], a permutation of 0 .. channels - 1.
    """
    draw = np.random.default_rng(zlib.crc32(np.asarray(energy, np.float64).tobytes()))
    return draw.permutation(energy.shape[1])[None].astype(np.float64)


# Method -> a function from the energy [N, channels] of a side to its scores.
METHODS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "channel": lambda energy: energy.sum(axis=0, keepdims=True),
    "coefficient": lambda energy: energy.sum(axis=1, keepdims=True),
    "channel_coefficient": lambda energy: np.asarray(energy, np.float64),
    "band": band_scores,
    "random_channel": random_channel_scores,
}
# Methods whose masks are whole channels or low-frequency prefixes, either always or if energies fall with frequency.
DENSE_METHODS = ("channel", "band", "coefficient", "random_channel")


def check_methods(methods: Sequence[str]) -> None:
    """Raises `UserError` if one of `methods` does not exist."""
    for method in methods:
        if method not in METHODS:
            raise UserError(
                f"no pruning method {method!r}{suggestion(method, METHODS)}; accepted are {', '.join(METHODS)}"
            )


def score(method: str, energies: Masks) -> dict[str, np.ndarray]:
    """Scores every masked side.

    Args:
      method: one of `METHODS`.
      energies: path of every FCMask -> [N, channels], from `mask_energies`.

    Returns:
      Path -> scores, an array that broadcasts to [N, channels].
    """
    return {path: METHODS[method](energy) for path, energy in energies.items()}


def prune_share(network: MaskedGraph, scores: Scores, share: float, scope: Scope = "layer") -> dict[str, np.ndarray]:
    """Prunes the pieces with the lowest scores.

    Among equal scores, the higher coefficient is removed first, then the later channel.

    Args:
      network: the graph with its masks.
      scores: path of every FCMask -> an array that broadcasts to [N, channels].
      share: the share of pieces to prune, 0 to 1, rounded to whole pieces.
      scope: "layer" prunes that share of every side (the paper's percentile). "global" prunes it of all pieces of the
        network, and compares scores relative to the mean of their side.

    Returns:
      Path -> bool [N, channels], true where a coefficient is kept.
    """
    if scope == "layer":
        kept = {path: _strongest(of.ravel(), share) for path, of in scores.items()}
    else:
        relative = {path: of.ravel() / (of.mean() or 1.0) for path, of in scores.items()}
        kept = _strongest_of_all(relative, share)
    sizes = network.mask_sizes
    return {
        path: np.broadcast_to(pieces.reshape(scores[path].shape), sizes[path][::-1]).copy()
        for path, pieces in kept.items()
    }


def _strongest(scores: np.ndarray, share: float) -> np.ndarray:
    number = max(1, len(scores) - int(np.floor(share * len(scores) + 0.5)))
    kept = np.zeros(len(scores), bool)
    kept[np.argsort(-scores, kind="stable")[:number]] = True
    return kept


def _strongest_of_all(scores: Scores, share: float) -> dict[str, np.ndarray]:
    everything = np.concatenate([*scores.values()])
    kept = np.zeros(len(everything), bool)
    kept[np.argsort(-everything, kind="stable")[: len(everything) - int(np.floor(share * len(everything) + 0.5))]] = (
        True
    )
    ends = np.cumsum([len(of) for of in scores.values()])
    found = dict(zip(scores, np.split(kept, ends[:-1]), strict=True))
    for path, of in scores.items():
        found[path][of.argmax()] = True
    return found


def prefix_counts(masks: Masks) -> dict[str, np.ndarray] | None:
    """Converts masks to kept counts.

    Args:
      masks: path -> bool [N, channels].

    Returns:
      Path -> int [channels]; None if any mask is not a low-frequency prefix.
    """
    if any((mask[1:] & ~mask[:-1]).any() for mask in masks.values()):
        return None
    return {path: mask.sum(axis=0) for path, mask in masks.items()}


def masks_of_counts(network: MaskedGraph, counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts kept counts to masks.

    Args:
      network: the graph with its masks.
      counts: path of every FCMask -> kept counts [channels], 0 to N.

    Returns:
      Path -> bool [N, channels].
    """
    return {path: np.arange(num_coefs)[:, None] < counts[path] for path, (_, num_coefs) in network.mask_sizes.items()}


def whole_masks(network: MaskedGraph) -> dict[str, np.ndarray]:
    """Makes the masks that prune nothing.

    Args:
      network: the graph with its masks.

    Returns:
      Path -> bool [N, channels], all true.
    """
    return {path: np.ones((num_coefs, channels), bool) for path, (channels, num_coefs) in network.mask_sizes.items()}


@dataclasses.dataclass(frozen=True)
class MaskMacs:
    """Exact MACs of a network under explicit masks; counted layers only.

    Attributes:
      dense: the network without pruning.
      pruned: wrapped layers pruned, without transforms: one product per coefficient that both sides keep.
      paper_total: `pruned` plus N per kept coefficient of either side, except in released layers.
      total: every layer in its cheapest exact form; None if a mask is not a prefix and so has no dense form.
    """

    dense: int
    pruned: int
    paper_total: int
    total: int | None

    def ratio(self, convention: Convention) -> float:
        """Returns MACs over dense MACs.

        Args:
          convention: "bare" without transforms, "paper" with the paper's, or "total" in the cheapest exact form.

        Returns:
          The ratio, 0 or more.

        Raises:
          ValueError: the convention is "total", and a mask is not a prefix.
        """
        macs = {"bare": self.pruned, "paper": self.paper_total, "total": self.total}[convention]
        if macs is None:
            raise ValueError(_NO_DENSE_FORM)
        return macs / self.dense

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts in plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "bare_ratio": self.ratio("bare"),
            "paper_ratio": self.ratio("paper"),
            "ratio": None if self.total is None else self.ratio("total"),
        }


def mask_macs(network: MaskedGraph, masks: Masks, released: Collection[str] = ()) -> MaskMacs:
    """Counts a network under explicit masks.

    Args:
      network: the graph with its masks.
      masks: path of every FCMask -> bool [N, channels].
      released: names of the layers that the gate has released.

    Returns:
      The MACs by every convention.
    """
    counts = prefix_counts(masks)
    total = None if counts is None else network_macs(network, counts, released).to_dict()["total"]
    return dataclasses.replace(_papers_macs(network, masks, released), total=total)


def _papers_macs(network: MaskedGraph, masks: Masks, released: Collection[str]) -> MaskMacs:
    """Counts everything but `total`, which takes long to count."""
    dense = pruned = paper = network.graph.product_macs
    for name, layer in network.counted_layers.items():
        of_layer = (layer.dense_macs, layer.dense_macs)
        if name in network.blocks:
            of_layer = _layer_macs(network, name, masks, name in released)
        dense, pruned, paper = dense + layer.dense_macs, pruned + of_layer[0], paper + of_layer[1]
    return MaskMacs(dense, pruned, paper, None)


def _layer_macs(network: MaskedGraph, name: str, masks: Masks, released: bool = False) -> tuple[int, int]:
    """Returns (pruned, paper_total) of a wrapped layer; a side without a mask keeps everything."""
    layer, block = network.layers[name], network.blocks[name]
    paths = network.mask_of(name, "input"), network.mask_of(name, "output")
    inputs, outputs = (
        np.ones((block**2, channels), bool) if path is None else masks[path]
        for path, channels in zip(paths, (layer.in_channels, layer.out_channels), strict=True)
    )
    height, width = layer.in_size
    return explicit_mask_macs((height, width), block, inputs, outputs, released)


@dataclasses.dataclass(frozen=True)
class Pruned:
    """Masks by profiling, gated if the convention counts transforms.

    Attributes:
      masks: path of every FCMask -> bool [N, channels].
      share: the share of pieces that was pruned before the gate, 0 to 1.
      released: names of the layers that the gate released.
      macs: MACs of the network under these masks.
    """

    masks: dict[str, np.ndarray]
    share: float
    released: tuple[str, ...]
    macs: MaskMacs


def gate_masks(
    network: MaskedGraph, masks: Masks, convention: Convention
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Releases what is no cheaper pruned than whole: channels that keep a coefficient then keep all.

    Prefix masks are gated like learned masks (`fdjax.pruning.harden.gate_counts`). For other masks, only the paper's
    count exists; layers that share a mask are released together.

    Args:
      network: the graph with its masks.
      masks: path -> bool [N, channels].
      convention: how MACs are counted, as in `MaskMacs.ratio`. "bare" counts no transforms, so that nothing is
        released.

    Returns:
      The masks after release, and the names of the released layers, in order.

    Raises:
      ValueError: the convention is "total", and a mask is not a prefix.
    """
    if convention == "bare":
        return dict(masks), ()
    counts = prefix_counts(masks)
    if counts is not None:
        gated, released = gate_counts(network, counts, convention)
        return masks_of_counts(network, gated), released
    if convention == "total":
        raise ValueError(_NO_DENSE_FORM)
    whole = {path: np.broadcast_to(mask.any(axis=0), mask.shape) for path, mask in masks.items()}
    found, released = dict(masks), set[str]()
    for names in sharing_layers(network):
        sides = (network.mask_of(name, side) for name in names for side in ("input", "output"))
        paths = {path for path in sides if path is not None}
        pruned = sum(_layer_macs(network, name, masks)[1] for name in names)
        if paths and pruned >= sum(_layer_macs(network, name, whole, released=True)[1] for name in names):
            released.update(names)
            found |= {path: whole[path].copy() for path in paths}
    return found, tuple(name for name in network.layers if name in released)


class UnreachableTarget(ValueError):
    """A MAC ratio that a method cannot reach; `lowest` is the lowest ratio that it can."""

    def __init__(self, target: float, lowest: float):
        super().__init__(
            f"a target of {target:g} cannot be met: with only the strongest piece of every side, {lowest:.3f}x of the "
            "MACs remain; choose a higher target, or mask more sides"
        )
        self.lowest = lowest


def prune_to_target(
    network: MaskedGraph, scores: Scores, target: float, *, scope: Scope = "layer", convention: Convention = "bare"
) -> Pruned:
    """Finds the share whose masks come nearest to a MAC ratio after the gate.

    The ratio moves in steps, because pieces are removed whole; there are few steps if a piece is a coefficient of all
    channels. Compare `macs.ratio(convention)` of the result with the target.

    Args:
      network: the graph with its masks.
      scores: as for `prune_share`.
      target: MAC ratio, above 0 to 1.
      scope: as for `prune_share`.
      convention: the convention of the ratio and of the gate, as in `MaskMacs.ratio`.

    Returns:
      The masks, the share, and their MACs.

    Raises:
      ValueError: the target is below the ratio of a network in which every side keeps its strongest piece only; or the
        convention is "total", and a mask is not a prefix.
    """

    def at(share: float) -> Pruned:
        masks, released = gate_masks(network, prune_share(network, scores, share, scope), convention)
        count = mask_macs if convention == "total" else _papers_macs
        return Pruned(masks, share, released, count(network, masks, released))

    def distance(pruned: Pruned) -> float:
        return abs(pruned.macs.ratio(convention) - target)

    low, high = 0.0, 1.0
    whole, fewest = at(low), at(high)
    lowest = fewest.macs.ratio(convention)
    if target < lowest:
        raise UnreachableTarget(target, lowest)
    best = min(whole, fewest, key=distance)
    for _ in range(_HALVINGS):
        middle = at((low + high) / 2)
        best = min(best, middle, key=distance)
        if middle.macs.ratio(convention) > target:
            low = middle.share
        else:
            high = middle.share
    return dataclasses.replace(best, macs=mask_macs(network, best.masks, best.released))


def contiguous_share(masks: Masks) -> dict[str, Any]:
    """Measures how many channel masks are low-frequency prefixes already (the paper, section 4.1.1).

    Channels that keep all coefficients or none are always prefixes. Channels that keep a part are therefore also
    counted separately, beside the share that chance would give if each channel kept as many coefficients at random. The
    zigzag's order within a diagonal (which of the two directions comes first) has little meaning, so masks that would
    be prefixes with some other order within each diagonal are counted as well.

    Args:
      masks: path -> bool [N, channels], by "channel_coefficient".

    Returns:
      JSON types: `channels`, and the shares of them that are `contiguous` and `contiguous_by_diagonal`; `partial`, the
      number of channels that keep a part, and their shares `partial_contiguous`, `partial_by_diagonal` and
      `partial_by_chance` (0 if there are none); and `sides`, a list of the same per path.
    """
    sides = [{"mask": path, **_contiguous_side(mask)} for path, mask in masks.items()]
    total: dict[str, Any] = {number: sum(side[number] for side in sides) for number in ("channels", "partial")}
    for number, shares in (("channels", _SHARES[:2]), ("partial", _SHARES[2:])):
        for share in shares:
            total[share] = sum(side[share] * side[number] for side in sides) / (total[number] or 1)
    return {**total, "sides": sides}


_SHARES = ("contiguous", "contiguous_by_diagonal", "partial_contiguous", "partial_by_diagonal", "partial_by_chance")


def _contiguous_side(mask: np.ndarray) -> dict[str, Any]:
    num_coefs, channels = mask.shape
    counts = mask.sum(axis=0)
    diagonals = np.array([row + column for row, column in zigzag_order(math.isqrt(num_coefs))])[:, None]
    last_kept, first_pruned = np.where(mask, diagonals, -1).max(0), np.where(mask, num_coefs, diagonals).min(0)
    by_diagonal = np.asarray(last_kept <= first_pruned)
    prefix = ~np.asarray((mask[1:] & ~mask[:-1]).any(axis=0))
    partial = (counts > 0) & (counts < num_coefs)
    chance = np.array([1 / math.comb(num_coefs, int(count)) for count in counts])
    shares = (prefix, by_diagonal, prefix[partial], by_diagonal[partial], chance[partial])
    return {
        "channels": channels,
        "partial": int(partial.sum()),
        **{name: float(share.mean()) if len(share) else 0.0 for name, share in zip(_SHARES, shares, strict=True)},
    }
