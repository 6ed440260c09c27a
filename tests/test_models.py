"""Laws of opening a base: whatever its layout, it is what diffusers makes of it; what cannot be trained is refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from stable_diffusion import full
from training_bases import KINDS, parts, published, write_config, write_file, write_folder

from lineage.errors import FileError, LineageError
from train import architectures
from train.config import ModelConfig
from train.models import Base, open_base
from train.pipeline import quiet

PROMPTS = ["red hair, smile", "by micah"]


def opened(path: Path, **settings) -> Base:
    return open_base(ModelConfig(path, **{"prediction": "epsilon", **settings}))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: write_file(folder / kind / "base.safetensors", kind) for kind in KINDS}


def peer(base: Base, **scheduler: Any) -> Any:
    """diffusers' own pipeline over the same modules."""
    settings = {**architectures.SCHEDULE, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}
    settings.pop("num_train_timesteps")
    names = ("", "_2")[: len(base.text_encoders)]
    own = {f"text_encoder{n}": e for n, e in zip(names, base.text_encoders, strict=True)}
    own |= {f"tokenizer{n}": t for n, t in zip(names, base.tokenizers, strict=True)}
    own |= {"unet": base.unet, "vae": base.vae, "scheduler": DDIMScheduler(**{**settings, **scheduler})}
    with quiet():
        from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
        from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

        if base.architecture == "sdxl":
            made: Any = StableDiffusionXLPipeline(**own)
        else:
            absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
            made = StableDiffusionPipeline(**own, **absent, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_arrives_from_a_file_and_from_a_folder(kind: str, bases: dict[str, Path], tmp_path: Path):
    wanted = parts(kind)
    for path in (bases[kind], write_folder(tmp_path / "folder", kind)):
        base = opened(path)
        assert base.architecture == kind
        found = [base.unet, base.vae, *base.text_encoders]
        for module, own in zip(found, wanted.values(), strict=True):
            assert module.state_dict().keys() == own.state_dict().keys()
            assert all(torch.equal(t, own.state_dict()[n]) for n, t in module.state_dict().items())
            assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_read_as_diffusers_reads_it(kind: str, bases: dict[str, Path]):
    base = opened(bases[kind])
    found = base.encode_text(PROMPTS)
    theirs = encode_prompt(peer(base))
    assert torch.equal(found.states, theirs[0])
    pooled = found.pooled
    assert pooled is None if kind != "sdxl" else pooled is not None and torch.equal(pooled, theirs[2])


@pytest.mark.parametrize("kind", KINDS)
def test_clip_skip_2_is_the_encoder_without_its_last_layer(kind: str, bases: dict[str, Path]):
    base = opened(bases[kind])
    found = base.encode_text(PROMPTS, clip_skip=2)
    for encoder in base.text_encoders:
        inner = getattr(encoder, "text_model", encoder)
        inner.encoder.layers = inner.encoder.layers[:-1]
    assert torch.equal(found.states, encode_prompt(peer(base))[0])


def encode_prompt(pipeline: Any) -> Any:
    return pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prediction", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_pictures_are_those_of_diffusers(kind: str, prediction: str, zero: bool, bases: dict[str, Path]):
    base = opened(bases[kind], prediction=prediction, zero_terminal_snr=zero)
    spacing = "trailing" if zero else "leading"
    made = peer(base, prediction_type=prediction, rescale_betas_zero_snr=zero, timestep_spacing=spacing)
    theirs = made(
        PROMPTS[0],
        negative_prompt="frown",
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="pt",
    ).images[0]
    mine = base.draw(PROMPTS[:2], "frown", seeds=[7, 8], steps=3, guidance=5.0, size=(32, 48))
    torch.testing.assert_close(mine[0], theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(mine[1], theirs, atol=1e-2)


def test_markers_of_the_base_decide(tmp_path: Path):
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    base = open_base(ModelConfig(write_file(tmp_path / "base.safetensors", "sd1", marks)))
    assert base.v
    assert base.zero_terminal_snr
    assert float(base.schedule.alphas_cumprod[-1]) < 1e-6
    plain = open_base(ModelConfig(base.path, prediction="epsilon", zero_terminal_snr=False))
    assert not plain.v
    assert float(plain.schedule.alphas_cumprod[-1]) > 1e-3


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_v_is_the_velocity_between_noise_and_latents(kind: str, bases: dict[str, Path]):
    base = opened(bases[kind], prediction="v_prediction")
    x, noise, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 500, 999])
    a = base.schedule.alphas_cumprod[t][:, None, None, None]
    v = base.target(x, noise, t)
    torch.testing.assert_close(v, a.sqrt() * noise - (1 - a).sqrt() * x)
    torch.testing.assert_close(a.sqrt() * base.schedule.add_noise(x, noise, t) - (1 - a).sqrt() * v, x)
    assert opened(bases[kind]).target(x, noise, t) is noise


def test_an_sd2_that_does_not_say_what_it_predicts_is_asked_about(bases: dict[str, Path]):
    with pytest.raises(LineageError, match=r"model\.prediction"):
        open_base(ModelConfig(bases["sd2"]))


def test_another_autoencoder_takes_its_place(bases: dict[str, Path], tmp_path: Path):
    other = {n: torch.full_like(t, 0.5) for n, t in parts("sd1")["vae"].state_dict().items()}
    save_file(other, tmp_path / "vae.safetensors")
    base = opened(bases["sd1"], vae=tmp_path / "vae.safetensors")
    assert all(bool((t == 0.5).all()) for t in base.vae.state_dict().values())


def test_a_file_without_its_configuration_is_told_apart_from_the_published_ones(tmp_path: Path, bases: dict[str, Path]):
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(bases["sd1"].read_bytes())
    with pytest.raises(FileError, match=r"published SD1 configuration.*--config DIR"):
        opened(alone)
    assert opened(alone, config=bases["sd1"].parent / "config").architecture == "sd1"


def test_no_tokenizer_names_both_ways(tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    config = write_config(tmp_path / "config", parts("sd1"))
    for file in (config / "tokenizer").iterdir():
        file.unlink()
    (tmp_path / "base.safetensors").write_bytes(bases["sd1"].read_bytes())
    assert opened(tmp_path / "base.safetensors").tokens(["a cat"])[0][0, :3].tolist() == [49406, 320, 2368]
    ends = {kind: [int(ids[0, -1]) for ids in filled(kind)] for kind in KINDS}
    assert ends == {"sd1": [49407], "sd2": [0], "sdxl": [49407, 0]}  # as the published tokenizers fill up
    monkeypatch.setattr(architectures, "_built", lambda: None)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(LineageError, match=r"--config DIR.*hub"):
        opened(tmp_path / "base.safetensors")


def filled(kind: str) -> list[torch.Tensor]:
    """Token numbers by tokenizers that no folder brings."""
    made = architectures.tokenizers(kind, [])
    return [t(["a cat"], padding="max_length", max_length=77, return_tensors="pt").input_ids for t in made]


@pytest.mark.parametrize("fault", ["lacks a tensor", "is an inpainting model", "is no model"])
def test_what_cannot_be_trained_on_is_refused(fault: str, tmp_path: Path, bases: dict[str, Path]):
    tensors = load_file(bases["sd1"])
    first = "model.diffusion_model.input_blocks.0.0.weight"
    if fault == "lacks a tensor":
        del tensors["model.diffusion_model.out.2.weight"]
    elif fault == "is an inpainting model":
        tensors[first] = torch.zeros(16, 9, 3, 3)
    else:
        tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "base.safetensors")
    words = {"lacks a tensor": r"has no unet\.conv_out\.weight", "is an inpainting model": "9 channels"}
    with pytest.raises(FileError, match=words.get(fault, "is unknown")):
        opened(tmp_path / "base.safetensors", config=bases["sd1"].parent / "config")


class Hostile:
    """Its pickle makes a folder when it is run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_hostile_pickle_does_not_run(tmp_path: Path):
    torch.save({"state_dict": Hostile(tmp_path / "ran")}, tmp_path / "base.ckpt")
    with pytest.raises(FileError):
        opened(tmp_path / "base.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_published_configurations_have_the_published_shapes(kind: str):
    for part, module in full(kind).items():
        found = published(kind)[part].state_dict()
        assert {n: t.shape for n, t in module.state_dict().items()} == {n: t.shape for n, t in found.items()}
