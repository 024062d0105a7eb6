"""Benchmarks of an artifact: the frozen network beside the dense one, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fdjax.frozen import load
from fdjax.frozen.bench import bench, bench_layers, dense_network, describe_masks
from fdjax.frozen.engines import bench_engines, check_engines
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


def bench_artifact_on(
    folder: Path, engines: Sequence[str], batches: Sequence[int], threads: int, *, rounds: int | None = None
) -> dict[str, Any]:
    """Times the frozen network in `folder` and the dense one on engines, turn by turn.

    Args:
      folder: the artifact.
      engines: some of `fdjax.frozen.engines.ENGINES`.
      batches: images at once.
      threads: processor cores of this process, for ONNX Runtime and OpenVINO.
      rounds: as `fdjax.frozen.bench.bench` has them.

    Returns:
      JSON types: `rows` of `fdjax.frozen.engines.bench_engines`; `machine`.

    Raises:
      UserError: no sound artifact, or an engine that is not there.
    """
    check_engines(engines)
    artifact = load(folder)
    networks = {"dense": dense_network(artifact.network), "pruned": artifact.frozen}
    facts = {"network": f"{artifact.network.name}_{artifact.network.input_shape[0]}", "threads": threads}
    rows = [
        {**facts, **row}
        for batch in batches
        for row in bench_engines(networks, engines, batch=batch, threads=threads, rounds=rounds)
    ]
    return {"rows": rows, "machine": machine()}


def machine() -> dict[str, str | None]:
    """What times depend on beside the network."""
    device = jax.devices()[0].device_kind
    return {"processor": processor(), "device": device, "jax": jax.__version__, "commit": commit()}
