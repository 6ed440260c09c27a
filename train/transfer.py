"""`lineage transfer-test`: cluster the bases, predict, and only then train adapters and put each on every model.

The folder belongs to one experiment. Predictions are written before the first training and never again; cells carry
their hash. Stopped at any moment, the same call does what is missing and ends with the same numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import lineage
from lineage import prediction
from lineage.contrasts import frame
from lineage.engines import in_parallel
from lineage.errors import LineageError
from lineage.records import restore
from lineage.results import provenance, write_files
from lineage.transfer_measures import readings
from lineage.transfer_records import Cell, PairPrediction, TransferResult, WorldFacts, predictions_hash, world_facts
from lineage.transfer_statistics import statistics
from lineage.verdicts import hypotheses
from train import topology, world
from train.cells import finished, jobs, run
from train.experiment import Experiment

Progress = Callable[[int, int, str], None]
NOTES = (
    "Miniature models of 3 million parameters, trained on drawn avatars, are not Stable Diffusion: what holds here is "
    "a hint of what to look for there.",
)


def transfer_test(
    experiment: Experiment,
    folder: Path | str,
    *,
    finished_only: bool = False,
    workers: int = 1,
    engine: str | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> TransferResult:
    """Run what is missing of the experiment in `folder`, world by world, and conclude.

    finished_only: conclude from the worlds that are finished, and run nothing. workers: processes; engine, address: a
    cluster instead (lineage.engines). LineageError where the folder holds another experiment, or cells that are older
    than the predictions."""
    # absolute: a training run's settings name its base and data as seen from there
    began, folder = time.monotonic(), Path(os.path.abspath(folder))
    world.claim(folder, "experiment.json", experiment.to_json(), "experiment")
    pools = partial(in_parallel, jobs=workers, engine=engine, address=address, progress=progress)
    seeds = [seed for seed in experiment.seeds if not finished_only or _complete(folder, experiment, seed)]
    if not seeds:
        raise LineageError(f"{folder}: no world is finished yet.")
    facts, foretold, cells = [], [], []
    for seed in seeds:
        fact, pairs, measured = _measured(folder, experiment, seed, pools, progress)
        facts.append(fact)
        foretold += pairs
        cells += measured
    found = readings(cells, facts, experiment.design)
    told = provenance("transfer-test", {}, seed=experiment.seeds[0], seconds=round(time.monotonic() - began, 1))
    return TransferResult(
        told, experiment.to_json(), experiment.hash, predictions_hash(foretold), experiment.design, tuple(facts),
        tuple(foretold), tuple(cells), found.dropped, statistics(cells, facts, foretold, experiment.design),
        hypotheses(frame(found)), notes=NOTES,
    )  # fmt: skip


def _measured(
    folder: Path, experiment: Experiment, seed: int, pools: Callable[..., list[list[Cell]]], progress: Progress | None
) -> tuple[WorldFacts, list[PairPrediction], list[Cell]]:
    """One world: what is missing of it is made, foretold and measured."""
    fact, pairs = _foretold(folder, experiment, seed, progress)
    todo = jobs(folder, experiment, seed, predictions_hash(pairs))
    if None in [finished(job) for job in todo]:  # all of them: stale ones are refused before anything is trained
        world.build(topology.draw(experiment.worlds.size, seed), home(folder, experiment, seed), progress)
    return fact, pairs, [cell for found in pools(run, todo) for cell in found]


def _complete(folder: Path, experiment: Experiment, seed: int) -> bool:
    files = [job.file for job in jobs(folder, experiment, seed, "")]
    return all(file.exists() for file in (_foretold_file(folder, experiment, seed), *files))


def forecast(experiment: Experiment) -> dict[str, int]:
    """What the experiment will do: worlds, models, adapters trained, cells measured, training steps in all."""
    plans = [topology.draw(experiment.worlds.size, seed) for seed in experiment.seeds]
    todo = [job for seed in experiment.seeds for job in jobs(Path(), experiment, seed, "")]
    adapters = sum(job.base is not None for job in todo)
    return {
        "worlds": len(plans),
        "models": sum(len(plan.models) for plan in plans),
        "adapters": adapters,
        "cells": sum(len(topology.draw(experiment.worlds.size, job.world_seed).models) for job in todo),
        "training steps": sum(plan.steps for plan in plans) + adapters * experiment.training.steps,
    }


def home(folder: Path, experiment: Experiment, seed: int) -> Path:
    """Where the world of `seed` lies."""
    return folder / "worlds" / f"{experiment.worlds.size}-{seed}"


def _foretold_file(folder: Path, experiment: Experiment, seed: int) -> Path:
    return folder / "predictions" / f"{home(folder, experiment, seed).name}.json"


def _foretold(
    folder: Path, experiment: Experiment, seed: int, progress: Progress | None
) -> tuple[WorldFacts, list[PairPrediction]]:
    """Facts and predictions of a world, made once, before its first training; they and its cells are all that another
    machine needs to go on."""
    made = home(folder, experiment, seed)
    file = _foretold_file(folder, experiment, seed)
    made_of = {"experiment": experiment.hash, "code": prediction.code_hash()}
    if not file.exists():
        world.build(topology.draw(experiment.worlds.size, seed), made, progress)
        facts = world_facts(made.name, json.loads((made / "truth.json").read_text(encoding="utf-8")))
        told = {"made_of": made_of, "facts": asdict(facts), "predictions": [asdict(p) for p in _pairs(made, facts)]}
        file.parent.mkdir(exist_ok=True)
        write_files(file.parent, {file.name: json.dumps(told, indent=1) + "\n"})
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["made_of"] != made_of:
        raise LineageError(f"{file}: was made by another predictor or experiment. Name another folder.")
    return restore(WorldFacts, told["facts"]), [restore(PairPrediction, p) for p in told["predictions"]]


def _pairs(made: Path, facts: WorldFacts) -> list[PairPrediction]:
    """From the weights of the world's models alone."""
    found = lineage.cluster(made / "models", metadata=False)
    tree, names = prediction.family_tree(found), [m.name for m in facts.models]
    return [
        PairPrediction(
            facts.name,
            p.base,
            p.model,
            p.strength,
            p.retention,
            {name: value(p.features) for name, value in prediction.BASELINES.items()},
            p.verdict,
            p.reason,
        )
        for p in prediction.predictions(tree, names, names)
        if p.base != p.model
    ]
