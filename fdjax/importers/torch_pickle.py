"""Reads files of `torch.save` without torch: the tensors that a pickle describes, and their raw numbers; nothing else.

There are two layouts, as in `torch/serialization.py`: a zip archive (torch 1.6 and later), and the legacy layout, with
five pickles and the raw storages in one file.
"""

from __future__ import annotations

import io
import math
import mmap
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax import dtypes

from fdjax.errors import UserError
from fdjax.importers.archives import check_archive
from fdjax.importers.inert_pickle import Inert, InertPickle
from fdjax.importers.state_dicts import Weights, choose

# The first pickled object of a legacy file.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
_MOST_DIMENSIONS = 32


class _Storage(NamedTuple):
    """A part of a storage: `size` numbers from `start` on, of the storage `key`, which has `whole` numbers."""

    key: str
    dtype: np.dtype
    start: int
    size: int
    whole: int


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it: a view of a storage that is read later."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Unread(NamedTuple):
    """A storage of an unknown type, which no needed tensor may use."""

    kind: str


# -- what a pickle calls and refers to


def _persistent(pid: Any) -> _Storage | _Unread:
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError("it refers to something that is not a storage")
    _, kind, key, _, size, *view = pid
    name = kind.name.rpartition(".")[2] if isinstance(kind, Inert) else ""
    if name not in _STORAGES:
        return _Unread(name or "a nameless type")
    whole = _whole(size)
    start, count = 0, whole
    if view and view[0] is not None:  # A part of a storage, as torch wrote it before 0.4.
        _, start, count = view[0][0], _whole(view[0][1]), _whole(view[0][2])
        if start + count > whole:
            raise ValueError(f"a part of storage {key} lies beyond its end")
    return _Storage(str(key), _STORAGES[name], start, count, whole)


def _whole(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError("a size is not a whole number of 0 or more")
    return number


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    """Returns the tensor that a call rebuilds, or None."""
    if name in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"):
        return _tensor(*arguments[:4])
    wrapped = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
    if name in (*wrapped, "torch.nn.parameter.Parameter", "torch.autograd.variable.Variable"):
        return arguments[0] if arguments and isinstance(arguments[0], _Tensor) else None
    if name == "copyreg.__newobj__" and arguments and isinstance(arguments[0], Inert):
        return _called(arguments[0].name, arguments[1:])
    if name == "torch._tensor._rebuild_from_type_v2" and isinstance(arguments[0], Inert):
        return _called(arguments[0].name, arguments[2])
    return None


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> _Tensor | None:
    if isinstance(storage, _Unread):
        return None
    if isinstance(shape, Inert):  # torch.Size
        shape = (shape.arguments or ((),))[0]
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple | list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError("a tensor has no storage, or too many dimensions")
    tensor = _Tensor(storage, _size(offset), tuple(map(_size, shape)), tuple(map(_size, strides)))
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    elements = math.prod(tensor.shape)
    if elements > storage.size > last:
        raise ValueError(
            f"a tensor of shape {tensor.shape} repeats its {storage.size} numbers (torch.expand); save its .clone()"
        )
    if elements > storage.size or (elements and last >= storage.size):
        raise ValueError(f"a tensor of shape {tensor.shape} does not fit its storage of {storage.size} elements")
    return tensor


def _size(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"a tensor with the size {number} does not fit its storage")
    return number


# -- files


class _Content(NamedTuple):
    """What the pickle describes, the names in it, and a function that reads a storage's bytes."""

    described: Any
    names: set[str]
    read: Callable[[_Storage], Any]


def read_torch(file: Path, averaged: bool = False) -> Weights:
    """Reads the tensors of a state dict that `torch.save` wrote.

    A state dict inside a larger object is found (`fdjax.importers.state_dicts`). Other objects beside the tensors (an
    epoch, an optimizer's state, arguments of a program) are skipped, and neither made nor read.

    Args:
      file: a zip archive or a legacy file.
      averaged: whether to take the averaged weights (EMA) of a file that has both.

    Returns:
      Arrays with the dtype that they have in the file; read-only where they are views of it.

    Raises:
      UserError: the pickle was made to execute code, the numbers are big-endian, the file is damaged, it holds no state
        dict, or a tensor is of a kind that is not supported.
    """
    try:
        content = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        chosen = choose(content.described, _Tensor, str(file), averaged)
        arrays: dict[str, np.ndarray] = {}
        # In a file that was made to mislead, records of one storage may differ: each is checked against the bytes.
        storages: dict[tuple[str, np.dtype, int], np.ndarray] = {}
        for name, tensor in chosen.tensors.items():
            if isinstance(tensor, Inert):
                raise UserError(
                    f"{file}: {name} is not a plain tensor of numbers ({tensor.name}); quantised and sparse weights "
                    "are not read: save the weights of the float network"
                )
            record = (tensor.storage.key, tensor.storage.dtype, tensor.storage.whole)
            if record not in storages:
                storages[record] = _numbers(tensor.storage, content.read)
            arrays[name] = _view(tensor, storages[record])
        notes = [*chosen.notes, *_passed_over(content.names)]
        return Weights(arrays, notes, chosen.averaged)
    except UserError:
        raise
    except Exception as error:  # A damaged pickle or archive raises almost any exception.
        raise UserError(
            f"{file} cannot be read as a file of torch.save: {type(error).__name__}: {error}; save the weights again "
            "with torch.save(model.state_dict(), FILE)"
        ) from error


def _passed_over(names: set[str]) -> list[str]:
    foreign = sorted(name for name in names if not name.startswith(("torch.", "collections.", "builtins.", "copyreg.")))
    if not foreign:
        return []
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    return [f"objects beside the tensors were skipped unread: {', '.join(foreign[:5])}{more}"]


def _big_endian(file: Path) -> UserError:
    return UserError(f"{file} was written on a big-endian machine; only little-endian files are read: save it again")


def _read_zip(file: Path) -> _Content:
    with zipfile.ZipFile(file) as archive:
        check_archive(archive, file)
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("the archive holds no data.pkl, or several")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise _big_endian(file)
        names: set[str] = set()
        stream = io.BytesIO(archive.read(pickles[0]))
    described = InertPickle(str(file), _called, _persistent, names.add).load(stream)

    def read(storage: _Storage) -> bytes:
        member = members[f"{root}data/{storage.key}"]
        if member.file_size != storage.whole * storage.dtype.itemsize:
            raise ValueError(f"storage {storage.key} has {member.file_size} bytes and should have "
                             f"{storage.whole * storage.dtype.itemsize}")  # fmt: skip
        with zipfile.ZipFile(file) as archive:
            return archive.read(member)

    return _Content(described, names, read)


def _read_legacy(file: Path) -> _Content:
    names: set[str] = set()
    wanted: dict[str, _Storage] = {}

    def persistent(pid: Any) -> _Storage | _Unread:
        storage = _persistent(pid)
        if isinstance(storage, _Unread):
            raise UserError(f"{file} has numbers of a type that is not read: {storage.kind}")
        wanted.setdefault(storage.key, storage)
        return storage

    def load() -> Any:
        return InertPickle(str(file), _called, persistent, names.add).load(content)

    with file.open("rb") as stream:
        # A memory map takes no memory of its own, however much a pickle asks to read.
        content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    first = load()
    if first != _LEGACY_MAGIC:  # A pickle that torch did not write.
        return _Content(first, names, lambda storage: b"")
    load()  # the protocol's version
    if not load()["little_endian"]:
        raise _big_endian(file)
    described = load()
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, load()):
        count = int.from_bytes(content.read(8), "little", signed=True)
        start, size = content.tell(), count * wanted[key].dtype.itemsize
        if count != wanted[key].whole or start + size > len(content):
            raise ValueError(f"storage {key} is cut off")
        places[key] = (start, size)
        content.seek(start + size)

    def read(storage: _Storage) -> memoryview:
        start, size = places[storage.key]
        return memoryview(content)[start : start + size]

    return _Content(described, names, read)


def _numbers(storage: _Storage, read: Callable[[_Storage], Any]) -> np.ndarray:
    numbers = np.frombuffer(read(storage), storage.dtype)
    if len(numbers) != storage.whole:
        raise ValueError(f"storage {storage.key} is cut off")
    if sys.byteorder != "little":
        numbers = numbers.byteswap().view(numbers.dtype.newbyteorder("="))
    return numbers


def _view(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    # No copy: many tensors may share one storage.
    strides = [step * numbers.itemsize for step in tensor.strides]
    first = tensor.storage.start + tensor.offset
    return np.lib.stride_tricks.as_strided(numbers[first:], tensor.shape, strides, writeable=False)
