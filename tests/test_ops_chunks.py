"""A batch a few images at a time; the oracle is the function applied to the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax.ops import chunks
from fdjax.ops.chunks import images_per_chunk, over_chunks

# Compilation is most of the time here, and what is compiled is tiny.
fast_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Bytes of one image of `arrays`.
IMAGE_BYTES = 4 * (2 * 3 + 5)


def arrays(batch: int) -> tuple[jax.Array, jax.Array]:
    """Small integers: sums of them are exact in any order."""
    rng = np.random.default_rng(batch)
    first = rng.integers(-9, 10, (batch, 2, 3)).astype(np.float32)
    return jnp.asarray(first), jnp.asarray(rng.integers(-9, 10, (batch, 5)).astype(np.float32))


@pytest.fixture
def arrange(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the chunk's size in bytes, and the number of devices."""

    def arrange(chunk_bytes: int, devices: int) -> None:
        monkeypatch.setattr(chunks, "_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(chunks.jax, "device_count", lambda: devices)

    return arrange


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_a_chunk_is_the_largest_equal_share_that_fits(devices: int, arrange) -> None:
    for batch in (1, 2, 3, 7, 12, 13, 16, 24, 60, 97):
        shares = devices if batch % devices == 0 else 1
        for chunk_images in (0, 1, 2, 3, 5, 8, 1000):  # that fit a device's cache
            arrange(chunk_images * IMAGE_BYTES, devices)
            images = images_per_chunk(arrays(batch))
            case = f"{batch} images, {chunk_images} fit, {images} taken"
            assert batch % images == 0, case
            assert images % shares == 0, case
            equal = [n for n in range(1, batch // shares + 1) if (batch // shares) % n == 0]
            assert images == shares * max([n for n in equal if n <= chunk_images], default=1), case


def test_all_arrays_count_towards_a_chunk_and_narrow_ones_less(arrange) -> None:
    arrange(4 * 24, 1)
    wide, narrow = jnp.zeros((8, 6), jnp.float32), jnp.zeros((8, 6), jnp.bfloat16)
    assert [images_per_chunk(each) for each in ([wide], [narrow], [wide, wide], [wide, narrow, narrow])] == [4, 8, 2, 2]


def whole(first: jax.Array, second: jax.Array) -> tuple[Any, Any]:
    """Sums and maps of several shapes and dtypes; a map of an image depends on that image of both arrays."""
    sums = {"per_channel": first.sum(axis=(0, 1)), "all": [jnp.sum(second), jnp.sum(first[:, :, :, None], axis=0)]}
    maps = (first * second[:, :1, None] + 1, {"narrow": second[:, 2:].astype(jnp.bfloat16), "flat": second[:, 0] > 0})
    return sums, maps


@pytest.mark.parametrize(
    ("batch", "chunk_images", "devices", "expected_images"),
    [
        (12, 2, 1, 2),
        (12, 5, 1, 4),
        (12, 1, 4, 4),
        (12, 1, 5, 1),
        (13, 4, 1, 1),
        (7, 3, 2, 1),
        (2, 1, 1, 1),
        (6, 0, 3, 3),
    ],
)
def test_chunk_by_chunk_is_all_at_once(
    batch: int, chunk_images: int, devices: int, expected_images: int, arrange
) -> None:
    arrange(chunk_images * IMAGE_BYTES, devices)
    seen = set()

    def function(first, second):
        seen.add((first.shape, second.shape))
        return whole(first, second)

    def apply(*arrays):
        return over_chunks(function, arrays)

    found = (apply if batch == 2 else fast_jit(apply))(*arrays(batch))
    assert seen == {((expected_images, 2, 3), (expected_images, 5))} and expected_images < batch
    expected = whole(*arrays(batch))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("batch", [1, 5, 6])
def test_a_batch_that_fits_is_taken_at_once(batch: int, arrange) -> None:
    arrange(batch * IMAGE_BYTES, 1)
    calls = []

    def function(first, second):
        calls.append(first.shape[0])
        return whole(first, second)

    found, expected = over_chunks(function, arrays(batch)), whole(*arrays(batch))
    assert calls == [batch]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_sums_alone_or_maps_alone(arrange) -> None:
    arrange(2 * IMAGE_BYTES, 1)
    first, second = arrays(6)
    sums, maps = over_chunks(lambda first, second: (second.sum(axis=0), ()), (first, second))
    np.testing.assert_array_equal(sums, np.sum(second, axis=0))
    assert maps == ()
    sums, maps = over_chunks(lambda first, second: ((), second * 2), (first, second))
    np.testing.assert_array_equal(maps, 2 * np.asarray(second))
    assert sums == ()


def test_each_device_has_an_equal_share_of_every_chunk(arrange) -> None:
    """The batch is split over the devices in order, so that device d of 4 has images 3d to 3d + 2 of 12."""
    arrange(IMAGE_BYTES, 4)
    images = jnp.broadcast_to(jnp.arange(12.0)[:, None], (12, IMAGE_BYTES // 4))
    _, devices = over_chunks(lambda x: ((), jnp.sort(x[:, 0] // 3)), (images,))
    np.testing.assert_array_equal(devices, np.repeat(np.arange(4), 3))
