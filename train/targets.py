"""Which layers of a UNet and its text encoders an adapter changes, and the names that kohya's files give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import nn

from lineage.errors import LineageError
from lineage.keys import canonical
from lineage.targets import targets as adapter_targets

Layer: TypeAlias = nn.Linear | nn.Conv2d


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
    parts = {"unet": unet}
    parts |= {f"text_encoder_{i}" if i > 1 else "text_encoder": e for i, e in enumerate(text_encoders, 1)}
    stored = {f"{c}.{n}": (tuple(p.shape), p.dtype) for c, m in parts.items() for n, p in m.named_parameters()}
    found = []
    for name, adapted in adapter_targets(canonical(stored)).items():
        component, _, path = adapted.param.stored.partition(".")
        module = parts[component].get_submodule(path.removesuffix(".weight"))
        assert isinstance(module, Layer)
        found.append(Target(adapted.module, component, name, module, adapted.attended))
    for target in found:
        _check(target)
    return found


def _check(target: Target) -> None:
    module = target.module
    if isinstance(module, nn.Conv2d) and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise LineageError(f"{target.canonical}: {module} is no convolution of Stable Diffusion; it cannot be adapted.")
