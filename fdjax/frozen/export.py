"""Writes a frozen network as a file for other programs: StableHLO for cpu, cuda and tpu, ONNX, or C++."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp

from fdjax.errors import UserError, first_line
from fdjax.frozen.assemble import Frozen
from fdjax.frozen.native.export import write_source
from fdjax.frozen.onnx_model import facts_for_onnx, write_onnx
from fdjax.frozen.xla import apply
from fdjax.graph.masks import MaskedGraph

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(frozen: Frozen, platforms: tuple[str, ...] = PLATFORMS) -> bytearray:
    """Serialises a network with its arrays by `jax.export`, for all platforms in one file.

    The function is float32 images [batch, H, W, C] -> logits, or has the network's other inputs and outputs; it takes
    any batch size.
    """
    arrays = {name: jnp.asarray(array) for name, array in frozen.arrays.items()}
    (batch,) = jax.export.symbolic_shape("batch", constraints=["batch >= 1"])
    program = frozen.program
    images = [jax.ShapeDtypeStruct((batch, *program.shapes[value]), jnp.float32) for value in program.inputs]

    @jax.jit
    def function(*images: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        outputs = apply(program, arrays, *images)
        return outputs[0] if len(outputs) == 1 else outputs

    return jax.export.export(function, platforms=platforms)(*images).serialize()


def read_stablehlo(file: Path) -> Callable[..., Any]:
    """Reads the function in a file that `export` wrote: images [B, H, W, C] -> logits [B, num_classes].

    Raises:
      UserError: if it is not such a file.
    """
    try:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:  # flatbuffers can raise any exception on other bytes.
        raise UserError(f"{file} is no network that fdjax export wrote: {error}") from error
    return lambda *images: exported.call(*(jnp.asarray(image, jnp.float32) for image in images))


def _write_onnx(frozen: Frozen, file: Path, graph: MaskedGraph | None, data: Mapping[str, Any] | None) -> None:
    write_onnx(frozen.program, frozen.arrays, file, facts_for_onnx(graph, data) if graph is not None else None)


WRITERS: dict[str, Callable[[Frozen, Path, MaskedGraph | None, Mapping[str, Any] | None], Any]] = {
    ".stablehlo": lambda frozen, file, graph, data: file.write_bytes(to_stablehlo(frozen)),
    ".onnx": _write_onnx,
    ".cc": lambda frozen, file, graph, data: write_source(frozen, file),
}


def export(frozen: Frozen, file: Path, graph: MaskedGraph | None = None, data: Mapping[str, Any] | None = None) -> None:
    """Writes a frozen network in the format that the file's suffix names: .stablehlo, .onnx or .cc.

    Args:
      frozen: the network.
      file: the file to write.
      graph: the graph that it was frozen from; an ONNX file then has the names of the classes and the form of images.
      data: the data settings in the manifest (`manifest["data"]`); an ONNX file then says how pictures are resized.

    Raises:
      UserError: if the suffix is another, the format cannot hold the network, or the file cannot be written. What
        the file held before is then still there.
    """
    if file.suffix not in WRITERS:
        raise UserError(f"{file}: give a file that ends in {' or '.join(WRITERS)}")
    try:
        # What the file held before stays until the new contents are complete.
        with tempfile.TemporaryDirectory(prefix=".fdjax", dir=file.parent) as folder:
            made = Path(folder, file.name)
            try:
                WRITERS[file.suffix](frozen, made, graph, data)
            except UserError as error:
                raise UserError(str(error).replace(str(made), str(file))) from error
            os.replace(made, file)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or first_line(error)}") from error
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} cannot be written: the parts of this network do not fit each other ({first_line(error)}); freeze "
            "it again, and if that does not help, it is a bug"
        ) from error
