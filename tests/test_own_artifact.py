"""What freeze gives of other libraries' models is saved, loaded, timed, exported and asked for classes as any other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fdjax
from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import fdjax_command
from fdjax.errors import UserError
from fdjax.frozen.export import export, read_stablehlo

SHAPE = (8, 8, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (2, *SHAPE)).astype(np.float32)
CLASSES = ("ant", "bee", "cat", "dog")
Model = tuple[Callable[[Any, Any], Any], Any]


def nnx_model() -> Model:
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.stem = nnx.Conv(3, 6, (3, 3), rngs=rngs)
            self.expand = nnx.Conv(6, 12, (1, 1), rngs=rngs)
            self.norm = nnx.BatchNorm(12, rngs=rngs)
            self.project = nnx.Conv(12, 6, (1, 1), rngs=rngs)
            self.top = nnx.Linear(6, 4, rngs=rngs)

        def __call__(self, x):
            x = jax.nn.relu(self.stem(x / 255))
            x = x + self.project(jax.nn.silu(self.norm(self.expand(x))))
            return self.top(x.mean(axis=(1, 2)))

    model = Net(nnx.Rngs(0))
    model.eval()
    graphdef, state = nnx.split(model)

    def apply(variables, images):
        replaced = jax.tree.map(lambda x: x, state)
        nnx.replace_by_pure_dict(replaced, variables)
        return nnx.merge(graphdef, replaced)(images)

    return apply, nnx.to_pure_dict(state)


def equinox_model() -> Model:
    equinox = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 4)
    layers = [
        equinox.nn.Conv2d(3, 6, 3, padding=1, key=keys[0]),
        equinox.nn.Conv2d(6, 12, 1, key=keys[1]),
        equinox.nn.Conv2d(12, 6, 1, key=keys[2]),
        equinox.nn.Linear(6, 4, key=keys[3]),
    ]
    variables, static = equinox.partition(layers, equinox.is_inexact_array)

    def one(layers, x):
        x = jax.nn.relu(layers[0](x.transpose(2, 0, 1) / 255))
        return layers[3](layers[2](jax.nn.relu(layers[1](x))).mean(axis=(1, 2)))

    return lambda variables, images: jax.vmap(lambda x: one(equinox.combine(variables, static), x))(images), variables


def keras_model() -> Model:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.config.backend() != "jax":
        pytest.skip(f"Keras is on {keras.config.backend()} here")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input(SHAPE),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(6, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(12, 1, activation="relu"),
            keras.layers.DepthwiseConv2D(3, padding="same"),
            keras.layers.Conv2D(6, 1),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ]
    )
    variables = {v.path: v.value for v in model.variables}
    paths = [[v.path for v in of] for of in (model.trainable_variables, model.non_trainable_variables)]

    def apply(variables, images):
        return model.stateless_call(*([variables[path] for path in of] for of in paths), images)[0]

    return apply, variables


@pytest.fixture(scope="module", params=[nnx_model, equinox_model, keras_model], ids=["nnx", "equinox", "keras"])
def saved(request, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A folder that a frozen model was saved into, and what its masked function says of the images."""
    apply, variables = request.param()
    graph = fdjax.with_masks(fdjax.trace(apply, variables, IMAGES[:1]), block=2, levels=(0, 1))
    rng = np.random.default_rng(1)
    counts = {path: rng.choice([0, 1, n], channels) for path, (channels, n) in graph.mask_sizes.items()}
    folder = tmp_path_factory.mktemp("artifacts") / "net"
    fdjax.freeze(graph, variables, counts, class_names=CLASSES).save(folder)
    return folder, np.asarray(fdjax.masked(apply, graph)(counts, variables, IMAGES))


def close(found: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * float(np.abs(expected).max()))


def test_it_is_loaded_as_a_function_and_as_a_predictor(saved) -> None:
    folder, expected = saved
    network = fdjax.load(folder)
    close(network(IMAGES), expected)
    close(jax.jit(lambda x: network(x) * 1.0)(IMAGES), expected)
    close(network.predict(IMAGES.astype(np.uint8)), expected)
    assert network.classify(IMAGES[0])[0][0] == CLASSES[int(expected[0].argmax())]


def test_bench_times_it(saved, tmp_path) -> None:
    file = tmp_path / "bench.json"
    command = ["bench", "--frozen", str(saved[0]), "--batch", "1", "--rounds", "1", "--layers", "--json", str(file)]
    assert fdjax_command(command) == 0
    found = json.loads(file.read_text())
    (row,) = found["rows"]
    assert 0 < row["mac_ratio"] < 1 and row["frozen_ms"] > 0 and row["onnxruntime_dense_ms"] > 0
    assert row["masks"].endswith("{0, 1, N}") and found["layers"]["1"]


def test_predict_names_the_class_of_a_picture(saved, tmp_path, capsys) -> None:
    folder, expected = saved
    Image.fromarray(IMAGES[1].astype(np.uint8)).save(tmp_path / "picture.png")
    assert fdjax_command(["predict", "--frozen", str(folder), str(tmp_path / "picture.png")]) == 0
    assert CLASSES[int(expected[1].argmax())] in capsys.readouterr().out


def test_exports_say_the_same(saved, tmp_path) -> None:
    folder, expected = saved
    for name in ("net.onnx", "net.stablehlo"):
        assert fdjax_command(["export", "--no-time", "--frozen", str(folder), "--out", str(tmp_path / name)]) == 0
    close(read_stablehlo(tmp_path / "net.stablehlo")(IMAGES), expected)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    close(session.run(None, {session.get_inputs()[0].name: IMAGES})[0], expected)


def test_eval_says_that_it_names_no_data(saved, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        eval_command(["--frozen", str(saved[0])])
    assert stop.value.code == 2 and "names no data set" in capsys.readouterr().err


def test_several_inputs_and_outputs(tmp_path, capsys) -> None:
    """Two images, two results: a function, timed and exported; not asked for classes."""
    rng = np.random.default_rng(2)
    variables = {name: rng.normal(size=shape) for name, shape in (("a", (3, 6)), ("b", (3, 6)), ("top", (6, 4)))}
    variables = {name: value.astype(np.float32) for name, value in variables.items()}

    def apply(variables, left, right):
        y = jax.nn.relu(left @ variables["a"] + right @ variables["b"])
        return y.mean(axis=(1, 2)) @ variables["top"], y @ variables["top"]

    graph = fdjax.with_masks(fdjax.trace(apply, variables, IMAGES[:1], IMAGES[:1]))
    frozen = fdjax.freeze(graph, variables, graph.full_counts())
    frozen.save(tmp_path / "net")
    expected = apply(variables, jnp.asarray(IMAGES), jnp.asarray(IMAGES[::-1]))
    for found in (fdjax.load(tmp_path / "net")(IMAGES, IMAGES[::-1]), frozen(IMAGES, IMAGES[::-1])):
        jax.tree.map(close, tuple(found), tuple(map(np.asarray, expected)))
    export(frozen.frozen, tmp_path / "net.stablehlo")
    found = read_stablehlo(tmp_path / "net.stablehlo")(IMAGES, IMAGES[::-1])
    jax.tree.map(close, tuple(found), tuple(map(np.asarray, expected)))
    assert fdjax_command(["bench", "--frozen", str(tmp_path / "net"), "--batch", "1", "--rounds", "1"]) == 0
    with pytest.raises(UserError, match="takes 2 inputs and gives 4, 8x8x4"):
        frozen.predict(IMAGES)


def test_class_names_of_another_number_are_refused() -> None:
    apply, variables = nnx_model()
    graph = fdjax.with_masks(fdjax.trace(apply, variables, IMAGES[:1]))
    with pytest.raises(ValueError, match="2 class names for a network of 4 outputs"):
        fdjax.freeze(graph, variables, graph.full_counts(), class_names=("yes", "no"))
