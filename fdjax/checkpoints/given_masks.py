"""Evaluates a trained network with given coefficient masks, which may be prefixes or any others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from fdjax.checkpoints.calibrate import (
    calibration_sample,
    check_counts,
    evaluation_sample,
    masked_graph,
    side_energies,
    training_sample,
)
from fdjax.checkpoints.statistics import corrected_statistics, make_statistics
from fdjax.config import LearnConfig
from fdjax.data import Dataset, ResizedImages, normalize, read_pictures, take_rows
from fdjax.errors import UserError
from fdjax.frozen.score import all_logits
from fdjax.graph.masks import SIDES, MaskedGraph
from fdjax.ops.pointwise import masked_pointwise
from fdjax.pruning.profiled import Masks, mask_energies, whole_masks
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.network import trace_network
from fdjax.training.own_network import zoo_network
from fdjax.training.restore import Restored, load_restored_data
from fdjax.zoo import FrequencyNetwork, FrequencyPointwise

COEF_MASKS = "coef_masks"


@dataclasses.dataclass(frozen=True)
class GivenMasks:
    """Applies a network with the coefficient masks in the entry `coef_masks` of its variables.

    The masks are arguments of the compiled program, so that one program serves for all masks.

    Attributes:
      network: the network; its own masks are not used.
      graph: channel graph of the network; it says which layers read which masks, and their blocks.
    """

    network: FrequencyNetwork
    graph: MaskedGraph

    def apply(self, variables: dict[str, Any], x: jax.Array, train: bool = False, mutable: Any = False) -> Any:
        """Computes logits.

        Args:
          variables: the network's collections, and `coef_masks`: the path of an FCMask -> its coefficient mask, float
            [N, channels]. Paths that are missing are not masked.
          x: normalised images, [B, H, W, C].
          train: whether batch norm uses batch statistics.
          mutable: collections to update, such as ["batch_stats"].

        Returns:
          Logits, [B, classes]; with `mutable` also the updated collections.
        """
        masks = variables[COEF_MASKS]
        collections = {name: value for name, value in variables.items() if name != COEF_MASKS}

        def masked(call, args, kwargs, context):
            module = context.module
            if not isinstance(module, FrequencyPointwise) or context.method_name != "__call__":
                return call(*args, **kwargs)
            name = "/".join(module.path)
            sides = [masks.get(self.graph.mask_of(name, side)) for side in SIDES]
            if all(mask is None for mask in sides):
                return call(*args, **kwargs)
            kernel = module.get_variable("params", "kernel").astype(args[0].dtype)
            sides = [None if mask is None else mask.astype(args[0].dtype) for mask in sides]
            y = masked_pointwise(args[0], kernel, self.graph.blocks[name], *sides)
            norm = kwargs.get("norm")
            return y if norm is None else norm(y)

        with nn.intercept_methods(masked):
            network = dataclasses.replace(self.network, mode="off")
            return network.apply(collections, x, train=train, mutable=mutable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """The images on which a network is measured.

    Attributes:
      num_images: number of the run's training images to measure coefficients on; at most as many as there are.
      eval_limit: number of test images to evaluate on; None: all.
      data_path: directory of the data set; None: the run's own `data.path`.
      calibration: a folder of pictures, at any depth, that replaces the run's training images.
      agreement: a folder of pictures, at any depth, that replaces the test images; their labels are the classes that
        the unpruned network predicts.
      recalibrate: whether batch norm's statistics are corrected for each masks, on the images that coefficients are
        measured on.
    """

    num_images: int = 512
    eval_limit: int | None = None
    data_path: str | None = None
    calibration: str | None = None
    agreement: str | None = None
    recalibrate: bool = True


class Tried(NamedTuple):
    """What masks make of a network.

    Attributes:
      top1: accuracy, 0 to 1.
      batch_stats: the statistics of batch norm that it was evaluated with.
    """

    top1: float
    batch_stats: Any


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained network with which masks are tried.

    Attributes:
      graph: channel graph of the network, with the masks that are tried and the scaling of images.
      energies: path of each FCMask -> mean squared coefficients, float64 [N, C] (`mask_energies`).
      num_images: number of images that they were measured on.
      num_examples: number of images that `top1` evaluates on.
      dataset: the run's whole data set; None if folders of pictures replace both of its parts.
      agreement: whether the labels are the classes that the unpruned network predicts.
      evaluate: masks -> accuracy and statistics.
      at_resolution: a side in pixels -> the unpruned network's accuracy, 0 to 1, on images resized to that square, and
        its dense MACs there.
    """

    graph: MaskedGraph
    energies: dict[str, np.ndarray]
    num_images: int
    num_examples: int
    dataset: Dataset | None
    agreement: bool
    evaluate: Callable[[Masks], Tried]
    at_resolution: Callable[[int], tuple[float, int]]

    def top1(self, masks: Masks) -> float:
        """Evaluates the network with masks.

        Args:
          masks: path of each FCMask -> bool [N, channels].

        Returns:
          The accuracy, 0 to 1.
        """
        return self.evaluate(masks).top1


def open_subject(restored: Restored, learn: LearnConfig, on: MeasuredOn) -> Subject:
    """Measures a trained network's coefficients and makes it ready for masks.

    Args:
      restored: a checkpoint whose weights have not been trained under masks.
      learn: block, sides and tying of the masks that will be tried.
      on: the images.

    Returns:
      The network, ready to be evaluated with masks.

    Raises:
      UserError: if the network is not of the zoo, its weights have been trained under masks, the settings do not fit
        it, a number is below 1, or the data set is missing.
    """
    if restored.weights_adapted:
        raise UserError(
            f"the checkpoint is in {restored.phase.name}, its weights have been trained under masks, or its batch norm "
            "corrected for them; profiling measures an unpruned network: give a checkpoint that has done no more than "
            "pretrain and learn"
        )
    check_counts(on.num_images, on.eval_limit)
    network = zoo_network(restored.network, "profiling")
    graph, collections = masked_graph(restored, learn), restored.state.variables()
    dataset = None if on.calibration and on.agreement else load_restored_data(restored, on.data_path)
    data, seed = restored.config.data, restored.config.seed
    read = functools.partial(read_pictures, shape=graph.input_shape, share=data.eval_crop, background=data.background)
    if on.calibration:
        images = read(on.calibration, rows=lambda count: calibration_sample(np.arange(count), seed, on.num_images))
    else:
        assert dataset is not None
        images, _ = training_sample(restored.config, dataset, on.num_images)
    blocks = sorted(set(graph.blocks.values()))
    energies = side_energies(network, graph, collections, images, blocks, about_mean=False)
    if on.agreement:
        test_images = read(on.agreement, rows=lambda count: evaluation_sample(count, seed, on.eval_limit))
        test_labels = _said(network, graph, collections, test_images)
    else:
        assert dataset is not None
        rows = evaluation_sample(len(dataset.test_labels), seed, on.eval_limit)
        test_images, test_labels = take_rows(dataset.test_images, rows), dataset.test_labels[rows]
    accuracy = make_evaluator(GivenMasks(network, graph), graph, Devices())
    measured = GivenMasks(dataclasses.replace(network, batch_norm_momentum=0.0), graph)
    statistics = make_statistics(measured, graph)

    def under(masks: Masks) -> dict[str, Any]:
        return {**collections, COEF_MASKS: {path: np.asarray(mask, np.float32) for path, mask in masks.items()}}

    @functools.cache
    def unpruned() -> Any:
        return statistics(under(whole_masks(graph)), images)

    def evaluate(masks: Masks) -> Tried:
        variables = under(masks)
        if on.recalibrate:
            own = collections["batch_stats"]
            variables["batch_stats"] = corrected_statistics(own, unpruned(), statistics(variables, images))
        return Tried(accuracy(variables, test_images, test_labels)["top1"], variables["batch_stats"])

    def at_resolution(side: int) -> tuple[float, int]:
        plain = network.without_masks()
        small = trace_network(
            plain, (side, side, graph.input_shape[2]), LearnConfig(block=1), count_classifier=not graph.uncounted
        )
        resized = ResizedImages(test_images, side)
        found = make_evaluator(plain, graph, Devices())(collections, resized, test_labels)
        return found["top1"], small.dense_macs

    energies = mask_energies(graph, energies)
    return Subject(graph, energies, len(images), len(test_labels), dataset, bool(on.agreement), evaluate, at_resolution)


def _said(network: FrequencyNetwork, graph: MaskedGraph, variables: dict[str, Any], images: np.ndarray) -> np.ndarray:
    """Returns the classes that the unpruned network predicts for images, int32 [n]."""

    @jax.jit
    def logits(batch: jax.Array) -> jax.Array:
        x = normalize(batch, graph.input_mean, graph.input_std)
        found = network.without_masks().apply(variables, x)
        assert isinstance(found, jax.Array)
        return found

    return all_logits(logits, images).argmax(axis=1).astype(np.int32)
