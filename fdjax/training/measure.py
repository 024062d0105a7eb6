"""Measuring a run: records, evaluations and plots of the network as it stands."""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fdjax.config import Config
from fdjax.data import Images
from fdjax.errors import RunStopped
from fdjax.graph.counting import NetworkMacs, network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.reports import plot_run
from fdjax.training.build import collection_of, flat_masks, hard_network
from fdjax.training.devices import Devices
from fdjax.training.evaluate import EVAL_BATCH, Evaluator, make_evaluator
from fdjax.training.feed import Waiting
from fdjax.training.health import diverged, nonfinite_network
from fdjax.training.own_network import Network
from fdjax.training.phases import Phase
from fdjax.training.restore import Past, masks_as_they_stand
from fdjax.training.speed import frozen_speed
from fdjax.training.state import TrainState
from fdjax.training.workdir import METRICS_FILE, MetricsLog
from fdjax.zoo import FCMASK

SOFT_MASKS_FILE = "soft_masks.npz"
# A loss this many times that of guessing has exploded, though it is a number.
_EXPLODED = 100.0
LabelledImages = tuple[Images, np.ndarray]


class PhaseEnd(NamedTuple):
    """What the end of a phase gave.

    Attributes:
      top1: on the test set, with rounded masks.
      soft_top1: likewise with masks as learned, just before rounding; None where the phase has learned none.
      macs: of the network with rounded masks.
      score: on the validation share, if there is one.
    """

    top1: float
    soft_top1: float | None
    macs: NetworkMacs
    score: float | None


class Measurements:
    """Everything that looks at a run's network without changing it.

    Args:
      config: of the run.
      network: with soft masks.
      graph: channel graph of the network.
      workdir: where records and plots go.
      test: images uint8 [n, H, W, C] and labels [n].
      validation: likewise; may be empty.
      devices: to evaluate on; one process writes.
      between_batches: called while evaluating; what it raises ends the evaluation.
    """

    def __init__(
        self,
        config: Config,
        network: Network,
        graph: MaskedGraph,
        workdir: Path,
        *,
        test: LabelledImages,
        validation: LabelledImages,
        devices: Devices,
        between_batches: Callable[[], None] = lambda: None,
    ):
        self.config, self.network, self.graph, self.workdir = config, network, graph, workdir
        self.test, self.validation, self._devices = test, validation, devices
        self._between_batches = between_batches
        self.log = MetricsLog(workdir / METRICS_FILE, writes=devices.is_writer)
        self._evaluators: dict[Any, Evaluator] = {}
        self._warned: set[str] = set()

    def record(
        self,
        phase: Phase,
        step: int,
        state: TrainState,
        pending: Sequence[tuple[int, dict[str, jax.Array]]],
        figures: dict,
        waiting: Waiting,
    ) -> dict[str, float]:
        """Writes the means of the steps since the last record; returns them.

        `pending`: numbers of steps, and the sums of their metrics. `waiting`: for batches, since the last record.

        Raises:
          RunStopped: the loss is no longer a number.
        """
        steps, sums = sum(steps for steps, _ in pending), jax.device_get([sums for _, sums in pending])
        totals = {name: sum(float(s[name]) for s in sums) for name in sums[0]}
        skipped = round(totals.pop("skipped", 0))
        if skipped == steps:
            raise self.diverged(f"none of the last {steps} steps was finite", phase, step)
        means = {f"train_{name}": total / (steps - skipped) for name, total in totals.items()}
        if self.config.data.unlabelled is not None:
            del means["train_top1"]
        if not math.isfinite(means["train_loss"]):
            raise self.diverged(f"the loss is {means['train_loss']}", phase, step)
        high = _EXPLODED * max(1.0, math.log(self.graph.num_classes))
        if means["train_loss"] > high:
            self._warn_once(
                phase,
                f"the loss of {phase.name} is {means['train_loss']:.3g} at step {step}, far above that of guessing; "
                f"{phase.name}.learning_rate may be too high",
            )
        # Here the devices are done with these steps, so that the time since the last record is theirs.
        record = {"step": step, "phase": phase.name, **figures, **means, "data_wait": round(waiting.share(), 4)}
        if skipped:
            record["skipped"] = skipped
            self._warn_once(phase, f"{skipped} of the {steps} steps up to step {step} were not finite and are skipped")
        if phase.learns_masks:
            record["lambda"] = float(state.lambda_)
        self.log.write(record)
        return means

    def _warn_once(self, phase: Phase, text: str) -> None:
        if phase.name not in self._warned and self._devices.is_writer:
            self._warned.add(phase.name)
            print(f"warning: {text}", flush=True)

    def diverged(self, what: str, phase: Phase, step: int) -> RunStopped:
        """The end of a run that has diverged: `what` is not finite."""
        return diverged(what, phase.name, step, getattr(self.config, phase.name).learning_rate)

    def check_finite(self, phase: Phase, step: int, collections: Mapping[str, Any]) -> None:
        """Raises `RunStopped` where a collection of the state at `step` of the run is not finite."""
        problem = nonfinite_network(collections)
        if problem is not None:
            raise self.diverged(problem, phase, step)

    def check_answers(self, phase: Phase, step: int, state: TrainState, done: Past) -> None:
        """Raises `RunStopped` where the network, finite itself, gives logits that are not, on one batch of images.

        A learning rate that is far too high leaves such weights; the loss shows them one step later.
        """
        images, labels = self.test
        self.evaluate(phase, state, done, finished=step == phase.end, split=(images[:EVAL_BATCH], labels[:EVAL_BATCH]))

    def macs(self, phase: Phase, state: TrainState, done: Past, *, finished: bool) -> NetworkMacs:
        """Of the network as it stands; `finished`: the phase is over, so that its masks meet the target."""
        hard = masks_as_they_stand(self.config, self.graph, phase, finished, state.fcmask, done)
        return hard.macs if hard else network_macs(self.graph, self.graph.full_counts())

    def evaluate(
        self, phase: Phase, state: TrainState, done: Past, *, finished: bool, split: LabelledImages
    ) -> tuple[dict[str, float], NetworkMacs]:
        """Accuracy and MACs of the network as it stands, with the program that `eval.py` would run once finished.

        Raises:
          RunStopped: the loss is not finite.
        """
        hard = masks_as_they_stand(self.config, self.graph, phase, finished, state.fcmask, done)
        variables = state.variables()
        if hard is None:
            key, network = "dense", dataclasses.replace(self.network, mode="off")
            macs = network_macs(self.graph, self.graph.full_counts())
        else:
            macs = hard.macs
            variables[FCMASK] = collection_of(self.graph, hard.counts)
            if phase.hard or finished:
                network = hard_network(self.network, self.graph, hard.counts)
                key = network.hard_form
            else:  # One program serves however the masks move.
                key, network = "moving", dataclasses.replace(self.network, mode="hard")
        if key not in self._evaluators:
            self._evaluators[key] = make_evaluator(
                network, self.graph, self._devices, between_batches=self._between_batches
            )
        figures = self._evaluators[key](variables, *split)
        if not math.isfinite(figures["loss"]):
            raise self.diverged(
                f"the loss on {figures['num_examples']:,} held-out images is {figures['loss']}", phase, int(state.step)
            )
        return figures, macs

    def evaluate_midway(self, phase: Phase, step: int, state: TrainState, done: Past) -> tuple[float | None, str]:
        """Measures and records in the midst of a phase; returns a score to choose the best by, and a line to print."""
        held_out = len(self.validation[1]) > 0
        name, split = ("validation", self.validation) if held_out else ("test", self.test)
        figures, macs = self.evaluate(phase, state, done, finished=False, split=split)
        self._write(phase, step, {f"{name}_top1": figures["top1"], f"{name}_loss": figures["loss"]}, macs)
        text = (
            f"{phase.name}: step {step - phase.start} of {phase.steps}, {name} accuracy {100 * figures['top1']:.2f}% "
            f"at {macs.ratio:.3f}x MACs"
        )
        # While masks come down, the least pruned network would be the best.
        return figures["top1"] if held_out and not phase.learns_masks else None, text

    def finish_phase(self, phase: Phase, state: TrainState, done: Past) -> PhaseEnd:
        """Measures and records at the end of a phase."""
        test, macs = self.evaluate(phase, state, done, finished=True, split=self.test)
        figures, score, soft_top1 = {"test_top1": test["top1"], "test_loss": test["loss"]}, None, None
        if len(self.validation[1]):
            validation, _ = self.evaluate(phase, state, done, finished=True, split=self.validation)
            score = validation["top1"]
            figures |= {"validation_top1": score, "validation_loss": validation["loss"]}
        if phase.learns_masks:
            soft = make_evaluator(
                dataclasses.replace(self.network, mode="soft"),
                self.graph,
                self._devices,
                between_batches=self._between_batches,
            )
            soft_top1 = figures["test_soft_top1"] = soft(state.variables(), *self.test)["top1"]
        self._write(phase, phase.end, figures, macs)
        if phase.learns_masks and self._devices.is_writer:
            np.savez(self.workdir / SOFT_MASKS_FILE, **flat_masks(state.fcmask))  # type: ignore[arg-type]
        return PhaseEnd(test["top1"], soft_top1, macs, score)

    def _write(self, phase: Phase, step: int, figures: dict[str, float], macs: NetworkMacs) -> None:
        histograms = {
            layer.name: {"input": layer.input_histogram, "output": layer.output_histogram}
            for layer in macs.layers
            if layer.input_histogram or layer.output_histogram
        }
        ratios = {"macs_ratio": macs.ratio, "macs_paper_ratio": macs.paper_ratio}
        self.log.write({"step": step, "phase": phase.name, **figures, **ratios, "kept_counts": histograms})

    def time(self, phase: Phase, state: TrainState, done: Past) -> dict[str, Any] | None:
        """The time of the network at the end of the run, frozen, as `frozen_speed` has it; None where it is no other
        than the dense network's, or is not asked for."""
        hard = masks_as_they_stand(self.config, self.graph, phase, True, state.fcmask, done)
        if hard is None or not self.config.checkpoint.time:
            return None
        return frozen_speed(self.config.learn, self.graph, state, hard.counts)

    def plot(self, phases: Sequence[Phase], state: TrainState, done: Past, layers: list[dict[str, Any]]) -> None:
        """Draws the run at its end."""
        learn = self.config.learn
        hard = masks_as_they_stand(self.config, self.graph, phases[-1], True, state.fcmask, done)
        fcmasks = []
        if hard is not None and done.masks_learned:
            soft = self._soft_masks()
            for path, (_, num_coefs) in self.graph.mask_sizes.items():
                rounded = hard.counts[path] / num_coefs
                fcmasks.append((path, soft.get(path, rounded), rounded, num_coefs))
        spans = [{"name": phase.name, "start_step": phase.start, "end_step": phase.end} for phase in phases]
        drawn = learn.target_convention == "total" and done.masks_learned
        plot_run(layers, self.log.read(), spans, fcmasks, self.workdir, target=learn.target_macs if drawn else None)

    def _soft_masks(self) -> dict[str, np.ndarray]:
        """The masks as learned, before rounding, of the latest mask phase."""
        try:
            with np.load(self.workdir / SOFT_MASKS_FILE) as arrays:
                soft = {path: arrays[path] for path in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return {}  # Missing or damaged: plots show the rounded masks in their place.
        sizes = {path: channels for path, (channels, _) in self.graph.mask_sizes.items()}
        return {
            path: mask
            for path, mask in soft.items()
            if path in sizes and mask.shape == (sizes[path],) and mask.dtype == np.float32 and np.isfinite(mask).all()
        }
