"""Filter pruning: which filters between convolutions go, so that the network really shrinks, its 3x3 layers too.

Methods share one signature, (what was measured of a layer) -> a score for each of its filters, and differ by their
scores; the filters with the lowest scores of a block go first. A block here is a row of convolutions, each of which
alone reads what the one before it writes. What stays fixed is the map that runs from block to block: pruned are the
maps within.

How many filters a block loses is one share for all blocks, or chosen for each from what blocks lose when pruned
alone (`choose_rates`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.fft import dctn

from fdjax.graph.channel_rules import SEVERAL, UNARY
from fdjax.graph.masks import MaskedGraph
from fdjax.graph.network import Layer, Space

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


@functools.lru_cache(maxsize=16)
def prunable(network: MaskedGraph) -> Mapping[str, tuple[Layer, ...]]:
    """Block name -> the convolutions whose filters go together in number, in order.

    Their maps have one reader, also a convolution, and nothing but elementwise operations in between; one of the two
    has a window, and the first is not the network's first. A block is named after the module that holds it.

    Raises:
      ValueError: a network that has none, or with groups.
    """
    after = {
        space.writers[0]: network.layers[space.readers[0]]
        for space in network.spaces.values()
        if space.is_run and _prunable_space(network, space)
    }
    found: dict[str, tuple[Layer, ...]] = {}
    inside = set[str]()
    for name in after:
        row = [network.layers[name]]
        while row[-1].name in after and row[0].name not in inside:
            row.append(after[row[-1].name])
            inside.add(row[-1].name)
        if len(row) > 1:
            found[_module(row)] = tuple(row[:-1])
    if not found:
        instead = ": prune its channels (method channel)" if network.masks else ""
        raise ValueError(
            f"filter pruning removes maps between two convolutions, one of them with a window, that nothing else "
            f"reads, and {network.name} has none{instead}"
        )
    if any(layer.groups > 1 for layers in found.values() for layer in layers):
        raise ValueError(f"filter pruning is for convolutions without groups, and {network.name} has groups")
    return found


def _prunable_space(network: MaskedGraph, space: Space) -> bool:
    writer, reader = network.layers[space.writers[0]], network.layers[space.readers[0]]
    ends = (writer, reader)
    convolutions = all(layer.kind in ("conv", "pointwise") for layer in ends) and any(
        side > 1 for layer in ends for side in layer.window
    )
    first = writer.source is None or network.spaces[writer.source].pinned is not None
    read_in_order = np.array_equal(writer.writes, reader.reads)
    return convolutions and not first and read_in_order and _is_elementwise(network, space)


def _is_elementwise(network: MaskedGraph, space: Space) -> bool:
    """Whether all that is done to the maps of a run keeps every pixel by itself."""
    reader = network.layers[space.readers[0]].operation
    return all(
        network.operations.operations[index].kind in UNARY | SEVERAL
        for index in _operations_on(network, space)
        if index != reader
    )


def _operations_on(network: MaskedGraph, space: Space) -> list[int]:
    """The indices of the operations that take a value of a space."""
    walk, channels = network.walk, set(space.channels.tolist())
    found = []
    for index, operation in enumerate(network.operations.operations):
        lives = (walk.live[value].ids for value in operation.inputs if value in walk.live)
        if any(ids is not None and len(ids) and int(walk.classes.find(ids[:1])[0]) in channels for ids in lives):
            found.append(index)
    return found


def _module(layers: Sequence[Layer]) -> str:
    """The path of the module that holds layers, or the name of the first."""
    parts = [layer.name.split("/")[:-1] for layer in layers]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common) or layers[0].name


def reader_of(network: MaskedGraph, layer: Layer) -> Layer:
    """The layer that reads what a prunable convolution writes."""
    return network.layers[network.spaces[layer.target].readers[0]]


def block_macs(network: MaskedGraph, name: str, filters: int) -> int:
    """Dense MACs of a block whose maps have so many channels: its convolutions, and the one that reads the last map."""
    layers = prunable(network)[name]
    inner = {layer.name for layer in layers}
    total = 0
    for place, layer in enumerate((*layers, reader_of(network, layers[-1]))):
        features = filters if layer.name in inner else layer.out_channels
        channels = filters if place else layer.in_channels
        total += layer.dense_macs // (layer.in_channels * layer.out_channels) * channels * features
    return total


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """The `count` filters with the highest scores, ascending by number; of equals the first."""
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count])


def rates(filters: int, steps: int = 8) -> tuple[int, ...]:
    """Numbers of filters that a block may be left with: 1/steps, 2/steps .. of them, rounded, at least one."""
    return tuple(sorted({max(_FEWEST, round(filters * step / steps)) for step in range(1, steps + 1)}))


def one_share(network: MaskedGraph, target: float) -> dict[str, int]:
    """Filters left in each block, the same share of all, so that the network comes nearest to `target`.

    Args:
      network: the network.
      target: MACs over the network's, 0 to 1.

    Raises:
      ValueError: no share reaches the target; the message says the lowest.
    """
    widths = {name: layers[0].out_channels for name, layers in prunable(network).items()}

    def at(share: float) -> dict[str, int]:
        return {name: max(_FEWEST, round(share * width)) for name, width in widths.items()}

    _check_reach(network, target, at(0.0))
    # The number of filters steps at these shares only.
    shares = sorted({(count + 0.5) / width for width in set(widths.values()) for count in range(width)} | {1.0})
    return min((at(np.nextafter(share, 0)) for share in shares), key=lambda left: abs(_ratio(network, left) - target))


def choose_rates(network: MaskedGraph, losses: Mapping[str, Sequence[float]], target: float) -> dict[str, int]:
    """Filters left in each block, so that the sum of losses is least for what the network costs.

    One price for MACs, found by halving; every block takes the rate that minimises its loss plus the price of its MACs.

    Args:
      network: the network.
      losses: block name -> what the network loses (in any unit) with only that block pruned, at each of `rates` of its
        filters, in order.
      target: MACs over the network's, 0 to 1; the result is at most that.

    Raises:
      ValueError: no choice reaches the target; the message says the lowest.
    """
    accepted = {name: rates(layers[0].out_channels) for name, layers in prunable(network).items()}
    macs = {name: np.array([block_macs(network, name, count) for count in counts]) for name, counts in accepted.items()}
    _check_reach(network, target, {name: counts[0] for name, counts in accepted.items()})
    total = sum(layer.dense_macs for layer in network.counted_layers.values())

    def at(price: float) -> dict[str, int]:
        left = {}
        for name, counts in accepted.items():
            cost = np.asarray(losses[name], np.float64) + price * macs[name] / total
            # Of equals the most filters.
            left[name] = counts[len(counts) - 1 - int(np.argmin(cost[::-1]))]
        return left

    low, high = 0.0, 1.0
    while _ratio(network, at(high)) > target:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _ratio(network, at(middle)) > target else (low, middle)
    return at(high)


def _ratio(network: MaskedGraph, left: Mapping[str, int]) -> float:
    total = sum(layer.dense_macs for layer in network.counted_layers.values())
    saved = sum(block_macs(network, name, prunable(network)[name][0].out_channels) for name in left)
    return (total - saved + sum(block_macs(network, name, count) for name, count in left.items())) / total


def _check_reach(network: MaskedGraph, target: float, fewest: Mapping[str, int]) -> None:
    lowest = _ratio(network, fewest)
    if target < lowest:
        raise ValueError(
            f"filter pruning of {network.name} can come down to {lowest:.3f}x of the MACs, not to {target:g}x: one "
            "filter stays in each block, and the maps between blocks keep all their channels"
        )


def keep_filters(
    network: MaskedGraph, variables: Mapping[str, Mapping], kept: Mapping[str, np.ndarray]
) -> dict[str, dict]:
    """Variables of the network with only these filters.

    Args:
      network: as it was before.
      variables: its collections, nested dicts of arrays; kernels are [..., C, D].
      kept: name of each convolution of `prunable` -> the filters that stay, ascending.

    Returns:
      The collections that the graph reads; arrays that nothing was removed of are the same objects.

    Raises:
      ValueError: a variable along the channels of which it is not known where they lie in it.
    """
    paths = network.operations.variables.values()

    def copied(tree: Mapping) -> dict:
        return {key: copied(value) if isinstance(value, Mapping) else value for key, value in tree.items()}

    collections = dict.fromkeys(path.split("/")[0] for path in paths)
    shrunk = {name: copied(variables[name]) for name in collections if name in variables}

    def shrink(path: str, stays: np.ndarray, axis: int) -> None:
        *parents, leaf = path.split("/")
        tree: Any = functools.reduce(lambda tree, part: tree[part], parents, shrunk)
        tree[leaf] = np.take(np.asarray(tree[leaf]), stays, axis)

    for layers in prunable(network).values():
        for layer in layers:
            stays = kept[layer.name]
            shrink(_kernel(network, layer), stays, -1)
            shrink(_kernel(network, reader_of(network, layer)), stays, -2)
            for path in channel_variables(network, layer):
                shrink(path, stays, 0)
    return shrunk


def _kernel(network: MaskedGraph, layer: Layer) -> str:
    return next(mixing.kernel for mixing in network.walk.mixing if mixing.operation == layer.operation)


def channel_variables(network: MaskedGraph, layer: Layer) -> list[str]:
    """The paths of the vectors [D] that act on what a prunable convolution writes, such as those of its batch norm.

    Raises:
      ValueError: a variable that acts on it and is no such vector.
    """
    operations, walk = network.operations, network.walk
    kernel = operations.operations[layer.operation].inputs
    space = network.spaces[layer.target]
    reader = reader_of(network, layer).operation
    seen = [value for value in kernel if value not in walk.live]
    for index in _operations_on(network, space):
        if index != reader:
            seen += [value for value in operations.operations[index].inputs if value not in walk.live]
    made_by = {value: operation for operation in operations.operations for value in operation.outputs}
    found, known = [], set[int]()
    while seen:
        value = seen.pop()
        if value in known:
            continue
        known.add(value)
        if value in made_by:
            seen += made_by[value].inputs
            continue
        path, shape = operations.variables.get(value), operations.shapes[value]
        if path is None or path == _kernel(network, layer) or not shape:
            continue
        if shape != (layer.out_channels,):
            raise ValueError(f"filters of {layer.name} cannot be removed: {path} acts on its maps and is no vector")
        found.append(path)
    return sorted(found)
