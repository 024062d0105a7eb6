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
from fdjax.graph.masks import MaskedGraph

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
