"""A tiny Stable Diffusion: the classes, wiring and file layout of SD1, 3 million parameters besides its embedding.

UNet2DConditionModel over latents of 4 x 16 x 16, AutoencoderKL (64 px, a quarter of it in latents), CLIPTextModel with
the real CLIP vocabulary (built from the merges that open_clip ships), DDIM with SD1's noise schedule.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from lineage.errors import MissingExtra
from lineage.keys import to_ldm
from lineage.target import Target
from lineage.writer import SafetensorsWriter, TensorSpec

if TYPE_CHECKING:
    from PIL import Image

Pipeline: TypeAlias = Any
"""diffusers' StableDiffusionPipeline, whose own annotations make every part of it optional."""

MERGES = "bpe_simple_vocab_16e6.txt.gz"
VOCABULARY = 49408
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Size:
    """Channels and depths. `text` is also the width of cross attention; over 64, so that a rank of 64 can be asked."""

    unet: tuple[int, ...] = (48, 96)
    attention: tuple[bool, ...] = (False, True)
    unet_layers: int = 1
    heads: int = 4
    vae: tuple[int, ...] = (16, 64, 64)
    text: int = 96
    text_layers: int = 2


def build(size: Size, tokenizer: Path, seed: int) -> Pipeline:
    """A pipeline with random weights that depend on `seed` alone; `tokenizer`: a folder as `write_tokenizer` makes."""
    import diffusers
    import transformers

    with quiet():
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts: dict[str, Any] = {
            "vae": _vae(diffusers, size),
            "text_encoder": _text_encoder(transformers, size),
            "tokenizer": transformers.CLIPTokenizer.from_pretrained(tokenizer),
            "unet": _unet(diffusers, size),
            "scheduler": _scheduler(diffusers),
        }
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with quiet():
        pipeline = StableDiffusionPipeline(**parts, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unet(diffusers: Any, size: Size) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=size.unet,
        layers_per_block=size.unet_layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in size.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(size.attention)),
        attention_head_dim=size.heads,
        cross_attention_dim=size.text,
        norm_num_groups=8,
    )


def _vae(diffusers: Any, size: Size) -> Any:
    levels = len(size.vae)
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=size.vae,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    _prepare(vae)
    return vae


def _prepare(vae: Any) -> None:
    """Orthogonal kernels and silent residual branches: diffusers' default lets the signal fade on its long straight way
    (L1 after 250 steps 0.09 instead of 0.06), and a posterior of deviation 1 would drown it at first."""
    from torch.nn import Conv2d, init

    for name, module in vae.named_modules():
        if isinstance(module, Conv2d):
            init.orthogonal_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        if name.endswith(".conv2"):
            init.zeros_(module.weight)
    init.zeros_(vae.quant_conv.weight[4:])
    init.constant_(vae.quant_conv.bias[4:], -6.0)


def _text_encoder(transformers: Any, size: Size) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.text,
        intermediate_size=4 * size.text,
        num_hidden_layers=size.text_layers,
        num_attention_heads=size.heads,
        projection_dim=size.text,
        bos_token_id=VOCABULARY - 2,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=VOCABULARY - 1,
    )
    return transformers.CLIPTextModel(config).eval()


def _scheduler(diffusers: Any) -> Any:
    return diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def write_tokenizer(folder: Path) -> None:
    """vocab.json, merges.txt and configuration of CLIP's tokenizer, from the merges in the open_clip package."""
    merges = _merges()
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters] + ["".join(m.split()) for m in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _merges() -> list[str]:
    # find_spec, not import: open_clip itself needs torchvision, its data file does not
    spec = importlib.util.find_spec("open_clip")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders:
        raise MissingExtra("demo", "train", "open_clip_torch (pip install --no-deps open_clip_torch)")
    lines = gzip.decompress((Path(folders[0]) / MERGES).read_bytes()).decode("utf-8").split("\n")
    return lines[1 : VOCABULARY - 512 - 2 + 1]


def _byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes, in the order of CLIP's vocabulary (GPT-2's byte-level BPE)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def encode_text(pipeline: Pipeline, captions: Sequence[str]) -> Tensor:
    """Text states (batch, 77, text), with gradient to the text encoder."""
    return pipeline.text_encoder(token_ids(pipeline, captions))[0]


def token_ids(pipeline: Pipeline, captions: Sequence[str]) -> Tensor:
    """Token numbers (batch, 77), padded and cut as the pipeline itself does."""
    tokenizer = pipeline.tokenizer
    return tokenizer(
        list(captions),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def sample(
    pipeline: Pipeline, prompts: Sequence[str], seed: int, steps: int = 25, guidance: float = 4.0
) -> list[Image.Image]:
    """One picture per prompt; prompt i starts from the noise of seed + i, whatever the model."""
    noise = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    with torch.no_grad():
        found = pipeline(list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=noise)
    return found.images


def write_config(pipeline: Pipeline, folder: Path) -> None:
    """What `from_single_file(config=folder, local_files_only=True)` needs: every configuration, no weights."""
    pipeline.save_config(folder)
    for name in ("unet", "vae", "scheduler"):
        getattr(pipeline, name).save_config(folder / name)
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")


def load(file: Path) -> Pipeline:
    """A single file in float32, through diffusers' own loader; `write_config` filled the `config` beside its folder."""
    with quiet():
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

        found = StableDiffusionPipeline.from_single_file(
            str(file), config=str(file.parent.parent / "config"), local_files_only=True, torch_dtype=torch.float32
        )
    found.set_progress_bar_config(disable=True)
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """No bar for five small parts, no warning of the absent safety checker, none of processors that nobody uses."""
    from diffusers.utils import logging as diffusers
    from transformers.utils import logging as transformers

    before = [(lib, lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in (diffusers, transformers)]
    for lib, _, _ in before:
        lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib, level, bars in before:
            lib.set_verbosity(level)
            if bars:
                lib.enable_progress_bar()


def save(pipeline: Pipeline, file: Path, metadata: Mapping[str, str]) -> None:
    """One LDM single file in fp16, as models are passed around."""
    states = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder, "vae": pipeline.vae}
    tensors = to_ldm({name: module.state_dict() for name, module in states.items()})
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    more = {"format": "pt", "modelspec.architecture": "stable-diffusion-v1", "modelspec.title": file.stem}
    write_tensors(file, halves, {**more, **metadata})


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A .safetensors file, whole or not at all; its bytes depend on nothing else (safetensors shuffles metadata)."""
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    with Target(file) as target:
        writer = SafetensorsWriter(target.file, specs, metadata)
        for name in writer.order:
            writer.put(name, tensors[name])
        writer.finish(metadata)
        target.sync()
        target.commit()
