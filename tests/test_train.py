"""Laws of training: it learns, repeats, resumes to the bit, leaves the base alone, and says what its files are."""

import itertools
import json
import multiprocessing
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import config

import lineage
from lineage.adapters import bind
from lineage.errors import LineageError
from lineage.hashing import sha256
from train.config import Config
from train.data import Batch
from train.kohya import from_kohya
from train.loop import Record, Training, denoising_errors, randomness, train
from train.models import Text
from train.rate_sweep import find_lr
from train.rates import RatePoint, rising, suggestion
from train.runs import LOG

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("no_sync")


def finish(config: Config) -> list[Record]:
    return list(train(config, device="cpu"))


def left_by(config: Config) -> dict[str, bytes]:
    """All files of a run but its settings, which name its folder, and the log, which tells times."""
    files = (f for f in sorted(config.save.folder.rglob("*")) if f.is_file())
    return {f.name: f.read_bytes() for f in files if f.name not in (LOG, "config.toml")}


def started(folder: Path, **changes: Any) -> Training:
    return Training(config(folder, **changes), CPU, None)


def parts(batch: Batch) -> list[Batch]:
    """A batch of four as one of one and one of three."""
    cut = [slice(0, 1), slice(1, 4)]
    return [Batch(batch.pictures[c], batch.flips[c], batch.captions[c], batch.weights[c]) for c in cut]


def test_training_lowers_the_loss_of_its_pictures(tmp_path: Path):
    run = started(tmp_path, training__steps=25, training__batch=4, training__lr=0.03)
    batch = run.batches()[0]

    def judged() -> float:
        with torch.no_grad():
            return float(torch.cat([run.loss(batch, 0, 10 * i) for i in range(4)]).mean())

    before = judged()
    for _ in range(25):
        run.advance()
    assert judged() < 0.9 * before


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_stopped_run_ends_with_the_same_bits(kind: str, tmp_path: Path):
    more: dict[str, Any] = {
        "sample__prompts": ("red shirt",),
        "sample__at": (3,),
        "save__at": (3,),
        "network__pivotal": ("OyamaMahiro",),
        "data__shuffle": True,
        "data__caption_dropout": 0.2,
        "data__flip": True,
        "training__scheduler": "cosine",
        "training__accumulation": 2,
    }
    whole, parts = (config(tmp_path, kind, **more, save__folder=tmp_path / name) for name in ("whole", "parts"))
    taken = []
    for last in (1, 3, 4):
        run = train(parts, device="cpu")
        taken += [next(run) for _ in range(last - len(taken))]
        run.close()
    taken += finish(parts)
    assert [(r.step, r.loss, r.lr) for r in taken] == [(r.step, r.loss, r.lr) for r in finish(whole)]
    assert left_by(parts) == left_by(whole)
    assert len(left_by(whole)) == 6  # two adapters, two embeddings, two samples; no state
    assert steps_logged(parts) == [1, 2, 3, 4, 5, 6]


def steps_logged(config: Config) -> list[int]:
    return [json.loads(line)["step"] for line in (config.save.folder / LOG).read_text(encoding="utf-8").splitlines()]


PLACES = (
    "lineage.target:os.replace",
    "lineage.results:_write_synced",
    "train.loop:Training._move",
    "train.runs:RunFolder.log",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_breaks_anywhere_goes_on(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    more: dict[str, Any] = {"sample__prompts": ("red shirt",), "save__every": 2, "training__steps": 4}
    whole, broken = (config(tmp_path, **more, save__folder=tmp_path / name) for name in "ab")
    finish(whole)
    for calls in (0, 2):
        with monkeypatch.context() as patch:
            break_after(calls, place, patch)
            with pytest.raises(KeyboardInterrupt):
                finish(broken)
    finish(broken)
    assert left_by(broken) == left_by(whole)
    assert steps_logged(broken) == steps_logged(whole)


def break_after(calls: int, place: str, patch: pytest.MonkeyPatch) -> None:
    """`place` works so many times, then raises as Ctrl-C would in the midst of it."""
    works, left = resolve_name(place), itertools.count(calls, -1)

    def breaking(*args, **kwargs):
        if next(left) <= 0:
            raise KeyboardInterrupt
        return works(*args, **kwargs)

    patch.setattr(place.replace(":", "."), breaking)


def killed_runs(folder: Path, kills: int) -> None:
    """Start a run, kill -9 it at a random moment, and so on; then let it end."""
    whole, killed = (
        config(folder, sample__prompts=("red shirt",), save__every=2, save__folder=folder / n) for n in "ab"
    )
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    processes: Any = multiprocessing.get_context(method)
    processes.set_forkserver_preload(["train.loop", "diffusers", "transformers", "bitsandbytes"])

    def process(config: Config, wait: float | None = None) -> float:
        begun = time.perf_counter()
        worker = processes.Process(target=finish, args=(config,))
        worker.start()
        worker.join(wait)
        worker.kill()
        worker.join()
        return time.perf_counter() - begun

    process(replace(whole, save=replace(whole.save, folder=folder / "c")))  # starts the server
    lasts = process(whole)
    moments = random.Random(kills)
    for _ in range(kills):
        process(killed, moments.uniform(0.3, 1.0) * lasts)
    process(killed)
    assert left_by(killed) == left_by(whole)
    assert len(left_by(whole)) == 4
    assert steps_logged(killed) == steps_logged(whole)


def test_killed_three_times_it_ends_with_the_same_bits(tmp_path: Path):
    killed_runs(tmp_path, 3)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(tmp_path: Path):
    killed_runs(tmp_path, 20)


def test_a_run_that_is_done_does_nothing(tmp_path: Path):
    settings = config(tmp_path, training__steps=2)
    assert len(finish(settings)) == 2
    before = left_by(settings)
    assert finish(settings) == []
    assert left_by(settings) == before


def test_a_run_of_relative_paths_is_the_same_run_again(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = config(Path(), training__steps=1)
    assert not settings.model.base.is_absolute()
    assert len(finish(settings)) == 1
    assert finish(settings) == []
    monkeypatch.chdir(tmp_path.parent)
    assert finish(config(tmp_path, training__steps=1)) == []


def test_another_run_in_the_folder_is_refused(tmp_path: Path):
    finish(config(tmp_path, training__steps=1))
    with pytest.raises(LineageError, match=r"training\.lr is 0\.01 there and 0\.02 here.*another folder"):
        finish(config(tmp_path, training__steps=1, training__lr=0.02))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(LineageError, match="not empty and not the folder of a training run"):
        finish(config(tmp_path, save__folder=tmp_path / "mine"))


def test_a_run_moved_elsewhere_goes_on(tmp_path: Path):
    settings = config(tmp_path)
    run = train(settings, device="cpu")
    next(run)
    run.close()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert [r.step for r in finish(config(tmp_path, save__folder=tmp_path / "moved"))] == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("part", ["base", "data"])
def test_a_run_whose_base_or_pictures_changed_is_refused(part: str, tmp_path: Path):
    settings = config(tmp_path)
    run = train(settings, device="cpu")
    next(run)
    run.close()
    if part == "base":
        lineage.apply(settings.model.base, {}, tmp_path / "other.safetensors", half=True)
        (tmp_path / "other.safetensors").replace(settings.model.base)
    else:
        (tmp_path / "data" / "1_others" / "green.txt").write_text("another caption", encoding="utf-8")
    with pytest.raises(LineageError, match=f"The {part} changed since step 1"):
        finish(settings)


def test_every_picture_of_every_step_has_its_own_noise():
    drawn = {
        (seed, step, picture): randomness(seed, step, picture, (4, 2, 2), 1000)
        for seed, step, picture in itertools.product(range(2), range(3), range(4))
    }
    assert len({tuple(noise.flatten().tolist()) for _, noise in drawn.values()}) == len(drawn)
    assert len({int(t) for t, _ in drawn.values()}) > len(drawn) // 2
    for key, (t, noise) in drawn.items():
        again = randomness(*key, (4, 2, 2), 1000)
        assert int(again[0]) == int(t)
        assert torch.equal(again[1], noise)


def test_regularisation_weighs_as_much_as_it_is_told(tmp_path: Path):
    run = started(tmp_path)
    batch = run.batches()[0]
    plain, weighed = (run.loss(replace(batch, weights=w), 1, 0) for w in (torch.ones(2), torch.tensor([1.0, 0.25])))
    torch.testing.assert_close(weighed, plain * torch.tensor([1.0, 0.25]))


def test_gradients_are_clipped_to_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = started(tmp_path, training__clip_grad=1e-3, training__optimizer="adamw")
    seen = []
    norm = torch.nn.utils.get_total_norm
    monkeypatch.setattr(
        run.optimizer, "step", lambda: seen.append(norm([p.grad for p in run.parameters if p.grad is not None]))
    )
    run.advance()
    assert float(seen[0]) == pytest.approx(1e-3, rel=1e-3)


def test_a_step_in_parts_is_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Training, "_move", lambda run: None)
    cut, uncut = (started(tmp_path, training__batch=4) for _ in "ab")
    batch = next(b for b in iter(lambda: uncut.batches()[0], None) if len(b) == 4)
    losses = [run.descend(1) for run in (feeding(uncut, [batch]), feeding(cut, parts(batch)))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gradients = [torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None]) for run in (cut, uncut)]
    assert float((gradients[0] - gradients[1]).norm() / gradients[1].norm()) < 1e-5


def feeding(run: Training, batches: list[Batch]) -> Training:
    run.batches = lambda: batches
    return run


@pytest.mark.parametrize("learns", ["unet", "text_encoder", "words"])
def test_each_part_learns_at_its_own_rate(learns: str, tmp_path: Path):
    """The first step of AdamW moves what has a gradient by its rate."""
    rates = {"unet": 3e-3, "text_encoder": 2e-4, "words": 5e-2}
    run = started(
        tmp_path,
        training__optimizer="adamw",
        training__weight_decay=0.0,
        training__unet_lr=rates["unet"],
        training__text_encoder_lr=rates["text_encoder"],
        training__pivotal_lr=rates["words"],
        network__pivotal=("plain1x", "OyamaMahiro"),
        data__prune={},
    )
    assert run.words
    parts = run.words.parameters() if learns == "words" else run.network.parameters(learns)
    before = [p.detach().clone() for p in parts]
    batch = run.batches()[0]
    feeding(run, [replace(batch, captions=tuple("OyamaMahiro, smile" for _ in batch.captions))]).advance()
    moved = torch.cat([(p.detach() - b).abs().flatten() for p, b in zip(parts, before, strict=True)])
    assert float(moved.max()) == pytest.approx(rates[learns], rel=1e-2)


def test_the_frozen_base_stays_bit_for_bit(tmp_path: Path):
    run = started(tmp_path, network__pivotal=("OyamaMahiro",))
    digest = sha256(run.config.model.base)
    modules = [run.base.unet, run.base.vae, *run.base.text_encoders]
    before = [{n: t.clone() for n, t in module.state_dict().items()} for module in modules]
    for _ in range(3):
        run.advance()
    for module, state in zip(modules, before, strict=True):
        learned = {n for n, t in module.state_dict().items() if not torch.equal(t, state[n])}
        assert learned <= {"embeddings.token_embedding.new", "text_model.embeddings.token_embedding.new"}
    assert run.words
    run.words.remove()
    run.network.remove()
    assert not any("new" in n for module in modules for n in module.state_dict())
    assert sha256(run.config.model.base) == digest


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_what_the_base_predicts(prediction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A UNet that knows the answer has no error; one that answers the other question has some."""
    run = started(tmp_path, model__prediction=prediction)
    x, noise, t = torch.randn(3, 4, 16, 16), torch.randn(3, 4, 16, 16), torch.tensor([10, 500, 900])
    a = run.base.schedule.alphas_cumprod[t][:, None, None, None]
    answers = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x}
    for question, answer in answers.items():
        monkeypatch.setattr(run.base, "predict", lambda *_, answer=answer: answer)
        errors = denoising_errors(run.base, x, Text(torch.empty(0)), t, noise)
        assert bool((errors < 1e-9).all()) == (question == prediction)


def test_gradient_checkpointing_changes_no_step(tmp_path: Path):
    losses = [
        [run.advance().loss for _ in range(3)]
        for run in (started(tmp_path, training__gradient_checkpointing=on) for on in (True, False))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_single(precision: str, tmp_path: Path):
    half, single = (started(tmp_path, training__precision=p) for p in (precision, "fp32"))
    assert half.advance().loss == pytest.approx(single.advance().loss, rel=2e-2)
    assert {p.dtype for p in half.parameters} == {torch.float32}
    assert half.base.unet.dtype != torch.float32
    assert half.base.vae.dtype == torch.float32


def test_kept_text_is_what_would_be_encoded(tmp_path: Path):
    kept, anew = (started(tmp_path, network__text_encoder=False, data__cache_text=c) for c in (True, False))
    assert [kept.advance().loss for _ in range(4)] == pytest.approx([anew.advance().loss for _ in range(4)], rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path):
    with pytest.raises(LineageError, match=r"loss of step \d+ is .*training\.lr"):
        finish(config(tmp_path, training__lr=1e30, training__optimizer="adamw", training__clip_grad=0.0))


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_files_are_read_by_this_toolkit_and_name_their_parent(kind: str, tmp_path: Path):
    settings = config(tmp_path, kind, training__steps=2, network__pivotal=("OyamaMahiro",), network__pivotal_vectors=2)
    finish(settings)
    adapter = lineage.open_adapter(settings.save.folder / f"{settings.name}.safetensors")
    with lineage.open_checkpoint(settings.model.base) as base:
        bound, unmatched = bind(adapter, base.specs)
    assert unmatched == []
    assert len(bound) == len(adapter.modules) > 0
    assert adapter.metadata["ss_new_sd_model_hash"] == sha256(settings.model.base)
    assert adapter.metadata["ss_steps"] == "2"
    assert json.loads(adapter.metadata["ss_dataset_dirs"])["1_others"] == {"n_repeats": 1, "img_count": 2}
    assert json.loads(adapter.metadata["ss_tag_frequency"])["1_others"]["plain"] == 2
    words = load_file(settings.save.folder / "OyamaMahiro.safetensors")
    shapes = {"sdxl": {"clip_l": (2, 16), "clip_g": (2, 16)}}.get(kind, {"emb_params": (2, 16)})
    assert {name: tuple(t.shape) for name, t in words.items()} == shapes
    lineage.apply(settings.model.base, {str(adapter.path): 1.0}, tmp_path / "applied.safetensors")
    assert sha256(tmp_path / "applied.safetensors") != sha256(settings.model.base)


def test_metadata_turns_into_the_settings_again(tmp_path: Path):
    settings = config(
        tmp_path,
        training__steps=1,
        training__optimizer="adamw8bit",
        training__weight_decay=0.02,
        training__scheduler="cosine",
        training__warmup=1,
        training__unet_lr=3e-3,
        training__accumulation=2,
        training__precision="bf16",
        training__seed=3,
        network__conv_alpha=2.0,
        data__keep_tokens=2,
        data__tag_dropout=0.1,
        data__shuffle=True,
        data__clip_skip=2,
        save__name="named",
    )
    finish(settings)
    again = from_kohya(tmp_path / "run" / "named.safetensors").config
    assert again.network == settings.network
    assert replace(again.training, text_encoder_lr=None) == settings.training
    assert again.text_encoder_lr == settings.text_encoder_lr
    assert replace(again.data, folder=settings.data.folder, reg=None) == settings.data


def test_new_words_are_read_whole_and_nothing_else_changes(tmp_path: Path):
    run = started(tmp_path, network__pivotal=("OyamaMahiro",), network__pivotal_vectors=3, network__pivotal_init="red")
    plain = started(tmp_path)
    ids = run.base.tokens(["smile, oyamamahiro, red", "OyamaMahiros"])[0]
    first, smile, comma, red, last = plain.base.tokens(["smile, red"])[0][0, :5].tolist()
    assert ids[0, :9].tolist() == [first, smile, comma, 49408, 49409, 49410, comma, red, last]
    assert torch.equal(ids[1:], plain.base.tokens(["OyamaMahiros"])[0])
    assert torch.equal(run.base.encode_text(["smile"]).states, plain.base.encode_text(["smile"]).states)
    start = run.base.text_encoders[0].get_input_embeddings()(torch.tensor([red, 49408, 49409, 49410]))
    assert all(torch.equal(row, start[0]) for row in start[1:])
    assert run.words
    (learned,) = run.words.parameters()
    torch.nn.init.normal_(learned, generator=torch.Generator().manual_seed(0))
    found = run.base.text_encoders[0].get_input_embeddings()(torch.tensor([49410, 49408, 49409]))
    assert torch.equal(found, learned[[2, 0, 1]])
    assert torch.equal(run.words.tensors()["OyamaMahiro"]["emb_params"], learned)


@pytest.mark.parametrize("word", ["cat", "two words", ""])
def test_what_cannot_be_a_new_word_is_refused(word: str, tmp_path: Path):
    with pytest.raises(LineageError, match=r"network\.pivotal"):
        started(tmp_path, network__pivotal=(word,))


def test_an_unknown_device_is_named(tmp_path: Path):
    with pytest.raises(LineageError, match=r"nonsense.*--device cpu"):
        list(train(config(tmp_path), device="nonsense"))


@pytest.mark.parametrize("best", [1e-4, 3e-3])
def test_the_suggested_rate_is_where_the_loss_falls_steepest(best: float):
    """Loss: a step down around `best` per decade, then up again."""
    from math import exp, log10

    points = [
        RatePoint(r, 1 - 0.5 / (1 + exp(-6 * (log10(r) - log10(best)))) + 2 * max(0.0, log10(r) - log10(best) - 1.5))
        for r in rising(1e-7, 1.0, 140)
    ]
    found = suggestion(1.0, points)
    assert found is not None
    assert 0.8 < found / best < 1.25


def test_no_rate_is_suggested_where_none_helps():
    assert suggestion(1.0, [RatePoint(r, 1.0 + 10 * r) for r in rising(1e-6, 1e-1, 50)]) is None


@pytest.fixture
def toml(tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        file = tmp_path / "config.toml"
        file.write_text(config(tmp_path, **changes).to_toml(), encoding="utf-8")
        return file

    return write


def test_the_command_trains_then_says_done(call, toml, tmp_path: Path):
    code, out, err = call(
        "train", toml(), "-o", tmp_path / "out", "--set", "training.steps=3", "--json", "--device", "cpu"
    )
    assert (code, [json.loads(line)["step"] for line in out.splitlines()]) == (0, [1, 2, 3])
    assert "Written" in err
    assert (tmp_path / "out" / "config.toml").exists()
    code, out, err = call("train", toml(), "-o", tmp_path / "out", "--set", "training.steps=3")
    assert (code, out) == (0, "")
    assert "Done already" in err
    code, _, err = call("train", toml(), "-o", tmp_path / "out", "--set", "training.steps=4")
    assert code == 2
    assert "training.steps is 3 there and 4 here" in err


def test_ctrl_c_ends_the_step_and_the_same_command_goes_on(call, toml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    move = Training._move

    def pressed(run: Training) -> None:
        if run.step == 2:
            signal.raise_signal(signal.SIGINT)
        move(run)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_move", pressed)
        code, _, err = call("train", toml(), "--device", "cpu")
    assert code == 130
    assert "Interrupted" in err
    code, out, _ = call("train", toml(), "--device", "cpu", "--json")
    assert (code, [json.loads(line)["step"] for line in out.splitlines()]) == (0, [4, 5, 6])


def test_find_lr_writes_its_page_and_no_run(call, toml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("train.rate_sweep.find_lr", partial(find_lr, steps=20))
    code, out, _ = call("train", toml(training__optimizer="adamw"), "--find-lr", "--json", "--device", "cpu")
    result = json.loads(out)
    assert code == 0
    assert result["kind"] == "rates"
    assert len(result["points"]) > 10
    assert result["lowest"] is None or result["suggestion"] <= result["lowest"]
    assert (tmp_path / "run-rates" / "report.html").exists()
    assert not (tmp_path / "run").exists()
    code, _, err = call("train", toml(), "--find-lr")
    assert (code, "--force" in err) == (2, True)
    code, _, err = call("train", toml(training__optimizer="prodigy", training__lr=1.0), "--find-lr", "--force")
    assert code == 2
    assert "finds the learning rate itself" in err


def test_a_dry_run_tells_and_writes_nothing(call, toml, tmp_path: Path):
    code, out, _ = call("train", toml(), "--dry-run")
    assert code == 0
    assert "3 steps per epoch" in out
    assert "plain" in out
    assert "Memory" in out
    assert not (tmp_path / "run").exists()


def test_an_adapter_turns_into_settings_that_can_be_read(call, toml, tmp_path: Path):
    assert call("train", toml(training__steps=1, save__name="named"), "--device", "cpu")[0] == 0
    code, out, err = call("train", "--from-kohya", tmp_path / "run" / "named.safetensors")
    assert code == 0
    assert "Ignored: " in err
    assert Config.parse(out, tmp_path).network == config(tmp_path).network
    code, _, err = call("train")
    assert code == 2
    assert "--from-kohya" in err


def test_the_lack_of_a_package_names_the_extra(call, toml, monkeypatch: pytest.MonkeyPatch):
    file = toml()
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d_condition", None)
    code, _, err = call("train", file, "--device", "cpu")
    assert code == 2
    assert "needs diffusers: pip install 'model-lineage[train]'" in err
