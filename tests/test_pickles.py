"""Pickles that lie, explode or want to run code: read as data, or refused with the name of what they want."""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from suspect import archive, legacy, looked_at

import lineage
from lineage.errors import LineageError

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "scalar": torch.tensor(1)}


@FUZZ
@given(content=st.binary(max_size=200), start=st.sampled_from([b"\x80\x02", b"\x80\x04", b"(", b""]))
def test_any_pickle_in_a_zip(content, start, tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(archive(start + content + b"."))
    looked_at(tmp_path / "m.ckpt")


class Evil:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


EVIL = {
    f"{os.name if os.name == 'nt' else 'posix'}.system": Evil(os.system, "touch pwned"),
    "builtins.eval": Evil(eval, "open('pwned', 'w')"),
    "builtins.exec": Evil(exec, "open('pwned', 'w')"),
    "builtins.getattr": Evil(getattr, "text", "upper"),
    "builtins.bytearray": Evil(bytearray, 10**12),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("named", EVIL)
def test_pickles_with_code_are_refused_by_name(named, protocol, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for wrap in (lambda e: e, lambda e: {"a": 1, "x": e}, lambda e: {"callbacks": [e], "state_dict": {}}):
        content = pickle.dumps(wrap(EVIL[named]), protocol)
        (tmp_path / "m.ckpt").write_bytes(archive(content))
        with pytest.raises(LineageError) as caught:
            lineage.open_checkpoint(tmp_path / "m.ckpt")
        assert named.replace("builtins", "") in str(caught.value).replace("__builtin__", "")
        assert ".safetensors" in str(caught.value)
    if protocol == 2:
        (tmp_path / "m.pt").write_bytes(legacy({"x": EVIL[named], **TENSORS}))
        with pytest.raises(LineageError, match=named.rpartition(".")[2]):
            lineage.open_checkpoint(tmp_path / "m.pt")
    assert not (tmp_path / "pwned").exists()


def test_all_refused_names_are_told(tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(archive(pickle.dumps([*EVIL.values()], 2)))
    with pytest.raises(LineageError) as caught:
        lineage.open_checkpoint(tmp_path / "m.ckpt")
    assert all(part in str(caught.value) for part in ("system", "eval", "exec", "getattr", "bytearray"))


def tensor_pickle(numel: int, offset: int, shape: tuple, strides: tuple, storage: str = "FloatStorage") -> bytes:
    """{"a": tensor} as torch writes it, with any numbers."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", getattr(torch, storage), "0", "cpu", numel) if obj == "S" else None

    out = io.BytesIO()
    rebuild = import_module("torch._utils")._rebuild_tensor_v2
    Pickler(out, 2).dump({"a": Evil(rebuild, "S", offset, shape, strides, False, {})})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "offset", "shape", "strides", "right"),
    [
        (4, 0, (2, 2), (2, 1), True),
        (4, 0, (2, 2), (1, 2), True),
        (4, 0, (0, 10**9), (1, 1), True),
        (4, 0, (), (), True),
        (10**12, 0, (4,), (1,), True),  # only four of them are used, and those are there
        (10**12, 0, (10**12,), (1,), False),
        (4, 0, (10**6, 10**6), (0, 0), False),
        (4, 3, (2,), (1,), False),
        (4, 0, (2,), (100,), False),
        (4, -1, (2,), (1,), False),
        (4, 0, (-2,), (1,), False),
        (4, 0, (2,), (-1,), False),
        (4, 0, (2**62, 4), (1, 1), False),
        (4, 0, (2,), (1, 1), False),
        (4, 0, (1,) * 100, (1,) * 100, False),
        (-4, 0, (2,), (1,), False),
    ],
)
def test_sizes_that_lie(numel, offset, shape, strides, right, tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(archive(tensor_pickle(numel, offset, shape, strides)))
    found = looked_at(tmp_path / "m.ckpt")
    assert (found is not None) == right
    if found:
        assert tuple(found["a"].shape) == shape


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"(" * depth + b"t" * depth + b"."


BOMBS = {
    "memo index": b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".",
    "string length": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"abc.",
    "string length 8": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "nesting": nested(100_000),
    "nested key": b"\x80\x02}" + b"(" * 100_000 + b"t" * 100_000 + b"K\x01s.",
    "doubling": b"\x80\x02]q\x00" + b"(h\x00h\x00e" * 100_000 + b".",
    "same list again": b"\x80\x02]("
    + b"NN\x86" * 50_000
    + b"eq\x00"
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 5_000
    + b".",
    "many marks": b"\x80\x02" + b"(" * 200_000 + b".",
    "large number": b"\x80\x02\x8b" + struct.pack("<i", 10**6) + b"\x7f" * 10**6 + b".",
    "odd escape": b"S'\\d'\n.",
    "extension": b"\x80\x02\x82\x01.",
    "no end": b"\x80\x02}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(bomb, tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(archive(BOMBS[bomb]))
    assert looked_at(tmp_path / "m.ckpt") is None
    (tmp_path / "m.pt").write_bytes(BOMBS[bomb])
    assert looked_at(tmp_path / "m.pt") is None


def test_a_legacy_count_that_lies(tmp_path: Path):
    data = legacy({"a": torch.zeros(7)})
    lie = data.replace(struct.pack("<q", 7) + b"\0" * 28, struct.pack("<q", 10**12) + b"\0" * 28)
    assert lie != data
    (tmp_path / "m.pt").write_bytes(lie)
    assert looked_at(tmp_path / "m.pt") is None


def test_a_zip_directory_that_lies(tmp_path: Path):
    """It says that a member is longer than the whole file: mapping it would end the process."""
    content = archive(tensor_pickle(10**6, 0, (10**6,), (1,)))
    directory = content.index(b"PK\x01\x02")
    size = struct.pack("<II", 16, 16)
    assert content.count(size, directory) == 1
    lie = content[:directory] + content[directory:].replace(size, struct.pack("<II", 4 * 10**6, 4 * 10**6))
    (tmp_path / "m.ckpt").write_bytes(lie)
    assert looked_at(tmp_path / "m.ckpt") is None


def test_other_zips(tmp_path: Path):
    good = pickle.dumps({}, 2)
    cases = [
        archive(tensor_pickle(4, 0, (4,), (1,)), compress=zipfile.ZIP_DEFLATED),
        archive(pickle.dumps({"a": b"\0" * 10**8}, 2), compress=zipfile.ZIP_DEFLATED),
        archive(good),
        archive(tensor_pickle(4, 0, (4,), (1,)), storages=()),
        archive(tensor_pickle(4, 0, (4,), (1,)), storages=(b"\0" * 4,)),
    ]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("readme.txt", "no model")
    for content in [*cases, out.getvalue()]:
        (tmp_path / "m.ckpt").write_bytes(content)
        assert looked_at(tmp_path / "m.ckpt") is None


def test_lightning_files_are_read(tmp_path: Path):
    """sd-v1-4.ckpt holds callbacks and numpy numbers beside its tensors."""
    module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    parents = {n: type(sys)(n) for n in ("pytorch_lightning", "pytorch_lightning.callbacks")}
    with pytest.MonkeyPatch.context() as patch:
        for name, m in {**parents, module.__name__: module}.items():
            patch.setitem(sys.modules, name, m)
        instance = callback()
        vars(instance).update(
            monitor="loss", best={"score": torch.tensor(0.5)}, value=np.float64(0.5), dtype=np.dtype("f4")
        )
        content = {"callbacks": {"a": instance, callback: np.zeros(2)}, "loops": {}, "state_dict": TENSORS}
        torch.save(content, tmp_path / "m.ckpt")
    found = looked_at(tmp_path / "m.ckpt")
    assert found
    assert all(torch.equal(found[n], t) for n, t in TENSORS.items())
