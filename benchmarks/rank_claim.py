"""The functional test of "almost every fine-tune lies within 64 ranks": what fine-tunes still do when cut to k ranks.

    python benchmarks/rank_claim.py [-o OUT] [--worlds quick:0,quick:1] [--small]

Makes the worlds in benchmarks/data/worlds where they are not there yet, measures every fine-tune of each, writes
result.json and report.html to OUT, and prints tables in Markdown. Each pair is kept as soon as it is measured, and the
same command continues. Held-out loss and the judge's score of base + rank-k change for k = 1, 2, 4, ... stand beside
adapters of the same ranks trained directly.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from lineage.rank_records import RankClaimResult, RankPair, RankPoint, answer
from lineage.records import restore
from lineage.results import dumps, provenance, to_json, write_files
from reports.build import build
from train import judge, pipeline, topology, world
from train.rank_claim import Protocol, examine
from train.topology import Model, World

DATA = Path(__file__).parent / "data"
SMALL = Protocol(ranks=(1, 8), trained=(1, 4), rates=(3e-3,), pictures=4, draws=2, drawn=4)


def progress(done: int, total: int, label: str) -> None:
    print(f"\r{done}/{total} {label:70}", end="", file=sys.stderr, flush=True)


def measure(name: str, out: Path, protocol: Protocol) -> list[RankPair]:
    """Every fine-tune of a world, from its file where it has been measured."""
    size, seed = name.split(":")
    plan = topology.draw(size, int(seed))
    kept = {m.name: out / "pairs" / f"{size}-{seed}-{m.name}.json" for m in plan.trained if m.parent}
    missing = [m for m in plan.trained if m.name in kept and not _fits(kept[m.name], protocol)]
    if missing:
        _examine(f"{size}-{seed}", plan, missing, kept, protocol)
    return [restore(RankPair, _read(file)["pair"]) for file in kept.values()]


def _examine(name: str, plan: World, missing: list[Model], kept: dict[str, Path], protocol: Protocol) -> None:
    folder = world.build(plan, DATA / "worlds" / name, progress)
    vae = pipeline.load(world.model_file(folder, plan.models[0].name)).vae
    judging = judge.fit(plan.styles, plan.seed, vae=vae, count=plan.pictures)
    for model in missing:
        pair = examine(name, plan, folder, model, judging, protocol, progress)
        text = json.dumps({"protocol": asdict(protocol), "pair": asdict(pair)}, indent=1)
        write_files(kept[model.name].parent, {kept[model.name].name: text + "\n"}, force=True)


def _read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def _fits(file: Path, protocol: Protocol) -> bool:
    """Whether a pair was measured in this way."""
    return file.exists() and _read(file)["protocol"] == json.loads(json.dumps(asdict(protocol)))


READINGS: dict[str, Callable[[RankPair, RankPoint], float | None]] = {
    "gain": lambda pair, point: pair.gain(point.outcome),
    "judge's score": lambda _, point: point.outcome.score,
    "energy": lambda _, point: point.energy,
    "energy of a Gaussian change": lambda _, point: point.gaussian,
}
ADAPTERS = {"extracted": "cut", "trained": "trained", "compressed": "compressed"}


def table(pairs: list[RankPair], reading: str) -> str:
    """Markdown: a row for each fine-tune, a column for each adapter that has the reading."""
    read = READINGS[reading]
    rows = [
        {"fine-tune": pair.name}
        | {
            f"{name} {'all' if point.rank is None else point.rank}": f"{value:.2f}"
            for kind, name in ADAPTERS.items()
            for point in getattr(pair, kind)
            for value in [read(pair, point)]
            if value is not None
        }
        for pair in pairs
    ]
    heads = list(dict.fromkeys(head for row in rows for head in row))
    lines = [heads, ["---"] * len(heads), *([row.get(head, "") for head in heads] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=DATA / "rank_claim", metavar="OUT")
    parser.add_argument("--worlds", default="quick:0,quick:1", help="size:seed, separated by commas")
    parser.add_argument("--small", action="store_true", help="few pictures and ranks, to see that it works")
    options = parser.parse_args()
    protocol = SMALL if options.small else Protocol()
    pairs = [pair for name in options.worlds.split(",") for pair in measure(name, options.output, protocol)]
    result = RankClaimResult(
        provenance=provenance("rank_claim", {}),
        pairs=tuple(pairs),
        ranks=protocol.ranks,
        draws=protocol.draws,
        pictures=protocol.pictures,
        answer=answer(pairs),
    )
    files = {"result.json": dumps(result), "report.html": build(to_json(result))}
    write_files(options.output, files, force=True)
    print(result.answer, *(f"{reading}\n\n{table(pairs, reading)}" for reading in READINGS), sep="\n\n")


if __name__ == "__main__":
    main()
