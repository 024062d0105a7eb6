"""Properties of images that are not errors, but should be known before a network is trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
_THUMBNAIL = 16
# A picture with less contrast than this has no useful hash, because all flat pictures are alike.
_LEAST_CONTRAST = 6.0
# Limits for near-duplicates: differing bits of their 64-bit hashes, and the mean difference of their thumbnails,
# 0..255.
_BITS, _DIFFERENCE = 4, 3.0
_CHUNK = 64
# With more pairs than this, the search would take minutes, and is skipped.
_MOST_PAIRS = 3e9
# A picture is small below this share of the median area, and long above this aspect ratio.
_SMALL, _LONG = 1 / 16, 3.0


def oddities(header: Image.Image) -> tuple[str, ...]:
    """Returns the kinds of oddities that the header of an image shows."""
    found = []
    if header.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in header.info:
        found.append("transparency (data.background shows through)")
    if header.mode.startswith("I;16") or header.mode == "I":
        found.append("more than 8 bits (scaled to 8)")
    if header.mode in ("1", "CMYK", "YCbCr", "LAB", "HSV"):
        found.append(f"mode {header.mode} (converted)")
    if header.getexif().get(_ORIENTATION, 1) != 1:
        found.append("turned by EXIF (brought upright)")
    return tuple(found)


def odd_sizes(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, str]]:
    """Finds images that are much smaller than the others, or so long that a square leaves out most of them.

    Args:
      sizes: (height, width) of each image; (0, 0) if it could not be read.

    Returns:
      (index, kind) of each such image.
    """
    areas = np.array([height * width for height, width in sizes], np.float64)
    if not areas.any():
        return []
    median = float(np.median(areas[areas > 0]))
    found = []
    for index, (height, width) in enumerate(sizes):
        if not height or not width:
            continue
        if height * width < _SMALL * median:
            found.append((index, "much smaller than the others"))
        if max(height, width) > _LONG * min(height, width):
            found.append((index, "very long: a square of it leaves out most"))
    return found


def fingerprint(pixels: np.ndarray) -> tuple[int, np.ndarray] | None:
    """Computes a 64-bit hash and a thumbnail, which serve to find near-duplicates.

    Args:
      pixels: uint8 [H, W, C].

    Returns:
      (hash, thumbnail), or None for an image without contrast.
    """
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("L")
    thumbnail = np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX))
    if thumbnail.std() < _LEAST_CONTRAST:
        return None
    small = np.asarray(image.resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big"), thumbnail


def near_pairs(
    first: Sequence[tuple[int, np.ndarray] | None], second: Sequence[tuple[int, np.ndarray] | None]
) -> Iterator[tuple[int, int]] | None:
    """Finds pairs of images, one of each list, that look the same.

    Args:
      first: fingerprints of the images of one list.
      second: fingerprints of the images of the other.

    Returns:
      Pairs of indices into `first` and `second`; None if there are too many pairs to compare.
    """
    kept = [[index for index, one in enumerate(many) if one is not None] for many in (first, second)]
    if len(kept[0]) * len(kept[1]) > _MOST_PAIRS:
        return None
    return _near_pairs((first, second), kept) if kept[0] and kept[1] else iter(())


def _near_pairs(both: Sequence[Sequence[Any]], kept: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    hashes, thumbnails = [], []
    for many, indices in zip(both, kept, strict=True):
        chosen = [many[index] for index in indices]
        hashes.append(np.array([one[0] for one in chosen], np.uint64))
        thumbnails.append(np.stack([one[1] for one in chosen]).astype(np.int16))
    for start in range(0, len(kept[1]), _CHUNK):
        apart = np.bitwise_count(hashes[1][start : start + _CHUNK, None] ^ hashes[0][None])
        for at, other in zip(*np.nonzero(apart <= _BITS), strict=True):
            difference = np.abs(thumbnails[1][start + at] - thumbnails[0][other]).mean()
            if difference <= _DIFFERENCE:
                yield kept[0][int(other)], kept[1][int(start + at)]
