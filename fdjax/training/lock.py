"""One process at a time works in a workdir: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from fdjax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = "run.lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a workdir, which exists, against other runs. What a killed process has left behind is taken over.

    Raises:
      UserError: another process holds it; the message says which.
    """
    descriptor = _acquire(folder / LOCK_FILE)
    try:
        yield
    finally:
        if descriptor is not None:
            # Removed while it is held: whoever opened it meanwhile sees that it is no longer the file of this name.
            (folder / LOCK_FILE).unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(file: Path) -> int | None:
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None  # A file system without locks.
            raise UserError(
                f"--workdir {file.parent}: {_holder(file)} is at work there; wait for it, or end it, or give another "
                "--workdir"
            ) from error
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def holder(folder: Path) -> str | None:
    """Who holds a workdir now, such as "process 12 on HOST"; None: nobody, or nobody knows. Nothing is changed."""
    if fcntl is None:
        return None
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return _holder(folder / LOCK_FILE) if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return None


def _holder(file: Path) -> str:
    try:
        holder = json.loads(file.read_text())
        return f"process {int(holder['process'])} on {str(holder['host'])[:100]}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
