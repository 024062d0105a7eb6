"""Prunes a trained network by profiling, and writes it as a checkpoint with hard masks for refinement."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.checkpoints.given_masks import MeasuredOn, Subject, open_subject
from fdjax.config import Config, LearnConfig
from fdjax.data import split_validation
from fdjax.data.batches import steps_per_epoch
from fdjax.errors import UserError
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import Counts
from fdjax.pruning.profiled import (
    DENSE_METHODS,
    Pruned,
    Scope,
    check_methods,
    gate_masks,
    mask_macs,
    prefix_counts,
    prune_share,
    prune_to_target,
    score,
)
from fdjax.training.build import collection_of
from fdjax.training.devices import to_host
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import has_teacher, plan_phases
from fdjax.training.restore import Past, Restored, checkpoint_meta
from fdjax.training.state import create_state
from fdjax.training.summary import versions
from fdjax.training.workdir import check_new_folder
from fdjax.zoo import FCMASK

# Why masks are refused.
_SPARSE = "its masks are no low-frequency prefixes, which alone have a dense form"


def prune_checkpoint(
    restored: Restored,
    learn: LearnConfig,
    method: str,
    out: Path,
    *,
    share: float | None = None,
    scope: Scope = "layer",
    on: MeasuredOn,
) -> dict[str, Any]:
    """Prunes a trained network and writes it as a checkpoint at step 0 of a refinement.

    The masks are gated by MACs, as learned masks are.

    Args:
      restored: a checkpoint whose weights have not been trained under masks.
      learn: block, sides, tying, and the target with its convention.
      method: one of `fdjax.pruning.profiled.METHODS` whose masks have a dense form.
      out: the folder to write: new or empty.
      share: share of the pieces to prune, 0 to 1, in place of the target.
      scope: see `fdjax.pruning.profiled.prune_share`.
      on: the images that coefficients and accuracy are measured on.

    Returns:
      The report of `fdjax prune`, JSON types.

    Raises:
      UserError: if the settings, the target or the data set do not fit, masks have no dense form, or the folder is not
        empty. Nothing has been written then.
    """
    check_methods([method])
    if method not in DENSE_METHODS:
        raise UserError(
            f"--method {method} leaves masks that are sparse, with no dense form to write; accepted are "
            f"{', '.join(DENSE_METHODS)} (fdjax profile measures {method})"
        )
    check_new_folder(out)
    # These settings are for the rounding of learned masks; here no mask is rounded.
    target = {"target_macs": None, "lambda_": 0.0} if share is not None else {}
    settings: dict[str, Any] = {"levels": "all", "group_multiple": 1, "gate": "macs", "approach": "lambda", **target}
    learn = dataclasses.replace(learn, **settings)
    subject = open_subject(restored, learn, on)
    pruned = _prune(subject, method, learn, share, scope)
    counts = prefix_counts(pruned.masks)
    assert counts is not None  # `_prune` accepts prefixes only.
    config = _refining(restored.config, learn, on.data_path)
    done = Past(
        dense_top1=restored.done.dense_top1,
        released=list(pruned.released),
        inherited=restored.finished_phases(),
        masks_learned=True,
        weights_adapted=on.recalibrate,
        filters_removed=restored.done.filters_removed,
        pruned_by=method,
        unpruned_macs=restored.done.unpruned_macs,
    )
    top1, statistics = subject.evaluate(pruned.masks)
    _write(out, restored, subject, config, counts, done, statistics)
    macs = network_macs(subject.graph, counts, pruned.released)
    return {
        "method": method,
        "scope": scope,
        "target_macs": learn.target_macs,
        "target_convention": learn.target_convention,
        "share": pruned.share,
        "num_images": subject.num_images,
        "recalibrated": on.recalibrate,
        # The accuracy of pretraining was measured on all test images, so it is comparable only with all of them.
        "dense_top1": restored.done.dense_top1 if on.eval_limit is None and not subject.agreement else None,
        "top1": None if subject.agreement else top1,
        "agreement": top1 if subject.agreement else None,
        "num_examples": subject.num_examples,
        "macs": macs.to_dict(),
        "flags": mask_flags(learn),
        "layers": [layer.to_dict() for layer in macs.layers],
        "versions": versions(),
    }


def mask_flags(learn: LearnConfig) -> list[str]:
    """Returns the flags of `train.py` that give a config the mask settings of the pruned checkpoint."""
    flags = ["--learn.block", str(learn.block), "--learn.sides", learn.sides, "--learn.levels", learn.levels]
    flags.append("--learn.tied" if learn.tied else "--learn.no-tied")
    # Without pairs too, so that those of the config do not stay.
    for name, pairs in (("map", learn.block_by_map), ("layer", learn.block_by_layer)):
        flags += [f"--learn.block-by-{name}", *(str(word) for pair in pairs for word in pair)]
    for name, rules in (("include", learn.include), ("exclude", learn.exclude)):
        if rules not in ((), ("*",)):
            flags += [f"--learn.{name}", *rules]
    if learn.target_macs is not None:
        flags += ["--learn.target-macs", str(learn.target_macs), "--learn.target-convention", learn.target_convention]
    else:
        flags += ["--learn.target-macs", "None", "--learn.lambda", "0.0"]
    return flags


def _prune(subject: Subject, method: str, learn: LearnConfig, share: float | None, scope: Scope) -> Pruned:
    graph, scores, convention = subject.graph, score(method, subject.energies), learn.target_convention
    try:
        if share is None:
            assert learn.target_macs is not None
            pruned = prune_to_target(graph, scores, learn.target_macs, scope=scope, convention=convention)
            if prefix_counts(pruned.masks) is None:
                raise ValueError(_SPARSE)
            return pruned
        masks = prune_share(graph, scores, share, scope)
        masks, released = gate_masks(graph, masks, convention)
        if prefix_counts(masks) is None:
            raise ValueError(_SPARSE)
        return Pruned(masks, share, released, mask_macs(graph, masks, released))
    except ValueError as error:
        raise UserError(f"--method {method}: {error}") from error


def _refining(config: Config, learn: LearnConfig, data_path: str | None) -> Config:
    """Returns the config of a run that has begun to refine the pruned network."""
    data = config.data
    if data_path is not None:
        data = dataclasses.replace(data, path=str(Path(data_path).expanduser().resolve()))
    return dataclasses.replace(config, phases=("refine",), learn=learn, data=data)


def _write(
    out: Path, restored: Restored, subject: Subject, config: Config, counts: Counts, done: Past, statistics: Any
) -> None:
    steps = 1  # Without the data set the steps of an epoch are not known; a refinement from here has its own.
    if subject.dataset is not None:
        labels = subject.dataset.train_labels
        done.num_train = len(labels)
        train, _ = split_validation(done.num_train, labels, config.data.validation, config.seed)
        steps = steps_per_epoch(len(train), config.data.batch_size)
    (phase,) = plan_phases(config, steps)
    fcmask = jax.tree.map(jnp.asarray, collection_of(subject.graph, counts))
    variables = {**restored.state.variables(), FCMASK: fcmask}
    state = create_state(variables, config.seed, *optimizers_for(config, phase))
    if has_teacher(config, phase) and not done.filters_removed:
        state = state.with_teacher()
    # The teacher has the unpruned network's statistics.
    state = state.replace(batch_stats=jax.tree.map(jnp.asarray, statistics))
    meta = checkpoint_meta(config, subject.graph, phase, 0, done, versions())
    Checkpoints(out.expanduser().resolve() / CHECKPOINT_FOLDER).save(0, to_host(state), meta)
