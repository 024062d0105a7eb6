"""The masked pointwise convolution by scipy, in float64, block by block: the oracle of the library's forms of it."""

from __future__ import annotations

import numpy as np
import scipy.fft


def frequencies(block: int) -> list[tuple[int, int]]:
    """The zigzag order: by anti-diagonal, odd ones downwards."""
    cells = [(i, j) for i in range(block) for j in range(block)]
    return sorted(cells, key=lambda ij: (ij[0] + ij[1], ij[0] if (ij[0] + ij[1]) % 2 else -ij[0]))


def scipy_masked(x, kernel, block: int, input_mask=None, output_mask=None) -> np.ndarray:
    """x [H, W, C] -> [H, W, D] with masks [N, C] and [N, D], by scipy, in float64, one block at a time."""

    def grid(mask, channels: int) -> np.ndarray:
        weights = np.ones((block, block, channels))
        if mask is not None:
            for n, frequency in enumerate(frequencies(block)):
                weights[frequency] = mask[n]
        return weights

    height, width, channels = x.shape
    kernel = np.asarray(kernel, np.float64)
    x = np.pad(np.asarray(x, np.float64), ((0, -height % block), (0, -width % block), (0, 0)), mode="edge")
    out = np.zeros((*x.shape[:2], kernel.shape[1]))
    for i in range(0, x.shape[0], block):
        for j in range(0, x.shape[1], block):
            here = np.s_[i : i + block, j : j + block]
            coefs = scipy.fft.dctn(x[here], axes=(0, 1), norm="ortho") * grid(input_mask, channels)
            coefs = coefs @ kernel * grid(output_mask, kernel.shape[1])
            out[here] = scipy.fft.idctn(coefs, axes=(0, 1), norm="ortho")
    return out[:height, :width]


def prefix_mask(counts, block: int) -> np.ndarray:
    """Kept counts [C] of blocks K x K -> the mask [N, C] that keeps so many leading coefficients."""
    return (np.arange(block**2)[:, None] < np.asarray(counts)).astype(np.float32)
