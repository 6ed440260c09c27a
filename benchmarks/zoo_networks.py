"""The zoo's small networks: byte transformer, convolutional classifier, denoising UNet, vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CONTEXT = 32  # bytes
VOCABULARY = 128
SIDE = 16  # pixels
CLASSES = 10
GROUPS = 8  # of every GroupNorm


class Block(nn.Module):
    """Pre-norm transformer block (batch, tokens, width)."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (m(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class Bytes(nn.Module):
    """Next byte of a text; biases start at 0, as in GPT-2."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, 4, True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, 0, 0.02 if name in ("embed.weight", "place.weight") else p.shape[1] ** -0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


class Pixels(nn.Module):
    """Class of a picture (batch, 3, SIDE, SIDE), from patches of 4 x 4; torch's own start (no zero biases)."""

    def __init__(self, width: int = 48, depth: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn((SIDE // 4) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, 4, False) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).mT + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h).mean(1))


class Convolutions(nn.Module):
    """Class of a picture, VGG-like; torch's own start."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64)) -> None:
        super().__init__()
        pairs = list(zip((3, *widths), widths, strict=False))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairs)
        self.norms = nn.ModuleList(nn.GroupNorm(GROUPS, b) for _, b in pairs)
        self.fc, self.head = nn.Linear(widths[-1] * 4, 96), nn.Linear(96, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, 2) if i < 3 else x
        return self.head(F.relu(self.fc(x.flatten(1))))


class Residual(nn.Module):
    """ResNet block with a time embedding (batch, 64)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, before), nn.GroupNorm(GROUPS, after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.time = nn.Linear(64, after)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(t)[..., None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Denoiser(nn.Module):
    """Noise of a noisy picture at time t (batch,) in 0..1: two levels with one skip connection."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inward = nn.Conv2d(3, width, 3, padding=1)
        self.time1, self.time2 = nn.Linear(32, 64), nn.Linear(64, 64)
        self.down, self.shrink = Residual(width, width), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.middle1, self.middle2 = Residual(2 * width, 2 * width), Residual(2 * width, 2 * width)
        self.grow, self.up = nn.Conv2d(2 * width, width, 3, padding=1), Residual(2 * width, width)
        self.norm, self.outward = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        waves = t[:, None] * 2.0 ** torch.arange(16)
        t = F.silu(self.time2(F.silu(self.time1(torch.cat([waves.sin(), waves.cos()], 1)))))
        top = self.down(self.inward(x), t)
        h = self.middle2(self.middle1(self.shrink(top), t), t)
        h = self.grow(F.interpolate(h, scale_factor=2.0))
        return self.outward(F.silu(self.norm(self.up(torch.cat([h, top], 1), t))))


NETWORKS: dict[str, type[nn.Module]] = {
    "bytes": Bytes,
    "convolutions": Convolutions,
    "denoiser": Denoiser,
    "pixels": Pixels,
}
