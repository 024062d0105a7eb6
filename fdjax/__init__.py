"""fdjax: dense pruning of pointwise convolutions in the frequency domain.

`import fdjax` offers the pure functions of `fdjax.ops`. They are loaded on first use (PEP 562), so that
`fdjax.runtime` can set up the process before jax is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
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

__all__ = [
    "BandPlan",
    "banded_pointwise",
    "block_dct",
    "block_idct",
    "coef_mask",
    "dct_basis",
    "dense_pointwise",
    "depthwise_conv",
    "expected_pointwise_macs",
    "fcmask_penalty",
    "hard_coef_mask",
    "kept_counts",
    "masked_pointwise",
    "plan_bands",
    "pointwise_macs",
    "zigzag_order",
]


def __getattr__(name: str):
    if name in __all__:
        from fdjax import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'fdjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
