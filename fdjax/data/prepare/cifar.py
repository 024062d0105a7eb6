"""CIFAR-10 and CIFAR-100 in their original layouts: the binary and the python version, as archive or unpacked."""

from __future__ import annotations

import dataclasses
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fdjax.data.labels import class_numbers
from fdjax.data.prepare.source import DamagedExample, Source, SourceSplit, read_to_the_end, with_class_names
from fdjax.errors import UserError

_PIXELS = 3 * 32 * 32
# Checksums of the python versions, as in torchvision; TFDS has those of the binary versions.
PUBLISHED = {
    "cifar-10-python.tar.gz": ("md5", "c58f30108f718f92721af3b95e74349a"),
    "cifar-100-python.tar.gz": ("md5", "eb9058c3a382ffc7106e4002c42a8d85"),
}
EXPECTED = {"train": 50_000, "test": 10_000}


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The files of one version, and its label fields in the order of a binary record, with the class last."""

    files: dict[str, tuple[str, ...]]
    names: dict[str, tuple[str, str]]
    labels: tuple[str, ...]
    binary: bool


_BATCHES = tuple(f"data_batch_{n}" for n in range(1, 6))
_LAYOUTS = {
    "cifar10": (
        _Layout(
            {"train": tuple(f"{name}.bin" for name in _BATCHES), "test": ("test_batch.bin",)},
            {"label": ("batches.meta.txt", "")},
            ("label",),
            binary=True,
        ),
        _Layout(
            {"train": _BATCHES, "test": ("test_batch",)},
            {"label": ("batches.meta", "label_names")},
            ("labels",),
            binary=False,
        ),
    ),
    "cifar100": (
        _Layout(
            {"train": ("train.bin",), "test": ("test.bin",)},
            {"coarse_label": ("coarse_label_names.txt", ""), "label": ("fine_label_names.txt", "")},
            ("coarse_label", "label"),
            binary=True,
        ),
        _Layout(
            {"train": ("train",), "test": ("test",)},
            {"coarse_label": ("meta", "coarse_label_names"), "label": ("meta", "fine_label_names")},
            ("coarse_labels", "fine_labels"),
            binary=False,
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class _Part:
    """The contents of one file: pixels [n, 3072] and labels [n, fields]; `where` names the place of a record."""

    name: str
    pixels: np.ndarray
    labels: np.ndarray
    where: Callable[[int], str]


def open_cifar(name: str, path: Path, builder: Any, *, skip_damaged: bool) -> Source:
    """Reads CIFAR-10 or CIFAR-100 from an archive, or from the folder that it was unpacked to.

    Args:
      name: `cifar10` or `cifar100`.
      path: the .tar.gz, the folder with the batch files, or the folder above it.
      builder: TFDS's builder of the set.
      skip_damaged: whether to leave out an incomplete record at the end of a file.

    Returns:
      The source.

    Raises:
      UserError: files are missing, damaged or of another format.
    """
    available, read = _archive(path) if path.is_file() else _folder(path)
    layout = next(
        (one for one in _LAYOUTS[name] if any(file in available for files in one.files.values() for file in files)),
        None,
    )
    if layout is None:
        wanted = " or ".join(f"{one.files['train'][0]}, ... ({version})" for one, version in
                             zip(_LAYOUTS[name], ("binary", "python"), strict=True))  # fmt: skip
        raise UserError(f"{path} holds no {name} in its original layout: it has no {wanted}")
    for file in {*(f for files in layout.files.values() for f in files), *(file for file, _ in layout.names.values())}:
        if file not in available:
            raise UserError(f"{path} has no file {file}, which belongs to {name}")
    features = builder.info.features
    for field, (file, key) in layout.names.items():
        with_class_names(features, field, _names(read(file), f"{path}: {file}", key))
    fields = ("coarse_label", "label")[-len(layout.labels) :]
    splits = {}
    for split, files in layout.files.items():
        parse = _binary if layout.binary else _python
        parts = [parse(read(file), f"{path}: {file}", layout.labels, skip_damaged) for file in files]
        splits[split] = _split(split, parts, fields, features)
    files = [path] if path.is_file() else sorted({Path(available[f]) for fs in layout.files.values() for f in fs})
    return Source(name, str(builder.version), features, splits, files, {}, EXPECTED)


def _split(split: str, parts: list[_Part], fields: tuple[str, ...], features: Any) -> SourceSplit:
    starts = np.cumsum([0, *(len(part.pixels) for part in parts)])

    def place(index: int) -> tuple[_Part, int]:
        at = int(np.searchsorted(starts, index, side="right")) - 1
        return parts[at], index - int(starts[at])

    def name_of(index: int) -> str:
        part, at = place(index)
        return part.where(at)

    def read(index: int) -> dict[str, Any]:
        part, at = place(index)
        pixels = part.pixels[at].reshape(3, 32, 32).transpose(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG")
        found = {"id": f"{split}_{index:05d}", "image": png.getvalue()}
        for field, label in zip(fields[:-1], part.labels[at], strict=False):
            if not 0 <= label < features[field].num_classes:
                raise DamagedExample(
                    f"{name_of(index)} has the {field} {label}; it must be 0..{features[field].num_classes - 1}"
                )
            found[field] = int(label)
        return found

    def label(index: int) -> int:
        part, at = place(index)
        return int(part.labels[at, -1])

    return SourceSplit(int(starts[-1]), read, label, name_of, num_bytes=int(starts[-1]) * 2500)


def _archive(path: Path) -> tuple[dict[str, Any], Callable[[str], bytes]]:
    members = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                if stream is not None:
                    members[Path(member.name).name] = stream.read()
            read_to_the_end(archive)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{path} is not an archive, or is truncated or damaged: {error}") from error
    return members, members.__getitem__


def _folder(path: Path) -> tuple[dict[str, Any], Callable[[str], bytes]]:
    if not path.is_dir():
        raise UserError(f"the source {path} is not there")
    folders = [path, *sorted(entry for entry in path.iterdir() if entry.is_dir() and entry.name.startswith("cifar"))]
    for folder in folders:
        files = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
        if any(file in files for layouts in _LAYOUTS.values() for one in layouts for file in one.files["train"]):
            return files, lambda name, files=files: _bytes(files[name])
    return {}, lambda name: b""


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error


def _names(content: bytes, where: str, key: str) -> list[str]:
    if not key:
        return [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    names = _unpickled(content, where).get(key)
    if not isinstance(names, list):
        raise UserError(f"{where} has no list {key!r}: it is not a file of this set")
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def _binary(content: bytes, where: str, labels: tuple[str, ...], skip_damaged: bool) -> _Part:
    size = len(labels) + _PIXELS
    whole, rest = divmod(len(content), size)
    if rest and not skip_damaged:
        raise UserError(
            f"{where} is truncated or of another format: its {len(content):,} bytes are not a whole number of records "
            f"of {size:,}; record {whole}, at offset {whole * size:,}, is incomplete"
        )
    records = np.frombuffer(content, np.uint8, whole * size).reshape(whole, size)
    return _Part(
        where,
        records[:, len(labels) :],
        records[:, : len(labels)].astype(np.int64),
        lambda index: f"{where}, record {index} at offset {index * size:,}",
    )


def _python(content: bytes, where: str, labels: tuple[str, ...], skip_damaged: bool) -> _Part:
    del skip_damaged  # A pickle is whole or unreadable.
    batch = _unpickled(content, where)
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != _PIXELS:
        raise UserError(f"{where} holds no 'data' of uint8 [n, {_PIXELS}]: it is not a batch of this set")
    columns = []
    for key in labels:
        column = batch.get(key)
        if not isinstance(column, list) or len(column) != len(data):
            raise UserError(f"{where} has {len(data):,} images but no {key!r} for each of them")
        columns.append(class_numbers(column, f"{where}, {key!r},"))
    return _Part(where, data, np.stack(columns, axis=1), lambda index: f"{where}, index {index}")


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles arrays and nothing else, because a pickle can execute code."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy._core.numeric", "_codecs")
        for name in ("ndarray", "dtype", "_reconstruct", "_frombuffer", "encode")
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which such a file does not need")
        return super().find_class(module_name, global_name)


def _unpickled(content: bytes, where: str) -> dict[str, Any]:
    try:
        loaded = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # A damaged pickle raises almost any exception.
        raise UserError(f"{where} is truncated, damaged or no pickle: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{where} holds no dictionary: it is not a file of this set")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in loaded.items()}
