"""Executes commands of fdjax one after the other in another process, and records their output, memory and time."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import multiprocessing
import re
import time
import traceback
from pathlib import Path
from typing import Any

# Seconds after which a command counts as hanging.
TIME_LIMIT = 120.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of a command.

    Attributes:
      status: its exit status; None if it ended by an exception, or not at all.
      out: its standard output.
      err: its standard error, with the traceback of an exception.
      seconds: its time.
      grown: the most bytes of memory that it added to the process.
    """

    status: int | None
    out: str
    err: str
    seconds: float
    grown: int

    def problem(self) -> str | None:
        """Returns what is wrong with its end, whatever the command was; None if nothing is."""
        if self.status is None:
            return f"ended by {self.err.strip().splitlines()[-1][:200]}"
        if "Traceback" in self.err or "Traceback" in self.out:
            return "printed a traceback"
        if self.status not in (0, 1, 2):
            return f"exit status {self.status}"
        lines = self.err.strip().splitlines()
        if self.status and not any("error" in line.lower() for line in lines):
            return f"exit status {self.status} without a word"
        message = "\n".join(lines).split("error: ")[-1].splitlines()
        if self.status and len(message) > 12:
            return f"a message of {len(message)} lines"
        return None


def _memory(name: str) -> int:
    """Returns the memory of the process in bytes: VmRSS, or VmHWM for its peak."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) * 1024 if found else 0


def _weights(path: str) -> str:
    """Returns a checksum of a checkpoint's weights, statistics and masks."""
    import jax

    from fdjax.training.restore import open_checkpoint

    _, _, restored = open_checkpoint(path)
    leaves = jax.tree.leaves(jax.device_get(restored.state.collections()))
    return hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest()


def _run(arguments: list[str]) -> int:
    name, rest = arguments[0], arguments[1:]
    if name == "train":
        from fdjax.commands.train import train_command

        return train_command(rest)
    if name == "eval":
        from fdjax.commands.evaluate import eval_command

        return eval_command(rest)
    if name == "weights":
        print(_weights(rest[0]))
        return 0
    from fdjax.commands.main import fdjax_command

    return fdjax_command(arguments)


def _outcome(arguments: list[str]) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, began, status = _memory("VmRSS"), time.monotonic(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = _run(arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
    grown = max(0, _memory("VmHWM") - before)
    return Outcome(status, out.getvalue(), err.getvalue(), time.monotonic() - began, grown)


def _serve(pipe: Any) -> None:
    from fdjax import runtime

    runtime.setup()
    while True:
        pipe.send(_outcome(pipe.recv()))


class Worker:
    """A process that executes commands; it is replaced after it hangs or dies, and after `most` commands."""

    def __init__(self, most: int = 200):
        self._most, self._done, self._process, self._pipe = most, 0, None, None

    def run(self, *arguments: str) -> Outcome:
        """Executes `fdjax ...`, `train ...`, `eval ...`, or `weights DIR`, which prints a checksum."""
        if self._process is None or self._done >= self._most:
            self.close()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._done = 0
        assert self._pipe is not None
        self._pipe.send(list(arguments))
        self._done += 1
        try:
            if self._pipe.poll(TIME_LIMIT):
                return self._pipe.recv()
            said = f"nothing after {TIME_LIMIT:.0f} s"
        except (EOFError, ConnectionError):
            said = "the death of its process"
        self.close()
        return Outcome(None, "", said, TIME_LIMIT, 0)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
