"""`fdjax predict`: the classes of pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import tyro

from fdjax.commands.arguments import check_at_least_one
from fdjax.commands.output_files import check_json_target, write_report
from fdjax.errors import UserError


@dataclasses.dataclass(kw_only=True)
class PredictArguments:
    """Names the classes of pictures by a frozen network."""

    images: tyro.conf.Positional[tuple[str, ...]]
    """Picture files, in any format that Pillow opens."""
    frozen: str
    """A frozen network, as fdjax freeze writes it."""
    top: int = 1
    """How many classes to name for each, the likeliest first."""
    json: str | None = None
    """Write the classes and their probabilities to this file too."""


def predict_command(arguments: Sequence[str]) -> int:
    """`fdjax predict`."""
    parsed = tyro.cli(PredictArguments, prog="fdjax predict", args=arguments)
    check_json_target(parsed.json)
    if not parsed.images:
        raise UserError("no picture given: fdjax predict --frozen DIR IMAGE...")
    check_at_least_one(top=parsed.top)
    from fdjax.data import load_image
    from fdjax.frozen import load

    network, found = load(parsed.frozen), []
    data = network.manifest.get("data", {})
    share, background = data.get("eval_crop", 1.0), data.get("background", "white")
    for file in parsed.images:
        likeliest = network.classify(load_image(file, network.input_shape, share, background), parsed.top)
        if not all(math.isfinite(probability) for _, probability in likeliest):
            raise UserError(
                f"the frozen network in {parsed.frozen} gives logits that are not finite for {file}: its training has "
                "diverged; freeze an earlier checkpoint (--which)"
            )
        print(f"{file}: " + ", ".join(f"{name} {100 * share:.1f}%" for name, share in likeliest))
        found.append({"image": file, "classes": [{"name": name, "probability": p} for name, p in likeliest]})
    write_report(parsed.json, found)
    return 0
