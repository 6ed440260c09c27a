"""`lineage.svd` on two files: against numpy on the tensors themselves, on planted ranks, and what it must refuse."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lineage
from lineage.errors import LineageError
from lineage.results import dumps
from lineage.spectrum import SOLVERS

G = torch.Generator().manual_seed(7)


def weights(dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """A small network of an unknown architecture: matrices, a conv, a norm, integers."""
    return {
        "layers.0.weight": (0.05 * torch.randn(160, 200, generator=G)).to(dtype),
        "layers.1.weight": (0.05 * torch.randn(90, 20, 3, 3, generator=G)).to(dtype),
        "layers.2.weight": (0.05 * torch.randn(100, 100, generator=G)).to(dtype),
        "layers.2.norm": torch.ones(100).to(dtype),
        "ids": torch.arange(5),
    }


def planted(w: torch.Tensor, rank: int, relative: float) -> torch.Tensor:
    flat = w.float().flatten(1)
    d = torch.randn(flat.shape[0], rank, generator=G) @ torch.randn(rank, flat.shape[1], generator=G)
    return (flat + relative * flat.norm() * d / d.norm()).view(w.shape).to(w.dtype)


@pytest.fixture
def pair(tmp_path):
    """(base file, tuned file, their tensors): rank 5 in layer 0, flat in layer 1, layer 2 untouched, norm moved."""
    base = weights()
    noise = torch.randn(base["layers.1.weight"].shape, generator=G)
    tuned = base | {
        "layers.0.weight": planted(base["layers.0.weight"], 5, 0.05),
        "layers.1.weight": (base["layers.1.weight"].float() + 0.01 * noise).half(),
        "layers.2.norm": base["layers.2.norm"] + 0.25,
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", base, tuned


def layers(result):
    return {layer.name: layer for layer in result.layers}


@pytest.mark.parametrize("solver", SOLVERS)
def test_figures_agree_with_numpy(pair, solver):
    base_file, tuned_file, base, tuned = pair
    found = layers(lineage.svd(base_file, tuned_file, solver=solver, rank=16))
    for name in ("layers.0.weight", "layers.1.weight"):
        w = base[name].double().flatten(1).numpy()
        d = tuned[name].double().flatten(1).numpy() - w
        s = np.linalg.svd(d, compute_uv=False)
        layer = found[name]
        assert layer.frobenius == pytest.approx(np.linalg.norm(d), rel=1e-6)
        assert layer.relative == pytest.approx(np.linalg.norm(d) / np.linalg.norm(w), rel=1e-6)
        assert layer.identical_entries == int((d == 0).sum())
        assert layer.stable_rank == pytest.approx((s**2).sum() / s[0] ** 2, rel=1e-3)
        for k, e in layer.energy.items():
            assert e.low <= (s[: int(k)] ** 2).sum() / (s**2).sum() <= e.high
        if layer.effective_rank is not None:
            p = s / s.sum()
            # the tail of a low-rank change, the rounding of its files, lies at the floor of a float32 Gram
            assert layer.effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=5e-3)
        assert set(layer.energy) == {"1", "2", "4", "8", "16"}


def test_planted_rank_is_seen_through_float16(pair):
    found = layers(lineage.svd(*pair[:2]))
    assert found["layers.0.weight"].signal_rank == 5
    assert (found["layers.0.weight"].signal_energy or {})["8"] == pytest.approx(1)
    assert found["layers.2.weight"].signal_rank == 0
    assert found["layers.2.weight"].solver == "identical"
    assert not found["layers.2.weight"].below_storage_precision


def test_a_change_below_storage_precision_is_said_to_be_so(tmp_path):
    base = {"w": (0.05 * torch.randn(150, 150, generator=G)).bfloat16()}
    save_file(base, tmp_path / "base.safetensors")
    save_file({"w": planted(base["w"], 40, 0.002)}, tmp_path / "tuned.safetensors")
    (layer,) = lineage.svd(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors").layers
    assert layer.signal_rank is None
    assert layer.below_storage_precision
    assert layer.signal_energy is None
    assert layer.frobenius > 0


def test_a_model_against_itself_is_identical(pair):
    result = lineage.svd(pair[0], pair[0])
    assert result.summary.identical_matrices == 3
    assert all(layer.frobenius == 0 and layer.k_99 == 0 for layer in result.layers)
    assert "bit-identical" in result.summary.answer


def test_dtype_of_the_tuned_file_is_not_lost(tmp_path):
    """The tuned model is never cast to the base's dtype: a change smaller than the base's spacing is still measured."""
    w = (0.05 * torch.randn(80, 80, generator=G)).bfloat16()
    change = 1e-5 * torch.randn(80, 80, generator=G)
    save_file({"w": w}, tmp_path / "base.safetensors")
    save_file({"w": w.float() + change}, tmp_path / "tuned.safetensors")
    (layer,) = lineage.svd(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors").layers
    assert layer.frobenius == pytest.approx(float(change.norm()), rel=1e-3)


def test_what_cannot_be_compared_is_listed_with_its_reason(pair, tmp_path):
    base, tuned = pair[2], dict(pair[3])
    tuned["extra"] = torch.zeros(3, 3)
    tuned["layers.1.weight"] = torch.zeros(4, 4).half()
    tuned["layers.2.weight"] = torch.full((100, 100), float("nan")).half()
    del tuned["layers.0.weight"]
    save_file(tuned, tmp_path / "other.safetensors")
    result = lineage.svd(pair[0], tmp_path / "other.safetensors")
    reasons = {(row["name"], row["side"]) for row in result.unmatched}
    assert {("extra", "tuned"), ("layers.0.weight", "base"), ("ids", "both")} <= reasons
    assert {"layers.1.weight", "layers.2.weight"} <= {name for name, _ in reasons}
    counted = len(result.layers) + len(result.vectors) + len({name for name, _ in reasons})
    assert counted == len(base.keys() | tuned.keys())


def test_only_the_wanted_components(pair):
    with pytest.raises(LineageError, match="nothing to compare"):
        lineage.svd(*pair[:2], components=["vae"])


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"tolerance": 2}, {"solver": "magic"}, {"device": "abacus"}])
def test_options_out_of_range_are_refused(pair, wrong):
    with pytest.raises(LineageError, match=str(next(iter(wrong)))):
        lineage.svd(*pair[:2], **wrong)


def test_summary_counts_and_groups_add_up(pair):
    result = lineage.svd(*pair[:2])
    s = result.summary
    assert s.matrices + s.small_matrices == len(result.layers)
    assert s.vectors == len(result.vectors) == 1
    total = sum(layer.frobenius**2 for layer in (*result.layers, *result.vectors))
    assert s.frobenius**2 == pytest.approx(total)
    for groups in (s.components, s.blocks):
        assert sum(g.frobenius**2 for g in groups.values()) == pytest.approx(total)
        assert sum(g.layers for g in groups.values()) == len(result.layers)
    assert s.gaussian.layers == s.raw.layers == 2


def test_the_result_is_strict_json_and_the_same_twice(pair):
    first, second = (json.loads(dumps(lineage.svd(*pair[:2]))) for _ in range(2))
    for r in (first, second):
        del r["provenance"]["date"], r["provenance"]["seconds"]
    assert first == second
    assert first["schema"]
    assert first["layers"][0]["energy"]["1"].keys() == {"low", "value", "high"}


def test_progress_reaches_the_total(pair):
    seen = []
    lineage.svd(*pair[:2], progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == sum(s[0] for s in seen[-1:])
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)


def test_records_hold_what_was_measured(pair):
    result = lineage.svd(*pair[:2])
    inputs = result.provenance.inputs
    assert inputs["base"]["path"] == "base.safetensors"
    assert len(inputs["tuned"]["sha256"]) == 64
    assert asdict(result)["kind"] == "svd"


@pytest.fixture
def adapter(tmp_path):
    """(base file, LoRA file, its exact delta): a rank-3 LoRA with alpha 6 on one matrix of a bare UNet."""
    name = "lora_unet_down_blocks_0_attentions_0_proj_in"
    up, down = torch.randn(120, 3, generator=G), torch.randn(3, 90, generator=G)
    base = {
        "unet.down_blocks.0.attentions.0.proj_in.weight": torch.randn(120, 90, generator=G),
        "unet.mid_block.resnets.0.conv1.bias": torch.zeros(4),
    }
    factors = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(6.0)}
    save_file(base, tmp_path / "base.safetensors")
    save_file(factors, tmp_path / "lora.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "lora.safetensors", base, up @ down * 6 / 3


@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_is_measured_from_its_factors(adapter, with_base):
    base_file, lora, base, delta = adapter
    result = lineage.svd(base_file if with_base else None, lora)
    (layer,) = result.layers
    s = torch.linalg.svdvals(delta.double())
    assert layer.solver == "factors"
    assert layer.component == "unet"
    assert (layer.signal_rank, layer.k_99) == (3, 3)
    assert layer.frobenius == pytest.approx(float(delta.norm()), rel=1e-6)
    assert layer.singular_values[:3] == pytest.approx(s[:3].tolist(), rel=1e-5)
    weight = base["unet.down_blocks.0.attentions.0.proj_in.weight"]
    assert layer.relative == (pytest.approx(float(delta.norm() / weight.norm()), rel=1e-5) if with_base else None)


def test_an_untrained_adapter_changes_nothing(adapter, tmp_path):
    module = "lora_unet_down_blocks_0_attentions_0_proj_in"
    zero = {f"{module}.lora_up.weight": torch.zeros(120, 3), f"{module}.lora_down.weight": torch.randn(3, 90)}
    save_file(zero, tmp_path / "zero.safetensors")
    (layer,) = lineage.svd(adapter[0], tmp_path / "zero.safetensors").layers
    assert (layer.frobenius, layer.signal_rank, layer.signal_rank_at_least, layer.k_99) == (0, 0, 0, 0)


def test_a_whole_model_needs_its_base(pair):
    with pytest.raises(LineageError, match="base is needed"):
        lineage.svd(None, pair[1])


def test_lone_numbers_are_vectors_and_empty_tensors_are_listed(tmp_path):
    for name, value in (("base", 1.0), ("tuned", 3.5)):
        tensors = {"scale": torch.tensor(value), "none": torch.zeros(0, 4), "w": torch.full((70, 70), value)}
        save_file(tensors, tmp_path / f"{name}.safetensors")
    result = lineage.svd(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert [(v.name, v.frobenius, v.relative) for v in result.vectors] == [("scale", 2.5, 2.5)]
    assert result.unmatched == ({"name": "none", "side": "both", "reason": "has no entries"},)
    assert not result.notes


def test_the_page_is_told_that_the_edge_may_be_conservative(pair):
    assert any("conservative" in note for note in lineage.svd(*pair[:2]).notes)
