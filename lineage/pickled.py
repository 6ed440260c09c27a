"""A pickle of tensors read as data: nothing that it names is imported or called.

A small machine goes through the instructions and knows a fixed list of constructors; a tensor becomes a Place (storage,
offset, shape, strides), so a lying size cannot allocate anything. A global that is not on the list is remembered and
the pickle refused with the names of all of them.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from lineage.places import CONSTRUCTORS, Inert, Storage, StorageType, meaning, ordered, plain_key

MAX_PICKLE = 16 * 2**20  # bytes; that of SDXL has 0.4 MB
_MAX_ITEMS = 200_000  # copied in all, so that a short pickle cannot ask for the same long list for ever
_MAX_ARGUMENTS = 16
_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, EOFError, MemoryError, RecursionError)


class Refused(ValueError):
    """The pickle names globals that a model has no need of."""

    def __init__(self, names: list[str]):
        super().__init__(", ".join(names))
        self.names = names


class Pickle(NamedTuple):
    """The object, the length of its pickle in bytes, and storage key -> bytes per entry."""

    found: Any
    length: int
    itemsizes: dict[str, int]


def interpret(data: bytes) -> Pickle:
    """The pickle that `data` begins with, as dicts, lists, tuples, numbers, strings, Place and Inert.

    Refused for globals outside the list, ValueError for anything malformed."""
    machine = _Machine()
    found = None, 0
    try:
        with warnings.catch_warnings():  # the reader of old string literals warns of their escapes
            warnings.simplefilter("ignore", DeprecationWarning)
            found = machine.run(io.BytesIO(data))
    except _FAULTS as e:
        if not machine.refused:
            raise ValueError(f"malformed pickle: {str(e)[:200] or type(e).__name__}") from e
    if machine.refused:
        raise Refused(machine.refused)
    return Pickle(*found, machine.itemsizes)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_IGNORED = {"PROTO", "FRAME"}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_MARK = Inert("mark")


class _Machine:
    """The stack machine of pickle, over plain data. `refused`: unknown globals so far."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.refused: list[str] = []
        self.itemsizes: dict[str, int] = {}
        self.items = 0

    def run(self, stream: io.BytesIO) -> tuple[Any, int]:
        for op, value, _ in pickletools.genops(stream):
            if op.name == "STOP":
                return self.stack.pop(), stream.tell()
            if op.name in _LITERALS:
                self.stack.append(value)
            elif op.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[op.name])
            elif op.name not in _IGNORED:
                _STEPS[op.name](self, value)
        raise ValueError("no end")

    def marked(self) -> list[Any]:
        """All above the last mark, taken off with it."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("a mark is missing")
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def known(self, name: str) -> Any:
        """What stands here for a global; an unknown one is noted and inert."""
        found = meaning(name)
        if found is None and name not in self.refused:
            self.refused.append(name)
        return Inert(name) if found is None else found

    def call(self, function: Any, arguments: Any) -> Any:
        """Only the constructors of this file are called."""
        if isinstance(function, Inert):
            return function
        if function not in CONSTRUCTORS.values() or len(arguments) > _MAX_ARGUMENTS:
            raise ValueError("a call of what cannot be called")
        if function is ordered and arguments:
            self.items += len(arguments[0])
            if self.items > _MAX_ITEMS:
                raise ValueError("too many items")
        return function(*arguments)

    def fill(self, values: list[Any]) -> None:
        """Key, value, key, value, ... into the dict on top."""
        target = self.stack[-1]
        if isinstance(target, dict):
            target.update(zip(map(plain_key, values[::2]), values[1::2], strict=True))
        elif not isinstance(target, Inert):
            raise ValueError("items for what is no dict")

    def extend(self, values: list[Any]) -> None:
        """Values onto the list on top."""
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):
            raise ValueError("values for what is no list")

    def storage(self, identity: Any) -> Storage:
        """A persistent id of torch: ("storage", class, key, location, entries[, view])."""
        label, kind, key, _, numel, *view = identity
        if label != "storage" or not isinstance(kind, StorageType) or not isinstance(key, str | int):
            raise ValueError("a storage of unknown kind")
        start, numel = (view[0][1], view[0][2]) if view and view[0] else (0, numel)
        if not all(type(n) is int and 0 <= n < 2**62 for n in (start, numel)):
            raise ValueError("a storage of impossible size")
        self.itemsizes[str(key)] = 1 if kind.dtype is None else kind.dtype.itemsize
        return Storage(str(key), kind.dtype, numel, start)


def _reduce(m: _Machine, _: Any) -> None:
    arguments = m.stack.pop()
    m.stack[-1] = m.call(m.stack[-1], arguments)


def _new_with_names(m: _Machine, _: Any) -> None:
    m.stack.pop()
    _reduce(m, None)


def _old_object(m: _Machine, _: Any) -> None:
    function, *arguments = m.marked()
    m.stack.append(m.call(function, arguments))


def _old_instance(m: _Machine, value: str) -> None:
    m.stack.append(m.call(m.known(value.replace(" ", ".", 1)), m.marked()))


def _named_on_stack(m: _Machine, _: Any) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.stack.append(m.known(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"))


def _pack(m: _Machine, count: int) -> None:
    items = tuple(m.stack[-count:])
    if len(items) != count:
        raise ValueError("too few values")
    m.stack[-count:] = [items]


def _set_item(m: _Machine, _: Any) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    m.fill([key, value])


def _remember(m: _Machine, index: Any) -> None:
    m.memo[len(m.memo) if index is None else index] = m.stack[-1]


def _recall(m: _Machine, index: Any) -> None:
    m.stack.append(m.memo[index])


def _dict(m: _Machine, _: Any) -> None:
    values = m.marked()
    m.stack.append({})
    m.fill(values)


_STEPS: dict[str, Callable[[_Machine, Any], Any]] = {
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": lambda m, _: m.marked(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append(Inert("set")),
    "LIST": lambda m, _: m.stack.append(m.marked()),
    "DICT": _dict,
    "FROZENSET": lambda m, _: (m.marked(), m.stack.append(Inert("set"))),
    "ADDITEMS": lambda m, _: m.marked(),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, _: _pack(m, 1),
    "TUPLE2": lambda m, _: _pack(m, 2),
    "TUPLE3": lambda m, _: _pack(m, 3),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.marked()),
    "SETITEM": _set_item,
    "SETITEMS": lambda m, _: m.fill(m.marked()),
    "GLOBAL": lambda m, value: m.stack.append(m.known(value.replace(" ", ".", 1))),
    "STACK_GLOBAL": _named_on_stack,
    "REDUCE": _reduce,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _new_with_names,
    "OBJ": _old_object,
    "INST": _old_instance,
    "BUILD": lambda m, _: m.stack.pop(),
    "BINPERSID": lambda m, _: m.stack.append(m.storage(m.stack.pop())),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _recall),
}
