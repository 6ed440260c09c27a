"""Transfer experiments on files of one's own: found, checked before any training, measured, judged by image models."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_world import SMALL, TINY

import cli
from lineage.errors import LineageError
from lineage.results import load_json
from train import lessons, pictures, transfer, world
from train.experiment import Experiment
from train.image_judge import ImageJudge, references

LESSON = """
[model]
base = "replaced.safetensors"
[data]
folder = "replaced"
resolution = 64
bucket_min = 64
bucket_max = 64
trigger_words = ["by personas"]
{data}
[network]
dim = 2
[training]
steps = 2
batch = 2
optimizer = "adamw"
lr = 1e-3
"""
EXPERIMENT = """
[files]
models = "models"
bases = ["base", "tuned"]
apply = ["mixed"]
lesson = "lesson.toml"
judges = [{judges}]
references = "references"
own = "own"
[targets.personas]
kind = "style"
pictures = "pictures"
held_out = "held-out"
prompts = ["by personas, smile"]
[training]
seeds = [0]
[secondary]
networks = ["locon"]
setups = ["no tags", "other clip skip"]
bases = 1
models = 2
[measures]
held_out = 3
draws = 1
drawn = 2
steps = 2
"""


def clip(folder: Path) -> Path:
    """A CLIP of random weights."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=small, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def dino(folder: Path) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(1)
    Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    ).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, pictures, references and image models of one's own."""
    home = tmp_path_factory.mktemp("own")
    world.build(replace(TINY, size=replace(SMALL, text_layers=2)), home / "world")
    for name in ("models", "config"):
        shutil.copytree(home / "world" / name, home / name)
    for name, part in (("pictures", "lesson"), ("held-out", "test")):
        lessons.write_pictures(home / name, "personas", pictures.gallery(["personas"], 4, 0, part))
    lessons.write_pictures(home / "own" / "base", "micah", pictures.gallery(["micah"], 3, 0, "test"))
    for style in ("personas", "micah", "dylan"):
        (home / "references" / style).mkdir(parents=True)
        for n, shown in enumerate(pictures.gallery([style], 3, 0, "references")):
            shown.image.save(home / "references" / style / f"{n}.png")
    clip(home / "clip"), dino(home / "dino")
    (home / "lesson.toml").write_text(LESSON.format(data="clip_skip = 1"), encoding="utf-8")
    judges = '"clip:clip", "dino:dino"'
    (home / "experiment.toml").write_text(EXPERIMENT.format(judges=judges), encoding="utf-8")
    return home


@pytest.fixture(scope="module")
def done(made: Path) -> Path:
    assert cli._exit_code(["transfer-test", str(made / "experiment.toml"), "-o", str(made / "out"), "-q"]) == 0
    return made / "out"


def changed(made: Path, tmp_path: Path, old: str, new: str, name: str = "experiment.toml") -> Experiment:
    """The experiment with one thing changed, its files where they are."""
    for item in made.iterdir():
        if item.name not in (name, "out"):
            (tmp_path / item.name).symlink_to(item)
    text = (made / name).read_text("utf-8")
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new), encoding="utf-8")
    return Experiment.read(tmp_path / "experiment.toml")


def test_every_adapter_is_put_on_every_model_and_judged_by_all(done: Path):
    cells = load_json(done / "result.json")["cells"]
    usual = [c for c in cells if c["network"] == "loha" and c["setup"] == "default" and c["weight"] == 0.65]
    pairs = {(c["base"], c["model"]) for c in usual if c["base"] != c["model"]}
    assert pairs == {("base", "tuned"), ("base", "mixed"), ("tuned", "base"), ("tuned", "mixed")}
    own = {c["model"] for c in cells if c["base"] == c["model"] and c["weight"] == 1}
    assert own == {"base", "tuned", "mixed"}  # what is only applied to has its own adapter as a reference
    for cell in cells:
        assert math.isfinite(cell["loss"])
        assert (cell["own_loss"] is not None) == (cell["model"] == "base")
        assert set(cell["strength_judges"]) == {"clip clip", "dino dino"}
        assert set(cell["retention_judges"]) == (set() if cell["base"] is None else set(cell["strength_judges"]))
    secondary = {(c["network"], c["setup"], c["base"], c["model"]) for c in cells if c["base"]} - {
        (n, "default", x, y) for n in ("loha", "random") for x in own for y in own
    }
    ways = [("locon", "default"), ("loha", "no tags"), ("loha", "other clip skip")]
    assert secondary == {(*way, "base", y) for way in ways for y in ("base", "tuned")}
    page = (done / "report.html").read_text("utf-8")
    assert "</html>" in page
    assert "iniature" not in page


def test_untouched_models_look_like_themselves(done: Path):
    """Weight 0 of any adapter: retention 1, by construction of the measure; here by the adapter that does least."""
    cells = load_json(done / "result.json")["cells"]
    kept = [v for c in cells if c["base"] for v in c["retention_judges"].values()]
    assert kept
    assert all(-1 <= v <= 1 for v in kept)
    assert max(kept) > 0.9


def test_the_family_is_what_weights_tell(done: Path):
    [facts] = load_json(done / "result.json")["worlds"]
    members = {m["name"]: m for m in facts["models"]}
    assert {m["root"] for m in members.values() if m["name"] in ("base", "tuned", "mixed")} == {members["base"]["root"]}
    assert members["mixed"]["use"] == "apply"
    assert members["tuned"]["use"] == "base"


@pytest.mark.parametrize("make", [clip, dino])
def test_a_judge_knows_the_pictures_it_was_shown(made: Path, tmp_path: Path, make):
    shown = references(made / "references", ["personas"])
    judge = ImageJudge(make(tmp_path / "model"), {name: files[:1] for name, files in shown.items()})
    from train.images import read_pixels

    stack = torch.stack([read_pixels(files[0], (64, 64)) for files in shown.values()])
    assert judge.scores(stack).argmax(1).tolist() == [0, 1, 2]
    assert judge.scores(stack).abs().max() <= 1 + 1e-5


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('bases = ["base", "tuned"]', 'bases = ["bas"]', "'bas': no model in .* Did you mean base"),
        ('bases = ["base", "tuned"]', "bases = []", "files.bases: name at least one"),
        ('held_out = "held-out"', 'held_out = "nowhere"', "nowhere: cannot be read as a folder"),
        ('kind = "style"', 'kind = "look"', "targets.personas.kind: 'look' is not known"),
        ("[targets.personas]", '[targets."../x"]', r"targets: '\.\./x' cannot be part of a file's name"),
        ('"clip:clip"', '"blip:clip"', "files.judges: 'blip:"),
        ('"clip:clip"', '"clip:pictures"', "is no image model of transformers"),
        ('references = "references"', "", "the judges need a folder"),
        ('references = "references"', 'references = "own"', "no pictures of 'personas'"),
        ("seeds = [0]", "seeds = [0]\nsteps = 3", "steps: .files. takes that from files.lesson"),
        ("seeds = [0]", "seeds = [0]\n[worlds]\nsize = 'small'", "worlds: .files. takes that from files.lesson"),
        ('"no tags"', '"no tag"', "secondary.setups: 'no tag' is not known. Did you mean"),
        ('"no tags"', '"regularisation"', "files.regularisation: the setup 'regularisation' needs that folder"),
        ('lesson = "lesson.toml"', "", "files.lesson is missing"),
    ],
)
def test_what_is_wrong_is_named_before_anything_is_trained(made: Path, tmp_path: Path, old: str, new: str, said: str):
    with pytest.raises(LineageError, match=said):
        transfer.transfer_test(changed(made, tmp_path, old, new), tmp_path / "out")
    assert not (tmp_path / "out" / "adapters").exists()


def test_clip_skip_is_2_unless_the_lesson_says_otherwise(made: Path, tmp_path: Path):
    assert Experiment.read(made / "experiment.toml").training.clip_skip == 1
    assert changed(made, tmp_path, "clip_skip = 1", "", "lesson.toml").training.clip_skip == 2


def test_another_lesson_is_another_experiment(made: Path, done: Path, tmp_path: Path):
    other = changed(made, tmp_path, "lr = 1e-3", "lr = 2e-3", "lesson.toml")
    with pytest.raises(LineageError, match="holds another experiment"):
        transfer.transfer_test(other, done)


def test_a_model_that_was_exchanged_since_is_refused(made: Path, done: Path, tmp_path: Path):
    again = tmp_path / "out"
    shutil.copytree(done, again)
    next(again.glob("cells/*/*/base-0.json")).unlink()
    file = again / "predictions" / "models.json"
    told = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(told | {"models": told["models"] | {"mixed": "0" * 64}}), encoding="utf-8")
    with pytest.raises(LineageError, match="mixed: is no longer the model"):
        transfer.transfer_test(Experiment.read(made / "experiment.toml"), again)


def test_hours_are_known_when_a_job_is_done(made: Path, done: Path, tmp_path: Path):
    experiment = Experiment.read(made / "experiment.toml")
    told = {what.split(":")[0].split(" by")[0]: n for n, what in transfer.forecast(experiment, tmp_path)}
    assert told["hours"] == "?"
    after = [what for _, what in transfer.forecast(experiment, done)]
    assert any("hours by one worker" in what for what in after)
    [left] = [n for n, what in transfer.forecast(experiment, done) if "left to do" in what]
    assert left == "0"
    assert json.loads(next((done / "cells").rglob("base-0.json")).read_text("utf-8"))["seconds"] > 0
