"""Pictures of the mathematics, drawn with the functions of `fdjax.ops`: the paper's Figures 1, 2 and 4, and images in
the frequency domain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fdjax.ops import (
    BandPlan,
    banded_pointwise,
    block_dct,
    block_idct,
    coef_mask,
    dense_pointwise,
    masked_pointwise,
    plan_bands,
    zigzag_order,
)
from fdjax.ops.blocks import num_blocks
from fdjax.ops.fcmask import counts_to_fcmask, hard_coef_mask
from fdjax.reports.figures import BLUE, COUNT_COLORS, GREEN, ORANGE, PURPLE, VERMILION, NoDataError, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, "black")
_STYLES = ("-", "--", "-.", ":")
_KEPT, _PRUNED = "0.45", "1.0"


def strategies_figure() -> Figure:
    """Draws what each way to prune keeps at one half of all coefficients (the paper's Figure 1).

    Random scores, which fall with frequency at a different speed for each channel, stand for a layer's energies.
    """
    channels, num_coefs = 16, 4**2
    rng = np.random.default_rng(0)
    fall = np.linspace(0.1, 0.5, channels)[:, None] * np.arange(num_coefs)
    scores = rng.gumbel(size=(channels, num_coefs)) - fall
    pairs = np.zeros(scores.size, bool)
    pairs[np.argsort(-scores, axis=None)[: scores.size // 2]] = True
    pairs = pairs.reshape(scores.shape)

    def mask_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.asarray(hard_coef_mask(counts_to_fcmask(np.asarray(counts), num_coefs), num_coefs)).T > 0  # type: ignore[arg-type]

    half = [num_coefs] * (channels // 2) + [0] * (channels // 2)
    masks = {
        "(a) channels": mask_of(half),
        "(b) coefficients": mask_of([num_coefs // 2] * channels),
        "(c) channel and\ncoefficient": pairs,
        "(d) channel-frequency\nbands": mask_of(np.sort(pairs.sum(1))[::-1]),
    }
    figure = new_figure(9.0, 2.9)
    for axes, (title, mask) in zip(figure.subplots(1, 4, sharey=True), masks.items(), strict=True):
        _draw_mask(axes, mask)
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("coefficient (zigzag)", fontsize=8.5)
    figure.axes[0].set_ylabel("channel", fontsize=8.5)
    return figure


def coef_mask_figure(block: int, levels: Sequence[int] | None = None) -> Figure:
    """Draws the mask of each coefficient as a function of FCMask (the paper's Figure 2).

    One panel has the paper's formula for 2x2 blocks; another has the run's own, if that is different.

    Args:
      block: K of the run.
      levels: kept counts below N between which its masks fade; None: all.
    """
    panels: list[tuple[str, int, Sequence[int] | None]] = [("2 × 2 blocks, all levels (the paper's example)", 2, None)]
    if (block, levels) != (2, None):
        words = "all levels" if levels is None else f"levels {', '.join(map(str, levels))}, N"
        panels.append((f"{block} × {block} blocks, {words} (this run)", block, levels))
    figure = new_figure(4.6 * len(panels), 3.3)
    fcmask = np.linspace(0, 1, 401, dtype=np.float32)
    for axes, (title, size, own) in zip(np.ravel(figure.subplots(1, len(panels))), panels, strict=True):
        curves = np.asarray(coef_mask(fcmask, size**2, own))  # type: ignore[arg-type]
        together: dict[bytes, list[int]] = {}
        for n, curve in enumerate(curves):
            together.setdefault(curve.tobytes(), []).append(n)
        for index, numbers in enumerate(together.values()):
            label = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
            style = {"color": _LINES[index % len(_LINES)], "linestyle": _STYLES[index // len(_LINES) % len(_STYLES)]}
            axes.plot(fcmask, curves[numbers[0]], linewidth=1.6, label=label, **style)
        axes.set_xlabel("FCMask of the channel")
        axes.set_ylabel("mask of the coefficient")
        axes.set_title(title, fontsize=9.5)
        axes.legend(title="coefficient", fontsize=7.5, title_fontsize=8, ncols=math.ceil(len(together) / 9))
        axes.grid(color="0.9", linewidth=0.7)
    return figure


class Equivalence(NamedTuple):
    """One pointwise layer computed three ways (the paper's Figure 4).

    Attributes:
      figure: a drawing of what each way multiplies.
      plain_error: largest difference between the plain layer and the layer between DCT and inverse DCT without masks,
        over the largest output.
      banded_error: largest difference between the masked and the banded layer, over the largest output.
      dense_macs: MACs of the plain product.
      banded_macs: MACs of the products of the bands, without transforms.
    """

    figure: Figure
    plain_error: float
    banded_error: float
    dense_macs: int
    banded_macs: int


def equivalence(side: int = 16, channels: int = 12, block: int = 2) -> Equivalence:
    """Computes and draws a small pointwise layer: plain, masked, and by bands (the paper's Figure 4).

    Args:
      side: H and W of a random map.
      channels: C and D.
      block: K.
    """
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, side, side, channels)).astype(np.float32)
    kernel = rng.standard_normal((channels, channels)).astype(np.float32)
    num_coefs = block**2
    spread = np.linspace(num_coefs + 0.4, -0.4, channels).round().clip(0, num_coefs).astype(int)
    plan = plan_bands(spread.tolist(), np.maximum(spread, 1).tolist(), block)
    masks = [
        np.asarray(hard_coef_mask(counts_to_fcmask(np.array(counts), num_coefs), num_coefs))  # type: ignore[arg-type]
        for counts in (plan.input_counts, plan.output_counts)
    ]
    ones = np.ones_like(masks[0])
    dense, whole, masked, banded = (
        np.asarray(y)
        for y in (
            dense_pointwise(x, kernel),  # type: ignore[arg-type]
            masked_pointwise(x, kernel, block, ones, ones),  # type: ignore[arg-type]
            masked_pointwise(x, kernel, block, *masks),  # type: ignore[arg-type]
            banded_pointwise(x, kernel, plan),  # type: ignore[arg-type]
        )
    )
    blocks = num_blocks(side, block) ** 2
    return Equivalence(
        _equivalence_figure(plan, masks),
        float(np.abs(whole - dense).max() / np.abs(dense).max()),
        float(np.abs(banded - masked).max() / np.abs(masked).max()),
        side**2 * kernel.size,
        blocks * sum(inputs * outputs for inputs, outputs in plan.widths),
    )


def _equivalence_figure(plan: BandPlan, masks: Sequence[np.ndarray]) -> Figure:
    channels = len(plan.input_counts)
    figure = new_figure(9.0, 5.2)
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    plain, before, product, after = above.subplots(1, 4, width_ratios=(1, 1, 1, 1))
    _draw_mask(plain, np.ones((channels, channels), bool))
    plain.set_title("(a) one product for\nevery pixel", fontsize=9)
    _draw_mask(before, masks[0].T > 0)
    before.set_title("(b) DCT, input mask", fontsize=9)
    _draw_mask(product, np.ones((channels, channels), bool))
    product.set_title("one product for\nevery coefficient", fontsize=9)
    _draw_mask(after, masks[1].T > 0)
    after.set_title("output mask, IDCT", fontsize=9)
    for axes in (plain, product):
        axes.set_xlabel("output channel", fontsize=8)
        axes.set_ylabel("input channel", fontsize=8)
    for axes, side in ((before, "input"), (after, "output")):
        axes.set_xlabel("coefficient", fontsize=8)
        axes.set_ylabel(f"{side} channel", fontsize=8)
    for band, (axes, (inputs, outputs)) in enumerate(
        zip(np.ravel(below.subplots(1, len(plan.widths))), plan.widths, strict=True)
    ):
        used = np.zeros((channels, channels), bool)
        used[:inputs, :outputs] = True
        _draw_mask(axes, used)
        axes.set_title(f"{'(c) ' if band == 0 else ''}band {band}: {inputs} × {outputs}", fontsize=9)
        axes.set_xlabel("output channel", fontsize=8)
    below.axes[0].set_ylabel("input channel", fontsize=8)
    return figure


def _draw_mask(axes: Axes, mask: np.ndarray) -> None:
    """Draws a mask with grey cells for what is kept; the first row is at the top."""
    from matplotlib.colors import ListedColormap

    axes.pcolormesh(mask, cmap=ListedColormap([_PRUNED, _KEPT]), vmin=0, vmax=1, edgecolors="0.8", linewidth=0.4)
    axes.set_ylim(len(mask), 0)
    axes.set_xticks([])
    axes.set_yticks([])


def image_frequencies_figure(images: np.ndarray, block: int, names: Sequence[str]) -> Figure:
    """Draws images, their coefficients, and their reconstructions from the first coefficients, in a row for each image.

    The coefficients are those of the mean over colours, as one small map for each frequency in its place in the block;
    large amplitudes are dark, on a logarithmic scale.

    Args:
      images: uint8 [n, H, W, C], C 1 or 3.
      block: K.
      names: names of the images.

    Returns:
      The figure.

    Raises:
      NoDataError: if there is no image.
    """
    if not len(images):
        raise NoDataError("there is no image to show")
    num_coefs = block**2
    kept = sorted({1, max(1, num_coefs // 4), max(1, num_coefs // 2), max(1, 3 * num_coefs // 4), num_coefs})[-5:]
    pixels = images.astype(np.float32) / 255
    size = images.shape[1:3]
    coefs = np.asarray(block_dct(pixels, block))  # type: ignore[arg-type]
    figure = new_figure(1.65 * (2 + len(kept)), 0.5 + 1.85 * len(images))
    grid = figure.subplots(len(images), 2 + len(kept), squeeze=False)
    for row, image, coefs_of, name in zip(grid, pixels, coefs, names, strict=True):
        _draw_image(row[0], image, name)
        tiles = _frequency_tiles(coefs_of.mean(-1), block)
        row[1].imshow(np.log10(np.abs(tiles) + 1e-3), cmap=COUNT_COLORS + "_r", interpolation="nearest")
        row[1].set_title(f"coefficients,\n{block}×{block} blocks", fontsize=8)
        _bare(row[1])
        for axes, count in zip(row[2:], kept, strict=True):
            back = np.asarray(block_idct(coefs_of[..., :count, :], block, size))  # type: ignore[arg-type]
            error = float(np.sqrt(np.mean((back - image) ** 2)))
            _draw_image(axes, back, f"first {count} of {num_coefs}\nerror {255 * error:.1f} of 255")
    return figure


def _frequency_tiles(coefs: np.ndarray, block: int) -> np.ndarray:
    """Tiles the map of each coefficient by its row and column of frequency: [R, S, N] -> [K*R, K*S]."""
    rows, columns = coefs.shape[:2]
    tiles = np.zeros((block * rows, block * columns), coefs.dtype)
    for n, (row, column) in enumerate(zigzag_order(block)):
        tiles[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = coefs[..., n]
    return tiles


def _draw_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """Draws an image [H, W, C] in 0..1; values that a truncated transform takes outside that range are clipped."""
    shown = np.clip(image, 0, 1)
    if shown.shape[-1] == 1:
        axes.imshow(shown[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        axes.imshow(shown[..., :3], interpolation="nearest")
    axes.set_title(title, fontsize=8)
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
