"""The warnings about learned masks say what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from fdjax.config import LearnConfig
from fdjax.training.mask_warnings import lost_warnings, mask_warnings
from fdjax.training.phases import Phase


def macs(ratio: float) -> Any:
    return cast("Any", SimpleNamespace(ratio=ratio, paper_ratio=ratio, layers=()))


@pytest.mark.parametrize("ratio", [0.5, 0.491, 0.509])
def test_a_target_that_is_met_gets_no_warning(ratio: float) -> None:
    assert mask_warnings(LearnConfig(target_macs=0.5), macs(ratio)) == []


@pytest.mark.parametrize(("ratio", "advised"), [(0.222, True), (0.7, False)])
def test_masks_below_the_target_are_to_be_learned_otherwise(ratio: float, advised: bool) -> None:
    (said,) = mask_warnings(LearnConfig(target_macs=0.5), macs(ratio))
    assert f"{ratio:.3f}x" in said and ("learn.approach aim" in said) == advised
    (said,) = mask_warnings(LearnConfig(target_macs=0.5, approach="aim"), macs(ratio))
    assert "learn.approach aim" not in said and ("more learn.epochs" in said) == advised


@pytest.mark.parametrize(
    ("top1", "dense_top1", "lost"),
    [(0.25, 0.77, True), (0.37, 0.77, True), (0.38, 0.77, False), (0.25, 0.30, False), (0.25, None, False)],
)
def test_a_network_that_was_lost_is_said(top1: float, dense_top1: float | None, lost: bool) -> None:
    """Of four classes, guessing gives a quarter."""
    learn, refine = (Phase(name, index=1, start=0, steps=10, steps_per_epoch=5) for name in ("learn", "refine"))
    said = [lost_warnings(phase, top1, dense_top1, 4) for phase in (learn, refine)]
    assert [len(warnings) for warnings in said] == [lost, lost]
    if lost:
        assert f"{100 * top1:.2f}%, and guessing would give 25.00% (dense: 77.00%)" in said[0][0]
        assert "(10 steps are few)" in said[0][0] and "10 steps" not in said[1][0]
