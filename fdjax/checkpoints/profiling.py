"""Profiled pruning of a trained network before refinement: curves, contiguity, sensitivity (the paper, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.checkpoints.given_masks import MeasuredOn, Subject, open_subject
from fdjax.config import Config, LearnConfig
from fdjax.errors import UserError
from fdjax.graph.masks import SIDES
from fdjax.ops.dct import zigzag_order
from fdjax.pruning.block_choice import block_units
from fdjax.pruning.profiled import (
    Convention,
    Pruned,
    Scope,
    UnreachableTarget,
    check_methods,
    contiguous_share,
    mask_macs,
    prune_share,
    prune_to_target,
    score,
    whole_masks,
)
from fdjax.reports import read_result
from fdjax.reports.references import PAPERS_CONTIGUITY, PAPERS_CONTIGUITY_NETWORK
from fdjax.training.restore import Restored
from fdjax.training.summary import versions
from fdjax.training.workdir import CONFIG_FILE, SUMMARY_FILE, read_json

# The share of pruned pairs at which the paper counts contiguous channel masks.
CONTIGUITY_SHARE = 0.3
# With up to this many coefficients sensitivity measures every kept count; with more, those that end a diagonal.
_EVERY_COUNT = 9


def _say(line: str) -> None:
    print(line, flush=True)


def profile(
    restored: Restored,
    learn: LearnConfig,
    methods: Sequence[str],
    ratios: Sequence[float],
    *,
    scope: Scope = "layer",
    convention: Convention = "bare",
    on: MeasuredOn,
    runs: Sequence[str] = (),
    resolutions: Sequence[int] = (),
    contiguity: bool = False,
    sensitivity: bool = False,
) -> dict[str, Any]:
    """Measures the accuracy of a trained network under profiled pruning.

    Args:
      restored: a checkpoint whose weights have not been trained under masks.
      learn: block, sides and tying of the masks.
      methods: some of `fdjax.pruning.profiled.METHODS`, or none.
      ratios: MAC ratios to prune to, above 0 to 1.
      scope: see `fdjax.pruning.profiled.prune_share`.
      convention: see `fdjax.pruning.profiled.prune_to_target`.
      on: the images that coefficients and accuracy are measured on.
      runs: workdirs of finished runs, see `read_runs`.
      resolutions: sides in pixels, below the images' own, to which test images are resized.
      contiguity: whether to measure contiguity.
      sensitivity: whether to measure sensitivity.

    Returns:
      The report of `fdjax profile`, JSON types.

    Raises:
      UserError: if something asked for does not exist or does not fit, or no method reaches a ratio. Nothing has been
        evaluated then.
    """
    check_request(methods, ratios)
    check_resolutions(resolutions, restored.graph.input_shape)
    subject = open_subject(restored, learn, on)
    graph = subject.graph
    planned, missed = plan_curves(subject, methods, ratios, scope, convention)
    for row in missed:
        _say(f"{row['method']} does not reach {row['ratio']:g}x MACs; its lowest is {row['lowest']:.3f}x")
    macs = mask_macs(graph, whole_masks(graph))
    points, left_out = read_runs(runs, macs.dense)
    for row in left_out:
        _say(f"--runs {row['run']} is left out: {row['reason']}")
    dense_top1 = subject.top1(whole_masks(graph))
    if subject.agreement:
        _say(f"agreement with the unpruned network, on {subject.num_examples:,} pictures")
    else:
        _say(f"dense: {100 * dense_top1:.2f}% on {subject.num_examples:,} test images")
    if on.recalibrate:
        _say(f"batch norm: averages corrected by {subject.num_images:,} images (not with --no-recalibrate)")
    blocks = dict(graph.blocks)
    form = f"{'tied masks' if learn.tied else 'untied masks'}, blocks of {_listed(sorted({*blocks.values()}))}"
    images = "pictures" if subject.agreement else "test images"
    return {
        "words": f"{graph.name} at width {restored.config.model.width:g}, {form}, {subject.num_examples:,} {images}",
        "measure": "agreement" if subject.agreement else "top1",
        "settings": {
            "scope": scope,
            "convention": convention,
            "blocks": blocks,
            "tied": learn.tied,
            "sides": learn.sides,
            "num_images": subject.num_images,
            "recalibrated": on.recalibrate,
            "num_examples": subject.num_examples,
            "seed": restored.config.seed,
        },
        "dense": {"top1": dense_top1, "macs": macs.dense},
        "methods": measure_curves(subject, planned),
        "resolutions": measure_resolutions(subject, resolutions, macs.dense),
        "out_of_reach": missed,
        "runs": points,
        "runs_left_out": left_out,
        "contiguity": measure_contiguity(subject) if contiguity else None,
        "sensitivity": measure_sensitivity(subject, dense_top1) if sensitivity else None,
        "versions": versions(),
    }


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def check_request(methods: Sequence[str], ratios: Sequence[float]) -> None:
    """Raises `UserError` if a method does not exist, or a ratio is not above 0 and at most 1."""
    check_methods(methods)
    if not ratios:
        raise UserError("--ratios is empty; give MAC ratios above 0 to 1, such as 0.9 0.7 0.5")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise UserError(f"--ratios must be above 0 and at most 1, got {ratio:g}")


def check_resolutions(sides: Sequence[int], input_shape: tuple[int, int, int]) -> None:
    """Raises `UserError` if a side is not smaller than the network's own, or the network's images are not square."""
    height, width, _ = input_shape
    if sides and height != width:
        raise UserError(
            f"--resolutions are sides of squares, and this network's images are {height}x{width}: leave it out"
        )
    for side in sides:
        if not 1 <= side < height:
            raise UserError(f"--resolutions must be from 1 to {height - 1}, below the network's {height}, got {side}")


def plan_curves(
    subject: Subject, methods: Sequence[str], ratios: Sequence[float], scope: Scope, convention: Convention
) -> tuple[dict[str, dict[float, Pruned]], list[dict[str, Any]]]:
    """Makes the masks of each method for each ratio that it can reach.

    Of ratios that give the same masks, one is kept.

    Args:
      subject: the network.
      methods: some of `fdjax.pruning.profiled.METHODS`.
      ratios: MAC ratios, above 0 to 1.
      scope: the scope of the pruned share, see `prune_share`.
      convention: the convention of the ratios, see `prune_to_target`.

    Returns:
      method -> ratio -> masks; and a row for each ratio that a method cannot reach: `method`, `ratio`, and the `lowest`
      ratio that it can reach.

    Raises:
      UserError: if no method can reach a ratio.
    """
    planned: dict[str, dict[float, Pruned]] = {method: {} for method in methods}
    missed: list[dict[str, Any]] = []
    for method in methods:
        scores, seen = score(method, subject.energies), set[bytes]()
        for ratio in sorted({*ratios}, reverse=True):
            try:
                pruned = prune_to_target(subject.graph, scores, ratio, scope=scope, convention=convention)
            except UnreachableTarget as error:
                missed.append({"method": method, "ratio": ratio, "lowest": error.lowest})
                continue
            key = b"".join(np.packbits(mask).tobytes() for mask in pruned.masks.values())
            if key not in seen:
                seen.add(key)
                planned[method][ratio] = pruned
    for ratio in sorted({*ratios}, reverse=True):
        lowest = [row["lowest"] for row in missed if row["ratio"] == ratio]
        if lowest and len(lowest) == len(methods):
            raise UserError(
                f"no method reaches {ratio:g}x MACs: with the strongest piece of every side alone, the lowest is "
                f"{min(lowest):.3f}x; give a higher ratio, or mask more sides"
            )
    return planned, missed


def measure_curves(subject: Subject, planned: dict[str, dict[float, Pruned]]) -> dict[str, Any]:
    """Evaluates the masks of `plan_curves`; returns method -> list of points, JSON types."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for method, by_ratio in planned.items():
        curves[method] = []
        for ratio, pruned in by_ratio.items():
            point = {
                "target": ratio,
                "share": pruned.share,
                "top1": subject.top1(pruned.masks),
                "macs": pruned.macs.to_dict(),
                "released": list(pruned.released),
            }
            curves[method].append(point)
            macs = pruned.macs
            # Scattered masks have no dense form, so they have the paper's count only.
            total = "" if macs.total is None else f", {macs.ratio('total'):.3f}x in the cheapest exact form"
            _say(
                f"{method}: {100 * point['top1']:.2f}% at {macs.ratio('bare'):.3f}x MACs without transforms{total}, "
                f"{macs.ratio('paper'):.3f}x by the paper's count"
            )
    return curves


def measure_resolutions(subject: Subject, sides: Sequence[int], dense_macs: int) -> list[dict[str, Any]]:
    """Evaluates the unpruned network at smaller inputs.

    Returns:
      Rows of `size`, `top1`, `macs` and `ratio` by descending size, JSON types.
    """
    rows = []
    for side in sorted({*sides}, reverse=True):
        top1, macs = subject.at_resolution(side)
        rows.append({"size": side, "top1": top1, "macs": macs, "ratio": macs / dense_macs})
        _say(f"input of {side}x{side}: {100 * top1:.2f}% at {macs / dense_macs:.3f}x MACs")
    return rows


def measure_contiguity(subject: Subject) -> dict[str, Any]:
    """Counts the channel masks that are prefixes when 30% of each side's pairs are pruned; returns JSON types."""
    masks = prune_share(subject.graph, score("channel_coefficient", subject.energies), CONTIGUITY_SHARE)
    return {
        "share": CONTIGUITY_SHARE,
        "paper": PAPERS_CONTIGUITY,
        "papers_network": PAPERS_CONTIGUITY_NETWORK,
        **contiguous_share(masks),
    }


def sensitivity_counts(num_coefs: int) -> list[int]:
    """Returns the kept counts below N at which sensitivity is measured, ascending."""
    if num_coefs <= _EVERY_COUNT:
        return list(range(1, num_coefs))
    diagonals = [row + column for row, column in zigzag_order(round(num_coefs**0.5))]
    return [n for n in range(1, num_coefs) if diagonals[n] != diagonals[n - 1]]


def measure_sensitivity(subject: Subject, dense_top1: float) -> list[dict[str, Any]]:
    """Measures the accuracy when only one layer is pruned: its masked sides keep the same prefix in all channels.

    The two layers that share a tied mask are pruned together.

    Args:
      subject: the network.
      dense_top1: accuracy of the unpruned network on the same images, 0 to 1.

    Returns:
      JSON types: for each layer `name`, `num_coefs`, `map` (H, W), and `top1` by kept count, ascending to N.
    """
    graph = subject.graph
    whole, rows = whole_masks(graph), []
    for name, layers in block_units(graph).items():
        num_coefs = graph.blocks[layers[0].name] ** 2
        paths = {path for layer in layers for side in SIDES if (path := graph.mask_of(layer.name, side))}
        top1 = {}
        for count in sensitivity_counts(num_coefs):
            kept = np.arange(num_coefs)[:, None] < count
            pruned = {path: np.broadcast_to(kept, whole[path].shape) for path in paths}
            top1[str(count)] = subject.top1(whole | pruned)
        top1[str(num_coefs)] = dense_top1
        rows.append({"name": name, "num_coefs": num_coefs, "map": list(layers[0].in_size), "top1": top1})
        _say(f"{name}: " + ", ".join(f"{count} of {num_coefs} {100 * of:.2f}%" for count, of in top1.items()))
    return rows


def read_runs(folders: Sequence[str], dense_macs: int) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Reads finished runs as points of the plot: learned masks, or networks of another width or resolution.

    Args:
      folders: workdirs.
      dense_macs: MACs of the profiled network; ratios are relative to it.

    Returns:
      JSON types: for each run `name`, `kind` in words, `bare_ratio`, `paper_ratio`, `ratio`, the final `top1`, and, if
      it learned masks, `soft_top1` and `rounded_top1` before refinement; and the folders left out, with reasons.
    """
    points, left_out = [], []
    for given in folders:
        folder = Path(given).expanduser().resolve()
        summary, fields = read_json(folder / SUMMARY_FILE), read_json(folder / CONFIG_FILE)
        if summary is None or fields is None:
            missing = SUMMARY_FILE if summary is None else CONFIG_FILE
            left_out.append({"run": given, "reason": f"no readable {missing}: not the workdir of a finished run"})
            continue
        try:
            result = read_result(folder.name, Config.from_dict(fields), summary)
            scale = summary["macs"]["dense"] / dense_macs
        except (KeyError, TypeError, ValueError) as error:
            left_out.append({"run": given, "reason": str(error)})
            continue
        points.append(
            {
                "name": folder.name,
                "kind": f"learned: {result.masks}" if result.rounded_top1 is not None else result.network_words,
                "bare_ratio": result.bare_ratio * scale,
                "paper_ratio": (result.bare_ratio if result.paper_ratio is None else result.paper_ratio) * scale,
                "ratio": result.macs_ratio * scale,
                "top1": summary["top1"],
                "soft_top1": result.soft_top1,
                "rounded_top1": result.rounded_top1,
            }
        )
    return points, left_out
