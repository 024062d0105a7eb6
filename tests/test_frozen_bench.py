"""Benchmarks of frozen networks: the rows have their fields, and the figures are of what they say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fdjax import runtime
from fdjax.commands.main import fdjax_command
from fdjax.errors import UserError
from fdjax.frozen import freeze, save
from fdjax.frozen.bench import (
    bench,
    bench_layers,
    compile_network,
    dense_network,
    dense_of,
    describe_masks,
    seeded_variables,
)
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.reports import bench_figure, bench_table
from fdjax.training.network import graph_variables
from tests.frozen_networks import random_counts, random_variables
from tests.test_frozen import MEANS, TIED, UNTIED, make

ROOT = Path(__file__).parents[1]
FIELDS = {
    "network", "masks", "target", "batch", "threads", "dtype", "dense_ms", "frozen_ms", "time_ratio", "mac_ratio",
    "paper_ratio", "onnxruntime_dense_ms",
}  # fmt: skip


def test_seeded_variables_are_what_the_graph_asks_for() -> None:
    network, graph = make(**UNTIED)
    variables = random_variables(network, graph, 0)
    expected = jax.tree.leaves(graph_variables(graph, variables["params"], variables["batch_stats"]))
    found = seeded_variables(graph)
    assert [np.shape(array) for array in found] == [np.shape(array) for array in expected]
    assert all(np.isfinite(array).all() for array in found)


def test_what_is_timed_subtracts_the_mean_of_its_images_as_the_network_does() -> None:
    """An image that is padded after its mean is subtracted needs an operation for it, which takes time."""
    network, graph = make(**UNTIED)
    graph = dataclasses.replace(graph, input_mean=(120.0,) * graph.input_shape[-1])
    variables = random_variables(network, graph, 0)
    counts = graph.full_counts()
    real = freeze(graph, graph_variables(graph, variables["params"], variables["batch_stats"]), counts)
    kinds = [[type(o).__name__ for o in frozen.program.operations] for frozen in (real, dense_network(graph))]
    assert kinds[0] == kinds[1] and kinds[0][0] == "Apply"


def test_a_row_says_what_was_measured() -> None:
    _, graph = make(**TIED)
    dense = dense_network(graph)
    frozen = freeze(graph, seeded_variables(graph), random_counts(graph, 1, MEANS))
    ran = []

    def peer(network, batch):
        assert network is dense and batch == 2
        return lambda: ran.append(batch)

    facts = {"network": "n", "masks": "tied", "target": None, "threads": 1, "mac_ratio": 0.5, "paper_ratio": 0.6}
    row = bench(frozen, dense, facts, batch=2, rounds=3, peer=peer)
    assert row.keys() >= FIELDS and row["rounds"] == 3 and len(ran) == 6
    assert row["time_ratio"] == row["frozen_ms"] / row["dense_ms"]
    for name in ("dense", "frozen"):
        low, high = row[f"{name}_ms_quartiles"]
        assert 0 < low <= row[f"{name}_ms"] <= high
        assert row[f"{name}_compile_s"] > 0
    weights = sum(array.nbytes for array in frozen.arrays.values()) / 1e6
    assert row["frozen_memory_mb"] > weights
    json.dumps(row)
    layers = bench_layers(frozen, dense, batch=1)
    assert [layer["name"] for layer in layers] == ["block00", "block01", "block02", "block03", "head", "classifier"]
    assert all(layer["macs"] <= layer["dense_macs"] for layer in layers)
    text = bench_table({"rows": [row], "layers": {"1": layers}})
    assert "time_ratio" in text and "block03" in text and "batch 1" in text
    assert len(bench_figure([row]).axes[0].collections) == 2


def test_bfloat16_computes_in_bfloat16() -> None:
    _, graph = make(**TIED)
    logits = compile_network(dense_network(graph), 1, "bfloat16").run()
    assert logits.dtype == jnp.bfloat16 and np.isfinite(np.asarray(logits, np.float32)).all()


def test_masks_are_described_by_their_levels() -> None:
    for fields, levels, expected in (
        (TIED, MEANS, "tied {0, 1, N}"),
        (UNTIED, None, "untied"),
        (TIED, (), "tied {0, N}"),
    ):
        _, graph = make(**fields)
        layers = [layer.to_dict() for layer in network_macs(graph, random_counts(graph, 1, levels)).layers]
        assert describe_masks(graph, layers) == expected


def test_the_command_in_a_process_of_its_own(tmp_path) -> None:
    """It holds itself to one core before jax is loaded, so that it needs its own process."""
    _, graph = make(**TIED)
    counts = random_counts(graph, 1, MEANS)
    macs = network_macs(graph, counts)
    layers = [layer.to_dict() for layer in macs.layers]
    save(
        tmp_path / "frozen",
        graph,
        freeze(graph, seeded_variables(graph), counts),
        {"macs": macs.to_dict(), "layers": layers},
    )
    report, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    command = [
        sys.executable, "-m", "fdjax", "bench", "--frozen", str(tmp_path / "frozen"), "--batch", "1", "2",
        "--threads", "1", "--rounds", "3", "--json", str(report), "--picture", str(picture),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert [row["batch"] for row in found["rows"]] == [1, 2] and found["layers"] == {}
    assert all(row.keys() >= FIELDS and row["threads"] == 1 for row in found["rows"])
    assert found["rows"][0]["network"] == "mobilenetv2_small_28" and found["rows"][0]["mac_ratio"] == macs.ratio
    assert "1 of " in found["machine"]["processor"] or os.cpu_count() == 1
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("picture", ["none/rows.png", "rows.bmpx"])
def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path, picture, capsys) -> None:
    flags = ["bench", "--frozen", str(tmp_path), "--picture", str(tmp_path / picture)]
    with pytest.raises(SystemExit) as stop:
        fdjax_command(flags)
    assert stop.value.code == 2
    assert "--picture" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["\x00", [], "add"])
def test_a_forged_graph_of_which_no_dense_network_can_be_made_is_refused(kind) -> None:
    _, graph = make(**TIED)
    fields = json.loads(json.dumps(graph.to_dict()))
    operations = fields["graph"]["operations"]
    place = next(place for place, operation in enumerate(operations) if "broadcast" in operation[0])
    operations[place][0] = kind
    forged = SimpleNamespace(network=MaskedGraph.from_dict(fields))
    with pytest.raises(UserError, match="describes no network that can be made"):
        dense_of(forged)  # type: ignore[arg-type]


def test_more_threads_than_there_are_cores_are_refused() -> None:
    with pytest.raises(UserError, match="may use"):
        runtime.limit_threads(100_000)
    assert runtime.limit_threads(None) >= 1
