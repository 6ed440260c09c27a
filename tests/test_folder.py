"""What every file of a folder is: exactly one bucket each, and the counts add up whatever lies there."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lineage.errors import LineageError
from lineage.folder import BUCKETS, Item, declared_parent, scan
from lineage.keys import to_ldm
from tests.stable_diffusion import states, tiny

VAE_KEYS = ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight")
UNET = {"down_blocks.0.resnets.0.conv1.weight": (8, 8, 3, 3), "mid_block.resnets.0.conv1.weight": (8, 8, 3, 3)}
UNET |= {"time_embedding.linear_1.weight": (8, 8), "conv_in.weight": (8, 4, 3, 3)}
LDM = {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3), "first_stage_model.quant_conv.weight": (4, 4)}
TEXT = {"text_model.embeddings.token_embedding.weight": (16, 8)}
SHAPES = {
    "plain": {"layers.0.weight": (6, 6), "layers.1.weight": (6, 6)},
    "wide": {"layers.0.weight": (9, 9), "layers.1.weight": (9, 9)},
    "unet": UNET,
    "ldm": LDM,
    "vae": dict.fromkeys(VAE_KEYS, (4, 4, 1, 1)),
    "text": TEXT,
    "lora": {"lora_unet_mid.lora_down.weight": (2, 8), "lora_unet_mid.lora_up.weight": (8, 2)},
    "loha": {f"lora_unet_mid.hada_{w}": (2, 2) for w in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "embedding": {"emb_params": (3, 8)},
}
EXPECTED = {"plain": "model", "wide": "model", "unet": "model", "ldm": "model", "vae": "vae", "text": "other"}
EXPECTED |= {"lora": "adapter", "loha": "adapter", "embedding": "other", "damaged": "unreadable", "note": "ignored"}
EXPECTED |= {"pickle": "unreadable", "index": "model", "pipeline": "model", "transformer": "model", "peft": "adapter"}


def weights(kind: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, shape in SHAPES[kind].items()}


def place(folder: Path, name: str, kind: str) -> int:
    """Put one thing of a kind into a folder; how many files it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    if kind in SHAPES:
        save_file(weights(kind), path)
    elif kind == "damaged":
        path.write_bytes(b"\xff" * 40)
    elif kind == "note":
        (folder / f"{name}.txt").write_text("words", encoding="utf-8")
    elif kind == "pickle":
        (folder / f"{name}.ckpt").write_bytes(b"\x80\x02cos\nsystem\n(S'true'\ntR.")
    else:
        return place_many(folder, name, kind)
    return 1


def place_many(folder: Path, name: str, kind: str) -> int:
    if kind == "index":
        for i, (key, tensor) in enumerate(weights("plain").items()):
            save_file({key: tensor}, folder / f"{name}-{i}.safetensors")
        shards = {key: f"{name}-{i}.safetensors" for i, key in enumerate(SHAPES["plain"])}
        text = json.dumps({"weight_map": shards})
        (folder / f"{name}.safetensors.index.json").write_text(text, encoding="utf-8")
        return 3
    home = folder / name
    for sub in ("unet", "vae", "tokenizer") if kind == "pipeline" else ("",):
        (home / sub).mkdir(parents=True, exist_ok=True)
    if kind == "pipeline":
        save_file(weights("unet"), home / "unet" / "diffusion_pytorch_model.safetensors")
        save_file(weights("vae"), home / "vae" / "diffusion_pytorch_model.safetensors")
        for note in ("model_index.json", "unet/config.json", "tokenizer/vocab.json"):
            (home / note).write_text("{}", encoding="utf-8")
        return 5
    peft = kind == "peft"
    (home / ("adapter_config.json" if peft else "config.json")).write_text('{"model_type": "gpt2"}', encoding="utf-8")
    save_file(weights("lora" if peft else "plain"), home / f"{'adapter_model' if peft else 'model'}.safetensors")
    return 2


things = st.tuples(
    st.sampled_from(["", "a", "a/b", "c", "c/d/e"]),
    st.sampled_from(["x", "y", "z é"]),
    st.sampled_from(sorted(EXPECTED)),
)


@given(st.lists(things, max_size=9, unique_by=lambda t: (t[0], t[1], t[2] == "note")), st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_file_lands_in_one_bucket_and_the_counts_add_up(tmp_path_factory, found, loop):
    folder = tmp_path_factory.mktemp("folder")
    expected: dict[str, int] = dict.fromkeys(BUCKETS, 0)
    for place_in, name, kind in found:
        expected[EXPECTED[kind]] += place(folder / place_in, name, kind)
    if loop:
        os.symlink(folder, folder / "loop", target_is_directory=True)
    seen = scan(folder)
    files = [Path(home) / f for home, _, names in os.walk(folder) for f in names]
    assert seen.files == len(files) == sum(expected.values())
    assert seen.counts == expected
    assert len(seen.items) == len(found)
    assert all(item.reason for item in seen.items if item.bucket in ("unreadable", "ignored"))
    names = [item.name for item in seen.items if item.bucket != "ignored"]
    assert len(set(names)) == len(names)
    assert sum(len(group) for group in seen.groups.values()) == len(seen.of("model"))


def test_models_are_grouped_by_architecture_components_and_shapes(tmp_path):
    for i, kind in enumerate(["plain", "plain", "wide", "unet", "ldm", "ldm"]):
        place(tmp_path, f"{kind}{i}", kind)
    groups = {name: sorted(i.name for i in items) for name, items in scan(tmp_path).groups.items()}
    assert sorted(groups.values()) == [["ldm4", "ldm5"], ["plain0", "plain1"], ["unet3"], ["wide2"]]
    assert sum(name.startswith("unknown model") for name in groups) == 2


def test_a_few_other_keys_do_not_part_models(tmp_path):
    save_file(weights("plain"), tmp_path / "a.safetensors")
    save_file(weights("plain") | {"head.weight": torch.zeros(2, 6)}, tmp_path / "b.safetensors")
    assert len(scan(tmp_path).groups) == 1


def test_single_file_and_folder_of_one_model_are_one_group(tmp_path):
    parts = states(tiny("sd1"))
    for component, state in parts.items():
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        (tmp_path / "sd" / component).mkdir(parents=True)
        save_file({k: t.contiguous() for k, t in state.items()}, tmp_path / "sd" / component / f"{stem}.safetensors")
    save_file(to_ldm(parts, "sd1"), tmp_path / "one.safetensors")
    found = scan(tmp_path)
    assert list(found.groups) == ["sd1 text_encoder+unet+vae"]
    assert [i.name for i in found.of("model")] == ["one", "sd"]
    assert found.counts["model"] == 4


def test_names_take_their_folder_where_two_collide(tmp_path):
    for where, name in (("", "a"), ("s", "a"), ("s", "b"), ("t/s", "b"), ("s", "c")):
        place(tmp_path / where, name, "plain")
    torch.save(weights("plain"), tmp_path / "s" / "c.ckpt")
    names = {i.path.relative_to(tmp_path).as_posix(): i.name for i in scan(tmp_path).items}
    assert names == {
        "a.safetensors": "a",
        "s/a.safetensors": "s/a",
        "s/b.safetensors": "s/b.safetensors",
        "s/c.ckpt": "s/c.ckpt",
        "s/c.safetensors": "s/c.safetensors",
        "t/s/b.safetensors": "t/s/b.safetensors",
    }


def test_the_folder_itself_may_be_the_model(tmp_path):
    place_many(tmp_path, "pipe", "pipeline")
    (item,) = scan(tmp_path / "pipe").items
    assert (item.name, item.bucket, item.files) == ("pipe", "model", 5)


def test_a_whole_model_beside_a_pipeline_counts_for_itself(tmp_path):
    place_many(tmp_path, "pipe", "pipeline")
    place(tmp_path / "pipe", "v1-5-pruned", "ldm")
    assert {i.name: i.files for i in scan(tmp_path).items} == {"pipe": 5, "v1-5-pruned": 1}


CARD = "---\nlicense: openrail\ntags:\n- anime\nbase_model:\n- 'org/Parent-v1'\n- other\n---\n# Words\nbase_model: no\n"


def test_adapters_declare_their_parent(tmp_path):
    save_file(
        weights("lora"), tmp_path / "a.safetensors", {"ss_new_sd_model_hash": "ab" * 32, "ss_sd_model_hash": "None"}
    )
    place_many(tmp_path, "peft", "peft")
    (tmp_path / "peft" / "README.md").write_text(CARD, encoding="utf-8")
    by_hash, by_card = sorted(scan(tmp_path).of("adapter"), key=lambda i: i.name)
    assert by_hash.declared == {"sha256": "ab" * 32}
    assert (by_card.declared, by_card.licence) == ({"base_model": "org/Parent-v1"}, "openrail")
    models = {"x": "ab" * 32, "y": "cd" * 32, "s/parent-v1": "ef" * 32}
    assert declared_parent(by_hash, models) == "x"
    assert declared_parent(by_card, models) == "s/parent-v1"
    assert declared_parent(by_card, models | {"t/Parent-v1": "00"}) is None


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"sha256": "AB" * 32}, "x"),
        ({"sha256": "AB" * 5}, "x"),
        ({"sha256": "AB"}, None),
        ({"sha256": "zz", "name": "C:\\models\\Y.safetensors"}, "y"),
        ({"short_hash": "12345678"}, "y"),
        ({"name": "other.ckpt"}, None),
        ({}, None),
    ],
)
def test_a_hash_counts_before_a_name(declared, expected):
    item = Item("a", Path("a"), "adapter", declared=declared)
    assert declared_parent(item, {"x": "ab" * 32, "y": "cd" * 32}, {"x": "", "y": "12345678"}) == expected


def test_hostile_folders_are_told_about(tmp_path):
    (tmp_path / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "shards.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc"}}', encoding="utf-8")
    (tmp_path / "deep.safetensors.index.json").write_text("[" * 100_000, encoding="utf-8")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "README.md").write_text("---\n" + "a:\n" * 10_000 + "---\n", encoding="utf-8")
    found = scan(tmp_path)
    assert found.counts == dict.fromkeys(BUCKETS, 0) | {"unreadable": 4, "ignored": 2}
    assert all(str(i.path) in i.reason for i in found.of("unreadable"))


def test_links_to_one_folder_are_entered_once(tmp_path):
    place(tmp_path / "real", "a", "plain")
    for name in ("again", "aaa"):
        os.symlink(tmp_path / "real", tmp_path / name, target_is_directory=True)
    (item,) = scan(tmp_path).items
    assert item.path == tmp_path / "real" / "a.safetensors"


def test_no_folder_is_refused(tmp_path):
    with pytest.raises(LineageError, match="is no folder"):
        scan(tmp_path / "none")


def test_progress_counts_every_item(tmp_path):
    for name in "abc":
        place(tmp_path, name, "plain")
    told = []
    scan(tmp_path, progress=lambda *step: told.append(step))
    assert told == [(i, 3, f"{n}.safetensors") for i, n in enumerate("abc", 1)]
