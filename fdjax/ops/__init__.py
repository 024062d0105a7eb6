"""The paper's mathematics as pure functions; needs jax, numpy and chex only."""

from fdjax.ops.bands import BandPlan, plan_bands
from fdjax.ops.dct import block_dct, block_idct, dct_basis, zigzag_order
from fdjax.ops.depthwise import depthwise_conv
from fdjax.ops.fcmask import coef_mask, fcmask_penalty, hard_coef_mask, kept_counts
from fdjax.ops.macs import expected_pointwise_macs, pointwise_macs
from fdjax.ops.pointwise import banded_pointwise, dense_pointwise, masked_pointwise

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
