"""Networks of Keras Applications, with seeded random weights: traced, masked, counted, frozen; a table in Markdown.

    python benchmarks/keras_networks.py MobileNetV2 ResNet50 --size 64 > table.md

Keras (3, on JAX) is needed. For each network and kind of masks: processor seconds of the trace, dense MACs, which share
of them lies in layers whose channels can be pruned, the MAC ratio of seeded hard masks, and the largest difference
between the frozen network and the masked model beside the largest output.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import jax
import numpy as np

import fdjax
from fdjax.graph.network import Graph

MASKS = {
    "channels": {},
    "0, 1, N in blocks of 2": {"block": 2, "levels": (0, 1)},
    "untied, blocks of 2": {"block": 2, "tied": False},
}


def model_of(name: str, size: int) -> tuple[Any, dict[str, np.ndarray]]:
    """`apply(variables, images)` of a network, and variables whose statistics are not 0 and 1."""
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

    def apply(variables: Any, images: Any) -> Any:
        trainable, others = (
            [variables[v.path] for v in of] for of in (model.trainable_variables, model.non_trainable_variables)
        )
        return model.stateless_call(trainable, others, images, training=False)[0]

    return apply, {variable.path: moved(variable) for variable in model.variables}


def prunable_share(graph: Graph) -> float:
    """The share of MACs in layers of which masks of whole channels take something away."""
    network = fdjax.with_masks(graph)
    layers = network.layers.values()
    masked = (of for of in layers if network.paths_of(of.name, "input") or network.paths_of(of.name, "output"))
    return sum(of.dense_macs for of in masked) / sum(of.dense_macs for of in layers)


def rows(name: str, size: int) -> list[str]:
    """The rows of one network."""
    apply, variables = model_of(name, size)
    start = time.process_time()
    graph = fdjax.trace(apply, variables, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
    macs = sum(layer.dense_macs for layer in graph.layers.values())
    seconds, share = time.process_time() - start, prunable_share(graph)
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    found = []
    for kind, settings in MASKS.items():
        network = fdjax.with_masks(graph, **settings)
        rng = np.random.default_rng(0)
        counts = {path: rng.choice(network.levels_of(path), n) for path, (n, _) in network.mask_sizes.items()}
        masked = np.asarray(jax.jit(fdjax.masked(apply, network))(counts, variables, images))
        difference = np.abs(fdjax.freeze(network, variables, counts)(images) - masked).max() / np.abs(masked).max()
        ratio = fdjax.count(network, counts).ratio
        cells = (f"{seconds:.1f} s", f"{macs / 1e6:.1f} M", f"{share:.0%}", kind, f"{ratio:.3f}x", f"{difference:.0e}")
        found.append(f"| {' | '.join((name, *cells))} |")
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", help="names in keras.applications")
    parser.add_argument("--size", type=int, default=96, help="side of the images in pixels")
    arguments = parser.parse_args()
    print(
        "| network | trace | dense MACs | prunable | masks | MACs | largest difference |\n|---|---|---|---|---|---|---|"
    )
    for name in arguments.networks:
        print("\n".join(rows(name, arguments.size)), flush=True)


if __name__ == "__main__":
    main()
