"""Compares counting, hardening and freezing with those of a checkout before the channel graph, on all of configs/.

    python tools/compare_graph.py BEFORE [--only WORD]

BEFORE is a checkout of the last commit that knew networks by the roles of their layers. Both sides compute the same
figures of the same networks under the same random masks: MACs of hard masks by every convention and layer, expected
MACs by both conventions, hardened counts at three targets after the gate, and the logits of the frozen networks, from
the same variables and images. A network that BEFORE does not know is named and left out. The exit status is 1 if
something differs without the explanation below, or nothing was compared.

One difference is by design. If a space is between the last layer of a unit and the first layer of the next, its dead
channels now die on both of its ends; before, only those that the next layer removes counted. The tool checks that this
is the only cause. Masks are closed if channels that are dead on one end are dead on both. Under closed masks both sides
have to agree exactly, also in hardened counts. Under any hard masks, each layer's new count has to be its old count
under the closed masks, and so do the expected MACs. Soft masks cannot be closed, so there expected MACs only have to be
no higher.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent.parent
SIDE = Path(__file__).with_name("_side_of_comparison.py")
KINDS = ("all", "levels", "channels")
SEEDS = 3
LOGITS_WITHIN, EXPECTED_WITHIN = 1e-5, 1e-6
# Variance of kernels times their inputs. If masks on every side remove most channels, a network with less variance
# gives all images the same logits. If few are removed, one with more amplifies a difference in the last digit a
# thousandfold.
GAIN_UNTIED, GAIN_TIED = 4.0, 2.0
CLASSES = {"cifar100": 100, "imagenet2012": 1000}

Case = dict[str, Any]
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Found:
    """The results of a side: figures and logits, by name."""

    figures: Figures
    logits: dict[str, np.ndarray]


def cases(only: str) -> Iterator[tuple[str, Case]]:
    """Yields (name, case) of all networks of configs/, with and without tied masks if they can have them."""
    from fdjax.config import load_config

    seen = []
    for file in sorted((HERE / "configs").glob("*.py")):
        config = load_config(str(file))
        # Settings with their default values are left out, because the old code may not know them.
        defaults = {field.name: field.default for field in dataclasses.fields(config.model)}
        model = {
            name: value
            for name, value in dataclasses.asdict(config.model).items()
            if name == "name" or value != defaults[name]
        }
        asked = (model, config.data.image_size, config.learn.block, config.learn.block_by_map)
        if asked in seen or only not in file.stem:
            continue
        seen.append(asked)
        inverted = model["name"].startswith("mobilenetv2") or model["name"] == "efficientnet_lite0"
        for tied in (False, True) if inverted else (False,):
            yield f"{file.stem}{' tied' if tied else ''}", _case(config, model, tied)


def _case(config: Any, model: dict[str, Any], tied: bool) -> Case:
    """Makes the case that both sides get: the network, its masks, and the seeds."""
    from fdjax.config import Config
    from fdjax.training.build import build_network

    side = config.data.image_size or (28 if "mnist" in config.data.name else 32)
    height, width = side if isinstance(side, tuple) else (side, side)
    shape, classes = (height, width, 1 if "mnist" in config.data.name else 3), CLASSES.get(config.data.name, 10)
    blocks = {"block": config.learn.block, "block_by_map": [list(pair) for pair in config.learn.block_by_map]}
    learn = {**blocks, "tied": tied, "levels": "0,1,N" if tied else "all", "group_multiple": 8 if tied else 1}
    settings = json.loads(json.dumps({"model": model, "learn": learn}))
    _, graph = build_network(Config.from_dict(settings), shape, classes)
    return {
        "config": settings,
        "shape": shape,
        "classes": classes,
        "levels": [0, 1] if tied else None,
        "group_multiple": learn["group_multiple"],
        "seeds": SEEDS,
        "kinds": KINDS,
        "gain": GAIN_TIED if tied else GAIN_UNTIED,
        "pairs": _pairs_between_units(graph),
    }


def _pairs_between_units(graph: Any) -> list[tuple[str, str]]:
    """Returns the masks on the two ends of every run whose two layers belong to different modules."""
    found = []
    for space in graph.spaces.values():
        if space.is_run and space.depthwise:
            ends = (space.writers[0], "output"), (space.readers[0], "input")
            paths = [graph.mask_of(*end) for end in ends]
            modules = {layer.rpartition("/")[0] for layer, _ in ends}
            if None not in paths and len(set(paths)) == len(modules) == 2:
                found.append(tuple(paths))
    return found


def ask(side: str, root: Path, case: Case, folder: Path) -> Found | None:
    """Returns the results of a side for a case; None if it does not know the network."""
    asked, answer = folder / f"{side}.json", folder / f"{side}.npz"
    asked.write_text(json.dumps(case))
    # Without a GPU and a cache of compiled programs both sides compute under the same conditions.
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, str(SIDE), side, str(asked), str(answer)], cwd=root, env=environment)
    if done.returncode == 2:
        return None
    done.check_returncode()
    with np.load(answer) as arrays:
        logits = {name: arrays[name] for name in arrays.files if name != "figures"}
        figures = json.loads(str(arrays["figures"]))
    return Found({**figures, "variables": str(logits.pop("variables"))}, logits)


def agree(key: str, before: Any, after: Any) -> bool:
    """Whether two figures are equal, or nearly so for expected MACs."""
    if key.startswith("expected"):
        return abs(before - after) <= EXPECTED_WITHIN * abs(before)
    return before == after


def explained(key: str, before: Figures, after: Figures) -> bool:
    """Whether dead channels that now die on both ends explain a difference, as the module's docstring says."""
    group, *rest = key.split("/", 1)
    if "closed" in key or "paper" in key or not any("/closed/" in other for other in before):
        return False
    if group in ("MACs", "layers"):
        beforehand = before[f"{group}/closed/{rest[0]}"]
        return _only_cheaper(before[key], after[key]) and _totals(after[key]) == _totals(beforehand)
    if group == "expected":
        # Soft masks cannot be closed, because both ends fade.
        hard = before.get(f"{group}/closed/{rest[0]}")
        return after[key] <= before[key] if hard is None else agree(key, hard, after[key])
    # If dead channels cost less, other counts meet a target.
    return group == "hardened"


def _totals(figure: Any) -> Any:
    """Returns the MACs in the cheapest form and that form, which are the last two of a layer's figures."""
    return figure[-2:] if isinstance(figure, list) else figure


def _only_cheaper(before: Any, after: Any) -> bool:
    """Whether only these differ, and are lower."""
    if isinstance(before, list):
        return before[:-2] == after[:-2] and after[-2] <= before[-2]
    return after <= before


def compare_logits(before: Found, after: Found) -> tuple[float, bool]:
    """Returns the largest difference over the largest logit, and if it is small while images' logits differ."""
    if before.logits.keys() != after.logits.keys():
        return float("inf"), False
    worst, telling = 0.0, True
    for name, expected in before.logits.items():
        largest = float(np.abs(expected).max())
        worst = max(worst, float(np.abs(after.logits[name] - expected).max()) / largest)
        telling &= float(np.ptp(expected, axis=0).max()) > 1e-3 * largest
    return worst, telling and worst <= LOGITS_WITHIN


def compare(name: str, before: Found, after: Found) -> bool:
    """Prints a row; returns whether it has no unexplained difference."""
    row, complaints = [name], list[str]()
    if before.figures.keys() != after.figures.keys():
        complaints.append("other figures")
    for group in ("variables", "masks", "MACs", "layers", "expected", "hardened"):
        keys = [key for key in before.figures if key.split("/")[0] == group]
        differ = [k for k in keys if k not in after.figures or not agree(k, before.figures[k], after.figures[k])]
        unexplained = [
            key for key in differ if key not in after.figures or not explained(key, before.figures, after.figures)
        ]
        row.append(f"{len(keys) - len(differ)}/{len(keys)}{'*' if differ else ''}")
        complaints += [
            f"{key}: {str(before.figures[key])[:200]} before, {str(after.figures.get(key))[:200]} after"
            for key in unexplained[:3]
        ]
    pairs = [(before.figures[k], after.figures.get(k, 0)) for k in before.figures if k.startswith("expected")]
    row.append(f"{max((abs(b - a) / b for b, a in pairs if b), default=0.0):.1e}")
    worst, good = compare_logits(before, after)
    row += [str(len(before.logits)), f"{worst:.1e}"]
    complaints += [] if good else ["logits"]
    print("| " + " | ".join([*row, "; ".join(complaints) or "as it should be"]) + " |", flush=True)
    return not complaints


def main() -> int:
    """Compares the two sides."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="checkout of the code before the channel graph")
    parser.add_argument("--only", default="", metavar="WORD", help="compare only configs with this word in their names")
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE))
    good, compared, left_out = True, 0, list[str]()
    columns = ("network", "variables", "masks", "MACs", "of layers", "expected", "hardened", "expected: difference")
    print("| " + " | ".join((*columns, "frozen networks", "logits: difference / largest", "verdict")) + " |")
    print("|---" * (len(columns) + 3) + "|", flush=True)
    for name, case in cases(asked.only):
        with tempfile.TemporaryDirectory() as folder:
            before = ask("before", asked.before.resolve(), case, Path(folder))
            after = ask("after", HERE, case, Path(folder)) if before is not None else None
        if before is None or after is None:
            left_out.append(name)
            continue
        good &= compare(name, before, after)
        compared += 1
    print("\nFigures that agree / all. Differences are relative; those marked * are explained by channels of a space")
    print("between two units that die on both of its ends now (python tools/compare_graph.py --help).")
    if left_out:
        print(f"Left out, since the code before does not know them: {', '.join(left_out)}.")
    return 0 if good and compared else 1


if __name__ == "__main__":
    raise SystemExit(main())
