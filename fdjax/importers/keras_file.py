"""Weights that Keras saved: whole models (`.h5`, `.keras`) and weights alone (`.h5`, `.weights.h5`); all are HDF5."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError

# What Keras 3 numbers: the variables of a batch norm, and of a convolution or dense layer.
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_KERNEL = ("kernel", "bias")
KERAS_ARCHIVE_MEMBER = "model.weights.h5"


def read_keras(file: Path) -> dict[str, np.ndarray]:
    """The weights of a Keras model, by layer.

    Args:
      file: HDF5, as `model.save` and `model.save_weights` of Keras 2 and 3 write it, or an archive `.keras`.

    Returns:
      "LAYER/kernel", "LAYER/bias", "LAYER/gamma", ... -> array; the kernel of a depthwise layer is "kernel" too.

    Raises:
      UserError: h5py is not installed, the file is damaged, or it names no layers.
    """
    try:
        import h5py  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"{file} is an HDF5 file: pip install h5py, then give the command again") from error
    try:
        source: Any = file
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                source = io.BytesIO(archive.read(KERAS_ARCHIVE_MEMBER))
        with h5py.File(source, "r") as content:
            root: Any = content.get("model_weights", content)
            if "layer_names" in root.attrs or "layer_names0" in root.attrs:
                return _by_layer_names(root)
            if "layers" in root:
                return _numbered(root["layers"], file)
    except UserError:
        raise
    except Exception as error:  # h5py raises nearly anything on a damaged file.
        raise UserError(f"{file} cannot be read as Keras weights: {type(error).__name__}: {error}") from error
    raise UserError(f"{file} holds no Keras weights; save them with model.save_weights('NAME.weights.h5')")


def _strings(group: Any, name: str) -> list[str]:
    """A list attribute; Keras cuts one that is too long for HDF5 into NAME0, NAME1, ..."""
    found = [group.attrs[name]] if name in group.attrs else []
    while f"{name}{len(found)}" in group.attrs:
        found.append(group.attrs[f"{name}{len(found)}"])
    return [text.decode() if isinstance(text, bytes) else str(text) for part in found for text in part]


def _by_layer_names(root: Any) -> dict[str, np.ndarray]:
    weights = {}
    for layer in _strings(root, "layer_names"):
        for name in _strings(root[layer], "weight_names"):
            leaf = name.rpartition("/")[2].partition(":")[0]
            weights[f"{layer}/{'kernel' if leaf == 'depthwise_kernel' else leaf}"] = np.asarray(root[layer][name])
    return weights


def _numbered(layers: Any, file: Path) -> dict[str, np.ndarray]:
    weights = {}
    for group in layers.values():
        variables = group.get("vars", {})
        if not variables:
            continue
        if "name" not in variables.attrs:
            raise UserError(
                f"{file} numbers its layers and does not name them, as early versions of Keras 3 did; load it there "
                "and save the model with model.save('NAME.h5')"
            )
        names = _NORM if len(variables) == len(_NORM) else _KERNEL
        for number, name in enumerate(names[: len(variables)]):
            weights[f"{variables.attrs['name']}/{name}"] = np.asarray(variables[str(number)])
    return weights
