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
from statistics import fmean

import lineage
from lineage import prediction
from lineage.cluster_result import ClusterResult
from lineage.contrasts import frame
from lineage.engines import in_parallel
from lineage.errors import LineageError
from lineage.pairs import pick_device
from lineage.records import restore
from lineage.results import provenance, write_files
from lineage.transfer_measures import readings
from lineage.transfer_records import (
    NOT_TESTABLE,
    Cell,
    Failed,
    PairPrediction,
    TransferResult,
    WorldFacts,
    predictions_hash,
)
from lineage.transfer_statistics import statistics
from lineage.verdicts import hypotheses
from train import world
from train.cells import failed, finished, jobs, run
from train.experiment import Experiment
from train.own_files import FilesSite
from train.sites import Site, WorldSite

Progress = Callable[[int, int, str], None]
MINIATURE = (
    "Miniature models of 3 million parameters, trained on drawn avatars, are not Stable Diffusion: what holds here is "
    "a hint of what to look for there."
)
STEP, CELL, WORLD_STEP = 0.2, 1.6, 0.25  # seconds on one core
MODEL, ADAPTER = 16.3e6, 1e6  # bytes
ONE_WORLD = "One folder of models is one case: no interval over worlds can be given, and no claim gets a verdict."


def transfer_test(
    experiment: Experiment,
    folder: Path | str,
    *,
    finished_only: bool = False,
    device: str = "auto",
    workers: int = 1,
    engine: str | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> TransferResult:
    """Run what is missing of the experiment in `folder`, site by site, and conclude.

    finished_only: conclude from the worlds that are finished, and run nothing. device: of every job. workers:
    processes; engine, address: a cluster instead (lineage.engines). LineageError where the folder holds another
    experiment, or cells that are older than the predictions."""
    # absolute: a training run's settings name its base and data as seen from there
    began, folder = time.monotonic(), Path(os.path.abspath(folder))
    world.claim(folder, "experiment.json", experiment.to_json(), "experiment")
    device = str(pick_device(device))
    gpu = device.startswith("cuda")
    pools = partial(in_parallel, jobs=workers, engine=engine, address=address, gpu=gpu, progress=progress)
    chosen = [site for site in sites(folder, experiment) if not finished_only or _complete(folder, experiment, site)]
    if not chosen:
        raise LineageError(f"{folder}: no world is finished yet.")
    facts, foretold, cells, lost = [], [], [], []
    for site in chosen:
        fact, pairs, measured, diverged = _measured(folder, experiment, site, device, pools, progress)
        facts.append(fact)
        foretold += pairs
        cells += measured
        lost += diverged
    return _concluded(experiment, facts, foretold, cells, lost, time.monotonic() - began)


def _concluded(
    experiment: Experiment,
    facts: list[WorldFacts],
    foretold: list[PairPrediction],
    cells: list[Cell],
    lost: list[Failed],
    seconds: float,
) -> TransferResult:
    found = readings(cells, facts, experiment.design)
    claims = hypotheses(frame(found))
    if experiment.files:  # the article's roles are not in it
        claims = tuple(claim for claim in claims if claim.verdict != NOT_TESTABLE)
    told = provenance("transfer-test", {}, seed=experiment.seeds[0], seconds=round(seconds, 1))
    return TransferResult(
        told, experiment.to_json(), experiment.hash, predictions_hash(foretold), experiment.design, tuple(facts),
        tuple(foretold), tuple(cells), found.dropped, statistics(cells, facts, foretold, experiment.design),
        claims, tuple(lost), notes=(ONE_WORLD if experiment.files else MINIATURE,),
    )  # fmt: skip


def sites(folder: Path, experiment: Experiment) -> list[Site]:
    """Where it takes place: every world of the experiment, or its own files."""
    if experiment.files:
        return [FilesSite(experiment)]
    return [WorldSite(experiment, seed, folder) for seed in experiment.seeds]


def _measured(
    folder: Path, experiment: Experiment, site: Site, device: str, pools: Callable[..., list[list[Cell]]],
    progress: Progress | None,
) -> tuple[WorldFacts, list[PairPrediction], list[Cell], list[Failed]]:  # fmt: skip
    """One site: what is missing of it is made, foretold and measured."""
    fact, pairs = _foretold(folder, experiment, site, progress)
    todo = jobs(folder, experiment, site, predictions_hash(pairs), device)
    if None in [finished(job) for job in todo]:  # all of them: stale ones are refused before anything is trained
        site.make(progress)
        _check_models(_foretold_file(folder, site), site)
    cells = [cell for found in pools(run, todo) for cell in found]
    return fact, pairs, cells, [lost for job in todo if (lost := failed(job))]


def _complete(folder: Path, experiment: Experiment, site: Site) -> bool:
    files = [job.file for job in jobs(folder, experiment, site, "")]
    return all(file.exists() for file in (_foretold_file(folder, site), *files))


def forecast(experiment: Experiment, folder: Path) -> list[tuple[str, str]]:
    """What the experiment will do and how much is left: (number, what). Hours follow from the jobs that are finished in
    `folder`, else, for miniature worlds, from their rate on one core of a server; bytes likewise."""
    found = sites(folder, experiment)
    todo = [job for site in found for job in jobs(folder, experiment, site, "")]
    trained, left = [job for job in todo if job.base], [job for job in todo if not job.file.exists()]
    seconds = [json.loads(job.file.read_text(encoding="utf-8"))["seconds"] for job in trained if job.file.exists()]
    cells, steps = sum(job.count for job in todo), experiment.training.steps
    told = [
        (f"{len(found):,}", "sites: worlds, or one folder of models"),
        (f"{sum(len(site.models) for site in found):,}", "models"),
        (f"{len(trained):,}", f"adapters, {steps:,} steps each"),
        (f"{cells:,}", "cells"),
        (f"{len(left):,}", f"of {len(todo):,} jobs left to do"),
    ]
    unmade = [s.plan.steps for s in found if isinstance(s, WorldSite) and not _foretold_file(folder, s).exists()]
    if seconds or not experiment.files:
        each = fmean(seconds) if seconds else steps * STEP + cells / len(todo) * CELL
        hours = (len(left) * each + sum(unmade) * WORLD_STEP) / 3600
        told.append((f"{hours:.1f}", f"hours by one worker, {each:.0f} s for each job"))
    else:
        told.append(("?", "hours: known when the first job is done"))
    if not experiment.files:
        size = sum(len(site.models) for site in found) * MODEL + len(trained) * ADAPTER
        told.append((f"{size / 1e9:.1f}", "GB of disk"))
    return told


def _foretold_file(folder: Path, site: Site) -> Path:
    return folder / "predictions" / f"{site.name}.json"


def _foretold(
    folder: Path, experiment: Experiment, site: Site, progress: Progress | None
) -> tuple[WorldFacts, list[PairPrediction]]:
    """Facts and predictions of a site, made once, before its first training; they and its cells are all that another
    machine needs to go on."""
    file = _foretold_file(folder, site)
    made_of = {"experiment": experiment.hash, "code": prediction.code_hash()}
    if not file.exists():
        found = lineage.cluster(site.make(progress), metadata=False)
        facts = site.facts(found)
        told = {"made_of": made_of, "models": site.hashes(), "facts": asdict(facts)}
        told["predictions"] = [asdict(p) for p in _pairs(found, facts)]
        file.parent.mkdir(exist_ok=True)
        write_files(file.parent, {file.name: json.dumps(told, indent=1) + "\n"})
    told = json.loads(file.read_text(encoding="utf-8"))
    if told["made_of"] != made_of:
        raise LineageError(f"{file}: was made by another predictor or experiment. Name another folder.")
    return restore(WorldFacts, told["facts"]), [restore(PairPrediction, p) for p in told["predictions"]]


def _check_models(foretold: Path, site: Site) -> None:
    told = json.loads(foretold.read_text(encoding="utf-8")).get("models", {})
    for name, digest in site.hashes().items():
        if told.get(name) != digest:
            raise LineageError(
                f"{name}: is no longer the model that {foretold} was made from. Put it back, or name another folder."
            )


def _pairs(found: ClusterResult, facts: WorldFacts) -> list[PairPrediction]:
    """From the weights of the models alone."""
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
