"""Freezing a checkpoint, the artifact it writes, and what is refused: one line, exit status 2."""

from __future__ import annotations

import csv
import errno
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints.freeze import masked_logits
from fdjax.commands.evaluate import eval_command
from fdjax.commands.main import fdjax_command
from fdjax.data import load_dataset, load_image
from fdjax.errors import UserError
from fdjax.frozen import Stopwatch, choice, clock, load, release_slower, save
from fdjax.frozen.artifact import ARRAYS, CHECKSUM, FORMAT_VERSION, GRAPH, MANIFEST, file_sha256
from fdjax.frozen.clock import Times, interleaved
from fdjax.frozen.score import agreement, figures
from fdjax.reports.tables import frozen_table
from fdjax.training.network import graph_variables
from fdjax.training.restore import restore
from tests.frozen_checkpoints import write_checkpoint
from tests.frozen_networks import frozen_of, random_counts, random_variables
from tests.test_frozen import TIED, make

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run"), "refine", released=("head",))


@pytest.fixture(scope="module")
def artifact(checkpoint, tmp_path_factory) -> Path:
    """The checkpoint frozen by the command; tests do not change it."""
    out = tmp_path_factory.mktemp("artifacts") / "frozen"
    assert fdjax_command(["freeze", "--no-time", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copy(artifact, tmp_path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def refused(capsys):
    """Runs a command that must be refused; returns the one line it said."""

    def run(command, *arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            command(list(arguments))
        said = capsys.readouterr().err
        assert stop.value.code == 2 and len(said.splitlines()) == 1
        return said

    return run


def reseal(folder: Path) -> None:
    """Makes the manifest's checksum true again."""
    (folder / CHECKSUM).write_text(f"{file_sha256(folder / MANIFEST)}  {MANIFEST}\n")


def test_the_manifest_says_what_was_frozen(artifact) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert manifest["format_version"] == FORMAT_VERSION
    assert manifest["input"]["shape"] == [28, 28, 1] and manifest["input"]["mean"] == [73.0]
    assert manifest["class_names"][-1] == "Ankle boot"
    assert manifest["files"] == {name: file_sha256(artifact / name) for name in (ARRAYS, GRAPH)}
    assert sorted(path.name for path in artifact.iterdir()) == sorted([MANIFEST, ARRAYS, GRAPH, CHECKSUM])
    assert {unit["name"]: unit["form"] for unit in manifest["units"]}["block00"] == "groups"
    assert 0 < manifest["macs"]["ratio"] < 1
    assert manifest["program_macs"] == load(artifact).frozen.program.macs()
    assert "The frozen network computes" not in frozen_table(manifest)
    merged = manifest | {"program_macs": 2 * manifest["macs"]["total"]}
    assert f"The frozen network computes {merged['program_macs']:,}" in frozen_table(merged)
    assert [layer["name"] for layer in manifest["layers"] if layer["released"]] == ["head"]
    assert manifest["versions"]["jax"] and manifest["choice"]["by"] == "macs"


def test_it_agrees_with_the_masked_network_on_the_whole_test_set(artifact, checkpoint) -> None:
    accuracy = json.loads((artifact / MANIFEST).read_text())["accuracy"]
    assert accuracy["num_examples"] == 2000
    assert accuracy["masked"]["relative_error"] < 1e-4 and accuracy["masked"]["same_top1"] > 0.999
    images = load_dataset("fashion_mnist_subset").test_images[:50]
    restored = restore(*find_checkpoint(str(checkpoint)))
    assert restored.hard is not None
    expected = masked_logits(restored, restored.hard.counts, images)
    assert agreement(np.asarray(load(artifact).predict(images)), expected)["relative_error"] < 1e-4


def test_eval_takes_it_and_says_what_the_checkpoint_says(artifact, checkpoint, tmp_path, capsys) -> None:
    reports = [tmp_path / "frozen.json", tmp_path / "checkpoint.json"]
    assert eval_command(["--frozen", str(artifact), "--json", str(reports[0]), "--by-class"]) == 0
    headings, *rows = capsys.readouterr().out.splitlines()[-11:]
    assert eval_command(["--checkpoint", str(checkpoint), "--json", str(reports[1])]) == 0
    frozen, masked = (json.loads(report.read_text()) for report in reports)
    assert frozen["top1"] == masked["top1"] and frozen["num_examples"] == masked["num_examples"]
    assert frozen["loss"] == pytest.approx(masked["loss"], rel=1e-4)
    assert frozen["macs"] == masked["macs"] and frozen["layers"] == masked["layers"]
    # By class: rows of the matrix are classes, of which every image is in one place.
    confusion = np.array(frozen["confusion"])
    assert frozen["confusion"] == masked["confusion"] and (confusion.sum(axis=1) == 200).all()
    assert np.trace(confusion) / 2000 == pytest.approx(frozen["top1"])
    assert frozen["class_names"] == masked["class_names"] and headings.split()[:2] == ["class", "images"]
    for row, name, own in zip(rows, frozen["class_names"], np.diag(confusion), strict=True):
        assert row.startswith(name) and f"  200  {own / 2:.2f}%  " in row.replace("   ", "  ").replace("   ", "  ")


def test_loading_and_predicting_need_neither_flax_nor_training_code(artifact) -> None:
    code = f"""
import sys
import time
import numpy as np
from fdjax.frozen import load
network = load({str(artifact)!r})
logits = network.predict(np.zeros((2, *network.input_shape), np.uint8))
assert logits.shape == (2, len(network.class_names)) and np.isfinite(logits).all()
heavy = ("flax", "optax", "orbax", "tensorflow_datasets", "tyro", "fdjax.zoo", "fdjax.training", "fdjax.checkpoint")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_uint8_and_float_images_give_the_same_logits(artifact) -> None:
    network = load(artifact)
    images = load_dataset("fashion_mnist_subset").test_images[:2]
    np.testing.assert_array_equal(network.predict(images), network.predict(images.astype(np.float32)))


def test_predict_names_the_classes_of_pictures(artifact, tmp_path, capsys) -> None:
    dataset, files = load_dataset("fashion_mnist_subset"), []
    for index in range(2):
        files.append(str(tmp_path / f"{index}.png"))
        Image.fromarray(dataset.test_images[index, ..., 0]).save(files[-1])
    report = tmp_path / "classes.json"
    assert fdjax_command(["predict", "--frozen", str(artifact), *files, "--top", "2", "--json", str(report)]) == 0
    said = capsys.readouterr().out.splitlines()
    logits = np.asarray(load(artifact).predict(dataset.test_images[:2]))
    for line, row, found in zip(said, logits, json.loads(report.read_text()), strict=True):
        assert dataset.class_names[row.argmax()] in line
        assert [entry["name"] for entry in found["classes"]] == [dataset.class_names[i] for i in np.argsort(-row)[:2]]


def test_predict_takes_folders_and_goes_on_past_damaged_files(artifact, tmp_path, capsys, refused) -> None:
    dataset, folder = load_dataset("fashion_mnist_subset"), tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index in range(20):
        Image.fromarray(dataset.test_images[index, ..., 0]).save(folder / "deep" / f"{index:02}.png")
    (folder / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "notes.txt").write_text("no picture")
    table, report = tmp_path / "classes.csv", tmp_path / "classes.json"
    given = [str(folder), "--top", "2", "--csv", str(table), "--json", str(report)]
    assert fdjax_command(["predict", "--frozen", str(artifact), *given]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 20
    assert "damaged.png" in captured.err and "1 of 21 pictures could not be read" in captured.err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "class_1", "probability_1", "class_2", "probability_2", "error"]
    assert [Path(row["image"]).name for row in rows] == ["damaged.png", *(f"{index:02}.png" for index in range(20))]
    assert "damaged.png" in rows[0]["error"] and not rows[0]["class_1"]
    logits = np.asarray(load(artifact).predict(dataset.test_images[:20]))
    assert [row["class_1"] for row in rows[1:]] == [dataset.class_names[row.argmax()] for row in logits]
    assert all(0 < float(row["probability_2"]) <= float(row["probability_1"]) <= 1 for row in rows[1:])
    assert "error" in json.loads(report.read_text())[0]
    # Nothing that can be read, and nothing that can be written.
    predict = ["predict", "--frozen", str(artifact)]
    assert "damaged.png" in refused(fdjax_command, *predict, str(folder / "damaged.png"))
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in refused(fdjax_command, *predict, str(tmp_path / "empty"))
    assert "--csv" in refused(fdjax_command, *predict, str(folder), "--csv", str(tmp_path / "a" / "b.csv"))


def test_pictures_are_fitted_as_a_data_sets_are(tmp_path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    file = str(tmp_path / "wide.png")
    Image.fromarray(pixels).save(file)
    np.testing.assert_array_equal(load_image(file, (40, 40, 3)), pixels[:, 10:50])
    assert load_image(file, (28, 28, 1)).shape == (28, 28, 1)
    np.testing.assert_array_equal(load_image(file, (40, 60, 3)), pixels)
    np.testing.assert_array_equal(load_image(file, (40, 30, 3)), pixels[:, 15:45])
    with pytest.raises(UserError, match="cannot be read"):
        load_image(str(tmp_path / "none.png"), (28, 28, 1))


# What is refused


@pytest.mark.parametrize(
    ("phase", "step", "expected"),
    [("pretrain", None, "no masks"), ("learn", 3, "soft masks only: learn is at step 3")],
)
def test_a_checkpoint_without_hard_masks_is_refused(refused, tmp_path, phase, step, expected) -> None:
    workdir = write_checkpoint(tmp_path / "run", phase, step)
    said = refused(fdjax_command, "freeze", "--checkpoint", str(workdir), "--out", str(tmp_path / "out"))
    assert expected in said and not (tmp_path / "out").exists()


def test_another_input_size_is_refused(artifact, refused, tmp_path) -> None:
    with pytest.raises(UserError, match=r"images of 28x28x1.*got \[1, 32, 32, 3\]"):
        load(artifact).predict(np.zeros((1, 32, 32, 3)))
    with pytest.raises(UserError, match="28x28x1"):
        load(artifact).predict(np.zeros((28, 28, 1)))


@pytest.mark.parametrize("name", [ARRAYS, GRAPH, MANIFEST, CHECKSUM])
@pytest.mark.parametrize("damage", ["edited", "missing"])
def test_a_damaged_artifact_is_refused_and_the_file_named(refused, copy, name, damage) -> None:
    if damage == "missing":
        (copy / name).unlink()
    else:
        content = bytearray((copy / name).read_bytes())
        digit = max(place for place, byte in enumerate(content) if chr(byte).isdigit())
        place = digit if name != ARRAYS else len(content) // 2
        content[place] ^= 1
        (copy / name).write_bytes(bytes(content))
    said = refused(eval_command, "--frozen", str(copy))
    expected = {CHECKSUM: CHECKSUM if damage == "missing" else MANIFEST}.get(name, name)
    assert expected in said


@pytest.mark.parametrize("version", [1, 2, FORMAT_VERSION + 1])
def test_another_format_is_refused_in_a_line_that_says_how_to_make_it_anew(refused, copy, version) -> None:
    manifest = json.loads((copy / MANIFEST).read_text())
    if version < FORMAT_VERSION:  # They had a plan and a spec, and no graph.
        del manifest["program"]
        manifest |= {"plan": {}, "spec": {}, "files": {ARRAYS: manifest["files"][ARRAYS]}}
        (copy / GRAPH).unlink()
    (copy / MANIFEST).write_text(json.dumps({**manifest, "format_version": version}))
    reseal(copy)
    (copy.parent / "x.png").write_bytes(b"")
    for command in (
        ("predict", "--frozen", str(copy), str(copy.parent / "x.png")),
        ("bench", "--frozen", str(copy)),
        ("export", "--frozen", str(copy), "--out", str(copy.parent / "network.onnx")),
    ):
        said = refused(fdjax_command, *command)
        assert f"format version {version}; this fdjax reads {FORMAT_VERSION}" in said
        assert "freeze the checkpoint again (fdjax freeze)" in said
        assert ("update fdjax" in said) == (version > FORMAT_VERSION)
    assert f"format version {version}" in refused(eval_command, "--frozen", str(copy))


def test_sealed_files_that_do_not_fit_each_other_are_refused(refused, copy) -> None:
    """Checksums that are right say nothing of a program and arrays of two networks."""
    manifest = json.loads((copy / MANIFEST).read_text())
    with np.load(copy / ARRAYS) as stored:
        arrays = dict(stored)
    name = next(name for name, array in arrays.items() if array.ndim == 2)
    for array, expected in ((arrays[name][1:], "do not fit each other"), (arrays[name] * np.nan, "is not finite")):
        np.savez(copy / ARRAYS, **{**arrays, name: array})
        files = {**manifest["files"], ARRAYS: file_sha256(copy / ARRAYS)}
        (copy / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
        reseal(copy)
        assert expected in refused(eval_command, "--frozen", str(copy))


def test_a_folder_with_other_things_is_left_alone(refused, checkpoint, tmp_path) -> None:
    (tmp_path / "letters.txt").write_text("dear diary")
    said = refused(fdjax_command, "freeze", "--checkpoint", str(checkpoint), "--out", str(tmp_path))
    assert "not empty and holds no frozen network" in said
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_frozen_network_is_replaced_in_one_move(copy) -> None:
    network = load(copy)
    (copy.parent / f".{copy.name}.draft").mkdir()
    save(copy, network.network, network.frozen, {"note": "second"})
    assert load(copy).manifest["note"] == "second"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_what_lies_beside_a_frozen_network_is_not_lost(copy) -> None:
    network = load(copy)
    (copy / ".DS_Store").touch()
    save(copy, network.network, network.frozen, dict(network.manifest))
    (copy / "mine.onnx").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"holds mine\.onnx beside a frozen network"):
        save(copy, network.network, network.frozen, {})
    assert (copy / "mine.onnx").read_bytes() == b"mine" and load(copy).manifest == network.manifest


def test_a_link_stays_a_link_and_the_current_directory_stays(copy, tmp_path, monkeypatch) -> None:
    network = load(copy)
    (tmp_path / "link").symlink_to(copy)
    save(tmp_path / "link", network.network, network.frozen, {"note": "by the link"})
    assert (tmp_path / "link").is_symlink() and load(copy).manifest["note"] == "by the link"
    monkeypatch.chdir(copy)
    save(Path(), network.network, network.frozen, {"note": "from within"})
    assert load(copy).manifest["note"] == "from within" and Path.cwd().samefile(copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted([MANIFEST, ARRAYS, GRAPH, CHECKSUM])


def test_a_folder_that_cannot_be_written_is_one_line_and_keeps_what_it_had(copy, monkeypatch) -> None:
    network = load(copy)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        save(copy, network.network, network.frozen, {})
    assert load(copy).manifest == network.manifest


def test_data_that_cannot_be_read_are_named_in_place_of_an_accuracy(checkpoint, tmp_path, monkeypatch, capsys) -> None:
    def damaged(*_, **__):
        raise UserError("3.png is a damaged image")

    monkeypatch.setattr("fdjax.checkpoints.freeze.run_data", damaged)
    out = tmp_path / "out"
    assert fdjax_command(["freeze", "--no-time", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    assert "accuracy: not measured: 3.png is a damaged image" in capsys.readouterr().out
    manifest = load(out).manifest
    assert manifest["accuracy"] is None and manifest["accuracy_problem"] == "3.png is a damaged image"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--release"], "--choose time"),
        (["--choose", "time", "--engine-batch", "0"], "at least 1"),
        (["--data-path", "/does/not/exist"], "takes no path"),
    ],
)
def test_wrong_flags_are_refused(refused, checkpoint, tmp_path, arguments, expected) -> None:
    out = str(tmp_path / "out")
    assert expected in refused(fdjax_command, "freeze", "--checkpoint", str(checkpoint), "--out", out, *arguments)


def test_eval_takes_a_checkpoint_or_a_frozen_network(refused, artifact) -> None:
    assert "either" in refused(eval_command)
    assert "either" in refused(eval_command, "--frozen", str(artifact), "--checkpoint", "x")
    assert "test set" in refused(eval_command, "--frozen", str(artifact), "--which", "best")
    assert "no frozen network" in refused(eval_command, "--frozen", str(ROOT))


# Choosing by time


def test_forms_chosen_by_time_are_the_fastest_measured_and_the_same_function(checkpoint, tmp_path) -> None:
    out = tmp_path / "timed"
    command = [
        "freeze",
        "--no-time",
        "--checkpoint",
        str(checkpoint),
        "--out",
        str(out),
        "--choose",
        "time",
        "--engine-batch",
        "2",
    ]
    assert fdjax_command(command) == 0
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["choice"] == {"by": "time", "engine": "xla", "batch": 2, "released_at_freezing": []}
    assert manifest["accuracy"]["masked"]["relative_error"] < 1e-4
    timed = [unit for unit in manifest["units"] if unit["milliseconds"]]
    assert timed
    runs = [operation for operation in manifest["program"]["operations"] if operation["operation"] == "run"]
    chains = {run["name"]: {chain["name"] for chain in run["chains"]} for run in runs}
    for unit in timed:
        fastest = min(unit["milliseconds"], key=unit["milliseconds"].__getitem__)
        assert ("means" in chains[unit["name"]]) == (fastest in ("means", "groups"))


class _Biased(Stopwatch):
    """Finds every layer faster released, or none."""

    released_ms = 0.0

    def measure(self, layer, candidates):
        return {name: self.released_ms if name.startswith("released") else 1.0 for name in candidates}


def test_release_raises_partial_counts_of_the_slower_layers_only(checkpoint) -> None:
    restored = restore(*find_checkpoint(str(checkpoint)))
    assert restored.hard is not None
    graph, counts = restored.graph, restored.hard.counts
    variables = graph_variables(graph, restored.state.params, restored.state.batch_stats)
    biased = _Biased()
    raised, names = release_slower(graph, variables, counts, biased)
    assert {name.split("/")[0] for name in names} == {"block00", "block01", "block02", "block03", "head"}
    for path, (_, num_coefs) in graph.mask_sizes.items():
        np.testing.assert_array_equal(raised[path], np.where(counts[path] > 0, num_coefs, 0))
    biased.released_ms = 2.0
    kept, names = release_slower(graph, variables, counts, biased)
    assert not names and all(np.array_equal(kept[path], counts[path]) for path in counts)


def test_measurements_are_remembered(tmp_path, monkeypatch) -> None:
    network, graph = make(**TIED)
    arguments = graph, random_variables(network, graph, 0), random_counts(graph, 1, (1,))
    times = {name: Times(np.array(found), np.array(found)) for name, found in (("bands", [2, 3]), ("means", [1, 1]))}
    monkeypatch.setattr(choice, "interleaved", lambda functions, **_: {name: times[name] for name in functions})
    watch = Stopwatch(1, tmp_path)
    first = frozen_of(*arguments, watch.choose)
    assert watch.times["block00"] == {"bands": 2.5, "means": 1.0}
    monkeypatch.setattr(choice, "interleaved", lambda functions, **_: pytest.fail("measured again"))
    assert frozen_of(*arguments, Stopwatch(1, tmp_path).choose).program == first.program


def test_functions_are_timed_in_turn() -> None:
    calls = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in ("a", "b")}, rounds=4)
    assert calls[-4:] == ["a", "b", "a", "b"] and [len(found.wall) for found in times.values()] == [4, 4]


def test_on_one_core_what_other_programs_took_is_not_a_functions_time(monkeypatch) -> None:
    slept = interleaved({"a": lambda: time.sleep(0.01)}, rounds=3)["a"]
    assert (slept.wall >= 10).all() and (slept.processor < 10).all()
    monkeypatch.setattr(clock, "has_one_core", lambda: True)
    np.testing.assert_array_equal(slept.own, slept.processor)
    monkeypatch.setattr(clock, "has_one_core", lambda: False)
    np.testing.assert_array_equal(slept.own, slept.wall)


def test_figures_break_ties_as_argmax_does() -> None:
    logits = np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 9.0]])
    found = figures(logits, np.array([0, 1, 2]))
    assert found["top1"] == pytest.approx(2 / 3) and found["num_examples"] == 3
    expected = np.mean([np.log(2 * np.e + 1) - 1] * 2 + [np.log(2 + np.e**9) - 9])
    assert found["loss"] == pytest.approx(expected)
    assert "top5" not in found and "top5" in figures(np.eye(11), np.arange(11))
