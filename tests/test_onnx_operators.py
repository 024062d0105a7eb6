"""ONNX's operators, each beside ONNX Runtime on the same one-node file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from fdjax.errors import UserError  # noqa: E402
from fdjax.onnx import from_onnx  # noqa: E402
from fdjax.onnx.operators import OPERATORS  # noqa: E402

IMAGES = (2, 4, 6, 6)
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(6, 4, 3, 3)).astype(np.float32)
GROUPED = RNG.normal(size=(4, 2, 3, 3)).astype(np.float32)
VECTOR, OTHER = (RNG.uniform(0.5, 1.5, 4).astype(np.float32) for _ in range(2))


class Case(NamedTuple):
    """A node: its operator, its inputs after the image, its attributes, what it reads before it, the opset."""

    op: str
    inputs: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = MappingProxyType({})
    before: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...] = ()
    opset: int = 18
    outputs: int = 1


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


FLAT = (("Flatten", (), {}),)
POOL = {"kernel_shape": [3, 3], "strides": [2, 2]}
CASES = {
    "conv": Case("Conv", (KERNEL, RNG.normal(size=6).astype(np.float32)), {"pads": [1, 1, 1, 1]}),
    "conv, uneven": Case("Conv", (KERNEL,), {"pads": [0, 1, 2, 0], "strides": [2, 1], "dilations": [1, 2]}),
    "conv, groups": Case("Conv", (GROUPED,), {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "conv, lower": Case("Conv", (KERNEL,), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "conv, valid": Case("Conv", (KERNEL,), {"auto_pad": "VALID"}),
    "transposed": Case(
        "ConvTranspose", (KERNEL[:4],), {"pads": [1, 0, 1, 1], "strides": [2, 2], "output_padding": [1, 0]}
    ),
    "gemm": Case("Gemm", (RNG.normal(size=(5, 144)).astype(np.float32), np.ones(5, np.float32)),
                 {"transB": 1, "alpha": 0.5, "beta": 2.0}, FLAT),
    "gemm, plain": Case("Gemm", (RNG.normal(size=(144, 5)).astype(np.float32), np.ones(1, np.float32)), {}, FLAT),
    "matmul": Case("MatMul", (RNG.normal(size=(6, 3)).astype(np.float32),)),
    "matmul, several": Case("MatMul", (RNG.normal(size=(2, 4, 6, 3)).astype(np.float32),)),
    "batch norm": Case("BatchNormalization", (VECTOR, OTHER, OTHER, VECTOR), {"epsilon": 1e-3}),
    "instance norm": Case("InstanceNormalization", (VECTOR, OTHER), {"epsilon": 1e-3}),
    "group norm": Case("GroupNormalization", (VECTOR, OTHER), {"num_groups": 2}, opset=21),
    "instance norm of groups": Case("InstanceNormalization", (VECTOR[:2], OTHER[:2]), {},
                                    (("Reshape", (ints(0, 2, -1),), {}),)),
    "layer norm": Case("LayerNormalization", (np.ones(6, np.float32), np.full(6, 0.5, np.float32)), {"axis": -1}),
    "max pool": Case("MaxPool", (), {**POOL, "pads": [1, 1, 1, 1]}),
    "max pool, ceil": Case("MaxPool", (), {**POOL, "ceil_mode": 1}),
    "average pool": Case("AveragePool", (), {**POOL, "pads": [1, 1, 0, 1]}),
    "average pool, ceil": Case("AveragePool", (), {**POOL, "ceil_mode": 1}),
    "average pool, with padding": Case("AveragePool", (), {**POOL, "pads": [1, 1, 1, 1], "count_include_pad": 1}),
    "average pool, same": Case("AveragePool", (), {**POOL, "auto_pad": "SAME_UPPER"}),
    "global average": Case("GlobalAveragePool"),
    "global max": Case("GlobalMaxPool"),
    "mean, attribute": Case("ReduceMean", (), {"axes": [2, 3], "keepdims": 0}, opset=13),
    "mean, input": Case("ReduceMean", (ints(-1, -2),)),
    "mean of all": Case("ReduceMean"),
    "sum of channels": Case("ReduceSum", (ints(1),), {"keepdims": 0}),
    "least": Case("ReduceMin", (ints(1),)),
    "max": Case("ReduceMax", (ints(3),), {"keepdims": 0}),
    "norm": Case("ReduceL2", (ints(1),)),
    "add a vector": Case("Add", (VECTOR.reshape(4, 1, 1),)),
    "multiply by a map": Case("Mul", (RNG.normal(size=(1, 4, 6, 6)).astype(np.float32),)),
    "divide": Case("Div", (np.float32(3.0),)),
    "less a map": Case("Sub", (RNG.normal(size=(6, 6)).astype(np.float32),)),
    "power": Case("Pow", (np.float32(2.0),)),
    "prelu": Case("PRelu", (VECTOR.reshape(4, 1, 1),)),
    "maximum": Case("Max", (np.float32(0.1), np.float32(-0.2))),
    "minimum": Case("Min", (np.float32(0.1),)),
    "clip, attributes": Case("Clip", (), {"min": -0.3, "max": 0.4}, opset=10),
    "clip, inputs": Case("Clip", (np.float32(0), np.float32(6))),
    "clip, below": Case("Clip", (np.float32(0.1),)),
    "leaky relu": Case("LeakyRelu", (), {"alpha": 0.2}),
    "elu": Case("Elu", (), {"alpha": 0.7}),
    "selu": Case("Selu"),
    "gelu": Case("Gelu", (), {"approximate": "tanh"}, opset=20),
    "hard sigmoid": Case("HardSigmoid", (), {"alpha": 1 / 6}),
    # A softmax at the end is left out.
    "softmax of channels": Case("Neg", (), {}, (("Softmax", (), {"axis": 1}),)),
    "log softmax": Case("Neg", (), {}, (("LogSoftmax", (), {}),)),
    "reshape": Case("Reshape", (ints(0, 2, 2, -1),)),
    "reshape to tokens": Case("Reshape", (ints(0, 4, 36),)),
    "flatten": Case("Flatten", (), {"axis": 2}),
    "transpose to last": Case("Transpose", (), {"perm": [0, 2, 3, 1]}),
    "transpose": Case("Transpose", (), {"perm": [0, 3, 1, 2]}),
    "transpose twice": Case("Transpose", (), {"perm": [0, 3, 1, 2]}, (("Transpose", (), {"perm": [0, 2, 3, 1]}),)),
    "squeeze all": Case("Squeeze", (), {}, (("GlobalAveragePool", (), {}),)),
    "squeeze": Case("Squeeze", (ints(2, 3),), {}, (("GlobalAveragePool", (), {}),)),
    "unsqueeze": Case("Unsqueeze", (ints(2, 3),), {}, FLAT),
    "unsqueeze, first": Case("Unsqueeze", (ints(1),), {}, FLAT),
    "split": Case("Split", (ints(1, 3),), {"axis": 1}, outputs=2),
    "split, equal": Case("Split", (), {"axis": 1, "num_outputs": 3}, outputs=3),
    "split, without sizes": Case("Split", (), {"axis": 1}, opset=13, outputs=2),
    "slice": Case("Slice", (ints(1, -4), ints(4, -1), ints(1, 3), ints(2, 1))),
    "slice, backwards": Case("Slice", (ints(-1), ints(-9999), ints(1), ints(-1))),
    "gather": Case("Gather", (ints(3, 0, -2),), {"axis": 1}),
    "gather neighbours": Case("Gather", (ints(1, 2),), {"axis": 1}),
    "gather a table": Case("Gather", (np.asarray([[0, 1], [3, 2]]),), {"axis": 1}),
    "gather one": Case("Gather", (np.asarray(-1, np.int64),), {"axis": 2}),
    "pad": Case("Pad", (ints(0, 1, 0, 1, 0, 0, 2, 0), np.float32(0.5))),
    "pad, reflected": Case("Pad", (ints(0, 0, 1, 2, 0, 0, 2, 1),), {"mode": "reflect"}),
    "pad of axes": Case("Pad", (ints(1, 2), np.float32(0), ints(1))),
    "expand": Case("Expand", (ints(2, 4, 6, 6),), {}, (("GlobalAveragePool", (), {}),)),
    "enlarge": Case("Resize", ("", np.asarray([1, 1, 2, 3], np.float32)),
                    {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    "enlarge, half a pixel": Case("Resize", ("", np.asarray([1, 1, 2, 3], np.float32)), {"mode": "nearest"}),
    "enlarge to a size": Case("Resize", ("", "", ints(2, 4, 12, 12)),
                              {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
                               "nearest_mode": "floor"}),
    "enlarge, old": Case("Upsample", (np.asarray([1, 1, 2, 3], np.float32),), {"mode": "nearest"}, opset=9),
    "depth to space": Case("DepthToSpace", (), {"blocksize": 2}),
    "depth to space, columns": Case("DepthToSpace", (), {"blocksize": 2, "mode": "CRD"}),
    "cast": Case("Cast", (), {"to": TensorProto.INT32}),
    "cast like": Case("CastLike", (np.asarray([1], np.int32),)),
    "where": Case("Where", (np.float32(0.5), VECTOR.reshape(4, 1, 1)), {},
                  (("Cast", (), {"to": TensorProto.INT32}), ("Cast", (), {"to": TensorProto.BOOL}))),
    "sum": Case("Sum", (VECTOR.reshape(4, 1, 1), np.float32(0.5))),
    "concat": Case("Concat", (RNG.normal(size=(2, 3, 6, 6)).astype(np.float32),), {"axis": 1}),
    "swish": Case("Swish", (), {"alpha": 0.5}, opset=24),
    "dropout": Case("Dropout", (np.float32(0.3),)),
} | {op.lower(): Case(op) for op in (
    "Relu", "Sqrt", "Log", "Sigmoid", "HardSwish", "Mish", "Softplus", "Tanh", "Erf", "Exp", "Abs", "Neg", "Reciprocal",
    "Identity",
)}  # fmt: skip


def write(file: Path, case: Case, dims: tuple[Any, ...] = ("n", *IMAGES[1:])) -> str:
    """Writes the nodes of a case as a file of ONNX."""
    nodes, initializers, value = [], [], "images"
    for number, (op, inputs, attributes) in enumerate((*case.before, (case.op, case.inputs, case.attributes))):
        names = []
        for at, given in enumerate(inputs):
            names.append("" if isinstance(given, str) else f"layer{number}.{at}")
            if not isinstance(given, str):
                initializers.append(numpy_helper.from_array(np.asarray(given), names[-1]))
        made = [f"made{number}_{at}" for at in range(case.outputs if number == len(case.before) else 1)]
        nodes.append(helper.make_node(op, [value, *names], made, name=f"/layer{number}/{op}", **attributes))
        value = made[0]
    results = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in nodes[-1].output]
    image = helper.make_tensor_value_info("images", TensorProto.FLOAT, dims)
    graph = helper.make_graph(nodes, "case", [image], results, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", case.opset)], ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model)
    for result in inferred.graph.output:
        if not result.type.tensor_type.elem_type:
            result.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.save(inferred, str(file))
    return str(file)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_gives_what_onnx_runtime_gives(name, tmp_path):
    case = CASES[name]
    low = 0.1 if case.op in ("Sqrt", "Log") else -1
    images = np.random.default_rng(1).uniform(low, 1, IMAGES).astype(np.float32)
    file = write(tmp_path / "case.onnx", case)
    wanted = onnxruntime.InferenceSession(file).run(None, {"images": images})
    apply, variables = from_onnx(file)
    found: Any = jax.jit(apply)(variables, images.transpose(0, 2, 3, 1))
    found = found if isinstance(found, tuple) else (found,)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        # As images, results of four dimensions have their channels last.
        np.testing.assert_allclose(mine, theirs.transpose(0, 2, 3, 1) if theirs.ndim == 4 else theirs, atol=1e-5)


def test_every_operator_is_tried():
    before = {op for case in CASES.values() for op, _, _ in case.before}  # A softmax at the end would be left out.
    assert {*OPERATORS} <= {case.op for case in CASES.values()} | before


@pytest.mark.parametrize(
    ("case", "named"),
    [
        (Case("NonZero"), "(NonZero) cannot be read; operators that can"),
        (Case("AveragePool", (), {**POOL, "dilations": [2, 2]}, opset=19), "without dilations"),
        (Case("Resize", ("", np.asarray([1, 1, 2, 2], np.float32)), {"mode": "linear"}), "to the nearest pixel"),
        (Case("Resize", ("", np.asarray([1, 1, 2, 2], np.float32)), {"nearest_mode": "ceil"}), "to the nearest pixel"),
        (Case("Resize", ("", np.asarray([1, 2, 1, 1], np.float32))), "only rows and columns"),
        (Case("Resize", ("", np.asarray([2, 2], np.float32)), {"axes": [2, 3]}, opset=18), "only rows and columns"),
        (Case("Pad", (ints(0, 0, -1, 0, 0, 0, 0, 0),)), "by a negative number"),
        (Case("Pad", (ints(0, 0, 1, 0, 0, 0, 0, 0),), {"mode": "wrap"}, opset=19), "its mode is wrap"),
        (Case("MatMul", (np.ones((5, 3), np.float32),)), "does not take values of 2x4x6x6"),
    ],
)
def test_what_cannot_be_computed_is_named(case, named, tmp_path):
    apply, variables = from_onnx(write(tmp_path / "case.onnx", case))
    with pytest.raises(UserError) as raised:
        jax.eval_shape(apply, variables, np.zeros((2, 6, 6, 4), np.float32))
    assert named in str(raised.value) and f"/layer0/{case.op}" in str(raised.value)
