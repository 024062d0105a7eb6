"""Keras weights: every layout of its files, and the network against torch's operations with SAME padding."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

h5py = pytest.importorskip("h5py", reason="h5py is not installed: Keras files are HDF5")
torch = pytest.importorskip("torch", reason="torch is not installed: it computes what is expected")

from fdjax.commands.import_weights import check_even_maps  # noqa: E402
from fdjax.errors import UserError  # noqa: E402
from fdjax.importers import FORMATS, convert, count_classes, read_weights  # noqa: E402
from fdjax.zoo import MobileNet  # noqa: E402
from tests.graph_networks import network_for  # noqa: E402
from tests.imported_networks import imported_logits, relative_error, torch_logits  # noqa: E402
from tests.torch_networks import TimmMobileNet, randomise  # noqa: E402

Layers = dict[str, dict[str, np.ndarray]]
# The members of a batch norm in the order in which Keras numbers them, and their names in torch.
NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def keras_layers(module: TimmMobileNet) -> Layers:
    """The weights of a torch module as Keras Applications' MobileNetV2 would have them."""
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {leaf: state[f"{name}.{theirs}"] for leaf, theirs in NORM.items()}

    def conv(name: str, depthwise: bool = False) -> dict[str, np.ndarray]:
        return {"kernel": state[f"{name}.weight"].transpose(2, 3, *((0, 1) if depthwise else (1, 0)))}

    layers = {"Conv1": conv("conv_stem"), "bn_Conv1": norm("bn1")}
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(module.blocks) for b in range(len(stage))]
    for number, block in enumerate(blocks):
        name = f"block_{number}" if number else "expanded_conv"
        roles = [("expand", "conv_pw"), ("depthwise", "conv_dw"), ("project", "conv_pwl")]
        if f"{block}.conv_pwl.weight" not in state:
            roles = [("depthwise", "conv_dw"), ("project", "conv_pw")]
        for at, (role, theirs) in enumerate(roles, start=1):
            layers[f"{name}_{role}"] = conv(f"{block}.{theirs}", role == "depthwise")
            layers[f"{name}_{role}_BN"] = norm(f"{block}.bn{at}")
    layers |= {"Conv_1": conv("conv_head"), "Conv_1_bn": norm("bn2")}
    layers["predictions"] = {"kernel": state["classifier.weight"].T, "bias": state["classifier.bias"]}
    return layers


def write_keras2(root, layers: Layers, suffix: str = ":0") -> None:
    """As `save_weights` of Keras 2 does, and `save` of both; Keras 3 leaves out the suffix."""
    root.attrs["layer_names"] = [name.encode() for name in ["input_1", *layers]]
    root.create_group("input_1").attrs["weight_names"] = np.array([], "S1")
    for name, weights in layers.items():
        group = root.create_group(name)
        leaves = ["depthwise_kernel" if name.endswith("depthwise") and suffix else leaf for leaf in weights]
        group.attrs["weight_names"] = [f"{name}/{leaf}{suffix}".encode() for leaf in leaves]
        for leaf, array in zip(leaves, weights.values(), strict=True):
            group[f"{name}/{leaf}{suffix}"] = array


def write_keras3(root, layers: Layers, *, named: bool = True) -> None:
    """As `save_weights` of Keras 3 does: groups are named after classes, variables numbered, names attributes."""
    counts: dict[str, int] = {}
    for name, weights in {"input": {}, **layers}.items():
        kind = "batch_normalization" if "gamma" in weights else "conv2d" if weights else "input_layer"
        number = counts.setdefault(kind, 0)
        counts[kind] += 1
        variables = root.create_group(f"layers/{kind}{f'_{number}' if number else ''}/vars")
        if named:
            variables.attrs["name"] = name
        for at, array in enumerate(weights.values()):
            variables[str(at)] = array
    root.create_group("vars")


def write(file: Path, layers: Layers) -> None:
    """In the layout that the file's name says."""
    if file.name == "whole.keras":
        content = io.BytesIO()
        with h5py.File(content, "w") as root:
            write_keras3(root, layers)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("config.json", "{}")
            archive.writestr("model.weights.h5", content.getvalue())
        return
    with h5py.File(file, "w") as root:
        if file.name == "keras3.weights.h5":
            write_keras3(root, layers)
        elif file.name == "whole.h5":
            root.create_group("optimizer_weights")["iterations"] = np.zeros((), np.int64)
            write_keras2(root.create_group("model_weights"), layers, suffix="")
        else:
            write_keras2(root, layers)


FILES = ("keras2.h5", "whole.h5", "keras3.weights.h5", "whole.keras")


@pytest.fixture(scope="module")
def module() -> TimmMobileNet:
    rows = ((4, 8, 2, 1, 3), (4, 24, 2, 2, 3))
    return randomise(TimmMobileNet(rows, 8, 256, same=True, eps=1e-3), 3)  # type: ignore[return-value]


def test_logits_are_those_of_the_same_weights_in_torch(module, tmp_path: Path) -> None:
    write(tmp_path / FILES[0], keras_layers(module))
    tensors = read_weights(str(tmp_path / FILES[0]))
    network = MobileNet("mobilenetv2_small", 10, 0.35, 1, padding="same", batch_norm_epsilon=1e-3)
    assert FORMATS["keras"].conventions.padding == network.padding
    assert FORMATS["keras"].conventions.batch_norm_epsilon == network.batch_norm_epsilon
    images = np.random.default_rng(1).normal(size=(2, 22, 22, 3)).astype(np.float32)
    found = imported_logits(network, tensors, "keras", images)
    assert relative_error(found, torch_logits(module, images)) < 1e-4
    assert count_classes(tensors, "keras", network) == 10


@pytest.mark.parametrize("file", FILES)
def test_every_layout_holds_the_same(module, tmp_path: Path, file: str) -> None:
    layers = keras_layers(module)
    write(tmp_path / file, layers)
    found = read_weights(str(tmp_path / file))
    assert sorted(found) == sorted(f"{layer}/{leaf}" for layer, weights in layers.items() for leaf in weights)
    for name, array in found.items():
        layer, _, leaf = name.rpartition("/")
        np.testing.assert_array_equal(array, layers[layer][leaf], err_msg=name)


@pytest.mark.parametrize("file", ["whole.h5", "keras3.weights.h5"])
def test_a_model_within_the_model_has_the_same_weights(module, tmp_path: Path, file: str) -> None:
    """Transfer learning: a base of Keras Applications is one layer of a new model."""
    layers = keras_layers(module)
    top = {"predictions": layers.pop("predictions")}
    with h5py.File(tmp_path / file, "w") as root:
        if file == "whole.h5":
            write_keras2(root, top, suffix="")
            root.attrs["layer_names"] = [b"base", b"predictions"]
            base = root.create_group("base")
            names = [f"{layer}/{leaf}" for layer, weights in layers.items() for leaf in weights]
            base.attrs["weight_names"] = [name.encode() for name in names]
            for name in names:
                layer, _, leaf = name.rpartition("/")
                base[name] = layers[layer][leaf]
        else:
            write_keras3(root, top)
            write_keras3(root.create_group("layers/functional"), layers)
    found = read_weights(str(tmp_path / file))
    for name, array in found.items():
        layer, _, leaf = name.rpartition("/")
        np.testing.assert_array_equal(array, {**layers, **top}[layer][leaf], err_msg=name)
    assert len(found) == sum(map(len, {**layers, **top}.values()))


def test_layer_names_that_keras_has_cut_up_are_read(module, tmp_path: Path) -> None:
    """HDF5 holds no attribute of more than 64 KB."""
    with h5py.File(tmp_path / "w.h5", "w") as root:
        write_keras2(root, keras_layers(module))
        names = root.attrs["layer_names"]
        del root.attrs["layer_names"]
        root.attrs["layer_names0"], root.attrs["layer_names1"] = names[:5], names[5:]
    assert len(read_weights(str(tmp_path / "w.h5"))) == sum(map(len, keras_layers(module).values()))


def test_keras_mobilenetv1_is_refused_where_its_padding_would_differ() -> None:
    """Keras pads one zero after the map before each stride of 2, also where its side is odd."""
    network = MobileNet("mobilenetv1", 7, 0.25, 1, padding="same", batch_norm_epsilon=1e-3)
    check_even_maps(network_for(network, (64, 64, 3)))
    with pytest.raises(UserError, match=r"reads one of 5x5 at 80 pixels: give --data.image-size a multiple of 32"):
        check_even_maps(network_for(network, (80, 80, 3)))


def test_keras_mobilenetv1_has_its_classifier_as_a_convolution() -> None:
    network = MobileNet("mobilenetv1", 7, 0.25, 1, padding="same", batch_norm_epsilon=1e-3)
    graph = network_for(network, (32, 32, 3))
    rng, tensors = np.random.default_rng(5), {}
    for layer in graph.layers.values():
        number = int(layer.name[5:7]) + 1 if layer.name.startswith("block") else 0
        name = {"conv": "conv1", "depthwise": f"conv_dw_{number}", "pointwise": f"conv_pw_{number}"}.get(
            layer.kind, "conv_preds"
        )
        channels = (layer.in_channels, 1) if layer.kind == "depthwise" else (layer.in_channels, layer.out_channels)
        tensors[f"{name}/kernel"] = rng.normal(size=(*(layer.window or (1, 1)), *channels)).astype(np.float32)
        if layer.kind == "dense":
            tensors[f"{name}/bias"] = rng.normal(size=7).astype(np.float32)
        else:
            tensors |= {f"{name}_bn/{leaf}": rng.uniform(0.5, 1, layer.out_channels) for leaf in NORM}
    variables = convert(tensors, "keras", network, graph, 0.25)
    assert count_classes(tensors, "keras", network) == 7
    params = variables["params"]
    np.testing.assert_array_equal(params["classifier"]["kernel"], tensors["conv_preds/kernel"][0, 0])
    np.testing.assert_array_equal(params["block02"]["depthwise"], tensors["conv_dw_3/kernel"][..., 0])
    np.testing.assert_array_equal(params["block12"]["project"]["kernel"], tensors["conv_pw_13/kernel"][0, 0])
    np.testing.assert_array_equal(params["stem"]["kernel"], tensors["conv1/kernel"])
    np.testing.assert_allclose(
        variables["batch_stats"]["block12"]["project_norm"]["var"], tensors["conv_pw_13_bn/moving_variance"], rtol=1e-6
    )


def test_files_without_weights_or_names_are_refused(module, tmp_path: Path) -> None:
    with h5py.File(tmp_path / "numbered.h5", "w") as root:
        write_keras3(root, keras_layers(module), named=False)
    with h5py.File(tmp_path / "other.h5", "w") as root:
        root["data"] = np.zeros(3)
    with h5py.File(tmp_path / "cut.h5", "w") as root:
        write_keras2(root, keras_layers(module))
    content = (tmp_path / "cut.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: len(content) // 2])
    for file, expected in (
        ("numbered.h5", "numbers its layers and does not name them"),
        ("other.h5", "holds no Keras weights"),
        ("cut.h5", "cannot be read as Keras weights"),
    ):
        with pytest.raises(UserError, match=expected):
            read_weights(str(tmp_path / file))
