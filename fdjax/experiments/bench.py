"""Benchmarks of an artifact: the frozen network beside the dense one, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fdjax.frozen import load
from fdjax.frozen.bench import bench, bench_layers, dense_network, describe_masks
from fdjax.frozen.onnx_model import onnxruntime_peer
from fdjax.provenance import commit, processor


def bench_artifact(
    folder: Path,
    batches: Sequence[int],
    threads: int,
    dtype: str = "float32",
    *,
    rounds: int | None = None,
    layers: bool = False,
) -> dict[str, Any]:
    """Times the frozen network in `folder`.

    Args:
      folder: the artifact.
      batches: images at once; a row each.
      threads: processor cores of this process, for the rows and for ONNX Runtime.
      dtype: "float32" or "bfloat16".
      rounds: as `fdjax.frozen.bench.bench` has them.
      layers: time each block alone, too, at every batch size.

    Returns:
      JSON types: `rows`; `layers`, lists by batch size; `machine`.

    Raises:
      UserError: no sound artifact.
    """
    artifact = load(folder)
    network, manifest = artifact.network, artifact.manifest
    dense, peer = dense_network(network), onnxruntime_peer(threads)
    facts = {
        "network": f"{network.name}_{network.input_shape[0]}",
        "masks": describe_masks(network, manifest["layers"]),
        "target": None,
        "threads": threads,
        "mac_ratio": manifest["macs"]["ratio"],
        "paper_ratio": manifest["macs"]["paper_ratio"],
    }
    rows = [bench(artifact.frozen, dense, facts, batch=n, dtype=dtype, rounds=rounds, peer=peer) for n in batches]
    alone = {str(n): bench_layers(artifact.frozen, dense, batch=n) for n in batches} if layers else {}
    return {"rows": rows, "layers": alone, "machine": machine()}


def machine() -> dict[str, str | None]:
    """What times depend on beside the network."""
    device = jax.devices()[0].device_kind
    return {"processor": processor(), "device": device, "jax": jax.__version__, "commit": commit()}
