"""Stable Diffusion models from diffusers and transformers: tiny with real weights, or full size on the meta device."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel  # type: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def unet(channels, attention, context, **more) -> UNet2DConditionModel:
    """A UNet with one level per entry of `channels`; `attention`: whether each level has it."""
    down = tuple(CROSS if a else PLAIN for a in attention)
    up = tuple(d.replace("Down", "Up") for d in reversed(down))
    options = {
        "sample_size": 8,
        "block_out_channels": channels,
        "down_block_types": down,
        "up_block_types": up,
        "cross_attention_dim": context,
        "attention_head_dim": 8,
        **more,
    }
    return UNet2DConditionModel(**options)


def vae(channels, **more) -> AutoencoderKL:
    """An AutoencoderKL with one level per entry of `channels`."""
    n = len(channels)
    options = {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * n,
        "up_block_types": ("UpDecoderBlock2D",) * n,
        "latent_channels": 4,
        **more,
    }
    return AutoencoderKL(**options)


def text(width, layers, heads, *, projection=None, **more):
    """A CLIP text encoder, with projection where `projection` gives its width."""
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection or width,
        **more,
    )
    return CLIPTextModel(config) if projection is None else CLIPTextModelWithProjection(config)


def tiny(kind: str) -> dict[str, torch.nn.Module]:
    """A tiny pipeline's components with random weights: sd1 (2 levels), sd1-deep (4), sd2, sdxl, sdxl-refiner."""
    small = {"norm_num_groups": 8, "layers_per_block": 1}
    words = {"vocab_size": 64, "max_position_embeddings": 16}
    auto = vae((16, 16, 32) if kind == "sd1-deep" else (16, 32), norm_num_groups=8, layers_per_block=1)
    if kind == "sd1":
        return {
            "unet": unet((16, 32), (True, False), 24, **small),
            "vae": auto,
            "text_encoder": text(24, 2, 2, **words),
        }
    if kind == "sd1-deep":
        net = unet((16, 16, 32, 32), (True, True, True, False), 24, **{**small, "layers_per_block": 2})
        return {"unet": net, "vae": auto, "text_encoder": text(24, 3, 2, **words)}
    if kind == "sd2":
        net = unet((16, 32), (True, False), 32, use_linear_projection=True, **small)
        return {"unet": net, "vae": auto, "text_encoder": text(32, 2, 2, **words)}
    xl = {**XL, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}
    second = text(32, 2, 2, projection=32, **words)
    if kind == "sdxl-refiner":
        net = unet((16, 32, 32, 32), (False, True, True, False), 1280, **small, **xl)
        return {"unet": net, "vae": auto, "text_encoder_2": second}
    net = unet((16, 32, 32), (False, True, True), 56, transformer_layers_per_block=(1, 2, 3), **small, **xl)
    return {"unet": net, "vae": auto, "text_encoder": text(24, 2, 2, **words), "text_encoder_2": second}


def full(kind: str) -> dict[str, torch.nn.Module]:
    """Components of the published SD1.5, SD2.1 and SDXL base models, without storage."""
    with torch.device("meta"):
        auto = vae((128, 256, 512, 512), layers_per_block=2)
        four, heads = (320, 640, 1280, 1280), (True, True, True, False)
        if kind == "sd1":
            return {"unet": unet(four, heads, 768), "vae": auto, "text_encoder": text(768, 12, 12)}
        if kind == "sd2":
            net = unet(four, heads, 1024, use_linear_projection=True, attention_head_dim=(5, 10, 20, 20))
            return {"unet": net, "vae": auto, "text_encoder": text(1024, 23, 16)}
        net = unet(
            (320, 640, 1280),
            (False, True, True),
            2048,
            transformer_layers_per_block=(1, 2, 10),
            **{**XL, "attention_head_dim": (5, 10, 20)},
        )
        second = text(1280, 32, 20, projection=1280)
        return {"unet": net, "vae": auto, "text_encoder": text(768, 12, 12), "text_encoder_2": second}


def states(parts: dict[str, torch.nn.Module]) -> dict[str, dict[str, Tensor]]:
    """State dicts under transformers 4 names; plain tensors."""
    return {c: {named(c, n): t.detach() for n, t in m.state_dict().items()} for c, m in parts.items()}


def flat(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Canonical name -> tensor."""
    return {f"{c}.{n}": t for c, state in parts.items() for n, t in state.items()}


def specs(tensors: dict[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """What canonical() takes."""
    return {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}


def named(component: str, name: str) -> str:
    """The transformers 4 name; transformers 5 leaves out `text_model.`"""
    inside = component.startswith("text") and name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if inside else name
