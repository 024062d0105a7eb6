"""Tokens on a grid: blocks on the map that the tokens are, counted and frozen as on a map."""

from __future__ import annotations

import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fdjax
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.graph.masks import MaskedGraph

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
GRID = (4, 6)


class Mixer(nn.Module):
    """A token per 2x2 pixels; MLPs with a residual stream under a layer norm; as tokens or as maps."""

    tokens: bool = True
    class_token: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2), name="patches")(x)
        if self.tokens:
            x = x.reshape(x.shape[0], -1, 8)
        if self.class_token:
            first = self.param("first", nn.initializers.normal(0.1), (1, 1, 8))
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, 8)), x], axis=1)
        for unit in range(2):
            y = nn.LayerNorm(name=f"unit{unit}/norm")(x)
            y = nn.gelu(nn.Dense(12, name=f"unit{unit}/expand")(y))
            x = x + nn.Dense(8, name=f"unit{unit}/project")(y)
        return nn.Dense(4, name="top")(x.mean(axis=1 if self.tokens else (1, 2)))


def traced(module: nn.Module, **settings: Any) -> tuple[MaskedGraph, Any]:
    variables = jax.jit(module.init)(jax.random.key(0), IMAGES)
    return fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES[:1]), **settings), variables


@pytest.mark.parametrize("settings", [{"levels": (0, 1)}, {"tied": False}], ids=["tied", "untied"])
def test_blocks_on_the_grid_of_tokens_are_those_on_the_map(settings):
    graph, variables = traced(Mixer(), block=2, grid=GRID, **settings)
    on_maps, _ = traced(Mixer(tokens=False), block=2, **settings)
    assert graph.mask_sizes == on_maps.mask_sizes and graph.blocks == on_maps.blocks
    assert {graph.blocks[f"unit{unit}/expand"] for unit in range(2)} == {2}
    rng = np.random.default_rng(1)
    counts = {path: rng.choice(graph.levels_of(path), channels) for path, (channels, _) in graph.mask_sizes.items()}
    assert fdjax.count(graph, counts).to_dict() == fdjax.count(on_maps, counts).to_dict()

    soft = {path: jnp.asarray(rng.uniform(size=len(count)), jnp.float32) for path, count in counts.items()}
    for masks in (counts, soft):
        expected = fdjax.masked(Mixer(tokens=False).apply, on_maps)(masks, variables, IMAGES)
        found = fdjax.masked(Mixer().apply, graph)(masks, variables, IMAGES)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))

    expected = fdjax.masked(Mixer().apply, graph)(counts, variables, IMAGES)
    frozen = fdjax.freeze(MaskedGraph.from_dict(json.loads(json.dumps(graph.to_dict()))), variables, counts)
    onnx = onnxruntime_session(to_onnx(frozen.frozen.program, frozen.frozen.arrays))
    for made in (frozen(IMAGES), onnx(IMAGES)):
        np.testing.assert_allclose(made, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_between_two_products_values_stay_on_the_grid():
    graph, _ = traced(Mixer(), block=2, grid=GRID)
    reshapes = [o for o in graph.operations.operations if o.kind == "reshape" and graph.walk.live.get(o.inputs[0])]
    # To tokens once; to the grid and back once for each unit.
    assert len(reshapes) == 1 + 2 * 2


def test_without_a_grid_and_where_it_does_not_fit_tokens_have_whole_channels():
    graph, _ = traced(Mixer())
    assert set(graph.blocks.values()) == {1}
    assert "unit0/expand works on tokens, and no grid is given for them" in str(graph.graph)
    with pytest.raises(ValueError, match=r"block 2 does not fit the 24 map .* the grid of its 24 tokens"):
        traced(Mixer(), block=2, tied=False)
    # A class token among them: 25 tokens are no map of 4x6.
    with pytest.raises(ValueError, match=r"the grid 4x6 fits no layer: .* those on tokens have 25"):
        traced(Mixer(class_token=True), block=2, grid=GRID)
    with pytest.raises(ValueError, match=r"the grid 4x6 fits no layer: .* no layer works on tokens"):
        traced(Mixer(tokens=False), block=2, grid=GRID)
    with pytest.raises(ValueError, match=r"the rule 'unit7/.' fits no layer"):
        traced(Mixer(), block=2, grid={"unit7/*": GRID})
    one, _ = traced(Mixer(), block={"*": 1, "unit1/*": 2}, grid={"unit1/*": GRID})
    assert one.masks["unit0/expand/channels"].block == 1 and one.masks["unit1/expand/channels"].block == 2
