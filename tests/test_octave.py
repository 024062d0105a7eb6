"""Octave networks: products and a whole network against torch, published counts, a training step, freezing."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from fdjax.frozen import Frozen, Program
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.ops.octave import FREQUENCIES, Split, octave_pointwise, split_channels
from fdjax.training import network as training_network
from fdjax.zoo import FCMASK, OctaveMobileNet, mobilenet
from fdjax.zoo.octave import OctaveResidual
from tests.frozen_networks import (
    HASTE,
    frozen_logits,
    frozen_of,
    masked_logits,
    random_variables,
    raw_images,
    relative_error,
    with_preprocessing,
)
from tests.graph_networks import network_for

compiled = functools.partial(jax.jit, compiler_options=HASTE)
TINY = mobilenet.Variant(
    8, 3, 1, (mobilenet.Stage(1, 16, 1, 1), mobilenet.Stage(2, 24, 2, 2), mobilenet.Stage(2, 32, 2, 2, 5)), False, 32
)


@pytest.fixture(autouse=True, scope="module")
def tiny_variant():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mobilenet.VARIANTS, "tiny", TINY)
        yield


@functools.cache
def tiny(octave_maps: str = "all", pixels: int = 12, padding: str = "same") -> tuple[OctaveMobileNet, MaskedGraph]:
    """Maps of 12, 6 and 3 pixels, the last all high; of 8, 4 and 2, where all have low channels but what heads read."""
    network = OctaveMobileNet("tiny", 5, octave=0.4, octave_maps=octave_maps, padding=padding)
    return network, with_preprocessing(network_for(network, (pixels, pixels, 3), count_classifier=True))


# The product


def random_product(seed: int, sides: tuple[int, int] = (6, 4)) -> tuple[dict, dict]:
    rng = np.random.default_rng(seed)
    rows, columns = sides
    maps = {"high": rng.normal(size=(2, rows, columns, 5)), "low": rng.normal(size=(2, rows // 2, columns // 2, 3))}
    channels, features = {"high": 5, "low": 3}, {"high": 4, "low": 7}
    kernels = {f"{a}_to_{b}": rng.normal(size=(channels[a], features[b])) for a in FREQUENCIES for b in FREQUENCIES}
    return maps, kernels


def as_float32(tree: dict) -> dict:
    return {name: jnp.asarray(array, jnp.float32) for name, array in tree.items()}


@pytest.mark.parametrize(
    "names",
    [
        ("high_to_high", "high_to_low", "low_to_high", "low_to_low"),
        ("high_to_high", "high_to_low"),
        ("high_to_high", "low_to_high"),
        ("low_to_low",),
    ],
)
def test_the_products_are_those_of_torch(names: tuple[str, ...]) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed: its pools and products are the oracle")
    maps, kernels = random_product(0)
    kernels = {name: kernels[name] for name in names}
    found = octave_pointwise(as_float32(maps), as_float32(kernels))
    x = {name: torch.from_numpy(array.transpose(0, 3, 1, 2)) for name, array in maps.items()}
    expected: dict = {}
    for name, kernel in kernels.items():
        source, target = name.split("_to_")
        y = torch.nn.functional.avg_pool2d(x[source], 2) if (source, target) == ("high", "low") else x[source]
        y = torch.nn.functional.conv2d(y, torch.from_numpy(kernel.T[:, :, None, None].copy()))
        if (source, target) == ("low", "high"):
            y = torch.nn.functional.interpolate(y, scale_factor=2, mode="nearest")
        expected[target] = expected.get(target, 0) + y
    assert {*found} == {*expected}
    for name, y in found.items():
        np.testing.assert_allclose(y, expected[name].numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_it_is_one_plain_product_where_the_high_map_is_constant_in_blocks() -> None:
    """What is repeated 2x2 times loses nothing when it is averaged: both resolutions then say the same."""
    maps, kernels = random_product(1)
    low_sized = {"high": maps["high"][:, ::2, ::2], "low": maps["low"]}
    maps["high"] = np.repeat(np.repeat(low_sized["high"], 2, 1), 2, 2)
    found = octave_pointwise(as_float32(maps), as_float32(kernels))
    x = np.concatenate([low_sized["high"], low_sized["low"]], axis=-1)
    kernel = np.block([[kernels[f"{a}_to_{b}"] for b in FREQUENCIES] for a in FREQUENCIES])
    high, low = np.split(x @ kernel, [4], axis=-1)
    np.testing.assert_allclose(found["high"], np.repeat(np.repeat(high, 2, 1), 2, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["low"], low, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda maps, kernels: kernels.update(up=kernels["low_to_low"]), "unknown kernel 'up'"),
        (lambda maps, kernels: maps.pop("low"), "the kernel low_to_high needs a map 'low'"),
        (lambda maps, kernels: maps.update(low=maps["high"]), "twice the sides"),
        (lambda maps, kernels: kernels.update(low_to_low=kernels["high_to_low"]), "do not fit"),
    ],
)
def test_maps_and_kernels_that_do_not_fit_are_refused(change, message: str) -> None:
    maps, kernels = map(as_float32, random_product(0))
    change(maps, kernels)
    with pytest.raises(ValueError, match=message):
        octave_pointwise(maps, kernels)


def test_an_odd_map_is_not_halved() -> None:
    maps, kernels = map(as_float32, random_product(0, (5, 4)))
    with pytest.raises(ValueError, match=r"\(5, 4\) cannot be halved"):
        octave_pointwise({"high": maps["high"]}, {"high_to_low": kernels["high_to_low"]})


@pytest.mark.parametrize(
    ("channels", "share", "low"), [(16, 0.25, 4), (24, 0.1, 2), (100, 0.29, 29), (7, 0.99, 6), (8, 0.1, 0)]
)
def test_low_channels_are_the_share_rounded_down(channels: int, share: float, low: int) -> None:
    assert split_channels(channels, share) == Split(channels - low, low)


# Counts


def recount(width: float, share: float, *, wide_only: bool, to_eight: bool, expand_first: bool) -> tuple[int, int]:
    """MACs of an Oct-MobileNetV2 at 224 pixels, from Sandler et al.'s table 2, and the elements that its means read.

    The authors' own (facebookresearch/OctConv, utils/gluon/utils/mobilenetv2.py) has low channels in the wide maps of
    the blocks before the last stride only, which lies between 14x14 and 7x7; takes channels times the width, rounded
    down; has an expand layer in its first block; and averages where a depthwise layer has a stride. All maps at least
    halve to even sides before 7x7.
    """

    def channels(base: int) -> int:
        if not to_eight:
            return int(base * width)
        # The nearest multiple of 8, or the next one where that takes more than a tenth away.
        near = max(8, int(np.floor(base * width / 8 + 0.5)) * 8)
        return near + 8 if near < 0.9 * base * width else near

    def product(inputs: Split, outputs: Split, side: int) -> int:
        at_half = (inputs.high + inputs.low) * (outputs.high + outputs.low) - inputs.high * outputs.high
        return side**2 * inputs.high * outputs.high + (side // 2) ** 2 * at_half

    side, narrow = 112, Split(channels(32), 0)
    macs, averaged = 27 * narrow.high * side**2, 0
    for expansion, base, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            step = stride if repeat == 0 else 1
            after, total = side // step, expansion * sum(narrow)
            has_expand = expansion > 1 or expand_first
            low = int(share * total) if has_expand and after % 2 == 0 else 0
            wide = Split(total - low, low)
            out_low = int(share * channels(base)) if not wide_only and after % 2 == 0 else 0
            out = Split(channels(base) - out_low, out_low)
            if has_expand:
                macs += product(narrow, wide, side)
                averaged += side**2 * narrow.high if low else 0
            if step == 2:
                averaged += side**2 * wide.high + (side // 2) ** 2 * wide.low
            macs += 9 * (after**2 * wide.high + (after // 2) ** 2 * wide.low) + product(wide, out, after)
            side, narrow = after, out
    head = channels(1280) if width > 1 else 1280
    return macs + side**2 * sum(narrow) * head + head * 1000, averaged + side**2 * head


@pytest.mark.parametrize(("width", "share", "millions"), [(1.0, 0.375, 256), (1.125, 0.5, 295)])
def test_the_published_counts(monkeypatch, width: float, share: float, millions: int) -> None:
    """Table 4 and the authors' README: 256 M (alpha 0.375) and 295 M (0.5). Their counter takes 1 for each element
    that a mean reads, which is 2.4 to 2.5 M; ours counts products only."""
    published, averaged = recount(width, share, wide_only=True, to_eight=False, expand_first=True)
    assert round((published + averaged) / 1e6) == millions

    def dense(octave_maps: str) -> int:
        module = OctaveMobileNet("mobilenetv2", width=width, octave=share, octave_maps=octave_maps)
        return network_macs(network_for(module, (224, 224, 3), True), {}).to_dict()["dense"]

    # Channels are rounded to multiples of 8, as everywhere else in this package; which changes nothing at width 1.
    ours, _ = recount(width, share, wide_only=True, to_eight=True, expand_first=True)
    assert dense("wide") == ours and (ours == published) == (width == 1)
    if width == 1:
        assert dense("all") == recount(width, share, wide_only=False, to_eight=True, expand_first=False)[0]
    else:
        monkeypatch.setattr(mobilenet, "round_channels", int)
        # A network is traced once; this one has changed since.
        monkeypatch.setattr(training_network, "_traced", training_network._trace_plain)
        assert dense("wide") == published


def test_all_maps_have_as_many_channels_as_in_the_plain_network() -> None:
    for octave_maps in ("all", "wide"):
        network, _ = tiny(octave_maps)
        for plan, plain in zip(network.octave_blocks((12, 12)), network.blocks((12, 12)), strict=True):
            assert sum(plan.inputs) == plain.in_channels and sum(plan.outputs) == plain.out_channels
            assert sum(plan.wide) == plain.wide_channels
            assert plan.inputs == plan.outputs or not plain.residual


def test_which_maps_have_low_channels() -> None:
    def low(octave_maps: str, pixels: int) -> list[tuple[bool, bool, bool]]:
        plans = tiny(octave_maps)[0].octave_blocks((pixels, pixels))
        return [(plan.inputs.low > 0, plan.wide.low > 0, plan.outputs.low > 0) for plan in plans]

    # The first block has no expand layer: the stem's map, all high, is its wide one.
    assert low("all", 12) == [
        (False, False, True), (True, True, True), (True, True, True), (True, False, False), (False, False, False),
    ]  # fmt: skip
    # Even to the end: the head still reads high channels only.
    assert low("all", 8)[3:] == [(True, True, False), (False, True, False)]
    assert low("wide", 12) == [(False, True, False)] * 3 + [(False, False, False)] * 2
    assert "block00/expand/high_to_high" in tiny("wide")[1].layers


@pytest.mark.parametrize("octave_maps", ["all", "wide"])
def test_the_graph_names_every_parameter_with_its_size_and_no_mask(octave_maps: str) -> None:
    network, graph = tiny(octave_maps, 8)
    like = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *graph.input_shape)))
    assert FCMASK not in like and not graph.mask_sizes
    expected = {path: leaf.shape for path, leaf in flatten_dict(like, sep="/").items()}
    found = {path: graph.operations.shapes[value] for value, path in graph.operations.variables.items()}
    assert {path: shape for path, shape in found.items() if not path.startswith("input/")} == expected
    assert not graph.walk.opaque


# The network


def torch_forward(network: OctaveMobileNet, graph: MaskedGraph, variables: dict, images: np.ndarray) -> np.ndarray:
    """Logits by torch's functions from the variables, block by block as the paper draws it."""
    import torch
    import torch.nn.functional as F

    params, stats = (flatten_dict(variables[name], sep="/") for name in ("params", "batch_stats"))

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float64))

    def norm(x: torch.Tensor, path: str) -> torch.Tensor:
        mean, var = (tensor(stats[f"{path}/{name}"]) for name in ("mean", "var"))
        scale, bias = (tensor(params[f"{path}/{name}"]) for name in ("scale", "bias"))
        return F.batch_norm(x, mean, var, scale, bias, eps=network.batch_norm_epsilon)

    def pointwise(maps: dict, path: str) -> dict:
        made: dict = {}
        for a in FREQUENCIES:
            for b in FREQUENCIES:
                if f"{path}/{a}_to_{b}/kernel" in params:
                    kernel = tensor(params[f"{path}/{a}_to_{b}/kernel"].T[:, :, None, None])
                    x = F.avg_pool2d(maps[a], 2) if (a, b) == ("high", "low") else maps[a]
                    y = F.conv2d(x, kernel)
                    y = F.interpolate(y, scale_factor=2, mode="nearest") if (a, b) == ("low", "high") else y
                    made[b] = made[b] + y if b in made else y
        return {name: norm(y, f"{path}/{name}_norm") for name, y in made.items()}

    def depthwise(maps: dict, path: str, stride: int) -> dict:
        made = {}
        for name, x in maps.items():
            kernel = tensor(params[f"{path}/{name}"].transpose(2, 0, 1)[:, None])
            y = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2, groups=len(kernel))
            made[name] = F.relu6(norm(y, f"{path}/{name}_norm"))
        return made

    x = tensor(((images - np.array(graph.input_mean)) / np.array(graph.input_std)).transpose(0, 3, 1, 2))
    x = F.conv2d(x, tensor(params["stem/kernel"].transpose(3, 2, 0, 1)), padding=1)
    maps = {"high": F.relu6(norm(x, "stem_norm"))}
    for plan in network.octave_blocks(graph.input_shape[:2]):
        block, stride = plan.block.name, plan.block.stride
        y = maps
        if f"{block}/expand/high_to_high/kernel" in params:
            y = {name: F.relu6(z) for name, z in pointwise(y, f"{block}/expand").items()}
        y = pointwise(depthwise(y, f"{block}/depthwise", stride), f"{block}/project")
        shapes = [{name: z.shape for name, z in m.items()} for m in (maps, y)]
        maps = {name: z + maps[name] for name, z in y.items()} if shapes[0] == shapes[1] else y
    (x,) = maps.values()
    x = F.relu6(norm(F.conv2d(x, tensor(params["head/kernel"].T[:, :, None, None])), "head_norm")).mean(dim=(2, 3))
    return (x @ tensor(params["classifier/kernel"]) + tensor(params["classifier/bias"])).numpy()


CASES = [("all", 12), ("wide", 8)]


@functools.cache
def case(octave_maps: str, pixels: int) -> tuple[dict, np.ndarray, np.ndarray, Frozen]:
    """Variables, images, what the network says of them, and the frozen network."""
    network, graph = tiny(octave_maps, pixels, "torch")
    variables, images = random_variables(network, graph, 0), raw_images(graph, 4, 0)
    logits = masked_logits(network, graph, variables, {}, images)
    return variables, images, logits, frozen_of(graph, variables, {})


@pytest.mark.parametrize(("octave_maps", "pixels"), CASES)
def test_the_network_is_what_torch_makes_of_its_variables(octave_maps: str, pixels: int) -> None:
    pytest.importorskip("torch", reason="torch is not installed: its functions are the oracle")
    variables, images, logits, _ = case(octave_maps, pixels)
    expected = torch_forward(*tiny(octave_maps, pixels, "torch"), variables, images)
    assert relative_error(logits, expected) < 1e-4


def test_a_step_of_gradient_lowers_a_blocks_loss_and_moves_every_weight() -> None:
    network, _ = tiny()
    plan = next(plan for plan in network.octave_blocks((12, 12)) if plan.block.residual and plan.inputs.low)
    block, rng = OctaveResidual(plan, network.norms(train=True), "same"), np.random.default_rng(0)

    def draw() -> dict[str, jax.Array]:
        sides = plan.block.in_size[0], plan.block.in_size[0] // 2
        parts = zip(FREQUENCIES, sides, plan.inputs, strict=True)
        return as_float32({name: rng.normal(size=(4, side, side, channels)) for name, side, channels in parts})

    maps, wanted = draw(), draw()
    variables = compiled(block.init)(jax.random.key(0), maps)

    @compiled
    def step(params):
        def loss(params):
            made, updated = block.apply({**variables, "params": params}, maps, mutable=["batch_stats"])
            return sum(jnp.mean((made[name] - wanted[name]) ** 2) for name in wanted), updated["batch_stats"]

        (value, averages), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), grads, averages

    before, params, grads, averages = step(variables["params"])
    after, *_ = step(params)
    assert float(after) < float(before)
    assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, averages, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


# Frozen


@pytest.mark.parametrize(("octave_maps", "pixels"), CASES)
def test_the_frozen_network_equals_it(monkeypatch, octave_maps: str, pixels: int) -> None:
    _, images, expected, frozen = case(octave_maps, pixels)
    assert Program.from_dict(json.loads(json.dumps(frozen.program.to_dict()))) == frozen.program
    # So few bytes that maps in two frequencies go through in chunks.
    monkeypatch.setattr("fdjax.frozen.xla_stages._CHUNK_BYTES", 4 * 12 * 12 * 60)
    assert relative_error(frozen_logits(frozen, images, in_chunks=True), expected) < 1e-5
    assert frozen.program.macs() == network_macs(tiny(octave_maps, pixels)[1], {}).to_dict()["dense"]


@pytest.mark.parametrize(("octave_maps", "pixels"), CASES)
def test_onnx_says_the_same(octave_maps: str, pixels: int) -> None:
    pytest.importorskip("onnxruntime")
    from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx

    _, images, expected, frozen = case(octave_maps, pixels)
    model = to_onnx(frozen.program, frozen.arrays)
    assert relative_error(onnxruntime_session(model, 1)(images), expected) < 1e-5
