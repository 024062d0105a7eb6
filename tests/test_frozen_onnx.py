"""Frozen networks in ONNX Runtime say what the masked ones say in XLA, whatever the masks; their files stay small."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from fdjax.errors import UserError
from fdjax.frozen.bench import onnxruntime_peer
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx, write_onnx
from tests.frozen_networks import frozen_of, masked_logits, random_counts, random_variables, raw_images, relative_error
from tests.test_frozen import MEANS, UNTIED, make

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("onnx", "onnxruntime")),
    reason="onnx or onnxruntime is not installed",
)


def check(network, graph, variables, counts, batch: int = 2):
    """Compares with the masked network; returns the model."""
    frozen, images = frozen_of(graph, variables, counts), raw_images(graph, batch, 0)
    model = to_onnx(frozen.program, frozen.arrays)
    expected = masked_logits(network, graph, variables, counts, images)
    assert relative_error(onnxruntime_session(model, threads=1)(images), expected) < 1e-4
    return model


@needs_onnx
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", [2, 3, 4, 7])
def test_every_form_of_masks_says_the_same(block: int, tied: bool) -> None:
    """Maps of 14 and 7 pixels, strides of 1 and 2: each block divides both, one, or none of them."""
    network, graph = make(block=block, tied=tied, padding="torch" if block in (3, 7) else "same")
    variables = random_variables(network, graph, 0)
    for levels in (None, (), MEANS, (1, block)):
        check(network, graph, variables, random_counts(graph, block, levels))
    check(network, graph, variables, graph.full_counts())


@needs_onnx
@pytest.mark.parametrize(
    "fields",
    [
        {"block": 4, "shape": (22, 26, 3)},
        {"block": 3, "shape": (24, 24, 3), "block_by_map": {12: 2}, "tied": True},
        {**UNTIED, "sides": "output"},
    ],
)
def test_blocks_that_differ_and_maps_that_are_not_square(fields) -> None:
    network, graph = make(**fields)
    variables = random_variables(network, graph, 0)
    for levels in ((0, 3, 7), MEANS) if fields["block"] > 2 else (None, MEANS):
        check(network, graph, variables, random_counts(graph, 1, levels), batch=3)


@needs_onnx
def test_runs_and_layers_of_which_nothing_is_left() -> None:
    network, graph = make(**UNTIED)
    variables, counts = random_variables(network, graph, 0), graph.full_counts()
    counts["block02/project/input"][:] = 0
    check(network, graph, variables, counts)
    check(network, graph, variables, {path: np.zeros_like(count) for path, count in counts.items()})


@needs_onnx
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("block", [2, 3, 4, 7])
def test_no_file_is_much_larger_than_the_dense_networks(block: int, tied: bool) -> None:
    """Of a network of 0.3 MB, in which the graph's own description weighs most where all counts occur."""
    network, graph = make(width=1.0, block=block, tied=tied)
    variables = random_variables(network, graph, 0)

    def size(counts) -> int:
        frozen = frozen_of(graph, variables, counts)
        return len(to_onnx(frozen.program, frozen.arrays).SerializeToString())

    dense = size(graph.full_counts())
    assert size(random_counts(graph, 0)) < 1.1 * dense
    for levels in ((), MEANS, (1, block)):
        assert size(random_counts(graph, 0, levels)) < 0.9 * dense, levels


@needs_onnx
def test_the_file_is_a_model_and_the_peer_runs(tmp_path) -> None:
    import onnx

    network, graph = make(**UNTIED)
    dense = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    write_onnx(dense.program, dense.arrays, tmp_path / "dense.onnx")
    model = onnx.load(tmp_path / "dense.onnx")
    assert [value.name for value in model.graph.input] == ["images"]
    peer = onnxruntime_peer(threads=1)
    assert peer is not None and np.shape(peer(dense, 2)()) == (2, 10)


def test_without_onnx_there_is_no_peer_and_a_word_of_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert onnxruntime_peer() is None
    network, graph = make(**UNTIED)
    frozen = frozen_of(graph, random_variables(network, graph, 0), graph.full_counts())
    with pytest.raises(UserError, match="pip install onnx"):
        to_onnx(frozen.program, frozen.arrays)
