"""Which layers of a UNet and its text encoders an adapter changes, and the names that kohya's files give them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from lineage.errors import LineageError
from lineage.layouts import invert, modern_clip, rename, unet_table

Layer: TypeAlias = nn.Linear | nn.Conv2d

TRANSFORMER = "Transformer2DModel"
BLOCKS = (TRANSFORMER, "ResnetBlock2D", "Downsample2D", "Upsample2D")
TEXT_PARTS = (".self_attn.", ".mlp.")


@dataclass(frozen=True)
class Target:
    """A layer to adapt. name: kohya's; canonical: of its weight; attended: whether a plain LoRA changes it too."""

    name: str
    component: str
    canonical: str
    module: Layer
    attended: bool

    @property
    def pointwise(self) -> bool:
        """Linear or 1x1 convolution."""
        return isinstance(self.module, nn.Linear) or self.module.kernel_size == (1, 1)


def targets(unet: nn.Module, text_encoders: Sequence[nn.Module]) -> list[Target]:
    """All targets in module order, the UNet's first. LineageError for a convolution that Stable Diffusion has not."""
    found = list(_unet_targets(unet))
    several = len(text_encoders) > 1
    for i, encoder in enumerate(text_encoders, 1):
        component = "text_encoder" if i == 1 else f"text_encoder_{i}"
        found += _text_targets(encoder, f"lora_te{i}_" if several else "lora_te_", component)
    for target in found:
        _check(target)
    return found


def _unet_targets(unet: nn.Module) -> Iterator[Target]:
    """SDXL files name the blocks of the UNet as its single file does, older models' as diffusers does."""
    blocks = {path: type(m).__name__ for path, m in unet.named_modules() if type(m).__name__ in BLOCKS}
    single_file = invert(unet_table(name for name, _ in unet.named_parameters()))
    for path, module in unet.named_modules():
        block = next((kind for at, kind in blocks.items() if path.startswith(f"{at}.")), None)
        if block and isinstance(module, Layer):
            shown = rename(path, single_file) or path if hasattr(unet, "add_embedding") else path
            name = "lora_unet_" + shown.replace(".", "_")
            yield Target(name, "unet", f"unet.{path}.weight", module, block == TRANSFORMER)


def _text_targets(encoder: nn.Module, prefix: str, component: str) -> Iterator[Target]:
    for path, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and any(part in path for part in TEXT_PARTS):
            path = modern_clip(path)
            yield Target(prefix + path.replace(".", "_"), component, f"{component}.{path}.weight", module, True)


def _check(target: Target) -> None:
    module = target.module
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise LineageError(f"{target.canonical}: {module} is no convolution of Stable Diffusion; it cannot be adapted.")
