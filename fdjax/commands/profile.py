"""`fdjax profile` and `fdjax prune`: pruning a trained network by what was measured of it."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fdjax.commands.output_files import check_file_target, check_json_target, write_report
from fdjax.errors import UserError, suggestion

if TYPE_CHECKING:
    from fdjax.checkpoints.given_masks import MeasuredOn
    from fdjax.config import LearnConfig
    from fdjax.training.restore import Restored

# How far from the target, relatively, a network may land without a warning.
_TOLERANCE = 0.02


@dataclasses.dataclass(kw_only=True)
class _Masks:
    checkpoint: str
    """A workdir, its checkpoints folder, or one step's folder, of a run that has not trained weights under masks."""
    which: str = "latest"
    """latest, best (on the validation share) or a step number."""
    scope: Literal["layer", "global"] = "layer"
    """layer: the same share of every masked side goes. global: one threshold for all of them."""
    block: int | None = None
    """Side of the block in all layers, 1 to 16 (None: as in the run's config)."""
    tied: bool = False
    """As learn.tied, and by default as in the run's config: one mask for a wide channel of a residual block."""
    sides: Literal["both", "input", "output"] = "both"
    """As learn.sides, likewise."""
    images: int = 512
    """How many training images to measure coefficients on (seeded)."""
    eval_limit: int | None = None
    """How many test images to take the accuracy on (seeded; None: all)."""
    data_path: str | None = None
    """Where the run's data set lies now, if it has moved."""
    calibration: str | None = None
    """A folder of pictures (no labels needed) to measure coefficients on, in place of the run's training images."""
    agreement: str | None = None
    """A folder of pictures on which the pruned network is compared with the unpruned one, in place of the accuracy on
    the test set: the share of them that it gives the same class."""
    json: str | None = None
    """Write the report to this file too."""

    def measured_on(self) -> MeasuredOn:
        """The images that the flags ask for."""
        from fdjax.checkpoints.given_masks import MeasuredOn

        return MeasuredOn(
            num_images=self.images,
            eval_limit=self.eval_limit,
            data_path=self.data_path,
            calibration=self.calibration,
            agreement=self.agreement,
        )

    def mask_settings(self, restored: Restored) -> LearnConfig:
        """The run's, with these in their place."""
        learn = dataclasses.replace(restored.config.learn, tied=self.tied, sides=self.sides)
        if not self.tied:
            learn = dataclasses.replace(learn, group_multiple=1)
        if self.block is not None:
            learn = dataclasses.replace(learn, block=self.block, block_by_map=(), block_by_layer=())
        return learn


@dataclasses.dataclass(kw_only=True)
class ProfileArguments(_Masks):
    """Measures what profiled pruning leaves of a trained network's accuracy, before any refinement."""

    methods: tuple[str, ...] = ()
    """Of channel, coefficient, channel_coefficient, band (default: all; none beside --contiguity or --sensitivity)."""
    ratios: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    """MAC ratios to prune to, above 0 to 1."""
    convention: Literal["bare", "paper"] = "bare"
    """What --ratios count. bare: no transforms. paper: N for each kept coefficient of either side, too, and layers that
    are no cheaper pruned than whole are released."""
    contiguity: bool = False
    """Count the channel masks that are low-frequency prefixes already when 30% of channel-coefficient pairs go."""
    sensitivity: bool = False
    """Measure accuracy against kept count, one layer at a time."""
    runs: tuple[str, ...] = ()
    """Workdirs of other finished runs to draw as points: learned masks, other widths or resolutions."""
    resolutions: tuple[int, ...] = ()
    """Smaller input as another curve: sides in pixels to which test images are resized, the network unpruned."""
    plot: str | None = None
    """Draw the curves into this PNG file."""
    sensitivity_plot: str | None = None
    """Draw the sensitivity into this PNG file."""


@dataclasses.dataclass(kw_only=True)
class PruneArguments(_Masks):
    """Prunes a trained network by what was measured of it; train.py --init OUT --phases refine goes on from there."""

    method: str
    """Masks: channel or band; coefficient where they turn out to be prefixes. Filters of a ResNet: l1, dct, fpwt or
    thinet."""
    out: str
    """Directory to write the checkpoint into: new or empty."""
    target_macs: float | None = None
    """The MAC ratio to reach after the gate, transforms in it, above 0 to 1."""
    convention: Literal["total", "paper"] = "total"
    """As learn.target_convention: what the target and the gate speak of, macs.ratio or macs.paper_ratio."""
    percentile: float | None = None
    """Prune this share of every side's pieces, 0 to 100, in place of meeting a target (masks)."""
    rates: Literal["one", "search"] = "one"
    """Filters: the same share in every block, or a search by what blocks lose when pruned alone."""


def _restored(arguments: Sequence[str]) -> Restored | None:
    """The checkpoint that --checkpoint and --which name, found before the flags whose defaults it gives."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--checkpoint")
    parser.add_argument("--which", default="latest")
    found = parser.parse_known_args(list(arguments))[0]
    if found.checkpoint is None:
        return None
    from fdjax.checkpoint import find_checkpoint
    from fdjax.training.restore import restore

    return restore(*find_checkpoint(found.checkpoint, found.which))


def _defaults(restored: Restored | None) -> dict[str, Any]:
    if restored is None:
        return {"checkpoint": tyro.MISSING}
    learn = restored.config.learn
    return {"checkpoint": tyro.MISSING, "tied": learn.tied, "sides": learn.sides}


def profile_command(arguments: Sequence[str]) -> int:
    """`fdjax profile`."""
    restored = _restored(arguments)
    parsed = tyro.cli(
        ProfileArguments, prog="fdjax profile", args=arguments, default=ProfileArguments(**_defaults(restored))
    )
    assert restored is not None  # without --checkpoint parsing has failed
    check_json_target(parsed.json)
    check_file_target("--plot", parsed.plot, (".png",))
    check_file_target("--sensitivity-plot", parsed.sensitivity_plot, (".png",))
    if parsed.sensitivity_plot is not None and not parsed.sensitivity:
        raise UserError("--sensitivity-plot draws what --sensitivity measures: give both")
    from fdjax.checkpoints.profiling import profile
    from fdjax.pruning.profiled import METHODS
    from fdjax.reports import plot_profile, plot_sensitivity, profile_table

    methods = parsed.methods or (() if parsed.contiguity or parsed.sensitivity else tuple(METHODS))
    if parsed.plot is not None and not methods:
        raise UserError("--plot draws curves: name the --methods beside --contiguity or --sensitivity")
    report = profile(
        restored,
        parsed.mask_settings(restored),
        methods,
        parsed.ratios,
        scope=parsed.scope,
        convention=parsed.convention,
        on=parsed.measured_on(),
        runs=parsed.runs,
        resolutions=parsed.resolutions,
        contiguity=parsed.contiguity,
        sensitivity=parsed.sensitivity,
    )
    write_report(parsed.json, report)
    if methods:
        print(profile_table(report))
    if report["contiguity"] is not None:
        print(_contiguity_words(report["contiguity"]))
    if parsed.plot is not None:
        plot_profile(report, parsed.plot)
    if parsed.sensitivity_plot is not None:
        plot_sensitivity(report["sensitivity"], report["words"], parsed.sensitivity_plot)
    return 0


def _contiguity_words(found: Mapping[str, Any]) -> str:
    return (
        f"contiguity: of {found['channels']:,} channel masks {found['contiguous']:.1%} are low-frequency prefixes when "
        f"{found['share']:.0%} of channel-coefficient pairs go (the paper, for ResNeXt-29: {found['paper']:.1%}); of "
        f"the {found['partial']:,} that keep a part {found['partial_contiguous']:.1%}, by chance it would be "
        f"{found['partial_by_chance']:.1%}; in any order within a diagonal of the zigzag "
        f"{found['contiguous_by_diagonal']:.1%} and {found['partial_by_diagonal']:.1%}"
    )


def _prune_filters(restored: Restored, parsed: PruneArguments) -> int:
    if parsed.calibration or parsed.agreement:
        raise UserError("--calibration and --agreement are for masks; filters are pruned by the run's own data set")
    if parsed.target_macs is None:
        raise UserError("filters are pruned to a target: give --target-macs RATIO, such as 0.5")
    from fdjax.checkpoints.filter_pruning import prune_filters
    from fdjax.checkpoints.imported import check_import_target, save_trained
    from fdjax.training.restore import Past

    out = Path(parsed.out).expanduser().resolve()
    check_import_target(out)
    pruned = prune_filters(
        restored,
        parsed.method,
        parsed.target_macs,
        per_block=parsed.rates,
        num_images=parsed.images,
        eval_limit=parsed.eval_limit,
        data_path=parsed.data_path,
    )
    save_trained(out, pruned.config, pruned.spec, pruned.variables, Past(dense_top1=restored.done.dense_top1))
    report = pruned.report
    dense = "" if report["dense_top1"] is None else f" (dense {100 * report['dense_top1']:.2f}%)"
    print(
        f"{report['method']}: {100 * report['top1']:.2f}% top-1{dense} of {report['num_examples']:,} images at "
        f"{report['macs']['after'] / 1e6:,.2f} M MACs, {report['ratio']:.3f}x"
    )
    if abs(report["ratio"] / parsed.target_macs - 1) > _TOLERANCE:
        print(f"warning: filters go whole, and {report['ratio']:.3f}x MACs is the nearest to {parsed.target_macs:g}x")
    print(f"{parsed.out}: to refine it, train.py --config CONFIG --init {parsed.out} --phases refine with the flags")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0


def prune_command(arguments: Sequence[str]) -> int:
    """`fdjax prune`."""
    restored = _restored(arguments)
    required: Any = tyro.MISSING
    defaults = PruneArguments(**_defaults(restored), method=required, out=required)
    parsed = tyro.cli(PruneArguments, prog="fdjax prune", args=arguments, default=defaults)
    assert restored is not None  # without --checkpoint parsing has failed
    check_json_target(parsed.json)
    learn = dataclasses.replace(parsed.mask_settings(restored), target_convention=parsed.convention)
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
    reached = report["macs"]["paper_ratio" if parsed.convention == "paper" else "ratio"]
    if parsed.target_macs is not None and abs(reached / parsed.target_macs - 1) > _TOLERANCE:
        print(f"warning: pieces go whole, and {reached:.3f}x MACs is the nearest to {parsed.target_macs:g}x")
    print(f"{parsed.out}: to refine it, train.py --config CONFIG --init {parsed.out} --phases refine with the flags")
    print(shlex.join(report["flags"]))
    write_report(parsed.json, report)
    return 0
