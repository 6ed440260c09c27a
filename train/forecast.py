"""What a run will take, told before it starts: its steps, what its captions hold, and its memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.captions import plain
from train.config import Config
from train.data import DataPlan

if TYPE_CHECKING:
    from torch import Tensor

STATE = {"adamw": 8, "adam8bit": 2, "adamw8bit": 2, "dadapt-adam": 12, "prodigy": 16}
"""Bytes an optimiser keeps per parameter."""
VALUE_AND_GRADIENT = 8
TAGS, COMPANIONS = 30, 8
OFTEN, RARE = 0.5, 3
"""A tag goes with a trigger if it is in this share of its pictures, and this much rarer in the others."""


@dataclass(frozen=True)
class Memory:
    """Bytes. On the device: `weights` of the frozen base, the `network` with gradients and optimiser, `activations`
    kept for the backward pass of one batch. In main memory: `latents` that are kept."""

    weights: int
    network: int
    activations: int
    latents: int

    @property
    def device(self) -> int:
        return self.weights + self.network + self.activations


def memory(config: Config, plan: DataPlan) -> Memory:
    """Counted on the base's own shapes without their values, by tracing one step in the largest bucket. What the
    allocator and the gradients in flight add is not in it; with gradient checkpointing the activations are an upper
    bound. LineageError where the base cannot be trained on."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from train.models import skeleton
    from train.networks import Network

    with FakeTensorMode():
        architecture, parts = skeleton(config.model, config.training.precision)
        texts = [parts[name] for name in parts if name.startswith("text")]
        network = Network(parts["unet"], texts, config.network)
        shrink = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
        kept = _kept_for_backward(config, _largest(plan, shrink), parts["unet"], texts, architecture == "sdxl")
    weights = _storages(p for part in parts.values() for p in part.parameters())
    own = _storages(network.parameters())
    per_value = VALUE_AND_GRADIENT + STATE[config.training.optimizer]
    return Memory(
        weights=sum(weights.values()),
        network=sum(own.values()) // 4 * per_value,
        activations=sum(size for key, size in kept.items() if key not in weights | own),
        latents=_latents(config, plan, shrink),
    )


def _largest(plan: DataPlan, shrink: int) -> tuple[int, int]:
    """(height, width) of the latents of the largest bucket."""
    width, height = max(plan.buckets, key=math.prod)
    return height // shrink, width // shrink


def _kept_for_backward(
    config: Config, sides: tuple[int, int], unet: Any, texts: Sequence[Any], pooled: bool
) -> dict[int, int]:
    """Storage -> bytes of all that autograd keeps of one batch."""
    import torch

    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor  # held, so that its number is not given again
        return tensor

    n = config.training.batch
    for text in texts if config.network.pivotal else ():
        text.get_input_embeddings().weight.requires_grad_(True)
    half = config.training.precision != "fp32"
    with (
        torch.autocast("cpu", _dtype(config) if half else None, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        said = [text(torch.zeros(n, 77, dtype=torch.long), output_hidden_states=True) for text in texts]
        states = torch.cat([s.hidden_states[-1] for s in said], -1)
        more = {"text_embeds": said[-1].text_embeds, "time_ids": torch.zeros(n, 6)} if pooled else None
        latents = torch.zeros(n, unet.config.in_channels, *sides)
        unet(latents, torch.zeros(n), states, added_cond_kwargs=more).sample.float().square().mean()
    return _storages(found.values())


def _dtype(config: Config) -> Any:
    from train.models import DTYPES

    return DTYPES[config.training.precision]


def _storages(tensors: Any) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}


def _latents(config: Config, plan: DataPlan, shrink: int) -> int:
    if not config.data.cache_latents:
        return 0
    each = (math.prod(side // shrink for side in p.bucket) for p in plan.pictures)
    return 4 * 4 * sum(each) * (1 + config.data.flip)


def summary(config: Config, plan: DataPlan) -> str:
    """Lines for a terminal: folders, steps, buckets, tags, triggers, notes. Names come from files: escape control
    characters where they are shown."""
    return "\n".join(line for part in (_steps, _folders, _buckets, _tags, _triggers) for line in part(config, plan))


def memory_line(found: Memory) -> str:
    parts = {"base": found.weights, "activations": found.activations, "network and optimiser": found.network}
    told = ", ".join(f"{name} {_size(size)}" for name, size in parts.items())
    kept = f"; kept latents in main memory {_size(found.latents)}" if found.latents else ""
    return f"Memory, about {_size(found.device)}: {told}{kept}"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _steps(config: Config, plan: DataPlan) -> Iterator[str]:
    training = config.training
    yield f"{len(plan.pictures):,} pictures, {plan.shown(False) + plan.shown(True):,} shown per epoch"
    if reg := plan.shown(True):
        yield f"  of them regularisation: {reg:,}, weighing {config.data.reg_weight:g}"
    size = f"batch {training.batch}" + (f" x {training.accumulation}" if training.accumulation > 1 else "")
    yield f"{plan.steps_per_epoch:,} steps per epoch ({size}); {plan.steps:,} steps, {plan.epochs:.2f} epochs"


def _folders(config: Config, plan: DataPlan) -> Iterator[str]:
    yield "Folders (repeats x pictures):"
    for title, reg in (("", False), ("regularisation ", True)):
        for name, f in plan.folders(reg).items():
            yield f"  {f['n_repeats']:>4} x {f['img_count']:<6,} {title}{name}"
    yield from (f"  {note}" for note in plan.notes)


def _buckets(config: Config, plan: DataPlan) -> Iterator[str]:
    yield "Buckets (width x height: shown per epoch):"
    for (width, height), shown in plan.buckets.items():
        yield f"  {width:>4} x {height:<4}: {shown:,}"


def _tags(config: Config, plan: DataPlan) -> Iterator[str]:
    yield f"Tags ({len(plan.tags):,} different; pictures that carry them):"
    yield from (f"  {shown:>6,} {tag}" for tag, shown in list(plan.tags.items())[:TAGS])
    if len(plan.tags) > TAGS:
        yield f"  ... and {len(plan.tags) - TAGS:,} more"


def _triggers(config: Config, plan: DataPlan) -> Iterator[str]:
    """How often each trigger word is there, and which tags keep what ought to attach to it."""
    for word in config.data.trigger_words:
        found = [plain(word) in map(plain, p.caption.tags) for p in plan.pictures]
        yield f"Trigger {word!r}: in {sum(found):,} of {len(found):,} pictures"
        if close := companions(plan, found):
            told = ", ".join(f"{tag} {share:.0%}" for tag, share in list(close.items())[:COMPANIONS])
            yield f"  goes with {told}: what of it should attach to the trigger belongs in data.prune"


def companions(plan: DataPlan, chosen: Sequence[bool]) -> dict[str, float]:
    """Tag -> share of the chosen pictures that carry it, for tags that are typical of them; the most frequent first."""
    inside, outside = sum(chosen), len(chosen) - sum(chosen)
    counts: dict[str, list[int]] = {}
    for picture, is_in in zip(plan.pictures, chosen, strict=True):
        for tag in set(picture.caption.free):
            counts.setdefault(tag, [0, 0])[is_in] += 1
    shares = {tag: (n / max(1, inside), m / max(1, outside)) for tag, (m, n) in counts.items()}
    typical = {tag: i for tag, (i, o) in shares.items() if i >= OFTEN and i > RARE * o}
    return dict(sorted(typical.items(), key=lambda item: (-item[1], item[0])))
