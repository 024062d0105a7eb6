"""Reading a run back: a checkpoint's directory is all it takes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax

from fdjax.checkpoint import Checkpoints, DamagedCheckpoint, find_checkpoint
from fdjax.config import Config
from fdjax.data import Dataset, limit_training, open_dataset, split_validation
from fdjax.errors import UserError
from fdjax.graph.counting import NetworkMacs, network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.pruning import HardMasks
from fdjax.pruning.timed import TimeTable
from fdjax.training.build import collection_of, counts_of, hard_masks, hard_network, network_of
from fdjax.training.devices import Devices
from fdjax.training.evaluate import make_evaluator
from fdjax.training.health import nonfinite_network
from fdjax.training.optimizers import optimizers_for
from fdjax.training.own_network import Network, OwnNetwork
from fdjax.training.phases import Phase, has_teacher
from fdjax.training.state import TrainState, create_state, init_variables
from fdjax.training.summary import evaluation_summary
from fdjax.zoo import FCMASK


@dataclasses.dataclass
class Past:
    """What a run knows of its past; JSON types, kept in every checkpoint.

    Attributes:
      history: finished phases, as `summary.json` lists them.
      seconds: of work so far.
      dense_top1: at the end of pretraining.
      released: the layers that the gate has released, in force while masks are hard.
      inherited: phases that the run given by --init had finished.
      skipped: how many of this run's own phases are left out because of that.
      num_train: examples of the training set, the validation share included.
      masks_learned: whether masks have been learned, here or in that run, or set by `fdjax prune`.
      weights_adapted: whether a phase has trained the weights under masks since pretraining, here or in that run.
      imported: of a checkpoint made by `fdjax import`, where its weights are from; else empty.
      times: the `TimeTable` that the run steers by; None where its target is not one of time.
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
    imported: dict[str, Any] = dataclasses.field(default_factory=dict)
    times: dict[str, Any] | None = None

    @property
    def table(self) -> TimeTable | None:
        """`times`, as an object."""
        return None if self.times is None else TimeTable.from_dict(self.times)


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint read back.

    Attributes:
      config: of its run.
      network: with soft masks.
      graph: channel graph of the network, with preprocessing and class names.
      phase: the one it is in.
      phase_step: steps of it that are done.
      state: arrays.
      done: the past of the run.
      hard: the hard masks of the network as it stands; None while nothing has touched the masks.
      made_on: what its last bits depend on (`Run.made_on`); empty in checkpoints of before.
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

    @property
    def weights_adapted(self) -> bool:
        """Whether the weights have been trained under masks: they are no longer the unpruned network's."""
        return self.done.weights_adapted or (self.phase.adapts_weights and self.phase_step > 0)

    @property
    def as_imported(self) -> bool:
        """Whether nothing here has trained the weights since they were imported."""
        return bool(self.done.imported) and self.phase.name == "pretrain" and not self.phase.steps

    def finished_phases(self) -> list[str]:
        """Phases that are done, inherited ones first."""
        return self.done.inherited + [phase["name"] for phase in self.done.history]

    def evaluation(self) -> tuple[Network, dict[str, Any]]:
        """The network as it stands and its collections: hard masks once there are any."""
        if self.hard is None:
            return dataclasses.replace(self.network, mode="off"), self.state.variables()
        variables = {**self.state.variables(), FCMASK: collection_of(self.graph, self.hard.counts)}
        return hard_network(self.network, self.graph, self.hard.counts), variables

    def macs(self) -> NetworkMacs:
        """Of the network as it stands."""
        return self.hard.macs if self.hard else network_macs(self.graph, self.graph.full_counts())


def restore(checkpoints: Checkpoints, step: int) -> Restored:
    """Reads a checkpoint; the directory is all it takes.

    Raises:
      UserError: it is damaged, no checkpoint of a run, or of a network whose code is not there or has changed.
    """
    meta = checkpoints.meta(step)
    try:
        config = Config.from_dict(meta["config"])
        # Checkpoints of version 0.1 call it a graph.
        network, graph = network_of(config, meta["network"] if "network" in meta else meta["spec"])
        # level_losses: of an option that has been removed; no config that is accepted used it.
        past = {name: value for name, value in meta["done"].items() if name != "level_losses"}
        phase, phase_step, done = Phase(**meta["phase"]), int(meta["phase_step"]), Past(**past)
    except UserError as error:
        raise UserError(f"checkpoint {checkpoints.folder / str(step)} cannot be read: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoints.folder / str(step)} is not of an fdjax run: {error}") from error
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
        _texts(meta.get("made_on")),
    )  # fmt: skip


def _texts(value: Any) -> dict[str, str]:
    """A JSON object of texts; empty where it is something else."""
    found = value if isinstance(value, dict) else {}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def restore_latest(checkpoints: Checkpoints, below: int | None = None) -> tuple[int, Restored] | None:
    """The newest step that is sound and can be restored; says on stderr which ones it passes over.

    Args:
      checkpoints: of a run.
      below: only steps before this one.

    Returns:
      The step and what it holds; None where no step was ever finished.

    Raises:
      UserError: there are steps, and none of them can be used.
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
    """Finds and reads the checkpoint that `path` means, as `find_checkpoint` has it.

    The latest is the newest that can be restored; any other is the one that was asked for, or an error.
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
    def create():
        variables = init_variables(network, graph.input_shape, config.seed)
        state = create_state(variables, config.seed, *optimizers_for(config, phase))
        return state.with_teacher() if has_teacher(config, phase) else state

    return jax.eval_shape(create)


def masks_as_they_stand(
    config: Config, graph: MaskedGraph, phase: Phase, finished: bool, fcmask: Any, done: Past
) -> HardMasks | None:
    """Masks as the network is evaluated with; None in pretraining, where they are all 1."""
    if phase.learns_masks:
        return hard_masks(config.learn, graph, fcmask, to_target=finished, table=done.table)
    if phase.hard:
        counts = counts_of(graph, fcmask)
        return HardMasks(counts, tuple(done.released), 0.0, network_macs(graph, counts, done.released))
    return None


def load_restored_data(restored: Restored, data_path: str | None = None) -> Dataset:
    """The data set of a checkpoint's run; `data_path` in place of the run's own `data.path`.

    Raises:
      UserError: the data are not there or are others.
    """
    data, graph = restored.config.data, restored.graph
    path = data_path if data_path is not None else data.path
    dataset = open_dataset(
        data.name,
        path,
        data.image_size,
        data.grayscale,
        stream=data.loading == "stream",
        crop_share=data.eval_crop,
        background=data.background,
    ).in_order_of(graph.class_names)
    check_data(graph, dataset)
    return dataset


def check_data(graph: MaskedGraph, dataset: Dataset) -> None:
    """Raises `UserError` unless a network is for such images and for these classes.

    One whose classes have no names takes any data with as many classes, in the order that the data have them.
    """
    for what, own, theirs in (
        ("images of", "x".join(map(str, graph.input_shape)), "x".join(map(str, dataset.image_shape))),
        ("classes:", str(graph.num_classes), str(dataset.num_classes)),
    ):
        if own != theirs:
            raise UserError(f"the network is for {what} {own}; the data are {what} {theirs}")
    if graph.class_names and graph.class_names != dataset.class_names:
        pairs = zip(graph.class_names, dataset.class_names, strict=True)
        number, (own, theirs) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"the network's classes have other names than the data's: class {number} is {own!r}, and {theirs!r} there"
        )


def evaluate_restored(restored: Restored, split: str = "test", data_path: str | None = None) -> dict[str, Any]:
    """Accuracy and MACs of a checkpoint's network as it stands.

    Args:
      restored: the checkpoint.
      split: "test" or "validation" (the share that its run held out).
      data_path: in place of the run's own `data.path`.

    Raises:
      UserError: the data are not there or are others, or there is no validation share.
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
        "step": restored.phase.start + restored.phase_step,
        "phase": restored.phase.name,
        "dense_top1": restored.done.dense_top1 if split == "test" else None,
    }
