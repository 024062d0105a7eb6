"""Times the frozen network of an artifact beside its dense network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from fdjax.frozen import FrozenNetwork, load
from fdjax.frozen.bench import bench, bench_layers, dense_of, describe_masks, onnxruntime_peer
from fdjax.frozen.engine_bench import bench_engines
from fdjax.frozen.engines import check_engines, is_there
from fdjax.frozen.speed import check_made_for, engines_of_file, slower_words, speed_on
from fdjax.provenance import commit, processor


def bench_artifact(
    folder: Path,
    batches: Sequence[int],
    threads: int,
    dtype: str = "float32",
    *,
    rounds: int | None = None,
    layers: bool = False,
    any_engine: bool = False,
) -> dict[str, Any]:
    """Times the frozen network in `folder`.

    Args:
      folder: the artifact.
      batches: images at once; a row each.
      threads: processor cores of this process, for the rows and for ONNX Runtime.
      dtype: "float32" or "bfloat16".
      rounds: as `fdjax.frozen.bench.bench` has them.
      layers: time each block alone, too, at every batch size.
      any_engine: also where the network was made for another engine, or another batch.

    Returns:
      JSON types: `rows`; `layers`, lists by batch size; `machine`; `remarks`, lines to print.

    Raises:
      UserError: no sound artifact, or one that was made for another engine or batch.
    """
    artifact = load(folder)
    network, manifest = artifact.network, artifact.manifest
    remarks = check_made_for(manifest, ["xla"], batches, anyway=any_engine)
    dense, peer = dense_of(artifact), onnxruntime_peer(threads)
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
    return {"rows": rows, "layers": alone, "machine": machine(), "remarks": remarks}


def bench_artifact_on(
    folder: Path,
    engines: Sequence[str],
    batches: Sequence[int],
    threads: int,
    *,
    rounds: int | None = None,
    any_engine: bool = False,
) -> dict[str, Any]:
    """Times the frozen network in `folder` and the dense one on engines, turn by turn.

    Args:
      folder: the artifact.
      engines: some of `fdjax.frozen.engines.ENGINES`.
      batches: images at once.
      threads: processor cores of this process, for ONNX Runtime and OpenVINO.
      rounds: as `fdjax.frozen.bench.bench` has them.
      any_engine: also where the network was made for none of these engines, or another batch.

    Returns:
      JSON types: `rows` of `fdjax.frozen.engine_bench.bench_engines`; `machine`; `remarks`, lines to print.

    Raises:
      UserError: no sound artifact, one that was made for another engine or batch, or an engine that is not there.
    """
    check_engines(engines)
    artifact = load(folder)
    remarks = check_made_for(artifact.manifest, engines, batches, anyway=any_engine)
    networks = {"dense": dense_of(artifact), "pruned": artifact.frozen}
    facts = {"network": f"{artifact.network.name}_{artifact.network.input_shape[0]}", "threads": threads}
    rows = [
        {**facts, **row}
        for batch in batches
        for row in bench_engines(networks, engines, batch=batch, threads=threads, rounds=rounds)
    ]
    return {"rows": rows, "machine": machine(), "remarks": remarks}


def slower_remarks(network: FrozenNetwork, file: Path, *, measure: bool) -> list[str]:
    """That an exported network is slower than its dense self on the engines that such a file is for, if so.

    Args:
      network: the artifact.
      file: whose suffix says the format.
      measure: time it where its manifest does not say, on the first of these engines that is there.

    Returns:
      Lines, none or one.
    """
    engines, manifest = engines_of_file(file), network.manifest
    speed = manifest.get("time")
    if speed is None or speed["engine"] not in engines:
        present = [engine for engine in engines if is_there(engine)]
        pruned = manifest.get("macs", {}).get("ratio", 1) < 1
        dense = dense_of(network) if measure and present and pruned else None
        speed = None if dense is None else speed_on(present[0], network.frozen, dense, 1)
    said = slower_words(speed) if speed else None
    return [said] if said else []


def machine() -> dict[str, str | None]:
    """What times depend on beside the network."""
    device = jax.devices()[0].device_kind
    return {"processor": processor(), "device": device, "jax": jax.__version__, "commit": commit()}
