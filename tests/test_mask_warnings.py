"""The warnings about learned masks say what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fdjax.config import LearnConfig
from fdjax.training.mask_warnings import mask_warnings


def macs(ratio: float) -> Any:
    return cast("Any", SimpleNamespace(ratio=ratio, paper_ratio=ratio, layers=()))


@pytest.mark.parametrize("ratio", [0.5, 0.491, 0.509])
def test_a_target_that_is_met_gets_no_warning(ratio: float) -> None:
    assert mask_warnings(LearnConfig(target_macs=0.5), macs(ratio)) == []


@pytest.mark.parametrize(("ratio", "advised"), [(0.222, True), (0.7, False)])
def test_masks_below_the_target_are_to_be_learned_otherwise(ratio: float, advised: bool) -> None:
    (said,) = mask_warnings(LearnConfig(target_macs=0.5), macs(ratio))
    assert f"{ratio:.3f}x" in said and ("learn.approach aim" in said) == advised
