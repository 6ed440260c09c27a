"""What the globals in a pickle of tensors stand for here: a tensor is a Place in the file, the rest is inert.

A Place is checked when it is made: all its entries lie in its storage, and no size can be larger than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch

_MAX_DIMENSIONS = 32


class Inert(NamedTuple):
    """Stands for any object that is no tensor and no plain data; `name` is its class."""

    name: str


class StorageType(NamedTuple):
    """The class of a storage; dtype None where the tensor says its own."""

    dtype: torch.dtype | None


@dataclass(frozen=True)
class Storage:
    """`numel` entries (bytes, where dtype is None) of the stored block `key`, from entry `start` on."""

    key: str
    dtype: torch.dtype | None
    numel: int
    start: int = 0


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `offset` and `strides` in entries of its block."""

    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def reach(self) -> int:
        """Bytes of the block from its start to this tensor's end."""
        steps = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return 0 if 0 in self.shape else (self.offset + steps + 1) * self.dtype.itemsize


def _tensor(storage: Storage, offset: int, shape: Any, strides: Any, *_: Any) -> Place:
    if storage.dtype is None:
        raise ValueError("a tensor without dtype")
    return _place(storage, offset, shape, strides, storage.dtype)


def _tensor_with_dtype(
    storage: Storage, offset: int, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Place:
    return _place(storage, offset, shape, strides, dtype)


def _place(storage: Storage, offset: Any, shape: Any, strides: Any, dtype: Any) -> Place:
    """A Place whose entries all lie in its storage and which has no more of them than the storage (none expanded)."""
    if not isinstance(storage, Storage) or not isinstance(dtype, torch.dtype):
        raise ValueError("a tensor of nothing")
    if len(shape) > _MAX_DIMENSIONS or len(shape) != len(strides):
        raise ValueError("a tensor of impossible shape")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor of impossible size")
    itemsize = 1 if storage.dtype is None else storage.dtype.itemsize
    place = Place(storage.key, offset, tuple(shape), tuple(strides), dtype)
    if max(place.reach, prod(place.shape) * dtype.itemsize) > storage.numel * itemsize:
        raise ValueError(f"a tensor of shape {place.shape} in a storage of {storage.numel} entries")
    return Place(place.key, offset + storage.start, place.shape, place.strides, dtype)


def _first(value: Any, *_: Any) -> Any:
    return value


def _from_type(_function: Any, _type: Any, arguments: Any, _state: Any) -> Place:
    return _tensor(*arguments)


def ordered(items: Any = ()) -> dict[Any, Any]:
    return dict(_pair(item) for item in items)


def _pair(item: Any) -> tuple[Any, Any]:
    key, value = item
    return plain_key(key), value


def plain_key(key: Any) -> Any:
    """Keys that name nothing become one inert key: the hash of a deeply nested tuple would exhaust the stack."""
    return key if isinstance(key, str | int | bytes | float | Inert | None) else Inert("key")


CONSTRUCTORS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_with_dtype,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "collections.OrderedDict": ordered,
}
_STORAGES = {
    f"torch.{kind}Storage": StorageType(dtype)
    for kind, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Byte": torch.uint8,
        "Char": torch.int8,
        "Short": torch.int16,
        "Int": torch.int32,
        "Long": torch.int64,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
} | dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), StorageType(None))
_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "bool"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
    )
}
_PLAIN = ("set", "frozenset", "dict", "list", "int", "long")
_HARMLESS = {
    *("torch.Size", "torch.device", "torch.Tensor", "torch.nn.parameter.Parameter"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray", "_codecs.encode"),
    *("collections.defaultdict", "collections.Counter", "argparse.Namespace", "typing.Any"),
    *(f"{b}.{kind}" for b in ("builtins", "__builtin__") for kind in _PLAIN),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "datetime.datetime", "datetime.timedelta"),
}
_HARMLESS_PACKAGES = (
    "pytorch_lightning.",
    "lightning.pytorch.",
    "lightning.fabric.",
    "lightning_fabric.",
    "omegaconf.",
)


def meaning(name: str) -> Any:
    """A constructor of ours, a StorageType, a dtype or an Inert for a global; None for one that no model needs."""
    for table in (CONSTRUCTORS, _STORAGES, _DTYPES):
        if name in table:
            return table[name]
    return Inert(name) if name in _HARMLESS or name.startswith(_HARMLESS_PACKAGES) else None
