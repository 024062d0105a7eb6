"""A frozen network read back from an ONNX file, with the metadata that `fdjax export` writes into it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError, first_line

_FACTS = ("class_names", "input", "pictures")


@dataclasses.dataclass(frozen=True)
class OnnxNetwork:
    """A network in an ONNX file, run by ONNX Runtime; `load_onnx` makes one.

    Attributes:
      input_shape: (H, W, C) of an image.
      class_names: names of the logits, in order; if empty, classes are named by their numbers.
      manifest: the manifest of a frozen network, as far as the file has it; `data` says how pictures are resized.
      run: float32 images [B, H, W, C] in 0..255 -> logits [B, classes].
    """

    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    manifest: Mapping[str, Any]
    run: Callable[[np.ndarray], np.ndarray]

    def predict(self, images: np.ndarray) -> np.ndarray:
        """Computes logits.

        Args:
          images: raw images, [B, H, W, C], 0..255.

        Returns:
          [B, classes].
        """
        return self.run(np.asarray(images, np.float32))


def load_onnx(path: str | os.PathLike[str]) -> OnnxNetwork:
    """Reads an ONNX file that `fdjax export` or `fdjax freeze` wrote.

    Args:
      path: path of the file.

    Returns:
      The network.

    Raises:
      UserError: the file does not exist, ONNX Runtime is missing or refuses it, or the file does not say what images
        the network takes.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no file {file}; fdjax export --frozen DIR --out {file.name} writes one")
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError(f"{file} needs ONNX Runtime, which is not installed: pip install onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has an exception class of its own for each kind of error.
        raise UserError(f"{file} is not an ONNX file that ONNX Runtime can run: {first_line(error)}") from error
    facts = session.get_modelmeta().custom_metadata_map
    missing = [name for name in _FACTS if name not in facts]
    if missing:
        raise UserError(
            f"{file} does not say what pictures it takes (its metadata lack {', '.join(missing)}), so this version of "
            "fdjax did not write it; write one with fdjax export --frozen DIR --out FILE.onnx"
        )
    try:
        names, given, pictures = (json.loads(facts[name]) for name in _FACTS)
        height, width, channels = map(int, given["shape"])
        network = OnnxNetwork(
            (height, width, channels), tuple(map(str, names)), {"data": dict(pictures)}, _run(session)
        )
        classes = network.predict(np.zeros((1, *network.input_shape))).shape[1:]
        if len(classes) != 1 or (names and len(names) != classes[0]):
            raise ValueError(f"{len(names)} class names for outputs of {list(classes)}")
    except Exception as error:  # ONNX Runtime may raise any exception on a file that was changed.
        raise UserError(f"{file} does not fit its own metadata: {first_line(error)}; export it again") from error
    return network


def _run(session: Any) -> Callable[[np.ndarray], np.ndarray]:
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    return lambda batch: session.run([logits.name], {images.name: batch})[0]
