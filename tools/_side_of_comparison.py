"""One side of `compare_graph.py`: computes the figures of one network with the fdjax that is imported, old or new.

    python tools/_side_of_comparison.py SIDE CASE.json OUT.npz

A case describes the network and its masks; no config file is read. Functions may be in different modules on the two
sides, but have to compute the same.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = (0.8, 0.5, 0.33)
CONVENTIONS = ("total", "paper")
FIELDS = ("dense", "pruned", "full_transforms", "paper_total", "total")
INPUT_MEAN, INPUT_STD = 120.0, 60.0
BATCH = 2
# With these options a network compiles in a fraction of the time.
QUICK: Any = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}

Counts = dict[str, np.ndarray]
Pairs = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Side:
    """The functions of one side, and the network in the form that they take (a spec before, a graph after)."""

    name: str
    network: Any
    module: Any
    expected_macs: Callable[..., Any]
    harden_to_target: Callable[..., Any]
    network_macs: Callable[..., Any]
    logits: Callable[[Any, Counts, np.ndarray], np.ndarray]


def load_side(name: str, case: Mapping[str, Any]) -> Side:
    """Returns the network of a case, and the functions of a side.

    Raises:
      fdjax.errors.UserError: if this side does not know the settings.
    """
    config = importlib.import_module("fdjax.config").Config.from_dict(case["config"])
    build = importlib.import_module("fdjax.training.build").build_network
    module, network = build(config, tuple(case["shape"]), case["classes"])
    channels = case["shape"][-1]
    network = dataclasses.replace(network, input_mean=(INPUT_MEAN,) * channels, input_std=(INPUT_STD,) * channels)
    pruning, frozen = importlib.import_module("fdjax.pruning"), importlib.import_module("fdjax.frozen")
    expected = importlib.import_module("fdjax.pruning.expected").expected_macs
    if name == "before":
        counting = importlib.import_module("fdjax.spec")

        def logits(variables: Any, counts: Counts, images: np.ndarray) -> np.ndarray:
            made = frozen.freeze(network, variables, counts)
            run = jax.jit(lambda arrays, images: frozen.apply(made.plan, arrays, images), compiler_options=QUICK)
            return np.asarray(run(made.arrays, images))
    else:
        counting, xla = (importlib.import_module(f"fdjax.{name}") for name in ("graph.counting", "frozen.xla"))
        as_traced = importlib.import_module("fdjax.training.network").graph_variables

        def logits(variables: Any, counts: Counts, images: np.ndarray) -> np.ndarray:
            traced = as_traced(network, variables["params"], variables["batch_stats"])
            made = frozen.freeze(network, traced, counts)
            run = jax.jit(lambda arrays, images: xla.apply(made.program, arrays, images)[0], compiler_options=QUICK)
            return np.asarray(run(made.arrays, images))

    return Side(name, network, module, expected, pruning.harden_to_target, counting.network_macs, logits)


def _generator(seed: int, path: str, *more: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(path.encode()), *more])


def random_counts(sizes: Mapping[str, tuple[int, int]], seed: int, kind: str) -> Counts:
    """Returns path -> random kept counts: "all" of 0..N, "levels" 0, 1 and N, or "channels", 0 and N."""
    found = {}
    for path, (channels, num_coefs) in sizes.items():
        rng, levels = _generator(seed, path, len(kind)), [0, 1, num_coefs]
        if kind == "all":
            found[path] = rng.integers(0, num_coefs + 1, channels)
        else:
            found[path] = rng.choice(levels if kind == "levels" else levels[::2], channels)
    return found


def closed(counts: Counts, pairs: Pairs) -> Counts:
    """Returns counts in which a channel dead on one end of a run is dead on both; `pairs` are the ends' masks."""
    found = dict(counts)
    for writer, reader in pairs:
        alive = (found[writer] > 0) & (found[reader] > 0)
        found[writer], found[reader] = found[writer] * alive, found[reader] * alive
    return found


def random_masks(sizes: Mapping[str, tuple[int, int]], seed: int, pairs: Pairs) -> dict[str, np.ndarray]:
    """Returns path -> random FCMask; masks of different sides differ, as learned ones do, those of a pair are equal."""
    found = {}
    for path, (channels, _) in sizes.items():
        rng = _generator(seed, path, 0)
        found[path] = np.clip(rng.uniform(0.2, 1) + rng.normal(0, 0.3, channels), 0, 1).astype(np.float32)
    return found | {reader: found[writer] for writer, reader in pairs}


def random_variables(module: Any, shape: tuple[int, ...], seed: int, gain: float) -> tuple[dict[str, Any], list[Any]]:
    """Returns random `params` and `batch_stats` of a module, the same on both sides, and their paths and shapes."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *shape))))
    described = []

    def draw(keys: Any, leaf: Any) -> np.ndarray:
        path = "/".join(key.key for key in keys)
        described.append([path, *leaf.shape])
        rng, name = _generator(seed, path, 1), path.rpartition("/")[2]
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        deviation = np.sqrt(gain / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1
        return rng.normal(0, deviation, leaf.shape).astype(np.float32)

    collections = {name: shapes[name] for name in ("params", "batch_stats")}
    return jax.tree_util.tree_map_with_path(draw, collections), sorted(described)


def counted(side: Side, key: str, counts: Counts) -> Iterator[tuple[str, Any]]:
    """Returns the MACs of hard masks by every convention, in total and layer by layer."""
    macs = side.network_macs(side.network, counts)
    yield from ((f"MACs/{key}/{field}", macs.to_dict()[field]) for field in FIELDS)
    for layer in macs.layers:
        yield f"layers/{key}/{layer.name}", [getattr(layer, field) for field in (*FIELDS, "form")]


def expected(side: Side, key: str, masks: Mapping[str, np.ndarray], levels: Any) -> Iterator[tuple[str, float]]:
    """Returns the expected MACs by both conventions."""
    given = {path: jnp.asarray(mask) for path, mask in masks.items()}
    for convention in CONVENTIONS:
        yield f"expected/{key}/{convention}", float(side.expected_macs(side.network, given, levels, convention))


def hardened(
    side: Side, key: str, masks: Any, case: Mapping[str, Any], levels: Any, seed: int
) -> Iterator[tuple[str, Any]]:
    """Returns the counts at every target, the released layers, and the ratio that is reached."""
    rounding = {"levels": levels, "group_multiple": case["group_multiple"]}
    for convention in CONVENTIONS if seed == 0 else CONVENTIONS[:1]:
        for target in TARGETS:
            made = side.harden_to_target(side.network, masks, target, convention=convention, **rounding)
            found: dict[str, Any] = {path: zlib.crc32(np.int64(count).tobytes()) for path, count in made.counts.items()}
            ratio = made.macs.ratio if convention == "total" else made.macs.paper_ratio
            found |= {"released": sorted(made.released), "ratio": ratio}
            yield f"hardened/{key}/{convention}/{target}", found


def figures(side: Side, case: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields all figures of a case, by name; with pairs, also those of masks that are closed before."""
    sizes, seeds, levels = dict(side.network.mask_sizes), range(case["seeds"]), case["levels"]
    yield "masks", sorted([path, *size] for path, size in sizes.items())
    forms = {"": [], "closed/": case["pairs"]} if case["pairs"] else {"": []}
    for form, pairs in forms.items():
        for seed in seeds:
            drawn = {kind: closed(random_counts(sizes, seed, kind), pairs) for kind in case["kinds"]}
            for kind, counts in drawn.items():
                yield from counted(side, f"{form}{kind}/{seed}", counts)
            if not sizes:
                continue
            masks = random_masks(sizes, seed, pairs)
            rounded = {path: np.round(mask) for path, mask in random_masks(sizes, seed, []).items()}
            shares = {path: (count / sizes[path][1]).astype(np.float32) for path, count in drawn["all"].items()}
            yield from expected(side, f"{form}counts/{seed}", shares, levels)
            yield from expected(side, f"{form}rounded/{seed}", closed(rounded, pairs), levels)
            if pairs:
                # Only at these levels are equal masks on both ends zero together, whatever their N.
                yield from hardened(side, f"{form}{seed}", masks, case, [0, 1], seed)
            else:
                yield from expected(side, f"{form}soft/{seed}", masks, levels)
                yield from hardened(side, f"{form}{seed}", masks, case, levels, seed)


def frozen_logits(side: Side, case: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Returns the logits of the frozen network under hard masks, for random images."""
    shape, sizes = tuple(case["shape"]), dict(side.network.mask_sizes)
    for seed in range(case["seeds"]):
        variables, described = random_variables(side.module, shape, seed, case["gain"])
        yield "variables", np.array(json.dumps(described))
        # The images have large patches, which pools do not average out.
        patches = _generator(seed, "images").integers(0, 256, (BATCH, 4, 4, shape[2])).astype(np.uint8)
        rows, columns = (np.arange(side) * 4 // side for side in shape[:2])
        images = patches[:, rows][:, :, columns]
        # Compilation takes most of the time, so each seed has another kind of masks.
        kind = case["kinds"][seed % len(case["kinds"])]
        yield f"logits/{kind}/{seed}", side.logits(variables, random_counts(sizes, seed, kind), images)


def main() -> int:
    """Writes the figures of a side; exit status 2 means that it does not know the settings."""
    name, case_file, out = sys.argv[1:]
    case = json.loads(Path(case_file).read_text())
    from fdjax.errors import UserError

    try:
        side = load_side(name, case)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    arrays = dict(frozen_logits(side, case))
    np.savez(out, figures=np.array(json.dumps(dict(figures(side, case)))), **arrays)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
