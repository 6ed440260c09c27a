"""Settings of kohya's trainers: what they mean here, and that no key is lost without a word."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lineage.errors import LineageError
from train import kohya_keys as keys
from train.config import SECTIONS, Config, DataConfig, ModelConfig, NetworkConfig, TrainingConfig
from train.kohya import Imported, from_kohya
from train.metadata import metadata

GUI = {
    "LoRA_type": "LyCORIS/LoHa",
    "pretrained_model_name_or_path": "nai.ckpt",
    "train_data_dir": "img",
    "reg_data_dir": "",
    "output_dir": "out",
    "output_name": "mahiro",
    "max_resolution": "512,512",
    "learning_rate": 0.0002,
    "unet_lr": 0.0002,
    "text_encoder_lr": 0.0001,
    "lr_scheduler": "constant",
    "lr_warmup": 0,
    "optimizer": "AdamW8bit",
    "optimizer_args": "weight_decay=0.05 betas=0.9,0.98",
    "network_dim": 8,
    "network_alpha": 1,
    "conv_dim": 4,
    "conv_alpha": 2,
    "use_cp": True,
    "train_batch_size": "2",
    "epoch": 5,
    "max_train_steps": "",
    "mixed_precision": "fp16",
    "save_precision": "bf16",
    "seed": "1234",
    "clip_skip": "2",
    "enable_bucket": True,
    "bucket_no_upscale": True,
    "bucket_reso_steps": 64,
    "shuffle_caption": True,
    "keep_tokens": "1",
    "gradient_accumulation_steps": 1.0,
    "cache_latents": True,
    "min_snr_gamma": 5,
    "noise_offset": 0,
    "xformers": True,
    "sample_prompts": "1girl, tilty --n bad --w 512\n# none\nby momoko",
    "sample_every_n_steps": 100,
    "save_every_n_epochs": 1,
    "some_new_option": 3,
}
SCRIPT = """
[model_arguments]
pretrained_model_name_or_path = "models/ac.safetensors"
v_parameterization = true
[training_arguments]
max_train_steps = 3000
learning_rate = 5e-4
optimizer_type = "Prodigy"
optimizer_args = ["weight_decay=0.01", "d_coef=2"]
lr_scheduler = "cosine_with_restarts"
lr_warmup_steps = 100
mixed_precision = "bf16"
[network_arguments]
network_module = "lycoris.kohya"
network_args = ["algo=loha", "conv_dim=16", "conv_alpha=8", "dropout=0.1"]
network_dim = 32
network_alpha = 16
network_train_unet_only = true
[dataset_arguments]
train_data_dir = "data"
resolution = "768,512"
"""


def read(folder: Path, content: Any, name: str = "") -> Imported:
    file = folder / (name or ("c.toml" if isinstance(content, str) else "c.json"))
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return from_kohya(file)


def test_the_guis_settings(tmp_path):
    found = read(tmp_path, GUI)
    c = found.config
    assert c.network == NetworkConfig(conv_alpha=2, tucker=True)
    assert c.training == TrainingConfig(
        epochs=5, batch=2, optimizer="adamw8bit", unet_lr=2e-4, text_encoder_lr=1e-4, weight_decay=0.05,
        precision="fp16", seed=1234,
    )  # fmt: skip
    assert c.data == DataConfig(tmp_path / "img", clip_skip=2, upscale=False, shuffle=True, keep_tokens=1)
    assert c.model.base == tmp_path / "nai.ckpt"
    assert (c.save.folder, c.save.name, c.save.dtype) == (tmp_path / "out" / "mahiro", "mahiro", "bf16")
    assert (c.sample.prompts, c.sample.every) == (("1girl, tilty", "by momoko"), 100)
    assert found.ignored["noise_offset"] == "is off"
    assert "loss" in found.ignored["min_snr_gamma"]
    assert found.ignored["some_new_option"] == "is not known here"
    assert "optimizer_args.betas" in found.ignored


def test_the_scripts_arguments(tmp_path):
    found = read(tmp_path, SCRIPT)
    c = found.config
    assert c.network == NetworkConfig(dim=32, alpha=16, conv_dim=16, conv_alpha=8, text_encoder=False)
    assert c.training == TrainingConfig(
        steps=3000, optimizer="prodigy", lr=5e-4, scheduler="cosine", warmup=100, weight_decay=0.01, precision="bf16"
    )
    assert (c.model.prediction, c.data.resolution, c.data.buckets) == ("v_prediction", 640, False)
    assert set(found.ignored) == {"network_args.dropout", "optimizer_args.d_coef"}
    assert any("cosine_with_restarts" in note for note in found.notes)
    assert any("768 x 512" in note for note in found.notes)


def test_the_arguments_own_name_goes_before_another_spelling(tmp_path):
    for more in ({"resolution": 256, "max_resolution": "512,512"}, {"max_resolution": "256,256", "resolution": ""}):
        assert read(tmp_path, LEAST | more).config.data.resolution == 256


LEAST = {"pretrained_model_name_or_path": "b.ckpt", "train_data_dir": "d"}


def test_what_is_left_out_is_what_their_scripts_take(tmp_path):
    c = read(tmp_path, LEAST).config
    assert (c.network.algo, c.network.dim, c.network.kernel_dim) == ("lora", 4, 0)
    assert (c.training.steps, c.training.lr, c.training.optimizer) == (1600, 2e-6, "adamw")
    assert (c.data.buckets, c.save.dtype) == (False, "fp32")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"network_module": "networks.lora"}, ("lora", 0)),
        ({"network_module": "networks.lora", "network_args": ["conv_dim=3"]}, ("locon", 3)),
        ({"network_module": "networks.loha", "network_args": ["conv_dim=3"]}, ("loha", 3)),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=lora", "conv_dim=3"]}, ("locon", 3)),
        ({"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}, ("loha", 4)),
        ({"network_module": "lycoris.kohya", "network_args": {"algo": "loha", "conv_dim": "5"}}, ("loha", 5)),
        ({"LoRA_type": "Standard", "conv_dim": 0}, ("lora", 0)),
        ({"LoRA_type": "LyCORIS/LoCon", "conv_dim": 2, "conv_alpha": 1}, ("locon", 2)),
    ],
)
def test_kinds_of_networks(tmp_path, more, expected):
    network = read(tmp_path, LEAST | more).config.network
    assert (network.algo, network.kernel_dim) == expected
    assert expected[0] != "lora" or network.conv_dim == 0


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"text_encoder_lr": 0.0, "unet_lr": 1e-4}, (True, False)),
        ({"text_encoder_lr": [1e-4, 2e-4], "unet_lr": 0}, (False, True)),
        ({"network_train_text_encoder_only": True}, (False, True)),
        ({"unet_lr": "", "text_encoder_lr": "None"}, (True, True)),
    ],
)
def test_parts_that_are_off(tmp_path, more, parts):
    network = read(tmp_path, LEAST | more).config.network
    assert (network.unet, network.text_encoder) == parts


@pytest.mark.parametrize(
    ("more", "length"),
    [
        ({}, (1600, None)),
        ({"max_train_steps": 70, "epoch": 3}, (70, None)),
        ({"max_train_steps": 0, "epoch": 3}, (None, 3)),
        ({"max_train_steps": 70, "max_train_epochs": 4}, (None, 4)),
    ],
)
def test_how_long(tmp_path, more, length):
    training = read(tmp_path, LEAST | more).config.training
    assert (training.steps, training.epochs) == length


@pytest.mark.parametrize(
    ("more", "warmup", "noted"),
    [
        ({"max_train_steps": 200, "lr_warmup": 10}, 20, False),
        ({"max_train_steps": 200, "lr_warmup_steps": 0.1}, 20, False),
        ({"max_train_steps": 200, "lr_warmup_steps": 7}, 7, False),
        ({"epoch": 2, "lr_warmup": 10}, 0, True),
    ],
)
def test_warmup(tmp_path, more, warmup, noted):
    found = read(tmp_path, LEAST | more)
    assert found.config.training.warmup == warmup
    assert any("warmup" in note for note in found.notes) is noted


@pytest.mark.parametrize("optimizer", sorted(keys.OPTIMIZERS))
def test_every_optimizer_named_any_way(tmp_path, optimizer):
    for spelling in (optimizer, f"bitsandbytes.optim.{optimizer.upper()}(weight_decay=0.1,betas=(0.9, 0.99))"):
        found = read(tmp_path, LEAST | {"optimizer_type": spelling})
        assert found.config.training.optimizer == keys.OPTIMIZERS[optimizer]
    assert found.config.training.weight_decay == 0.1
    assert set(found.ignored) == {"optimizer_args.betas"}


BASE = SimpleNamespace(path=Path("nai.safetensors"), architecture="sd1", v=False, zero_terminal_snr=False)


def adapter(folder: Path, told: dict[str, str], parts: Sequence[str] = ("unet", "te")) -> Path:
    save_file({f"lora_{part}_x.alpha": torch.zeros(1) for part in parts}, folder / "a.safetensors", told)
    return folder / "a.safetensors"


@given(
    network=st.builds(
        NetworkConfig,
        algo=st.sampled_from(["loha", "locon"]),
        dim=st.integers(1, 128),
        alpha=st.floats(0.5, 64),
        conv_dim=st.integers(1, 64),
        conv_alpha=st.floats(0.5, 64),
        tucker=st.booleans(),
        text_encoder=st.booleans(),
    ),
    training=st.builds(
        TrainingConfig,
        steps=st.integers(1, 99999),
        batch=st.integers(1, 8),
        optimizer=st.sampled_from(["adamw", "adamw8bit", "dadapt-adam", "prodigy"]),
        lr=st.floats(1e-6, 1),
        scheduler=st.sampled_from(["constant", "cosine", "linear"]),
        warmup=st.integers(0, 99),
        clip_grad=st.floats(0, 2),
        accumulation=st.integers(1, 4),
        precision=st.sampled_from(["fp32", "fp16", "bf16"]),
        seed=st.integers(0, 2**32),
    ),
    data=st.builds(
        DataConfig,
        folder=st.just(Path("d")),
        resolution=st.sampled_from([256, 512, 1024]),
        shuffle=st.booleans(),
        keep_tokens=st.integers(0, 3),
        flip=st.booleans(),
        clip_skip=st.integers(1, 2),
        tag_dropout=st.floats(0, 1),
        upscale=st.booleans(),
        cache_latents=st.booleans(),
    ),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
def test_what_our_own_files_tell_is_read_again(tmp_path, network, training, data):
    c = Config(ModelConfig(Path("nai.safetensors")), data, network, training)
    hashes = {"ss_sd_model_name": "nai.safetensors", "ss_new_sd_model_hash": "0" * 64}
    told = metadata(c, BASE, hashes, {"ss_max_train_steps": training.steps, "ss_dataset_dirs": {}}, 5)  # pyright: ignore[reportArgumentType]
    parts = ["te"] * network.text_encoder + ["unet"] * network.unet
    found = from_kohya(adapter(tmp_path, told, parts)).config
    assert found.network == network
    rates = {"unet_lr": training.lr, "text_encoder_lr": training.lr if network.text_encoder else None}
    assert found.training == replace(training, **rates)
    assert replace(found.data, folder=data.folder) == data


def test_metadata_of_a_described_data_set(tmp_path):
    datasets = [
        {
            "resolution": [768, 768],
            "batch_size_per_device": 3,
            "enable_bucket": True,
            "subsets": [{"shuffle_caption": True, "keep_tokens": 2}],
        }
    ]
    told = {"ss_network_module": "networks.lora", "ss_network_dim": "8", "ss_datasets": json.dumps(datasets)}
    found = from_kohya(adapter(tmp_path, told))
    assert (found.config.data.resolution, found.config.data.shuffle, found.config.data.keep_tokens) == (768, True, 2)
    assert (found.config.training.batch, found.config.data.buckets) == (3, True)
    assert any("data.folder" in note for note in found.notes)
    assert any("model.base" in note for note in found.notes)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("c.json", "{", "cannot be read"),
        ("c.json", "[1]", "no table"),
        ("c.json", "[" * 100000, "cannot be read"),
        ("c.toml", "[[datasets]]\nresolution = 512\n", "data set only"),
        ("c.json", json.dumps(LEAST | {"network_dim": "many"}), "network_dim: 'many' is not a whole number"),
        ("c.json", json.dumps(LEAST | {"network_dim": 1e999}), "network_dim"),
        ("c.json", json.dumps(LEAST | {"network_dim": 2.5}), "network_dim: 2.5 is not a whole number"),
        ("c.json", json.dumps(LEAST | {"network_dim": -3}), r"network\.dim: -3"),
        ("c.json", json.dumps(LEAST | {"enable_bucket": "perhaps"}), "enable_bucket.*true or false"),
        ("c.json", json.dumps(LEAST | {"LoRA_type": "LyCORIS/LoKr"}), "'lycoris/lokr' are not trained here"),
        ("c.json", json.dumps(LEAST | {"optimizer": "Lion"}), "'lion' is not offered.*adamw8bit"),
        ("c.json", json.dumps(LEAST | {"network_args": [["a"]]}), "network_args"),
        ("c.json", json.dumps(LEAST | {"output_name": "../../x"}), r"save\.name"),
    ],
)
def test_faults_are_told(tmp_path, name, content, why):
    with pytest.raises(LineageError, match=why) as error:
        read(tmp_path, content, name)
    assert str(tmp_path / name) in str(error.value)


def test_files_without_settings(tmp_path):
    for file in (adapter(tmp_path, {"format": "pt"}), tmp_path / "missing.json"):
        with pytest.raises(LineageError, match=file.name):
            from_kohya(file)


def test_the_settings_are_written_with_what_was_ignored(tmp_path):
    found = read(tmp_path, GUI | {"evil\nkey = 1": 3})
    text = found.to_toml()
    file = tmp_path / "ours.toml"
    file.write_text(text, encoding="utf-8")
    assert Config.read(file) == found.config
    for key in found.ignored:
        assert key.replace("\n", " ") in text


values = st.none() | st.booleans() | st.integers(-9, 999) | st.floats() | st.text(max_size=6) | st.lists(st.integers())
known = st.sampled_from(sorted({*keys.SAME, *keys.TOGETHER, *keys.REASONS, *keys.ALIASES}))


@given(st.dictionaries(known | st.text(max_size=5), values, max_size=12))
@example({"max_resolution": [1, -1]})
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_settings_give_a_configuration_or_an_error(tmp_path, given):
    """Every key is used or named."""
    try:
        found = read(tmp_path, LEAST | given)
    except LineageError:
        return
    plain = {keys.ALIASES.get(key, key) for key in given}
    assert plain <= {*found.ignored, *keys.SAME, *keys.TOGETHER, *LEAST}


def test_the_table_names_each_key_once_and_only_our_own():
    assert not set(keys.SAME) & set(keys.TOGETHER)
    assert not (set(keys.SAME) | set(keys.TOGETHER)) & set(keys.REASONS)
    assert sum(len(names) for names in keys.IGNORED.values()) == len(keys.REASONS)
    ours = {f"{name}.{key}" for name, section in SECTIONS.items() for key in section.__dataclass_fields__}
    assert {target for target, _ in keys.SAME.values()} <= ours
