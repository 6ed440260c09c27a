"""Tiny bases of random weights to train on, with CLIP's whole vocabulary, as single files and as diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from stable_diffusion import XL, states, text, unet, vae
from torch import Tensor, nn

from lineage.keys import to_ldm
from train import pipeline
from train.models import BUILDERS

KINDS = ("sd1", "sd2", "sdxl")
SMALL: dict[str, Any] = {"norm_num_groups": 8, "layers_per_block": 1}
WORDS: dict[str, Any] = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}


def parts(kind: str) -> dict[str, Any]:
    """Components of a tiny model; the same weights at every call."""
    torch.manual_seed(0)
    auto = vae((8, 8, 16), norm_num_groups=8, layers_per_block=1)
    if kind != "sdxl":
        more = {"use_linear_projection": True} if kind == "sd2" else {}
        first = text(16, 3, 2, hidden_act="gelu" if kind == "sd2" else "quick_gelu", **WORDS)
        return {"unet": unet((16, 24), (False, True), 16, **SMALL, **more), "vae": auto, "text_encoder": first}
    xl = {**XL, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    net = unet((16, 24), (False, True), 32, **SMALL, **xl)
    second = text(16, 3, 2, projection=16, hidden_act="gelu", **WORDS)
    return {"unet": net, "vae": auto, "text_encoder": text(16, 3, 2, **WORDS), "text_encoder_2": second}


def write_config(folder: Path, modules: dict[str, Any]) -> Path:
    """configurations and tokenizers, no weights."""
    for name, module in modules.items():
        (module.config.save_pretrained if name.startswith("text") else module.save_config)(folder / name)
    pipeline.write_tokenizer(folder / "tokenizer")
    if "text_encoder_2" in modules:
        pipeline.write_tokenizer(folder / "tokenizer_2")
    return folder


def write_file(path: Path, kind: str, extra: dict[str, Tensor] | None = None) -> Path:
    """A single file in LDM layout, float32, its configuration in `config` beside it; `extra` tensors as they are."""
    modules = parts(kind)
    write_config(path.parent / "config", modules)
    save_file({**to_ldm(states(modules), kind), **(extra or {})}, path)
    return path


def write_folder(path: Path, kind: str) -> Path:
    """A diffusers folder."""
    modules = parts(kind)
    write_config(path, modules)
    for name, module in modules.items():
        module.save_pretrained(path / name)
    return path


def published(kind: str) -> dict[str, nn.Module]:
    """Modules of the published size, without storage, as train.architectures describes them."""
    from train.architectures import PUBLISHED

    with torch.device("meta"):
        return {part: BUILDERS[part](settings) for part, settings in PUBLISHED[kind].items()}
