"""A rehearsal at real size, on the CPU: two training steps on a randomly initialised SD1.5, applied and sampled."""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def write_random_base(folder: Path) -> None:
    """SD1.5 with random weights as a single fp16 file."""
    torch.manual_seed(0)
    parts = {part: BUILDERS[part](settings) for part, settings in PUBLISHED["sd1"].items()}
    pipeline.save(SimpleNamespace(**parts), folder / "base.safetensors", {})


def train_two_steps(folder: Path) -> list[float]:
    """Losses of a LoHa with the default settings but gradient checkpointing, batch 1, 512 px."""
    config = Config(
        ModelConfig(folder / "base.safetensors"),
        DataConfig(write_pictures(folder / "data", (512, 512)), resolution=512),
        training=TrainingConfig(steps=2, gradient_checkpointing=True),
        save=SaveConfig(folder / "run"),
    )
    records = list(train(config, device="cpu"))
    print(*(f"step {r.step}: {r.seconds:.1f} s" for r in records), sep=", ")
    return [r.loss for r in records]


def apply_it(folder: Path) -> None:
    adapter: dict[str | Path, float] = {folder / "run" / "loha.safetensors": 1.0}
    lineage.apply(folder / "base.safetensors", adapter, folder / "applied.safetensors")


def sample_one_step(folder: Path) -> torch.Tensor:
    return open_base(ModelConfig(folder / "applied.safetensors")).draw(
        ["red shirt"], seeds=[0], steps=1, size=(512, 512)
    )[0]


def measured(work: Callable[[Path], Any], folder: Path) -> tuple[Any, float, float]:
    """(what `work` gives, seconds, GiB of memory at most), in a process of its own."""
    begun = time.perf_counter()
    return work(folder), time.perf_counter() - begun, peak() / 2**30


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.rehearsal
@pytest.mark.slow
def test_train_apply_and_sample_at_real_size(tmp_path: Path, capsys: pytest.CaptureFixture):
    def stage(work: Callable[[Path], Any]) -> Any:
        processes = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=processes) as pool:
            found, seconds, memory = pool.submit(measured, work, tmp_path).result()
        with capsys.disabled():
            print(f"\n{work.__name__}: {seconds:.1f} s, {memory:.1f} GiB", end="")
        return found

    stage(write_random_base)
    losses = stage(train_two_steps)
    stage(apply_it)
    picture = stage(sample_one_step)
    with capsys.disabled():
        print(f"\nadapter: {(tmp_path / 'run' / 'loha.safetensors').stat().st_size / 1e6:.1f} MB")
    assert all(0 < loss < 10 for loss in losses)
    assert picture.shape == (3, 512, 512)
    assert picture.isfinite().all()
