"""Laws of the miniature world: pictures show their tags, runs repeat to the bit, files are what loaders expect."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_world import SMALL, TINY

import cli
import lineage
from lineage.errors import LineageError
from lineage.results import load_json
from train import demo, judge, pictures, pipeline, topology, world
from train.experiment import Experiment, Lessons, Measures
from train.fit import Plan, denoising_loss, encode_latents, encode_text, fit_autoencoder, pixels, rate, standardise
from train.muon import orthogonal
from train.styles import BACKGROUND, STYLES


@pytest.mark.parametrize("style", STYLES)
def test_caption_says_what_was_drawn(style: str):
    for picture in pictures.gallery([style], 12, seed=3):
        named, traits = pictures.read(picture.caption)
        hidden = {"hair colour"} if picture.traits.get("hair") == "bald" else set()
        assert named == style
        assert traits == {kind: tag for kind, tag in picture.traits.items() if tag and kind not in hidden}


@pytest.mark.parametrize("style", STYLES)
def test_background_is_the_one_of_the_tag(style: str):
    for picture in pictures.gallery([style], 6, seed=1):
        corner = "#{:02x}{:02x}{:02x}".format(*np.asarray(picture.image)[0, 0])
        assert corner == BACKGROUND[picture.traits["background"]]


@pytest.mark.parametrize("style", STYLES)
def test_every_tag_shows(style: str):
    first = {kind: next(iter(tagged)) for kind, tagged in STYLES[style].traits.items()}
    for kind, tagged in STYLES[style].traits.items():
        drawn = [pictures.draw(STYLES[style], first | {kind: tag}, "x").image.tobytes() for tag in tagged]
        assert len(set(drawn)) == len(tagged), kind


def test_pictures_repeat_and_parts_are_disjoint():
    train, again, held_out = (
        [p.image.tobytes() for p in pictures.gallery(["micah"], 8, seed=5, part=part)]
        for part in ("train", "train", "test")
    )
    assert train == again
    assert not set(train) & set(held_out)


def test_an_unknown_tag_is_named():
    with pytest.raises(LineageError, match="'three eyes'"):
        pictures.read("by micah, three eyes")


def test_only_allowed_licences_are_drawn_and_credited():
    credits = pictures.credits(STYLES)
    for style in STYLES:
        found = pictures.licence(style)
        assert found["licence"].startswith(("CC0", "CC BY 4", "MIT"))
        assert f"| {style} | {found['work']} | {found['author']} | [{found['licence']}]" in credits
    with pytest.raises(LineageError, match="only CC0, CC BY and MIT"):
        pictures.licence("avataaars")


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (24, 24)])
def test_orthogonal_draws_singular_values_to_one(shape: tuple[int, int]):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(orthogonal(g))
    assert s.min() > 0.6
    assert s.max() < 1.3
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(orthogonal(g).flatten(), (u @ vh).flatten(), 0) > 0.95
    assert not orthogonal(torch.zeros(shape)).any()


def test_rate_warms_up_and_ends_near_zero():
    plan = Plan(steps=100, lr=1.0, warmup=10)
    rates = [rate(n, plan) for n in range(1, 101)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.build(TINY, tmp_path_factory.mktemp("world") / "w")


def hashes(folder: Path) -> dict[str, str]:
    found = [f for f in sorted(folder.rglob("*.*")) if "config" not in f.parts]
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in found}


def test_tokenizer_is_clips(folder: Path):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "config" / "tokenizer")
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_same_seed_same_files(folder: Path, tmp_path: Path):
    assert hashes(world.build(TINY, tmp_path / "again")) == hashes(folder)


def test_another_seed_another_world(folder: Path):
    other = replace(TINY, seed=1)
    keys = {world.stage_key(w, m) for w in (TINY, other) for m in TINY.models}
    assert len(keys) == 8
    assert world.autoencoder_key(TINY) == world.autoencoder_key(other)


class Stop(Exception):
    pass


def stopping_at(step: int) -> Callable[[int, int, str], None]:
    calls = itertools.count(1)

    def progress(done: int, total: int, label: str) -> None:
        if next(calls) == step:
            raise Stop

    return progress


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 5, 7])
def test_interrupted_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path, step: int):
    with pytest.raises(Stop):
        world.build(TINY, tmp_path / "w", stopping_at(step))
    assert hashes(tmp_path / "w") != hashes(folder)
    assert hashes(world.build(TINY, tmp_path / "w")) == hashes(folder)


def test_finished_stages_are_kept_and_steps_add_up(folder: Path):
    before = {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")}
    seen: list[tuple[int, int]] = []
    world.build(TINY, folder, lambda done, total, label: seen.append((done, total)))
    assert seen[-1] == (8, 8)
    assert {f.name: f.stat().st_mtime_ns for f in folder.rglob("*.safetensors")} == before


def test_a_damaged_stage_is_made_again(folder: Path, tmp_path: Path):
    made = world.build(TINY, tmp_path / "w")
    (made / "models" / "tuned.safetensors").write_bytes(b"cut short")
    assert hashes(world.build(TINY, made)) == hashes(folder)


def test_another_world_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(LineageError, match="holds another world"):
        world.build(replace(TINY, seed=1), folder)
    (tmp_path / "diary.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(LineageError, match="not empty"):
        world.build(TINY, tmp_path)


def test_single_file_loads_in_diffusers_with_equal_values_and_samples(folder: Path, tmp_path: Path):
    made = world.blank(TINY, folder, 0)
    for part in (made.unet, made.text_encoder, made.vae):
        part.half().float()
    (tmp_path / "models").mkdir()
    pipeline.save(made, tmp_path / "models" / "model.safetensors", {})
    shutil.copytree(folder / "config", tmp_path / "config")
    loaded = pipeline.load(tmp_path / "models" / "model.safetensors")
    for name in ("unet", "text_encoder", "vae"):
        want, got = getattr(made, name).state_dict(), getattr(loaded, name).state_dict()
        assert want.keys() == got.keys()
        assert all(torch.equal(want[key], got[key]) for key in want)
    prompts = ["by micah, long hair", "smile"]
    want, got = (pipeline.sample(p, prompts, seed=4, steps=2) for p in (made, loaded))
    assert [a.tobytes() for a in want] == [b.tobytes() for b in got]


def test_files_are_recognised(folder: Path):
    found = lineage.inspect(world.model_file(folder, "tuned"))
    assert (found.layout, found.architecture) == ("ldm", "sd1")
    assert set(found.components) == {"unet", "text_encoder", "vae"}


def test_fine_tune_leaves_the_autoencoder_and_moves_the_rest(folder: Path):
    base, tuned = (load_file(world.model_file(folder, name)) for name in ("base", "tuned"))
    assert base.keys() == tuned.keys()
    vae = {name for name in base if name.startswith("first_stage_model.")}
    assert all(torch.equal(base[name], tuned[name]) for name in vae)
    assert any(not torch.equal(base[name], tuned[name]) for name in base.keys() - vae)


def test_standardised_latents_and_an_unchanged_autoencoder(folder: Path):
    vae = world.blank(TINY, folder, 0).vae
    images = pixels(pictures.gallery(["micah", "dylan"], 8, seed=0))
    with torch.no_grad():
        before = vae.encode(images).latent_dist
        decoded = vae.decode(before.mean).sample
        standardise(vae, images)
        after = vae.encode(images).latent_dist
        z = encode_latents(vae, images)
        torch.testing.assert_close(vae.decode(after.mean).sample, decoded, atol=1e-4, rtol=1e-3)
    centred = before.mean - before.mean.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(after.mean / after.std, centred / before.std, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)


def test_uncapped_loss_is_the_error_of_v(folder: Path):
    made = world.blank(TINY, folder, 0)
    latents = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    text = torch.zeros(6, 77, SMALL.text)
    generator = torch.Generator().manual_seed(2)
    t = torch.randint(1000, (6,), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    alpha = made.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1).double()
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.no_grad():
        predicted = made.unet(noisy.float(), t, text).sample
        clean = (noisy - (1 - alpha).sqrt() * predicted) / alpha.sqrt()
        error = alpha.sqrt() * (predicted - noise) - (1 - alpha).sqrt() * (clean - latents)
        for cap, want in ((1.0, (predicted - noise).square().mean()), (1e9, error.square().mean())):
            got = denoising_loss(made, latents, text, torch.Generator().manual_seed(2), cap)
            assert float(got) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.slow
def test_autoencoder_learns(folder: Path):
    vae = world.blank(TINY, folder, 0).vae
    images = pixels(pictures.gallery(["micah", "dylan"], 24, seed=0))
    losses = [s.loss for s in fit_autoencoder(vae, images, Plan(80, 2e-3, muon_lr=0.02, batch=8), seed=0)]
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])


def test_truth_names_parents_and_weights(folder: Path):
    told = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    found = {m["name"]: m for m in told["models"]}
    assert [m["relation"] for m in told["models"]] == ["root", "finetune", "merge", "permuted"]
    assert {p["name"]: p["weight"] for p in found["mixed"]["parents"]} == {"base": 0.25, "tuned": 0.75}
    assert {m["root"] for m in told["models"]} == {"base"}
    assert found["mixed"]["styles"] == ["micah", "dylan", "pixel-art"]
    assert told["characters"] == {"hina": ["dylan", "micah"]}


def test_a_merge_is_what_its_recipe_says(folder: Path):
    base, tuned, mixed = (load_file(world.model_file(folder, name)) for name in ("base", "tuned", "mixed"))
    for name in base:
        if "model" in name and base[name].is_floating_point():
            half = 0.5 * base[name] + 0.5 * tuned[name]
            assert torch.equal(mixed[name], 0.5 * half + 0.5 * tuned[name]), name


def test_permuted_computes_the_same_from_weights_that_moved(folder: Path):
    tuned, shuffled = (pipeline.load(world.model_file(folder, name)) for name in ("tuned", "shuffled"))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = [p.unet(latents, 500, encode_text(p, ["by micah", "smile"])).sample for p in (tuned, shuffled)]
    torch.testing.assert_close(said[0], said[1], atol=2e-5, rtol=1e-3)
    for part in ("unet", "text_encoder"):
        was, now = (getattr(p, part).state_dict() for p in (tuned, shuffled))
        assert all(torch.equal(was[k].flatten().sort().values, now[k].flatten().sort().values) for k in was)
        moved = {k for k in was if not torch.equal(was[k], now[k])}
        assert {k.split(".")[-2] for k in moved} >= (
            {"to_q", "conv1", "conv2"} if part == "unet" else {"fc1", "q_proj"}
        )


@pytest.mark.parametrize("size", topology.SHAPES)
def test_topologies_are_family_trees_of_unseen_targets(size: str):
    drawn = [topology.draw(size, seed) for seed in range(5)]
    assert len({json.dumps(topology.to_json(w)) for w in drawn}) == 5
    assert topology.to_json(drawn[0]) == topology.to_json(topology.draw(size, 0))
    for w in drawn:
        known: set[str] = set()
        for member in w.models:
            assert set(w.parents(member.name)) <= known
            known.add(member.name)
        assert len(known) == len(w.models)
        assert not set(w.targets) & set(w.styles)
        assert len(w.targets) == 3
        assert {w.root(m.name) for m in w.models} == {"vanilla", "stranger"}
        assert all(w.root(p) == "vanilla" for m in w.models for p in w.parents(m.name))


def test_seeds_draw_other_trees():
    trees = {
        tuple((m.name, *w.parents(m.name)) for m in w.models) for w in (topology.draw("small", s) for s in range(9))
    }
    assert len(trees) > 5


def test_the_article_world_has_its_recipes():
    w = topology.draw("article")
    merges = {m.name: m.recipe for m in w.models if isinstance(m, topology.Merge)}
    golden = {"nai-full-pruned": -2.0} | dict.fromkeys(("bp_nman_e29", *topology.OTHERS), 0.5)
    for name in ("tmp3", "AleaMix", "tmp3-ad", "AleaMix-ad"):
        assert set(w.parents(name)) <= set(golden)
    assert len(w.parents("AleaMix")) == 7
    assert {m.role for m in w.models} >= {
        "NAI",
        "AC",
        "BP",
        "NMFSAN",
        "NED",
        "VBP",
        "MFB",
        "Salt-Mix",
        "Mix-Pro",
        "nep",
    }
    assert merges["AleaMix-ad"].count("nai-full-pruned") == 6


def test_characters_keep_their_traits_and_are_told_by_name():
    for picture in pictures.portraits(["hina"], ["micah"], 4, seed=0):
        assert picture.tags[:2] == ("by micah", "hina")
        assert not set(pictures.CHARACTERS["hina"].values()) & set(picture.tags)
    [pair] = pictures.portraits(["hina", "taro"], ["micah"], 1, seed=0)
    assert pair.image.size == (64, 64)
    assert {"hina", "taro"} <= set(pair.tags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", judge.KINDS)
def test_judges_tell_styles_and_characters_they_were_not_shown(kind: judge.Kind):
    styles = ["micah", "pixel-art", "dylan"]
    learned = judge.fit(styles, 0, characters=["hina"], kind=kind, count=60, plan=replace(judge.PLAN, steps=150))
    held_out = judge.examples(styles, ["hina"], 20, 0, "test")
    assert learned.accuracy(held_out) > 0.95
    scores = learned.scores(pixels(held_out))[:, -1]
    shown = torch.tensor([bool(p.names) for p in held_out])
    order = torch.stack([(s > scores[~shown]).float().mean() for s in scores[shown]])
    assert order.mean() > 0.9


@pytest.mark.slow
def test_demo_command_leaves_its_files_and_may_be_called_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topology, "draw", lambda size, seed: TINY)
    monkeypatch.setattr(demo, "demo", partial(demo.demo, steps=2))
    small = Experiment(training=Lessons(steps=2, pictures=4, batch=2), measures=Measures(2, 1, 2, steps=2))
    monkeypatch.setattr(demo, "EXPERIMENT", small)
    monkeypatch.setattr(judge, "PLAN", Plan(steps=5, lr=1e-3, batch=4))
    assert [cli._exit_code(["demo", "-q", "-o", str(folder)]) for _ in range(2)] == [0, 0]
    for picture in ("samples.png", "merge/samples.png", "loha/samples.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "world.json").read_text(encoding="utf-8")) == topology.to_json(TINY)
    assert "Micah Lanier" in (folder / "CREDITS.md").read_text(encoding="utf-8")
    found = load_json(folder / "svd" / "result.json")
    assert found["summary"]["components"]["vae"]["frobenius"] == 0
    assert (folder / "merge" / "mixed.safetensors").read_bytes() == world.model_file(folder, "mixed").read_bytes()
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert found["summary"]["answer"] in page
    for name in ("svd", "cluster", "merge", "transfer-test"):
        assert f'href="{name}/report.html"' in page
        assert "</html>" in (folder / name / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_world_command_says_what_the_judge_sees(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(topology, "draw", lambda size, seed: TINY)
    monkeypatch.setattr(judge, "PLAN", Plan(steps=5, lr=1e-3, batch=4))
    assert cli._exit_code(["world", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "held-out pictures" in out
    assert out.splitlines()[-1].endswith("tuned")
