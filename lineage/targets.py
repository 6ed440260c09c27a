"""Which weights of a Stable Diffusion model adapters change, and the names that kohya's files give their modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lineage.keys import Param, architecture_of
from lineage.layouts import invert, rename, unet_table

_UNET = re.compile(r"\.(attentions|resnets|downsamplers|upsamplers)\.")
_TEXT = re.compile(r"\.(self_attn|mlp)\.")


@dataclass(frozen=True)
class Target:
    """A weight that adapters change. module: kohya's name. attended: whether a plain LoRA changes it too (inside a
    transformer, or of a text encoder). pointwise: a Linear or a 1x1 convolution."""

    module: str
    param: Param
    attended: bool

    @property
    def pointwise(self) -> bool:
        return all(k == 1 for k in self.param.shape[2:])


def targets(specs: Mapping[str, Param]) -> dict[str, Target]:
    """Canonical weight name -> Target, in the model's order: all Linear and Conv weights inside the UNet's attention,
    resnet, downsampling and upsampling blocks, and inside the text encoders' attention and MLP."""
    inside = {"unet": _UNET, "text_encoder": _TEXT, "text_encoder_2": _TEXT}
    name_of = module_names(specs)
    return {
        name: Target(name_of(param), param, param.component != "unet" or ".attentions." in name)
        for name, param in specs.items()
        if param.component in inside and inside[param.component].search(name)
        if name.endswith(".weight") and len(param.shape) > 1
    }


def module_names(specs: Mapping[str, Param]) -> Callable[[Param], str]:
    """The function of a parameter of the UNet or a text encoder to kohya's name of its module.

    SDXL's files name the blocks of the UNet as its single file does, older models' as diffusers does."""
    sdxl = architecture_of(specs) == "sdxl"
    names = [n.removeprefix("unet.") for n in specs if n.startswith("unet.")]
    blocks = invert(unet_table(names)) if sdxl else {}
    number = {"text_encoder": "1", "text_encoder_2": "2"} if sdxl else {}

    def name_of(param: Param) -> str:
        path = param.name.removeprefix(f"{param.component}.")
        module = (rename(path, blocks) or path).rpartition(".")[0].replace(".", "_")
        prefix = "lora_unet_" if param.component == "unet" else f"lora_te{number.get(param.component, '')}_"
        return prefix + module

    return name_of
