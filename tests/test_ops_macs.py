"""MAC counts of one layer: hand counts, brute force, and the compiler's own count."""

from __future__ import annotations

import dataclasses
import itertools
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.ops import banded_pointwise, dense_pointwise, expected_pointwise_macs, plan_bands, pointwise_macs
from fdjax.ops.macs import block_constant_taps, block_transform_macs, conv_macs, depthwise_macs, group_macs

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


@given(st.lists(st.sampled_from([0, 1, 4]), min_size=1, max_size=8), st.sampled_from([1, 2]))
def test_a_tied_run_with_levels_0_1_n_costs_what_a_hand_count_says(counts, stride: int) -> None:
    """A mean (1 MAC an element) and a product at block resolution, the taps once combined, a product, a broadcast."""
    in_size, channels, features, taps = (8, 4), 3, 5, 1000
    out_size = (8 // stride, 4 // stride)
    whole, means = counts.count(4), counts.count(1)
    pixels, out_pixels = 32, 32 // stride**2
    blocks, out_blocks = pixels // 4, out_pixels // 4
    writer = pixels * channels * whole + (pixels * channels + blocks * channels * means if means else 0)
    depthwise = 9 * out_pixels * whole + taps * means
    reader = out_pixels * features * whole
    if means:
        reader += out_pixels * means + out_blocks * means * features + out_pixels * features
    found = group_macs(np.array(counts), 2, channels, features, in_size, out_size, taps)
    assert found == (writer, depthwise, reader)
    # Without the mean of the narrow input and the broadcast to the narrow output, channels do not share anything.
    alone = [
        group_macs(np.array(some), 2, channels, features, in_size, out_size, taps, narrow_transforms=False)
        for some in (counts, *([count] for count in counts))
    ]
    assert alone[0] == tuple(map(sum, zip(*alone[1:], strict=True)))
    shared = pixels * channels + out_pixels * features if means else 0
    assert sum(found) - sum(alone[0]) == shared


def test_a_tied_run_with_other_counts_returns_to_pixels_for_the_depthwise_layer() -> None:
    # K = 2 on 4x4: 4 blocks. Wide counts 4, 2, 2, 1, 0; C = 3, D = 5. Transforms of 2 coefficients: 8 a block.
    found = group_macs(np.array([4, 2, 2, 1, 0]), 2, 3, 5, (4, 4), (4, 4), taps_of_mean=64)
    narrow_in, narrow_out = 4 * 3 * 8, 4 * 5 * 8
    assert found == (
        16 * 3 * 1 + narrow_in + 4 * (3 * 2 * 2 + 2 * 8) + 4 * (3 * 1),
        9 * 16 * 1 + 9 * 16 * 2 + 64 * 1,
        16 * 5 * 1 + narrow_out + 4 * (2 * 8 + 5 * 2 * 2) + 4 * (4 + 5 * 1),
    )


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
