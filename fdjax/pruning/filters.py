"""Filter pruning: removes filters between convolutions, so that the network really shrinks, including its 3x3 layers.

All methods have one signature, from what was measured of a layer to a score per filter, and differ only in their
scores. The filters of a block with the lowest scores are removed first. A block here is a chain of convolutions, each
of which is the only reader of the one before it. The maps within blocks are pruned; the map that runs from block to
block stays.

The number of filters that a block loses is one share for all blocks, or is chosen per block from what the network loses
when that block alone is pruned (`choose_rates`).
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.fft import dctn

from fdjax.graph.channel_rules import SEVERAL, UNARY
from fdjax.graph.masks import MaskedGraph
from fdjax.graph.network import Layer, Space

# The least number of filters that a block keeps.
_FEWEST = 1
_HALVINGS = 60


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a convolution whose filters may be removed.

    Attributes:
      kernel: [window, window, C, D].
      maps: [n, H, W, D], its output on n calibration images, after batch norm and ReLU.
      contributions: [samples, D], each filter's contribution to sampled values of the next layer's output.
    """

    kernel: np.ndarray
    maps: np.ndarray
    contributions: np.ndarray


def l1_scores(measured: Measured) -> np.ndarray:
    """Scores a filter by the sum of its absolute weights (Li et al. 2017, "Pruning Filters for Efficient ConvNets").

    Args:
      measured: the layer; its `kernel` is used.

    Returns:
      [D], 0 or more.
    """
    return np.abs(measured.kernel).sum(axis=(0, 1, 2))


def dct_scores(measured: Measured) -> np.ndarray:
    """Scores a filter by the sum of absolute DCT coefficients of its whole map, averaged over images.

    The transform is orthonormal, so a map with its energy spread over many frequencies scores higher than one with
    concentrated energy.

    Args:
      measured: the layer; its `maps` are used.

    Returns:
      [D], 0 or more.
    """
    coefs = np.asarray(dctn(measured.maps, axes=(1, 2), norm="ortho"))
    return np.abs(coefs).sum(axis=(1, 2)).mean(axis=0)


def haar(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes one level of the orthonormal Haar transform; an odd last row or column is repeated.

    Args:
      maps: [H, W, D].

    Returns:
      The low band [h*w, D] and the high bands [3*h*w, D], with h = ceil(H/2) and w = ceil(W/2).
    """
    height, width = maps.shape[:2]
    maps = np.pad(maps, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    a, b, c, d = (maps[i::2, j::2] for i in (0, 1) for j in (0, 1))
    low, *high = ((a + b + c + d) / 2, (a - b + c - d) / 2, (a + b - c - d) / 2, (a - b - c + d) / 2)
    channels = maps.shape[-1]
    return low.reshape(-1, channels), np.stack(high).reshape(-1, channels)


def wavelet_scores(measured: Measured) -> np.ndarray:
    """Scores a filter by how little its mean output map resembles the other maps of its layer.

    This is FPWT, reconstructed from its abstract, because the full text was not available. One level of the Haar
    transform is applied to each filter's mean map. The resemblance is the mean cosine similarity to the layer's other
    maps in the low band and in the high bands, weighted by each band's share of the map's energy. A filter that
    resembles the others is unimportant.

    Args:
      measured: the layer; its `maps` are used.

    Returns:
      [D] in [0, 1].
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
    # A filter whose map is zero carries no information.
    return np.where(energies.sum(axis=0) > 0, 1 - resembles, 0.0)


def reconstruction_scores(measured: Measured) -> np.ndarray:
    """Ranks filters in the order of removal that changes the next layer's output least.

    This is ThiNet's greedy rule (Luo et al. 2017): each step removes the filter for which the sum of all removed
    contributions has the smallest squares over the samples. Weights are not rescaled afterwards; refinement does more.

    Args:
      measured: the layer; its `contributions` are used.

    Returns:
      [D], the rank of each filter, where 0 is removed first.
    """
    contributions = np.asarray(measured.contributions, np.float64)
    products = contributions.T @ contributions
    filters = len(products)
    scores, removed = np.zeros(filters), np.zeros(filters, bool)
    # The squared sum of all removed contributions, and what each further filter adds to it.
    crossed = np.zeros(filters)
    for place in range(filters):
        added = np.diag(products) + 2 * crossed
        chosen = int(np.argmin(np.where(removed, np.inf, added)))
        scores[chosen], removed[chosen] = place, True
        crossed += products[:, chosen]
    return scores


def random_scores(measured: Measured) -> np.ndarray:
    """Draws a score for every filter: the baseline that a criterion has to beat.

    Args:
      measured: the layer; the bytes of its `kernel` seed the draw, so that a layer has the same scores each time.

    Returns:
      [D], a permutation of 0 .. D - 1.
    """
    kernel = np.asarray(measured.kernel, np.float64)
    return np.random.default_rng(zlib.crc32(kernel.tobytes())).permutation(kernel.shape[-1]).astype(np.float64)


METHODS: Mapping[str, Callable[[Measured], np.ndarray]] = {
    "l1": l1_scores,
    "dct": dct_scores,
    "fpwt": wavelet_scores,
    "thinet": reconstruction_scores,
    "random": random_scores,
}


@functools.lru_cache(maxsize=16)
def prunable(network: MaskedGraph) -> Mapping[str, tuple[Layer, ...]]:
    """Finds the blocks whose filters can be pruned.

    Within a block, each map has one reader, also a convolution, and only elementwise operations in between. One of the
    two convolutions has a window, and the first is not the network's first.

    Args:
      network: the graph with its masks.

    Returns:
      Block name -> its convolutions whose filters are removed together in number, in order. A block is named after the
      module that holds it.

    Raises:
      ValueError: the network has no such block, or has groups.
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
        instead = "; prune its channels instead (method channel)" if network.masks else ""
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
    """Returns whether all operations on the maps of a run act on each pixel separately."""
    reader = network.layers[space.readers[0]].operation
    return all(
        network.operations.operations[index].kind in UNARY | SEVERAL
        for index in _operations_on(network, space)
        if index != reader
    )


def _operations_on(network: MaskedGraph, space: Space) -> list[int]:
    """Returns the indices of the operations that read a value of a space."""
    walk, channels = network.walk, set(space.channels.tolist())
    found = []
    for index, operation in enumerate(network.operations.operations):
        lives = (walk.live[value].ids for value in operation.inputs if value in walk.live)
        if any(ids is not None and len(ids) and int(walk.classes.find(ids[:1])[0]) in channels for ids in lives):
            found.append(index)
    return found


def _module(layers: Sequence[Layer]) -> str:
    """Returns the path of the module that holds the layers, or the name of the first layer."""
    parts = [layer.name.split("/")[:-1] for layer in layers]
    common = []
    for names in zip(*parts, strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "/".join(common) or layers[0].name


def reader_of(network: MaskedGraph, layer: Layer) -> Layer:
    """Returns the layer that reads the output of a prunable convolution."""
    return network.layers[network.spaces[layer.target].readers[0]]


def block_macs(network: MaskedGraph, name: str, filters: int) -> int:
    """Counts the dense MACs of a block with `filters` channels, including the layer that reads its last map."""
    layers = prunable(network)[name]
    inner = {layer.name for layer in layers}
    total = 0
    for place, layer in enumerate((*layers, reader_of(network, layers[-1]))):
        features = filters if layer.name in inner else layer.out_channels
        channels = filters if place else layer.in_channels
        total += layer.dense_macs // (layer.in_channels * layer.out_channels) * channels * features
    return total


def strongest(scores: np.ndarray, count: int) -> np.ndarray:
    """Returns the filters with the highest scores; of equal scores, the first.

    Args:
      scores: [D].
      count: how many filters to return, 0 to D.

    Returns:
      int [count], in ascending order.
    """
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count])


def rates(filters: int, steps: int = 8) -> tuple[int, ...]:
    """Returns the numbers of filters that a block may keep: 1/steps, 2/steps .. of them, rounded, and at least one."""
    return tuple(sorted({max(_FEWEST, round(filters * step / steps)) for step in range(1, steps + 1)}))


def one_share(network: MaskedGraph, target: float) -> dict[str, int]:
    """Chooses the number of filters that each block keeps: the one share of all that comes nearest to the target.

    Args:
      network: the graph with its masks.
      target: MACs over the unpruned network's, 0 to 1.

    Returns:
      Block name -> number of filters.

    Raises:
      ValueError: no share reaches the target; the message gives the lowest ratio.
    """
    widths = {name: layers[0].out_channels for name, layers in prunable(network).items()}

    def at(share: float) -> dict[str, int]:
        return {name: max(_FEWEST, round(share * width)) for name, width in widths.items()}

    _check_reach(network, target, at(0.0))
    # The number of filters changes at these shares only.
    shares = sorted({(count + 0.5) / width for width in set(widths.values()) for count in range(width)} | {1.0})
    return min((at(np.nextafter(share, 0)) for share in shares), key=lambda left: abs(_ratio(network, left) - target))


def choose_rates(network: MaskedGraph, losses: Mapping[str, Sequence[float]], target: float) -> dict[str, int]:
    """Chooses the number of filters that each block keeps, so that the sum of losses is least for the network's MACs.

    Every block takes the rate that minimises its loss plus a price times its MACs. Bisection finds the price, which is
    the same for all blocks.

    Args:
      network: the graph with its masks.
      losses: block name -> the network's loss, in any unit, with only that block pruned, at each of the `rates` of its
        filters, in order.
      target: MACs over the unpruned network's, 0 to 1; the result does not exceed it.

    Returns:
      Block name -> number of filters.

    Raises:
      ValueError: no choice reaches the target; the message gives the lowest ratio.
    """
    accepted = {name: rates(layers[0].out_channels) for name, layers in prunable(network).items()}
    macs = {name: np.array([block_macs(network, name, count) for count in counts]) for name, counts in accepted.items()}
    _check_reach(network, target, {name: counts[0] for name, counts in accepted.items()})
    total = network.dense_macs

    def at(price: float) -> dict[str, int]:
        left = {}
        for name, counts in accepted.items():
            cost = np.asarray(losses[name], np.float64) + price * macs[name] / total
            # Among equal costs, the most filters.
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
    total = network.dense_macs
    saved = sum(block_macs(network, name, prunable(network)[name][0].out_channels) for name in left)
    return (total - saved + sum(block_macs(network, name, count) for name, count in left.items())) / total


def _check_reach(network: MaskedGraph, target: float, fewest: Mapping[str, int]) -> None:
    lowest = _ratio(network, fewest)
    if target < lowest:
        raise ValueError(
            f"filter pruning of {network.name} can reach {lowest:.3f}x of the MACs, not {target:g}x: one filter stays "
            "in each block, and the maps between blocks keep all their channels"
        )


def keep_filters(
    network: MaskedGraph, variables: Mapping[str, Mapping], kept: Mapping[str, np.ndarray]
) -> dict[str, dict]:
    """Removes all filters but those given from the variables.

    Args:
      network: the network before removal.
      variables: its collections, nested dicts of arrays; kernels are [..., C, D].
      kept: name of each convolution of `prunable` -> the filters to keep, in ascending order.

    Returns:
      The collections that the graph reads. Arrays that lose nothing are the same objects.

    Raises:
      ValueError: a variable acts on pruned channels, and its channel axis is unknown.
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
    """Finds the vectors [D] that act on the output of a prunable convolution, such as those of its batch norm.

    Args:
      network: the graph with its masks.
      layer: a convolution of `prunable`.

    Returns:
      The paths of the variables, sorted.

    Raises:
      ValueError: a variable acts on the output and is not such a vector.
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
            raise ValueError(
                f"filters of {layer.name} cannot be removed: {path} acts on its maps and is not a vector of channels"
            )
        found.append(path)
    return sorted(found)
