"""Module names of Stable Diffusion in two spellings: LDM (single files) and diffusers / transformers (folders).

Every table maps an LDM module path to a diffusers module path and is derived from the names that are there, so any
number of levels works: a level of the UNet ends where a down- or upsampler sits. `invert` gives the way back.
"""

from __future__ import annotations

from collections.abc import Iterable

Tree = dict[str, "Tree"]
Table = dict[str, str]

_DEPTH = 8  # no module path in a table has more parts, so a hostile name of a million dots costs nothing

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb.weight": "class_embedding.weight",
}
_VAE = {
    f"{side}.{ldm}": f"{side}.{ours}"
    for side in ("encoder", "decoder")
    for ldm, ours in {"conv_in": "conv_in", "conv_out": "conv_out", "norm_out": "conv_norm_out"}.items()
} | {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_VAE_RESNET = {
    **{name: name for name in ("norm1", "conv1", "norm2", "conv2")},
    "nin_shortcut": "conv_shortcut",
}
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn": "self_attn",
}


def rename(name: str, table: Table) -> str | None:
    """`name` with its longest module prefix in `table` replaced; None where no prefix is there."""
    parts = name.split(".", _DEPTH)
    for n in range(len(parts), 0, -1):
        found = table.get(".".join(parts[:n]))
        if found is not None:
            return ".".join([found, *parts[n:]])
    return None


def invert(table: Table) -> Table:
    """diffusers -> LDM from LDM -> diffusers."""
    return {ours: ldm for ldm, ours in table.items()}


def unet_table(names: Iterable[str]) -> Table:
    """LDM -> diffusers modules of the UNet whose parameters are `names`, in either spelling, without prefix."""
    tree = _tree(names)
    table = dict(_UNET)
    label = "class_embedding" if "class_embedding" in tree else "add_embedding"
    table |= {f"label_emb.0.{2 * i}": f"{label}.linear_{i + 1}" for i in (0, 1)}
    _resnet(table, "middle_block.0", "mid_block.resnets.0")
    _resnet(table, "middle_block.2", "mid_block.resnets.1")
    table["middle_block.1"] = "mid_block.attentions.0"
    if "input_blocks" in tree or "output_blocks" in tree:
        _down_from_ldm(table, tree.get("input_blocks", {}))
        _up_from_ldm(table, tree.get("output_blocks", {}))
    else:
        _down_from_diffusers(table, tree.get("down_blocks", {}))
        _up_from_diffusers(table, tree.get("up_blocks", {}))
    return table


def vae_table(names: Iterable[str]) -> Table:
    """LDM -> diffusers modules of the VAE whose parameters are `names`, in either spelling; decoder blocks reversed."""
    tree = _tree(names)
    table = dict(_VAE)
    for side, ldm, ours, sampler in (
        ("encoder", "down", "down_blocks", ("downsample", "downsamplers.0")),
        ("decoder", "up", "up_blocks", ("upsample", "upsamplers.0")),
    ):
        branch = tree.get(side, {})
        levels = [i for i, _ in _numbered(branch.get(ldm, {}) | branch.get(ours, {}))]
        for i in levels:
            j = levels[-1] - i if ldm == "up" else i
            at, to = f"{side}.{ldm}.{i}", f"{side}.{ours}.{j}"
            table[f"{at}.{sampler[0]}.conv"] = f"{to}.{sampler[1]}.conv"
            units = branch.get(ldm, {}).get(str(i), {}).get("block", {})
            units = units | branch.get(ours, {}).get(str(j), {}).get("resnets", {})
            for k, _ in _numbered(units):
                _extend(table, f"{at}.block.{k}", f"{to}.resnets.{k}", _VAE_RESNET)
                _extend(table, f"{at}.attn.{k}", f"{to}.attentions.{k}", _VAE_ATTENTION)
        for k in (1, 2):
            _extend(table, f"{side}.mid.block_{k}", f"{side}.mid_block.resnets.{k - 1}", _VAE_RESNET)
        _extend(table, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", _VAE_ATTENTION)
    return table


def modern_vae(name: str) -> str:
    """The present diffusers name of a VAE parameter; files of before 2023 say query, key, value, proj_attn."""
    parts = name.split(".", _DEPTH)
    if len(parts) >= 2 and "attentions" in parts and parts[-2] in _OLD_VAE_ATTENTION:
        parts[-2] = _OLD_VAE_ATTENTION[parts[-2]]
    return ".".join(parts)


def open_clip_table(names: Iterable[str]) -> Table:
    """OpenCLIP -> transformers modules of a text encoder whose parameters are `names`, in either spelling.

    The fused attention keeps its own leaf: "...attn.in_proj_weight" becomes "...self_attn.in_proj_weight".
    """
    tree = _tree(names)
    table = dict(_OPEN_CLIP)
    layers = tree.get("transformer", {}).get("resblocks", {})
    layers = layers | tree.get("text_model", {}).get("encoder", {}).get("layers", {})
    for i, _ in _numbered(layers):
        _extend(table, f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", _OPEN_CLIP_LAYER)
    return table


def modern_clip(name: str) -> str:
    """The transformers (< 5) name of a CLIP text parameter: NAI-era files and transformers 5 leave out `text_model.`"""
    inside = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
    return f"text_model.{name}" if inside else name


def _down_from_ldm(table: Table, blocks: Tree) -> None:
    level = layer = 0
    for i, block in _numbered(blocks):
        if "op" in block.get("0", {}):
            table[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            level, layer = level + 1, 0
        elif i > 0:
            _resnet(table, f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}")
            table[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{layer}"
            layer += 1


def _up_from_ldm(table: Table, blocks: Tree) -> None:
    level = layer = 0
    for i, block in _numbered(blocks):
        _resnet(table, f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}")
        sampler = next((k for k in ("1", "2") if "conv" in block.get(k, {})), None)
        table[f"output_blocks.{i}.1"] = f"up_blocks.{level}.attentions.{layer}"
        layer += 1
        if sampler:
            table[f"output_blocks.{i}.{sampler}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            level, layer = level + 1, 0


def _down_from_diffusers(table: Table, blocks: Tree) -> None:
    i = 1
    for level, block in _numbered(blocks):
        for layer, _ in _numbered(block.get("resnets", {})):
            _resnet(table, f"input_blocks.{i}.0", f"down_blocks.{level}.resnets.{layer}")
            table[f"input_blocks.{i}.1"] = f"down_blocks.{level}.attentions.{layer}"
            i += 1
        if "downsamplers" in block:
            table[f"input_blocks.{i}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            i += 1


def _up_from_diffusers(table: Table, blocks: Tree) -> None:
    i = 0
    for level, block in _numbered(blocks):
        attentions = block.get("attentions", {})
        last = None
        for layer, _ in _numbered(block.get("resnets", {})):
            _resnet(table, f"output_blocks.{i}.0", f"up_blocks.{level}.resnets.{layer}")
            if str(layer) in attentions:
                table[f"output_blocks.{i}.1"] = f"up_blocks.{level}.attentions.{layer}"
            last = f"output_blocks.{i}.{2 if str(layer) in attentions else 1}.conv"
            i += 1
        if "upsamplers" in block and last:
            table[last] = f"up_blocks.{level}.upsamplers.0.conv"


def _resnet(table: Table, ldm: str, ours: str) -> None:
    _extend(table, ldm, ours, _RESNET)


def _extend(table: Table, ldm: str, ours: str, leaves: Table) -> None:
    table |= {f"{ldm}.{a}": f"{ours}.{b}" for a, b in leaves.items()}


def _tree(names: Iterable[str]) -> Tree:
    """Nested dict of the module paths."""
    root: Tree = {}
    for name in names:
        node = root
        for part in name.split(".", _DEPTH)[:_DEPTH]:
            node = node.setdefault(part, {})
    return root


def _numbered(node: Tree) -> list[tuple[int, Tree]]:
    """Children whose key is a plain number, in numeric order."""
    plain = [k for k in node if k.isascii() and k.isdigit() and len(k) < 5 and str(int(k)) == k]
    return [(int(k), node[k]) for k in sorted(plain, key=int)]
