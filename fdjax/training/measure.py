"""Measures a run: records metrics, evaluates the network and draws plots."""

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
from fdjax.training.early_stopping import note_evaluation
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
# A finite loss that is this many times the loss of guessing gives a warning.
_EXPLODED = 100.0
LabelledImages = tuple[Images, np.ndarray]


class PhaseEnd(NamedTuple):
    """What is measured at the end of a phase.

    Attributes:
      top1: accuracy on the test set with rounded masks, 0 to 1.
      soft_top1: accuracy on the test set with soft masks, before rounding; None if the phase has learned no masks.
      macs: MACs of the network with rounded masks.
      score: accuracy on the validation share; None if there is none.
    """

    top1: float
    soft_top1: float | None
    macs: NetworkMacs
    score: float | None


class Measurements:
    """Measures a run's network; nothing here changes it.

    Args:
      config: the run's config.
      network: with soft masks.
      graph: channel graph of the network.
      workdir: directory for records and plots.
      test: images uint8 [n, H, W, C] and labels int [n].
      validation: images and labels of the validation share; may be empty.
      devices: the run's devices; only one process writes.
      between_batches: is called between batches of an evaluation; an exception that it raises ends the evaluation.
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
        """Records the means of the metrics over the steps since the last record.

        Args:
          phase: the present phase.
          step: number of the run's steps that are done.
          state: the state after them.
          pending: numbers of steps, with the sums of their metrics.
          figures: other figures to record.
          waiting: the time spent waiting for batches.

        Returns:
          The means, by names that begin with `train_`.

        Raises:
          RunStopped: if the loss is not finite.
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
        # The devices have finished these steps by now, so the time since the last record is the time that they took.
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
        """Makes the exception that ends a run that has diverged; the sentence `what` says what is not finite."""
        return diverged(what, phase.name, step, getattr(self.config, phase.name).learning_rate)

    def check_finite(self, phase: Phase, step: int, collections: Mapping[str, Any]) -> None:
        """Raises `RunStopped` if a collection of the state at `step` of the run is not finite."""
        problem = nonfinite_network(collections)
        if problem is not None:
            raise self.diverged(problem, phase, step)

    def check_answers(self, phase: Phase, step: int, state: TrainState, done: Past) -> None:
        """Checks that the network gives finite logits for one batch of images.

        A learning rate that is far too high can leave finite weights that give infinite logits; the training loss would
        show them only one step later.

        Args:
          phase: the present phase.
          step: number of the run's steps that are done.
          state: the state after them.
          done: the past of the run.

        Raises:
          RunStopped: if the loss is not finite.
        """
        images, labels = self.test
        self.evaluate(phase, state, done, finished=step == phase.end, split=(images[:EVAL_BATCH], labels[:EVAL_BATCH]))

    def macs(self, phase: Phase, state: TrainState, done: Past, *, finished: bool) -> NetworkMacs:
        """Counts the MACs of the network with its present masks, rounded.

        Args:
          phase: the present phase.
          state: the state, whose masks are counted.
          done: the past of the run.
          finished: whether the phase is over; its masks are then rounded to the target.

        Returns:
          The MACs.
        """
        hard = masks_as_they_stand(self.config, self.graph, phase, finished, state.fcmask, done)
        return hard.macs if hard else network_macs(self.graph, self.graph.full_counts())

    def evaluate(
        self, phase: Phase, state: TrainState, done: Past, *, finished: bool, split: LabelledImages
    ) -> tuple[dict[str, float], NetworkMacs]:
        """Evaluates the network with its present masks, rounded; at the end of a phase by the program of `eval.py`.

        Args:
          phase: the present phase.
          state: the state to evaluate.
          done: the past of the run.
          finished: whether the phase is over; its masks are then rounded to the target.
          split: images uint8 [n, H, W, C] and labels int [n].

        Returns:
          The figures of `make_evaluator`, and the MACs.

        Raises:
          RunStopped: if the loss is not finite.
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
            else:  # While masks change, one program serves for all of their values.
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
        """Evaluates the network in the course of a phase and records the results.

        Args:
          phase: the present phase.
          step: number of the run's steps that are done.
          state: the state after them.
          done: the past of the run.

        Returns:
          A score by which the best checkpoint is chosen, if there is one, and a line to print.
        """
        held_out = len(self.validation[1]) > 0
        name, split = ("validation", self.validation) if held_out else ("test", self.test)
        figures, macs = self.evaluate(phase, state, done, finished=False, split=split)
        self._write(phase, step, {f"{name}_top1": figures["top1"], f"{name}_loss": figures["loss"]}, macs)
        text = (
            f"{phase.name}: step {step - phase.start} of {phase.steps}, {name} accuracy {100 * figures['top1']:.2f}% "
            f"at {macs.ratio:.3f}x MACs"
        )
        # While masks are learned there is no score: the network that is pruned least would have the best.
        score = figures["top1"] if held_out and not phase.learns_masks else None
        note_evaluation(self.config, phase, step, score, done)
        return score, text

    def finish_phase(self, phase: Phase, state: TrainState, done: Past) -> PhaseEnd:
        """Evaluates the network at the end of a phase and records the results.

        Args:
          phase: the phase that ends.
          state: the state at its end.
          done: the past of the run.

        Returns:
          What was measured.
        """
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
        """Times the network at the end of the run, frozen, beside the dense network.

        Args:
          phase: the last phase.
          state: the state at its end.
          done: the past of the run.

        Returns:
          What `frozen_speed` returns; None if nothing is pruned, or the config does not ask for the time.
        """
        hard = masks_as_they_stand(self.config, self.graph, phase, True, state.fcmask, done)
        if hard is None or not self.config.checkpoint.time:
            return None
        return frozen_speed(self.config.learn, self.graph, state, hard.counts)

    def plot(self, phases: Sequence[Phase], state: TrainState, done: Past, layers: list[dict[str, Any]]) -> None:
        """Draws the plots of a finished run into the workdir.

        Args:
          phases: the run's phases.
          state: the state at the end.
          done: the past of the run.
          layers: the layers of the summary.
        """
        learn = self.config.learn
        hard = masks_as_they_stand(self.config, self.graph, phases[-1], True, state.fcmask, done)
        fcmasks = []
        if hard is not None and done.masks_learned:
            soft = self._soft_masks()
            for path, (_, num_coefs) in self.graph.mask_sizes.items():
                rounded = hard.counts[path] / num_coefs
                fcmasks.append((path, soft.get(path, rounded), rounded, num_coefs))
        spans = [{"name": phase.name, "start_step": phase.start, "end_step": phase.end} for phase in phases]
        by_macs = learn.target_time is None and learn.target_convention == "total"
        drawn = by_macs and done.masks_learned
        plot_run(layers, self.log.read(), spans, fcmasks, self.workdir, target=learn.target_macs if drawn else None)

    def _soft_masks(self) -> dict[str, np.ndarray]:
        """Reads the soft masks of the latest mask phase, before rounding."""
        try:
            with np.load(self.workdir / SOFT_MASKS_FILE) as arrays:
                soft = {path: arrays[path] for path in arrays.files}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
            return {}  # If the file is missing or damaged, plots show the rounded masks instead.
        sizes = {path: channels for path, (channels, _) in self.graph.mask_sizes.items()}
        return {
            path: mask
            for path, mask in soft.items()
            if path in sizes and mask.shape == (sizes[path],) and mask.dtype == np.float32 and np.isfinite(mask).all()
        }
