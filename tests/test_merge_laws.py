"""Laws of merging: float32 arithmetic, per-block weights, components, adapters, records, and readers of the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_merging import SHAPES, TEXT, UNET, assert_same_bits, save
from torch import Tensor, nn

import lineage
from lineage.cache import cached_sha256
from lineage.errors import LineageError
from lineage.hashing import sha256, short_hash
from lineage.recipe import coefficients, parse
from lineage.recipe_toml import parse_toml

pytestmark = pytest.mark.usefixtures("no_sync")
QUERY = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
CONV = f"{UNET}middle_block.0.in_layers.2.weight"


def model(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A model with plain Gaussian weights."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in SHAPES.items()}


@pytest.fixture
def models(tmp_path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    for i, name in enumerate("abcd"):
        save(model(i), folder / f"{name}.safetensors")
    return folder


def run(recipe: Any, models: Path, **options) -> dict[str, Tensor]:
    """The tensors of the only output."""
    out = models.parent / "out"
    result = lineage.merge(recipe, out, models=models, force=True, container="safetensors", **options)
    return safetensors.torch.load_file(out / str(result.outputs[-1].file))


@pytest.mark.parametrize("arithmetic", ["webui", "float32"])
def test_weight_nought_is_the_first_and_weight_one_the_second(models, arithmetic):
    for weight, name in ((0, "a"), (1, "b")):
        found = run(parse(f"x = a + b, {weight}"), models, arithmetic=arithmetic)
        expected = safetensors.torch.load_file(models / f"{name}.safetensors")
        assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("arithmetic", ["webui", "float32"])
def test_laws_of_order(models, arithmetic):
    forth = run(parse("x = a + b, 0.25"), models, arithmetic=arithmetic)
    back = run(parse("x = b + a, 0.75"), models, arithmetic=arithmetic)
    assert_same_bits(forth, back)
    same = run(parse("x = a + c + c, 0.8"), models, arithmetic=arithmetic)
    assert all(torch.equal(same[k], v) for k, v in safetensors.torch.load_file(models / "a.safetensors").items())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abcd"), st.decimals(-1, 1, places=3)), max_size=6))
def test_explained_coefficients_reproduce_the_float32_result(tmp_path_factory, lines):
    models = tmp_path_factory.mktemp("m") / "models"
    models.mkdir()
    for i, name in enumerate("abcd"):
        save(model(i), models / f"{name}.safetensors")
    text = "x0 = a + b, 0.3\n" + "".join(
        f"x{i} = __O{i}__ + {name}{' + d' if difference else ''}, {m}\n"
        for i, (difference, name, m) in enumerate(lines, 1)
    )
    recipe = parse(text)
    found = run(recipe, models, arithmetic="float32")
    terms = coefficients(recipe)[-1]
    for key in SHAPES:
        parts = [float(c) * model("abcd".index(n))[key].double() for n, c in terms.items()]
        torch.testing.assert_close(found[key].double(), sum(parts), rtol=1e-5, atol=1e-5)


def test_float32_rounds_once(models):
    for i, name in enumerate("abcd"):
        save({k: t.half() for k, t in model(i).items()}, models / f"{name}.safetensors")
    found = run(parse("t = a + b, 0.3\nx = __O1__ + c + d, 0.7"), models, arithmetic="float32")
    a, b, c, d = (model(i)[QUERY].half().double() for i in range(4))
    exact = 0.7 * a + 0.3 * b + 0.7 * (c - d)
    assert found[QUERY].dtype == torch.float16
    wrong = (found[QUERY] != exact.half()).float().mean()
    rounded_twice = (
        (run(parse("t = a + b, 0.3\nx = __O1__ + c + d, 0.7"), models)[QUERY] != exact.half()).float().mean()
    )
    assert wrong < 0.02 < rounded_twice


def test_fp16_flag_under_float32_halves_every_float(models):
    save(model(0) | {"betas": torch.rand(5)}, models / "a.safetensors")
    assert {t.dtype for t in run(parse("x = a + b, 0.3, fp16"), models, arithmetic="float32").values()} == {
        torch.float16
    }
    webui = run(parse("x = a + b, 0.3, fp16"), models)
    assert webui["betas"].dtype == torch.float32


def test_any_number_of_lines(models):
    lines = ["x0 = a + b, 0.5", *(f"x{i} = __O{i}__ + {'abcd'[i % 4]}, 0.01" for i in range(1, 1200))]
    found = run(parse("\n".join(lines)), models)
    assert all(t.isfinite().all() for t in found.values())


PAIR = '[[merge]]\nname = "x"\nmodels = ["a", "b"]\nweight = 0.5\n'
BLOCKS = {
    "IN01": QUERY,
    "M00": CONV,
    "OUT": f"{UNET}out.2.bias",
    "TE.00": f"{TEXT}encoder.layers.0.self_attn.q_proj.weight",
}


def test_block_weights_reach_their_blocks(models):
    text = PAIR + 'blocks = { "IN01" = 0, "TE.*" = 1, "*middle_block*" = 0.25 }'
    found = run(parse_toml(text), models)
    a, b = (safetensors.torch.load_file(models / f"{n}.safetensors") for n in "ab")
    for block, weight in {"IN01": 0.0, "TE.00": 1.0, "M00": 0.25, "OUT": 0.5}.items():
        key = BLOCKS[block]
        torch.testing.assert_close(found[key], (1 - weight) * a[key] + weight * b[key])


def test_block_list_of_26(models):
    weights = [i / 25 for i in range(26)]
    found = run(parse_toml(f'[[merge]]\nname="x"\nmodels=["a","b"]\nweight=0\nblocks={weights}'), models)
    a, b = (safetensors.torch.load_file(models / f"{n}.safetensors") for n in "ab")
    places = {f"{TEXT}final_layer_norm.weight": 0, BLOCKS["IN01"]: 2, BLOCKS["M00"]: 13, BLOCKS["OUT"]: 25}
    for key, place in places.items():
        torch.testing.assert_close(found[key], (1 - weights[place]) * a[key] + weights[place] * b[key])


def test_explain_tells_the_blocks_apart(models):
    text = PAIR + 'blocks = { "M00" = 0.25 }'
    output = lineage.merge(parse_toml(text), models=models, dry_run=True).outputs[0]
    assert output.coefficients == {"a": 0.5, "b": 0.5}
    assert output.block_coefficients == {"M00": {"a": 0.75, "b": 0.25}}


@pytest.mark.parametrize("prefix", ["first_stage_model.", ""])
def test_a_component_is_taken_whole(models, prefix):
    vae = "first_stage_model.decoder.conv_in.weight"
    donor = {prefix + vae.removeprefix("first_stage_model."): model(9)[vae]}
    save(donor, models / "vae.safetensors")
    text = PAIR + 'take = { vae = "vae" }'
    found = run(parse_toml(text), models)
    assert torch.equal(found[vae], model(9)[vae])
    with pytest.raises(LineageError, match="nothing to take"):
        run(parse_toml(text.replace("vae = ", "text_encoder = ")), models)


LORA = [("LoConModule", {}), ("LohaModule", {}), ("LokrModule", {"decompose_both": True, "factor": 2})]


@pytest.mark.parametrize(("kind", "options"), LORA)
@pytest.mark.parametrize("key", [QUERY, CONV])
def test_applied_adapters_equal_lycoris_forward(models, kind, options, key):
    modules = pytest.importorskip("lycoris.modules")
    weight = model(0)[key]
    layer = (
        nn.Linear(*weight.shape[::-1], bias=False) if weight.dim() == 2 else nn.Conv2d(8, 8, 3, padding=1, bias=False)
    )
    layer.weight.data = weight.clone()
    name = {
        QUERY: "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q",
        CONV: "lora_unet_mid_block_resnets_0_conv1",
    }[key]
    network = getattr(modules, kind)(name, layer.requires_grad_(False), 1.0, 4, 1.5, **options).eval()
    for p in network.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    tensors = {f"{name}.{k}": v.detach().clone().contiguous() for k, v in network.state_dict().items()}
    safetensors.torch.save_file(tensors, models / "style.safetensors")
    lineage.apply(models / "a.safetensors", {models / "style.safetensors": 0.65}, models / "x.safetensors")
    found = safetensors.torch.load_file(models / "x.safetensors")
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)) if weight.dim() == 2 else torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        whole, plain = network.forward(x), layer(x)
        layer.weight.data = found[key]
        torch.testing.assert_close(layer(x), plain + 0.65 * (whole - plain), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(t, found[k]) for k, t in model(0).items() if k != key)


def test_adapter_in_a_recipe_follows_the_merge(models):
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    up, down = torch.randn(8, 2), torch.randn(2, 8)
    save(
        {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.0)},
        models / "l.safetensors",
    )
    text = '[[merge]]\nname="x"\nmodels=["a","b"]\nweight=0.5\nadapters={ "l.safetensors" = 2 }'
    expected = (model(0)[QUERY] + model(1)[QUERY]) / 2 + 2 * (up @ down) / 2
    torch.testing.assert_close(run(parse_toml(text), models)[QUERY], expected)


def test_adapter_of_another_architecture_is_refused(models):
    save(
        {
            "lora_unet_nowhere.lora_up.weight": torch.zeros(8, 2),
            "lora_unet_nowhere.lora_down.weight": torch.zeros(2, 8),
        },
        models / "l.safetensors",
    )
    with pytest.raises(LineageError, match="lora_unet_nowhere"):
        lineage.apply(models / "a.safetensors", {models / "l.safetensors": 1}, models / "x.safetensors")


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as f:
        return f.metadata()


def test_metadata_accumulates_the_lineage(models, tmp_path):
    lineage.merge(parse("mid = a + b, 0.5, safetensors"), models, models=models)
    lineage.merge(parse("x = mid + c + a, 0.5, safetensors"), tmp_path, models=models)
    found = header(tmp_path / "x.safetensors")
    record, known = json.loads(found["sd_merge_recipe"]), json.loads(found["sd_merge_models"])
    assert record["type"] == "lineage"
    assert record["recipe"] == "x = mid + c + a, 0.5, safetensors"
    assert record["coefficients"] == {"mid": 1.0, "c": 0.5, "a": -0.5}
    assert record["inputs"]["c"] == {"file": "c.safetensors", "sha256": sha256(models / "c.safetensors")}
    assert {entry["name"] for entry in known.values()} == {"a", "b", "c", "mid"}
    assert set(known) == {sha256(models / f"{n}.safetensors") for n in ("a", "b", "c", "mid")}
    assert known[sha256(models / "b.safetensors")]["legacy_hash"] == short_hash(models / "b.safetensors")
    assert known[sha256(models / "mid.safetensors")]["sd_merge_recipe"]["output"] == "mid"
    assert found["format"] == "pt"
    assert found["modelspec.title"] == "x"


def test_without_hashes_the_tensors_are_the_same_and_the_record_says_so(models, tmp_path):
    recipe = parse("x = a + b, 0.5, safetensors")
    result = lineage.merge(recipe, tmp_path / "bare", models=models, hashes=False)
    lineage.merge(recipe, tmp_path / "full", models=models)
    bare, full = (safetensors.torch.load_file(tmp_path / n / "x.safetensors") for n in ("bare", "full"))
    assert_same_bits(bare, full)
    found = header(tmp_path / "bare" / "x.safetensors")
    assert json.loads(found["sd_merge_models"]) == {}
    assert json.loads(found["sd_merge_recipe"])["inputs"]["a"]["sha256"] is None
    assert [i.sha256 for i in result.inputs] == [None, None]


@pytest.mark.parametrize("nonsense", ["[", "[1]", '"x"', "null", "[" * 10000])
def test_nonsense_in_a_strangers_metadata_is_no_obstacle(models, tmp_path, nonsense):
    tensors = safetensors.torch.load_file(models / "a.safetensors")
    metadata = {"sd_merge_models": nonsense, "sd_merge_recipe": nonsense}
    safetensors.torch.save_file(tensors, models / "a.safetensors", metadata)
    lineage.merge(parse("x = a + b, 0.5, safetensors"), tmp_path, models=models)
    assert len(json.loads(header(tmp_path / "x.safetensors")["sd_merge_models"])) == 2


def test_result_records_files_policies_and_changes(models, tmp_path):
    save(model(0) | {"model.only": torch.zeros(3), "betas": torch.zeros(3)}, models / "a.safetensors")
    save(model(1) | {"model.other": torch.zeros(3)}, models / "b.safetensors")
    result = lineage.merge(parse("x = a + b, 0.25, fp16, safetensors"), tmp_path, models=models)
    output, step = result.outputs[0], result.steps[0]
    assert output.bytes == (tmp_path / "x.safetensors").stat().st_size
    assert step.policy == {"merged": len(SHAPES), "unhalved": 2, "dropped": 1}
    assert {(k["name"], k["policy"]) for k in step.changed_keys} == {
        ("model.only", "unhalved"),
        ("betas", "unhalved"),
        ("model.other", "dropped"),
    }
    assert [i.sha256 for i in result.inputs] == [sha256(models / f"{n}.safetensors") for n in "ab"]
    a, b = ({k: t.double() for k, t in model(i).items()} for i in range(2))
    norm = lambda t: float(sum(v.square().sum() for v in t.values()) ** 0.5)  # noqa: E731
    expected = 0.25 * norm({k: b[k] - a[k] for k in a}) / norm(a)
    assert output.changes[0].whole == pytest.approx(expected, rel=1e-3)
    middle = 0.25 * float((b[CONV] - a[CONV]).norm() / a[CONV].norm())
    assert output.changes[0].blocks["M00"] == pytest.approx(middle, rel=1e-3)


def test_a_known_hash_is_not_taken_for_a_changed_file(models, tmp_path):
    recipe = parse("x = a + b, 0.25, safetensors")
    for seed in (1, 2):
        save(model(seed), models / "b.safetensors")
        found = lineage.merge(recipe, tmp_path, models=models, force=True)
        assert [i.sha256 for i in found.inputs] == [sha256(models / f"{n}.safetensors") for n in "ab"]
        assert cached_sha256(tmp_path / "x.safetensors") == sha256(tmp_path / "x.safetensors")


def test_sampled_change_is_close(tmp_path):
    g = torch.Generator().manual_seed(0)
    a, b = ({"model.diffusion_model.w": torch.randn(1000, 700, generator=g)} for _ in "ab")
    save(a, tmp_path / "a.safetensors")
    save(b, tmp_path / "b.safetensors")
    out = lineage.merge(parse("x = a + b, 0.5"), tmp_path / "out", models=tmp_path).outputs[0]
    assert out.changes[0].whole == pytest.approx(0.5 * 2**0.5, rel=0.02)


def test_warnings_name_both_models(models):
    save(model(0) | {"v_pred": torch.zeros(0)}, models / "b.safetensors")
    save(model(1), models / "e.safetensors")
    safetensors.torch.save_file(model(1), models / "e.safetensors", {"modelspec.prediction_type": "epsilon"})
    warnings = lineage.merge(parse("x = e + b, 1.5"), models=models, dry_run=True).warnings
    assert any("b predicts v, e predicts noise" in w for w in warnings)
    assert any("marker key v_pred of b is dropped" in w for w in warnings)
    assert any("outside 0 to 1" in w for w in warnings)
    assert any("blow-up" in w for w in lineage.merge(parse("x = a + b + c, 0.9"), models=models, dry_run=True).warnings)


def test_overflow_is_told(models, tmp_path):
    for name, value in {"a": 60000.0, "b": -60000.0}.items():
        save({"model.w": torch.full((9,), value).half()}, models / f"{name}.safetensors")
    warnings = lineage.merge(parse("x = a + a + b, 1"), tmp_path, models=models).warnings
    assert any("weights in 1 of its tensors" in w for w in warnings)
    assert not any("infinite" in w for w in lineage.merge(parse("y = a + b, 1"), tmp_path, models=models).warnings)


def test_models_without_a_common_key_are_refused(models):
    save({"other.weight": torch.zeros(3)}, models / "z.safetensors")
    with pytest.raises(LineageError, match="share no key"):
        lineage.merge(parse("x = a + z, 0.5"), models=models, dry_run=True)


def test_arithmetic_that_torch_lacks_is_refused_before_reading(models):
    for name in "ab":
        save({"model.w": torch.zeros(3).to(torch.float8_e4m3fn)}, models / f"{name}.safetensors")
    with pytest.raises(LineageError, match="--arithmetic float32"):
        lineage.merge(parse("x = a + b, 0.5"), models=models, dry_run=True)
    assert run(parse("x = a + b, 0.5"), models, arithmetic="float32")["model.w"].dtype == torch.float8_e4m3fn


def test_keep_writes_intermediates(models, tmp_path):
    recipe = parse("t = a + b, 0.5\nu = __O1__ + c, 0.5\nx = __O2__ + d, 0.5, safetensors")
    lineage.merge(recipe, tmp_path / "one", models=models)
    lineage.merge(recipe, tmp_path / "two", models=models, keep=["t"])
    assert [p.name for p in sorted((tmp_path / "one").iterdir())] == ["x.safetensors"]
    assert [p.name for p in sorted((tmp_path / "two").iterdir())] == ["t.ckpt", "x.safetensors"]
    with pytest.raises(LineageError, match="Did you mean t"):
        lineage.merge(recipe, tmp_path / "three", models=models, keep=["tt"])


def test_diffusers_loads_a_merge(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    from lineage.keys import to_ldm

    config: Any = {
        "sample_size": 8,
        "attention_head_dim": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    torch.manual_seed(0)
    unets = [UNet2DConditionModel(**config) for _ in range(2)]
    for name, unet in zip("ab", unets, strict=True):
        save(to_ldm({"unet": unet.state_dict()}), tmp_path / f"{name}.safetensors")
    unets[0].save_config(tmp_path / "config" / "unet")
    lineage.merge(parse("x = a + b, 0.25, safetensors\ny = a + b, 0.25, ckpt"), tmp_path, models=tmp_path)
    states = [u.state_dict() for u in unets]
    assert (tmp_path / "y.ckpt").read_bytes()[-22:-18] == b"PK\5\6"  # nothing behind the archive's end
    for file in ("x.safetensors", "y.ckpt"):
        options = {"config": str(tmp_path / "config"), "subfolder": "unet", "local_files_only": True}
        loaded = UNet2DConditionModel.from_single_file(str(tmp_path / file), **options).state_dict()
        assert set(loaded) == set(states[0])
        for key, tensor in loaded.items():
            assert torch.equal(tensor, (1 - 0.25) * states[0][key] + 0.25 * states[1][key]), key
