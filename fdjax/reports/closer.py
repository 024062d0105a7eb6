"""The part of the report page that can be explored: layers and their channel groups, and an image in frequencies.

The numbers stand in the page as JSON, and one script of the page draws them. Its hash is in the page's security policy,
so that a browser runs this script and no other. Without scripts the part is hidden, and the page has all it had.
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
# So that the page stays small: as many images, and none with more pixels on a side.
_MOST_IMAGES, _LARGEST_SIDE = 4, 256


@functools.cache
def script() -> str:
    """The script of the page."""
    return (importlib.resources.files("fdjax.reports") / "closer.js").read_text(encoding="utf-8")


def script_policy() -> str:
    """What the security policy says of scripts: this one, by its hash."""
    digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
    return f"script-src 'sha256-{digest}'"


def closer_data(layers: Sequence[Mapping[str, Any]], pixels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The numbers of a run's part, as plain JSON types.

    Args:
      layers: those of `summary.json`; layers that lack a count are left out.
      pixels: uint8 [n, H, W, C], example images; n may be 0.
      names: of the images.
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
    """The part of a run's section, as HTML; arguments as of `closer_data`."""
    data = closer_data(layers, pixels, names)
    if not data["layers"] and not data["images"]:
        return []
    # Within a script nothing is escaped; this is what could end it.
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
    """The script element, once at the end of the page."""
    return f"<script>{script()}</script>"
