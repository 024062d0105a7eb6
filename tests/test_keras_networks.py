"""Networks of Keras Applications with seeded random weights: traced, counted, masked, frozen, and written as ONNX."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")

NETWORKS = (
    "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "Xception", "ResNet50", "DenseNet121", "ConvNeXtTiny",
    "NASNetMobile",
)  # fmt: skip
MASKS = ("channels", "0, 1, N in blocks of 2", "untied, blocks of 2")
pytestmark = pytest.mark.slow


@functools.cache
def benchmark() -> Any:
    pytest.importorskip("onnxruntime")
    keras = pytest.importorskip("keras")
    if keras.config.backend() != "jax":
        pytest.skip(f"Keras is on {keras.config.backend()} here")
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        return importlib.import_module("keras_networks")
    finally:
        sys.path.pop(0)


@functools.lru_cache(maxsize=1)
def traced(name: str) -> Any:
    return benchmark().trace(name, benchmark().NETWORKS[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_has_the_macs_of_keras_list_of_layers_and_is_the_model(name: str) -> None:
    network = traced(name)
    assert network.macs == network.listed_macs
    assert all(layer.dense_macs > 0 for layer in network.graph.layers.values())
    images = network.images[:1]
    (found,) = jax.jit(lambda v, x: network.graph.operations.evaluate(v, x))(network.variables, images)
    expected = np.asarray(jax.jit(network.apply)(network.variables, images))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_is_masked_also_in_onnx_runtime(name: str, masks: str) -> None:
    compared = benchmark().compare(traced(name), benchmark().MASKS[masks])
    assert compared.frozen < 1e-4 and compared.onnx < 1e-4
    assert compared.ratio < 0.8
