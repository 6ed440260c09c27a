"""Where a parameter sits (its block) and what it does (its role), from its canonical name and shape alone."""

from __future__ import annotations

import re
from collections.abc import Callable

from lineage.layouts import invert, rename, unet_table

_ROLES = (
    (r"\.attn(\d)\.to_(q|k|v|out)", r"attn\1.\2"),
    (r"\.self_attn\.(q|k|v|out)_proj", r"attn.\1"),
    (r"\.self_attn\.o_proj", "attn.out"),
    (r"\.attentions\.\d+\.to_(q|k|v|out)", r"attn.\1"),
    (r"\.ff\.net\.0", "ff.in"),
    (r"\.ff\.net\.2", "ff.out"),
    (r"\.mlp\.(gate|up)_proj\.", "ff.in"),
    (r"\.mlp\.down_proj\.", "ff.out"),
    (r"\.(proj_in|proj_out)\.", r"\1"),
    (r"\.mlp\.(fc1|fc2)", r"mlp.\1"),
    (r"\.(conv_shortcut)\.", "shortcut"),
    (r"\.downsamplers\.", "down"),
    (r"\.upsamplers\.", "up"),
    (r"\.(time_emb_proj|time_embedding|add_embedding|class_embedding)\b", "time"),
    (r"\b(token_embedding|position_embedding|embed_tokens|wte|wpe)\b|embeddings\.weight$", "embed"),
    (r"\.(conv\w*|quant_conv|post_quant_conv)\.", "conv"),
)
_UNET_BLOCKS = {"middle_block": "M00", "time_embed": "TIME", "label_emb": "TIME", "out": "OUT"}
_VAE_PARTS = {"conv_in": "in", "mid_block": "mid"}


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """attn1.q (self), attn2.q (cross), attn.q (text encoder, VAE), ff.in, ff.out, mlp.fc1, conv, ... of a canonical
    name; "bias" for any bias, "norm" for the scale of a norm, "other" for what is none of these."""
    if name.endswith(".bias"):
        return "bias"
    if len(shape) < 2:
        return "norm" if name.endswith(".weight") else "other"
    for pattern, role in _ROLES:
        found = re.search(pattern, name)
        if found:
            return found.expand(role)
    return "other"


def blocks(component: str, paths: list[str]) -> Callable[[str], str]:
    """Path inside the component -> block, for a component whose parameters are `paths`.

    UNet: IN00.., M00, OUT00.., TIME, OUT, numbered as merge boards and LDM count them, so SDXL has its own. Text
    encoders: TE.00.., TE.embed, TE.final (TE2 the second). VAE: VAE.encoder.down.0, VAE.decoder.mid, ..."""
    if component == "unet":
        table = invert(unet_table(paths))
        return lambda path: _unet_block(rename(path, table) or path)
    if component == "vae":
        return _vae_block
    label = "TE2" if component == "text_encoder_2" else "TE"
    return lambda path: f"{label}.{_text_block(path)}"


def numbered_prefix(name: str) -> str:
    """The leading numbered path: "model.layers.3" of "model.layers.3.mlp.up_proj.weight"; else the module."""
    found = re.match(r".{0,200}?\.[0-9]{1,5}(?=\.)", name)
    return found[0] if found else name.rsplit(".", 1)[0][:200]


def _unet_block(ldm: str) -> str:
    numbered = re.match(r"(in|out)put_blocks\.([0-9]{1,4})\.", ldm)
    if numbered:
        return f"{numbered[1].upper()}{int(numbered[2]):02d}"
    return _UNET_BLOCKS.get(ldm.split(".", 1)[0], "other")


def _text_block(path: str) -> str:
    layer = re.search(r"\.layers\.([0-9]{1,4})\.", path)
    return f"{int(layer[1]):02d}" if layer else "embed" if ".embeddings." in path else "final"


def _vae_block(path: str) -> str:
    level = re.match(r"(encoder|decoder)\.(down|up)_blocks\.([0-9]{1,4})\.", path)
    if level:
        return f"VAE.{level[1]}.{level[2]}.{int(level[3])}"
    side, _, rest = path.partition(".")
    if side not in ("encoder", "decoder"):
        return f"VAE.{side.removesuffix('_conv')}"
    return f"VAE.{side}.{_VAE_PARTS.get(rest.split('.', 1)[0], 'out')}"
