"""Images by index: an array in memory, or an object that decodes images when rows are taken."""

from __future__ import annotations

import concurrent.futures
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from fdjax.data.decode import BACKGROUND, fit_middle, read_pixels, sides, to_pixels

Rows = slice | np.ndarray


class Images(Protocol):
    """Images uint8 [n, H, W, C], 0..255; a NumPy array is one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


class StoredImages:
    """Encoded images that are decoded by threads when rows are taken: the middle of each, resized.

    Args:
      encoded: index -> the encoded image.
      name_of: index -> what a message calls the image.
      rows: int [n], the indices of the images.
      size: H and W, or one number for both.
      channels: C, 1 or 3.
      share: side of the middle part, relative to the largest (`fit_middle`).
      background: the colour behind transparent parts.
    """

    def __init__(
        self,
        encoded: Callable[[int], bytes],
        name_of: Callable[[int], str],
        rows: np.ndarray,
        size: int | tuple[int, int],
        channels: int,
        share: float = 1.0,
        background: str = BACKGROUND,
    ):
        self.encoded, self.name_of, self.rows = encoded, name_of, rows
        self.size, self.channels, self._share = sides(size), channels, share
        self.background = background
        self.shape = (len(rows), *self.size, channels)
        self.dtype = np.dtype(np.uint8)
        self.nbytes = int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        chosen = self.rows[rows].tolist()
        pixels = np.empty((len(chosen), *self.shape[1:]), np.uint8)

        def fill(place: int) -> None:
            pixels[place] = self.middle(chosen[place])

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(fill, range(len(chosen))):
                pass
        return pixels

    def middle(self, index: int) -> np.ndarray:
        """Decodes one image.

        Args:
          index: index of the image in its source.

        Returns:
          uint8 [H, W, C], the middle of the image, resized.
        """
        whole = read_pixels(self.encoded(index), self.channels, self.name_of(index), background=self.background)
        image = Image.fromarray(whole[..., 0] if self.channels == 1 else whole)
        return to_pixels(fit_middle(image, self.size, self._share))

    def subset(self, rows: np.ndarray) -> StoredImages:
        """Selects images, which stay encoded.

        Args:
          rows: int [m], row numbers.

        Returns:
          The m images.
        """
        return StoredImages(
            self.encoded, self.name_of, self.rows[rows], self.size, self.channels, self._share, self.background
        )


class ResizedImages:
    """Images that are resized (bilinear, antialiased) when rows are taken.

    Args:
      images: images of any size.
      size: H and W of the result, or one number for both.
    """

    def __init__(self, images: Images, size: int | tuple[int, int]):
        self._images, self._size = images, sides(size)
        self.shape = (len(images), *self._size, images.shape[-1])
        self.nbytes = int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: Rows) -> np.ndarray:
        height, width = self._size
        whole = [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in self._images[rows]]
        resized = [to_pixels(image.resize((width, height), Image.Resampling.BILINEAR)) for image in whole]
        return np.stack(resized) if resized else np.empty((0, *self.shape[1:]), np.uint8)


def take_rows(images: Images, rows: np.ndarray | Sequence[int]) -> Images:
    """Selects images; encoded images stay encoded.

    Args:
      images: [n, H, W, C].
      rows: int [m], row numbers.

    Returns:
      The m images.
    """
    chosen = np.asarray(rows, np.int64)
    return images.subset(chosen) if isinstance(images, StoredImages) else images[chosen]
