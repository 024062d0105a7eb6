"""`fdjax profile`: measures the accuracy of a network that is pruned by profiled energies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fdjax.commands.arguments import parse_arguments
from fdjax.commands.mask_arguments import MaskArguments, mask_defaults, restored_checkpoint
from fdjax.commands.output_files import check_file_target, check_json_target, write_report
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class ProfileArguments(MaskArguments):
    """Measures the accuracy of a trained network that is pruned by profiled energies, before any refinement."""

    methods: tuple[str, ...] = ()
    """Methods: channel, coefficient, channel_coefficient, band, random_channel (default: all, or none with --contiguity
    or --sensitivity)."""
    ratios: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    """MAC ratios to prune to, above 0 to 1."""
    convention: Literal["bare", "paper"] = "bare"
    """Convention of --ratios. bare: transforms are not counted. paper: each kept coefficient of either side counts N
    MACs for its transform, and layers that are no cheaper pruned than dense are released."""
    contiguity: bool = False
    """Count the channel masks that are low-frequency prefixes when 30% of channel-coefficient pairs are pruned."""
    sensitivity: bool = False
    """Measure accuracy against kept count, one layer at a time."""
    runs: tuple[str, ...] = ()
    """Workdirs of other finished runs to draw as points: learned masks, other widths or resolutions."""
    resolutions: tuple[int, ...] = ()
    """Sides, in pixels, to which test images are resized for a curve of the unpruned network at smaller inputs."""
    plot: str | None = None
    """PNG file to draw the curves into."""
    sensitivity_plot: str | None = None
    """PNG file to draw the sensitivity into."""


def profile_command(arguments: Sequence[str]) -> int:
    """Runs `fdjax profile` and returns its exit status."""
    restored = restored_checkpoint(arguments)
    parsed = parse_arguments(ProfileArguments, "fdjax profile", arguments, ProfileArguments(**mask_defaults(restored)))
    assert restored is not None  # parsing fails without --checkpoint
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
        f"{found['share']:.0%} of channel-coefficient pairs are pruned (the paper, for {found['papers_network']}: "
        f"{found['paper']:.1%}). Of the {found['partial']:,} masks that keep a part, {found['partial_contiguous']:.1%} "
        f"are prefixes; by chance it would be {found['partial_by_chance']:.1%}. If the order within a diagonal of the "
        f"zigzag does not count, the shares are {found['contiguous_by_diagonal']:.1%} of all masks and "
        f"{found['partial_by_diagonal']:.1%} of those that keep a part"
    )
