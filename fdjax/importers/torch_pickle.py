"""Files of `torch.save`, read without torch: a pickle, of which nothing but tensors is rebuilt, and the raw numbers.

The two layouts are those of `torch/serialization.py`: a zip archive (torch 1.6 and later), and the legacy one, five
pickles and the raw storages in one file.
"""

from __future__ import annotations

import collections
import math
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from jax import dtypes

from fdjax.errors import UserError

# What a legacy file begins with, pickled.
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


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    size: int


class _Tensor(NamedTuple):
    """A tensor as its pickle describes it: a view of a storage that is read later."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(UserError):
    """The pickle asks for something that is not a tensor."""


class _TensorsOnly(pickle.Unpickler):
    """Rebuilds plain containers and tensors; the only names that it resolves are those below."""

    def __init__(self, stream: IO[bytes], file: Path):
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return name
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self._rebuild_parameter
        module = module.replace("__builtin__", "builtins")  # its name in old pickles
        raise _Refused(
            f"{self._file} is a pickle that wants to execute code when it is read ({module}.{name}), which fdjax never "
            "does: only tensors are read; save the state dict alone (torch.save(model.state_dict(), FILE)), or use a "
            ".safetensors file"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, size, *view = pid
        if kind != "storage" or any(part is not None for part in view):
            raise ValueError(f"it refers to {pid!r}")
        return _Storage(str(key), _STORAGES[storage], int(size))

    def _rebuild_tensor(
        self,
        storage: _Storage,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool = False,
        backward_hooks: Any = None,
        metadata: Any = None,
    ) -> _Tensor:
        tensor = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
        sizes = (*tensor.shape, *tensor.strides, tensor.offset)
        elements = math.prod(tensor.shape)
        if min(sizes) < 0 or elements > storage.size or (elements and last >= storage.size):
            raise ValueError(f"a tensor of shape {tensor.shape} does not fit its storage of {storage.size} elements")
        return tensor

    def _rebuild_parameter(self, data: _Tensor, requires_grad: bool = True, backward_hooks: Any = None) -> _Tensor:
        return data


def read_torch(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict that `torch.save` wrote.

    A state dict under "state_dict", "model" or "model_state_dict" of a larger object is found; what else lies beside
    tensors (an epoch, a learning rate) is left out.

    Args:
      file: a zip archive or a legacy file.

    Returns:
      Name -> array, of the type it has in the file.

    Raises:
      UserError: the pickle asks for anything but tensors, the numbers are big-endian, the file is damaged, or there is
        no state dict in it.
    """
    try:
        if zipfile.is_zipfile(file):
            content, storages = _read_zip(file)
        else:
            content, storages = _read_legacy(file)
        described = _state_dict(content)
        if described is None:
            raise UserError(
                f"{file} holds no state dict (names with tensors) but a {type(content).__name__}; save one with "
                "torch.save(model.state_dict(), FILE)"
            )
        return {name: _materialise(tensor, storages) for name, tensor in described.items()}
    except UserError:
        raise
    except Exception as error:  # A damaged pickle or archive raises nearly anything.
        raise UserError(
            f"{file} cannot be read as a file of torch.save: {type(error).__name__}: {error}; save the weights again "
            "with torch.save(model.state_dict(), FILE)"
        ) from error


def _big_endian(file: Path) -> UserError:
    return UserError(f"{file} was written on a big-endian machine; only little-endian files are read: save it again")


def _read_zip(file: Path) -> tuple[Any, dict[str, bytes]]:
    """What the pickle describes, and the storages by key."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("the archive holds no data.pkl, or several")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise _big_endian(file)
        with archive.open(pickles[0]) as stream:
            content = _TensorsOnly(stream, file).load()
        data = f"{root}data/"
        return content, {name.removeprefix(data): archive.read(name) for name in names if name.startswith(data)}


def _read_legacy(file: Path) -> tuple[Any, dict[str, bytes]]:
    """As `_read_zip`."""
    with file.open("rb") as stream:
        first = _TensorsOnly(stream, file).load()
        if first != _LEGACY_MAGIC:  # a pickle by somebody else
            return first, {}
        _TensorsOnly(stream, file).load()  # the protocol's version
        system = _TensorsOnly(stream, file).load()
        if not system["little_endian"]:
            raise _big_endian(file)
        sizes: dict[str, int] = {}

        class Legacy(_TensorsOnly):
            def persistent_load(self, pid: Any) -> _Storage:
                storage = super().persistent_load(pid)
                sizes[storage.key] = storage.size * storage.dtype.itemsize
                return storage

        content = Legacy(stream, file).load()
        storages = {}
        for key in _TensorsOnly(stream, file).load():
            stream.read(8)  # the number of elements
            storages[key] = stream.read(sizes[key])
    return content, storages


def _state_dict(content: Any) -> dict[str, _Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    for key in ("state_dict", "model", "model_state_dict"):
        inner = _state_dict(content.get(key))
        if inner:
            return inner
    return {str(name): value for name, value in content.items() if isinstance(value, _Tensor)} or None


def _materialise(tensor: _Tensor, storages: Mapping[str, bytes]) -> np.ndarray:
    storage = np.frombuffer(storages[tensor.storage.key], tensor.storage.dtype)
    if len(storage) < tensor.storage.size:
        raise ValueError(f"storage {tensor.storage.key} is cut off")
    if sys.byteorder != "little":
        storage = storage.byteswap().view(storage.dtype.newbyteorder("="))
    strides = [step * storage.itemsize for step in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
