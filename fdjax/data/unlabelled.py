"""Training pictures without labels, for a network that learns from another network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fdjax.data.decode import BACKGROUND, load_image, open_file
from fdjax.data.images import StoredImages
from fdjax.data.sources import Dataset, read_images
from fdjax.errors import UserError

PICTURE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_pictures(root: Path) -> list[str]:
    """Lists the picture files in a folder and its subfolders, sorted, without hidden ones.

    Raises:
      UserError: the folder does not exist or holds no picture.
    """
    if not root.is_dir():
        raise UserError(f"the folder of pictures {root} is {'not a folder' if root.exists() else 'not there'}")
    found = []
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [
            os.path.join(folder, name)
            for name in files
            if not name.startswith(".") and name.lower().endswith(PICTURE_SUFFIXES)
        ]
    if not found:
        raise UserError(f"the folder {root} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    return sorted(found)


def read_pictures(
    folder: str | Path,
    shape: tuple[int, int, int],
    share: float = 1.0,
    background: str = BACKGROUND,
    rows: Callable[[int], np.ndarray] = np.arange,
) -> np.ndarray:
    """Reads pictures of a folder, at any depth, as `load_image` does.

    Args:
      folder: the folder.
      shape: (H, W, C) of the result.
      share: as in `load_image`.
      background: as in `load_image`.
      rows: the number of pictures -> those to read, int [n], by their place when sorted by path; by default all.

    Returns:
      uint8 [n, H, W, C].

    Raises:
      UserError: there are no pictures, or one cannot be read.
    """
    files = list_pictures(Path(folder))
    return np.stack([load_image(files[row], shape, share, background) for row in rows(len(files))])


def with_unlabelled(dataset: Dataset, folder: str | Path, background: str = BACKGROUND) -> Dataset:
    """Replaces the training images of a set by the pictures of a folder, at any depth.

    They take the form of the set's own images: the same size and channels, in memory or on disk. Their labels are all 0
    and have no meaning.

    Args:
      dataset: the set.
      folder: the folder.
      background: the colour behind transparent parts, by name or as #rrggbb.

    Returns:
      The set with these training images.

    Raises:
      UserError: there are no pictures, or one cannot be read.
    """
    files = list_pictures(Path(folder))
    size, channels = dataset.image_shape[:2], dataset.image_shape[2]
    if isinstance(dataset.train_images, StoredImages):

        def encoded(index: int) -> bytes:
            try:
                return Path(files[index]).read_bytes()
            except OSError as error:
                raise UserError(f"the file {files[index]} cannot be read: {error.strerror}") from error

        images = StoredImages(encoded, files.__getitem__, np.arange(len(files)), size, channels, background=background)
    else:
        mode = "L" if channels == 1 else "RGB"

        def opened(index: int) -> Image.Image:
            return open_file(files[index], mode, background)

        images, _ = read_images(len(files), opened, files.__getitem__, size, None, "reading pictures")
    labels = np.zeros(len(files), np.int32)
    return dataclasses.replace(dataset, train_images=images, train_labels=labels)
