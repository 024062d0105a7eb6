"""Data sets that stay on disk: labels are in memory, and images are decoded when rows are taken."""

from __future__ import annotations

import concurrent.futures
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fdjax.data.decode import BACKGROUND, Size
from fdjax.data.folder import list_folder
from fdjax.data.images import StoredImages
from fdjax.data.labels import class_numbers
from fdjax.data.sources import Dataset, check_source, load_dataset
from fdjax.data.tfds_sets import FASHION_MNIST_SUBSET, FOLDER, LABELS_FILE, PreparedReader, find_prepared
from fdjax.errors import UserError

_CHUNK = 256


def open_dataset(
    name: str,
    path: str | None = None,
    image_size: Size = None,
    grayscale: bool = False,
    *,
    background: str = BACKGROUND,
    stream: bool = False,
    crop_share: float = 1.0,
) -> Dataset:
    """Opens a data set, either in memory as in `load_dataset`, or streamed: images are then decoded as needed.

    Args:
      name: as in `load_dataset`; the embedded subset cannot be streamed.
      path: as in `load_dataset`.
      image_size: H and W, or one number for both; required for streaming.
      grayscale: as in `load_dataset`.
      background: as in `load_dataset`.
      stream: whether to leave the images on disk.
      crop_share: side of the middle square of a test image, as a share of its shorter side (streaming only).

    Returns:
      The data set.

    Raises:
      UserError: as in `load_dataset`. With streaming, an image that cannot be decoded raises only when it is needed.
    """
    check_source(name, path)
    if not stream:
        return load_dataset(name, path, image_size, grayscale, background)
    if name == FASHION_MNIST_SUBSET:
        raise UserError(f"the data set {name!r} is small and cannot be streamed; give --data.loading memory")
    if image_size is None:
        raise UserError("a streamed set needs an image size: give --data.image-size N")
    if name == FOLDER:
        return _open_folder(Path(path or ""), image_size, grayscale, crop_share, background)
    return _open_prepared(name, path, image_size, grayscale, crop_share, background)


def _open_folder(
    root: Path, image_size: int | tuple[int, int], grayscale: bool, crop_share: float, background: str
) -> Dataset:
    listing = list_folder(root)
    parts: dict[str, Any] = {}
    for split in listing.splits:
        files = listing.files(split)

        def encoded(index: int, files=files) -> bytes:
            try:
                return Path(files[index][0]).read_bytes()
            except OSError as error:
                raise UserError(f"the file {files[index][0]} cannot be read: {error.strerror}") from error

        parts[f"{split}_images"] = StoredImages(
            encoded,
            lambda index, files=files: files[index][0],
            np.arange(len(files)),
            image_size,
            1 if grayscale else 3,
            crop_share,
            background,
        )
        parts[f"{split}_labels"] = np.array([label for _, label in files], np.int32)
    return Dataset(FOLDER, class_names=listing.classes, skipped=listing.skipped_words, **parts)


def _open_prepared(
    name: str, path: str | None, image_size: int | tuple[int, int], grayscale: bool, crop_share: float, background: str
) -> Dataset:
    reader = PreparedReader(find_prepared(name, path))
    parts: dict[str, Any] = {}
    for use, split in reader.splits().items():
        source = reader.open(split)
        parts[f"{use}_images"] = StoredImages(
            lambda index, source=source, split=split: reader.example(source, split, index)[0],
            lambda index, split=split: reader.name_of(split, index),
            np.arange(len(source)),
            image_size,
            1 if grayscale else reader.channels,
            crop_share,
            background,
        )
        parts[f"{use}_labels"] = labels_of(reader, split)
    return Dataset(name, class_names=reader.class_names, **parts)


def labels_of(reader: PreparedReader, split: str) -> np.ndarray:
    """Returns the labels of a split: those that `prepare` has stored, or else those of all records, which it reads.

    Args:
      reader: the reader of the set.
      split: name of the split.

    Returns:
      int32 [n].

    Raises:
      UserError: a record cannot be read, or has an impossible label.
    """
    source = reader.open(split)
    try:
        with np.load(reader.folder / LABELS_FILE) as stored:
            labels = class_numbers(stored[split], f"{reader.folder / LABELS_FILE}, split {split!r},")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        labels = None
    if labels is None or labels.shape != (len(source),):
        labels = np.empty(len(source), np.int32)

        def fill(chunk: range) -> int:
            for index in chunk:
                labels[index] = reader.example(source, split, index)[1]
            return len(chunk)

        chunks = [range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK)]
        with (
            concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool,
            tqdm(total=len(source), desc=f"reading {split} labels", unit=" images", disable=None, leave=False) as bar,
        ):
            for count in pool.map(fill, chunks):
                bar.update(count)
    reader.check_labels(split, labels)
    return labels.astype(np.int32)
