"""A run, from a config and a workdir to a summary: the order of its phases, and the steps of each.

The way from `train` to a step: `train` opens the run, `_train_phases` goes through its phases, `make_steps` makes what
a phase repeats. If a run is interrupted, it can resume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.config import Config, WeightPhaseConfig
from fdjax.errors import RunStopped, UserError
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning.timed import TimeTable
from fdjax.training.build import counts_of, hard_network
from fdjax.training.compilation import tidy_after_compilations
from fdjax.training.devices import Devices
from fdjax.training.lock import locked
from fdjax.training.loop import Run
from fdjax.training.opening import open_run, stopped, summary_if_finished, write_beginning
from fdjax.training.optimizers import optimizers_for, sharpening
from fdjax.training.own_network import Network
from fdjax.training.phases import Phase, has_teacher, phase_settings
from fdjax.training.state import TrainState
from fdjax.training.steps import (
    Step,
    balancing_weights,
    labels_alone,
    make_distillation,
    make_mask_step,
    make_prepare,
    make_weight_step,
    skip_nonfinite,
    with_class_weights,
)
from fdjax.training.stopping import Stopping
from fdjax.training.streaming import make_feed
from fdjax.training.summary import describe
from fdjax.training.workdir import CONFIG_FILE, SUMMARY_FILE, check_folder


def train(
    config: Config,
    workdir: str,
    init: str | None = None,
    *,
    local_devices: int | None = None,
    profile: int = 0,
    stopping: Stopping | None = None,
) -> dict[str, Any]:
    """Trains as `config` describes in `workdir`; a run that is there already is resumed.

    Args:
      config: the run's config.
      workdir: a new or empty directory, or that of the run to resume.
      init: a checkpoint of another run to start from.
      local_devices: number of each process's devices to use; None: all.
      profile: number of steps of each phase to trace.
      stopping: asks the run to save and stop.

    Returns:
      The summary, as `summary.json` has it.

    Raises:
      UserError: if what was asked for does not exist, does not fit, or the directory holds another run. Nothing has
        been written then.
      RunStopped: if the run has diverged, or a file cannot be written.
      RunInterrupted: if `stopping` asked for it.
    """
    tidy_after_compilations()
    devices = Devices(local_devices)
    devices.check_precision(config.model.precision)
    devices.check_batch(config.data.batch_size)
    folder = Path(workdir).expanduser().resolve()
    check_folder(folder, "--workdir")
    with contextlib.ExitStack() as held:
        begun = (folder / CONFIG_FILE).exists()
        if begun and devices.is_writer:
            held.enter_context(locked(folder))
        run, source = open_run(config, folder, init, devices, profile, stopping)
        summary = summary_if_finished(run)
        if summary is not None:
            if devices.is_writer:
                # A sweep tells by their times that the summary is of this config; those of copies may differ.
                times = [(folder / name).stat().st_mtime_ns for name in (CONFIG_FILE, SUMMARY_FILE)]
                if times[0] > times[1]:
                    os.utime(folder / SUMMARY_FILE)
                print(f"the run in {folder} is finished; nothing to do. Its result:\n{describe(summary)}")
            return summary
        # However the run ends, its saves are finished before the lock is released.
        held.callback(run.saves.join)
        # Another process may still be reading the files that process 0 writes from here on.
        devices.wait_for_all("before the run")
        try:
            if devices.is_writer:
                folder.mkdir(parents=True, exist_ok=True)
                if not begun:
                    held.enter_context(locked(folder))
                    if (folder / CONFIG_FILE).exists():
                        raise UserError(f"--workdir {folder}: another process has begun a run there; give another one")
                write_beginning(folder, run.config, source)
            run.announce()
            summary = run.finish(_train_phases(run))
        except (RunStopped, OSError) as error:
            raise stopped(error, folder) from error
        if devices.is_writer:
            print(f"{describe(summary)}\nresults:  {folder}")
        devices.wait_for_all("after the run")
        return summary


def _train_phases(run: Run) -> TrainState:
    """Trains the phases in their order, from where the run starts or resumes; returns the state at the end."""
    state, index, phase_step = run.start()
    feed = make_feed(run.config, run.devices, run.train_images, run.train_labels, run.order)
    labels = run.train_labels[run.train_indices]
    for phase in run.phases[index:]:
        state, unfinished = run.begin_phase(state, phase, phase_step)
        if unfinished:
            steps = make_steps(run.config, run.network, run.graph, phase, state, labels, run.table)
            state = run.run_phase(state, phase, phase_step, feed, steps)
        phase_step = 0
    return state


def make_steps(
    config: Config,
    network: Network,
    graph: MaskedGraph,
    phase: Phase,
    state: TrainState,
    labels: np.ndarray,
    table: TimeTable | None = None,
) -> dict[Hashable, Step]:
    """Makes the steps of a phase: its mask step, its weight steps, or in `alternate` both.

    Args:
      config: the run's config.
      network: with soft masks.
      graph: channel graph of the network.
      phase: the phase.
      state: the state at the beginning of the phase; in hard phases its masks are constants of the steps.
      labels: labels of the training examples, int [n].
      table: measured times, if the target is a time.

    Returns:
      The steps by the keys of the phase's chunks: "masks" or "weights", and whether batch norm is trained.
    """
    trained = _network_for(network, graph, phase, state)
    data, settings = config.data, phase_settings(config, phase.name)
    prepare = make_prepare(
        graph,
        data.crop_padding,
        data.flip,
        config.model.precision,
        jitter=data.jitter,
        cutout=data.cutout,
        erase=data.erase,
        crop_area=0.0 if data.loading == "stream" else data.crop_area,  # a stream cuts while it decodes
    )
    weight_opt, mask_opt = optimizers_for(config, phase)
    objective = labels_alone
    if has_teacher(config, phase):
        objective = make_distillation(dataclasses.replace(network, mode="off"), config.distill)
    if data.class_weights == "balanced":
        objective = with_class_weights(objective, balancing_weights(labels, graph.num_classes))
    guarded = skip_nonfinite if config.skip_nonfinite else lambda step: step
    steps: dict[Hashable, Step] = {}
    if phase.learns_masks:
        step = make_mask_step(
            trained,
            graph,
            mask_opt,
            prepare,
            config.learn,
            objective,
            mixup_alpha=data.mixup,
            table=table,
            pull=sharpening(config.learn, phase),
        )
        steps["masks", False] = guarded(step)
    if isinstance(settings, WeightPhaseConfig):
        for train_batch_norm in (True, False):
            step = make_weight_step(
                trained,
                weight_opt,
                prepare,
                objective,
                train_batch_norm=train_batch_norm,
                label_smoothing=settings.label_smoothing,
                mixup_alpha=data.mixup,
            )
            steps["weights", train_batch_norm] = guarded(step)
    return steps


def _network_for(network: Network, graph: MaskedGraph, phase: Phase, state: TrainState) -> Network:
    if phase.learns_masks:
        return dataclasses.replace(network, mode="soft")
    if phase.hard:
        return hard_network(network, graph, counts_of(graph, state.fcmask))
    return dataclasses.replace(network, mode="off")
