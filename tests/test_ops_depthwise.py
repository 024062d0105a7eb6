"""The depthwise convolution; oracles: XLA's grouped convolution with its own gradient, and PyTorch."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.ops import depthwise, depthwise_conv

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


@pytest.mark.parametrize("batch", [6, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_big_batch_is_summed_in_chunks(batch: int, stride: int) -> None:
    """Over 1.2 MB the tap gradient runs a few images at a time; 5 images divide into single ones only."""
    x, kernel = normal(batch, 64, 64, 16), normal(3, 3, 16, seed=1)
    cotangent = normal(batch, 64 // stride, 64 // stride, 16, seed=2)
    assert x.nbytes + cotangent.nbytes > 1_200_000
    program = str(jax.make_jaxpr(partial(value_and_grads, depthwise_conv, jit=lambda f: f), static_argnums=(2, 3))(
        x, kernel, stride, "same", cotangent
    ))  # fmt: skip
    assert "scan" in program
    _, _, found = value_and_grads(depthwise_conv, x, kernel, stride, "same", cotangent, jax.jit)
    padded = np.pad(np.float64(x), ((0, 0), *[(1, 1) if stride == 1 else (0, 1)] * 2, (0, 0)))
    span = cotangent.shape[1] * stride
    for i in range(3):
        for j in range(3):
            view = padded[:, i : i + span : stride, j : j + span : stride]
            np.testing.assert_allclose(found[i, j], np.sum(view * cotangent, axis=(0, 1, 2)), atol=2e-3, rtol=1e-4)


def test_chunks_do_not_change_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel, cotangent = normal(6, 4, 4, 3), normal(3, 3, 3, seed=1), normal(6, 4, 4, 3, seed=2)
    expected = value_and_grads(grouped, x, kernel, 1, "same", cotangent)[2]
    one_image = 2 * x[0].nbytes
    for chunk_bytes in (1, 2 * one_image, 4 * one_image):  # 1, 2 and (as 4 does not divide 6) 3 images at a time
        monkeypatch.setattr(depthwise, "_CHUNK_BYTES", chunk_bytes)
        found = value_and_grads(depthwise_conv, x, kernel, 1, "same", cotangent)[2]
        np.testing.assert_allclose(found, expected, atol=2e-5)


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


def test_the_kernels_gradient_in_bfloat16_is_summed_in_float32() -> None:
    """8,192 ones: a bfloat16 sum of ones stops at 256."""
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
