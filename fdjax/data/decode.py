"""Encoded pictures to pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fdjax.errors import UserError

try:
    import simplejpeg
except ImportError:  # Pillow then does it all, at less than half of the speed.
    simplejpeg = None

_JPEG = b"\xff\xd8"
# H and W, one number for both, or None for an image's own.
Size = int | tuple[int, int] | None
# What shines through where a picture is transparent, unless told otherwise.
BACKGROUND = "white"
# As many as Pillow opens. In memory such a picture has half a gigabyte.
MOST_PIXELS = 178_956_970
_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258
_EXIF, _EXIF_WITHIN = b"Exif\x00\x00", 1 << 16
# How the pixels of each EXIF orientation are brought upright.
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
    """(H, W) of a size."""
    return (size, size) if isinstance(size, int) else size


def load_image(file: str, shape: tuple[int, int, int], share: float = 1.0, background: str = BACKGROUND) -> np.ndarray:
    """Reads one picture as a data set's images are read: its middle, resized.

    Args:
      file: in any format that Pillow opens.
      shape: (H, W, C) of the result; C is 1 (grey) or 3 (RGB).
      share: of the largest part of that form in the picture's middle that is taken, by its sides.
      background: the colour behind what is transparent, by name or as #rrggbb.

    Returns:
      uint8 [H, W, C], 0..255.

    Raises:
      UserError: the file cannot be read or is no picture.
    """
    height, width, channels = shape
    image = open_file(file, "L" if channels == 1 else "RGB", background)
    return to_pixels(fit_middle(image, (height, width), share))


def open_file(file: str, mode: str, background: str = BACKGROUND) -> Image.Image:
    """As `open_stream`, of a file; raises UserError where it cannot be read."""
    try:
        stream = open(file, "rb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"the file {file} cannot be read: {error.strerror}") from error
    with stream:
        return open_stream(stream, mode, file, background)


def open_stream(stream: Any, mode: str, name: str, background: str = BACKGROUND) -> Image.Image:
    """Decodes one image.

    Args:
      stream: of the encoded image.
      mode: Pillow's name of the wanted form, "L" or "RGB"; palettes, transparency, CMYK and 9 to 16 bits are brought to
        it.
      name: what a message calls the image.
      background: the colour behind what is transparent.

    Returns:
      The image, upright.

    Raises:
      UserError: it is no image, damaged, very large, or has 32-bit pixels.
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
        raise UserError(f"{name} is no image that Pillow can open") from error
    except Image.DecompressionBombError as error:
        raise _too_large(name, "") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on a damaged file
        raise UserError(f"{name} is a damaged or unsupported image: {error}") from error


def check_pixels(height: int, width: int, name: str) -> None:
    """Raises `UserError` for an image with more pixels than are read."""
    if height * width > MOST_PIXELS:
        raise _too_large(name, f" of {width:,} by {height:,} pixels")


def _too_large(name: str, size: str) -> UserError:
    return UserError(
        f"{name} is a picture{size} with more than {MOST_PIXELS / 1e6:.0f} million pixels, which are not read; make it "
        "smaller, or leave it out"
    )


def _in_mode(image: Image.Image, mode: str, name: str, background: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if deep:
        # A TIFF may hold 9 to 15 bits in 16; Pillow brings all others to the full range of 16.
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
        bits = bits[0] if isinstance(bits, tuple) else bits
        if not 9 <= bits <= 16:
            raise UserError(f"{name} has {bits} bits a pixel in a form that is not known; 8 or 16 bits are supported")
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
    """Resizes the middle of an image, as large as it can be in the result's form, to a size (bilinear, antialiased).

    Args:
      image: of any size.
      size: of the result; None leaves the image as it is.
      share: sides of that part, as a share of the largest. 0.875 of a square is what resizing the shorter side to 256
        and cutting out 224 x 224 gives, ImageNet's custom.
    """
    if size is None or (share == 1 and image.size == sides(size)[::-1]):
        return image
    height, width = sides(size)
    scale = share * min(image.width / width, image.height / height)
    wide, high = scale * width, scale * height
    left, top = (image.width - wide) / 2, (image.height - high) / 2
    if share == 1 and height == width:
        left, top = left // 1, top // 1
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, left + wide, top + high))


def orientation_of(encoded: bytes) -> int:
    """The EXIF orientation of an encoded JPEG, 1 to 8; 1 is upright, and where it says nothing."""
    if encoded.find(_EXIF, 0, _EXIF_WITHIN) < 0:
        return 1
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # whoever decodes it says what is wrong
        return 1
    return found if found in _UPRIGHT else 1


def read_pixels(
    encoded: bytes,
    channels: int,
    name: str,
    smallest: tuple[int, int] | None = None,
    background: str = BACKGROUND,
) -> np.ndarray:
    """Decodes one image as fast as we can: a JPEG by simplejpeg where it is installed, anything else by Pillow.

    Args:
      encoded: the image.
      channels: 1 (grey) or 3 (RGB) of the result, whatever the image has.
      name: what a message calls it.
      smallest: (height, width) that are enough: a JPEG may then come at 1/2, 1/4 or 1/8 of its size, but no smaller.
      background: the colour behind what is transparent.

    Returns:
      uint8 [height, width, channels], upright.

    Raises:
      UserError: as `open_stream`.
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
        except ValueError:  # CMYK, damaged, or odd in a way that Pillow forgives: it decides
            pass
    return to_pixels(open_stream(io.BytesIO(encoded), "L" if channels == 1 else "RGB", name, background))


def to_pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, C] of a grey or RGB image."""
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]
