"""Writes weights that were trained elsewhere as the checkpoint of a run that has pretrained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.graph.masks import MaskedGraph
from fdjax.training.build import collection_of
from fdjax.training.health import nonfinite_network
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase
from fdjax.training.restore import Past, checkpoint_meta
from fdjax.training.state import create_state
from fdjax.training.summary import versions
from fdjax.training.workdir import IMPORT_FILE, write_json
from fdjax.zoo import FCMASK


def save_imported(
    folder: Path, config: Config, graph: MaskedGraph, variables: dict[str, Any], origin: dict[str, Any]
) -> None:
    """Writes imported variables as a checkpoint whose pretraining is done, and `import.json` beside it.

    Args:
      folder: new or empty (`fdjax.training.workdir.check_new_folder`).
      config: the network's config, with the padding and batch norm epsilon that the weights were trained with.
      graph: channel graph of the network, with the scaling of images, and class names if they are known.
      variables: the collections params and batch_stats, float32.
      origin: where the weights come from; JSON types, stored in the checkpoint.

    Raises:
      UserError: if a weight or statistic is not finite. Nothing has been written then.
    """
    save_trained(folder, config, graph, variables, Past(imported=origin))
    write_json(folder / IMPORT_FILE, origin)


def save_trained(folder: Path, config: Config, graph: MaskedGraph, variables: dict[str, Any], done: Past) -> None:
    """Writes variables as a checkpoint whose pretraining is done, in 0 steps.

    Args:
      folder: new or empty.
      config: the network's config.
      graph: channel graph of the network.
      variables: the collections params and batch_stats, float32; all masks become 1.
      done: the past of the weights; its history becomes that of pretraining.

    Raises:
      UserError: if a weight or statistic is not finite. Nothing has been written then.
    """
    problem = nonfinite_network(variables)
    if problem is not None:
        raise UserError(f"{problem}: the training of these weights has diverged, or their file is damaged; give others")
    config = dataclasses.replace(config, phases=("pretrain",))
    phase = Phase("pretrain", index=0, start=0, steps=0, steps_per_epoch=0)
    history = [{"name": phase.name, "steps": 0, "seconds": 0.0, "top1": done.dense_top1, "ratio": 1.0}]
    done = dataclasses.replace(done, history=history)
    whole = {**variables, FCMASK: collection_of(graph, graph.full_counts())}
    state = create_state(jax.tree.map(jnp.asarray, whole), config.seed, *optimizers_for(config, phase))
    meta = checkpoint_meta(config, graph, phase, phase.steps, done, versions())
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoints(folder / CHECKPOINT_FOLDER).save(phase.end, state, meta)
