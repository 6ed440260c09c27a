"""Every container gives the same tensors; nothing is lost, renamed or cast."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import tempfile
from collections import OrderedDict
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lineage
from lineage.errors import LineageError
from lineage.hashing import begin, sha256, short_hash

DTYPES = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    some = {f"layers.{i}.weight": torch.randn(3, 5, generator=g).abs().to(d) for i, d in enumerate(DTYPES)}
    odd = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "nan": torch.tensor([float("nan"), float("inf")])}
    return {**some, **odd}


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN included."""
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def save_zip(t, path):
    torch.save(t, path)


def save_legacy(t, path):
    torch.save(t, path, _use_new_zipfile_serialization=False)


def save_nested(t, path):
    torch.save({"epoch": 3, "global_step": np.float64(2), "state_dict": OrderedDict(t)}, path)


def save_model(t, path):
    torch.save({"model": t}, path, pickle_protocol=4)


def save_parameters(t, path):
    made = {n: torch.nn.Parameter(x) if x.is_floating_point() and x.dtype.itemsize > 1 else x for n, x in t.items()}
    torch.save(made, path)


def save_sharded(t, path):
    folder = path.parent
    names = sorted(t)
    files = {"a-00001-of-00002.safetensors": names[::2], "a-00002-of-00002.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({n: t[n] for n in part}, folder / file)
    where = {n: file for file, part in files.items() for n in part}
    path.write_text(json.dumps({"metadata": {}, "weight_map": where}), "utf-8")


CONTAINERS = {
    "model.safetensors": save_file,
    "model.ckpt": save_zip,
    "legacy.pt": save_legacy,
    "nested.ckpt": save_nested,
    "model.pth": save_model,
    "pytorch_model.bin": save_parameters,
    "wrongly-named.ckpt": save_file,
    "model.safetensors.index.json": save_sharded,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_every_tensor(name, tmp_path: Path):
    want = tensors()
    CONTAINERS[name](want, tmp_path / name)
    with lineage.open_checkpoint(tmp_path / name) as checkpoint:
        assert set(checkpoint) == set(checkpoint.raw) == set(want)
        for n, t in want.items():
            assert same(checkpoint[n], t), n
            assert same(checkpoint.raw[n], t), n
            assert checkpoint.specs[n].shape == t.shape == checkpoint.raw.specs[n].shape
            assert checkpoint.specs[n].dtype == t.dtype == checkpoint.raw.specs[n].dtype
            assert checkpoint.raw.specs[n].nbytes == t.numel() * t.itemsize
        assert sorted(checkpoint.raw.order) == sorted(want)
        with pytest.raises(KeyError):
            checkpoint["no such name"]
        with pytest.raises(KeyError):
            checkpoint.raw["no such name"]


@pytest.mark.parametrize("name", ["model.ckpt", "legacy.pt", "model.safetensors"])
def test_offsets_say_where_the_bytes_are(name, tmp_path: Path):
    """The stated offset is that of the tensor's first byte, and `order` follows it."""
    want = {n: t for n, t in tensors().items() if t.numel()}
    CONTAINERS[name](want, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    with lineage.open_checkpoint(tmp_path / name) as checkpoint:
        specs = checkpoint.raw.specs
        for n, t in want.items():
            begin = specs[n].offset
            assert begin is not None
            stored = torch.frombuffer(bytearray(data[begin : begin + specs[n].nbytes]), dtype=torch.uint8)
            assert torch.equal(stored, t.reshape(-1).view(torch.uint8))
        offsets = [specs[n].offset or 0 for n in checkpoint.raw.order]
        assert offsets == sorted(offsets)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_that_share_a_storage(legacy, tmp_path: Path):
    base = torch.arange(24.0).reshape(4, 6)
    want = {"whole": base, "transposed": base.t(), "rows": base[1:3], "column": base[:, 2], "tied": base}
    torch.save(want, tmp_path / "m.pt", _use_new_zipfile_serialization=not legacy)
    oracle = torch.load(tmp_path / "m.pt", weights_only=True)
    with lineage.open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert all(torch.equal(checkpoint[n], oracle[n]) for n in want)


def test_storages_that_are_parts_of_others(tmp_path: Path):
    """Files of torch < 0.4 save part of a storage as ("storage", class, key, place, entries, (key, start, count))."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, "0", "cpu", 8, ("1", 2, 4)) if obj == "S" else None

    class Rebuilt:
        def __reduce__(self):
            return import_module("torch._utils")._rebuild_tensor_v2, ("S", 1, (3,), (1,), False, {})

    with open(tmp_path / "m.pt", "wb") as f:
        for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
            pickle.dump(part, f, 2)
        Pickler(f, 2).dump({"a": Rebuilt()})
        pickle.dump(["0"], f, 2)
        f.write(struct.pack("<q8f", 8, *range(8)))
    oracle = torch.load(tmp_path / "m.pt", weights_only=True)
    with lineage.open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert torch.equal(checkpoint["a"], oracle["a"])
        assert checkpoint["a"].tolist() == [3, 4, 5]


def test_changing_a_tensor_does_not_change_the_file(tmp_path: Path):
    for name in ("model.safetensors", "model.ckpt", "legacy.pt"):
        CONTAINERS[name](tensors(), tmp_path / name)
        before = sha256(tmp_path / name)
        with lineage.open_checkpoint(tmp_path / name) as checkpoint:
            checkpoint["layers.0.weight"].zero_()
        assert sha256(tmp_path / name) == before


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "legacy.pt"])
def test_a_closed_file_can_be_replaced(name, tmp_path: Path):
    CONTAINERS[name](tensors(), tmp_path / name)
    with lineage.open_checkpoint(tmp_path / name) as checkpoint:
        kept = checkpoint["layers.0.weight"].clone()
    CONTAINERS[name]({"other": torch.zeros(2)}, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / name)
    assert same(kept, tensors()["layers.0.weight"])
    with pytest.raises((LineageError, KeyError)):
        checkpoint["layers.0.weight"]


COMPONENTS = {
    "unet": ("diffusion_pytorch_model", {"conv_in.weight": (4, 4, 3, 3), "time_embedding.linear_1.weight": (8, 4)}),
    "vae": ("diffusion_pytorch_model", {"encoder.mid_block.attentions.0.to_q.weight": (4, 4)}),
    "text_encoder": ("model", {"text_model.encoder.layers.0.mlp.fc1.weight": (8, 4)}),
    "text_encoder_2": ("model", {"text_projection.weight": (4, 4)}),
}


def pipeline(folder: Path, kind: str, extra: str = "") -> dict[str, Tensor]:
    """A diffusers folder in one of its forms; canonical name -> tensor."""
    want = {}
    for component, (stem, shapes) in COMPONENTS.items():
        (folder / component).mkdir(parents=True)
        state = {n: torch.randn(s) for n, s in shapes.items()}
        want |= {f"{component}.{n}": t for n, t in state.items()}
        stem = "pytorch_model" if kind == "bin" and stem == "model" else stem
        if kind == "bin":
            torch.save(state, folder / component / f"{stem}{extra}.bin")
        elif kind == "safetensors":
            save_file(state, folder / component / f"{stem}{extra}.safetensors")
        else:
            save_sharded(state, folder / component / f"{stem}.safetensors.index.json")
    (folder / "scheduler").mkdir()
    config = {"prediction_type": "v_prediction"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), "utf-8")
    (folder / "model_index.json").write_text("{}", "utf-8")
    return want


@pytest.mark.parametrize(
    ("kind", "extra"), [("safetensors", ""), ("safetensors", ".fp16"), ("bin", ""), ("shards", "")]
)
def test_diffusers_folders(kind, extra, tmp_path: Path):
    want = pipeline(tmp_path / "p", kind, extra)
    with lineage.open_checkpoint(tmp_path / "p") as checkpoint:
        assert checkpoint.layout == "diffusers"
        assert checkpoint.prediction_type == "v"
        assert set(checkpoint) == set(want)
        assert all(torch.equal(checkpoint[n], t) for n, t in want.items())
        assert {p.component for p in checkpoint.specs.values()} == set(COMPONENTS)


def test_the_full_weights_are_taken_before_a_variant(tmp_path: Path):
    want = pipeline(tmp_path / "p", "safetensors")
    halves = pipeline(tmp_path / "q", "safetensors", ".fp16")
    shutil.copytree(tmp_path / "q", tmp_path / "p", dirs_exist_ok=True)
    with lineage.open_checkpoint(tmp_path / "p") as checkpoint:
        assert all(torch.equal(checkpoint[n], t) for n, t in want.items())
        assert not all(torch.equal(checkpoint[n], t) for n, t in halves.items())


def test_other_parts_of_a_pipeline_are_not_dropped(tmp_path: Path):
    pipeline(tmp_path / "p", "safetensors")
    for name in ("transformer", "safety_checker"):
        (tmp_path / "p" / name).mkdir()
        save_file({"blocks.0.weight": torch.zeros(2, 2)}, tmp_path / "p" / name / "model.safetensors")
    with lineage.open_checkpoint(tmp_path / "p") as checkpoint:
        assert {"transformer.blocks.0.weight", "safety_checker.blocks.0.weight"} <= set(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_transformers_folders(name, tmp_path: Path):
    want = {"model.layers.0.mlp.up_proj.weight": torch.randn(4, 3), "lm_head.weight": torch.randn(5, 3)}
    CONTAINERS[name](want, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), "utf-8")
    with lineage.open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layout == "hf"
        assert checkpoint.architecture == "llama"
        assert all(torch.equal(checkpoint[n], t) for n, t in want.items())
        assert checkpoint.specs["lm_head.weight"].component == "model"


LDM = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3)}


@pytest.mark.parametrize(
    ("more", "metadata", "yaml", "expected"),
    [
        ({}, None, None, None),
        ({"v_pred": torch.zeros(0)}, None, None, "v"),
        ({"ztsnr": torch.zeros(0)}, None, None, None),
        ({}, {"modelspec.prediction_type": "v"}, None, "v"),
        ({}, {"modelspec.prediction_type": "epsilon"}, None, "epsilon"),
        ({}, None, 'model:\n  params:\n    parameterization: "v"\n', "v"),
        ({}, None, "model:\n  params:\n    timesteps: 1000\n", "epsilon"),
    ],
)
def test_prediction_type(more, metadata, yaml, expected, tmp_path: Path):
    save_file({**LDM, **more}, tmp_path / "m.safetensors", metadata=metadata)
    if yaml:
        (tmp_path / "m.yaml").write_text(yaml, "utf-8")
    with lineage.open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.prediction_type == expected
        assert checkpoint.zero_terminal_snr == ("ztsnr" in more)


def test_ema_stays_in_raw_only(tmp_path: Path):
    ema = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(4, 4, 3, 3),
        "model_ema.decay": torch.tensor(0.9),
    }
    save_file({**LDM, **ema}, tmp_path / "m.safetensors")
    with lineage.open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert list(checkpoint) == ["unet.conv_in.weight"]
        assert set(checkpoint.raw) == {*LDM, *ema}
        assert set(checkpoint.ema) == set(ema)


def test_hashes(tmp_path: Path):
    data = os.urandom(0x110000 + 999)
    (tmp_path / "m").write_bytes(data)
    assert sha256(tmp_path / "m") == hashlib.sha256(data).hexdigest()
    assert short_hash(tmp_path / "m") == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_a_hash_begun_early_is_of_the_file_as_it_is_when_asked_for(tmp_path: Path):
    file = tmp_path / "m"
    file.write_bytes(b"old")
    begin(file, tmp_path / "missing", tmp_path)
    assert sha256(file) == hashlib.sha256(b"old").hexdigest()
    begin(file)
    file.write_bytes(b"newer")
    assert sha256(file) == hashlib.sha256(b"newer").hexdigest()


def test_the_hash_of_a_folder_is_of_its_names_and_contents(tmp_path: Path):
    def digest(**files: bytes) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return sha256(folder)

    assert digest(a=b"1", b=b"2") == digest(b=b"2", a=b"1")
    assert len({digest(a=b"1", b=b"2"), digest(a=b"2", b=b"1"), digest(a=b"1"), digest(c=b"1", b=b"2")}) == 4
