"""ImageNet 2012 from its tar files, which are read in place, neither unpacked nor copied."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from fdjax.data.prepare.pictures import checked_picture
from fdjax.data.prepare.source import DamagedExample, Source, SourceSplit, read_to_the_end
from fdjax.errors import UserError

TRAIN_TAR, VALIDATION_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
EXPECTED = {"train": 1_281_167, "validation": 50_000}
_SYNSET = re.compile(r"n\d{8}")


class _Member(NamedTuple):
    """A picture in a tar file: its place, and its class (-1 if unknown)."""

    name: str
    offset: int
    size: int
    label: int


def open_imagenet(path: Path, builder: Any, labels: Path | None) -> Source:
    """Lists ImageNet's pictures in their tar files.

    Args:
      path: the folder with `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`.
      builder: TFDS's builder of the set.
      labels: the validation labels: a file with a line `NAME SYNSET` per picture, or with one synset per line in the
        order of the pictures' names, or the devkit's archive. None: the devkit's archive in `path` if it is there, or
        else the list that comes with TFDS.

    Returns:
      The source.

    Raises:
      UserError: a file is missing, truncated or not the expected one.
    """
    files = [path / TRAIN_TAR, path / VALIDATION_TAR]
    for file in files:
        if not file.is_file():
            raise UserError(f"{path} has no file {file.name}, from which imagenet2012 is prepared")
    features = builder.info.features
    classes = {name: number for number, name in enumerate(features["label"].names)}
    train = list(_train_members(files[0], classes))
    validation = [member for member, _ in _members(files[1])]
    if labels is None and (path / DEVKIT).is_file():
        labels = path / DEVKIT
    known = _validation_labels(labels, sorted(member.name for member in validation))
    found = []
    for member in validation:
        if member.name not in known:
            raise UserError(f"{labels} names no class for {member.name} of {files[1]}")
        found.append(member._replace(label=classes.get(known[member.name], -1)))
    splits = {"train": _split(files[0], train), "validation": _split(files[1], found)}
    return Source("imagenet2012", str(builder.version), features, splits, files, {}, EXPECTED)


def _split(file: Path, members: list[_Member]) -> SourceSplit:
    if not members:
        raise UserError(f"{file} holds no pictures")
    handle = os.open(file, os.O_RDONLY)  # Open until the process ends; pread needs no lock.

    def name_of(index: int) -> str:
        return f"{file}, {members[index].name} at offset {members[index].offset:,}"

    def read(index: int) -> dict[str, Any]:
        member = members[index]
        encoded = os.pread(handle, member.size, member.offset)
        if len(encoded) != member.size:
            raise DamagedExample(f"{name_of(index)} is truncated: {len(encoded):,} of {member.size:,} bytes")
        return {"image": checked_picture(encoded, name_of(index), "JPEG"), "file_name": member.name}

    num_bytes = sum(member.size for member in members)
    return SourceSplit(len(members), read, lambda index: members[index].label, name_of, num_bytes)


def _members(file: Path, stream: Any = None, base: int = 0) -> Iterator[tuple[_Member, Callable[[], Any]]]:
    """Yields the files in a tar, each with a function that opens it; `base` is the offset of the tar in its file."""
    try:
        with tarfile.open(None if stream else file, "r:", fileobj=stream) as archive:
            for entry in archive:
                if entry.isfile():
                    member = _Member(Path(entry.name).name, base + entry.offset_data, entry.size, -1)
                    yield member, lambda entry=entry, archive=archive: archive.extractfile(entry)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{file} is not a tar file, or is truncated or damaged: {error}") from error


def _train_members(file: Path, classes: dict[str, int]) -> Iterator[_Member]:
    """Yields the training pictures; the training tar holds one tar per class."""
    with tqdm(total=len(classes), desc=f"listing {file.name}", unit=" classes", disable=None, leave=False) as bar:
        for inner, opened in _members(file):
            synset = Path(inner.name).stem
            if synset not in classes:
                raise UserError(f"{file}, {inner.name} at offset {inner.offset:,} is not of a class of ImageNet")
            for member, _ in _members(file, opened(), inner.offset):
                yield member._replace(label=classes[synset])
            bar.update()


def _validation_labels(labels: Path | None, names: list[str]) -> dict[str, str]:
    """Returns picture name -> synset."""
    if labels is None:
        import tensorflow_datasets as tfds

        lines = Path(tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")).read_text().split()
    elif labels.is_file() and tarfile.is_tarfile(labels):
        lines = _devkit_labels(labels)
    else:
        try:
            rows = [line.replace(",", " ").split() for line in labels.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"the labels {labels} cannot be read: {error}") from error
        for number, row in enumerate(rows, 1):
            if not 1 <= len(row) <= 2 or not _SYNSET.fullmatch(row[-1]):
                raise UserError(
                    f"{labels}, line {number} is {' '.join(row)!r}; it must be a picture's name and its synset "
                    "(n01440764), or the synset alone"
                )
        if rows and len(rows[0]) == 2:
            return {row[0]: row[-1] for row in rows}
        lines = [row[-1] for row in rows]
    where = labels or "TFDS's list of validation labels"
    # A part of the published pictures can still be identified by their numbers.
    numbers = [int(found[1]) - 1 if (found := re.search(r"_val_(\d{8})\.", name)) else -1 for name in names]
    if len(lines) == len(names):
        return dict(zip(names, lines, strict=True))
    if all(0 <= number < len(lines) for number in numbers):
        return {name: lines[number] for name, number in zip(names, numbers, strict=True)}
    raise UserError(f"{where} has {len(lines):,} labels for {len(names):,} validation pictures; give --labels FILE")


def _devkit_labels(archive: Path) -> list[str]:
    """Reads the labels of the devkit, whose numbering of classes is explained by its meta.mat."""
    from scipy.io import loadmat

    try:
        with tarfile.open(archive) as devkit:
            contents = {}
            for entry in devkit:
                stream = devkit.extractfile(entry) if entry.isfile() else None
                if stream is not None and Path(entry.name).name in (
                    "meta.mat",
                    "ILSVRC2012_validation_ground_truth.txt",
                ):
                    contents[Path(entry.name).name] = stream.read()
            read_to_the_end(devkit)
        synsets = loadmat(io.BytesIO(contents["meta.mat"]), squeeze_me=True)["synsets"]
        names = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [names[int(line)] for line in contents["ILSVRC2012_validation_ground_truth.txt"].split()]
    except Exception as error:  # scipy raises almost any exception on a damaged file.
        raise UserError(f"{archive} is not ImageNet's devkit, or is damaged: {error}") from error
