"""The allocator's settings, in a process of their own: they hold until it ends."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
