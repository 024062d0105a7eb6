"""`fdjax predict` by an ONNX file: the same as by the folder that it was exported from."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
onnx = pytest.importorskip("onnx", reason="onnx is not installed")

from fdjax.commands.main import fdjax_command  # noqa: E402
from fdjax.frozen import freeze, load, save  # noqa: E402
from fdjax.frozen.bench import seeded_variables  # noqa: E402
from fdjax.frozen.onnx_file import load_onnx  # noqa: E402
from fdjax.frozen.onnx_model import write_onnx  # noqa: E402
from fdjax.training.build import build_network  # noqa: E402
from tests.frozen_checkpoints import CONFIG  # noqa: E402

NAMES = ("été", "b c", *(str(number) for number in range(8)))


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `frozen`, its `network.onnx`, and `pictures`."""
    folder = tmp_path_factory.mktemp("here")
    _, graph = build_network(CONFIG, (28, 28, 1), 10)
    graph = dataclasses.replace(graph, class_names=NAMES, input_mean=(70.0,), input_std=(80.0,))
    frozen = freeze(graph, seeded_variables(graph), graph.full_counts())
    data = {"eval_crop": 0.5, "background": "black", "path": "somewhere"}
    facts = {"macs": {"ratio": 1.0, "paper_ratio": 1.0}, "layers": [], "data": data}
    save(folder / "frozen", graph, frozen, facts)
    export = ["export", "--frozen", str(folder / "frozen"), "--out", str(folder / "network.onnx"), "--no-time"]
    assert fdjax_command(export) == 0
    (folder / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        # Half transparent, so that the background counts, and larger than the network takes.
        pixels = rng.integers(0, 256, (40, 60, 4), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    (folder / "pictures" / "3.png").write_bytes(b"no picture")
    write_onnx(frozen.program, frozen.arrays, folder / "unnamed.onnx")
    (folder / "text.onnx").write_text("These are words.")
    model = onnx.load(folder / "network.onnx")
    next(p for p in model.metadata_props if p.key == "class_names").value = json.dumps(["one"])
    onnx.save(model, folder / "renamed.onnx")
    return folder


def test_it_says_what_the_folder_says(here, capsys, tmp_path) -> None:
    tables = []
    for frozen in ("frozen", "network.onnx"):
        table = tmp_path / f"{frozen}.csv"
        given = ["--frozen", str(here / frozen), str(here / "pictures"), "--top", "3", "--csv", str(table)]
        assert fdjax_command(["predict", *given]) == 0
        captured = capsys.readouterr()
        assert "1 of 4 pictures could not be read" in captured.err and len(captured.out.splitlines()) == 3
        with table.open(newline="", encoding="utf-8") as file:
            tables.append(list(csv.DictReader(file)))
    for own, theirs in zip(*tables, strict=True):
        assert [own[f"class_{n}"] for n in (1, 2, 3)] == [theirs[f"class_{n}"] for n in (1, 2, 3)]
        if not own["error"]:
            assert own["class_1"] in NAMES
            assert float(own["probability_1"]) == pytest.approx(float(theirs["probability_1"]), abs=1e-5)
    network, again = load(here / "frozen"), load_onnx(here / "network.onnx")
    assert again.class_names == NAMES and again.input_shape == network.input_shape
    images = np.random.default_rng(1).integers(0, 256, (2, 28, 28, 1), np.uint8)
    np.testing.assert_allclose(again.predict(images), np.asarray(network.predict(images)), atol=1e-4)


@pytest.mark.parametrize(
    ("file", "more", "expected"),
    [
        ("none.onnx", [], "there is no file"),
        ("text.onnx", [], "is not an ONNX file that ONNX Runtime can run"),
        ("unnamed.onnx", [], "does not say what pictures it takes (its metadata lack class_names, input, pictures)"),
        ("renamed.onnx", [], "does not fit its own metadata: 1 class names"),
        ("network.onnx", ["--engine", "native"], "leave out --engine native"),
    ],
)
def test_what_is_no_such_file_is_one_message(here, capsys, file: str, more: list[str], expected: str) -> None:
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["predict", "--frozen", str(here / file), str(here / "pictures"), *more])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and expected in said and len(said.splitlines()) == 1


def test_without_onnxruntime_it_says_what_to_install(here, capsys, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name))
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["predict", "--frozen", str(here / "network.onnx"), str(here / "pictures")])
    assert stop.value.code == 2 and "pip install onnxruntime" in capsys.readouterr().err
