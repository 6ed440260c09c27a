"""Full training of a tiny Stable Diffusion: first its autoencoder, then UNet and text encoder on cached latents.

Batches, noise, timesteps and dropped captions come from one explicit generator, so a run repeats bit by bit on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from train.muon import Muon
from train.pictures import Picture
from train.pipeline import Pipeline, encode_text

OUTER = ("conv_in", "conv_out", "embedding")


@dataclass(frozen=True)
class Plan:
    """AdamW at `lr`; Muon at `muon_lr` for the inner matrices where that is not 0. Both warm up linearly and go down a
    cosine to zero; gradients are clipped at norm 1."""

    steps: int
    lr: float
    muon_lr: float = 0.0
    batch: int = 16
    warmup: int = 20
    weight_decay: float = 0.01
    weight_cap: float = 8.0
    drop_caption: float = 0.1
    drop_tag: float = 0.1


@dataclass(frozen=True)
class Step:
    """One optimiser step: its number (from 1) of how many, and the loss of its batch."""

    number: int
    of: int
    loss: float


def descend(parameters: Mapping[str, Tensor], loss: Callable[[], Tensor], plan: Plan) -> Iterator[Step]:
    """Take plan.steps steps down `loss()`; the caller may stop listening, then the steps stop too."""
    optimizers = _optimizers(parameters, plan)
    for number in range(1, plan.steps + 1):
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * rate(number, plan)
            optimizer.zero_grad(set_to_none=True)
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        yield Step(number, plan.steps, float(value.detach()))


def _optimizers(parameters: Mapping[str, Tensor], plan: Plan) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon takes matrices and kernels, not embeddings and not the layers that touch pixels or latents."""
    inner = (
        {n for n, p in parameters.items() if p.ndim > 1 and not any(w in n for w in OUTER)} if plan.muon_lr else set()
    )
    rest = [p for n, p in parameters.items() if n not in inner]
    adam = torch.optim.AdamW(rest, lr=plan.lr, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True)
    if not inner:
        return [(adam, plan.lr)]
    return [(adam, plan.lr), (Muon([parameters[n] for n in sorted(inner)], plan.muon_lr), plan.muon_lr)]


def rate(number: int, plan: Plan) -> float:
    """Share of plan.lr at step `number` (from 1)."""
    warm = min(1.0, number / max(1, plan.warmup))
    return warm * 0.5 * (1 + math.cos(math.pi * (number - 1) / plan.steps))


def pixels(pictures: Sequence[Picture]) -> Tensor:
    """(n, 3, height, width) in [-1, 1]."""
    import numpy as np

    stacked = np.stack([np.asarray(p.image) for p in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit_autoencoder(vae: Any, images: Tensor, plan: Plan, seed: int) -> Iterator[Step]:
    """L1 of the reconstruction plus 1e-6 KL; afterwards latents are standardised (`standardise`)."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        x = crops(images[torch.randint(len(images), (plan.batch,), generator=generator)], generator)
        posterior: Any = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        out = vae.decode(posterior.mean + posterior.std * noise).sample
        return functional.l1_loss(out, x) + 1e-6 * posterior.kl().mean()

    yield from descend(dict(vae.named_parameters()), loss, plan)
    standardise(vae, images[:512])


def crops(images: Tensor, generator: torch.Generator, size: int = 32) -> Tensor:
    """One window (n, 3, size, size) for the whole batch, on the grid of latents: a quarter of the work per step."""
    y, x = (4 * torch.randint((images.shape[-1] - size) // 4 + 1, (2,), generator=generator)).tolist()
    return images[:, :, y : y + size, x : x + size]


@torch.no_grad()
def standardise(vae: Any, images: Tensor) -> None:
    """Fold shift and scale into the 1x1 convs around the latents, so that each channel times SD's own scaling_factor
    has mean 0 and deviation 1 over `images`; what the autoencoder computes does not change."""
    z = encode_latents(vae, images) / vae.config.scaling_factor
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3)) * vae.config.scaling_factor
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # log variance of the scaled latent
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def encode_latents(vae: Any, images: Tensor) -> Tensor:
    """Means of the posterior times scaling_factor, (n, 4, height / 4, width / 4)."""
    found = [vae.encode(part).latent_dist.mean for part in images.split(64)]
    return torch.cat(found) * vae.config.scaling_factor


@torch.no_grad()
def decoded(vae: Any, images: Tensor) -> Tensor:
    """What the autoencoder makes of pictures, (n, 3, height, width) in [-1, 1]."""
    latents = encode_latents(vae, images) / vae.config.scaling_factor
    return torch.cat([vae.decode(part).sample for part in latents.split(64)]).clamp(-1, 1)


def fit_denoiser(
    pipeline: Pipeline,
    pictures: Sequence[Picture],
    plan: Plan,
    seed: int,
    parameters: Mapping[str, Tensor] | None = None,
) -> Iterator[Step]:
    """Epsilon prediction on cached latents; UNet and text encoder learn, the autoencoder does not.

    parameters: what learns instead, such as a network's on the frozen models."""
    latents = encode_latents(pipeline.vae, pixels(pictures))
    generator = torch.Generator().manual_seed(seed)
    if parameters is None:
        parameters = dict(pipeline.unet.named_parameters(prefix="unet"))
        parameters |= dict(pipeline.text_encoder.named_parameters(prefix="text_encoder"))

    def loss() -> Tensor:
        chosen = torch.randint(len(pictures), (plan.batch,), generator=generator)
        text = encode_text(pipeline, [caption(pictures[i], plan, generator) for i in chosen.tolist()])
        return denoising_loss(pipeline, latents[chosen], text, generator, plan.weight_cap)

    pipeline.unet.train()
    yield from descend(parameters, loss, plan)
    pipeline.unet.eval()


def denoising_loss(
    pipeline: Pipeline, latents: Tensor, text: Tensor, generator: torch.Generator, cap: float = 1.0
) -> Tensor:
    """Mean squared error of the predicted noise at uniform timesteps (Ho et al. 2020, eq. 14), weighted by
    min(cap, 1 / alpha_bar): without a cap that is the error of v (Salimans & Ho 2022), which counts where only the text
    can tell the colours; alone it would neglect fine lines."""
    schedule = pipeline.scheduler
    t = torch.randint(schedule.config.num_train_timesteps, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    predicted = pipeline.unet(schedule.add_noise(latents, noise, t), t, text).sample
    weight = (1 / schedule.alphas_cumprod[t]).clamp(max=cap)
    return (weight * (predicted - noise).square().mean((1, 2, 3))).mean()


def caption(picture: Picture, plan: Plan, generator: torch.Generator) -> str:
    """The picture's caption with tags dropped at random, or empty (for classifier-free guidance)."""
    chance = torch.rand(1 + len(picture.tags), generator=generator).tolist()
    if chance[0] < plan.drop_caption:
        return ""
    return ", ".join(tag for tag, c in zip(picture.tags, chance[1:], strict=True) if c >= plan.drop_tag)
