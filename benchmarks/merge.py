"""`lineage merge` against sd-mecha and a load-all script, all in one run.

    python benchmarks/merge.py [--cases pair,chain,sdxl,ckpt] [--rounds 3] [--models 7] [--cached]

Makes float16 checkpoints with the names and shapes of SD1.5 (2.1 GB) and SDXL (6.9 GB) in benchmarks/data, times whole
commands, each with the `sync` that follows it, best of the rounds, and prints a table in Markdown. `limit` reads the
inputs, copies an output and syncs. The inputs are dropped from the page cache before every run, so they come from the
disk, as models that were not just used do; `--cached`: they are not. `inputs known`: files that an earlier run has
hashed are not hashed again. Peak memory is RssAnon, read from /proc. Linux only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import stable_diffusion  # pyright: ignore[reportMissingImports]

from lineage.keys import to_ldm

DATA = Path(__file__).parent / "data"
OUT = DATA / "merged"
WEIGHTS = (0.5, 0.333, 0.25, 0.2, 0.166, 0.142)
PEERS = {
    "sd-mecha": """
import sys, torch, sd_mecha
from pathlib import Path
first, *others = (sd_mecha.model(Path(p).absolute()) for p in sys.argv[2:])
recipe = first
for other, m in zip(others, (0.5, 0.333, 0.25, 0.2, 0.166, 0.142)):
    recipe = sd_mecha.weighted_sum(recipe, other, alpha=m)
sd_mecha.merge(recipe, output=Path(sys.argv[1]).absolute(), merge_device="cpu",
               merge_dtype=torch.float16, output_dtype=torch.float16)
""",
    "load-all": """
import sys
from safetensors.torch import load_file, save_file
first, *others = sys.argv[2:]
a = load_file(first)
for other, m in zip(others, (0.5, 0.333, 0.25, 0.2, 0.166, 0.142)):
    b = load_file(other)
    for k in a:
        a[k] = ((1 - m) * a[k]) + (m * b[k])
    del b
save_file(a, sys.argv[1])
""",
}


def make(kind: str, name: str, seed: int) -> Path:
    """A checkpoint of `kind` (sd1, sdxl); entries repeat after 2^22, which no merger can profit from."""
    path = DATA / f"{name}.safetensors"
    if not path.exists():
        DATA.mkdir(parents=True, exist_ok=True)
        shapes = to_ldm(stable_diffusion.states(stable_diffusion.full(kind)), kind)
        noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)).half()
        filled = lambda n: noise.repeat(-(-n // len(noise)))[:n].clone()  # noqa: E731  a view would hold all of it
        save_file({n: filled(t.numel()).view(t.shape) for n, t in shapes.items()}, path, {"format": "pt"})
    return path


def recipe(files: list[Path], container: str) -> Path:
    """The article's chain of averages over `files`."""
    lines = [f"x1 = {files[0].stem} + {files[1].stem}, {WEIGHTS[0]}, fp16, {container}"]
    for i, file in enumerate(files[2:], 1):
        lines.append(f"x{i + 1} = __O{i}__ + {file.stem}, {WEIGHTS[i]}, fp16, {container}")
    path = DATA / "recipe.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def commands(files: list[Path], container: str) -> Iterator[tuple[str, list[str]]]:
    """(name, command) of every contender; each writes into OUT."""
    inputs, copied = " ".join(map(str, files)), OUT / "copied"
    yield "limit", ["sh", "-c", f"cat {inputs} > /dev/null; cp {files[0]} {copied}"]
    lineage = Path(sys.executable).with_name("lineage")
    places = ["--models", str(DATA), "-o", str(OUT), "--force", "-q"]
    merge = [str(lineage), "merge", str(recipe(files, container)), *places]
    yield "lineage", ["env", f"LINEAGE_CACHE={OUT / 'cache'}", *merge]
    yield "lineage, inputs known", ["env", f"LINEAGE_CACHE={DATA / 'cache'}", *merge]
    yield "lineage --no-hashes", [*merge, "--no-hashes"]
    if container == "safetensors":
        for name, code in PEERS.items():
            yield name, [sys.executable, "-c", code, str(OUT / f"{name}.safetensors"), *map(str, files)]


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds with the sync after it, peak RssAnon in GiB) of a command."""
    subprocess.run(["sync"], check=True)
    start, peak = time.perf_counter(), 0
    with open(OUT / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.02)
    subprocess.run(["sync"], check=True)
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{(OUT / 'log').read_text('utf-8')[-2000:]}")
    return time.perf_counter() - start, peak / 2**20


def anonymous(pid: int) -> int:
    """RssAnon of a process in KiB; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def race(case: str, files: list[Path], container: str, rounds: int, *, cached: bool) -> None:
    """Best of the rounds, contenders taking turns; prints rows of the table."""
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, command in commands(files, container):
            shutil.rmtree(OUT, ignore_errors=True)
            OUT.mkdir(parents=True)
            if not cached:
                forget(files)
            seconds, peak = timed(command)
            print(f"{case}: {name}: {seconds:.1f} s", file=sys.stderr)
            before = best.get(name, (seconds, peak))
            best[name] = (min(seconds, before[0]), max(peak, before[1]))
    shutil.rmtree(OUT, ignore_errors=True)
    ours, bare, limit = (best[name][0] for name in ("lineage", "lineage, inputs known", "limit"))
    for name, (seconds, peak) in best.items():
        row = f"{seconds:.1f} | {seconds / ours:.2f} | {seconds / bare:.2f} | {seconds / limit:.2f}"
        print(f"| {case} | {name} | {row} | {peak:.2f} |", flush=True)


def check(files: list[Path]) -> None:
    """Our output of the pair is the load-all script's, bit for bit."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name, command in commands(files, "safetensors"):
        if name in ("lineage --no-hashes", "load-all"):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    ours, theirs = load_file(OUT / "x1.safetensors"), load_file(OUT / "load-all.safetensors")
    same = all(torch.equal(ours[k].view(torch.int16), theirs[k].view(torch.int16)) for k in theirs if k in ours)
    print(f"\nSame bits as the load-all script: {same and ours.keys() == theirs.keys()}")
    shutil.rmtree(OUT, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="pair,chain,sdxl,ckpt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", type=int, default=7, help="files of the chain")
    parser.add_argument("--cached", action="store_true", help="inputs stay in the page cache")
    args = parser.parse_args()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print("| case | program | seconds | / ours | / ours, inputs known | / limit | RssAnon, GiB |")
    print("|---|---|---|---|---|---|---|")
    cases = args.cases.split(",")
    if {"pair", "ckpt"} & set(cases):
        pair = [make("sd1", f"merge-{i}", i) for i in range(2)]
    if "pair" in cases:
        race("two SD1.5", pair, "safetensors", args.rounds, cached=args.cached)
    if "ckpt" in cases:
        race("two SD1.5, .ckpt out", pair, "ckpt", args.rounds, cached=args.cached)
    if "chain" in cases:
        chain = [make("sd1", f"merge-{i}", i) for i in range(args.models)]
        race(f"chain of {args.models - 1} lines", chain, "safetensors", args.rounds, cached=args.cached)
    if "sdxl" in cases:
        race(
            "two SDXL",
            [make("sdxl", f"merge-xl-{i}", i) for i in range(2)],
            "safetensors",
            args.rounds,
            cached=args.cached,
        )
    if "pair" in cases:
        check(pair)


if __name__ == "__main__":
    main()
