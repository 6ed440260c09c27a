"""Training of the zoo's networks on real data: Python's own sources and texts, handwritten digits, drawn avatars."""

from __future__ import annotations

import math
import random
import re
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from zoo_networks import CONTEXT, NETWORKS, SIDE

State = dict[str, Tensor]
Loss = Callable[[nn.Module, torch.Generator], Tensor]

DATA = Path(__file__).parent / "data"
BATCH = {"bytes": 12, "convolutions": 16, "denoiser": 6, "pixels": 16}
TEXTS = (
    "email",
    "asyncio",
    "unittest",
    "idlelib",
    "json",
    "xml",
    "multiprocessing",
    "encodings",
    "pydoc_data",
    "LICENSE",
)
STYLES = ("adventurer", "micah", "miniavs", "personas", "pixel-art", "toon-head")
PICTURES = 100  # of each style
LABELS = ("style", "hair", "background")
TURNS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "mirror": lambda x: x.flip(-1),
    "negative": lambda x: -x,
    "gray": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "dark": lambda x: x * 0.5 - 0.5,
    "turned": lambda x: x.transpose(-1, -2),
}
SPELLINGS: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda text: text,
    "upper": bytes.upper,
    "letters": lambda text: re.sub(rb"[^A-Za-z ]+", b" ", text),
    "packed": lambda text: re.sub(rb"\s+", b" ", text),
}


@dataclass(frozen=True)
class Recipe:
    """How one network was trained. change: ||delta|| / ||start|| that lr and steps aim at; the true one is measured.
    lr: per entry for the optimisers that normalise, else per unit of the (clipped) gradient. only: part of a
    parameter's name that may change ("" for all). task: one or, joined by "+", several in turn. share: of the task's
    data, which part by the seed."""

    optimizer: str
    lr: float
    steps: int
    weight_decay: float
    task: str
    seed: int
    only: str = ""
    share: float = 1.0


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda p, **o: torch.optim.SGD(p, momentum=0.9, **o),
    "rmsprop": torch.optim.RMSprop,
}
GRADIENT = {"sgd"}  # optimisers whose step is as long as the gradient


def tasks(arch: str, rng: random.Random) -> list[str]:
    """Six tasks that one root learns together, so that a fine-tune is one of them. Classes mean the same in all."""
    if arch == "bytes":
        return rng.sample([f"{text}/{spelling}" for text in TEXTS for spelling in SPELLINGS], 6)
    if arch == "denoiser":
        return rng.sample(
            [f"{kind}/{turn}" for kind in (*(f"avatars-{s}" for s in STYLES), "digits") for turn in TURNS], 6
        )
    kind = rng.choice([*(f"avatars-{label}" for label in LABELS), "digits"])
    return [f"{kind}/{turn}" for turn in TURNS]


def start(arch: str, seed: int) -> State:
    """A new network's parameters."""
    torch.manual_seed(seed)
    return {name: t.detach().clone() for name, t in NETWORKS[arch]().state_dict().items()}


def train(arch: str, state: Mapping[str, Tensor], recipe: Recipe) -> State:
    """The parameters after training, float32. Deterministic on one machine."""
    net = NETWORKS[arch]()
    net.load_state_dict({name: t.float() for name, t in state.items()})
    moving = [p for name, p in net.named_parameters() if recipe.only in name]
    optimizer = OPTIMIZERS[recipe.optimizer](moving, lr=recipe.lr, weight_decay=recipe.weight_decay)
    g = torch.Generator().manual_seed(recipe.seed)
    loss_of = objective(arch, recipe)
    warm = min(10, recipe.steps)
    for step in range(recipe.steps):
        loss = loss_of(net, g)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(moving, 1.0)
        for group in optimizer.param_groups:
            cosine = 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps)
            group["lr"] = recipe.lr * min(1.0, (step + 1) / warm) * cosine
        optimizer.step()
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def rate(optimizer: str, change: float, steps: int, state: Mapping[str, Tensor]) -> float:
    """Learning rate at which the weights move by about `change` of their norm in so many steps: they go further the
    longer they run, but not straight."""
    norm = math.sqrt(sum(float(t.float().square().sum()) for t in state.values()))
    length = change * norm / steps**0.75
    return length / 3 if optimizer in GRADIENT else length / math.sqrt(sum(t.numel() for t in state.values()))


def objective(arch: str, recipe: Recipe) -> Loss:
    """Loss of a network on a random batch of one of the recipe's tasks."""
    losses = [_of_task(arch, task, recipe) for task in recipe.task.split("+")]
    return lambda net, g: losses[int(torch.randint(len(losses), (), generator=g))](net, g)


def _of_task(arch: str, task: str, recipe: Recipe) -> Loss:
    g = torch.Generator().manual_seed(recipe.seed)
    if arch == "bytes":
        data = text(task)
        length = max(4 * CONTEXT, int(recipe.share * len(data)))
        first = int(torch.randint(len(data) - length + 1, (), generator=g))
        return _next_byte(data[first : first + length], BATCH[arch])
    x, y = pictures(task)
    seen = torch.randperm(len(x), generator=g)[: max(8, int(recipe.share * len(x)))]
    return (_noise if arch == "denoiser" else _label)(x[seen], y[seen], BATCH[arch])


def _next_byte(data: Tensor, batch: int) -> Loss:
    def loss(net: nn.Module, g: torch.Generator) -> Tensor:
        at = torch.randint(len(data) - CONTEXT - 1, (batch, 1), generator=g) + torch.arange(CONTEXT + 1)
        rows = data[at]
        return F.cross_entropy(net(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    return loss


def _label(x: Tensor, y: Tensor, batch: int) -> Loss:
    def loss(net: nn.Module, g: torch.Generator) -> Tensor:
        at = torch.randint(len(x), (batch,), generator=g)
        return F.cross_entropy(net(x[at]), y[at])

    return loss


def _noise(x: Tensor, _: Tensor, batch: int) -> Loss:
    def loss(net: nn.Module, g: torch.Generator) -> Tensor:
        clean = x[torch.randint(len(x), (batch,), generator=g)]
        t, noise = torch.rand(batch, generator=g), torch.randn(clean.shape, generator=g)
        mixed = (1 - t).sqrt()[:, None, None, None] * clean + t.sqrt()[:, None, None, None] * noise
        return F.mse_loss(net(mixed, t), noise)

    return loss


@cache
def text(task: str) -> Tensor:
    """Bytes (n,) of a task "package/spelling", at most half a million, all below 128."""
    package, spelling = task.split("/")
    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((library / package).rglob("*.py")) or [library / "LICENSE.txt"]
    if package == "LICENSE":
        files = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*.dist-info/licenses/*LICENSE*"))
    raw = b"\n".join(f.read_bytes() for f in files if "test" not in f.parts)[:500_000]
    data = np.frombuffer(SPELLINGS[spelling](raw), np.uint8)
    return torch.from_numpy((data & 127).astype(np.int64))


@cache
def pictures(task: str) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, SIDE, SIDE) in -1..1 and labels (n,) of a task "kind/turn"."""
    kind, turn = task.split("/")
    x, y = _digits() if kind == "digits" else _avatars(kind.removeprefix("avatars-"))
    return TURNS[turn](x), y


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float()[:, None] / 8 - 1  # pyright: ignore[reportAttributeAccessIssue]
    x = F.interpolate(x, (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1).contiguous()
    return x, torch.from_numpy(found.target).long()  # pyright: ignore[reportAttributeAccessIssue]


def _avatars(what: str) -> tuple[Tensor, Tensor]:
    """Of one style, or of all with a label."""
    drawn = _drawn()
    x = torch.from_numpy(drawn["pictures"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    if what in STYLES:
        chosen = torch.from_numpy(drawn["style"]) == STYLES.index(what)
        return x[chosen], torch.zeros(int(chosen.sum()), dtype=torch.long)
    return x, torch.from_numpy(drawn[what]).long()


@cache
def _drawn() -> dict[str, np.ndarray]:
    """Avatars drawn once and kept: "pictures" (n, SIDE, SIDE, 3) uint8, and an integer label of each kind."""
    file = DATA / "zoo-avatars.npz"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{random.randrange(10**9)}.npz")
        np.savez(part, allow_pickle=False, **_draw())
        part.replace(file)
    with np.load(file) as held:
        return dict(held)


def _draw() -> dict[str, np.ndarray]:
    from train.pictures import gallery

    found = gallery(STYLES, PICTURES, 0)
    labels = {
        "style": [p.style for p in found],
        "hair": [p.traits["hair"] for p in found],
        "background": [p.traits["background"] for p in found],
    }
    numbers = {k: np.array([sorted(set(v)).index(one) for one in v]) for k, v in labels.items()}
    small = np.stack([np.asarray(p.image.resize((SIDE, SIDE))) for p in found])
    return {"pictures": small, **numbers}
