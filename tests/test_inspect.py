"""`lineage.inspect` says what a file holds, from its header; checked against files written here."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import stable_diffusion as sd
import torch
from safetensors.torch import save_file

import lineage
from lineage.errors import LineageError
from lineage.keys import to_ldm
from lineage.results import dumps


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl", "sdxl-refiner"])
def model(request, tmp_path_factory):
    """(kind, modules, file): a tiny model as an LDM single file."""
    parts = sd.tiny(request.param)
    path = tmp_path_factory.mktemp(request.param) / "m.safetensors"
    save_file(to_ldm(sd.states(parts), request.param), path)
    return request.param, parts, path


def test_components_are_counted_as_torch_counts_them(model):
    kind, parts, path = model
    result = lineage.inspect(path)
    assert (result.kind, result.layout, result.architecture) == ("inspect", "ldm", kind)
    counted = {c: sum(p.numel() for p in m.parameters()) for c, m in parts.items()}
    assert {c: facts.parameters for c, facts in result.components.items()} == counted
    assert result.parameters == sum(counted.values())
    assert result.dtypes == {"float32": result.tensors}
    assert result.bytes == path.stat().st_size
    assert result.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert any("OpenCLIP" in note for note in result.notes) == (kind == "sd2")


def test_records_of_origin_are_read(tmp_path: Path):
    recipe = {"type": "webui", "multiplier": 0.5}
    metadata = {
        "format": "pt",
        "sd_merge_recipe": json.dumps(recipe),
        "sd_merge_models": "{not json",
        "modelspec.title": "x <b>",
        "modelspec.prediction_type": "v",
        "ss_sd_model_hash": "0123abcd",
        "mecha_recipe": "version 0.1.0",
    }
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors", metadata=metadata)
    result = lineage.inspect(tmp_path / "m.safetensors")
    assert result.metadata == metadata
    assert result.records["sd_merge_recipe"] == recipe
    assert set(result.records) == set(metadata) - {"format"}
    assert result.prediction_type == "v"
    assert json.loads(dumps(result))["records"]["sd_merge_models"] == "{not json"


def test_notes_on_inpainting_ema_and_doubles(tmp_path: Path):
    stem, te = "model.diffusion_model.input_blocks.0.0.", "cond_stage_model.transformer."
    tensors = {
        f"{stem}weight": torch.zeros(4, 9, 3, 3),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(4, 9, 3, 3),
        f"{te}text_model.final_layer_norm.weight": torch.zeros(4),
        f"{te}final_layer_norm.weight": torch.zeros(4),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    result = lineage.inspect(tmp_path / "m.safetensors")
    assert all(any(word in note for note in result.notes) for word in ("inpainting", "EMA", "twice"))
    assert result.components["ema"].tensors == 1
    assert result.components["ema"].parameters == 4 * 9 * 9
    assert result.parameters == 4 * 9 * 9 + 8


ADAPTERS = {
    "adapter:lora": ("lora_down.weight", "lora_up.weight"),
    "adapter:loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "adapter:lokr": ("lokr_w1", "lokr_w2"),
}


@pytest.mark.parametrize("expected", ADAPTERS)
def test_adapters_are_known_by_their_names(expected, tmp_path: Path):
    module = "lora_unet_mid_block_attentions_0_proj_in"
    save_file({f"{module}.{slot}": torch.zeros(2, 2) for slot in ADAPTERS[expected]}, tmp_path / "a.safetensors")
    result = lineage.inspect(tmp_path / "a.safetensors")
    assert (result.layout, result.architecture) == ("adapter", expected)


OTHERS = {
    "flux": "double_blocks.0.img_attn.qkv.weight",
    "sd3": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "controlnet": "control_model.input_blocks.0.0.weight",
    "vae": "first_stage_model.encoder.down.0.block.0.conv1.weight",
    "unknown": "blocks.0.weight",
}


@pytest.mark.parametrize("expected", OTHERS)
def test_other_architectures(expected, tmp_path: Path):
    save_file({OTHERS[expected]: torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    assert lineage.inspect(tmp_path / "m.safetensors").architecture == expected


def test_a_pickle_and_a_folder(model, tmp_path: Path):
    kind, parts, path = model
    with lineage.open_checkpoint(path) as checkpoint:
        torch.save({"state_dict": {n: checkpoint.raw[n].half() for n in checkpoint.raw}}, tmp_path / "m.ckpt")
    pickled, single = lineage.inspect(tmp_path / "m.ckpt"), lineage.inspect(path)
    assert (pickled.architecture, pickled.parameters) == (kind, single.parameters)
    assert pickled.dtypes == {"float16": single.tensors}
    for component, state in sd.states(parts).items():
        (tmp_path / "p" / component).mkdir(parents=True)
        save_file(state, tmp_path / "p" / component / "model.safetensors")
    folder = lineage.inspect(tmp_path / "p")
    assert (folder.layout, folder.architecture, folder.parameters) == ("diffusers", kind, single.parameters)
    assert len(folder.sha256) == 64


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    for name in ("missing.safetensors", "."):
        with pytest.raises(LineageError):
            lineage.inspect(tmp_path / name)
