"""Native code for users: an exported source, a saved network that predicts, benchmarks, engines that are not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from fdjax.commands.main import fdjax_command
from fdjax.config import LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.frozen import Frozen, freeze, load, save
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.export import export
from fdjax.frozen.native import compile as native_compile
from fdjax.frozen.native.compile import find_compiler
from fdjax.graph.masks import MaskedGraph
from fdjax.training.network import trace_network
from fdjax.zoo.registry import make_network
from tests.frozen_networks import random_counts, relative_error

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native_compile.COMPILERS)), reason="this machine has no C++ compiler"
)


def small_frozen() -> tuple[MaskedGraph, Frozen]:
    learn = LearnConfig(block=2, tied=True)
    network = make_network(ModelConfig(name="mobilenetv2_small", width=0.3), learn, 10)
    graph = trace_network(network, (20, 20, 1), learn)
    return graph, freeze(graph, seeded_variables(graph), random_counts(graph, 0, (1,)))


def test_an_exported_source_tests_itself(tmp_path) -> None:
    _, frozen = small_frozen()
    export(frozen, tmp_path / "model.cc")
    # As another file of a program sees it.
    (tmp_path / "user.cc").write_text(
        "#include <cstddef>\n"
        'extern "C" const std::size_t model_image_size, model_logits_size, model_workspace_size;\n'
        "std::size_t sizes() { return model_image_size + model_logits_size + model_workspace_size; }\n"
    )
    compiler = find_compiler()
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-march=native",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-DFDJAX_MAIN",
        "model.cc",
        "user.cc",
    ]
    done = subprocess.run([*command, "-o", "model"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    done = subprocess.run(["./model"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("ok: largest difference"), done.stdout
    text = (tmp_path / "model.cc").read_text()
    assert "void model(const std::uint8_t* images, float* logits, void* workspace)" in text
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}/2nd.cc: .* begin with a letter"):
        export(frozen, tmp_path / "2nd.cc")
    for name in ("main", "double", "exp", "image", "IMAGE", "read", "random", "hypot"):
        with pytest.raises(UserError, match=f"{name} has a meaning"):
            export(frozen, tmp_path / f"{name}.cc")


def test_a_saved_network_runs_natively_and_is_timed(tmp_path, capsys) -> None:
    graph, frozen = small_frozen()
    save(tmp_path / "frozen", graph, frozen, {"macs": {"ratio": 0.5, "paper_ratio": 0.5}, "layers": []})
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 1)).astype(np.uint8)
    expected = np.asarray(load(tmp_path / "frozen").predict(images))
    native = load(tmp_path / "frozen", engine="native")
    assert relative_error(np.asarray(native.predict(images)), expected) < 1e-5
    assert native.classify(images[0], 2)[0][1] > 0
    with pytest.raises(UserError, match="runs on xla or native, got 'tensor'"):
        load(tmp_path / "frozen", engine="tensor")
    arguments = ["bench", "--frozen", str(tmp_path / "frozen"), "--engine", "native", "--batch", "2", "--rounds", "3"]
    assert fdjax_command([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    dense, pruned = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert (dense["form"], pruned["form"], pruned["engine"]) == ("dense", "pruned", "native")
    assert pruned["ratio_to_best_dense"] == pruned["time_ratio"] == pruned["ms"] / dense["ms"]
    assert pruned["macs"] < dense["macs"] and "native" in capsys.readouterr().out
