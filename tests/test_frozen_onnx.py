"""The ONNX graph of a frozen network says in ONNX Runtime what the network says."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fdjax.errors import UserError
from fdjax.frozen import freeze
from fdjax.frozen.onnx_export import onnxruntime_peer, onnxruntime_session, to_onnx, write_onnx
from tests.frozen_networks import frozen_logits, random_counts, random_variables, raw_images, relative_error
from tests.test_frozen import MEANS, TIED, UNTIED, make

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


@needs_onnx
@pytest.mark.parametrize(
    ("fields", "levels"),
    [
        (TIED, MEANS),
        ({**TIED, "padding": "torch"}, (1, 2)),
        (UNTIED, None),
        ({"block": 4, "shape": (22, 26, 3)}, None),
        ({"block": 3, "shape": (24, 24, 3), "block_by_map": {12: 2}, "tied": True}, MEANS),
    ],
)
def test_onnx_runtime_agrees(fields, levels) -> None:
    network, spec = make(**fields)
    frozen = freeze(spec, random_variables(network, spec, 0), random_counts(spec, 1, levels))
    run = onnxruntime_session(to_onnx(frozen), threads=1)
    images = raw_images(spec, 3, 0)
    assert relative_error(run(images), frozen_logits(frozen, images)) < 1e-4 / 4
    assert run(images[:1]).shape == (1, 10)


@needs_onnx
def test_the_file_is_a_model_and_the_peer_runs(tmp_path) -> None:
    import onnx

    network, spec = make(**UNTIED)
    dense = freeze(spec, random_variables(network, spec, 0), spec.full_counts())
    write_onnx(dense, tmp_path / "dense.onnx")
    model = onnx.load(tmp_path / "dense.onnx")
    assert [value.name for value in model.graph.input] == ["images"]
    assert {node.op_type for node in model.graph.node} >= {"Conv", "Clip", "Gemm"}
    peer = onnxruntime_peer(threads=1)
    assert peer is not None and np.shape(peer(dense, 2)()) == (2, 10)


@needs_onnx
def test_a_network_with_nothing_left_in_a_block_is_refused() -> None:
    network, spec = make(**UNTIED)
    counts = spec.full_counts()
    counts["block02/project/input"][:] = 0
    frozen = freeze(spec, random_variables(network, spec, 0), counts)
    with pytest.raises(UserError, match="block02 is pruned away"):
        to_onnx(frozen)


def test_without_onnx_there_is_no_peer_and_a_word_of_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnxruntime_peer() is None
    network, spec = make(**UNTIED)
    with pytest.raises(UserError, match="pip install onnx"):
        to_onnx(freeze(spec, random_variables(network, spec, 0), spec.full_counts()))
