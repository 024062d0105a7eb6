"""Decoding: from encoded images to pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fdjax.errors import UserError

try:
    import simplejpeg
except ImportError:  # Pillow then decodes everything, at less than half the speed.
    simplejpeg = None

_JPEG = b"\xff\xd8"
# (H, W), one number for both, or None for the image's own size.
Size = int | tuple[int, int] | None
# The default colour behind the transparent parts of an image.
BACKGROUND = "white"
# Pillow's limit. Such an image takes half a gigabyte of memory.
MOST_PIXELS = 178_956_970
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258
_EXIF, _XMP, _EXIF_WITHIN = b"Exif\x00\x00", b"http://ns.adobe.com/xap/", 1 << 16
# EXIF orientation -> the function that brings pixels upright.
_UPRIGHT = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: x.swapaxes(0, 1)[:, ::-1],
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: x.swapaxes(0, 1)[::-1],
}


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns (H, W) of a size."""
    return (size, size) if isinstance(size, int) else size


def load_image(file: str, shape: tuple[int, int, int], share: float = 1.0, background: str = BACKGROUND) -> np.ndarray:
    """Reads an image as the images of a data set are read: its middle, resized.

    Args:
      file: path of an image in any format that Pillow opens.
      shape: (H, W, C) of the result; C is 1 (grey) or 3 (RGB).
      share: side of the part to take, above 0 to 1, relative to the largest part of the result's aspect ratio in the
        middle of the image.
      background: the colour behind transparent parts, by name or as #rrggbb.

    Returns:
      uint8 [H, W, C], 0..255.

    Raises:
      UserError: the file cannot be read or is not an image.
    """
    height, width, channels = shape
    image = open_file(file, "L" if channels == 1 else "RGB", background)
    return to_pixels(fit_middle(image, (height, width), share))


def open_file(file: str, mode: str, background: str = BACKGROUND) -> Image.Image:
    """Opens an image file as in `open_stream`; raises `UserError` if it cannot be read."""
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error
    with stream:
        return open_stream(stream, mode, file, background)


def open_stream(stream: Any, mode: str, name: str, background: str = BACKGROUND) -> Image.Image:
    """Decodes one image.

    Args:
      stream: a binary stream of the encoded image.
      mode: Pillow's mode of the result, "L" or "RGB". Palettes, transparency, CMYK and 9 to 16 bits are converted to
        it.
      name: what a message calls the image.
      background: the colour behind transparent parts, by name or as #rrggbb.

    Returns:
      The image, upright.

    Raises:
      UserError: the image is damaged, too large, a single pixel, in an unknown format, or has 32-bit pixels.
    """
    try:
        image = Image.open(stream)
        check_pixels(image.height, image.width, name)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _in_mode(image, mode, name, background)
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can open") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, "") from error
    except Exception as error:  # Pillow's plugins raise almost any exception on a damaged file.
        raise UserError(f"{name} is a damaged or unsupported image: {error}") from error


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises `UserError` if an image has more pixels than the limit, or a single one."""
    if height == width == 1:
        raise UserError(f"{name} is a picture of a single pixel, which shows nothing; remove it")
    if height * width > MOST_PIXELS:
        raise _too_large(name, f" of {width:,} by {height:,} pixels")


def _too_large(name: str, size: str) -> UserError:
    return UserError(
        f"{name} is a picture{size} with more than {MOST_PIXELS / 1e6:.0f} million pixels, which is the limit; make "
        "it smaller, or remove it"
    )


def _in_mode(image: Image.Image, mode: str, name: str, background: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep:
        # A TIFF may hold 9 to 15 bits in 16; Pillow scales other formats to the full range of 16 bits.
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        bits = bits[0] if isinstance(bits, tuple) else bits
        if not 9 <= bits <= 16:
            raise UserError(f"{name} has {bits} bits per pixel in an unknown form; 8 or 16 bits are supported")
        levels = np.asarray(image).astype(np.uint32) >> (bits - 8)
        image = Image.fromarray(np.minimum(levels, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (Pillow's mode {image.mode}); 8 or 16 bits are supported")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        front = image.convert("RGBA")
        behind = Image.new("RGBA", front.size, background)
        image = Image.alpha_composite(behind, front)
    return image.convert(mode)


def fit_middle(image: Image.Image, size: Size, share: float = 1.0) -> Image.Image:
    """Resizes the middle of an image, as large as the aspect ratio of the result allows (bilinear, antialiased).

    Args:
      image: an image of any size.
      size: size of the result; None leaves the image as it is.
      share: side of the part to take, relative to the largest, above 0 to 1. With 0.875, a square result is the same as
        after resizing the shorter side to 256 and cropping 224 x 224, as is usual for ImageNet.

    Returns:
      The resized image.
    """
    if size is None or (share == 1 and image.size == sides(size)[::-1]):
        return image
    height, width = sides(size)
    scale = share * min(image.width / width, image.height / height)
    # A product may exceed the side that the scale was made of by its last bit: Pillow refuses a box beyond the image.
    wide, high = min(scale * width, image.width), min(scale * height, image.height)
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    if share == 1 and height == width:
        left, top = left // 1, top // 1
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))


def orientation_of(encoded: bytes) -> int:
    """Returns the orientation of an encoded JPEG by EXIF, or else by XMP, 1 to 8; 1 (upright) if it has none."""
    if all(encoded.find(mark, 0, _EXIF_WITHIN) < 0 for mark in (_EXIF, _XMP)):
        return 1
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # The decoder will report what is wrong.
        return 1
    return found if found in _UPRIGHT else 1


def read_pixels(
    encoded: bytes,
    channels: int,
    name: str,
    smallest: tuple[int, int] | None = None,
    background: str = BACKGROUND,
) -> np.ndarray:
    """Decodes one image in the fastest way: a JPEG by simplejpeg if that is installed, anything else by Pillow.

    Args:
      encoded: the encoded image.
      channels: channels of the result, 1 (grey) or 3 (RGB).
      name: what a message calls the image.
      smallest: the (height, width) that suffice. A JPEG may then be decoded at 1/2, 1/4 or 1/8 of its size, but no
        smaller than this.
      background: the colour behind transparent parts, by name or as #rrggbb.

    Returns:
      uint8 [height, width, channels], upright.

    Raises:
      UserError: as in `open_stream`.
    """
    if simplejpeg is not None and encoded[:2] == _JPEG:
        orientation = orientation_of(encoded)
        height, width = (smallest or (0, 0))[:: -1 if orientation > 4 else 1]
        factor = 2 if smallest else 1
        try:
            full = simplejpeg.decode_jpeg_header(encoded)
            check_pixels(int(full[0]), int(full[1]), name)
            pixels = simplejpeg.decode_jpeg(
                encoded, "GRAY" if channels == 1 else "RGB", min_height=height, min_width=width, min_factor=factor
            )
            return np.ascontiguousarray(_UPRIGHT[orientation](pixels)) if orientation > 1 else pixels
        except UserError:
            raise
        except ValueError:  # CMYK, damaged, or odd in a way that Pillow may tolerate.
            pass
    return to_pixels(open_stream(io.BytesIO(encoded), "L" if channels == 1 else "RGB", name, background))


def to_pixels(image: Image.Image) -> np.ndarray:
    """Converts a grey or RGB image to an array.

    Args:
      image: an image of mode "L" or "RGB".

    Returns:
      uint8 [H, W, C], with C 1 or 3.
    """
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
