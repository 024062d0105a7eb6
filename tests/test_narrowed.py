"""Without the channels that hard masks remove, a function has the same results and gradients, and multiplies less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fdjax
from fdjax.graph.jaxprs import without_calls
from tests import test_any_model as units
from tests import test_any_structure as structures
from tests import test_unusual_networks as unusual

Loss = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def quickly_compiled() -> Iterator[None]:
    """Each program runs once: it need not be fast."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def macs_of(function: Callable[..., Any], *arguments: Any) -> int:
    """What the convolutions and products of a function multiply, by the shapes in its jaxpr."""
    total = 0
    for equation in without_calls(jax.make_jaxpr(function)(*arguments)).jaxpr.eqns:
        if equation.primitive.name not in ("conv_general_dilated", "dot_general"):
            continue
        (first, second), numbers = (atom.aval for atom in equation.invars), equation.params["dimension_numbers"]
        if equation.primitive.name == "dot_general":
            terms = np.prod([first.shape[axis] for axis in numbers[0][0]], dtype=int)
        else:
            terms = second.size // second.shape[numbers.rhs_spec[0]]
        total += equation.outvars[0].aval.size * int(terms)
    return total


def both_ways(function: Callable[..., Any], graph: fdjax.MaskedGraph, counts: Any) -> tuple[Any, Any]:
    """The function of (variables, images) with hard masks: with all channels, and narrow."""

    def of(narrow: bool) -> Callable[..., Any]:
        return lambda variables, images: fdjax.masked(function, graph, narrow=narrow)(counts, variables, images)

    return of(False), of(True)


def assert_same(whole: Loss, narrow: Loss, variables: Any, images: Any) -> None:
    """Compares all results, and the gradients of a function of them."""

    def graded(function: Loss) -> Any:
        def loss(variables: Any) -> Any:
            results = jax.tree.leaves(function(variables, images))
            return sum(jnp.sin(result.astype(jnp.float32)).sum() for result in results), results

        return jax.jit(jax.grad(loss, has_aux=True))(variables)

    (wanted_gradients, wanted), (gradients, results) = graded(whole), graded(narrow)
    for result, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(result, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, gradients, wanted_gradients))
    assert float(apart) <= 1e-4 * float(optax.tree.norm(wanted_gradients))


STRUCTURES = [
    ("resnet", "levels"),
    ("resnext", "channels"),
    ("densenet", "untied"),
    ("unet", "levels"),
    ("transposed", "channels"),
    ("convnext", "channels"),
    ("vit", "channels"),
    ("shufflenet", "levels"),
    ("channels first", "levels"),
]


@pytest.mark.parametrize(("name", "masks"), STRUCTURES)
def test_networks_of_every_structure(name, masks):
    module, settings = structures.NETS[name], {**structures.MASKS[masks], "grid": structures.GRIDS.get(name)}
    variables, images = structures.random_variables(module), structures.IMAGES
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, images[:1]), **settings)
    whole, narrow = both_ways(module.apply, graph, structures.random_counts(graph, 0))
    assert_same(whole, narrow, variables, images)
    assert macs_of(narrow, variables, images) < macs_of(whole, variables, images)


UNUSUAL = [
    "ELU",
    "softplus",
    "instance norm, depthwise",
    "one pixel, spread",
    "a residual around groups",
    "padding adds channels",
    "a difference from constants",
    "dilated",
    "products in windows",
    "a part of a concatenation is dead",
    "a product over pixels",
    "constant rows are joined",
]


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_networks(name):
    apply, variables, images = unusual.NETWORKS[name], unusual.VARIABLES, unusual.IMAGES
    graph = fdjax.with_masks(fdjax.trace(apply, variables, images), floor=0)
    whole, narrow = both_ways(apply, graph, unusual.counts_of(name, graph))
    assert_same(whole, narrow, variables, images)
    assert macs_of(narrow, variables, images) < macs_of(whole, variables, images)


@pytest.mark.parametrize("read", [(0,), (0, 1), (0, 1, 2)])
def test_parts_of_a_split_of_which_some_are_not_read(read):
    conv, variables, images = unusual.conv, unusual.VARIABLES, unusual.IMAGES

    def apply(v, x):
        parts = jnp.split(jax.nn.relu(conv(x, v, "first")), (3, 5), axis=-1)
        y = jnp.concatenate([parts[part] for part in read] * 3, axis=-1)[..., :8]
        return unusual.top(jax.nn.relu(conv(y, v, "point")), v)

    graph = fdjax.with_masks(fdjax.trace(apply, variables, images), floor=0)
    whole, narrow = both_ways(apply, graph, unusual.counts_of("", graph))
    assert_same(whole, narrow, variables, images)
    assert macs_of(narrow, variables, images) < macs_of(whole, variables, images)


def loss_of(module: nn.Module, rngs: Any = None) -> Loss:
    """A loss in training, with the changed statistics."""

    def loss(variables: Any, images: Any) -> Any:
        logits, changed = module.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(images))).mean(), changed

    return loss


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (3, 8, 8, 3))


@pytest.mark.parametrize("settings", [{}, {"block": 2, "levels": (0, 1)}], ids=["channels", "levels"])
def test_statistics_of_what_is_computed_change_as_before_and_the_others_stay(settings, images):
    variables = units.random_net(units.Net(), images)
    graph = fdjax.with_masks(fdjax.trace(units.Net().apply, variables, images[:1]), **settings)
    rng = np.random.default_rng(0)
    counts = {path: n * rng.integers(0, 2, channels) for path, (channels, n) in graph.mask_sizes.items()}
    whole, narrow = both_ways(loss_of(units.Net()), graph, counts)
    found, wanted = (jax.jit(jax.value_and_grad(f, has_aux=True))(variables, images) for f in (narrow, whole))
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-5)
    for gradient, want in zip(*map(jax.tree.leaves, (found[1]["params"], wanted[1]["params"])), strict=True):
        np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-5)
    trees = (found[0][1]["batch_stats"], wanted[0][1]["batch_stats"], variables["batch_stats"])
    stayed = 0
    for statistic, want, before in zip(*map(jax.tree.leaves, trees), strict=True):
        left_out = np.asarray(statistic == before)
        np.testing.assert_allclose(statistic[~left_out], want[~left_out], rtol=1e-5, atol=1e-6)
        stayed += left_out.sum()
    dead = sum(int((graph.side_counts(counts, f"unit{unit}/project", "input") == 0).sum()) for unit in (1, 2))
    # Two batch norms lie between expand and project, with two statistics each; the residual stream has some more.
    assert stayed >= 4 * dead > 0


def test_statistics_have_another_key_than_flax(images):
    variables = units.random_net(units.Net(), images)
    graph = fdjax.with_masks(fdjax.trace(units.Net().apply, variables, images[:1]))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}

    def renamed(variables: Any, images: Any) -> Any:
        loss, changed = loss_of(units.Net())({"params": variables["params"], "batch_stats": variables["state"]}, images)
        return loss, {"state": changed["batch_stats"]}

    own = {"params": variables["params"], "state": variables["batch_stats"]}
    macs = []
    for statistics in ("state", "batch_stats"):
        function = fdjax.masked(renamed, graph, narrow=True, statistics=statistics)
        macs.append(macs_of(lambda variables, images, f=function: f(counts, variables, images), own, images))
    whole, narrow = both_ways(loss_of(units.Net()), graph, counts)
    assert macs[0] == macs_of(narrow, variables, images)
    # Under a key that is not known statistics are results as any, so what they are of is computed.
    assert macs[0] < macs[1] <= macs_of(whole, variables, images)


def test_whole_channels_multiply_exactly_what_is_counted():
    module = structures.NETS["resnet"]
    variables, images = structures.random_variables(module), structures.IMAGES
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, images[:1]))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    _, narrow = both_ways(module.apply, graph, counts)
    assert macs_of(narrow, variables, images) == len(images) * fdjax.count(graph, counts).to_dict()["total"]


class Dropping(nn.Module):
    """A layer of dropout between two others, and an activation with a gradient of its own."""

    activation: Callable[[Any], Any]

    @nn.compact
    def __call__(self, x, train=False):
        x = self.activation(nn.Conv(12, (3, 3), name="first")(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3, name="top")(nn.Conv(6, (1, 1), name="second")(x).mean(axis=(1, 2)))


@jax.custom_jvp
def straight_through(x):
    return jnp.maximum(x, 0.0)


straight_through.defjvps(lambda tangent, result, x: tangent)


@pytest.mark.parametrize("activation", [nn.relu, nn.relu6, straight_through])
def test_dropout_drops_the_same_and_gradients_of_activations_are_their_own(activation, images):
    module = Dropping(activation)
    variables = module.init(jax.random.key(0), images)
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, images[:1]))
    counts = {path: np.arange(channels) % 3 // 2 for path, (channels, _) in graph.mask_sizes.items()}

    def train(variables: Any, images: Any) -> Any:
        return module.apply(variables, images, train=True, rngs={"dropout": jax.random.key(5)})

    whole, narrow = both_ways(train, graph, counts)
    assert_same(whole, narrow, variables, images)
    assert macs_of(narrow, variables, images) < macs_of(whole, variables, images)


def test_all_channels_are_computed_where_masks_move_or_a_checkpoint_holds_layers(images):
    variables = units.random_net(units.Net(), images)
    graph = fdjax.with_masks(fdjax.trace(units.Net().apply, variables, images[:1]))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    soft = {path: jnp.full(channels, 0.5) for path, (channels, _) in graph.mask_sizes.items()}
    again = units.Net(remat=True)
    moving = jax.jit(fdjax.masked(units.Net().apply, graph, narrow=True))
    np.testing.assert_array_equal(
        moving(soft, variables, images), jax.jit(fdjax.masked(units.Net().apply, graph))(soft, variables, images)
    )
    whole, narrow = both_ways(again.apply, graph, counts)
    np.testing.assert_array_equal(jax.jit(narrow)(variables, images), jax.jit(whole)(variables, images))
    assert "remat" in str(jax.make_jaxpr(narrow)(variables, images))
