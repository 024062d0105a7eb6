"""The depthwise convolution; oracles: XLA's grouped convolution with its own gradient, and PyTorch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.ops import chunks, depthwise_conv
from fdjax.ops.depthwise import correlate, correlate_grads, output_size, pad_map, unpad_map

CASES = [
    (size, stride, padding)
    for size in ((7, 8), (6, 5))
    for stride in (1, 2)
    for padding in ("same", "torch")
] + [((7, 8), 3, "same"), ((7, 8), 3, "torch"), ((1, 2), 2, "same"), ((1, 1), 1, "torch")]  # fmt: skip
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def grouped(x: jax.Array, kernel: jax.Array, stride: int, padding: str) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        "SAME" if padding == "same" else [(1, 1), (1, 1)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def value_and_grads(function, x, kernel, stride: int, padding: str, cotangent, jit=fast_jit):
    """y, and the gradients to x and kernel under `cotangent`."""

    def run(x, kernel, cotangent):
        y, pull = jax.vjp(lambda x, kernel: function(x, kernel, stride, padding), x, kernel)
        return y, *pull(cotangent)

    return jit(run)(x, kernel, cotangent)


@pytest.mark.parametrize(("size", "stride", "padding"), CASES)
def test_forward_and_gradients_are_the_grouped_convolutions(size, stride: int, padding: str) -> None:
    x, kernel = normal(2, *size, 5), normal(3, 3, 5, seed=1)
    cotangent = normal(2, -(-size[0] // stride), -(-size[1] // stride), 5, seed=2)
    found = value_and_grads(depthwise_conv, x, kernel, stride, padding, cotangent)
    expected = value_and_grads(grouped, x, kernel, stride, padding, cotangent)
    for name, left, right in zip(("y", "dx", "dkernel"), found, expected, strict=True):
        assert left.shape == right.shape, name
        np.testing.assert_allclose(left, right, atol=2e-5, err_msg=name)


def test_same_and_torch_padding_differ_for_even_maps_at_stride_2_only() -> None:
    kernel = normal(3, 3, 2)
    for size, stride, differ in (((6, 6), 2, True), ((7, 7), 2, False), ((6, 6), 1, False)):
        x = normal(1, *size, 2)
        same, torch = (depthwise_conv(x, kernel, stride, padding) for padding in ("same", "torch"))  # type: ignore[arg-type]
        assert bool(np.abs(same - torch).max() > 0.1) == differ


@pytest.mark.parametrize("stride", [1, 2])
def test_torch_padding_is_pytorchs(stride: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: its depthwise convolution is the oracle")
    x, kernel = normal(2, 6, 7, 5), normal(3, 3, 5, seed=1)
    cotangent = normal(2, -(-6 // stride), -(-7 // stride), 5, seed=2)
    x_t = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    kernel_t = torch.tensor(kernel.transpose(2, 0, 1)[:, None], requires_grad=True)
    y_t = torch.nn.functional.conv2d(x_t, kernel_t, stride=stride, padding=1, groups=5)
    y_t.backward(torch.tensor(cotangent.transpose(0, 3, 1, 2)))
    found = value_and_grads(depthwise_conv, x, kernel, stride, "torch", cotangent)
    expected = (
        y_t.detach().numpy().transpose(0, 2, 3, 1),
        x_t.grad.numpy().transpose(0, 2, 3, 1),
        kernel_t.grad.numpy()[:, 0].transpose(1, 2, 0),
    )
    for left, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


def padded_in_float64(x: np.ndarray, stride: int) -> np.ndarray:
    """For an even map and "same" padding at stride 1 or 2."""
    return np.pad(np.float64(x), ((0, 0), *[(1, 1) if stride == 1 else (0, 1)] * 2, (0, 0)))


@pytest.mark.parametrize("batch", [10, 11])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_big_batch_is_taken_in_chunks(batch: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit a core's cache runs a few images at a time; 11 images divide into single ones only."""
    x, kernel = normal(batch, 64, 64, 16), normal(3, 3, 16, seed=1)
    cotangent = normal(batch, 64 // stride, 64 // stride, 16, seed=2)
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 2_400_000)
    assert x.nbytes + cotangent.nbytes > chunks._CHUNK_BYTES
    program = str(jax.make_jaxpr(partial(value_and_grads, depthwise_conv, jit=lambda f: f), static_argnums=(2, 3))(
        x, kernel, stride, "same", cotangent
    ))  # fmt: skip
    assert "scan" in program
    _, found_dx, found = value_and_grads(depthwise_conv, x, kernel, stride, "same", cotangent, jax.jit)
    padded = padded_in_float64(x, stride)
    to_padded = np.zeros_like(padded)
    span = cotangent.shape[1] * stride
    for i in range(3):
        for j in range(3):
            view = (slice(None), slice(i, i + span, stride), slice(j, j + span, stride))
            np.testing.assert_allclose(
                found[i, j], np.sum(padded[view] * cotangent, axis=(0, 1, 2)), atol=2e-3, rtol=1e-4
            )
            to_padded[view] += kernel[i, j] * cotangent
    before = 2 - stride
    np.testing.assert_allclose(found_dx, to_padded[:, before : before + 64, before : before + 64], atol=2e-5)


@pytest.mark.parametrize(
    ("batch", "stride", "padding", "chunk_images", "num_chunks"),
    # As 4 does not divide 6, 3 images are taken at a time.
    [
        (6, 1, "same", 0, 6),
        (6, 1, "torch", 2, 3),
        (6, 2, "same", 4, 2),
        (5, 2, "torch", 3, 5),
        (6, 2, "torch", 6, None),
    ],
)
def test_chunks_do_not_change_the_gradients(
    batch: int,
    stride: int,
    padding: str,
    chunk_images: int,
    num_chunks: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with jax.enable_x64(True):
        x, kernel = np.float64(normal(batch, 4, 6, 3)), np.float64(normal(3, 3, 3, seed=1))
        cotangent = np.float64(normal(batch, 4 // stride, 6 // stride, 3, seed=2))
        at_once = value_and_grads(depthwise_conv, x, kernel, stride, padding, cotangent)
        monkeypatch.setattr(chunks, "_CHUNK_BYTES", chunk_images * (x[0].nbytes + cotangent[0].nbytes))
        found = value_and_grads(depthwise_conv, x, kernel, stride, padding, cotangent)
        expected = value_and_grads(grouped, x, kernel, stride, padding, cotangent)
        program = jax.make_jaxpr(partial(value_and_grads, depthwise_conv, jit=lambda f: f), static_argnums=(2, 3))(
            x, kernel, stride, padding, cotangent
        )
    assert ("scan" in str(program)) == (num_chunks is not None)
    assert num_chunks is None or f"length={num_chunks}\n" in str(program)
    for index in (1, 2):
        assert found[index].dtype == np.float64
        np.testing.assert_allclose(found[index], at_once[index], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(found[index], expected[index], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "stride", "padding"), [((7, 6), 1, "same"), ((7, 6), 2, "same"), ((7, 6), 2, "torch"), ((1, 2), 2, "same")]
)
def test_the_padded_form_is_the_grouped_convolution(size, stride: int, padding: str) -> None:
    """`correlate` and its gradients on a map that was padded before; `unpad_map` takes the zeros off again."""
    x, kernel = normal(2, *size, 5), normal(3, 3, 5, seed=1)
    out = output_size(size, stride)
    cotangent = normal(2, *out, 5, seed=2)
    padded = pad_map(jnp.asarray(x), stride, padding)
    np.testing.assert_array_equal(unpad_map(padded, size, stride, padding), x)
    assert np.abs(padded).sum() == pytest.approx(np.abs(x).sum())

    def padded_form(padded, kernel, g):
        return (
            correlate(padded, kernel, out, stride),
            *correlate_grads(padded, g, kernel, size, stride, padding),
        )

    found = fast_jit(padded_form)(padded, kernel, cotangent)
    expected = value_and_grads(grouped, x, kernel, stride, padding, cotangent)
    for name, left, right in zip(("y", "dx", "dkernel"), found, expected, strict=True):
        assert left.shape == right.shape, name
        np.testing.assert_allclose(left, right, atol=2e-5, err_msg=name)


def test_gradients_under_jit_and_vmap() -> None:
    """A kernel for each example: the batch axis of vmap is not the layer's own."""
    x, kernel, cotangent = normal(3, 2, 6, 5, 4), normal(3, 3, 3, 4, seed=1), normal(3, 2, 3, 3, 4, seed=2)

    def grads(function, x, kernel, cotangent):
        return jax.grad(lambda x, w: jnp.sum(cotangent * function(x, w, 2, "same")), argnums=(0, 1))(x, kernel)

    found = fast_jit(jax.vmap(partial(grads, depthwise_conv)))(x, kernel, cotangent)
    expected = [fast_jit(partial(grads, grouped))(*each) for each in zip(x, kernel, cotangent, strict=True)]
    for index in (0, 1):
        np.testing.assert_allclose(found[index], np.stack([pair[index] for pair in expected]), atol=2e-5)


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_leading_batch_dimensions_are_free(leading: tuple[int, ...]) -> None:
    x, kernel = normal(*leading, 6, 5, 4), normal(3, 3, 4, seed=1)
    expected = grouped(x.reshape(-1, 6, 5, 4), kernel, 2, "same")  # type: ignore[arg-type]
    y = fast_jit(depthwise_conv, static_argnums=2)(x, kernel, 2)
    assert y.shape == (*leading, 3, 3, 4)
    np.testing.assert_allclose(y.reshape(-1, 3, 3, 4), expected, atol=1e-5)


@pytest.mark.parametrize("chunk_images", [1, 8])
def test_the_kernels_gradient_in_bfloat16_is_summed_in_float32(
    chunk_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,192 ones: a bfloat16 sum of ones stops at 256."""
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", chunk_images * 2 * 2 * 32 * 32 * 4)
    x, kernel = jnp.ones((8, 32, 32, 4), jnp.bfloat16), jnp.ones((3, 3, 4), jnp.float32)
    y, dx, dkernel = value_and_grads(depthwise_conv, x, kernel, 1, "same", jnp.ones_like(x))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    inside = np.array([31, 32, 31])
    counts = 8 * inside[:, None] * inside[None]
    np.testing.assert_allclose(dkernel, np.broadcast_to(counts[:, :, None], (3, 3, 4)), rtol=2**-8)
    np.testing.assert_array_equal(y[0, 1, 1].astype(jnp.float32), np.full(4, 9.0))
    np.testing.assert_array_equal(dx[0, 0, 0].astype(jnp.float32), np.full(4, 4.0))


def test_bad_input_is_a_value_error() -> None:
    x, kernel = jnp.zeros((2, 4, 4, 3)), jnp.zeros((3, 3, 3))
    for bad_x, bad_kernel in ((x, kernel[:2]), (x[..., :2], kernel), (x[0, 0], kernel), (x, kernel[..., None])):
        with pytest.raises(ValueError, match="do not fit: got"):
            depthwise_conv(bad_x, bad_kernel)
    with pytest.raises(ValueError, match=r"padding must be one of .*'same', 'torch'.* got 'valid'"):
        depthwise_conv(x, kernel, 1, "valid")
