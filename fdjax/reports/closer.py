"""The part of the report page that can be explored: layers with their channel groups, and an image in frequencies.

The page holds the numbers as JSON, and one script draws them. The page's security policy has the hash of that script,
so that a browser runs it and no other. Without scripts, this part is hidden, and the rest of the page is complete.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fdjax.ops import zigzag_order
from fdjax.reports import html

# Ways of counting a layer's MACs, in the order of their bars.
COUNTS = (
    ("dense", "dense"),
    ("pruned", "pruned, no transforms"),
    ("paper_total", "pruned, the paper's count"),
    ("total", "pruned, cheapest exact form"),
)
_LAYER_FIELDS = ("name", "kind", "block", "num_coefs", "form", "released", "kept_counts")
# Limits that keep the page small: the number of images, and the pixels of their longest side.
_MOST_IMAGES, _LARGEST_SIDE = 4, 256


@functools.cache
def script() -> str:
    """Returns the script of the page."""
    return (importlib.resources.files("fdjax.reports") / "closer.js").read_text(encoding="utf-8")


def script_policy() -> str:
    """Returns the directive of the security policy that allows this script, by its hash."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return f"script-src 'sha256-{digest}'"


def closer_data(layers: Sequence[Mapping[str, Any]], pixels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Collects the numbers that the part of a run needs.

    Args:
      layers: the layers of `summary.json`; layers that lack a count are left out.
      pixels: example images, uint8 [n, H, W, C]; n may be 0.
      names: names of the images.

    Returns:
      The numbers in plain JSON types.
    """
    shown = [layer for layer in layers if all(key in layer for key, _ in COUNTS)]
    blocks = {layer["block"] for layer in shown if layer.get("block")} | {2, 4, 8}
    fitting = pixels[:_MOST_IMAGES] if len(pixels) and max(pixels.shape[1:3]) <= _LARGEST_SIDE else pixels[:0]
    images = [
        {
            "name": name,
            "height": image.shape[0],
            "width": image.shape[1],
            "channels": image.shape[2],
            "pixels": image.reshape(-1).tolist(),
        }
        for image, name in zip(fitting, names, strict=False)
    ]
    side = min(pixels.shape[1:3]) if len(pixels) else 0
    return {
        "counts": [{"key": key, "name": name} for key, name in COUNTS],
        "layers": [
            {**{key: layer.get(key) for key in _LAYER_FIELDS}, **{key: layer[key] for key, _ in COUNTS}}
            for layer in shown
        ],
        "blocks": [{"block": k, "order": list(map(list, zigzag_order(k)))} for k in sorted(blocks) if 1 < k <= side],
        "images": images,
    }


def closer_section(layers: Sequence[Mapping[str, Any]], pixels: np.ndarray, names: Sequence[str]) -> list[str]:
    """Formats the part of a run.

    Args:
      layers: as in `closer_data`.
      pixels: as in `closer_data`.
      names: as in `closer_data`.

    Returns:
      HTML; empty if there is nothing to show.
    """
    data = closer_data(layers, pixels, names)
    if not data["layers"] and not data["images"]:
        return []
    # Browsers do not unescape the contents of a script element, and only "<" can end it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = [html.element("h3", "Look closer")]
    if data["layers"]:
        words = (
            "Point at a layer, or click it to keep it. A piece of its strips stands for the channels that keep the "
            "same number of coefficients."
        )
        parts += [html.paragraph(words), html.element("div", class_="layers")]
    if data["images"] and data["blocks"]:
        words = "A test image through the blockwise DCT that the network's maps go through."
        parts += [html.paragraph(words), html.element("div", class_="picture")]
    parts.append(f'<script type="application/json">{text}</script>')
    return [f'<section class="closer" hidden>{"".join(parts)}</section>']


def closer_script() -> str:
    """Returns the script element, which stands once at the end of the page."""
    return f"<script>{script()}</script>"
