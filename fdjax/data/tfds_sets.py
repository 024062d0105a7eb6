"""TFDS sets on disk, found and read without TensorFlow and without the network."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.data.folder import scan
from fdjax.data.labels import class_numbers
from fdjax.errors import UserError, suggestion

FASHION_MNIST_SUBSET = "fashion_mnist_subset"
FOLDER = "folder"
PREPARED = "prepared"
INFO_FILE = "dataset_info.json"
# `prepare` writes this beside a set: the labels in stored order, so that no reader has to read all records for them.
LABELS_FILE = "fdjax_labels.npz"
# `prepare` writes this too: classes, counts and checksums.
MANIFEST_FILE = "fdjax_manifest.json"

TFDS_NAME = re.compile(r"(?P<name>[A-Za-z]\w*)(/(?P<config>[\w+\-.]+))?(:(?P<version>\d+\.\d+\.\d+))?")
_TFDS_FORMATS = ("array_record", "parquet")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A TFDS set on disk; `test_splits` lists the splits that may serve as test set, best first."""

    folder: Path
    test_splits: tuple[str, ...]


def find_prepared(name: str, path: str | None) -> Prepared:
    """Finds a TFDS set on disk without TFDS's own look-up, which may use the network and needs the builder's code.

    Args:
      name: `prepared`, or `NAME`, `NAME/CONFIG` or `NAME:VERSION`.
      path: directory of the set (for `prepared`), or TFDS's data directory.

    Returns:
      The set.

    Raises:
      UserError: the set does not exist, lacks a split, or cannot be read without TensorFlow.
    """
    if name == PREPARED:
        folder = Path(path or "").expanduser()
        if not path or not (folder / INFO_FILE).is_file():
            given = f"{folder} holds none" if path else "no path was given"
            raise UserError(
                f"the data set {PREPARED!r} needs the directory of a prepared TFDS set, which holds {INFO_FILE}, as "
                f"path; {given}"
            )
        _check_packages(name)
        return _read_prepared(folder)
    match = TFDS_NAME.fullmatch(name)
    if match is None:
        raise unknown_source(name)
    data_dir = Path(path or default_data_dir()).expanduser()
    top = data_dir / match["name"]
    versions = _versions(top / match["config"] if match["config"] else top)
    if not match["config"] and not versions:
        versions = _default_config_versions(name, top)
    if match["version"]:
        versions = [folder for folder in versions if folder.name == match["version"]]
    if not versions:
        if not top.is_dir() and match["name"] not in tfds_names():
            raise unknown_source(name)
        where = "is not there" if not data_dir.is_dir() else f"holds no prepared {name!r}"
        raise UserError(
            f"the data set {name!r} is not on this machine: the TFDS data directory {data_dir} {where}. Nothing is"
            f" downloaded here: prepare it with 'fdjax data prepare' or TFDS in the array_record format, give the"
            f" directory as path, or save its images as a folder and use the data set {FOLDER!r}"
        )
    _check_packages(name)
    return _read_prepared(versions[-1])


def default_data_dir() -> str:
    """Returns TFDS's own data directory."""
    return os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"


def _check_packages(name: str) -> None:
    for package in ("tensorflow_datasets", "array_record"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the data set {name!r} needs the Python package {package}, which is not installed")


def _versions(folder: Path) -> list[Path]:
    """Returns the prepared versions in a TFDS folder, oldest first."""
    found = [
        Path(entry.path)
        for entry in (scan(folder) if folder.is_dir() else ())
        if re.fullmatch(r"\d+\.\d+\.\d+", entry.name) and os.path.isfile(os.path.join(entry.path, INFO_FILE))
    ]
    return sorted(found, key=lambda entry: [int(part) for part in entry.name.split(".")])


def _default_config_versions(name: str, top: Path) -> list[Path]:
    entries = scan(top) if top.is_dir() else []
    configs = {entry.name: found for entry in entries if (found := _versions(Path(entry.path)))}
    try:
        default = json.loads((top / ".config" / "metadata.json").read_text())["default_config_name"]
    except (OSError, ValueError, KeyError, TypeError):
        default = None
    if len(configs) > 1 and default not in configs:
        choices = ", ".join(f"{top.name}/{config}" for config in sorted(configs))
        raise UserError(f"the data set {name!r} was prepared in several configs in {top}; name one of {choices}")
    return configs[default] if default in configs else next(iter(configs.values()), [])


def _read_prepared(folder: Path) -> Prepared:
    try:
        info = json.loads((folder / INFO_FILE).read_text())
        splits = {split["name"] for split in info["splits"]}
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the TFDS description {folder / INFO_FILE} is damaged: {error}") from error
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
    return Prepared(folder, test_splits)


def tfds_names() -> list[str]:
    """Lists the sets that TFDS knows; none if it is not installed."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        return []
    return tfds.list_builders(with_community_datasets=False)


def unknown_source(name: str) -> UserError:
    """Returns the error that a name does not denote a data set."""
    hint = suggestion(name.lower(), [FASHION_MNIST_SUBSET, FOLDER, PREPARED, *tfds_names()])
    return UserError(
        f"unknown data set {name!r}{hint}; accepted are {FASHION_MNIST_SUBSET!r}, {FOLDER!r} and {PREPARED!r}"
        " (with a path) and the names of TFDS (https://www.tensorflow.org/datasets/catalog)"
    )


def image_and_label(tfds: Any, info: Any, folder: Path) -> tuple[str, str]:
    """Returns the fields of a set that hold an image and its class.

    Raises:
      UserError: the set has no such fields.
    """
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


class PreparedReader:
    """Reads the examples of a prepared set, with images still encoded.

    Args:
      prepared: the set, from `find_prepared`.

    Attributes:
      folder: folder of the set.
      class_names: names of the classes, in the order of the labels.
      channels: channels of the images, 1 or 3; 3 if the set does not say.
      test_split: the split that serves as test set.
      validation_split: the split that serves as validation set; None if there is none.

    Raises:
      UserError: the set is damaged, or not for image classification.
    """

    def __init__(self, prepared: Prepared):
        self.folder = prepared.folder
        try:
            import tensorflow_datasets as tfds

            self._builder: Any = tfds.builder_from_directory(str(self.folder))
            features: Any = self._builder.info.features
        except Exception as error:
            raise UserError(f"TFDS cannot open the data set in {self.folder}: {error}") from error
        self._image_key, self._label_key = image_and_label(tfds, self._builder.info, self.folder)
        self.class_names = tuple(features[self._label_key].names)
        if len(self.class_names) < 2:
            raise UserError(f"the data set in {self.folder} has {len(self.class_names)} class; at least two are needed")
        self._check_class_names()
        self.channels = 1 if features[self._image_key].shape[-1] == 1 else 3
        # fdjax decodes the images: TFDS uses OpenCV if it is installed, which yields other pixels from the same JPEG.
        images = [key for key, field in features.items() if isinstance(field, tfds.features.Image)]
        self._options: dict[str, Any] = {"decoders": {key: tfds.decode.SkipDecoding() for key in images}}
        file_format = self._builder.info.file_format
        if file_format is not None and file_format.value == "array_record":
            # Reading two fields of a record is faster than letting TFDS make arrays of all of them.
            self._options = {"deserialize_method": tfds.decode.DeserializeMethod.RAW_BYTES}
        self.test_split = prepared.test_splits[0]
        self.validation_split = prepared.test_splits[1] if len(prepared.test_splits) > 1 else None
        # Some test sets, such as ImageNet's, have the label -1 throughout; the validation set then takes their place.
        if self.validation_split and self.example(self.open(self.test_split), self.test_split, 0)[1] < 0:
            self.test_split, self.validation_split = self.validation_split, None

    def splits(self) -> dict[str, str]:
        """Returns the use of each split ("train", "test", "validation" if there is one) and its name in the set."""
        named = {"train": "train", "test": self.test_split, "validation": self.validation_split}
        return {use: split for use, split in named.items() if split is not None}

    def _check_class_names(self) -> None:
        """Checks class names against the manifest of `prepare`; TFDS replaces names that it cannot read by numbers."""
        try:
            written = tuple(json.loads((self.folder / MANIFEST_FILE).read_text())["class_names"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        if written != self.class_names:
            pairs = itertools.zip_longest(written, self.class_names)
            at, (ours, theirs) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
            raise UserError(
                f"the data set in {self.folder} is damaged: its class {at} is {ours!r} by {MANIFEST_FILE}, and "
                f"{theirs!r} by TFDS's files; prepare it again"
            )

    def open(self, split: str) -> Sequence[Any]:
        """Returns the records of a split; raises `UserError` if there are none."""
        try:
            source = self._builder.as_data_source(split=split, **self._options)
        except Exception as error:
            raise UserError(f"TFDS cannot read the split {split!r} in {self.folder}: {error}") from error
        if not len(source):
            raise UserError(f"the split {split!r} in {self.folder} is empty")
        return source

    def name_of(self, split: str, index: int) -> str:
        """Returns what a message calls a record."""
        return f"{self.folder}, split {split!r}, record {index}"

    def example(self, source: Sequence[Any], split: str, index: int) -> tuple[bytes, int]:
        """Returns the encoded image and the label of a record of `open(split)`; raises `UserError` if it fails."""
        from tensorflow_datasets.proto import tf_example_pb2

        example_type: Any = getattr(tf_example_pb2, "Example")  # noqa: B009 - made at run time, unknown to type checkers
        try:
            record = source[index]
            if isinstance(record, bytes):
                fields = example_type.FromString(record).features.feature
                return fields[self._image_key].bytes_list.value[0], fields[self._label_key].int64_list.value[0]
            label = class_numbers([record[self._label_key]], self.name_of(split, index))[0]
            return record[self._image_key], int(label)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.name_of(split, index)} cannot be read: {error}") from error

    def check_labels(self, split: str, labels: np.ndarray) -> None:
        """Checks that all labels are classes of the set.

        Args:
          split: name of the split.
          labels: int [n], in the order of the records.

        Raises:
          UserError: a label is out of range.
        """
        wrong = np.flatnonzero((labels < 0) | (labels >= len(self.class_names)))
        if wrong.size:
            raise UserError(
                f"{self.name_of(split, int(wrong[0]))} has the label {labels[wrong[0]]};"
                f" with {len(self.class_names)} classes it must be 0..{len(self.class_names) - 1}"
            )
