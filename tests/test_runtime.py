"""The settings of a process, in processes of their own: they hold until these end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fdjax import runtime

PROGRAM = """
from fdjax import runtime
assert runtime.close_heap_gaps() == 0  # not tuned yet
assert runtime.keep_freed_memory()
blocks = [bytearray(300_000) for _ in range(200)]
del blocks[::2]
taken = runtime.close_heap_gaps()
assert taken >= 90 * 300_000, taken
assert runtime.close_heap_gaps() < taken // 10
assert all(len(block) == 300_000 and not any(block) for block in blocks)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_gaps_are_closed_and_what_is_in_use_stays() -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr


FLAG = "--xla_cpu_experimental_ynn_fusion_type"
CONVOLUTION = """
from fdjax import runtime
runtime.setup()
runtime.use_threads_for_convolutions()  # once is enough
import os, jax, jax.numpy as jnp
assert os.environ["XLA_FLAGS"].count("ynn") == 1, os.environ["XLA_FLAGS"]
def convolution(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
program = jax.jit(convolution).lower(jnp.ones((8, 16, 16, 32)), jnp.ones((3, 3, 32, 32))).compile()
print("YNNPACK" if "ynn" in program.as_text() else "XLA", jax.device_count())
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", "XLA 1"),
        ("--xla_force_host_platform_device_count=3", "XLA 3"),
        (f"{FLAG}=individual_convolution", "YNNPACK 1"),  # the user's own choice
    ],
)
def test_convolutions_are_xlas_own_unless_the_user_says_otherwise(given: str, expected: str) -> None:
    environment = {**os.environ, "XLA_FLAGS": given, "JAX_PLATFORMS": "cpu", runtime.CACHE_VARIABLE: ""}
    result = subprocess.run(
        [sys.executable, "-c", CONVOLUTION], cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == expected


@pytest.mark.parametrize(
    ("version", "added"), [("0.9.2", False), ("0.10.2", True), ("0.12.0.1", True), ("0.13.0", False), ("1.0", False)]
)
def test_a_version_of_jaxlib_that_may_not_know_the_flag_is_not_given_it(
    monkeypatch: pytest.MonkeyPatch, version: str, added: bool
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
    monkeypatch.setattr(importlib.metadata, "version", lambda package: {"jaxlib": version}[package])
    assert runtime.use_threads_for_convolutions() == added
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_dump_to=here"
    assert flags[1:] == ([f"{FLAG}=-individual_convolution"] if added else [])
