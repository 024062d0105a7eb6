"""Traces, masks, counts and freezes networks of Keras Applications with random weights; prints a table in Markdown.

    python benchmarks/keras_networks.py MobileNetV2 ResNet50 --size 64 > table.md

It needs Keras 3 (on JAX) and ONNX Runtime. For each network and kind of masks it prints the processor seconds of the
trace, the dense MACs (checked against a count by Keras' own list of layers), the share of MACs in layers whose channels
can be pruned, the MAC ratio of random hard masks, and the largest difference of the frozen network, in JAX and in ONNX
Runtime, from the masked model, over the largest output.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np

import fdjax
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.graph.network import Graph

# Network -> side of the smallest images that are tried, in pixels.
NETWORKS = {
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "Xception": 71,
    "ResNet50": 64,
    "DenseNet121": 64,
    "ConvNeXtTiny": 64,
    "NASNetMobile": 64,
}
MASKS: dict[str, dict[str, Any]] = {
    "channels": {},
    "0, 1, N in blocks of 2": {"block": 2, "levels": (0, 1)},
    "untied, blocks of 2": {"block": 2, "tied": False},
}
Apply = Callable[[Mapping[str, Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced network.

    Attributes:
      apply: `apply(variables, images)`.
      variables: the variables, by path.
      images: two images.
      graph: the network's channel graph.
      seconds: processor time of the trace.
      listed_macs: MACs by Keras' own list of layers.
    """

    apply: Apply
    variables: dict[str, np.ndarray]
    images: np.ndarray
    graph: Graph
    seconds: float
    listed_macs: int

    @property
    def macs(self) -> int:
        """MACs of the graph."""
        return sum(layer.dense_macs for layer in self.graph.layers.values())


@dataclasses.dataclass(frozen=True)
class Compared:
    """A network with hard masks: its MAC ratio, and differences from the masked model over the largest output."""

    ratio: float
    frozen: float
    onnx: float


def model_of(name: str, size: int) -> tuple[Any, Apply, dict[str, np.ndarray]]:
    """Returns a Keras model, the function `apply(variables, images)`, and variables with random statistics."""
    import keras

    keras.utils.set_random_seed(0)
    make = getattr(keras.applications, name)
    model = make(weights=None, input_shape=(size, size, 3), classes=10, classifier_activation=None)
    rng = np.random.default_rng(1)

    def moved(variable: Any) -> np.ndarray:
        array = np.asarray(variable.value)
        if array.ndim > 1 or array.dtype != np.float32:
            return array
        positive = any(part in variable.path for part in ("variance", "gamma"))
        return array + (rng.uniform if positive else rng.normal)(size=array.shape).astype(np.float32) * np.float32(0.2)

    def apply(variables: Mapping[str, Any], images: Any) -> Any:
        trainable, others = (
            [variables[v.path] for v in of] for of in (model.trainable_variables, model.non_trainable_variables)
        )
        return model.stateless_call(trainable, others, images, training=False)[0]

    return model, apply, {variable.path: moved(variable) for variable in model.variables}


def listed_macs(model: Any) -> int:
    """Counts MACs by Keras' own list of layers: the size of each kernel times the number of output pixels."""
    kinds, total = ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "Dense"), 0
    for layer in model.layers:
        if type(layer).__name__ in ("Sequential", "Functional"):
            total += listed_macs(layer)
        elif type(layer).__name__ in kinds:
            pixels = math.prod(layer.output.shape[1:-1])
            total += pixels * sum(math.prod(weight.shape) for weight in layer.weights if len(weight.shape) > 1)
    return total


def trace(name: str, size: int) -> Traced:
    """Traces a network."""
    model, apply, variables = model_of(name, size)
    start = time.process_time()
    graph = fdjax.trace(apply, variables, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
    seconds = time.process_time() - start
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    return Traced(apply, variables, images, graph, seconds, listed_macs(model))


def compare(traced: Traced, settings: Mapping[str, Any], seed: int = 0) -> Compared:
    """Masks a network by random kept counts, and freezes it; `settings` are those of `with_masks`."""
    network = fdjax.with_masks(traced.graph, **settings)
    rng = np.random.default_rng(seed)
    counts = {path: rng.choice(network.levels_of(path), n) for path, (n, _) in network.mask_sizes.items()}
    masked = np.asarray(jax.jit(fdjax.masked(traced.apply, network))(counts, traced.variables, traced.images))
    frozen = fdjax.freeze(network, traced.variables, counts)
    program, arrays = frozen.frozen.program, frozen.frozen.arrays
    made = (frozen(traced.images), onnxruntime_session(to_onnx(program, arrays))(traced.images))
    differences = (float(np.abs(np.asarray(one) - masked).max() / np.abs(masked).max()) for one in made)
    return Compared(fdjax.count(network, counts).ratio, *differences)


def prunable_share(graph: Graph) -> float:
    """Returns the share of MACs in layers whose MACs masks of whole channels can lower."""
    network = fdjax.with_masks(graph)
    layers = network.layers.values()
    masked = (of for of in layers if network.paths_of(of.name, "input") or network.paths_of(of.name, "output"))
    return sum(of.dense_macs for of in masked) / sum(of.dense_macs for of in layers)


def rows(name: str, size: int, seeds: int) -> list[str]:
    """Makes the rows of one network, with the largest differences over `seeds` draws of masks."""
    traced = trace(name, size)
    if traced.macs != traced.listed_macs:
        raise SystemExit(f"{name}: {traced.macs} MACs in the graph, {traced.listed_macs} by Keras' list of layers")
    share, found = prunable_share(traced.graph), []
    for kind, settings in MASKS.items():
        drawn = [compare(traced, settings, seed) for seed in range(seeds)]
        ratio, frozen, onnx = drawn[0].ratio, max(of.frozen for of in drawn), max(of.onnx for of in drawn)
        cells = (f"{traced.seconds:.1f} s", f"{traced.macs / 1e6:.1f} M", f"{share:.0%}", kind, f"{ratio:.3f}x")
        found.append(f"| {' | '.join((f'{name}, {size}', *cells, f'{frozen:.0e}', f'{onnx:.0e}'))} |")
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="names in keras.applications")
    parser.add_argument("--size", type=int, help="side of the images in pixels (default: the smallest tried)")
    parser.add_argument("--seeds", type=int, default=1, help="number of draws of masks (default: 1)")
    arguments = parser.parse_args()
    print("| network, pixels | trace | dense MACs | prunable | masks | MACs | frozen | in ONNX Runtime |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.networks:
        print("\n".join(rows(name, arguments.size or NETWORKS.get(name, 96), arguments.seeds)), flush=True)


if __name__ == "__main__":
    main()
