"""Filter pruning: which filters inside a ResNet's blocks go, so that the network really shrinks, its 3x3 layers too.

Methods share one signature, (what was measured of a layer) -> a score for each of its filters, and differ by their
scores; the filters with the lowest scores of a block go first. What stays fixed is the map that runs from block to
block: pruned are a block's inner maps.

How many filters a block loses is one share for all blocks, or chosen for each from what blocks lose when pruned
alone (`choose_rates`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.fft import dctn

from fdjax.spec import LayerSpec, NetworkSpec, blocks

# What is left of a block at the least.
_FEWEST = 1
_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a convolution whose filters may go.

    Attributes:
      kernel: [window, window, C, D].
      maps: [n, H, W, D], its output on n calibration images, after batch norm and ReLU.
      contributions: [samples, D], what each of its filters contributes to sampled values of the next layer's output.
    """

    kernel: np.ndarray
    maps: np.ndarray
    contributions: np.ndarray


def l1_scores(measured: Measured) -> np.ndarray:
    """[D]: the sum of a filter's absolute weights (Li et al. 2017, "Pruning Filters for Efficient ConvNets")."""
    return np.abs(measured.kernel).sum(axis=(0, 1, 2))


def dct_scores(measured: Measured) -> np.ndarray:
    """[D]: the mean over images of the sum of absolute DCT coefficients of a filter's map, transformed as a whole.

    Orthonormal, so that a map whose energy is spread over many frequencies scores higher than one that is concentrated.
    """
    coefs = np.asarray(dctn(measured.maps, axes=(1, 2), norm="ortho"))
    return np.abs(coefs).sum(axis=(1, 2)).mean(axis=0)


def haar(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One level of the orthonormal Haar transform: [H, W, D] -> low band [h*w, D], high bands [3*h*w, D].

    An odd last row or column is repeated.
    """
    height, width = maps.shape[:2]
    maps = np.pad(maps, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    a, b, c, d = (maps[i::2, j::2] for i in (0, 1) for j in (0, 1))
    low, *high = ((a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
    channels = maps.shape[-1]
    return low.reshape(-1, channels), np.stack(high).reshape(-1, channels)


def wavelet_scores(measured: Measured) -> np.ndarray:
    """[D]: how little a filter's mean output map resembles the others of its layer, in 0..1.

    FPWT, reconstructed from its abstract, as no more of it is at hand: one level of the Haar transform of each filter's
    mean map; the mean cosine similarity to the layer's other maps in the low band and in the high bands, weighted by
    each band's share of the map's energy. A filter that resembles the others is unimportant.
    """
    bands = haar(np.asarray(measured.maps, np.float64).mean(axis=0))
    filters = bands[0].shape[1]
    energies = np.stack([np.square(band).sum(axis=0) for band in bands])
    shares = energies / np.maximum(energies.sum(axis=0), np.finfo(float).tiny)
    resembles = np.zeros(filters)
    for band, share in zip(bands, shares, strict=True):
        directions = band / np.maximum(np.linalg.norm(band, axis=0), np.finfo(float).tiny)
        similarity = np.abs(directions.T @ directions)
        others = (similarity.sum(axis=1) - np.diag(similarity)) / max(1, filters - 1)
        resembles += share * others
    # A filter whose map is nothing tells nothing apart.
    return np.where(energies.sum(axis=0) > 0, 1 - resembles, 0.0)


def reconstruction_scores(measured: Measured) -> np.ndarray:
    """[D]: the order in which filters go, 0 first, so that the next layer's output changes least.

    ThiNet's greedy rule (Luo et al. 2017): to the removed filters is added, one by one, that for which the sum of the
    removed contributions has the least squares over the samples. Weights are not rescaled afterwards; refinement does
    more.
    """
    contributions = np.asarray(measured.contributions, np.float64)
    products = contributions.T @ contributions
    filters = len(products)
    scores, removed = np.zeros(filters), np.zeros(filters, bool)
    # The squares of the sum of all removed, and what adding a filter to it adds.
    crossed = np.zeros(filters)
    for place in range(filters):
        added = np.diag(products) + 2 * crossed
        chosen = int(np.argmin(np.where(removed, np.inf, added)))
        scores[chosen], removed[chosen] = place, True
        crossed += products[:, chosen]
    return scores


METHODS: Mapping[str, Callable[[Measured], np.ndarray]] = {
    "l1": l1_scores,
    "dct": dct_scores,
    "fpwt": wavelet_scores,
    "thinet": reconstruction_scores,
}


def prunable(spec: NetworkSpec) -> dict[str, tuple[LayerSpec, ...]]:
    """Block name -> the convolutions whose filters go together in number: those inside of a ResNet's blocks.

    Raises:
      ValueError: a network that has none, or with groups.
    """
    found = {}
    for name, roles in blocks(spec).items():
        if "conv1" in roles:
            inner = ("conv1", "conv2") if "conv3" in roles else ("conv1",)
            found[name] = tuple(roles[role] for role in inner)
    if not found:
        instead = ": prune its channels (method channel)" if spec.mask_sizes else ""
        raise ValueError(f"filter pruning is for ResNets, which {spec.name} is not{instead}")
    if any(layer.groups > 1 for layers in found.values() for layer in layers):
        raise ValueError(f"filter pruning is for convolutions without groups, and {spec.name} has groups")
    return found


def block_macs(spec: NetworkSpec, name: str, filters: int) -> int:
    """Dense MACs of a block whose inner maps have so many channels, shortcut included."""
    roles, total = blocks(spec)[name], 0
    inner = {layer.name for layer in prunable(spec)[name]}
    for role, layer in roles.items():
        channels, features = layer.in_channels, layer.out_channels
        features = filters if layer.name in inner else features
        channels = filters if role != "shortcut" and role != "conv1" else channels
        total += dataclasses.replace(layer, in_channels=channels, out_channels=features).dense_macs
    return total


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` filters with the highest scores, ascending by number; of equals the first."""
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count])


def rates(filters: int, steps: int = 8) -> tuple[int, ...]:
    """Numbers of filters that a block may be left with: 1/steps, 2/steps .. of them, rounded, at least one."""
    return tuple(sorted({max(_FEWEST, round(filters * step / steps)) for step in range(1, steps + 1)}))


def one_share(spec: NetworkSpec, target: float) -> dict[str, int]:
    """Filters left in each block, the same share of all, so that the network comes nearest to `target`.

    Args:
      spec: the network.
      target: MACs over the network's, 0 to 1.

    Raises:
      ValueError: no share reaches the target; the message says the lowest.
    """
    widths = {name: layers[0].out_channels for name, layers in prunable(spec).items()}

    def at(share: float) -> dict[str, int]:
        return {name: max(_FEWEST, round(share * width)) for name, width in widths.items()}

    _check_reach(spec, target, at(0.0))
    # The number of filters steps at these shares only.
    shares = sorted({(count + 0.5) / width for width in set(widths.values()) for count in range(width)} | {1.0})
    return min((at(np.nextafter(share, 0)) for share in shares), key=lambda left: abs(_ratio(spec, left) - target))


def choose_rates(spec: NetworkSpec, losses: Mapping[str, Sequence[float]], target: float) -> dict[str, int]:
    """Filters left in each block, so that the sum of losses is least for what the network costs.

    One price for MACs, found by halving; every block takes the rate that minimises its loss plus the price of its MACs.

    Args:
      spec: the network.
      losses: block name -> what the network loses (in any unit) with only that block pruned, at each of `rates` of its
        filters, in order.
      target: MACs over the network's, 0 to 1; the result is at most that.

    Raises:
      ValueError: no choice reaches the target; the message says the lowest.
    """
    accepted = {name: rates(layers[0].out_channels) for name, layers in prunable(spec).items()}
    macs = {name: np.array([block_macs(spec, name, count) for count in counts]) for name, counts in accepted.items()}
    _check_reach(spec, target, {name: counts[0] for name, counts in accepted.items()})
    total = sum(layer.dense_macs for layer in spec.counted_layers)

    def at(price: float) -> dict[str, int]:
        left = {}
        for name, counts in accepted.items():
            cost = np.asarray(losses[name], np.float64) + price * macs[name] / total
            # Of equals the most filters.
            left[name] = counts[len(counts) - 1 - int(np.argmin(cost[::-1]))]
        return left

    low, high = 0.0, 1.0
    while _ratio(spec, at(high)) > target:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _ratio(spec, at(middle)) > target else (low, middle)
    return at(high)


def _ratio(spec: NetworkSpec, left: Mapping[str, int]) -> float:
    total = sum(layer.dense_macs for layer in spec.counted_layers)
    saved = sum(block_macs(spec, name, prunable(spec)[name][0].out_channels) for name in left)
    return (total - saved + sum(block_macs(spec, name, count) for name, count in left.items())) / total


def _check_reach(spec: NetworkSpec, target: float, fewest: Mapping[str, int]) -> None:
    lowest = _ratio(spec, fewest)
    if target < lowest:
        raise ValueError(
            f"filter pruning of {spec.name} can come down to {lowest:.3f}x of the MACs, not to {target:g}x: one filter "
            "stays in each block, and the maps between blocks keep all their channels"
        )


def keep_filters(
    spec: NetworkSpec, variables: Mapping[str, Mapping], kept: Mapping[str, np.ndarray]
) -> dict[str, dict]:
    """Variables of the network with only these filters.

    Args:
      spec: of the network before.
      variables: its collections `params` and `batch_stats`, nested dicts of arrays.
      kept: name of each convolution of `prunable` -> the filters that stay, ascending.

    Returns:
      The two collections; arrays that nothing was removed of are the same objects.
    """

    def copied(tree: Mapping) -> dict:
        return {key: copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}

    shrunk = {name: copied(variables[name]) for name in ("params", "batch_stats")}
    for name, layers in prunable(spec).items():
        for number, layer in enumerate(layers, 1):
            stays = kept[layer.name]
            own, after = shrunk["params"][name][f"conv{number}"], shrunk["params"][name][f"conv{number + 1}"]
            own["kernel"] = own["kernel"][..., stays]
            after["kernel"] = after["kernel"][..., stays, :]
            for collection in shrunk.values():
                norm = collection[name][f"conv{number}_norm"]
                collection[name][f"conv{number}_norm"] = {key: value[stays] for key, value in norm.items()}
    return shrunk
