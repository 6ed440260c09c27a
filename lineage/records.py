"""A result's JSON back into its typed record; what does not fit is the user's to mend, and is named by its place."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lineage.errors import LineageError

T = TypeVar("T")


def restore(record: type[T], found: Any, where: str = "result") -> T:
    """The dataclass `record` from its plain JSON form `found`. Unknown fields are ignored (a later minor schema).

    Raises LineageError that names the field when one is missing or of another type.
    """
    return _restored(record, found, where)


def _restored(kind: Any, found: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return found
    if origin in (Union, types.UnionType):
        return _optional(kind, found, where)
    if dataclasses.is_dataclass(kind):
        return _record(kind, found, where)
    if origin is tuple:
        return _sequence(get_args(kind), _typed(list, found, where, "a list"), where)
    if origin is dict:
        value = get_args(kind)[1]
        return {k: _restored(value, v, f"{where}.{k}") for k, v in _typed(dict, found, where, "an object").items()}
    return _scalar(kind, found, where)


def _optional(kind: Any, found: Any, where: str) -> Any:
    return None if found is None else _restored(next(a for a in get_args(kind) if a is not type(None)), found, where)


def _sequence(arguments: tuple, found: list, where: str) -> tuple:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(found)
    if len(arguments) != len(found):
        raise _misfit(where, f"a list of {len(arguments)}", found)
    return tuple(_restored(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(arguments, found, strict=True)))


def _record(kind: Any, found: Any, where: str) -> Any:
    _typed(dict, found, where, "an object")
    hints = _hints(kind)
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in found and not _has_default(f)]
    if missing:
        raise LineageError(f"{where}: lacks {', '.join(missing)}. Was the file cut or edited? Run the verb again.")
    return kind(
        **{name: _restored(hint, found[name], f"{where}.{name}") for name, hint in hints.items() if name in found}
    )


_CACHE: dict[Any, dict[str, Any]] = {}


def _hints(kind: Any) -> dict[str, Any]:
    if kind not in _CACHE:
        _CACHE[kind] = get_type_hints(kind)
    return _CACHE[kind]


def _has_default(f: dataclasses.Field) -> bool:
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _scalar(kind: Any, found: Any, where: str) -> Any:
    if kind is float and isinstance(found, int) and not isinstance(found, bool):
        found = float(found)
    wrong = not isinstance(found, kind) or (kind is int and isinstance(found, bool))
    if wrong or (kind is float and not math.isfinite(found)):
        raise _misfit(where, f"a value of type {kind.__name__}", found)
    return found


def _typed(kind: type, found: Any, where: str, wanted: str) -> Any:
    if not isinstance(found, kind):
        raise _misfit(where, wanted, found)
    return found


def _misfit(where: str, wanted: str, found: Any) -> LineageError:
    return LineageError(
        f"{where}: {wanted} is needed, found {repr(found)[:40]}. Was the file edited? Run the verb again."
    )
