"""Checkpoints as a run leaves them, without the run: random weights and masks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import CheckpointConfig, Config, LearnConfig, ModelConfig
from fdjax.data import describe_source
from fdjax.ops.fcmask import counts_to_fcmask
from fdjax.training.build import build_network, facts_of
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import plan_phases
from fdjax.training.restore import Past
from fdjax.training.state import create_state
from tests.frozen_networks import random_counts, random_variables

STEPS_PER_EPOCH = 10
CONFIG = Config(
    phases=("pretrain", "learn", "refine"),
    model=ModelConfig(name="mobilenetv2_small", width=0.3),
    learn=LearnConfig(block=2, block_by_map=((7, 7),), tied=True, levels="0,1,N", target_macs=0.7),
    checkpoint=CheckpointConfig(time=False),
)


def write_checkpoint(
    workdir: Path, phase_name: str, phase_step: int | None = None, released=(), config: Config = CONFIG
) -> Path:
    """Writes the checkpoint of a run that is in the named phase: at `phase_step` of it, or at its end.

    Masks are random from the phase on that learns them: soft in it, rounded afterwards.
    """
    shape, classes = describe_source(config.data.name)
    network, graph = build_network(config, shape, len(classes))
    graph = dataclasses.replace(graph, input_mean=(73.0,), input_std=(90.0,), class_names=classes)
    phase = next(phase for phase in plan_phases(config, STEPS_PER_EPOCH) if phase.name == phase_name)
    counts = random_counts(graph, 1, (1,)) if phase.hard else graph.full_counts()
    fcmask = {path: counts_to_fcmask(count, graph.mask_sizes[path][1]) for path, count in counts.items()}
    if phase.learns_masks:
        rng = np.random.default_rng(1)
        fcmask = {path: rng.uniform(0, 1, len(mask)).astype(np.float32) for path, mask in fcmask.items()}
    variables = {**random_variables(network, graph, 0), "fcmask": unflatten_dict(fcmask, sep="/")}
    done = Past(released=list(released), masks_learned=phase.hard, dense_top1=0.5)
    step = phase.steps if phase_step is None else phase_step
    meta = {
        "config": config.to_dict(),
        "network": facts_of(graph),
        "phase": dataclasses.asdict(phase),
        "phase_step": step,
        "done": dataclasses.asdict(done),
    }
    state = create_state(variables, config.seed, *optimizers_for(config, phase))
    Checkpoints(workdir / CHECKPOINT_FOLDER).save(phase.start + step, state, meta)
    return workdir
