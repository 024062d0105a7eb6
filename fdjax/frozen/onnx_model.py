"""Writes a frozen network as an ONNX model, from its program and arrays.

The packages onnx and onnxruntime are optional, and are imported when they are needed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.onnx_apply import apply_primitive
from fdjax.frozen.onnx_graph import INPUT, OUTPUT, TO_ONNX, Graph, Value
from fdjax.frozen.onnx_hard_sigmoids import join_hard_sigmoids
from fdjax.frozen.onnx_layers import Layers
from fdjax.frozen.onnx_products import HostArrays
from fdjax.frozen.program import Apply, Program
from fdjax.graph.masks import MaskedGraph

_OPSET, _IR_VERSION = 17, 9
# The data settings of a run that say how a picture is turned into an image of the network.
PICTURE_FACTS = ("eval_crop", "background")


def _names(name: str, count: int) -> list[str]:
    """Returns `count` names, such as images, images1, images2."""
    return [f"{name}{index or ''}" for index in range(count)]


def _write(program: Program, arrays: HostArrays, channels_first: bool) -> tuple[Graph, list[str]]:
    """Writes the graph of all operations; returns it with the kind of each output: "float", "int" or "bool"."""
    graph = Graph()
    layers = Layers(graph, arrays)
    values = {
        value: _given(program.shapes[value], name, channels_first)
        for value, name in zip(program.inputs, _names(INPUT, len(program.inputs)), strict=True)
    }
    for operation in program.operations:
        if isinstance(operation, Apply):
            inputs = [
                values[v] if v >= 0 else np.asarray(arrays[f"{operation.name}/arg{-1 - v}"]) for v in operation.inputs
            ]
            shapes = [program.shapes[value] for value in operation.outputs]
            made = apply_primitive(graph, operation, inputs, shapes, layers.products.zeros)
            values.update(zip(operation.outputs, made, strict=True))
        else:
            values[operation.y] = layers.layer(operation, values[operation.x], program.shapes[operation.y])
    for value, name in zip(program.outputs, _names(OUTPUT, len(program.outputs)), strict=True):
        moved = channels_first and len(program.shapes[value]) == 3
        made = graph.channels_first(values[value]) if moved else graph.plain(values[value])
        graph.op("Identity", made, output=name)
    graph.nodes = join_hard_sigmoids(graph.nodes, graph.constants, _names(OUTPUT, len(program.outputs)))
    used = {name for node in graph.nodes for name in node.input}
    graph.constants = [constant for constant in graph.constants if constant.name in used]
    return graph, [values[value].dtype for value in program.outputs]


def _given(shape: tuple[int, ...], name: str, channels_first: bool) -> Value:
    return Value(shape, channels_first=name) if channels_first and len(shape) == 3 else Value(shape, plain=name)


def facts_for_onnx(network: MaskedGraph, data: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Returns the metadata of an ONNX file, as JSON texts by name: class names and the form of images.

    Args:
      network: the graph that the network was frozen from.
      data: the data settings in the manifest, which say how pictures are resized; None: they are not written.
    """
    given = {"layout": "NHWC", "range": [0, 255], "shape": list(network.input_shape)}
    inside = {"mean": list(network.input_mean), "std": list(network.input_std)}
    facts = {"class_names": list(network.class_names), "input": given, "normalised_inside": inside}
    facts["pictures"] = {name: (data or {})[name] for name in PICTURE_FACTS if name in (data or {})}
    return {name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()}


def to_onnx(
    program: Program,
    arrays: HostArrays,
    *,
    channels_first: bool = False,
    facts: Mapping[str, str] | None = None,
) -> Any:
    """Makes an ONNX model: float32 images [batch, ...] in 0..255 -> logits [batch, ...], for any batch size.

    Other inputs and outputs are named images1, logits1 and so on.

    Args:
      program: the program.
      arrays: its arrays, by name.
      channels_first: whether maps are taken and returned as [batch, C, H, W], as inside a network; for parts of one.
      facts: metadata of the model (`facts_for_onnx`).

    Returns:
      The model, an `onnx.ModelProto`.

    Raises:
      UserError: if the package onnx is not installed, or an operation cannot be written.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("writing ONNX needs the package onnx: pip install onnx")
    from onnx import TensorProto, checker, helper

    graph, kinds = _write(program, {name: np.asarray(array) for name, array in arrays.items()}, channels_first)

    def laid_out(shape: tuple[int, ...]) -> list[int]:
        return [shape[axis - 1] for axis in TO_ONNX[1:]] if channels_first and len(shape) == 3 else list(shape)

    types = {"float": TensorProto.FLOAT, "int": TensorProto.INT64, "bool": TensorProto.BOOL}

    def described(name: str, values: tuple[int, ...], kinds: Sequence[str]) -> list[Any]:
        return [
            helper.make_tensor_value_info(given, types[kind], ["batch", *laid_out(program.shapes[value])])
            for given, value, kind in zip(_names(name, len(values)), values, kinds, strict=True)
        ]

    inputs = described(INPUT, program.inputs, ["float"] * len(program.inputs))
    outputs = described(OUTPUT, program.outputs, kinds)
    model = helper.make_model(
        helper.make_graph(graph.nodes, "frozen_network", inputs, outputs, graph.constants),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="fdjax",
    )
    helper.set_model_props(model, dict(facts or {}))
    checker.check_model(model)
    return model


def write_onnx(program: Program, arrays: HostArrays, file: Path, facts: Mapping[str, str] | None = None) -> None:
    """Writes an ONNX model into a file.

    Args:
      program: the program.
      arrays: its arrays, by name.
      file: the file to write.
      facts: metadata of the model (`facts_for_onnx`).
    """
    file.write_bytes(to_onnx(program, arrays, facts=facts).SerializeToString())


def onnxruntime_session(model: Any, threads: int | None = None) -> Callable[..., Any]:
    """Opens an ONNX model in ONNX Runtime on the CPU.

    Args:
      model: the model that `to_onnx` returned.
      threads: number of threads; None: ONNX Runtime's choice.

    Returns:
      images float32 [B, ...] -> logits, or a list of several outputs.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*images: np.ndarray) -> Any:
        feed = {name: np.asarray(image, np.float32) for name, image in zip(names, images, strict=True)}
        made = session.run(None, feed)
        return made[0] if len(made) == 1 else made

    return run
