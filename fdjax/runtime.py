"""What a command sets before the first computation. Import and call `setup` before anything imports jax."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

CACHE_VARIABLE = "FDJAX_CACHE_DIR"

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep big buffers instead of returning them to the kernel after every step.

    By default every large array is mapped anew and its pages are faulted in again, which costs up to half of a training
    step on the CPU. Returns whether it took effect (False where the C library is another).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 28))
    results = [mallopt(parameter, value) for parameter, value in settings]
    return all(result == 1 for result in results)


def compilation_cache_dir() -> Path | None:
    """Where compiled programs are kept: $FDJAX_CACHE_DIR (empty: nowhere), or the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fdjax" / "xla"


def setup() -> None:
    """Sets the allocator and the persistent compilation cache. Call once, first thing in a command."""
    if "jax" in sys.modules:
        raise RuntimeError("fdjax.runtime.setup must run before jax is imported")
    keep_freed_memory()
    cache = compilation_cache_dir()
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
