"""What of a picture is no fault, but should be known before a network is trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

_ORIENTATION = 0x0112
_THUMBNAIL = 16
# A picture with less contrast than this has no hash to speak of: all flat pictures are alike.
_LEAST_CONTRAST = 6.0
# Bits of 64 in which the hashes of near-duplicates may differ, and the mean difference of their thumbnails, in 0..255.
_BITS, _DIFFERENCE = 4, 3.0
_CHUNK = 64
# Beyond so many pairs the search takes minutes, and is left out.
_MOST_PAIRS = 3e9
# A picture is small beside the others from this share of their median area, and long from this form.
_SMALL, _LONG = 1 / 16, 3.0


def oddities(header: Image.Image) -> tuple[str, ...]:
    """Kinds of oddities that the header of a picture tells."""
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
    """(index, kind) of the pictures that are much smaller than the others, or of which a square leaves out most.

    Args:
      sizes: (height, width) of each; (0, 0) for one that could not be read.
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
    """A hash of 64 bits and a thumbnail, by which near-duplicates are found; None for a picture without contrast.

    Args:
      pixels: uint8 [H, W, C].
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
) -> Iterator[tuple[int, int]]:
    """Pairs of pictures, one of each list, that look the same: indices. Nothing where there are too many to compare."""
    kept = [[index for index, one in enumerate(many) if one is not None] for many in (first, second)]
    if not kept[0] or not kept[1] or len(kept[0]) * len(kept[1]) > _MOST_PAIRS:
        return
    hashes, thumbnails = [], []
    for many, indices in zip((first, second), kept, strict=True):
        chosen: list[Any] = [many[index] for index in indices]
        hashes.append(np.array([one[0] for one in chosen], np.uint64))
        thumbnails.append(np.stack([one[1] for one in chosen]).astype(np.int16))
    for start in range(0, len(kept[1]), _CHUNK):
        apart = np.bitwise_count(hashes[1][start : start + _CHUNK, None] ^ hashes[0][None])
        for at, other in zip(*np.nonzero(apart <= _BITS), strict=True):
            difference = np.abs(thumbnails[1][start + at] - thumbnails[0][other]).mean()
            if difference <= _DIFFERENCE:
                yield kept[0][int(other)], kept[1][int(start + at)]
