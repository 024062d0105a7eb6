"""Zip archives that others wrote: what they say that they hold is looked at before any of it is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

from fdjax.errors import UserError

# Weights hardly compress, and their frameworks store them as they are; a bomb unpacks to a thousand times its size.
_MOST_TIMES, _FREE_BYTES = 20, 1 << 20


def most_bytes(size: int) -> int:
    """How many bytes a weights file of `size` bytes may at most hold."""
    return _FREE_BYTES + _MOST_TIMES * size


def check_archive(archive: zipfile.ZipFile, file: Path) -> None:
    """Raises `UserError` where members unpack to far more than the file has, or are packed in an odd way."""
    members = archive.infolist()
    total = sum(member.file_size for member in members)
    if total > most_bytes(file.stat().st_size):
        raise UserError(
            f"{file} is an archive of {file.stat().st_size:,} bytes that would unpack to {total:,}; weights do not "
            "compress like that: it is damaged, or was made to fill the memory"
        )
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or member.flag_bits & 1:
            raise UserError(f"{file} is an archive whose member {member.filename!r} is encrypted or packed by an odd "
                            "method; save the weights again")  # fmt: skip
