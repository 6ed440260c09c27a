"""Laws of the optimisers: each descends, repeats, resumes to the bit, and keeps the rates of its groups apart."""

import io
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lineage.errors import LineageError
from train.config import TrainingConfig
from train.optimizers import ESTIMATING, OPTIMIZERS, SCHEDULES, build, set_rates, share

TARGET = torch.linspace(-1, 1, 5000).view(50, 100)


def settings(name: str, **more) -> TrainingConfig:
    return TrainingConfig(steps=10, optimizer=name, lr=1.0 if name in ESTIMATING else 0.05, **more)


def problem(config: TrainingConfig) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Large enough that eight-bit states are used."""
    parameters = [nn.Parameter(torch.zeros(50, 100)), nn.Parameter(torch.zeros(50, 100))]
    return parameters, build([{"params": [p], "lr": config.lr} for p in parameters], config)


def descend(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> Iterator[float]:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.stack([(p - TARGET).square().mean() for p in parameters]).sum()
        loss.backward()
        optimizer.step()
        yield float(loss.detach())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_descends_and_repeats(name: str):
    first, again = (list(descend(*problem(settings(name)), 40)) for _ in range(2))
    assert first == again
    assert first[-1] < 0.9 * first[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_and_loaded_it_goes_on_to_the_bit(name: str):
    parameters, optimizer = problem(settings(name))
    list(descend(parameters, optimizer, 7))
    file = io.BytesIO()
    torch.save({"p": [p.detach() for p in parameters], "o": optimizer.state_dict()}, file)
    list(descend(parameters, optimizer, 5))
    file.seek(0)
    state = torch.load(file, weights_only=True)
    others, second = problem(settings(name))
    for p, value in zip(others, state["p"], strict=True):
        p.data.copy_(value)
    second.load_state_dict(state["o"])
    list(descend(others, second, 5))
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n.endswith("8bit")])
def test_eight_bit_states_are_bytes(name: str):
    parameters, optimizer = problem(settings(name))
    list(descend(parameters, optimizer, 1))
    state = [t for t in optimizer.state[parameters[0]].values() if isinstance(t, torch.Tensor)]
    assert {t.dtype for t in state if t.shape == (50, 100)} == {torch.uint8}


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in ESTIMATING])
def test_a_group_at_rate_0_stays_while_the_other_moves(name: str):
    parameters, optimizer = problem(settings(name, weight_decay=0.0))
    set_rates(optimizer, [0.05, 0.0], 1.0)
    list(descend(parameters, optimizer, 3))
    assert parameters[0].any()
    assert not parameters[1].any()


@pytest.mark.parametrize("name", ESTIMATING)
def test_optimizers_that_find_the_rate_refuse_one(name: str):
    parameter = nn.Parameter(torch.zeros(3))
    with pytest.raises(LineageError, match=r"training\.lr = 1\.0"):
        build([{"params": [parameter], "lr": 2e-4}], settings(name))
    with pytest.raises(LineageError, match=r"no other rate"):
        build(
            [{"params": [parameter], "lr": 1.0}, {"params": [nn.Parameter(torch.zeros(3))], "lr": 0.5}], settings(name)
        )


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_weight_decay_shrinks_what_has_no_gradient(name: str):
    config = settings(name, weight_decay=0.5)
    parameter = nn.Parameter(torch.ones(50, 100))
    optimizer = build([{"params": [parameter], "lr": 0.1}], config)
    parameter.grad = torch.zeros(50, 100)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((50, 100), 1 - 0.1 * 0.5))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_whole_after_the_warmup_and_never_rise(name: str):
    config = settings(name="adamw", scheduler=name, warmup=4)
    rates = [share(config, step, 20) for step in range(1, 21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] > 0
    assert (rates[-1] == 1) == (name == "constant")


def test_linear_and_cosine_meet_half_way():
    config = {name: settings("adamw", scheduler=name) for name in ("linear", "cosine")}
    assert share(config["linear"], 51, 100) == pytest.approx(0.5)
    assert share(config["cosine"], 51, 100) == pytest.approx(0.5)
