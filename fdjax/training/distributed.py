"""Joins several processes into one run, through `jax.distributed`.

`jax.distributed` aborts a process with a stack trace when another process is missing or when there are too many. A roll
call at the same address comes first, so that each process can print one clear message instead: process 0 waits for the
others, and tells them whether all are there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping

import jax

from fdjax.errors import STOPPED_STATUS, UserError, first_line

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_AUTO = "auto"
# Seconds after which the other processes end when one has died silently, or has ended with an error.
_HEARTBEAT_TIMEOUT, _SHUTDOWN_TIMEOUT = 60, 20
_LONGEST_MESSAGE = 1 << 16
# What the error message of a collective operation says when another process has died.
_GONE = re.compile(r"closed by peer|reset by peer|Broken pipe", re.I)
# The fields of a process's first message, and the seconds within which it has to send it once it is connected.
_HELLO = {"process": int, "processes": int, "fingerprint": str}
_HELLO_TIMEOUT = 2.0


@dataclasses.dataclass(frozen=True)
class Membership:
    """The place of this process in a run of several.

    Attributes:
      address: (host, port) at which process 0 listens.
      processes: number of processes.
      process: number of this process, from 0.
    """

    address: tuple[str, int]
    processes: int
    process: int

    @property
    def place(self) -> str:
        """The address as the user gave it."""
        return f"{self.address[0]}:{self.address[1]}"


def membership(
    coordinator: str | None, processes: int | None, process: int | None, environment: Mapping[str, str]
) -> Membership | None:
    """Combines the flags with the environment's variables.

    Returns:
      The membership; None for a run in one process.

    Raises:
      UserError: if a value is missing or not possible.
    """
    coordinator = coordinator or environment.get(ADDRESS)
    counts = {}
    for name, given in ((PROCESSES, processes), (PROCESS, process)):
        text = environment.get(name) if given is None else str(given)
        if text is not None and not text.isdecimal():
            raise UserError(f"{name} is {text!r}; it must be a whole number")
        counts[name] = None if text is None else int(text)
    processes, process = counts[PROCESSES], counts[PROCESS]
    if coordinator is None:
        if processes is not None and processes > 1:
            raise UserError(f"{processes} processes need --coordinator HOST:PORT (or {ADDRESS}), where process 0 runs")
        return None
    if processes is None or process is None:
        raise UserError(
            f"--coordinator {coordinator} needs --num-processes N and --process-id I (or {PROCESSES} and {PROCESS})"
        )
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}; {processes} processes are numbered 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--coordinator {coordinator!r} must be HOST:PORT, such as 10.0.0.1:9000")
    return Membership((host, int(port)), processes, process)


def join(coordinator: str | None, processes: int | None, process: int | None, timeout: float, fingerprint: str) -> None:
    """Joins the run that the flags or the environment name; does nothing for a run in one process.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" on a cluster that jax knows (Slurm, TPU pods, MPI, Kubernetes).
      processes: number of processes.
      process: number of this process, from 0.
      timeout: seconds to wait for the others.
      fingerprint: a hash of what the run will do; all processes have to pass the same.

    Raises:
      UserError: if a process is missing, is one too many, or was started for another run.
    """
    if coordinator == _AUTO:
        try:
            jax.distributed.initialize(initialization_timeout=round(timeout))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--coordinator auto: jax does not know this cluster: {error}") from error
        return
    member = membership(coordinator, processes, process, os.environ)
    if member is None or member.processes == 1:
        return
    if member.process == 0:
        call_roll(member, timeout, fingerprint)
    else:
        answer_roll(member, timeout, fingerprint)
    # This service would catch SIGTERM to announce a preemption; here SIGTERM ends the process, which can resume.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        member.place,
        member.processes,
        member.process,
        initialization_timeout=max(10, round(timeout)),
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
        shutdown_timeout_seconds=_SHUTDOWN_TIMEOUT,
    )


@contextlib.contextmanager
def ends_with_its_peers() -> Iterator[None]:
    """Prints one line and ends the process with status 1 when another process of the run has died.

    It does not raise an exception: on a normal exit jax would wait for the others and abort with a stack trace.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _GONE.search(str(error)):
            raise
        others = sorted({*range(jax.process_count())} - {jax.process_index()})
        which = f"process {others[0]}" if len(others) == 1 else f"one of processes {', '.join(map(str, others))}"
        print(
            f"error: {which} of the run is gone ({first_line(error)}); start all processes again with the same "
            "command: the run resumes from its last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        sys.stdout.flush()
        os._exit(STOPPED_STATUS)


def call_roll(member: Membership, timeout: float, fingerprint: str) -> None:
    """Does the roll call in process 0: waits for the other processes, and then releases all of them at once.

    Raises:
      UserError: if process 0 cannot listen at the address, or a process does not come in time.
    """
    deadline = time.monotonic() + timeout
    present: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", member.address[1]), backlog=member.processes, reuse_port=False)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {member.address[1]} of --coordinator {member.place} ({error.strerror}); "
            "give a free port"
        ) from error
    try:
        while len(present) < member.processes - 1:
            left = deadline - time.monotonic()
            if left <= 0:
                raise _missing(member, present, timeout)
            server.settimeout(left)
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise _missing(member, present, timeout) from None
            _admit(connection, member, present, fingerprint)
        for connection in present.values():
            _say(connection, "")
    finally:
        server.close()
        # If the others close their connections first, the port is free for jax at once.
        for connection in present.values():
            connection.settimeout(1.0)
            with contextlib.suppress(OSError):
                connection.recv(1)
            connection.close()


def _missing(member: Membership, present: Mapping[int, socket.socket], timeout: float) -> UserError:
    absent = [str(process) for process in range(1, member.processes) if process not in present]
    which = f"process {absent[0]} is" if len(absent) == 1 else f"processes {', '.join(absent)} are"
    message = (
        f"{which} missing: {len(present) + 1} of {member.processes} processes came to {member.place} within "
        f"{timeout:g} s; start all of them, or wait longer (--connect-timeout)"
    )
    for connection in present.values():
        _say(connection, message)
    return UserError(message)


def _admit(connection: socket.socket, member: Membership, present: dict[int, socket.socket], fingerprint: str) -> None:
    """Adds a process to those that are present, or tells it why it is rejected."""
    hello = _hear(connection, _HELLO_TIMEOUT)
    problem = None
    if hello is None or any(type(hello.get(name)) is not kind for name, kind in _HELLO.items()):
        problem = "this is the roll call of an fdjax run"
    elif hello["processes"] != member.processes or not 0 < hello["process"] < member.processes:
        problem = (
            f"the coordinator at {member.place} expects {member.processes} processes, numbered 0 to "
            f"{member.processes - 1}; this one is {hello['process']} of {hello['processes']}"
        )
    elif hello["process"] in present:
        problem = f"process {hello['process']} has already come to {member.place}; give each its own --process-id"
    elif hello["fingerprint"] != fingerprint:
        problem = (
            f"process {hello['process']} was given another config, workdir or --init than process 0 at {member.place}; "
            "start all with the same"
        )
    if problem is not None:
        _say(connection, problem)
        connection.close()
    elif hello is not None:
        present[hello["process"]] = connection


def answer_roll(member: Membership, timeout: float, fingerprint: str) -> None:
    """Does the roll call in the other processes: reports to process 0 and waits for its answer.

    Raises:
      UserError: if process 0 cannot be reached in time, or rejects this process.
    """
    deadline = time.monotonic() + timeout
    connection = None
    while connection is None:
        try:
            connection = socket.create_connection(member.address, timeout=max(0.1, deadline - time.monotonic()))
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"process 0 is missing: nothing answers at {member.place} within {timeout:g} s ({error}); start it "
                    "there, or wait longer (--connect-timeout)"
                ) from error
            time.sleep(0.1)
    with connection:
        hello = {"process": member.process, "processes": member.processes, "fingerprint": fingerprint}
        with contextlib.suppress(OSError):  # If this fails, no answer comes either.
            connection.sendall(json.dumps(hello).encode() + b"\n")
        # Process 0 has its own timeout, which may have begun later than ours.
        answer = _hear(connection, 2 * timeout + 10)
    if answer is None or "problem" not in answer:
        raise UserError(
            f"process 0 at {member.place} did not answer process {member.process}: it has ended, or its run has begun "
            "without this one; start all processes again"
        )
    if answer["problem"]:
        raise UserError(answer["problem"])


def _say(connection: socket.socket, problem: str) -> None:
    with contextlib.suppress(OSError):  # The other process has ended; jax notices if it was needed.
        connection.sendall(json.dumps({"problem": problem}).encode() + b"\n")


def _hear(connection: socket.socket, timeout: float) -> dict | None:
    """Receives one line of JSON; returns None if none comes in time."""
    connection.settimeout(timeout)
    heard = b""
    try:
        while not heard.endswith(b"\n") and len(heard) < _LONGEST_MESSAGE:
            more = connection.recv(4096)
            if not more:
                return None
            heard += more
        message = json.loads(heard)
    except (OSError, ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
