"""Broken and hostile files: each gives a LineageError or a right answer, never a traceback, a hang or much memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from suspect import legacy, looked_at, zipped

import lineage
from lineage.raw import stays_inside

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TENSORS = {
    "model.diffusion_model.input_blocks.0.0.weight": torch.arange(36.0).reshape(1, 4, 3, 3).half(),
    "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_bias": torch.arange(6.0),
    "scalar": torch.tensor(1),
}


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
