"""Models that know nothing of fdjax: traced, masked, counted, rounded and frozen."""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdjax
from fdjax.graph.masks import MaskedGraph


class Unit(nn.Module):
    """An inverted residual as people write it."""

    wide: int
    features: int

    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, name=name)  # noqa: E731
        y = nn.relu6(norm("norm1")(nn.Conv(self.wide, (1, 1), use_bias=False, name="expand")(x)))
        y = nn.Conv(self.wide, (3, 3), feature_group_count=self.wide, use_bias=False, name="depthwise")(y)
        y = nn.relu6(norm("norm2")(y))
        return x + norm("norm3")(nn.Conv(self.features, (1, 1), use_bias=False, name="project")(y))


class Net(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        unit = nn.remat(Unit, static_argnums=(2,)) if self.remat else Unit
        x = unit(24, 8, name="unit1")(x, train)
        x = unit(16, 8, name="unit2")(x, train)
        x = nn.relu(nn.Conv(12, (1, 1), name="head")(x))
        return nn.Dense(5, name="classifier")(x.mean(axis=(1, 2)))


def random_net(module: nn.Module, images: jax.Array) -> dict:
    """Variables with statistics and biases that are not 0 and 1."""
    variables = jax.jit(module.init)(jax.random.key(0), images)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.uniform(size=leaf.shape).astype(np.float32), variables)


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (3, 8, 8, 3))


@pytest.fixture(scope="module")
def variables(images: jax.Array) -> dict:
    return random_net(Net(), images)


def random_counts(graph, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.integers(0, n + 1, channels) for path, (channels, n) in graph.mask_sizes.items()}


SETTINGS = {
    "whole channels": {},
    "tied": {"block": 2, "levels": (0, 1)},
    "the paper's": {"block": 3, "tied": False},
    "streams by levels": {"block": 2, "levels": (0, 1), "streams": "levels", "exclude": ("stem",)},
    "by rules": {"block": {"*": 2, "unit1/*": 4}, "levels": {"unit2/*": (0,)}, "tied": False, "exclude": ("head",)},
    "tied by rules": {"block": {"unit1/*": 4}, "exclude": ("*2/project",)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_frozen_is_masked(settings, images, variables, tmp_path):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]), **settings)
    counts = random_counts(graph, 0)
    masked = jax.jit(fdjax.masked(Net().apply, graph))(counts, variables, images)
    frozen = fdjax.freeze(graph, variables, counts)
    tolerance = 1e-5 * float(jnp.abs(masked).max())
    np.testing.assert_allclose(frozen(images), masked, rtol=0, atol=tolerance)
    frozen.save(tmp_path / "frozen")
    np.testing.assert_array_equal(fdjax.load(tmp_path / "frozen")(images), frozen(images))
    whole = jax.jit(fdjax.masked(Net().apply, graph))(fdjax.init_fcmask(graph), variables, images)
    np.testing.assert_allclose(whole, jax.jit(Net().apply)(variables, images), rtol=0, atol=2e-5)


def test_a_training_step_learns_masks_and_statistics(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]), block=2, levels=(0, 1))

    def loss(variables, images, labels):
        logits, changed = Net().apply(variables, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), changed

    @jax.jit
    def step(fcmask):
        def penalized(fcmask):
            task, changed = fdjax.masked(loss, graph)(fcmask, variables, images, jnp.arange(3))
            return task + fdjax.expected_ratio(graph, fcmask), changed

        return jax.grad(penalized, has_aux=True)(fcmask)

    gradient, changed = step({path: 0.7 * mask for path, mask in fdjax.init_fcmask(graph).items()})
    assert set(gradient) == set(graph.masks)
    assert all(float(jnp.abs(value).max()) > 0 for value in gradient.values())
    before = variables["batch_stats"]
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, changed["batch_stats"])), strict=True))


@pytest.mark.slow
def test_checkpointed_modules_and_vmap_are_masked_alike(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]), block=2, tied=False)
    fcmask = {
        path: jax.random.uniform(jax.random.key(i), mask.shape)
        for i, (path, mask) in enumerate(fdjax.init_fcmask(graph).items())
    }

    def value(module):
        return lambda fcmask: (fdjax.masked(module.apply, graph)(fcmask, variables, images) ** 2).sum()

    plain, again = (jax.jit(jax.value_and_grad(value(Net(remat=remat))))(fcmask) for remat in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, again)
    one = fdjax.masked(Net().apply, graph)
    single = jax.vmap(lambda image: one(fcmask, variables, image[None])[0])(images)
    np.testing.assert_allclose(single, one(fcmask, variables, images), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_applied_twice_is_masked_twice(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]))
    counts = random_counts(graph, 0)

    def difference(variables, images):
        return Net().apply(variables, images) - Net().apply(variables, 2 * images)

    once = jax.jit(fdjax.masked(Net().apply, graph))
    expected = once(counts, variables, images) - once(counts, variables, 2 * images)
    twice = jax.jit(fdjax.masked(difference, graph))(counts, variables, images)
    np.testing.assert_allclose(twice, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(twice - difference(variables, images)).max()) > 1e-2


def test_rounding_meets_the_target_and_keeps_the_floor(images, variables):
    graph = fdjax.trace(Net().apply, variables, images[:1])
    graph = fdjax.with_masks(graph, levels=(0,), floor={"unit2/expand": 12})
    rng = np.random.default_rng(0)
    fcmask = {path: rng.uniform(0, 1, mask.channels).astype(np.float32) for path, mask in graph.masks.items()}
    hard = fdjax.harden(graph, fcmask, target_macs=0.6)
    assert abs(hard.macs.ratio - 0.6) < 0.05
    assert (fdjax.harden(graph, fcmask, target_macs=0.2).counts["unit2/expand/channels"] > 0).sum() >= 12
    assert fdjax.count(graph, hard.counts, hard.released).to_dict() == hard.macs.to_dict()
    # In multiples, too: 12 become 16, and one of 8 all of them.
    even = fdjax.harden(graph, fcmask, target_macs=0.1, group_multiple=16).counts
    assert (even["unit2/expand/channels"] > 0).sum() == 16 and (even["stem/channels"] > 0).all()


def test_the_table_says_what_can_be_masked_and_what_stays(images, variables):
    graph = fdjax.trace(Net().apply, variables, images[:1])
    lines = str(graph).splitlines()
    row = next(line for line in lines if line.startswith("unit1/expand"))
    assert "pointwise" in row and "8 -> 24" in row and "any block, with unit1/project" in row
    stem = next(line for line in lines if line.startswith("stem"))
    assert "whole channels, with unit1/project, unit2/project and 3 more (stem mixes channels and pixels)" in stem
    assert "none" in next(line for line in lines if line.startswith("classifier"))
    assert "  classifier: a channel of the result" in lines
    masked = str(fdjax.with_masks(graph, block=2)).splitlines()
    row = next(line for line in masked if line.startswith("unit1/expand"))
    assert "input, whole channels, as stem/channels; output, blocks of 2, as unit1/expand/channels" in row


def test_every_layer_shrinks_and_the_program_has_the_macs_that_are_counted(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]))
    counts = {path: (np.arange(channels) % 2).astype(int) for path, (channels, _) in graph.mask_sizes.items()}
    macs = fdjax.count(graph, counts)
    # One side of the stem and of the classifier stays: the images' channels, and the results.
    shares = {layer.name: layer.total / layer.dense for layer in macs.layers}
    assert shares == {
        name: 0.5 if graph.layers[name].kind in ("depthwise", "conv", "dense") else 0.25 for name in shares
    }
    assert fdjax.freeze(graph, variables, counts).frozen.program.macs() == macs.to_dict()["total"]
    expected = fdjax.expected_ratio(graph, {path: jnp.asarray(count, jnp.float32) for path, count in counts.items()})
    np.testing.assert_allclose(expected, macs.ratio, rtol=1e-5)


def test_a_graph_with_masks_has_a_json_form(images, variables):
    for settings in SETTINGS.values():
        graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]), **settings)
        again = MaskedGraph.from_dict(json.loads(json.dumps(graph.to_dict())))
        assert (again.masks, again.blocks, again.levels) == (graph.masks, dict(graph.blocks), graph.levels)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exclude": ("stam*",)}, r"the rule 'stam\*' fits no layer; similar names are stem$"),
        ({"include": ("unit1/expnd",)}, "fits no layer; similar names are unit1/expand, unit2/expand"),
        ({"block": {"nothing": 2}}, "the rule 'nothing' fits no layer; the names are stem, unit1/expand,"),
        ({"include": ("stem",), "tied": False}, "the rule 'stem' fits no layer that can have masks of its own"),
        ({"include": ("stem",)}, "the rules leave nothing to prune: an excluded layer also keeps"),
        ({"block": 9}, "block 9 does not fit the 8x8 map of layer unit1/expand"),
        ({"block": 17}, "block must be from 1 to 16, got 17"),
        ({"exclude": ("*",)}, "leave nothing to prune"),
        ({"floor": {"head": -1}}, "a floor must be 0 channels or more, got -1"),
    ],
)
def test_rules_that_do_not_fit_are_refused(settings, message, images, variables):
    graph = fdjax.trace(Net().apply, variables, images[:1])
    with pytest.raises(ValueError, match=message):
        fdjax.with_masks(graph, **settings)


def test_masks_or_a_function_of_another_model_are_refused(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]))
    masked = fdjax.masked(Net().apply, graph)
    with pytest.raises(ValueError, match="the masks do not fit the graph"):
        masked({"other": jnp.ones(3)}, variables, images)
    fcmask = fdjax.init_fcmask(graph)
    with pytest.raises(ValueError, match=r"mask unit1/expand/channels must have shape \(24,\), got \(23,\)"):
        masked({**fcmask, "unit1/expand/channels": jnp.ones(23)}, variables, images)
    with pytest.raises(ValueError, match=r"the function has no masked layer stem, unit1/expand, unit1/project \.\.\.:"):
        fdjax.masked(lambda variables, x: x.sum(), graph)(fcmask, variables, images)
    with pytest.raises(ValueError, match="cannot be traced with images of shape"):
        fdjax.trace(Net().apply, variables, images[0, 0])


def test_a_masked_layer_inside_of_a_loop_is_refused(images, variables):
    graph = fdjax.with_masks(fdjax.trace(Net().apply, variables, images[:1]))

    def looped(variables, images):
        return jax.lax.map(lambda image: Net().apply(variables, image[None]), images)

    with pytest.raises(ValueError, match="a masked layer lies inside scan"):
        fdjax.masked(looped, graph)(fdjax.init_fcmask(graph), variables, images)


class Excited(nn.Module):
    """Squeeze and excite, hard swish, and attention by a map of one channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.hard_swish(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.hard_swish(nn.Conv(16, (1, 1), name="expand")(x))
        gate = x.mean(axis=(1, 2), keepdims=True)
        gate = nn.relu(nn.Conv(6, (1, 1), name="squeeze")(gate))
        x = x * nn.hard_sigmoid(nn.Conv(16, (1, 1), name="excite")(gate))
        x = nn.relu(nn.Conv(12, (1, 1), name="project")(x))
        x = x * nn.sigmoid(nn.Conv(1, (3, 3), name="attention")(x))
        return nn.Dense(4, name="classifier")(nn.Conv(10, (1, 1), name="head")(x).mean(axis=(1, 2)))


@pytest.mark.parametrize("dead", [(), ("squeeze/output",), ("excite/input",), ("project/input", "squeeze/input")])
def test_gates_by_channel_and_by_pixel_are_frozen_exactly(dead, images):
    variables = random_net(Excited(), images)
    graph = fdjax.with_masks(fdjax.trace(Excited().apply, variables, images[:1]), tied=False)
    counts = random_counts(graph, 1) | {path: np.zeros(graph.masks[path].channels, int) for path in dead}
    masked = jax.jit(fdjax.masked(Excited().apply, graph))(counts, variables, images)
    frozen = fdjax.freeze(graph, variables, counts)
    np.testing.assert_allclose(frozen(images), masked, rtol=0, atol=1e-5 * float(jnp.abs(masked).max()))
    assert "mul of values with different numbers of channels (test_any_model.py:" in graph.spaces["project"].pinned
