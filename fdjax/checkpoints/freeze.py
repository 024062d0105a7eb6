"""Freezes a checkpoint: compiles its network, measures it beside the masked one, and writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.data import Dataset, Images, normalize, open_dataset
from fdjax.errors import UserError
from fdjax.frozen import (
    Frozen,
    FrozenNetwork,
    Program,
    Stopwatch,
    check_target,
    fewest_macs,
    freeze,
    release_slower,
    save,
)
from fdjax.frozen.bench import dense_network
from fdjax.frozen.choice import layers_of
from fdjax.frozen.engines import find_engine
from fdjax.frozen.score import agreement, all_logits, check_finite, figures
from fdjax.frozen.speed import speed_on
from fdjax.frozen.targets import Estimate, compare_ahead
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import Counts, MaskedGraph
from fdjax.pruning import HardMasks
from fdjax.training.build import collection_of, hard_network
from fdjax.training.network import graph_variables
from fdjax.training.restore import Restored, check_data
from fdjax.training.summary import versions
from fdjax.zoo import FCMASK

# The settings of the data that a frozen network stores: where its images come from, and how they are prepared.
DATA_FIELDS = ("name", "path", "image_size", "grayscale", "loading", "eval_crop", "background")


def hard_masks_of(restored: Restored) -> HardMasks:
    """Returns the masks to freeze.

    Raises:
      UserError: if there are none, or they are still being learned.
    """
    phase, graph = restored.phase, restored.graph
    if restored.hard is None and (restored.done.imported or not graph.mask_sizes):
        # An imported network can be frozen without pruning: all masks are 1. Other networks may have no masks at all.
        counts = graph.full_counts()
        return HardMasks(counts, (), 0.0, network_macs(graph, counts))
    if restored.hard is None:
        raise UserError(
            f"the checkpoint has no masks: it is in {phase.name}, and nothing has been pruned; let its run go on with "
            "the phases learn and refine, or freeze a later checkpoint"
        )
    if phase.learns_masks and restored.phase_step < phase.steps:
        raise UserError(
            f"the checkpoint has soft masks only: {phase.name} is at step {restored.phase_step:,} of {phase.steps:,}; "
            "let its run finish the phase (the same train.py command goes on), or freeze a later checkpoint"
        )
    return restored.hard


def freeze_checkpoint(
    restored: Restored,
    out: Path,
    *,
    stopwatch: Stopwatch | None = None,
    estimate: Estimate | None = None,
    release: bool = False,
    data_path: str | None = None,
    compare_on: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Compiles a checkpoint's network, measures it beside the masked one, and writes it.

    If forms are chosen by time on an engine that reads ONNX files, the network is also written as an ONNX file. If the
    data set is missing, the accuracy is not measured.

    Args:
      restored: the checkpoint.
      out: the folder to write.
      stopwatch: chooses forms by measured time.
      estimate: chooses forms by a compiler's estimates, and removes masks that it estimates to cost time. Without
        `stopwatch` and `estimate`, MACs choose the forms.
      release: whether to remove the masks of layers that take longer pruned than released; needs a stopwatch.
      data_path: directory of the data set; None: the run's own `data.path`.
      compare_on: an engine and a batch size to time the network on, beside the dense one; None: no timing.

    Returns:
      The manifest, JSON types.

    Raises:
      UserError: if there are no hard masks, an operation has no frozen form, logits are not finite, or the folder holds
        something else.
    """
    hard = hard_masks_of(restored)
    check_target(out)
    graph, state = restored.graph, restored.state
    variables = graph_variables(graph, state.params, state.batch_stats)
    counts, released, newly = dict(hard.counts), list(hard.released), []
    chooser = stopwatch or estimate
    if release or estimate is not None:
        if chooser is None:
            raise ValueError("release compares times: it needs a stopwatch")
        counts, newly = release_slower(graph, variables, hard.counts, chooser)
        released = [name for name in graph.layers if name in {*released, *newly}]
    try:
        frozen = freeze(graph, variables, counts, chooser.choose if chooser else fewest_macs)
    except UserError:
        raise
    except ValueError as error:  # A network of the user's own may have operations that have no frozen form.
        raise UserError(f"this network cannot be frozen: {error}") from error
    macs = network_macs(graph, counts, released)
    facts = {
        "macs": macs.to_dict(),
        "layers": [layer.to_dict() for layer in macs.layers],
        "program_macs": frozen.program.macs(),
        "units": [_described(name, program, stopwatch) for name, (program, _) in layers_of(frozen).items()],
        "choice": {
            "by": "time" if stopwatch else "estimate" if estimate else "macs",
            "engine": stopwatch.engine if stopwatch else None,
            "batch": chooser.batch if chooser else None,
            "released_at_freezing": newly,
            **(_estimated(graph, frozen, estimate) if estimate else {}),
        },
        "time": _time(graph, frozen, counts, compare_on),
        **_accuracy(restored, frozen, counts, hard.counts if newly else None, data_path),
        "checkpoint": {
            "step": restored.phase.start + restored.phase_step,
            "phase": restored.phase.name,
            "dense_top1": restored.done.dense_top1,
        },
        "data": {name: getattr(restored.config.data, name) for name in DATA_FIELDS},
        "versions": versions(),
    }
    return save(out, graph, frozen, facts, onnx=stopwatch is not None and find_engine(stopwatch.engine).writes_onnx)


def _time(
    graph: MaskedGraph, frozen: Frozen, counts: Counts, compare_on: tuple[str, int] | None
) -> dict[str, Any] | None:
    """Returns `speed_on` an engine and batch; None if it is not asked for, or nothing is pruned."""
    whole = all((counts[path] == num_coefs).all() for path, (_, num_coefs) in graph.mask_sizes.items())
    if compare_on is None or whole:
        return None
    return speed_on(compare_on[0], frozen, dense_network(graph), compare_on[1])


def _estimated(graph: MaskedGraph, frozen: Frozen, estimate: Estimate) -> dict[str, Any]:
    """Returns the target, and the estimated cycles of every form, of the whole network and of the dense network."""
    networks = {"dense": dense_network(graph), "pruned": frozen}
    dense, pruned = compare_ahead(estimate.target, networks, estimate.batch, estimate.dtype)
    expected = {"dense_cycles": dense["cycles"], "cycles": pruned["cycles"], "ratio": pruned["cycle_ratio"]}
    return {"target": estimate.target, "cycles": estimate.cycles, "expected": expected}


def _described(name: str, program: Program, stopwatch: Stopwatch | None) -> dict[str, Any]:
    times = stopwatch.times.get(name) if stopwatch else None
    form = getattr(program.operations[0], "form", "dense")
    return {"name": name, "form": form, "macs": program.macs(), "milliseconds": times}


def _accuracy(
    restored: Restored, frozen: Frozen, counts: Counts, before: Counts | None, data_path: str | None
) -> dict[str, Any]:
    """Evaluates the frozen network on the test set beside the masked one.

    Args:
      restored: the checkpoint.
      frozen: the frozen network.
      counts: the kept counts that were frozen.
      before: the kept counts before layers were released, which are evaluated too; None: no layer was.
      data_path: directory of the data set.

    Returns:
      Entries of the manifest, JSON types: `accuracy`, the figures; None if the data set cannot be read, and then
      `accuracy_problem` says why.
    """
    try:
        dataset = run_data(restored.graph, dataclasses.asdict(restored.config.data), data_path)
    except UserError as error:
        if data_path is not None:
            raise
        grey = np.full((1, *restored.graph.input_shape), 128, np.uint8)
        check_finite(masked_logits(restored, counts, grey), "the checkpoint's network")
        return {"accuracy": None, "accuracy_problem": str(error)}
    images, labels = dataset.test_images, dataset.test_labels
    masked = masked_logits(restored, counts, images)
    check_finite(masked, "the checkpoint's network")
    logits = all_logits(FrozenNetwork(restored.graph, frozen, {}).predict, images)
    check_finite(logits, "the frozen network")
    found = {**figures(logits, labels), "masked": {**figures(masked, labels), **agreement(logits, masked)}}
    if before is not None:
        found["before_release"] = figures(masked_logits(restored, before, images), labels)
    return {"accuracy": found}


def evaluate_frozen(network: FrozenNetwork, data_path: str | None = None) -> dict[str, Any]:
    """Evaluates a frozen network on the test set of its run; returns accuracy and MACs as `evaluate_restored` does.

    Raises:
      UserError: if the data set is missing or does not fit the network.
    """
    if "data" not in network.manifest:
        raise UserError(
            f"the frozen network of {network.network.name} was not frozen from a run, and names no data set; "
            "evaluate it in Python, as a function: fdjax.load(FOLDER)(images)"
        )
    dataset = run_data(network.network, network.manifest["data"], data_path)
    checkpoint = network.manifest["checkpoint"]
    logits = all_logits(network.predict, dataset.test_images)
    check_finite(logits, "the frozen network")
    return {
        **figures(logits, dataset.test_labels),
        **{name: network.manifest[name] for name in ("macs", "layers")},
        "split": "test",
        "class_names": list(network.class_names),
        **checkpoint,
    }


def run_data(graph: MaskedGraph, data: Mapping[str, Any], data_path: str | None = None) -> Dataset:
    """Opens the data set that a network was trained on.

    Args:
      graph: channel graph of the network.
      data: the fields `DATA_FIELDS` of its run's config.
      data_path: directory of the data set; None: the field `path`.

    Returns:
      The data set, with its classes in the network's order.

    Raises:
      UserError: if the data set is missing or does not fit the network.
    """
    path = data["path"] if data_path is None else data_path
    size = data["image_size"]
    dataset = open_dataset(
        data["name"],
        path,
        tuple(size) if isinstance(size, list) else size,
        data["grayscale"],
        stream=data.get("loading") == "stream",
        crop_share=data.get("eval_crop", 1.0),
        background=data.get("background", "white"),
    ).in_order_of(graph.class_names)
    check_data(graph, dataset)
    return dataset


def masked_logits(restored: Restored, counts: Counts, images: Images) -> np.ndarray:
    """Computes the logits of the masked network.

    Args:
      restored: the checkpoint.
      counts: the kept counts of each FCMask by its path, int [C].
      images: raw images, uint8 [n, H, W, C].

    Returns:
      Logits, float32 [n, classes].
    """
    graph = restored.graph
    network = hard_network(restored.network, graph, counts)
    variables = {**restored.state.variables(), FCMASK: collection_of(graph, counts)}

    @jax.jit
    def logits(variables: Any, images: jax.Array) -> Any:
        x = normalize(images, graph.input_mean, graph.input_std, jnp.float32)
        return network.apply(variables, x, train=False)

    return all_logits(lambda batch: logits(variables, batch), images)
