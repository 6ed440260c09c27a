"""`lineage predict`: what an adapter says of its base, what fits, what is said and drawn of it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from synthetic_cluster import HOSTILE_NAMES
from synthetic_prediction import adapter, predict_result, tuned, unet
from test_reports import Elements

import lineage
from lineage.errors import FileError, LineageError
from lineage.hashing import short_hash
from lineage.predict_result import PredictResult
from lineage.prediction import family_tree, predict_pair
from lineage.records import restore
from lineage.results import dumps, to_json
from lineage.training_base import Candidate
from reports.build import build
from reports.page import visible
from reports.predict_words import answer


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A chain of three, a sibling, a stranger, its child for v-prediction, and another architecture."""
    folder = tmp_path_factory.mktemp("predict") / "models"
    folder.mkdir()
    base, stranger = unet(0), unet(1)
    first = tuned(base, 2, 0.03)
    made = {"base": base, "first": first, "second": tuned(first, 3, 0.02), "sibling": tuned(base, 4, 0.03)}
    made |= {
        "stranger": stranger,
        "v-child": {**tuned(stranger, 5), "v_pred": torch.zeros(0)},
        "large": unet(6, 32, 40),
    }
    for name, tensors in made.items():
        metadata = {"sd_merge_models": json.dumps({"cd" * 32: {}})} if name == "sibling" else None
        save_file(tensors, folder / f"{name}.safetensors", metadata)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def ask(models, tmp_path):
    """ask(metadata, card) -> the result for an adapter that says so."""

    def asked(metadata: dict[str, str], card: str = "") -> PredictResult:
        if card:
            (tmp_path / "README.md").write_text(card, encoding="utf-8")
        return lineage.predict(adapter(tmp_path / "style.safetensors", metadata), models)

    return asked


def verdicts(result: PredictResult) -> dict[str, str]:
    return {f.model: f.verdict for f in result.forecasts}


def test_every_model_gets_what_the_tree_says(ask, models):
    result = ask({"ss_new_sd_model_hash": sha256(models / "first.safetensors")})
    assert (result.base.model, result.base.sure, result.base.stands_in) == ("first", "certain", False)
    found = lineage.cluster(models, sketch=True)
    tree = family_tree(found)
    assert sorted(verdicts(result)) == sorted(m.name for m in found.models)
    for f in result.forecasts:
        expected = predict_pair(tree, "first", f.model)
        if f.model != "large":
            assert (f.strength, f.retention, f.verdict) == (expected.strength, expected.retention, expected.verdict)
            assert f.reason == expected.reason
    assert verdicts(result)["first"] == "works"
    assert verdicts(result)["stranger"] == "other root"


def test_what_does_not_fit_is_refused_with_a_reason(ask, models):
    for metadata in ({"ss_new_sd_model_hash": sha256(models / "first.safetensors")}, {}):
        large = next(f for f in ask(metadata).forecasts if f.model == "large")
        assert (large.verdict, large.strength, large.retention) == ("other architecture", None, None)
        assert "another shape" in large.reason


@pytest.mark.parametrize(
    ("key", "said", "sure"),
    [
        ("ss_new_sd_model_hash", lambda file: sha256(file), "certain"),
        ("ss_new_sd_model_hash", lambda file: sha256(file).upper(), "certain"),
        ("ss_sd_model_hash", lambda file: sha256(file)[:10], "likely"),
        ("ss_sd_model_hash", lambda file: sha256(file)[:8], "likely"),
        ("ss_sd_model_name", lambda file: file.name, "likely"),
        ("ss_sd_model_name", lambda file: f"D:\\models\\{file.stem.upper()}.ckpt", "likely"),
    ],
)
def test_the_base_is_found_by_what_the_adapter_says(ask, models, key, said, sure):
    base = ask({key: said(models / "second.safetensors")}).base
    assert (base.model, base.sure, base.stands_in) == ("second", sure, False)


def test_the_old_hash_is_one_of_large_files_only(tmp_path):
    """Below 1 MiB it is that of nothing, and so everybody's."""
    for size, known in ((100, False), (1_200_000, True)):
        (tmp_path / "m.ckpt").write_bytes(bytes(range(100)) * (size // 100))
        model = Candidate("m", tmp_path / "m.ckpt", "ab" * 32, {})
        assert model.has(short_hash(tmp_path / "m.ckpt")) == known


def test_the_base_is_found_by_the_card(ask):
    base = ask({}, "---\nbase_model: someone/first\n---\n").base
    assert (base.model, base.sure) == ("first", "likely")


def test_a_hash_counts_more_than_a_name(ask, models):
    base = ask({"ss_new_sd_model_hash": sha256(models / "first.safetensors"), "ss_sd_model_name": "sibling"}).base
    assert (base.model, base.sure) == ("first", "certain")


@pytest.mark.parametrize(
    ("digest", "name", "stand_in", "why"),
    [
        ("ef" * 32, "first.safetensors", "first", "a file of the same name"),
        ("ef" * 32, "sibling-v2.safetensors", "sibling", "guessed by its name"),
        ("cd" * 32, "zzz", "sibling", "its own metadata names that hash"),
        ("ef" * 32, "zzz", None, "nothing here is known to be near"),
        ("", "second_pruned", "second", "guessed by its name"),
    ],
)
def test_a_missing_base_is_named_and_another_may_stand_in(ask, digest, name, stand_in, why):
    result = ask({"ss_new_sd_model_hash": digest, "ss_sd_model_name": name})
    base = result.base
    assert (base.model, base.stands_in) == (stand_in, stand_in is not None)
    assert base.sure == ("a guess" if stand_in else "unknown")
    assert why in base.words
    assert name in base.words
    assert digest[:10] in base.words
    assert all(f.confidence is None for f in result.forecasts)
    assert "which is not here" in answer(result)


@pytest.mark.parametrize("metadata", [{}, {"ss_sd_model_name": "None"}, {"ss_sd_model_hash": "not a hash"}])
def test_without_metadata_nothing_is_guessed(ask, metadata):
    result = ask(metadata)
    assert (result.base.model, result.base.sure) == (None, "unknown")
    assert Counter(verdicts(result).values()) == {"base unknown": 6, "other architecture": 1}
    assert all(f.strength is None and f.retention is None and f.relation is None for f in result.forecasts)


def test_epsilon_against_v_prediction_is_warned(ask, models):
    metadata = {"ss_new_sd_model_hash": sha256(models / "first.safetensors")}
    for said, kind in (("False", "epsilon"), ("True", "v")):
        result = ask({**metadata, "ss_v_parameterization": said})
        assert result.adapter.prediction_type == kind
        warned = {f.model: " ".join(f.warnings) for f in result.forecasts}
        assert ("pictures will break" in warned["v-child"]) == (kind == "epsilon")
        assert ("no word of v-prediction" in warned["first"]) == (kind == "v")
    of_its_base = ask({"ss_new_sd_model_hash": sha256(models / "v-child.safetensors")})
    assert of_its_base.adapter.prediction_type == "v"


def test_only_adapters_and_folders(models, tmp_path):
    with pytest.raises(FileError, match="is no adapter"):
        lineage.predict(models / "first.safetensors", models)
    with pytest.raises(FileError, match="does not exist"):
        lineage.predict(tmp_path / "nowhere.safetensors", models)
    with pytest.raises(LineageError, match="one of the two"):
        lineage.predict(None, models)


def test_bases_are_ranked_for_both_wishes(models):
    result = lineage.predict(None, models, targets=["second", models / "sibling.safetensors"])
    assert result.targets == ("second", "sibling")
    advice = {a.base: a for a in result.advice}
    assert set(advice) == {"base", "first", "second", "sibling"}
    assert [a.stays for a in result.advice] == sorted((a.stays for a in result.advice), reverse=True)
    for a in result.advice:
        assert a.stays == pytest.approx(sum(p.strength for p in a.pairs) / 2)
        assert a.through == pytest.approx(sum(p.strength * p.retention for p in a.pairs) / 2)
    assert max(advice.values(), key=lambda a: a.through).base == "base"
    one = lineage.predict(None, models, targets=["second"])
    assert one.advice[0].base == "second"
    assert max(one.advice, key=lambda a: a.through).base == "base"


def test_unknown_targets_are_named(models):
    with pytest.raises(LineageError, match=r"target 'secnd': no model.*Did you mean second"):
        lineage.predict(None, models, targets=["secnd"])


def test_file_order_and_names_change_nothing(models, tmp_path):
    new = {"base": "z", "first": "y", "second": "x", "sibling": "w", "stranger": "v", "v-child": "u", "large": "t"}
    (tmp_path / "renamed").mkdir()
    for old, name in new.items():
        (tmp_path / "renamed" / f"{name}.safetensors").write_bytes((models / f"{old}.safetensors").read_bytes())
    style = adapter(tmp_path / "a.safetensors", {"ss_new_sd_model_hash": sha256(models / "first.safetensors")})
    found = {f.model: f for f in lineage.predict(style, tmp_path / "renamed").forecasts}
    for f in lineage.predict(style, models).forecasts:
        g = found[new[f.model]]
        assert (g.verdict, g.relation) == (f.verdict, f.relation)
        assert (g.strength, g.retention) == (pytest.approx(f.strength), pytest.approx(f.retention))


def test_folders_too_large_to_keep_distances_are_measured_again(ask, models, monkeypatch):
    metadata = {"ss_new_sd_model_hash": sha256(models / "first.safetensors")}
    kept = ask(metadata).forecasts
    monkeypatch.setattr("lineage.cluster_records.ALL_DISTANCES", 3)
    for f, g in zip(kept, ask(metadata).forecasts, strict=True):
        assert (g.model, g.verdict) == (f.model, f.verdict)
        assert (g.strength, g.retention) == (pytest.approx(f.strength, abs=1e-4), pytest.approx(f.retention, abs=1e-4))


def test_the_list_is_the_tree(ask, models):
    result = ask({})
    place = {m.name: (i, m.depth) for i, m in enumerate(result.models)}
    for e in lineage.cluster(models, sketch=True).edges:
        if e.directed:
            assert place[e.parent][0] < place[e.child][0]
            assert place[e.parent][1] < place[e.child][1]


def test_the_command_line(call, models, tmp_path):
    style = adapter(tmp_path / "style.safetensors", {"ss_new_sd_model_hash": sha256(models / "first.safetensors")})
    code, out, err = call("predict", style, models, "-o", tmp_path / "out")
    assert code == 0, err
    assert out.startswith("style.safetensors, trained on first, on 7 models: works on")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"result.json", "report.html"}
    found = json.loads((tmp_path / "out" / "result.json").read_text("utf-8"))
    assert to_json(restore(PredictResult, found)) == found
    assert all(f["model"] in out and f["verdict"] in out for f in found["forecasts"])
    forms = [("--targets", "second", "sibling", models), ("--target", "second", "--target", "sibling", models)]
    said = [call("predict", *form) for form in forms]
    assert said[0][:2] == said[1][:2]
    assert said[0][0] == 0
    assert "if the trained style should stay" in said[0][1]
    for wrong in ((models,), (style, style, models), ("--target", "second", style, models), ("--targets", models)):
        assert call("predict", *wrong)[0] == 2


# --- the page


def page(result: PredictResult) -> str:
    return build(json.loads(dumps(result)))


def test_every_forecast_is_drawn_with_its_reason():
    result = predict_result(tuple(f"model-{i}" for i in range(9)))
    text = page(result)
    for f in result.forecasts:
        assert f.reason in text
        if f.strength is not None:
            assert f'class="fill signal" style="width:{100 * f.strength:.1f}%"' in text
    assert text.count('<li title="') == 9
    assert "fitted to four miniature worlds, not to Stable Diffusion" in text


def test_names_are_text():
    result = predict_result(HOSTILE_NAMES)
    elements = Elements(page(result))
    shown = "".join(elements.words)
    assert all(visible(name) in shown for name in HOSTILE_NAMES)
    assert not {"img", "a"} & {tag for tag, _ in elements.found}
    assert [a.get("type") for tag, a in elements.found if tag == "script"] == ["application/json"]


def test_an_empty_ranking_has_a_page():
    lonely = replace(predict_result(), adapter=None, base=None, forecasts=(), targets=("AC",), advice=())
    assert "No model of models reaches AC." in page(lonely)
