"""`lineage svd` on SD1.5-size pairs against torch.linalg.svd and svdvals, all in one run.

    python benchmarks/svd.py [--pairs mixed,low] [--skip-peers]

Makes a base and two tuned checkpoints (LDM layout, 1,130 keys, float16, 2.1 GB each, relative change 3 %) in
benchmarks/data, times the whole command, and prints a table in Markdown. Peak memory is RssAnon, read from /proc.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

DATA = Path(__file__).parent / "data"
PREFIXES = {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model."}
RELATIVE = 0.03
KINDS = {"mixed": ("low", "power", "flat"), "low": ("low", "low", "low")}


def sd15_shapes() -> dict[str, tuple[int, ...]]:
    """Stored name -> shape of a Stable Diffusion 1.5 single file, from the configs of its diffusers folder."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from lineage.keys import to_ldm

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae: Any = AutoencoderKL.from_config(
            {
                "block_out_channels": (128, 256, 512, 512),
                "layers_per_block": 2,
                "down_block_types": ("DownEncoderBlock2D",) * 4,
                "up_block_types": ("UpDecoderBlock2D",) * 4,
            }
        )
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12)
        )
    states = {"unet": unet.state_dict(), "vae": vae.state_dict(), "text_encoder": text.state_dict()}
    return {name: tuple(t.shape) for name, t in to_ldm(states, "sd1").items()}


def orthonormal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=g)).Q


def delta(kind: str, m: int, n: int, g: torch.Generator) -> Tensor:
    """Unit-norm (m, n) matrix: planted rank 4 to 48, singular values i^-1/2, or Gaussian."""
    if kind == "low":
        rank = int(torch.randint(4, 49, (1,), generator=g))
        d = torch.randn(m, rank, generator=g) @ torch.randn(rank, n, generator=g)
    elif kind == "flat":
        d = torch.randn(m, n, generator=g)
    else:
        k = min(m, n)
        d = (orthonormal(m, k, g) * torch.arange(1, k + 1) ** -0.5) @ orthonormal(n, k, g).mT
    return d / d.norm()


def make() -> None:
    """The three files, once."""
    DATA.mkdir(exist_ok=True)
    if all((DATA / f"{name}.safetensors").exists() for name in ("base", *KINDS)):
        return
    g = torch.Generator().manual_seed(0)
    base: dict[str, Tensor] = {}
    tuned: dict[str, dict[str, Tensor]] = {pair: {} for pair in KINDS}
    shapes = sd15_shapes()
    count, total = 0, sum(torch.Size(s).numel() for s in shapes.values())
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=g) * (0.02 if len(shape) < 2 else torch.Size(shape[1:]).numel() ** -0.5)
        base[name] = w.half()
        third = min(2, 3 * count // total)
        for pair, kinds in KINDS.items():
            d = delta(kinds[third], shape[0], w.numel() // shape[0], g) if len(shape) > 1 else torch.zeros(shape)
            tuned[pair][name] = (base[name].float() + RELATIVE * w.norm() * d.view(shape)).half()
        count += w.numel()
        print(f"\rmaking {100 * count // total} %", end="", file=sys.stderr)
    for name, tensors in {"base": base, **tuned}.items():
        save_file(tensors, DATA / f"{name}.safetensors", metadata={"format": "pt"})


def watch(command: list[str]) -> tuple[float, float]:
    """(seconds, peak RssAnon in GiB) of a command."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            peak = max(peak, *(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")))
        except (OSError, TypeError):
            pass
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, peak / 2**20


def warm(*files: Path) -> None:
    """Bring the files into the page cache."""
    for file in files:
        with open(file, "rb") as f:
            while f.read(2**24):
                pass


def peers(pair: str) -> tuple[float, float, dict[str, Tensor]]:
    """(seconds of svd, seconds of svdvals, stored name -> exact singular values) over UNet and text encoder."""
    seconds, found = [0.0, 0.0], {}
    with (
        safe_open(DATA / "base.safetensors", "pt") as base,
        safe_open(DATA / f"{pair}.safetensors", "pt") as tuned,
    ):
        for name in base.keys():  # noqa: SIM118
            if not name.startswith(tuple(PREFIXES.values())) or len(base.get_slice(name).get_shape()) < 2:
                continue
            d = (tuned.get_tensor(name).float() - base.get_tensor(name).float()).flatten(1)
            start = time.perf_counter()
            torch.linalg.svd(d, full_matrices=False)
            middle = time.perf_counter()
            found[name] = torch.linalg.svdvals(d).double()
            seconds[0] += middle - start
            seconds[1] += time.perf_counter() - middle
    return seconds[0], seconds[1], found


def check(result: dict, exact: dict[str, Tensor], pair: str) -> tuple[int, int, float]:
    """(intervals, violations, widest). What float32 LAPACK contradicts is judged again in float64."""
    from lineage.checkpoint import open_checkpoint

    count, wrong, widest = 0, 0, 0.0
    with open_checkpoint(DATA / "base.safetensors") as base, open_checkpoint(DATA / f"{pair}.safetensors") as tuned:
        for layer in result["layers"]:
            name = layer["name"]
            rows = layer["energy"].items()
            count += len(rows)
            widest = max(widest, *(i["high"] - i["low"] for _, i in rows))
            if violations(rows, exact[base.specs[name].stored]):
                delta = (tuned[name].double() - base[name].double()).flatten(1)
                wrong += violations(rows, torch.linalg.svdvals(delta))
    return count, wrong, widest


def violations(rows: Iterable[tuple[str, dict[str, float]]], s: Tensor) -> int:
    """How many intervals {low, high} at k do not hold the energy of the singular values `s`."""
    squares = s.double().square()
    truth = {k: float(squares[: int(k)].sum() / squares.sum()) for k, _ in rows}
    return sum(not i["low"] <= truth[k] <= i["high"] for k, i in rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="mixed,low")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    make()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| pair | lineage svd, s | RssAnon, GiB | svd, s | ratio | svdvals, s | ratio | intervals | wrong | widest |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for pair in options.pairs.split(","):
        files = (DATA / "base.safetensors", DATA / f"{pair}.safetensors")
        warm(*files)
        with tempfile.TemporaryDirectory() as out:
            components = [x for c in PREFIXES for x in ("--component", c)]
            cold = ["env", f"LINEAGE_CACHE={out}/cache"]  # no input's hash is known from an earlier run
            how = ["-o", out, "--force", "-q", *components]
            command = [*cold, sys.executable, "-m", "cli", "svd", *map(str, files), *how]
            seconds, memory = watch([*command, "--device", options.device])
            result = json.loads((Path(out) / "result.json").read_text())
        row = f"| {pair} | {seconds:.1f} | {memory:.2f} |"
        if not options.skip_peers:
            svd, svdvals, exact = peers(pair)
            intervals, wrong, widest = check(result, exact, pair)
            row += f" {svd:.0f} | {svd / seconds:.2f}x | {svdvals:.0f} | {svdvals / seconds:.2f}x |"
            row += f" {intervals} | {wrong} | {widest:.1e} |"
        print(row, flush=True)


if __name__ == "__main__":
    main()
