"""MAC counts: the paper's numbers to the digit, hand counts, brute force, and the compiler's own count."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fdjax.spec import NetworkSpec, effective_counts, network_macs, unit_group_macs, units
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.ops import banded_pointwise, dense_pointwise, expected_pointwise_macs, plan_bands, pointwise_macs
from fdjax.ops.macs import block_constant_taps, block_transform_macs, conv_macs, depthwise_macs, group_macs
from fdjax.zoo import MobileNet
from tests.small_network import small

# The networks, counted here from Sandler et al.'s Table 2 with nothing of ours

TABLE_2 = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))


def count_mobilenet(pixels: int, stem: tuple[int, int], strides, expand_always: bool, classes: int) -> dict[str, int]:
    """Dense MACs, MACs with every wrapped layer's full 4x4 transforms (16 an element), and parameters; width 1.0."""
    window, stride = stem
    side, channels = pixels // stride, 32
    dense = side**2 * 3 * 32 * window**2
    parameters = 3 * 32 * window**2 + 2 * 32
    transforms = 0

    def pointwise(inputs: int, outputs: int) -> None:
        nonlocal dense, parameters, transforms
        dense += side**2 * inputs * outputs
        transforms += side**2 * (inputs + outputs) * 16
        parameters += inputs * outputs + 2 * outputs

    for (expansion, outputs, repeats), first_stride in zip(TABLE_2, strides, strict=True):
        for repeat in range(repeats):
            wide = expansion * channels
            if expansion > 1 or expand_always:
                pointwise(channels, wide)
            side //= first_stride if repeat == 0 else 1
            dense += side**2 * 9 * wide
            parameters += 9 * wide + 2 * wide
            pointwise(wide, outputs)
            channels = outputs
    pointwise(320, 1280)
    parameters += 1280 * classes + classes
    return {"dense": dense, "full": dense + transforms, "classifier": 1280 * classes, "parameters": parameters}


ORIGINAL = (1, 2, 2, 2, 1, 2, 1)
PAPERS = {
    # name: (pixels, classes, our count above, published M dense, published M with full transforms, exact integers)
    "mobilenetv2_cifar10": (
        32, 10, count_mobilenet(32, (3, 1), (1, 1, 2, 2, 1, 2, 1), True, 10),
        "89.01", "117.98", 89_012_224, 117_979_136,
    ),
    "mobilenetv2_cifar100": (
        32, 100, count_mobilenet(32, (1, 1), (1, 2, 2, 2, 1, 1, 1), False, 100),
        "42.96", "53.67", 42_958_848, 53_673_984,
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", PAPERS)
def test_cifar_networks_have_the_papers_counts_to_the_digit(variant: str) -> None:
    pixels, classes, counted, dense_m, full_m, dense, full = PAPERS[variant]
    spec = MobileNet(variant, classes, block=4).spec((pixels, pixels, 3))
    macs = network_macs(spec, spec.full_counts()).to_dict()
    assert (macs["dense"], macs["full_transforms"]) == (dense, full)
    assert (counted["dense"], counted["full"]) == (dense, full)
    assert (f"{dense / 1e6:.2f}", f"{full / 1e6:.2f}") == (dense_m, full_m)
    assert macs["paper_total"] == full
    assert macs["pruned"] == macs["total"] == dense
    assert (macs["ratio"], macs["paper_ratio"]) == (1, full / dense)


@pytest.mark.parametrize(("pixels", "published", "exact"), [(224, "300.77", 300_774_272), (192, "221.32", 221_316_608)])
def test_the_original_has_its_published_count_with_the_classifier(pixels: int, published: str, exact: int) -> None:
    counted = count_mobilenet(pixels, (3, 2), ORIGINAL, False, 1000)
    blocks = {14: 2, 7: 7} if pixels == 224 else {}
    network = MobileNet("mobilenetv2", 1000, block=2 if pixels == 224 else 3, block_by_map=blocks)
    spec = network.spec((pixels, pixels, 3), count_classifier=True)
    macs = network_macs(spec, spec.full_counts()).to_dict()
    assert macs["dense"] == counted["dense"] + counted["classifier"] == exact
    assert f"{exact / 1e6:.2f}" == published
    without = network_macs(dataclasses.replace(spec, count_classifier=False), spec.full_counts()).to_dict()
    assert macs["dense"] - without["dense"] == 1_280_000


# TF-slim's README: width, resolution, millions of MACs.
PUBLISHED = {
    1.4: {224: 582}, 1.3: {224: 509}, 1.0: {224: 300, 192: 221, 160: 154, 128: 99, 96: 56},
    0.75: {224: 209, 192: 153, 160: 107, 128: 69, 96: 39}, 0.5: {224: 97, 192: 71, 160: 50, 128: 32, 96: 18},
    0.35: {224: 59, 192: 43, 160: 30, 128: 20, 96: 11},
}  # fmt: skip


@pytest.mark.parametrize("width", PUBLISHED)
def test_every_width_and_resolution_has_its_published_count(width: float) -> None:
    for pixels, millions in PUBLISHED[width].items():
        spec = MobileNet("mobilenetv2", 1000, width=width, block=1).spec((pixels, pixels, 3), count_classifier=True)
        assert abs(sum(layer.dense_macs for layer in spec.counted_layers) / 1e6 - millions) < 1, pixels


def test_the_original_has_its_published_number_of_parameters() -> None:
    variables = jax.eval_shape(
        lambda key: MobileNet("mobilenetv2", 1000, mode="off").init(key, jnp.zeros((1, 32, 32, 3))), jax.random.key(0)
    )
    found = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert found == count_mobilenet(224, (3, 2), ORIGINAL, False, 1000)["parameters"] == 3_504_872


# One pointwise layer, by loops

BLOCKS = (1, 2, 3, 4)


@cache
def zigzag(block: int) -> tuple[tuple[int, int], ...]:
    cells = itertools.product(range(block), repeat=2)
    return tuple(sorted(cells, key=lambda ij: (sum(ij), ij[0] if sum(ij) % 2 else ij[1])))


@cache
def loop_transform(block: int, count: int) -> int:
    """The cheapest way to `count` coefficients of one block, operation by operation."""
    used = zigzag(block)[:count]
    direct = sum(1 for _ in used for _ in range(block) for _ in range(block))
    by_axis = []
    for axis in (0, 1):
        first = sum(block for _ in {frequency[axis] for frequency in used} for _ in range(block))
        by_axis.append(first + sum(block for _ in used))
    return min(direct, *by_axis) if used else 0


@dataclasses.dataclass(frozen=True)
class Loops:
    products: int
    paper_total: int
    total: int
    form: str


def loop_pointwise(size, block: int, inputs, outputs) -> Loops:
    num_coefs = block * block
    blocks = sum(1 for _ in range(0, size[0], block) for _ in range(0, size[1], block))

    def multiply(inputs, outputs) -> int:
        return sum(1 for n in range(num_coefs) for c in inputs for d in outputs if n < c and n < d)

    products = multiply(inputs, outputs)
    paper = blocks * (products + num_coefs * (sum(inputs) + sum(outputs)))
    # What one side drops altogether the other need not keep.
    last = min(max(inputs, default=0), max(outputs, default=0))
    inputs, outputs = [min(c, last) for c in inputs], [min(d, last) for d in outputs]
    if {*inputs, *outputs} <= {0, num_coefs}:
        alive = sum(map(bool, inputs)) * sum(map(bool, outputs))
        whole = all(inputs) and all(outputs)
        return Loops(products * blocks, paper, size[0] * size[1] * alive, "dense" if whole else "channels")
    transforms = sum(loop_transform(block, count) for count in (*inputs, *outputs))
    return Loops(products * blocks, paper, blocks * (multiply(inputs, outputs) + transforms), "bands")


@st.composite
def pointwise_layers(draw):
    block = draw(st.sampled_from(BLOCKS))
    size = draw(st.tuples(st.integers(block, 9), st.integers(block, 9)))
    count = st.one_of(st.sampled_from([0, 1, block**2]), st.integers(0, block**2))
    counts = st.lists(count, min_size=1, max_size=6)
    return size, block, draw(counts), draw(counts)


@given(pointwise_layers())
@example(((4, 4), 2, [4, 4], [4, 4, 4]))
@example(((4, 4), 2, [0, 0], [4, 2]))
@example(((4, 4), 2, [4, 0], [4, 4, 0]))
@example(((5, 7), 2, [4, 1], [2, 2]))
@example(((8, 8), 4, [16, 16], [3, 1]))
def test_a_layers_counts_are_those_of_explicit_loops(case) -> None:
    size, block, inputs, outputs = case
    macs = pointwise_macs(size, block, np.array(inputs), np.array(outputs))
    loops = loop_pointwise(size, block, inputs, outputs)
    blocks = -(-size[0] // block) * -(-size[1] // block)
    assert macs.dense == size[0] * size[1] * len(inputs) * len(outputs)
    assert (
        macs.full_transforms
        == loop_pointwise(size, block, [block**2] * len(inputs), [block**2] * len(outputs)).paper_total
    )
    assert macs.paper_total == loops.paper_total
    assert (macs.total, macs.form) == (loops.total, loops.form)
    whole = {*inputs, *outputs} <= {0, block**2}
    if not whole or size[0] % block == size[1] % block == 0:
        assert macs.pruned == loops.products
    else:  # nothing is transformed, so nothing is padded
        assert macs.pruned == loops.products * size[0] * size[1] // (blocks * block**2)


@given(pointwise_layers())
def test_the_cheapest_form_is_never_dearer_than_the_papers(case) -> None:
    size, block, inputs, outputs = case
    macs = pointwise_macs(size, block, np.array(inputs), np.array(outputs))
    assert macs.total <= macs.paper_total
    assert macs.paper_total <= macs.full_transforms
    assert macs.pruned <= macs.paper_total


@given(pointwise_layers())
def test_nothing_pruned_is_dense_in_the_cheapest_form(case) -> None:
    size, block, inputs, outputs = case
    full = (np.full(len(inputs), block**2), np.full(len(outputs), block**2))
    macs = pointwise_macs(size, block, *full)
    assert (macs.total, macs.form, macs.pruned) == (macs.dense, "dense", macs.dense)
    assert macs.paper_total == macs.full_transforms > macs.dense
    assert pointwise_macs(size, block, *full, released=True).paper_total == macs.dense


@given(pointwise_layers(), st.randoms(use_true_random=False))
def test_keeping_one_coefficient_less_never_costs_the_paper_more(case, random) -> None:
    size, block, inputs, outputs = case
    before = pointwise_macs(size, block, np.array(inputs), np.array(outputs))
    channel = random.randrange(len(inputs))
    fewer = [count - (count > 0 and index == channel) for index, count in enumerate(inputs)]
    after = pointwise_macs(size, block, np.array(fewer), np.array(outputs))
    assert after.paper_total <= before.paper_total
    assert loop_pointwise(size, block, fewer, outputs).products <= loop_pointwise(size, block, inputs, outputs).products


def test_transforms_by_hand() -> None:
    # Direct: k*k a coefficient. Separable: k*k for each frequency of the first axis, k for each coefficient.
    assert block_transform_macs(2, 0) == 0
    assert block_transform_macs(2, 1) == 4
    assert block_transform_macs(2, 2) == 8  # (0,0) (0,1): direct 8, separable 4 + 4
    assert block_transform_macs(2, 3) == 12  # direct 12, separable 8 + 6
    assert block_transform_macs(2, 4) == 16  # direct 16, separable 8 + 8
    assert block_transform_macs(4, 1) == 16
    assert block_transform_macs(4, 2) == 24  # one row of frequencies: separable 16 + 8, direct 32
    assert block_transform_macs(4, 16) == 128  # separable 64 + 64, direct 256
    assert block_transform_macs(1, 1) == 1
    assert block_transform_macs(16, 256) == 2 * 16**3


@pytest.mark.parametrize("block", range(1, 17))
def test_transforms_of_every_length_are_those_of_explicit_loops(block: int) -> None:
    found = [block_transform_macs(block, count) for count in range(block**2 + 1)]
    assert found == [loop_transform(block, count) for count in range(block**2 + 1)]
    assert all(left <= right for left, right in itertools.pairwise(found))


def test_convolutions_by_hand() -> None:
    assert conv_macs((5, 7), 3, 4) == 420
    assert conv_macs((5, 7), 3, 4, window=3) == 3780
    assert depthwise_macs((5, 7), 3) == 945


# The expectation for soft masks


@given(pointwise_layers())
def test_expected_count_is_the_exact_one_on_hard_masks(case) -> None:
    size, block, inputs, outputs = case
    macs = pointwise_macs(size, block, np.array(inputs), np.array(outputs))
    masks = [np.float32(np.arange(block**2)[:, None] < np.array(counts)) for counts in (inputs, outputs)]
    shape = (size, block, len(inputs), len(outputs))
    assert float(expected_pointwise_macs(*shape, *masks)) == macs.paper_total  # type: ignore[arg-type]
    products = loop_pointwise(size, block, inputs, outputs).products
    assert float(expected_pointwise_macs(*shape, *masks, transforms=False)) == products  # type: ignore[arg-type]
    full = pointwise_macs(size, block, np.array(inputs), np.full(len(outputs), block**2)).paper_total
    assert float(expected_pointwise_macs(*shape, masks[0])) == full  # type: ignore[arg-type]
    assert float(expected_pointwise_macs(*shape)) == macs.full_transforms


@given(pointwise_layers())
def test_expected_count_takes_what_each_further_coefficient_costs(case) -> None:
    size, block, inputs, outputs = case
    masks = [np.float32(np.arange(block**2)[:, None] < np.array(counts)) for counts in (inputs, outputs)]
    shape, blocks = (size, block, len(inputs), len(outputs)), -(-size[0] // block) * -(-size[1] // block)
    costs = [loop_transform(block, n + 1) - loop_transform(block, n) for n in range(block**2)]
    transforms = sum(loop_transform(block, count) for count in (*inputs, *outputs))
    found = float(expected_pointwise_macs(*shape, *masks, transforms=costs))  # type: ignore[arg-type]
    assert found == loop_pointwise(size, block, inputs, outputs).products + blocks * transforms


def test_expected_count_has_the_gradient_of_its_formula_and_it_is_positive() -> None:
    rng = np.random.default_rng(0)
    size, block, blocks = (5, 7), 2, 12
    inputs, outputs = (rng.uniform(0.01, 1, (4, n)).astype(np.float32) for n in (3, 5))
    gradients = jax.grad(partial(expected_pointwise_macs, size, block, 3, 5), argnums=(0, 1))(inputs, outputs)
    for gradient, other, channels in zip(gradients, (outputs, inputs), (3, 5), strict=True):
        expected = blocks * (other.sum(axis=1, keepdims=True) + 4)
        np.testing.assert_allclose(gradient, np.broadcast_to(expected, (4, channels)), rtol=1e-5)
        assert (np.asarray(gradient) > 0).all()


# Depthwise on block-constant maps, and groups


@given(
    st.sampled_from([1, 2]),
    st.sampled_from(["same", "torch"]),
    st.integers(1, 4),
    st.integers(2, 9),
    st.integers(2, 9),
)
def test_taps_on_a_block_constant_map_are_those_of_explicit_loops(stride, padding, block, height, width) -> None:
    out = (-(-height // stride), -(-width // stride))
    if padding == "torch":
        pads = (1, 1)
    else:
        pads = tuple(max((o - 1) * stride + 3 - n, 0) // 2 for o, n in zip(out, (height, width), strict=True))
    total = 0
    for i, j in itertools.product(range(out[0]), range(out[1])):
        total += len(
            {
                ((i * stride + a - pads[0]) // block, (j * stride + b - pads[1]) // block)
                for a, b in itertools.product(range(3), repeat=2)
            }
        )
    assert block_constant_taps(out, stride, block, pads) == total  # type: ignore[arg-type]


def test_taps_by_hand() -> None:
    # Along 4 pixels in blocks of 2, one zero before and after: pixels see 2, 2, 2, 2 blocks (one of them padding).
    assert block_constant_taps((4, 4), 1, 2, (1, 1)) == 8 * 8
    # One block of 4: the first and last pixel see a padding tap too.
    assert block_constant_taps((4, 4), 1, 4, (1, 1)) == 6 * 6
    # Stride 2 without padding before: pixels 0..2 and 2..4 (4 is padding): 2 blocks of 2 each.
    assert block_constant_taps((2, 2), 2, 2, (0, 0)) == 4 * 4
    assert block_constant_taps((3, 3), 1, 1, (1, 1)) == 81


@given(st.lists(st.sampled_from([0, 1, 4]), min_size=1, max_size=8), st.booleans(), st.sampled_from([1, 2]))
def test_a_tied_block_with_levels_0_1_n_costs_what_a_hand_count_says(counts, has_expand: bool, stride: int) -> None:
    """A mean (1 MAC an element) and a product at block resolution, the taps once combined, a product, a broadcast."""
    in_size, channels, features, taps = (8, 4), 3, 5, 1000
    out_size = (8 // stride, 4 // stride)
    whole, means = counts.count(4), counts.count(1)
    pixels, out_pixels = 32, 32 // stride**2
    blocks, out_blocks = pixels // 4, out_pixels // 4
    expand = pixels * channels * whole + (pixels * channels + blocks * channels * means if means else 0)
    depthwise = 9 * out_pixels * whole + (taps * means if has_expand else 9 * out_pixels * means)
    # Without an expand layer the map is no block-constant one: its mean is taken after the depthwise layer as well.
    project = out_pixels * features * whole
    if means:
        project += out_pixels * means + out_blocks * means * features + out_pixels * features
    found = group_macs(np.array(counts), 2, channels if has_expand else None, features, in_size, out_size, taps)
    assert found == {"expand": expand if has_expand else 0, "depthwise": depthwise, "project": project}
    # Without the mean of the narrow input and the broadcast to the narrow output, channels do not share anything.
    alone = [
        group_macs(
            np.array(some), 2, channels if has_expand else None, features, in_size, out_size, taps,
            narrow_transforms=False,
        )
        for some in (counts, *([count] for count in counts))
    ]  # fmt: skip
    assert alone[0] == {role: sum(macs[role] for macs in alone[1:]) for role in alone[0]}
    shared = (pixels * channels if has_expand else 0) + out_pixels * features if means else 0
    assert sum(found.values()) - sum(alone[0].values()) == shared


def test_a_tied_block_with_other_counts_returns_to_pixels_for_the_depthwise_layer() -> None:
    # K = 2 on 4x4: 4 blocks. Wide counts 4, 2, 2, 1, 0; C = 3, D = 5. Transforms of 2 coefficients: 8 a block.
    found = group_macs(np.array([4, 2, 2, 1, 0]), 2, 3, 5, (4, 4), (4, 4), taps_of_mean=64)
    narrow_in, narrow_out = 4 * 3 * 8, 4 * 5 * 8
    assert found == {
        "expand": 16 * 3 * 1 + narrow_in + 4 * (3 * 2 * 2 + 2 * 8) + 4 * (3 * 1),
        "depthwise": 9 * 16 * 1 + 9 * 16 * 2 + 64 * 1,
        "project": 16 * 5 * 1 + narrow_out + 4 * (2 * 8 + 5 * 2 * 2) + 4 * (4 + 5 * 1),
    }


# Whole networks


SPECS = {
    "both": small(),
    "input": small(sides="input"),
    "output": small(sides="output"),
    "tied": small(tied=True),
    "torch": small(tied=True, padding="torch", block_by_map={}),
    "wide": small(width=2.0, block=3, block_by_map={}),
}


def random_counts(spec: NetworkSpec, seed: int, levels: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = {}
    for path, (channels, num_coefs) in spec.mask_sizes.items():
        counts[path] = rng.choice([0, 1, num_coefs], channels) if levels else rng.integers(0, num_coefs + 1, channels)
    return counts


@pytest.mark.parametrize("kind", SPECS)
def test_nothing_pruned_is_the_dense_network(kind: str) -> None:
    spec = SPECS[kind]
    macs = network_macs(spec, spec.full_counts())
    assert macs.ratio == 1
    for layer in macs.layers:
        assert (layer.total, layer.pruned, layer.form) == (layer.dense, layer.dense, "dense")


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("seed", range(3))
def test_totals_are_sums_of_layers_and_layers_are_those_of_pointwise_macs(kind: str, seed: int) -> None:
    spec = SPECS[kind]
    counts = random_counts(spec, seed)
    macs = network_macs(spec, counts, released=["head"])
    summary, layers = macs.to_dict(), [layer.to_dict() for layer in macs.layers]
    assert [layer["name"] for layer in layers] == [layer.name for layer in spec.layers if layer.kind != "dense"]
    for field in ("dense", "pruned", "full_transforms", "paper_total", "total"):
        assert summary[field] == sum(layer[field] for layer in layers)
        assert type(summary[field]) is int
    assert summary["ratio"] == macs.ratio == summary["total"] / summary["dense"]
    assert summary["paper_ratio"] == macs.paper_ratio == summary["paper_total"] / summary["dense"]
    assert json.loads(json.dumps([summary, layers])) == [summary, layers]
    assert [layer["name"] for layer in layers if layer["released"]] == ["head"]
    for layer, found in zip(spec.layers, layers, strict=False):
        assert found["total"] <= found["paper_total"]
        assert found["ratio"] == found["total"] / found["dense"]
        if not layer.block:
            assert found["kept_counts"] == {"input": None, "output": None}
            assert found["pruned"] == found["full_transforms"] == found["paper_total"] == found["dense"]
            continue
        num_coefs = layer.block**2
        sides = []
        for side, mask, channels in (
            ("input", layer.input_mask, layer.in_channels),
            ("output", layer.output_mask, layer.out_channels),
        ):
            sides.append(list(counts[mask]) if mask else [num_coefs] * channels)
            expected = [sides[-1].count(n) for n in range(num_coefs + 1)] if mask else None
            assert found["kept_counts"][side] == expected
        assert found["num_coefs"] == num_coefs
        if layer.name != "head":
            assert found["paper_total"] == loop_pointwise(layer.in_size, layer.block, *sides).paper_total


@pytest.mark.parametrize("kind", ["both", "input", "output", "wide"])
def test_untied_layers_and_depthwise_layers_are_counted_without_dead_channels(kind: str) -> None:
    """A wide channel that is dead on one end of its block is dead on the other, and in between."""
    spec = SPECS[kind]
    counts = random_counts(spec, 7, levels=True)
    found = {layer.name: layer for layer in network_macs(spec, counts).layers}
    forms = set()
    for roles in units(spec).values():
        expand, depthwise, project = roles["expand"], roles["depthwise"], roles["project"]
        num_coefs = {role: layer.block**2 for role, layer in roles.items() if layer.block}

        def side(path, channels: int, full: int) -> list[int]:
            return [int(n) for n in counts[path]] if path else [full] * channels

        narrow_in = side(expand.input_mask, expand.in_channels, num_coefs["expand"])
        wide_out = side(expand.output_mask, expand.out_channels, num_coefs["expand"])
        wide_in = side(project.input_mask, project.in_channels, num_coefs["project"])
        narrow_out = side(project.output_mask, project.out_channels, num_coefs["project"])
        alive = [bool(out and back) for out, back in zip(wide_out, wide_in, strict=True)]
        wide_out, wide_in = ([n * a for n, a in zip(wide, alive, strict=True)] for wide in (wide_out, wide_in))
        for layer, sides in ((expand, (narrow_in, wide_out)), (project, (wide_in, narrow_out))):
            loops = loop_pointwise(layer.in_size, layer.block, *sides)
            assert (found[layer.name].total, found[layer.name].form) == (loops.total, loops.form)
            forms.add(loops.form)
        height, width = depthwise.out_size
        assert found[depthwise.name].total == 9 * height * width * sum(alive)
        effective = effective_counts(spec, counts)
        assert effective[expand.name][1].tolist() == wide_out
        assert effective[project.name][0].tolist() == wide_in
    assert "bands" in forms


@pytest.mark.parametrize("kind", ["tied", "torch"])
def test_tied_blocks_take_the_cheaper_of_groups_and_layers(kind: str) -> None:
    spec = SPECS[kind]
    for seed, levels in ((0, True), (1, True), (2, False)):
        counts = random_counts(spec, seed, levels)
        found = {layer.name: layer for layer in network_macs(spec, counts).layers}
        untied = effective_counts(spec, counts)
        tied_units = 0
        for roles in units(spec).values():
            if roles["expand"].output_mask != roles["project"].input_mask:
                continue
            tied_units += 1
            wide = counts[roles["project"].input_mask]
            by_layer = sum(
                loop_pointwise(layer.in_size, layer.block, *(list(map(int, s)) for s in untied[layer.name])).total
                for layer in roles.values()
                if layer.block
            ) + 9 * roles["depthwise"].out_size[0] * roles["depthwise"].out_size[1] * int((wide > 0).sum())
            by_group = sum(unit_group_macs(spec, roles, wide).values())
            total = sum(found[layer.name].total for layer in roles.values())
            assert total == min(by_group, by_layer)
            assert {found[layer.name].form == "groups" for layer in roles.values()} == {by_group < by_layer}
        assert tied_units >= 1


def test_group_counts_of_a_network_use_its_own_padding() -> None:
    """Levels {0, 1, N} on the block whose depthwise layer has stride 2: 14x14 to 7x7 in 4x4 blocks."""
    for padding, first, along in (("same", 0, 10), ("torch", -1, 11)):
        network = MobileNet("mobilenetv2_small", 10, block=4, tied=True, padding=padding)
        spec = network.spec((28, 28, 1))
        roles = units(spec)["block02"]
        depthwise, expand, project = roles["depthwise"], roles["expand"], roles["project"]
        assert (depthwise.in_size, depthwise.out_size, depthwise.stride) == ((14, 14), (7, 7), 2)
        assert along == sum(len({(2 * i + first + a) // 4 for a in range(3)}) for i in range(7))
        counts = np.zeros(depthwise.in_channels, int)
        counts[:3] = 1
        assert unit_group_macs(spec, roles, counts) == {
            "expand": 16 * (16 * expand.in_channels + 3 * expand.in_channels),
            "depthwise": 3 * along**2,
            "project": 4 * (3 * 16 + 3 * project.out_channels + 16 * project.out_channels),
        }


@pytest.mark.parametrize("kind", SPECS)
def test_spec_survives_json(kind: str) -> None:
    spec = dataclasses.replace(SPECS[kind], input_mean=(1.5, 2.0), input_std=(3.0, 4.0), class_names=("ant", "bee"))
    again = NetworkSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec and hash(again) == hash(spec)
    assert again.mask_sizes == spec.mask_sizes


@pytest.mark.parametrize("fields", [{}, {"layers": 3}, {"layers": [{"colour": "red"}]}, {"layers": [], "colour": 1}])
def test_fields_of_no_spec_are_a_value_error(fields: dict) -> None:
    with pytest.raises(ValueError, match="no NetworkSpec"):
        NetworkSpec.from_dict(fields)


def test_block_settings_that_do_not_fit_are_value_errors_with_words() -> None:
    network = MobileNet("mobilenetv2_small", 10)
    with pytest.raises(ValueError, match=r"block 8 is larger than the 7x7 map of layer block02/project"):
        dataclasses.replace(network, block=8).spec((28, 28, 1))
    with pytest.raises(ValueError, match=r"block_by_layer names 'block99/expand'; wrapped layers are block00/expand"):
        dataclasses.replace(network, block_by_layer={"block99/expand": 2}).spec((28, 28, 1))


# The compiler's own count


def compiled_flops(function, *arguments) -> float:
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"])  # type: ignore[index]


def test_the_compiler_counts_two_flops_a_mac_in_a_dense_layer() -> None:
    x, kernel = jnp.ones((8, 12, 16)), jnp.ones((16, 24))
    assert compiled_flops(dense_pointwise, x, kernel) == 2 * conv_macs((8, 12), 16, 24)


@pytest.mark.parametrize(
    ("block", "inputs", "outputs"),
    [
        (2, [4] * 16, [4] * 16),
        (2, [4] * 6 + [3] * 4 + [2] * 6, [4] * 5 + [2] * 11),
        (4, [16] * 6 + [8] * 4 + [3] * 6, [16] * 5 + [9] * 11),
    ],
)
def test_the_compiler_counts_the_papers_total_in_a_banded_layer(block: int, inputs, outputs) -> None:
    """Direct transforms, truncated channel by channel, and a product for each band."""
    plan = plan_bands(inputs, outputs, block)
    x, kernel = jnp.ones((16, 16, 16)), jnp.ones((16, 16))
    macs = pointwise_macs((16, 16), block, np.array(inputs), np.array(outputs))
    flops = compiled_flops(lambda x, kernel: banded_pointwise(x, kernel, plan), x, kernel)
    assert flops == 2 * macs.paper_total
