"""Choosing the blocks of a pretrained network's layers by what its maps look like on training images."""

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

_CALIBRATION_STREAM = 4
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
    """The energy of each coefficient on every masked side of the unpruned network.

    What a mask multiplies is measured: the input of a layer, and its output before batch norm. Outputs are scaled as
    the batch norm scales them, since their own scale means nothing to what follows.

    Args:
      network: any masks it has are not used.
      graph: channel graph of it, with the masks that will be learned and with preprocessing.
      variables: its collections.
      images: uint8 [n, H, W, C], shuffled, so that each batch is like the others.
      candidates: K; of each side those that fit are measured.
      about_mean: measure about the channel's mean in the batch: a constant that is missing is made up for by the batch
        norm after the layer, once weights are refined. False: the mean square as it is, which counts without that.

    Returns:
      (layer name, "input" or "output") -> K -> float64 [N, channels].
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
    # Of one size, or of two that differ by one: each is compiled for.
    for batch in np.array_split(images, -(-len(images) // _BATCH)):
        share = len(batch) / len(images)
        part = jax.tree.map(lambda e, share=share: share * np.asarray(e, np.float64), measure(variables, batch))
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def calibration_sample(train: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Of the indices `train`, `num_images` or as many as there are, shuffled by `seed`."""
    return train[seeded_permutation(len(train), seed, _CALIBRATION_STREAM)[:num_images]]


def training_sample(config: Config, dataset: Dataset, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """`calibration_sample` of what a run of `config` trains on, from the whole set: uint8 [n, H, W, C], labels [n]."""
    dataset = limit_training(dataset, config.data.train_limit, config.seed)
    train, _ = split_validation(len(dataset.train_labels), dataset.train_labels, config.data.validation, config.seed)
    rows = calibration_sample(train, config.seed, num_images)
    return dataset.train_images[rows], dataset.train_labels[rows]


def masked_graph(restored: Restored, learn: LearnConfig) -> MaskedGraph:
    """The channel graph of a restored network, with the blocks, sides and tying of `learn` in place of its own.

    Raises:
      UserError: settings that do not fit the network, or one without wrapped layers.
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
    """Chooses a block for every layer of a pretrained network.

    Args:
      restored: the checkpoint.
      learn: mask settings and target; its blocks are not used.
      candidates: K.
      num_images: of the run's training images (seeded, the validation share left out), as many as there are.
      data_path: in place of the run's own `data.path`.

    Returns:
      The report of `fdjax blocks`, of JSON types.

    Raises:
      UserError: the network has been refined under masks, the settings do not fit it, or the data are not there.
    """
    if restored.weights_adapted:
        raise UserError(
            f"the checkpoint is in {restored.phase.name}, its weights have been trained under masks; blocks are chosen "
            "by the maps of an unpruned network: give a checkpoint that has done no more than pretrain and learn"
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
    """The flags of `train.py` that turn the mask settings `before` into `learn`, with the blocks of `graph`."""
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
    # A run with a fixed lambda has no target; here it only says where blocks are compared.
    if before.target_macs is not None and learn.target_macs != before.target_macs:
        flags += ["--learn.target-macs", str(learn.target_macs)]
    return flags
