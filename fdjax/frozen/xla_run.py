"""Pointwise layers and runs of a frozen network in XLA."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fdjax.frozen.products import Indices, ProductPlan, Window, block_shares, mean_phases
from fdjax.frozen.program import Activation, Chain, Pointwise, Run
from fdjax.frozen.xla_conv import depthwise
from fdjax.frozen.xla_products import Arrays, Input, Part, analyse, compose, multiply, segment_coefs, take

# A product of few input channels on pixels is written as a sum, so that XLA fuses the following operations with it and
# writes the wide map only once.
_MAX_PRODUCT_CHANNELS = 16


def activate(x: jax.Array, activation: Activation) -> jax.Array:
    """Applies an activation.

    Args:
      x: [...].
      activation: its name.

    Returns:
      [...].
    """
    if activation == "none":
        return x
    return jnp.clip(x, 0, 6) if activation == "relu6" else jax.nn.relu(x)


def placed(y: jax.Array, placement: Indices | None) -> jax.Array:
    """Brings channels to their places.

    Args:
      y: [..., C].
      placement: for each channel of the result its place in `y`, -1 for zero; None: the same order.

    Returns:
      [..., D].
    """
    if placement is None:
        return y
    made = y.shape[-1]
    if -1 in placement:
        y = jnp.concatenate([y, jnp.zeros((*y.shape[:-1], 1), y.dtype)], axis=-1)
    return take(y, tuple(made if index < 0 else index for index in placement))


def finished(y: jax.Array, arrays: Arrays, operation: Pointwise | Run) -> jax.Array:
    """Applies placement, bias and activation of an operation.

    Args:
      y: what its products make, [..., C].
      arrays: the network's arrays, by name.
      operation: the operation.

    Returns:
      [..., D].
    """
    y = placed(y, operation.placement)
    if operation.bias != "none":
        y = y + arrays[f"{operation.name}/bias"]
    return activate(y, operation.activation)


def pointwise(x: jax.Array, arrays: Arrays, layer: Pointwise) -> jax.Array:
    """Computes a pointwise layer.

    Args:
      x: [B, *size, C].
      arrays: the network's arrays, by name.
      layer: the layer.

    Returns:
      [B, *size, D], or the mean over the map, [B, D], if the layer is pooled.
    """
    product = layer.product
    part = multiply(analyse(x, layer.block, [product])[0], arrays, layer.name, product)
    if layer.pooled and layer.placement is None and layer.bias != "map":
        return _pooled(x, part, arrays, layer)
    y = compose([part], product.output_segments, product.output_counts, layer.block, x, layer.size)
    y = finished(y, arrays, layer)
    return y.mean(axis=(1, 2)) if layer.pooled else y


def _pooled(x: jax.Array, part: Part, arrays: Arrays, layer: Pointwise) -> jax.Array:
    """Computes the mean over the map, segment by segment; what is constant in every block stays at block resolution."""
    product, pieces = layer.product, []
    for segment in product.output_segments:
        start, stop, count = segment
        bias = 0 if layer.bias == "none" else arrays[f"{layer.name}/bias"][start:stop]
        if count == 1 and start >= product.whole[1]:
            # Each block is weighted by its part that lies on the map.
            y = activate(segment_coefs([part], segment)[0] + bias, layer.activation)
            shares = [share.astype(y.dtype) for share in block_shares((layer.size[0], layer.size[1]), layer.block)]
            pieces.append(jnp.einsum("brsc,r,s->bc", y, *shares))
        else:
            y = compose([part], [segment], product.output_counts, layer.block, x, layer.size)
            pieces.append(activate(y + bias, layer.activation).mean(axis=(1, 2)))
    if not pieces:
        return jnp.zeros((x.shape[0], 0), x.dtype)
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)


def run_chains(x: jax.Array, arrays: Arrays, run: Run) -> jax.Array:
    """Computes a run.

    Args:
      x: [B, H, W, C].
      arrays: the network's arrays, by name.
      run: the run.

    Returns:
      [B, H', W', D].
    """
    inputs = analyse(x, run.blocks[0], [chain.writer for chain in run.chains])
    parts = []
    for given, chain in zip(inputs, run.chains, strict=True):
        one = _chain_of_means if chain.means else _chain_on_pixels
        parts.append(one(x, given, arrays, run, chain))
    y = compose(parts, run.segments, run.output_counts, run.blocks[1], x, run.out_size)
    return finished(y, arrays, run)


def _chain_on_pixels(x: jax.Array, given: Input, arrays: Arrays, run: Run, chain: Chain) -> Part:
    name, writer = f"{run.name}/{chain.name}", chain.writer
    written_out = _writes_out(writer)
    if written_out:
        y = _written_out(take(x, writer.input_order), arrays[f"{name}/writer/whole"])
    else:
        part = multiply(given, arrays, f"{name}/writer", writer)
        y = compose([part], writer.output_segments, writer.output_counts, run.blocks[0], x, run.in_size)
    for index, step in enumerate(run.steps):
        array = arrays[f"{name}/step{index}"]
        if step.window is None:
            y = activate(y + array, step.activation)
        else:
            y = depthwise(y, array, step.window, from_memory=written_out)
    return multiply(analyse(y, run.blocks[1], [chain.reader])[0], arrays, f"{name}/reader", chain.reader)


def _writes_out(writer: ProductPlan) -> bool:
    return not writer.transforms and 0 < writer.inputs <= _MAX_PRODUCT_CHANNELS and writer.outputs > 0


def _written_out(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Computes x [..., C] @ kernel [C, D]; on the CPU as a sum of C products, with which XLA fuses what follows."""

    def on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, [x[..., c : c + 1] * kernel[c] for c in range(x.shape[-1])])

    return lax.platform_dependent(x, kernel, cpu=on_cpu, default=jnp.matmul)


def _chain_of_means(x: jax.Array, given: Input, arrays: Arrays, run: Run, chain: Chain) -> Part:
    """Computes a chain of means at block resolution.

    Bias and activation keep a block-constant map block-constant; of the depthwise step only the means are needed.
    """
    name = f"{run.name}/{chain.name}"
    # (share of the pixels, map) of each phase of the depthwise step; before that step there is one.
    maps = [(1.0, multiply(given, arrays, f"{name}/writer", chain.writer).low[0].coefs[0])]
    for index, step in enumerate(run.steps):
        array = arrays[f"{name}/step{index}"]
        if step.window is None:
            maps = [(weight, activate(y + array, step.activation)) for weight, y in maps]
        else:
            ((_, y),) = maps
            maps = _phases(y, array, step.window, run.blocks[0])
    means = [y if weight == 1 else y * weight for weight, y in maps]
    coefs = functools.reduce(jnp.add, means)[None]
    return multiply(Input(coefs[0], {(0, chain.channels): coefs}), arrays, f"{name}/reader", chain.reader)


def _phases(y: jax.Array, taps: jax.Array, window: Window, block: int) -> list[tuple[float, jax.Array]]:
    """Computes a depthwise step at block resolution; returns (share of pixels, map [B, R', S', E]) of each phase."""
    phases, stride = mean_phases(window, block), window.stride
    pads, last = [], []
    for axis in (0, 1):
        offsets = [tap[:2][axis] for phase in phases for tap in phase.taps]
        reach = stride[axis] * (window.out_size[axis] // block - 1)
        pads.append((max(0, -min(offsets)), max(0, reach + max(offsets) + 1 - window.in_size[axis] // block)))
        last.append(reach + 1)
    padded = jnp.pad(y, ((0, 0), *pads, (0, 0)))
    remaining, made = iter(taps), []
    for phase in phases:
        terms = []
        for row, column, _, _ in phase.taps:
            i, j = pads[0][0] + row, pads[1][0] + column
            stop = (y.shape[0], i + last[0], j + last[1], y.shape[3])
            terms.append(lax.slice(padded, (0, i, j, 0), stop, (1, *stride, 1)) * next(remaining))
        made.append((phase.weight, functools.reduce(jnp.add, terms)))
    return made
