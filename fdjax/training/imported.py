"""Weights trained elsewhere, written as the checkpoint of a run that has pretrained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config
from fdjax.errors import UserError
from fdjax.nn import FCMASK
from fdjax.spec import NetworkSpec
from fdjax.training.build import collection_of
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase
from fdjax.training.restore import Past
from fdjax.training.state import create_state
from fdjax.training.summary import versions
from fdjax.training.workdir import check_folder, write_json

IMPORT_FILE = "import.json"


def check_import_target(folder: Path) -> None:
    """Raises `UserError` unless `folder`, given by --out, is new or empty and can be written; writes nothing."""
    check_folder(folder, "--out")
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--out {folder} is not empty; give a new or empty directory")


def save_imported(
    folder: Path, config: Config, spec: NetworkSpec, variables: dict[str, Any], origin: dict[str, Any]
) -> None:
    """Writes variables as a checkpoint whose pretraining is done, and `import.json` beside it.

    Args:
      folder: new or empty (`check_import_target`).
      config: with the padding and batch norm epsilon that the weights were trained with.
      spec: of the network, with preprocessing and, where they are known, class names.
      variables: the collections params and batch_stats, float32.
      origin: where the weights are from; JSON types, kept in the checkpoint.
    """
    config = dataclasses.replace(config, phases=("pretrain",))
    # No step was done here; what was done elsewhere counts as pretraining.
    phase = Phase("pretrain", index=0, start=0, steps=0, steps_per_epoch=0)
    done = Past(history=[{"name": phase.name, "steps": 0, "seconds": 0.0, "top1": None, "ratio": 1.0}], imported=origin)
    whole = {**variables, FCMASK: collection_of(spec, spec.full_counts())}
    state = create_state(jax.tree.map(jnp.asarray, whole), config.seed, *optimizers_for(config, phase))
    meta = {
        "config": config.to_dict(),
        "spec": spec.to_dict(),
        "phase": dataclasses.asdict(phase),
        "phase_step": phase.steps,
        "done": dataclasses.asdict(done),
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    Checkpoints(folder / CHECKPOINT_FOLDER).save(phase.end, state, meta)
    write_json(folder / IMPORT_FILE, origin)
