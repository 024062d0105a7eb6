"""Octave networks as a user meets them: settings that are refused, commands about masks, a run to the end."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fdjax.checkpoints.imported import save_trained
from fdjax.commands.main import fdjax_command
from fdjax.config import Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig
from fdjax.data import describe_source
from fdjax.errors import UserError
from fdjax.importers.names import layers_of
from fdjax.training.build import build_network
from fdjax.training.restore import Past
from fdjax.training.run import train
from fdjax.zoo import FCMASK, OctaveMobileNet
from tests.frozen_networks import random_variables


@pytest.mark.parametrize("name", ["mobilenetv1", "resnet20", "resnet50", "resnext29"])
def test_octave_is_for_linear_bottlenecks(name: str) -> None:
    with pytest.raises(UserError, match=r"above 0 only for a mobilenetv2 or efficientnet_lite0, got 0\.5"):
        ModelConfig(name=name, octave=0.5)
    assert ModelConfig(name=name, octave=0.0).octave == 0


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=rf"ModelConfig.octave must be a share from 0 to below 1.*got {share}"):
        ModelConfig(octave=share)


def test_octave_maps_are_all_or_wide() -> None:
    with pytest.raises(UserError, match="octave_maps"):
        ModelConfig(octave=0.5, octave_maps="narrow")  # type: ignore[arg-type]


@pytest.mark.parametrize(("share", "pixels"), [(0.001, 28), (0.5, 10)])
def test_a_share_that_splits_no_map_is_refused(share: float, pixels: int) -> None:
    """Of a few channels a thousandth is none; 10x10 images have maps of 5 and 3 pixels."""
    config = Config(model=ModelConfig(name="mobilenetv2_small", octave=share, width=0.35))
    with pytest.raises(UserError, match=f"octave {share:g} leaves no low channel in mobilenetv2_small at {pixels}x"):
        build_network(config, (pixels, pixels, 1), 10)


def test_mask_settings_bear_on_nothing() -> None:
    """Blocks that fit no map, and tying: a config made for masks is taken as it is."""
    model = ModelConfig(name="mobilenetv2_small", octave=0.25)
    learn = LearnConfig(block=16, block_by_map=((3, 2),), tied=True)
    _, graph = build_network(Config(model=model, learn=learn), (28, 28, 1), 10)
    assert graph.to_dict() == build_network(Config(model=model), (28, 28, 1), 10)[1].to_dict()
    assert graph.name == "mobilenetv2_small_octave0.25" and not graph.blocks


def test_no_weights_are_imported_into_it() -> None:
    with pytest.raises(UserError, match=r"no source has weights of a network with model\.octave"):
        layers_of(OctaveMobileNet("mobilenetv2"), "torchvision")


CONFIG = Config(
    phases=("pretrain",),
    data=DataConfig(batch_size=8, train_limit=64),
    model=ModelConfig(name="mobilenetv2_small", width=0.5, octave=0.25),
    pretrain=WeightPhaseConfig(steps=2),
    learn=LearnConfig(block=2, block_by_map=((7, 7),)),
)
NO_MASKS = "has no layers that can have masks"


@pytest.mark.parametrize("model", [CONFIG.model, ModelConfig(name="resnet20")])
@pytest.mark.parametrize("learn", [CONFIG.learn, LearnConfig(block=2, target_macs=None, lambda_=0.1)])
@pytest.mark.parametrize("phase", ["learn", "alternate"])
def test_phases_that_learn_masks_are_refused_before_anything_is_written(tmp_path, model, learn, phase) -> None:
    config = dataclasses.replace(CONFIG, model=model, learn=learn, phases=("pretrain", phase))
    with pytest.raises(UserError, match=NO_MASKS):
        train(config, str(tmp_path / "run"))
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """With random weights, as a run that has pretrained leaves it."""
    folder = tmp_path_factory.mktemp("octave")
    shape, classes = describe_source(CONFIG.data.name)
    network, graph = build_network(CONFIG, shape, len(classes))
    graph = dataclasses.replace(graph, input_mean=(73.0,), input_std=(90.0,), class_names=classes)
    save_trained(folder, CONFIG, graph, {**random_variables(network, graph, 0), FCMASK: {}}, Past(dense_top1=0.5))
    return folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("profile", "--methods", "channel", "--ratios", "0.5"), NO_MASKS),
        (("prune", "--method", "channel", "--target-macs", "0.5", "--out", "new"), NO_MASKS),
        (("prune", "--method", "l1", "--target-macs", "0.5", "--out", "new"), "octave0.25 has none"),
        (("blocks",), NO_MASKS),
    ],
)
def test_commands_about_masks_are_refused_in_one_line(
    checkpoint, tmp_path, capsys, monkeypatch, command, message
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        fdjax_command([*command, "--checkpoint", str(checkpoint)])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(said) == 1 and message in said[0]
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_run_from_training_to_a_frozen_network(tmp_path, quick_runs) -> None:
    run, frozen, report = (str(tmp_path / name) for name in ("run", "frozen", "report.json"))
    train(CONFIG, run)
    # The same run, longer: it goes on.
    summary = train(dataclasses.replace(CONFIG, pretrain=WeightPhaseConfig(steps=4)), run)
    assert [phase["steps"] for phase in summary["phases"]] == [4] and summary["top1"] == summary["dense_top1"]
    counted = build_network(CONFIG, (28, 28, 1), 10)[1].counted_layers
    assert summary["macs"]["total"] == summary["macs"]["dense"] == sum(layer.dense_macs for layer in counted.values())
    assert [layer["name"] for layer in summary["layers"]] == [*counted]
    assert fdjax_command(["freeze", "--no-time", "--checkpoint", run, "--out", frozen, "--json", report]) == 0
    found = json.loads(Path(report).read_text())["accuracy"]
    assert found["top1"] == found["masked"]["top1"] and found["masked"]["relative_error"] < 1e-4
    table, page = str(tmp_path / "table"), str(tmp_path / "page.html")
    assert fdjax_command(["bench", "--frozen", frozen, "--layers", "--json", report]) == 0
    layers = json.loads(Path(report).read_text())["layers"]["1"]
    assert {*(f"block{index:02d}" for index in range(4)), "head"} <= {layer["name"] for layer in layers}
    assert all(layer["frozen_ms"] > 0 and layer["macs"] == layer["dense_macs"] for layer in layers)
    assert fdjax_command(["results", "--workdir", run, "--out", table]) == 0
    assert "mobilenetv2_small at width 0.5, octave 0.25" in (Path(table) / "table.md").read_text()
    assert fdjax_command(["report", "--workdir", run, "--out", page]) == 0
