"""train.py on a network that a user's function makes: a whole run, resumed, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import fdjax_command
from fdjax.commands.train import train_command
from fdjax.config import CheckpointConfig, Config, DataConfig, LearnConfig, ModelConfig, WeightPhaseConfig
from fdjax.errors import UserError
from fdjax.frozen import load
from fdjax.training.build import build_network, collection_of
from fdjax.training.own_network import OwnNetwork
from fdjax.training.restore import Restored, restore
from fdjax.training.run import train
from fdjax.training.state import init_variables
from fdjax.zoo import FCMASK

ROOT = Path(__file__).parents[1]
STEPS = 4
# With batch norm, dropout and a residual unit, on stem maps of 14x14.
SOURCE = """
import flax.linen as nn

class Unit(nn.Module):
    wide: int

    @nn.compact
    def __call__(self, x, train):
        norm = lambda name: nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
        y = nn.relu(norm("norm1")(nn.Conv(self.wide, (1, 1), use_bias=False, name="expand")(x)))
        y = nn.relu(nn.Conv(self.wide, (3, 3), feature_group_count=self.wide, name="depthwise")(y))
        y = norm("norm2")(nn.Conv(x.shape[-1], (1, 1), use_bias=False, name="project")(y))
        return x + nn.Dropout(0.2, deterministic=not train)(y)

class Net(nn.Module):
    num_classes: int
    width: float

    @nn.compact
    def __call__(self, images, train):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2, name="stem")(images))
        x = Unit(round(12 * self.width), name="unit")(x, train)
        return nn.Dense(self.num_classes, name="top")(x.mean(axis=(1, 2)))

def small(num_classes, width=1.0):
    return Net(num_classes, width)
"""


def config_of(**model) -> Config:
    weights = WeightPhaseConfig(steps=STEPS, learning_rate=0.02)
    return Config(
        phases=("pretrain", "learn", "refine"),
        data=DataConfig(batch_size=16, train_limit=64, crop_padding=2),
        model=ModelConfig(**{"factory": "own_nets:small", "arguments": (("width", 2),), **model}),
        pretrain=weights,
        learn=LearnConfig(steps=STEPS, block=2, tied=True, levels="0,1,N", target_macs=0.8),
        refine=weights,
        checkpoint=CheckpointConfig(every_epochs=0.5, keep=100, time=False),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with the module own_nets."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_nets.py").write_text(SOURCE)
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> Path:
    """The workdir of a finished run."""
    workdir, before, path = tmp_path_factory.mktemp("runs") / "finished", os.getcwd(), list(sys.path)
    os.chdir(folder)
    try:
        train(config_of(), str(workdir))
    finally:
        os.chdir(before)
        sys.path[:] = path
    return workdir


def at(workdir: Path, step: int) -> Restored:
    return restore(Checkpoints(workdir / CHECKPOINT_FOLDER), step)


def same(left, right) -> bool:
    """Bit for bit."""
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def test_a_run_prunes_it_and_records_the_factory(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == ["pretrain", "learn", "refine"]
    assert summary["macs"]["ratio"] < 0.85
    model = json.loads((finished / "config.json").read_text())["model"]
    assert (model["factory"], model["arguments"]) == ("own_nets:small", [["width", 2]])
    restored = at(finished, 3 * STEPS)
    assert restored.graph.layers["unit/expand"].out_channels == 24
    assert set(restored.graph.masks) == {"stem/channels", "unit/expand/channels"}


def test_masks_move_in_learn_only_and_weights_in_the_other_phases(finished):
    pretrained, learned, refined = (at(finished, phase * STEPS).state for phase in (1, 2, 3))
    assert same(pretrained.params, learned.params) and same(pretrained.batch_stats, learned.batch_stats)
    assert not same(pretrained.fcmask, learned.fcmask)
    assert not same(learned.params, refined.params) and not same(learned.batch_stats, refined.batch_stats)


@pytest.mark.slow
def test_interrupted_in_every_phase_it_ends_bit_for_bit_the_same(finished, tmp_path):
    for step in (2, STEPS + 2, 2 * STEPS + 2):
        workdir = tmp_path / str(step)
        stopped = Checkpoints(workdir / CHECKPOINT_FOLDER)
        source = at(finished, step)
        meta = Checkpoints(finished / CHECKPOINT_FOLDER).meta(step)
        stopped.save(step, jax.device_get(source.state), {k: v for k, v in meta.items() if k != "score"})
        (workdir / "config.json").write_text((finished / "config.json").read_text())
        train(config_of(), str(workdir))
        assert same(at(workdir, 3 * STEPS).state, at(finished, 3 * STEPS).state)


def test_the_seed_draws_dropout(finished):
    """Two steps from one state, with two keys, end in other weights: dropout is on, and follows the key."""
    from fdjax.data import load_dataset
    from fdjax.training.optimizers import optimizers_for
    from fdjax.training.steps import make_prepare, make_weight_step

    start = at(finished, 2)
    data = load_dataset("fashion_mnist_subset")
    prepare = make_prepare(start.graph, 0, False)
    network = dataclasses.replace(start.network, mode="off")
    step = jax.jit(make_weight_step(network, optimizers_for(start.config, start.phase)[0], prepare))
    batch = data.train_images[:8], data.train_labels[:8]
    one, again = (step(start.state, *batch)[0].params for _ in range(2))
    other = step(start.state.replace(key=start.state.key + 1), *batch)[0].params
    assert same(one, again) and not same(one, other)


def test_init_takes_its_weights(finished, tmp_path):
    config = dataclasses.replace(config_of(), phases=("refine",))
    summary = train(config, str(tmp_path / "again"), init=str(finished))
    assert [phase["name"] for phase in summary["phases"]] == ["refine"]
    with pytest.raises(UserError, match="does not fit"):
        train(config_of(arguments=(("width", 3),)), str(tmp_path / "wider"), init=str(finished))


def test_all_commands_take_its_checkpoint(finished, tmp_path, capsys):
    figures = tmp_path / "figures.json"
    assert eval_command(["--checkpoint", str(finished), "--json", str(figures)]) == 0
    evaluated, summary = json.loads(figures.read_text()), json.loads((finished / "summary.json").read_text())
    assert (evaluated["top1"], evaluated["macs"]) == (summary["top1"], summary["macs"])
    frozen = str(tmp_path / "frozen")
    assert (
        fdjax_command(["freeze", "--no-time", "--checkpoint", str(finished), "--out", frozen, "--json", str(figures)])
        == 0
    )
    accuracy = json.loads(figures.read_text())["accuracy"]
    assert accuracy["masked"]["same_top1"] > 0.999 and accuracy["masked"]["relative_error"] < 1e-4
    assert load(frozen)(np.zeros((2, 28, 28, 1), np.float32)).shape == (2, 10)
    assert fdjax_command(["export", "--no-time", "--frozen", frozen, "--out", str(tmp_path / "net.onnx")]) == 0
    assert fdjax_command(["macs", "--checkpoint", str(finished)]) == 0
    assert "unit/expand" in capsys.readouterr().out
    assert fdjax_command(["report", "--workdir", str(finished), "--out", str(tmp_path / "run.html")]) == 0
    assert "own_nets:small(width=2)" in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize("sides", ["both", "input"])
def test_soft_hard_and_moving_masks_are_one_where_they_should_be(sides):
    """Masks all 1 change nothing; hard masks built in are those of the variables."""
    config = config_of()
    learn = dataclasses.replace(config.learn, tied=False, sides=sides, levels="all")
    network, graph = build_network(dataclasses.replace(config, learn=learn), (28, 28, 1), 10)
    assert isinstance(network, OwnNetwork)
    variables = init_variables(network, (28, 28, 1), 0)
    x = jax.random.normal(jax.random.key(1), (4, 28, 28, 1))
    dense = dataclasses.replace(network, mode="off").apply(variables, x)
    np.testing.assert_allclose(network.apply(variables, x), dense, rtol=0, atol=1e-5)
    rng = np.random.default_rng(0)
    counts = {path: rng.integers(0, n + 1, channels) for path, (channels, n) in graph.mask_sizes.items()}
    hard = {**variables, FCMASK: collection_of(graph, counts)}
    moving = dataclasses.replace(network, mode="hard").apply(hard, x)
    assert float(np.abs(moving - dense).max()) > 1e-3
    np.testing.assert_allclose(network.hardened(counts).apply(variables, x), moving, rtol=0, atol=1e-5)


# -- what is refused


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs train.py with a factory that must be refused; returns what it said."""

    def run(factory: str, *arguments: str) -> str:
        workdir, file = tmp_path / "refused", str(ROOT / "configs" / "quickstart.py")
        command = ["--config", file, "--workdir", str(workdir), "--model.factory", factory, *arguments]
        with pytest.raises(SystemExit) as stop:
            train_command(command)
        said = capsys.readouterr()
        assert stop.value.code == 2 and not workdir.exists() and "Traceback" not in said.err
        return " ".join(said.err.replace("│", " ").split())

    return run


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_package_anywhere", r"there is no module 'no_such_package_anywhere'|importing .* fails"),
        ("def small(:", r"fails: SyntaxError: .*\.py, line 1\)"),
        ("x = 1 / 0\ndef small(): pass", r"fails: ZeroDivisionError: division by zero \(.*\.py, line 1\)"),
        ("def smal(): pass", r"has no 'small' \(did you mean 'smal'\?\)"),
        ("small = 3", "small is not a function but int"),
        ("def small(depth): pass", r"takes \(depth\), and is called with \(\): missing a required argument: 'depth'"),
        ("def small(): raise ValueError('no such depth')", r"call fails: ValueError: no such depth \(.*line 1\)"),
        ("def small(): raise SystemExit(4)", r"call fails: SystemExit: 4"),
        ("def small(): return 3", r"must return a Flax Linen module .* got builtins\.int"),
        ("from flax import nnx\ndef small(): return nnx.Linear(2, 3, rngs=nnx.Rngs(0))", r"other libraries.*Python"),
        ("NET\n    def __call__(self, images): return images", r"must take \(images, train\).* it takes \(images\)"),
        (
            "NET\n    @nn.compact\n    def __call__(self, images, train): return nn.Dense(7)(images.reshape(2, -1))",
            r"a logit for each of the 10 classes .* got float32\[2, 7\]",
        ),
        (
            "NET\n    @nn.compact\n    def __call__(self, images, train): return nn.Dense(10)(images.reshape(2, 32))",
            r"does not take images of 28x28x1 when it is initialised: .*\(.*line \d+\)",
        ),
        (
            "NET\n    @nn.compact\n    def __call__(self, images, train):\n"
            "        self.variable('cache', 'seen', lambda: 0)\n        return nn.Dense(10)(images.mean((1, 2)))",
            "has the collection cache; only params and batch_stats are trained and saved",
        ),
        (
            "NET\n    @nn.compact\n    def __call__(self, images, train):\n"
            "        return nn.Dense(10, name='top')(images.mean((1, 2)))",
            r"no layers that can have masks \(top: reads vectors\)",
        ),
    ],
)
def test_a_wrong_factory_is_refused(refused, folder, source, message, request):
    name = f"wrong{abs(hash(request.node.name))}"
    head = "import flax.linen as nn\ndef small(): return Net()\nclass Net(nn.Module):"
    (folder / f"{name}.py").write_text(source.replace("NET", head))
    assert re.search(message, said := refused(f"{name}:small")), said


def test_a_wrong_name_or_argument_is_refused(refused):
    assert "must be package.module:function" in refused("own_nets.small")
    assert "no module 'nowhere_at_all'" in refused("nowhere_at_all:small")
    unknown = refused("own_nets:small", "--model.arguments", "depth", "3")
    assert "takes (num_classes, width=1.0)" in unknown and "unexpected keyword argument 'depth'" in unknown
    misspelt = refused("own_nets:small", "--learn.exclude", "sten")
    assert "the rule 'sten' fits no layer that can have masks (learn.exclude); similar names are stem" in misspelt
    no_classifier = refused("own_nets:small", "--refine.body-rate", "0.1")
    assert "a rate for all layers but the one called 'classifier'" in no_classifier


def test_a_checkpoint_whose_factory_is_gone_or_has_changed_is_refused(finished, tmp_path):
    command = [sys.executable, str(ROOT / "eval.py"), "--checkpoint", str(finished)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    gone = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert gone.returncode == 2 and "Traceback" not in gone.stderr
    assert f"no module 'own_nets' in {tmp_path}" in gone.stderr and str(finished / CHECKPOINT_FOLDER) in gone.stderr
    (tmp_path / "own_nets.py").write_text(SOURCE.replace("12 * self.width", "16 * self.width"))
    changed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert changed.returncode == 2 and "Traceback" not in changed.stderr
    assert "is of another network than own_nets:small makes now: it holds float32[24]" in changed.stderr


def test_commands_for_the_zoo_alone_say_so(finished, tmp_path, capsys, folder):
    pretrained = tmp_path / "pretrained"
    train(dataclasses.replace(config_of(), phases=("pretrain",)), str(pretrained))
    prune = ["prune", "--target-macs", "0.5", "--out", str(tmp_path / "out"), "--method"]
    for command in (["blocks"], ["profile"], [*prune, "l1"], [*prune, "fpwt"]):
        with pytest.raises(SystemExit) as stop:
            fdjax_command([*command, "--checkpoint", str(pretrained)])
        assert stop.value.code == 2
        assert "is for the networks that --model.name names" in capsys.readouterr().err, command


@pytest.mark.slow
@pytest.mark.parametrize("network", ["own", "zoo"])
def test_a_run_leaves_whole_what_learn_exclude_names(network, tmp_path):
    """From the command line to the frozen network: the layer has no mask, and all of its channels are there."""
    own = ("--model.factory", "own_nets:small", "--model.arguments", "width", "2")
    layer, rule = ("stem", "st?m") if network == "own" else ("head", "head")
    steps = [f"--{phase}.steps={STEPS}" for phase in ("pretrain", "learn", "refine")]
    data = ("--data.train-limit", "64", "--data.batch-size", "16", "--checkpoint.no-time")
    command = ["--config", str(ROOT / "configs" / "quickstart.py"), "--workdir", str(tmp_path / "run"), *steps, *data]
    command += [*(own if network == "own" else ()), "--learn.exclude", rule, "--learn.target-macs", "0.6"]
    assert train_command(command) == 0
    restored = restore(Checkpoints(tmp_path / "run" / CHECKPOINT_FOLDER), 3 * STEPS)
    assert restored.graph.masks and not any(
        layer in (name for name, _ in m.sides) for m in restored.graph.masks.values()
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (row,) = (row for row in summary["layers"] if row["name"] == layer)
    assert summary["macs"]["ratio"] < 0.95 and row["kept_counts"] == {"input": None, "output": None}
    frozen = str(tmp_path / "frozen")
    assert fdjax_command(["freeze", "--no-time", "--checkpoint", str(tmp_path / "run"), "--out", frozen]) == 0
    assert load(frozen).network.layers[layer].out_channels == restored.graph.layers[layer].out_channels
