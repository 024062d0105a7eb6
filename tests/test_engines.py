"""Engines: the same logits on each, schedules chosen by one's clock, and what is said where one does not fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fdjax.checkpoints import freeze as freezing
from fdjax.commands.main import fdjax_command
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.experiments import bench
from fdjax.frozen import Stopwatch, choice, load, save
from fdjax.frozen.artifact import MANIFEST, ONNX
from fdjax.frozen.choice import time_programs
from fdjax.frozen.engines import ENGINES, find_engine, is_there, runner
from fdjax.frozen.native import compile as native_compile
from fdjax.frozen.speed import check_made_for, partial_counts, slower_words
from fdjax.training.run import train
from tests.frozen_checkpoints import CONFIG, write_checkpoint
from tests.frozen_networks import frozen_of, random_counts, random_variables, raw_images, relative_error
from tests.test_frozen import TIED, make

HAVE_ONNX = importlib.util.find_spec("onnx") is not None and importlib.util.find_spec("onnxruntime") is not None
needs_onnx = pytest.mark.skipif(not HAVE_ONNX, reason="onnx or onnxruntime is not installed")
SLOWER = {"engine": "onnxruntime", "batch": 8, "ratio": 1.25}


@pytest.fixture(scope="module")
def tied():
    network, graph = make(**TIED)
    return graph, frozen_of(graph, random_variables(network, graph, 0), random_counts(graph, 1, (1,)))


@pytest.fixture
def fast_clock(monkeypatch):
    """Has the clock run each function once, and gives every function the time that it is asked about."""

    def once(functions, rounds=None, seconds=0.0):
        from fdjax.frozen.clock import Times

        for function in functions.values():
            function()
        return {name: Times(np.ones(1), np.ones(1)) for name in functions}

    monkeypatch.setattr(choice, "interleaved", once)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "native" else name for name in ENGINES]
)
def test_every_engine_gives_the_same_logits(tied, name) -> None:
    if not is_there(name):
        pytest.skip(f"{name} is not installed")
    graph, frozen = tied
    images, engine = raw_images(graph, 3, 0), find_engine(name)
    function = engine.compile(frozen.program, frozen.arrays, [images.shape], 1, False)
    found = function(engine.place(images))
    found = np.asarray(found[0] if isinstance(found, tuple) else found)
    expected = np.asarray(find_engine("xla").compile(frozen.program, frozen.arrays, [], 1, False)(images)[0])
    assert found.shape == (3, 10) and relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ENGINES)
def test_a_part_of_a_network_gives_the_same_maps(tied, name) -> None:
    if not is_there(name):
        pytest.skip(f"{name} is not installed")
    _, frozen = tied
    program, arrays = choice.layers_of(frozen)["block01"]
    expected = np.asarray(runner(find_engine("xla"), program, arrays, 2, 1, part=True)()[0])
    found = runner(find_engine(name), program, arrays, 2, 1, part=True)()
    found = np.asarray(found[0] if isinstance(found, tuple) else found)
    if find_engine(name).writes_onnx:
        found = found.transpose(0, 2, 3, 1)
    assert relative_error(found, expected) < 1e-5


def test_what_an_engine_refuses_is_not_chosen(tied, fast_clock, monkeypatch) -> None:
    _, frozen = tied
    sound = choice.layers_of(frozen)["block01"]
    broken = (sound[0], {})
    assert set(time_programs({"broken": broken, "sound": sound}, 1)) == {"sound"}
    with pytest.raises(UserError, match="the engine xla refuses broken: "):
        time_programs({"broken": broken}, 1)


@pytest.mark.parametrize(("part", "expected"), [(True, 9.0), (False, 2.0)])
def test_a_whole_network_has_the_median_of_several_measurements(tied, monkeypatch, part: bool, expected: float) -> None:
    """One measurement on a busy machine may be far off."""
    from fdjax.frozen.clock import Times

    _, frozen = tied
    program = choice.layers_of(frozen)["block01"] if part else (frozen.program, frozen.arrays)
    measured = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(choice, "interleaved", lambda functions, **_: {"it": Times(*np.full((2, 3), next(measured)))})
    assert time_programs({"it": program}, 1, part=part) == {"it": expected}


@needs_onnx
def test_schedules_are_chosen_by_the_clock_of_an_engine(tmp_path, fast_clock, monkeypatch, capsys) -> None:
    monkeypatch.setattr(freezing, "_accuracy", lambda *_: {"accuracy": None})
    checkpoint = write_checkpoint(tmp_path / "run", "refine")
    out = tmp_path / "frozen"
    command = ["freeze", "--no-time", "--checkpoint", str(checkpoint), "--out", str(out), "--choose", "time"]
    assert fdjax_command([*command, "--engine", "onnxruntime", "--engine-batch", "2"]) == 0
    manifest = json.loads((out / MANIFEST).read_text())
    chosen = {"by": "time", "engine": "onnxruntime", "batch": 2, "released_at_freezing": []}
    assert manifest["choice"] == chosen and manifest["time"] is None
    assert any(unit["milliseconds"] for unit in manifest["units"])
    network = load(out)
    import onnxruntime

    session = onnxruntime.InferenceSession(out / ONNX, providers=["CPUExecutionProvider"])
    images = raw_images(network.network, 2, 0)
    facts = session.get_modelmeta().custom_metadata_map
    assert tuple(json.loads(facts["class_names"])) == network.class_names != ()
    assert json.loads(facts["input"]) == {"layout": "NHWC", "range": [0, 255], "shape": [28, 28, 1]}
    assert json.loads(facts["normalised_inside"]) == {"mean": [73.0], "std": [90.0]}
    (found,) = session.run(None, {"images": images.astype(np.float32)})
    assert relative_error(np.asarray(found), np.asarray(network.predict(images))) < 1e-5
    capsys.readouterr()
    bench = ["bench", "--frozen", str(out), "--rounds", "1", "--engine", "onnxruntime", "--batch"]
    assert fdjax_command([*bench, "2"]) == 0
    assert "was made for" not in capsys.readouterr().out
    said = refused(capsys, *bench, "1")
    assert "was made for onnxruntime at 2 images, not for onnxruntime at 1 image: use it there, freeze it anew" in said
    assert fdjax_command([*bench, "1", "--any-engine"]) == 0
    assert "this network was made for onnxruntime at 2 images; on onnxruntime at 1 image" in capsys.readouterr().out
    assert fdjax_command(["export", "--no-time", "--frozen", str(out), "--out", str(tmp_path / "n.onnx")]) == 0
    capsys.readouterr()
    export = ["export", "--no-time", "--frozen", str(out), "--out", str(tmp_path / "n.stablehlo")]
    assert "not for xla: use it there, freeze it anew with --choose time --engine xla" in refused(capsys, *export)
    assert not (tmp_path / "n.stablehlo").exists()
    assert fdjax_command([*export, "--any-engine"]) == 0
    assert "made for onnxruntime at 2 images; on xla others" in capsys.readouterr().out
    (out / ONNX).write_bytes(b"")
    with pytest.raises(UserError, match=f"damaged: {ONNX}"):
        load(out)


def test_a_network_that_is_slower_is_said(tied, monkeypatch, tmp_path, capsys) -> None:
    words = slower_words(SLOWER)
    assert words is not None and len(words.splitlines()) == 1
    assert "takes 1.25x of the dense network's time (8 images)" in words
    assert "fdjax freeze --choose time --engine onnxruntime --engine-batch 8" in words
    assert slower_words({**SLOWER, "ratio": 1.01}) is None and slower_words({**SLOWER, "ratio": None}) is None
    graph, frozen = tied
    save(tmp_path / "frozen", graph, frozen, {"time": {**SLOWER, "engine": "xla"}})
    command = ["export", "--frozen", str(tmp_path / "frozen"), "--out", str(tmp_path / "network.stablehlo")]
    assert fdjax_command(command) == 0
    assert "on xla this network takes 1.25x" in capsys.readouterr().out


@needs_onnx
def test_where_no_time_is_known_an_export_measures(tied, monkeypatch, tmp_path, capsys) -> None:
    graph, frozen = tied
    monkeypatch.setattr(bench, "speed_on", lambda engine, *_: {**SLOWER, "engine": engine, "batch": 1})
    save(tmp_path / "frozen", graph, frozen, {"macs": {"ratio": 0.5}})
    command = ["export", "--frozen", str(tmp_path / "frozen"), "--out", str(tmp_path / "network.onnx")]
    assert fdjax_command(command) == 0
    assert "on onnxruntime this network takes 1.25x of the dense network's time (1 image)" in capsys.readouterr().out
    assert fdjax_command([*command, "--no-time"]) == 0
    assert "the dense network's time" not in capsys.readouterr().out


def test_an_artifact_for_another_engine_or_batch_is_refused() -> None:
    manifest = {"choice": {"by": "time", "engine": "openvino", "batch": 8}}
    assert check_made_for(manifest, ["openvino"], [1, 8]) == check_made_for(manifest, ["onnxruntime", "openvino"]) == []
    estimated = {"choice": {"by": "estimate", "engine": None, "target": "tpu:v5e", "batch": 8}}
    for other in ({}, {"choice": {"by": "macs", "engine": None, "batch": None}}, estimated):
        assert check_made_for(other, ["xla"], [1]) == []
    for engines, batches, here in (
        (["xla"], [1], "xla at 1 image"),
        (["openvino"], [1, 2], "openvino at 1 and 2 images"),
    ):
        with pytest.raises(UserError) as stop:
            check_made_for(manifest, engines, batches)
        assert f"made for openvino at 8 images, not for {here}: " in str(stop.value) and "--any-engine" in str(
            stop.value
        )
        assert f"--choose time --engine {engines[0]} --engine-batch 1" in str(stop.value)
        (words,) = check_made_for(manifest, engines, batches, anyway=True)
        assert f"made for openvino at 8 images; on {here} others" in words


def test_times_of_engines_are_kept_apart(tied, tmp_path, fast_clock) -> None:
    _, frozen = tied
    parts = {"bands": choice.layers_of(frozen)["block01"]}
    engines = [name for name in ENGINES if is_there(name) and name != "native"]
    for engine in engines:
        assert Stopwatch(1, tmp_path, engine).measure("block01", parts) == {"bands": 1.0}
        Stopwatch(1, tmp_path, engine).measure("block01", parts)
    assert len([*tmp_path.iterdir()]) == len(engines)


def test_partial_counts_of_a_program(tied) -> None:
    graph, frozen = tied
    network, _ = make(**TIED)
    whole = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    assert partial_counts(whole.program) == 0 < partial_counts(frozen.program)


# What is refused


@pytest.fixture
def nothing_installed(monkeypatch) -> None:
    found = importlib.util.find_spec
    gone = ("onnx", "onnxruntime", "openvino")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else found(name, *a))


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        fdjax_command(list(arguments))
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(said.splitlines()) == 1
    return said


def test_an_engine_that_is_not_there_is_one_line(nothing_installed, monkeypatch, tmp_path, capsys) -> None:
    out = str(tmp_path / "out")
    command = ["freeze", "--checkpoint", "nowhere", "--out", out, "--choose", "time", "--engine"]
    said = refused(capsys, *command, "openvino")
    assert "the engine openvino needs what is not installed: pip install onnx openvino" in said
    assert "invalid choice" in refused(capsys, *command, "tvm")
    assert "--engine-batch must be at least 1" in refused(capsys, *command, "xla", "--engine-batch", "0")
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert "needs a C++17 compiler" in refused(capsys, *command, "native")
    assert not Path(out).exists()
    with pytest.raises(UserError, match="there is no engine 'tvm'; give some of xla, native, onnxruntime, openvino"):
        find_engine("tvm")
    assert native_compile.COMPILERS and not is_there("native")


def test_a_run_for_an_engine_that_is_not_there_does_not_begin(nothing_installed, tmp_path) -> None:
    config = dataclasses.replace(CONFIG, learn=dataclasses.replace(CONFIG.learn, engine="onnxruntime"))
    with pytest.raises(UserError, match="pip install onnx onnxruntime"):
        train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_saved_configs_have_the_batch_by_its_old_name() -> None:
    fields = CONFIG.to_dict()
    fields["learn"]["gate_batch"] = fields["learn"].pop("engine_batch")
    assert Config.from_dict(fields) == CONFIG
