"""Convolutions with groups against PyTorch's, and their gradients against the library's own grouped form."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fdjax.ops.conv import grouped_conv, max_pool
from fdjax.ops.depthwise import conv_pads


def arrays(channels: int, features: int, groups: int, window: int, size: tuple[int, int]):
    rng = np.random.default_rng(channels + groups)
    x = rng.normal(size=(2, *size, channels)).astype(np.float32)
    return x, rng.normal(size=(window, window, channels // groups, features)).astype(np.float32)


# Groups that are joined, that are as wide as what they are joined to, wider, and that cannot be joined evenly.
@pytest.mark.parametrize(
    ("channels", "features", "groups", "window"),
    [(8, 12, 1, 3), (128, 128, 32, 3), (64, 32, 2, 3), (80, 40, 2, 1), (30, 60, 5, 3), (33, 22, 11, 5)],
)
@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_convolution_is_pytorchs(channels: int, features: int, groups: int, window: int, stride: int) -> None:
    torch = pytest.importorskip("torch")
    x, kernel = arrays(channels, features, groups, window, (9, 6))
    found = grouped_conv(jnp.asarray(x), jnp.asarray(kernel), stride, "torch", groups)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        torch.from_numpy(kernel.transpose(3, 2, 0, 1)),
        stride=stride,
        padding=window // 2,
        groups=groups,
    )
    np.testing.assert_allclose(found, expected.numpy().transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("padding", "stride"), [("same", 2), ("torch", 1)])
@pytest.mark.parametrize(("groups", "window"), [(16, 3), (1, 3), (1, 5), (1, 1)])
def test_the_gradients_are_those_of_the_library(groups: int, window: int, padding: str, stride: int) -> None:
    x, kernel = map(jnp.asarray, arrays(64, 64, groups, window, (7, 8)))

    def library(x, kernel):
        pads = [conv_pads(length, stride, window, padding) for length in x.shape[1:3]]
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), pads, dimension_numbers=numbers, feature_group_count=groups
        )

    def ours(x, kernel):
        return grouped_conv(x, kernel, stride, padding, groups)

    found, expected = (
        jax.jit(jax.value_and_grad(lambda x, kernel, f=f: jnp.sum(jnp.sin(f(x, kernel))), argnums=(0, 1)))(x, kernel)
        for f in (ours, library)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), found, expected)


@pytest.mark.parametrize("padding", ["same", "torch"])
def test_the_pool_takes_the_largest_of_each_window(padding: str) -> None:
    x = np.random.default_rng(0).normal(size=(1, 6, 5, 2)).astype(np.float32)
    rows, columns = (conv_pads(length, 2, 3, padding) for length in x.shape[1:3])
    found = np.asarray(max_pool(jnp.asarray(x), (rows, columns)))
    assert found.shape == (1, 3, 3, 2)
    for i in range(3):
        for j in range(3):
            top, left = 2 * i - rows[0], 2 * j - columns[0]
            window = x[:, max(top, 0) : top + 3, max(left, 0) : left + 3]
            np.testing.assert_array_equal(found[:, i, j], window.max(axis=(1, 2)))


def test_groups_that_do_not_fit_are_refused() -> None:
    x, kernel = map(jnp.asarray, arrays(8, 8, 2, 3, (4, 4)))
    with pytest.raises(ValueError, match="in 3 groups do not fit: got"):
        grouped_conv(x, kernel, groups=3)
