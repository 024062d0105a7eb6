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
    """Times the frozen network in `folder` beside the dense one.

    Args:
      folder: directory of the frozen network.
      batches: batch sizes in images; each makes a row.
      threads: number of processor cores of this process, which is recorded and which ONNX Runtime uses.
      dtype: type of weights and activations, "float32" or "bfloat16".
      rounds: number of rounds, as in `fdjax.frozen.bench.bench`.
      layers: whether to time each run and layer alone as well, at every batch size.
      any_engine: whether to accept a network that was made for another engine or batch size.

    Returns:
      JSON types: `rows`; `layers`, lists by batch size; `machine`; `remarks`, lines to print.

    Raises:
      UserError: if the folder has no valid frozen network, or one that was made for another engine or batch size.
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
    """Times the frozen network in `folder` and the dense one on several engines, in alternation.

    Args:
      folder: directory of the frozen network.
      engines: some of `fdjax.frozen.engines.ENGINES`.
      batches: batch sizes in images.
      threads: number of processor cores of this process, which ONNX Runtime and OpenVINO use.
      rounds: number of rounds, as in `fdjax.frozen.bench.bench`.
      any_engine: whether to accept a network that was made for none of these engines, or for another batch size.

    Returns:
      JSON types: `rows` of `fdjax.frozen.engine_bench.bench_engines`, with the pruned network's MACs by the masks, over
      the dense network's (`mask_ratio`, `paper_ratio`); `machine`; `remarks`, lines to print.

    Raises:
      UserError: if the folder has no valid frozen network, or one that was made for another engine or batch size, or
        if an engine is not installed.
    """
    check_engines(engines)
    artifact = load(folder)
    remarks = check_made_for(artifact.manifest, engines, batches, anyway=any_engine)
    networks = {"dense": dense_of(artifact), "pruned": artifact.frozen}
    macs = artifact.manifest["macs"]
    facts = {
        "network": f"{artifact.network.name}_{artifact.network.input_shape[0]}",
        "threads": threads,
        "mask_ratio": macs["ratio"],
        "paper_ratio": macs["paper_ratio"],
    }
    rows = [
        {**facts, **row}
        for batch in batches
        for row in bench_engines(networks, engines, batch=batch, threads=threads, rounds=rounds)
    ]
    return {"rows": rows, "machine": machine(), "remarks": remarks}


def slower_remarks(network: FrozenNetwork, file: Path, *, measure: bool) -> list[str]:
    """Returns a remark if an exported network is slower than the dense one on the engines that its file is for.

    Args:
      network: the frozen network.
      file: the exported file; its suffix is the format.
      measure: whether to measure the time if the manifest has none, on the first of these engines that is installed.

    Returns:
      A list of one line, or of none.
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
    """Returns the facts other than the network on which times depend: processor, device, and versions."""
    device = jax.devices()[0].device_kind
    return {"processor": processor(), "device": device, "jax": jax.__version__, "commit": commit()}
