"""The training step of fdjax, as `train.py` makes it, on random images."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _worker import Case, Facts, Run

from fdjax.config import Config, LearnConfig
from fdjax.training.build import build_network
from fdjax.training.compilation import tidy_after_compilations
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import plan_phases
from fdjax.training.state import TrainState, create_state, init_variables
from fdjax.training.steps import make_mask_step, make_prepare, make_weight_step
from fdjax.zoo import FCMASK

NUM_CLASSES = 10
STEPS_PER_EPOCH = 100


def fitted_config(case: Case) -> Config:
    """Returns the config of a case; maps smaller than the block are one block."""
    model = {"name": case.network, "width": case.width, "precision": case.dtype}
    config = Config.from_dict({"seed": case.seed, "model": model})
    learn = LearnConfig(
        block=1,
        tied=case.step in ("masks_tied", "masks_channels"),
        sides="input" if case.step == "masks_one_sided" else "both",
        levels="0,N" if case.step == "masks_channels" else "all",
    )
    _, graph = build_network(dataclasses.replace(config, learn=learn), input_shape(case), NUM_CLASSES)
    small = sorted({side for layer in graph.wrapped_layers.values() if (side := layer.in_size[0]) < case.block})
    learn = dataclasses.replace(learn, block=case.block, block_by_map=tuple((side, side) for side in small))
    return dataclasses.replace(config, learn=learn)


def input_shape(case: Case) -> tuple[int, int, int]:
    """(H, W, C) of an image."""
    return case.resolution, case.resolution, 3


def half_learned(fcmask: Any, seed: int) -> Any:
    """Returns random masks, as in the middle of learning: neither 0 nor 1."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda mask: jnp.asarray(generator.uniform(0.3, 1, mask.shape), jnp.float32), fcmask)


def make_our_step(case: Case) -> tuple[Any, TrainState]:
    """Makes the jitted step of a case, and its first state."""
    config = fitted_config(case)
    network, graph = build_network(config, input_shape(case), NUM_CLASSES)
    graph = dataclasses.replace(graph, input_mean=(120.0,) * 3, input_std=(60.0,) * 3)
    trains_weights = case.step == "weights"
    phase_name = "pretrain" if trains_weights else "learn"
    phase = next(phase for phase in plan_phases(config, STEPS_PER_EPOCH) if phase.name == phase_name)
    weight_optimizer, mask_optimizer = optimizers_for(config, phase)
    prepare = make_prepare(graph, config.data.crop_padding, config.data.flip, config.model.precision)
    if trains_weights:
        step = make_weight_step(dataclasses.replace(network, mode="off"), weight_optimizer, prepare)
    else:
        step = make_mask_step(dataclasses.replace(network, mode="soft"), graph, mask_optimizer, prepare, config.learn)
    variables = init_variables(network, graph.input_shape, case.seed)
    if not trains_weights:
        variables[FCMASK] = half_learned(variables[FCMASK], case.seed)
    return jax.jit(step, donate_argnums=0), create_state(variables, case.seed, weight_optimizer, mask_optimizer)


def random_data(case: Case) -> tuple[jax.Array, jax.Array]:
    """Returns a batch: images uint8 [B, H, W, C], labels int32 [B]."""
    generator = np.random.default_rng(case.seed)
    images = generator.integers(0, 256, (case.batch, *input_shape(case)), np.uint8)
    labels = generator.integers(0, NUM_CLASSES, case.batch, np.int32)
    return jnp.asarray(images), jnp.asarray(labels)


def prepare(case: Case) -> tuple[Run, Facts]:
    """Compiles the step and measures the time of the compilation."""
    tidy_after_compilations()
    step, state = make_our_step(case)
    data = random_data(case)
    start = time.perf_counter()
    compiled = step.lower(state, *data).compile()
    facts = {
        "compile_s": time.perf_counter() - start,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "device": jax.devices()[0].device_kind,
    }

    def run(steps: int) -> float:
        nonlocal state
        metrics = {}
        for _ in range(steps):
            state, metrics = compiled(state, *data)
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])

    return run, facts
