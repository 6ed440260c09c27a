"""Trainings that differ from the default in one thing: what they change, and that they change nothing else."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
from tiny_world import TINY

from lineage.hypotheses import SETUPS
from train import folders, topology
from train.config import SECTIONS, Config, SaveConfig
from train.experiment import Experiment, Lessons, Worlds
from train.lessons import PRODUCTS
from train.pictures import CHARACTERS
from train.setups import CHANGES, Way, applied_clip_skip, changed
from train.sites import WorldSite

EXPERIMENT = Experiment(Worlds(characters=1), Lessons(steps=2, pictures=4, batch=2))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topology, "draw", lambda size, seed: TINY)
        yield WorldSite(EXPERIMENT, 0, tmp_path_factory.mktemp("site"))


def lesson(site: WorldSite, setup: str, target: str = "hina", network: str = "loha") -> Config:
    usual = site.lesson(target, "base", SaveConfig(Path("run")), 0)
    return changed(usual, Way(network, setup), site)


def differing(a: Config, b: Config) -> set[str]:
    return {
        f"{name}.{f.name}"
        for name, section in SECTIONS.items()
        for f in fields(section)
        if getattr(getattr(a, name), f.name) != getattr(getattr(b, name), f.name)
    }


WHAT = {
    "default": set(),
    "no tags": {"data.prune", "data.keep_tokens"},
    "all tags": {"data.prune"},
    "regularisation": {"data.reg"},
    "photo regularisation": {"data.reg"},
    "higher resolution": {"data.resolution", "data.bucket_max", "data.buckets"},
    "large": {"network.dim", "network.conv_dim"},
    "large fast": {"network.dim", "network.conv_dim", "training.lr"},
    "large half alpha": {"network.dim", "network.conv_dim", "network.alpha", "network.conv_alpha"},
    "constant": {"training.scheduler"},
    "cosine": set(),  # the default of miniature worlds
    "dadaptation": {"training.optimizer", "training.lr"},
    "half text rate": {"training.text_encoder_lr"},
    "other clip skip": {"data.clip_skip"},
    "mixed clip skip": {"data.clip_skip"},
}


def test_every_setup_of_the_claims_can_be_trained():
    assert CHANGES.keys() == SETUPS.keys() == WHAT.keys()


@pytest.mark.parametrize("setup", WHAT)
def test_a_setup_changes_what_it_says_and_nothing_else(site, setup):
    assert differing(lesson(site, setup), lesson(site, "default")) == WHAT[setup]


def test_settings_are_those_of_the_article(site):
    """Dim 32 and 16 with alpha 1 or half of them; 5e-4 for 2e-4; half the rate for the text encoder."""
    usual = lesson(site, "default").training
    for setup, alphas, faster in (
        ("large", (1, 1), 1), ("large fast", (1, 1), 5e-4 / 2e-4), ("large half alpha", (16, 8), 1),
    ):  # fmt: skip
        changed_to = lesson(site, setup)
        network = changed_to.network
        assert (network.dim, network.conv_dim, network.alpha, network.conv_alpha) == (32, 16, *alphas)
        assert changed_to.training.lr == pytest.approx(usual.lr * faster)
    half = lesson(site, "half text rate")
    assert (half.unet_lr, half.text_encoder_lr) == (usual.lr, usual.lr / 2)
    assert lesson(site, "higher resolution").data.resolution == 96


def captions(config: Config) -> list[set[str]]:
    return [set(p.caption.tags) for p in folders.pictures(config.data)[0]]


def test_captions_hold_what_their_setup_says(site):
    traits = set(CHARACTERS["hina"].values())
    usual, everything, bare = (captions(lesson(site, s)) for s in ("default", "all tags", "no tags"))
    assert all("hina" in tags and len(tags) > 2 and not tags & traits for tags in usual)
    assert [tags - traits for tags in everything] == usual
    assert all(traits <= tags for tags in everything)
    assert bare == [{"hina"}] * len(usual)
    assert captions(lesson(site, "no tags", "personas")) == [{"by personas"}] * 4
    for target in site.targets:
        for p in site.held_out(target):
            assert not traits & set(p.caption.tags) or target != "hina"
        assert len(site.prompts(target)) == EXPERIMENT.measures.drawn


def test_regularisation_pictures_do_not_show_the_target(site):
    for setup in ("regularisation", "photo regularisation"):
        reg = lesson(site, setup).data.reg
        assert reg
        told = {tag for file in reg.rglob("*.txt") for tag in file.read_text("utf-8").strip().split(", ")}
        artists = {tag for tag in told if tag.startswith("by ")}
        styles = TINY.trained[0].styles
        assert artists == {f"by {style}" for style in (styles[:1] if "photo" in setup else styles)}
        assert "hina" not in told


@pytest.mark.parametrize("algo", ["locon", "lora"])
def test_other_networks_have_the_same_size_and_strength_per_layer(site, algo):
    a, b = lesson(site, "default").network, lesson(site, "default", network=algo).network
    assert a.dim * PRODUCTS["loha"] == b.dim * PRODUCTS[algo]
    assert a.conv_dim * PRODUCTS["loha"] == b.conv_dim * PRODUCTS[algo]
    assert (a.scale, a.conv_scale) == (b.scale, b.conv_scale)


def test_clip_skip_in_use(site):
    other = lesson(site, "other clip skip").data.clip_skip
    assert other != EXPERIMENT.training.clip_skip
    assert applied_clip_skip(EXPERIMENT.training.clip_skip, "other clip skip") == other
    for setup in SETUPS.keys() - {"other clip skip"}:
        assert applied_clip_skip(EXPERIMENT.training.clip_skip, setup) == EXPERIMENT.training.clip_skip


def test_a_world_that_is_there_is_not_drawn_again(site):
    first = lesson(site, "default").data.folder
    stamp = first.stat().st_mtime_ns
    assert lesson(replace_seed(site), "default").data.folder.stat().st_mtime_ns == stamp


def replace_seed(site: WorldSite) -> WorldSite:
    return replace(site, experiment=replace(EXPERIMENT, training=replace(EXPERIMENT.training, seeds=(5,))))


def test_worlds_of_one_size_share_their_autoencoder(site):
    """A damaged one is not taken."""
    first, second, third = (replace(site, seed=seed) for seed in (10, 11, 12))
    steps = []
    first.make(None)
    stamp = (first.home / "autoencoder.safetensors").read_bytes()
    second.make(lambda done, total, label: steps.append(label))
    assert (second.home / "autoencoder.safetensors").read_bytes() == stamp
    assert "autoencoder" in steps[0]
    assert "loss" not in steps[0]
    for home in (first.home, second.home):
        (home / "autoencoder.safetensors").write_bytes(stamp[:1000])
    third.make(None)
    assert (third.home / "autoencoder.safetensors").read_bytes() == stamp
