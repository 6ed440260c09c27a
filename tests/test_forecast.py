"""What is told before a run starts is what happens: kept memory, steps, and the tags that go with a trigger."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config

from train import data, forecast
from train.captions import Caption
from train.loop import Training

CPU = torch.device("cpu")


def kept_in_truth(run: Training) -> int:
    """Bytes that autograd keeps of one real batch, beside the weights."""
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor
        return tensor

    batch = run.batches()[0]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run.loss(batch, 1, 0).sum()
    models = (run.base.unet, *run.base.text_encoders)
    known = {p.untyped_storage()._cdata for m in models for p in m.parameters()}
    known |= {p.untyped_storage()._cdata for p in run.parameters}
    assert loss.requires_grad
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in known)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__batch": 3, "network__text_encoder": False},
        {"network__algo": "locon", "training__precision": "bf16"},
        {"network__pivotal": ("tilty",), "network__text_encoder": False},
    ],
)
def test_the_memory_told_is_the_memory_kept(tmp_path: Path, changes):
    run = Training(config(tmp_path, **changes), CPU)
    told = forecast.memory(run.config, run.plan)
    assert told.activations == pytest.approx(kept_in_truth(run), rel=0.03)
    parts = (run.base.unet, run.base.vae, *run.base.text_encoders)
    held = sum(p.nbytes for m in parts for p in m.parameters())
    assert told.weights == pytest.approx(held, rel=1e-4)  # a new word is one row more
    assert told.network >= 2 * sum(p.nbytes for p in run.network.parameters())
    batch = run.batches()[0]
    every = {key: run.base.encode_images(batch.read(i)[None]) for i, key in enumerate(batch.keys)}
    each = next(iter(every.values())).nbytes
    assert told.latents == each * len(run.plan.pictures)


def test_the_summary_counts_what_is_there(tmp_path: Path):
    c = config(tmp_path, data__trigger_words=("red shirt",))
    plan = data.plan(c)
    text = forecast.summary(c, plan)
    for number in (len(plan.pictures), plan.steps_per_epoch, plan.steps):
        assert f"{number:,}" in text
    for tag, shown in plan.tags.items():
        assert f"{shown:>6,} {tag}" in text
    assert "Trigger 'red shirt'" in text


def test_what_goes_with_a_trigger(tmp_path: Path):
    """white hair in all pictures of the trigger and few others; smile in half of all; hat in few."""
    plan = data.plan(config(tmp_path))
    first = plan.pictures[0]
    captions = [Caption(("tilty",), ("white hair", "smile", "hat")[: 1 + (i < 5) + (i < 2)]) for i in range(10)]
    others = [Caption((), ("smile",) * (i < 5) + ("white hair",) * (i == 0)) for i in range(10)]
    plan = replace(plan, pictures=tuple(replace(first, caption=c) for c in captions + others))
    found = forecast.companions(plan, [i < 10 for i in range(20)])
    assert found == {"white hair": 1.0}
