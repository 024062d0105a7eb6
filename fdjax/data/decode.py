"""Encoded pictures to pixels."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fdjax.errors import UserError


def load_image(file: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads one picture as a data set's images are read: its middle, resized.

    Args:
      file: in any format that Pillow opens.
      shape: (H, W, C) of the result; C is 1 (grey) or 3 (RGB).

    Returns:
      uint8 [H, W, C], 0..255.

    Raises:
      UserError: the file cannot be read or is no picture.
    """
    height, width, channels = shape
    image = open_file(file, "L" if channels == 1 else "RGB")
    if height == width:
        return to_pixels(fit_middle(image, height))
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return to_pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def open_file(file: str, mode: str) -> Image.Image:
    """As `open_stream`, of a file; raises UserError where it cannot be read."""
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error
    with stream:
        return open_stream(stream, mode, file)


def open_stream(stream: Any, mode: str, name: str) -> Image.Image:
    """Decodes one image.

    Args:
      stream: of the encoded image.
      mode: Pillow's name of the wanted form, "L" or "RGB"; palettes, transparency, CMYK and 16 bits are brought to it.
      name: what a message calls the image.

    Raises:
      UserError: it is no image, damaged, or has 32-bit pixels.
    """
    try:
        image = Image.open(stream)
        image.load()
        if image.mode == mode:
            return image
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode not in ("I", "F"):
            return image.convert(mode)
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is no image that Pillow can open") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        raise UserError(f"{name} is a damaged or unsupported image: {error}") from error
    raise UserError(f"{name} has 32-bit pixels (Pillow's mode {image.mode}); 8 or 16 bits are supported")


def fit_middle(image: Image.Image, size: int | None) -> Image.Image:
    """Resizes the middle square of an image to `size` x `size`; the same as resizing first and cropping then."""
    if size is None or image.size == (size, size):
        return image
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + short, top + short))


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a grey or RGB image."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
