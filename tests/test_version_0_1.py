"""Checkpoints and frozen networks that fdjax 0.1 wrote, which knew networks by the roles of their layers.

tests/version_0_1 holds small ones, and what 0.1 says of them (`record.py` there wrote it).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fdjax.checkpoint import Checkpoints
from fdjax.data import normalize, open_dataset
from fdjax.errors import UserError
from fdjax.frozen import freeze, load
from fdjax.frozen.xla import apply
from fdjax.training.network import graph_variables
from fdjax.training.restore import restore

HERE = Path(__file__).parent / "version_0_1"
EXPECTED = json.loads((HERE / "expected.json").read_text())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "untied" else pytest.mark.slow) for name in EXPECTED]
)
def test_a_checkpoint_of_0_1_is_the_same_network(name: str):
    expected = EXPECTED[name]
    restored = restore(Checkpoints(HERE / name / "checkpoints"), expected["step"])
    assert restored.macs().to_dict() == expected["macs"]
    assert restored.done.released == expected["released"]

    images, graph = open_dataset(restored.config.data.name).test_images[:3], restored.graph
    network, variables = restored.evaluation()
    x = normalize(images, graph.input_mean, graph.input_std, np.float32)
    logits = np.asarray(network.apply(variables, x, train=False))
    tolerance = 1e-5 * np.abs(expected["logits"]).max()
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=tolerance)

    assert restored.hard is not None
    arrays = graph_variables(graph, restored.state.params, restored.state.batch_stats)
    frozen = freeze(graph, arrays, restored.hard.counts)
    (logits,) = apply(frozen.program, frozen.arrays, images)
    np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=tolerance)


def test_a_frozen_network_of_0_1_is_refused_in_one_line():
    with pytest.raises(UserError, match="format version 2; this fdjax reads 3: freeze the checkpoint again") as raised:
        load(HERE / "frozen")
    assert "\n" not in str(raised.value)
