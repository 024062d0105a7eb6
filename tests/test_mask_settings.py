"""Which settings of masks are accepted, and what becomes of saved ones that have been removed."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fdjax.commands.main import fdjax_command
from fdjax.config import Config, LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.ops.fcmask import coef_mask, kept_counts
from fdjax.training.build import build_network, flat_masks, soft_collection
from tests.small_network import small


def test_saved_configs_may_have_removed_options_that_were_off():
    saved = Config().to_dict()
    saved["learn"] |= {"schedule": "constant", "rounding": "nearest", "noise": 0, "stage_masks": False}
    assert Config.from_dict(saved) == Config()
    saved["learn"]["rounding"] = "least_loss"
    with pytest.raises(UserError, match=r"config\.learn\.rounding is 'least_loss', an option that has been removed"):
        Config.from_dict(saved)


@pytest.mark.parametrize("levels", [None, (0,), (0, 1), (0, 1, 3)])
def test_learning_goes_on_from_hard_masks_with_the_counts_they_keep(levels):
    """A hard mask is count / N, and a soft one has its levels at equal distances."""
    graph, rng = small(width=0.3), np.random.default_rng(0)
    allowed = {path: graph.levels_of(path, levels) for path in graph.masks}
    counts = {path: rng.choice(allowed[path], channels) for path, (channels, _) in graph.mask_sizes.items()}
    for path, mask in flat_masks(soft_collection(graph, counts, levels)).items():
        num_coefs = graph.mask_sizes[path][1]
        np.testing.assert_array_equal(kept_counts(jnp.asarray(mask), num_coefs, levels), counts[path])
        coefs = np.asarray(coef_mask(jnp.asarray(mask), num_coefs, levels))
        assert np.abs(coefs - np.round(coefs)).max() < 1e-5  # Nothing fades.


def test_a_multiple_is_at_least_one():
    with pytest.raises(UserError, match=r"LearnConfig\.group_multiple must be at least 1, got 0"):
        LearnConfig(tied=True, group_multiple=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"exclude": ("head",)}, {"block00", "block01", "block02", "block03"}),
        ({"exclude": ("block0[0-2]/*", "*3/project")}, {"block03", "head"}),
        ({"include": ("block02/*", "head"), "exclude": ("*/expand",)}, {"block02", "head"}),
    ],
)
def test_layers_that_are_left_out_have_no_masks(tied, rules, left):
    config = Config(
        model=ModelConfig(name="mobilenetv2_small", width=0.2),
        learn=LearnConfig(block=2, tied=tied, **rules),
    )
    module, graph = build_network(config, (28, 28, 1), 10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    masks: dict[str, Any] = flatten_dict(shapes["fcmask"], sep="/")
    assert {path: mask.shape[0] for path, mask in masks.items()} == {
        path: channels for path, (channels, _) in graph.mask_sizes.items()
    }
    assert {name.partition("/")[0] for name in graph.blocks} == left


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--learn.exclude", "hed"),
            "the rule 'hed' fits no layer that can have masks (learn.exclude); similar names are",
        ),
        (("--learn.include", "block9*"), "(learn.include); similar names are block0"),
        (("--learn.exclude", "*"), "learn.include and learn.exclude leave none of the 9 layers that can have masks"),
    ],
)
def test_a_rule_that_fits_no_layer_is_an_error_of_the_command(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        fdjax_command(["macs", "--config", "configs/quickstart.py", *flags])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_layers_are_left_out_from_the_command_line(capsys, tmp_path):
    file = tmp_path / "macs.json"
    flags = ["--learn.exclude", "head", "block00/*", "--json", str(file)]
    assert fdjax_command(["macs", "--config", "configs/quickstart.py", *flags]) == 0
    blocks = {layer["name"]: layer["block"] for layer in json.loads(file.read_text())["layers"]}
    assert {name for name in blocks if blocks[name] is None} >= {"head", "block00/expand", "block00/project"}
    assert blocks["block01/expand"] is not None and "head " in capsys.readouterr().out
