"""What a single file does not carry: the configuration of each part of Stable Diffusion, and CLIP's tokenizer.

The published configurations of SD1.5, SD2.1 and SDXL are written down here; any other model brings a folder.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lineage.errors import FileError, LineageError, MissingExtra
from train.pipeline import write_tokenizer

PARTS = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}
SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
HUB_TOKENIZER = "openai/clip-vit-large-patch14"
CLIP_END = 49407

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_FOUR_LEVELS = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_CROSS, _CROSS, _CROSS, _PLAIN),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "sample_size": 64,
}
_SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": (_PLAIN, _CROSS, _CROSS),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}


def _text(width: int, layers: int, act: str, projection: int) -> dict[str, Any]:
    """CLIP's text encoders have heads of 64 and an MLP of four times their width."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    ends = {"bos_token_id": CLIP_END - 1, "eos_token_id": CLIP_END}
    return {**sizes, **ends, "num_hidden_layers": layers, "hidden_act": act, "projection_dim": projection}


_CLIP_L = _text(768, 12, "quick_gelu", 768)
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "sd1": {
        "unet": {**_FOUR_LEVELS, "cross_attention_dim": 768, "attention_head_dim": 8},
        "vae": _VAE,
        "text_encoder": _CLIP_L,
    },
    "sd2": {
        "unet": {
            **_FOUR_LEVELS,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        "vae": _VAE,
        "text_encoder": _text(1024, 23, "gelu", 512),
    },
    "sdxl": {
        "unet": _SDXL_UNET,
        "vae": {**_VAE, "scaling_factor": 0.13025, "sample_size": 1024},
        "text_encoder": _CLIP_L,
        "text_encoder_2": _text(1280, 32, "gelu", 1280),
    },
}


def configuration(part: str, architecture: str, folders: Sequence[Path]) -> tuple[dict[str, Any], str]:
    """(settings of one part, where they come from): the first folder that has them, else the published ones."""
    for folder in folders:
        if (file := folder / part / "config.json").is_file():
            return read_settings(file), str(file)
    return dict(PUBLISHED[architecture][part]), f"the published {architecture.upper()} configuration"


def noise_schedule(folders: Sequence[Path]) -> dict[str, Any]:
    """Betas, and what else the scheduler's file in a folder says; SD's own where there is none."""
    files = (folder / "scheduler" / "scheduler_config.json" for folder in folders)
    found = next((read_settings(file) for file in files if file.is_file()), {})
    return {**SCHEDULE, **found}


def read_settings(file: Path) -> dict[str, Any]:
    """A small JSON object. FileError where it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(file, f"is not readable as JSON ({e}).") from e
    if not isinstance(found, dict):
        raise FileError(file, "is not a JSON object.")
    return found


def tokenizers(architecture: str, folders: Sequence[Path]) -> list[Any]:
    """One CLIP tokenizer per text encoder: from a folder, else from open_clip's vocabulary, else from the hub's cache.

    OpenCLIP's encoders were trained on sequences filled up with "!" (number 0), OpenAI's with the end mark."""
    names = ("tokenizer", "tokenizer_2")[: len(PARTS[architecture]) - 2]
    return [_tokenizer(name, architecture == "sd2" or name == "tokenizer_2", folders) for name in names]


def _tokenizer(name: str, open_clip: bool, folders: Sequence[Path]) -> Any:
    from transformers import CLIPTokenizer

    for folder in folders:
        if (folder / name / "tokenizer_config.json").is_file():
            return CLIPTokenizer.from_pretrained(folder / name)
    found = _built() or _cached()
    if open_clip:
        found.pad_token = "!"
    return found


def _built() -> Any:
    from transformers import CLIPTokenizer

    try:
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder))
            return CLIPTokenizer.from_pretrained(folder)
    except MissingExtra:
        return None


def _cached() -> Any:
    from transformers import CLIPTokenizer

    with contextlib.suppress(OSError, ValueError):
        found = CLIPTokenizer.from_pretrained(HUB_TOKENIZER)
        if len(found) > CLIP_END:  # transformers 5 makes an empty one where it cannot fetch
            return found
    raise LineageError(
        "No tokenizer: a single file carries none. Set model.config (lineage train: --set model.config=DIR, lineage "
        "sample: --config DIR) to a folder with tokenizer/, as any diffusers model has, or let "
        f"{HUB_TOKENIZER} be fetched from the hub once; "
        "`pip install --no-deps open_clip_torch` serves too."
    )
