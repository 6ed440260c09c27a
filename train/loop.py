"""The training loop: a generator of step records that owns its folder and can be stopped at any moment.

Everything random of step s comes from generators made for (seed, s, picture), and the state between two steps is
complete; so a run that was stopped or killed ends, on the CPU, with the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Generator, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lineage.errors import LineageError
from lineage.pairs import pick_device
from lineage.results import write_files
from train import data, optimizers
from train.config import Config
from train.data import Batch, DataPlan
from train.embeddings import Words
from train.metadata import base_hashes, metadata
from train.models import DTYPES, Base, Text, open_base
from train.networks import Network
from train.runs import RunFolder
from train.sheet import image, png

Progress = Callable[[int, int, str], None]


class Diverged(LineageError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Record:
    """One optimiser step: its number (from 1) of how many, the mean loss of its pictures, the largest learning rate of
    its groups (with what the optimiser found itself, where it does), and how long it took."""

    step: int
    of: int
    loss: float
    lr: float
    seconds: float


def train(config: Config, *, device: str = "auto", progress: Progress | None = None) -> Generator[Record]:
    """Train as `config` says, from where its folder stands; a run that is done yields nothing.

    Closing the generator keeps the state of the last step. LineageError before the first step for all that cannot be
    trained; Diverged for a loss that is no number."""
    folder = RunFolder(config)
    if folder.done:
        return
    run = Training(config, pick_device(device), progress)
    folder.begin()
    if state := folder.load():
        run.restore(state)
    while run.step < run.steps:
        record = run.advance()
        folder.log(asdict(record))
        _keep(run, folder)
        try:
            yield record
        except GeneratorExit:
            folder.save(run.state())
            raise
    run.save(folder, None)
    folder.finish()


def _keep(run: Training, folder: RunFolder) -> None:
    """What is due after the step just taken; the state last, so that a run killed before it does all of this again."""
    sample, save = run.config.sample, run.config.save
    if run.step == run.steps or _due(run.step, sample.every, sample.at):
        run.draw(folder)
    if run.step < run.steps and _due(run.step, save.every, save.at):
        run.save(folder, run.step)
    if run.step == run.steps or run.step % save.state_every == 0:
        folder.save(run.state())


def _due(step: int, every: int, at: Sequence[int]) -> bool:
    return step in at or (every > 0 and step % every == 0)


class Training:
    """A frozen base, what learns on it, its optimiser and its data, between two steps."""

    def __init__(self, config: Config, device: torch.device, progress: Progress | None = None):
        training = config.training
        self.config = config
        self.plan: DataPlan = data.plan(config, progress)
        self.steps = self.plan.steps
        self.base = open_base(config.model, device=device, precision=training.precision)
        self.hashes = base_hashes(self.base)
        self.network = Network(self.base.unet, self.base.text_encoders, config.network, training.seed)
        self.words = Words(self.base, config.network) if config.network.pivotal else None
        groups = [*self.network.parameter_groups(config), *self._word_groups()]
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.rates = [group["lr"] for group in groups]
        self.optimizer = optimizers.build(groups, training)
        self.scaler = torch.amp.GradScaler(device.type, enabled=training.precision == "fp16")
        if training.gradient_checkpointing:
            _checkpoint(self.base)
        self.step = 0
        self._batches: Iterator[Batch] | None = None
        self._kept_latents: dict[Hashable, Tensor] = {}
        self._kept_text: dict[str, Text] = {}

    def _word_groups(self) -> list[dict[str, Any]]:
        if not self.words:
            return []
        return [{"params": self.words.parameters(), "lr": self.config.pivotal_lr, "weight_decay": 0.0}]

    @property
    def learns_text(self) -> bool:
        """Whether gradients reach the text encoders."""
        return self.config.network.text_encoder or self.words is not None

    def advance(self) -> Record:
        """Take one step. Diverged where its loss is no number."""
        start = time.perf_counter()
        number = self.step + 1
        factor = optimizers.share(self.config.training, number, self.steps)
        optimizers.set_rates(self.optimizer, self.rates, factor)
        loss = self.descend(number)
        self.step = number
        return Record(number, self.steps, loss, optimizers.rate(self.optimizer), time.perf_counter() - start)

    def descend(self, number: int) -> float:
        """One step, with the randomness of step `number`, down the mean loss of its pictures, which is returned."""
        batches = self.batches()
        total = sum(len(batch) for batch in batches)
        losses, first = [], 0
        for batch in batches:
            loss = self.loss(batch, number, first).sum() / total
            self.scaler.scale(loss).backward()
            losses.append(float(loss.detach()))
            first += len(batch)
        if not math.isfinite(sum(losses)):
            raise Diverged(
                f"The loss of step {number} is {sum(losses)}. Lower training.lr, or use another training.precision."
            )
        self._move()
        return sum(losses)

    def _move(self) -> None:
        self.scaler.unscale_(self.optimizer)
        if limit := self.config.training.clip_grad:
            torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def batches(self) -> list[Batch]:
        """The batches of the coming step."""
        if self._batches is None:
            self._batches = data.batches(self.plan, self.config, self.step)
        return [next(self._batches) for _ in range(self.config.training.accumulation)]

    def loss(self, batch: Batch, step: int, first: int) -> Tensor:
        """Loss of each picture (n,); `first`: number of the batch's first picture within its step, so that noise and
        timesteps do not depend on how a step is cut into batches."""
        latents = self._latents(batch)
        numbers = range(first, first + len(batch))
        drawn = [randomness(self.config.training.seed, step, n, latents.shape[1:], self._timesteps) for n in numbers]
        t, noise = (torch.stack(parts).to(latents.device) for parts in zip(*drawn, strict=True))
        errors = denoising_errors(self.base, latents, self._text(batch), t, noise, batch.sizes)
        return errors * batch.weights.to(errors.device)

    @property
    def _timesteps(self) -> int:
        return self.base.schedule.config.num_train_timesteps

    def _latents(self, batch: Batch) -> Tensor:
        kept = self._kept_latents if self.config.data.cache_latents else {}
        return data.latents(batch, lambda pixels: self.base.encode_images(pixels).cpu(), kept).to(self.base.device)

    def _text(self, batch: Batch) -> Text:
        if self.learns_text or not self.config.data.cache_text:
            return self._encoded(batch.captions)
        new = [c for c in dict.fromkeys(batch.captions) if c not in self._kept_text]
        self._kept_text |= {caption: self._encoded([caption]).to("cpu") for caption in new}
        return Text.cat([self._kept_text[c] for c in batch.captions]).to(self.base.device)

    def _encoded(self, captions: Sequence[str]) -> Text:
        with torch.set_grad_enabled(self.learns_text and torch.is_grad_enabled()), self.base.arithmetic():
            return self.base.encode_text(captions, self.config.data.clip_skip)

    def state(self) -> dict[str, Any]:
        """All that decides the coming steps."""
        return {
            "step": self.step,
            "network": self.network.tensors(),
            "words": [p.detach() for p in self.words.parameters()] if self.words else [],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "made_of": self._made_of,
        }

    @property
    def _made_of(self) -> dict[str, str]:
        return {"base": self.hashes["ss_new_sd_model_hash"], "data": self.plan.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. LineageError where base or pictures are others by now."""
        for part, was in state["made_of"].items():
            if was != self._made_of[part]:
                raise LineageError(f"The {part} changed since step {state['step']}: restore it, or name a new folder.")
        self.step = state["step"]
        self.network.load(state["network"])
        with torch.no_grad():
            for parameter, vectors in zip(self.words.parameters() if self.words else [], state["words"], strict=True):
                parameter.copy_(vectors)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def draw(self, folder: RunFolder) -> None:
        """One picture of each prompt and seed."""
        sample, size = self.config.sample, self.config.sample_size
        for i, prompt in enumerate(sample.prompts):
            for seed in sample.seeds:
                (picture,) = self.base.draw(
                    [prompt],
                    sample.negative,
                    seeds=[seed],
                    steps=sample.steps,
                    guidance=sample.guidance,
                    size=(size, size),
                    clip_skip=self.config.data.clip_skip,
                )
                file = folder.sample(self.step, i, seed)
                write_files(file.parent, {file.name: png(image(picture))}, force=True)

    def save(self, folder: RunFolder, step: int | None) -> None:
        """The adapter and the words beside it, as of now; `step` None: the final ones."""
        told = metadata(self.config, self.base, self.hashes, self.plan.metadata, self.step)
        if self.words:
            self.words.save(lambda word: folder.embedding(word, step), told)
        self.network.save(folder.adapter(step), told, DTYPES[self.config.save.dtype])


def randomness(seed: int, step: int, picture: int, shape: Sequence[int], timesteps: int) -> tuple[Tensor, Tensor]:
    """(timestep (), noise of `shape`) of one picture of one step, drawn on the CPU."""
    digest = hashlib.blake2b(f"{seed} {step} {picture}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.randint(timesteps, (), generator=generator), torch.randn(tuple(shape), generator=generator)


def denoising_errors(
    base: Base, latents: Tensor, text: Text, t: Tensor, noise: Tensor, sizes: Tensor | None = None
) -> Tensor:
    """Mean squared error (n,) of what the UNet says at timesteps t (n,) (Ho et al. 2020, eq. 14; for v Salimans & Ho
    2022), in float32."""
    with base.arithmetic():
        said = base.predict(base.schedule.add_noise(latents, noise, t), t, text, sizes)
    return (said.float() - base.target(latents, noise, t)).square().mean((1, 2, 3))


def _checkpoint(base: Base) -> None:
    """Recompute activations in the backward pass. Both libraries want training mode for it; nothing here drops out."""
    base.unet.enable_gradient_checkpointing()
    for encoder in base.text_encoders:
        modern = getattr(encoder, "activation_checkpointing_enable", None)  # transformers 5
        (modern or encoder.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in (base.unet, *base.text_encoders):
        module.train()
