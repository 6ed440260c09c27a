"""Laws of `lineage cluster` on folders whose past is known."""

import json
import random

import kin
import pytest
import torch
from safetensors.torch import load_file, save_file

import lineage
from lineage.errors import LineageError
from lineage.hashing import short_hash


@pytest.fixture(scope="module")
def models() -> dict[str, kin.Weights]:
    a, z = kin.root(1), kin.root(2)
    b, c, d = kin.tune(a, 3), kin.tune(a, 4, 0.03), kin.tune(a, 5)
    found = {
        "a": a, "b": b, "c": c, "d": d, "e": kin.tune(b, 6), "f": kin.tune(b, 7, 0.01), "g": kin.tune(c, 8),
        "z": z, "y": kin.tune(z, 9), "x": kin.tune(z, 10),
    }  # fmt: skip
    found["merge"] = kin.half(kin.mix({"b": 0.7, "c": 0.3}, found))
    found["three"] = kin.mix({"d": 0.5, "e": 0.25, "g": 0.25}, found)
    found["diff"] = kin.half(kin.mix({"e": 1, "g": 0.5, "a": -0.5}, found))
    found["baked"] = kin.lora(d, 11)
    found["int8"] = kin.quantise(e := found["e"])
    found["pruned"] = kin.prune(found["c"])
    found["short"] = kin.half(e)
    found["twin"] = {k: w.clone() for k, w in found["g"].items()}
    found["moved"] = kin.permute(found["d"], 12)
    return found


EDGES = {
    ("a", "b", "finetune"), ("a", "c", "finetune"), ("a", "d", "finetune"), ("b", "e", "finetune"),
    ("b", "f", "finetune"), ("c", "g", "finetune"), ("z", "y", "finetune"), ("z", "x", "finetune"),
    ("b", "merge", "merge"), ("c", "merge", "merge"), ("d", "three", "merge"), ("e", "three", "merge"),
    ("g", "three", "merge"), ("e", "diff", "merge"), ("g", "diff", "merge"), ("a", "diff", "merge"),
    ("d", "baked", "adapter"), ("e", "int8", "quantized"), ("c", "pruned", "pruned"), ("e", "short", "copy"),
    ("d", "moved", "permuted"),
}  # fmt: skip


@pytest.fixture(scope="module")
def result(models, tmp_path_factory):
    where = tmp_path_factory.mktemp("zoo")
    return lineage.cluster(kin.save(models, where / "models"), base=None, cache=where / "cache")


def edges(result) -> set[tuple[str, str, str]]:
    return {(e.parent, e.child, e.relation) for e in result.edges}


def test_the_past_is_told(result):
    found = edges(result)
    twins = {(p, c, r) for p, c, r in found if {p, c} == {"g", "twin"}}
    assert len(twins) == 1
    renamed = {(p.replace("twin", "g"), c.replace("twin", "g"), r) for p, c, r in found - twins}
    assert renamed == EDGES


def test_each_initialisation_has_a_root(result):
    assert [r.name for r in result.roots] == ["a", "z"]
    assert {m.root for m in result.models if m.name in "xyz"} == {"z"}


def test_every_file_has_a_family_of_its_root(result):
    home = {f.name: f for f in result.families}
    for m in result.models:
        assert home[m.family].root == m.root
        assert m.name in home[m.family].members or m.name == m.root


def test_coefficients_lie_in_their_intervals(result):
    truth = {
        "merge": {"b": 0.7, "c": 0.3},
        "three": {"d": 0.5, "e": 0.25, "g": 0.25},
        "diff": {"e": 1, "g": 0.5, "a": -0.5},
    }
    for merge in result.merges:
        for p in merge.parents:
            name = p.name.replace("twin", "g")
            assert p.low <= truth[merge.child][name] <= p.high
            assert p.high - p.low < 0.02


@pytest.mark.parametrize("child", ["merge", "three", "diff"])
def test_a_found_recipe_gives_the_file_again(result, models, child, tmp_path):
    kin.save({n: w for n, w in models.items() if n != child}, tmp_path / "models")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(next(m.recipe for m in result.merges if m.child == child), encoding="utf-8")
    lineage.merge(recipe, tmp_path / "out", models=tmp_path / "models")
    again = load_file(tmp_path / "out" / f"{child}.safetensors")
    for name, w in models[child].items():
        assert again[name].dtype == w.dtype
        step = 2 * w.abs().max() * torch.finfo(w.dtype).eps
        assert (again[name].double() - w.double()).abs().max() <= step


def test_names_and_order_do_not_matter(result, models, tmp_path):
    names = sorted(models)
    new = dict(zip(names, random.Random(0).sample([f"m{i:02d}" for i in range(len(names))], len(names)), strict=True))
    again = lineage.cluster(kin.save({new[n]: models[n] for n in names}, tmp_path / "m"), cache=tmp_path / "cache")
    assert {(new[p], new[c], r) for p, c, r in edges(result)} == edges(again)


def test_a_user_names_the_root(models, tmp_path):
    folder = kin.save({n: models[n] for n in "abcde"}, tmp_path / "m")
    assert [r.name for r in lineage.cluster(folder, base="e", cache=tmp_path / "cache").roots] == ["e"]
    with pytest.raises(LineageError, match="no model of the folder"):
        lineage.cluster(folder, base="nobody", cache=tmp_path / "cache")


def test_dates_order_parents_before_children(models, tmp_path):
    folder = kin.save({n: models[n] for n in "ab"}, tmp_path / "m")
    for first, second in ("ab", "ba"):
        days = tmp_path / "days.csv"
        days.write_text(f"name,date\n{first},2023-01-01\n{second},2023-02-01\n", encoding="utf-8")
        found = lineage.cluster(folder, dates=days, cache=tmp_path / "cache").edges
        assert [(e.parent, e.child, e.directed) for e in found] == [(first, second, True)]


def test_metadata_that_weights_contradict_is_reported(models, tmp_path):
    said = {"b": {"sd_merge_recipe": json.dumps({"primary_model_hash": "z", "secondary_model_hash": None})}}
    folder = kin.save({n: models[n] for n in "abz"}, tmp_path / "m", said)
    found = lineage.cluster(folder, cache=tmp_path / "cache")
    assert [(c.model, c.claim) for c in found.contradictions] == [("b", "made from z")]
    assert not lineage.cluster(folder, metadata=False, cache=tmp_path / "cache").contradictions


def test_a_lone_pair_has_no_direction(models, tmp_path):
    folder = kin.save({n: models[n] for n in "ab"}, tmp_path / "m")
    found = lineage.cluster(folder, cache=tmp_path / "cache")
    assert [e.directed for e in found.edges] == [False]


def test_sketches_tell_the_same(result, models, tmp_path):
    folder = kin.save(models, tmp_path / "m")
    found = lineage.cluster(folder, sketch=True, cache=tmp_path / "cache")
    assert found.choice.producer == "sketch"
    assert edges(found) == edges(result)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(LineageError, match="no models"):
        lineage.cluster(tmp_path)


def test_one_more_file_is_answered_for(models, tmp_path):
    folder = kin.save({n: w for n, w in models.items() if n != "merge"}, tmp_path / "m")
    extra = kin.save({"merge": models["merge"]}, tmp_path / "more") / "merge.safetensors"
    found = lineage.cluster(folder, add=extra, cache=tmp_path / "cache")
    assert found.added == "merge"
    assert {e.parent for e in found.edges if e.child == "merge"} == {"b", "c"}


def test_only_sure_edges_are_drawn(result, models, tmp_path):
    folder = kin.save(models, tmp_path / "m")
    sure = lineage.cluster(folder, min_confidence=0.9, cache=tmp_path / "cache").edges
    assert {(e.parent, e.child) for e in sure} == {(e.parent, e.child) for e in result.edges if e.confidence >= 0.9}


def test_old_hashes_name_a_parent(tmp_path):
    """The 8 digits, of 64 kB in the middle of the file, by which trainers called the model until 2022."""
    g = torch.Generator().manual_seed(0)
    models = {name: kin.root(i) | {"wide.weight": torch.rand(600, 512, generator=g)} for i, name in enumerate("xy")}
    models["z"] = kin.tune(models["y"], 5)
    for name, tensors in models.items():
        said = {"ss_sd_model_hash": short_hash(tmp_path / "y.safetensors")} if name == "z" else None
        save_file(tensors, tmp_path / f"{name}.safetensors", said)
    lora = {f"lora_unet_a.lora_{end}.weight": torch.ones(2, 2) for end in ("up", "down")}
    save_file(lora, tmp_path / "lora.safetensors", {"ss_sd_model_hash": short_hash(tmp_path / "x.safetensors").upper()})
    found = lineage.cluster(tmp_path, cache=tmp_path / "cache")
    assert [(e.parent, e.declared) for e in found.edges if e.child == "lora"] == [("x", True)]
    (own,) = (e for e in found.edges if e.child == "z")
    assert (own.parent, own.directed) == ("y", True)
    assert "metadata" in {e.source for e in own.evidence}


def test_what_a_pruned_file_keeps_tells_its_parent_though_others_are_nearer(tmp_path):
    a = kin.root(1)
    found = {"a": a, "parent": kin.tune({k: 1.03 * w for k, w in a.items()}, 2, 0.01)}
    found |= {f"near{i}": kin.tune({k: 0.97 * w for k, w in a.items()}, 3 + i, 0.01) for i in range(9)}
    found["pruned"] = kin.half(kin.prune(found["parent"], 0.5))
    result = lineage.cluster(kin.save(found, tmp_path / "models"), cache=tmp_path / "cache")
    assert ("parent", "pruned", "pruned") in edges(result)
    far = {k: float((w.float() - found["pruned"][k].float()).square().sum()) for k, w in found["parent"].items()}
    near = {k: float((w.float() - found["pruned"][k].float()).square().sum()) for k, w in found["near0"].items()}
    assert sum(near.values()) < sum(far.values())


def merges(found: dict[str, kin.Weights], folder) -> dict[str, set[str]]:
    """Child -> parents of what is read as a merge."""
    result = lineage.cluster(kin.save(found, folder / "models"), cache=folder / "cache")
    return {m.child: {p.name for p in m.parents} for m in result.merges}


@pytest.mark.parametrize("seed", range(4))
def test_an_add_difference_is_read_from_the_end_that_was_made_last(tmp_path, seed):
    a = kin.root(seed)
    found = {"a": a, "b": kin.tune(a, 10 + seed), "c": kin.tune(a, 20 + seed, 0.02)}
    beyond = kin.mix(
        {"b": 1.3, "c": -0.3}, found
    )  # so that the merge lies nearer to the others than what it is made of
    found["x"] = kin.tune(beyond, 30 + seed, 0.01)
    found["m"] = {k: found["x"][k] + 0.3 * (found["c"][k] - found["b"][k]) for k in a}
    assert merges(found, tmp_path) == {"m": {"x", "c", "b"}}


def test_what_went_into_a_merge_is_not_made_of_it_by_way_of_another(tmp_path):
    a = kin.root(1)
    found = {"a": a, "s": kin.tune(a, 2), "x": kin.tune(a, 3, 0.02), "y": kin.tune(a, 4)}
    found["c"] = kin.half(kin.mix({"a": 0.7, "s": 0.3}, found))
    found["m"] = kin.half(
        kin.mix({"x": 1, "s": 0.3, "c": -0.3}, found | {"c": {k: w.float() for k, w in found["c"].items()}})
    )
    assert merges(found, tmp_path) == {"c": {"a", "s"}, "m": {"x", "s", "c"}}


def test_what_descends_from_a_merge_is_not_taken_for_it(tmp_path):
    a = kin.root(1)
    found = {"a": a, "b": kin.tune(a, 2), "c": kin.tune(a, 3), "d": kin.tune(a, 4)}
    found["m"] = {k: found["b"][k] + 0.5 * (found["c"][k] - found["d"][k]) for k in a}
    found["x"] = kin.half(kin.tune(found["m"], 5, 2e-4))
    assert merges(found, tmp_path) == {"m": {"b", "c", "d"}}


def test_a_near_copy_that_stands_for_a_missing_parent_does_not_pass_for_it(tmp_path):
    a = kin.root(31)
    b, c, d = (kin.tune(a, seed) for seed in (32, 33, 34))
    near = {**b, "layers.3.attn.weight": kin.tune(b, 35, 0.001)["layers.3.attn.weight"]}
    models = {"a": a, "c": c, "d": d, "near": near, "merge": kin.mix({"b": 0.6, "c": 0.4}, {"b": b, "c": c})}
    (found,) = lineage.cluster(kin.save(models, tmp_path / "models"), cache=tmp_path / "cache").merges
    assert found.child == "merge"
    assert found.unseen_parent
    assert {p.name for p in found.parents} <= {"near", "c"}
    whole = {**models, "b": b}
    (found,) = lineage.cluster(kin.save(whole, tmp_path / "whole"), cache=tmp_path / "cache").merges
    assert not found.unseen_parent
    assert {p.name for p in found.parents} == {"b", "c"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_intervals_hold_though_a_parent_is_its_base_made_shorter(tmp_path, dtype):
    base = kin.root(100)
    shorter = {k: 0.98 * w for k, w in kin.tune(base, 1, 0.004).items()}
    tuned = {"p": kin.tune(base, 2, 0.01), "q": shorter, "r": kin.tune(base, 3, 0.01)}
    tuned = {n: {k: w.to(dtype) for k, w in m.items()} for n, m in tuned.items()}
    truth = {"p": 5 / 9, "q": 3 / 9, "r": 1 / 9}
    wide = {n: {k: w.float() for k, w in m.items()} for n, m in tuned.items()}
    models = {"base": base, **tuned, "merge": kin.mix(truth, wide)}
    (found,) = lineage.cluster(kin.save(models, tmp_path / "models"), cache=tmp_path / "cache").merges
    spans = {p.name: (p.low or 0.0, p.high or 0.0) for p in found.parents}
    assert spans.keys() == truth.keys()
    assert all(low <= truth[n] <= high for n, (low, high) in spans.items())
    assert all(high - low < 1e-4 for low, high in spans.values())
