"""One read of a model, the exact pass over a folder of SD1.5-size files, and what sketches cost in precision.

    python benchmarks/scan.py [--files 12] [--hashes 200] [--skip-pass]

Needs benchmarks/data/base.safetensors (benchmarks/svd.py makes it). The other files are perturbed copies of it, written
beside it as far as the disk has room, and removed again. Every pass runs in a process of its own; each reading of the
bytes is timed right before the pass it is compared with, from the same state of the page cache. Peak memory is RssAnon,
read from /proc. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from svd import DATA, watch  # pyright: ignore[reportMissingImports]

from lineage.sketch import Hash, allocate

FOLDER = DATA / "scan"
PIECE = 1 << 22
SPARE = 8 << 30  # bytes of the disk that stay free

FINGERPRINT = """
import sys, time, torch
torch.set_num_threads(1)
from pathlib import Path
from lineage.fingerprint import fingerprint
from lineage.cache import Cache
path, folder = Path(sys.argv[1]), Path(sys.argv[2])
fingerprint(path, cache=folder / "first", seed=1)
cpu, start = time.process_time(), time.perf_counter()
fingerprint(path, cache=folder / "second")
seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
start = time.perf_counter()
fingerprint(path, cache=folder / "second")
again = time.perf_counter() - start
size = sum(f.stat().st_size for f in (folder / "second").rglob("*") if f.is_file())
Path(sys.argv[3]).write_text(f"{seconds} {cpu} {again} {size}", encoding="utf-8")
"""

EXACT = """
import sys, time
from pathlib import Path
from lineage.exact import exact_gram
from lineage.fingerprint import fingerprint
paths = {Path(p).stem: Path(p) for p in sys.argv[3:]}
prints = {name: fingerprint(p, cache=Path(sys.argv[1])) for name, p in paths.items()}
start = time.perf_counter()
gram = exact_gram(paths, prints=prints)
Path(sys.argv[2]).write_text(f"{time.perf_counter() - start} {gram.relative().max()}", encoding="utf-8")
"""

PRINTS = """
import sys
from pathlib import Path
from lineage.fingerprint import fingerprints
found, failed = fingerprints(sys.argv[2:], cache=Path(sys.argv[1]), jobs=2)
assert not failed, failed
"""


def perturbed(target: Path, seed: int) -> None:
    """A copy of the base with the lowest bits of its entries drawn anew: a change of about 1e-3."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 4, PIECE // 2, dtype=np.uint16)
    with open(DATA / "base.safetensors", "rb") as source, open(target, "wb") as out:
        (length,) = struct.unpack("<Q", source.read(8))
        source.seek(0)
        out.write(source.read(8 + length))
        while piece := source.read(PIECE):
            out.write(
                (np.frombuffer(piece, np.uint16) ^ np.roll(noise, int(rng.integers(PIECE)))[: len(piece) // 2]).data
            )


def files(count: int) -> list[Path]:
    """The base and as many perturbed copies as asked for and as the disk has room for."""
    FOLDER.mkdir(exist_ok=True)
    base = DATA / "base.safetensors"
    room = (shutil.disk_usage(FOLDER).free - SPARE) // base.stat().st_size
    made = [FOLDER / f"copy{i}.safetensors" for i in range(min(count - 1, room))]
    for i, path in enumerate(made):
        if not path.exists():
            perturbed(path, i)
    return [base, *made]


def read_once(paths: list[Path]) -> float:
    """Seconds to read all bytes, file after file, by plain reads of 4 MiB."""
    start, buffer = time.perf_counter(), bytearray(PIECE)
    for path in paths:
        with open(path, "rb", buffering=0) as f:
            while f.readinto(buffer):
                pass
    return time.perf_counter() - start


def run(code: str, *arguments: object) -> tuple[float, float]:
    """(seconds, peak RssAnon in GiB) of a piece of Python."""
    return watch([sys.executable, "-c", code, *map(str, arguments)])


def one_read(folder: Path) -> None:
    """Print the speed of fingerprinting the base, in the page cache, on one thread."""
    base, answer = DATA / "base.safetensors", folder / "answer"
    read_once([base])
    _, memory = run(FINGERPRINT, base, folder, answer)
    seconds, cpu, again, size = map(float, answer.read_text(encoding="utf-8").split())
    rate = base.stat().st_size / 1e6
    print("| fingerprint of 2.1 GB, float16, one thread | value |\n|---|---|")
    print(f"| MB/s | {rate / seconds:.0f} |\n| MB per second of processor time | {rate / cpu:.0f} |")
    print(f"| second run, ms | {1e3 * again:.0f} |\n| bytes in the cache | {size:.0f} |")
    print(f"| RssAnon of the process, GiB | {memory:.2f} |\n", flush=True)


def exact_pass(folder: Path, counts: list[int]) -> None:
    """Print time and memory of the exact pass against reading the bytes once."""
    made, answer = files(max(counts)), folder / "answer"
    run(PRINTS, folder / "cache", *made)
    print("| files | GB | reading once, s | exact pass, s | ratio | RssAnon, GiB |\n|---|---|---|---|---|---|")
    for count in sorted({min(n, len(made)) for n in counts}):
        paths = made[:count]
        read_once(paths)
        reading = read_once(paths)
        _, memory = run(EXACT, folder / "cache", answer, *paths)
        seconds = float(answer.read_text(encoding="utf-8").split()[0])
        total = sum(p.stat().st_size for p in paths) / 1e9
        print(
            f"| {count} | {total:.1f} | {reading:.1f} | {seconds:.1f} | {seconds / reading:.2f} | {memory:.2f} |",
            flush=True,
        )
    print()


Delta = Callable[[int, int, torch.Generator], torch.Tensor]
DELTAS: dict[str, Delta] = {
    "Gaussian": lambda m, n, g: torch.randn(m, n, generator=g),
    "rank 1": lambda m, n, g: torch.randn(m, 1, generator=g) @ torch.randn(1, n, generator=g),
    "rank 8": lambda m, n, g: torch.randn(m, 8, generator=g) @ torch.randn(8, n, generator=g),
    "1 % of the entries": lambda m, n, g: torch.randn(m, n, generator=g) * (torch.rand(m, n, generator=g) < 0.01),
    "row-scaled": lambda m, n, g: torch.randn(m, n, generator=g) * torch.randn(m, 1, generator=g).exp(),
    "equal rows": lambda m, n, g: torch.randn(1, n, generator=g).expand(m, n).contiguous(),
    "heavy-tailed": lambda m, n, g: torch.randn(m, n, generator=g) / torch.rand(m, n, generator=g).sqrt(),
}
MODEL = {f"layers.{i}.{name}.weight": (256 * (1 + i % 3), 512) for i in range(24) for name in ("up", "down")}


def sketch_errors(kind: str, hashes: int) -> list[float]:
    """Relative errors of squared sketch distances of a difference of `kind` over all of MODEL, one per hash."""
    g = torch.Generator().manual_seed(99)
    deltas = {name: DELTAS[kind](*shape, g) for name, shape in MODEL.items()}
    entries: dict[str, int] = {}
    for name, d in deltas.items():
        entries[name[:9]] = entries.get(name[:9], 0) + d.numel()
    slots, exact = allocate(entries), sum(float(d.double().square().sum()) for d in deltas.values())
    errors = []
    for seed in range(10_000, 10_000 + hashes):
        sums = {block: np.zeros(n) for block, n in slots.items()}
        for name, d in deltas.items():
            h = Hash(name, d.numel(), slots[name[:9]], seed)
            h.take(d.reshape(-1))
            sums[name[:9]] += h.sketch()
        errors.append(sum(float(s @ s) for s in sums.values()) / exact - 1)
    return errors


def sketches(hashes: int) -> None:
    """Print the errors of squared sketch distances, 65,536 slots over 24 blocks of 12.6 million entries."""
    print("| difference | hashes | mean error, % | median, % | 99.9th percentile, % | largest, % |")
    print("|---|---|---|---|---|---|")
    everything: list[float] = []
    for kind in DELTAS:
        errors = sketch_errors(kind, hashes)
        everything += errors
        print(_row(kind, errors), flush=True)
    print(_row("all", everything))


def _row(kind: str, errors: list[float]) -> str:
    sizes = 100 * np.abs(errors)
    percentile = f"{np.percentile(sizes, 99.9):.2f}" if len(errors) >= 1000 else "too few"
    mean = 100 * statistics.fmean(errors)
    return f"| {kind} | {len(errors)} | {mean:+.3f} | {np.median(sizes):.2f} | {percentile} | {sizes.max():.2f} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=12)
    parser.add_argument("--hashes", type=int, default=150)
    parser.add_argument("--skip-pass", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        one_read(FOLDER)
        if not options.skip_pass:
            exact_pass(FOLDER, [3, 6, options.files])
        sketches(options.hashes)
    finally:
        shutil.rmtree(FOLDER)


if __name__ == "__main__":
    main()
