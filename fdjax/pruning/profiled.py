"""Pruning by profiling: what was measured of a trained network says what it can do without (the paper, section 3.2).

Methods share one signature and differ only by their scores. A method scores every masked side by an array that
broadcasts to [N, channels], and its shape says what is pruned as one piece: [1, channels] whole channels, [N, 1] the
same coefficients of all channels, [N, channels] single coefficients of single channels. Of each side, or of the network
as a whole, the pieces with the lowest scores go; the strongest piece of a side always stays.

Masks here are explicit, path of an FCMask -> bool [N, channels], since not all of them are low-frequency prefixes.
"""

from __future__ import annotations

import dataclasses
import math
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

_NO_DENSE_FORM = "its masks are no low-frequency prefixes, which alone have a dense form and a count of it"
# Halvings of the share that is looked for: finer than one piece of the widest layers.
_HALVINGS = 18


def mask_energies(network: MaskedGraph, energies: Energies) -> dict[str, np.ndarray]:
    """The energy of what each FCMask multiplies, as shares of its side's whole; the mean over sides that share a mask.

    Args:
      network: the network.
      energies: mean squared coefficients of every masked side, for the block that it has.

    Returns:
      path of every FCMask -> float64 [N, channels], with sum 1 (0 where a side is silent).
    """
    found: dict[str, list[np.ndarray]] = {}
    for path, mask in network.masks.items():
        for side in mask.sides:
            energy = np.asarray(energies[side][mask.block], np.float64)
            found.setdefault(path, []).append(energy / (energy.sum() or 1.0))
    return {path: np.mean(sides, axis=0) for path, sides in found.items()}


def band_scores(energy: np.ndarray) -> np.ndarray:
    """Scores by which the pieces above any threshold are a low-frequency prefix of each channel: [N, channels], both.

    Each channel's energies are replaced by the non-increasing sequence nearest to them. What lies above a threshold t
    is then the prefix that maximises its energy less t for each coefficient: of all choices of prefixes with as many
    coefficients, the one that keeps most energy.
    """
    fitted = [isotonic_regression(channel, increasing=False).x for channel in np.asarray(energy, np.float64).T]
    # Rounding may leave a step upwards in the last digit.
    return np.minimum.accumulate(np.stack(fitted, axis=1), axis=0)


# Method -> scores of a side from its energy [N, channels].
METHODS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "channel": lambda energy: energy.sum(axis=0, keepdims=True),
    "coefficient": lambda energy: energy.sum(axis=1, keepdims=True),
    "channel_coefficient": lambda energy: np.asarray(energy, np.float64),
    "band": band_scores,
}
# Those whose masks are whole channels or low-frequency prefixes: always, or where the energies fall.
DENSE_METHODS = ("channel", "band", "coefficient")


def check_methods(methods: Sequence[str]) -> None:
    """Raises `UserError` if one of `methods` does not exist."""
    for method in methods:
        if method not in METHODS:
            raise UserError(
                f"no pruning method {method!r}{suggestion(method, METHODS)}; accepted are {', '.join(METHODS)}"
            )


def score(method: str, energies: Masks) -> dict[str, np.ndarray]:
    """Scores of every masked side by one of `METHODS`, from `mask_energies`."""
    return {path: METHODS[method](energy) for path, energy in energies.items()}


def prune_share(network: MaskedGraph, scores: Scores, share: float, scope: Scope = "layer") -> dict[str, np.ndarray]:
    """Prunes the pieces with the lowest scores.

    Of equal scores the higher coefficient goes first, then the later channel.

    Args:
      network: the network.
      scores: path of every FCMask -> an array that broadcasts to [N, channels].
      share: of the pieces, 0 to 1, rounded to whole pieces.
      scope: "layer" takes that share of every side (the paper's percentile), "global" of all pieces of the network,
        whose scores are compared after division by the mean of their side.

    Returns:
      path -> bool [N, channels].
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
    """Kept counts [channels] of masks that are low-frequency prefixes everywhere; None if any is not."""
    if any((mask[1:] & ~mask[:-1]).any() for mask in masks.values()):
        return None
    return {path: mask.sum(axis=0) for path, mask in masks.items()}


def masks_of_counts(network: MaskedGraph, counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks [N, channels] of kept counts."""
    return {path: np.arange(num_coefs)[:, None] < counts[path] for path, (_, num_coefs) in network.mask_sizes.items()}


def whole_masks(network: MaskedGraph) -> dict[str, np.ndarray]:
    """The masks [N, channels] that prune nothing."""
    return {path: np.ones((num_coefs, channels), bool) for path, (channels, num_coefs) in network.mask_sizes.items()}


@dataclasses.dataclass(frozen=True)
class MaskMacs:
    """MACs of a network under explicit masks, exact; counted layers only.

    Attributes:
      dense: of the plain network.
      pruned: wrapped layers pruned, no transforms: a product where both sides keep a coefficient.
      paper_total: likewise with N for each kept coefficient of either side, but for released layers.
      total: every layer in its cheapest exact form; None where masks are no prefixes, which have no dense form.
    """

    dense: int
    pruned: int
    paper_total: int
    total: int | None

    def ratio(self, convention: Convention) -> float:
        """MACs over dense MACs: "bare" without transforms, "paper" with the paper's, "total" in the cheapest form."""
        macs = {"bare": self.pruned, "paper": self.paper_total, "total": self.total}[convention]
        if macs is None:
            raise ValueError(_NO_DENSE_FORM)
        return macs / self.dense

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **dataclasses.asdict(self),
            "bare_ratio": self.ratio("bare"),
            "paper_ratio": self.ratio("paper"),
            "ratio": None if self.total is None else self.ratio("total"),
        }


def mask_macs(network: MaskedGraph, masks: Masks, released: Collection[str] = ()) -> MaskMacs:
    """Counts a network under explicit masks; `released`: names of layers that the gate has released."""
    counts = prefix_counts(masks)
    total = None if counts is None else network_macs(network, counts, released).to_dict()["total"]
    return dataclasses.replace(_papers_macs(network, masks, released), total=total)


def _papers_macs(network: MaskedGraph, masks: Masks, released: Collection[str]) -> MaskMacs:
    """All but the total, which takes long to count."""
    dense = pruned = paper = 0
    for name, layer in network.counted_layers.items():
        of_layer = (layer.dense_macs, layer.dense_macs)
        if name in network.blocks:
            of_layer = _layer_macs(network, name, masks, name in released)
        dense, pruned, paper = dense + layer.dense_macs, pruned + of_layer[0], paper + of_layer[1]
    return MaskMacs(dense, pruned, paper, None)


def _layer_macs(network: MaskedGraph, name: str, masks: Masks, released: bool = False) -> tuple[int, int]:
    """(pruned, paper_total) of a wrapped layer; a side without a mask keeps all."""
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
      share: of the pieces that was pruned before the gate.
      released: names of the layers that the gate released.
      macs: of the network under these masks.
    """

    masks: dict[str, np.ndarray]
    share: float
    released: tuple[str, ...]
    macs: MaskMacs


def gate_masks(
    network: MaskedGraph, masks: Masks, convention: Convention
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Releases what is no cheaper pruned than whole: channels that keep something keep all.

    Prefixes are gated as learned masks are (`fdjax.pruning.gate_counts`). Of other masks there is only the paper's
    count; layers that share a mask are released together.

    Args:
      network: the network.
      masks: path -> bool [N, channels].
      convention: "bare" counts no transforms, so that nothing is gained by a release and nothing is released.

    Returns:
      The masks after release, and the names of the released layers, in order.

    Raises:
      ValueError: "total" of masks that are no prefixes.
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
    """A MAC ratio that a method cannot come down to; `lowest` is what it can."""

    def __init__(self, target: float, lowest: float):
        super().__init__(
            f"a target of {target:g} cannot be met: with the strongest piece of every side alone {lowest:.3f}x of the "
            "MACs remain; ask for more, or mask more sides"
        )
        self.lowest = lowest


def prune_to_target(
    network: MaskedGraph, scores: Scores, target: float, *, scope: Scope = "layer", convention: Convention = "bare"
) -> Pruned:
    """Finds the share whose masks, after the gate, come nearest to a MAC ratio.

    Pieces go whole, so that the ratio has steps (few where a piece is a coefficient of all channels): compare
    `macs.ratio(convention)` of what comes back with the target.

    Args:
      network: the network.
      scores: as for `prune_share`.
      target: MAC ratio, above 0 to 1.
      scope: as for `prune_share`.
      convention: of the ratio and the gate: "bare" without transforms, "paper" with the paper's, "total" in the
        cheapest exact form.

    Raises:
      ValueError: the target is below what is left when every side keeps its strongest piece only, or `convention` is
        "total" and masks come about that are no prefixes.
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
    """How many channel masks are a low-frequency prefix already (the paper, section 4.1.1).

    Channels that keep all coefficients or none are prefixes whatever happens, so that those that keep a part are
    counted by themselves, too, beside what chance would give: kept coefficients drawn at random, as many a channel.
    And since the zigzag's order within a diagonal (which of the two directions is first) means little, also counted are
    masks that would be prefixes with the coefficients of each diagonal in some other order.

    Args:
      masks: path -> bool [N, channels], by "channel_coefficient".

    Returns:
      JSON types: `channels`, and of them the share `contiguous` and `contiguous_by_diagonal`; `partial`, channels that
      keep a part, and of them the shares `partial_contiguous`, `partial_by_diagonal` and `partial_by_chance` (0 where
      there are none); and `sides`, a list of the same for each path.
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
