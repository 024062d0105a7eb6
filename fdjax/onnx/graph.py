"""Reads an ONNX file: its nodes in order, its weights as layers with names, and what follows from its constants."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError, first_line

CLASSIFIER = "classifier"
# Operators with a kernel and a bias: inputs 1 and 2.
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NORMS = {"BatchNormalization": 4, "InstanceNormalization": 2, "LayerNormalization": 2, "GroupNormalization": 2}
_NORM_LEAVES = ("scale", "bias", "mean", "var")
# Operands of these are trained where they have several numbers: layer scales, positions, slopes, biases.
_TRAINED_OPERANDS = ("Add", "Mul", "PRelu")
# What may stand between the last product and the logits.
_AFTER_LOGITS = ("Softmax", "LogSoftmax")
_TRANSPARENT = (
    "Identity",
    "Relu",
    "Flatten",
    "Reshape",
    "Squeeze",
    "Dropout",
    "Cast",
    "GlobalAveragePool",
    "ReduceMean",
)
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial")
STATS = ("mean", "var")
_OLDEST_OPSET = 7


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation.

    Attributes:
      op: the operator, such as "Conv".
      name: the node's name in the file, for messages.
      inputs: names of its values; "" for one that is left out.
      outputs: names of its results.
      attributes: its attributes, by name; strings are str.
      weights: place of an input -> (layer, leaf) of the weight in that place.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    weights: Mapping[int, tuple[str, str]]


@dataclasses.dataclass(frozen=True, eq=False)
class OnnxGraph:
    """The network of an ONNX file.

    Attributes:
      file: the file.
      opset: version of the operators.
      nodes: the operations whose results depend on the image, in an order in which they can be computed.
      constants: name -> array of values that do not depend on the image and are not trained.
      params: layer -> leaf -> float32 array: "kernel" ([rows, columns, C, D], or [C, D]), "bias", "scale", "value".
      stats: layer -> {"mean", "var"} of batch norms.
      input: name of the image.
      input_dims: its dimensions in the file; None where a dimension is not fixed.
      outputs: names of the results. A softmax at the end is left out: the results are logits.
      classifier: the layer that makes the logits; None if it was not found.
      notes: what a user should know, in whole sentences.
    """

    file: Path
    opset: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, np.ndarray]
    params: Mapping[str, Mapping[str, np.ndarray]]
    stats: Mapping[str, Mapping[str, np.ndarray]]
    input: str
    input_dims: tuple[int | None, ...]
    outputs: tuple[str, ...]
    classifier: str | None
    notes: tuple[str, ...]

    @property
    def channels_last(self) -> bool:
        """Whether images are [B, H, W, C] in the file, as in those of TensorFlow; PyTorch's are [B, C, H, W]."""
        first, last = self.input_dims[1], self.input_dims[3]
        few = (1, 2, 3, 4)
        return last in few and first not in few

    @property
    def channels(self) -> int | None:
        """Number of channels of an image, if the file fixes it."""
        return self.input_dims[3 if self.channels_last else 1]

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(H, W) of an image; None where the file does not fix it."""
        first = 1 if self.channels_last else 2
        return self.input_dims[first], self.input_dims[first + 1]


def read_onnx_graph(path: str | Path) -> OnnxGraph:
    """Reads the network of an ONNX file.

    Args:
      path: a file of ONNX, of opset 7 or later, with one image [B, C, H, W] or [B, H, W, C] as its input. Tensors that
        lie in other files have to be in its folder.

    Returns:
      The network; weights in half precision are made float32.

    Raises:
      UserError: the file is not there, is damaged or no ONNX file, the package onnx is not installed, or the network
        has several inputs, an input that is no image, or control flow.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is not a file" if file.exists() else "is not there; give its path, or put it back where it was"
        raise UserError(f"no ONNX file {str(path)!r}: it {what}")
    model = _load(file)
    return _Reader(file, model).read()


def _load(file: Path) -> Any:
    try:
        import onnx
        from onnx import inliner
    except ImportError as error:
        raise UserError(f"{file}: reading ONNX needs the package onnx: pip install onnx") from error
    try:
        model = onnx.load(str(file))
        if not model.graph.node:
            raise ValueError("it has no operations")
        # Functions are what PyTorch's exporter may keep modules as; their operations take the place of their calls.
        return inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:  # The parser, the check of external files and the inliner raise their own.
        raise UserError(
            f"{file} is not an ONNX file that can be read: {first_line(error)}; export it again, with the files beside "
            "it that hold its tensors"
        ) from error


class _Reader:
    """What is found while a file is read."""

    def __init__(self, file: Path, model: Any) -> None:
        from onnx import helper, numpy_helper

        self.file, self.model, self.graph = file, model, model.graph
        self.opset = next((found.version for found in model.opset_import if found.domain in ("", "ai.onnx")), 0)
        self.attribute, self.to_array = helper.get_attribute_value, numpy_helper.to_array
        self.constants: dict[str, np.ndarray] = {}
        self.params: dict[str, dict[str, np.ndarray]] = {}
        self.stats: dict[str, dict[str, np.ndarray]] = {}
        self.placed: dict[tuple[Any, ...], tuple[str, str]] = {}
        self.notes: list[str] = []

    def read(self) -> OnnxGraph:
        from onnx.defs import onnx_opset_version

        if not _OLDEST_OPSET <= self.opset <= onnx_opset_version():
            raise UserError(
                f"{self.file} is of opset {self.opset}; fdjax and this version of the package onnx read opsets "
                f"{_OLDEST_OPSET} to {onnx_opset_version()}: export it with another one (opset_version=17)"
            )
        for tensor in self.graph.initializer:
            try:
                self.constants[tensor.name] = _float32(self.to_array(tensor))
            except Exception as error:
                raise UserError(
                    f"{self.file}: the tensor {tensor.name!r} cannot be read: {first_line(error)}"
                ) from error
        if self.graph.sparse_initializer:
            raise UserError(f"{self.file} has sparse tensors, which are not read: export it with dense ones")
        name, dims = self._image()
        nodes = self._without_constants()
        outputs = tuple(found.name for found in self.graph.output)
        nodes, outputs = self._logits(nodes, outputs)
        nodes = _needed(_joined_biases(nodes, self.constants, outputs), outputs)
        last = self._classifier(nodes, outputs)
        nodes = [self._with_weights(node, node is last) for node in nodes]
        used = {name for node in nodes for at, name in enumerate(node.inputs) if at not in node.weights}
        if not self.stats and any(node.op == "Conv" for node in nodes):
            self.notes.append(
                "the file has no batch norm; if the network had some, the exporter has folded it into other layers, "
                "and training it further needs lower rates (docs/import.md says how to export it unfolded)"
            )
        return OnnxGraph(
            file=self.file,
            opset=self.opset,
            nodes=tuple(nodes),
            constants={name: value for name, value in self.constants.items() if name in used},
            params=self.params,
            stats=self.stats,
            input=name,
            input_dims=dims,
            outputs=outputs,
            # A last layer whose kernel an earlier one has, too, is no layer of its own.
            classifier=CLASSIFIER if CLASSIFIER in self.params else None,
            notes=tuple(self.notes),
        )

    def _image(self) -> tuple[str, tuple[int | None, ...]]:
        """Returns the name and the dimensions of the only input."""
        found = [value for value in self.graph.input if value.name not in self.constants]
        if len(found) != 1:
            names = ", ".join(value.name for value in found) or "none"
            raise UserError(f"{self.file} has {len(found)} inputs ({names}); networks with one image can be read")
        tensor = found[0].type.tensor_type
        dims = tuple(dim.dim_value or None for dim in tensor.shape.dim)
        if len(dims) != 4:
            raise UserError(
                f"{self.file}: its input {found[0].name} has {len(dims)} dimensions; an image is [B, C, H, W] or "
                "[B, H, W, C]"
            )
        return found[0].name, dims

    def _without_constants(self) -> list[Node]:
        """Computes the nodes whose inputs are constants; returns the others."""
        from onnx.reference import ReferenceEvaluator

        left = []
        for at, proto in enumerate(self.graph.node):
            name = proto.name or f"{proto.op_type}_{at}"
            if proto.domain not in ("", "ai.onnx"):
                raise UserError(
                    f"{self.file}: the node {name} has the operator {proto.domain}.{proto.op_type}, which is none of "
                    "ONNX's own: export the network without operators of one engine"
                )
            attributes = {found.name: self.attribute(found) for found in proto.attribute}
            if any(found.HasField("g") or found.graphs for found in proto.attribute):
                raise UserError(
                    f"{self.file}: the node {name} ({proto.op_type}) is control flow, which is not read: export the "
                    "network for images of one size"
                )
            inputs = [found for found in proto.input if found]
            if all(found in self.constants for found in inputs) and proto.op_type not in _RANDOM:
                try:
                    values = ReferenceEvaluator(proto, opsets={"": self.opset}).run(
                        None, {found: self.constants[found] for found in inputs}
                    )
                except Exception as error:
                    raise UserError(
                        f"{self.file}: the constant of the node {name} ({proto.op_type}) cannot be computed: "
                        f"{first_line(error)}"
                    ) from error
                self.constants |= {
                    key: _float32(np.asarray(value)) for key, value in zip(proto.output, values, strict=False)
                }
                continue
            texts = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
            left.append(Node(proto.op_type, name, tuple(proto.input), tuple(proto.output), texts, {}))
        return left

    def _logits(self, nodes: list[Node], outputs: tuple[str, ...]) -> tuple[list[Node], tuple[str, ...]]:
        """Leaves out a softmax that makes the only result."""
        made = {name: node for node in nodes for name in node.outputs}
        last = made.get(outputs[0]) if len(outputs) == 1 else None
        while last is not None and last.op == "Identity":
            last = made.get(last.inputs[0])
        if last is None or last.op not in _AFTER_LOGITS:
            return nodes, outputs
        self.notes.append(f"the file ends with {last.op}, which was left out: results are logits")
        return [node for node in nodes if node is not last], (last.inputs[0],)

    def _classifier(self, nodes: list[Node], outputs: tuple[str, ...]) -> Node | None:
        """Finds the product with a kernel that makes the only result."""
        made = {name: node for node in nodes for name in node.outputs}
        name = outputs[0] if len(outputs) == 1 else ""
        while (node := made.get(name)) is not None:
            if node.op in _PRODUCTS:
                return node if len(node.inputs) > 1 and node.inputs[1] in self.constants else None
            if node.op not in _TRANSPARENT:
                return None
            name = node.inputs[0]
        return None

    # -- weights

    def _with_weights(self, node: Node, is_classifier: bool) -> Node:
        """Takes the trained tensors of a node among the layers."""
        weights = {}
        if node.op in _PRODUCTS and len(node.inputs) > 1 and node.inputs[1] in self.constants:
            layer = CLASSIFIER if is_classifier else self._layer_name(node)
            kernel = self.constants[node.inputs[1]]
            if node.op != "MatMul" or kernel.ndim == 2:
                how = (node.op, *(node.attributes.get(name) for name in ("transB", "alpha")))
                weights[1] = self._place(node.inputs[1], layer, "kernel", _our_kernel(node, kernel), how)
                layer = weights[1][0]
                if len(node.inputs) > 2 and node.inputs[2] in self.constants:
                    bias = self.constants[node.inputs[2]] * np.float32(node.attributes.get("beta", 1.0))
                    size = self.params[layer]["kernel"].shape[-1]
                    bias = np.broadcast_to(bias.reshape(-1), (size,)) if bias.size in (1, size) else bias
                    weights[2] = self._place(node.inputs[2], layer, "bias", bias, (node.attributes.get("beta"),))
        elif node.op in _NORMS:
            layer = self._layer_name(node)
            if node.attributes.get("training_mode"):
                note = "the file was exported in training mode; its batch norms take their running averages here"
                self.notes += [] if note in self.notes else [note]
            for at, leaf in zip(range(1, 1 + _NORMS[node.op]), _NORM_LEAVES, strict=False):
                if at < len(node.inputs) and node.inputs[at] in self.constants:
                    weights[at] = self._place(node.inputs[at], layer, leaf, self.constants[node.inputs[at]])
                    layer = weights[at][0]
        elif node.op in _TRAINED_OPERANDS:
            for at, name in enumerate(node.inputs):
                value = self.constants.get(name)
                if value is not None and value.dtype == np.float32 and (value.size > 1 or node.op == "PRelu"):
                    weights[at] = self._place(name, self._layer_name(node), "value", value)
        return dataclasses.replace(node, weights=weights)

    def _place(self, tensor: str, layer: str, leaf: str, value: np.ndarray, how: tuple = ()) -> tuple[str, str]:
        """Stores a trained tensor; returns where it is.

        Nodes that read a tensor in the same way, which `how` tells, share it. Read in several ways, it is several.
        """
        key = (tensor, leaf, *how)
        if key in self.placed:
            return self.placed[key]
        if any(other[0] == tensor for other in self.placed):
            self.notes.append(
                f"the tensor {tensor} is read in several ways: from here on, each is trained as a weight of its own"
            )
        taken = self.stats if leaf in STATS else self.params
        if leaf in taken.get(layer, {}):  # Another layer has the name.
            layer = next(
                name for name in (f"{layer}_{number}" for number in range(2, len(self.params) + 3))
                if leaf not in taken.get(name, {})
            )  # fmt: skip
        taken.setdefault(layer, {})[leaf] = np.ascontiguousarray(value, np.float32)
        self.placed[key] = (layer, leaf)
        return layer, leaf

    def _layer_name(self, node: Node) -> str:
        """Names a layer as its author did, as far as the file says it; "classifier" is the last one's name."""
        name = self._authors_name(node)
        return f"{CLASSIFIER}_1" if name == CLASSIFIER else name

    def _authors_name(self, node: Node) -> str:
        for name in node.inputs[1:]:
            found = re.fullmatch(r"([A-Za-z_][\w.]*)\.(weight|bias|running_mean|running_var|gamma|beta)", name)
            if found:
                return found[1]
        parts = [part for part in re.split(r"[/:]", node.name) if part and part != "StatefulPartitionedCall"]
        if len(parts) > 1 and re.fullmatch(r"[A-Z]\w*|convolution|depthwise", parts[-1]):
            parts = parts[:-1]
        # PyTorch writes features/features.1/conv/conv.0 where its module is called features.1.conv.0.
        parts = [part for part, after in itertools.zip_longest(parts, parts[1:], fillvalue="")
                 if not after.startswith(f"{part}.")]  # fmt: skip
        return re.sub(r"[^\w.\-]", "_", ".".join(parts)) if parts else node.op.lower()


def _float32(value: np.ndarray) -> np.ndarray:
    """Returns floats of any precision as float32, and other types as they are."""
    is_float = value.dtype.kind == "f" or value.dtype.name == "bfloat16"
    return value.astype(np.float32) if is_float and value.dtype != np.float32 else value


def _our_kernel(node: Node, kernel: np.ndarray) -> np.ndarray:
    """Returns a kernel as [rows, columns, C, D], or [C, D]."""
    if node.op == "Gemm":
        kernel = kernel.T if node.attributes.get("transB") else kernel
        return kernel * np.float32(node.attributes.get("alpha", 1.0))
    if node.op == "MatMul" or kernel.ndim != 4:
        return kernel
    return kernel.transpose(2, 3, 1, 0) if node.op == "Conv" else kernel.transpose(2, 3, 0, 1)


def _joined_biases(nodes: list[Node], constants: Mapping[str, np.ndarray], outputs: Iterable[str]) -> list[Node]:
    """Gives products without a bias the vector that is added to them and to nothing else, as their bias."""
    readers = Counter(name for node in nodes for name in node.inputs) + Counter(outputs)
    made = {name: node for node in nodes for name in node.outputs}
    replaced: dict[int, Node | None] = {}
    for node in nodes:
        if node.op != "Add":
            continue
        for value, bias in (node.inputs, node.inputs[::-1]):
            product, vector = made.get(value), constants.get(bias)
            if product is None or vector is None or product.op not in ("MatMul", "Conv") or readers[value] > 1:
                continue
            if len(product.inputs) != 2 or product.inputs[1] not in constants:
                continue
            kernel = constants[product.inputs[1]]
            # Of more dimensions, it would add an axis to the result.
            width = kernel.shape[-1 if product.op == "MatMul" else 0]
            shapes = [(width,)] if product.op == "MatMul" else [(width, 1, 1), (1, width, 1, 1)]
            if kernel.ndim >= 2 and vector.shape in shapes and vector.dtype == np.float32:
                joined = dataclasses.replace(
                    product, inputs=(*product.inputs, bias), outputs=node.outputs, name=product.name
                )
                replaced |= {id(product): joined, id(node): None}
            break
    kept = [replaced.get(id(node), node) for node in nodes]
    return [node for node in kept if node is not None]


def _needed(nodes: list[Node], outputs: Iterable[str]) -> list[Node]:
    """Returns the nodes that a result depends on, in their order."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if wanted & {*node.outputs}:
            wanted |= {*node.inputs}
            kept.append(node)
    return kept[::-1]
