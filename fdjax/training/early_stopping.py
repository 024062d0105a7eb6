"""Early stopping: ends a phase when the validation accuracy no longer rises, with the weights that were best."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from fdjax.checkpoint import Checkpoints, DamagedCheckpoint
from fdjax.config import Config, WeightPhaseConfig
from fdjax.errors import UserError
from fdjax.training.cadence import Cadence
from fdjax.training.phases import Phase, phase_settings
from fdjax.training.restore import Past, restore

if TYPE_CHECKING:
    from fdjax.training.state import TrainState


def patience_of(config: Config, phase: Phase) -> int | None:
    """Returns how many consecutive evaluations without a better one end the phase; None if it does all its steps."""
    settings = phase_settings(config, phase.name)
    return settings.patience if isinstance(settings, WeightPhaseConfig) else None


def check_patience(config: Config, phases: Sequence[Phase], num_validation: int) -> None:
    """Raises `UserError` if a phase may stop early and there are no validation images."""
    for phase in phases:
        patience = patience_of(config, phase)
        if patience is not None and not num_validation:
            raise UserError(
                f"{phase.name}.patience is {patience}, and there are no validation images to stop by: give "
                "--data.validation 0.1, or a data set with a validation split of its own"
            )


@dataclasses.dataclass(frozen=True)
class BestSoFar:
    """The best evaluation of a phase so far.

    Attributes:
      step: step of the run at the best evaluation.
      top1: its accuracy on the validation images, 0 to 1.
      since: number of evaluations since then.
      last: step of the run at the latest evaluation.
    """

    step: int
    top1: float
    since: int
    last: int

    @classmethod
    def after(cls, before: dict[str, Any] | None, step: int, top1: float) -> BestSoFar:
        """Adds an evaluation to the best so far.

        Among equal evaluations, the later one is kept, because its checkpoint is kept too; it still counts as no
        better.

        Args:
          before: the best so far as a dict (`dataclasses.asdict`), or None before the first evaluation.
          step: step of the run at the evaluation.
          top1: accuracy on the validation images, 0 to 1.

        Returns:
          The best with this evaluation.
        """
        best = None if before is None else cls(**before)
        if best is None or top1 > best.top1:
            return cls(step, top1, 0, step)
        return cls(step if top1 == best.top1 else best.step, best.top1, best.since + 1, step)


def note_evaluation(config: Config, phase: Phase, step: int, score: float | None, done: Past) -> None:
    """Records an evaluation after `step` of the run in its past."""
    done.evaluated = step
    if patience_of(config, phase) is not None and score is not None:
        done.best = dataclasses.asdict(BestSoFar.after(done.best, step, score))


def best_of_finished(entry: dict[str, Any], step: int) -> dict[str, Any] | None:
    """Returns the best so far of a finished phase that goes on; None if it could not end early.

    Args:
      entry: the phase in the run's history.
      step: step of the run at the end of the phase, whose checkpoint has the best weights.
    """
    stopped = entry.get("stopped")
    return stopped and dataclasses.asdict(BestSoFar(step, stopped["validation_top1"], 0, step))


def lacks_evaluation(config: Config, phase: Phase, step: int, done: Past) -> bool:
    """Returns whether a run that was stopped just before an evaluation, or in it, has to do it at `step`."""
    at = step - phase.start
    if not at or done.evaluated == step or (done.best or {}).get("last") == step:
        return False
    if patience_of(config, phase) is None:
        # The end of the phase is evaluated in any case; checkpoints of earlier versions do not say what was.
        return done.evaluated is not None and at < phase.steps and Cadence(config, phase).evaluates(at)
    return at == phase.steps or Cadence(config, phase).evaluates(at)


def out_of_patience(config: Config, phase: Phase, done: Past) -> bool:
    """Returns whether a phase ends where it is."""
    patience = patience_of(config, phase)
    return patience is not None and done.best is not None and BestSoFar(**done.best).since >= patience


def ending_words(phase: Phase, stopped: dict[str, Any]) -> str:
    """Returns the message at the end of such a phase; `stopped` is from `take_best`."""
    best = f"step {stopped['best']:,}, {100 * stopped['validation_top1']:.2f}% of the validation images"
    if stopped["at"] == phase.steps:
        return f"{phase.name}: the weights are those of {best}"
    return (
        f"{phase.name}: ends after {stopped['at']:,} of {phase.steps:,} steps ({stopped['evaluations']:,} evaluations "
        f"in a row were no better); the weights are those of {best}"
    )


def take_best(
    checkpoints: Checkpoints, done: Past, phase: Phase, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Ends a phase that may stop early, after the steps that `state` has done.

    Args:
      checkpoints: the checkpoints of the run, all of them on disk.
      done: the run's past, from which the best evaluation is removed.
      phase: the phase.
      state: the current state.

    Returns:
      The state of the best evaluation, as if all steps of the phase were done (the weights of `state` if its checkpoint
      cannot be read), and an entry for the run's history in JSON types.
    """
    assert done.best is not None
    best, done.best = BestSoFar(**done.best), None
    steps = {"at": int(state.step) - phase.start, "best": best.step - phase.start}
    if best.step != int(state.step):
        try:
            checkpoints.verify(best.step)
            state = restore(checkpoints, best.step).state
        except (DamagedCheckpoint, OSError) as error:
            print(f"warning: {error}; continuing with the current weights", file=sys.stderr)
            steps["best"] = steps["at"]
    # The next phase draws the same random numbers as after all steps of this one. Should this one be made longer, its
    # learning rate goes on from there.
    rates = optax.tree_utils.tree_set(state.weight_opt, count=jnp.asarray(phase.steps, jnp.int32))
    state = state.replace(step=jnp.asarray(phase.end, jnp.int32), weight_opt=rates)
    state = jax.tree.map(jnp.array, state)
    return state, {"stopped": {**steps, "validation_top1": best.top1, "evaluations": best.since}}
