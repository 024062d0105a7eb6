"""The benchmarks of frozen networks: seeded masks are what they say, rows have their fields, mistakes are refused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fdjax import runtime
from fdjax.checkpoint import find_checkpoint
from fdjax.checkpoints.freeze import freeze_checkpoint
from fdjax.graph.counting import network_macs
from fdjax.training.restore import restore
from fdjax.zoo import MobileNet
from tests.frozen_checkpoints import write_checkpoint
from tests.graph_networks import network_for

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
FIELDS = {
    "network", "masks", "target", "batch", "threads", "dtype", "dense_ms", "frozen_ms", "time_ratio", "mac_ratio",
    "paper_ratio", "onnxruntime_dense_ms",
}  # fmt: skip


@pytest.fixture
def seeded_masks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_seeded_masks").seeded_masks


def run(script: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / script), "--threads", "1", "--rounds", "2", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@functools.cache
def graph_of(masks: str):
    return network_for(MobileNet("mobilenetv2", 1000, 1.0, block=3, tied=masks == "tied"), (192, 192, 3), True)


@pytest.mark.parametrize("target", [0.8, 0.5])
def test_tied_masks_have_three_levels_and_meet_the_papers_count(seeded_masks, target) -> None:
    graph = graph_of("tied")
    found = seeded_masks(graph, "tied", target, 0)
    assert found.macs.paper_ratio == pytest.approx(target, abs=0.01)
    assert network_macs(graph, found.counts, found.released).paper_ratio == found.macs.paper_ratio
    for path, counts in found.counts.items():
        assert set(counts) <= {0, 1, 9}
        assert all(np.sum(counts == level) % 16 == 0 for level in (0, 1)), path
    assert (found.counts["head/input"] == 9).all() and (found.counts["head/output"] < 9).any()
    again, other = (seeded_masks(graph, "tied", target, seed).counts["block12/wide"] for seed in (0, 1))
    np.testing.assert_array_equal(again, found.counts["block12/wide"])
    assert (other != again).any()


def test_the_papers_masks_keep_any_count_on_both_sides(seeded_masks) -> None:
    found = seeded_masks(graph_of("paper"), "paper", 0.8, 0)
    assert found.macs.paper_ratio == pytest.approx(0.8, abs=0.01)
    for path in ("block12/expand/output", "block12/project/input", "block12/project/output"):
        assert len(set(found.counts[path])) > 3


def test_released_layers_leave_the_target_to_the_others(seeded_masks) -> None:
    graph = graph_of("tied")
    free = seeded_masks(graph, "tied", 0.8, 0)
    bound = seeded_masks(graph, "tied", 0.8, 0, ["block12/expand", "block12/project"])
    assert (free.counts["block12/wide"] == 1).any() and not (bound.counts["block12/wide"] == 1).any()
    assert bound.macs.paper_ratio == pytest.approx(0.8, abs=0.01)
    assert (bound.counts["block14/wide"] == 9).sum() < (free.counts["block14/wide"] == 9).sum()


def test_the_benchmark_of_networks(tmp_path) -> None:
    report, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    done = run(
        "frozen_mobilenet_v2.py", "--network", "mobilenet_v2_small", "--masks", "tied", "--targets", "0.6",
        "--batch", "2", "--layers", "--json", str(report), "--picture", str(picture),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [row["batch"] for row in found["rows"]] == [2]
    for row, layers in zip(found["rows"], found["layers"], strict=True):
        assert row.keys() >= FIELDS and (row["network"], row["masks"]) == ("mobilenet_v2_small", "tied")
        assert row["paper_ratio"] == pytest.approx(0.6, abs=0.05) and row["clock"] == "processor"
        assert row["time_ratio"] == row["frozen_ms"] / row["dense_ms"]
        assert [layer["name"] for layer in layers["blocks"]][-2:] == ["head", "classifier"]
    assert found["settings"]["targets"] == [0.6] and found["machine"]["jax"]
    assert picture.stat().st_size > 1000


def test_the_benchmark_of_networks_on_engines(tmp_path) -> None:
    report = tmp_path / "rows.json"
    flags = ("--network", "mobilenet_v2_small", "--masks", "channels=0.5", "--batch", "1", "--json", str(report))
    done = run("frozen_mobilenet_v2.py", "--engine", "xla", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    dense, pruned = found["rows"]
    assert (dense["form"], pruned["form"]) == ("dense", "channels 0.5") and dense["mac_ratio"] == 1
    assert pruned["time_ratio"] == pruned["ms"] / dense["ms"] and pruned["engine"] == "xla"
    assert found["masks"]["mobilenet_v2_small"]["channels 0.5"]["paper_ratio"] == pytest.approx(0.5, abs=0.05)


def test_the_benchmark_of_engines(tmp_path) -> None:
    restored = restore(*find_checkpoint(str(write_checkpoint(tmp_path / "run", "refine"))))
    freeze_checkpoint(restored, tmp_path / "frozen")
    report = tmp_path / "rows.json"
    flags = ("--frozen", str(tmp_path / "frozen"), "--batch", "2", "--repeats", "2", "--json", str(report))
    done = run("frozen_engines.py", *flags)
    assert done.returncode == 0, done.stderr
    row, *others = json.loads(report.read_text())["rows"]
    assert (row["network"], row["engine"], row["batch"], row["threads"]) == ("frozen", "xla", 2, 1)
    assert row["mac_ratio"] == restored.macs().ratio and row["clock"] == "processor"
    low, high = row["time_ratio_range"]
    assert 0 < low <= row["time_ratio"] <= high
    assert {other["engine"] for other in others} <= {"onnxruntime"}
    assert others or importlib.util.find_spec("onnxruntime") is None or "ONNX Runtime refuses it" in done.stdout


def test_the_benchmarks_of_layers_and_transforms(tmp_path) -> None:
    report = tmp_path / "rows.json"
    small = ("--size", "6", "--channels", "8", "--block", "3", "--keep", "0.5", "--json", str(report))
    assert run("banded_layer.py", *small).returncode == 0
    levels, counts = json.loads(report.read_text())["rows"]
    assert (levels["counts"], counts["counts"]) == ("levels", "all") and levels["outputs"] == 48
    assert levels["time_ratio"] == levels["banded_ms"] / levels["dense_ms"]
    # Channels that keep 1 or 9 coefficients need no transforms but means; others do.
    assert levels["mac_ratio"] < counts["mac_ratio"] and levels["paper_ratio"] > 0.25
    assert run("transforms.py", *small).returncode == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert row["coefs"] == 4 and row["forward_ratio"] == row["forward_ms"] / row["copy_ms"]
    shape = ("--size", "6", "--channels", "16", "--groups", "4", "--batch", "2", "--json", str(report))
    assert run("grouped_conv.py", *shape).returncode == 0
    (row,) = json.loads(report.read_text())["rows"]
    assert row["gradient_ratio"] == row["gradient_ms"] / row["library_gradient_ms"] and row["ratio"] > 0


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("frozen_mobilenet_v2", ("--targets", "0"), "share"),
        ("frozen_mobilenet_v2", ("--network", "vgg"), "mobilenet_v2_192"),
        ("frozen_mobilenet_v2", ("--masks", "half=0.5"), "as in tied=0.44"),
        ("frozen_mobilenet_v2", ("--engine", "xla", "--gate", "time"), "--gate macs"),
        ("frozen_engines", (), "--frozen"),
        ("banded_layer", ("--size", "2", "--block", "3"), "larger than the map"),
        ("transforms", ("--keep", "2"), "share"),
        ("grouped_conv", ("--groups", "5"), "does not divide"),
        ("decode", ("--count", "4"), "at least 32"),
        ("train", ("--network", "resnet20", "--step", "masks"), "no pointwise layer"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_set_up(monkeypatch, capsys, script, flags, says) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("limit_threads", "setup"):
        monkeypatch.setattr(runtime, name, lambda *_, name=name: pytest.fail(f"it has called {name}"))
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main(["--threads", "1", "--rounds", "2", *flags])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and len(said.splitlines()) == 1 and says in said


def test_a_mistake_that_shows_later_is_one_line_too() -> None:
    done = run("frozen_mobilenet_v2.py", "--network", "mobilenet_v2_small", "--block", "16")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1 and "16" in done.stderr
