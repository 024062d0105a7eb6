"""Reads a weights file of any layout as arrays by name."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from fdjax.data.folder import natural
from fdjax.errors import UserError
from fdjax.importers.keras_file import KERAS_ARCHIVE_MEMBER, read_keras
from fdjax.importers.state_dicts import Weights, unwrapped
from fdjax.importers.torch_pickle import read_torch

_HDF5_START = b"\x89HDF\r\n\x1a\n"
_START_BYTES = 16


def read_weights(path: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a weights file, as in `open_weights`.

    Args:
      path: path of the file.

    Returns:
      Name -> array.
    """
    return open_weights(path).tensors


def open_weights(path: str, averaged: bool = False) -> Weights:
    """Reads the tensors of a weights file, whose format is found by its content, not its name.

    Args:
      path: a file of `torch.save` (.pth, .pt, .bin, .th, ...), a .safetensors file, or Keras weights (.h5, .keras).
      averaged: whether to take the averaged weights (EMA) of a file that has both.

    Returns:
      Name -> array as stored in the file, without prefixes of wrappers that all names share ("module."); and notes on
      how the weights were found.

    Raises:
      UserError: the file does not exist, is of another kind, is damaged, or is far larger in memory than on disk.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is not a file" if file.exists() else "is not there"
        raise UserError(
            f"no weights file {path!r}: it {what}; give a .pth, .pt, .bin, .safetensors, .h5 or .keras file"
        )
    try:
        return _open(file, averaged)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the weights file {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # Readers raise almost any exception on a damaged file.
        raise UserError(
            f"the weights file {path} is damaged: {type(error).__name__}: {error}; save or copy it again"
        ) from error


def _open(file: Path, averaged: bool) -> Weights:
    with file.open("rb") as stream:
        start = stream.read(_START_BYTES)
    zipped = not start.startswith(_HDF5_START) and zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as archive:
            is_keras = KERAS_ARCHIVE_MEMBER in archive.namelist()
        if not is_keras:
            return read_torch(file, averaged)
    elif start.startswith(b"\x80") and start[8:9] != b"{":  # A pickle: a legacy file, or refused with a reason.
        return read_torch(file, averaged)
    elif not start.startswith(_HDF5_START) and start[8:9] != b"{":  # A safetensors header begins with its length.
        raise UserError(
            f"{file} is not a weights file: accepted are state dicts of torch.save (.pth, .pt, .bin), .safetensors "
            "files and Keras weights (.h5, .keras)"
        )
    if averaged:
        raise UserError(f"{file} is not a file of torch.save, and only those hold averaged weights; leave --ema out")
    if not zipped and start[8:9] == b"{":
        return Weights(unwrapped(_read_safetensors(file)), [], averaged=False)
    return Weights(read_keras(file, zipped), [], averaged=False)


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import numpy as safetensors  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"{file} is a safetensors file: pip install safetensors, then give the command again"
        ) from error
    try:
        found = safetensors.load_file(file)
    except Exception as error:  # The library raises its own exception and others.
        raise UserError(f"{file} cannot be read as a safetensors file: {error}") from error
    # The file does not keep the order of the layers, and lists body.10 before body.2.
    return {name: found[name] for name in sorted(found, key=natural)}
