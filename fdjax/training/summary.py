"""The results of a run or an evaluation, as JSON and as text."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import jax

from fdjax import __version__
from fdjax.config import Config
from fdjax.graph.counting import NetworkMacs
from fdjax.graph.masks import MaskedGraph
from fdjax.provenance import commit, processor
from fdjax.training.progress import duration
from fdjax.training.speed import speed_words

if TYPE_CHECKING:
    from fdjax.training.restore import Past


def versions() -> dict[str, str | None]:
    """Returns versions and devices, on which results depend; `commit` is None outside of a git checkout."""
    return {
        "fdjax": __version__,
        "commit": commit(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "processor": processor(),
    }


def evaluation_summary(figures: dict[str, float], macs: NetworkMacs) -> dict[str, Any]:
    """Returns the part that `eval.py --json` and `summary.json` have in common."""
    return {**figures, "macs": macs.to_dict(), "layers": [layer.to_dict() for layer in macs.layers]}


def run_summary(
    config: Config, graph: MaskedGraph, done: Past, figures: dict[str, float], macs: NetworkMacs, made_by: dict
) -> dict[str, Any]:
    """Makes the contents of `summary.json`, without the time of the frozen network.

    Args:
      config: the run's config.
      graph: channel graph of the network.
      done: the run's past.
      figures: metrics on the test images.
      macs: MACs of the network at the end of the run.
      made_by: versions at the start of the run.

    Returns:
      The summary, in JSON types.
    """
    learn = config.learn
    return {
        **evaluation_summary(figures, macs),
        "split": "test",
        "num_classes": graph.num_classes,
        "class_names": list(graph.class_names),
        "dense_top1": done.dense_top1,
        "seconds": round(done.seconds, 1),
        "phases": done.history,
        "target_macs": learn.target_macs if done.masks_learned and learn.target_time is None else None,
        "target_time": learn.target_time if done.masks_learned else None,
        "target_convention": learn.target_convention,
        "seed": config.seed,
        "imported": done.imported or None,
        "pruned_by": done.pruned_by or None,
        "unpruned_macs": done.unpruned_macs,
        "versions": made_by,
    }


def describe(summary: dict[str, Any]) -> str:
    """Describes a summary in a few lines."""
    macs, lines = summary["macs"], []
    if summary.get("dense_top1") is not None:
        dense = summary.get("unpruned_macs") or macs["dense"]
        lines.append(f"dense:  {100 * summary['dense_top1']:.2f}% top-1 at {dense / 1e6:,.2f} M MACs")
    name = "pruned" if macs["total"] < macs["dense"] else "network"
    costs = f"{macs['total'] / 1e6:,.2f} M MACs, transforms included: {macs['ratio']:.3f}x"
    if summary.get("agreement") is not None:
        agreement, pictures = 100 * summary["agreement"], summary["num_examples"]
        lines.append(f"{name}: the same class as the unpruned network for {agreement:.2f}% of {pictures:,} pictures")
        lines.append(f"MACs:   {costs}")
    else:
        images = f"{summary['num_examples']:,} {summary['split']} images"
        lines.append(f"{name}: {100 * summary['top1']:.2f}% top-1 at {costs} ({images})")
    if summary.get("time") is not None:
        lines.append(f"time:   {speed_words(summary['time'])}")
    if "seconds" in summary:
        lines.append(f"run:    {duration(summary['seconds'])}")
    return "\n".join(lines)
