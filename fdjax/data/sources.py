"""Where images come from: the embedded Fashion-MNIST subset, an image folder, or TFDS; never the network."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.resources
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fdjax.data.batches import seeded_permutation
from fdjax.errors import UserError, suggestion

FASHION_MNIST_SUBSET = "fashion_mnist_subset"
FOLDER = "folder"

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
_SPLIT_STREAM, _LIMIT_STREAM = 2, 3
_MIN_STD = 1e-3
_PROGRESS_FROM = 5000
# Below this size opening an image holds Python's lock for longer than decoding it takes without: threads slow it down.
_THREADS_FROM_PIXELS = 64 * 64
_CHUNK = 64
_TFDS_NAME = re.compile(r"(?P<name>[A-Za-z]\w*)(/(?P<config>[\w+\-.]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_TFDS_FORMATS = ("array_record", "parquet")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set for image classification that fits in memory.

    Attributes:
      name: the name it was loaded by.
      train_images: uint8 [n, H, W, C], 0..255.
      train_labels: int32 [n], 0..num_classes - 1.
      test_images: uint8 [m, H, W, C].
      test_labels: int32 [m].
      class_names: one a class, in the order of the labels.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        height, width, channels = self.train_images.shape[1:]
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """How many classes there are, at least two."""
        return len(self.class_names)


def load_dataset(name: str, path: str | None = None, image_size: int | None = None, grayscale: bool = False) -> Dataset:
    """Loads a data set into memory. It never downloads anything.

    Args:
      name: `fashion_mnist_subset` (comes with fdjax: 10,000 + 2,000 grey 28x28 images), `folder`, or a TFDS name,
        `NAME`, `NAME/CONFIG` or `NAME:VERSION`, of a set with an image and a class label that was prepared in the
        array_record format.
      path: for `folder`, the folder with `train/<class>/*` and `test/<class>/*`, in any format that Pillow opens (the
        classes are the sorted names of train's folders; hidden files are ignored, EXIF orientation too); for TFDS,
        its data directory (default: TFDS's own); None for the subset.
      image_size: H and W of the result. The middle square of each image, as large as its shorter side, is resized
        to it (bilinear); an image of this size stays as it is. None: all images must have one size.
      grayscale: make C 1. Else a folder's images become RGB, and others keep their channels.

    Returns:
      The data set; the examples are in the order of the source (a folder's by class, then by file name).

    Raises:
      UserError: the name is unknown, the data are not where they should be or not as described above.
    """
    if image_size is not None and image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1")
    check_source(name, path)
    if name == FASHION_MNIST_SUBSET:
        return _load_fashion_mnist_subset(image_size)
    if name == FOLDER:
        return _load_folder(Path(path or ""), image_size, grayscale)
    return _load_tfds(name, _find_prepared(name, path), image_size, grayscale)


def load_image(file: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads one picture as a data set's images are read: its middle, resized.

    Args:
      file: in any format that Pillow opens.
      shape: (H, W, C) of the result; C is 1 (grey) or 3 (RGB).

    Returns:
      uint8 [H, W, C], 0..255.

    Raises:
      UserError: the file cannot be read or is no picture.
    """
    height, width, channels = shape
    image = _decode_file(file, "L" if channels == 1 else "RGB")
    if height == width:
        return _pixels(_fit(image, height))
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return _pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def check_source(name: str, path: str | None = None) -> None:
    """Checks that a data set is there, without loading it: for commands, before they load or write anything.

    A folder's files are listed but not opened: one that is no image is found by `load_dataset`.

    Args:
      name: as for `load_dataset`.
      path: as for `load_dataset`.

    Raises:
      UserError: the name is unknown, or the data are missing, incomplete or in a form that cannot be read.
    """
    if name == FASHION_MNIST_SUBSET:
        if path is not None:
            raise UserError(f"the data set {name!r} comes with fdjax and takes no path; {path!r} was given")
    elif name == FOLDER:
        if not path:
            raise UserError(f"the data set {name!r} needs a path: a folder with train/<class>/* and test/<class>/*")
        _list_folder(Path(path))
    else:
        _find_prepared(name, path)


def describe_source(
    name: str, path: str | None = None, image_size: int | None = None, grayscale: bool = False
) -> tuple[tuple[int, int, int], tuple[str, ...]]:
    """The shape of a data set's images and its classes, without loading it; a stock TFDS set need not even be there.

    Args:
      name: as for `load_dataset`.
      path: as for `load_dataset`.
      image_size: as for `load_dataset`; where it is None a folder's first image is opened.
      grayscale: as for `load_dataset`.

    Returns:
      (H, W, C), and the class names.

    Raises:
      UserError: the name is unknown, a folder is not as it should be, or the set's images have no one size and no
        `image_size` was given.
    """
    if name == FASHION_MNIST_SUBSET:
        check_source(name, path)
        size = image_size or 28
        return (size, size, 1), _FASHION_MNIST_CLASSES
    if name == FOLDER:
        check_source(name, path)
        classes = _list_folder(Path(path or ""))["train"]
        first = _fit(_decode_file(next(iter(classes.values()))[0], "RGB"), image_size)
        return (first.height, first.width, 1 if grayscale else 3), tuple(classes)
    try:
        folder = _find_prepared(name, path).folder
    except UserError:
        if name not in _tfds_names():
            raise
        folder = None
    import tensorflow_datasets as tfds

    if folder is None:
        builder: Any = tfds.builder(name, data_dir=path, try_gcs=False)
    else:
        builder = tfds.builder_from_directory(str(folder))
    image_key, label_key = _image_and_label(tfds, builder.info, folder or Path(name))
    height, width, channels = builder.info.features[image_key].shape
    height, width = image_size or height, image_size or width
    if not height or not width:
        raise UserError(f"the images of {name!r} have different sizes, so an image size must be given (image_size)")
    return (height, width, 1 if grayscale else channels or 3), tuple(builder.info.features[label_key].names)


def channel_statistics(images_uint8: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns each channel's mean and standard deviation.

    Args:
      images_uint8: uint8 [n, H, W, C], not empty.

    Returns:
      mean and std, each of C floats in units of 0..255; std is at least 0.001. The sums are exact.

    Raises:
      ValueError: the images are not uint8 of rank 4, or there is none.
    """
    if images_uint8.dtype != np.uint8 or images_uint8.ndim != 4 or images_uint8.size == 0:
        raise ValueError(f"images must be uint8 [n, H, W, C], not empty; got {images_uint8.dtype} {images_uint8.shape}")
    channels = images_uint8.shape[-1]
    size = images_uint8[0].size
    sums = np.zeros(size, np.int64)
    squares = np.zeros(size, np.int64)
    rows = min(max(1, 2**20 // size), 2**16)  # 2**16 squares of 255 are still below 2**32
    for start in range(0, len(images_uint8), rows):
        chunk = images_uint8[start : start + rows].reshape(-1, size)
        sums += chunk.sum(axis=0, dtype=np.uint32)
        squares += np.square(chunk, dtype=np.uint16).sum(axis=0, dtype=np.uint32)
    sums, squares = (total.reshape(-1, channels).sum(axis=0) for total in (sums, squares))
    count = images_uint8.size // channels
    # In Python's integers: the difference of two large sums would cost float64 its last digits.
    variances = [(count * int(q) - int(s) ** 2) / count**2 for s, q in zip(sums, squares, strict=True)]
    mean = tuple(int(s) / count for s in sums)
    return mean, tuple(max(variance**0.5, _MIN_STD) for variance in variances)


def split_validation(num_examples: int, labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Holds out a share of the training examples, the same share of each class as nearly as whole numbers allow.

    Args:
      num_examples: how many training examples there are.
      labels: int [num_examples], non-negative.
      share: the share to hold out, in [0, 1).
      seed: any integer.

    Returns:
      (train_indices, validation_indices), int32, each sorted; together 0..num_examples - 1 once each. A class's
      validation count is within 1 of `share` of it, and no class loses all its examples.

    Raises:
      UserError: `share` is out of [0, 1), or so small that it holds out nothing.
      ValueError: `labels` does not have `num_examples` entries.
    """
    labels = np.asarray(labels)
    if labels.shape != (num_examples,):
        raise ValueError(f"labels must have shape ({num_examples},); got {labels.shape}")
    if not 0 <= share < 1:
        raise UserError(f"the validation share is {share}; it must be at least 0 and below 1")
    everything = np.arange(num_examples, dtype=np.int32)
    if share == 0:
        return everything, everything[:0]
    order = seeded_permutation(num_examples, seed, _SPLIT_STREAM)
    classes, counts = np.unique(labels, return_counts=True)
    wanted = share * counts
    held_out = np.minimum(np.floor(wanted).astype(np.int64), counts - 1)
    # Largest remainders: rounding each class by itself could hold out nothing where classes are small.
    missing = round(share * num_examples) - int(held_out.sum())
    by_remainder = np.argsort(held_out - wanted, kind="stable")
    open_classes = by_remainder[(held_out + 1 < counts)[by_remainder] & (held_out < wanted)[by_remainder]]
    held_out[open_classes[: max(missing, 0)]] += 1
    if held_out.sum() == 0:
        raise UserError(f"a validation share of {share} of {num_examples} training examples holds out none of them")
    chosen = [order[labels[order] == label][:count] for label, count in zip(classes, held_out, strict=True)]
    validation = np.sort(np.concatenate(chosen))
    return np.setdiff1d(everything, validation, assume_unique=True), validation


def limit_training(dataset: Dataset, limit: int | None, seed: int) -> Dataset:
    """Keeps `limit` of the training examples (seeded), the same share of each class; None keeps all.

    Raises:
      UserError: there are fewer.
    """
    count = len(dataset.train_labels)
    if limit is None or limit == count:
        return dataset
    if limit > count:
        raise UserError(f"data.train_limit is {limit:,}, but {dataset.name} has {count:,} training images")
    order = seeded_permutation(count, seed, _LIMIT_STREAM)
    classes, counts = np.unique(dataset.train_labels, return_counts=True)
    # Largest remainders, in whole numbers: `limit` is met exactly, and no class is asked for more than it has.
    kept_of_class, remainders = np.divmod(counts * limit, count)
    kept_of_class[np.argsort(-remainders, kind="stable")[: limit - int(kept_of_class.sum())]] += 1
    ordered = dataset.train_labels[order]
    chosen = [order[ordered == label][:kept] for label, kept in zip(classes, kept_of_class, strict=True)]
    kept = np.sort(np.concatenate(chosen))
    return dataclasses.replace(
        dataset, train_images=dataset.train_images[kept], train_labels=dataset.train_labels[kept]
    )


def _load_fashion_mnist_subset(image_size: int | None) -> Dataset:
    resource = importlib.resources.files("fdjax.data") / f"{FASHION_MNIST_SUBSET}.npz"
    with resource.open("rb") as file, np.load(io.BytesIO(file.read())) as arrays:
        parts = {key: arrays[key] for key in arrays}
    images = {}
    for split in ("train", "test"):
        pixels = parts[f"{split}_images"]
        if image_size is None or pixels.shape[1:] == (image_size, image_size):
            images[split] = pixels[..., None]
        else:
            images[split] = np.stack([np.asarray(_fit(Image.fromarray(p), image_size)) for p in pixels])[..., None]
    return Dataset(
        FASHION_MNIST_SUBSET,
        images["train"],
        parts["train_labels"].astype(np.int32),
        images["test"],
        parts["test_labels"].astype(np.int32),
        _FASHION_MNIST_CLASSES,
    )


def _load_folder(root: Path, image_size: int | None, grayscale: bool) -> Dataset:
    listing = _list_folder(root)
    class_names = tuple(listing["train"])
    mode = "L" if grayscale else "RGB"
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    expected: _Reference | None = None
    for split, classes in listing.items():
        files = [file for class_files in classes.values() for file in class_files]
        labels[split] = np.repeat(
            np.array([class_names.index(name) for name in classes], np.int32), [len(c) for c in classes.values()]
        )
        images[split], expected = _read_images(
            len(files),
            lambda i, files=files: _decode_file(files[i], mode),
            lambda i, files=files: files[i],
            image_size,
            expected,
            f"reading {split} images",
        )
    return Dataset(FOLDER, images["train"], labels["train"], images["test"], labels["test"], class_names)


def _list_folder(root: Path) -> dict[str, dict[str, list[str]]]:
    """Returns {split: {class: sorted files}}, classes sorted; raises UserError when the layout is wrong."""
    layout = "an image folder holds train/<class>/* and test/<class>/*"
    if not root.is_dir():
        raise UserError(f"the data path {root} is {'no folder' if root.exists() else 'not there'}; {layout}")
    listing = {}
    for split in ("train", "test"):
        folder = root / split
        if not folder.is_dir():
            raise UserError(f"the data folder {root} has no folder {split!r}; {layout}")
        classes = {}
        for class_folder in _scan(folder):
            if not class_folder.is_dir():
                continue
            entries = _scan(class_folder.path)
            for entry in entries:
                if entry.is_dir():
                    raise UserError(f"{entry.path} is a folder, but {layout}")
            if not entries:
                raise UserError(f"the class folder {class_folder.path} holds no images")
            classes[class_folder.name] = [entry.path for entry in entries]
        listing[split] = classes
    known = listing["train"]
    if len(known) < 2:
        found = f"only the class {next(iter(known))!r}" if known else "no class folders"
        raise UserError(f"the folder {root / 'train'} has {found}; at least two classes are needed, and {layout}")
    for name in listing["test"]:
        if name not in known:
            raise UserError(
                f"the class folder {root / 'test' / name} has no counterpart in {root / 'train'}"
                f"{suggestion(name, known)}"
            )
    if not listing["test"]:
        raise UserError(f"the folder {root / 'test'} has no class folders; {layout}")
    return listing


def _scan(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from error


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A TFDS set found on disk; `test_splits` are the splits that may serve as test set, best first."""

    folder: Path
    test_splits: tuple[str, ...]


def _find_prepared(name: str, path: str | None) -> _Prepared:
    """Finds a TFDS set on disk by itself: TFDS's own look-up may ask the network and needs the builder's code."""
    match = _TFDS_NAME.fullmatch(name)
    if match is None:
        raise _unknown_source(name)
    data_dir = Path(path or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    top = data_dir / match["name"]
    versions = _versions(top / match["config"] if match["config"] else top)
    if not match["config"] and not versions:
        versions = _default_config_versions(name, top)
    if match["version"]:
        versions = [folder for folder in versions if folder.name == match["version"]]
    if not versions:
        if not top.is_dir() and match["name"] not in _tfds_names():
            raise _unknown_source(name)
        where = "is not there" if not data_dir.is_dir() else f"holds no prepared {name!r}"
        raise UserError(
            f"the data set {name!r} is not on this machine: the TFDS data directory {data_dir} {where}. Nothing is"
            f" downloaded here: prepare it with TFDS in the array_record format, give the directory as path, or save"
            f" its images as a folder and use the data set {FOLDER!r}"
        )
    for package in ("tensorflow_datasets", "array_record"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the data set {name!r} needs the Python package {package}, which is not installed")
    return _read_prepared(versions[-1])


def _versions(folder: Path) -> list[Path]:
    """Returns the prepared versions in a TFDS folder, oldest first."""
    found = [
        Path(entry.path)
        for entry in (_scan(folder) if folder.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", entry.name) and os.path.isfile(os.path.join(entry.path, "dataset_info.json"))
    ]
    return sorted(found, key=lambda entry: [int(part) for part in entry.name.split(".")])


def _default_config_versions(name: str, top: Path) -> list[Path]:
    entries = _scan(top) if top.is_dir() else []
    configs = {entry.name: found for entry in entries if (found := _versions(Path(entry.path)))}
    try:
        default = json.loads((top / ".config" / "metadata.json").read_text())["default_config_name"]
    except (OSError, ValueError, KeyError, TypeError):
        default = None
    if len(configs) > 1 and default not in configs:
        choices = ", ".join(f"{top.name}/{config}" for config in sorted(configs))
        raise UserError(f"the data set {name!r} was prepared in several configs in {top}; name one of {choices}")
    return configs[default] if default in configs else next(iter(configs.values()), [])


def _read_prepared(folder: Path) -> _Prepared:
    try:
        info = json.loads((folder / "dataset_info.json").read_text())
        splits = {split["name"] for split in info["splits"]}
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the TFDS description {folder / 'dataset_info.json'} is damaged: {error}") from error
    if not set(formats) & set(_TFDS_FORMATS):
        raise UserError(
            f"the data set in {folder} is stored as {formats[0]}; without TensorFlow only array_record can be read:"
            " prepare it again with file_format='array_record'"
        )
    test_splits = tuple(split for split in ("test", "validation") if split in splits)
    if "train" not in splits or not test_splits:
        raise UserError(
            f"the data set in {folder} has the splits {sorted(splits)}; 'train' and 'test' (or 'validation') are needed"
        )
    return _Prepared(folder, test_splits)


def _tfds_names() -> list[str]:
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        return []
    return tfds.list_builders(with_community_datasets=False)


def _unknown_source(name: str) -> UserError:
    hint = suggestion(name.lower(), [FASHION_MNIST_SUBSET, FOLDER, *_tfds_names()])
    return UserError(
        f"unknown data set {name!r}{hint}; accepted are {FASHION_MNIST_SUBSET!r}, {FOLDER!r} (with a path) and the"
        " names of TFDS (https://www.tensorflow.org/datasets/catalog)"
    )


def _load_tfds(name: str, prepared: _Prepared, image_size: int | None, grayscale: bool) -> Dataset:
    folder = prepared.folder
    try:
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(str(folder))
        features: Any = builder.info.features
    except Exception as error:
        raise UserError(f"TFDS cannot open the data set in {folder}: {error}") from error
    image_key, label_key = _image_and_label(tfds, builder.info, folder)
    class_names = tuple(features[label_key].names)
    if len(class_names) < 2:
        raise UserError(f"the data set in {folder} has {len(class_names)} class; at least two are needed")
    mode = "L" if grayscale or features[image_key].shape[-1] == 1 else "RGB"
    # We decode ourselves: TFDS takes OpenCV where it is installed, which yields other pixels from the same JPEG.
    decoders = {k: tfds.decode.SkipDecoding() for k, f in features.items() if isinstance(f, tfds.features.Image)}

    def open_split(split: str) -> Sequence[Any]:
        try:
            source = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:
            raise UserError(f"TFDS cannot read the split {split!r} in {folder}: {error}") from error
        if not len(source):
            raise UserError(f"the split {split!r} in {folder} is empty")
        return source

    def example(source: Sequence[Any], split: str, index: int) -> Any:
        try:
            return source[index]
        except Exception as error:
            raise UserError(f"{folder}, split {split!r}: record {index} cannot be read: {error}") from error

    test_split = prepared.test_splits[0]
    # ImageNet's test set, for one, has the label -1 throughout: what can be tested on is its validation set.
    if len(prepared.test_splits) > 1 and example(open_split(test_split), test_split, 0)[label_key] < 0:
        test_split = prepared.test_splits[1]

    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    expected: _Reference | None = None
    for split in ("train", test_split):
        source = open_split(split)
        split_labels = np.empty(len(source), np.int32)

        def read(index: int, source=source, split=split, split_labels=split_labels) -> Image.Image:
            record = example(source, split, index)
            split_labels[index] = record[label_key]
            return _decode(io.BytesIO(record[image_key]), mode, f"{folder}, split {split!r}, record {index}")

        pixels, expected = _read_images(
            len(source),
            read,
            lambda index, split=split: f"{folder}, split {split!r}, record {index}",
            image_size,
            expected,
            f"reading {split} images",
        )
        wrong = np.flatnonzero((split_labels < 0) | (split_labels >= len(class_names)))
        if wrong.size:
            raise UserError(
                f"{folder}, split {split!r}, record {wrong[0]} has the label {split_labels[wrong[0]]};"
                f" with {len(class_names)} classes it must be 0..{len(class_names) - 1}"
            )
        images.append(pixels)
        labels.append(split_labels)
    return Dataset(name, images[0], labels[0], images[1], labels[1], class_names)


def _image_and_label(tfds: Any, info: Any, folder: Path) -> tuple[str, str]:
    features = info.features

    def fits(keys: Any) -> bool:
        return (
            isinstance(keys, tuple)
            and len(keys) == 2
            and all(isinstance(key, str) and key in features for key in keys)
            and isinstance(features[keys[0]], tfds.features.Image)
            and features[keys[0]].np_dtype == np.uint8
            and isinstance(features[keys[1]], tfds.features.ClassLabel)
        )

    if isinstance(features, tfds.features.FeaturesDict):
        for keys in (("image", "label"), info.supervised_keys):
            if fits(keys):
                return keys
    raise UserError(
        f"the data set in {folder} cannot be used for image classification: it needs the fields 'image' (uint8) and"
        f" 'label' (a class), or supervised keys of these kinds; it has {_field_kinds(features)}"
    )


def _field_kinds(features: Any) -> str:
    try:
        return ", ".join(f"{key!r} ({type(features[key]).__name__})" for key in features)
    except TypeError:
        return type(features).__name__


@dataclasses.dataclass(frozen=True)
class _Reference:
    """The image whose size all others must have."""

    name: str
    shape: tuple[int, ...]


def _read_images(
    count: int,
    read: Callable[[int], Image.Image],
    name_of: Callable[[int], str],
    image_size: int | None,
    expected: _Reference | None,
    what: str,
) -> tuple[np.ndarray, _Reference]:
    """Reads `count` images into one uint8 [count, H, W, C]; `expected` is the other split's size, if already read."""
    first = read(0)
    threaded = first.width * first.height >= _THREADS_FROM_PIXELS
    reference = expected or _Reference(name_of(0), _pixels(_fit(first, image_size)).shape)
    try:
        images = np.empty((count, *reference.shape), np.uint8)
    except MemoryError as error:
        gigabytes = count * np.prod(reference.shape, dtype=float) / 1e9
        raise UserError(f"{what}: {count} images take {gigabytes:.1f} GB, more than there is memory") from error

    def fill(chunk: range) -> int:
        for index in chunk:
            pixels = _pixels(_fit(read(index), image_size))
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


def _pixels(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _decode_file(file: str, mode: str) -> Image.Image:
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error
    with stream:
        return _decode(stream, mode, file)


def _decode(stream: Any, mode: str, name: str) -> Image.Image:
    """Decodes one image; `name` is what a message calls it."""
    try:
        image = Image.open(stream)
        image.load()
        if image.mode == mode:
            return image
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode not in ("I", "F"):
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image that Pillow can open") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        raise UserError(f"{name} is a damaged or unsupported image: {error}") from error
    raise UserError(f"{name} has 32-bit pixels (Pillow's mode {image.mode}); 8 or 16 bits are supported")


def _fit(image: Image.Image, size: int | None) -> Image.Image:
    """Resizes the middle square of an image to `size` x `size`; the same as resizing first and cropping then."""
    if size is None or image.size == (size, size):
        return image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))
