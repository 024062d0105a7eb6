"""A copy of a run's ONNX file beside its checkpoints, which need no other file then, wherever they are moved."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from fdjax.provenance import file_sha256

_NAME = "network.{digest}.onnx"
_DIGITS = 16


def keep_file(file: Path, folder: Path) -> Path | None:
    """Copies an ONNX file into a folder, in place of earlier copies. Tensors that lie in other files go into the copy.

    Args:
      file: a file that `fdjax.onnx.read_onnx_graph` reads.
      folder: the folder of a run's checkpoints; it is made if it is not there.

    Returns:
      The copy; None if one file cannot hold the network (2 GiB).

    Raises:
      OSError: the copy cannot be written.
    """
    content = _whole(file)
    if content is None:
        return None
    copy = folder / _name(content)
    if kept_file(folder) != copy:
        folder.mkdir(parents=True, exist_ok=True)
        draft = copy.with_suffix(".draft")
        draft.write_bytes(content)
        # Nobody ever sees half of a copy.
        os.replace(draft, copy)
    for other in folder.glob(_NAME.format(digest="*")):
        if other != copy:
            other.unlink()
    return copy


def kept_file(folder: Path) -> Path | None:
    """Returns the whole copy of an ONNX file that `keep_file` has left in a folder; None if there is none."""
    copies = sorted(folder.glob(_NAME.format(digest="*")))
    return next((copy for copy in copies if copy.name == _name(copy.read_bytes())), None)


def holds_network_of(file: Path, copy: Path | None, sha256: str | None) -> bool:
    """Returns whether an ONNX file is the one that a run has begun with.

    Args:
      file: the file, or the copy itself.
      copy: the run's copy; None if it has none.
      sha256: checksum of the file that was imported; None if it is not known.

    Returns:
      True also if nothing is known of the run's file.
    """
    if copy is None and sha256 is None:
        return True
    if file_sha256(file) == sha256:
        return True
    content = _whole(file)
    return copy is not None and content is not None and copy.name == _name(content)


def _name(content: bytes) -> str:
    return _NAME.format(digest=hashlib.sha256(content).hexdigest()[:_DIGITS])


def _whole(file: Path) -> bytes | None:
    """Returns the bytes of a file that holds all tensors of a network; None if they are more than one file can hold."""
    import onnx

    model: Any = onnx.load(str(file), load_external_data=False)
    if all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        return file.read_bytes()
    model = onnx.load(str(file))
    return model.SerializeToString() if model.ByteSize() < onnx.checker.MAXIMUM_PROTOBUF else None
