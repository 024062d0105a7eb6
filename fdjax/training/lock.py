"""A lock that keeps a workdir for one process at a time. It is released when the process ends, even if it is killed."""

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
    """Locks a workdir, which has to exist, against other runs; the lock file of a killed process is no obstacle.

    Raises:
      UserError: if another process holds the lock; the message says which.
    """
    descriptor = _acquire(folder / LOCK_FILE)
    try:
        yield
    finally:
        if descriptor is not None:
            # The file is removed while the lock is held, so that a process that has opened it meanwhile can see that it
            # is no longer the file of this name.
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
    """Returns which process holds a workdir's lock, such as "process 12 on HOST"; None if none is known to."""
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
