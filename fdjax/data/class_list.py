"""Files that list classes, one per line, as editors on any system write them."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from fdjax.errors import UserError

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_class_list(path: str, what: str = "--classes") -> tuple[str, ...]:
    """Reads the names in a file that lists classes; empty lines and spaces around names are ignored.

    Args:
      path: path of a text in UTF-8, or UTF-16 with a byte order mark, with any line ends.
      what: what messages call the file.

    Returns:
      The names, in order.

    Raises:
      UserError: the file cannot be read, has fewer than two names, or has one of them twice.
    """
    try:
        content = Path(path).expanduser().read_bytes()
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} cannot be read as text: save it as UTF-8 ({error})") from error
    names = tuple(name for line in re.split(r"\r\n|\r|\n", text) if (name := line.strip()))
    if len(names) < 2:
        raise UserError(f"{what} {path} must hold two or more different names, one per line; it has {len(names)}")
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{what} {path} must hold two or more different names, one per line; {name!r} occurs twice")
        seen.add(name)
    return names
