"""Chooses the block size of each layer of a pretrained network by the energies of its maps on training images."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fdjax.config import Config, LearnConfig
from fdjax.data import Dataset, limit_training, normalize, split_validation
from fdjax.data.batches import seeded_permutation
from fdjax.errors import UserError
from fdjax.graph.masks import SIDES, MaskedGraph
from fdjax.ops.pointwise import dense_pointwise
from fdjax.pruning.block_choice import (
    BlockChoice,
    Energies,
    Option,
    block_units,
    check_choice,
    choose_blocks,
    coefficient_energy,
    fitting_blocks,
)
from fdjax.training.build import check_maskable
from fdjax.training.network import remasked
from fdjax.training.own_network import zoo_network
from fdjax.training.restore import Restored, load_restored_data
from fdjax.zoo import FrequencyNetwork, FrequencyPointwise, check_tying

_CALIBRATION_STREAM, _EVALUATION_STREAM = 4, 7
_BATCH = 64


def side_energies(
    network: FrequencyNetwork,
    graph: MaskedGraph,
    variables: dict[str, Any],
    images: np.ndarray,
    candidates: Sequence[int],
    *,
    about_mean: bool = True,
) -> Energies:
    """Measures the energy of each coefficient on every masked side of the unpruned network.

    It measures the values that a mask multiplies: the input of a layer, and its output before batch norm. Outputs are
    scaled as batch norm scales them, because batch norm removes their own scale.

    Args:
      network: the network; its own masks are not used.
      graph: channel graph of the network, with the masks that will be learned and the scaling of images.
      variables: the network's collections.
      images: uint8 [n, H, W, C], shuffled, so that batches have similar energies.
      candidates: block sizes K to measure; a side skips those that do not fit its map.
      about_mean: whether to measure about the channel's mean in the batch. In refinement the batch norm after the layer
        makes up for a constant that is missing. False: measure the mean square, which counts without refinement.

    Returns:
      (layer name, "input" or "output") -> K -> mean energies, float64 [N, channels].
    """
    network = dataclasses.replace(network, mode="off")
    wanted = {
        (layer.name, side): fitting_blocks(layers, candidates)
        for layers in block_units(graph).values()
        for layer in layers
        for side in SIDES
        if graph.mask_of(layer.name, side)
    }

    @jax.jit
    def measure(variables: dict[str, Any], images: jax.Array):
        found = {}

        def look(call, args, kwargs, context):
            layer = context.module
            if isinstance(layer, FrequencyPointwise) and context.method_name == "__call__":
                x, norm = args[0], kwargs["norm"]
                var = norm.get_variable("batch_stats", "var")
                slope = norm.get_variable("params", "scale") * jax.lax.rsqrt(var + norm.epsilon)
                kernel = layer.get_variable("params", "kernel") * slope
                for side, y in (("input", x), ("output", dense_pointwise(x, kernel))):
                    place = ("/".join(layer.path), side)
                    if about_mean:
                        y -= jnp.mean(y, axis=(0, 1, 2))
                    if place in wanted:
                        found[place] = {block: coefficient_energy(y, block) for block in wanted[place]}
            return call(*args, **kwargs)

        with nn.intercept_methods(look):
            network.apply(variables, normalize(images, graph.input_mean, graph.input_std), train=False)
        return found

    total: Any = None
    # The batches have at most two sizes, so that at most two programs are compiled.
    for batch in np.array_split(images, -(-len(images) // _BATCH)):
        share = len(batch) / len(images)
        part = jax.tree.map(lambda e, share=share: share * np.asarray(e, np.float64), measure(variables, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def calibration_sample(train: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Draws a sample of indices.

    Args:
      train: the indices, int [n].
      seed: the seed of the sample.
      num_images: size of the sample; at most n are drawn.

    Returns:
      The sample in shuffled order, int [num_images or n].
    """
    return train[seeded_permutation(len(train), seed, _CALIBRATION_STREAM)[:num_images]]


def training_sample(config: Config, dataset: Dataset, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws a sample of the images that a run trains on; the validation share is left out.

    Args:
      config: the run's config.
      dataset: as `load_restored_data` opens it.
      num_images: size of the sample; at most as many as there are.

    Returns:
      Images uint8 [n, H, W, C] and labels int [n].
    """
    if config.data.unlabelled is None:  # Otherwise the limit is of the pictures without labels.
        dataset = limit_training(dataset, config.data.train_limit, config.seed)
    train, _ = split_validation(len(dataset.train_labels), dataset.train_labels, config.data.validation, config.seed)
    rows = calibration_sample(train, config.seed, num_images)
    return dataset.train_images[rows], dataset.train_labels[rows]


def check_counts(num_images: int, eval_limit: int | None) -> None:
    """Raises `UserError` if --images or --eval-limit is below 1."""
    for flag, number in (("images", num_images), ("eval-limit", eval_limit)):
        if number is not None and number < 1:
            raise UserError(f"--{flag} must be at least 1, got {number}")


def evaluation_sample(count: int, seed: int, limit: int | None) -> np.ndarray:
    """Draws a sample of the images that a network is evaluated on.

    Args:
      count: number of images.
      seed: the seed of the sample.
      limit: size of the sample; None, or `count` and more: all images.

    Returns:
      Their indices in ascending order, int [n].
    """
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(seeded_permutation(count, seed, _EVALUATION_STREAM)[:limit])


def masked_graph(restored: Restored, learn: LearnConfig) -> MaskedGraph:
    """Returns the channel graph of a restored network with masks by the blocks, sides and tying of `learn`.

    Raises:
      UserError: if the settings do not fit the network, or no layer can have masks.
    """
    check_maskable(restored.graph)
    check_tying(restored.config.model, learn)
    own = restored.graph
    try:
        return remasked(own, learn)
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_blocks_of(
    restored: Restored, learn: LearnConfig, candidates: Sequence[int], num_images: int, data_path: str | None = None
) -> dict[str, Any]:
    """Chooses a block size for every layer of a pretrained network.

    Args:
      restored: the checkpoint.
      learn: mask settings and target; its blocks are not used.
      candidates: block sizes K to choose from.
      num_images: number of the run's training images to measure on; at most as many as there are.
      data_path: directory of the data set; None: the run's own `data.path`.

    Returns:
      The report of `fdjax blocks`, JSON types.

    Raises:
      UserError: if the weights have been trained under masks, the settings do not fit the network, or the data set is
        missing.
    """
    if restored.weights_adapted:
        raise UserError(
            f"the checkpoint is in {restored.phase.name}, its weights have been trained under masks, or its batch norm "
            "corrected for them; blocks are chosen by the maps of an unpruned network: give a checkpoint that has done "
            "no more than pretrain and learn"
        )
    network = zoo_network(restored.network, "choosing blocks")
    if learn.target_macs is None:
        raise UserError("the checkpoint's config has no target; give one: --target-macs 0.5")
    if num_images < 1:
        raise UserError(f"--images must be at least 1, got {num_images}")
    graph = masked_graph(restored, dataclasses.replace(learn, block=1, block_by_map=(), block_by_layer=()))
    try:
        check_choice(graph, candidates, learn.target_macs)
    except ValueError as error:
        raise UserError(str(error)) from error

    dataset = load_restored_data(restored, data_path)
    images, _ = training_sample(restored.config, dataset, num_images)
    energies = side_energies(network, graph, restored.state.variables(), images, candidates)
    try:
        choice = choose_blocks(graph, energies, candidates, learn.target_macs, learn.counts_below_whole)
    except ValueError as error:
        raise UserError(str(error)) from error
    return _report(choice, restored.config.learn, learn, len(images))


def _report(choice: BlockChoice, before: LearnConfig, learn: LearnConfig, num_images: int) -> dict[str, Any]:
    def option_row(option: Option) -> dict[str, Any]:
        histograms = {path: np.bincount(kept, minlength=option.block**2 + 1) for path, kept in option.counts.items()}
        kept_counts = {path: histogram.tolist() for path, histogram in histograms.items()}
        return {"block": option.block, "lost": option.lost, "macs": option.macs, "kept_counts": kept_counts}

    return {
        "target_macs": learn.target_macs,
        "masks": {"sides": learn.sides, "tied": learn.tied, "levels": learn.levels},
        "num_images": num_images,
        "multiplier": choice.multiplier,
        "macs": choice.macs.to_dict(),
        "units": [
            {
                "name": name,
                "layers": [layer.name for layer in layers],
                "maps": [list(layer.in_size) for layer in layers],
                "options": [option_row(option) for option in choice.options[name]],
                "block": choice.chosen[name].block,
            }
            for name, layers in block_units(choice.network).items()
        ],
        "blocks": dict(choice.network.blocks),
        "flags": block_flags(choice.network, before, learn),
    }


def block_flags(graph: MaskedGraph, before: LearnConfig, learn: LearnConfig) -> list[str]:
    """Returns the flags of `train.py` that change the mask settings `before` to `learn`, with the blocks of `graph`."""
    frequent = Counter(graph.blocks.values())
    common = min(frequent, key=lambda block: (-frequent[block], block))
    by_map = dict(before.block_by_map)
    others = [
        (name, block)
        for name, block in graph.blocks.items()
        if by_map.get(graph.layers[name].in_size[0], common) != block
    ]
    flags = ["--learn.block", str(common)]
    if others or before.block_by_layer:
        flags += ["--learn.block-by-layer", *(word for name, block in others for word in (name, str(block)))]
    if learn.tied != before.tied:
        flags.append("--learn.tied" if learn.tied else "--learn.no-tied")
    if learn.levels != before.levels:
        flags += ["--learn.levels", learn.levels]
    if learn.sides != before.sides:
        flags += ["--learn.sides", learn.sides]
    # A run with a fixed lambda has no target; the target given here only says at which MACs blocks are compared.
    if before.target_macs is not None and learn.target_macs != before.target_macs:
        flags += ["--learn.target-macs", str(learn.target_macs)]
    return flags
