"""`fdjax import`: what it writes is a checkpoint like any other, and nothing is written where something is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: it writes the files that are read here")

from fdjax.checkpoint import find_checkpoint  # noqa: E402
from fdjax.commands.evaluate import eval_command  # noqa: E402
from fdjax.commands.import_weights import ImportArguments  # noqa: E402
from fdjax.commands.main import fdjax_command  # noqa: E402
from fdjax.commands.train import train_command  # noqa: E402
from fdjax.data import Dataset, load_dataset  # noqa: E402
from fdjax.errors import UserError  # noqa: E402
from fdjax.frozen import load  # noqa: E402
from fdjax.importers import FORMATS  # noqa: E402
from fdjax.training.restore import check_data, restore  # noqa: E402
from tests.imported_networks import relative_error, torch_logits  # noqa: E402
from tests.torch_networks import randomise, small_mobilenetv2  # noqa: E402

CONFIG = str(Path(__file__).parent / "tiny_run.py")
MEAN, STD = 73.0, 90.0
SCALING = ("--input-mean", str(MEAN), "--input-std", str(STD))


def arguments(weights: Path, out: Path, *more: str) -> list[str]:
    given = ["--config", CONFIG, "--format", "torchvision", "--weights", str(weights), "--out", str(out)]
    return ["import", *given, "--model.width", "0.35", *SCALING, *more]


@pytest.fixture(scope="module")
def module() -> torch.nn.Module:
    return randomise(small_mobilenetv2(), 4)


@pytest.fixture(scope="module")
def weights(module, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(module.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert fdjax_command(arguments(weights, out, "--json", str(out.parent / "report.json"))) == 0
    return out


@pytest.fixture(scope="module")
def expected(module) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The test images, torch's logits of them, and their labels."""
    data = load_dataset("fashion_mnist_subset")
    images = np.asarray(data.test_images)
    return images, torch_logits(module, (images.astype(np.float32) - MEAN) / STD), data.test_labels


@pytest.fixture(scope="module")
def torch_top1(expected) -> float:
    _, logits, labels = expected
    return float((logits.argmax(axis=1) == labels).mean())


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; returns what it said."""

    def run(command, given: list[str]) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command(given)
        assert stop.value.code == 2
        return capsys.readouterr().err

    return run


# What is written


def test_the_report_says_what_was_done(checkpoint, weights, module) -> None:
    report = json.loads((checkpoint.parent / "report.json").read_text())
    assert report["format"] == "torchvision" and report["weights"] == weights.name
    assert report["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (report["padding"], report["batch_norm_epsilon"]) == ("torch", 1e-5)
    assert (report["input_mean"], report["input_std"]) == ([MEAN], [STD])
    assert (report["eval_crop"], report["interpolation"]) == (0.875, "bilinear")
    assert report["num_parameters"] == sum(p.numel() for p in module.parameters())
    assert report["class_names"][-1] == "Ankle boot"
    origin = json.loads((checkpoint / "import.json").read_text())
    assert origin.items() <= report.items()


def test_what_is_printed_tells_the_conventions_and_how_to_go_on(weights, tmp_path, capsys) -> None:
    fdjax_command(arguments(weights, tmp_path / "out"))
    said = capsys.readouterr().out
    for text in ("padding torch", "epsilon 1e-05", "mean 73", "std 90", "bilinear", f"--init {tmp_path / 'out'}"):
        assert text in said
    assert "--model.padding torch --model.batch-norm-epsilon 1e-05" in said


def test_it_is_a_checkpoint_that_has_pretrained(checkpoint) -> None:
    restored = restore(*find_checkpoint(str(checkpoint)))
    assert restored.finished_phases() == ["pretrain"] and restored.hard is None
    assert (restored.config.model.padding, restored.config.model.width) == ("torch", 0.35)
    assert (restored.config.model.padding, restored.config.model.batch_norm_epsilon) == ("torch", 1e-5)
    assert (restored.graph.input_mean, restored.graph.input_std) == ((MEAN,), (STD,))
    assert restored.done.imported["format"] == "torchvision"


def test_eval_finds_the_accuracy_that_torch_has(checkpoint, torch_top1, tmp_path) -> None:
    assert eval_command(["--checkpoint", str(checkpoint), "--json", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["num_examples"] == 2000
    # Rounding may turn over a class or two.
    assert found["top1"] == pytest.approx(torch_top1, abs=0.001)
    assert found["macs"]["ratio"] == 1 and found["dense_top1"] is None


def test_it_freezes_as_it_is_and_says_what_torch_says(checkpoint, expected, tmp_path) -> None:
    images, logits, _ = expected
    assert (
        fdjax_command(["freeze", "--no-time", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "frozen")]) == 0
    )
    frozen = load(str(tmp_path / "frozen"))
    assert frozen.manifest["macs"]["ratio"] == 1
    assert relative_error(np.asarray(frozen.predict(images[:20])), logits[:20]) < 1e-4


def test_a_run_prunes_it_from_there(checkpoint, expected, refused, tmp_path, quick_runs) -> None:
    run = ["--config", CONFIG, "--workdir", str(tmp_path / "run"), "--init", str(checkpoint), "--model.width", "0.35"]
    phases = ["--phases", "learn", "--learn.steps", "1"]
    said = refused(train_command, [*run, *phases])
    assert "--model.padding torch --model.batch-norm-epsilon 1e-05" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert train_command([*run, *phases, "--model.padding", "torch"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert [phase["name"] for phase in summary["phases"]] == ["learn"]
    # What torch's network has on the same images.
    _, logits, labels = expected
    right = logits[:quick_runs].argmax(axis=1) == labels[:quick_runs]
    assert summary["num_examples"] == quick_runs and summary["dense_top1"] == pytest.approx(right.mean(), abs=0.001)
    restored = restore(*find_checkpoint(str(tmp_path / "run")))
    assert restored.finished_phases() == ["pretrain", "learn"]
    assert (restored.graph.input_mean, restored.graph.input_std) == ((MEAN,), (STD,))


def test_the_command_has_the_formats_that_there_are() -> None:
    hints = get_type_hints(ImportArguments, localns={"np": np}, include_extras=False)
    assert get_args(hints["format"]) == (*FORMATS, "onnx")


# Class names


def without_data(tmp_path: Path, *more: str) -> list[str]:
    absent = ["--data.name", "folder", "--data.path", str(tmp_path / "absent"), "--data.image-size", "28"]
    return [*absent, "--data.grayscale", *more]


@pytest.mark.parametrize("named", [True, False])
def test_classes_are_named_by_a_file_or_not_at_all(weights, tmp_path, named: bool) -> None:
    names = tuple(f"kind {number}" for number in range(10))
    (tmp_path / "classes.txt").write_text("\n".join(names) + "\n")
    more = ["--classes", str(tmp_path / "classes.txt")] if named else []
    given = arguments(weights, tmp_path / "out", *without_data(tmp_path, *more))
    assert fdjax_command(given) == 0
    graph = restore(*find_checkpoint(str(tmp_path / "out"))).graph
    assert graph.num_classes == 10 and graph.input_shape == (28, 28, 1)
    assert graph.class_names == (names if named else ())

    def data(classes: tuple[str, ...], size: int = 28) -> Dataset:
        images = np.zeros((1, size, size, 1), np.uint8)
        return Dataset("folder", images, np.zeros(1, np.int32), images, np.zeros(1, np.int32), classes)

    check_data(graph, data(names))
    others = (*names[:9], "other")
    if named:
        with pytest.raises(UserError, match="class 9 is 'kind 9' in the network and 'other' in the data"):
            check_data(graph, data(others))
    else:
        check_data(graph, data(others))
    with pytest.raises(UserError, match="classes: 10; the data set has classes: 9"):
        check_data(graph, data(names[:9]))
    with pytest.raises(UserError, match="28x28x1; the data set has images of 30x30x1"):
        check_data(graph, data(names, 30))


# What is refused


def changed(module, file: Path, change) -> Path:
    state = dict(module.state_dict())
    change(state)
    torch.save(state, file)
    return file


def test_all_that_does_not_fit_is_named_in_one_message(module, refused, tmp_path) -> None:
    def change(state) -> None:
        del state["features.0.1.running_var"], state["classifier.1.bias"]
        state["extra.weight"], state["extra.bias"] = torch.ones(3, 2), torch.ones(3)
        state["features.5.0.weight"] = state["features.5.0.weight"][:, :4]
        state["features.1.conv.0.0.weight"] = torch.ones(7)
        state["features.0.1.bias"] = torch.full_like(state["features.0.1.bias"], float("nan"))
        state["features.0.1.weight"] = state["features.0.1.weight"].to(torch.int32)

    file = changed(module, tmp_path / "w.pth", change)
    said = refused(fdjax_command, arguments(file, tmp_path / "out"))
    assert said.count("error:") == 1
    for text in (
        "mobilenetv2_small (width 0.35, 10 classes, 1 input channels)",
        "2 missing, 2 unmapped, 2 misshapen, 2 no finite floats",
        "missing: features.0.1.running_var, classifier.1.bias\n",
        "unmapped: extra.weight [3, 2], extra.bias [3]\n",
        "features.5.0.weight is [256, 4, 1, 1], wanted [256, 24, 1, 1]",
        "features.1.conv.0.0.weight is [7], wanted [32, 8, 1, 1]",
        "features.0.1.bias (float32)",
        "features.0.1.weight (int32)",
    ):
        assert text in said
    assert not (tmp_path / "out").exists()


def test_another_width_is_called_that(refused, tmp_path) -> None:
    module = small_mobilenetv2(width=1.0)
    torch.save(module.state_dict(), tmp_path / "w.pth")
    said = refused(fdjax_command, arguments(tmp_path / "w.pth", tmp_path / "out"))
    assert "probably of another width: the config's model.width is 0.35" in said
    misshapen = [line for line in said.splitlines() if line.startswith("  misshapen")]
    # The classifier and the head's batch norm do not depend on the width.
    same = [name for name in module.state_dict() if name.startswith(("features.5.1", "classifier"))]
    counters = [name for name in module.state_dict() if name.endswith("num_batches_tracked")]
    assert len(misshapen) == 1
    assert misshapen[0].count(" wanted ") == len({*module.state_dict()} - {*same, *counters})
    assert not (tmp_path / "out").exists()


def test_another_number_of_classes_is_called_that(refused, tmp_path) -> None:
    torch.save(small_mobilenetv2(classes=12).state_dict(), tmp_path / "w.pth")
    said = refused(fdjax_command, arguments(tmp_path / "w.pth", tmp_path / "out"))
    assert "Only the classifier differs" in said and "classifier.1.weight is [12, 256], wanted [10, 256]" in said


def test_names_of_another_format_are_recognised(weights, refused, tmp_path) -> None:
    given = arguments(weights, tmp_path / "out")
    given[given.index("torchvision")] = "timm"
    said = refused(fdjax_command, given)
    assert "The names are those of --format torchvision" in said and "missing: conv_stem.weight" in said


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--format", "efficientnet_lite"], "has no mobilenetv2_small; its formats are torchvision, timm, keras"),
        (["--input-mean", "1", "2", "3"], "--input-mean has 3 numbers, and the config's images have 1 channel:"),
        (["--input-std", "0"], "--input-std must be numbers above 0, got 0.0"),
        (["--input-std", "nan"], "--input-std must be numbers above 0, got nan"),
        (["--input-mean", "inf"], "--input-mean must be finite numbers, got inf"),
        (["--epsilon", "0"], "batch_norm_epsilon must be above 0"),
        (["--weights", "none.pth"], "no weights file 'none.pth'"),
        (["--classes", "none.txt"], "--classes none.txt cannot be read"),
        (["--data.name", "no_such_set"], "no_such_set"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(weights, refused, tmp_path, more, expected) -> None:
    said = refused(fdjax_command, arguments(weights, tmp_path / "out", *more))
    assert expected in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [("one\n", "two or more different names"), ("a\nb\na\n", "two or more different names"), ("a\nb\n", "leave --cl")],
)
def test_wrong_class_names_are_refused(weights, refused, tmp_path, content: str, expected: str) -> None:
    (tmp_path / "classes.txt").write_text(content)
    said = refused(fdjax_command, arguments(weights, tmp_path / "out", "--classes", str(tmp_path / "classes.txt")))
    assert expected in said and not (tmp_path / "out").exists()


def test_images_of_unknown_size_are_refused(weights, refused, tmp_path) -> None:
    absent = ["--data.name", "folder", "--data.path", str(tmp_path / "absent")]
    assert "--data.image-size" in refused(fdjax_command, arguments(weights, tmp_path / "out", *absent))


def test_grey_images_need_their_own_scaling(weights, refused, tmp_path) -> None:
    given = [argument for argument in arguments(weights, tmp_path / "out") if argument not in SCALING]
    assert "give --input-mean with one number" in refused(fdjax_command, given)


def test_a_directory_with_something_in_it_is_left_alone(weights, refused, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert "is not empty" in refused(fdjax_command, arguments(weights, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(fdjax_command, arguments(weights, tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_pickle_that_wants_to_execute_code_is_no_import(refused, tmp_path) -> None:
    class Attack:
        def __reduce__(self):
            return eval, (f"open({str(tmp_path / 'executed')!r}, 'w').close()",)

    torch.save({"features.0.0.weight": Attack()}, tmp_path / "w.pth")
    said = refused(fdjax_command, arguments(tmp_path / "w.pth", tmp_path / "out"))
    assert "wants to execute code" in said and len(said.splitlines()) == 1
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()
