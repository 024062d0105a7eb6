"""What a run says that it will do, before it does it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fdjax.config import Config
from fdjax.graph.counting import network_macs
from fdjax.graph.masks import MaskedGraph
from fdjax.training.phases import Phase
from fdjax.training.restore import Restored


def announcement(
    config: Config, graph: MaskedGraph, phases: Sequence[Phase], sizes: tuple[int, int, int], skipped: str = ""
) -> str:
    """The network, its MACs and the phases, in a few lines.

    Args:
      config: of the run.
      graph: channel graph of the network.
      phases: that are to be run.
      sizes: numbers of training, validation and test images.
      skipped: what of the data was passed over, in words.
    """
    dense = network_macs(graph, graph.full_counts()).to_dict()
    training, validation, test = sizes
    lines = [
        f"{graph.name} on {config.data.name}: {training:,} training, {validation:,} validation, {test:,} test images "
        f"of {'x'.join(map(str, graph.input_shape))}, {graph.num_classes} classes"
    ]
    if skipped:
        lines.append(f"passed over in the folder: {skipped}")
    transforms = (dense["full_transforms"] - dense["dense"]) / dense["dense"]
    # Whole channels are never transformed.
    costs = "" if config.learn.counts_below_whole == (0,) else f"; full transforms would add {transforms:.0%}"
    lines.append(f"{dense['dense'] / 1e6:,.2f} M MACs dense{costs}")
    for phase in phases:
        share, learn = phase.steps / phase.steps_per_epoch, config.learn
        goal = f", masks to {learn.target_macs}x MACs" if learn.target_macs else f", lambda {learn.lambda_ or 0:g}"
        if learn.target_time is not None:
            goal = f", masks to {learn.target_time}x of the time on {learn.engine}, batch {learn.engine_batch}"
        what = f"  {phase.name}: {phase.steps:,} steps of {config.data.batch_size} ({share:.3g} epochs)"
        lines.append(what + (goal if phase.learns_masks else ""))
    return "\n".join(lines)


def beginning(
    config: Config, init: Restored | None, resumed: Restored | None, skipped: int, inherited: list[str]
) -> str:
    """What a run goes on from, in a line; empty where it begins with nothing.

    Args:
      config: of the run.
      init: what --init means.
      resumed: the run's own checkpoint.
      skipped: how many of its first phases are left out.
      inherited: the phases that the run given by --init has done.
    """
    if resumed is not None:
        done, steps = resumed.phase_step, resumed.phase.steps
        return f"going on where it stopped: {resumed.phase.name}, step {done:,} of {steps:,}"
    if init is None:
        return ""
    if init.as_imported:
        return f"starting from weights imported from {init.done.imported['weights']}"
    left_out = ", ".join(config.phases[:skipped]) or "no phase"
    return f"starting from a run that has done {', '.join(inherited)}; skipping {left_out}"


def changes(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What has changed since a checkpoint was written, of what the last bits depend on, in a line; empty: nothing.

    Args:
      then: of the checkpoint, as `Run.made_on` has it; names that it lacks are passed over.
      now: of the run.
    """
    parts = [f"{name}: {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if not parts:
        return ""
    return f"note: {'; '.join(parts)}. Figures may differ from an uninterrupted run's, in their last bits at first"
