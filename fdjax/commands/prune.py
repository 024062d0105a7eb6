"""`fdjax prune`: prunes a trained network, ready for refinement."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.mask_arguments import MaskArguments, mask_defaults, restored_checkpoint
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.errors import UserError, suggestion

if TYPE_CHECKING:
    from fdjax.training.restore import Restored

# The relative distance from the target beyond which a warning is printed.
_TOLERANCE = 0.02


@dataclasses.dataclass(kw_only=True)
class PruneArguments(MaskArguments):
    """Prunes a trained network by its measured energies; train.py --init OUT --phases refine then refines it."""

    method: str
    """Method. For masks: channel, band, random_channel, or coefficient (if its masks are low-frequency prefixes). For
    filters inside residual blocks: l1, dct, fpwt, thinet or random."""
    out: str
    """Directory to write the checkpoint into: new or empty."""
    target_macs: float | None = None
    """MAC ratio to reach after the gate, with transforms, above 0 to 1."""
    convention: Literal["total", "paper"] = "total"
    """Convention of the target and the gate, as in learn.target_convention: macs.ratio or macs.paper_ratio."""
    percentile: float | None = None
    """Share of every side's pieces to prune, 0 to 100 percent, in place of --target-macs (for masks only)."""
    rates: Literal["one", "search"] = "one"
    """Shares of filters. one: every block loses the same share. search: found from each block's loss when it is pruned
    alone."""


def _say_of_batch_norm(report: dict[str, Any]) -> None:
    if report["recalibrated"]:
        print(f"batch norm: averages corrected by {report['num_images']:,} images (not with --no-recalibrate)")


def _prune_filters(restored: Restored, parsed: PruneArguments) -> int:
    if parsed.calibration or parsed.agreement:
        raise UserError(
            "--calibration and --agreement are for masks; filters are scored on the run's own data set: leave them out"
        )
    given = mask_defaults(restored)
    for_masks = {
        "convention": "total",
        "scope": MaskArguments.scope,
        "block": None,
        "tied": given["tied"],
        "sides": given["sides"],
    }
    wrong = [name for name, default in for_masks.items() if getattr(parsed, name) != default]
    if wrong:
        raise UserError(f"--{wrong[0]} is for masks, and --method {parsed.method} removes filters: leave it out")
    if parsed.target_macs is None:
        raise UserError("filters are pruned to a target: give --target-macs RATIO, such as 0.5")
    from fdjax.checkpoints.filter_pruning import prune_filters
    from fdjax.checkpoints.imported import save_trained
    from fdjax.training.restore import Past
    from fdjax.training.workdir import check_new_folder

    out = Path(parsed.out).expanduser().resolve()
    check_new_folder(out)
    pruned = prune_filters(
        restored,
        parsed.method,
        parsed.target_macs,
        per_block=parsed.rates,
        num_images=parsed.images,
        eval_limit=parsed.eval_limit,
        data_path=parsed.data_path,
        recalibrate=parsed.recalibrate,
    )
    report = pruned.report
    past = Past(
        dense_top1=restored.done.dense_top1,
        filters_removed=True,
        pruned_by=parsed.method,
        unpruned_macs=restored.done.unpruned_macs or report["macs"]["before"],
    )
    save_trained(out, pruned.config, pruned.graph, pruned.variables, past)
    dense = "" if report["dense_top1"] is None else f" (dense {100 * report['dense_top1']:.2f}%)"
    print(
        f"{report['method']}: {100 * report['top1']:.2f}% top-1{dense} of {report['num_examples']:,} images at "
        f"{report['macs']['after'] / 1e6:,.2f} M MACs, {report['ratio']:.3f}x"
    )
    _say_of_batch_norm(report)
    if abs(report["ratio"] / parsed.target_macs - 1) > _TOLERANCE:
        print(
            f"warning: only whole filters can be removed; {report['ratio']:.3f}x MACs is the nearest to "
            f"{parsed.target_macs:g}x"
        )
    print(f"{parsed.out}: to refine it, run train.py --config CONFIG --init {parsed.out} --phases refine with")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0


def prune_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax prune` and returns its exit status."""
    restored = restored_checkpoint(arguments)
    required: Any = tyro.MISSING
    defaults = PruneArguments(**mask_defaults(restored), method=required, out=required)
    parsed = parse_arguments(PruneArguments, "fdjax prune", arguments, defaults)
    assert restored is not None  # parsing fails without --checkpoint
    check_json_target(parsed.json)
    settings = dataclasses.replace(parsed.mask_settings(restored), target_time=None)
    learn = dataclasses.replace(settings, target_convention=parsed.convention)
    if (parsed.target_macs is None) == (parsed.percentile is None):
        raise UserError("give either --target-macs RATIO, such as 0.5, or --percentile P, such as 30")
    if parsed.target_macs is not None:
        if not 0 < parsed.target_macs <= 1:
            raise UserError(f"--target-macs must be above 0 and at most 1, got {parsed.target_macs:g}")
        learn = dataclasses.replace(learn, target_macs=parsed.target_macs, lambda_=None)
    if parsed.percentile is not None and not 0 <= parsed.percentile <= 100:
        raise UserError(f"--percentile must be from 0 to 100, got {parsed.percentile:g}")
    from fdjax.checkpoints.prune import prune_checkpoint
    from fdjax.pruning import filters, profiled
    from fdjax.training.summary import describe

    known = (*profiled.METHODS, *filters.METHODS)
    if parsed.method not in known:
        raise UserError(
            f"no pruning method {parsed.method!r}{suggestion(parsed.method, known)}; accepted are {', '.join(known)}"
        )
    if parsed.method in filters.METHODS:
        return _prune_filters(restored, parsed)
    report = prune_checkpoint(
        restored,
        learn,
        parsed.method,
        Path(parsed.out),
        share=None if parsed.percentile is None else parsed.percentile / 100,
        scope=parsed.scope,
        on=parsed.measured_on(),
    )
    print(describe({**report, "split": "test"}))
    _say_of_batch_norm(report)
    reached = report["macs"]["paper_ratio" if parsed.convention == "paper" else "ratio"]
    if parsed.target_macs is not None and abs(reached / parsed.target_macs - 1) > _TOLERANCE:
        print(
            f"warning: only whole pieces can be pruned; {reached:.3f}x MACs is the nearest to {parsed.target_macs:g}x"
        )
    print(f"{parsed.out}: to refine it, run train.py --config CONFIG --init {parsed.out} --phases refine with")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0
