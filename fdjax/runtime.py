"""The setup of a process before its first computation. Import this and call `setup` before anything imports jax."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from pathlib import Path

from fdjax.errors import UserError

CACHE_VARIABLE = "FDJAX_CACHE_DIR"

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8
# Linux's madvise.
_MADV_DONTNEED, _MADV_HUGEPAGE, _HUGE_PAGE = 4, 14, 2 << 20
# Sizes of free pieces of the heap, in bytes, for `close_heap_gaps`: the largest and the smallest that it looks for; the
# size below which it tries every size that glibc distinguishes; and the size from which pages are returned.
_LARGEST_GAP, _SMALLEST_GAP, _EXACT_BELOW, _WORTH_RETURNING = 1 << 30, 24, 1200, 1 << 16

# The flag of XLA that names what it hands to the library YNNPACK on the CPU, and the versions of jaxlib (from, before)
# that are known to have it: XLA ends the process if it is given a flag that it does not know.
_LIBRARY_FLAG, _FLAG_SINCE, _FLAG_BEFORE = "--xla_cpu_experimental_ynn_fusion_type", (0, 10), (0, 13)

_tuned: ctypes.CDLL | None = None


def keep_freed_memory() -> bool:
    """Makes glibc keep freed large buffers, rather than return them to the kernel after every step, and use huge pages.

    By default, every large array is mapped anew and its pages are faulted in again, which takes up to half of a
    training step on the CPU.

    Returns:
      Whether it took effect; False if the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):
        return False
    # -1: free memory at the top of the heap is never returned.
    settings = ((_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 1 << 28))
    if any(mallopt(parameter, value) != 1 for parameter, value in settings):
        return False
    _declare(libc)
    _use_huge_pages(libc)
    global _tuned
    _tuned = libc
    return True


class _MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2 (malloc.h)."""

    _fields_ = [(name, ctypes.c_size_t) for name in
                ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                 "keepcost")]  # fmt: skip


def _declare(libc: ctypes.CDLL) -> None:
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_long]


def close_heap_gaps() -> int:
    """Allocates the free pieces below the top of the heap for good, and returns their whole pages to the kernel.

    A compilation leaves tens of thousands of such pieces. The operations of a step that allocate memory then search
    among them, and get memory that is scattered: steps took up to 1.4 times as long (two cores, a narrow network). Once
    the pieces are taken, memory comes from the top, in one piece.

    Returns:
      The number of bytes taken; 0 if `keep_freed_memory` had no effect.
    """
    libc = _tuned
    if libc is None or not hasattr(libc, "mallinfo2"):
        return 0
    libc.mallinfo2.restype = _MallocInfo
    info = libc.mallinfo2()
    top = libc.sbrk(0) - info.keepcost
    gaps, taken, size = info.fordblks - info.keepcost, 0, _LARGEST_GAP
    while size >= _SMALLEST_GAP:
        address = libc.malloc(size) if taken < gaps else None
        if address and address < top:
            taken += size
            page = os.sysconf("SC_PAGE_SIZE")
            start, end = -(-address // page) * page, (address + size) // page * page
            if end - start >= _WORTH_RETURNING:
                libc.madvise(start, end - start, _MADV_DONTNEED)
            continue
        libc.free(address)
        size = size * 4 // 5 if size > _EXACT_BELOW else size - 16
    return taken


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Lets Linux back the heap with huge pages. Reserves addresses for up to half of the memory, but no memory yet."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    address = libc.malloc(size)
    if address:
        start = -(-address // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(start, (address + size - start) // _HUGE_PAGE * _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(address)


def limit_threads(threads: int | None) -> int:
    """Limits this process to a number of processor cores, which XLA's flags alone do not do.

    Call it before jax is imported.

    Args:
      threads: number of cores; None leaves the process as it is.

    Returns:
      The number of cores that the process may use.

    Raises:
      UserError: the process may not use that many.
    """
    if not hasattr(os, "sched_setaffinity"):
        if threads is not None:
            os.environ["NPROC"] = str(threads)
        return threads or os.cpu_count() or 1
    allowed = sorted(os.sched_getaffinity(0))
    if threads is None:
        return len(allowed)
    if threads > len(allowed):
        raise UserError(f"--threads {threads}: this process may use only {len(allowed)} cores")
    os.environ["NPROC"] = str(threads)
    os.sched_setaffinity(0, allowed[:threads])
    return threads


def compilation_cache_dir() -> Path | None:
    """Returns the directory of compiled programs: $FDJAX_CACHE_DIR (None if empty) or the user's cache directory."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fdjax" / "xla"


def cache_dir(of: str) -> Path | None:
    """Returns the directory of another cache: in $FDJAX_CACHE_DIR, or else beside XLA's; None if nothing is cached.

    Args:
      of: its name, such as "times" or "native".
    """
    compiled = compilation_cache_dir()
    if compiled is None:
        return None
    return (compiled if os.environ.get(CACHE_VARIABLE) else compiled.parent) / of


def times_cache_dir() -> Path | None:
    """Returns the directory of measured times of layers; None if nothing is cached."""
    return cache_dir("times")


def use_threads_for_convolutions() -> bool:
    """Makes XLA compute convolutions on the CPU with its own code, which uses all cores, rather than with YNNPACK.

    In jaxlib 0.10, YNNPACK computes a convolution of 32 or more channels on one core (measured on two); on one core the
    two take as long. What the environment's `XLA_FLAGS` says of YNNPACK is kept.

    Returns:
      Whether the flag was added; False too if this version of jaxlib is not known to have it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    version = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
    if _LIBRARY_FLAG in flags or not _FLAG_SINCE <= version < _FLAG_BEFORE:
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {_LIBRARY_FLAG}=-individual_convolution".strip()
    return True


def setup() -> None:
    """Sets up the allocator, XLA's flags and the persistent compilation cache.

    A command calls this once, before anything else.

    Raises:
      RuntimeError: jax has been imported before.
    """
    if "jax" in sys.modules:
        raise RuntimeError("fdjax.runtime.setup must run before jax is imported")
    keep_freed_memory()
    use_threads_for_convolutions()
    cache = compilation_cache_dir()
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
