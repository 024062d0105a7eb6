"""Steps over 1, 2, 4 and 8 fake CPU devices, in a process of its own: python -m tests.data_parallel_worker OUT.json

Writes how far the states are from those of one device; `tests/test_devices.py` judges the figures.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import jax
import numpy as np
import optax

from fdjax.config import LearnConfig
from fdjax.data import channel_statistics, load_dataset
from fdjax.training.build import build_network
from fdjax.training.devices import Devices, to_host
from fdjax.training.feed import Feed
from fdjax.training.state import TrainState, create_state, init_variables
from fdjax.training.steps import Step, make_mask_step, make_prepare, make_weight_step
from tests.tiny_run import get_config

BATCH, EXAMPLES = 16, 160
COUNTS = (1, 2, 4, 8)
KINDS = ("weights", "masks")
# After one step the trace of a momentum optimizer is the gradient.
OPTIMIZER = optax.sgd(0.05, momentum=0.9)
ROWS = np.random.default_rng(1).permutation(EXAMPLES).reshape(-1, BATCH).astype(np.int32)

CONFIG = get_config()
DATASET = load_dataset(CONFIG.data.name, None, None, False)
IMAGES, LABELS = DATASET.train_images[:EXAMPLES], DATASET.train_labels[:EXAMPLES]


@cache
def devices_of(count: int) -> Devices:
    return Devices(local=count)


@cache
def step_of(kind: str, precision: str) -> Step:
    network, graph = build_network(CONFIG, DATASET.image_shape, DATASET.num_classes)
    mean, std = channel_statistics(IMAGES)
    graph = dataclasses.replace(graph, input_mean=mean, input_std=std)
    prepare = make_prepare(graph, crop_padding=2, flip=True, precision=precision)
    if kind == "weights":
        return make_weight_step(network.clone(mode="off"), OPTIMIZER, prepare, label_smoothing=0.1)
    return make_mask_step(network.clone(mode="soft"), graph, OPTIMIZER, prepare, LearnConfig())


@cache
def first_state() -> TrainState:
    """On the host, float32; masks inside (0, 1)."""
    network, _ = build_network(CONFIG, DATASET.image_shape, DATASET.num_classes)
    variables = init_variables(network, DATASET.image_shape, 0)
    rng = np.random.default_rng(2)
    masks = {"fcmask": jax.tree.map(lambda m: rng.uniform(0.3, 0.9, m.shape).astype(m.dtype), variables["fcmask"])}
    state = create_state({**variables, **masks}, 0, OPTIMIZER, OPTIMIZER)
    return to_host(state.replace(lambda_=np.float32(0.5)))


def in_double(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, state)


@cache
def feed_of(count: int, resident: bool, steps_per_dispatch: int) -> Feed:
    return Feed(devices_of(count), IMAGES, LABELS, resident=resident, steps_per_dispatch=steps_per_dispatch)


@cache
def program_of(count: int, kind: str, precision: str, resident: bool, steps_per_dispatch: int):
    return feed_of(count, resident, steps_per_dispatch).compile(step_of(kind, precision))


def run(
    count: int, kind: str, steps: int, precision: str = "float32", *, resident: bool = True, steps_per_dispatch: int = 1
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """Yields the state, still on the devices, and the metrics after each dispatch of `steps`."""
    program = program_of(count, kind, precision, resident, steps_per_dispatch)
    feed = feed_of(count, resident, steps_per_dispatch)
    state = devices_of(count).replicate(in_double(first_state()) if precision == "float64" else first_state())
    plan = ((None, ROWS[at : min(at + feed.longest, steps)]) for at in range(0, steps, feed.longest))
    for _, batch in feed.batches(plan):
        state, metrics = program(state, *batch)
        yield state, metrics


def last(*args, **kwargs) -> tuple[TrainState, dict[str, float]]:
    """The state on the host after all steps, and the sums of the metrics."""
    dispatches = list(run(*args, **kwargs))
    metrics = [jax.device_get(metrics) for _, metrics in dispatches]
    return to_host(dispatches[-1][0]), {name: float(sum(m[name] for m in metrics)) for name in metrics[0]}


def apart(left: Any, right: Any) -> float:
    """The largest of the leaves' max|left - right| / max|right|; whole numbers must be the same.

    Leaves far smaller than the largest are measured by a tenth of that: some gradients are zero but for rounding,
    those of biases and scales that the next batch norm takes away.
    """
    pairs = list(zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True))
    assert all(a.dtype == b.dtype and a.shape == b.shape for a, b in pairs)
    assert all(np.array_equal(a, b) for a, b in pairs if not np.issubdtype(a.dtype, np.floating))
    pairs = [(a, b) for a, b in pairs if not np.array_equal(a, b)]
    if not pairs:
        return 0.0
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(right))
    return max(float(np.abs(a - b).max() / max(np.abs(b).max(), largest / 10)) for a, b in pairs)


def parts(state: TrainState, metrics: dict[str, float]) -> dict[str, Any]:
    names = ("step", "params", "batch_stats", "fcmask", "weight_opt", "mask_opt")
    losses = {name: [np.asarray(value)] for name, value in metrics.items()}
    return losses | {name: getattr(state, name) for name in names}


def compare(steps: int, precision: str) -> dict[str, dict[str, float]]:
    """ "kind count" -> part -> distance from one device."""
    figures = {}
    for kind in KINDS:
        alone = parts(*last(1, kind, steps, precision))
        for count in COUNTS[1:]:
            these = parts(*last(count, kind, steps, precision))
            figures[f"{kind} {count}"] = {name: apart(these[name], alone[name]) for name in these}
    return figures


def compare_dispatches(kind: str, precision: str) -> dict[str, float]:
    """part -> distance of 5 and 2 steps at once from 7 single ones."""
    alone, together = (parts(*last(2, kind, 7, precision, steps_per_dispatch=longest)) for longest in (1, 5))
    return {name: apart(together[name], alone[name]) for name in alone}


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def moves(kind: str) -> dict[str, bool]:
    """Which collections one step on one device has moved: the comparisons are not of things that stand still."""
    (state, _), before = last(1, kind, 1), first_state()
    names = ("params", "batch_stats", "fcmask", "weight_opt", "mask_opt")
    return {name: bits(getattr(state, name)) != bits(getattr(before, name)) for name in names}


def main(out: str) -> None:
    before = bits(first_state())
    report: dict[str, Any] = {"devices": jax.device_count(), "float32": compare(1, "float32")}
    report["moves"] = {kind: moves(kind) for kind in KINDS}
    replicated = [
        leaf.sharding.is_fully_replicated and len(leaf.sharding.device_set) == count
        for count in COUNTS
        for kind in KINDS
        for state, _ in run(count, kind, 1)
        for leaf in jax.tree.leaves(state)
    ]
    report["replicated"] = all(replicated) and len(replicated) > 0
    report["host_fed_bit_equal"] = {
        kind: bits(last(4, kind, 3)[0]) == bits(last(4, kind, 3, resident=False)[0]) for kind in KINDS
    }
    report["dispatch"] = {"masks": compare_dispatches("masks", "float32")}
    report["host_state_untouched"] = before == bits(first_state())
    jax.config.update("jax_enable_x64", True)
    report["float64"] = compare(3, "float64")
    # In single precision seven steps of the weights make much of the rounding of the first.
    report["dispatch"]["weights"] = compare_dispatches("weights", "float64")
    with open(out, "w") as file:
        json.dump(report, file, indent=1)


if __name__ == "__main__":
    main(sys.argv[1])
