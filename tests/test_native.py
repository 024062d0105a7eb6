"""Native code makes what the same program makes in XLA, whatever its masks, sizes and operations."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from fdjax.config import LearnConfig, ModelConfig
from fdjax.errors import UserError
from fdjax.frozen import freeze
from fdjax.frozen.bench import seeded_variables
from fdjax.frozen.native import compile as native_compile
from fdjax.frozen.native.compile import NativeNetwork, compile_source, find_compiler
from fdjax.frozen.native.emit import emit
from fdjax.frozen.program import Program
from fdjax.frozen.xla import apply
from fdjax.training.network import trace_network
from fdjax.zoo.registry import make_network
from tests.frozen_networks import HASTE, frozen_logits, random_counts, relative_error, with_preprocessing
from tests.programs import RUNS, Network, normalised

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native_compile.COMPILERS)), reason="this machine has no C++ compiler"
)


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch) -> None:
    """Each program runs once: it need not be fast."""
    flags = ("-std=c++17", "-O0", "-march=native", "-fPIC", "-shared")
    monkeypatch.setattr(native_compile.compile_source, "__defaults__", (flags, None))


def raw_images(network: Network, batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (batch, *network.shapes[0])).astype(np.uint8)


def check(network: Network, folder: Path, *outputs: int, batch: int = 2) -> NativeNetwork:
    program, images = network.program(*outputs), raw_images(network, batch)
    native = NativeNetwork(program, network.arrays, folder=folder)
    expected = jax.jit(functools.partial(apply, program), compiler_options=HASTE)(network.arrays, images)
    for y, wanted in zip(native(images), expected, strict=True):
        assert y.shape == wanted.shape and relative_error(y, np.asarray(wanted)) < 1e-5
    return native


@pytest.mark.parametrize(("levels", "block", "tied", "window", "stride", "size"), RUNS)
def test_a_run(levels, block, tied, window, stride, size, tmp_path) -> None:
    bias = ("none", "channel", "map")[sum(size) % 3]
    network = Network((*size, 6))
    x = normalised(network)
    y = network.run(x, 70, 9, block, levels, window=window, stride=stride, tied=tied, bias=bias)
    if y and network.shapes[y] == network.shapes[x]:
        y = network.function(lambda x, y: x + y, x, y)
    check(network, tmp_path, y, batch=3)


@pytest.mark.parametrize(
    ("levels", "out_levels", "block", "size", "bias"),
    [
        (None, None, 2, (6, 6), "channel"),
        ((0, 1), (1,), 3, (7, 8), "none"),
        ((16,), (1, 16), 4, (8, 6), "channel"),
        ((1,), (1,), 1, (5, 5), "map"),
        (None, (4, 5, 9), 3, (9, 9), "map"),
    ],
)
def test_a_pointwise_layer(levels, out_levels, block, size, bias, tmp_path) -> None:
    network = Network((*size, 7))
    x = normalised(network)
    both = [
        network.pointwise(x, 60, block, levels, bias, pooled=pooled, out_levels=out_levels) for pooled in (False, True)
    ]
    check(network, tmp_path, *both)


def test_vectors_and_tokens(tmp_path) -> None:
    network = Network((5, 8))
    tokens = network.pointwise(normalised(network), 12, 1, (0, 1), bias="map")
    vector = network.function(lambda x: x.mean(axis=1), tokens)
    check(network, tmp_path, tokens, network.pointwise(vector, 3, 1, (1,), activation="none"), batch=11)


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "window", "stride", "pads"),
    [
        (3, 8, 1, (3, 3), (2, 2), ((0, 1), (0, 1))),
        (3, 8, 1, (7, 7), (2, 2), None),
        (8, 8, 8, (3, 3), (1, 1), None),
        (8, 8, 8, (5, 3), (2, 1), ((1, 2), (0, 0))),
        (8, 16, 8, (3, 3), (1, 1), None),
        (8, 12, 2, (3, 1), (1, 2), None),
        (8, 4, 1, (1, 1), (2, 2), None),
        (1, 1, 1, (3, 3), (1, 1), None),
    ],
)
def test_convolutions(channels, outputs, groups, window, stride, pads, tmp_path) -> None:
    network = Network((9, 10, channels))
    y = network.conv(normalised(network), outputs, window, stride, groups, pads)
    check(network, tmp_path, network.conv(y, outputs, groups=outputs, bias="map", activation="relu"), y)


def whole_network() -> tuple[Network, int]:
    """Every kind of operation: the stem as a run with the depthwise layer after it, additions, means, a head."""
    network = Network((16, 16, 3))
    x = network.conv(0, 8, stride=(2, 2))
    x = network.pointwise(network.conv(x, 8, groups=8), 8, activation="none")
    for stride in ((1, 1), (2, 2), (1, 1)):
        y = network.run(x, 24, 8, 2, (0, 1, 4), stride=stride)
        x = network.function(lambda x, y: x + y, x, y) if stride == (1, 1) else y
    x = network.pointwise(x, 16, 2, pooled=True)
    return network, network.pointwise(network.take(x, (3, -1, *range(4, 16))), 10, 1, (1,), activation="none")


def test_a_whole_network(tmp_path, monkeypatch) -> None:
    """Image by image at first, then all at once; as a JAX function, and from numbers that are no bytes."""
    monkeypatch.setattr("fdjax.frozen.native.layout.LARGE", 200)
    network, logits = whole_network()
    native = check(network, tmp_path, logits, batch=5)
    images = raw_images(network, 4)
    (expected,) = native(images)
    np.testing.assert_array_equal(native(images.astype(np.float32))[0], expected)
    np.testing.assert_array_equal(native.in_jax(images)[0], expected)
    monkeypatch.setenv("NPROC", "2")
    np.testing.assert_array_equal(jax.jit(native.in_jax)(images)[0], expected)
    monkeypatch.setenv("NPROC", "1")
    with pytest.raises(UserError, match=r"waits for ever in a process with one core.*outside of jit.*NPROC=2"):
        jax.jit(lambda x: native.in_jax(x))(images)
    np.testing.assert_array_equal(np.concatenate([native(image[None])[0] for image in images]), expected)


def pooled(x):
    y = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 0), (1, 1), (0, 0)))
    y = jax.numpy.pad(y, ((0, 0), (1, 0), (0, 0), (0, 2)))
    return jax.nn.sigmoid(y) * x.mean(axis=(1, 2), keepdims=True)[..., :1].repeat(y.shape[-1], axis=-1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.numpy.clip(x[:, 1::2, :3] ** 2, 0.5, 3),
        lambda x: jax.numpy.concatenate([x, -x, abs(x)], axis=-1),
        lambda x: jax.nn.relu(x.reshape(x.shape[0], -1, 10)) * 2,
        lambda x: jax.nn.swish(x) + x.mean(axis=(1, 2), keepdims=True),
    ],
)
def test_other_operations(function, tmp_path) -> None:
    network = Network((4, 6, 5))
    check(network, tmp_path, network.function(function, network.conv(normalised(network), 5)), batch=3)


# The networks of the zoo

MASKS = {
    "none": (False, None),
    "channels": (False, ()),
    "tied": (True, (1,)),
    "all": (True, None),
    "paper": (False, None),
}


def check_zoo(folder: Path, name: Any, side: int, masks: str, batch: int, block: int = 2, **fields: Any) -> None:
    """A network of the zoo with random weights and masks, on images of side x (side + 3) pixels."""
    tied, levels = MASKS[masks]
    learn = LearnConfig(block=block, tied=tied and name.startswith(("mobilenetv2", "efficient")))
    network = make_network(ModelConfig(name=name, **fields), learn, 100)
    graph = with_preprocessing(trace_network(network, (side, side + 3, 3), learn))
    counts = graph.full_counts() if masks == "none" else random_counts(graph, 0, levels)
    frozen = freeze(graph, seeded_variables(graph), counts)
    images = np.random.default_rng(1).integers(0, 256, (batch, side, side + 3, 3)).astype(np.uint8)
    found = NativeNetwork(frozen.program, frozen.arrays, folder=folder)(images)[0]
    assert relative_error(found, frozen_logits(frozen, images)) < 1e-5


@pytest.mark.parametrize(("name", "masks"), [("mobilenetv2_small", "paper"), ("resnet20", "channels")])
def test_a_network_of_the_zoo(name, masks, tmp_path) -> None:
    fields: dict[str, Any] = {"width": 0.3} if name.startswith("mobile") else {}
    check_zoo(tmp_path, name, 20, masks, 3, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(
    ("name", "side", "fields"),
    [
        ("mobilenetv2", 96, {}),
        ("mobilenetv2_cifar10", 32, {"width": 0.5}),
        ("mobilenetv2", 64, {"octave": 0.25}),
        ("mobilenetv2", 64, {"octave": 0.25, "octave_maps": "all"}),
        ("mobilenetv1", 64, {}),
        ("efficientnet_lite0", 64, {}),
        ("resnet20", 32, {}),
        ("resnet50", 64, {}),
        ("resnext50_32x4d", 64, {}),
        ("resnext29", 32, {}),
    ],
)
def test_every_network_of_the_zoo(name, side, fields, masks, tmp_path) -> None:
    if "octave" in fields and masks != "none":
        pytest.skip("octave networks have no masks")
    blocks = (2, 2) if side == 64 else (3, 4)  # The last map has to hold a block.
    for batch, odd, block in ((1, 0, blocks[0]), (5, 5, blocks[1])):
        check_zoo(tmp_path, name, side + odd, masks, batch, block, **fields)


# Memory and compilers

MAIN = """
#include <cstdio>
#include <cstdlib>
#include <vector>
int main() {
  const int n = 3;
  std::vector<float> weights(WEIGHTS), results(n * 10);
  std::vector<std::uint8_t> images(n * IMAGE);
  std::FILE* file = std::fopen("weights.bin", "rb");
  if (!file || std::fread(weights.data(), 4, WEIGHTS, file) != WEIGHTS) return 1;
  std::fclose(file);
  for (std::size_t i = 0; i < images.size(); i++) images[i] = static_cast<std::uint8_t>(i * 37 % 256);
  const std::size_t size = (network_workspace(n) + 63) / 64 * 64;
  void* workspace = std::aligned_alloc(64, size);
  network_of_bytes(images.data(), n, weights.data(), results.data(), workspace);
  std::free(workspace);
  for (const float v : results) std::printf("%.8g\\n", static_cast<double>(v));
}
"""


def run_alone(folder: Path, compiler: str, *flags: str, runner: tuple[str, ...] = ()) -> np.ndarray:
    """The whole network as a program of its own; its results, and what XLA says."""
    network, logits = whole_network()
    program = network.program(logits)
    code = emit(program, network.arrays)
    (folder / "network.cc").write_text(code.source + MAIN)
    code.weights.tofile(folder / "weights.bin")
    command = [compiler, "-std=c++17", "-Wall", "-Wextra", *flags, "network.cc", "-o", "network"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if "cannot find" in done.stderr and "clang_rt" in done.stderr:
        pytest.skip(f"{compiler} has no sanitizers on this machine")
    assert done.returncode == 0, done.stderr[:2000]
    done = subprocess.run([*runner, "./network"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
    found = np.array(done.stdout.split(), np.float32).reshape(3, 10)
    images = (np.arange(3 * 16 * 16 * 3) * 37 % 256).astype(np.uint8).reshape(3, 16, 16, 3)
    (expected,) = jax.jit(functools.partial(apply, program), compiler_options=HASTE)(network.arrays, images)
    assert relative_error(found, np.asarray(expected)) < 1e-5
    return found


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_no_warnings_and_no_stray_memory_access(compiler, tmp_path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"this machine has no {compiler}")
    run_alone(tmp_path, compiler, "-O2", "-march=native", "-Werror")
    run_alone(tmp_path, compiler, "-O1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.parametrize("flags", [(), ("-mavx2", "-mfma")])
def test_narrower_vectors(flags, tmp_path) -> None:
    run_alone(tmp_path, find_compiler(), "-O1", *flags)


@pytest.mark.slow
def test_another_processor(tmp_path) -> None:
    if shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None:
        pytest.skip("needs g++-aarch64-linux-gnu and qemu-user")
    run_alone(tmp_path, "aarch64-linux-gnu-g++", "-O2", "-static", runner=("qemu-aarch64",))


# What cannot be done


def test_a_library_of_another_compiler_or_processor_is_not_taken(tmp_path, monkeypatch) -> None:
    source = 'extern "C" int one() { return 1; }'
    first = compile_source(source, folder=tmp_path)
    time = first.stat().st_mtime_ns
    assert compile_source(source, folder=tmp_path) == first and first.stat().st_mtime_ns == time
    monkeypatch.setattr(native_compile, "cpu_features", lambda: "another processor")
    second = compile_source(source, folder=tmp_path)
    monkeypatch.setattr(native_compile, "compiler_version", lambda compiler: "another compiler")
    assert len({first, second, compile_source(source, folder=tmp_path)}) == 3


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path) -> None:
    (tmp_path / "file").touch()
    made = compile_source('extern "C" int two() { return 2; }', folder=tmp_path / "file" / "cache")
    assert made.is_file() and tmp_path not in made.parents


def test_without_a_compiler_one_line_says_so() -> None:
    with pytest.raises(UserError, match=r"needs a C\+\+17 compiler; none found") as raised:
        find_compiler({"PATH": ""})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="CXX=no-such-compiler"):
        find_compiler({"PATH": "", "CXX": "no-such-compiler"})


def test_what_does_not_compile_is_said_in_one_line(tmp_path) -> None:
    with pytest.raises(UserError, match=r"cannot compile the network: .*error") as raised:
        compile_source("int one() { return two; }", folder=tmp_path)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_images_of_another_size_are_refused(tmp_path) -> None:
    network = Network((8, 8, 3))
    native = check(network, tmp_path, network.conv(0, 4))
    with pytest.raises(UserError, match=r"takes images \[B, 8, 8, 3\]; got \[2, 8, 9, 3\]"):
        native(np.zeros((2, 8, 9, 3), np.uint8))


def test_an_operation_without_a_kernel_is_named() -> None:
    network = Network((4, 4, 3))
    y = network.function(lambda x: jax.numpy.cumsum(x, axis=1), network.conv(0, 4))
    with pytest.raises(
        UserError, match=r"the operation cumsum \(layer1\) has no kernel in native code, which knows add"
    ):
        emit(network.program(y), network.arrays)


def test_several_inputs_are_refused() -> None:
    network = Network((4, 4, 3))
    program = network.program(network.conv(0, 4))
    two = Program(program.shapes, (0, 1), program.outputs, program.operations)
    with pytest.raises(UserError, match="networks of one input; this one has 2"):
        emit(two, network.arrays)
