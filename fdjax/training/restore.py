"""Restores a run from the directory of a checkpoint; nothing else is needed."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fdjax.checkpoint import Checkpoints, DamagedCheckpoint, find_checkpoint
from fdjax.config import Config
from fdjax.data import Dataset, limit_training, split_validation
from fdjax.errors import UserError
from fdjax.graph.counting import NetworkMacs, network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.onnx.kept_file import holds_network_of, kept_file
from fdjax.pruning import HardMasks
from fdjax.pruning.timed import TimeTable
from fdjax.training.build import collection_of, counts_of, facts_of, hard_masks, hard_network, network_of
from fdjax.training.datasets import open_data
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.health import nonfinite_network
from fdjax.training.optimizers import optimizers_for
from fdjax.training.own_network import Network, OwnNetwork
from fdjax.training.phases import Phase, has_teacher
from fdjax.training.state import TrainState, create_state, variable_shapes
from fdjax.training.summary import evaluation_summary
from fdjax.zoo import FCMASK


@dataclasses.dataclass
class Past:
    """What a run has done so far; JSON types, stored in every checkpoint.

    Attributes:
      history: finished phases, as `summary.json` lists them.
      seconds: time that the run has taken so far.
      dense_top1: test accuracy at the end of pretraining, 0 to 1.
      released: layers that the gate has released; they stay released while masks are hard.
      inherited: phases that the run of --init had finished.
      skipped: number of this run's own phases that are skipped because of that.
      num_train: number of training examples, with the validation share.
      masks_learned: whether masks have been learned, in this run or that of --init, or set by `fdjax prune`.
      weights_adapted: whether the weights have been trained under masks since pretraining, in this run or that of
        --init, or `fdjax prune` has corrected batch norm for masks.
      filters_removed: whether `fdjax prune` has removed filters since pretraining, in this run or that of --init.
      pruned_by: the method of `fdjax prune` that has set the masks or removed filters since pretraining, in this run or
        that of --init; otherwise empty.
      unpruned_macs: MACs of the network before filters were removed; None if none were.
      imported: the origin of weights that `fdjax import` has imported; otherwise empty.
      best: the fields of the `BestSoFar` of a phase that can end early; otherwise None.
      evaluated: step of the run at its latest evaluation, 0 before the first; None in checkpoints without it.
      times: the `TimeTable` of a run whose target is a time; otherwise None.
    """

    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    dense_top1: float | None = None
    released: list[str] = dataclasses.field(default_factory=list)
    inherited: list[str] = dataclasses.field(default_factory=list)
    skipped: int = 0
    num_train: int = 0
    masks_learned: bool = False
    weights_adapted: bool = False
    filters_removed: bool = False
    pruned_by: str = ""
    unpruned_macs: int | None = None
    imported: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] | None = None
    evaluated: int | None = None
    times: dict[str, Any] | None = None

    @property
    def table(self) -> TimeTable | None:
        """`times` as a `TimeTable`."""
        return None if self.times is None else TimeTable.from_dict(self.times)


def checkpoint_meta(
    config: Config, graph: MaskedGraph, phase: Phase, phase_step: int, done: Past, versions: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what a checkpoint holds beside its state, which `restore` reads; JSON types.

    Args:
      config: the run's config.
      graph: channel graph of the network.
      phase: the phase.
      phase_step: number of the phase's steps that are done.
      done: the run's past.
      versions: versions of the programs at the start of the run.
    """
    return {
        "config": config.to_dict(),
        "network": facts_of(graph),
        "phase": dataclasses.asdict(phase),
        "phase_step": phase_step,
        "done": dataclasses.asdict(done),
        "versions": dict(versions),
    }


@dataclasses.dataclass(frozen=True)
class Restored:
    """A restored checkpoint.

    Attributes:
      config: the run's config.
      network: with soft masks.
      graph: channel graph of the network, with the scaling of images and the class names.
      phase: the phase in which the checkpoint was saved.
      phase_step: number of the phase's steps that were done.
      state: the run's state.
      done: the past of the run.
      hard: the network's masks, rounded; None in pretraining, where all masks are 1.
      made_on: `Run.made_on` of the run; empty in older checkpoints.
      onnx_file: the copy of the network's ONNX file beside the checkpoints; None if there is none.
    """

    config: Config
    network: Network
    graph: MaskedGraph
    phase: Phase
    phase_step: int
    state: TrainState
    done: Past
    hard: HardMasks | None
    made_on: dict[str, str]
    onnx_file: Path | None

    @property
    def weights_adapted(self) -> bool:
        """Whether weights or batch norm have been fitted to masks: they are no longer the unpruned network's."""
        return self.done.weights_adapted or (self.phase.adapts_weights and self.phase_step > 0)

    @property
    def as_imported(self) -> bool:
        """Whether the weights are still as they were imported."""
        return bool(self.done.imported) and self.phase.name == "pretrain" and not self.phase.steps

    def finished_phases(self) -> list[str]:
        """Returns the names of the finished phases, those of --init first."""
        return self.done.inherited + [phase["name"] for phase in self.done.history]

    def evaluation(self) -> tuple[Network, dict[str, Any]]:
        """Returns the network that is evaluated and its collections; its masks are hard, once there are any."""
        if self.hard is None:
            return dataclasses.replace(self.network, mode="off"), self.state.variables()
        variables = {**self.state.variables(), FCMASK: collection_of(self.graph, self.hard.counts)}
        return hard_network(self.network, self.graph, self.hard.counts), variables

    def macs(self) -> NetworkMacs:
        """Returns the MACs of the network that is evaluated."""
        return self.hard.macs if self.hard else network_macs(self.graph, self.graph.full_counts())


def restore(checkpoints: Checkpoints, step: int) -> Restored:
    """Restores a checkpoint step.

    Raises:
      UserError: if it is damaged, is not a run's, or is of a network whose code is missing or has changed.
    """
    meta = checkpoints.meta(step)
    try:
        config = Config.from_dict(meta["config"])
        kept = None if config.model.onnx_file is None else kept_file(checkpoints.folder)
        model = config.model if kept is None else config.model.with_onnx_file(kept)
        # Checkpoints of version 0.1 call it a graph.
        facts = meta["network"] if "network" in meta else meta["spec"]
        network, graph = network_of(dataclasses.replace(config, model=model), facts)
        # Older checkpoints have level_losses, of an option that has been removed.
        past = {name: value for name, value in meta["done"].items() if name != "level_losses"}
        phase, phase_step, done = Phase(**meta["phase"]), int(meta["phase_step"]), Past(**past)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoints.folder / str(step)} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoints.folder / str(step)} is not of an fdjax run: {error}") from error
    if kept is None:
        _check_onnx_file(config, done)
    like = _abstract_state(config, network, graph, phase)
    if isinstance(network, OwnNetwork) and (problem := checkpoints.mismatch(step, like)) is not None:
        raise UserError(
            f"checkpoint {checkpoints.folder / str(step)} is of another network than {network.title} makes "
            f"now: it {problem}; bring back the code that it was trained with"
        )
    state = checkpoints.restore(step, like)
    problem = nonfinite_network(state.collections())
    if problem is not None:
        raise DamagedCheckpoint(
            f"checkpoint {checkpoints.folder / str(step)} is of a run that has diverged: {problem}; give an earlier "
            "step"
        )
    return Restored(
        config, network, graph, phase, phase_step, state, done,
        masks_as_they_stand(config, graph, phase, phase_step >= phase.steps, state.fcmask, done),
        _texts(meta.get("made_on")), kept,
    )  # fmt: skip


def _check_onnx_file(config: Config, done: Past) -> None:
    """Raises `UserError` if the ONNX file of the network is another one than was imported."""
    file = config.model.onnx_file
    if file is not None and not holds_network_of(file, None, done.imported.get("sha256")):
        raise UserError(
            f"the network of the checkpoint is that of {file} as it was imported, and the file has changed since: "
            "bring it back, or import the new one"
        )


def _texts(value: Any) -> dict[str, str]:
    """Returns the texts of a JSON object; empty if it is something else."""
    found = value if isinstance(value, dict) else {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def restore_latest(checkpoints: Checkpoints, below: int | None = None) -> tuple[int, Restored] | None:
    """Restores the newest checkpoint step that is sound; a warning names each step that is skipped.

    Args:
      checkpoints: the run's checkpoints.
      below: only steps before this one are tried.

    Returns:
      The step, and what was restored; None if no step was ever saved.

    Raises:
      UserError: if there are steps, but none of them can be used.
    """
    problem = None
    for step in checkpoints.sound_steps(below):
        try:
            return step, restore(checkpoints, step)
        except DamagedCheckpoint as error:
            print(f"warning: {error}; trying the one before it", file=sys.stderr)
            problem = error
    if problem is None and not checkpoints.steps():
        return None
    raise UserError(
        f"every checkpoint in {checkpoints.folder} is damaged{f', such as: {problem}' if problem else ''}; bring back "
        "a copy of that folder, or give another --workdir"
    )


def open_checkpoint(path: str, which: str = "latest") -> tuple[Checkpoints, int, Restored]:
    """Finds and restores the checkpoint that `path` and `which` name, as `find_checkpoint` does.

    If the latest is damaged, the newest sound one takes its place; any other that is damaged is an error.
    """
    checkpoints, step = find_checkpoint(path, which)
    try:
        return checkpoints, step, restore(checkpoints, step)
    except DamagedCheckpoint as error:
        if which != "latest" or checkpoints.folder / str(step) == Path(path).expanduser().resolve():
            raise
        older = [other for other in checkpoints.steps() if other < step]
        if not older:
            raise
        print(f"warning: {error}; trying the one before it", file=sys.stderr)
    found = restore_latest(checkpoints, below=step)
    assert found is not None
    return checkpoints, *found


def _abstract_state(config: Config, network: Network, graph: MaskedGraph, phase: Phase) -> TrainState:
    def create(variables: dict[str, Any]) -> TrainState:
        state = create_state(variables, config.seed, *optimizers_for(config, phase))
        return state.with_teacher() if has_teacher(config, phase) else state

    return jax.eval_shape(create, variable_shapes(network, graph.input_shape))


def masks_as_they_stand(
    config: Config, graph: MaskedGraph, phase: Phase, finished: bool, fcmask: Any, done: Past
) -> HardMasks | None:
    """Rounds the present masks as the network is evaluated with them.

    Args:
      config: the run's config.
      graph: channel graph of the network.
      phase: the present phase.
      finished: whether the phase is over; learned masks are then rounded to the target.
      fcmask: the collection, values in [0, 1].
      done: the past of the run.

    Returns:
      The hard masks; None in pretraining, where all masks are 1.
    """
    if phase.learns_masks:
        return hard_masks(config.learn, graph, fcmask, to_target=finished, table=done.table)
    if phase.hard:
        counts = counts_of(graph, fcmask)
        return HardMasks(counts, tuple(done.released), 0.0, network_macs(graph, counts, done.released))
    return None


def load_restored_data(restored: Restored, data_path: str | None = None) -> Dataset:
    """Opens the data set of a checkpoint's run, at `data_path` if that is given, else at the run's own `data.path`.

    Its training images are those of `data.train_limit`, chosen before classes are put in the network's order, as in the
    run; all, if there are fewer. With `data.unlabelled` they are the data set's own.

    Raises:
      UserError: if the data set is missing, or does not fit the network.
    """
    data, graph = restored.config.data, restored.graph
    path = data_path if data_path is not None else data.path
    whole = dataclasses.replace(data, path=path, unlabelled=None, train_limit=None)
    dataset, limit = open_data(whole, restored.config.seed), data.train_limit
    # The test set can be evaluated where the training images are not all there.
    if data.unlabelled is None and limit is not None and limit <= len(dataset.train_labels):
        dataset = limit_training(dataset, limit, restored.config.seed)
    dataset = dataset.in_order_of(graph.class_names)
    check_data(graph, dataset)
    return dataset


def check_data(graph: MaskedGraph, dataset: Dataset) -> None:
    """Raises `UserError` unless the data set has the images and classes that the network is for.

    If the network's classes have no names, only their number has to agree.
    """
    for what, own, theirs in (
        ("images of", "x".join(map(str, graph.input_shape)), "x".join(map(str, dataset.image_shape))),
        ("classes:", str(graph.num_classes), str(dataset.num_classes)),
    ):
        if own != theirs:
            raise UserError(f"the network is for {what} {own}; the data set has {what} {theirs}: give its own data set")
    if graph.class_names and graph.class_names != dataset.class_names:
        pairs = zip(graph.class_names, dataset.class_names, strict=True)
        number, (own, theirs) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"the network's classes have other names than the data set's: class {number} is {own!r} in the network and "
            f"{theirs!r} in the data set; give the data set that the network was trained on"
        )


def evaluate_restored(restored: Restored, split: str = "test", data_path: str | None = None) -> dict[str, Any]:
    """Evaluates a checkpoint's network.

    Args:
      restored: the checkpoint.
      split: "test" or "validation" (the share that its run held out).
      data_path: directory of the data set; None: the run's own `data.path`.

    Returns:
      The accuracy and MACs as `summary.json` has them, with `split`, `step`, `phase` and `dense_top1`; JSON types.

    Raises:
      UserError: if the data set is missing or does not fit the network, or there is no validation share.
    """
    data, graph, dataset = restored.config.data, restored.graph, load_restored_data(restored, data_path)
    images, labels = dataset.test_images, dataset.test_labels
    if split == "validation":
        dataset = limit_training(dataset, data.train_limit, restored.config.seed)
        _, held_out = split_validation(
            len(dataset.train_labels), dataset.train_labels, data.validation, restored.config.seed
        )
        images, labels = dataset.held_out(held_out)
        if not len(labels):
            raise UserError(
                "the run held out no validation share (data.validation is 0), and the data have no validation set; use "
                "--split test"
            )
    network, variables = restored.evaluation()
    figures = make_evaluator(network, graph, Devices())(variables, images, labels)
    return {
        **evaluation_summary(figures, restored.macs()),
        "split": split,
        "class_names": list(graph.class_names),
        "step": restored.phase.start + restored.phase_step,
        "phase": restored.phase.name,
        "dense_top1": restored.done.dense_top1 if split == "test" else None,
        "unpruned_macs": restored.done.unpruned_macs,
    }
