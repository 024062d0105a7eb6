"""The source of a set to be prepared: its examples by index, in the form in which they will be stored."""

from __future__ import annotations

import dataclasses
import hashlib
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fdjax.errors import UserError

_HASH_CHUNK = 1 << 22
_PROGRESS_FROM_BYTES = 1 << 28


def read_to_the_end(archive: tarfile.TarFile) -> None:
    """Reads what follows the last member of an archive, so that the checksum of a compressed archive is verified.

    Raises:
      OSError, EOFError, zlib.error: the checksum differs, or the file is truncated.
    """
    stream = archive.fileobj
    while stream is not None and stream.read(_HASH_CHUNK):
        pass


class DamagedExample(Exception):
    """An example that cannot be used; the message says which, and why."""


@dataclasses.dataclass(frozen=True)
class SourceSplit:
    """The examples of one split, in the order of their source.

    Attributes:
      count: number of examples.
      read: index -> the fields of the set's features except the label, with "image" encoded; raises `DamagedExample`.
      label: index -> the label, not yet checked.
      name_of: index -> what a message calls the example: its file, and an offset or index.
      num_bytes: estimate of the bytes that all examples will take.
    """

    count: int
    read: Callable[[int], dict[str, Any]]
    label: Callable[[int], int]
    name_of: Callable[[int], str]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Source:
    """A set to be prepared.

    Attributes:
      name: the name of the prepared set.
      version: TFDS's version, such as `1.2.3`.
      features: TFDS's features, with class names.
      splits: name -> split.
      files: the files that it is made from; those with published checksums come first.
      info: further arguments of `tfds.core.DatasetInfo`.
      expected: split -> number of examples of the published set; empty if there is none.
    """

    name: str
    version: str
    features: Any
    splits: Mapping[str, SourceSplit]
    files: Sequence[Path]
    info: Mapping[str, Any]
    expected: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return tuple(self.features["label"].names)

    def check_counts(self) -> None:
        """Raises `UserError` if a split does not have as many examples as the published set."""
        for split, count in self.expected.items():
            got = self.splits[split].count if split in self.splits else 0
            if got != count:
                raise UserError(
                    f"{self.name}: the {split} split has {got:,} examples, and the published set has {count:,}; "
                    "complete the files, or give --unpublished if this is meant to be another set"
                )


def check_files(files: Sequence[Path], published: Mapping[str, tuple[str, str]]) -> None:
    """Compares files with published checksums, by name; files without a checksum pass.

    Args:
      files: files of the source.
      published: file name -> (algorithm, hexadecimal digest).

    Raises:
      UserError: a file differs from the published one.
    """
    for file in files:
        if file.name not in published:
            continue
        algorithm, digest = published[file.name]
        got = file_digest(file, algorithm)
        if got != digest:
            raise UserError(
                f"{file} is not the published file: its {algorithm} is {got}, and that of the original is {digest}; "
                "fetch it again, or give --unpublished if it is meant to be another file"
            )


def file_digest(file: Path, algorithm: str = "sha256") -> str:
    """Returns the checksum of a file, in hexadecimal; shows progress if the file is large.

    Raises:
      UserError: the file cannot be read.
    """
    digest = hashlib.new(algorithm)
    try:
        size = file.stat().st_size
        with (
            file.open("rb") as stream,
            tqdm(
                total=size,
                unit="B",
                unit_scale=True,
                desc=f"checking {file.name}",
                disable=size < _PROGRESS_FROM_BYTES or None,
                leave=False,
            ) as bar,
        ):
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
                bar.update(len(chunk))
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def with_class_names(features: Any, key: str, names: Sequence[str]) -> None:
    """Names the classes of a field.

    Raises:
      UserError: the number of names differs from the number of classes, or a name occurs twice.
    """
    field = features[key]
    if len(set(names)) != len(names) or field.num_classes not in (None, len(names)):
        raise UserError(f"{len(set(names))} different class names for {field.num_classes} classes: {', '.join(names)}")
    field.names = list(names)
