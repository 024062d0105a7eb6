"""Writes a frozen network to disk as arrays, a manifest and checksums, and reads it back, ready to predict."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from fdjax.errors import UserError
from fdjax.frozen.assemble import Choose, Frozen, fewest_macs, freeze
from fdjax.frozen.native.compile import NativeNetwork
from fdjax.frozen.onnx_model import facts_for_onnx, to_onnx
from fdjax.frozen.program import Program, makes
from fdjax.frozen.xla import apply, compiler_options
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.provenance import file_sha256

FORMAT, FORMAT_VERSION = "fdjax frozen network", 3
MANIFEST, ARRAYS, GRAPH, CHECKSUM = "manifest.json", "arrays.npz", "network.json", "manifest.json.sha256"
ONNX = "network.onnx"
_DRAFT = ".draft"
# What systems leave in folders that are looked at.
_LITTER = frozenset((".DS_Store", "Thumbs.db", "desktop.ini"))


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class FrozenNetwork:
    """A frozen network, as a function that works under `jit`, `vmap` and `grad`, and with `predict` for images.

    `load` reads one, and `freeze_network` makes one.

    Attributes:
      network: the channel graph that it was frozen from, with its masks.
      frozen: its program and arrays.
      manifest: what was recorded when it was written; JSON types.
    """

    def __init__(self, network: MaskedGraph, frozen: Frozen, manifest: Mapping[str, Any], engine: str = "xla"):
        """Makes a network that runs on an engine.

        Args:
          network: the channel graph that it was frozen from.
          frozen: its program and arrays.
          manifest: what was recorded about it; JSON types.
          engine: "xla", or "native" (C++ that is compiled now for this processor).

        Raises:
          UserError: if the engine is another, there is no C++ compiler, or native code has no kernel for an operation.
        """
        self.network, self.frozen, self.manifest = network, frozen, manifest
        if engine not in ("xla", "native"):
            raise UserError(f"a frozen network runs on xla or native, got {engine!r}")
        if engine == "native":
            native = NativeNetwork(frozen.program, frozen.arrays)
            self._arrays, self._function = {}, lambda arrays, *images: native.in_jax(*images)
            self._compiled: Any = self._function
            return
        self._arrays = {name: jnp.asarray(array) for name, array in frozen.arrays.items()}
        self._function = functools.partial(apply, frozen.program, in_chunks=jax.default_backend() == "cpu")
        self._compiled = jax.jit(self._function, compiler_options=compiler_options())

    def _outputs(self, *inputs: ArrayLike) -> tuple[jax.Array, ...]:
        # Inside another compiled function this one is traced, and the outer function's compiler options hold.
        traced = any(isinstance(value, Tracer) for value in inputs)
        function: Any = self._function if traced else self._compiled
        return function(self._arrays, *inputs)

    def __call__(self, *inputs: ArrayLike) -> Any:
        """Evaluates the network on the inputs of the traced function, [B, ...]; returns its result, or a tuple."""
        outputs = self._outputs(*inputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes the network into a folder, atomically; `load` reads it back.

        Args:
          folder: new, empty, or a frozen network to replace.

        Raises:
          UserError: if the folder holds something else.
          ValueError: if an operation of the network has no JSON form.
        """
        self.manifest = save(Path(folder), self.network, self.frozen, self.manifest)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        return self.network.input_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the logits; empty if they are not known."""
        return self.network.class_names

    def predict(self, images: ArrayLike) -> jax.Array:
        """Computes the logits of raw images; compiles once for each batch size.

        Args:
          images: uint8 or float [B, H, W, C], values in 0..255.

        Returns:
          Logits, float32 [B, num_classes].

        Raises:
          UserError: if the images have another size or rank than the network was frozen for, or the network does not
            take one batch of images and return logits.
        """
        program, shape = self.frozen.program, np.shape(images)
        if len(program.inputs) != 1 or len(program.outputs) != 1 or len(program.shapes[program.outputs[0]]) != 1:
            given = ", ".join(_shape(program.shapes[value]) or "one number" for value in program.outputs)
            raise UserError(
                f"classes are predicted by networks that give logits of one batch of images; this one takes "
                f"{len(program.inputs)} inputs and gives {given}: call it as a function (fdjax.load)"
            )
        if len(shape) != 4 or shape[1:] != self.input_shape:
            raise UserError(
                f"this network was frozen for images of {_shape(self.input_shape)}, a batch of which is "
                f"[B, {', '.join(map(str, self.input_shape))}]; got {list(shape)}"
            )
        return self._outputs(images)[0]

    def classify(self, image: np.ndarray, top: int = 1) -> list[tuple[str, float]]:
        """Classifies one image.

        Args:
          image: a raw image, uint8 or float [H, W, C], values in 0..255.
          top: number of classes to return.

        Returns:
          The most probable classes, by name (or by number, if they have no names), with their probabilities, 0 to 1.
        """
        probabilities = np.asarray(jax.nn.softmax(self.predict(image[None])[0]))
        names = self.class_names or tuple(map(str, range(self.network.num_classes)))
        return [(names[i], float(probabilities[i])) for i in np.argsort(-probabilities, kind="stable")[:top]]


def freeze_network(
    graph: MaskedGraph,
    variables: Any,
    counts: Counts,
    choose: Choose = fewest_macs,
    *,
    class_names: Sequence[str] = (),
) -> FrozenNetwork:
    """Compiles any traced function with hard masks into a dense network.

    Args:
      graph: the traced function, with its masks.
      variables: the variables, a tree of arrays with the structure and shapes that were traced.
      counts: path of each FCMask -> kept counts (`HardMasks.counts`), int [C], 0..N; empty if there are no masks.
      choose: chooses among the exact schedules of each run; `fdjax.frozen.Stopwatch().choose` does so by measured time.
      class_names: names of the outputs, in order, for `classify` and `fdjax predict`; if empty, classes are numbers.

    Returns:
      The frozen network; it equals the masked function up to rounding.

    Raises:
      ValueError: if variables, counts or class names do not fit the graph, or a frozen network has no form for an
        operation.
    """
    if class_names:
        if len(class_names) != graph.num_classes:
            raise ValueError(f"{len(class_names)} class names for a network of {graph.num_classes} outputs")
        graph = dataclasses.replace(graph, class_names=tuple(class_names))
    macs = network_macs(graph, counts)
    facts = {"macs": macs.to_dict(), "layers": [layer.to_dict() for layer in macs.layers]}
    return FrozenNetwork(graph, freeze(graph, variables, counts, choose), facts)


def check_target(folder: Path) -> None:
    """Raises `UserError` if `folder` cannot be written, or holds anything but a frozen network."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a directory")
    held = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if held - _LITTER and not _is_artifact(folder):
        raise UserError(f"{folder} is not empty and holds no frozen network; give another directory")
    others = sorted(held - {MANIFEST, ARRAYS, GRAPH, CHECKSUM, ONNX, _DRAFT} - _LITTER)
    if others:
        few = f"{', '.join(others[:3])}{' and others' if len(others) > 3 else ''}"
        raise UserError(f"{folder} holds {few} beside a frozen network; move them away, or give another directory")
    parent = next(path for path in folder.resolve().parents if path.exists())
    where = folder if _stays(folder.resolve()) else parent
    if not where.is_dir() or not os.access(where, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be made: {where} is no directory that can be written; give another one")


def _stays(folder: Path) -> bool:
    """Whether this directory cannot be replaced by another one: a mounted one, or the one that a shell is in."""
    return folder.is_dir() and (folder.is_mount() or Path.cwd().is_relative_to(folder))


def _is_artifact(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_text())["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def save(
    folder: Path, network: MaskedGraph, frozen: Frozen, facts: Mapping[str, Any], *, onnx: bool = False
) -> dict[str, Any]:
    """Writes a frozen network into a folder, at once: whoever reads it finds the network before or the new one.

    The files of a mounted directory, or of the current one, are replaced one by one, the checksum last.

    Args:
      folder: new, empty, or a frozen network to replace.
      network: the channel graph that it was frozen from, with its masks.
      frozen: its program and arrays.
      facts: other entries of the manifest; JSON types.
      onnx: whether to write an ONNX file into the folder, too.

    Returns:
      The manifest, JSON types.

    Raises:
      UserError: if the folder holds something else, or cannot be written.
    """
    check_target(folder)
    # The ONNX model is made first, so that nothing is written if it cannot be.
    written = (
        to_onnx(frozen.program, frozen.arrays, facts=facts_for_onnx(network, facts.get("data"))).SerializeToString()
        if onnx
        else None
    )
    try:
        return _write(folder.resolve(), network, frozen, facts, written)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}; give another directory") from error


def _write(
    folder: Path, network: MaskedGraph, frozen: Frozen, facts: Mapping[str, Any], written: bytes | None
) -> dict[str, Any]:
    """Writes a draft, and puts it in the place of the folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    stays = _stays(folder)
    draft = folder / _DRAFT if stays else folder.with_name(f".{folder.name}{_DRAFT}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    np.savez(draft / ARRAYS, **frozen.arrays)  # type: ignore[arg-type]
    (draft / GRAPH).write_text(json.dumps(network.to_dict(), separators=(",", ":")) + "\n")
    names = [ARRAYS, GRAPH]
    if written is not None:
        (draft / ONNX).write_bytes(written)
        names.append(ONNX)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "input": {
            "shape": list(network.input_shape),
            "layout": "NHWC",
            "range": [0, 255],
            "mean": list(network.input_mean),
            "std": list(network.input_std),
        },
        "class_names": list(network.class_names),
        **facts,
        "program": frozen.program.to_dict(),
        "arrays": _described(frozen.arrays),
        "files": {name: file_sha256(draft / name) for name in names},
    }
    (draft / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    (draft / CHECKSUM).write_text(f"{file_sha256(draft / MANIFEST)}  {MANIFEST}\n")
    if stays:
        if ONNX not in names:
            (folder / ONNX).unlink(missing_ok=True)
        for name in (*names, MANIFEST, CHECKSUM):
            (draft / name).replace(folder / name)
        draft.rmdir()
        return manifest
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        # What an ended process left under this name is older than the folder.
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """Checks every file of a frozen network and returns its manifest.

    Raises:
      UserError: if there is no frozen network, its format has another version, or a file is missing or damaged.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no frozen network (no {MANIFEST}); fdjax freeze writes one")
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        version, files = manifest["format_version"], dict(manifest.get("files", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, MANIFEST) from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder / MANIFEST} is not of a frozen network; fdjax freeze writes one")
    if version != FORMAT_VERSION:
        way = "freeze the checkpoint again (fdjax freeze)"
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise UserError(
            f"the frozen network in {folder} has format version {version}; this fdjax reads {FORMAT_VERSION}: "
            f"{f'update fdjax, or {way}' if newer else way}"
        )
    try:
        recorded = (folder / CHECKSUM).read_text().split()[0]
    except (OSError, ValueError, IndexError) as error:
        raise _damaged(folder, CHECKSUM) from error
    for name, digest in {MANIFEST: recorded, **files}.items():
        file = folder / name
        if not file.is_file() or file_sha256(file) != digest:
            raise _damaged(folder, name)
    return manifest


def _described(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Returns the name of each array -> its type and shape."""
    return {name: f"{np.dtype(array.dtype)}{list(np.shape(array))}" for name, array in arrays.items()}


def _check_described(arrays: Mapping[str, np.ndarray], manifest: Mapping[str, Any]) -> None:
    """Raises `ValueError` unless the arrays have the names, types and shapes that the manifest says."""
    if manifest.get("arrays", _described(arrays)) != _described(arrays):
        raise ValueError(f"the arrays in {ARRAYS} have other names, types or shapes than {MANIFEST} says")


def _damaged(folder: Path, name: str) -> UserError:
    state = "is not what was written (its checksum differs)" if (folder / name).exists() else "is missing"
    return UserError(f"the frozen network in {folder} is damaged: {name} {state}; freeze the checkpoint again")


def load(path: str | os.PathLike[str], engine: str = "xla") -> FrozenNetwork:
    """Reads a frozen network.

    Args:
      path: the folder that `fdjax freeze` wrote.
      engine: the engine that executes it, "xla" or "native".

    Returns:
      The network.

    Raises:
      UserError: if there is no frozen network, it is damaged, its format has another version, or the engine cannot run
        it.
    """
    folder = Path(path).expanduser()
    manifest = read_manifest(folder)
    try:
        program = Program.from_dict(manifest["program"])
        network = MaskedGraph.from_dict(json.loads((folder / GRAPH).read_text()))
        with np.load(folder / ARRAYS) as stored:
            arrays = {name: stored[name] for name in stored.files}
        _check(program, arrays, network)
        _check_described(arrays, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"the frozen network in {folder} cannot be read: {error}") from error
    return FrozenNetwork(network, Frozen(program, arrays), manifest, engine)


def _check(program: Program, arrays: Mapping[str, np.ndarray], network: MaskedGraph) -> None:
    """Raises `ValueError` unless a program and its arrays fit each other and the network, and the arrays are finite."""
    for name, array in arrays.items():
        # Constants of other operations than layers may be infinite, as in padding before a maximum.
        sound = np.isfinite if "/arg" not in name else lambda array: ~np.isnan(array)
        if np.issubdtype(array.dtype, np.floating) and not sound(array).all():
            raise ValueError(f"array {name} is not finite")
    for own, value in zip(program.inputs, network.operations.images, strict=True):
        if program.shapes[own] != network.operations.shapes[value][1:]:
            raise ValueError(
                f"its program takes {program.shapes[own]}, and the network {network.operations.shapes[value][1:]}"
            )
    images = [jax.ShapeDtypeStruct((1, *program.shapes[value]), jnp.float32) for value in program.inputs]
    shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}
    made_by_operations = tuple(value for operation in program.operations for value in makes(operation))
    every = dataclasses.replace(program, outputs=program.outputs + made_by_operations)
    try:
        found = jax.eval_shape(functools.partial(apply, every), shapes, *images)
    except Exception as error:  # A wrong program can make JAX raise any exception.
        raise ValueError(f"its program and its arrays do not fit each other: {error}") from error
    made = found[: len(program.outputs)]
    for value, output in zip(made_by_operations, found[len(made) :], strict=True):
        if output.shape[1:] != program.shapes[value]:
            raise ValueError(f"value {value} of its program is {output.shape[1:]}, not {program.shapes[value]}")
    expected = [(1, *network.operations.shapes[value][1:]) for value in network.operations.outputs]
    if [output.shape for output in made] != expected:
        raise ValueError(f"it gives {[output.shape for output in made]}, where the network gives {expected}")
