"""`lineage extract` and `lineage resize`: the errors they tell are real, the adapters give the model back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import stable_diffusion
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lineage
from lineage.checkpoint import open_checkpoint
from lineage.errors import LineageError
from lineage.keys import kohya_modules, to_ldm
from lineage.targets import targets
from lineage.truncation import fit_hadamard, truncate

pytestmark = pytest.mark.usefixtures("no_sync")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low(w: Tensor, rank: int, g: torch.Generator) -> Tensor:
    """A change of a 50th of w's size in `rank` ranks."""
    flat = w.flatten(1)
    d = torch.randn(len(flat), rank, generator=g) @ torch.randn(rank, flat.shape[1], generator=g)
    return (d * flat.norm() / d.norm() / 50).view(w.shape)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """base, and tuned: every matrix changed in 3 ranks, one norm moved; as float32 single files."""
    folder = tmp_path_factory.mktemp("models")
    base = to_ldm(stable_diffusion.states(stable_diffusion.tiny("sd1")), "sd1")
    g = generator(1)
    tuned = {n: t + low(t, 3, g) if t.is_floating_point() and t.dim() > 1 else t.clone() for n, t in base.items()}
    norm = next(n for n in base if n.endswith("norm1.weight") and base[n].dim() == 1)
    tuned[norm] = tuned[norm] + 0.5
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return folder


def extract(models: Path, output: Path, **options: Any):
    return lineage.extract(models / "base.safetensors", models / "tuned.safetensors", output, **options)


def matrix(rows: int, columns: int, decay: float) -> Tensor:
    g, short = generator(0), min(rows, columns)
    u, v = (torch.linalg.qr(torch.randn(n, short, generator=g)).Q for n in (rows, columns))
    return (u * torch.arange(1, short + 1) ** -decay) @ v.mT


@pytest.mark.parametrize("shape", [(320, 900), (900, 320), (60, 70)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_truncation_is_within_one_per_cent_of_the_best(shape, decay):
    delta = matrix(shape[0], shape[1], decay)
    left, right = truncate(delta, 20)
    s = torch.linalg.svdvals(delta.double())
    best = s[20:].norm()
    assert left.shape == (shape[0], 20)
    assert best * (1 - 1e-5) <= (delta - left @ right).double().norm() <= 1.01 * best


def test_a_planted_loha_is_found_again():
    g = generator(3)
    halves = [torch.randn(300, 8, generator=g) @ torch.randn(8, 400, generator=g) for _ in range(2)]
    delta = halves[0] * halves[1]
    a1, b1, a2, b2 = fit_hadamard(delta, 8)
    assert (delta - (a1 @ b1) * (a2 @ b2)).norm() < 1e-3 * delta.norm()


def test_more_rounds_of_the_fit_never_err_more():
    delta = matrix(90, 110, 0.3)

    def error(rounds: int) -> float:
        a1, b1, a2, b2 = fit_hadamard(delta, 4, rounds)
        return float((delta - (a1 @ b1) * (a2 @ b2)).norm())

    errors = [error(n) for n in (1, 3, 10, 30)]
    assert errors == sorted(errors, reverse=True)
    left, right = truncate(delta, 4)
    assert errors[-1] < float((delta - left @ right).norm())


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_targets_are_the_layers_that_adapters_change_under_kohyas_names(kind, tmp_path):
    parts = stable_diffusion.tiny(kind)
    save_file(to_ldm(stable_diffusion.states(parts), kind), tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as model:
        found = targets(model.specs)
        names = kohya_modules(model.specs)
    assert {names[t.module] for t in found.values()} == set(found)
    blocks = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    expected = set()
    for path, block in parts["unet"].named_modules():
        if type(block).__name__ in blocks:
            for inner, layer in block.named_modules():
                if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                    expected.add(f"unet.{path}.{inner}.weight")
    assert {n for n in found if n.startswith("unet.")} == expected
    prefixes = {t.module.split("_")[1] for t in found.values()} - {"unet"}
    assert prefixes == ({"te1", "te2"} if kind == "sdxl" else {"te"})


@pytest.mark.parametrize("kind", ["locon", "loha"])
def test_applied_to_the_base_it_errs_as_it_was_told(models, tmp_path, kind):
    """The errors in the result, against the difference of the files themselves."""
    found = extract(models, tmp_path / "a.safetensors", kind=kind, rank=2, dtype="float32")
    lineage.apply(models / "base.safetensors", {tmp_path / "a.safetensors": 1.0}, tmp_path / "m.safetensors")
    with (
        open_checkpoint(models / "base.safetensors") as base,
        open_checkpoint(models / "tuned.safetensors") as tuned,
        open_checkpoint(tmp_path / "m.safetensors") as made,
    ):
        total = lost = 0.0
        told = {layer.name: layer for layer in found.layers}
        for name, param in base.specs.items():
            if not param.dtype.is_floating_point:
                continue
            wanted, got = (x[name].double() - base[name].double() for x in (tuned, made))
            total, lost = total + float(wanted.square().sum()), lost + float((wanted - got).square().sum())
            if name in told:
                error = float((wanted - got).norm() / wanted.norm())
                assert told[name].error == pytest.approx(error, abs=1e-4)
    assert found.kept == pytest.approx(1 - lost / total, abs=1e-5)


def test_enough_ranks_and_whole_differences_give_the_tuned_model_back(models, tmp_path):
    found = extract(models, tmp_path / "a.safetensors", rank=4, dtype="float32", diffs=True, components=["unet"])
    assert {x.name.split(".")[0] for x in found.left_out} <= {"unet"}
    assert found.kept is not None
    assert found.kept > 1 - 1e-6
    lineage.apply(models / "base.safetensors", {tmp_path / "a.safetensors": 1.0}, tmp_path / "m.safetensors")
    made, tuned = load_file(tmp_path / "m.safetensors"), load_file(models / "tuned.safetensors")
    for name in (n for n in made if n.startswith("model.diffusion_model.")):
        torch.testing.assert_close(made[name], tuned[name], atol=1e-5, rtol=1e-4)


def test_everything_that_changed_is_in_the_adapter_or_listed(models, tmp_path):
    found = extract(models, tmp_path / "a.safetensors", kind="lora", rank=1)
    with open_checkpoint(models / "base.safetensors") as a, open_checkpoint(models / "tuned.safetensors") as b:
        changed = {n for n in a if not torch.equal(a[n], b[n])}
    named = [layer.name for layer in found.layers] + [x.name for x in found.left_out]
    assert sorted(named) == sorted(changed)
    assert all(".attentions." in layer.name or layer.component != "unet" for layer in found.layers)
    assert all(x.reason for x in found.left_out)
    lost = sum(x.share or 0 for x in found.left_out)
    assert found.kept is not None
    assert found.kept <= 1 - lost


@pytest.mark.parametrize(("energy", "rank"), [(0.5, None), (0.9999, 3)])
def test_energy_takes_the_fewest_ranks_that_hold_the_share(models, tmp_path, energy, rank):
    found = extract(models, tmp_path / "a.safetensors", energy=energy, dtype="float32")
    for layer in found.layers:
        assert 1 - layer.error**2 >= energy - 1e-4
        assert rank is None or layer.rank <= rank


def test_signal_takes_the_planted_rank_through_float16(tmp_path):
    parts = stable_diffusion.states(stable_diffusion.tiny("sd1"))
    base = {n: t.half() if t.is_floating_point() else t for n, t in to_ldm(parts, "sd1").items()}
    g, key = generator(5), "model.diffusion_model.input_blocks.0.0.weight"
    wide = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert key in base
    tuned = base | {wide: (base[wide].float() + 5 * low(base[wide].float(), 2, g)).half()}
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    (layer,) = extract(tmp_path, tmp_path / "a.safetensors", signal=True).layers
    assert layer.rank == 2


def test_a_matrix_with_fewer_ranks_than_asked_for_says_so(models, tmp_path):
    found = extract(models, tmp_path / "a.safetensors", rank=40)
    for layer in found.layers:
        short = min(layer.shape[0], math.prod(layer.shape[1:]))
        assert layer.rank == min(40, short)
        assert layer.wanted == (40 if short < 40 else None)


def test_the_file_names_its_base_and_kind(models, tmp_path):
    extract(models, tmp_path / "a.safetensors", kind="loha", rank=2)
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        found = f.metadata()
    svd = lineage.svd(models / "base.safetensors", models / "tuned.safetensors").provenance.inputs
    assert found["ss_new_sd_model_hash"] == svd["base"]["sha256"]
    assert json.loads(found["ss_network_args"])["algo"] == "loha"
    assert lineage.open_adapter(tmp_path / "a.safetensors").kind == "loha"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "one thing"),
        ({"energy": 1.5}, "share"),
        ({"rank": 0}, "1 or more"),
        ({"kind": "dora"}, "choose one of"),
        ({"dtype": "int8"}, "choose one of"),
        ({"signal": True, "conv_rank": 2}, "--rank only"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(models, tmp_path, options, message):
    with pytest.raises(LineageError, match=message):
        extract(models, tmp_path / "a.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_and_an_unchanged_model_are_refused(models, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"mine")
    with pytest.raises(LineageError, match="exists already"):
        extract(models, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == b"mine"
    base = models / "base.safetensors"
    with pytest.raises(LineageError, match="no weight that adapters change"):
        lineage.extract(base, base, tmp_path / "b.safetensors")


def deltas(path: Path) -> dict[str, Tensor]:
    return {n: f.delta().flatten(1).double() for n, f in lineage.open_adapter(path).modules.items()}


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    for kind, rank in {"locon": 6, "loha": 2}.items():
        extract(models, folder / f"{kind}.safetensors", kind=kind, rank=rank, dtype="float32")
    return folder


@pytest.mark.parametrize("source", ["locon", "loha"])
@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.8}, {"ratio": 2.0}])
def test_resizing_truncates_each_module_as_its_svd_would(adapters, tmp_path, source, size):
    before = deltas(adapters / f"{source}.safetensors")
    found = lineage.resize(adapters / f"{source}.safetensors", tmp_path / "r.safetensors", **size)
    after = deltas(tmp_path / "r.safetensors")
    told = {layer.module: layer for layer in found.layers}
    for name, delta in before.items():
        s = torch.linalg.svdvals(delta)
        share = s.square().cumsum(0) / s.square().sum()
        keep = {
            "rank": min(2, len(s)),
            "energy": int((share < 0.8).sum()) + 1,
            "ratio": int((s >= s[0] / 2).sum()),
        }[next(iter(size))]
        assert told[name].rank == keep
        assert float((delta - after[name]).norm()) == pytest.approx(float(s[keep:].norm()), abs=1e-4 * float(s.norm()))


def test_resizing_to_enough_ranks_changes_nothing(adapters, tmp_path):
    found = lineage.resize(adapters / "loha.safetensors", tmp_path / "r.safetensors", rank=4)
    before, after = deltas(adapters / "loha.safetensors"), deltas(tmp_path / "r.safetensors")
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, atol=1e-5, rtol=1e-3)
    assert found.kept == pytest.approx(1, abs=1e-6)


def test_a_loha_stays_one_when_asked(adapters, tmp_path):
    found = lineage.resize(adapters / "loha.safetensors", tmp_path / "r.safetensors", rank=1, kind="loha")
    assert lineage.open_adapter(tmp_path / "r.safetensors").kind == "loha"
    assert all(x.best_error is not None and x.error >= x.best_error - 1e-5 for x in found.layers)


def test_dora_cannot_be_resized_alone(adapters, tmp_path):
    tensors = load_file(adapters / "locon.safetensors")
    module = next(n for n in tensors if n.endswith(".lora_up.weight")).removesuffix(".lora_up.weight")
    tensors[f"{module}.dora_scale"] = torch.ones(len(tensors[f"{module}.lora_up.weight"]), 1)
    save_file(tensors, tmp_path / "d.safetensors")
    with pytest.raises(LineageError, match="DoRA"):
        lineage.resize(tmp_path / "d.safetensors", tmp_path / "r.safetensors", rank=1)


def test_the_commands_save_a_page_that_names_what_was_left_out(models, tmp_path, call):
    files = [models / "base.safetensors", models / "tuned.safetensors"]
    code, out, err = call("extract", *files, "-o", tmp_path / "a.safetensors", "--rank", 2, "--report", tmp_path / "r")
    assert code == 0, err
    assert "left out" in out
    assert "token_embedding" in (tmp_path / "r" / "report.html").read_text("utf-8")
    code, out, _ = call("resize", tmp_path / "a.safetensors", "-o", tmp_path / "b.safetensors", "--rank", 1, "--json")
    assert code == 0
    assert json.loads(out)["kind"] == "adapter"
    code, _, err = call("resize", tmp_path / "a.safetensors", "-o", tmp_path / "c.safetensors")
    assert code == 2
    assert "--rank" in err
