"""Several processes: the roll call before they join, whole runs on two, and what the command says when one is wrong."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from fdjax.checkpoint import CHECKPOINT_FOLDER, MANIFEST, Checkpoints
from fdjax.commands.train import train_command
from fdjax.errors import STOPPED_STATUS, UserError
from fdjax.training.distributed import ADDRESS, PROCESS, PROCESSES, Membership, answer_roll, call_roll, membership
from fdjax.training.restore import restore
from tests.tiny_run import STEPS

ROOT = Path(__file__).parents[1]
SAME = "the same run"


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def port() -> int:
    return free_port()


def member(port: int, processes: int, process: int) -> Membership:
    return Membership(("localhost", port), processes, process)


class Attempt(threading.Thread):
    """One process's part in the roll call, in a thread: `error` is None if it may go on."""

    def __init__(self, who: Membership, timeout: float, fingerprint: str = SAME):
        super().__init__(daemon=True)
        self._arguments = (who, timeout, fingerprint)
        self.error: BaseException | None = None
        self.seconds = float("inf")
        self.start()

    def run(self) -> None:
        begin = time.monotonic()
        try:
            (call_roll if self._arguments[0].process == 0 else answer_roll)(*self._arguments)
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - begin

    def message(self) -> str:
        """What it says; it must have been sent away within 20 s."""
        self.join(20)
        assert not self.is_alive()
        assert isinstance(self.error, UserError), self.error
        return str(self.error)

    def passed(self) -> bool:
        self.join(20)
        assert not self.is_alive()
        return self.error is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_all_go_on_when_all_are_there(port, order):
    attempts = []
    for process in order:
        attempts.append(Attempt(member(port, 3, process), 10.0))
        time.sleep(0.2)
    assert all(attempt.passed() for attempt in attempts)
    # jax is to listen there next.
    socket.create_server(("", port)).close()


def test_all_are_told_who_is_missing(port):
    attempts = [Attempt(member(port, 4, process), 1.0) for process in (0, 2)]
    for attempt in attempts:
        message = attempt.message()
        assert "processes 1, 3 are missing" in message
        assert "2 of 4 processes" in message
        assert f"localhost:{port} within 1 s" in message
        assert attempt.seconds < 4
    alone = Attempt(member(port, 2, 0), 0.5)
    assert "process 1 is missing: 1 of 2" in alone.message()


def test_process_0_that_does_not_come_is_missed(port):
    attempt = Attempt(member(port, 2, 1), 1.0)
    message = attempt.message()
    assert "process 0 is missing" in message
    assert f"localhost:{port}" in message
    assert 0.9 < attempt.seconds < 4


@pytest.mark.parametrize(
    ("processes", "process", "fingerprint", "expected"),
    [
        (3, 2, SAME, "expects 2 processes, numbered 0 to 1; this one is 2 of 3"),
        (3, 1, SAME, "this one is 1 of 3"),
        (2, 1, "another run", "was given another config, workdir or --init"),
    ],
)
def test_one_that_does_not_belong_is_sent_away_and_the_others_go_on(port, processes, process, fingerprint, expected):
    first = Attempt(member(port, 2, 0), 10.0)
    stranger = Attempt(member(port, processes, process), 10.0, fingerprint)
    message = stranger.message()
    assert expected in message
    assert f"localhost:{port}" in message
    assert first.is_alive()
    assert Attempt(member(port, 2, 1), 10.0).passed()
    assert first.passed()


def test_a_number_that_is_taken_is_refused_and_the_others_go_on(port):
    first, second = (Attempt(member(port, 3, process), 10.0) for process in (0, 1))
    time.sleep(0.5)
    assert "process 1 has already come" in Attempt(member(port, 3, 1), 10.0).message()
    assert Attempt(member(port, 3, 2), 10.0).passed()
    assert first.passed()
    assert second.passed()


GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "bytes": bytes(range(128, 256)) + b"\n",
    "number": b"7\n",
    "empty object": b"{}\n",
    "part of a hello": b'{"process": 1}\n',
    "no fingerprint": b'{"process": 1, "processes": 2}\n',
    "text for a number": b'{"process": "1", "processes": 2, "fingerprint": "the same run"}\n',
    "list for a number": b'{"process": [1], "processes": 2, "fingerprint": "the same run"}\n',
    "fraction": b'{"process": 0.5, "processes": 2, "fingerprint": "the same run"}\n',
    "deep": b"[" * 60_000 + b"\n",
    "long": b"x" * 200_000,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_process_of_a_run_does_not_break_the_roll_call(port, name):
    first = Attempt(member(port, 2, 0), 15.0)
    deadline = time.monotonic() + 5
    while True:
        try:
            connection = socket.create_connection(("localhost", port), timeout=5)
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    with connection, contextlib.suppress(OSError):
        connection.sendall(GARBAGE[name])
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    time.sleep(0.1)
    second = Attempt(member(port, 2, 1), 5.0)
    assert first.passed(), first.error
    assert second.passed(), second.error


def test_one_that_connects_and_says_nothing_does_not_hold_up_the_others(port):
    first = Attempt(member(port, 2, 0), 15.0)
    time.sleep(0.3)
    with socket.create_connection(("localhost", port), timeout=5):
        assert Attempt(member(port, 2, 1), 10.0).passed()
        assert first.passed()


def test_a_port_in_use_is_said():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        message = Attempt(member(port, 2, 0), 1.0).message()
    assert f"cannot listen on port {port}" in message
    assert "give a free port" in message


def test_something_else_at_the_address_is_said():
    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

    with socket.create_server(("", 0)) as server:
        threading.Thread(target=serve, args=(server,), daemon=True).start()
        message = Attempt(member(server.getsockname()[1], 2, 1), 1.0).message()
    assert "did not answer process 1" in message


# -- flags and environment


def test_flags_go_before_the_environment():
    environment = {ADDRESS: "there:1", PROCESSES: "4", PROCESS: "3"}
    assert membership(None, None, None, environment) == Membership(("there", 1), 4, 3)
    assert membership("here:2", 2, 0, environment) == Membership(("here", 2), 2, 0)
    assert membership(None, None, 1, environment) == Membership(("there", 1), 4, 1)
    assert Membership(("here", 2), 2, 0).place == "here:2"


def test_one_process_is_no_membership():
    assert membership(None, None, None, {}) is None
    assert membership(None, 1, 0, {}) is None


@pytest.mark.parametrize(
    ("flags", "environment", "expected"),
    [
        ((None, 2, 0), {}, "2 processes need --coordinator HOST:PORT"),
        ((None, None, None), {PROCESSES: "2"}, "need --coordinator"),
        (("here:1", None, 0), {}, "needs --num-processes N and --process-id I"),
        (("here:1", 2, None), {}, "needs --num-processes N and --process-id I"),
        ((None, None, None), {ADDRESS: "here:1"}, "needs --num-processes"),
        (("here", 2, 0), {}, "must be HOST:PORT"),
        ((":1", 2, 0), {}, "must be HOST:PORT"),
        (("here:", 2, 0), {}, "must be HOST:PORT"),
        (("here:http", 2, 0), {}, "must be HOST:PORT"),
        (("here:0", 2, 0), {}, "must be HOST:PORT"),
        (("here:65536", 2, 0), {}, "must be HOST:PORT"),
        (("here:1", 2, 2), {}, "--process-id is 2; 2 processes are numbered 0 to 1"),
        (("here:1", 2, -1), {}, "whole number"),
        (("here:1", 0, 0), {}, "0"),
        (("here:1", None, 0), {PROCESSES: "two"}, f"{PROCESSES} is 'two'"),
        (("here:1", 2, None), {PROCESS: "1.5"}, f"{PROCESS} is '1.5'"),
    ],
)
def test_what_is_missing_or_impossible_is_refused(flags, environment, expected):
    with pytest.raises(UserError) as refused:
        membership(*flags, environment)
    assert expected in str(refused.value)


# -- the command


def command(*arguments: str) -> list[str]:
    return [sys.executable, "train.py", "--config", "tests/tiny_run.py", *arguments]


def environment(fake_devices: int = 1) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in (ADDRESS, PROCESSES, PROCESS)}
    flags = f"--xla_force_host_platform_device_count={fake_devices}" if fake_devices > 1 else ""
    return {**inherited, "PYTHONPATH": str(ROOT), "NPROC": "16", "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--devices", "2"], ["--devices 2", "this process has 1"]),
        (["--model.precision", "bfloat16"], ["bfloat16", "cpu", "float32"]),
        (["--process-id", "5", "--num-processes", "2", "--coordinator", "localhost:1"], ["--process-id is 5"]),
        (["--num-processes", "2", "--process-id", "0"], ["--coordinator HOST:PORT"]),
    ],
)
def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, arguments, expected):
    for name in (ADDRESS, PROCESSES, PROCESS):
        monkeypatch.delenv(name, raising=False)
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train_command(["--config", str(ROOT / "tests" / "tiny_run.py"), "--workdir", str(workdir), *arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and len(said.splitlines()) == 1
    assert all(part in said for part in expected)
    assert not workdir.exists()


def test_a_batch_that_devices_do_not_divide_is_refused_in_one_line(tmp_path):
    workdir = tmp_path / "run"
    result = subprocess.run(
        command("--workdir", str(workdir), "--devices", "3"),
        cwd=ROOT, env=environment(fake_devices=4), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert all(part in result.stderr for part in ("data.batch_size is 16", "3 devices", "15 or 18"))
    assert not workdir.exists()


@pytest.mark.parametrize(("present", "absent"), [(0, 1), (1, 0)])
def test_the_command_names_the_process_that_does_not_come(tmp_path, port, present, absent):
    begin = time.monotonic()
    result = subprocess.run(
        command(
            "--workdir", str(tmp_path / "run"), "--coordinator", f"localhost:{port}", "--num-processes", "2",
            "--process-id", str(present), "--connect-timeout", "2",
        ),
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - begin < 20
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert f"process {absent} is missing" in result.stderr
    assert f"localhost:{port}" in result.stderr
    assert not (tmp_path / "run").exists()


# -- whole runs

PHASES = ("pretrain", "learn")


def compiled_quickly(variables: dict[str, str]) -> dict[str, str]:
    return {**variables, "XLA_FLAGS": variables["XLA_FLAGS"] + " --xla_backend_optimization_level=0"}


@contextlib.contextmanager
def two_processes(workdir: Path, logs: Path) -> Iterator[list[subprocess.Popen]]:
    """Starts a run on two processes of this machine, and kills what is left of it at the end."""
    logs.mkdir()
    place = ("--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--connect-timeout", "60")
    # Process 1 finds nothing in the compilation cache, which process 0 fills: let it compile quickly.
    quick = compiled_quickly(environment())
    processes: list[subprocess.Popen] = []
    try:
        for process in (0, 1):
            with (logs / f"{process}.out").open("w") as out, (logs / f"{process}.err").open("w") as err:
                arguments = command(
                    "--workdir", str(workdir), "--phases", *PHASES, *place, "--process-id", str(process)
                )
                started = subprocess.Popen(arguments, cwd=ROOT, env=quick, stdout=out, stderr=err)
            processes.append(started)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait(30)


def records(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_and_one(tmp_path_factory) -> tuple[Path, Path, Path]:
    """Workdirs of a run on two processes, killed once, and of the same run on one; and the folder of the logs.

    The one process has two devices, so that each device computes the same in both runs, on any processor:
    only who adds up the gradients differs. tests/test_devices.py compares several devices with one.
    """
    folder = tmp_path_factory.mktemp("distributed")
    two, one = folder / "two", folder / "one"
    wanted = two / CHECKPOINT_FOLDER / "4" / MANIFEST
    with two_processes(two, folder / "killed") as processes:
        deadline = time.monotonic() + 200
        while not wanted.exists() and time.monotonic() < deadline:
            assert all(process.poll() is None for process in processes), (folder / "killed/0.err").read_text()
            time.sleep(0.005)
        # The other one notices, and says so.
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(90) == STOPPED_STATUS, (folder / "killed/0.err").read_text()
    assert "process 1 of the run is gone" in (folder / "killed/0.err").read_text()
    assert wanted.exists(), (folder / "killed/0.err").read_text()
    assert not (two / "summary.json").exists()
    with two_processes(two, folder / "logs") as processes:
        for process in processes:
            assert process.wait(200) == 0, "\n".join(file.read_text() for file in (folder / "logs").glob("*.err"))
    arguments = command("--workdir", str(one), "--phases", *PHASES)
    result = subprocess.run(
        arguments, cwd=ROOT, env=compiled_quickly(environment(2)), capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    assert "2 x cpu" in result.stdout
    return two, one, folder / "logs"


def test_two_processes_killed_and_resumed_measure_what_one_does(two_and_one):
    two, one, _ = two_and_one
    left, right = records(two), records(one)
    assert [(r["step"], r["phase"], *sorted(r)) for r in left] == [(r["step"], r["phase"], *sorted(r)) for r in right]
    for mine, other in zip(left, right, strict=True):
        for name in ("train_loss", "test_loss"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-6)
    mine, other = (json.loads((workdir / "summary.json").read_text()) for workdir in (two, one))
    assert [(p["name"], p["steps"]) for p in mine["phases"]] == [(p["name"], p["steps"]) for p in other["phases"]]
    for name in ("top1", "dense_top1", "macs", "num_examples"):
        assert mine[name] == other[name]


def test_two_processes_end_with_the_state_of_one(two_and_one):
    end = STEPS * len(PHASES)
    left, right = (restore(Checkpoints(workdir / CHECKPOINT_FOLDER), end).state for workdir in two_and_one[:2])
    assert int(right.step) == end
    jax.tree.map_with_path(lambda path, *leaves: np.testing.assert_array_equal(*leaves, err_msg=str(path)), left, right)


def test_one_of_two_processes_writes_and_prints(two_and_one):
    two, one, logs = two_and_one
    trained = [(r["step"], r["phase"]) for r in records(two) if "train_loss" in r]
    assert len(trained) == len(set(trained))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert "resuming where it stopped: pretrain" in (logs / "0.out").read_text()
    assert "2 x cpu" in (logs / "0.out").read_text()
    # XLA's collectives on the CPU announce themselves.
    assert all(line.startswith("[Gloo]") for line in (logs / "1.out").read_text().splitlines())
