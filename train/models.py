"""Open any SD1.x, SD2.x or SDXL base for training: a single file in LDM layout or a diffusers folder.

Tensors come through `lineage.open_checkpoint`, so a hostile pickle never runs, under names that do not depend on the
layout. A Base knows everything that differs between the three architectures; nobody outside asks which one it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import FileError, LineageError
from lineage.layouts import modern_clip
from train import architectures, prompts
from train.architectures import PARTS
from train.config import ModelConfig
from train.pipeline import quiet

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LATENT_CHANNELS = 4
LATENTS = {"sd1": 64, "sd2": 96, "sdxl": 128}
"""Along a side of the pictures that published models were trained on."""


@dataclass(frozen=True)
class Text:
    """Prompts as the UNet reads them: states (n, tokens, width), and SDXL's pooled (n, 1280)."""

    states: Tensor
    pooled: Tensor | None = None

    def to(self, device: str | torch.device) -> Text:
        return Text(self.states.to(device), None if self.pooled is None else self.pooled.to(device))

    @staticmethod
    def cat(texts: Sequence[Text]) -> Text:
        pooled = [t.pooled for t in texts if t.pooled is not None]
        return Text(torch.cat([t.states for t in texts]), torch.cat(pooled) if pooled else None)


@dataclass
class Base:
    """A model of frozen weights, in evaluation mode. architecture: sd1, sd2 or sdxl. v: it predicts the velocity
    (Salimans & Ho 2022) instead of the noise. schedule: diffusers' DDIMScheduler with the base's betas."""

    path: Path
    architecture: str
    unet: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    schedule: Any
    precision: str = "fp32"

    @property
    def v(self) -> bool:
        return self.schedule.config.prediction_type == "v_prediction"

    @property
    def zero_terminal_snr(self) -> bool:
        return bool(self.schedule.config.rescale_betas_zero_snr)

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def shrink(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def side(self) -> int:
        """Pixels of a side of the squares that the model was made for."""
        return (self.unet.config.sample_size or LATENTS[self.architecture]) * self.shrink

    def arithmetic(self) -> AbstractContextManager[Any]:
        """The precision of forward passes: half where that was asked for; parameters that learn stay in float32."""
        half = self.precision != "fp32"
        return torch.autocast(self.device.type, DTYPES[self.precision] if half else None, enabled=half)

    def tokens(self, prompts: Sequence[str]) -> list[Tensor]:
        """Token numbers (n, 77) for each text encoder, filled up and cut as diffusers does."""
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return [t(list(prompts), max_length=t.model_max_length, **options).input_ids for t in self.tokenizers]

    def encode_text(self, prompts: Sequence[str], clip_skip: int = 1) -> Text:
        """Text states, with gradient where the text encoders have one. clip_skip 1: the layer the model was made for,
        which is the last of SD1 (2: the one before it ...), and the last but one of SDXL."""
        return self._encode(self.tokens(prompts), clip_skip)

    def encode_prompts(self, written: Sequence[str], clip_skip: int = 1) -> Text:
        """Text states of prompts with weights, of any length (train.prompts); pooled states are the first chunk's."""
        found = [prompts.chunks(tokenizer, written) for tokenizer in self.tokenizers]
        ids, weights = (list(zip(*each, strict=True)) for each in zip(*found, strict=True))
        parts = [self._encode(i, clip_skip, w) for i, w in zip(ids, weights, strict=True)]
        return Text(torch.cat([part.states for part in parts], 1), parts[0].pooled)

    def _encode(self, ids: Sequence[Tensor], clip_skip: int, weights: Sequence[Tensor] | None = None) -> Text:
        """Of token numbers (n, 77), and their weights, for each text encoder."""
        found = [e(i.to(self.device), output_hidden_states=True) for e, i in zip(self.text_encoders, ids, strict=True)]
        if clip_skip >= (depth := min(len(f.hidden_states) for f in found)):
            raise LineageError(f"{self.path}: clip skip {clip_skip}, but its text encoder has {depth - 1} layers.")
        if self.architecture == "sdxl":
            states = [f.hidden_states[-1 - clip_skip] for f in found]
        else:
            encoder = getattr(self.text_encoders[0], "text_model", self.text_encoders[0])  # transformers < 5 nests it
            states = [encoder.final_layer_norm(found[0].hidden_states[-clip_skip])]
        if weights:
            states = [prompts.weighted(z, w) for z, w in zip(states, weights, strict=True)]
        return Text(torch.cat(states, -1), found[-1].text_embeds if self.architecture == "sdxl" else None)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents (n, 4, h, w) of pixels (n, 3, height, width) in [-1, 1]: means of the posterior, scaled."""
        with torch.no_grad():
            mean = self.vae.encode(pixels.to(self.vae.device)).latent_dist.mean
        return mean * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels (n, 3, height, width) in [0, 1] of latents."""
        with torch.no_grad():
            pixels = self.vae.decode(latents.float() / self.vae.config.scaling_factor).sample
        return (pixels / 2 + 0.5).clamp(0, 1)

    def predict(self, noisy: Tensor, t: Tensor, text: Text, sizes: Tensor | None = None) -> Tensor:
        """What the UNet says at timesteps t (n,). sizes (n, 6), read by SDXL alone: height and width of the original,
        top and left of the crop, height and width of the target; left out, an uncropped picture of this size."""
        if text.pooled is None:
            return self.unet(noisy, t, text.states).sample
        if sizes is None:
            h, w = (self.shrink * side for side in noisy.shape[-2:])
            sizes = torch.tensor([[h, w, 0, 0, h, w]]).repeat(len(noisy), 1)
        added = {"text_embeds": text.pooled, "time_ids": sizes.to(noisy.device)}
        return self.unet(noisy, t, text.states, added_cond_kwargs=added).sample

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the UNet ought to say: the noise, or sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022)."""
        return self.schedule.get_velocity(latents, noise, t) if self.v else noise

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        negative: str = "",
        *,
        seeds: Sequence[int],
        steps: int = 20,
        guidance: float = 7.0,
        size: tuple[int, int],
        clip_skip: int = 1,
        stepped: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """One picture for each prompt and its seed, (n, 3, height, width) in [0, 1], by DDIM; prompts as in
        `encode_prompts`; `size` (height, width) in pixels, a multiple of `shrink`; `stepped` is called after each step.
        The noise is drawn on the CPU, so that a seed means the same on every device."""
        n, shape = len(prompts), (LATENT_CHANNELS, *(side // self.shrink for side in size))
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.stack(noise).to(self.device)
        self.schedule.set_timesteps(steps, device=self.device)
        with self.arithmetic():
            text = self.encode_prompts([*[negative] * n, *prompts], clip_skip)
            for t in self.schedule.timesteps:
                without, with_prompt = self.predict(x.repeat(2, 1, 1, 1), t.expand(2 * n), text).float().chunk(2)
                x = self.schedule.step(without + guidance * (with_prompt - without), t, x).prev_sample
                stepped()
        return self.decode(x).cpu()


def open_base(config: ModelConfig, *, device: str | torch.device = "cpu", precision: str = "fp32") -> Base:
    """The model at config.base. UNet and text encoders are held in `precision`, the autoencoder in float32 (SDXL's
    overflows in half precision).

    LineageError where it is no model to be trained, where configuration and weights do not fit, and where nothing
    tells the tokenizer or what an SD2 predicts."""
    folders = _folders(config)
    with open_checkpoint(config.base) as checkpoint:
        architecture = architecture_of(checkpoint)
        parts = {
            part: _part(
                part, checkpoint, architecture, folders, device, torch.float32 if part == "vae" else DTYPES[precision]
            )
            for part in PARTS[architecture]
            if not (part == "vae" and config.vae)
        }
        schedule = _schedule(config, checkpoint, architecture, folders)
    if config.vae:
        with open_checkpoint(config.vae) as checkpoint:
            parts["vae"] = _part("vae", checkpoint, architecture, folders, device, torch.float32)
    encoders = tuple(parts[p] for p in PARTS[architecture] if p.startswith("text"))
    tokenizers = tuple(architectures.tokenizers(architecture, folders))
    return Base(config.base, architecture, parts["unet"], parts["vae"], encoders, tokenizers, schedule, precision)


def skeleton(config: ModelConfig, precision: str = "fp32") -> tuple[str, dict[str, Any]]:
    """(architecture, part -> module) of the model at config.base, with shapes and dtypes as `open_base` gives them and
    values that mean nothing. LineageError where it is no model to be trained."""
    folders = _folders(config)
    with open_checkpoint(config.base) as checkpoint:
        architecture = architecture_of(checkpoint)
    parts: dict[str, Any] = {}
    for part in PARTS[architecture]:
        with quiet(), torch.device("meta"):
            module = BUILDERS[part](architectures.configuration(part, architecture, folders)[0])
        dtype = torch.float32 if part == "vae" else DTYPES[precision]
        state = {name: torch.empty(t.shape, dtype=dtype) for name, t in module.state_dict().items()}
        module.load_state_dict(state, assign=True)
        _fill_positions(module, "cpu")
        parts[part] = module.requires_grad_(False).eval()
    return architecture, parts


def _folders(config: ModelConfig) -> list[Path]:
    """Where configurations may lie: as named, in the base itself, in `config` beside a single file or its folder."""
    beside = config.base.absolute().parent
    found = [config.config, config.base, beside / "config", beside.parent / "config"]
    if config.config and not config.config.is_dir():
        raise FileError(
            config.config, "is not a folder.", "model.config names one with unet/config.json, tokenizer/ ..."
        )
    return [folder for folder in found if folder and folder.is_dir()]


def architecture_of(checkpoint: Checkpoint) -> str:
    """sd1, sd2 or sdxl, by the header; FileError where it is no model to be trained or drawn with."""
    found = checkpoint.architecture
    if found not in PARTS:
        raise FileError(checkpoint.path, f"is {found}: only SD1.x, SD2.x and SDXL can be trained on or drawn with.")
    channels = checkpoint.specs["unet.conv_in.weight"].shape[1]
    if channels != LATENT_CHANNELS:
        raise FileError(
            checkpoint.path,
            f"its UNet takes {channels} channels, as inpainting models do.",
            "Train on its base instead.",
        )
    return found


def _part(
    part: str,
    checkpoint: Checkpoint,
    architecture: str,
    folders: Sequence[Path],
    device: str | torch.device,
    dtype: torch.dtype,
) -> Any:
    """One module with its weights, frozen."""
    settings, source = architectures.configuration(part, architecture, folders)
    with quiet(), torch.device("meta"):
        module = BUILDERS[part](settings)
    state = _state(part, module, checkpoint, source, dtype)
    module.load_state_dict({name: t.to(device) for name, t in state.items()}, assign=True)
    _fill_positions(module, device)
    return module.requires_grad_(False).eval()


def _state(part: str, module: Any, checkpoint: Checkpoint, source: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's parameters from the checkpoint; a 1x1 kernel and a matrix are the same."""
    found: dict[str, Tensor] = {}
    for name, wanted in module.state_dict().items():
        stored = f"{part}.{modern_clip(name) if part.startswith('text') else name}"
        if stored not in checkpoint.specs:
            raise FileError(checkpoint.path, f"has no {stored}, which {source} asks for.", ANOTHER)
        param = checkpoint.specs[stored]
        if param.shape[:2] != wanted.shape[:2] or param.numel != wanted.numel():
            problem = f"{stored} is {param.shape}, and {tuple(wanted.shape)} by {source}."
            raise FileError(checkpoint.path, problem, ANOTHER)
        found[name] = checkpoint[stored].reshape(wanted.shape).to(dtype, copy=True)
    return found


ANOTHER = (
    "Set model.config (lineage train: --set model.config=DIR, lineage sample: --config DIR) to the folder of the "
    "model's own configuration, as diffusers lays it out."
)


def _fill_positions(module: Any, device: str | torch.device) -> None:
    """CLIP's position numbers are no part of its state, so they are still without storage."""
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if buffer.is_meta:
                child.register_buffer(name, torch.arange(buffer.shape[-1], device=device)[None], persistent=False)


def _unet(settings: Mapping[str, Any]) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(dict(settings))


def _vae(settings: Mapping[str, Any]) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL.from_config(dict(settings))


def _clip(settings: Mapping[str, Any], projected: bool = False) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    # 2 is an old mistake in published files: it makes the pooled state that of the highest number, a new word's too
    wrong = settings.get("eos_token_id") == 2 and settings.get("vocab_size", 49408) > architectures.CLIP_END
    config = CLIPTextConfig(**{**settings, **({"eos_token_id": architectures.CLIP_END} if wrong else {})})
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


BUILDERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _clip,
    "text_encoder_2": lambda settings: _clip(settings, projected=True),
}


def _schedule(config: ModelConfig, checkpoint: Checkpoint, architecture: str, folders: Sequence[Path]) -> Any:
    """DDIM with the base's betas and prediction. Timesteps must reach the last one where its SNR is zero (Lin et al.
    2023, section 3.3)."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    said = architectures.noise_schedule(folders)
    zero = bool(said.get("rescale_betas_zero_snr")) or checkpoint.zero_terminal_snr
    zero = zero if config.zero_terminal_snr is None else config.zero_terminal_snr
    own = {
        "prediction_type": _prediction(config, checkpoint, architecture, said),
        "rescale_betas_zero_snr": zero,
        "timestep_spacing": "trailing" if zero else "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    }
    known = {*architectures.SCHEDULE, "trained_betas"}
    return DDIMScheduler(**{k: v for k, v in said.items() if k in known}, **own)


def _prediction(config: ModelConfig, checkpoint: Checkpoint, architecture: str, said: Mapping[str, Any]) -> str:
    if config.prediction != "auto":
        return config.prediction
    found = checkpoint.prediction_type or said.get("prediction_type")
    if found is None and architecture == "sd2":
        raise LineageError(
            f"{checkpoint.path}: nothing says whether this SD2 predicts noise (512 px models) or v (768 px models). "
            "Set model.prediction (lineage sample: --prediction) to epsilon or v_prediction."
        )
    return "v_prediction" if str(found).startswith("v") else "epsilon"
