"""Networks with operations that are rare, or of rare parameters: frozen, they are what is masked, on every engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fdjax
from fdjax.errors import UserError
from fdjax.frozen.native import compile as native_compile
from fdjax.frozen.native.compile import NativeNetwork
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.graph.masks import MaskedGraph, layer_blocks
from fdjax.graph.network import layer_name

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
# A layer's name -> the shape of its kernel, for all networks here.
SHAPES = {
    "first": (3, 3, 3, 8), "odd": (3, 3, 3, 5), "point": (1, 1, 8, 8), "small": (1, 1, 5, 8), "each": (3, 3, 1, 5),
    "wide": (3, 3, 1, 8), "grouped": (3, 3, 4, 8), "top": (8, 4),
}  # fmt: skip
VARIABLES = {
    name: {"kernel": jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.4)}
    for seed, (name, shape) in enumerate(SHAPES.items())
}
# A product over columns: [8, 12].
COLUMNS = np.eye(8, 12, dtype=np.float32) + 0.1
Network = Callable[[Any, Any], Any]


def conv(x: Any, variables: Any, name: str, padding: Any = "SAME", groups: int = 1, **how: Any) -> Any:
    numbers = ("NHWC", "HWIO", "NHWC")
    kernel = variables[name]["kernel"]
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=numbers, feature_group_count=groups,
                                    **how)  # fmt: skip


def top(y: Any, variables: Any) -> Any:
    return y.mean((1, 2)) @ variables["top"]["kernel"]


def activated(activation: Callable[[Any], Any]) -> Network:
    return lambda v, x: top(conv(activation(conv(x, v, "first") + 0.3), v, "point") + 0.1, v)


def separable(between: Callable[[Any], Any]) -> Network:
    """Five channels, which fill no vector of eight, pass what makes zeros into no numbers."""
    return lambda v, x: top(conv(conv(between(conv(x, v, "odd") + 0.3), v, "each", groups=5), v, "small"), v)


def instance_norm(y: Any) -> Any:
    return (y - y.mean((1, 2), keepdims=True)) * lax.rsqrt(y.var((1, 2), keepdims=True))


def one_pixel(**how: Any) -> Network:
    return lambda v, x: top(conv(jax.nn.relu(conv(x, v, "first") + 0.3), v, "point", **how), v)


def spread(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    return top(conv(y, v, "point", ((0, 1), (0, 1)), lhs_dilation=(2, 2)), v)


def around_groups(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    z = jax.nn.relu(conv(y, v, "grouped", groups=2) + 0.1)
    return top(z, v), top(conv(y, v, "point"), v)


def with_new_channels(v: Any, x: Any) -> Any:
    y = conv(x, v, "odd") + 0.3
    return top(jnp.pad(y, ((0, 0), (0, 0), (0, 0), (0, 3)), constant_values=1.0) + conv(x, v, "first"), v)


def taken_from_constants(v: Any, x: Any) -> Any:
    first = conv(jax.nn.relu(conv(x, v, "odd")), v, "small") + 0.2
    return top(first - conv(x, v, "first") * jnp.linspace(0.5, 2, 8), v)


def dilated(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first", rhs_dilation=(2, 2)) + 0.3)
    y = jax.nn.relu(conv(conv(y, v, "point"), v, "wide", groups=8, rhs_dilation=(2, 3)) + 0.1)
    y = jax.nn.relu(conv(conv(y, v, "point"), v, "grouped", groups=2, rhs_dilation=(3, 3)) + 0.1)
    return top(y, v)


def in_windows(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    y = jax.nn.relu(y.reshape(y.shape[0], 4, 2, 8, 8) @ v["point"]["kernel"][0, 0] + 0.1)
    return y.mean((1, 2, 3)) @ v["top"]["kernel"]


def times_a_number(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3) * x.mean((1, 2, 3), keepdims=True)
    return top(conv(y, v, "point"), v)


def truncated(v: Any, x: Any) -> Any:
    y = conv(x, v, "first") + 0.3
    return top(conv((4 * y).astype(jnp.int32).astype(jnp.float32), v, "point"), v)


def divided(v: Any, x: Any) -> Any:
    y = (8 * conv(x, v, "first")).astype(jnp.int32) // 4
    return top(conv(y.astype(jnp.float32), v, "point"), v)


def conditions(v: Any, x: Any) -> Any:
    return top(conv(jax.nn.relu(conv((x > 0.1).astype(jnp.float32), v, "first") + 0.3), v, "point"), v)


def over_pixels(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    y = jnp.einsum("bhwc,wv->bhcv", y, COLUMNS).transpose(0, 1, 3, 2)
    return top(conv(y, v, "point"), v)


def negative_padding(v: Any, x: Any) -> Any:
    return top(conv(jax.nn.relu(conv(x, v, "first", ((-1, 0), (0, -1)))), v, "point"), v)


def of_one_row(v: Any, x: Any) -> Any:
    y = conv(jax.nn.relu(conv(x, v, "first") + 0.3), v, "point")
    return top(y, v) + y.mean((1, 2, 3))[:, None] @ v["top"]["kernel"][:1]


def partly_dead(v: Any, x: Any) -> Any:
    y = conv(x, v, "odd")
    both = jnp.concatenate([y, conv(y, v, "small")[..., :3]], axis=-1)
    return top(conv(both, v, "point"), v)


def with_rows(v: Any, x: Any) -> Any:
    """Constant rows before and after a map, as a class token is joined to others; then one of them is read, too."""
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    row = jnp.broadcast_to(v["point"]["kernel"][0, 0][None, None], (x.shape[0], 1, 8, 8))
    y = jax.nn.relu(conv(jnp.concatenate([row, y, 2 * row], axis=1), v, "point") + 0.1)
    return top(y, v) + y[:, 0].mean(1) @ v["top"]["kernel"]


NETWORKS: dict[str, Network] = {
    "leaky ReLU": activated(jax.nn.leaky_relu),
    "ELU": activated(jax.nn.elu),
    "softplus": activated(jax.nn.softplus),
    "where": activated(lambda y: jnp.where(y > 0.1, y, 0.2)),
    "clip": activated(lambda y: jnp.clip(y, -0.1, 0.9)),
    "soft sign, depthwise": separable(jax.nn.soft_sign),
    "instance norm, depthwise": separable(instance_norm),
    "one pixel, padded": one_pixel(padding=((1, 1), (1, 1))),
    "one pixel, moved": one_pixel(padding=((1, -1), (0, 0))),
    "one pixel, spread": spread,
    "a residual around groups": around_groups,
    "padding adds channels": with_new_channels,
    "a difference from constants": taken_from_constants,
    "dilated": dilated,
    "products in windows": in_windows,
    "a part of a concatenation is dead": partly_dead,
    "times a number for each image": times_a_number,
    "truncated to integers": truncated,
    "integers divided": divided,
    "conditions as numbers": conditions,
    "a product over pixels": over_pixels,
    "a matrix of one row": of_one_row,
    "constant rows are joined": with_rows,
    "negative padding first": negative_padding,
}
# What an engine has no code for, and says so.
NOT_NATIVE = (
    "one pixel, moved", "negative padding first", "times a number for each image", "a matrix of one row",
    "truncated to integers", "integers divided", "a product over pixels",
)  # fmt: skip
REFUSED = {*(("native", name) for name in NOT_NATIVE), ("onnxruntime", "integers divided")}


def counts_of(name: str, graph: fdjax.MaskedGraph) -> dict[str, np.ndarray]:
    """Kept counts that show what the network is there for: drawn, or with all of some channels dead."""
    rng = np.random.default_rng(0)
    counts = {path: rng.choice(graph.levels_of(path), channels) for path, (channels, _) in graph.mask_sizes.items()}
    if name == "a residual around groups":
        counts = {**counts, "first/channels": np.ones(8, int), "grouped/channels": np.repeat([1, 0], 4)}
    if name in ("a difference from constants", "a part of a concatenation is dead"):
        counts = {path: np.zeros_like(count) if path.startswith("small") or (name.startswith("a diff") and
                  path.startswith("odd")) else count for path, count in counts.items()}  # fmt: skip
    return counts


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program runs once: it need not be fast."""
    flags = ("-std=c++17", "-O0", "-march=native", "-fPIC", "-shared")
    monkeypatch.setattr(native_compile.compile_source, "__defaults__", (flags, None))


@pytest.mark.skipif(not any(map(shutil.which, native_compile.COMPILERS)), reason="there is no C++ compiler")
@pytest.mark.parametrize("name", NETWORKS)
def test_frozen_is_masked_on_every_engine(name: str, tmp_path) -> None:
    apply = NETWORKS[name]
    graph = fdjax.with_masks(fdjax.trace(apply, VARIABLES, IMAGES), floor=0)
    for counts in (counts_of(name, graph), graph.full_counts()):
        wanted = jax.tree.leaves(jax.jit(fdjax.masked(apply, graph))(counts, VARIABLES, IMAGES))
        made = fdjax.freeze(graph, VARIABLES, counts)
        program, arrays = made.frozen.program, made.frozen.arrays
        macs = fdjax.count(graph, counts).to_dict()
        assert program.macs() <= macs["total"] <= macs["dense"]
        engines = {
            "xla": lambda made=made: made,
            "onnxruntime": lambda program=program, arrays=arrays: onnxruntime_session(to_onnx(program, arrays), 1),
            "native": lambda program=program, arrays=arrays: NativeNetwork(program, arrays, folder=tmp_path),
        }
        found = {}
        for engine, opened in engines.items():
            if (engine, name) in REFUSED:
                with pytest.raises(UserError):
                    opened()
            else:
                found[engine] = opened()(IMAGES)
        for engine, results in found.items():
            for result, want in zip(jax.tree.leaves(results), wanted, strict=True):
                tolerance = 1e-5 * float(jnp.abs(want).max())
                np.testing.assert_allclose(result, want, rtol=0, atol=tolerance, err_msg=engine)


def merged(v: Any, x: Any) -> Any:
    y = jax.nn.relu(conv(x, v, "first") + 0.3)
    y = y.reshape(-1, 8) @ v["point"]["kernel"][0, 0]
    return top(jax.nn.relu(y).reshape(x.shape[0], 8, 8, 8), v)


def test_images_that_are_merged_with_pixels_are_named_counted_and_not_frozen() -> None:
    graph = fdjax.trace(merged, VARIABLES, IMAGES)
    assert graph.layers["point"].in_size == (64,) and "merges images with pixels" in str(graph)
    whole = MaskedGraph("network", graph, {}, {}, 4)
    assert {layer.name: layer.dense for layer in fdjax.count(whole, {}).layers}["point"] == 64 * 8 * 8
    with pytest.raises(ValueError, match=r"no form for reshape .*, because the first axis .* keep them first"):
        fdjax.freeze(whole, VARIABLES, {})


def test_padding_may_be_minus_infinity(tmp_path) -> None:
    def apply(v: Any, x: Any) -> Any:
        y = jnp.pad(conv(x, v, "first") - 9.0, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
        y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        return top(conv(y, v, "point"), v)

    graph = fdjax.with_masks(fdjax.trace(apply, VARIABLES, IMAGES))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    wanted = jax.jit(fdjax.masked(apply, graph))(counts, VARIABLES, IMAGES)
    made = fdjax.freeze(graph, VARIABLES, counts)
    program, arrays = made.frozen.program, made.frozen.arrays
    made.save(tmp_path / "frozen")
    for found in (
        made(IMAGES),
        fdjax.load(tmp_path / "frozen")(IMAGES),
        onnxruntime_session(to_onnx(program, arrays), 1)(IMAGES),
        NativeNetwork(program, arrays, folder=tmp_path)(IMAGES),
    ):
        np.testing.assert_allclose(np.asarray(jax.tree.leaves(found)[0]), wanted, rtol=1e-5)


def test_constants_of_removed_channels_are_kept_or_refused() -> None:
    """The outputs of a layer go, and what their biases make of them is a constant for the layer that reads them."""

    def network(between: Callable[[Any, Any], Any]) -> Network:
        def apply(v: Any, x: Any) -> Any:
            y = conv(jax.nn.relu(conv(x, v, "first")), v, "point") + 0.3
            return top(between(jax.nn.relu(y), x), v)

        return apply

    over_columns = network(lambda y, x: jnp.einsum("bhwc,wv->bhcv", y, COLUMNS).transpose(0, 1, 3, 2))
    scaled = network(lambda y, x: y * x.mean((1, 2, 3), keepdims=True))
    for apply, fits in ((over_columns, True), (scaled, False)):
        graph = fdjax.with_masks(fdjax.trace(apply, VARIABLES, IMAGES), tied=False)
        counts = dict(graph.full_counts()) | {"point/output": np.arange(8) % 2}
        wanted = jax.jit(fdjax.masked(apply, graph))(counts, VARIABLES, IMAGES)
        if fits:
            np.testing.assert_allclose(fdjax.freeze(graph, VARIABLES, counts)(IMAGES), wanted, rtol=1e-4, atol=1e-4)
            continue
        with pytest.raises(ValueError, match=r"no form for mul .*would differ from image to image"):
            fdjax.freeze(graph, VARIABLES, counts)


def test_integers_of_images_are_not_computed_with_and_soft_masks_are_no_counts() -> None:
    def halved(v: Any, x: Any) -> Any:
        return top(conv((x // jnp.uint8(2)).astype(jnp.float32), v, "first"), v)

    whole = fdjax.with_masks(fdjax.trace(halved, VARIABLES, (50 * IMAGES + 128).astype(np.uint8)))
    with pytest.raises(ValueError, match=r"div of images of integers.*convert them to it first"):
        fdjax.freeze(whole, VARIABLES, whole.full_counts())
    graph = fdjax.with_masks(fdjax.trace(NETWORKS["leaky ReLU"], VARIABLES, IMAGES))
    with pytest.raises(ValueError, match=r"must be integers from 0 to 1, got float32; soft masks .* fdjax\.harden"):
        fdjax.freeze(graph, VARIABLES, fdjax.init_fcmask(graph))


def test_onnx_says_which_outputs_are_conditions() -> None:
    def both(v: Any, x: Any) -> Any:
        logits = top(conv(jax.nn.relu(conv(x, v, "first")), v, "point"), v)
        return logits, logits > 0

    graph = fdjax.with_masks(fdjax.trace(both, VARIABLES, IMAGES))
    frozen = fdjax.freeze(graph, VARIABLES, graph.full_counts()).frozen
    logits, positive = onnxruntime_session(to_onnx(frozen.program, frozen.arrays), 1)(IMAGES)
    assert positive.dtype == np.bool_ and np.array_equal(positive, np.asarray(logits) > 0)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        tokens = nn.Conv(8, (1, 1), dtype=jnp.bfloat16, name="embed")(x).reshape(x.shape[0], 64, 8)
        tokens = tokens + nn.MultiHeadDotProductAttention(2, dtype=jnp.bfloat16, name="attention")(tokens)
        hidden = nn.Dense(8, dtype=jnp.bfloat16, name="mlp2")(
            nn.gelu(nn.Dense(16, dtype=jnp.bfloat16, name="mlp1")(tokens))
        )
        return nn.Dense(4, name="top")((tokens + hidden).mean(1))


def test_modules_in_bfloat16_are_frozen() -> None:
    module = Attention()
    variables: Any = module.init(jax.random.key(0), jnp.asarray(IMAGES))
    graph = fdjax.with_masks(fdjax.trace(module.apply, variables, IMAGES))
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    wanted = jax.jit(fdjax.masked(module.apply, graph))(counts, variables, IMAGES)
    found = fdjax.freeze(graph, variables, counts)(IMAGES)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.02 * float(jnp.abs(wanted).max()))


def test_products_that_belong_to_no_layer_are_counted() -> None:
    """Those of attention, of kernels with several axes, over pixels, and in loops."""
    variables = jax.eval_shape(Attention().init, jax.random.key(0), IMAGES)
    graph = fdjax.trace(Attention().apply, variables, IMAGES)
    layers = 64 * 3 * 8 + 2 * 64 * 8 * 16 + 8 * 4
    attention = 4 * 64 * 8 * 8 + 2 * 64 * 64 * 8
    assert graph.product_macs == attention and f"{layers + attention:,} MACs an image" in str(graph)
    masks = fdjax.with_masks(graph)
    dense = fdjax.count(masks, masks.full_counts()).to_dict()
    assert dense["dense"] == dense["total"] == layers + attention
    nothing = {path: np.zeros_like(count) for path, count in masks.full_counts().items()}
    ratio = fdjax.count(masks, nothing).ratio
    assert ratio > attention / (layers + attention)
    soft = {path: jnp.asarray(count, jnp.float32) for path, count in nothing.items()}
    assert float(fdjax.expected_ratio(masks, soft)) == pytest.approx(ratio, rel=1e-5)

    def looped(v: Any, x: Any) -> Any:
        y = conv(x, v, "first")
        y = lax.fori_loop(0, 3, lambda _, y: conv(y, v, "point"), y)
        return top(jnp.einsum("bhwc,wv->bhvc", y, COLUMNS), v)

    assert fdjax.trace(looped, VARIABLES, IMAGES).product_macs == 3 * 64 * 64 + 8 * 8 * 12 * 8


def test_learned_positions_and_mixed_tokens_are_frozen() -> None:
    """What a layer adds may differ from token to token."""

    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            tokens = nn.Conv(12, (2, 2), strides=(2, 2), name="patch")(x).reshape(x.shape[0], 16, 12)
            tokens = tokens + self.param("positions", nn.initializers.normal(1.0), (1, 16, 12))
            mixed = nn.Dense(16, name="mix", bias_init=nn.initializers.normal(1.0))(tokens.swapaxes(1, 2))
            tokens = tokens + mixed.swapaxes(1, 2)
            tokens = tokens + nn.Dense(12, name="fc2")(nn.gelu(nn.Dense(24, name="fc1")(tokens)))
            return nn.Dense(5, name="top")(tokens.mean(1))

    variables: Any = Tokens().init(jax.random.key(0), jnp.asarray(IMAGES))
    graph = fdjax.with_masks(fdjax.trace(Tokens().apply, variables, IMAGES), block=1)
    counts = {path: np.arange(channels) % 2 for path, (channels, _) in graph.mask_sizes.items()}
    wanted = jax.jit(fdjax.masked(Tokens().apply, graph))(counts, variables, IMAGES)
    np.testing.assert_allclose(fdjax.freeze(graph, variables, counts)(IMAGES), wanted, rtol=1e-4, atol=1e-5)


def test_maps_of_one_channel_and_numbers_for_each_image_hide_no_layer() -> None:
    def flattened(v: Any, x: Any) -> Any:
        y = jax.nn.relu(conv(x, v, "one"))
        return y.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ v["flat"]["kernel"] @ v["top"]["kernel"]

    variables = {**VARIABLES, "one": {"kernel": jnp.ones((3, 3, 3, 1))}, "flat": {"kernel": jnp.ones((64, 8))}}
    graph = fdjax.trace(flattened, variables, IMAGES)
    macs = {name: layer.dense_macs for name, layer in graph.layers.items()}
    assert macs == {"one": 64 * 27, "flat": 64 * 8, "top": 32}

    def timed(v: Any, x: Any, time: Any) -> Any:
        embedded = jax.nn.silu(time[:, None] @ v["time"]["kernel"]) @ v["point"]["kernel"][0, 0]
        return top(conv(jax.nn.relu(conv(x, v, "first") + embedded[:, None, None]), v, "wide_point"), v)

    variables = {**VARIABLES, "time": {"kernel": jnp.ones((1, 8))}, "wide_point": VARIABLES["point"]}
    graph = fdjax.trace(timed, variables, IMAGES, np.ones(2, np.float32))
    assert {*graph.layers} == {"first", "point", "wide_point", "top"}
    assert graph.spaces[graph.layers["wide_point"].target].pinned is None


def test_layers_with_constant_kernels_stay_as_they_are() -> None:
    """A masked function finds its layers by the paths of their kernels."""
    haar = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], np.float32).reshape(4, 2, 2) / 2
    filters = np.tile(np.moveaxis(haar, 0, -1)[:, :, None], (1, 1, 1, 8))

    def wavelet(v: Any, x: Any) -> Any:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.nn.relu(conv(x, v, "first"))
        y = lax.conv_general_dilated(y, filters, (2, 2), "VALID", dimension_numbers=numbers, feature_group_count=8)
        return top(conv(jax.nn.relu(y @ v["down"]["kernel"]), v, "point"), v)

    variables = {**VARIABLES, "down": {"kernel": jnp.ones((32, 8)) / 8}}
    for tied in (True, False):
        graph = fdjax.with_masks(fdjax.trace(wavelet, variables, IMAGES), tied=tied)
        assert graph.layers["unnamed"].constant and not any("unnamed" in path for path in graph.masks)
        masked = fdjax.masked(wavelet, graph)(graph.full_counts(), variables, IMAGES)
        np.testing.assert_allclose(masked, wavelet(variables, IMAGES), rtol=1e-4, atol=1e-5)


def test_a_layer_may_be_called_value() -> None:
    assert layer_name("params/attention/value/kernel") == "attention/value"
    assert layer_name("attention/kernel/value") == layer_name("attention/kernel") == "attention"


def test_one_pixel_and_tokens_have_blocks_of_one() -> None:
    """Squeeze-and-excite by convolutions, and sequences shorter than the block."""

    def excited(v: Any, x: Any) -> Any:
        y = conv(x, v, "first")
        y = y * jax.nn.sigmoid(conv(y.mean((1, 2), keepdims=True), v, "squeeze"))
        return top(conv(y, v, "point"), v)

    graph = fdjax.trace(excited, {**VARIABLES, "squeeze": VARIABLES["point"]}, IMAGES)
    assert layer_blocks(graph, ("squeeze", "point"), 2) == {"squeeze": 1, "point": 2}
    with pytest.raises(ValueError, match="block 2 is larger than the 1x1 map of layer squeeze"):
        layer_blocks(graph, ("squeeze", "point"), 2, by_layer={"squeeze": 2})
    pixels = np.ones((2, 1, 1, 8), np.float32)
    tokens = fdjax.trace(lambda v, x: x.reshape(-1, 1, 8) @ v["top"]["kernel"], VARIABLES, pixels)
    assert layer_blocks(tokens, ("top",), 4) == {"top": 1}
