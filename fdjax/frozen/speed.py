"""Measures whether a frozen network is faster than its dense network on an engine, and words what is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fdjax.errors import UserError
from fdjax.frozen.assemble import Frozen
from fdjax.frozen.clock import cores
from fdjax.frozen.engine_bench import bench_engines
from fdjax.frozen.engines import check_engines
from fdjax.frozen.products import ProductPlan
from fdjax.frozen.program import Pointwise, Program, Run

# Ratios of times up to this may be chance.
NEARLY = 1.02
# With more kept counts between 0 and N, summed over the sides of products, XLA compiles for more than about 15 s.
_MOST_PARTIAL_COUNTS = 150
_ENGINES_OF_FILES = {".stablehlo": ("xla",), ".onnx": ("onnxruntime", "openvino"), ".cc": ("native",)}


def speed_on(engine: str, frozen: Frozen, dense: Frozen, batch: int, *, patient: bool = False) -> dict[str, Any]:
    """Times a pruned and the dense network on an engine, in alternation, with all cores of this process.

    Args:
      engine: one of `fdjax.frozen.engines.ENGINES`.
      frozen: the pruned network.
      dense: the dense network.
      batch: the batch size, in images.
      patient: whether to time the pruned network even if XLA takes minutes to compile it.

    Returns:
      JSON types: `engine`, `device`, `threads` (None unless the device is a CPU), `batch`, `clock` ("processor" or
      "wall"), the medians `dense_ms` and `pruned_ms` in milliseconds, `ratio` (pruned over dense), and `problem`: None,
      or why there are no times ("compilation" if XLA would take minutes, or the engine's message).

    Raises:
      UserError: if the engine is not installed.
    """
    check_engines([engine])
    on_cpu = engine != "xla" or jax.default_backend() == "cpu"
    facts: dict[str, Any] = {
        "engine": engine,
        "device": jax.devices()[0].device_kind if engine == "xla" else "cpu",
        "threads": (1 if engine == "native" else cores()) if on_cpu else None,
        "batch": batch,
        **dict.fromkeys(("clock", "dense_ms", "pruned_ms", "ratio", "problem")),
    }
    if engine == "xla" and not patient and partial_counts(frozen.program) > _MOST_PARTIAL_COUNTS:
        return {**facts, "problem": "compilation"}
    whole, pruned = bench_engines({"dense": dense, "pruned": frozen}, [engine], batch=batch, threads=cores())
    problem = pruned.get("error", whole.get("error"))
    if problem is not None:
        return {**facts, "problem": problem}
    times = {"dense_ms": whole["ms"], "pruned_ms": pruned["ms"], "ratio": pruned["time_ratio"]}
    return {**facts, "clock": pruned["clock"], **times}


def partial_counts(program: Program) -> int:
    """Returns the number of different kept counts between 0 and N, summed over the sides of every product."""
    total = 0
    for operation in program.operations:
        pairs: list[tuple[ProductPlan, int]] = []
        if isinstance(operation, Run):
            sides = zip(("writer", "reader"), operation.blocks, strict=True)
            pairs = [(getattr(chain, side), block) for side, block in sides for chain in operation.chains]
        elif isinstance(operation, Pointwise):
            pairs = [(operation.product, operation.block)]
        for product, block in pairs:
            total += sum(len({*side} - {0, block**2}) for side in (product.input_counts, product.output_counts))
    return total


def is_slower(speed: Mapping[str, Any]) -> bool:
    """Whether `speed_on` found the pruned network slower than the dense one, by more than chance."""
    return speed["ratio"] is not None and speed["ratio"] > NEARLY


def images_words(batch: int) -> str:
    """Words a number of images, such as "1 image" or "8 images"."""
    return "1 image" if batch == 1 else f"{batch:,} images"


def slower_words(speed: Mapping[str, Any]) -> str | None:
    """Returns a line to print if `speed_on` found the pruned network slower than the dense one, else None."""
    if not is_slower(speed):
        return None
    flags = f"--engine {speed['engine']} --engine-batch {speed['batch']}"
    return (
        f"on {speed['engine']} this network takes {speed['ratio']:.2f}x of the dense network's time "
        f"({images_words(speed['batch'])}): fdjax freeze --choose time {flags} takes the fastest schedules, with "
        "--release also removes masks that cost time; or learn the masks with --learn.gate time or "
        f"--learn.target-time and --learn.engine {speed['engine']}"
    )


def check_made_for(
    manifest: Mapping[str, Any], engines: Sequence[str], batches: Sequence[int] | None = None, *, anyway: bool = False
) -> list[str]:
    """Checks that an artifact whose schedules were chosen by time is used on the same engine and batch size.

    Args:
      manifest: the artifact's manifest.
      engines: the engines that it will run on; the one it was timed on has to be among them.
      batches: the batch sizes that it will run with, in images; None: not known.
      anyway: whether another engine or batch size is a remark instead of an error.

    Returns:
      The remark, or nothing.

    Raises:
      UserError: if the engine or the batch size is another.
    """
    choice = manifest.get("choice") or {}
    made_for, made_at = choice.get("engine"), int(choice.get("batch") or 1)
    if made_for is None or (made_for in engines and (batches is None or made_at in batches)):
        return []
    here = " or ".join(engines) + ("" if batches is None else f" at {_numbers_words(batches)}")
    flags = f"--choose time --engine {engines[0]}" + ("" if batches is None else f" --engine-batch {batches[0]}")
    words = f"this network was made for {made_for} at {images_words(made_at)}"
    if anyway:
        return [f"{words}; on {here} others of its schedules may be faster: fdjax freeze {flags}"]
    raise UserError(
        f"{words}, not for {here}: use it there, freeze it anew with {flags}, or take it as it is with --any-engine"
    )


def _numbers_words(batches: Sequence[int]) -> str:
    """Words numbers of images, such as "1 and 8 images"."""
    if len(batches) == 1:
        return images_words(batches[0])
    return f"{', '.join(f'{batch:,}' for batch in batches[:-1])} and {images_words(batches[-1])}"


def engines_of_file(file: Path) -> tuple[str, ...]:
    """Returns the engines that an exported file is for, by its suffix."""
    return _ENGINES_OF_FILES.get(file.suffix, ())
