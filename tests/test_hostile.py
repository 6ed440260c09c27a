"""Broken and hostile files: each gives a LineageError or a right answer, never a traceback, a hang or much memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

import lineage
from lineage.errors import LineageError
from lineage.raw import stays_inside
from lineage.results import dumps

SECONDS, MEGABYTES = 30, 96
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.arange(36.0).reshape(1, 4, 3, 3).half(),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.arange(6.0),
    "scalar": torch.tensor(1),
}


def looked_at(path: Path) -> dict[str, torch.Tensor] | None:
    """Everything that can be asked of a file; None where it is refused. Any other exception is a failure."""
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with lineage.open_checkpoint(path) as checkpoint:
            found = {n: checkpoint[n].clone() for n in checkpoint}
            found |= {n: checkpoint.raw[n].clone() for n in checkpoint.raw}
        dumps(lineage.inspect(path))
        return found
    except LineageError as refusal:
        return _checked(refusal, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEGABYTES * 2**20
        assert time.perf_counter() - begun < SECONDS


def _checked(refusal: LineageError, path: Path) -> None:
    """It names the file and stays readable."""
    assert path.name in str(refusal)
    assert len(str(refusal)) < 2000


def zipped(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def legacy(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


WRITERS: dict[str, Callable[[dict], bytes]] = {"m.safetensors": save, "m.ckpt": zipped, "m.pt": legacy}
each_writer = pytest.mark.parametrize("name", WRITERS)


@each_writer
def test_truncated_at_any_byte(name, tmp_path: Path):
    data = WRITERS[name](TENSORS)
    path = tmp_path / name
    path.write_bytes(data)
    assert looked_at(path)
    step = max(1, len(data) // 400)
    for length in {*range(0, len(data), step), *range(len(data) - 40, len(data))}:
        path.write_bytes(data[:length])
        assert looked_at(path) is None, length


@each_writer
@FUZZ
@given(data=st.data())
def test_changed_bytes(name, tmp_path: Path, data: st.DataObject):
    content = bytearray(WRITERS[name](TENSORS))
    places = st.integers(0, len(content) - 1)
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=4)):
        content[at] = value
    path = tmp_path / name
    path.write_bytes(content)
    looked_at(path)


@FUZZ
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".safetensors", ".ckpt", ".bin", ".index.json", ""]))
@example(content=b"", suffix=".ckpt")
@example(content=b"PK\x03\x04", suffix=".ckpt")
@example(content=b"\x80\x02.", suffix=".ckpt")
@example(content=b"\xff" * 8 + b"{", suffix=".safetensors")
def test_any_bytes_at_all(content, suffix, tmp_path: Path):
    path = tmp_path / f"m{suffix}"
    path.write_bytes(content)
    assert looked_at(path) is None


@FUZZ
@given(content=st.binary(max_size=200), start=st.sampled_from([b"\x80\x02", b"\x80\x04", b"(", b""]))
def test_any_pickle_in_a_zip(content, start, tmp_path: Path):
    (tmp_path / "m.ckpt").write_bytes(archive(start + content + b"."))
    looked_at(tmp_path / "m.ckpt")


def header(entries: dict, body: bytes = b"\0" * 64, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape, begin, end, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        header({"a": entry([16], 0, 64)}, length=2**63),
        header({"a": entry([16], 0, 64)}, length=2**40),
        header({"a": entry([16], 0, 64)}, length=10),
        header({"a": entry([16], 0, 64)}, length=0),
        header({"a": entry([8], 0, 32), "b": entry([8], 16, 48)}),
        header({"a": entry([8], 0, 32), "b": entry([4], 48, 64)}),
        header({"a": entry([8], 0, 32)}),
        header({"a": entry([2**40], 0, 2**42)}),
        header({"a": entry([2**62, 2**62], 0, 64)}),
        header({"a": entry([-1], 0, 64)}),
        header({"a": entry([16], 64, 0)}),
        header({"a": entry([16], 0, 64, "F7")}),
        header({"a": {"dtype": "F32"}}),
        header({"a": entry([16], 0, 64), "__metadata__": {"n": 3}}),
        header([1]),  # type: ignore[arg-type]
        b"[" * 100_000,
    ],
)
def test_headers_that_lie(content, tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(content)
    assert looked_at(tmp_path / "m.safetensors") is None


class Evil:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(pickled: bytes, storages: tuple[bytes, ...] = (b"\0" * 16,), compress: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        z.writestr("a/data.pkl", pickled)
        z.writestr("a/byteorder", "little")
        for i, storage in enumerate(storages):
            z.writestr(f"a/data/{i}", storage)
    return out.getvalue()


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


OUTSIDE = [
    "../x.safetensors",
    "/etc/passwd",
    "a/../../x",
    "C:\\x",
    "C:x",
    "..\\x",
    "\\\\srv\\x",
    "\\x",
    "a\\..\\..\\x",
    "",
]


@pytest.mark.parametrize("shard", [*OUTSIDE, "x\0y", 3, None, ["a"], "missing.safetensors", "m.safetensors.index.json"])
def test_an_index_names_only_files_in_its_folder(shard, tmp_path: Path):
    (tmp_path / "in").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    path = tmp_path / "in" / "m.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}), "utf-8")
    assert looked_at(path) is None
    assert not isinstance(shard, str) or shard not in OUTSIDE or not stays_inside(shard)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_an_index_that_is_none(content, tmp_path: Path):
    (tmp_path / "m.safetensors.index.json").write_text(content, "utf-8")
    assert looked_at(tmp_path / "m.safetensors.index.json") is None


def link(target: Path, at: Path) -> None:
    try:
        at.symlink_to(target)
    except OSError:
        pytest.skip("no links on this system")


def test_a_link_does_not_leave_the_folder_except_in_the_hubs_cache(tmp_path: Path):
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "in"
    folder.mkdir()
    link(tmp_path / "secret.safetensors", folder / "s.safetensors")
    index = json.dumps({"weight_map": {"a": "s.safetensors"}})
    (folder / "m.safetensors.index.json").write_text(index, "utf-8")
    assert looked_at(folder / "m.safetensors.index.json") is None

    cache = tmp_path / "models--x"
    (cache / "blobs").mkdir(parents=True)
    revision = cache / "snapshots" / "abc" / "unet"
    revision.mkdir(parents=True)
    save_file({"a": torch.zeros(2)}, cache / "blobs" / "0123")
    (cache / "blobs" / "4567").write_text(index, "utf-8")
    link(cache / "blobs" / "0123", revision / "s.safetensors")
    link(cache / "blobs" / "4567", revision / "m.safetensors.index.json")
    assert looked_at(revision / "m.safetensors.index.json")


NAMES = [
    "<script>alert(1)</script>",
    "a\x1b[31mred",
    "a\nb\r\t\0c",
    "\u202eevil",
    "=cmd|'x'",
    "a" * 5000,
    "." * 5000,
    "",
]


@each_writer
@pytest.mark.parametrize("odd", [*NAMES, "model.diffusion_model.input_blocks.²", "model.diffusion_model." + "1" * 5000])
def test_odd_names_are_only_names(name, odd, tmp_path: Path):
    (tmp_path / name).write_bytes(WRITERS[name]({odd: torch.ones(3), **TENSORS}))
    found = looked_at(tmp_path / name)
    assert found
    assert torch.equal(found[odd], torch.ones(3))


@FUZZ
@given(
    names=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=20)
        | st.sampled_from(
            [
                f"{prefix}{rest}"
                for prefix in (
                    "",
                    "model.diffusion_model.",
                    "first_stage_model.",
                    "cond_stage_model.model.",
                    "unet.",
                    "vae.",
                )
                for rest in (
                    *("input_blocks.1.0.op", "output_blocks.99999.0.in_layers.0.weight", "down_blocks.x.resnets.-1"),
                    *("transformer.resblocks.0.attn.in_proj_weight", "encoder.down.0.block.0.norm1.weight"),
                    *("text_projection", "decoder.up.٣.block.0.conv1.weight", "mid_block.attentions.0.to_q.weight"),
                )
            ]
        ),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    shape=st.sampled_from([(), (0,), (3,), (4, 0), (6, 2), (6, 2, 1, 1)]),
)
def test_any_names_keep_every_tensor(names, shape, tmp_path: Path):
    names = [n for n in names if n != "__metadata__"]
    tensors = {n: torch.full(shape, float(i)) for i, n in enumerate(names)}
    save_file(tensors, tmp_path / "m.safetensors")
    if not tensors:
        return
    with lineage.open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert {p.stored for p in checkpoint.specs.values()} == set(names)
        for name, param in checkpoint.specs.items():
            assert checkpoint[name].shape == param.shape
            assert name == param.name


@each_writer
def test_values_that_are_no_numbers(name, tmp_path: Path):
    odd = {
        "nan": torch.full((3, 3), float("nan")),
        "inf": torch.tensor([float("inf"), -float("inf")]).half(),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(float("nan")),
        "fp8": torch.full((2, 2), float("nan")).to(torch.float8_e4m3fn),
    }
    (tmp_path / name).write_bytes(WRITERS[name](odd))
    found = looked_at(tmp_path / name)
    assert found
    assert all(torch.equal(found[n].view(torch.uint8), t.view(torch.uint8)) for n, t in odd.items() if t.dim())


def test_what_is_no_file(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / "empty", tmp_path / "missing.safetensors"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        paths.append(tmp_path / "pipe.safetensors")
    assert [looked_at(path) for path in paths] == [None] * len(paths)
