"""Reads pickles as data: their operations are followed, but nothing that they name is imported, made or called.

Python's own unpickler executes what a file asks for, and allocates the memory that it asks for: nine bytes suffice for
4 GB. Here, a class or function is only its name, an object is only what it was given, and all data lie in the file
itself.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from fdjax.errors import UserError

# A state dict takes about 40 operations per tensor; a list of numbers takes one per number.
_MOST_OPERATIONS = 2_000_000
_PLAIN_KEYS = (str, bytes, int, float, type(None))
# Nothing that a file names is ever called. A file that names one of these was made to attack, and is refused.
_ATTACKERS = frozenset((
    "os", "posix", "nt", "subprocess", "sys", "runpy", "importlib", "socket", "shutil", "pty", "code", "codeop",
    "ctypes", "pickle", "marshal", "webbrowser", "pip", "pdb",
))  # fmt: skip
_BUILTIN_TYPES = frozenset((
    "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
    "slice", "str", "tuple",
))  # fmt: skip
# Bound methods and nested classes are pickled as calls of it, which is left uncalled like all others.
_BUILTIN_FUNCTIONS = frozenset(("getattr",))
_MARK = object()


class Inert:
    """An object, class or function that a pickle names, with what the pickle passes to it; or a key that is not plain.

    Attributes:
      name: "module.name".
      arguments: the arguments of the call; None if it was not called.
      state: the state that it was to be given, or None.
      items: the items that were set on it, by key.
    """

    __slots__ = ("arguments", "items", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] | None = None):
        self.name, self.arguments, self.state = name, arguments, None
        self.items: dict[Any, Any] = {}


class InertPickle:
    """Follows one pickle.

    Args:
      file: what messages call the file.
      called: (name, arguments) of a call -> what to put in its place, or None to leave it inert.
      persistent: persistent id -> what it stands for.
      named: called with the name of every class and function in the pickle.
    """

    def __init__(
        self,
        file: str,
        called: Callable[[str, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
        named: Callable[[str], None],
    ):
        self._file, self._called, self._persistent, self._named = file, called, persistent, named
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def load(self, stream: Any) -> Any:
        """Reads the pickle at the position of a stream, and leaves the stream after it.

        Args:
          stream: an object with `read` and `readline`, for which reading beyond the end takes no memory (`io.BytesIO`,
            `mmap`).

        Returns:
          The object of the pickle.

        Raises:
          UserError: the pickle names what only an attack would name, or has too many operations.
          Exception: the pickle is damaged.
        """
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MOST_OPERATIONS:
                raise UserError(
                    f"{self._file} holds a pickle of more than {_MOST_OPERATIONS:,} operations, far more than weights "
                    "take; save the state dict alone (torch.save(model.state_dict(), FILE))"
                )
            if opcode.name == "STOP":
                return self._stack.pop()
            handler = _HANDLERS.get(opcode.name)
            if handler is not None:
                handler(self, argument)
            elif opcode.arg is not None and not opcode.stack_before:
                self._stack.append(argument)
            else:
                raise ValueError(f"its pickle has the unsupported operation {opcode.name}")
        raise ValueError("its pickle has no end")

    # -- parts of the machine

    def _after_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def _pop(self, count: int) -> list[Any]:
        found = self._stack[-count:]
        if len(found) < count or any(value is _MARK for value in found):
            raise ValueError("its stack is empty")
        del self._stack[-count:]
        return found

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name is not text")
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # The names in old pickles.
        full = f"{module}.{name}"
        if module.partition(".")[0] in _ATTACKERS or (
            module == "builtins" and name not in _BUILTIN_TYPES | _BUILTIN_FUNCTIONS
        ):
            raise UserError(
                f"{self._file} is a pickle that wants to execute code when it is read ({full}), which fdjax never "
                "does: only tensors are read; save the state dict alone (torch.save(model.state_dict(), FILE)), or use "
                "a .safetensors file"
            )
        self._named(full)
        self._stack.append(Inert(full))

    def _call(self, function: Any, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise ValueError("a call has no arguments")
        if not isinstance(function, Inert):
            self._stack.append(Inert("an object", arguments))
            return
        if function.name in ("collections.OrderedDict", "collections.defaultdict", "builtins.dict"):
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            made: Any = {}
            for pair in pairs:
                key, value = pair
                made[_key(key)] = value
        else:
            made = self._called(function.name, arguments)
        self._stack.append(Inert(function.name, arguments) if made is None else made)

    def _put(self, into: Any, pairs: list[Any]) -> None:
        if len(pairs) % 2:
            raise ValueError("a key has no value")
        target = into.items if isinstance(into, Inert) else into
        if not isinstance(target, dict):
            raise ValueError("items are set on what is not a dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[_key(key)] = value

    # -- operations

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def pop(self, _: Any) -> None:
        self._stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._after_mark()

    def dup(self, _: Any) -> None:
        self._stack.append(self._stack[-1])

    def put(self, index: Any) -> None:
        self._memo[int(index)] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: Any) -> None:
        self._stack.append(self._memo[int(index)])

    def tuple_of(self, count: int) -> None:
        self._stack.append(tuple(self._pop(count)) if count else ())

    def marked_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._after_mark()))

    def marked_list(self, _: Any) -> None:
        self._stack.append(self._after_mark())

    def marked_dict(self, _: Any) -> None:
        pairs = self._after_mark()
        self._stack.append({})
        self._put(self._stack[-1], pairs)

    def set_items(self, _: Any) -> None:
        pairs = self._after_mark()
        self._put(self._stack[-1], pairs)

    def set_item(self, _: Any) -> None:
        pair = self._pop(2)
        self._put(self._stack[-1], pair)

    def append(self, _: Any) -> None:
        self._extend(self._pop(1))

    def appends(self, _: Any) -> None:
        self._extend(self._after_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise ValueError("values are added to what is not a list")

    def global_(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def stack_global(self, _: Any) -> None:
        self._name(*self._pop(2))

    def reduce(self, _: Any) -> None:
        self._call(*self._pop(2))

    def newobj_ex(self, _: Any) -> None:
        made, arguments, _ = self._pop(3)
        self._call(made, arguments)

    def inst(self, argument: str) -> None:
        arguments = tuple(self._after_mark())
        self.global_(argument)
        self._call(self._stack.pop(), arguments)

    def obj(self, _: Any) -> None:
        made, *arguments = self._after_mark()
        self._call(made, tuple(arguments))

    def build(self, _: Any) -> None:
        (state,) = self._pop(1)
        if isinstance(self._stack[-1], Inert):
            self._stack[-1].state = state

    def extension(self, code: int) -> None:
        self._stack.append(Inert(f"extension {code}"))

    def persid(self, pid: Any) -> None:
        self._stack.append(self._persistent(pid))

    def binpersid(self, _: Any) -> None:
        self._stack.append(self._persistent(self._pop(1)[0]))

    def constant(self, value: Any) -> None:
        self._stack.append(value)

    def nothing(self, _: Any) -> None:
        pass


def _key(key: Any) -> Any:
    # The hash of deeply nested tuples can take forever.
    return key if isinstance(key, _PLAIN_KEYS) else Inert("a key")


def _fixed(method: Callable[[InertPickle, Any], None], make: Callable[[], Any]) -> Callable[[InertPickle, Any], None]:
    return lambda machine, _: method(machine, make())


_M = InertPickle
_HANDLERS: dict[str, Callable[[InertPickle, Any], None]] = {
    "MARK": _M.mark, "POP": _M.pop, "POP_MARK": _M.pop_mark, "DUP": _M.dup, "PROTO": _M.nothing, "FRAME": _M.nothing,
    "PUT": _M.put, "BINPUT": _M.put, "LONG_BINPUT": _M.put, "MEMOIZE": _M.memoize,
    "GET": _M.get, "BINGET": _M.get, "LONG_BINGET": _M.get,
    "NONE": _fixed(_M.constant, lambda: None), "NEWTRUE": _fixed(_M.constant, lambda: True),
    "NEWFALSE": _fixed(_M.constant, lambda: False), "EMPTY_LIST": _fixed(_M.constant, list),
    "EMPTY_DICT": _fixed(_M.constant, dict), "EMPTY_SET": _fixed(_M.constant, list),
    "EMPTY_TUPLE": _fixed(_M.tuple_of, lambda: 0), "TUPLE1": _fixed(_M.tuple_of, lambda: 1),
    "TUPLE2": _fixed(_M.tuple_of, lambda: 2), "TUPLE3": _fixed(_M.tuple_of, lambda: 3),
    "TUPLE": _M.marked_tuple, "LIST": _M.marked_list, "FROZENSET": _M.marked_list, "DICT": _M.marked_dict,
    "SETITEM": _M.set_item, "SETITEMS": _M.set_items, "APPEND": _M.append, "APPENDS": _M.appends,
    "ADDITEMS": _M.appends, "GLOBAL": _M.global_, "STACK_GLOBAL": _M.stack_global, "REDUCE": _M.reduce,
    "NEWOBJ": _M.reduce, "NEWOBJ_EX": _M.newobj_ex, "INST": _M.inst, "OBJ": _M.obj, "BUILD": _M.build,
    "EXT1": _M.extension, "EXT2": _M.extension, "EXT4": _M.extension, "PERSID": _M.persid, "BINPERSID": _M.binpersid,
}  # fmt: skip
