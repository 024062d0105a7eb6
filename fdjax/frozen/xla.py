"""Executes a frozen network in XLA: a pure function of arrays and images, with a function for each operation kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.frozen.program import Apply, Conv, Pointwise, Program, Run, Take, makes
from fdjax.frozen.xla_apply import apply_primitive
from fdjax.frozen.xla_conv import convolve
from fdjax.frozen.xla_products import Arrays
from fdjax.frozen.xla_run import activate, placed, pointwise, run_chains
from fdjax.frozen.xla_stages import Stage, stages

Maps = tuple[jax.Array, ...]

# Prefix of an operation's name in the names of its instructions, where slashes are dots.
RUN_SCOPE = "run="


def compiler_options() -> dict[str, int]:
    """Returns XLA's options for a frozen network: on the CPU the widest vectors; on AVX-512 they are 10% faster."""
    return {"xla_cpu_prefer_vector_width": 512} if jax.default_backend() == "cpu" else {}


def apply(program: Program, arrays: Arrays, *images: jax.Array, in_chunks: bool = False) -> tuple[jax.Array, ...]:
    """Evaluates a frozen network on raw images.

    Args:
      program: the program; static.
      arrays: its arrays by name; their floating-point type is that of all activations.
      *images: each input of the program, uint8 or float [B, ...].
      in_chunks: whether operations on large maps process a few images at a time, for the CPU's caches.

    Returns:
      Each output of the program, [B, ...].
    """
    dtype = next((array.dtype for array in arrays.values() if jnp.issubdtype(array.dtype, jnp.floating)), jnp.float32)
    batch = images[0].shape[0]
    if not in_chunks:
        stage = Stage(batch, program.operations, program.inputs, program.outputs)
        return _evaluate(stage, program, arrays, dtype, images)
    given = tuple(images)
    for stage in stages(program, batch):
        given = _in_chunks(functools.partial(_evaluate, stage, program, arrays, dtype), given, stage.images, batch)
    return given


def _in_chunks(function: Callable[[Maps], Maps], given: Maps, images: int, batch: int) -> Maps:
    if images >= batch:
        return function(given)
    made = lax.map(function, tuple(x.reshape(-1, images, *x.shape[1:]) for x in given))
    return tuple(y.reshape(batch, *y.shape[2:]) for y in made)


def _evaluate(stage: Stage, program: Program, arrays: Arrays, dtype: Any, given: Maps) -> Maps:
    batch, cheap = given[0].shape[0], set(program.inputs)
    values = dict(zip(stage.inputs, given, strict=True))
    values = {value: x.astype(dtype) if value in cheap else x for value, x in values.items()}
    for operation in stage.operations:
        if isinstance(operation, Apply):
            made = apply_primitive(operation, values, arrays, batch, dtype)
            if cheap.issuperset(value for value in operation.inputs if value >= 0):
                # Values that depend on the images without a layer between are cheap to compute again.
                cheap.update(operation.outputs)
        else:
            with jax.named_scope(scope_of(operation)):
                made = [_layer(operation, values[operation.x], arrays, operation.x in cheap)]
        values.update(zip(makes(operation), made, strict=True))
    return tuple(values[value] for value in stage.outputs)


def scope_of(operation: Conv | Pointwise | Run | Take) -> str:
    """Returns the name of an operation in the names of its instructions."""
    return RUN_SCOPE + operation.name.replace("/", ".")


def _layer(operation: Conv | Pointwise | Run | Take, x: jax.Array, arrays: Arrays, cheap: bool) -> jax.Array:
    if isinstance(operation, Conv):
        return _conv(x, arrays, operation, cheap)
    if isinstance(operation, Pointwise):
        return pointwise(x, arrays, operation)
    return run_chains(x, arrays, operation) if isinstance(operation, Run) else placed(x, operation.indices)


def _conv(x: jax.Array, arrays: Arrays, layer: Conv, cheap: bool) -> jax.Array:
    y = convolve(x, arrays[f"{layer.name}/kernel"], layer.window, layer.groups, of_images=cheap)
    if layer.bias != "none":
        y = y + arrays[f"{layer.name}/bias"]
    return activate(y, layer.activation)
