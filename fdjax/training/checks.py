"""Checks whether a run can begin or resume: its config against the checkpoint it starts from. Nothing is written."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from fdjax.config import MASK_PHASES, Config, LearnConfig, ModelConfig
from fdjax.config.settings import as_flags
from fdjax.errors import UserError
from fdjax.frozen.engines import check_engines
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.onnx.kept_file import holds_network_of
from fdjax.pruning import mac_ratio
from fdjax.training.build import check_maskable
from fdjax.training.mask_warnings import CHANCE
from fdjax.training.own_network import Network, OwnNetwork
from fdjax.training.phases import Phase, has_teacher
from fdjax.training.restore import Restored
from fdjax.training.state import variable_shapes
from fdjax.training.time_table import check_timed

# The settings that decide which masks there are, and their sizes.
_MASK_SETTINGS = ("sides", "tied", "include", "exclude", "block", "block_by_map", "block_by_layer")


def check_target_macs(learn: LearnConfig, graph: MaskedGraph, phases: Sequence[Phase]) -> None:
    """Raises `UserError` if no layer can have masks, or the target is missed even with every masked channel removed."""
    if not any(phase.learns_masks for phase in phases):
        return
    check_maskable(graph)
    if learn.target_time is not None:
        check_timed(learn, graph)
    if learn.target_macs is None or learn.target_time is not None:
        return
    nothing = {path: np.zeros_like(count) for path, count in graph.full_counts().items()}
    floor = mac_ratio(network_macs(graph, nothing), learn.target_convention)
    if learn.target_macs <= floor:
        raise UserError(
            f"learn.target_macs is {learn.target_macs:g}, but with every masked channel removed {floor:.3f}x of "
            "the MACs remain; give a higher target, or mask more (learn.sides both)"
        )


def check_gate(learn: LearnConfig) -> None:
    """Raises `UserError` if the engine is not installed, or if several processes would measure times."""
    check_engines([learn.engine])
    by_time = learn.gate == "time" or learn.target_time is not None
    if by_time and jax.process_count() > 1:
        what = "learn.gate is 'time'" if learn.target_time is None else "learn.target_time is given"
        raise UserError(
            f"{what}, and several processes would measure different times; give --learn.gate macs and a target of "
            "MACs, or learn in one process"
        )


def check_same_data(workdir: Path, graph: MaskedGraph, num_train: int, resumed: Restored) -> None:
    """Raises `UserError` if the run in `workdir` was begun on data that differ from today's (`graph`, `num_train`)."""
    before, trained_on = resumed.graph, resumed.done.num_train
    if (graph.input_shape, graph.class_names, num_train) != (before.input_shape, before.class_names, trained_on):
        raise UserError(
            f"the run in {workdir} was begun on {trained_on:,} training images of {before.input_shape} and "
            f"{before.num_classes} classes; the data set now has {num_train:,} of {graph.input_shape} and "
            f"{graph.num_classes} classes, or classes with other names; bring back the data, or give another --workdir"
        )


def check_same_masks(workdir: Path, learn: LearnConfig, graph: MaskedGraph, resumed: Restored) -> None:
    """Raises `UserError` if the run in `workdir` has masks, and today's settings (`learn`, `graph`) make others."""
    has_masks = resumed.done.masks_learned or resumed.phase.learns_masks
    if has_masks and graph.mask_sizes != resumed.graph.mask_sizes:
        flags = _differing_mask_flags(resumed.config.learn, learn)
        raise UserError(f"the run in {workdir} has masks of other settings; give {flags}, or another --workdir")


def _differing_mask_flags(before: LearnConfig, after: LearnConfig) -> str:
    """Returns the flags of train.py that set what makes masks as it was `before`, where it is another one now."""
    differing = [name for name in _MASK_SETTINGS if getattr(before, name) != getattr(after, name)]
    flags = as_flags({f"learn.{name}": getattr(before, name) for name in differing})
    return shlex.join(flags) if flags else "pictures of the same size"


def check_labels(config: Config, phases: Sequence[Phase]) -> None:
    """Raises `UserError` if labels are needed and the training images have none."""
    if config.data.unlabelled is not None and phases[0].name == "pretrain":
        raise UserError(
            "data.unlabelled has no labels to pretrain with: leave pretrain out of the phases "
            f"(--phases {' '.join(phase.name for phase in phases[1:]) or 'learn refine'}), with --init DIR, a trained "
            "network"
        )


def check_steps_done(workdir: Path, phases: Sequence[Phase], resumed: Restored) -> None:
    """Raises `UserError` if the run in `workdir` has done more steps of its phase than `phases` ask for."""
    asked = next(phase for phase in phases if phase.name == resumed.phase.name)
    if asked.steps < resumed.phase_step:
        raise UserError(
            f"the run in {workdir} has done {resumed.phase_step:,} steps of {asked.name}, more than the "
            f"{asked.steps:,} that the config asks for; give the phase at least as many"
        )


def check_beginning(config: Config) -> None:
    """Raises `UserError` if a run without --init begins with something that needs trained weights."""
    if config.phases[0] != "pretrain":
        raise UserError(
            f"phases begin with {config.phases[0]!r}, which needs trained weights: begin with 'pretrain', "
            "or give --init DIR, a run or imported checkpoint to start from"
        )


def check_init(config: Config, network: Network, graph: MaskedGraph, init: Restored) -> None:
    """Raises `UserError` if the network or the masks of --init do not fit `network`, which the config describes."""
    model, learn = config.model, config.learn
    shapes = [[(layer.name, layer.kind, layer.in_channels, layer.out_channels, layer.window, layer.stride)
               for layer in of.layers.values()] for of in (graph, init.graph)]  # fmt: skip
    if shapes[0] != shapes[1]:
        other = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), None)
        detail = f": layer {other[1][0]} there, {other[0][0]} here differ" if other else ""
        theirs = init.config.model
        hint = ""
        if theirs.onnx_file is not None and not theirs.onnx_file.exists() and init.onnx_file is not None:
            theirs = theirs.with_onnx_file(init.onnx_file)
        if theirs.factory not in (None, model.factory):
            arguments = [str(word) for pair in theirs.arguments for word in pair]
            flags = ["--model.factory", str(theirs.factory), *(["--model.arguments"] if arguments else []), *arguments]
            hint = f"; for its network give {shlex.join(flags)}"
        raise UserError(
            f"--init holds {init.graph.name} for {init.graph.num_classes} classes, which does not fit "
            f"{graph.name} for {graph.num_classes} classes{detail}{hint}"
        )
    if isinstance(network, OwnNetwork) or isinstance(init.network, OwnNetwork):
        _check_same_weights(network, graph, init)
    own, theirs = ((of.padding, of.batch_norm_epsilon) for of in (model, init.config.model))
    if own != theirs:
        raise UserError(
            f"--init was trained with padding {theirs[0]!r} and batch norm epsilon {theirs[1]}, and the config has "
            f"{own[0]!r} and {own[1]}: add --model.padding {theirs[0]} --model.batch-norm-epsilon {theirs[1]}"
        )
    masked = any(name in MASK_PHASES for name in [*init.finished_phases(), init.phase.name])
    if (masked or init.done.masks_learned) and graph.mask_sizes != init.graph.mask_sizes:
        flags = _differing_mask_flags(init.config.learn, learn)
        raise UserError(
            f"--init has masks of other settings; give {flags}, or start from a run that has only pretrained"
        )


def check_onnx_file(model: ModelConfig, begun: Restored | None) -> None:
    """Raises `UserError` if the config's network is in another ONNX file than that of the checkpoint `begun`."""
    file = model.onnx_file
    if file is None or begun is None or begun.config.model.onnx_file is None:
        return
    if not holds_network_of(file, begun.onnx_file, begun.done.imported.get("sha256")):
        other = f" (its copy is {begun.onnx_file})" if begun.onnx_file is not None else ""
        raise UserError(
            f"{file} is another file than the network of the checkpoint was read from, or has changed since: give that "
            f"one{other}, or import the new one"
        )


def check_classes(then: Sequence[str], now: Sequence[str], *, pretrains: bool) -> None:
    """Raises `UserError` if a class of --init has another output in the data set, unless the run pretrains.

    Args:
      then: names of the classes of --init, in order; empty if they have none.
      now: names of the data set's classes, in order.
      pretrains: whether the run begins with pretrain, which makes a network for the data set.
    """
    moved = [name for at, name in enumerate(then) if name in now and now[at] != name]
    if moved and not pretrains:
        name = moved[0]
        raise UserError(
            f"the class {name!r} is output {list(then).index(name)} in the network of --init and "
            f"{list(now).index(name)} in the data set, and other classes differ, so labels would be wrong: give the "
            "data set that the network was trained on, a classes.txt in its order, or --phases that begin with pretrain"
        )


def _check_same_weights(network: Network, graph: MaskedGraph, init: Restored) -> None:
    """Raises `UserError` if the weights of --init have other paths or shapes than the network's."""
    wanted = variable_shapes(network, graph.input_shape)
    for collection in ("params", "batch_stats"):
        own, theirs = (
            {path: np.shape(leaf) for path, leaf in flatten_dict(dict(of), sep="/").items()}  # type: ignore[arg-type]
            for of in (wanted[collection], getattr(init.state, collection))
        )
        if own != theirs:
            path = min(path for path in {*own, *theirs} if own.get(path) != theirs.get(path))
            raise UserError(
                f"--init holds {init.graph.name}, whose weights do not fit {graph.name}: {collection}/{path} has shape "
                f"{theirs.get(path, 'none')} there and {own.get(path, 'none')} here"
            )


def inherited_phases(config: Config, init: Restored) -> list[str]:
    """Returns the phases that --init has done; imported weights count as pretrained, unless the run pretrains them.

    Raises:
      UserError: if --init has a new classifier, which is untrained, and the run does not begin with pretrain.
    """
    if init.as_imported and config.phases[0] == "pretrain":
        return []
    if init.as_imported and init.done.imported.get("new_classifier"):
        raise UserError(
            "--init holds imported weights with a new classifier, which nothing has trained: begin with pretrain "
            f"(--phases pretrain {' '.join(config.phases)})"
        )
    return init.finished_phases()


def phases_done(config: Config, finished: Sequence[str]) -> int:
    """Returns how many of the config's first phases --init has already done.

    Raises:
      UserError: if it has done all of them.
    """
    same = [mine == theirs for mine, theirs in zip(config.phases, finished, strict=False)]
    done = same.index(False) if False in same else len(same)
    if done == len(config.phases):
        raise UserError(
            f"--init has already done {', '.join(config.phases)}; ask for a further phase, or name only the "
            "phases to do again (--phases learn refine)"
        )
    return done


def check_teacher(config: Config, first: Phase, init: Restored) -> None:
    """Raises `UserError` if the run, whose first phase is `first`, needs a teacher that --init does not have."""
    if not has_teacher(config, first) or init.state.teacher:
        return
    if init.done.filters_removed:
        raise UserError(
            f"distill.weight is {config.distill.weight:g}, but filters have been removed from the network of --init, "
            "and it holds no unpruned network to learn from; give --distill.weight 0"
        )
    if init.weights_adapted:
        raise UserError(
            f"distill.weight is {config.distill.weight:g}, but --init, a run that ends in {init.phase.name}, has its "
            "weights trained under masks, or its batch norm corrected for them, and holds no unpruned network to learn "
            "from; start from a run that has done no more than pretrain and learn, from one that was itself run with "
            "distill.weight above 0, or from fdjax prune --no-recalibrate, or give --distill.weight 0"
        )


def warn_of_chance(dense_top1: float | None, num_classes: int) -> None:
    """Prints a warning if masks are about to be learned on a network that is hardly better than guessing."""
    if dense_top1 is not None and dense_top1 < CHANCE / num_classes:
        print(
            f"warning: the network whose masks are to be learned has a test accuracy of {100 * dense_top1:.2f}%, and "
            f"guessing would give {100 / num_classes:.2f}%: its masks will mean little. Train it first (more epochs of "
            "pretrain, another learning rate), or check that its weights belong to these classes",
            flush=True,
        )
