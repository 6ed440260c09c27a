"""A rehearsal at real size, on the CPU: two training steps on a randomly initialised SD1.5, applied and sampled."""

import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from training_runs import write_pictures

import lineage
from train import pipeline
from train.architectures import PUBLISHED
from train.config import Config, DataConfig, ModelConfig, SaveConfig, TrainingConfig
from train.loop import train
from train.models import BUILDERS, open_base


def write_random_base(path: Path) -> Path:
    """SD1.5 with random weights as a single fp16 file."""
    torch.manual_seed(0)
    parts = {part: BUILDERS[part](settings) for part, settings in PUBLISHED["sd1"].items()}
    pipeline.save(SimpleNamespace(**parts), path, {})
    return path


@pytest.mark.slow
def test_train_apply_and_sample_at_real_size(tmp_path: Path, capsys: pytest.CaptureFixture):
    told: list[str] = []

    def stage(name: str) -> None:
        nonlocal begun
        memory = psutil.Process().memory_info()
        peak = getattr(memory, "peak_wset", 0) or peak_memory()
        told.append(f"{name}: {time.perf_counter() - begun:.1f} s, at most {peak / 2**30:.1f} GiB so far")
        begun = time.perf_counter()

    begun = time.perf_counter()
    base = write_random_base(tmp_path / "base.safetensors")
    stage("a random SD1.5 written")
    config = Config(
        ModelConfig(base),
        DataConfig(write_pictures(tmp_path / "data", (512, 512)), resolution=512),
        training=TrainingConfig(steps=2, gradient_checkpointing=True),
        save=SaveConfig(tmp_path / "run"),
    )
    records = list(train(config, device="cpu"))
    stage(f"opened, pictures encoded, two steps of {', '.join(f'{r.seconds:.1f} s' for r in records)}, saved")
    adapter = tmp_path / "run" / "loha.safetensors"
    lineage.apply(base, {str(adapter): 1.0}, tmp_path / "applied.safetensors")
    stage("applied")
    picture = open_base(ModelConfig(tmp_path / "applied.safetensors")).draw(
        "red shirt", seed=0, steps=1, size=(512, 512)
    )
    stage("opened, one sampling step and decoded, 512 px")
    with capsys.disabled():
        print("", *told, f"adapter: {adapter.stat().st_size / 1e6:.1f} MB", sep="\n")
    assert picture.shape == (3, 512, 512)
    assert picture.isfinite().all()
    assert all(0 < r.loss < 10 for r in records)


def peak_memory() -> int:
    """Largest resident size so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
