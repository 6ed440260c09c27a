"""Canonical names against diffusers' own converters, there and back, for any number of levels."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import stable_diffusion as sd
import torch
from torch import Tensor

from lineage.keys import Param, architecture_of, canonical, kohya_modules, layout_of, match, to_ldm

TINY = ("sd1", "sd1-deep", "sd2", "sdxl", "sdxl-refiner")
FULL = ("sd1", "sd2", "sdxl")
MODELS = [*((sd.tiny, kind) for kind in TINY), *((sd.full, kind) for kind in FULL)]
each_model = pytest.mark.parametrize(("make", "kind"), MODELS, ids=[f"{m.__name__}-{k}" for m, k in MODELS])


@functools.cache
def built(make, kind):
    torch.manual_seed(0)
    return make(kind)


def ldm_of(make, kind) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(single-file tensors, the same under canonical names)."""
    states = sd.states(built(make, kind))
    return to_ldm(states, kind.removesuffix("-deep")), sd.flat(states)


def converted(parts, ldm: dict[str, Tensor]) -> dict[str, Tensor]:
    """The independent oracle: what diffusers' single-file loader makes of `ldm`, under canonical names."""
    from diffusers.loaders import single_file_utils as oracle

    found = {}
    for component, model in parts.items():
        if component == "unet":
            got = oracle.convert_ldm_unet_checkpoint(dict(ldm), model.config)
        elif component == "vae":
            got = oracle.convert_ldm_vae_checkpoint(dict(ldm), model.config)
        elif any(n.startswith(f"{_embedder(component, parts)}model.") for n in ldm):
            prefix = f"{_embedder(component, parts)}model."
            got = oracle.convert_open_clip_checkpoint(model, dict(ldm), prefix=prefix)
        else:
            got = oracle.convert_ldm_clip_checkpoint(dict(ldm))
        found |= {f"{component}.{name}": t for name, t in got.items()}
    return found


def _embedder(component, parts) -> str:
    if "text_encoder_2" not in parts:
        return "cond_stage_model."
    first = component == "text_encoder" or "text_encoder" not in parts
    return f"conditioner.embedders.{0 if first else 1}."


@each_model
def test_there_and_back_is_the_identity(make, kind):
    ldm, want = ldm_of(make, kind)
    params = canonical(sd.specs(ldm))
    assert set(params) == set(want)
    assert {p.stored for p in params.values()} == set(ldm)
    for name, param in params.items():
        seen = param.view(ldm[param.stored])
        assert tuple(seen.shape) == param.shape == tuple(want[name].shape), name
        assert want[name].is_meta or torch.equal(seen, want[name]), name


@each_model
def test_diffusers_converter_finds_the_same_tensors(make, kind):
    ldm, _ = ldm_of(make, kind)
    params = canonical(sd.specs(ldm))
    oracle = converted(built(make, kind), ldm)
    assert set(params) == set(oracle)
    for name, theirs in oracle.items():
        ours = params[name].view(ldm[params[name].stored])
        assert ours.shape == theirs.shape, name
        assert ours.is_meta or torch.equal(ours, theirs), name


@each_model
def test_blocks_and_roles_do_not_depend_on_the_layout(make, kind):
    ldm, want = ldm_of(make, kind)
    single, folder = canonical(sd.specs(ldm)), canonical(sd.specs(want))
    assert (layout_of(ldm), layout_of(want)) == ("ldm", "diffusers")
    assert architecture_of(single) == architecture_of(folder) == kind.removesuffix("-deep")
    assert {n: (p.component, p.block, p.role, p.shape) for n, p in single.items()} == {
        n: (p.component, p.block, p.role, p.shape) for n, p in folder.items()
    }
    pairs, unmatched = match(single, folder)
    assert len(pairs) == len(single)
    assert unmatched == []


@pytest.mark.parametrize("kind", ["sd1", "sd1-deep", "sdxl"])
def test_from_single_file_loads_what_to_ldm_wrote(kind, tmp_path: Path):
    from diffusers import AutoencoderKL, UNet2DConditionModel  # type: ignore[reportPrivateImportUsage]
    from safetensors.torch import save_file

    ldm, _ = ldm_of(sd.tiny, kind)
    parts = built(sd.tiny, kind)
    file = tmp_path / "model.safetensors"
    save_file(ldm, file)
    for component, cls in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_text(json.dumps(dict(parts[component].config)), "utf-8")
        loaded = cls.from_single_file(
            str(file), config=str(tmp_path), subfolder=component, local_files_only=True
        ).state_dict()
        want = parts[component].state_dict()
        assert set(loaded) == set(want)
        assert all(torch.equal(loaded[n], want[n]) for n in want)


def test_names_of_the_published_sd15_file():
    """Spot checks against names of v1-5-pruned-emaonly, which has 686 UNet, 248 VAE and 196 text tensors."""
    ldm, _ = ldm_of(sd.full, "sd1")
    params = canonical(sd.specs(ldm))
    by_stored = {p.stored: p for p in params.values()}
    unet, vae = "model.diffusion_model.", "first_stage_model."
    counts = {prefix: sum(n.startswith(prefix) for n in ldm) for prefix in (unet, vae, "cond_stage_model.")}
    assert counts == {unet: 686, vae: 248, "cond_stage_model.": 196}
    for stored, name, block, role in (
        ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight", "IN03", "down"),
        ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight", "IN04", "shortcut"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight", "OUT02", "up"),
        ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight", "OUT05", "up"),
        (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight",
            "OUT11",
            "attn2.k",
        ),
        ("middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight", "M00", "proj_in"),
        ("time_embed.2.weight", "time_embedding.linear_2.weight", "TIME", "time"),
        ("out.2.weight", "conv_out.weight", "OUT", "conv"),
    ):
        param = by_stored[unet + stored]
        assert (param.name, param.block, param.role) == (f"unet.{name}", block, role)
    assert by_stored[f"{vae}decoder.up.3.block.0.conv1.weight"].name == "vae.decoder.up_blocks.0.resnets.0.conv1.weight"
    assert by_stored[f"{vae}encoder.mid.attn_1.q.weight"].shape == (512, 512)


@pytest.mark.parametrize(("kind", "inputs"), [("sd1", 12), ("sd2", 12), ("sdxl", 9)])
def test_blocks_are_those_of_merge_boards(kind, inputs):
    """SD1 and SD2 have 12 + 1 + 12 blocks, SDXL 9 + 1 + 9; layers of text encoders, levels of the VAE."""
    ldm, _ = ldm_of(sd.full, kind)
    params = canonical(sd.specs(ldm))
    found = {c: {p.block for p in params.values() if p.component == c} for c in ("unet", "text_encoder", "vae")}
    numbered = {f"{side}{i:02d}" for side in ("IN", "OUT") for i in range(inputs)}
    assert found["unet"] == {*numbered, "M00", "TIME", "OUT"}
    layers = 23 if kind == "sd2" else 12
    assert found["text_encoder"] == {*(f"TE.{i:02d}" for i in range(layers)), "TE.embed", "TE.final"}
    levels = {f"VAE.{side}.{i}" for side in ("encoder.down", "decoder.up") for i in range(4)}
    ends = {f"VAE.{side}.{part}" for side in ("encoder", "decoder") for part in ("in", "mid", "out")}
    assert found["vae"] == {*levels, *ends, "VAE.quant", "VAE.post_quant"}


def test_old_spellings_get_the_same_names():
    """NAI-era text encoders and diffusers' VAE attention of before 2023."""
    ldm, want = ldm_of(sd.tiny, "sd1")
    nai = {n.replace("transformer.text_model.", "transformer."): t for n, t in ldm.items()}
    assert nai.keys() != ldm.keys()
    assert set(canonical(sd.specs(nai))) == set(want)
    old = want
    for new, name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        old = {
            n.replace(f"mid_block.attentions.0.{new}.", f"mid_block.attentions.0.{name}.") if "vae" in n else n: t
            for n, t in old.items()
        }
    assert old.keys() != want.keys()
    assert set(canonical(sd.specs(old))) == set(want)


def test_parts_without_prefix_are_recognised():
    ldm, want = ldm_of(sd.tiny, "sd1")
    for prefix, component in (("model.diffusion_model.", "unet"), ("first_stage_model.", "vae")):
        bare = {n.removeprefix(prefix): t for n, t in ldm.items() if n.startswith(prefix)}
        assert set(canonical(sd.specs(bare))) == {n for n in want if n.startswith(f"{component}.")}
    for component in ("unet", "vae", "text_encoder"):
        bare = {n.removeprefix(f"{component}."): t for n, t in want.items() if n.startswith(f"{component}.")}
        assert set(canonical(sd.specs(bare))) == {n for n in want if n.startswith(f"{component}.")}


def test_ema_copies_are_left_out_and_schedules_kept():
    ldm, want = ldm_of(sd.tiny, "sd1")
    ema = {
        f"model_ema.{n.removeprefix('model.').replace('.', '')}": t for n, t in ldm.items() if n.startswith("model.")
    }
    more = {"betas": torch.zeros(1000), "model_ema.decay": torch.tensor(0.999)}
    params = canonical(sd.specs({**ldm, **ema, **more}))
    assert set(params) == {*want, "betas"}
    assert params["betas"].component == "other"


def test_two_spellings_of_one_tensor_are_both_kept():
    """A merge of an old and a new file may hold the text encoder twice; neither copy may vanish."""
    new, old = "cond_stage_model.transformer.text_model.final_layer_norm.weight", "cond_stage_model.transformer."
    stored = {new: ((4,), torch.float32), f"{old}final_layer_norm.weight": ((4,), torch.float32)}
    assert {p.stored for p in canonical(stored).values()} == set(stored)


def test_other_architectures_keep_their_names():
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.11.mlp.up_proj.weight", "lm_head.weight"]
    params = canonical(dict.fromkeys(names, ((4, 4), torch.float32)))
    assert list(params) == names
    assert {p.component for p in params.values()} == {"model"}
    assert [p.block for p in params.values()] == ["model.layers.0", "model.layers.11", "lm_head"]


def test_match_lists_what_it_leaves_out():
    def specs(**shapes) -> dict[str, Param]:
        return canonical({n: (s, torch.float32) for n, s in shapes.items()})

    base = specs(same=(4, 6), linear=(4, 6), wider=(4, 6), gone=(2,))
    tuned = specs(same=(4, 6), linear=(4, 6, 1, 1), wider=(4, 7), new=(2,))
    pairs, unmatched = match(base, tuned)
    assert [a.name for a, _ in pairs] == ["same", "linear"]
    assert {(u["name"], u["side"]) for u in unmatched} == {("wider", "both"), ("gone", "base"), ("new", "tuned")}
    assert all(u["reason"] for u in unmatched)


def test_sd2_says_why_its_last_layer_has_no_partner():
    ldm, want = ldm_of(sd.tiny, "sd2")
    short = {n: t for n, t in want.items() if ".layers.1." not in n}
    _, unmatched = match(canonical(sd.specs(ldm)), canonical(sd.specs(short)))
    assert unmatched
    assert all("diffusers drops it" in u["reason"] for u in unmatched)


@pytest.mark.parametrize("kind", TINY)
def test_adapter_names_reach_every_weight(kind):
    """kohya's rule, generated from the real modules: prefix + dotted path with '_' for '.'; SGM names for SDXL."""
    ldm, _ = ldm_of(sd.tiny, kind)
    params = canonical(sd.specs(ldm))
    modules = kohya_modules(params)
    texts = {"text_encoder": "lora_te1" if "sdxl" in kind else "lora_te", "text_encoder_2": "lora_te2"}
    for component, model in built(sd.tiny, kind).items():
        if component == "vae":
            continue
        for path, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                path = sd.named(component, f"{path}.weight").removesuffix(".weight")
                prefix = texts.get(component, "lora_unet")
                assert modules[f"{prefix}_{path.replace('.', '_')}"] == f"{component}.{path}.weight"
                assert modules[f"{component}.{path}"] == f"{component}.{path}.weight"
    stem = "model.diffusion_model."
    for stored in ldm:
        if stored.startswith(stem) and stored.endswith(".weight"):
            path = stored.removeprefix(stem).removesuffix(".weight")
            target = modules[f"lora_unet_{path.replace('.', '_')}"]
            assert params[target].stored == stored
            assert modules[f"diffusion_model.{path}"] == target


def test_peft_names_of_transformers_5_reach_the_text_encoder():
    """It drops `text_model.`; with two text encoders such a name says too little and is not guessed."""
    layer = "encoder.layers.0.self_attn.q_proj"
    for kind, known in (("sd1", True), ("sdxl", False)):
        modules = kohya_modules(canonical(sd.specs(ldm_of(sd.tiny, kind)[0])))
        assert (f"base_model.model.{layer}" in modules) == known
        assert modules[f"text_encoder.{layer}"] == f"text_encoder.text_model.{layer}.weight"
