"""A program in XLA makes what its layers make, masked and unfrozen; and programs are data."""

from __future__ import annotations

import dataclasses
import functools
import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from fdjax.frozen.program import Program, Run
from fdjax.frozen.xla import apply
from fdjax.frozen.xla_stages import stages
from tests.frozen_networks import HASTE, relative_error
from tests.programs import RUNS, Network, normalised


def raw_images(network: Network, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, *network.shapes[0])).astype(np.uint8)


def evaluate(program: Program, arrays, images, **how):
    function = functools.partial(apply, program, **how)
    return jax.jit(function, compiler_options=HASTE)(arrays, images)


def check(network: Network, *outputs: int, batch: int = 2, **how) -> Program:
    program, images = network.program(*outputs), raw_images(network, batch)
    found = evaluate(program, network.arrays, images, **how)
    expected = jax.jit(network.reference(*outputs), compiler_options=HASTE)(images)
    for value, y, wanted in zip(outputs, found, expected, strict=True):
        assert y.shape == (batch, *network.shapes[value])
        assert relative_error(np.asarray(y), np.asarray(wanted)) < 1e-5
    return program


@pytest.mark.parametrize(("levels", "block", "tied", "window", "stride", "size"), RUNS)
def test_a_run_makes_what_its_masked_layers_make(levels, block, tied, window, stride, size) -> None:
    network, bias = Network((*size, 6)), ("none", "channel", "map")[sum(size) % 3]
    x = normalised(network)
    y = network.run(x, 20, 5, block, levels, window=window, stride=stride, tied=tied, bias=bias)
    check(network, y)


def test_chains_of_means_run_at_block_resolution() -> None:
    network = Network((8, 8, 20))
    y = network.run(normalised(network), 24, 20, 2, (1, 2, 4))
    program = check(network, y)
    (run,) = (operation for operation in program.operations if isinstance(operation, Run))
    assert [chain.name for chain in run.chains] == ["coefs4", "coefs2", "means"]
    # As many multiply-accumulates less as means and their blocks are fewer than pixels.
    untied = dataclasses.replace(run, chains=run.chains[:2])
    assert run.macs() - untied.macs() < run.chains[2].channels * 8 * 8 * (20 + 9 + 20) / 2


@pytest.mark.parametrize(
    ("levels", "out_levels", "block", "size", "bias"),
    [
        (None, None, 2, (6, 6), "channel"),
        ((0, 1), (1,), 3, (7, 8), "none"),
        ((16,), (1, 16), 4, (8, 6), "channel"),
        ((1,), (1,), 1, (5, 5), "map"),
        (None, (4, 5, 9), 3, (9, 9), "map"),
    ],
)
def test_a_pointwise_layer(levels, out_levels, block, size, bias) -> None:
    network = Network((*size, 7))
    x = normalised(network)
    both = [
        network.pointwise(x, 12, block, levels, bias, pooled=pooled, out_levels=out_levels) for pooled in (False, True)
    ]
    check(network, *both)


def test_pointwise_layers_on_vectors_and_tokens() -> None:
    network = Network((5, 8))
    tokens = network.pointwise(normalised(network), 12, 1, (0, 1), bias="map")
    vector = network.function(lambda x: x.mean(axis=1), tokens)
    check(network, tokens, network.pointwise(vector, 3, 1, (1,), activation="none"))


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "window", "stride", "pads"),
    [
        (3, 8, 1, (3, 3), (2, 2), ((0, 1), (0, 1))),
        (3, 8, 1, (7, 7), (2, 2), None),
        (8, 8, 8, (3, 3), (1, 1), None),
        (8, 8, 8, (5, 3), (2, 1), ((1, 2), (0, 0))),
        (8, 16, 8, (3, 3), (1, 1), None),
        (8, 12, 2, (3, 1), (1, 2), None),
        (8, 4, 1, (1, 1), (2, 2), None),
        (1, 1, 1, (3, 3), (1, 1), None),
    ],
)
def test_convolutions(channels, outputs, groups, window, stride, pads) -> None:
    network = Network((9, 10, channels))
    y = network.conv(normalised(network), outputs, window, stride, groups, pads)
    check(network, network.conv(y, outputs, groups=outputs, bias="map", activation="relu"), y)


def whole_network(images: tuple[int, int, int] = (16, 16, 3)) -> tuple[Network, int]:
    network = Network(images)
    x = network.conv(normalised(network), 8, stride=(2, 2))
    for stride in ((1, 1), (2, 2), (1, 1)):
        y = network.run(x, 24, 8, 2, (0, 1, 4), stride=stride)
        x = network.function(lambda x, y: x + y, x, y) if stride == (1, 1) else y
    x = network.pointwise(x, 16, 2, pooled=True)
    return network, network.pointwise(network.take(x, (3, -1, *range(4, 16))), 10, 1, (1,), activation="none")


@pytest.mark.parametrize("how", [{}, {"in_chunks": True}])
def test_a_whole_network(how, monkeypatch) -> None:
    monkeypatch.setattr("fdjax.frozen.xla_stages._CHUNK_BYTES", 8_000)
    network, logits = whole_network()
    program = check(network, logits, batch=4, **how)
    cut = stages(program, 4)
    assert len({stage.images for stage in cut}) > 1
    assert [stage.images for stage in cut] == sorted(stage.images for stage in cut)
    assert tuple(operation for stage in cut for operation in stage.operations) == program.operations
    # The residual's input and its run's output never cross together.
    assert all(len(stage.inputs) == len(stage.outputs) == 1 for stage in cut)


def test_float_images_and_half_precision() -> None:
    network, logits = whole_network()
    images, program = raw_images(network), network.program(logits)
    (expected,) = evaluate(program, network.arrays, images)
    (found,) = evaluate(program, network.arrays, images.astype(np.float32))
    np.testing.assert_array_equal(found, expected)
    half = {name: array.astype(jnp.bfloat16) for name, array in network.arrays.items()}
    (found,) = evaluate(program, half, images)
    assert found.dtype == jnp.bfloat16 and relative_error(np.asarray(found, np.float32), np.asarray(expected)) < 0.1


def attention(x):
    """Tokens of a map, one head; what a graph of any network may hold."""
    tokens = x.reshape(x.shape[0], -1, x.shape[-1])
    scores = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", tokens, tokens) / 4)
    mixed = jnp.einsum("bqk,bkc->bqc", scores, tokens)
    padded = jnp.concatenate([jnp.ones((x.shape[0], 1, x.shape[-1])), mixed], axis=1)
    return jnp.where(padded > 0.1, padded, jnp.zeros_like(padded))[:, 1:]


def pooled(x):
    y = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 0), (1, 1), (0, 0)))
    y = jnp.pad(y, ((0, 0), (1, 0), (0, 0), (0, 2)))
    return jax.nn.sigmoid(y) * jnp.broadcast_to(x.mean(axis=(1, 2), keepdims=True)[..., :1], y.shape)


@pytest.mark.parametrize("function", [attention, pooled, jax.nn.gelu, lambda x: x[:, 1::2, :3] ** 2])
def test_other_operations_take_any_batch(function) -> None:
    network = Network((4, 6, 5))
    y = network.function(function, network.conv(normalised(network), 5))
    check(network, y, batch=3)


def test_a_network_of_many_outputs_is_not_cut_apart() -> None:
    network, logits = whole_network()
    early = network.operations[2].y
    program = check(network, early, logits, batch=4, in_chunks=True)
    assert stages(program, 4)[-1].outputs == (early, logits)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    levels=st.none() | st.lists(st.integers(0, 4), min_size=1, max_size=3).filter(any),
    tied=st.booleans(),
    bias=st.sampled_from(["none", "channel", "map"]),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_a_program_comes_back_from_json(seed, levels, tied, bias, stride) -> None:
    network = Network((6, 8, 4), seed)
    x = network.run(network.conv(normalised(network), 4), 6, 5, 2, levels, stride=stride, tied=tied, bias=bias)
    program = network.program(network.pointwise(network.take(x, (0, -1, 2)), 3, 2, levels, bias, pooled=True))
    read = Program.from_dict(json.loads(json.dumps(program.to_dict())))
    assert read == program and hash(read) == hash(program) and read.macs() == program.macs() > 0


@pytest.mark.parametrize("damage", ["shapes", "operations", "inputs"])
def test_what_is_no_program_is_refused(damage) -> None:
    network, logits = whole_network()
    fields = network.program(logits).to_dict()
    with pytest.raises(ValueError, match="no program of a frozen network"):
        Program.from_dict({name: value for name, value in fields.items() if name != damage})
    fields["operations"][1]["operation"] = "loop"
    with pytest.raises(ValueError, match="no program of a frozen network"):
        Program.from_dict(fields)
