"""The engines that execute a frozen network, by name: what each needs, its emitter, and the form of its inputs.

An engine compiles a program to a function (`Engine.compile`); `fdjax.frozen.clock` times such functions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fdjax import provenance
from fdjax.errors import UserError
from fdjax.frozen.native.compile import FLAGS, NativeNetwork, compiler_version, find_compiler
from fdjax.frozen.onnx_model import onnxruntime_session, to_onnx
from fdjax.frozen.program import Program
from fdjax.frozen.xla import apply, compiler_options

Arrays = Mapping[str, np.ndarray]
Compiled = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine.

    Attributes:
      name: the engine's name.
      packages: packages that have to be installed beside fdjax.
      compile: (program, arrays, shapes of the inputs [B, ...], threads, whether the program is a part of a network) ->
        a function of the inputs. The maps of a part have the engine's own layout: [B, C, H, W] in ONNX.
      place: converts an input to the type that the function takes.
      version: returns the versions that times depend on, beside the processor.
      writes_onnx: whether the engine reads ONNX files.
    """

    name: str
    packages: tuple[str, ...]
    compile: Callable[[Program, Arrays, Sequence[tuple[int, ...]], int, bool], Compiled]
    place: Callable[[np.ndarray], Any]
    version: Callable[[], str]
    writes_onnx: bool = False


def _compile_xla(
    program: Program, arrays: Arrays, shapes: Sequence[tuple[int, ...]], threads: int, part: bool
) -> Compiled:
    on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
    function = functools.partial(apply, program, in_chunks=jax.default_backend() == "cpu")
    return functools.partial(jax.jit(function, compiler_options=compiler_options()), on_device)


def _compile_native(
    program: Program, arrays: Arrays, shapes: Sequence[tuple[int, ...]], threads: int, part: bool
) -> Compiled:
    return NativeNetwork(program, arrays)


def _compile_onnxruntime(
    program: Program, arrays: Arrays, shapes: Sequence[tuple[int, ...]], threads: int, part: bool
) -> Compiled:
    return onnxruntime_session(to_onnx(program, arrays, channels_first=part), threads)


def _compile_openvino(
    program: Program, arrays: Arrays, shapes: Sequence[tuple[int, ...]], threads: int, part: bool
) -> Compiled:
    # Its telemetry forks a process, some time after the import. JAX warns of a deadlock, but the child never calls JAX.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
    import openvino

    core = openvino.Core()
    model = core.read_model(to_onnx(program, arrays, channels_first=part).SerializeToString())
    model.reshape({given: list(shape) for given, shape in zip(model.inputs, shapes, strict=True)})
    hints = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", {**hints, "ENABLE_CPU_PINNING": False}).create_infer_request()

    def run(*inputs: np.ndarray) -> Any:
        made = tuple(request.infer(list(inputs)).values())
        return made[0] if len(made) == 1 else made

    return run


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)


_ALL = (
    Engine(
        "xla",
        (),
        _compile_xla,
        jnp.asarray,
        lambda: f"jax {jax.__version__} {jax.devices()[0].device_kind} {compiler_options()}",
    ),
    Engine(
        "native",
        (),
        _compile_native,
        np.asarray,
        lambda: f"{compiler_version(find_compiler())} {' '.join(FLAGS)}",
    ),
    Engine(
        "onnxruntime",
        ("onnx", "onnxruntime"),
        _compile_onnxruntime,
        _float32,
        lambda: f"onnxruntime {importlib.metadata.version('onnxruntime')}",
        writes_onnx=True,
    ),
    Engine(
        "openvino",
        ("onnx", "openvino"),
        _compile_openvino,
        _float32,
        lambda: f"openvino {importlib.metadata.version('openvino')}",
        writes_onnx=True,
    ),
)
_BY_NAME: Mapping[str, Engine] = {engine.name: engine for engine in _ALL}
ENGINES = tuple(_BY_NAME)


def find_engine(name: str) -> Engine:
    """Returns the engine of a name.

    Raises:
      UserError: if there is no such engine, or it is not installed; the message says what to install.
    """
    if name not in _BY_NAME:
        raise UserError(f"there is no engine {name!r}; give some of {', '.join(ENGINES)}")
    engine = _BY_NAME[name]
    missing = [package for package in engine.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"the engine {name} needs what is not installed: pip install {' '.join(missing)}")
    if name == "native":
        find_compiler()
    return engine


def check_engines(names: Sequence[str]) -> None:
    """Raises `UserError` for the first engine that is unknown or not installed."""
    for name in names:
        find_engine(name)


def is_there(name: str) -> bool:
    """Whether an engine is installed."""
    try:
        find_engine(name)
    except UserError:
        return False
    return True


def random_inputs(program: Program, batch: int, part: bool = False) -> list[np.ndarray]:
    """Makes random inputs of a program.

    Args:
      program: the program.
      batch: the batch size, in images.
      part: whether the program is a part of a network, which reads maps.

    Returns:
      A batch for each input: images, uint8 [B, H, W, C], or maps, float32 [B, H, W, C] in 0..6.
    """
    rng, made = np.random.default_rng(0), []
    for value in program.inputs:
        shape = (batch, *program.shapes[value])
        made.append(rng.uniform(0, 6, shape).astype(np.float32) if part else rng.integers(0, 256, shape, np.uint8))
    return made


def runner(
    engine: Engine, program: Program, arrays: Arrays, batch: int, threads: int, *, part: bool = False
) -> Callable[[], Any]:
    """Compiles a program and gives it random inputs.

    Args:
      engine: the engine.
      program: the program of a network, or of a part of one.
      arrays: the program's arrays, by name.
      batch: the batch size, in images.
      threads: threads of ONNX Runtime and OpenVINO; XLA uses the process's, native code one.
      part: whether the program is a part of a network, which reads maps.

    Returns:
      A function that executes the program once.
    """
    given = random_inputs(program, batch, part)
    if part and engine.writes_onnx:
        given = [np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if x.ndim == 4 else x for x in given]
    placed = [engine.place(x) for x in given]
    function = engine.compile(program, arrays, [x.shape for x in given], threads, part)
    return functools.partial(function, *placed)


@functools.cache
def what_times_depend_on(name: str) -> str:
    """Returns what times on an engine depend on: its version, the processor, and a hash of the emitters' code."""
    folder, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted([*folder.glob("*.py"), *folder.glob("native/*.py"), *folder.glob("native/*.h")]):
        digest.update(file.read_bytes())
    return f"{name} {find_engine(name).version()} {provenance.processor()} {digest.hexdigest()}"
