"""Prints a Markdown reference of all settings and flags, which it reads from the code.

python -m tools.docs_reference
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from fdjax.commands import evaluate, main, train
from fdjax.config import Config

# Scripts in the repository's root that are also commands of `fdjax`.
_SCRIPTS = {train: "train.py", evaluate: "eval.py"}
# The call in which a command parses its dataclass. Its second argument is the program's name, or a variable with it.
_PARSES = re.compile(r"parse_\w+\(\s*(\w+Arguments), (?:\"([^\"]+)\"|program)")


def field_docs(kind: type) -> dict[str, tuple[str, str]]:
    """Returns field -> (annotation, text below the field) of a dataclass and its base classes."""
    found: dict[str, tuple[str, str]] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = ""
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    text = " ".join(str(after.value.value).split())
                found[statement.target.id] = (ast.unparse(statement.annotation), text)
    return found


def settings() -> Iterator[tuple[str, type, list[tuple[str, str, str, str]]]]:
    """Yields for each part of a config its name ("" for the config itself), its class, and its rows (see `rows_of`)."""
    parts: dict[str, type] = {"": Config}
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.default):
            parts[field.name] = type(field.default)
    for name, kind in parts.items():
        default = Config() if name == "" else getattr(Config(), name)
        yield name, kind, list(rows_of(kind, f"{name}." if name else "", default))


def commands() -> Iterator[tuple[str, type]]:
    """Yields the program's name and the dataclass of the flags of each command."""
    modules = [*_SCRIPTS, *(importlib.import_module(function.__module__) for function, _ in main.COMMANDS.values())]
    for module in dict.fromkeys(modules):
        for kind, program in dict.fromkeys(_PARSES.findall(inspect.getsource(module))):
            yield program or _SCRIPTS[module], getattr(module, kind)


def rows_of(kind: type, prefix: str = "", default: Any = None) -> Iterator[tuple[str, str, str, str]]:
    """Yields (flag, type, default, text) for each field of a dataclass."""
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        annotation, text = docs[field.name]
        if dataclasses.is_dataclass(field.default) or "Config" in annotation:
            continue
        name = field.name.rstrip("_").replace("_", "-")
        value = field.default if default is None else getattr(default, field.name)
        flag = f"--{prefix}{name}"
        if annotation == "bool":
            flag += f", --{prefix}no-{name}"
        if "Positional" in annotation:
            flag = name.upper()
        shown = "needed" if value is dataclasses.MISSING else _shown(value)
        yield flag, _type_words(annotation), shown, text


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _type_words(annotation: str) -> str:
    """Describes a type: `Literal['a', 'b']` becomes "a, b", and tyro's annotations are removed."""
    choices = re.search(r"Literal\[(.*?)\]", annotation)
    if choices:
        words = ", ".join(re.findall(r"'([^']+)'", choices[1]))
        return f"some of {words}" if annotation.startswith("tuple") else words
    inner = re.match(r"Annotated\[(.*?), tyro", annotation)
    words = re.sub(r"tyro\.conf\.Positional\[(.*)\]", r"\1", inner[1] if inner else annotation)
    words = re.sub(r"tuple\[tuple\[\w+, .*\], \.\.\.\]", "pairs", words)
    return re.sub(r"tuple\[(\w+), \.\.\.\]", r"one or several of \1", words).replace("tuple[int, int]", "two ints")


def _table(rows: Iterator[tuple[str, str, str, str]] | list[tuple[str, str, str, str]]) -> str:
    lines = ["| flag | accepted | default | what |", "|---|---|---|---|"]
    for flag, kind, default, text in rows:
        shown = default if default == "needed" else f"`{default}`"
        flags = ", ".join(f"`{one}`" for one in flag.split(", "))
        cells = (flags, kind.replace("|", "or"), shown, re.sub(r"([|*_`])", r"\\\1", text).replace("<", "&lt;"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown() -> str:
    """Returns the tables of all settings, then those of all commands."""
    parts = ["## Settings of a config"]
    for name, kind, rows in settings():
        title = f"### {name}" if name else "### The run"
        parts += [title, inspect.getdoc(kind) or "", _table(rows)]
    parts.append("## Flags of the commands")
    for program, kind in commands():
        hints = typing.get_type_hints(kind)
        has_settings = any(hint is Config for hint in hints.values())
        parts += [f"### {program}", inspect.getdoc(kind) or "", _table(list(rows_of(kind)))]
        if has_settings:
            parts.append("All settings of a config are flags of this command too.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(markdown())
