"""From a weights file, whatever its layout, to arrays by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fdjax.errors import UserError
from fdjax.importers.keras_file import KERAS_ARCHIVE_MEMBER, read_keras
from fdjax.importers.torch_pickle import read_torch

_HDF5_START = b"\x89HDF\r\n\x1a\n"
_START_BYTES = 16
# What wrappers (DataParallel, torch.compile, Lightning) put before every name.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def read_weights(path: str) -> dict[str, np.ndarray]:
    """The tensors of a weights file; its content says what it is, not its name.

    Args:
      path: a state dict of `torch.save` (.pth, .pt, .bin), a .safetensors file, or Keras weights (.h5, .keras).

    Returns:
      Name -> array as it lies in the file; prefixes that all names share because of a wrapper ("module.") are gone.

    Raises:
      UserError: no such file, or none of these, or damaged.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"no weights file {path!r}; give a .pth, .pt, .bin, .safetensors, .h5 or .keras file")
    try:
        with file.open("rb") as stream:
            start = stream.read(_START_BYTES)
    except OSError as error:
        raise UserError(f"the weights file {path} cannot be read: {error.strerror}") from error
    if start.startswith(_HDF5_START):
        return read_keras(file)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            is_keras = KERAS_ARCHIVE_MEMBER in archive.namelist()
        return read_keras(file) if is_keras else _unwrapped(read_torch(file))
    if start[8:9] == b"{":  # after the length of the header
        return _unwrapped(_read_safetensors(file))
    if start[:1] == b"\x80":  # a pickle: a legacy file, or refused with the reason
        return _unwrapped(read_torch(file))
    raise UserError(
        f"{path} is no weights file: accepted are state dicts of torch.save (.pth, .pt, .bin), .safetensors files and "
        "Keras weights (.h5, .keras)"
    )


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import numpy as safetensors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{file} is a safetensors file: pip install safetensors, then give the command again"
        ) from error
    try:
        return safetensors.load_file(file)
    except Exception as error:  # the library has an exception of its own, and raises others too
        raise UserError(f"{file} cannot be read as a safetensors file: {error}") from error


def _unwrapped(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors
