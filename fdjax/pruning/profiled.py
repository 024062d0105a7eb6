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
from fdjax.ops.dct import zigzag_order
from fdjax.ops.macs import explicit_mask_macs
from fdjax.pruning.block_choice import Energies
from fdjax.pruning.harden import gate_counts
from fdjax.spec import LayerSpec, NetworkSpec, network_macs

Masks = Mapping[str, np.ndarray]
Scores = Mapping[str, np.ndarray]
Scope = Literal["layer", "global"]
Convention = Literal["bare", "paper", "total"]
SCOPES: tuple[Scope, ...] = ("layer", "global")

_NO_DENSE_FORM = "its masks are no low-frequency prefixes, which alone have a dense form and a count of it"
# Halvings of the share that is looked for: finer than one piece of the widest layers.
_HALVINGS = 18


def mask_energies(spec: NetworkSpec, energies: Energies) -> dict[str, np.ndarray]:
    """The energy of what each FCMask multiplies, as shares of its side's whole; the mean over sides that share a mask.

    Args:
      spec: the network.
      energies: mean squared coefficients of every masked side, for the block that it has.

    Returns:
      path of every FCMask -> float64 [N, channels], with sum 1 (0 where a side is silent).
    """
    found: dict[str, list[np.ndarray]] = {}
    for layer in spec.layers:
        for side, path in (("input", layer.input_mask), ("output", layer.output_mask)):
            if path:
                assert layer.block is not None
                energy = np.asarray(energies[layer.name, side][layer.block], np.float64)
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


def prune_share(spec: NetworkSpec, scores: Scores, share: float, scope: Scope = "layer") -> dict[str, np.ndarray]:
    """Prunes the pieces with the lowest scores.

    Of equal scores the higher coefficient goes first, then the later channel.

    Args:
      spec: the network.
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
    sizes = spec.mask_sizes
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


def masks_of_counts(spec: NetworkSpec, counts: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The masks [N, channels] of kept counts."""
    return {path: np.arange(num_coefs)[:, None] < counts[path] for path, (_, num_coefs) in spec.mask_sizes.items()}


def whole_masks(spec: NetworkSpec) -> dict[str, np.ndarray]:
    """The masks [N, channels] that prune nothing."""
    return {path: np.ones((num_coefs, channels), bool) for path, (channels, num_coefs) in spec.mask_sizes.items()}


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


def mask_macs(spec: NetworkSpec, masks: Masks, released: Collection[str] = ()) -> MaskMacs:
    """Counts a network under explicit masks; `released`: names of layers that the gate has released."""
    counts = prefix_counts(masks)
    total = None if counts is None else network_macs(spec, counts, released).to_dict()["total"]
    return dataclasses.replace(_papers_macs(spec, masks, released), total=total)


def _papers_macs(spec: NetworkSpec, masks: Masks, released: Collection[str]) -> MaskMacs:
    """All but the total, which takes long to count."""
    dense = pruned = paper = 0
    for layer in spec.counted_layers:
        of_layer = (layer.dense_macs, layer.dense_macs)
        if layer.block:
            of_layer = _layer_macs(layer, masks, layer.name in released)
        dense, pruned, paper = dense + layer.dense_macs, pruned + of_layer[0], paper + of_layer[1]
    return MaskMacs(dense, pruned, paper, None)


def _layer_macs(layer: LayerSpec, masks: Masks, released: bool = False) -> tuple[int, int]:
    """(pruned, paper_total) of a wrapped layer; a side without a mask keeps all."""
    assert layer.block is not None
    inputs, outputs = (
        np.ones((layer.num_coefs, channels), bool) if path is None else masks[path]
        for path, channels in ((layer.input_mask, layer.in_channels), (layer.output_mask, layer.out_channels))
    )
    return explicit_mask_macs(layer.in_size, layer.block, inputs, outputs, released)


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
    spec: NetworkSpec, masks: Masks, convention: Convention
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Releases what is no cheaper pruned than whole: channels that keep something keep all.

    Prefixes are gated as learned masks are (`fdjax.pruning.gate_counts`). Of other masks there is only the paper's
    count; layers that share a mask are released together.

    Args:
      spec: the network.
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
        gated, released = gate_counts(spec, counts, convention)
        return masks_of_counts(spec, gated), released
    if convention == "total":
        raise ValueError(_NO_DENSE_FORM)
    whole = {path: np.broadcast_to(mask.any(axis=0), mask.shape) for path, mask in masks.items()}
    found, released = dict(masks), set[str]()
    for layers in _sharing_masks(spec):
        pruned = sum(_layer_macs(layer, masks)[1] for layer in layers)
        if pruned >= sum(_layer_macs(layer, whole, released=True)[1] for layer in layers):
            released.update(layer.name for layer in layers)
            found |= {path: whole[path].copy() for layer in layers for path in _paths(layer)}
    return found, tuple(layer.name for layer in spec.layers if layer.name in released)


def _paths(layer: LayerSpec) -> set[str]:
    return {path for path in (layer.input_mask, layer.output_mask) if path}


def _sharing_masks(spec: NetworkSpec) -> list[list[LayerSpec]]:
    """The masked layers, those that share a mask together."""
    groups: list[tuple[set[str], list[LayerSpec]]] = []
    for layer in spec.layers:
        paths, layers = _paths(layer), [layer]
        if not paths:
            continue
        for group in [group for group in groups if group[0] & paths]:
            groups.remove(group)
            paths, layers = paths | group[0], group[1] + layers
        groups.append((paths, layers))
    return [layers for _, layers in groups]


class UnreachableTarget(ValueError):
    """A MAC ratio that a method cannot come down to; `lowest` is what it can."""

    def __init__(self, target: float, lowest: float):
        super().__init__(
            f"a target of {target:g} cannot be met: with the strongest piece of every side alone {lowest:.3f}x of the "
            "MACs remain; ask for more, or mask more sides"
        )
        self.lowest = lowest


def prune_to_target(
    spec: NetworkSpec, scores: Scores, target: float, *, scope: Scope = "layer", convention: Convention = "bare"
) -> Pruned:
    """Finds the share whose masks, after the gate, come nearest to a MAC ratio.

    Pieces go whole, so that the ratio has steps (few where a piece is a coefficient of all channels): compare
    `macs.ratio(convention)` of what comes back with the target.

    Args:
      spec: the network.
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
        masks, released = gate_masks(spec, prune_share(spec, scores, share, scope), convention)
        count = mask_macs if convention == "total" else _papers_macs
        return Pruned(masks, share, released, count(spec, masks, released))

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
    return dataclasses.replace(best, macs=mask_macs(spec, best.masks, best.released))


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
