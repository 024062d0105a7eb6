"""Convolutions of any function in the forms that are fastest on the CPU: a function transformation, like `jax.grad`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.graph.jaxprs import CALLS, bind_equation, evaluate_jaxpr
from fdjax.graph.trace import CHECKPOINTS, called_jaxpr
from fdjax.ops.conv import conv_with_pads
from fdjax.ops.depthwise import PADDINGS, conv_pads, depthwise_conv
from fdjax.ops.platform import for_cpu
from fdjax.ops.pointwise import dense_pointwise


def fast_convolutions(function: Callable[..., Any]) -> Callable[..., Any]:
    """Transforms a function so that its convolutions are fast on the CPU, in reverse-mode gradients, too.

    XLA on the CPU takes many times as long for depthwise and grouped convolutions as other forms of the same sums do
    (`fdjax.ops.depthwise`, `fdjax.ops.conv`), and longer for the gradients of other kernels at large batches. Results
    differ by rounding only.

    Convolutions of maps, in any layout, are replaced, also inside `jit` and `jax.checkpoint`. Others stay as they are:
    those over one or three axes, with dilation, in loops, in functions with their own gradients, and depthwise ones
    whose window is even or whose padding is neither TensorFlow's SAME nor PyTorch's.

    Args:
      function: any function made of JAX operations.

    Returns:
      A function of the same arguments and results. Keyword arguments are passed on as they are; positional ones are
      traced, as by `jax.jit`. On other backends than the CPU it calls `function`. As with all functions that have
      reverse-mode gradients of their own, `jax.jvp` and `jax.hessian` do not apply to it.
    """

    @functools.wraps(function)
    def transformed(*args: Any, **settings: Any) -> Any:
        if not for_cpu():
            return function(*args, **settings)
        closed, shapes = jax.make_jaxpr(functools.partial(function, **settings), return_shape=True)(*args)
        results = evaluate_jaxpr(closed.jaxpr, closed.consts, jax.tree.leaves(args), _apply)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return transformed


def _apply(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        made = _convolve(inputs[0], inputs[1], params)
        if made is not None:
            return [made]
    elif _calls_convolutions(equation):
        body = called_jaxpr(name, params)
        if name in CALLS:
            return evaluate_jaxpr(body.jaxpr, body.consts, inputs, _apply)
        again = jax.checkpoint(
            lambda *given: evaluate_jaxpr(body.jaxpr, body.consts, given, _apply),
            policy=params["policy"],
            prevent_cse=params["prevent_cse"],
        )
        return again(*inputs)
    return bind_equation(equation, inputs)


def _calls_convolutions(equation: Any) -> bool:
    """Returns whether an equation is a call that holds a convolution."""
    name = equation.primitive.name
    if name not in (*CALLS, *CHECKPOINTS):
        return False
    inner = called_jaxpr(name, equation.params).jaxpr.eqns
    return any(each.primitive.name == "conv_general_dilated" or _calls_convolutions(each) for each in inner)


def _convolve(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array | None:
    """Computes a convolution in its fast form; returns None if it has none."""
    if x.ndim != 4 or params["batch_group_count"] != 1:
        return None
    dilated = {*params["lhs_dilation"], *params["rhs_dilation"]} != {1}
    if dilated or not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype != kernel.dtype:
        return None
    if params["precision"] is not None or params["preferred_element_type"] not in (None, x.dtype):
        return None
    batch, channels, *sides = params["dimension_numbers"].lhs_spec
    outputs, inputs, *window = params["dimension_numbers"].rhs_spec
    y = _convolve_maps(x.transpose(batch, *sides, channels), kernel.transpose(*window, inputs, outputs), params)
    batch, channels, *sides = params["dimension_numbers"].out_spec
    return None if y is None else jnp.moveaxis(y, range(4), (batch, *sides, channels))


def _convolve_maps(x: jax.Array, kernel: jax.Array, params: Any) -> jax.Array | None:
    """x [B, H, W, C], kernel [rows, columns, C / groups, D] -> [B, H', W', D]; None if it has no fast form."""
    groups, strides, pads = params["feature_group_count"], params["window_strides"], params["padding"]
    if np.min(pads) < 0:
        return None
    if kernel.shape[:2] == strides == (1, 1) and groups == 1 and not np.any(pads):
        return dense_pointwise(x, kernel[0, 0])
    if groups == 1 or kernel.shape[2] > 1:
        return conv_with_pads(x, kernel, strides, pads, groups)
    window, stride = kernel.shape[0], strides[0]
    if kernel.shape[:2] != (window, window) or window % 2 == 0 or strides[1] != stride or kernel.shape[3] != groups:
        return None
    for padding in PADDINGS:
        if tuple(pads) == tuple(conv_pads(length, stride, window, padding) for length in x.shape[1:3]):
            return depthwise_conv(x, kernel[:, :, 0], stride, padding)
    return None
