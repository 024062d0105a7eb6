"""The lines that a run prints before it starts: what it will do, and what it goes on from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fdjax.config import Config
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.reports.results import epochs_words
from fdjax.training.phases import Phase
from fdjax.training.restore import Restored


def announcement(
    config: Config, graph: MaskedGraph, phases: Sequence[Phase], sizes: tuple[int, int, int], skipped: str = ""
) -> str:
    """Describes the network, its MACs and the phases in a few lines.

    Args:
      config: the run's config.
      graph: channel graph of the network.
      phases: the phases that will be run.
      sizes: numbers of training, validation and test images.
      skipped: which files of the data set were skipped, in words; empty if none were.

    Returns:
      The lines, as one text.
    """
    dense = network_macs(graph, graph.full_counts()).to_dict()
    training, validation, test = sizes
    lines = [
        f"{graph.name} on {config.data.name}: {training:,} training, {validation:,} validation, {test:,} test images "
        f"of {'x'.join(map(str, graph.input_shape))}, {graph.num_classes} classes"
    ]
    if skipped:
        lines.append(f"skipped in the folder: {skipped}")
    transforms = (dense["full_transforms"] - dense["dense"]) / dense["dense"]
    # With whole channels there are no transforms.
    costs = "" if config.learn.counts_below_whole == (0,) else f"; full transforms would add {transforms:.0%}"
    lines.append(f"{dense['dense'] / 1e6:,.2f} M MACs dense{costs}")
    for phase in phases:
        share, learn = phase.steps / phase.steps_per_epoch, config.learn
        goal = f", masks to {learn.target_macs}x MACs" if learn.target_macs else f", lambda {learn.lambda_ or 0:g}"
        if learn.target_time is not None:
            goal = f", masks to {learn.target_time}x of the time on {learn.engine}, batch {learn.engine_batch}"
        what = f"  {phase.name}: {phase.steps:,} steps of {config.data.batch_size} ({epochs_words(share)})"
        lines.append(what + (goal if phase.learns_masks else ""))
    return "\n".join(lines)


def beginning(
    config: Config, init: Restored | None, resumed: Restored | None, skipped: int, inherited: list[str]
) -> str:
    """Says in a line what a run starts from.

    Args:
      config: the run's config.
      init: the checkpoint that --init names.
      resumed: the run's own checkpoint.
      skipped: number of the run's first phases that are skipped.
      inherited: phases that the run of --init has done.

    Returns:
      The line; empty if the run starts from initial weights.
    """
    if resumed is not None:
        done, steps = resumed.phase_step, resumed.phase.steps
        return f"resuming where it stopped: {resumed.phase.name}, step {done:,} of {steps:,}"
    if init is None:
        return ""
    if init.as_imported:
        return f"starting from weights imported from {init.done.imported['weights']}"
    skipping = f"; skipping {', '.join(config.phases[:skipped])}" if skipped else ""
    return f"starting from a run that has done {', '.join(inherited) or 'no phase'}{skipping}"


def renamed_classes(then: Sequence[str], now: Sequence[str]) -> str:
    """Says in a line which outputs of --init's network stand for classes of other names than the data set's.

    Args:
      then: names of the network's classes in --init, in order; empty if they have none.
      now: names of the data set's classes, in order, as many.

    Returns:
      The line; empty if the names are the same, or there are none.
    """
    differ = [number for number, names in enumerate(zip(then, now, strict=False)) if names[0] != names[1]]
    if not differ:
        return ""
    first = differ[0]
    return (
        f"note: {len(differ)} of {len(now)} classes have other names than in --init: output {first} was "
        f"{then[first]!r} and is {now[first]!r} now. Each output keeps its weights"
    )


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Says in a line which versions or devices have changed since a checkpoint was written.

    Args:
      then: `Run.made_on` of the checkpoint; names that it lacks are ignored.
      now: `Run.made_on` of the run.

    Returns:
      The line; empty if nothing has changed.
    """
    parts = [f"{name}: {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if not parts:
        return ""
    return f"note: {'; '.join(parts)}. Results may differ from those of an uninterrupted run, at first in the last bits"
