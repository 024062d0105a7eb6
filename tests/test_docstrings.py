"""Public functions on arrays say in one style (Google's) what they take, return and raise.

The check reads source text and imports nothing, so that it covers files whose libraries are absent.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ARRAYS = ("ArrayLike", "Array", "ndarray", "NDArray", "PyTree", "TrainState")
# Parameters by these names are trees of arrays where their annotation is `Any`.
TREES = {"variables", "params", "fcmask", "fcmasks", "images", "labels", "grads"}
REPORTED = {"UserError", "ValueError"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def words(node: ast.AST | None) -> set[str]:
    """The identifiers in an annotation; one in quotes counts too."""
    return set() if node is None else set(re.findall(r"\w+", ast.unparse(node)))


@functools.cache
def array_names() -> frozenset[str]:
    """The names of array types, and of the aliases that fdjax makes of them, such as `Counts`."""
    aliases = {}
    for file in (ROOT / "fdjax").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and isinstance(node.value, ast.Subscript)
                and "Callable" not in words(node.value)
            ):
                aliases[node.targets[0].id] = words(node.value)
    names = set(ARRAYS)
    while found := {alias for alias, parts in aliases.items() if parts & names} - names:
        names |= found
    return frozenset(names)


def parameters(function: Function) -> list[ast.arg]:
    spec = function.args
    every = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    return [arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def on_arrays(function: Function) -> bool:
    """Whether the function takes or returns arrays, by its annotations."""
    named = any("Any" in words(arg.annotation) for arg in parameters(function) if arg.arg in TREES)
    annotations = [function.returns, *(arg.annotation for arg in parameters(function))]
    return named or any(words(annotation) & array_names() for annotation in annotations)


def public_functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Functions of a module and methods of its public classes, but no property, which is documented as a value."""
    for node in tree.body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, Function) and not method.name.startswith("_"):
                    decorators = {word for decorator in method.decorator_list for word in words(decorator)}
                    if not decorators & {"property", "cached_property", "overload"}:
                        yield f"{node.name}.{method.name}", method


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """The nodes of a function's body, but not of functions that it defines."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(node)


def sections(docstring: str) -> dict[str, list[str]]:
    """A Google-style docstring's sections, each with its non-empty lines."""
    found, lines = {}, []
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Yields|Raises|Example|Examples):", line):
            lines = found.setdefault(line[:-1], [])
        elif line and not line.startswith(" "):
            lines = []
        elif line.strip():
            lines.append(line)
    return found


def entries(lines: list[str]) -> list[str]:
    """The names that a section's entries describe: `name: ...`, or `name, other: ...`."""
    heads = [match[1] for line in lines if (match := re.match(r" {2}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", line))]
    return [name.lstrip("*") for head in heads for name in head.split(", ")]


def faults(function: Function) -> Iterator[str]:
    """What a function's docstring lacks."""
    docstring = ast.get_docstring(function)
    if docstring is None:
        yield "has no docstring"
        return
    said = sections(docstring)
    nodes = list(own_nodes(function))
    wanted, named = [arg.arg for arg in parameters(function)], entries(said.get("Args", []))
    if sorted(named) != sorted(wanted):
        yield f"takes ({', '.join(wanted)}); its Args: name ({', '.join(named)})"
    returns = any(isinstance(node, ast.Return) and node.value is not None for node in nodes)
    yields = any(isinstance(node, ast.Yield | ast.YieldFrom) for node in nodes)
    abstract = function.returns is not None and not words(function.returns) & {"None", "NoReturn"}
    if (returns or yields or abstract) and not (said.get("Returns") or said.get("Yields")):
        yield "has no Returns: or Yields:"
    raised = {name for node in nodes if isinstance(node, ast.Raise) for name in words(node.exc) & REPORTED if node.exc}
    if missing := raised - set(entries(said.get("Raises", []))):
        yield f"raises {', '.join(sorted(missing))} without naming it under Raises:"


@functools.cache
def offered() -> frozenset[tuple[str, str]]:
    """Module and name of each function that `import fdjax` offers, by the imports for type checkers."""
    found = set()
    for package in ("fdjax", "fdjax.ops"):
        tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
                found |= {(node.module, alias.name) for alias in node.names}
    return frozenset(found)


def faults_of(source: str, module: str = "") -> list[str]:
    found = []
    for name, function in public_functions(ast.parse(source)):
        if on_arrays(function) or (module, name) in offered():
            found += [f"line {function.lineno}, {name}: {fault}" for fault in faults(function)]
    return found


def test_public_functions_on_arrays_document_what_they_take_and_return():
    found = []
    for file in sorted((ROOT / "fdjax").rglob("*.py")):
        path = file.relative_to(ROOT)
        parts = path.with_suffix("").parts
        private = any(part.startswith("_") and not part.startswith("__") for part in parts)
        if not private:
            found += [f"{path.as_posix()}, {fault}" for fault in faults_of(file.read_text(), ".".join(parts))]
    assert not found, "\n".join(found)


GOOD = '''
def scale(x_BC: jax.Array, factor, *rest) -> jax.Array:
    """Scales values.

    Args:
      x_BC: values, [batch, channels].
      factor, *rest: what to multiply by.

    Returns:
      The scaled values, [batch, channels].

    Raises:
      ValueError: the factor is 0.
    """
    if not factor:
        raise ValueError("factor is 0")
    return x_BC * factor
'''


def test_the_check_finds_what_is_missing():
    assert faults_of(GOOD) == []
    assert "Args: name (x_BC, factor)" in faults_of(GOOD.replace("factor, *rest: what", "factor: what"))[0]
    assert "takes (x_BC, factor, rest)" in faults_of(GOOD.replace("x_BC: values", "y_BC: values"))[0]
    assert "no Returns" in faults_of(GOOD.replace("    Returns:\n", ""))[0]
    assert "raises ValueError" in faults_of(GOOD.replace("ValueError: the", "KeyError: the"))[0]
    assert "no docstring" in faults_of("def bare(counts: Counts): ...")[0]
    assert faults_of("def plain(size: int) -> int: ...") == faults_of("def _own(x: jax.Array): ...") == []
    assert faults_of("class Net:\n    def apply(self, variables: Any): ...")
