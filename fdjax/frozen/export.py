"""A frozen network as a file for other programs: StableHLO for cpu, cuda and tpu, ONNX, or C++."""

from __future__ import annotations

from collections.abc import Callable
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
    """The network with its arrays, serialised by `jax.export`: float32 images [batch, H, W, C] -> logits.

    Further inputs and outputs of the network are those of the function. The batch size is left open, and the
    platforms are in one file.
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
    """The function in a file that `export` wrote: images [B, H, W, C] -> logits [B, num_classes].

    Raises:
      UserError: the file is no such file.
    """
    try:
        exported = jax.export.deserialize(bytearray(file.read_bytes()))
    except Exception as error:  # flatbuffers raises nearly anything on foreign bytes
        raise UserError(f"{file} is no network that fdjax export wrote: {error}") from error
    return lambda *images: exported.call(*(jnp.asarray(image, jnp.float32) for image in images))


def _write_onnx(frozen: Frozen, file: Path, graph: MaskedGraph | None) -> None:
    write_onnx(frozen.program, frozen.arrays, file, facts_for_onnx(graph) if graph is not None else None)


WRITERS: dict[str, Callable[[Frozen, Path, MaskedGraph | None], Any]] = {
    ".stablehlo": lambda frozen, file, graph: file.write_bytes(to_stablehlo(frozen)),
    ".onnx": _write_onnx,
    ".cc": lambda frozen, file, graph: write_source(frozen, file),
}


def export(frozen: Frozen, file: Path, graph: MaskedGraph | None = None) -> None:
    """Writes a frozen network in the format that the file's suffix names: .stablehlo, .onnx or .cc.

    Args:
      frozen: the network.
      file: to write.
      graph: it was frozen from; an ONNX file then has the names of its classes, and what images it takes.

    Raises:
      UserError: another suffix, or a network that the format cannot hold.
    """
    if file.suffix not in WRITERS:
        raise UserError(f"{file}: give a file that ends in {' or '.join(WRITERS)}")
    try:
        WRITERS[file.suffix](frozen, file, graph)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{file} cannot be written: the parts of this network do not fit each other ({first_line(error)}); freeze "
            "it again, and if that does not help, it is a bug"
        ) from error
