"""Stops a run on a signal or at a time limit. The run saves and stops within seconds, or it is ended without saving.

Python runs signal handlers between two bytecode instructions, which a long compilation or evaluation delays. Therefore
a separate thread listens for signals, and ends the process if the run does not stop by itself in time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from fdjax.errors import RunInterrupted

# Seconds from the request to stop until the process is ended in any case, unless it is saving.
PATIENCE = 4.5
# The exit status of the command `timeout`.
TIME_LIMIT_STATUS = 124
_HINT = "the same command goes on from there"


class Stopping:
    """A context manager that listens for SIGTERM, SIGINT and a time limit; outside the main thread, for the limit only.

    Args:
      deadline: the time, by `time.monotonic`, of the limit; None: no limit.
    """

    def __init__(self, deadline: float | None = None):
        self._deadline = deadline
        self._asked: tuple[str, int] | None = None
        self._saving = threading.Lock()
        self._before: dict[int, object] = {}
        self._old_fd = -1

    def __enter__(self) -> Stopping:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        if threading.current_thread() is threading.main_thread():
            self._old_fd = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                # A signal that is ignored, as SIGINT is for a shell's background jobs, stays ignored.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._listen, name="stopping", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._before:
            signal.set_wakeup_fd(self._old_fd)
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._before = {}
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    @property
    def asked(self) -> bool:
        """Whether the run should save and stop."""
        return self._asked is not None

    def check(self) -> None:
        """Raises `RunInterrupted` if the run should save and stop."""
        if self._asked is not None:
            raise self.interruption()

    def interruption(self) -> RunInterrupted:
        """Makes the exception that ends the run once it has saved."""
        reason, status = self._asked or ("another process of the run was told to end", 128 + signal.SIGTERM)
        return RunInterrupted(f"{reason}; {_HINT}", status)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A context in which the process is not ended, except by a second signal."""
        with self._saving:
            yield

    def _listen(self) -> None:
        until: float | None = None
        while True:
            waits = [
                end - time.monotonic() for end in (until, None if self.asked else self._deadline) if end is not None
            ]
            ready, _, _ = select.select([self._reader], [], [], max(0.0, min(waits)) if waits else None)
            if ready:
                number = self._reader.recv(1)[0]
                if number == 0:
                    return
                if number not in (signal.SIGTERM, signal.SIGINT):
                    continue
                if self.asked:
                    self._end_at_once(128 + number)
                name = "interrupted" if number == signal.SIGINT else "told to end (SIGTERM)"
                self._asked, until = (name, 128 + number), time.monotonic() + PATIENCE
            elif not self.asked:
                self._asked = ("the time limit is reached", TIME_LIMIT_STATUS)
                until = time.monotonic() + PATIENCE
            elif self._saving.acquire(blocking=False):
                self._end_at_once(self._asked[1])  # type: ignore[index]
            else:
                until = time.monotonic() + 0.1

    @staticmethod
    def _end_at_once(status: int) -> None:
        hint = "the same command goes on from the last checkpoint, if there is one"
        print(f"stopped at once; {hint}", file=sys.stderr, flush=True)
        os._exit(status)
