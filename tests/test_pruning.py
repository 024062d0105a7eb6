"""From learned masks to hard ones: rounding, levels, the gate, and the offset that meets a target."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fdjax.config import LearnConfig
from fdjax.errors import UserError
from fdjax.graph.counting import effective_counts, network_macs
from fdjax.graph.masks import SIDES, MaskedGraph
from fdjax.ops import kept_counts
from fdjax.ops.fcmask import counts_to_fcmask, level_counts
from fdjax.pruning import HardMasks, even_groups, gate_counts, harden, harden_to_target, mac_ratio, round_masks
from tests.small_network import small, tied_masks, units

GRAPHS = {
    "both": small(),
    "input": small(sides="input"),
    "output": small(sides="output"),
    "tied": small(tied=True),
    "tied, one block size": small(tied=True, block_by_map={}),
    "wide": small(width=2.0, block_by_map={}),
    "4x4": small(block=4, block_by_map={}),
}
LEVELS = {"all": None, "0,1,N": (0, 1), "0,9,N": (0, 9), "0,N": (0,)}  # 9 is less than some N, and more than others


def random_masks(graph: MaskedGraph, seed: int, low: float = 0.0, at_ends: float = 0.15) -> dict[str, np.ndarray]:
    """Uniform masks; a share of the channels stands at exactly 0, another at exactly 1."""
    rng = np.random.default_rng(seed)
    masks = {}
    for path, (channels, _) in graph.mask_sizes.items():
        mask = rng.uniform(low, 1, channels)
        mask[rng.uniform(size=channels) < at_ends] = 0
        mask[rng.uniform(size=channels) < at_ends] = 1
        masks[path] = mask.astype(np.float32)
    return masks


def partial_counts(counts: np.ndarray, num_coefs: int) -> np.ndarray:
    return (counts > 0) & (counts < num_coefs)


# Rounding


@given(st.sampled_from(sorted(GRAPHS)), st.integers(0, 1000))
def test_rounding_is_floor_of_m_n_plus_one_half_and_agrees_with_ops(kind: str, seed: int) -> None:
    graph = GRAPHS[kind]
    masks = random_masks(graph, seed)
    counts = round_masks(graph, masks)
    assert counts.keys() == graph.mask_sizes.keys()
    for path, (channels, num_coefs) in graph.mask_sizes.items():
        scaled = masks[path].astype(np.float64) * num_coefs
        # Next to a half float32 may round the other way than real numbers do.
        clear = np.abs(scaled % 1 - 0.5) > 1e-5
        np.testing.assert_array_equal(counts[path][clear], np.floor(scaled + 0.5)[clear])
        assert counts[path].shape == (channels,)
    longest = max(counts, key=lambda path: len(counts[path]))  # one shape: ops are compiled for each
    num_coefs = graph.mask_sizes[longest][1]
    np.testing.assert_array_equal(kept_counts(jnp.asarray(masks[longest]), num_coefs), counts[longest])


def test_rounding_agrees_with_ops_next_to_every_threshold() -> None:
    graph = GRAPHS["both"]
    masks = random_masks(graph, 0)
    for path in ("block00/expand/output", "head/output"):
        channels, num_coefs = graph.mask_sizes[path]
        thresholds = np.resize((np.arange(num_coefs) + 0.5) / num_coefs, channels).astype(np.float32)
        for side in (0, 1):
            masks[path] = np.nextafter(thresholds, side, dtype=np.float32)
            expected = kept_counts(jnp.asarray(masks[path]), num_coefs)
            np.testing.assert_array_equal(round_masks(graph, masks)[path], expected)


@given(st.integers(0, 1000), st.floats(-1, 1))
@example(0, -1.0)
@example(0, 1.0)
def test_an_offset_moves_all_masks_and_stops_at_the_ends(seed: int, offset: float) -> None:
    graph = GRAPHS["both"]
    masks = random_masks(graph, seed)
    counts = round_masks(graph, masks, offset=offset)
    for path, (_, num_coefs) in graph.mask_sizes.items():
        shifted = np.clip(masks[path] + np.float32(offset), 0, 1)
        assert np.abs(counts[path] - shifted * num_coefs).max() <= 0.5 + 1e-4
        assert counts[path].min() >= 0 and counts[path].max() <= num_coefs


@given(st.integers(0, 1000), st.sampled_from(sorted(LEVELS)), st.one_of(st.just(0.0), st.floats(-1, 1, width=32)))
@example(0, "0,1,N", 0.0)
@example(0, "0,1,N", -0.25)
def test_rounding_to_levels_agrees_with_ops_with_and_without_an_offset(seed: int, name: str, offset: float) -> None:
    graph, levels = GRAPHS["both"], LEVELS[name]
    masks = random_masks(graph, seed)
    counts = round_masks(graph, masks, levels, offset)
    for path, (_, num_coefs) in graph.mask_sizes.items():
        assert set(counts[path].tolist()) <= set(level_counts(num_coefs, levels))
    for path in ("block00/expand/output", "head/output"):  # few shapes: ops are compiled for each
        shifted = jnp.asarray(masks[path] + np.float32(offset))
        np.testing.assert_array_equal(kept_counts(shifted, graph.mask_sizes[path][1], levels), counts[path])


def test_rounding_to_levels_gives_every_level_an_equal_part_of_the_unit_interval() -> None:
    """With 0, 1 and N: 0 below a quarter, 1 up to three quarters, N from there on, whatever N is."""
    graph = GRAPHS["both"]
    values = np.array([0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1], np.float32)
    masks = {path: np.resize(values, channels) for path, (channels, _) in graph.mask_sizes.items()}
    for path, counts in round_masks(graph, masks, (0, 1)).items():
        channels, num_coefs = graph.mask_sizes[path]
        np.testing.assert_array_equal(counts, np.resize([0, 0, 1, 1, 1, num_coefs, num_coefs], channels))


def test_levels_of_a_config_speak_of_n() -> None:
    for text, expected in (
        ("0,1,N", {1: (0, 1), 4: (0, 1, 4), 49: (0, 1, 49)}),
        ("N, 9,0, 9", {4: (0, 4), 9: (0, 9), 49: (0, 9, 49)}),
        ("all", {2: (0, 1, 2), 4: (0, 1, 2, 3, 4)}),
    ):
        for num_coefs, counts in expected.items():
            assert level_counts(num_coefs, LearnConfig(levels=text).counts_below_whole) == counts
    assert LearnConfig(levels="all").counts_below_whole is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"target_macs": 2.0}, "target_macs is 2.0"),
        ({"target_macs": 0.0}, "target_macs is 0.0"),
        ({"gate": "time"}, "'macs', 'none'"),
        ({"convention": "all"}, "'total', 'paper'"),
        ({"group_multiple": 0}, "give 1 or more"),
    ],
)
def test_settings_that_do_not_exist_are_named(settings, named) -> None:
    graph = GRAPHS["both"]
    with pytest.raises(UserError, match=named):
        harden(graph, random_masks(graph, 0), **settings)


def test_hard_masks_survive_the_trip_through_the_collection() -> None:
    graph = GRAPHS["both"]
    hard = harden(graph, random_masks(graph, 0))
    again = {path: counts_to_fcmask(counts, graph.mask_sizes[path][1]) for path, counts in hard.counts.items()}
    for path, counts in round_masks(graph, again).items():
        np.testing.assert_array_equal(counts, hard.counts[path])


# The gate


def masks_on(graph: MaskedGraph, *names: str) -> dict[str, int]:
    """Path of every mask on a side of these layers -> N."""
    paths = (graph.mask_of(name, side) for name in names for side in SIDES)
    return {path: graph.mask_sizes[path][1] for path in paths if path}


def check_release(graph: MaskedGraph, before, after, released: tuple[str, ...]) -> None:
    """Released layers: partial counts became N, dead channels stayed dead; nothing else moved."""
    touched = masks_on(graph, *released)
    for path, counts in before.items():
        expected = np.where(counts > 0, touched[path], 0) if path in touched else counts
        np.testing.assert_array_equal(after[path], expected, err_msg=path)


@given(
    st.sampled_from(sorted(GRAPHS)), st.sampled_from(sorted(LEVELS)), st.floats(0, 0.9), st.integers(0, 10_000),
    st.sampled_from(["total", "paper"]),
)  # fmt: skip
@example("both", "all", 0.0, 1, "paper")
@example("both", "all", 0.0, 1, "total")
@example("tied", "0,1,N", 0.0, 1, "total")
def test_the_gate_never_makes_a_network_dearer(kind: str, levels: str, low: float, seed: int, convention: str) -> None:
    graph = GRAPHS[kind]
    counts = round_masks(graph, random_masks(graph, seed, low), LEVELS[levels])
    gated, released = gate_counts(graph, counts, convention)
    check_release(graph, counts, gated, released)
    before, after = network_macs(graph, counts), network_macs(graph, gated, released)
    assert mac_ratio(after, convention) <= mac_ratio(before, convention)
    assert mac_ratio(after, convention) <= 1
    assert [layer.name for layer in after.layers if layer.released] == list(released)
    if not tied_masks(graph):  # layer by layer, too
        field = "paper_total" if convention == "paper" else "total"
        for old, new in zip(before.layers, after.layers, strict=True):
            assert getattr(new, field) <= min(getattr(old, field), old.dense), new.name


def test_a_dead_wide_channel_does_not_fool_the_papers_gate() -> None:
    """Expand makes one coefficient of channels that project drops: the paper's count pays for it, and more for all."""
    graph = small(block_by_map={})
    counts = graph.full_counts()
    expand, project = units(graph)["block00"]["expand"], units(graph)["block00"]["project"]
    counts["block00/expand/output"] = np.full(expand.out_channels, 1)
    counts["block00/project/input"] = np.zeros(project.in_channels, int)
    gated, released = gate_counts(graph, counts, "paper")
    before, after = (
        {layer.name: layer.paper_total for layer in macs.layers}[expand.name]
        for macs in (network_macs(graph, counts), network_macs(graph, gated, released))
    )
    assert after <= before


@pytest.mark.parametrize("convention", ["total", "paper"])
@pytest.mark.parametrize("kind", GRAPHS)
def test_a_layer_is_released_exactly_when_pruning_it_is_no_cheaper(kind: str, convention: str) -> None:
    """Each decision tried by hand, both ways, on a network in which no channel is dead."""
    graph = GRAPHS[kind]
    counts = {path: np.maximum(c, 1) for path, c in round_masks(graph, random_masks(graph, 5, 0.3)).items()}
    _, released = gate_counts(graph, counts, convention)
    rooms = [tuple(name for name, _ in mask.sides) for mask in tied_masks(graph).values()]
    rooms += [(name,) for name in graph.blocks if not any(name in room for room in rooms)]
    field = "paper_total" if convention == "paper" else "total"
    for room in rooms:
        raised = counts | {path: np.full_like(counts[path], n) for path, n in masks_on(graph, *room).items()}
        pruned = network_macs(graph, counts).to_dict()[field]
        whole = network_macs(graph, raised, room).to_dict()[field]
        assert ({*room} <= {*released}) == (pruned >= whole), room
        assert {*room} <= {*released} or not {*room} & {*released}


def test_nothing_pruned_is_released_by_both_conventions() -> None:
    for graph in GRAPHS.values():
        for convention in ("total", "paper"):
            gated, released = gate_counts(graph, graph.full_counts(), convention)
            assert released == (*graph.blocks,)
            macs = network_macs(graph, gated, released)
            assert macs.ratio == macs.paper_ratio == 1


def test_tied_blocks_are_released_as_a_whole() -> None:
    graph = GRAPHS["tied, one block size"]
    seen = set()
    for seed in range(12):
        counts = round_masks(graph, random_masks(graph, seed, 0.1 * (seed % 8)))
        gated, released = gate_counts(graph, counts)
        check_release(graph, counts, gated, released)
        assert tied_masks(graph).keys() == units(graph).keys()
        for unit in units(graph):
            names = {f"{unit}/expand", f"{unit}/project"}
            assert names <= {*released} or not names & {*released}
            seen.add(names <= {*released})
    assert seen == {True, False}


def test_released_layers_come_in_the_networks_order() -> None:
    for kind in ("both", "tied"):
        graph = GRAPHS[kind]
        _, released = gate_counts(graph, round_masks(graph, random_masks(graph, 3, 0.6)))
        order = [*graph.layers]
        assert len(released) > 1
        assert list(released) == sorted(released, key=order.index)


def test_the_gate_can_be_left_out() -> None:
    graph = GRAPHS["both"]
    masks = random_masks(graph, 0, 0.7)
    loose, gated = harden(graph, masks, gate="none"), harden(graph, masks)
    assert loose.released == () and gated.released
    for path, counts in round_masks(graph, masks).items():
        np.testing.assert_array_equal(loose.counts[path], counts)
    assert gated.macs.ratio < loose.macs.ratio


def test_hard_masks_carry_the_count_of_the_network_they_make() -> None:
    for kind, graph in GRAPHS.items():
        hard = harden(graph, random_masks(graph, 0))
        assert hard.macs == network_macs(graph, hard.counts, hard.released), kind
        assert hard.offset == 0


def test_gating_twice_changes_nothing() -> None:
    for kind, graph in GRAPHS.items():
        for convention in ("total", "paper"):
            once, _ = gate_counts(graph, round_masks(graph, random_masks(graph, 4, 0.2)), convention)
            twice, _ = gate_counts(graph, once, convention)
            for path in once:
                np.testing.assert_array_equal(once[path], twice[path], err_msg=kind)


def test_dead_channels_of_the_gated_network_are_those_of_the_masks() -> None:
    graph = GRAPHS["both"]
    counts = round_masks(graph, random_masks(graph, 9))
    gated, _ = gate_counts(graph, counts)
    before, after = effective_counts(graph, counts), effective_counts(graph, gated)
    for name, sides in before.items():
        for left, right in zip(sides, after[name], strict=True):
            np.testing.assert_array_equal(left == 0, right == 0)


# Even groups


@given(st.sampled_from(["tied", "tied, one block size", "both"]), st.sampled_from(sorted(LEVELS)), st.integers(0, 1000))
def test_groups_are_multiples_and_follow_the_order_of_the_masks(kind: str, levels: str, seed: int) -> None:
    graph, multiple = GRAPHS[kind], 8
    masks = random_masks(graph, seed)
    counts = round_masks(graph, masks, LEVELS[levels])
    evened = even_groups(graph, masks, counts, multiple)
    shared = {mask.path for mask in tied_masks(graph).values()}
    for path, old in counts.items():
        new = evened[path]
        if path not in shared and len(old) < multiple:
            np.testing.assert_array_equal(new, old)
            continue
        assert set(new) <= {0, *old}
        for count in np.unique(old[old > 0]):
            width, was = int((new >= count).sum()), int((old >= count).sum())
            assert width % multiple == 0 or width == len(new)
            assert abs(width - was) <= multiple // 2
        above = masks[path][:, None] > masks[path][None, :]
        assert (new[:, None] >= new[None, :])[above].all()


def test_even_groups_by_hand() -> None:
    """12 channels: of 7 that keep all and 2 more that keep the mean, 8 and 8 are left in multiples of 4."""
    graph = GRAPHS["tied, one block size"]
    path, (channels, num_coefs) = next(item for item in graph.mask_sizes.items() if item[0].endswith("/wide"))
    masks = random_masks(graph, 0)
    masks[path] = np.linspace(0, 1, channels).astype(np.float32)
    counts = dict(round_masks(graph, masks))
    counts[path] = np.zeros(channels, int)
    counts[path][-9:], counts[path][-7:] = 1, num_coefs
    expected = np.zeros(channels, int)
    expected[-8:] = num_coefs
    np.testing.assert_array_equal(even_groups(graph, masks, counts, 4)[path], expected)
    np.testing.assert_array_equal(even_groups(graph, masks, counts, 1)[path], counts[path])


def test_a_space_that_is_nearer_to_whole_than_to_a_multiple_stays_whole() -> None:
    """Masks that nothing prunes are not made smaller: 60 and 64 of 64 channels are nearer to all than to 48."""
    graph = GRAPHS["tied, one block size"]
    path, (channels, num_coefs) = next(item for item in graph.mask_sizes.items() if item[0] == "block00/wide")
    whole = {at: np.ones(size, np.float32) for at, (size, _) in graph.mask_sizes.items()}
    assert channels == 64 and harden(graph, whole, group_multiple=48).macs.ratio == 1.0
    counts = dict(round_masks(graph, whole))
    for kept, expected in ((64, 64), (60, 64), (50, 48)):
        counts[path] = np.where(np.arange(channels) < kept, num_coefs, 0)
        assert (even_groups(graph, whole, counts, 48)[path] > 0).sum() == expected


def test_a_target_and_a_time_for_the_gate_are_not_both_accepted() -> None:
    graph = GRAPHS["tied, one block size"]
    with pytest.raises(UserError, match="give one of them"):
        harden(graph, random_masks(graph, 0), target_macs=0.5, time=lambda *_: 1.0)


# The target

TARGETS = (0.2, 0.35, 0.5, 0.65, 0.8)


def at_targets(kind: str, seed: int, **settings) -> list[HardMasks]:
    graph = GRAPHS[kind]
    masks = random_masks(graph, seed, at_ends=0)  # masks of one value move together: the ratio would have steps
    return [harden_to_target(graph, masks, target, **settings) for target in TARGETS]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("both", {}),
        ("wide", {}),
        ("input", {}),
        ("output", {}),
        ("tied", {}),
        ("tied, one block size", {"levels": LEVELS["0,1,N"]}),
        ("both", {"levels": LEVELS["0,N"]}),
        ("tied", {"levels": LEVELS["0,1,N"], "group_multiple": 2}),
        ("both", {"group_multiple": 2}),
        ("4x4", {"gate": "none"}),
    ],
)
def test_random_masks_are_hardened_to_within_2_per_cent_of_any_target(kind: str, settings: dict) -> None:
    graph, ratios = GRAPHS[kind], []
    for target, hard in zip(TARGETS, at_targets(kind, 0, **settings), strict=True):
        assert abs(hard.macs.ratio - target) <= 0.02 * target
        again = harden(graph, random_masks(graph, 0, at_ends=0), offset=hard.offset, **settings)
        assert again.macs == hard.macs and again.released == hard.released
        ratios.append(hard.macs.ratio)
    assert all(left < right for left, right in itertools.pairwise(ratios))


def test_a_target_of_the_papers_convention_is_met_by_the_papers_count() -> None:
    for target, hard in zip(TARGETS[1:], at_targets("wide", 0, convention="paper")[1:], strict=True):
        assert abs(hard.macs.paper_ratio - target) <= 0.02 * target


@given(st.integers(0, 1000), st.floats(0.05, 1), st.floats(0.05, 1))
def test_a_higher_target_never_gives_a_smaller_network(seed: int, first: float, second: float) -> None:
    graph = GRAPHS["tied"]
    masks = random_masks(graph, seed)
    low, high = (harden_to_target(graph, masks, target, iterations=12) for target in sorted((first, second)))
    assert low.macs.ratio <= high.macs.ratio
    assert low.offset <= high.offset


def test_masks_that_meet_the_target_are_left_as_they_are() -> None:
    graph = GRAPHS["both"]
    masks = random_masks(graph, 0)
    as_they_stand = harden(graph, masks)
    hard = harden_to_target(graph, masks, as_they_stand.macs.ratio)
    assert hard.offset == 0
    for path, counts in as_they_stand.counts.items():
        np.testing.assert_array_equal(hard.counts[path], counts)


def test_masks_that_are_all_one_are_shifted_down_and_all_zero_up() -> None:
    graph = GRAPHS["wide"]
    ones = {path: np.ones(channels, np.float32) for path, (channels, _) in graph.mask_sizes.items()}
    zeros = {path: np.zeros_like(mask) for path, mask in ones.items()}
    assert harden_to_target(graph, ones, 0.5).offset < 0 < harden_to_target(graph, zeros, 0.5).offset
    assert harden_to_target(graph, ones, 1.0).macs.ratio == 1


@pytest.mark.parametrize("levels", ["0,1,N", "0,N"])
@pytest.mark.parametrize("kind", ["wide", "tied, one block size"])
def test_of_equal_masks_only_as_many_change_as_the_target_asks_for(kind: str, levels: str) -> None:
    graph = GRAPHS[kind]
    ones = {path: np.ones(channels, np.float32) for path, (channels, _) in graph.mask_sizes.items()}
    for target in TARGETS:
        hard = harden_to_target(graph, ones, target, levels=LEVELS[levels], gate="none")
        assert abs(hard.macs.ratio - target) <= 0.02 * target
        # Every mask keeps the same share of its channels, but for whole numbers, and keeps its first channels.
        falling = [counts for counts in hard.counts.values() if np.ptp(counts)]
        shares = [((counts == counts.max()).mean(), 1 / len(counts)) for counts in falling]
        assert max(share - one for share, one in shares) <= min(share + one for share, one in shares)
        assert all((np.diff(counts) <= 0).all() for counts in falling)


def test_a_network_with_masks_on_one_side_hardens_too() -> None:
    """sides="output": the project layers' wide side has no mask, so that expand's masks decide alone."""
    graph = GRAPHS["output"]
    masks = random_masks(graph, 2)
    assert not any(path.endswith("/input") for path in masks)
    hard = harden(graph, masks)
    dead = hard.counts["block01/expand/output"] == 0
    np.testing.assert_array_equal(effective_counts(graph, hard.counts)["block01/project"][0] == 0, dead)
    assert dead.any()
