"""Which settings of masks are accepted, and what becomes of saved ones that have been removed."""

from __future__ import annotations

import pytest

from fdjax.config import Config, LearnConfig
from fdjax.errors import UserError


def test_saved_configs_may_have_removed_options_that_were_off():
    saved = Config().to_dict()
    saved["learn"] |= {"schedule": "constant", "rounding": "nearest", "noise": 0, "stage_masks": False}
    assert Config.from_dict(saved) == Config()
    saved["learn"]["rounding"] = "least_loss"
    with pytest.raises(UserError, match=r"config\.learn\.rounding is 'least_loss', an option that has been removed"):
        Config.from_dict(saved)


def test_groups_of_a_multiple_need_tied_masks():
    with pytest.raises(UserError, match=r"LearnConfig\.group_multiple must be at least 1, got 0"):
        LearnConfig(tied=True, group_multiple=0)
    with pytest.raises(UserError, match=r"group_multiple must be 1 where masks are not tied .*, got 8"):
        LearnConfig(group_multiple=8)
