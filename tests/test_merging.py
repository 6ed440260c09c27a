"""`lineage merge`: the web UI's bits, laws of the arithmetic, metadata, faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import webui_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recipe import AVERAGE, DIFFERENCE, MODELS
from torch import Tensor

import lineage
from lineage.errors import LineageError
from lineage.recipe import parse

pytestmark = pytest.mark.usefixtures("no_sync")

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer.text_model."
NAI_TEXT = "cond_stage_model.transformer."
SHAPES = {
    f"{UNET}input_blocks.0.0.weight": (8, 4, 3, 3),
    f"{UNET}input_blocks.1.0.in_layers.2.weight": (8, 8, 3, 3),
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (8, 8),
    f"{UNET}middle_block.0.in_layers.2.weight": (8, 8, 3, 3),
    f"{UNET}out.2.bias": (4,),
    f"{TEXT}embeddings.token_embedding.weight": (50, 8),
    f"{TEXT}encoder.layers.0.self_attn.q_proj.weight": (8, 8),
    f"{TEXT}final_layer_norm.weight": (8,),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
    "model_ema.decay": (),
}
HARD = [0.0, -0.0, 1.0, 65504.0, -65504.0, 65472.0, 6e-8, -6e-8, 6.1e-5, 6.09e-5, 2049.0, 2051.0, 0.1, 1 / 3, 1e-4]


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Gaussian entries among half-precision's hard ones: ties, subnormals, the largest, signed zeros."""
    g = torch.Generator().manual_seed(seed)
    plain = torch.randn(shape, generator=g)
    hard = torch.tensor(HARD)[torch.randint(len(HARD), shape, generator=g)]
    return torch.where(torch.rand(shape, generator=g) < 0.5, plain, hard)


def tiny(seed: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """A model of a few keys under the names of SD1 single files."""
    tensors = {name: values(shape, 100 * seed + i).to(dtype) for i, (name, shape) in enumerate(SHAPES.items())}
    tensors[f"{TEXT}embeddings.position_ids"] = torch.arange(77)[None] + (seed % 2)
    tensors["model_ema.num_updates"] = torch.tensor(1000 + seed, dtype=torch.int32)
    tensors["alphas_cumprod"] = values((10,), seed)
    return tensors


def nai_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.replace(TEXT, NAI_TEXT): t for k, t in tensors.items()}


def save(tensors: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, {"format": "pt"})
    else:
        torch.save({"state_dict": tensors, "global_step": 3} if "nested" not in path.name else tensors, path)
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """The seven models of the recipes: mixed dtypes and containers, old names, keys that only some have."""
    folder = tmp_path_factory.mktemp("zoo")
    models = [tiny(i) for i in range(7)]
    models[1] = tiny(1, torch.float32)
    models[4] = tiny(4, torch.float32)
    models[0]["model.only_in_the_first"] = values((70,), 1)
    models[0]["betas"] = values((10,), 2)
    del models[2][f"{UNET}out.2.bias"]
    models[3]["model.only_in_another"] = values((7,), 3)
    models[5] |= {k: t.bfloat16() for k, t in models[5].items() if k.startswith("first_stage")}
    endings = ["ckpt", "safetensors", "ckpt", "safetensors", "safetensors", "ckpt", "safetensors"]
    for name, tensors, ending in zip(MODELS, models, endings, strict=True):
        save(nai_names(tensors) if name == MODELS[0] else tensors, folder / f"{name}.{ending}")
    return folder


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        found = ours[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected, dtype=torch.bool)
        assert torch.equal(found.isnan() if found.is_floating_point() else nan, nan), name
        bits = (t.masked_fill(nan, 0).contiguous().reshape(-1).view(torch.uint8) for t in (found, expected))
        assert torch.equal(*bits), name


@pytest.mark.parametrize("recipe", [AVERAGE, DIFFERENCE], ids=["average", "difference"])
@pytest.mark.parametrize("container", [None, "safetensors", "ckpt"])
def test_recipes_give_the_web_uis_bits(zoo, tmp_path, recipe, container):
    expected = webui_oracle.run(recipe, zoo, tmp_path)
    text = tmp_path / "recipe.txt"
    text.write_text(recipe)
    result = lineage.merge(text, tmp_path / "out", models=zoo, keep=["all"], container=container)
    assert {o.name for o in result.outputs} == set(expected)
    for output in result.outputs:
        assert output.file is not None
        assert container is None or output.file.endswith(container)
        assert_same_bits(webui_oracle.load(tmp_path / "out" / output.file), expected[output.name])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(o.file for o in result.outputs if o.file)


def merge_pair(folder: Path, a: dict, b: dict, c: dict | None = None, line: str = "x = a + b, 0.3", **options):
    """(our output, the oracle's) of one line over up to three models."""
    for name, tensors in {"a": a, "b": b, "c": c}.items():
        if tensors is not None:
            save(tensors, folder / f"{name}.safetensors")
    expected = webui_oracle.run(line, folder, folder)["x"]
    options = {"container": "safetensors", "force": True} | options
    lineage.merge(parse(line), folder / "out", models=folder, **options)
    return safetensors.torch.load_file(folder / "out" / "x.safetensors"), expected


LINES = ["x = a + b, 0.3", "x = a + b, 0.3, fp16", "x = a + b + c, 0.3", "x = a + b + c, 0.7, fp16"]
KINDS = [torch.float16, torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("dtypes", [(a, b) for a in KINDS for b in KINDS])
def test_mixed_dtypes(tmp_path, line, dtypes):
    a, b = dtypes
    assert_same_bits(*merge_pair(tmp_path, tiny(1, a), tiny(2, b), tiny(3, a), line))


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("channels", [9, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inpainting_channels_stay(tmp_path, line, channels, dtype):
    name = f"{UNET}input_blocks.0.0.weight"
    a = tiny(1, dtype) | {name: values((8, channels, 3, 3), 5).to(dtype)}
    ours, expected = merge_pair(tmp_path, a, tiny(2, torch.float32), tiny(3), line)
    assert_same_bits(ours, expected)
    with pytest.raises(LineageError, match=r"input_blocks\.0\.0\.weight"):
        merge_pair_reversed(tmp_path)


def merge_pair_reversed(folder: Path) -> None:
    lineage.merge(parse("x = b + a, 0.5"), folder / "refused", models=folder)


def test_pieces_do_not_show(tmp_path, monkeypatch):
    from lineage import streaming

    monkeypatch.setattr(streaming, "PIECE", 1 << 13)
    big = {"model.big": values((300, 301), 1).half(), "model.odd": values((16385,), 2).half()}
    other = {"model.big": values((300, 301), 3).half(), "model.odd": values((16385,), 4)}
    assert_same_bits(*merge_pair(tmp_path, big, other))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0, 1),
    st.lists(st.floats(width=16), min_size=1, max_size=40),
    st.integers(0, 2**31),
    st.sampled_from(["x = a + b, {m}, fp16", "x = a + b + c, {m}"]),
)
def test_any_half_values(tmp_path_factory, m, entries, seed, line):
    g = torch.Generator().manual_seed(seed)
    a = torch.tensor(entries, dtype=torch.float16)
    b, c = (torch.randint(-(2**15), 2**15, a.shape, generator=g).to(torch.int16).view(torch.float16) for _ in "bc")
    a, b, c = ({"model.w": t} for t in (a, b, c))
    assert_same_bits(*merge_pair(tmp_path_factory.mktemp("h"), a, b, c, line.format(m=m)))


@pytest.mark.parametrize("b", [torch.float16, torch.float32])
def test_a_difference_that_the_third_model_lacks_is_zero_yet_added(tmp_path, b):
    third = {k: t for k, t in tiny(3).items() if not k.startswith(UNET)}
    ours, expected = merge_pair(tmp_path, tiny(1), tiny(2, b), third, "x = a + b + c, 0.3")
    assert_same_bits(ours, expected)
    assert ours[f"{UNET}out.2.bias"].dtype == b


def test_an_input_used_twice_is_not_changed_by_the_first_use(tmp_path):
    wide = {f"{UNET}input_blocks.0.0.weight": values((8, 9, 3, 3), 5).half()}
    for i, name in enumerate("ab"):
        save(tiny(i) | (wide if name == "a" else {}), tmp_path / f"{name}.safetensors")
    recipe = "x = a + b, 0.3, safetensors\ny = a + b, 0.7, safetensors"
    expected = webui_oracle.run(recipe, tmp_path, tmp_path)
    lineage.merge(parse(recipe), tmp_path / "out", models=tmp_path)
    for name in "xy":
        assert_same_bits(safetensors.torch.load_file(tmp_path / "out" / f"{name}.safetensors"), expected[name])
