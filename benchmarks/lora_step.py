"""A LoHa step (forward and backward) beside lycoris-lora and peft: same base, batch and targets, all in one run.

    python benchmarks/lora_step.py [--only tiny,blocks,unet,cuda] [--seconds 8] [--no-onednn]

`base` is forward + backward to latents and text states with all weights frozen; the others add LoHa of dim 8 (linear)
and 4 (kernels) to the same layers. Times are the least of interleaved rounds; memory is the peak of what one step
allocates beside the models, by torch's own account of every allocation. Blocks are SD1.5's at the shapes of 64x64
latents, batch 1, float32; the tiny UNet is train.pipeline's, at the batch it is trained with. On CUDA: float16 weights
under autocast, and peak memory includes them.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import diffusers
import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from train import factored, pipeline
from train.architectures import PUBLISHED
from train.config import NetworkConfig
from train.fit import Plan
from train.networks import Network
from train.targets import Target, targets

Added: TypeAlias = tuple[list[nn.Parameter], Callable[[], Any]]  # what is trained, and how to take it off again

CONFIG = NetworkConfig()
LEVELS = ((320, 64), (640, 32), (1280, 16), (1280, 8))
UNET_GIB = 12  # free memory without which the whole UNet is left out
GIB = 2**30


class Part(nn.Module):
    """A UNet, or one block under the `place` that makes it a target, called by keywords; answers a tensor."""

    def __init__(self, part: nn.Module, place: str = "part"):
        super().__init__()
        self.run = part.requires_grad_(False).forward
        self.add_module(place, nn.ModuleList([part]))

    def forward(self, **inputs: Any) -> Tensor:
        out = self.run(**inputs)
        return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class Case:
    """What is timed: a model and its inputs, the latents (the shape of the output's gradient) first."""

    name: str
    make: Callable[[], Part]
    inputs: Mapping[str, Any]


@dataclass
class Cell:
    """One contestant on one case: the least seconds of a step, the peak bytes of a step."""

    seconds: float = float("inf")
    peak: int = 0

    def time(self, step: Callable[[], None]) -> None:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds = min(self.seconds, time.perf_counter() - start)


def base(model: Part) -> Added:
    return [], lambda: None


def ours(model: Part) -> Added:
    network = Network(model, [], CONFIG)
    return network.parameters(), network.remove


def lycoris(model: Part) -> Added:
    import lycoris.modules

    build: Any = lycoris.modules.LohaModule
    made = [build(t.name, t.module, 1.0, *rank_alpha(t)).to(t.module.weight.device) for t in targets(model, [])]
    for module in made:
        module.apply_to()
    return [p for module in made for p in module.parameters()], lambda: [module.restore() for module in made]


def peft(model: Part) -> Added:
    """Replaces layers for good, so it comes last where the model is shared."""
    from peft import LoHaConfig, inject_adapter_in_model

    ranks = {t.canonical.removeprefix("unet.").removesuffix(".weight"): rank_alpha(t)[0] for t in targets(model, [])}
    kernels = {f"^{path}$": rank for path, rank in ranks.items() if rank != CONFIG.dim}
    config = LoHaConfig(r=CONFIG.dim, alpha=int(CONFIG.alpha), target_modules=list(ranks), rank_pattern=kernels)
    inject_adapter_in_model(config, model)
    return [p for p in model.parameters() if p.requires_grad], lambda: None


def rank_alpha(target: Target) -> tuple[int, float]:
    return (CONFIG.dim, CONFIG.alpha) if target.pointwise else (CONFIG.conv_dim, CONFIG.conv_alpha)


CONTESTANTS = {"base": base, "ours": ours, "lycoris": lycoris, "peft": peft}


def step(case: Case, model: Part, parameters: list[nn.Parameter]) -> None:
    """Forward and backward, with the same gradient of the output in every contestant."""
    latents = next(iter(case.inputs.values()))
    with torch.autocast("cuda", torch.float16, enabled=latents.is_cuda):
        out = model(**case.inputs)
    out.backward(torch.ones_like(out))
    for tensor in (*parameters, *case.inputs.values()):
        if isinstance(tensor, Tensor):
            tensor.grad = None


def compare(case: Case, seconds: float) -> dict[str, Cell]:
    """Contestants in turns, each on a model of its own; the first round warms up and measures memory."""
    cells, steps, counts = {}, {}, set()
    for name, add in CONTESTANTS.items():
        model = seeded(case.make)
        parameters, _ = add(model)
        counts.add(sum(p.numel() for p in parameters))
        cells[name], steps[name] = Cell(), partial(step, case, model, parameters)
        cells[name].peak = peak(steps[name])
    assert len(counts - {0}) == 1, f"{case.name}: unequal networks {counts}"
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or cells["base"].seconds == float("inf"):
        for name, cell in cells.items():
            cell.time(steps[name])
    return cells


def compare_in_place(case: Case, rounds: int) -> Iterator[tuple[str, Cell]]:
    """Contestants one after the other on one model, which is too large to be there four times."""
    model = seeded(case.make)
    for name, add in CONTESTANTS.items():
        parameters, remove = add(model)
        cell, once = Cell(), partial(step, case, model, parameters)
        cell.peak = peak(once)
        for _ in range(rounds):
            cell.time(once)
        remove()
        gc.collect()
        yield name, cell


def seeded(make: Callable[[], Part]) -> Part:
    torch.manual_seed(0)
    return make()


def peak(run: Callable[[], None]) -> int:
    """Most bytes that `run` holds at once, of what it allocates itself; on CUDA, all that is held."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    held = most = 0
    profiler: Any = watched.profiler
    events = profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def random(*shape: int, device: str = "cpu") -> Tensor:
    """Unit normal inputs, with gradient."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    return made.to(device).requires_grad_()


def tiny() -> Iterator[Case]:
    size, batch = pipeline.Size(), Plan(steps=1, lr=1).batch
    inputs = {"sample": random(batch, 4, 16, 16), "timestep": torch.arange(batch)}
    words = {"encoder_hidden_states": random(batch, 77, size.text)}
    yield Case(f"tiny UNet, batch {batch}", lambda: Part(pipeline._unet(diffusers, size)), inputs | words)


def blocks() -> Iterator[Case]:
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for width, side in LEVELS:
        latents, words = random(1, width, side, side), random(1, 77, 768)
        transformer = partial(Transformer2DModel, 8, width // 8, width, cross_attention_dim=768)
        inputs = {"hidden_states": latents, "encoder_hidden_states": words}
        yield Case(f"transformer {width}, {side}x{side}", lambda make=transformer: Part(make(), "attentions"), inputs)
        resnet = partial(ResnetBlock2D, in_channels=width, temb_channels=1280)
        inputs = {"input_tensor": latents, "temb": torch.randn(1, 1280)}
        yield Case(f"resnet {width}, {side}x{side}", lambda make=resnet: Part(make(), "resnets"), inputs)


def unet(kind: str, batch: int, side: int, device: str = "cpu", checkpointing: bool = False) -> Case:
    """All of a published UNet with random weights, made without torch's slow initialisation."""
    config = PUBLISHED[kind]["unet"]

    def make() -> Part:
        with torch.device("meta"):
            made: Any = diffusers.UNet2DConditionModel(**config)  # type: ignore[reportPrivateImportUsage]
        made.to(torch.float16 if device == "cuda" else torch.float32).to_empty(device=device)
        for p in made.parameters():
            nn.init.normal_(p, std=p[0].numel() ** -0.5) if p.ndim > 1 else nn.init.ones_(p)
        if checkpointing:
            made.train().enable_gradient_checkpointing()
        return Part(made)

    inputs: dict[str, Any] = {"sample": random(batch, 4, side, side, device=device), "timestep": 500}
    inputs["encoder_hidden_states"] = random(batch, 77, config["cross_attention_dim"], device=device)
    if kind == "sdxl":
        pooled, times = random(batch, 1280, device=device), torch.full((batch, 6), 1024.0, device=device)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": times}
    return Case(f"{kind} UNet, {8 * side} px, batch {batch}{', checkpointing' * checkpointing}", make, inputs)


def show(name: str, cells: Mapping[str, Cell]) -> None:
    """One row: times, ours over the frozen base, peers over ours, peaks."""
    times = " | ".join(f"{1e3 * cell.seconds:.1f}" for cell in cells.values())
    us = cells["ours"].seconds
    ratios = [us / cells["base"].seconds, cells["lycoris"].seconds / us, cells["peft"].seconds / us]
    peaks = " | ".join(f"{cell.peak / 2**20:.0f}" for cell in cells.values())
    print(f"| {name} | {times} | " + " | ".join(f"{r:.2f}" for r in ratios) + f" | {peaks} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="tiny,blocks,unet,cuda")
    parser.add_argument("--seconds", type=float, default=8, help="for each of the small cases")
    parser.add_argument("--no-onednn", action="store_true", help="ours with torch's choice of matrix products")
    options = parser.parse_args()
    factored.ONEDNN = factored.ONEDNN and not options.no_onednn
    only = options.only.split(",")
    head = [f"{name} ms" for name in CONTESTANTS] + ["ours / base", "lycoris / ours", "peft / ours"]
    head += [f"{name} MiB" for name in CONTESTANTS]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| case | " + " | ".join(head) + " |\n|---" + "|---" * len(head) + "|", flush=True)
    for case in [*(tiny() if "tiny" in only else ()), *(blocks() if "blocks" in only else ())]:
        show(case.name, compare(case, options.seconds))
    if "unet" in only and psutil.virtual_memory().available > UNET_GIB * GIB:
        case = unet("sd1", 1, 64)
        show(case.name, dict(compare_in_place(case, rounds=1)))
    elif "unet" in only:
        print(f"SD1.5 UNet: not measured, under {UNET_GIB} GiB are free")
    if "cuda" in only and torch.cuda.is_available():
        for case in (unet("sd1", 2, 64, "cuda"), unet("sdxl", 1, 128, "cuda", checkpointing=True)):
            show(case.name, dict(compare_in_place(case, rounds=5)))
    elif "cuda" in only:
        print("CUDA: not measured, there is no device")


if __name__ == "__main__":
    main()
