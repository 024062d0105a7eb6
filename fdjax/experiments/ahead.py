"""Compiles frozen networks and training steps for accelerators that are not there (`fdjax.frozen.targets`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.config import Config
from fdjax.data import describe_source
from fdjax.frozen import load
from fdjax.frozen.bench import dense_of
from fdjax.frozen.targets import compare_ahead, compile_ahead
from fdjax.graph.masks import MaskedGraph
from fdjax.training.build import build_network
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase, plan_phases
from fdjax.training.run import make_steps
from fdjax.training.state import TrainState, create_state, variable_shapes

# The phases of a run do not depend on how many steps an epoch has.
_STEPS_PER_EPOCH = 10


def compile_artifact(folder: Path, target: str, batches: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    """Compiles the frozen network in `folder` and the dense one.

    Args:
      folder: directory of the frozen network.
      target: one of `fdjax.frozen.targets.TARGETS`.
      batches: batch sizes in images.
      dtype: type of weights and activations, "bfloat16" or "float32".

    Returns:
      Rows of `fdjax.frozen.targets.compare_ahead`.

    Raises:
      UserError: if the folder has no valid frozen network, or the target's compiler is not installed or refuses one.
    """
    artifact = load(folder)
    networks = {"dense": dense_of(artifact), "pruned": artifact.frozen}
    return [row for batch in batches for row in compare_ahead(target, networks, batch, dtype)]


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step that is to be compiled.

    Attributes:
      form: phase and kind of the step, such as "learn: mask step".
      function: the step, a function of `arguments`.
      arguments: the state, and objects with the shape and dtype of images [B, H, W, C] and labels [B].
    """

    form: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def training_steps(config: Config, shape: tuple[int, int, int], num_classes: int) -> Iterator[Step]:
    """Makes the weight steps and mask steps of a config's phases, without reading data.

    Args:
      config: the config of a run.
      shape: (H, W, C) of an image.
      num_classes: number of classes.

    Yields:
      The steps in the order of the phases. The masks of hard phases are all ones.
    """
    network, graph = build_network(config, shape, num_classes)
    graph = dataclasses.replace(graph, input_mean=(127.0,) * shape[2], input_std=(64.0,) * shape[2])
    images = jax.ShapeDtypeStruct((config.data.batch_size, *shape), jnp.uint8)
    labels = jax.ShapeDtypeStruct((config.data.batch_size,), jnp.int32)
    for phase in plan_phases(config, _STEPS_PER_EPOCH):
        for kind, step, state in _steps_of(config, network, graph, phase):
            yield Step(f"{phase.name}: {kind}", step, (state, images, labels))


def compile_steps(config: Config, target: str) -> list[dict[str, Any]]:
    """Compiles the `training_steps` of a config, for images of the shape that its data set has.

    Args:
      config: the config of a run.
      target: one of `fdjax.frozen.targets.TARGETS`.

    Returns:
      A row for each step, in JSON types: `form` (phase and kind of step), `target`, `batch`, `dtype`,
      `compile_seconds`, `memory_mb`, and `cycles` (None if the compiler gives no estimate).

    Raises:
      UserError: if the target's compiler is not installed or refuses a step.
    """
    data = config.data
    shape, classes = describe_source(data.name, data.path, data.image_size, data.grayscale)
    facts = {"target": target, "batch": data.batch_size, "dtype": config.model.precision}
    rows = []
    for step in training_steps(config, shape, len(classes)):
        made = compile_ahead(target, step.function, *step.arguments)
        figures = {"compile_seconds": made.seconds, "memory_mb": made.memory_mb, "cycles": made.cycles}
        rows.append({"form": step.form, **facts, **figures})
    return rows


def _steps_of(config: Config, network: Any, graph: MaskedGraph, phase: Phase) -> list[tuple[str, Any, Any]]:
    """Returns (kind, step, state) of each of a phase's steps; only the masks of the state have values."""

    def begin(variables: dict[str, Any]) -> TrainState:
        state = create_state(variables, config.seed, *optimizers_for(config, phase))
        return state.with_teacher() if config.distill.weight > 0 else state

    # No weights are initialised, because for a large network that takes longer than compiling some steps.
    state = jax.eval_shape(begin, variable_shapes(network, graph.input_shape))
    state = state.replace(fcmask=jax.tree.map(lambda mask: np.ones(mask.shape, mask.dtype), state.fcmask))
    steps = make_steps(config, network, graph, phase, state, np.arange(graph.num_classes))
    kinds = {("masks", False): "mask step", ("weights", True): "weight step"}
    return [(kinds[key], step, state) for key, step in steps.items() if key in kinds]  # type: ignore[index]
