"""LoHa, LoCon and LoRA networks on a frozen UNet and its text encoders, to be trained and saved under kohya's names.

A layer's forward is replaced, its weights stay where they are; several networks on one model add up.
Sources: LoRA, Hu et al. 2021; LoHa, Hyeon-Woo et al. 2022 (FedPara); LoCon, Yeh et al. 2024 (LyCORIS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineage.adapters import save_adapter
from lineage.errors import LineageError
from lineage.factors import Factors, factors
from train.config import Config, NetworkConfig
from train.factored import adapted, op_of
from train.targets import Target, targets
from train.together import Together, applied

__all__ = ["Network", "targets"]

LOHA_DEVIATIONS = {  # of w1_a, w1_b, w2_b; w2_a starts at 0
    "lycoris": (0.1, 1.0, 1.0),
    "lycoris-0.1.4": (1.0, 1.0, 0.01),
}
CORE_DEVIATION = 0.1


class Network:
    """Factors on every target layer of `unet` and `text_encoders` that `config` asks for; the models are frozen.

    At first it changes nothing. `multiplier` scales all of it; at 0 the models give their own output, bit for bit.
    Factors are float32 whatever the models' dtype, on the device of their layer, and depend on `seed` alone."""

    def __init__(self, unet: nn.Module, text_encoders: Sequence[nn.Module], config: NetworkConfig, seed: int = 0):
        self.multiplier = 1.0
        self._frozen = [(p, p.requires_grad) for m in (unet, *text_encoders) for p in m.parameters()]
        for parameter, _ in self._frozen:
            parameter.requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        chosen = [t for t in targets(unet, text_encoders) if _rank_alpha(t, config)]
        self._layers = [_Layer(target, config, generator, self) for target in chosen]
        for layer in self._layers:
            _injected(layer.target.module).layers.append(layer)
        self._together = [Together(model, self._layers) for model in (unet, *text_encoders)]

    def parameters(self, component: str = "") -> list[nn.Parameter]:
        """All factors, or those on "unet", "text_encoder" or "text_encoder_2"."""
        return [p for y in self._layers if component in ("", y.target.component) for p in y.slots.values()]

    def parameter_groups(self, config: Config) -> list[dict[str, Any]]:
        """What optimisers take: {"name", "params", "lr"} for the UNet and the text encoders, where there are any."""
        unet = self.parameters("unet")
        text = [p for y in self._layers if y.target.component != "unet" for p in y.slots.values()]
        groups = [("unet", unet, config.unet_lr), ("text_encoder", text, config.text_encoder_lr)]
        return [{"name": name, "params": params, "lr": lr} for name, params, lr in groups if params]

    def tensors(self) -> dict[str, Tensor]:
        """kohya's name -> tensor, alphas too; factors are views of the parameters."""
        found: dict[str, Tensor] = {}
        for layer in self._layers:
            found |= {f"{layer.target.name}.{slot}": p.detach() for slot, p in layer.slots.items()}
            found[f"{layer.target.name}.alpha"] = torch.tensor(float(layer.alpha))
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave, exactly. LineageError where names, shapes or alphas are another network's."""
        own = self.tensors()
        if odd := sorted(own.keys() ^ tensors.keys()):
            raise LineageError(f"{odd[0]}: only in {'this network' if odd[0] in own else 'the saved one'}. {_OTHER}")
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise LineageError(f"{name}: {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}. {_OTHER}")
            if name.endswith(".alpha") and tensor != tensors[name]:
                raise LineageError(f"{name}: {float(tensors[name])}, not {float(tensor)}. {_OTHER}")
            tensor.copy_(tensors[name])

    def factors(self, dtype: torch.dtype = torch.float32) -> dict[str, Factors]:
        """kohya's module name -> its factors, copied in `dtype`. LineageError where they hold NaN or infinity there."""
        found = {}
        for layer in self._layers:
            copies = {slot: p.detach().cpu().to(dtype, copy=True) for slot, p in layer.slots.items()}
            try:
                shape = tuple(layer.target.module.weight.shape)
                found[layer.target.name] = factors(copies, layer.alpha).shaped(shape)
            except LineageError as e:
                advice = "The training diverged, or the dtype is too narrow: lower the rate, or save fp32."
                raise LineageError(f"{layer.target.name} {e} {advice}") from None
        return found

    def save(self, path: str | Path, metadata: Mapping[str, str], dtype: torch.dtype = torch.float32) -> None:
        """A file that web UIs and ComfyUI load, whole or not at all; `metadata`: the ss_* keys (train.metadata)."""
        save_adapter(path, self.factors(dtype), metadata)

    def remove(self) -> None:
        """The models as they were; a second call does nothing."""
        for together in self._together:
            together.remove()
        for layer in self._layers:
            found = _injected(layer.target.module)
            found.layers.remove(layer)
            found.leave_if_empty()
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        self._layers, self._frozen, self._together = [], [], []


_OTHER = "The network has other settings than the one that was saved."


@dataclass(eq=False)
class _Layer:
    """The factors on one target layer."""

    target: Target
    slots: dict[str, nn.Parameter]
    alpha: float
    scale: float
    network: Network
    weight: Tensor | None = None  # with the delta; while its model's forward pass runs, where those of others are made

    def __init__(self, target: Target, config: NetworkConfig, generator: torch.Generator, network: Network):
        rank, self.alpha = _rank_alpha(target, config) or (0, 0.0)
        self.target, self.network, self.scale = target, network, self.alpha / rank
        shape = tuple(target.module.weight.shape)
        tucker = config.tucker and not target.pointwise
        make = _loha if config.algo == "loha" else _low_rank
        made = make(shape, rank, tucker, config.init, generator)
        device = target.module.weight.device
        self.slots = {slot: nn.Parameter(t.to(device)) for slot, t in made.items()}
        self.op = op_of(target.module)

    @property
    def strength(self) -> float:
        """What the product of the factors is multiplied with."""
        return self.scale * self.network.multiplier

    def pairs(self) -> list[Tensor]:
        """left (out, r), right (r, columns), once for LoRA, twice for LoHa; with gradient to the parameters."""
        s = self.slots
        if "lora_up.weight" in s:
            core = s.get("lora_mid.weight")
            return [s["lora_up.weight"].flatten(1), _right(s["lora_down.weight"], core)]
        if "hada_t1" in s:
            halves = [(s[f"hada_w{i}_a"].mT, _right(s[f"hada_w{i}_b"], s[f"hada_t{i}"])) for i in "12"]
            return [t for half in halves for t in half]
        return [s["hada_w1_a"], s["hada_w1_b"], s["hada_w2_a"], s["hada_w2_b"]]

    def __call__(self, x: Tensor, alone: bool) -> Tensor:
        """The layer's output with these factors, or only what they add to it."""
        module = self.target.module
        if self.weight is not None and not alone:
            return applied(x, self.weight, module.bias, self.op)
        return adapted(x, module.weight, module.bias, self.pairs(), self.strength, self.op, alone=alone)


class _Injected:
    """Stands in for a layer's forward while networks are on it."""

    def __init__(self, module: nn.Module):
        self.module, self.own = module, module.__dict__.get("forward")
        self.original = module.forward
        self.layers: list[_Layer] = []
        module.forward = self

    def __call__(self, x: Tensor) -> Tensor:
        active = [layer for layer in self.layers if layer.network.multiplier]
        if not active:
            return self.original(x)
        first, *others = active
        y = first(x, alone=False)
        for layer in others:
            y = y + layer(x, alone=True)
        return y

    def leave_if_empty(self) -> None:
        if not self.layers:
            del self.module.forward
            if self.own is not None:
                self.module.forward = self.own


def _injected(module: nn.Module) -> _Injected:
    found = module.__dict__.get("forward")
    return found if isinstance(found, _Injected) else _Injected(module)


def _rank_alpha(target: Target, config: NetworkConfig) -> tuple[int, float] | None:
    """Dim and alpha on this layer; None where `config` leaves it alone."""
    wanted = config.unet if target.component == "unet" else config.text_encoder
    if not wanted or (config.algo == "lora" and not target.attended):
        return None
    if target.pointwise:
        return config.dim, config.alpha
    return (config.kernel_dim, config.conv_alpha) if config.kernel_dim else None


def _right(right: Tensor, core: Tensor | None) -> Tensor:
    """(r, columns) of a right factor (r, in, ...), through a tucker core (r, r, *kernel) where there is one."""
    right = right.flatten(1)
    return right if core is None else torch.einsum("ij...,jn->in...", core, right).flatten(1)


def _loha(shape: tuple[int, ...], rank: int, tucker: bool, init: str, generator: torch.Generator) -> dict[str, Tensor]:
    """LyCORIS' start of a LoHa, today's or that of March 2023: normal deviates, and zero in w2_a, so the delta is 0."""
    out, columns = shape[0], shape[1] if tucker else math.prod(shape[1:])
    left = (rank, out) if tucker else (out, rank)
    made = {}
    for slot, size, deviation in zip(
        ("hada_w1_a", "hada_w1_b", "hada_w2_b"),
        (left, (rank, columns), (rank, columns)),
        LOHA_DEVIATIONS[init],
        strict=True,
    ):
        made[slot] = deviation * torch.randn(size, generator=generator)
    made["hada_w2_a"] = torch.zeros(left)
    if tucker:
        made |= {
            slot: CORE_DEVIATION * torch.randn(rank, rank, *shape[2:], generator=generator)
            for slot in ("hada_t1", "hada_t2")
        }
    return dict(sorted(made.items()))


def _low_rank(
    shape: tuple[int, ...], rank: int, tucker: bool, init: str, generator: torch.Generator
) -> dict[str, Tensor]:
    """kohya's start of a LoRA: lora_down as a fresh layer of torch, lora_up 0."""
    ones = (1,) * (len(shape) - 2)
    down = (rank, shape[1], *(ones if tucker else shape[2:]))
    made = {"lora_down.weight": _fresh(down, generator), "lora_up.weight": torch.zeros(shape[0], rank, *ones)}
    if tucker:
        made["lora_mid.weight"] = _fresh((rank, rank, *shape[2:]), generator)
    return made


def _fresh(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform within 1 / sqrt(inputs), as torch starts Linear and Conv (He et al. 2015 with a = sqrt 5)."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(math.prod(shape[1:]))
