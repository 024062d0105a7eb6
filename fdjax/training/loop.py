"""What a run does around its steps: it starts or resumes, begins and ends phases, records, evaluates and saves."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from fdjax.config import Config
from fdjax.data import Dataset, TrainingOrder, split_validation, training_statistics
from fdjax.errors import RunInterrupted, UserError
from fdjax.onnx.kept_file import keep_file
from fdjax.provenance import cpu_model
from fdjax.pruning.timed import TimeTable
from fdjax.training import checks, early_stopping
from fdjax.training.announce import announcement, beginning, changes, renamed_classes
from fdjax.training.build import build_network
from fdjax.training.cadence import Cadence
from fdjax.training.chunks import Chunk, chunks_of
from fdjax.training.devices import Devices
from fdjax.training.entering import enter_phase
from fdjax.training.feed import Feed, Waiting
from fdjax.training.mask_control import MaskControl
from fdjax.training.mask_warnings import lost_warnings, mask_warnings
from fdjax.training.measure import Measurements
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase, has_teacher, plan_phases
from fdjax.training.progress import Progress
from fdjax.training.restore import Past, Restored, checkpoint_meta
from fdjax.training.saving import BackgroundSaves
from fdjax.training.state import TrainState, create_state, init_variables, whole_masks
from fdjax.training.steps import Step
from fdjax.training.stopping import Stopping
from fdjax.training.summary import run_summary, versions
from fdjax.training.time_table import same_times, table_of
from fdjax.training.trace import Trace
from fdjax.training.workdir import SUMMARY_FILE, write_json
from fdjax.zoo import FCMASK

_PROFILE_FOLDER = "profile"


class _FeedStopped(Exception):
    """An error of the user's data that the feed has met; it is in `error`."""

    def __init__(self, error: UserError):
        super().__init__(str(error))
        self.error = error


def _fed(batches: Iterable[tuple[Chunk, Any]]) -> Iterator[tuple[Chunk, Any]]:
    """Yields from the feed; its errors are told from those of the loop that takes from it."""
    try:
        yield from batches
    except UserError as error:
        raise _FeedStopped(error) from error


class Run:
    """One run in one workdir. Only `fdjax.training.run` uses it; methods are in the order in which they are called."""

    def __init__(
        self,
        config: Config,
        workdir: Path,
        dataset: Dataset,
        devices: Devices,
        init: Restored | None,
        resumed: Restored | None,
        profile: int = 0,
        stopping: Stopping | None = None,
    ):
        self.config, self.workdir, self.init, self.resumed = config, workdir, init, resumed
        self.devices, self.profile, self.stopping = devices, profile, stopping or Stopping()
        shape, classes = dataset.image_shape, dataset.num_classes
        self.network, graph = build_network(config, shape, classes)
        self.train_indices, validation = split_validation(
            len(dataset.train_labels), dataset.train_labels, config.data.validation, config.seed
        )
        held_out = dataset.held_out(validation)
        source = resumed or init
        if source is not None:
            mean, std = source.graph.input_mean, source.graph.input_std
        else:
            mean, std = training_statistics(dataset, config.seed)
        self.graph = dataclasses.replace(graph, input_mean=mean, input_std=std, class_names=dataset.class_names)
        self.order = TrainingOrder(config.seed, self.train_indices, config.data.batch_size)
        self.phases = plan_phases(config, self.order.per_epoch)
        self.skipped = dataset.skipped
        self.train_images, self.train_labels = dataset.train_images, dataset.train_labels
        self.checkpoints = Checkpoints(
            workdir / CHECKPOINT_FOLDER, keep=config.checkpoint.keep, keep_best=len(held_out[1]) > 0
        )
        self.measure = Measurements(
            config,
            self.network,
            self.graph,
            workdir,
            test=(dataset.test_images, dataset.test_labels),
            validation=held_out,
            devices=devices,
            between_batches=self.stopping.check if devices.processes == 1 else lambda: None,
        )
        self.saves = BackgroundSaves(self.checkpoints, workdir, self.stopping)
        self.table: TimeTable | None = None
        self.done = Past(num_train=len(dataset.train_labels), evaluated=0)
        # Read once, at the beginning, because the checkout may change during the run.
        self.versions = versions()
        self._clock = time.monotonic()

    def check(self) -> None:
        """Checks that the run fits what it starts from, and skips the phases that the run of --init has done.

        Raises:
          UserError: if they do not fit, nothing can have masks, or the target cannot be met.
        """
        checks.check_onnx_file(self.config.model, self.resumed or self.init)
        if self.resumed is not None:
            checks.check_same_data(self.workdir, self.graph, self.done.num_train, self.resumed)
            checks.check_same_masks(self.workdir, self.config.learn, self.graph, self.resumed)
            self._skip(self.resumed.done.skipped)
            checks.check_steps_done(self.workdir, self.phases, self.resumed)
        elif self.init is None:
            checks.check_beginning(self.config)
        else:
            checks.check_init(self.config, self.network, self.graph, self.init)
            self.done.inherited = checks.inherited_phases(self.config, self.init)
            self._skip(checks.phases_done(self.config, self.done.inherited))
            pretrains = self.phases[0].name == "pretrain"
            checks.check_classes(self.init.graph.class_names, self.graph.class_names, pretrains=pretrains)
            checks.check_teacher(self.config, self.phases[0], self.init)
        checks.check_target_macs(self.config.learn, self.graph, self.phases)
        if any(phase.name != "pretrain" for phase in self.phases):
            checks.check_gate(self.config.learn)
        early_stopping.check_patience(self.config, self.phases, len(self.measure.validation[1]))
        checks.check_labels(self.config, self.phases)
        known = None
        if self.resumed is not None and same_times(self.resumed.config.learn, self.config.learn):
            known = self.resumed.done.table
        # Without a phase that learns masks, no time is asked for, unless masks of --init have still to be rounded.
        learns = any(phase.learns_masks for phase in (*self.phases, *([self.init.phase] if self.init else [])))
        self.table = table_of(self.config.learn, self.graph, known) if learns or known is not None else None
        self.control = MaskControl(self.config.learn, self.graph, self.devices, self.table)

    def _skip(self, count: int) -> None:
        first = self.phases[count].start
        self.phases = tuple(dataclasses.replace(phase, start=phase.start - first) for phase in self.phases[count:])
        self.done.skipped = count

    def announce(self) -> None:
        """Prints what the run will do."""
        if not self.devices.is_writer:
            return
        sizes = len(self.train_indices), len(self.measure.validation[1]), len(self.measure.test[1])
        print(announcement(self.config, self.graph, self.phases, sizes, self.skipped))
        print(f"on {self.devices.describe()}, workdir {self.workdir}", flush=True)
        begun = beginning(self.config, self.init, self.resumed, self.done.skipped, self.done.inherited)
        renamed = renamed_classes(self.init.graph.class_names, self.graph.class_names) if self.init else ""
        for line in (begun, renamed, changes(self.resumed.made_on, self.made_on()) if self.resumed else ""):
            if line:
                print(line, flush=True)

    def made_on(self) -> dict[str, str]:
        """Returns what results depend on beside the config: runs that agree in it give the same bits."""
        jax_version = str(self.versions.get("jax"))
        return {"jax": jax_version, "devices": self.devices.describe(), "processor": cpu_model()}

    def start(self) -> tuple[TrainState, int, int]:
        """Makes or restores the state that the run goes on from.

        Returns:
          The state, the index of its phase, and the number of the phase's steps that are done.
        """
        file = self.config.model.onnx_file
        if file is not None and self.devices.is_writer:
            keep_file(file, self.checkpoints.folder)
        if self.resumed is not None:
            saved = self.resumed
            step = saved.phase.start + saved.phase_step
            self.done = dataclasses.replace(saved.done, times=self.table and self.table.to_dict())
            if self.devices.is_writer:
                self.measure.log.cut_back(step)
                self.checkpoints.discard_after(step)
            index = [phase.name for phase in self.phases].index(saved.phase.name)
            state = saved.state
            if not self.done.masks_learned and not saved.phase.learns_masks:
                # No step has changed the masks yet, and the settings of masks may differ from the checkpoint's.
                state = state.replace(fcmask=whole_masks(self.network, self.graph.input_shape))
            return state, index, saved.phase_step
        if self.devices.is_writer:
            self.measure.log.cut_back(-1)
        phase, soft, self.done.times = self.phases[0], True, self.table and self.table.to_dict()
        if self.init is None:
            variables = init_variables(self.network, self.graph.input_shape, self.config.seed)
        else:
            variables = {"params": self.init.state.params, "batch_stats": self.init.state.batch_stats}
            variables[FCMASK] = whole_masks(self.network, self.graph.input_shape)
            self.done.dense_top1 = self.init.done.dense_top1
            self.done.imported = self.init.done.imported
            self.done.masks_learned = self.init.done.masks_learned or self.init.phase.learns_masks
            self.done.weights_adapted = self.init.weights_adapted
            self.done.filters_removed = self.init.done.filters_removed
            self.done.pruned_by, self.done.unpruned_macs = self.init.done.pruned_by, self.init.done.unpruned_macs
            if self.done.masks_learned:
                variables[FCMASK] = self.init.state.fcmask
                self.done.released = list(self.init.done.released)
                soft = not self.init.phase.hard
        state = create_state(variables, self.config.seed, *optimizers_for(self.config, phase))
        if self.init is not None and self.init.as_imported and phase.name != "pretrain":
            # The imported network has not been evaluated on this data set.
            dense, _ = self.measure.evaluate(self.init.phase, state, self.done, finished=True, split=self.measure.test)
            self.done.dense_top1 = dense["top1"]
        if self.init is not None and has_teacher(self.config, phase):
            state = state.replace(teacher=self.init.state.teacher)
        return self._enter(state, phase, soft_before=soft), 0, 0

    def _enter(self, state: TrainState, phase: Phase, *, soft_before: bool) -> TrainState:
        if phase.learns_masks and not self.done.masks_learned and self.devices.is_writer:
            checks.warn_of_chance(self.done.dense_top1, self.graph.num_classes)
        return enter_phase(self.config, self.network, self.graph, self.done, state, phase, soft_before=soft_before)

    def begin_phase(self, state: TrainState, phase: Phase, phase_step: int) -> tuple[TrainState, bool]:
        """Makes the state ready for a phase, or for the rest of it.

        Args:
          state: the state at the end of the phase before, or what `start` returned.
          phase: the phase.
          phase_step: number of the phase's steps that are done.

        Returns:
          The state, and whether steps of the phase remain to be done.
        """
        if phase_step == 0 and phase is not self.phases[0]:
            previous = self.phases[self.phases.index(phase) - 1]
            return self._enter(state, phase, soft_before=not previous.hard), True
        if phase_step >= phase.steps or early_stopping.out_of_patience(self.config, phase, self.done):
            if phase.name not in [entry["name"] for entry in self.done.history]:
                # The run was stopped before the end of the phase was evaluated.
                state = self._measure_and_save(state, phase)
            return state, False
        # A finished phase that the config has made longer goes on, so it is removed from the history.
        finished = [entry for entry in self.done.history if entry["name"] == phase.name]
        if finished and self.done.best is None:
            self.done.best = early_stopping.best_of_finished(finished[0], phase.start + phase_step)
        self.done.history = [entry for entry in self.done.history if entry["name"] != phase.name]
        return state, True

    def run_phase(
        self, state: TrainState, phase: Phase, phase_step: int, feed: Feed, steps: dict[Hashable, Step]
    ) -> TrainState:
        """Does the steps of a phase that remain, with its records, evaluations and checkpoints.

        Args:
          state: what `begin_phase` returned.
          phase: the phase.
          phase_step: number of the phase's steps that are done.
          feed: the feed of the run's examples.
          steps: the phase's steps by the keys of its chunks.

        Returns:
          The state at the end of the phase.
        """
        state = self._do_steps(state, phase, phase_step, feed, steps)
        return self._measure_and_save(state, phase) if self.done.best else state

    def _measure_and_save(self, state: TrainState, phase: Phase) -> TrainState:
        """Ends a phase that has not been measured yet; if it may end early, it continues with the best weights."""
        state, progress = self.devices.replicate(state), Progress(phase, phase.steps, quiet=not self.devices.is_writer)
        ended = None
        try:
            self._catch_up(phase, state, progress)
            if self.done.best:
                self.saves.wait()
                self.devices.wait_for_all("before the best weights are taken")
                state, ended = early_stopping.take_best(self.checkpoints, self.done, phase, state)
                state = self.devices.replicate(state)
                progress.say(early_stopping.ending_words(phase, **ended))
            self._save(phase, phase.steps, state, self._finish_phase(phase, state, progress, ended))
        finally:
            progress.close()
        return state

    def _catch_up(self, phase: Phase, state: TrainState, progress: Progress) -> None:
        """Does the evaluation before which a run was stopped, or in it."""
        if early_stopping.lacks_evaluation(self.config, phase, int(state.step), self.done):
            score, text = self.measure.evaluate_midway(phase, int(state.step), state, self.done)
            progress.say(text)
            self._save(phase, int(state.step) - phase.start, state, score)

    def _do_steps(
        self, state: TrainState, phase: Phase, phase_step: int, feed: Feed, steps: dict[Hashable, Step]
    ) -> TrainState:
        programs = {key: feed.compile(step) for key, step in steps.items()}
        cadence = Cadence(self.config, phase)
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
            self._catch_up(phase, state, progress)
            if early_stopping.out_of_patience(self.config, phase, self.done):
                return state
            chunks = chunks_of(self.config, phase, phase_step, cadence.ends_dispatch, feed.longest, self.order.rows)
            batches = feed.batches(chunks, (phase.start + phase_step, phase.end))
            for chunk, batch in _fed(waiting.over(batches)):
                if cadence.controls(chunk.first):
                    self.measure.check_finite(phase, phase.start + chunk.first, {FCMASK: state.fcmask})
                    state, measured = self.control.look(state, *cadence.control_at(chunk.first))
                    figures |= measured
                state, sums = programs[chunk.key](state, *batch)
                pending.append((chunk.steps, sums))
                if len(pending) > 1:
                    # At most two dispatches are in flight, so that the run can stop soon when it is asked to.
                    jax.block_until_ready(pending[-2][1])
                phase_step = chunk.first + chunk.steps
                traced = trace.advance(chunk.steps, state)
                if traced:
                    progress.say(traced)
                step, last = phase.start + phase_step, phase_step == phase.steps
                saves, evaluates = cadence.saves(phase_step), cadence.evaluates(phase_step)
                stops_here = self._asked_to_stop(at_record=cadence.records(phase_step))
                if cadence.records(phase_step) or saves or evaluates or stops_here:
                    figures |= self.measure.record(phase, step, state, pending, figures, waiting)
                    progress.advance(sum(steps for steps, _ in pending), figures)
                    pending = []
                    self.saves.check()
                if saves or evaluates or last or stops_here:
                    self.measure.check_finite(phase, step, state.collections())
                try:
                    if stops_here:
                        raise self.stopping.interruption()
                    score = self._look(phase, phase_step, state, progress, saves=saves, evaluates=evaluates)
                except RunInterrupted:
                    self._save(phase, phase_step, state, None)
                    self.saves.wait()
                    raise
                except UserError as error:  # Such as a damaged test picture.
                    raise self._saved_before(error, phase, phase_step, state) from error
                if saves or last or (evaluates and self.done.best):
                    self._save(phase, phase_step, state, score)
                if early_stopping.out_of_patience(self.config, phase, self.done):
                    break
                if saves or evaluates:
                    waiting.restart()
        except _FeedStopped as stopped:  # Such as a damaged training picture.
            error = stopped.error
            self.measure.check_finite(phase, phase.start + phase_step, state.collections())
            raise self._saved_before(error, phase, phase_step, state) from error
        finally:
            trace.close()
            progress.close()
        return state

    def _saved_before(self, error: UserError, phase: Phase, phase_step: int, state: TrainState) -> UserError:
        """Saves the state before a run ends by an error; returns the error with that said."""
        # Other processes may not have met it, and would wait for this one.
        if self.devices.processes > 1 or not phase_step:
            return error
        self._save(phase, phase_step, state, None)
        self.saves.wait()
        return UserError(f"{error} (the training up to here is saved: the same command goes on)")

    def _asked_to_stop(self, *, at_record: bool) -> bool:
        """Whether the run should save and stop here; several processes agree on it at the steps that are recorded."""
        if self.devices.processes == 1:
            return self.stopping.asked
        return at_record and self.devices.agree(self.stopping.asked)

    def _look(
        self, phase: Phase, phase_step: int, state: TrainState, progress: Progress, *, saves: bool, evaluates: bool
    ) -> float | None:
        """Evaluates the network if that is due; returns a score by which the best checkpoint is chosen, or None."""
        if phase_step == phase.steps and early_stopping.patience_of(self.config, phase) is None:
            return self._finish_phase(phase, state, progress)
        score, step = None, phase.start + phase_step
        if evaluates or phase_step == phase.steps:
            score, text = self.measure.evaluate_midway(phase, step, state, self.done)
            progress.say(text)
        elif saves and phase.name != "learn":  # In learn the weights do not change.
            self.measure.check_answers(phase, step, state, self.done)
        return score

    def _tick_clock(self) -> None:
        now = time.monotonic()
        self.done.seconds += now - self._clock
        self._clock = now

    def _save(self, phase: Phase, phase_step: int, state: TrainState, score: float | None) -> None:
        self._tick_clock()
        meta = checkpoint_meta(self.config, self.graph, phase, phase_step, self.done, self.versions)
        meta["made_on"] = self.made_on()
        # Scores of different phases cannot be compared, so the best is the best of the latest phase.
        if self.devices.is_writer:
            ranked = None if score is None else phase.index + score
            self.saves.begin(phase.start + phase_step, state, meta, ranked)

    def _finish_phase(
        self, phase: Phase, state: TrainState, progress: Progress, ended: dict[str, Any] | None = None
    ) -> float | None:
        top1, soft_top1, macs, score = self.measure.finish_phase(phase, state, self.done)
        if phase.name == "pretrain":
            self.done.dense_top1, self.done.weights_adapted, self.done.filters_removed = top1, False, False
            self.done.pruned_by, self.done.unpruned_macs = "", None
            self.done.imported = self.done.imported and {**self.done.imported, "fine_tuned": True}
        self.done.weights_adapted |= phase.adapts_weights
        self.done.masks_learned |= phase.learns_masks
        found = mask_warnings(self.config.learn, macs) if phase.learns_masks else []
        if self.done.masks_learned:
            found += lost_warnings(phase, soft_top1 or top1, self.done.dense_top1, self.graph.num_classes)
        for line in found:
            progress.say(f"warning: {line}")
        self._tick_clock()
        before = sum(entry["seconds"] for entry in self.done.history)
        entry = {"name": phase.name, "steps": phase.steps, "seconds": round(self.done.seconds - before, 2)}
        soft = {} if soft_top1 is None else {"soft_top1": soft_top1}
        self.done.history.append({**entry, "top1": top1, **soft, "ratio": macs.ratio, **(ended or {})})
        before_rounding = "" if soft_top1 is None else f" ({100 * soft_top1:.2f}% before rounding)"
        progress.say(f"{phase.name}: done, test accuracy {100 * top1:.2f}% at {macs.ratio:.3f}x MACs{before_rounding}")
        return score

    def finish(self, state: TrainState) -> dict[str, Any]:
        """Evaluates the network, writes plots and the summary, and adds the time of the frozen network.

        Args:
          state: the state at the end of the last phase.

        Returns:
          The summary; JSON types.
        """
        self.saves.wait()
        test, macs = self.measure.evaluate(self.phases[-1], state, self.done, finished=True, split=self.measure.test)
        summary = run_summary(self.config, self.graph, self.done, test, macs, self.versions)
        if self.devices.is_writer:
            self.measure.plot(self.phases, state, self.done, summary["layers"])
            write_json(self.workdir / SUMMARY_FILE, summary)
            # Timing comes after the summary is written, so that an interruption of it loses no result.
            summary["time"] = self.measure.time(self.phases[-1], state, self.done)
            write_json(self.workdir / SUMMARY_FILE, summary)
        return summary
