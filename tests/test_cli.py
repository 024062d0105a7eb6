"""The commands as a user meets them: bad input gives a short message, exit status 2, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import fdjax_command
from fdjax.commands.train import train_command

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
CIFAR10 = str(ROOT / "configs" / "cifar10_mobilenetv2.py")


def make_folder(root: Path, classes: int = 2, per_class: int = 3, size: int = 28) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in range(classes):
            folder = root / split / f"class{name}"
            folder.mkdir(parents=True)
            for index in range(per_class):
                Image.fromarray(rng.integers(0, 256, (size, size, 3), np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs train.py with arguments that must be refused; returns what it said."""

    def run(*arguments: str, config: str = QUICKSTART) -> str:
        workdir = tmp_path / "refused"
        with pytest.raises(SystemExit) as stop:
            train_command(["--config", config, "--workdir", str(workdir), *arguments])
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert not workdir.exists()
        assert "Traceback" not in said.err + said.out
        assert len(said.err.splitlines()) <= 10
        return " ".join(said.err.replace("│", " ").split())

    return run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--learn.target-mac", "0.5"], "--learn.target-macs"),
        (["--sed", "1"], "Unrecognized"),
        (["--seed", "one"], "'one'"),
        (["--learn.sides", "all"], "'both'"),
        (["--learn.target-macs", "0"], "above 0 and at most 1"),
        (["--learn.target-macs", "1.5"], "got 1.5"),
        (["--learn.target-macs", "half"], "half"),
        (["--learn.levels", "1,2"], "0,1,N"),
        (["--learn.block", "17"], "from 1 to 16"),
        (["--learn.block", "16"], "larger than the 14x14 map of layer block00/expand"),
        (["--learn.block-by-layer", "blok", "2"], "block00/expand"),
        (["--data.name", "fashion_mnist_subse"], "did you mean 'fashion_mnist_subset'"),
        (["--data.name", "folder"], "path"),
        (["--data.name", "folder", "--data.path", "/does/not/exist"], "/does/not/exist"),
        (["--data.validation", "1"], "below 1"),
        (["--data.train-limit", "0"], "at least 1"),
        (["--data.train-limit", "10001"], "fashion_mnist_subset has 10,000 training images"),
        (["--distill.weight", "1.5"], "from 0 to 1, got 1.5"),
        (["--distill.temperature", "0"], "above 0"),
        (["--data.batch-size", "20000"], "10000 training examples"),
        (["--phases", "learn", "refine"], "--init"),
        (["--phases", "learn", "pretrain"], "pretrain first"),
        (["--init", "/does/not/exist"], "/does/not/exist"),
        (["--learn.target-macs", "None"], "lambda"),
        (["--learn.target-macs", "0.002"], "every masked channel removed"),
        (["--learn.lambda", "0"], "above 0"),
        (["--learn.block-by-map", "15", "2"], "side 15"),
        (["--checkpoint.every-epochs", "inf"], "finite"),
        (["--checkpoint.keep", "1"], "must be from 2"),
        (["--pretrain.steps", "1000000000000"], "from 1 to 1,000,000,000"),
        (["--pretrain.epochs", "1e300"], "at most 1,000,000"),
        (["--pretrain.steps", "1000000000"], "at most 1,000,000,000 are counted"),
        (["--data.crop-padding", "100000"], "from 0 to 1,024 pixels"),
        (["--json", "/does/not/exist/file.json"], "directory that exists"),
        (["--json", "picture.png"], "ends in .json"),
        (["--profile", "-1"], "--profile must be 0 or more"),
        (["--connect-timeout", "-1"], "--connect-timeout must be 0 or more"),
        (["--devices", "0"], "--devices 0: this process has"),
        (["--compute.steps-per-dispatch", "0"], "at least 1"),
        (["--compute.data-on-device", "maybe"], "'auto'"),
        (["--model.precision", "float16"], "'bfloat16'"),
        (["--coordinator", "localhost"], "--num-processes N"),
        (["--coordinator", "localhost", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--num-processes", "2"], "--coordinator HOST:PORT"),
    ],
)
def test_wrong_flags_are_refused(refused, arguments, expected):
    assert expected in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "no config file"),
        ("from fdjax.config import Config\ndef get_config(): return Config(sede=1)", "sede"),
        ("from fdjax.config import Config\ndef get_config(): return Config(seed='1')", "seed must be int, got '1'"),
        ("from fdjax.config import *\ndef get_config(): return Config(learn=LearnConfig(target_macs=2))", "at most 1"),
        ("x = 1", "no get_config()"),
        ("def get_config(): return 3", "must return an fdjax.config.Config"),
        ("import sys\nsys.exit(3)", "SystemExit: 3"),
        ("this is no python", "SyntaxError"),
    ],
)
def test_wrong_config_files_are_refused(refused, tmp_path, text, expected):
    file = tmp_path / "config.py"
    if text is not None:
        file.write_text(text)
    assert expected in refused(config=str(file))


def test_a_folder_with_one_class_or_no_image_is_refused(refused, tmp_path):
    one = make_folder(tmp_path / "one", classes=1)
    assert "two classes" in refused("--data.name", "folder", "--data.path", str(one))
    empty = make_folder(tmp_path / "empty", per_class=0)
    assert "no images" in refused("--data.name", "folder", "--data.path", str(empty))
    (tmp_path / "bare").mkdir()
    assert "'train'" in refused("--data.name", "folder", "--data.path", str(tmp_path / "bare"))
    text = make_folder(tmp_path / "text")
    (text / "train" / "class0" / "0.png").write_text("no image")
    assert "0.png" in refused("--data.name", "folder", "--data.path", str(text), "--data.batch-size", "2")


def test_a_workdir_that_is_not_this_runs_is_left_alone(tmp_path, capsys):
    (tmp_path / "letters.txt").write_text("dear diary")
    with pytest.raises(SystemExit) as stop:
        train_command(["--config", QUICKSTART, "--workdir", str(tmp_path)])
    assert stop.value.code == 2
    assert "not empty and holds no run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        train_command(["--config", QUICKSTART, "--workdir", str(tmp_path / "other"), "--seed", "7"])
    assert stop.value.code == 2
    assert "holds another run" in capsys.readouterr().err
    assert (tmp_path / "other" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("flag", ["--config={file}", "--config {file}"])
@pytest.mark.parametrize(
    "command",
    [
        ["train"],
        ["macs"],
        ["import", "--format", "timm", "--weights", "w.pth"],
        ["data", "sheet"],
    ],
    ids=" ".join,
)
def test_every_command_reads_its_config_in_both_spellings(tmp_path, capsys, command, flag):
    (tmp_path / "config.py").write_text("raise ValueError('this very file')")
    given = [*command[1:], *flag.format(file=tmp_path / "config.py").split(), "--out", str(tmp_path / "out.png")]
    with pytest.raises(SystemExit) as stop:
        train_command(given) if command == ["train"] else fdjax_command([command[0], *given])
    assert stop.value.code == 2
    assert "ValueError: this very file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


@pytest.mark.parametrize("flags", [["--config="], ["--config", ""]])
def test_an_empty_config_path_is_not_the_default_config(capsys, flags):
    with pytest.raises(SystemExit) as stop:
        fdjax_command(["macs", *flags])
    assert stop.value.code == 2
    assert "no config file ''" in capsys.readouterr().err


def test_blocks_are_given_as_pairs_of_flags(capsys):
    pairs = ["--learn.block-by-map", "14", "7", "7", "1", "--learn.block-by-layer", "head", "7"]
    assert fdjax_command(["macs", "--config", QUICKSTART, *pairs]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert [rows[name][1] for name in ("block00/expand", "block03/expand", "head")] == ["7", "1", "7"]


def test_missing_config_and_workdir_are_said(capsys):
    for arguments, expected in ((["--workdir", "x"], "--config FILE"), (["--config", QUICKSTART], "workdir")):
        with pytest.raises(SystemExit) as stop:
            train_command(arguments)
        assert stop.value.code == 2
        assert expected in capsys.readouterr().err


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train_command(["--config", CIFAR10, "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for flag in ("--workdir", "--init", "--learn.target-macs", "--learn.lambda", "--pretrain.weight-decay", "--seed"):
        assert flag in said
    assert "4e-05" in said


@pytest.mark.parametrize("path", ["/does/not/exist", "file", "empty"])
def test_eval_refuses_what_is_no_checkpoint(tmp_path, capsys, path):
    if path == "file":
        path = __file__
    elif path == "empty":
        path = str(tmp_path)
    with pytest.raises(SystemExit) as stop:
        eval_command(["--checkpoint", path, "--json", str(tmp_path / "out.json")])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "checkpoint" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("config", "dense", "full"),
    [("cifar10_mobilenetv2", 89_012_224, 117_979_136), ("cifar100_mobilenetv2", 42_958_848, 53_673_984)],
)
def test_macs_of_the_papers_configs_to_the_digit(tmp_path, capsys, config, dense, full):
    report = tmp_path / "macs.json"
    config = str(ROOT / "configs" / f"{config}.py")
    assert fdjax_command(["macs", "--config", config, "--json", str(report)]) == 0
    written = json.loads(report.read_text())
    assert written["macs"]["dense"] == written["macs"]["total"] == dense
    assert written["macs"]["full_transforms"] == full
    assert sum(layer["dense"] for layer in written["layers"]) == dense
    assert f"{dense:,}" in capsys.readouterr().out


def test_macs_takes_overrides_and_refuses_both_or_neither_source(capsys):
    assert fdjax_command(["macs", "--config", CIFAR10, "--model.width", "0.35"]) == 0
    assert "89,012,224" not in capsys.readouterr().out
    for arguments in (["macs"], ["macs", "--config", CIFAR10, "--checkpoint", "x"], ["mac"], ["macs", "--width", "1"]):
        with pytest.raises(SystemExit) as stop:
            fdjax_command(arguments)
        assert stop.value.code == 2


def test_every_config_in_the_repository_loads_and_names_its_command():
    from fdjax.config import load_config

    for file in sorted((ROOT / "configs").glob("*.py")):
        assert load_config(str(file)).phases
        text = file.read_text()
        assert f"--config configs/{file.name}" in text or f"--config {file.stem} " in text
