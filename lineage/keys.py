"""Canonical parameter names: one spelling for SD1.x, SD2.x and SDXL, whatever the layout of the file.

Canonical is "<component>.<diffusers module path>.<parameter>", with transformers' (< 5) names in text encoders:
unet.down_blocks.0.resnets.0.conv1.weight, text_encoder.text_model.encoder.layers.0.mlp.fc1.weight. Parameters of any
other architecture keep their names; their component is "model".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from lineage.blocks import blocks, numbered_prefix, role_of
from lineage.layouts import invert, modern_clip, modern_vae, open_clip_table, rename, unet_table, vae_table

Shape = tuple[int, ...]
EMA_PREFIX = "model_ema."

_LDM_PREFIXES = {
    "model.diffusion_model.": ("unet", "ldm"),
    "first_stage_model.": ("vae", "ldm"),
    "cond_stage_model.transformer.": ("text_encoder", "clip"),
    "cond_stage_model.model.": ("text_encoder", "open_clip"),
    "conditioner.embedders.0.transformer.": ("text_encoder", "clip"),
    "conditioner.embedders.0.model.": ("text_encoder_2", "open_clip"),
    "conditioner.embedders.1.model.": ("text_encoder_2", "open_clip"),
}
_OPEN_CLIP_PREFIXES = {
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.1.model.",
    "sdxl-refiner": "conditioner.embedders.0.model.",
}
_FOLDER_PREFIXES = {
    "unet.": ("unet", "diffusers"),
    "vae.": ("vae", "diffusers"),
    "text_encoder.": ("text_encoder", "clip"),
    "text_encoder_2.": ("text_encoder_2", "clip"),
}
_BARE = (
    ({"input_blocks", "middle_block"}, ("unet", "ldm")),
    ({"down_blocks", "mid_block", "time_embedding"}, ("unet", "diffusers")),
    ({"encoder", "decoder", "quant_conv"}, ("vae", "either")),
    ({"text_model"}, ("text_encoder", "clip")),
    ({"transformer", "ln_final", "token_embedding"}, ("text_encoder", "open_clip")),
)
_ADAPTER_PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
_OTHER_MODELS = {".joint_blocks.": "sd3", "double_blocks.": "flux", "control_model.": "controlnet"}
_NO_TEXT_ENCODER = {"vision_model", "visual"}


@dataclass(frozen=True)
class Param:
    """One parameter. shape and dtype are those after the view.

    part: (i, n) where it is the i-th of n row blocks of the stored tensor (fused qkv). transposed: stored as its
    transpose. stored_shape: as in the file; a 1x1 kernel that another layout keeps as a Linear is flattened."""

    name: str
    stored: str
    shape: Shape
    dtype: torch.dtype
    component: str
    block: str
    role: str
    part: tuple[int, int] = (0, 1)
    transposed: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def view(self, stored: Tensor) -> Tensor:
        """This parameter, from the stored tensor; a view."""
        i, n = self.part
        rows = len(stored) // n if stored.dim() else 0
        tensor = stored[i * rows : (i + 1) * rows] if n > 1 else stored
        return (tensor.mT if self.transposed else tensor).reshape(self.shape)


@dataclass(frozen=True)
class Section:
    """The names under one prefix of a file, and how they are spelt: ldm, diffusers, either, clip or open_clip."""

    component: str
    spelling: str
    prefix: str
    names: tuple[str, ...]


def layout_of(names: Iterable[str]) -> str:
    """ "ldm" (single file), "diffusers" (folder, or a part of one), "hf" (text encoder alone) or "other"."""
    found = {section.spelling for section in _sections(names)}
    if found & {"ldm", "open_clip"} or any(n.startswith(("cond_stage_model.", "first_stage_model.")) for n in names):
        return "ldm"
    if found & {"diffusers", "either"}:
        return "diffusers"
    return "hf" if found else "other"


def canonical(stored: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, Param]:
    """Canonical name -> Param of a file's tensors (stored name -> shape, dtype). EMA copies are left out.

    Of two tensors with one meaning (a merge of an old and a new file) the second keeps its stored name."""
    return dict(_canonical(tuple(stored.items())))


@lru_cache(maxsize=32)  # most files of a folder have the same header
def _canonical(pairs: tuple[tuple[str, tuple[Shape, torch.dtype]], ...]) -> dict[str, Param]:
    stored = dict(pairs)
    names = [name for name in stored if not name.startswith(EMA_PREFIX)]
    sections = _sections(names)
    params: dict[str, Param] = {}
    taken: set[str] = set()
    for section in sections:
        taken.update(section.names)
        for param in _section_params(section, stored):
            name = _unused(param, params)
            params[name] = replace(param, name=name)
    component = "other" if sections else "model"
    for name in names:
        if name not in taken:
            shape, dtype = stored[name]
            block = "" if sections else numbered_prefix(name)
            plain = Param(name, name, shape, dtype, component, block, role_of(name, shape))
            own = _unused(plain, params)
            params[own] = replace(plain, name=own)
    order = {name: i for i, name in enumerate(stored)}
    return dict(sorted(params.items(), key=lambda item: (order[item[1].stored], item[1].part)))


def _unused(param: Param, params: Mapping[str, Param]) -> str:
    name = param.name
    if name in params:
        name = param.stored if param.part[1] == 1 else f"{param.stored}.{param.part[0]}"
    while name in params:
        name = f"{param.component}.{name}"
    return name


def architecture_of(specs: Mapping[str, Param]) -> str:
    """sd1, sd2, sdxl, sdxl-refiner, sd3, flux, controlnet, vae, clip or unknown, from names and shapes."""
    marked = next((kind for mark, kind in _OTHER_MODELS.items() if any(mark in n for n in specs)), None)
    if marked:
        return marked
    components = {p.component for p in specs.values()}
    if "unet" in components:
        return _stable_diffusion(specs, components)
    return "vae" if "vae" in components else "clip" if "text_encoder" in components else "unknown"


def _stable_diffusion(specs: Mapping[str, Param], components: set[str]) -> str:
    """By structure, not width, so that miniatures are told apart too; widths only where a UNet is alone."""
    if any(n.startswith("unet.add_embedding.") for n in specs):
        context = next((p for n, p in specs.items() if n.endswith("attn2.to_k.weight")), None)
        refiner = context is not None and context.shape[1:] == (1280,)
        return "sdxl-refiner" if refiner and "text_encoder" not in components else "sdxl"
    projection = next((p for n, p in specs.items() if n.endswith("attentions.0.proj_in.weight")), None)
    if not any(n.startswith("unet.conv_in.") for n in specs):
        return "unknown"
    return "sd2" if projection is not None and len(projection.shape) == 2 else "sd1"


def match(
    base: Mapping[str, Param], tuned: Mapping[str, Param]
) -> tuple[list[tuple[Param, Param]], list[dict[str, str]]]:
    """(pairs of the same name and matrix shape, in the base's order; the rest as {name, side, reason}).

    Shapes are compared as matrices, so a 1x1 convolution matches a Linear."""
    pairs, unmatched = [], []
    for name, a in base.items():
        b = tuned.get(name)
        if b is None:
            unmatched.append({"name": name, "side": "base", "reason": f"not in the tuned model{_cause(name, base)}"})
        elif a.shape[:1] != b.shape[:1] or a.numel != b.numel:
            reason = f"shape {tuple(b.shape)} in the tuned model, {tuple(a.shape)} in the base"
            unmatched.append({"name": name, "side": "both", "reason": reason})
        else:
            pairs.append((a, b))
    for name in tuned:
        if name not in base:
            unmatched.append({"name": name, "side": "tuned", "reason": f"not in the base{_cause(name, tuned)}"})
    return pairs, unmatched


def _cause(name: str, side: Mapping[str, Param]) -> str:
    """Why the other side may lack `name`, where that is well known."""
    layer = re.match(r"(text_encoder\.text_model\.encoder\.layers\.)(\d{1,4})\.", name)
    if not layer or not side[name].stored.startswith("cond_stage_model.model."):
        return ""
    following = f"{layer[1]}{int(layer[2]) + 1}.layer_norm1.weight"
    return "" if following in side else ": SD2 does not use its last OpenCLIP layer and diffusers drops it"


def kohya_modules(specs: Mapping[str, Param]) -> dict[str, str]:
    """Adapter module name -> canonical weight name, generated from the modules that are there.

    kohya's names in diffusers' and in LDM's block names (which SDXL files use), LyCORIS' own prefix, and dotted names:
    `unet.`, `diffusion_model.` (LDM blocks), `text_encoder.`, with and without `text_model.`; and `base_model.model.`
    where it can only be the one text encoder."""
    unet = invert(unet_table(n.removeprefix("unet.") for n in specs if n.startswith("unet.")))
    lone = "text_encoder" if all(p.component != "text_encoder_2" for p in specs.values()) else ""
    found: dict[str, str] = {}
    for name, param in specs.items():
        if not name.endswith(".weight") or param.component not in _ADAPTER_PREFIXES:
            continue
        path = name.removeprefix(f"{param.component}.").removesuffix(".weight")
        paths, dotted = {path}, {f"{param.component}.{path}"}
        if param.component == "unet":
            ldm = (rename(f"{path}.weight", unet) or name).removesuffix(".weight")
            paths, dotted = {path, ldm}, {f"unet.{path}", f"unet.{ldm}", f"diffusion_model.{ldm}"}
        elif short := path.removeprefix("text_model."):
            dotted |= {f"{param.component}.{short}"} | (
                {f"base_model.model.{short}"} if param.component == lone else set()
            )
        flat = {p + spelling.replace(".", "_") for p in _ADAPTER_PREFIXES[param.component] for spelling in paths}
        found |= dict.fromkeys(flat | dotted, name)
    return found


def to_ldm(states: Mapping[str, Mapping[str, Tensor]], architecture: str = "sd1") -> dict[str, Tensor]:
    """The single-file (LDM) tensors of a diffusers pipeline: component -> its state dict; the inverse of `canonical`.

    architecture: sd1 (CLIP under cond_stage_model.transformer), sd2 (OpenCLIP), sdxl (both, as embedders) or
    sdxl-refiner (OpenCLIP as the only embedder)."""
    out: dict[str, Tensor] = {}
    for component, state in states.items():
        if component == "unet":
            table, prefix = invert(unet_table(state)), "model.diffusion_model."
            out |= {prefix + _known(rename(name, table), name): t for name, t in state.items()}
        elif component == "vae":
            state = {modern_vae(name): t for name, t in state.items()}
            table = invert(vae_table(state))
            for name, t in state.items():
                linear = t.dim() == 2 and ".attentions." in name
                out["first_stage_model." + _known(rename(name, table), name)] = t[..., None, None] if linear else t
        else:
            out |= _text_to_ldm(component, {modern_clip(n): t for n, t in state.items()}, architecture)
    return {name: t.contiguous() for name, t in out.items()}


def _known(found: str | None, name: str) -> str:
    if found is None:
        raise KeyError(f"{name}: no single-file name")
    return found


def _text_to_ldm(component: str, state: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    if component == "text_encoder" and architecture in ("sd1", "sdxl"):
        prefix = "cond_stage_model.transformer." if architecture == "sd1" else "conditioner.embedders.0.transformer."
        return {prefix + name: t for name, t in state.items()}
    prefix = _OPEN_CLIP_PREFIXES[architecture]
    table, out = invert(open_clip_table(state)), {}
    for name, t in state.items():
        if ".q_proj." in name:
            fused = torch.cat([state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"])
            stem, leaf = name.split(".q_proj.")
            out[f"{prefix}{_known(rename(stem, table), name)}.in_proj_{leaf}"] = fused
        elif not re.search(r"\.[kv]_proj\.|position_ids$", name):
            transposed = name == "text_projection.weight"
            out[prefix + _known(rename(name, table), name)] = t.mT if transposed else t
    return out


def _sections(names: Iterable[str]) -> list[Section]:
    names = list(names)
    for prefixes in (_LDM_PREFIXES, _FOLDER_PREFIXES):
        found = [
            Section(component, spelling, prefix, tuple(members))
            for prefix, (component, spelling) in prefixes.items()
            if (members := [n for n in names if n.startswith(prefix)])
        ]
        if found:
            return found
    heads = {name.split(".", 1)[0] for name in names}
    for required, (component, spelling) in _BARE:
        if required <= heads and not heads & _NO_TEXT_ENCODER:
            return [Section(component, spelling, "", tuple(names))]
    return []


def _section_params(section: Section, stored: Mapping[str, tuple[Shape, torch.dtype]]) -> list[Param]:
    inner = [name.removeprefix(section.prefix) for name in section.names]
    renamed = _renamer(section, inner)
    block = blocks(section.component, [renamed(name) for name in inner])
    params = []
    for name, short in zip(section.names, inner, strict=True):
        shape, dtype = stored[name]
        path = renamed(short)
        plain = Param(f"{section.component}.{path}", name, shape, dtype, section.component, block(path), "")
        params += [replace(p, role=role_of(p.name, p.shape)) for p in _views(plain, section)]
    return params


def _renamer(section: Section, inner: list[str]) -> Callable[[str], str]:
    """Name without prefix -> diffusers or transformers name; a name that no table knows stays as it is."""
    if section.spelling == "clip":
        return modern_clip
    if section.spelling == "open_clip":
        table = open_clip_table(inner)
    else:
        table = unet_table(inner) if section.component == "unet" else vae_table(inner)
    if section.component == "vae":
        return lambda name: modern_vae(rename(name, table) or name)
    if section.spelling == "diffusers":
        return lambda name: name
    return lambda name: rename(name, table) or name


def _views(param: Param, section: Section) -> list[Param]:
    """Fused qkv split, OpenCLIP's projection transposed, the VAE's 1x1 attention kernels flattened."""
    name, shape = param.name, param.shape
    if ".self_attn.in_proj_" in name and section.spelling == "open_clip" and shape and shape[0] % 3 == 0:
        stem, leaf = name.split("in_proj_")
        rows = (shape[0] // 3, *shape[1:])
        return [replace(param, name=f"{stem}{x}_proj.{leaf}", shape=rows, part=(i, 3)) for i, x in enumerate("qkv")]
    if name.endswith(".text_projection.weight") and section.spelling == "open_clip" and len(shape) == 2:
        return [replace(param, shape=shape[::-1], transposed=True)]
    if section.component == "vae" and ".attentions." in name and shape[2:] == (1, 1):
        return [replace(param, shape=shape[:2])]
    return [param]
