"""fdjax: dense pruning of pointwise convolutions in the frequency domain.

`import fdjax` offers the pure functions of `fdjax.ops`, and functions that mask, count, harden and freeze any JAX
model. They are loaded on first use (PEP 562), so that `fdjax.runtime` can set up the process before jax is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fdjax.frozen.artifact import freeze_network as freeze
    from fdjax.frozen.artifact import load
    from fdjax.graph.counting import network_macs as count
    from fdjax.graph.fast_convolutions import fast_convolutions
    from fdjax.graph.network import trace
    from fdjax.graph.placing import init_fcmask, with_masks
    from fdjax.onnx.network import from_onnx
    from fdjax.ops import (
        BandPlan,
        banded_pointwise,
        block_dct,
        block_idct,
        coef_mask,
        dct_basis,
        dense_pointwise,
        depthwise_conv,
        expected_pointwise_macs,
        fcmask_penalty,
        hard_coef_mask,
        kept_counts,
        masked_pointwise,
        plan_bands,
        pointwise_macs,
        zigzag_order,
    )
    from fdjax.pruning.expected import expected_macs, expected_ratio
    from fdjax.pruning.harden import harden
    from fdjax.pruning.masked import masked

# Functions for any model -> (the module that defines it, its name there).
_OF_MODELS = {
    "count": ("fdjax.graph.counting", "network_macs"),
    "expected_macs": ("fdjax.pruning.expected", "expected_macs"),
    "expected_ratio": ("fdjax.pruning.expected", "expected_ratio"),
    "fast_convolutions": ("fdjax.graph.fast_convolutions", "fast_convolutions"),
    "freeze": ("fdjax.frozen.artifact", "freeze_network"),
    "from_onnx": ("fdjax.onnx.network", "from_onnx"),
    "harden": ("fdjax.pruning.harden", "harden"),
    "init_fcmask": ("fdjax.graph.placing", "init_fcmask"),
    "load": ("fdjax.frozen.artifact", "load"),
    "masked": ("fdjax.pruning.masked", "masked"),
    "trace": ("fdjax.graph.network", "trace"),
    "with_masks": ("fdjax.graph.placing", "with_masks"),
}

__all__ = [
    "BandPlan",
    "banded_pointwise",
    "block_dct",
    "block_idct",
    "coef_mask",
    "count",
    "dct_basis",
    "dense_pointwise",
    "depthwise_conv",
    "expected_macs",
    "expected_pointwise_macs",
    "expected_ratio",
    "fast_convolutions",
    "fcmask_penalty",
    "freeze",
    "from_onnx",
    "hard_coef_mask",
    "harden",
    "init_fcmask",
    "kept_counts",
    "load",
    "masked",
    "masked_pointwise",
    "plan_bands",
    "pointwise_macs",
    "trace",
    "with_masks",
    "zigzag_order",
]


def __getattr__(name: str):
    if name in _OF_MODELS:
        module, attribute = _OF_MODELS[name]
        return getattr(importlib.import_module(module), attribute)
    if name in __all__:
        from fdjax import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'fdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
