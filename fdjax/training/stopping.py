"""Being asked to stop: by a signal or a time limit. The run saves and stops within seconds, or without saving at once.

Python runs its signal handlers between two of its own instructions, which a long compilation or evaluation delays; so a
thread of its own is told of a signal by the interpreter, and ends the process where the run does not come round to it.
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

# Seconds from the request until the process ends in any case, unless it is saving.
PATIENCE = 4.5
# As `timeout` has it.
TIME_LIMIT_STATUS = 124
_HINT = "the same command goes on from there"


class Stopping:
    """Listens for SIGTERM, SIGINT and a time limit while it is entered, in the main thread; elsewhere for the limit.

    Args:
      deadline: the moment, by `time.monotonic`, at which the time is over; None for none.
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
                # What is ignored, as interruptions are in a shell's background, stays so.
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
        """Whether the run is to save and stop."""
        return self._asked is not None

    def check(self) -> None:
        """Raises `RunInterrupted` if the run is to save and stop."""
        if self._asked is not None:
            raise self.interruption()

    def interruption(self) -> RunInterrupted:
        """What ends the run once it has saved; in a run of several processes another one may have been asked."""
        reason, status = self._asked or ("another process of the run was told to end", 128 + signal.SIGTERM)
        return RunInterrupted(f"{reason}; {_HINT}", status)

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """What is done inside is not cut short, but by a second signal."""
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
        print("stopped at once; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        os._exit(status)
