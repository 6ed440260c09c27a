"""`lineage extract` on SD1.5-size pairs against kohya's way, all in one run.

    python benchmarks/extract.py [--pairs mixed,low] [--rank 64]

The pairs are those of benchmarks/svd.py. Each contender is a process of its own, files in the page cache, and writes a
float16 LoCon of the same layers; ours is the whole command with the hashes of its inputs. kohya's way, written anew
after networks/extract_lora_from_models.py of sd-scripts: both models whole in float32, all differences, one
torch.linalg.svd for each layer, cut to the rank. It is spared three things: its clamp of the largest values (which only
adds error), full_matrices (it computes all right vectors and drops them), and the building of both models' modules.
Errors are those of the files as written; the exact truncation is the tail of the peer's singular values. Peak memory is
RssAnon, read from /proc. Linux only.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import svd as pairs
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lineage.checkpoint import open_checkpoint
from lineage.targets import Target, targets

SPEED, MEMORY, ERROR = 10, 4, 1.01
"""What the peer must need at least, times ours, in seconds and in memory; ours, times the least error there is."""


def kohya(base: Path, tuned: Path, output: Path, rank: int) -> None:
    """Everything loaded, everything subtracted, then layer by layer. `.spectrum` files keep the singular values."""
    both = [{name: t.float() for name, t in load_file(file).items()} for file in (base, tuned)]
    found = {target.module: target.param.stored for target in layers(base)}
    deltas = {module: both[1][name] - both[0][name] for module, name in found.items()}
    del both
    tensors, spectra = {}, {}
    for module, delta in deltas.items():
        u, s, vh = torch.linalg.svd(delta.flatten(1), full_matrices=False)
        k, ones = min(rank, len(s)), (1,) * (delta.ndim - 2)
        spectra[module] = s
        tensors[f"{module}.lora_up.weight"] = (u[:, :k] * s[:k]).reshape(len(u), k, *ones).half().contiguous()
        tensors[f"{module}.lora_down.weight"] = vh[:k].reshape(k, *delta.shape[1:]).half().contiguous()
        tensors[f"{module}.alpha"] = torch.tensor(float(k))
    save_file(tensors, output)
    save_file(spectra, output.with_suffix(".spectrum"))


def layers(base: Path) -> list[Target]:
    """What both contenders change."""
    with open_checkpoint(base) as model:
        return list(targets(model.specs).values())


def race(pair: str, rank: int, folder: Path) -> Iterator[tuple[str, float, float, Path]]:
    """(contender, seconds, GiB, adapter) of both."""
    files = pairs.DATA / "base.safetensors", pairs.DATA / f"{pair}.safetensors"
    pairs.warm(*files)
    ours, theirs = folder / "ours.safetensors", folder / "kohya.safetensors"
    cold = ["env", f"LINEAGE_CACHE={folder / 'cache'}"]  # no input's hash is known from an earlier run
    command = [*cold, sys.executable, "-m", "cli", "extract", *map(str, files), "-o", str(ours), "-q"]
    yield "lineage extract", *pairs.watch([*command, "--rank", str(rank)]), ours
    command = [sys.executable, __file__, "--kohya", *map(str, (*files, theirs)), "--rank", str(rank)]
    yield "kohya's way", *pairs.watch(command), theirs


def worst(pair: str, adapters: list[Path], spectra: Path, rank: int) -> list[tuple[float, float]]:
    """(largest error over the exact truncation's, largest difference from it) over all layers, of each adapter.

    Errors are ||delta - adapter||_F / ||delta||_F."""
    files = [load_file(file) for file in adapters]
    exact = load_file(spectra)
    found = []
    base, tuned = (open_checkpoint(pairs.DATA / f"{name}.safetensors") for name in ("base", pair))
    with base, tuned:
        for target in targets(base.specs).values():
            name = target.param.name
            delta = (tuned[name].float() - base[name].float()).flatten(1)
            least = tail(exact[target.module], rank)
            errors = [float((delta - product(file, target.module)).norm() / delta.norm()) for file in files]
            found.append([(error / least, error - least) for error in errors])
    return [tuple(max(x) for x in zip(*each, strict=True)) for each in zip(*found, strict=True)]  # type: ignore[misc]


def tail(s: Tensor, rank: int) -> float:
    """Share of the norm beyond `rank` singular values of all."""
    squares = s.double().square()
    return float((squares[rank:].sum() / squares.sum()).sqrt())


def product(file: dict[str, Tensor], module: str) -> Tensor:
    """What a LoCon adds to a layer, (out, in * kernel)."""
    up, down = (file[f"{module}.lora_{part}.weight"].float().flatten(1) for part in ("up", "down"))
    return up @ down * (float(file[f"{module}.alpha"]) / len(down))


def report(pair: str, rank: int) -> None:
    """The rows of one pair."""
    with tempfile.TemporaryDirectory(dir=pairs.DATA) as folder:
        rows = list(race(pair, rank, Path(folder)))
        errors = worst(pair, [row[3] for row in rows], Path(folder) / "kohya.spectrum", rank)
    (_, seconds, memory, _), (_, slow, large, _) = rows
    for (name, s, gib, _), (ratio, more) in zip(rows, errors, strict=True):
        print(f"| {pair} | {name} | {s:.1f} | {s / seconds:.2f}x | {gib:.2f} | {gib / memory:.2f}x |", end="")
        print(f" {ratio:.5f} | {more:.1e} |", flush=True)
    met = slow >= SPEED * seconds, large >= MEMORY * memory, errors[0][0] <= ERROR
    said = [f"{what}: {'yes' if ok else 'NO'}" for what, ok in zip(GOALS, met, strict=True)]
    print(f"{pair}: {'; '.join(said)}", file=sys.stderr)


GOALS = (f"{SPEED} times as fast", f"1/{MEMORY} of the memory", f"error within {ERROR} of the exact truncation's")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", default="mixed,low")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--kohya", nargs=3, type=Path, metavar=("BASE", "TUNED", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kohya:
        base, tuned, output = options.kohya
        return kohya(base, tuned, output, options.rank)
    pairs.make()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| pair | program | seconds | / ours | RssAnon, GiB | / ours | error / exact | error - exact |")
    print("|---|---|---|---|---|---|---|---|")
    for pair in options.pairs.split(","):
        report(pair, options.rank)


if __name__ == "__main__":
    main()
