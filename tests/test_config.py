"""Settings: what is written is what is read, nothing unknown passes, and every refusal says where and what instead."""

import math
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.errors import LineageError
from train import config, values
from train.config import SECTIONS, Config, DataConfig, ModelConfig, NetworkConfig, TrainingConfig

LEAST = '[model]\nbase = "b.safetensors"\n[data]\nfolder = "d"\n[training]\nsteps = 5\n'


def read(folder: Path, text: str) -> Config:
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    return Config.read(file)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(LineageError) as error:
        read(folder, text)
    assert str(folder / "run.toml") in str(error.value)
    return str(error.value)


def test_the_defaults_are_the_articles(tmp_path):
    c = read(tmp_path, LEAST)
    n, t, d = c.network, c.training, c.data
    assert (n.algo, n.dim, n.conv_dim, n.alpha, n.conv_alpha) == ("loha", 8, 4, 1, 1)
    assert (t.lr, t.scheduler, t.optimizer, d.resolution, d.clip_skip) == (2e-4, "constant", "adam8bit", 512, 1)
    assert {6000, 10000} <= set(c.save.at)
    assert set(c.changed()) == {"model.base", "data.folder", "training.steps", "save.folder"}
    assert c.name == "loha"


def test_paths_start_at_the_file(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    c = read(tmp_path, LEAST + '[save]\nfolder = "../out"\n')
    assert c.model.base == tmp_path / "b.safetensors"
    assert c.save.folder == tmp_path.parent / "out"
    assert read(tmp_path, LEAST).save.folder == tmp_path / "run"
    absolute = (tmp_path / "x").as_posix()
    assert read(tmp_path, LEAST.replace("b.safetensors", absolute)).model.base == Path(absolute)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = {
    "int": st.integers(64, 640).map(lambda i: i // 64 * 64),
    "float": st.floats(1e-9, 1),
    "bool": st.booleans(),
    "str": text,
    "Path": st.just(Path("a b") / 'quote" and \\').map(Path.absolute),
    "tuple[str, ...]": st.lists(text, max_size=3).map(tuple),
    "tuple[int, ...]": st.lists(st.integers(1, 99), max_size=3).map(tuple),
    "Mapping[str, tuple[str, ...]]": st.dictionaries(
        text, st.lists(text.map("x".__add__), max_size=2).map(tuple), max_size=2
    ),
}
FIXED = {"training.epochs": st.none(), "training.steps": st.just(7), "network.unet": st.just(True)}
FIXED |= {"data.cache_text": st.just(False), "data.bucket_max": st.just(1024), "save.folder": VALUES["Path"]}
FIXED |= {"sample.guidance": st.floats(1, 20), "data.trigger_words": st.just(("t",))}
FIXED |= {name: st.sampled_from(["a word", "w-2"]) for name in values.NAMES}
FIXED["network.pivotal"] = st.just(("new", "b"))


def any_of(name: str, f) -> st.SearchStrategy:
    where, kind = f"{name}.{f.name}", str(f.type).removesuffix(" | None")
    if where in FIXED:
        return FIXED[where]
    strategy = st.sampled_from(values.CHOICES[where]) if where in values.CHOICES else VALUES[kind]
    return strategy | st.none() if str(f.type).endswith("None") else strategy


@st.composite
def configs(draw) -> Config:
    """Any setting at any value of its kind."""
    made = {
        name: section(**{f.name: draw(any_of(name, f)) for f in fields(section)}) for name, section in SECTIONS.items()
    }
    return Config(**made)  # pyright: ignore[reportArgumentType]


@given(configs())
def test_what_is_written_is_read_again(tmp_path_factory, c):
    folder = tmp_path_factory.getbasetemp()
    assert read(folder, c.to_toml()) == c
    assert Config.parse(c.to_toml(), folder / "another") == c


@given(configs())
def test_what_changed_makes_the_settings_again(c):
    tables: dict[str, dict] = {name: {} for name in SECTIONS}
    for where, value in c.changed().items():
        name, key = where.split(".")
        tables[name][key] = value
    assert Config(**{name: SECTIONS[name](**table) for name, table in tables.items()}) == c  # pyright: ignore[reportArgumentType]


def test_every_rule_is_about_a_key():
    for name, section in SECTIONS.items():
        assert config.section_name(section) == name
    every = {f"{name}.{f.name}" for name, section in SECTIONS.items() for f in fields(section)}
    ruled = {*values.CHOICES, *values.SHARES, *values.LEAST, *values.POSITIVE, *values.NAMES}
    assert ruled <= every


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("[training]\nstep = 3", ["training.step", "steps"]),
        ("[network]\nlr = 1.0", ["network.lr", "[training]"]),
        ("[netwrok]\ndim = 1", ["[netwrok]", "network"]),
        ("network = 3", ["network", "table"]),
        ('[network]\ndim = "8"', ["network.dim", "'8'", "whole number"]),
        ("[network]\ndim = 8.5", ["network.dim", "whole number"]),
        ("[network]\ndim = true", ["network.dim", "whole number"]),
        ("[network]\ndim = 0", ["network.dim", "1 and more"]),
        ("[network]\nalpha = 0", ["network.alpha", "more than 0"]),
        ("[network]\nalpha = true", ["network.alpha", "a number"]),
        ("[network]\nalpha = nan", ["network.alpha", "a number"]),
        ('[network]\nalgo = "lokr"', ["network.algo", "'loha', 'locon', 'lora'"]),
        ('[network]\npivotal = "x"', ["network.pivotal", "list of texts"]),
        ('[network]\npivotal = ["../x"]', ["network.pivotal", "file's name"]),
        ("[network]\nunet = 1", ["network.unet", "true or false"]),
        ("[network]\nunet = false\ntext_encoder = false", ["both off"]),
        ("[sample]\nseeds = [1.5]", ["sample.seeds", "whole numbers"]),
        ("[sample]\nsize = 513", ["sample.size", "multiple of 8"]),
        ('[save]\nname = "a/b"', ["save.name", "file's name"]),
        ('[save]\nfolder = ""', ["save.folder", "a path"]),
        ("[save]\nat = [0]", ["save.at", "1 and more"]),
        ("x = ", ["TOML"]),
    ],
)
def test_a_fault_is_told_with_what_is_allowed(tmp_path, bad, said):
    rest = LEAST.split("[training]")[0] if "[training]" in bad else LEAST
    error = refusal(tmp_path, f"{bad}\n{rest}")
    assert all(word in error for word in said), error


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("tag_dropout = 1.5", ["data.tag_dropout", "0 to 1"]),
        ("resolution = 500", ["data.resolution", "multiple of 8"]),
        ("bucket_min = 512\nbucket_max = 256", ["data.bucket_min", "256"]),
        ("prune = { tilty = 'smile' }", ["data.prune.tilty", "list of texts"]),
        ("prune = { tilty = ['tilty'] }", ["data.prune", "'tilty'", "trigger"]),
        ("trigger_words = ['a']\nprune = { '*' = ['a'] }", ["data.prune", "trigger"]),
        ("cache_text = true", ["data.cache_text", "text_encoder = false"]),
    ],
)
def test_a_fault_of_the_data_is_told(tmp_path, bad, said):
    error = refusal(tmp_path, LEAST.replace('folder = "d"', f'folder = "d"\n{bad}'))
    assert all(word in error for word in said), error


@pytest.mark.parametrize("without", ["base", "folder", "steps"])
def test_what_has_no_default_must_be_given(tmp_path, without):
    lines = [line for line in LEAST.splitlines() if not line.startswith(without)]
    assert without in refusal(tmp_path, "\n".join(lines))


def test_a_byte_order_mark_is_no_fault(tmp_path):
    assert read(tmp_path, "\ufeff" + LEAST) == read(tmp_path, LEAST)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xff")
    for file in (tmp_path / "run.toml", tmp_path / "missing.toml", tmp_path):
        with pytest.raises(LineageError, match="cannot be read"):
            Config.read(file)


def test_settings_are_frozen_and_checked_wherever_they_come_from():
    with pytest.raises(FrozenInstanceError):
        NetworkConfig().dim = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(LineageError, match=r"network\.dim"):
        replace(NetworkConfig(), dim=0)


@given(st.integers(1, 128), st.integers(0, 128), st.floats(0.01, 64), st.sampled_from(values.CHOICES["network.algo"]))
def test_derived_values_follow(dim, conv_dim, alpha, algo):
    network = NetworkConfig(dim=dim, conv_dim=conv_dim, alpha=alpha, conv_alpha=alpha, algo=algo)
    assert math.isclose(network.scale * dim, alpha)
    assert math.isclose(network.conv_scale * conv_dim, alpha if conv_dim else 0)
    assert network.kernel_dim == (conv_dim if algo != "lora" else 0)


def test_files_are_named_by_what_differs():
    c = Config(ModelConfig(Path("b")), DataConfig(Path("d")), training=TrainingConfig(epochs=3, lr=5e-4))
    assert c.name == "loha-lr0.0005"
    assert replace(c, network=NetworkConfig(dim=32, conv_dim=16)).name == "loha-dim32-conv_dim16-lr0.0005"
    assert replace(c, save=replace(c.save, name="mine")).name == "mine"
