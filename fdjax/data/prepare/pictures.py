"""Encoded pictures on their way into a set: each is decoded once, and rare forms are converted to common ones."""

from __future__ import annotations

import io

from PIL import Image

from fdjax.data.decode import open_stream, read_pixels
from fdjax.data.prepare.source import DamagedExample
from fdjax.errors import UserError

_QUALITY = 100


def checked_picture(encoded: bytes, name: str, wanted: str | None = None) -> bytes:
    """Decodes a picture to check that it is whole, and returns the bytes to store.

    JPEG and PNG in grey or RGB stay byte for byte. What TFDS's readers would not accept is encoded again: CMYK as JPEG
    of quality 100 (as TFDS does), other formats and pixel forms as PNG.

    Args:
      encoded: the contents of the file.
      name: what a message calls the picture.
      wanted: "JPEG" or "PNG" if the set has one format only.

    Returns:
      The encoded picture.

    Raises:
      DamagedExample: the picture cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(encoded))
        # A multi-picture file is a JPEG with others after it.
        form = "JPEG" if image.format == "MPO" else image.format
        plain = image.mode in ("L", "RGB") and form in ("JPEG", "PNG") and "transparency" not in image.info
        if plain and wanted in (None, form):
            read_pixels(encoded, 1 if image.mode == "L" else 3, name)
            return encoded
        rgb, target = open_stream(io.BytesIO(encoded), "RGB", name), wanted or "PNG"
        if form == "JPEG" and wanted is None:
            target = "JPEG"
    except UserError as error:
        raise DamagedExample(str(error)) from error
    except Exception as error:  # Pillow's plugins raise almost any exception on a damaged file.
        raise DamagedExample(f"{name} is not an image that Pillow can open") from error
    stored = io.BytesIO()
    rgb.save(stored, target, **({"quality": _QUALITY, "subsampling": 0} if target == "JPEG" else {}))
    return stored.getvalue()
