"""Zip archives of foreign origin: the sizes that they declare are checked before any member is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from fdjax.errors import UserError

# Weights hardly compress, and frameworks store them uncompressed; a zip bomb unpacks to a thousand times its size.
_MOST_TIMES, _FREE_BYTES = 20, 1 << 20


def most_bytes(size: int) -> int:
    """Returns the most bytes that a weights file of `size` bytes may unpack to."""
    return _FREE_BYTES + _MOST_TIMES * size


def check_archive(archive: zipfile.ZipFile, file: Path) -> None:
    """Raises `UserError` if members unpack to far more than the file's size, or are packed in an unusual way."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > most_bytes(file.stat().st_size):
        raise UserError(
            f"{file} is an archive of {file.stat().st_size:,} bytes that would unpack to {total:,}; weights do not "
            "compress like that: it is damaged, or was made to fill the memory"
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise UserError(f"{file} is an archive whose member {member.filename!r} is encrypted or packed by an "
                            "unusual method; save the weights again")  # fmt: skip
