"""The sources of images: the embedded Fashion-MNIST subset, an image folder, or a TFDS set; never the network."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.resources
import io
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fdjax.data.decode import BACKGROUND, Size, fit_middle, open_file, open_stream, sides, to_pixels
from fdjax.data.folder import list_folder
from fdjax.data.images import Images, take_rows
from fdjax.data.tfds_sets import (
    FASHION_MNIST_SUBSET,
    FOLDER,
    PREPARED,
    Prepared,
    PreparedReader,
    find_prepared,
    image_and_label,
    tfds_names,
)
from fdjax.errors import UserError

_FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PROGRESS_FROM = 5000
# For smaller images, threads are slower: opening an image holds Python's lock longer than decoding it takes.
_THREADS_FROM_PIXELS = 64 * 64
_CHUNK = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for image classification.

    Attributes:
      name: the name that it was loaded by.
      train_images: uint8 [n, H, W, C], 0..255, in memory or decoded when rows are taken (`StoredImages`).
      train_labels: int32 [n], 0..num_classes - 1.
      test_images: uint8 [m, H, W, C].
      test_labels: int32 [m].
      class_names: one name per class, in the order of the labels.
      validation_images: images of the source's own validation set, if it has one beside the test set.
      validation_labels: labels of the same.
      skipped: the files that were skipped in the source, in words.
    """

    name: str
    train_images: Images
    train_labels: np.ndarray
    test_images: Images
    test_labels: np.ndarray
    class_names: tuple[str, ...]
    validation_images: Images | None = None
    validation_labels: np.ndarray | None = None
    skipped: str = ""

    def held_out(self, rows: np.ndarray) -> tuple[Images, np.ndarray]:
        """Returns the images and labels to validate on.

        Args:
          rows: int [v], the rows of the training set that are held out. If there are none, the source's own validation
            set is returned.

        Returns:
          Images uint8 [v, H, W, C] and labels int32 [v].
        """
        if len(rows) or self.validation_images is None or self.validation_labels is None:
            return take_rows(self.train_images, rows), self.train_labels[rows]
        return self.validation_images, self.validation_labels

    def in_order_of(self, names: tuple[str, ...]) -> Dataset:
        """Returns the set with labels in the order of `names` if these are the same classes, or else unchanged."""
        if names == self.class_names or sorted(names) != sorted(self.class_names):
            return self
        places = np.array([names.index(name) for name in self.class_names], np.int32)
        return dataclasses.replace(
            self,
            train_labels=places[self.train_labels],
            test_labels=places[self.test_labels],
            class_names=names,
            validation_labels=None if self.validation_labels is None else places[self.validation_labels],
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the images."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """The number of classes, at least two."""
        return len(self.class_names)


def load_dataset(
    name: str,
    path: str | None = None,
    image_size: Size = None,
    grayscale: bool = False,
    background: str = BACKGROUND,
) -> Dataset:
    """Loads a data set into memory. It never downloads anything.

    Args:
      name: `fashion_mnist_subset` (10,000 + 2,000 grey 28x28 images that come with fdjax), `folder`, `prepared`, or a
        TFDS name (`NAME`, `NAME/CONFIG` or `NAME:VERSION`) of a set with an image and a class label that was prepared
        in the array_record format.
      path: for `folder`, the folder with `train/<class>/*`, `test/<class>/*` and optionally `validation/<class>/*`, in
        any format that Pillow opens. Its classes are the names of train's folders in natural order, or in the order of
        `classes.txt`; files that are not pictures are skipped. For `prepared`, the directory of one TFDS set, which
        holds its `dataset_info.json`. For a TFDS name, TFDS's data directory (default: TFDS's own). For the subset,
        None.
      image_size: H and W of the result, or one number for both. The middle of each image, as large as the aspect ratio
        allows, is resized to it (bilinear); an image of this size stays as it is. None requires all images to have one
        size.
      grayscale: whether to convert images to one channel. Otherwise, a folder's images become RGB, and others keep
        their channels.
      background: the colour behind transparent parts, by name or as #rrggbb.

    Returns:
      The data set, with examples in the order of the source (for a folder, by class, then by file name).

    Raises:
      UserError: the name is unknown, or the data are missing or not as described above.
    """
    if image_size is not None and min(sides(image_size)) < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1")
    check_source(name, path)
    if name == FASHION_MNIST_SUBSET:
        return _load_fashion_mnist_subset(image_size)
    if name == FOLDER:
        return _load_folder(Path(path or ""), image_size, grayscale, background)
    return _load_tfds(name, find_prepared(name, path), image_size, grayscale, background)


def check_source(name: str, path: str | None = None) -> None:
    """Checks that a data set exists, without loading it; commands call this before they load or write anything.

    The files of a folder are listed but not opened, so that `load_dataset` may still find a file that is not an image.

    Args:
      name: as in `load_dataset`.
      path: as in `load_dataset`.

    Raises:
      UserError: the name is unknown, or the data are missing, incomplete or in a form that cannot be read.
    """
    if name == FASHION_MNIST_SUBSET:
        if path is not None:
            raise UserError(f"the data set {name!r} comes with fdjax and takes no path; {path!r} was given")
    elif name == FOLDER:
        if not path:
            raise UserError(f"the data set {name!r} needs a path: a folder with train/<class>/* and test/<class>/*")
        list_folder(Path(path))
    else:
        find_prepared(name, path)


def describe_source(
    name: str, path: str | None = None, image_size: Size = None, grayscale: bool = False
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """Returns the image shape and the classes of a data set without loading it; a stock TFDS set may even be absent.

    Args:
      name: as in `load_dataset`.
      path: as in `load_dataset`.
      image_size: as in `load_dataset`. If it is None, the first image of a folder is opened.
      grayscale: as in `load_dataset`.

    Returns:
      (H, W, C), and the class names.

    Raises:
      UserError: the name is unknown, the layout of a folder is wrong, or the images differ in size and no `image_size`
        was given.
    """
    if name == FASHION_MNIST_SUBSET:
        check_source(name, path)
        return (*sides(image_size or 28), 1), _FASHION_MNIST_CLASSES
    if name == FOLDER:
        check_source(name, path)
        listing = list_folder(Path(path or ""))
        first = fit_middle(open_file(listing.files("train")[0][0], "RGB"), image_size)
        return (first.height, first.width, 1 if grayscale else 3), listing.classes
    try:
        folder = find_prepared(name, path).folder
    except UserError:
        if name == PREPARED or name not in tfds_names():
            raise
        folder = None
    import tensorflow_datasets as tfds

    if folder is None:
        builder: Any = tfds.builder(name, data_dir=path, try_gcs=False)
    else:
        builder = tfds.builder_from_directory(str(folder))
    image_key, label_key = image_and_label(tfds, builder.info, folder or Path(name))
    height, width, channels = builder.info.features[image_key].shape
    height, width = sides(image_size) if image_size else (height, width)
    if not height or not width:
        raise UserError(f"the images of {name!r} have different sizes, so an image size must be given (image_size)")
    return (height, width, 1 if grayscale else channels or 3), tuple(builder.info.features[label_key].names)


def _load_fashion_mnist_subset(image_size: Size) -> Dataset:
    resource = importlib.resources.files("fdjax.data") / f"{FASHION_MNIST_SUBSET}.npz"
    with resource.open("rb") as file, np.load(io.BytesIO(file.read())) as arrays:
        parts = {key: arrays[key] for key in arrays}
    images = {}
    for split in ("train", "test"):
        pixels = parts[f"{split}_images"]
        if image_size is None or pixels.shape[1:] == sides(image_size):
            images[split] = pixels[..., None]
        else:
            images[split] = np.stack([np.asarray(fit_middle(Image.fromarray(p), image_size)) for p in pixels])[
                ..., None
            ]
    return Dataset(
        FASHION_MNIST_SUBSET,
        images["train"],
        parts["train_labels"].astype(np.int32),
        images["test"],
        parts["test_labels"].astype(np.int32),
        _FASHION_MNIST_CLASSES,
    )


def _load_folder(root: Path, image_size: Size, grayscale: bool, background: str) -> Dataset:
    listing = list_folder(root)
    mode = "L" if grayscale else "RGB"
    parts: dict[str, Any] = {}
    expected: _Reference | None = None
    for split in listing.splits:
        found = listing.files(split)
        files = [file for file, _ in found]
        parts[f"{split}_labels"] = np.array([label for _, label in found], np.int32)
        parts[f"{split}_images"], expected = read_images(
            len(files),
            lambda i, files=files: open_file(files[i], mode, background),
            files.__getitem__,
            image_size,
            expected,
            f"reading {split} images",
        )
    return Dataset(FOLDER, class_names=listing.classes, skipped=listing.skipped_words, **parts)


def _load_tfds(name: str, prepared: Prepared, image_size: Size, grayscale: bool, background: str) -> Dataset:
    reader = PreparedReader(prepared)
    mode = "L" if grayscale or reader.channels == 1 else "RGB"
    parts: dict[str, Any] = {}
    expected: _Reference | None = None
    for use, split in reader.splits().items():
        source = reader.open(split)
        labels = np.empty(len(source), np.int32)

        def read(index: int, source=source, split=split, labels=labels) -> Image.Image:
            encoded, labels[index] = reader.example(source, split, index)
            return open_stream(io.BytesIO(encoded), mode, reader.name_of(split, index), background)

        parts[f"{use}_images"], expected = read_images(
            len(source),
            read,
            lambda index, split=split: reader.name_of(split, index),
            image_size,
            expected,
            f"reading {split} images",
        )
        reader.check_labels(split, labels)
        parts[f"{use}_labels"] = labels
    return Dataset(name, class_names=reader.class_names, **parts)


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The image that sets the size of all others."""

    name: str
    shape: tuple[int, ...]


def read_images(
    count: int,
    read: Callable[[int], Image.Image],
    name_of: Callable[[int], str],
    image_size: Size,
    expected: _Reference | None,
    what: str,
) -> tuple[np.ndarray, _Reference]:
    """Reads images into one array.

    Args:
      count: number of images.
      read: index -> the image.
      name_of: index -> what a message calls the image.
      image_size: size of the result; None requires all images to have one size.
      expected: the image that sets the size, if another split has been read already.
      what: what a message calls the images.

    Returns:
      uint8 [count, H, W, C], and the image that sets the size.

    Raises:
      UserError: the images differ in size, or do not fit into memory.
    """
    first = read(0)
    threaded = first.width * first.height >= _THREADS_FROM_PIXELS
    reference = expected or _Reference(name_of(0), to_pixels(fit_middle(first, image_size)).shape)
    try:
        images = np.empty((count, *reference.shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * np.prod(reference.shape, dtype=float) / 1e9
        raise UserError(f"{what}: {count} images take {gigabytes:.1f} GB, more than there is memory") from error

    def fill(chunk: range) -> int:
        for index in chunk:
            pixels = to_pixels(fit_middle(read(index), image_size))
            if pixels.shape != reference.shape:
                raise UserError(
                    "the images have different sizes, so an image size must be given (image_size): "
                    f"{reference.name} is {_size(reference.shape)}, {name_of(index)} is {_size(pixels.shape)}"
                )
            images[index] = pixels
        return len(chunk)

    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    quiet = count <= _PROGRESS_FROM or not sys.stderr.isatty()
    with tqdm(total=count, desc=what, unit=" images", disable=quiet, leave=False) as bar:
        if threaded:
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                _advance(bar, pool.map(fill, chunks))
        else:
            _advance(bar, map(fill, chunks))
    return images, reference


def _advance(bar: Any, done: Iterable[int]) -> None:
    for count in done:
        bar.update(count)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} wide and {shape[0]} high"
