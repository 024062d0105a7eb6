"""The objective with a teacher, and single steps with it; whole runs are in test_training.py."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.config import Config, DistillConfig, LearnConfig
from fdjax.training.phases import has_teacher, plan_phases
from fdjax.training.state import TrainState, create_state, init_variables
from fdjax.training.steps import labels_alone, make_distillation, make_mask_step, make_prepare, make_weight_step
from fdjax.zoo import FCMASK, MobileNet
from tests.graph_networks import network_for

# A network that compiles in a few seconds: 8 to 24 channels, maps of 6x6 and (not divided by the block) 3x3.
SHAPE, CLASSES, BATCH = (12, 12, 3), 5, 8
TINY = MobileNet("mobilenetv2_small", CLASSES, width=0.35, block=2)
GRAPH = network_for(TINY, SHAPE, input_mean=(120.0,) * 3, input_std=(60.0,) * 3)
TEACHER = dataclasses.replace(TINY, mode="off")
# After one step the trace of a momentum optimizer is the gradient.
OPTIMIZER = optax.sgd(0.02, momentum=0.9)
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(left, right) -> bool:
    """Bit for bit."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(leaves(left), leaves(right), strict=True))


# The objective, on logits


def objective_on(taught: np.ndarray, weight: float, temperature: float = 2.0):
    """(logits, labels, label smoothing) -> loss, of a teacher whose logits are given."""
    seen = []

    def apply(variables: dict[str, Any], x: jax.Array, train: bool) -> jax.Array:
        seen.append((variables, train))
        return x

    teacher: Any = SimpleNamespace(apply=apply)
    state: Any = SimpleNamespace(teacher={"params": 1, "batch_stats": 2}, fcmask=3)
    objective = make_distillation(teacher, DistillConfig(weight=weight, temperature=temperature))
    loss = objective(state, jnp.asarray(taught))
    # Its own weights and running averages, in evaluation.
    assert seen == [({"params": 1, "batch_stats": 2, FCMASK: 3}, False)]
    return loss


def random_logits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    taught, logits = (rng.normal(scale=4, size=(BATCH, CLASSES)).astype(np.float32) for _ in range(2))
    return taught, logits, rng.integers(0, CLASSES, BATCH)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0.25, 8), st.sampled_from([0.0, 0.1]))
@example(0, 1.0, 2.0, 0.1)
@example(0, 0.0, 2.0, 0.1)
def test_the_loss_is_that_of_an_independent_formulation(seed: int, weight: float, temperature: float, smoothing: float):
    taught, logits, labels = random_logits(seed)
    loss = objective_on(taught, weight, temperature)(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    teacher, student = (scipy.special.softmax(z.astype(np.float64) / temperature, axis=1) for z in (taught, logits))
    distance = scipy.special.rel_entr(teacher, student).sum(axis=1).mean()
    wanted = np.eye(CLASSES)[labels] * (1 - smoothing) + smoothing / CLASSES
    entropy = -(wanted * scipy.special.log_softmax(logits.astype(np.float64), axis=1)).sum(axis=1).mean()
    expected = (1 - weight) * entropy + weight * temperature**2 * distance
    assert loss.shape == () and loss.dtype == np.float32
    assert float(loss) == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_its_gradient_is_the_difference_of_the_softened_probabilities_times_the_temperature() -> None:
    """T^2 makes up for the two divisions by T: gradients keep their size whatever T is."""
    taught, logits, labels = random_logits(0)
    for temperature in (1.0, 4.0):
        loss = objective_on(taught, 1.0, temperature)
        gradient = jax.grad(lambda z, loss=loss: loss(z, jnp.asarray(labels)))(jnp.asarray(logits))
        teacher, student = (scipy.special.softmax(z / temperature, axis=1) for z in (taught, logits))
        np.testing.assert_allclose(gradient, temperature * (student - teacher) / BATCH, atol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    taught, logits, labels = random_logits(0)
    gradient = jax.grad(lambda z: objective_on(z, 0.5)(jnp.asarray(logits), jnp.asarray(labels)))(jnp.asarray(taught))
    np.testing.assert_array_equal(gradient, np.zeros_like(taught))


@given(st.integers(0, 1000))
def test_no_weight_is_cross_entropy_and_all_of_it_asks_for_no_labels(seed: int) -> None:
    taught, logits, labels = random_logits(seed)
    plain: Any = None
    alone = labels_alone(plain, jnp.asarray(taught))(jnp.asarray(logits), jnp.asarray(labels), 0.1)
    assert objective_on(taught, 0.0)(jnp.asarray(logits), jnp.asarray(labels), 0.1) == alone
    without, other = (objective_on(taught, 1.0)(jnp.asarray(logits), jnp.asarray(y)) for y in (labels, labels[::-1]))
    assert without == other


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_teacher_takes_part_after_pretraining_if_it_has_any_weight(weight: float) -> None:
    phases = ("pretrain", "learn", "alternate", "refine", "scratch")
    config = Config(phases=phases, distill=DistillConfig(weight=weight))
    found = {phase.name: has_teacher(config, phase) for phase in plan_phases(config, 10)}
    assert found == {name: weight > 0 and name != "pretrain" for name in phases}


# Steps


@cache
def programs(weight: float | None) -> dict[str, Any]:
    """A step on masks and one on weights, each compiled; None: without a teacher."""
    prepare = make_prepare(GRAPH, crop_padding=1, flip=True)
    objective = labels_alone if weight is None else make_distillation(TEACHER, DistillConfig(weight=weight))
    masks = make_mask_step(dataclasses.replace(TINY, mode="soft"), GRAPH, OPTIMIZER, prepare, LearnConfig(), objective)
    weights = make_weight_step(dataclasses.replace(TINY, mode="hard"), OPTIMIZER, prepare, objective)
    return {"masks": fast_jit(masks), "weights": fast_jit(weights)}


@cache
def first_state() -> TrainState:
    """As after pretraining: whole masks, and a teacher of the same weights."""
    state = create_state(init_variables(TINY, SHAPE, 0), 0, OPTIMIZER, OPTIMIZER)
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + jnp.asarray(rng.uniform(0, 0.1, leaf.shape), leaf.dtype), state.params)
    return state.replace(params=moved).with_teacher()


def half_pruned(state: TrainState) -> TrainState:
    rng = np.random.default_rng(2)
    masks = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.3, 0.9, leaf.shape), leaf.dtype), state.fcmask)
    return state.replace(fcmask=masks, lambda_=jnp.float32(0.1))


def batch(seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    images, labels = rng.integers(0, 256, (BATCH, *SHAPE), np.uint8), np.arange(BATCH, dtype=np.int32) % CLASSES
    return jnp.asarray(images), jnp.asarray(labels)


def test_at_the_start_of_learn_the_network_is_its_teacher_and_only_labels_pull_at_the_masks() -> None:
    state = first_state()
    assert float(state.lambda_) == 0 and all((mask == 1).all() for mask in leaves(state.fcmask))
    taught, taught_metrics = programs(1.0)["masks"](state, *batch(0))
    plain, plain_metrics = programs(None)["masks"](state, *batch(0))
    assert abs(float(taught_metrics["loss"])) < 1e-5 < 0.1 < float(plain_metrics["loss"])
    pulls = [max(np.abs(leaf).max() for leaf in leaves(after.mask_opt)) for after in (taught, plain)]
    assert pulls[0] < 1e-3 * pulls[1] and pulls[1] > 1e-3


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_with_all_the_weight_labels_do_not_matter(kind: str) -> None:
    """Nothing that is trained depends on them; only the accuracy that is reported does."""
    states = [half_pruned(first_state())] * 2
    for seed in range(3):
        images, labels = batch(seed)
        shuffled = jnp.roll(labels, 1)
        results = [programs(1.0)[kind](state, images, y) for state, y in zip(states, (labels, shuffled), strict=True)]
        states = [state for state, _ in results]
        assert results[0][1]["loss"] == results[1][1]["loss"] > 0
    assert same(*states)
    before = half_pruned(first_state())
    moves = {name: not same(getattr(states[0], name), getattr(before, name)) for name in ("params", "fcmask")}
    assert moves == {"params": kind == "weights", "fcmask": kind == "masks"}


@pytest.mark.parametrize("kind", ["masks", "weights"])
def test_the_teacher_stays_what_it_was(kind: str) -> None:
    state = half_pruned(first_state())
    after, _ = programs(1.0)[kind](state, *batch(0))
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert same(after.teacher, state.teacher)
    assert same(after.teacher, {"batch_stats": state.batch_stats, "params": state.params})


def test_a_teacher_is_taken_once_and_is_a_copy() -> None:
    state = create_state(init_variables(TINY, SHAPE, 0), 0, OPTIMIZER, OPTIMIZER)
    assert state.teacher == {}
    taught = state.with_teacher()
    pairs = zip(jax.tree.leaves(taught.teacher["params"]), jax.tree.leaves(taught.params), strict=True)
    assert all(mine is not theirs for mine, theirs in pairs)
    moved = taught.replace(params=jax.tree.map(lambda leaf: leaf + 1, taught.params)).with_teacher()
    assert same(moved.teacher, taught.teacher)
