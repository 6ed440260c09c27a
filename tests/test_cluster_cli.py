"""`lineage cluster` on the command line, with a result at hand instead of models."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from synthetic_cluster import cluster_result

import cli
import lineage
from lineage.cluster_result import Contradiction
from lineage.exports import EXPORTS


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder whose clustering is the synthetic result; its calls are kept in `folder.calls`."""
    (tmp_path / "models").mkdir()
    calls = []

    def cluster(folder, **options):
        calls.append((folder, options))
        found = cluster_result(12)
        if options["add"] is None:
            return found
        child = found.merges[0].child
        said = Contradiction(child, "card", "trained from scratch", "a merge")
        return replace(found, added=child, contradictions=(said,))

    monkeypatch.setitem(vars(lineage), "cluster", cluster)
    return tmp_path, calls


def test_all_files_are_written_and_kept(call, folder):
    path, _ = folder
    code, out, _ = call("cluster", path / "models", "-o", path / "out")
    assert code == 0
    assert {p.name for p in (path / "out").iterdir()} == {*cli.RESULT_FILES, *cli.GRAPH_FILES}
    assert set(cli.GRAPH_FILES) == set(EXPORTS)
    assert "12 models, 1 root, 1 family; " in out
    result = json.loads((path / "out" / "result.json").read_text("utf-8"))
    rows = list(csv.DictReader((path / "out" / "edges.csv").read_text("utf-8").splitlines()))
    assert len(rows) == len(result["edges"])


@pytest.mark.parametrize("left", [*cli.RESULT_FILES, *cli.GRAPH_FILES])
def test_an_old_export_is_refused_before_the_work(call, folder, left):
    path, calls = folder
    (path / "out").mkdir()
    (path / "out" / left).write_text("old")
    code, _, err = call("cluster", path / "models", "-o", path / "out")
    assert (code, calls) == (2, [])
    assert left in err
    assert (path / "out" / left).read_text() == "old"


def test_options_reach_the_library(call, folder):
    path, calls = folder
    (path / "dates.csv").write_text("a,2023-01-01\n")
    call("cluster", path / "models", "--base", "b", "--dates", path / "dates.csv", "--no-metadata", "--sketch",
         "--min-confidence", "0.5", "--engine", "dask", "--address", "tcp://x:1", "--device", "cpu")  # fmt: skip
    folder, options = calls[0]
    assert folder == path / "models"
    del options["progress"]
    assert options == {
        "add": None, "base": "b", "dates": path / "dates.csv", "metadata": False, "sketch": True, "min_confidence": 0.5,
        "engine": "dask", "address": "tcp://x:1", "device": "cpu",
    }  # fmt: skip
    call("cluster", path / "models")
    assert calls[1][1]["sketch"] is None
    assert calls[1][1]["metadata"] is True


def test_add_prints_one_sentence(call, folder):
    path, _ = folder
    (path / "upload.safetensors").write_bytes(b"")
    code, out, _ = call("cluster", path / "models", "--add", path / "upload.safetensors")
    assert code == 0
    assert len(out.strip().splitlines()) == 1
    assert out.strip().endswith("; the card says trained from scratch")
    assert " + " in out
    _, longer, _ = call("cluster", path / "models", "--add", path / "upload.safetensors", "-v")
    assert len(longer.splitlines()) > 10


def test_a_file_is_no_folder(call, folder):
    path, _ = folder
    (path / "x.safetensors").write_bytes(b"")
    assert call("cluster", path / "x.safetensors")[0] == 2


def test_the_table_shows_the_tree(call, folder):
    path, _ = folder
    _, out, _ = call("cluster", path / "models")
    for m in cluster_result(12).models:
        assert m.name in out
    assert "\n  " in out
    assert "(result" not in out


@pytest.fixture
def real(tmp_path, monkeypatch):
    """A base, two fine-tunes of it, and an upload that mixes them, of small random networks."""
    monkeypatch.setenv("LINEAGE_CACHE", str(tmp_path / "cache"))
    g = torch.Generator().manual_seed(0)
    shapes = {
        f"layers.{i}.{name}.weight": shape for i in range(4) for name, shape in (("q", (48, 48)), ("f", (96, 48)))
    }

    def noise(scale: float) -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=g) * scale for name, shape in shapes.items()}

    def plus(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: a[name] + b[name] for name in a}

    base = noise(0.2)
    left, right = plus(base, noise(0.004)), plus(base, noise(0.004))
    upload = {name: 0.7 * left[name] + 0.3 * right[name] for name in base}
    (tmp_path / "models").mkdir()
    for name, tensors in {"base": base, "left": left, "right": right}.items():
        save_file(tensors, tmp_path / "models" / f"{name}.safetensors")
    save_file(upload, tmp_path / "upload.safetensors")
    return tmp_path


def test_a_real_folder(call, real):
    code, out, err = call("cluster", real / "models", "--base", "base", "-o", real / "out")
    assert code == 0, err
    assert "3 models, 1 root" in out
    result = json.loads((real / "out" / "result.json").read_text("utf-8"))
    assert {(e["parent"], e["child"]) for e in result["edges"]} == {("base", "left"), ("base", "right")}


def test_one_more_file_is_answered_for(call, real):
    code, out, err = call("cluster", real / "models", "--add", real / "upload.safetensors", "-o", real / "out")
    assert code == 0, err
    assert out.strip() == "0.70 left + 0.30 right"
    result = json.loads((real / "out" / "result.json").read_text("utf-8"))
    assert result["added"] == "upload"
    (real / "README.md").write_text("---\nlicense: mit\n---\nTrained entirely from\nscratch.", encoding="utf-8")
    _, out, _ = call("cluster", real / "models", "--add", real / "upload.safetensors")
    assert out.strip() == "0.70 left + 0.30 right; the card says trained from scratch"
    _, out, _ = call("cluster", real / "models", "--add", real / "upload.safetensors", "--no-metadata")
    assert out.strip() == "0.70 left + 0.30 right"


def test_a_file_of_the_folder_may_be_asked_about(call, real):
    code, out, err = call("cluster", real / "models", "--add", real / "models" / "base.safetensors", "--base", "base")
    assert code == 0, err
    assert out.strip() == "a root, the parent of 2 models here"


def test_only_a_model_can_be_added(call, real):
    (real / "notes.txt").write_text("no model")
    code, _, err = call("cluster", real / "models", "--add", real / "notes.txt")
    assert code == 2
    assert "notes.txt: is no model" in err


def test_an_adapter_hangs_from_the_model_it_names(call, real):
    factors = {"a.lora_up.weight": torch.ones(8, 1), "a.lora_down.weight": torch.ones(1, 8), "a.alpha": torch.ones(())}
    digest = hashlib.sha256((real / "models" / "left.safetensors").read_bytes()).hexdigest()
    save_file(factors, real / "models" / "style.safetensors", metadata={"ss_new_sd_model_hash": digest})
    save_file(factors, real / "models" / "lost.safetensors")
    code, out, err = call("cluster", real / "models", "-o", real / "out")
    assert code == 0, err
    assert "3 models, 2 adapters, 1 root" in out
    result = json.loads((real / "out" / "result.json").read_text("utf-8"))
    kinds = {m["name"]: (m["kind"], m["root"] is None) for m in result["models"]}
    assert kinds["style"] == kinds["lost"] == ("adapter", True)
    (edge,) = [e for e in result["edges"] if e["relation"] == "adapter"]
    assert (edge["parent"], edge["child"], edge["declared"]) == ("left", "style", True)
    assert "base_model_relation: adapter" in (real / "out" / "model_cards.yaml").read_text("utf-8")
    _, plain, _ = call("cluster", real / "models", "--no-metadata", "--json")
    assert not [e for e in json.loads(plain)["edges"] if e["declared"]]
