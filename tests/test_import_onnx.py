"""Networks of ONNX files: they compute what PyTorch and ONNX Runtime compute, and go through import, training and
freezing."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import fdjax  # noqa: E402
from fdjax.checkpoint import find_checkpoint  # noqa: E402
from fdjax.commands.main import fdjax_command  # noqa: E402
from fdjax.commands.train import train_command  # noqa: E402
from fdjax.data import load_dataset  # noqa: E402
from fdjax.errors import UserError  # noqa: E402
from fdjax.onnx import from_onnx, read_onnx_graph  # noqa: E402
from fdjax.onnx.kept_file import holds_network_of, keep_file, kept_file  # noqa: E402
from fdjax.training.restore import restore  # noqa: E402

MEAN, STD = 73.0, 90.0
SCALING = ("--input-mean", str(MEAN), "--input-std", str(STD))
SIZE, CLASSES = 28, 10
CONFIG = """
from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, WeightPhaseConfig

def get_config():
    weights = WeightPhaseConfig(steps=2, learning_rate=0.02)
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(batch_size=16, train_limit=64, crop_padding=2),
        pretrain=weights,
        learn=LearnConfig(steps=2, block=2, tied=True, levels="0,1,N", target_macs=0.7),
        refine=weights,
        checkpoint=CheckpointConfig(time=False),
    )
"""


def image_of(*dims: Any) -> Any:
    return helper.make_tensor_value_info("images", TensorProto.FLOAT, dims)


def save(file: Path, nodes: list[Any], tensors: dict[str, np.ndarray], *, dims=("n", 1, SIZE, SIZE), opset=17) -> Path:
    """Writes a file whose result is that of the last node."""
    result = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "network", [image_of(*dims)], [result], initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), str(file))
    return file


def unit(outputs: int = CLASSES) -> tuple[list[Any], dict[str, np.ndarray]]:
    """An inverted residual unit with squeeze-and-excite and a concatenation, as PyTorch's exporter names its parts."""
    rng, nodes, tensors = np.random.default_rng(0), [], {}

    def node(op: str, inputs: list[str], output: str, scope: str = "", **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=f"{scope}/{op}_{output}", **attributes))
        return output

    def conv(value: str, name: str, shape: tuple[int, ...], *, norm: bool = True, **attributes: Any) -> str:
        tensors[f"{name}.weight"] = rng.normal(size=shape, scale=(2 / np.prod(shape[1:])) ** 0.5).astype(np.float32)
        made = node("Conv", [value, f"{name}.weight"], f"{name}.made", f"/{name}", kernel_shape=shape[2:], **attributes)
        if not norm:
            return made
        for leaf, low, high in (("weight", 0.7, 1.3), ("bias", -0.1, 0.1), ("running_mean", -0.1, 0.1),
                                ("running_var", 0.5, 1.5)):  # fmt: skip
            tensors[f"{name}_bn.{leaf}"] = rng.uniform(low, high, shape[0]).astype(np.float32)
        names = [f"{name}_bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        return node("BatchNormalization", [made, *names], f"{name}_bn.made", f"/{name}_bn", momentum=0.8)

    x = node("Relu", [conv("images", "stem", (8, 1, 3, 3), pads=[1, 1, 1, 1], strides=[2, 2])], "x")
    y = node("HardSwish", [conv(x, "expand", (24, 8, 1, 1))], "y")
    y = node("Relu", [conv(y, "depthwise", (24, 1, 3, 3), pads=[1, 1, 1, 1], group=24)], "deep")
    squeezed = node("GlobalAveragePool", [y], "squeezed")
    squeezed = node("Relu", [conv(squeezed, "fc1", (6, 24, 1, 1), norm=False)], "narrow")
    y = node("Mul", [y, node("Sigmoid", [conv(squeezed, "fc2", (24, 6, 1, 1), norm=False)], "gate")], "gated")
    x = node("Add", [x, conv(y, "project", (8, 24, 1, 1))], "sum")
    x = node("Concat", [x, node("Relu", [conv(x, "beside", (4, 8, 1, 1))], "four")], "joined", axis=1)
    x = node("Flatten", [node("GlobalAveragePool", [x], "pooled")], "flat", axis=1)
    tensors |= {
        "top.weight": rng.normal(size=(outputs, 12)).astype(np.float32),
        "top.bias": np.ones(outputs, np.float32),
    }
    node("Gemm", [x, "top.weight", "top.bias"], "logits", "/top", transB=1)
    return nodes, tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("onnx") / "unit.onnx", *unit())


def theirs(file: Path, images: np.ndarray) -> np.ndarray:
    """What ONNX Runtime gives for images [B, H, W, C]."""
    return onnxruntime.InferenceSession(str(file)).run(None, {"images": images.transpose(0, 3, 1, 2)})[0]


def some_images(count: int = 4) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (count, SIZE, SIZE, 1)).astype(np.float32)


# -- what it computes


def test_a_network_gives_what_onnx_runtime_gives_and_has_its_authors_names(file):
    apply, variables = from_onnx(file)
    logits: Any = jax.jit(apply)(variables, some_images())
    np.testing.assert_allclose(logits, theirs(file, some_images()), rtol=1e-5, atol=1e-5)
    layers = {"stem", "expand", "depthwise", "fc1", "fc2", "project", "beside"}
    norms = {f"{layer}_bn" for layer in layers - {"fc1", "fc2"}}
    assert {*variables["params"]} == layers | norms | {"classifier"} and {*variables["batch_stats"]} == norms


@pytest.mark.parametrize("levels", [(0,), (0, 1)])
def test_masks_and_freezing_give_the_masked_network(file, levels):
    apply, variables = from_onnx(file)
    graph = fdjax.with_masks(fdjax.trace(apply, variables, some_images(1)), block=2, levels=levels)
    fcmask = {path: np.linspace(0, 1, mask.size, dtype=np.float32) for path, mask in fdjax.init_fcmask(graph).items()}
    hard = fdjax.harden(graph, fcmask, target_macs=0.6)
    assert hard.macs.ratio < 0.65
    masked = fdjax.masked(apply, graph)(hard.counts, variables, some_images())
    np.testing.assert_allclose(fdjax.freeze(graph, variables, hard.counts)(some_images()), masked, atol=1e-5)
    whole = fdjax.freeze(graph, variables, graph.full_counts())
    np.testing.assert_allclose(whole(some_images()), theirs(file, some_images()), rtol=1e-5, atol=1e-5)


def test_what_pins_channels_is_named_by_its_node(tmp_path):
    nodes, tensors = unit()
    nodes[-2:-2] = [helper.make_node("Softmax", ["pooled"], ["shares"], name="/scores/Softmax", axis=1)]
    nodes[-2].input[0] = "shares"
    apply, variables = from_onnx(save(tmp_path / "softmax.onnx", nodes, tensors))
    assert "(node /scores/Softmax)" in str(fdjax.trace(apply, variables, some_images(1)))


def test_in_training_batch_norm_takes_the_batch_and_moves_its_averages(file):
    apply, variables = from_onnx(file)
    images = jnp.asarray(some_images(8))
    _, moved = jax.jit(lambda v, x: apply(v, x, train=True))(variables, images)
    kernel = variables["params"]["stem"]["kernel"]
    stem = np.asarray(
        jax.lax.conv_general_dilated(images, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )
    for leaf, of_batch in (("mean", stem.mean((0, 1, 2))), ("var", stem.var((0, 1, 2)))):
        wanted = 0.8 * variables["batch_stats"]["stem_bn"][leaf] + 0.2 * of_batch
        np.testing.assert_allclose(moved["stem_bn"][leaf], wanted, atol=1e-5)


def test_a_tensorflow_file_has_channels_last_a_bias_that_is_added_and_a_softmax(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "conv/kernel": rng.normal(size=(6, 1, 3, 3)).astype(np.float32),
        "conv/bias": rng.normal(size=(1, 6, 1, 1)).astype(np.float32),
        "dense/kernel": rng.normal(size=(6, 10)).astype(np.float32),
        "dense/bias": rng.normal(size=10).astype(np.float32),
    }
    nodes = [
        helper.make_node("Transpose", ["images"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "conv/kernel"], ["x"], name="model/conv/Conv2D", auto_pad="SAME_UPPER"),
        helper.make_node("Add", ["x", "conv/bias"], ["y"], name="model/conv/BiasAdd"),
        helper.make_node("Transpose", ["y"], ["last"], perm=[0, 2, 3, 1]),
        helper.make_node("ReduceMean", ["last"], ["pooled"], axes=[1, 2], keepdims=0),
        helper.make_node("MatMul", ["pooled", "dense/kernel"], ["z"], name="model/dense/MatMul"),
        helper.make_node("Add", ["z", "dense/bias"], ["logits"], name="model/dense/BiasAdd"),
        helper.make_node("Softmax", ["logits"], ["scores"]),
    ]
    file = save(tmp_path / "tf.onnx", nodes, tensors, dims=("n", SIZE, SIZE, 1), opset=13)
    apply, variables = from_onnx(file)
    scores = onnxruntime.InferenceSession(str(file)).run(None, {"images": some_images()})[0]
    logits: Any = apply(variables, some_images())
    np.testing.assert_allclose(jax.nn.softmax(logits), scores, atol=1e-5)
    assert {layer: {*leaves} for layer, leaves in variables["params"].items()} == {
        "model.conv": {"kernel", "bias"},
        "classifier": {"kernel", "bias"},
    }
    assert any("Softmax, which was left out" in note for note in read_onnx_graph(file).notes)


def test_a_file_for_one_image_takes_several(tmp_path):
    nodes, tensors = unit()
    nodes[-2] = helper.make_node("Reshape", ["pooled", "shape"], ["flat"], name="/Reshape")
    file = save(tmp_path / "one.onnx", nodes, {**tensors, "shape": np.asarray([1, 12])}, dims=(1, 1, SIZE, SIZE))
    apply, variables = from_onnx(file)
    one_by_one = np.concatenate([theirs(file, some_images()[at : at + 1]) for at in range(4)])
    logits: Any = apply(variables, some_images())
    np.testing.assert_allclose(logits, one_by_one, rtol=1e-5, atol=1e-5)


def test_shapes_that_are_computed_are_followed(tmp_path):
    nodes, tensors = unit()
    nodes[-2:-1] = [
        helper.make_node("Shape", ["pooled"], ["dims"]),
        helper.make_node("Gather", ["dims", "zero"], ["count"], axis=0),
        helper.make_node("Unsqueeze", ["count", "axis"], ["counts"]),
        helper.make_node("Concat", ["counts", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["pooled", "wanted"], ["flat"]),
    ]
    whole = {"zero": np.asarray(0), "axis": np.asarray([0]), "rest": np.asarray([-1])}
    file = save(tmp_path / "dynamic.onnx", nodes, {**tensors, **whole})
    apply, variables = from_onnx(file)
    for count in (1, 3):
        logits: Any = jax.jit(apply)(variables, some_images(count))
        np.testing.assert_allclose(logits, theirs(file, some_images(count)), rtol=1e-5, atol=1e-5)


def flat_network(*nodes: Any) -> list[Any]:
    """Puts nodes behind the image as a vector, "flat"."""
    return [helper.make_node("Flatten", ["images"], ["flat"], axis=1), *nodes]


SQUARE = {
    "w": np.random.default_rng(3).normal(size=(16, 16), scale=0.2).astype(np.float32),
    "b": np.random.default_rng(4).normal(size=16).astype(np.float32),
}
SHARED = {
    "a residual": [("Gemm", ["flat", "w"], {}), ("Gemm", ["y0", "w", "flat"], {"beta": 0.5})],
    "both ways round": [("Gemm", ["flat", "w", "b"], {}), ("Gemm", ["y0", "w", "b"], {"transB": 1})],
    "two factors": [("Gemm", ["flat", "w"], {"alpha": 0.5}), ("Gemm", ["y0", "w"], {"alpha": 2.0})],
    "two biases of one": [("Gemm", ["flat", "w", "b"], {}), ("Gemm", ["y0", "w", "b"], {"beta": 2.0})],
    "added, then a bias": [("Add", ["flat", "b"], {}), ("Relu", ["y0"], {}), ("Gemm", ["y1", "w", "b"], {})],
    "a bias, then added": [("Gemm", ["flat", "w", "b"], {}), ("Relu", ["y0"], {}), ("Mul", ["y1", "b"], {})],
    "twice the same": [("MatMul", ["flat", "w"], {}), ("Relu", ["y0"], {}), ("MatMul", ["y1", "w"], {})],
}


@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_several_nodes_read_are_read_as_each_does(name, tmp_path):
    made = [helper.make_node(op, given, [f"y{at}"], **how) for at, (op, given, how) in enumerate(SHARED[name])]
    file = save(tmp_path / "shared.onnx", flat_network(*made), SQUARE, dims=("n", 1, 4, 4))
    apply, variables = from_onnx(file)
    images = some_images()[:, :4, :4]
    np.testing.assert_allclose(apply(variables, images), theirs(file, images), rtol=1e-5, atol=1e-5)
    kernels = [leaves for leaves in variables["params"].values() if "kernel" in leaves]
    assert len(kernels) == (2 if name in ("both ways round", "two factors") else 1)
    several = any("is read in several ways" in note for note in read_onnx_graph(file).notes)
    assert several is (name not in ("a residual", "twice the same"))


def test_a_norm_that_is_called_twice_moves_its_averages_twice(tmp_path):
    leaves = {f"bn.{leaf}": np.full(1, value, np.float32)
              for leaf, value in (("weight", 2), ("bias", 0.5), ("running_mean", 0), ("running_var", 1))}  # fmt: skip
    nodes = [helper.make_node("BatchNormalization", ["images", *leaves], ["x"], momentum=0.5),
             helper.make_node("BatchNormalization", ["x", *leaves], ["y"], momentum=0.5)]  # fmt: skip
    apply, variables = from_onnx(save(tmp_path / "twice.onnx", nodes, leaves))
    _, moved = apply(variables, some_images() + 3, train=True)
    # The first call sees the mean of the images, the second the bias.
    np.testing.assert_allclose(moved["bn"]["mean"], 0.25 * (some_images() + 3).mean() + 0.5 * 0.5, rtol=1e-5)


def test_a_file_for_two_images_takes_six(tmp_path):
    nodes = [helper.make_node("Reshape", ["images", "shape"], ["tokens"]),
             helper.make_node("ReduceMean", ["tokens"], ["y"], axes=[1], keepdims=0)]  # fmt: skip
    file = save(tmp_path / "two.onnx", nodes, {"shape": np.asarray([2, -1, 7])}, dims=(2, 1, SIZE, SIZE))
    images = some_images(6)
    wanted = np.concatenate([theirs(file, images[at : at + 2]) for at in (0, 2, 4)])
    np.testing.assert_allclose(from_onnx(file)[0](from_onnx(file)[1], images), wanted, rtol=1e-5, atol=1e-6)


def test_what_adds_a_dimension_is_no_bias(tmp_path):
    kernel = unit()[1]["stem.weight"]
    more = [helper.make_node("Conv", ["images", "stem.weight"], ["x"]), helper.make_node("Add", ["x", "five"], ["y"])]
    five = np.ones((1, 1, 8, 1, 1), np.float32)
    file = save(tmp_path / "five.onnx", more, {"stem.weight": kernel, "five": five})
    apply, variables = from_onnx(file)
    np.testing.assert_allclose(apply(variables, some_images()), theirs(file, some_images()), rtol=1e-5, atol=1e-5)


def test_a_length_of_zero_has_a_gradient(tmp_path):
    nodes = [helper.make_node("ReduceL2", ["images"], ["y"], axes=[2, 3])]
    apply, variables = from_onnx(save(tmp_path / "length.onnx", nodes, {}))
    gradient = jax.grad(lambda x: apply(variables, x).sum())(jnp.zeros((1, SIZE, SIZE, 1)))
    assert jnp.isfinite(gradient).all()


def test_half_precision_becomes_float32(tmp_path):
    nodes, tensors = unit()
    halves = {name: value.astype(np.float16) for name, value in tensors.items()}
    nodes.insert(0, helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16))
    nodes[1].input[0] = "half"
    apply, variables = from_onnx(save(tmp_path / "half.onnx", nodes, halves))
    exact = from_onnx(save(tmp_path / "whole.onnx", *unit()))
    logits: Any = apply(variables, some_images())
    assert logits.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    wanted: Any = exact[0](exact[1], some_images())
    np.testing.assert_allclose(logits, wanted, atol=0.02)


@pytest.mark.parametrize("folded", [False, True])
def test_pytorchs_export_gives_what_pytorch_gives(folded, tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from tests.imported_networks import torch_logits
    from tests.torch_networks import randomise, small_mobilenetv2

    network, file = randomise(small_mobilenetv2(), 4), tmp_path / "small.onnx"
    kept = {} if folded else {"training": torch.onnx.TrainingMode.PRESERVE, "do_constant_folding": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = torch.zeros(1, 1, SIZE, SIZE)
        torch.onnx.export(network.eval(), image, str(file), dynamo=False, opset_version=17, **kept)
    apply, variables = from_onnx(file)
    logits: Any = jax.jit(apply)(variables, some_images())
    np.testing.assert_allclose(logits, torch_logits(network, some_images()), rtol=1e-4, atol=1e-5)
    norms = {name.removesuffix(".running_mean") for name in network.state_dict() if name.endswith(".running_mean")}
    assert {*variables.get("batch_stats", {})} == (set() if folded else norms)
    assert any("has no batch norm" in note for note in read_onnx_graph(file).notes) is folded


# -- fdjax import


def config_beside(path: Path) -> str:
    file = path.with_name("run_of_two_steps.py")
    file.write_text(CONFIG)
    return str(file)


def arguments(file: Path, out: Path, *more: str) -> list[str]:
    return [
        "import",
        "--config",
        config_beside(out),
        "--format",
        "onnx",
        "--weights",
        str(file),
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture(scope="module")
def imported(file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert fdjax_command(arguments(file, out, *SCALING, "--json", str(out.parent / "report.json"))) == 0
    return out


def own(file: Path) -> list[str]:
    return ["--model.factory", "fdjax.onnx.module:onnx_network", "--model.arguments", "file", str(file)]


def test_an_imported_network_is_frozen_as_it_was(imported, file, tmp_path):
    assert fdjax_command(["freeze", "--checkpoint", str(imported), "--out", str(tmp_path / "frozen")]) == 0
    images = np.asarray(load_dataset("fashion_mnist_subset").test_images[:16])
    scaled = (images.astype(np.float32) - MEAN) / STD
    np.testing.assert_allclose(fdjax.load(str(tmp_path / "frozen"))(images), theirs(file, scaled), rtol=1e-4, atol=1e-4)
    report = json.loads((imported.parent / "report.json").read_text())
    assert (report["format"], report["num_classes"], report["weights"]) == ("onnx", CLASSES, "unit.onnx")


def test_it_is_pruned_by_train(imported, file, tmp_path, quick_runs):
    workdir = tmp_path / "run"
    run = ["--config", config_beside(workdir), "--workdir", str(workdir), "--init", str(imported)]
    assert train_command([*run, "--phases", "learn", "refine", *own(file)]) == 0
    restored = restore(*find_checkpoint(str(workdir)))
    assert restored.macs().ratio < 0.8 and restored.graph.input_mean == (MEAN,)
    assert {"expand", "project"} <= {*restored.graph.layers}


def test_a_new_classifier_takes_the_place_of_the_last_layer(tmp_path):
    file = save(tmp_path / "many.onnx", *unit(outputs=37))
    with pytest.raises(SystemExit):
        fdjax_command(arguments(file, tmp_path / "out", *SCALING))
    assert fdjax_command(arguments(file, tmp_path / "out", *SCALING, "--new-classifier")) == 0
    restored = restore(*find_checkpoint(str(tmp_path / "out")))
    classifier, stem = (restored.state.params[name] for name in ("classifier", "stem"))
    assert classifier["kernel"].shape == (12, CLASSES) and np.abs(classifier["kernel"]).max() < 0.1
    np.testing.assert_array_equal(stem["kernel"], from_onnx(file)[1]["params"]["stem"]["kernel"])


def test_a_new_classifier_is_new_for_as_many_classes_too(file, tmp_path):
    assert fdjax_command(arguments(file, tmp_path / "out", *SCALING, "--new-classifier")) == 0
    restored = restore(*find_checkpoint(str(tmp_path / "out")))
    assert np.abs(restored.state.params["classifier"]["kernel"]).max() < 0.1


def test_a_layer_inside_may_be_called_classifier(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {"classifier.weight": rng.normal(size=(10, 784)), "out.weight": rng.normal(size=(10, 10))}
    nodes = flat_network(
        helper.make_node("Gemm", ["flat", "classifier.weight"], ["x"], transB=1),
        helper.make_node("Relu", ["x"], ["y"]),
        helper.make_node("Gemm", ["y", "out.weight"], ["z"], transB=1),
    )
    file = save(tmp_path / "two.onnx", nodes, {name: value.astype(np.float32) for name, value in tensors.items()})
    assert fdjax_command(arguments(file, tmp_path / "out", *SCALING, "--new-classifier")) == 0
    params = restore(*find_checkpoint(str(tmp_path / "out"))).state.params
    assert np.abs(params["classifier"]["kernel"]).max() < 0.1
    np.testing.assert_allclose(params["classifier_1"]["kernel"], tensors["classifier.weight"].T, rtol=1e-6)


# -- what is refused


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs `fdjax import`, which must refuse; returns what it said. Nothing may have been written."""

    def run(file: Path, *more: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            fdjax_command(arguments(file, tmp_path / "refused", *more))
        assert stop.value.code == 2 and not (tmp_path / "refused").exists()
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ((), "does not say how images were scaled"),
        (("--input-mean", "1"), "does not say how images were scaled"),
        ((*SCALING, "--ema", "--epsilon", "0.001"), "--ema and --epsilon are not for ONNX files"),
        ((*SCALING, "--by-order"), "--by-order is not for ONNX files"),
        (("--input-mean", "1", "2", "3", "--input-std", "1", "2", "3"), "--input-mean has 3 numbers"),
        (("--input-mean", "1", "--input-std", "0"), "--input-std must be numbers above 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(more, named, file, refused):
    assert named in refused(file, *more)


def test_files_that_hold_no_network_are_refused(file, tmp_path, refused):
    (tmp_path / "text.onnx").write_text("no network")
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:-500])
    (tmp_path / "empty.onnx").write_bytes(b"")
    assert "it is not there" in refused(tmp_path / "none.onnx", *SCALING)
    assert "is not a file" in refused(tmp_path, *SCALING)
    for name in ("text.onnx", "cut.onnx", "empty.onnx"):
        assert f"{name} is not an ONNX file that can be read" in refused(tmp_path / name, *SCALING)


def test_networks_that_are_not_read_are_refused(tmp_path, refused):
    nodes, tensors = unit()
    three = {**tensors, "stem.weight": np.zeros((8, 3, 3, 3), np.float32)}
    assert "is for images of 3 channels" in refused(
        save(tmp_path / "colour.onnx", nodes, three, dims=("n", 3, SIZE, SIZE)), *SCALING
    )
    other = [*nodes[:-1], helper.make_node("FusedGemm", ["flat", "top.weight"], ["logits"], domain="com.microsoft")]
    assert "com.microsoft.FusedGemm" in refused(save(tmp_path / "fused.onnx", other, tensors), *SCALING)
    branch = helper.make_graph([], "branch", [], [])
    flow = [*nodes, helper.make_node("If", ["logits"], ["one"], name="choice", then_branch=branch, else_branch=branch)]
    assert "choice (If) is control flow" in refused(save(tmp_path / "flow.onnx", flow, tensors), *SCALING)
    last = save(tmp_path / "last.onnx", [*nodes, helper.make_node("Det", ["logits"], ["one"])], tensors)
    assert "the layer that makes the logits was not found" in refused(last, *SCALING)
    twice = flat_network(
        helper.make_node("Gemm", ["flat", "first"], ["x"]),
        helper.make_node("Gemm", ["x", "w"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
        helper.make_node("Gemm", ["z", "w"], ["last"]),
    )
    shared = {"first": np.ones((784, 10), np.float32), "w": np.ones((10, 10), np.float32)}
    assert "the layer that makes the logits was not" in refused(save(tmp_path / "w.onnx", twice, shared), *SCALING)
    inside = [*nodes[:1], helper.make_node("LRN", [nodes[0].output[0]], ["normed"], name="lrn", size=3), *nodes[1:]]
    inside[2].input[0] = "normed"
    assert "the node lrn (LRN) cannot be read" in refused(save(tmp_path / "lrn.onnx", inside, tensors), *SCALING)
    assert "opset 6" in refused(save(tmp_path / "old.onnx", nodes, tensors, opset=6), *SCALING)
    flat = save(tmp_path / "flat.onnx", [helper.make_node("Relu", ["images"], ["y"])], {}, dims=("n", 784))
    assert "has 2 dimensions; an image is" in refused(flat, *SCALING)


def test_several_inputs_are_refused(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Add", ["images", "other"], ["y"])], "two",
        [image_of("n", 1, 4, 4), helper.make_tensor_value_info("other", TensorProto.FLOAT, ("n", 1, 4, 4))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(tmp_path / "two.onnx"))
    with pytest.raises(UserError, match=r"has 2 inputs \(images, other\)"):
        from_onnx(tmp_path / "two.onnx")


def test_a_run_without_the_network_or_its_file_says_what_to_give(imported, file, tmp_path, capsys):
    workdir = tmp_path / "run"
    run = ["--config", config_beside(workdir), "--workdir", str(workdir), "--init", str(imported), "--phases", "learn"]
    with pytest.raises(SystemExit):
        train_command(run)
    assert (
        f"give --model.factory fdjax.onnx.module:onnx_network --model.arguments file {file}" in capsys.readouterr().err
    )
    other = save(tmp_path / "other.onnx", *unit(outputs=CLASSES + 1))
    with pytest.raises(SystemExit):
        train_command([*run, *own(other)])
    assert "is another file than the network of the checkpoint was read from" in capsys.readouterr().err
    assert not workdir.exists()


def test_a_checkpoint_holds_its_network_and_is_read_without_the_file(file, tmp_path, quick_runs):
    network = Path(shutil.copy(file, tmp_path / "net.onnx"))
    assert fdjax_command(arguments(network, tmp_path / "imported", *SCALING)) == 0
    workdir = tmp_path / "run"
    run = ["--config", config_beside(workdir), "--workdir", str(workdir), "--init", str(tmp_path / "imported")]
    assert train_command([*run, "--phases", "learn", *own(network)]) == 0
    before = restore(*find_checkpoint(str(workdir)))
    network.rename(tmp_path / "moved.onnx")
    shutil.rmtree(tmp_path / "imported")
    moved = workdir.rename(tmp_path / "elsewhere")
    after = restore(*find_checkpoint(str(moved)))
    assert after.macs() == before.macs() and after.onnx_file is not None and after.onnx_file.parent.parent == moved
    assert after.onnx_file.read_bytes() == file.read_bytes()
    assert fdjax_command(["freeze", "--checkpoint", str(moved), "--out", str(tmp_path / "frozen")]) == 0
    # The run goes on where the file was, where it is now, and from the copy.
    again = ["--config", config_beside(moved), "--workdir", str(moved), "--phases", "learn", "refine"]
    for place in (network, tmp_path / "moved.onnx", after.onnx_file):
        assert train_command([*again, *own(place)]) == 0
    assert restore(*find_checkpoint(str(moved))).finished_phases() == ["pretrain", "learn", "refine"]


def test_a_damaged_copy_of_the_network_is_passed_over(imported, file, tmp_path):
    checkpoint = shutil.copytree(imported, tmp_path / "checkpoint")
    (copy,) = (checkpoint / "checkpoints").glob("*.onnx")
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    # The file itself is still there.
    restored = restore(*find_checkpoint(str(checkpoint)))
    assert restored.onnx_file is None and restored.macs() == restore(*find_checkpoint(str(imported))).macs()
    assert keep_file(file, checkpoint / "checkpoints") == copy and copy.read_bytes() == file.read_bytes()
    copy.unlink()
    content = file.read_bytes()
    save(file, *unit(outputs=11))
    try:
        with pytest.raises(UserError, match=r"the file has changed since: bring it back"):
            restore(*find_checkpoint(str(checkpoint)))
        file.unlink()
        with pytest.raises(UserError, match=r"no ONNX file .*put it back where it was"):
            restore(*find_checkpoint(str(checkpoint)))
    finally:
        file.write_bytes(content)


def test_a_kept_copy_holds_tensors_that_lie_in_other_files(file, tmp_path):
    (tmp_path / "many").mkdir()
    many, whole = tmp_path / "many" / "net.onnx", onnx.load(str(file))
    onnx.save(whole, str(many), save_as_external_data=True, location="net.data", size_threshold=0)
    copy = keep_file(many, tmp_path / "kept")
    assert copy is not None and copy == kept_file(tmp_path / "kept")
    assert holds_network_of(many, copy, None) and holds_network_of(copy, copy, None)
    (tmp_path / "many" / "net.data").unlink()
    np.testing.assert_array_equal(theirs(copy, some_images()), theirs(file, some_images()))
    # Another network takes its place.
    other = keep_file(save(tmp_path / "other.onnx", *unit(outputs=11)), tmp_path / "kept")
    assert [*(tmp_path / "kept").iterdir()] == [other] and not holds_network_of(file, other, None)
