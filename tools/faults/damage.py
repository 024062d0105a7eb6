"""Ways to damage a file with a seeded generator of random numbers; each returns what it did."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values that replace others in a JSON file.
_ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), "", "x" * 5000, [], {}, [[]], {"a": 1}, "0", -0.5, [None], "\u0000",
)  # fmt: skip


def _delete(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "deleted"


def _empty(file: Path, rng: random.Random) -> str:
    file.write_bytes(b"")
    return "emptied"


def _truncate(file: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    length = rng.randrange(len(content)) if content else 0
    file.write_bytes(content[:length])
    return f"cut off after {length} of {len(content)} bytes"


def _flip_a_bit(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        return _append(file, rng)
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def _scramble(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        return _append(file, rng)
    places = [rng.randrange(len(content)) for _ in range(rng.randint(2, 20))]
    for place in places:
        content[place] = rng.randrange(256)
    file.write_bytes(content)
    return f"{len(places)} bytes replaced"


def _zero(file: Path, rng: random.Random) -> str:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content)) if content else 0
    length = min(rng.randint(1, 4096), len(content) - start)
    content[start : start + length] = bytes(length)
    file.write_bytes(content)
    return f"{length} bytes from {start} on zeroed"


def _append(file: Path, rng: random.Random) -> str:
    length = rng.randint(1, 200)
    with file.open("ab") as stream:
        stream.write(rng.randbytes(length))
    return f"{length} random bytes appended"


def _directory(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "replaced by a directory"


def _dangling(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to("nowhere")
    return "replaced by a link to nothing"


def _noise(file: Path, rng: random.Random) -> str:
    length = rng.randint(1, 2000)
    file.write_bytes(rng.randbytes(length))
    return f"replaced by {length} random bytes"


def _other(file: Path, rng: random.Random) -> str:
    others = sorted(path for path in file.parent.iterdir() if path.is_file() and path != file)
    if not others:
        return _empty(file, rng)
    other = rng.choice(others)
    shutil.copyfile(other, file)
    return f"replaced by {other.name}"


BYTES: tuple[Callable[[Path, random.Random], str], ...] = (
    _delete, _empty, _truncate, _truncate, _flip_a_bit, _flip_a_bit, _scramble, _zero, _append, _directory, _dangling,
    _noise, _other,
)  # fmt: skip


def of_bytes(file: Path, rng: random.Random) -> str:
    """Damages a file as failing disks, bad copies and mistakes do."""
    return rng.choice(BYTES)(file, rng)


def of_itself(file: Path, rng: random.Random) -> str:
    """Damages a file as `of_bytes` does, but never replaces it by another sound file, which could not be detected."""
    return rng.choice([way for way in BYTES if way is not _other])(file, rng)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all values in a JSON value."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = [path]
    for key, item in items:
        found += _places(item, (*path, key))
    return found


def change_json(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Returns a JSON value with one thing changed, and a description of the change."""
    path: tuple[Any, ...] = rng.choice(_places(value)[1:] or [()])
    if not path:
        return rng.choice(_ODD), "all of it replaced"
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = rng.choice(("remove", "replace", "replace", "near", "double"))
    name, old = "/".join(map(str, path)), parent[path[-1]]
    if how == "near" and isinstance(old, int) and not isinstance(old, bool):
        parent[path[-1]] = old + rng.choice((-1, 1, 7))
        return value, f"{name}: {old} became {parent[path[-1]]}"
    if how == "remove":
        del parent[path[-1]]
        return value, f"{name} removed"
    if how == "double" and isinstance(parent, list):
        parent.insert(path[-1], old)
        return value, f"{name} said twice"
    parent[path[-1]] = rng.choice(_ODD)
    return value, f"{name} became {str(parent[path[-1]])[:30]!r}"


def of_json(file: Path, rng: random.Random) -> str:
    """Changes one thing in a JSON file, which is still valid JSON."""
    value, said = change_json(json.loads(file.read_text()), rng)
    file.write_text(json.dumps(value))
    return said
