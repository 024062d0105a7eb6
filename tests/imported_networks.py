"""What tests of imports have in common: an imported network's logits beside torch's."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
import pytest

from fdjax.importers import convert
from fdjax.training.build import collection_of
from fdjax.zoo import FCMASK, FrequencyNetwork
from tests.graph_networks import network_for

torch = pytest.importorskip("torch", reason="torch is not installed")


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def imported_logits(
    network: FrequencyNetwork, tensors: Mapping[str, np.ndarray], source: str, images: np.ndarray, mode: str = "off"
) -> np.ndarray:
    """What the network with a file's weights says of images [B, H, W, C], its masks `mode`."""
    graph = network_for(network, images.shape[1:])
    variables = {
        **convert(tensors, source, network, graph, network.width),
        FCMASK: collection_of(graph, graph.full_counts()),
    }
    return np.asarray(jax.jit(network.clone(mode=mode).apply)(variables, images))


def torch_logits(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """What a torch module says of images [B, H, W, C]."""
    with torch.no_grad():
        return module(torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))).numpy()
