"""ONNX's operators as functions of JAX, on images with their channels last."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fdjax.onnx.pools import POOLS, pads
from fdjax.onnx.shapes import SHAPES
from fdjax.onnx.values import TO_LAST, Call, Tensor, Unsupported, Value, as_in_onnx, with_channels_last

_IMAGE = ("NHWC", "HWIO", "NHWC")


# -- products


def _with_bias(call: Call, made: jax.Array) -> jax.Array:
    if "bias" in call.weights:
        return made + call.weights["bias"]
    return made + call.attributes.get("beta", 1.0) * call.plain(2) if call.has(2) else made


def _kernel(call: Call) -> jax.Array:
    if "kernel" not in call.weights:
        raise Unsupported("its kernel depends on the image")
    return call.weights["kernel"]


def _conv(call: Call) -> Tensor:
    images, kernel = call.image(), _kernel(call)
    if kernel.ndim != 4:
        raise Unsupported(f"its kernel has {kernel.ndim} dimensions; convolutions over two axes are read")
    made = lax.conv_general_dilated(
        images,
        kernel,
        tuple(call.attributes.get("strides", (1, 1))),
        pads(call, images.shape[1:3], kernel.shape[:2]),
        rhs_dilation=tuple(call.attributes.get("dilations", (1, 1))),
        dimension_numbers=_IMAGE,
        feature_group_count=call.attributes.get("group", 1),
    )
    return Tensor(_with_bias(call, made), channels_last=True)


def _conv_transpose(call: Call) -> Tensor:
    images, kernel = call.image(), _kernel(call)
    attributes = call.attributes
    if attributes.get("group", 1) != 1 or attributes.get("auto_pad", "NOTSET") != "NOTSET" or kernel.ndim != 4:
        raise Unsupported("transposed convolutions are read without groups, and with explicit padding")
    if "output_shape" in attributes:
        raise Unsupported("transposed convolutions are read without output_shape")
    dilations = attributes.get("dilations", (1, 1))
    extra = attributes.get("output_padding", (0, 0))
    added = []
    for axis, (before, after) in enumerate(pads(call, images.shape[1:3], kernel.shape[:2])):
        reach = (kernel.shape[axis] - 1) * dilations[axis]
        added.append((reach - before, reach - after + extra[axis]))
    made = lax.conv_general_dilated(
        images,
        jnp.flip(kernel, (0, 1)),
        (1, 1),
        added,
        lhs_dilation=tuple(attributes.get("strides", (1, 1))),
        rhs_dilation=tuple(dilations),
        dimension_numbers=_IMAGE,
    )
    return Tensor(_with_bias(call, made), channels_last=True)


def _gemm(call: Call) -> Tensor:
    left = call.plain().T if call.attributes.get("transA") else call.plain()
    if "kernel" in call.weights:
        return Tensor(_with_bias(call, left @ call.weights["kernel"]))
    right = call.plain(1).T if call.attributes.get("transB") else call.plain(1)
    return Tensor(_with_bias(call, call.attributes.get("alpha", 1.0) * (left @ right)))


def _matmul(call: Call) -> Tensor:
    if "kernel" in call.weights:
        return Tensor(_with_bias(call, call.plain() @ call.weights["kernel"]))
    return Tensor(call.plain() @ call.plain(1))


# -- normalisation


def _batch_norm(call: Call) -> Tensor:
    value = call.tensor()
    if value.ndim == 4:
        value = Tensor(with_channels_last(value), channels_last=True)
    axis = value.axis(1)
    over = tuple(at for at in range(value.ndim) if at != axis)
    shape = [1] * value.ndim
    shape[axis] = -1
    if not {"scale", "bias", "mean", "var"} <= {*call.weights}:
        raise Unsupported("its averages, or its scales and biases, are not in the file")
    mean, var = call.weights["mean"], call.weights["var"]
    if call.train:
        mean, square = value.array.mean(over), jnp.square(value.array).mean(over)
        var = jnp.maximum(square - mean**2, 0)
        call.batch_stats.update(mean=mean, var=var)
    factor = lax.rsqrt(var + call.attributes.get("epsilon", 1e-5)) * call.weights["scale"]
    made = (value.array - mean.reshape(shape)) * factor.reshape(shape) + call.weights["bias"].reshape(shape)
    return value.like(made)


def _layer_norm(call: Call) -> Tensor:
    values = call.plain()
    over = tuple(range(call.attributes.get("axis", -1) % values.ndim, values.ndim))
    centred = values - values.mean(over, keepdims=True)
    var = jnp.square(centred).mean(over, keepdims=True)
    made = centred * lax.rsqrt(var + call.attributes.get("epsilon", 1e-5)) * call.weights["scale"]
    return Tensor(_with_bias(call, made))


def _instance_norm(call: Call) -> Tensor:
    value = call.tensor()
    if value.ndim == 4:
        return _group_norm(call)
    # PyTorch's exporter writes group norm as one of [B, groups, numbers of a group].
    values = as_in_onnx(value)
    over, shape = tuple(range(2, values.ndim)), (-1, *(1,) * (values.ndim - 2))
    mean = values.mean(over, keepdims=True)
    var = jnp.square(values - mean).mean(over, keepdims=True)
    made = (values - mean) * lax.rsqrt(var + call.attributes.get("epsilon", 1e-5))
    return Tensor(made * call.weights["scale"].reshape(shape) + call.weights["bias"].reshape(shape))


def _group_norm(call: Call) -> Tensor:
    images = call.image()
    channels = images.shape[-1]
    groups = call.attributes.get("num_groups", channels)
    parts = images.reshape(*images.shape[:3], groups, channels // groups)
    mean = parts.mean((1, 2, 4), keepdims=True)
    var = jnp.square(parts - mean).mean((1, 2, 4), keepdims=True)
    made = ((parts - mean) * lax.rsqrt(var + call.attributes.get("epsilon", 1e-5))).reshape(images.shape)
    scale, bias = call.weights["scale"], call.weights["bias"]
    if scale.shape != (channels,):  # Opset 18 has one number for a group.
        scale, bias = (jnp.repeat(value, channels // groups) for value in (scale, bias))
    return Tensor(made * scale + bias, channels_last=True)


# -- elementwise


def _as_last(value: Value) -> Any:
    """Returns an operand of an image whose channels are last, for broadcasting."""
    if isinstance(value, Tensor):
        if value.channels_last:
            return value.array
        array, joined = value.array, jnp
    else:
        array, joined = value, np
    assert array is not None
    if array.ndim == 0 or array.ndim > 4:
        return array
    return joined.transpose(joined.reshape(array, (1,) * (4 - array.ndim) + array.shape), TO_LAST)


def _elementwise(function: Callable[..., jax.Array]) -> Callable[[Call], Tensor]:
    def call_it(call: Call) -> Tensor:
        values = [value for value in call.inputs if value is not None]
        images = any(isinstance(value, Tensor) and value.channels_last for value in values)
        images = images and all(
            np.ndim(value if isinstance(value, np.ndarray) else value.array) <= 4 for value in values
        )
        arrays = [
            _as_last(value) if images else as_in_onnx(value) if isinstance(value, Tensor) else value for value in values
        ]
        return Tensor(function(*arrays), channels_last=images)

    return call_it


def _one(function: Callable[..., Any]) -> Callable[[Call], Tensor]:
    """An operator of one value; the function takes the array and the attributes."""
    return lambda call: call.tensor().like(function(call.tensor().array, call.attributes))


def _folded(function: Callable[[Any, Any], jax.Array]) -> Callable[..., jax.Array]:
    def over_all(first: Any, *others: Any) -> jax.Array:
        for other in others:
            first = function(first, other)
        return jnp.asarray(first)

    return over_all


def _clip(call: Call) -> Tensor:
    value = call.tensor()
    low, high = call.known(1, "min"), call.known(2, "max")
    made = value.array
    if low == 0 and high == 6:
        return value.like(jax.nn.relu6(made))
    made = made if low is None else jnp.maximum(made, low)
    return value.like(made if high is None else jnp.minimum(made, high))


def _gelu(values: jax.Array, attributes: Mapping[str, Any]) -> jax.Array:
    return jax.nn.gelu(values, approximate=attributes.get("approximate", "none") == "tanh")


def _hard_sigmoid(values: jax.Array, attributes: Mapping[str, Any]) -> jax.Array:
    return jnp.clip(attributes.get("alpha", 0.2) * values + attributes.get("beta", 0.5), 0, 1)


def _prelu(values: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.where(values >= 0, values, values * slope)


def _softmax(function: Callable[..., jax.Array]) -> Callable[[Call], Tensor]:
    def call_it(call: Call) -> Tensor:
        value = call.tensor()
        axis = call.attributes.get("axis", -1 if call.opset >= 13 else 1)
        if call.opset < 13 and axis % value.ndim != value.ndim - 1 and math.prod(value.shape[axis + 1 :]) > 1:
            raise Unsupported(f"in opset {call.opset} it is over several axes at once")
        return value.like(function(value.array, axis=value.axis(axis)))

    return call_it


def _dropout(call: Call) -> Tensor:
    value = call.tensor()
    rate = float(call.known(1, "ratio", 0.5))
    if not call.train or call.key is None or not 0 < rate < 1:
        return value
    kept = jax.random.bernoulli(call.key, 1 - rate, value.array.shape)
    return value.like(jnp.where(kept, value.array / (1 - rate), 0))


def _cast(call: Call) -> Tensor:
    from onnx import helper

    value, wanted = call.tensor(), np.dtype(helper.tensor_dtype_to_np_dtype(call.attributes["to"]))
    is_float = wanted.kind == "f" or wanted.name == "bfloat16"
    return value.like(value.array.astype(jnp.float32 if is_float else wanted))


def _cast_like(call: Call) -> Value:
    value, like = call.inputs[0], call.tensor(1).array.dtype
    wanted = np.float32 if jnp.issubdtype(like, jnp.floating) else like
    return (
        value.astype(wanted)
        if isinstance(value, np.ndarray)
        else call.tensor().like(call.tensor().array.astype(wanted))
    )


# Operator -> the function that computes it.
OPERATORS: Mapping[str, Callable[[Call], Value | tuple[Tensor, ...]]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
    "Add": _elementwise(jnp.add),
    "Sub": _elementwise(jnp.subtract),
    "Mul": _elementwise(jnp.multiply),
    "Div": _elementwise(jnp.divide),
    "Pow": _elementwise(jnp.power),
    "Sum": _elementwise(_folded(jnp.add)),
    "Min": _elementwise(_folded(jnp.minimum)),
    "Max": _elementwise(_folded(jnp.maximum)),
    "PRelu": _elementwise(_prelu),
    "Where": _elementwise(jnp.where),
    "Clip": _clip,
    "Relu": _one(lambda values, _: jax.nn.relu(values)),
    "LeakyRelu": _one(lambda values, of: jax.nn.leaky_relu(values, of.get("alpha", 0.01))),
    "Elu": _one(lambda values, of: jax.nn.elu(values, of.get("alpha", 1.0))),
    "Selu": _one(lambda values, _: jax.nn.selu(values)),
    "Gelu": _one(_gelu),
    "Sigmoid": _one(lambda values, _: jax.nn.sigmoid(values)),
    "HardSigmoid": _one(_hard_sigmoid),
    "HardSwish": _one(lambda values, _: values * jnp.clip(values / 6 + 0.5, 0, 1)),
    "Swish": _one(lambda values, of: values * jax.nn.sigmoid(of.get("alpha", 1.0) * values)),
    "Mish": _one(lambda values, _: jax.nn.mish(values)),
    "Softplus": _one(lambda values, _: jax.nn.softplus(values)),
    "Tanh": _one(lambda values, _: jnp.tanh(values)),
    "Erf": _one(lambda values, _: lax.erf(values)),
    "Exp": _one(lambda values, _: jnp.exp(values)),
    "Log": _one(lambda values, _: jnp.log(values)),
    "Sqrt": _one(lambda values, _: jnp.sqrt(values)),
    "Abs": _one(lambda values, _: jnp.abs(values)),
    "Neg": _one(lambda values, _: -values),
    "Reciprocal": _one(lambda values, _: 1 / values),
    "Identity": _one(lambda values, _: values),
    "Softmax": _softmax(jax.nn.softmax),
    "LogSoftmax": _softmax(jax.nn.log_softmax),
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    **POOLS,
    **SHAPES,
}
