"""The part of `read_keras` that runs as a separate process: `python keras_worker.py FILE OUT BYTES`.

The HDF5 library loops forever on some damaged files, crashes on others, and allocates whatever memory a file asks for.
This process may do all of that: it has a time limit, and the system limits its memory. It does not import fdjax, so
that it starts quickly.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

# The variables that Keras 3 numbers: those of a batch norm, and those of a convolution or dense layer.
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
_KERNEL = ("kernel", "bias")
_SPARE_BYTES = 256 << 20


class Refused(Exception):
    """A file that is not read; the message says why."""


class _Reader:
    """Reads groups, attributes and data sets of one file, and refuses links to other places and oversized data."""

    def __init__(self, h5py: Any, most_bytes: int):
        self._h5py, self._left, self._most = h5py, most_bytes, most_bytes

    def member(self, group: Any, path: str) -> Any:
        """Returns what a group holds at a path, or None."""
        h5py = self._h5py
        for name in path.split("/"):
            link = group.get(name, getlink=True) if name else h5py.HardLink()
            if link is None:
                return None
            if not isinstance(link, h5py.HardLink):
                raise Refused(f"{path!r} is a link to another place or file, and links are not followed")
            group = group[name] if name else group
        return group

    def strings(self, group: Any, name: str) -> list[str]:
        """Returns an attribute that is a list; Keras splits one that is too long for HDF5 into NAME0, NAME1, ..."""
        found = [self.attribute(group, name)] if name in group.attrs else []
        while f"{name}{len(found)}" in group.attrs:
            found.append(self.attribute(group, f"{name}{len(found)}"))
        return [_text(text) for part in found for text in part]

    def attribute(self, group: Any, name: str) -> Any:
        self._take(math.prod(group.attrs.get_id(name).shape), f"attribute {name!r}")
        return group.attrs[name]

    def array(self, dataset: Any, name: str) -> np.ndarray:
        """Returns the numbers of a data set.

        Args:
          dataset: the data set.
          name: what messages call it.

        Returns:
          The array, with the shape and dtype that it has in the file.

        Raises:
          Refused: it is not a data set of numbers in this file.
        """
        if not isinstance(dataset, self._h5py.Dataset):
            raise Refused(f"{name!r} is not a data set")
        if dataset.external or dataset.is_virtual:
            raise Refused(f"the numbers of {name!r} lie in another file, and other files are not read")
        if dataset.dtype.kind not in "fiub":
            raise Refused(f"{name!r} holds no numbers but {dataset.dtype}")
        self._take(math.prod(dataset.shape) * dataset.dtype.itemsize, repr(name))
        return np.asarray(dataset)

    def _take(self, size: int, what: str) -> None:
        self._left -= size
        if self._left < 0:
            raise Refused(f"with {what} it would take more than {self._most:,} bytes, far more than a file of its size "
                          "holds")  # fmt: skip


def _text(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text)


def read(h5py: Any, file: str, most_bytes: int) -> dict[str, np.ndarray]:
    """Reads an HDF5 file as in `fdjax.importers.keras_file.read_keras`.

    Args:
      h5py: the module.
      file: path of the file.
      most_bytes: the most bytes that its arrays may take.

    Returns:
      Name -> array.

    Raises:
      Refused: the file does not hold Keras weights.
    """
    reader = _Reader(h5py, most_bytes)
    with h5py.File(file, "r") as content:
        root = reader.member(content, "model_weights") or content
        if "layer_names" in root.attrs or "layer_names0" in root.attrs:
            return _by_layer_names(reader, root)
        layers = reader.member(root, "layers")
        if layers is not None:
            return _numbered(reader, layers)
    raise Refused("it holds no Keras weights; save them with model.save_weights('NAME.weights.h5')")


def _by_layer_names(reader: _Reader, root: Any) -> dict[str, np.ndarray]:
    weights = {}
    for layer in reader.strings(root, "layer_names"):
        group = reader.member(root, layer)
        names = reader.strings(group, "weight_names")
        leaves = [name.rpartition("/")[2].partition(":")[0] for name in names]
        # A layer has each weight once; a model within the model has those of its layers, which its names begin with.
        is_model = len(set(leaves)) < len(leaves)
        for name, leaf in zip(names, leaves, strict=True):
            owner = name.split("/")[-2] if is_model and "/" in name else layer
            array = reader.array(reader.member(group, name), f"{layer}/{name}")
            _put(weights, f"{owner}/{'kernel' if leaf == 'depthwise_kernel' else leaf}", array)
    return weights


def _put(weights: dict[str, np.ndarray], name: str, array: np.ndarray) -> None:
    if name in weights:
        raise Refused(f"it has two weights named {name!r}, of models within the model; save those one by one")
    weights[name] = array


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts conv2d_2 before conv2d_10; the library lists names by their characters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", name)]


def _numbered(reader: _Reader, layers: Any) -> dict[str, np.ndarray]:
    weights = {}
    for number in sorted(layers, key=_by_number):
        group = reader.member(layers, number)
        within = reader.member(group, "layers")
        if within is not None:  # A model within the model, such as the base of transfer learning.
            for name, array in _numbered(reader, within).items():
                _put(weights, name, array)
        variables = reader.member(group, "vars")
        if variables is None or not len(variables):
            continue
        if "name" not in variables.attrs:
            raise Refused(
                "it numbers its layers and does not name them, as early versions of Keras 3 did; load it there "
                "and save the model with model.save('NAME.h5')"
            )
        layer = _text(reader.attribute(variables, "name"))
        names = _NORM if len(variables) == len(_NORM) else _KERNEL
        for at, name in enumerate(names[: len(variables)]):
            _put(weights, f"{layer}/{name}", reader.array(reader.member(variables, str(at)), f"{layer}/{name}"))
    return weights


def _limit_memory(most_bytes: int) -> None:
    """Limits the memory beyond what the process has now; where that fails, only the declared sizes are checked."""
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _SPARE_BYTES + 4 * most_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(file: str, out: str, most_bytes: str) -> int:
    """Writes the arrays to `out` (.npz). On failure, it prints the reason to standard output and returns 3."""
    import h5py

    _limit_memory(int(most_bytes))
    try:
        weights = read(h5py, file, int(most_bytes))
        with open(out, "wb") as stream:
            np.savez(stream, allow_pickle=False, **{str(n): array for n, array in enumerate(weights.values())})
    except Refused as refused:
        print(refused)
        return 3
    except Exception as error:  # h5py raises almost any exception on a damaged file.
        print(f"{type(error).__name__}: {error}")
        return 3
    print("\n".join(name.encode("unicode_escape").decode() for name in weights))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
