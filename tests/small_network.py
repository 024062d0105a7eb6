"""The spec of a small network: what several test files count and prune."""

from __future__ import annotations

from fdjax.spec import NetworkSpec

from fdjax.zoo import MobileNet


def small(**settings) -> NetworkSpec:
    """14x14 maps in 2x2 blocks and 7x7 maps in one, unless `settings` say otherwise."""
    return MobileNet("mobilenetv2_small", 10, **{"block": 2, "block_by_map": {7: 7}, **settings}).spec((28, 28, 1))
