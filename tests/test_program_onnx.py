"""A program in ONNX Runtime makes what its layers make, masked and unfrozen; the file stays small."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.errors import UserError
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx, write_onnx
from fdjax.frozen.program import Apply, Program
from tests.frozen_networks import HASTE, relative_error
from tests.programs import Network
from tests.test_program_xla import attention, normalised, pooled, raw_images, whole_network

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


def check(network: Network, *outputs: int, batch: int = 2):
    """Compares with the layers themselves; returns the model."""
    model, images = to_onnx(network.program(*outputs), network.arrays), raw_images(network, batch)
    found = onnxruntime_session(model, threads=1)(images)
    expected = jax.jit(network.reference(*outputs), compiler_options=HASTE)(images)
    for value, y, wanted in zip(outputs, [found] if len(outputs) == 1 else found, expected, strict=True):
        assert y.shape == (batch, *network.shapes[value])
        assert relative_error(y, np.asarray(wanted)) < 1e-5
    return model


def pads_of(model) -> list[int]:
    return [pad for node in model.graph.node for a in node.attribute if a.name == "pads" for pad in a.ints]


FORMS = {
    "dense": lambda n: ((n,), True),
    "channels": lambda n: ((0, n), True),
    "means": lambda n: ((0, 1, n), True),
    "groups": lambda n: ((0, 1, n // 2, n), True),
    "bands": lambda n: (None, False),
    "all means": lambda n: ((1,), True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [2, 3, 4, 7])
def test_every_mask_form_block_and_stride(form, stride, block) -> None:
    levels, tied = FORMS[form](block**2)
    model = None
    # The block divides both maps, or neither.
    for size in ((2 * block, 4 * block), (2 * block + 1, 3 * block - 1)):
        network = Network((*size, 5), block)
        x = network.run(normalised(network), 14, 6, block, levels, stride=(stride, stride), tied=tied, bias="map")
        # TensorFlow's padding at stride 2 is one-sided.
        pads = ((0, 1), (0, 1)) if stride == 2 else None
        network = network if pads is None else Network((*size, 5), block)
        if pads is not None:
            x = network.run(normalised(network), 14, 6, block, levels, stride=(2, 2), tied=tied, pads=pads)
        model = check(network, x)
        assert min(pads_of(model), default=0) >= 0


@pytest.mark.parametrize(
    ("window", "stride", "pads", "block"),
    [((5, 5), (1, 1), None, 3), ((1, 3), (1, 2), None, 2), (None, (1, 1), None, 3), ((3, 3), (2, 2), None, (2, 3))],
)
def test_runs_with_other_windows(window, stride, pads, block) -> None:
    levels = (0, 1, 9) if block == 3 else (1, 4)
    network = Network((12, 12, 5))
    y = network.run(normalised(network), 14, 6, block, levels, window=window, stride=stride, pads=pads)
    check(network, y)


@pytest.mark.parametrize(
    ("levels", "out_levels", "block", "size", "bias"),
    [
        (None, None, 2, (6, 6), "channel"),
        ((0, 1), (1,), 3, (7, 8), "none"),
        ((16,), (1, 16), 4, (8, 6), "channel"),
        ((1,), (1,), 1, (5, 5), "map"),
        (None, (4, 5, 9), 3, (9, 9), "map"),
    ],
)
def test_pointwise_layers(levels, out_levels, block, size, bias) -> None:
    network = Network((*size, 7))
    x = normalised(network)
    both = [network.pointwise(x, 12, block, levels, bias, pooled=mean, out_levels=out_levels) for mean in (False, True)]
    check(network, *both)


def test_pointwise_layers_on_vectors_and_tokens() -> None:
    network = Network((5, 8))
    tokens = network.pointwise(normalised(network), 12, 1, (0, 1), bias="map")
    vector = network.function(lambda x: x.mean(axis=1), tokens)
    check(network, tokens, network.pointwise(vector, 3, 1, (1,), activation="none"), network.take(vector, (2, -1, 0)))


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "window", "stride", "pads"),
    [
        (3, 8, 1, (3, 3), (2, 2), ((0, 1), (0, 1))),
        (8, 8, 8, (5, 3), (2, 1), ((1, 2), (0, 0))),
        (8, 16, 8, (3, 3), (1, 1), None),
        (8, 12, 2, (3, 1), (1, 2), None),
        (4, 4, 1, (3, 3), (2, 2), ((-1, 1), (1, -2))),
    ],
)
def test_convolutions(channels, outputs, groups, window, stride, pads) -> None:
    network = Network((9, 10, channels))
    y = network.conv(normalised(network), outputs, window, stride, groups, pads)
    model = check(network, network.conv(y, outputs, groups=outputs, bias="map", activation="relu"), y)
    assert min(pads_of(model)) >= 0


def test_a_layer_with_nothing_left_is_its_bias() -> None:
    network = Network((6, 6, 4))
    x = normalised(network)
    layer = network.pointwise(x, 3, 2, (0,), activation="none")
    vector = network.pointwise(network.function(lambda x: x.mean((1, 2)), layer), 3, 1, (0,), activation="none")
    run = network.run(x, 8, 3, 2, (4,), bias="map")
    # What freezing leaves of a run that has lost its space.
    lost = dataclasses.replace(network.operations[-1], chains=(), segments=(), output_counts=(), placement=(-1,) * 3)
    network.operations[-1] = lost
    network.reference_steps[-1] = (
        (x,),
        (run,),
        lambda x: jnp.zeros((len(x), 1, 1, 1)) + network.arrays[f"{lost.name}/bias"],
    )
    check(network, layer, vector, run)


# Other operations


def normalise_over_channels(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)


def squeeze_and_excite(x):
    gates = jax.nn.sigmoid(x.mean(axis=(1, 2)))
    return x * gates[:, None, None, :] + jnp.broadcast_to(gates[:, None, None, :], x.shape)


def pieces(x):
    a, b = jnp.split(x, [2], axis=-1)
    joined = jnp.concatenate([b, jnp.ones((x.shape[0], *x.shape[1:3], 1)), a[..., ::1], x[:, :, :, 1:3]], axis=-1)
    return joined[:, 1::2, 1:, :] / 3 - jnp.exp(-jnp.abs(joined[:, :1, :1]))


def average(x):
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 0), (0, 0)))
    return jnp.log1p(total**2) + jnp.sqrt(total**3 + 1) - jnp.expm1(-total) + jax.lax.erf(total)


def chosen(x):
    return jnp.where((x > 0.5) & (x <= 3), jnp.clip(x, 0.1, 0.9), jnp.minimum(-x, 2.0)) * (x != 1).astype(x.dtype)


def transposed(x):
    rows = jnp.transpose(x, (0, 2, 1, 3)).max(axis=1)
    return jnp.einsum("bhc,bwc->bhw", rows, x.min(axis=2)) @ np.ones((4, 3), np.float32) + jnp.tanh(x[:, :, 0, :3])


def shifted_windows(x):
    heads = x.reshape(x.shape[0], 2, 2, 6, 5).transpose(0, 1, 3, 2, 4)
    scores = jax.nn.softmax(jnp.einsum("bhqkc,bhpkc->bhqp", heads, heads))
    return jnp.einsum("bhqp,bhpkc->bhqkc", scores, heads)


def dilated(x):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 5, 4)).astype(np.float32)
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", rhs_dilation=(2, 2), dimension_numbers=numbers)


@pytest.mark.parametrize(
    "function",
    [
        attention,
        average,
        chosen,
        dilated,
        jax.nn.gelu,
        normalise_over_channels,
        pieces,
        pooled,
        shifted_windows,
        squeeze_and_excite,
        transposed,
        lambda x: jax.nn.softmax(jnp.squeeze(x[:, :1], 1).sum(1)) * jax.lax.stop_gradient(x.mean((1, 2))),
        lambda x: jax.nn.hard_swish(x[:, :1, :1]).reshape(x.shape[0], 5),
    ],
)
def test_other_operations_take_any_batch(function) -> None:
    network = Network((4, 6, 5))
    y = network.function(function, network.conv(normalised(network), 5))
    check(network, y, batch=3)


def test_an_operation_without_a_form_is_named() -> None:
    network = Network((4, 6, 5))
    y = network.function(lambda x: jnp.cumsum(x, axis=1), normalised(network))
    with pytest.raises(UserError, match=r"layer2: the operation 'cumsum' .*stablehlo"):
        to_onnx(network.program(y), network.arrays)
    program = network.program(y)
    wrong = dataclasses.replace(
        program.operations[-1],
        kind="pad",
        inputs=(1, -2),
        params=json.dumps({"padding_config": [[0, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]]}),
    )
    network.arrays["layer2/arg1"] = np.float32(0)
    with pytest.raises(UserError, match="layer2: the operation 'pad' with padding below zero"):
        to_onnx(dataclasses.replace(program, operations=(*program.operations[:-1], wrong)), network.arrays)
    assert isinstance(wrong, Apply)


# The file


def test_a_whole_network_takes_any_batch_and_writes_its_names(tmp_path) -> None:
    import onnx

    network, logits = whole_network()
    check(network, logits, batch=1)
    check(network, logits, batch=5)
    write_onnx(network.program(logits), network.arrays, tmp_path / "network.onnx")
    model = onnx.load(tmp_path / "network.onnx")
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert {node.op_type for node in model.graph.node} >= {"Conv", "Clip", "Gemm"}
    # Engines join a Clip to the layer before it where its bounds are scalars.
    shapes = {constant.name: list(constant.dims) for constant in model.graph.initializer}
    bounds = [name for node in model.graph.node if node.op_type == "Clip" for name in node.input[1:]]
    assert bounds and not any(shapes[name] for name in bounds)
    # And nothing lies in it that nothing reads.
    assert {*shapes} <= {name for node in model.graph.node for name in node.input}


@pytest.mark.parametrize(("levels", "tied"), [((1, 9), True), ((1, 3, 9), True), (None, False), ((4, 5, 6, 9), False)])
def test_a_file_is_hardly_larger_than_the_dense_networks(levels, tied) -> None:
    sizes = []
    for kept, both in (((9,), True), (levels, tied)):
        network = Network((12, 12, 3))
        x = network.conv(normalised(network), 64, stride=(2, 2))
        for _ in range(2):
            x = network.run(x, 256, 64, 3, kept, tied=both)
        y = network.pointwise(x, 256, 3, kept, pooled=True)
        sizes.append(len(check(network, y).SerializeToString()))
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize(("channels", "first"), [(3, ["Transpose", "Sub"]), (16, ["Add", "Transpose"])])
def test_a_number_for_each_channel_of_an_image_is_added_channel_by_channel(channels, first) -> None:
    """Along a last axis of three, engines add pixel by pixel."""
    network = Network((6, 8, channels), 2)
    mean = np.arange(1.0, channels + 1, dtype=np.float32).reshape(1, 1, 1, channels)
    y = network.function(lambda x: x + mean, 0)
    y = network.conv(y, 4, (3, 3))
    # Raw images make sums in the hundreds. Clipped to 6, these would lose most values, and keep all of their rounding.
    (kernel,) = (array for name, array in network.arrays.items() if name.endswith("kernel"))
    kernel /= 64
    model = check(network, y)
    assert [node.op_type for node in model.graph.node[:2]] == first


def test_a_map_of_biases_is_stored_by_its_kinds_of_rows() -> None:
    network = Network((32, 32, 4))
    y = network.run(normalised(network), 12, 64, 2, (4,), bias="map")
    (name,) = (name for name, array in network.arrays.items() if name.endswith("bias") and array.ndim == 3)
    bias = network.arrays[name]
    bias[1:-1], bias[:, 1:-1] = bias[1], bias[:, 1:2]
    model = check(network, y)
    assert len(model.SerializeToString()) < bias.nbytes / 4


def test_without_onnx_there_is_a_word_of_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx"):
        to_onnx(Program((), (), (), ()), {})
