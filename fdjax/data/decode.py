"""Encoded pictures to pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fdjax.errors import UserError

try:
    import simplejpeg
except ImportError:  # Pillow then does it all, at less than half of the speed.
    simplejpeg = None

_JPEG = b"\xff\xd8"


def load_image(file: str, shape: tuple[int, int, int], share: float = 1.0) -> np.ndarray:
    """Reads one picture as a data set's images are read: its middle, resized.

    Args:
      file: in any format that Pillow opens.
      shape: (H, W, C) of the result; C is 1 (grey) or 3 (RGB).
      share: of the largest part of that form in the picture's middle that is taken, by its sides.

    Returns:
      uint8 [H, W, C], 0..255.

    Raises:
      UserError: the file cannot be read or is no picture.
    """
    height, width, channels = shape
    image = open_file(file, "L" if channels == 1 else "RGB")
    if height == width:
        return to_pixels(fit_middle(image, height, share))
    scale = share * min(image.width / width, image.height / height)
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


def fit_middle(image: Image.Image, size: int | None, share: float = 1.0) -> Image.Image:
    """Resizes the middle square of an image to `size` x `size` (bilinear, antialiased).

    Args:
      image: of any size.
      size: H and W of the result; None leaves the image as it is.
      share: side of the square, as a share of the image's shorter side. 0.875 is what resizing the shorter side to 256
        and cutting out 224 x 224 gives, ImageNet's custom.
    """
    if size is None or (share == 1 and image.size == (size, size)):
        return image
    side = share * min(image.size)
    if share == 1:
        left, top = (image.width - side) // 2, (image.height - side) // 2
    else:
        left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def read_pixels(encoded: bytes, channels: int, name: str, smallest: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes one image as fast as we can: a JPEG by simplejpeg where it is installed, anything else by Pillow.

    Args:
      encoded: the image.
      channels: 1 (grey) or 3 (RGB) of the result, whatever the image has.
      name: what a message calls it.
      smallest: (height, width) that are enough: a JPEG may then come at 1/2, 1/4 or 1/8 of its size, but no smaller.

    Returns:
      uint8 [height, width, channels].

    Raises:
      UserError: as `open_stream`.
    """
    if simplejpeg is not None and encoded[:2] == _JPEG:
        height, width = smallest or (0, 0)
        factor = 2 if smallest else 1
        try:
            return simplejpeg.decode_jpeg(
                encoded, "GRAY" if channels == 1 else "RGB", min_height=height, min_width=width, min_factor=factor
            )
        except ValueError:  # CMYK, damaged, or odd in a way that Pillow forgives: it decides
            pass
    return to_pixels(open_stream(io.BytesIO(encoded), "L" if channels == 1 else "RGB", name))


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a grey or RGB image."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
