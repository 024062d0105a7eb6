"""Channel graphs of the networks that come with fdjax, with the masks that their modules have."""

from __future__ import annotations

import dataclasses
from typing import Any

from fdjax.config import LearnConfig
from fdjax.graph.masks import MaskedGraph
from fdjax.training.network import trace_network
from fdjax.zoo import FrequencyNetwork


def learn_of(module: FrequencyNetwork) -> LearnConfig:
    """The mask settings of a module, as a config has them."""
    blocks: dict[str, Any] = {
        name: tuple((getattr(module, name) or {}).items()) for name in ("block_by_map", "block_by_layer")
    }
    tied = getattr(module, "tied", False)
    return LearnConfig(block=module.block, sides=module.sides, tied=tied, **blocks)  # type: ignore[arg-type]


def network_for(
    module: FrequencyNetwork, input_shape: tuple[int, int, int], count_classifier: bool = False, **facts: Any
) -> MaskedGraph:
    """The channel graph of a module for images (H, W, C); `facts` are fields of `MaskedGraph`."""
    graph = trace_network(module, input_shape, learn_of(module), count_classifier=count_classifier)
    return dataclasses.replace(graph, **facts)
