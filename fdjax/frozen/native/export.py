"""Writes a frozen network as one C++ file: source, weights, a plain C function, and a main that tests and times it."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fdjax.errors import UserError
from fdjax.frozen.assemble import Frozen
from fdjax.frozen.native.emit import emit
from fdjax.frozen.xla import apply

_PER_LINE = 12
# Names that a function cannot have: words of C++, and functions that its libraries have, which it would replace.
_TAKEN = frozenset((
    "alignas", "alignof", "and", "asm", "auto", "bitand", "bitor", "bool", "break", "case", "catch", "char", "class",
    "compl", "const", "continue", "decltype", "default", "delete", "do", "double", "dynamic_cast", "else", "enum",
    "explicit", "export", "extern", "false", "float", "for", "friend", "goto", "if", "inline", "int", "long",
    "mutable", "namespace", "new", "noexcept", "not", "nullptr", "operator", "or", "private", "protected", "public",
    "register", "return", "short", "signed", "sizeof", "static", "struct", "switch", "template", "this",
    "thread_local", "throw", "true", "try", "typedef", "typeid", "typename", "union", "unsigned", "using", "virtual",
    "void", "volatile", "wchar_t", "while", "xor", "abort", "abs", "accept", "acos", "asin", "atan", "atan2", "bind",
    "calloc", "cbrt", "ceil", "clock", "close", "connect", "cos", "cosh", "div", "erf", "exit", "exp", "fabs",
    "floor", "fmod", "fork", "free", "gamma", "getenv", "j0", "j1", "jn", "kill", "labs", "lgamma", "link", "listen",
    "log", "log10", "log2", "lrint", "main", "malloc", "memcpy", "memmove", "memset", "modf", "open", "pipe", "poll",
    "pow", "printf", "puts", "qsort", "raise", "rand", "read", "realloc", "remainder", "remove", "rename", "rint",
    "round", "scanf", "select", "send", "signal", "sin", "sinh", "sleep", "socket", "sqrt", "srand", "std", "stat",
    "acosh", "asinh", "atanh", "copysign", "div", "drand48", "erand48", "erfc", "exp2", "expm1", "fdim", "fma",
    "fmax", "fmin", "frexp", "hypot", "ilogb", "index", "initstate", "ldexp", "llabs", "lldiv", "llrint", "llround",
    "log1p", "logb", "lrand48", "lround", "mblen", "mrand48", "nan", "nearbyint", "nextafter", "nexttoward", "random",
    "remquo", "scalb", "scalbln", "scalbn", "setenv", "setstate", "signgam", "significand", "srandom", "strlen",
    "system", "tan", "tanh", "tgamma", "time", "trunc", "wait", "write", "y0", "y1", "yn",
))  # fmt: skip
# XLA evaluates the network once, for the expected results; without optimisation it compiles faster.
_ONCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

_INTERFACE = """
// {name}: raw images of {shape}, uint8 -> {results} numbers ({outputs}).
// To compile the program that tests and times it:
//   c++ -std=c++17 -O3 -march=native -DFDJAX_MAIN {file} -o {name} && ./{name}
// Without -DFDJAX_MAIN this file is a library of the functions below.

extern "C" {{
extern const std::size_t {name}_image_size = IMAGE;  // Bytes of an image.
extern const std::size_t {name}_logits_size = {results};  // Floats of its results.
extern const std::size_t {name}_workspace_size = sizeof(float) * (SCRATCH + ONE + BATCH);  // Bytes; aligned to 64.

// One image.
void {name}(const std::uint8_t* images, float* logits, void* workspace) {{
  forward(images, 1, reinterpret_cast<const float*>(WEIGHT_BITS), logits, static_cast<float*>(workspace));
}}
// A batch of n images, with a workspace of {name}_workspace(n) bytes.
std::size_t {name}_workspace(int n) {{ return sizeof(float) * (SCRATCH + ONE + BATCH * static_cast<std::size_t>(n)); }}
void {name}_batch(const std::uint8_t* images, int n, float* logits, void* workspace) {{
  forward(images, n, reinterpret_cast<const float*>(WEIGHT_BITS), logits, static_cast<float*>(workspace));
}}
}}
"""

_MAIN = """
#ifdef FDJAX_MAIN
#include <chrono>
#include <cstdio>
#include <cstdlib>

int main() {{
  // The image of the test, whose byte i is i * 37 % 251, and XLA's results for it.
  static const float expected[] = {expected};
  static std::uint8_t image[IMAGE];
  static float logits[{results}];
  for (std::size_t i = 0; i < IMAGE; i++) image[i] = static_cast<std::uint8_t>(i * 37 % 251);
  void* workspace = std::aligned_alloc(64, ({name}_workspace_size + 63) / 64 * 64);
  if (!workspace) return 2;
  {name}(image, logits, workspace);
  float worst = 0, largest = 0;
  for (std::size_t i = 0; i < {name}_logits_size; i++) {{
    worst = std::max(worst, std::fabs(logits[i] - expected[i]));
    largest = std::max(largest, std::fabs(expected[i]));
  }}
  double best = 1e9;
  for (int round = 0; round < 50; round++) {{
    const auto start = std::chrono::steady_clock::now();
    {name}(image, logits, workspace);
    best = std::min(best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }}
  std::free(workspace);
  const bool same = worst <= 1e-4f * largest;
  std::printf("%s: largest difference %.2g of %.4g; %.3f ms an image (best of 50)\\n", same ? "ok" : "WRONG",
              static_cast<double>(worst), static_cast<double>(largest), best);
  return same ? 0 : 1;
}}
#endif
"""


def write_source(frozen: Frozen, file: Path) -> None:
    """Writes a network of one input as C++17.

    Raises:
      UserError: if there is no kernel for an operation, or the file's name, which becomes the function's, does not
        begin with a letter or has another meaning.
    """
    name = re.sub(r"\W", "_", file.stem, flags=re.ASCII)
    if not re.match(r"[A-Za-z]", name):
        raise UserError(f"{file}: the function is named after the file, whose name has to begin with a letter")
    code = emit(frozen.program, frozen.arrays, name, interface=False)
    # A name that stands anywhere in the code could be hidden by the function, or hide it.
    words = re.sub(r"//.*", "", code.source + _INTERFACE.replace("{name}", "") + _MAIN.replace("{name}", ""))
    if name in _TAKEN or re.search(rf"\b{name}\b", words):
        raise UserError(
            f"{file}: the function is named after the file, and {name} has a meaning in C++ or in this code; give "
            "another name"
        )
    image = (np.arange(np.prod(code.input_shape)) * 37 % 251).astype(np.uint8).reshape(1, *code.input_shape)
    arrays = {key: jnp.asarray(array) for key, array in frozen.arrays.items()}
    made = jax.jit(functools.partial(apply, frozen.program), compiler_options=_ONCE)(arrays, jnp.asarray(image))
    expected = np.concatenate([np.asarray(y, np.float32).ravel() for y in made])
    facts = {
        "name": name,
        "file": file.name,
        "shape": " x ".join(map(str, code.input_shape)),
        "outputs": ", then ".join(" x ".join(map(str, shape)) for shape in code.output_shapes),
        "results": expected.size,
        "expected": "{" + ", ".join(f"{float(v)!r}f" for v in expected) + "}",
    }
    with file.open("w", encoding="utf-8") as out:
        out.write(code.source)
        out.write(_numbers(code.weights))
        out.write(_INTERFACE.format(**facts))
        out.write(_MAIN.format(**facts))


def _numbers(weights: np.ndarray) -> str:
    """Writes the weights as hexadecimal numbers of their bits, which are short, exact, and fast to compile."""
    bits = [f"0x{value:x}" for value in weights.view(np.uint32).tolist()]
    lines = [",".join(bits[at : at + _PER_LINE]) for at in range(0, len(bits), _PER_LINE)]
    return "\nalignas(64) static const std::uint32_t WEIGHT_BITS[WEIGHTS] = {\n" + ",\n".join(lines) + "};\n"
