"""Compiles the source of a frozen network with the system's compiler, caches the library, and calls it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import mmap
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.native.emit import NativeCode, emit
from fdjax.frozen.program import Program
from fdjax.runtime import cache_dir

COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fPIC", "-shared")
_NAME = "network"
_PAGE = 2 << 20


def find_compiler(environment: Mapping[str, str] | None = None) -> str:
    """Returns the C++ compiler: $CXX, or the first of `COMPILERS` on the path.

    Raises:
      UserError: if there is none.
    """
    environment = os.environ if environment is None else environment
    wanted = environment.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        found = shutil.which(name, path=environment.get("PATH"))
        if found:
            return found
    sought = f"CXX={wanted}" if wanted else ", ".join(COMPILERS)
    raise UserError(f"native code needs a C++17 compiler; none found ({sought}): install g++ or clang, or set CXX")


def cpu_features() -> str:
    """Returns the facts about the processor on which a compiler's -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    kept = ("model name", "flags", "cpu family", "model", "stepping", "Features", "CPU part", "CPU implementer")
    facts = {line for line in lines if line.partition(":")[0].strip() in kept}
    return "\n".join([platform.machine(), platform.processor(), *sorted(facts)])


@functools.cache
def compiler_version(compiler: str) -> str:
    """Returns the version that a compiler prints.

    Raises:
      UserError: if the compiler does not run.
    """
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"the C++ compiler {compiler} does not run: {error}") from error
    return f"{compiler} {done.stdout}"


def compile_source(source: str, flags: Sequence[str] = FLAGS, folder: Path | None = None) -> Path:
    """Compiles a source to a shared library, unless the cache has it.

    The library's name is a hash of source, compiler, flags and processor, so that a library of another compiler or
    processor is never used.

    Args:
      source: C++17.
      flags: the compiler's flags.
      folder: the cache; None: that of the user, or a temporary one if nothing is cached or it cannot be written.

    Returns:
      The library.

    Raises:
      UserError: if there is no compiler, or it fails.
    """
    compiler = find_compiler()
    facts = [source, compiler_version(compiler), *flags, cpu_features()]
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]
    folder = folder or cache_dir("native")
    if folder is not None and (folder / f"{digest}.so").is_file():
        return folder / f"{digest}.so"
    folder = _writable(folder)
    library = folder / f"{digest}.so"
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        file, made = Path(draft) / f"{_NAME}.cc", Path(draft) / f"{_NAME}.so"
        file.write_text(source)
        done = subprocess.run([compiler, *flags, "-o", str(made), str(file)], capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-200:])
            raise UserError(f"the C++ compiler {compiler} cannot compile the network: {said}; set CXX to another")
        made.replace(library)
    return library


def _writable(folder: Path | None) -> Path:
    """Returns the folder, which is made, or a temporary one if there is none or it cannot be written."""
    if folder is not None:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    return Path(tempfile.mkdtemp(prefix="fdjax_native_"))


def _large_pages(size: int) -> np.ndarray:
    """Allocates floats in pages of 2 MB, if the system has them, because weights are read page after page."""
    memory = mmap.mmap(-1, max(1, -(-size * 4 // _PAGE)) * _PAGE + _PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.float32)
    start = -raw.ctypes.data % _PAGE // 4
    return raw[start : start + size]


def _xla_threads() -> int:
    """Returns the number of threads of XLA's CPU client, as it chooses them."""
    asked = os.environ.get("NPROC", "")
    if asked.isdecimal():
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NativeNetwork:
    """A frozen network as machine code.

    Attributes:
      code: its source and weights.
      library: the compiled library.
    """

    def __init__(self, program: Program, arrays: Mapping[str, np.ndarray], *, folder: Path | None = None):
        """Emits and compiles a network.

        Args:
          program: the program; it has one input.
          arrays: its arrays, by name.
          folder: the cache, as in `compile_source`.

        Raises:
          UserError: if there is no kernel for an operation, no compiler, or the compiler fails.
        """
        self.code: NativeCode = emit(program, arrays, _NAME)
        self.library = compile_source(self.code.source, folder=folder)
        functions = ctypes.CDLL(str(self.library))
        self._workspace_size: Any = functions.network_workspace
        self._workspace_size.restype = ctypes.c_size_t
        pointer = ctypes.c_void_p
        self._of_bytes: Any = functions.network_of_bytes
        self._of_floats: Any = functions.network_of_floats
        for function in (self._of_bytes, self._of_floats):
            function.argtypes, function.restype = (pointer, ctypes.c_int, pointer, pointer, pointer), None
        self._weights = _large_pages(self.code.weights.size)
        self._weights[:] = self.code.weights
        self._weights_at = self._weights.ctypes.data
        # The batch size, its workspace, and the workspace's address; kept for calls of the same batch size.
        self._workspace = 0, self._weights[:0], 0
        self._ends = np.cumsum([0, *(math.prod(shape) for shape in self.code.output_shapes)]).tolist()
        self._lock = threading.Lock()

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Evaluates the network on raw images, uint8 or float [B, H, W, C]; returns each output, float32 [B, ...].

        Raises:
          UserError: if the images have another size.
        """
        images = np.asarray(images)
        if images.shape[1:] != self.code.input_shape or not images.ndim:
            wanted = ", ".join(map(str, self.code.input_shape))
            raise UserError(f"this network takes images [B, {wanted}]; got {list(images.shape)}")
        in_bytes = images.dtype == np.uint8
        images = np.ascontiguousarray(images, None if in_bytes else np.float32)
        batch, function = len(images), self._of_bytes if in_bytes else self._of_floats
        results = np.empty(batch * self._ends[-1], np.float32)
        with self._lock:
            if batch != self._workspace[0]:
                workspace = _large_pages(self._workspace_size(batch) // 4)
                self._workspace = batch, workspace, workspace.ctypes.data
            if batch:
                function(images.ctypes.data, batch, self._weights_at, results.ctypes.data, self._workspace[2])
        return tuple(
            results[start * batch : stop * batch].reshape(batch, *shape)
            for start, stop, shape in zip(self._ends[:-1], self._ends[1:], self.code.output_shapes, strict=True)
        )

    def in_jax(self, images: Any) -> Any:
        """Evaluates the network from JAX, also under `jit`.

        Args:
          images: uint8 or float [B, H, W, C].

        Returns:
          Each output, float32 [B, ...].

        Raises:
          UserError: if it is traced in a process with one core and without NPROC, where JAX's callbacks can hang.
        """
        import jax
        from jax.core import Tracer

        if not isinstance(images, Tracer):
            return tuple(map(jax.numpy.asarray, self(np.asarray(images))))
        if _xla_threads() < 2:
            raise UserError(
                "native code inside jax.jit waits for ever in a process with one core, because JAX hands images to a "
                "callback on a second thread: call the network outside of jit, or set NPROC=2 in the environment "
                "before jax is imported"
            )
        batch = images.shape[0]
        like = tuple(jax.ShapeDtypeStruct((batch, *shape), np.float32) for shape in self.code.output_shapes)
        return jax.pure_callback(lambda x: self(np.asarray(x)), like, images)
