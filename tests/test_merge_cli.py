"""`lineage merge` and `lineage apply` on the command line."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch
from test_merging import SHAPES, save, tiny
from test_recipe import DIFFERENCE, MODELS


@pytest.fixture
def zoo(tmp_path):
    for i, name in enumerate(MODELS):
        save({k: t.clamp(-1, 1) for k, t in tiny(i).items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "recipe.txt").write_text(DIFFERENCE, encoding="utf-8")
    return tmp_path


def test_merge_writes_model_result_and_page(call, zoo):
    code, out, _ = call("merge", zoo / "recipe.txt", "--models", zoo, "-o", zoo / "out", "--keep", "tmp3-ad")
    assert code == 0
    names = {"AleaMix-ad.safetensors", "tmp3-ad.safetensors", "result.json", "report.html"}
    assert {p.name for p in (zoo / "out").iterdir()} == names
    assert "blow-up" in out
    result = json.loads((zoo / "out" / "result.json").read_text("utf-8"))
    assert result["kind"] == "merge"
    assert result["outputs"][1]["coefficients"]["nai-full-pruned"] == -2
    assert call("merge", zoo / "recipe.txt", "--models", zoo, "-o", zoo / "out")[0] == 2


def test_explain_and_dry_run_write_nothing(call, zoo):
    before = set(zoo.iterdir())
    code, out, _ = call("merge", zoo / "recipe.txt", "--models", zoo, "--explain")
    assert code == 0
    assert "-2.00000" in out
    assert "keys that were not plainly merged" not in out
    _, dry, _ = call("merge", zoo / "recipe.txt", "--models", zoo, "--dry-run")
    assert "alphas_cumprod" in dry
    assert set(zoo.iterdir()) == before


def test_variables_are_bound(call, zoo):
    (zoo / "v.txt").write_text("x = nep + __OTHER__, 0.5, safetensors", encoding="utf-8")
    assert call("merge", zoo / "v.txt", "--models", zoo, "--explain")[0] == 2
    bound = f"OTHER={zoo / 'Pastel-Mix.safetensors'}"
    assert call("merge", zoo / "v.txt", "--models", zoo, "--explain", "--set", bound)[0] == 0
    assert call("merge", zoo / "v.txt", "--models", zoo, "--explain", "--set", "OTHER")[0] == 2


def test_a_wrong_line_is_shown(call, zoo):
    (zoo / "w.txt").write_text("x = nep + nepp, 0.5", encoding="utf-8")
    code, _, err = call("merge", zoo / "w.txt", "--models", zoo, "--explain")
    assert code == 2
    assert "w.txt:1:11" in err
    assert "^^^^\nDid you mean nep" in err


def test_apply(call, zoo):
    name = "lora_unet_mid_block_resnets_0_conv1"
    factors = {"lora_up.weight": torch.ones(8, 1, 1, 1), "lora_down.weight": torch.ones(1, 8, 3, 3)}
    save({f"{name}.{k}": t for k, t in factors.items()}, zoo / "ones.safetensors")
    model = zoo / "nep.safetensors"
    assert call("apply", model, f"{zoo / 'ones.safetensors'}:0.5", "-o", zoo / "x.safetensors")[0] == 0
    before, after = (safetensors.torch.load_file(p) for p in (model, zoo / "x.safetensors"))
    key = next(k for k in SHAPES if "middle_block" in k)
    assert torch.equal(after[key], (before[key].float() + 0.5).half())
    assert str(zoo) not in (zoo / "x.safetensors").read_bytes()[:10000].decode("utf-8", "replace")
    assert call("apply", model, zoo / "ones.safetensors", "-o", zoo / "x.safetensors")[0] == 2
    assert call("apply", model, zoo / "ones.safetensors", "-o", zoo / "x.bin")[0] == 2
    for weight in ("nan", "inf", "half", ""):
        code, _, err = call("apply", model, f"{zoo / 'ones.safetensors'}:{weight}", "-o", zoo / "y.safetensors")
        assert code == 2
        assert f"'{weight}' is no weight" in err
        assert not (zoo / "y.safetensors").exists()
