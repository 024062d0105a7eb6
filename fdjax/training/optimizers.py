"""The two optimizers, one for weights and one for masks; neither updates the other's collection."""

from __future__ import annotations

from typing import Any

import jax
import optax

from fdjax.config import Config, LearnConfig, WeightPhaseConfig
from fdjax.training.phases import Phase, phase_settings


def learning_rate_schedule(phase: WeightPhaseConfig, steps: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the learning rate of the weights by their update in the phase, from 0 to `steps`."""
    warmup = min(round(phase.warmup_epochs * steps_per_epoch), steps)
    after = max(1, steps - warmup)
    if phase.schedule == "cosine":
        schedule = optax.cosine_decay_schedule(phase.learning_rate, after)
    elif phase.schedule == "step":
        falls: dict[int, float] = {}
        for share in phase.step_at:
            at = max(0, round(share * steps) - warmup)
            falls[at] = falls.get(at, 1.0) * phase.step_factor
        schedule = optax.piecewise_constant_schedule(phase.learning_rate, falls)
    else:
        schedule = optax.constant_schedule(phase.learning_rate)
    if not warmup:
        return schedule
    rise = optax.linear_schedule(0.0, phase.learning_rate, warmup)
    return optax.join_schedules([rise, schedule], [warmup])


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _body(params: Any) -> Any:
    """Returns a tree that is True for all parameters but the classifier's."""
    return {name: jax.tree.map(lambda _, name=name: name != "classifier", layer) for name, layer in params.items()}


def weight_optimizer(phase: WeightPhaseConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Makes the optimizer of the weights.

    Weight decay acts on kernels only, and the body may have a lower learning rate than the classifier.
    """
    if phase.optimizer == "adamw":
        optimizer = optax.adamw(schedule, weight_decay=phase.weight_decay, mask=_kernels)
    else:
        optimizer = optax.chain(
            optax.add_decayed_weights(phase.weight_decay, mask=_kernels),
            optax.sgd(schedule, momentum=phase.momentum, nesterov=phase.momentum > 0),
        )
    if phase.body_rate == 1:
        return optimizer
    return optax.chain(optimizer, optax.masked(optax.scale(phase.body_rate), _body))


def mask_optimizer(learn: LearnConfig) -> optax.GradientTransformation:
    """Makes the optimizer of the masks; the step projects the masks to [0, 1] after each update."""
    if learn.optimizer == "adam":
        return optax.adam(learn.learning_rate)
    return optax.sgd(learn.learning_rate, momentum=learn.momentum)


def sharpening(learn: LearnConfig, phase: Phase) -> optax.Schedule | None:
    """Returns the pull towards levels by the run's step: 0 until the ramp ends, then rising to `learn.sharpen`."""
    if not learn.sharpen:
        return None
    ramp = round(learn.ramp * phase.steps)
    return optax.linear_schedule(0.0, learn.sharpen, max(1, phase.steps - ramp), phase.start + ramp)


def optimizers_for(config: Config, phase: Phase) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Makes the optimizers of a phase, for weights and for masks; one that is not used in the phase has no state."""
    weights = masks = optax.identity()
    settings = phase_settings(config, phase.name)
    if isinstance(settings, WeightPhaseConfig):
        schedule = learning_rate_schedule(settings, max(1, phase.weight_steps(config)), phase.steps_per_epoch)
        weights = weight_optimizer(settings, schedule)
    if phase.learns_masks:
        masks = mask_optimizer(config.learn)
    return weights, masks
