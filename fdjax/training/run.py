"""A run: phases over one state, from a config and a workdir to a summary; interrupted anywhere, it resumes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints, find_checkpoint
from fdjax.config import Config, continuation_problem
from fdjax.data import (
    Dataset,
    RandomResizedCrop,
    StoredImages,
    TrainingOrder,
    TrainingStream,
    split_validation,
    training_statistics,
)
from fdjax.errors import UserError
from fdjax.pruning import mac_ratio
from fdjax.spec import NetworkMacs, network_macs
from fdjax.training.build import build_network, collection_of
from fdjax.training.checks import (
    check_beginning,
    check_gate,
    check_init,
    check_same_data,
    check_steps_done,
    check_target_macs,
    check_teacher,
    inherited_phases,
    phases_done,
    warn_of_chance,
)
from fdjax.training.compilation import tidy_after_compilations
from fdjax.training.controller import first_lambda
from fdjax.training.datasets import open_data
from fdjax.training.devices import Devices, to_host
from fdjax.training.feed import Feed, Waiting
from fdjax.training.mask_control import MaskControl
from fdjax.training.measure import Measurements
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase, has_teacher, plan_phases
from fdjax.training.programs import chunks_of, make_programs
from fdjax.training.progress import Progress
from fdjax.training.restore import Past, Restored, restore
from fdjax.training.rounding import gated_masks
from fdjax.training.state import TrainState, create_state, init_variables, new_controller
from fdjax.training.summary import describe, evaluation_summary, versions
from fdjax.training.trace import Trace
from fdjax.training.workdir import (
    CONFIG_FILE,
    INIT_FILE,
    SUMMARY_FILE,
    check_folder,
    read_config,
    read_json,
    write_json,
)
from fdjax.zoo import FCMASK

# How many times in a phase the controller looks at the masks, and how many steps lie between records.
_CONTROL_TICKS = 50
_RECORD_EVERY = 20
_PROFILE_FOLDER = "profile"
# How far from the target, relatively, a network may land without a warning.
_TOLERANCE = 0.02


class _Run:
    """One run in one workdir. `train` is the only user; methods are in the order in which they are called."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        dataset: Dataset,
        devices: Devices,
        init: Restored | None,
        resumed: Restored | None,
        profile: int = 0,
    ):
        self.config, self.workdir, self.init, self.resumed = config, workdir, init, resumed
        self.devices, self.profile = devices, profile
        shape, classes = dataset.image_shape, dataset.num_classes
        self.network, spec = build_network(config, shape, classes)
        self.train_indices, validation = split_validation(
            len(dataset.train_labels), dataset.train_labels, config.data.validation, config.seed
        )
        held_out = dataset.held_out(validation)
        source = resumed or init
        if source is not None:
            mean, std = source.spec.input_mean, source.spec.input_std
        else:
            mean, std = training_statistics(dataset, config.seed)
        self.spec = dataclasses.replace(spec, input_mean=mean, input_std=std, class_names=dataset.class_names)
        self.order = TrainingOrder(config.seed, self.train_indices, config.data.batch_size)
        self.per_epoch = self.order.per_epoch
        self.phases = plan_phases(config, self.per_epoch)
        self.skipped = dataset.skipped
        self.train_images, self.train_labels = dataset.train_images, dataset.train_labels
        self.checkpoints = Checkpoints(
            workdir / CHECKPOINT_FOLDER, keep=config.checkpoint.keep, keep_best=len(held_out[1]) > 0
        )
        self.measure = Measurements(
            config,
            self.network,
            self.spec,
            workdir,
            test=(dataset.test_images, dataset.test_labels),
            validation=held_out,
            devices=devices,
        )
        self.control = MaskControl(config.learn, self.spec, devices)
        self.done = Past(num_train=len(dataset.train_labels))
        # Once, at the beginning: the checkout may change while the run goes on.
        self.versions = versions()
        self._clock = time.monotonic()

    # -- beginning

    def check(self) -> None:
        """Compares the run with what it goes on from, and leaves out the phases that the run given by --init has done.

        Raises:
          UserError: they do not fit, there is nothing to mask, or the target cannot be met.
        """
        check_target_macs(self.config.learn, self.spec, self.phases)
        check_gate(self.config.learn)
        if self.resumed is not None:
            check_same_data(self.workdir, self.spec, self.done.num_train, self.resumed)
            self._skip(self.resumed.done.skipped)
            check_steps_done(self.workdir, self.phases, self.resumed)
        elif self.init is None:
            check_beginning(self.config)
        else:
            check_init(self.spec, self.init)
            self.done.inherited = inherited_phases(self.config, self.init)
            self._skip(phases_done(self.config, self.done.inherited))
            check_teacher(self.config, self.phases[0], self.init)

    def _skip(self, count: int) -> None:
        first = self.phases[count].start
        self.phases = tuple(dataclasses.replace(phase, start=phase.start - first) for phase in self.phases[count:])
        self.done.skipped = count

    def announce(self) -> None:
        """Says what the run will do."""
        if not self.devices.is_writer:
            return
        dense = network_macs(self.spec, self.spec.full_counts()).to_dict()
        shape = "x".join(map(str, self.spec.input_shape))
        print(
            f"{self.spec.name} on {self.config.data.name}: {len(self.train_indices):,} training, "
            f"{len(self.measure.validation[1]):,} validation, {len(self.measure.test[1]):,} test images of {shape}, "
            f"{self.spec.num_classes} classes"
        )
        if self.skipped:
            print(f"passed over in the folder: {self.skipped}")
        transforms = (dense["full_transforms"] - dense["dense"]) / dense["dense"]
        # Whole channels are never transformed.
        costs = "" if self.config.learn.counts_below_whole == (0,) else f"; full transforms would add {transforms:.0%}"
        print(f"{dense['dense'] / 1e6:,.2f} M MACs dense{costs}")
        for phase in self.phases:
            share = phase.steps / self.per_epoch
            goal = ""
            if phase.learns_masks:
                learn = self.config.learn
                goal = f", masks to {learn.target_macs}x MACs" if learn.target_macs else f", lambda {learn.lambda_:g}"
            print(f"  {phase.name}: {phase.steps:,} steps of {self.config.data.batch_size} ({share:.3g} epochs){goal}")
        print(f"on {self.devices.describe()}, workdir {self.workdir}", flush=True)
        if self.init is not None and self.resumed is None:
            skipped = ", ".join(self.config.phases[: self.done.skipped]) or "no phase"
            begun = f"a run that has done {', '.join(self.done.inherited)}; skipping {skipped}"
            if self.init.as_imported:
                begun = f"weights imported from {self.init.done.imported['weights']}"
            print(f"starting from {begun}", flush=True)
        if self.resumed is not None:
            at = f"{self.resumed.phase.name}, step {self.resumed.phase_step:,} of {self.resumed.phase.steps:,}"
            print(f"going on where it stopped: {at}", flush=True)

    def start(self) -> tuple[TrainState, int, int]:
        """The state to go on from, its phase and the steps of it that are done."""
        if self.resumed is not None:
            saved = self.resumed
            step = saved.phase.start + saved.phase_step
            self.done = saved.done
            if self.devices.is_writer:
                self.measure.log.cut_back(step)
                self.checkpoints.discard_after(step)
            index = [phase.name for phase in self.phases].index(saved.phase.name)
            state = saved.state
            if not self.done.masks_learned and not saved.phase.learns_masks:
                # Nothing has moved the masks; mask settings may have changed since.
                fresh = init_variables(self.network, self.spec.input_shape, self.config.seed)
                state = state.replace(fcmask=fresh[FCMASK])
            return state, index, saved.phase_step
        if self.devices.is_writer:
            self.measure.log.cut_back(-1)
        phase, soft = self.phases[0], True
        variables = init_variables(self.network, self.spec.input_shape, self.config.seed)
        if self.init is not None:
            variables |= {"params": self.init.state.params, "batch_stats": self.init.state.batch_stats}
            self.done.dense_top1 = self.init.done.dense_top1
            self.done.imported = self.init.done.imported
            self.done.masks_learned = self.init.done.masks_learned or self.init.phase.learns_masks
            self.done.weights_adapted = self.init.weights_adapted
            if self.done.masks_learned:
                variables[FCMASK] = self.init.state.fcmask
                self.done.released = list(self.init.done.released)
                soft = not self.init.phase.hard
        state = create_state(variables, self.config.seed, *optimizers_for(self.config, phase))
        if self.init is not None and self.init.as_imported and phase.name != "pretrain":
            # Nobody has measured it on these data yet.
            dense, _ = self.measure.evaluate(self.init.phase, state, self.done, finished=True, split=self.measure.test)
            self.done.dense_top1 = dense["top1"]
        if self.init is not None and has_teacher(self.config, phase):
            state = state.replace(teacher=self.init.state.teacher)
        return self._enter(state, phase, soft_before=soft), 0, 0

    # -- phases

    def _enter(self, state: TrainState, phase: Phase, *, soft_before: bool) -> TrainState:
        """What happens between phases; a pure function of the state before, so that a resumed run repeats it."""
        if phase.hard and soft_before:
            hard = gated_masks(self.config.learn, self.spec, state.fcmask, learned=self.done.masks_learned)
            self.done.released = list(hard.released)
            state = state.replace(fcmask=jax.tree.map(jnp.asarray, collection_of(self.spec, hard.counts)))
        if phase.learns_masks and not self.done.masks_learned and self.devices.is_writer:
            warn_of_chance(self.done.dense_top1, self.spec.num_classes)
        if has_teacher(self.config, phase):
            state = state.with_teacher()
        if phase.name == "scratch":
            fresh = init_variables(self.network, self.spec.input_shape, self.config.seed + 1)
            state = state.replace(params=fresh["params"], batch_stats=fresh["batch_stats"])
        weight_opt, mask_opt = optimizers_for(self.config, phase)
        mask_steps = phase.steps - phase.weight_steps(self.config)
        # From one mask phase to the next lambda goes on as it is.
        lambda_ = float(state.lambda_) if phase.learns_masks else 0.0
        if phase.learns_masks and not lambda_:
            lambda_ = first_lambda(self.config.learn, self.spec, mask_steps)
        return state.replace(
            weight_opt=weight_opt.init(state.params),
            mask_opt=mask_opt.init(state.fcmask),
            lambda_=jnp.asarray(lambda_, jnp.float32),
            controller=new_controller(),
        )

    def run_phases(self, state: TrainState, index: int, phase_step: int) -> TrainState:
        """Runs from there to the end."""
        resident = {"auto": None, "yes": True, "no": False}[self.config.compute.data_on_device]
        feed = Feed(
            self.devices,
            self.train_images,
            self.train_labels,
            resident=resident,
            steps_per_dispatch=self.config.compute.steps_per_dispatch,
            stream=self._stream(),
        )
        for phase in self.phases[index:]:
            if phase_step == 0 and phase is not self.phases[0]:
                previous = self.phases[self.phases.index(phase) - 1]
                state = self._enter(state, phase, soft_before=not previous.hard)
            elif phase_step >= phase.steps:
                phase_step = 0
                continue
            else:
                # A phase that was finished and is now longer goes on; it is not in the past yet.
                self.done.history = [p for p in self.done.history if p["name"] != phase.name]
            state = self._run_phase(state, phase, phase_step, feed)
            phase_step = 0
        return state

    def _stream(self) -> TrainingStream | None:
        data = self.config.data
        if not isinstance(self.train_images, StoredImages):
            return None
        return TrainingStream(
            self.train_images,
            self.train_labels,
            self.order.rows,
            seed=self.config.seed,
            crop=RandomResizedCrop.asked(data.random_resized_crop, data.crop_area),
            threads=data.workers,
            part=self.devices.local_part(data.batch_size),
        )

    def _run_phase(self, state: TrainState, phase: Phase, phase_step: int, feed: Feed) -> TrainState:
        labels = self.train_labels[self.train_indices]
        programs = make_programs(self.config, self.network, self.spec, phase, state, feed, labels)
        cadence = self.config.checkpoint
        save_every = max(1, round(cadence.every_epochs * self.per_epoch))
        evaluate_every = max(1, round(cadence.evaluate_every_epochs * self.per_epoch))
        is_mask_step = [phase.kind(self.config, step) == "masks" for step in range(phase.steps)]
        # How many mask steps lie before each step.
        mask_steps = np.cumsum([0, *is_mask_step])
        control_every = max(1, int(mask_steps[-1]) // _CONTROL_TICKS)

        def controls(step: int) -> bool:
            return is_mask_step[step] and mask_steps[step] % control_every == 0

        def stops(step: int) -> bool:
            if step == phase.steps or controls(step):
                return True
            return any(step % every == 0 for every in (_RECORD_EVERY, save_every, evaluate_every))

        later = sum(other.steps for other in self.phases[self.phases.index(phase) + 1 :])
        progress = Progress(phase, phase_step, later, quiet=not self.devices.is_writer)
        trace = Trace(self.workdir / _PROFILE_FOLDER / phase.name, self.profile if self.devices.is_writer else 0)
        pending: list[tuple[int, dict[str, jax.Array]]] = []
        figures: dict[str, float] = {}
        if not phase.learns_masks:
            figures["macs_ratio"] = self.measure.macs(phase, state, self.done, finished=True).ratio
        state = self.devices.replicate(state)
        waiting = Waiting()
        try:
            chunks = chunks_of(self.config, phase, phase_step, stops, feed.longest, self.order.rows)
            batches = feed.batches(chunks, (phase.start + phase_step, phase.end))
            for chunk, batch in waiting.over(batches):
                if controls(chunk.first):
                    self.measure.check_finite(phase, phase.start + chunk.first, {FCMASK: state.fcmask})
                    at = (int(mask_steps[chunk.first]), int(mask_steps[-1]), control_every)
                    state, measured = self.control.look(state, *at)
                    figures |= measured
                state, sums = programs[chunk.key](state, *batch)
                pending.append((chunk.steps, sums))
                phase_step = chunk.first + chunk.steps
                traced = trace.advance(chunk.steps, state)
                if traced:
                    progress.say(traced)
                step, last = phase.start + phase_step, phase_step == phase.steps
                saves, evaluates = phase_step % save_every == 0, phase_step % evaluate_every == 0
                if phase_step % _RECORD_EVERY == 0 or saves or evaluates or last:
                    figures |= self.measure.record(phase, step, state, pending, figures, waiting)
                    progress.advance(sum(steps for steps, _ in pending), figures)
                    pending = []
                if saves or evaluates or last:
                    self.measure.check_finite(phase, step, state.collections())
                score = None
                if evaluates and not last:
                    score, text = self.measure.evaluate_midway(phase, step, state, self.done)
                    progress.say(text)
                elif last:
                    score = self._finish_phase(phase, state, progress)
                elif saves and phase.name != "learn":  # Where the weights are those of the save before.
                    self.measure.check_answers(phase, step, state, self.done)
                if saves or last:
                    self._save(phase, phase_step, state, score)
                if saves or evaluates:
                    waiting.restart()
        finally:
            trace.close()
            progress.close()
        return state

    def _tick_clock(self) -> None:
        now = time.monotonic()
        self.done.seconds += now - self._clock
        self._clock = now

    def _save(self, phase: Phase, phase_step: int, state: TrainState, score: float | None) -> None:
        self._tick_clock()
        meta = {
            "config": self.config.to_dict(),
            "spec": self.spec.to_dict(),
            "phase": dataclasses.asdict(phase),
            "phase_step": phase_step,
            "done": dataclasses.asdict(self.done),
            "versions": self.versions,
        }
        # Networks of different phases do not compare: the best is the best of the latest phase.
        if self.devices.is_writer:
            ranked = None if score is None else phase.index + score
            self.checkpoints.save(phase.start + phase_step, to_host(state), meta, ranked)

    # -- end

    def _finish_phase(self, phase: Phase, state: TrainState, progress: Progress) -> float | None:
        top1, soft_top1, macs, score = self.measure.finish_phase(phase, state, self.done)
        if phase.name == "pretrain":
            self.done.dense_top1, self.done.weights_adapted = top1, False
        self.done.weights_adapted |= phase.adapts_weights
        if phase.learns_masks:
            self.done.masks_learned = True
            self._compare_with_target(macs, progress)
        self._tick_clock()
        before = sum(entry["seconds"] for entry in self.done.history)
        entry = {"name": phase.name, "steps": phase.steps, "seconds": round(self.done.seconds - before, 2)}
        soft = {} if soft_top1 is None else {"soft_top1": soft_top1}
        self.done.history.append({**entry, "top1": top1, **soft, "ratio": macs.ratio})
        before_rounding = "" if soft_top1 is None else f" ({100 * soft_top1:.2f}% before rounding)"
        progress.say(f"{phase.name}: done, test accuracy {100 * top1:.2f}% at {macs.ratio:.3f}x MACs{before_rounding}")
        return score

    def _compare_with_target(self, macs: NetworkMacs, progress: Progress) -> None:
        target, reached = self.config.learn.target_macs, mac_ratio(macs, self.config.learn.target_convention)
        if target is not None and abs(reached / target - 1) > _TOLERANCE:
            progress.say(f"warning: the target of {target:g}x MACs is out of reach here; the nearest is {reached:.3f}x")

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Evaluates the network as it stands, writes plots and the summary, and adds the time of the frozen network."""
        test, macs = self.measure.evaluate(self.phases[-1], state, self.done, finished=True, split=self.measure.test)
        learn = self.config.learn
        summary = {
            **evaluation_summary(test, macs),
            "split": "test",
            "num_classes": self.spec.num_classes,
            "class_names": list(self.spec.class_names),
            "dense_top1": self.done.dense_top1,
            "seconds": round(self.done.seconds, 1),
            "phases": self.done.history,
            "target_macs": learn.target_macs if self.done.masks_learned else None,
            "target_convention": learn.target_convention,
            "seed": self.config.seed,
            "imported": self.done.imported or None,
            "versions": self.versions,
        }
        if self.devices.is_writer:
            self.measure.plot(self.phases, state, self.done, summary["layers"])
            write_json(self.workdir / SUMMARY_FILE, summary)
            # After the summary is safe: freezing compiles the network anew, and an interruption there costs no result.
            summary["time"] = self.measure.time(self.phases[-1], state, self.done)
            write_json(self.workdir / SUMMARY_FILE, summary)
        return summary


def train(
    config: Config, workdir: str, init: str | None = None, *, local_devices: int | None = None, profile: int = 0
) -> dict[str, Any]:
    """Runs `config` in `workdir`, from where it stopped if it has been run before.

    Args:
      config: what to do.
      workdir: a new or empty directory, or one that holds this run.
      init: a checkpoint of another run to start from.
      local_devices: how many of each process's devices to use; None for all.
      profile: how many steps of each phase to trace.

    Returns:
      The summary.

    Raises:
      UserError: something asked for does not exist, does not fit or holds another run. Nothing has been written then.
    """
    tidy_after_compilations()
    devices = Devices(local_devices)
    devices.check_precision(config.model.precision)
    devices.check_batch(config.data.batch_size)
    folder = Path(workdir).expanduser().resolve()
    # So that the checkpoint can be evaluated from anywhere.
    absolute = {
        field: str(Path(path).expanduser().resolve())
        for field in ("path", "unlabelled")
        if (path := getattr(config.data, field)) is not None
    }
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **absolute))
    check_folder(folder, "--workdir")
    saved = read_config(folder)
    checkpoints = Checkpoints(folder / CHECKPOINT_FOLDER)
    step = checkpoints.newest_sound()
    if step is None and checkpoints.steps():
        raise UserError(f"every checkpoint in {checkpoints.folder} is damaged; give another --workdir, or remove them")
    resumed = restore(checkpoints, step) if step is not None else None
    if saved is not None:
        problem = continuation_problem(saved, config, resumed.phase.name if resumed else None)
        if problem:
            raise UserError(f"--workdir {folder} holds another run ({problem}); give another directory for this one")
    source = _init_source(folder, init, begun=saved is not None)
    start_from = restore(*find_checkpoint(source)) if source is not None and resumed is None else None
    dataset = open_data(config.data, config.seed)
    begun = resumed or start_from
    if begun is not None:
        dataset = dataset.in_order_of(begun.spec.class_names)
    run = _Run(config, folder, dataset, devices, start_from, resumed, profile)
    run.check()

    last, summary_file = run.phases[-1], folder / SUMMARY_FILE
    if resumed is not None and resumed.phase.name == last.name and resumed.phase_step >= last.steps:
        summary = read_json(summary_file)
        if summary is not None and summary["phases"] == resumed.done.history:
            if devices.is_writer:
                print(f"the run in {folder} is finished; nothing to do. Its result:\n{describe(summary)}")
            return summary
    # What one process writes below, another may still be reading above.
    devices.wait_for_all("before the run")
    if devices.is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        if source is not None:
            write_json(folder / INIT_FILE, {"checkpoint": source})
        write_json(folder / CONFIG_FILE, config.to_dict())
    run.announce()
    state = run.run_phases(*run.start())
    summary = run.finish(state)
    if devices.is_writer:
        print(f"{describe(summary)}\nresults:  {folder}")
    devices.wait_for_all("after the run")
    return summary


def _init_source(folder: Path, init: str | None, *, begun: bool) -> str | None:
    """The checkpoint that --init means, absolute: the one that the run in `folder` was begun with, if there is one."""
    asked = None if init is None else str(Path(init).expanduser().resolve())
    if not begun:
        return asked
    recorded = (read_json(folder / INIT_FILE) or {}).get("checkpoint")
    if asked is not None and asked != recorded:
        was = f"--init {recorded}" if recorded else "no --init"
        raise UserError(f"--workdir {folder} holds a run begun with {was}; give another directory for --init {init}")
    return recorded
