"""Compares counting and hardening with those of a checkout before the channel graph, on all networks of configs/.

    python tools/compare_graph.py BEFORE [--only WORD]

BEFORE is a checkout of the last commit that knew networks by the roles of their layers. Both sides are asked for the
same figures under the same random masks: MACs of hard masks by every convention and layer, expected MACs by both
conventions, and hardened counts at three targets, gated. Exits with 1 if something differs that should not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
SEEDS = range(3)
TARGETS = (0.8, 0.5, 0.33)
CONVENTIONS = ("total", "paper")
FIELDS = ("dense", "pruned", "full_transforms", "paper_total", "total")
# Where one space lies between the last layer of a unit and the first of the next, its dead channels now die on both of
# its ends; before, only those counted that the layer after it removes.
BOTH_ENDS = ("imagenet_mobilenetv1_224",)


def cases() -> list[tuple[str, bool]]:
    """(config, tied) of all that can be made; of configs with one network and mask settings, the first."""
    from fdjax.config import load_config

    found, seen = [], []
    for file in sorted((HERE / "configs").glob("*.py")):
        config = load_config(str(file))
        asked = (config.model, config.data.image_size, config.learn.block, config.learn.block_by_map)
        if asked in seen:
            continue
        seen.append(asked)
        model = config.model.name
        inverted = model.startswith("mobilenetv2") or model == "efficientnet_lite0"
        found += [(file.stem, tied) for tied in ((False, True) if inverted else (False,))]
    return found


def asked_config(name: str, tied: bool) -> tuple[Any, tuple[int, int, int], int]:
    """A config, the shape of its images, and its number of classes."""
    from fdjax.config import load_config

    config = load_config(str(HERE / "configs" / f"{name}.py"))
    levels = "0,1,N" if tied else "all"
    learn = dataclasses.replace(config.learn, tied=tied, levels=levels, group_multiple=8 if tied else 1)
    config = dataclasses.replace(config, learn=learn)
    if config.data.name.startswith("imagenet"):
        side = config.data.image_size or 224
        height, width = side if isinstance(side, tuple) else (side, side)
        return config, (height, width, 3), 1000
    return (config, (28, 28, 1), 10) if "mnist" in config.data.name else (config, (32, 32, 3), 10)


def random_masks(sizes: dict[str, tuple[int, int]], seed: int, hard: str | None, tied: bool) -> dict[str, Any]:
    """Path -> kept counts ("all", "levels" 0, 1 and N, "channels" 0 and N), or FCMasks where `hard` is None."""
    import numpy as np

    found = {}
    for path, (channels, num_coefs) in sizes.items():
        rng = np.random.default_rng([seed, zlib.crc32(path.encode()), len(hard or "")])
        if hard is None:
            # Masks differ from side to side, as learned ones do.
            found[path] = np.clip(rng.uniform(0.2, 1) + rng.normal(0, 0.3, channels), 0, 1).astype(np.float32)
        elif hard == "all":
            found[path] = rng.integers(0, num_coefs + 1, channels)
        else:
            found[path] = rng.choice([0, 1, num_coefs] if hard == "levels" else [0, num_coefs], channels)
    return found


def figures(side: str, name: str, tied: bool) -> dict[str, Any]:
    """Figure -> value, of the code that is imported."""
    import jax.numpy as jnp
    import numpy as np

    config, shape, classes = asked_config(name, tied)
    network, api = subject(side, config, shape, classes)
    expected_macs, harden_to_target, network_macs = api
    found: dict[str, Any] = {}
    sizes = dict(network.mask_sizes)
    found["masks"] = sorted((path, *size) for path, size in sizes.items())
    for kind in ("all", "levels", "channels"):
        for seed in SEEDS:
            counts = random_masks(sizes, seed, kind, tied)
            macs = network_macs(network, counts)
            found.update({f"MACs/{kind}/{seed}/{field}": macs.to_dict()[field] for field in FIELDS})
            found.update(
                {
                    f"layers/{kind}/{seed}/{layer.name}": [getattr(layer, field) for field in (*FIELDS, "form")]
                    for layer in macs.layers
                }
            )
    levels, group = config.learn.counts_below_whole, config.learn.group_multiple
    for seed in SEEDS if sizes else ():
        masks = random_masks(sizes, seed, None, tied)
        hard = {path: np.round(mask) for path, mask in masks.items()}
        for convention in CONVENTIONS:
            for word, fcmask in (("soft", masks), ("hard", hard)):
                fcmask = {path: jnp.asarray(mask) for path, mask in fcmask.items()}
                value = float(expected_macs(network, fcmask, levels, convention))
                found[f"expected/{convention}/{seed}/{word}"] = value
            for target in TARGETS if convention == "total" or seed == 0 else ():
                made = harden_to_target(
                    network, masks, target, levels=levels, convention=convention, group_multiple=group
                )
                key = f"hardened/{convention}/{seed}/{target}"
                found[key] = {path: zlib.crc32(np.int64(count).tobytes()) for path, count in made.counts.items()}
                found[key] |= {"released": sorted(made.released), "ratio": made.macs.ratio}
    return found


def subject(side: str, config: Any, shape: tuple[int, int, int], classes: int) -> tuple[Any, tuple[Any, ...]]:
    """The network as its side's functions take it, and these functions."""
    from fdjax.training.build import build_network

    module, made = build_network(config, shape, classes)
    if side == "before":
        from fdjax.spec import network_macs

        from fdjax.pruning import expected_macs, harden_to_target

        return made, (expected_macs, harden_to_target, network_macs)
    from fdjax.graph.counting import network_macs
    from fdjax.pruning.expected import expected_macs
    from fdjax.pruning.harden import harden_to_target
    from tests.graph_networks import network_of

    return network_of(module, made), (expected_macs, harden_to_target, network_macs)


def agree(key: str, before: Any, after: Any) -> bool:
    """Equal, or for expected MACs nearly so."""
    if key.startswith("expected"):
        return abs(before - after) <= 1e-6 * abs(before)
    return before == after


def compare(case: dict[str, Any], name: str, tied: bool) -> bool:
    """Prints a row; returns whether all is as it should be."""
    before, after = case["before"], case["after"]
    row, good = [f"{name}{' tied' if tied else ''}"], before.keys() == after.keys()
    for group in ("masks", "MACs", "layers", "expected", "hardened"):
        keys = [key for key in before if key.split("/")[0] == group]
        differ = [key for key in keys if key not in after or not agree(key, before[key], after[key])]
        row.append(f"{len(keys) - len(differ)}/{len(keys)}")
        if differ and name in BOTH_ENDS and group != "masks":
            fewer = (after[key] <= before[key] for key in differ if key.endswith("/total"))
            row[-1] += "*"
            good &= all(fewer) and all(agree(k, before[k], after[k]) for k in keys if k.endswith("paper_total"))
        elif differ:
            good = False
            row[-1] += f" ({differ[0]}: {str(before[differ[0]])[:200]} and {str(after.get(differ[0]))[:200]})"
    worst = max((abs(before[k] - after[k]) / before[k] for k in before if k.startswith("expected")), default=0.0)
    print("| " + " | ".join([*row, f"{worst:.1e}"]) + " |", flush=True)
    return good


def main() -> int:
    """The comparison; with --side, one side's figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the code before")
    parser.add_argument("--only", default="", help="only configs with this in their name")
    parser.add_argument("--side", choices=("before", "after"), help=argparse.SUPPRESS)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(figures(asked.side, asked.case[0], asked.case[1] == "tied")))
        return 0
    sys.path.insert(0, str(HERE))
    good = True
    print("| network | masks | MACs | of layers | expected | hardened | expected, largest relative difference |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, tied in cases():
        if asked.only not in name:
            continue
        started = {}
        for side, root in (("before", asked.before.resolve()), ("after", HERE)):
            command = [sys.executable, __file__, str(asked.before), "--side", side, "--case", name]
            command.append("tied" if tied else "untied")
            environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
            started[side] = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd=root)
        found = {side: json.loads(process.communicate()[0]) for side, process in started.items()}
        good &= compare(found, name, tied)
    print("* dead channels of a space between two units die on both of its ends now: never more MACs than before")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
