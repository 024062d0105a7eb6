"""What soft masks are expected to cost: the MAC count read with masks between 0 and 1, for penalties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.ops.fcmask import coef_mask, level_counts
from fdjax.ops.macs import block_transform_macs, depthwise_macs, expected_pointwise_macs
from fdjax.spec import LayerSpec, NetworkSpec, blocks, tied_mask, unit_group_macs, units


def expected_macs(
    spec: NetworkSpec,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
) -> jax.Array:
    """Expected MACs of all that masks act on, transforms included; differentiable.

    In the convention "total" a channel that is removed takes its part of the neighbouring layers with it, the depthwise
    layer's too, tied blocks are counted group by group, and levels of 0 and N alone need no transform. For hard masks
    it is then what `network_macs` counts, but for

    - what channels share: the narrow transforms of groups;
    - what choosing the form of a layer as a whole gains: where groups or bands would cost more than the dense layer, or
      one side drops a coefficient of all its channels;
    - levels that cost a tied channel more than a mixture of those around them: they count as that mixture.

    In the convention "paper" it is the paper's count of the wrapped layers, none released: N for each kept coefficient
    of either side.

    Args:
      spec: the network.
      fcmasks: path -> FCMask [channels], in [0, 1].
      levels: kept counts below N that are accepted; None: all.
      convention: "total" or "paper".

    Returns:
      A float32 scalar.
    """
    masks = {
        path: coef_mask(fcmasks[path].astype(jnp.float32), num_coefs, levels)
        for path, (_, num_coefs) in spec.mask_sizes.items()
    }
    if convention == "paper":
        wrapped = [layer for layer in spec.layers if layer.block]
        return sum((_layer(layer, *_sides(layer, masks)) for layer in wrapped), start=jnp.zeros(()))

    total = jnp.zeros(())
    in_unit = set()
    for roles in units(spec).values():
        in_unit |= {layer.name for layer in roles.values()}
        shared = tied_mask(roles)
        total += _tied_unit(spec, roles, masks[shared], levels) if shared else _unit(roles, masks, levels)
    for roles in blocks(spec).values():
        if "conv3" in roles:
            in_unit |= {roles["conv1"].name, roles["conv3"].name}
            total += _bottleneck(roles, masks, levels)
    for layer in spec.layers:
        if layer.block and layer.name not in in_unit:
            total += _cheapest(layer, *_sides(layer, masks), levels)
    return total


def expected_ratio(
    spec: NetworkSpec,
    fcmasks: Mapping[str, jax.Array],
    levels: Sequence[int] | None = None,
    convention: str = "total",
) -> jax.Array:
    """`expected_macs` and the layers that no mask acts on, over the dense network's MACs: a float32 scalar.

    With nothing pruned it is 1, or more where levels between 0 and N need transforms.
    """
    counted = {layer.name for layer in spec.layers if layer.block}
    if convention == "total":
        counted |= {layer.name for roles in units(spec).values() for layer in roles.values()}
        counted |= {roles["conv2"].name for roles in blocks(spec).values() if "conv3" in roles}
    dense = sum(layer.dense_macs for layer in spec.counted_layers)
    rest = sum(layer.dense_macs for layer in spec.counted_layers if layer.name not in counted)
    # As floats: ResNet-50's count is no int32.
    return (expected_macs(spec, fcmasks, levels, convention) + float(rest)) / float(dense)


def _sides(layer: LayerSpec, masks: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Coefficient masks [N, C] and [N, D]; ones where a side has none."""
    pairs = ((layer.input_mask, layer.in_channels), (layer.output_mask, layer.out_channels))
    inputs, outputs = (
        masks[path] if path else jnp.ones((layer.num_coefs, channels), jnp.float32) for path, channels in pairs
    )
    return inputs, outputs


def _cheapest(layer: LayerSpec, inputs: jax.Array, outputs: jax.Array, levels: Sequence[int] | None) -> jax.Array:
    """By bands, with the cheapest transforms; by channels where there are no levels between 0 and N."""
    assert layer.block is not None
    if len(level_counts(layer.num_coefs, levels)) == 2:
        # All coefficients of a channel are the same, and a map that is not transformed is not padded to whole blocks.
        return layer.in_size[0] * layer.in_size[1] * inputs[0].sum() * outputs[0].sum()
    costs = np.diff([block_transform_macs(layer.block, count) for count in range(layer.num_coefs + 1)])
    return _layer(layer, inputs, outputs, costs.tolist())


def _layer(
    layer: LayerSpec, inputs: jax.Array, outputs: jax.Array, transforms: bool | Sequence[float] = True
) -> jax.Array:
    assert layer.block is not None
    return expected_pointwise_macs(
        layer.in_size, layer.block, layer.in_channels, layer.out_channels, inputs, outputs, transforms
    )


def _unit(roles: Mapping[str, LayerSpec], masks: Mapping[str, jax.Array], levels: Sequence[int] | None) -> jax.Array:
    """An inverted residual block without tied masks: a wide channel lives if both of its layers keep its mean."""
    expand, depthwise, project = roles.get("expand"), roles["depthwise"], roles["project"]
    total, before = jnp.zeros(()), jnp.ones(project.in_channels)
    project_in, project_out = _sides(project, masks)
    after = project_in[0]
    if expand is not None:
        expand_in, expand_out = _sides(expand, masks)
        before = expand_out[0]
        total += _cheapest(expand, expand_in, expand_out * after, levels)
    per_channel = depthwise_macs(depthwise.out_size, 1, depthwise.window)
    total += per_channel * (before @ after)
    return total + _cheapest(project, project_in * before, project_out, levels)


def _bottleneck(
    roles: Mapping[str, LayerSpec], masks: Mapping[str, jax.Array], levels: Sequence[int] | None
) -> jax.Array:
    """A bottleneck: a group of the 3x3 convolution lives as much as the most alive of what is read of it."""
    first, conv, last = roles["conv1"], roles["conv2"], roles["conv3"]
    (reads, made), (read, writes) = _sides(first, masks), _sides(last, masks)
    groups = read[0].reshape(conv.groups, -1).max(axis=1)
    if conv.groups == 1:
        per_product = conv.dense_macs / (conv.in_channels * conv.out_channels)
        middle = per_product * made[0].sum() * read[0].sum()
    else:
        middle = conv.dense_macs / conv.groups * groups.sum()
    made = made * jnp.repeat(groups, conv.in_channels // conv.groups)
    return middle + _cheapest(first, reads, made, levels) + _cheapest(last, read, writes, levels)


def _tied_unit(
    spec: NetworkSpec, roles: Mapping[str, LayerSpec], mask: jax.Array, levels: Sequence[int] | None
) -> jax.Array:
    """A block with tied masks: each wide channel costs what its kept count costs, alone."""
    accepted = level_counts(mask.shape[0], levels)
    costs = [
        sum(unit_group_macs(spec, roles, np.array([count]), narrow_transforms=False).values()) for count in accepted
    ]
    # Some levels cost about as much as N does, or more: a channel comes down past them, along the convex hull.
    places = range(len(accepted))
    steps = np.diff(np.interp(places, *_lower_hull(places, costs)))
    # The coefficients between two levels fade together: the first of them stands for all.
    return jnp.asarray(steps, jnp.float32) @ mask[np.array(accepted[:-1])].sum(axis=1)


def _lower_hull(xs: Sequence[int], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """The corners of the lower convex hull of points given from left to right."""
    hull: list[tuple[float, float]] = []
    for x, y in zip(xs, ys, strict=True):
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return [x for x, _ in hull], [y for _, y in hull]
