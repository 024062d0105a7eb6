"""Training pictures without labels, for a network that learns from another network."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from fdjax.data.decode import BACKGROUND, load_image, open_file
from fdjax.data.folder import counted_kinds, foreign_kind, not_a_folder, scan
from fdjax.data.images import StoredImages
from fdjax.data.sources import Dataset, read_images
from fdjax.errors import UserError


def list_pictures(root: Path, skipped: Counter[str] | None = None) -> list[str]:
    """Lists the pictures in a folder and its subfolders, sorted, without hidden and system files; links are followed.

    Args:
      root: the folder.
      skipped: where to count the files that are no pictures, by kind.

    Raises:
      UserError: the folder does not exist or holds no picture, or a folder cannot be read.
    """
    if not os.path.isdir(root):
        raise UserError(f"the folder of pictures {root} is {not_a_folder(root)}")
    counts: Counter[str] = Counter() if skipped is None else skipped
    found, visited, waiting = [], set(), [str(root)]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in visited:  # A link leads to a folder that is listed already, perhaps one that it lies in.
            continue
        visited.add(real)
        for entry in scan(folder, counts):
            if entry.is_dir():
                waiting.append(entry.path)
            elif (kind := foreign_kind(entry)) is None:
                found.append(entry.path)
            else:
                counts[kind] += 1
    if not found:
        beside = f" (passed over: {counted_kinds(counts)})" if counts else ""
        raise UserError(f"the folder {root} holds no picture{beside}")
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
    skipped: Counter[str] = Counter()
    files = list_pictures(Path(folder), skipped)
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
    words = ", ".join(filter(None, (dataset.skipped, counted_kinds(skipped))))
    return dataclasses.replace(dataset, train_images=images, train_labels=labels, skipped=words)
