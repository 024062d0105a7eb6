"""A run: phases over one state, from a config and a workdir to a summary; interrupted anywhere, it resumes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import runtime
from fdjax.checkpoint import CHECKPOINT_FOLDER, Checkpoints, find_checkpoint
from fdjax.config import MASK_PHASES, Config, WeightPhaseConfig, continuation_problem
from fdjax.data import (
    Dataset,
    RandomResizedCrop,
    StoredImages,
    TrainingOrder,
    TrainingStream,
    split_validation,
    take_rows,
    training_statistics,
)
from fdjax.errors import UserError
from fdjax.frozen.choice import Stopwatch
from fdjax.nn import FCMASK, FrequencyNetwork
from fdjax.pruning import HardMasks, mac_ratio
from fdjax.pruning.expected import expected_ratio
from fdjax.spec import NetworkMacs, network_macs
from fdjax.training.build import (
    build_network,
    check_maskable,
    collection_of,
    counts_of,
    flat_masks,
    hard_masks,
    hard_masks_by_time,
    hard_network,
)
from fdjax.training.calibrate import calibration_sample, measure_level_losses
from fdjax.training.compilation import tidy_after_compilations
from fdjax.training.controller import first_lambda, next_lambda
from fdjax.training.datasets import open_data
from fdjax.training.devices import Devices, to_host
from fdjax.training.feed import Dispatch, Feed, Waiting
from fdjax.training.measure import Measurements
from fdjax.training.optimizers import optimizers_for
from fdjax.training.phases import Phase, has_teacher, phase_settings, plan_phases
from fdjax.training.profile import Trace
from fdjax.training.progress import Progress
from fdjax.training.restore import Past, Restored, restore
from fdjax.training.state import TrainState, create_state, init_variables, new_controller
from fdjax.training.steps import labels_alone, make_distillation, make_mask_step, make_prepare, make_weight_step
from fdjax.training.summary import describe, evaluation_summary, versions
from fdjax.training.workdir import (
    CONFIG_FILE,
    INIT_FILE,
    SUMMARY_FILE,
    check_folder,
    read_config,
    read_json,
    write_json,
)

# How many times in a phase the controller looks at the masks, and how many steps lie between records.
_CONTROL_TICKS = 50
_RECORD_EVERY = 20
_PROFILE_FOLDER = "profile"
# Offsets from targets above are told as from this one.
_HIGHEST_TARGET = 0.95
# How far from the target, relatively, a network may land without a warning.
_TOLERANCE = 0.02


class _Chunk(NamedTuple):
    """Steps that one dispatch does: from step `first` of the phase on, all by the program `key`."""

    first: int
    steps: int
    key: Hashable


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
        source = resumed or init
        if source is not None:
            mean, std = source.spec.input_mean, source.spec.input_std
        else:
            mean, std = training_statistics(dataset, config.seed)
        self.spec = dataclasses.replace(spec, input_mean=mean, input_std=std, class_names=dataset.class_names)
        self.order = TrainingOrder(config.seed, self.train_indices, config.data.batch_size)
        self.per_epoch = self.order.per_epoch
        self.phases = plan_phases(config, self.per_epoch)
        self.train_images, self.train_labels = dataset.train_images, dataset.train_labels
        self.checkpoints = Checkpoints(
            workdir / CHECKPOINT_FOLDER, keep=config.checkpoint.keep, keep_best=len(validation) > 0
        )
        self.measure = Measurements(
            config,
            self.network,
            self.spec,
            workdir,
            test=(dataset.test_images, dataset.test_labels),
            validation=(take_rows(dataset.train_images, validation), dataset.train_labels[validation]),
            devices=devices,
        )
        learn = config.learn
        self._expected_ratio = jax.jit(
            lambda masks: expected_ratio(self.spec, masks, learn.counts_below_whole, learn.target_convention)
        )
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
        self._check_target()
        if self.config.learn.gate == "time" and jax.process_count() > 1:
            raise UserError(
                "learn.gate is 'time', and several processes would measure different times; give --learn.gate macs, or "
                "learn in one process"
            )
        if self.resumed is not None:
            self._check_resumed(self.resumed)
            return
        if self.init is None:
            if self.config.data.unlabelled is not None:
                raise UserError("data.unlabelled has no labels to pretrain with: give --init DIR, a trained network")
            if self.config.phases[0] != "pretrain":
                raise UserError(
                    f"phases begin with {self.config.phases[0]!r}, which needs trained weights: begin with 'pretrain', "
                    "or give --init DIR, a run or imported checkpoint to start from"
                )
            return
        finished = self.init.finished_phases()
        shapes = [[(layer.name, layer.kind, layer.in_channels, layer.out_channels, layer.window, layer.stride)
                   for layer in spec.layers] for spec in (self.spec, self.init.spec)]  # fmt: skip
        if shapes[0] != shapes[1]:
            other = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), None)
            detail = f": layer {other[1][0]} there, {other[0][0]} here differ" if other else ""
            raise UserError(
                f"--init holds {self.init.spec.name} for {self.init.spec.num_classes} classes, which does not fit "
                f"{self.spec.name} for {self.spec.num_classes} classes{detail}"
            )
        own, theirs = ((spec.padding, spec.batch_norm_epsilon) for spec in (self.spec, self.init.spec))
        if own != theirs:
            raise UserError(
                f"--init was trained with padding {theirs[0]!r} and batch norm epsilon {theirs[1]}, and the config has "
                f"{own[0]!r} and {own[1]}: add --model.padding {theirs[0]} --model.batch-norm-epsilon {theirs[1]}"
            )
        masked = any(name in MASK_PHASES for name in [*finished, self.init.phase.name])
        if (masked or self.init.done.masks_learned) and self.spec.mask_sizes != self.init.spec.mask_sizes:
            raise UserError(
                "--init has masks of other settings (sides, tied, stage_masks or block); give it the same "
                "ones, or start from a run that has only pretrained"
            )
        self.done.inherited = finished
        same = [mine == theirs for mine, theirs in zip(self.config.phases, finished, strict=False)]
        skipped = same.index(False) if False in same else len(same)
        if skipped == len(self.phases):
            raise UserError(
                f"--init has already done {', '.join(self.config.phases)}; ask for a further phase, or name only the "
                "phases to do again (--phases learn refine)"
            )
        self._skip(skipped)
        first = self.phases[0]
        if has_teacher(self.config, first) and not self.init.state.teacher and self.init.weights_adapted:
            raise UserError(
                f"distill.weight is {self.config.distill.weight:g}, but --init, a run that ends in "
                f"{self.init.phase.name}, has trained its weights under masks and holds no unpruned network to learn "
                "from; start from a run that has done no more than pretrain and learn, or from one that was itself run "
                "with distill.weight above 0, or give --distill.weight 0"
            )

    def _skip(self, count: int) -> None:
        first = self.phases[count].start
        self.phases = tuple(dataclasses.replace(phase, start=phase.start - first) for phase in self.phases[count:])
        self.done.skipped = count

    def _check_target(self) -> None:
        learn = self.config.learn
        if not any(phase.learns_masks for phase in self.phases):
            return
        check_maskable(self.spec)
        if learn.target_macs is None:
            return
        nothing = {path: np.zeros_like(count) for path, count in self.spec.full_counts().items()}
        floor = mac_ratio(network_macs(self.spec, nothing), learn.target_convention)
        if learn.target_macs <= floor:
            raise UserError(
                f"learn.target_macs is {learn.target_macs:g}, but with every masked channel removed {floor:.3f}x of "
                "the MACs remain; ask for more, or mask more (learn.sides both)"
            )

    def _check_resumed(self, resumed: Restored) -> None:
        spec, done = resumed.spec, resumed.done
        if (self.spec.input_shape, self.spec.class_names, self.done.num_train) != (
            spec.input_shape, spec.class_names, done.num_train,
        ):  # fmt: skip
            raise UserError(
                f"the run in {self.workdir} was begun on {done.num_train:,} training images of {spec.input_shape} and "
                f"{spec.num_classes} classes; the data now hold {self.done.num_train:,} of {self.spec.input_shape} and "
                f"{self.spec.num_classes} classes, or classes of other names"
            )
        self._skip(done.skipped)
        asked = next(phase for phase in self.phases if phase.name == resumed.phase.name)
        if asked.steps < resumed.phase_step:
            raise UserError(
                f"the run in {self.workdir} has done {resumed.phase_step:,} steps of {asked.name}, more than the "
                f"{asked.steps:,} asked for; give it as many or more"
            )

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
        transforms = (dense["full_transforms"] - dense["dense"]) / dense["dense"]
        print(f"{dense['dense'] / 1e6:,.2f} M MACs dense; full transforms would add {transforms:.0%}")
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
            print(f"starting from a run that has done {', '.join(self.done.inherited)}; skipping {skipped}", flush=True)
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
            self.done.masks_learned = self.init.done.masks_learned or self.init.phase.learns_masks
            self.done.weights_adapted = self.init.weights_adapted
            if self.done.masks_learned:
                variables[FCMASK] = self.init.state.fcmask
                self.done.released = list(self.init.done.released)
                soft = not self.init.phase.hard
        state = create_state(variables, self.config.seed, *optimizers_for(self.config, phase))
        if self.init is not None and self.init.done.imported and not self.done.masks_learned:
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
            hard = self._round(state)
            self.done.released, self.done.level_losses = list(hard.released), {}
            state = state.replace(fcmask=jax.tree.map(jnp.asarray, collection_of(self.spec, hard.counts)))
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

    def _measure_level_losses(self, state: TrainState) -> dict[str, list[list[float]]]:
        learn = self.config.learn
        if learn.rounding == "nearest":
            return {}
        images = self.train_images[calibration_sample(self.train_indices, self.config.seed)]
        return measure_level_losses(self.network, self.spec, to_host(state), learn.counts_below_whole, images)

    def _round(self, state: TrainState) -> HardMasks:
        learn, to_target, fcmask = self.config.learn, self.done.masks_learned, state.fcmask
        # Masks that have not been learned are all 1; those of a run given by --init come without losses.
        losses = (self.done.level_losses or self._measure_level_losses(state)) if to_target else None
        if learn.gate != "time" or not to_target:
            return hard_masks(learn, self.spec, fcmask, to_target=to_target, losses=losses)
        # Times are kept on disk: a run that is resumed from before this point comes to the same.
        stopwatch = Stopwatch(learn.gate_batch, runtime.times_cache_dir())
        hard = hard_masks_by_time(learn, self.spec, fcmask, stopwatch, to_target=to_target, losses=losses)
        by_macs = hard_masks(learn, self.spec, fcmask, to_target=to_target, losses=losses).released
        slower = ", ".join(name for name in hard.released if name not in by_macs) or "nothing"
        if self.devices.is_writer:
            print(f"gate: {slower} released for being slower pruned; {hard.macs.ratio:.3f}x MACs", flush=True)
        return hard

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
            crop=RandomResizedCrop() if data.random_resized_crop else None,
            threads=data.workers,
            part=self.devices.local_part(data.batch_size),
        )

    def _network_for(self, phase: Phase, state: TrainState) -> FrequencyNetwork:
        if phase.learns_masks:
            return dataclasses.replace(self.network, mode="soft")
        if phase.hard:
            return hard_network(self.network, self.spec, counts_of(self.spec, state.fcmask))
        return dataclasses.replace(self.network, mode="off")

    def _make_programs(self, phase: Phase, state: TrainState, feed: Feed) -> dict[Hashable, Dispatch]:
        network = self._network_for(phase, state)
        data, settings = self.config.data, phase_settings(self.config, phase.name)
        prepare = make_prepare(
            self.spec,
            data.crop_padding,
            data.flip,
            self.config.model.precision,
            jitter=data.jitter,
            cutout=data.cutout,
            erase=data.erase,
        )
        weight_opt, mask_opt = optimizers_for(self.config, phase)
        objective = labels_alone
        if has_teacher(self.config, phase):
            objective = make_distillation(dataclasses.replace(self.network, mode="off"), self.config.distill)
        programs: dict[Hashable, Dispatch] = {}
        if phase.learns_masks:
            for mode in ("soft", "straight"):
                moving = dataclasses.replace(network, mode=mode)
                step = make_mask_step(
                    moving, self.spec, mask_opt, prepare, self.config.learn, objective, mixup_alpha=data.mixup
                )
                programs["masks", mode == "straight"] = feed.compile(step)
        if isinstance(settings, WeightPhaseConfig):
            for train_batch_norm in (True, False):
                step = make_weight_step(
                    network,
                    weight_opt,
                    prepare,
                    objective,
                    train_batch_norm=train_batch_norm,
                    label_smoothing=settings.label_smoothing,
                    mixup_alpha=data.mixup,
                )
                programs["weights", train_batch_norm] = feed.compile(step)
        return programs

    def _chunks(
        self, phase: Phase, phase_step: int, stops: Callable[[int], bool], longest: int
    ) -> Iterator[tuple[_Chunk, np.ndarray]]:
        """The rest of a phase as chunks, with their examples; no chunk goes on after a step at which it `stops`."""

        def key_of(step: int) -> Hashable:
            kind = phase.kind(self.config, step)
            if kind == "masks":
                return kind, phase.rounds_masks(self.config, step)
            return kind, phase.trains_batch_norm(self.config, step)

        while phase_step < phase.steps:
            first, key, rows = phase_step, key_of(phase_step), []
            while not rows or (len(rows) < longest and not stops(phase_step) and key_of(phase_step) == key):
                rows.append(self.order.rows(phase.start + phase_step))
                phase_step += 1
            yield _Chunk(first, len(rows), key), np.stack(rows)

    def _run_phase(self, state: TrainState, phase: Phase, phase_step: int, feed: Feed) -> TrainState:
        programs = self._make_programs(phase, state, feed)
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
            batches = feed.batches(
                self._chunks(phase, phase_step, stops, feed.longest), (phase.start + phase_step, phase.end)
            )
            for chunk, batch in waiting.over(batches):
                if controls(chunk.first):
                    at = (int(mask_steps[chunk.first]), int(mask_steps[-1]), control_every)
                    state, figures = self._control(state, *at, figures)
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
                score = None
                if evaluates and not last:
                    score, text = self.measure.evaluate_midway(phase, step, state, self.done)
                    progress.say(text)
                if last:
                    score = self._finish_phase(phase, state, progress)
                if saves or last:
                    self._save(phase, phase_step, state, score)
                if saves or evaluates:
                    waiting.restart()
        finally:
            trace.close()
            progress.close()
        return state

    def _control(
        self, state: TrainState, mask_step: int, mask_steps: int, interval: int, figures: dict[str, float]
    ) -> tuple[TrainState, dict[str, float]]:
        """Measures the masks, and moves lambda if there is a target.

        Turns of weight learning do not count: neither masks nor the line that they are to follow move in them.
        """
        learn = self.config.learn
        hard = hard_masks(learn, self.spec, state.fcmask, to_target=False)
        figures = {**figures, "macs_ratio": hard.macs.ratio, "macs_paper_ratio": hard.macs.paper_ratio}
        if learn.target_macs is None:
            return state, figures
        figures["expected_ratio"] = float(self._expected_ratio(flat_masks(state.fcmask)))
        on_the_way = mask_step < learn.ramp * mask_steps
        ratio = figures["expected_ratio"] if on_the_way else mac_ratio(hard.macs, learn.target_convention)
        offset = (learn.target_macs - ratio) / (1 - min(learn.target_macs, _HIGHEST_TARGET))
        previous, start = (float(state.controller[name]) for name in ("offset", "start"))
        lambda_ = float(state.lambda_)
        if np.isnan(start):
            start = offset
        else:
            progress, share = mask_step / mask_steps, interval / mask_steps
            lambda_ = next_lambda(lambda_, offset, previous, start, progress, share, learn.ramp)
        controller = {"offset": np.float32(offset), "start": np.float32(start)}
        figures["offset"] = offset
        moved = self.devices.replicate({"lambda_": np.float32(lambda_), "controller": controller})
        return state.replace(**moved), figures

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
        if phase.learns_masks:
            self.done.level_losses = self._measure_level_losses(state)
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
        """Evaluates the network as it stands, writes plots and, as the last thing, the summary."""
        test, macs = self.measure.evaluate(self.phases[-1], state, self.done, finished=True, split=self.measure.test)
        learn = self.config.learn
        summary = {
            **evaluation_summary(test, macs),
            "split": "test",
            "num_classes": self.spec.num_classes,
            "dense_top1": self.done.dense_top1,
            "seconds": round(self.done.seconds, 1),
            "phases": self.done.history,
            "target_macs": learn.target_macs if self.done.masks_learned else None,
            "target_convention": learn.target_convention,
            "seed": self.config.seed,
            "versions": self.versions,
        }
        if self.devices.is_writer:
            self.measure.plot(self.phases, state, self.done, summary["layers"])
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
