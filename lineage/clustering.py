"""`lineage cluster`: families, parents and merges of a folder of models, from weights alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from lineage.ancestry import grow
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.cluster_records import Found, records
from lineage.cluster_result import ClusterResult
from lineage.copies import permuted
from lineage.errors import FileError, LineageError
from lineage.evidence import Declared, Identity, declared, read_dates
from lineage.exact import LIMIT, choose, exact_gram
from lineage.families import kin as kinship
from lineage.families import trees
from lineage.fingerprint import Fingerprint, fingerprints
from lineage.folder import Folder, Item, scan
from lineage.gram import MOST_SPLIT, WHOLE, Gram, screen, shared, sketch_gram
from lineage.hashing import own_short_hash
from lineage.kin import Ancestry, Kin
from lineage.recipe import did_you_mean
from lineage.thresholds import CHOSEN, Thresholds

Progress = Callable[[int, int, str], None]
MOST_MEMBERS = 3500  # of a tree whose table is split into blocks: 24 of them take 2.4 GB
ADD_LIMIT = 10.0  # seconds of reading others again that an answer for one file is worth


@dataclass(frozen=True)
class Model:
    """One file that takes part. declared: what its metadata and card say of its parents."""

    name: str
    path: Path
    print: Fingerprint
    item: Item


@dataclass(frozen=True)
class Tree:
    """What was found about the models that grew from one root. members: in the order of `kin`.
    gram: theirs; whole: that of all models they can be compared with."""

    members: tuple[Model, ...]
    kin: Kin
    ancestry: Ancestry
    gram: Gram
    whole: Gram


@dataclass(frozen=True)
class Options:
    """How a tree is inferred; see `cluster`."""

    exact: bool
    base: str | None
    ignore: Collection[str]
    seed: int
    device: str
    chosen: Thresholds
    known: tuple[tuple[str, str, float], ...] = ()
    limit: float = 0.0  # seconds that reading the files of one tree again may take


def cluster(
    folder: str | Path,
    *,
    base: str | None = None,
    add: str | Path | None = None,
    dates: str | Path | None = None,
    metadata: bool = True,
    sketch: bool | None = None,
    min_confidence: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    engine: str | None = None,
    address: str | None = None,
    cache: str | Path | None = None,
    ignore: Collection[str] = (),
    chosen: Thresholds = CHOSEN,
    progress: Progress | None = None,
) -> ClusterResult:
    """The family tree of the models in `folder`: roots, families, fine-tunes, copies and merges, each with reasons.

    base: name of a model that is the root of its tree. add: one more file, answered for from what is cached. dates: CSV
    of name,date; a child never precedes its parent. metadata: let files speak of their origin. sketch: True takes
    distances from sketches, False reads all files again for them (default: whatever fits the time); what only entries
    tell is read from the files of every tree for which that fits the time. min_confidence: leave out edges below it.
    engine, address: joblib's backend for the fingerprints ("ray", "dask"). ignore: sources of evidence not to use
    (ancestry.SOURCES). LineageError for a folder without models and for names that are no model of it."""
    began = time.monotonic()
    scanned = scan(folder, also=add)
    models, scanned = _models(scanned, cache, engine, address, progress)
    names = [m.name for m in models]
    added = None if add is None else _added(scanned, Path(add))
    if base is not None and base not in names:
        raise LineageError(f"base {base!r}: no model of the folder. {did_you_mean(base, names)}")
    said = _said(models) if metadata else []
    days = read_dates(dates, names) if dates else {}
    limit = LIMIT if add is None else ADD_LIMIT
    choice = choose([m.print.bytes for m in models], sketch=sketch, limit=limit)
    options = Options(choice.exact, base, ignore, seed, device, chosen, _known(said, days, chosen), limit)
    grown = list(forest(models, options, progress))
    seconds = time.monotonic() - began
    return records(
        Found(scanned, models, grown, choice, said, days, min_confidence, seed, seconds, added, metadata=metadata)
    )


def _models(
    scanned: Folder, cache: str | Path | None, engine: str | None, address: str | None, progress: Progress | None
) -> tuple[list[Model], Folder]:
    """The folder's full models with their fingerprints, in an order that only their content decides; and the folder,
    where those that could not be read to the end count as unreadable."""
    items = scanned.of("model")
    if not items:
        raise LineageError(f"{scanned.path}: no models in it. Name the folder that holds the checkpoints.")
    paths, where = [item.path for item in items], Path(cache) if cache else None
    prints, reasons = fingerprints(paths, cache=where, engine=engine, address=address, progress=progress)
    found = [Model(item.name, item.path, prints[item.path], item) for item in items if item.path in prints]
    told = tuple(
        replace(item, bucket="unreadable", reason=reasons[item.path]) if item.path in reasons else item
        for item in scanned.items
    )
    if not found:
        raise LineageError(f"{scanned.path}: none of its models can be read. {next(iter(reasons.values()))}")
    return sorted(found, key=lambda m: (m.print.sha256, m.name)), replace(scanned, items=told)


def _added(scanned: Folder, path: Path) -> str:
    """The name of one more file, which must be a full model."""
    item = next(i for i in scanned.items if i.path.samefile(path))
    if item.bucket != "model":
        raise FileError(path, f"is no model ({item.kind or item.bucket}: {item.reason}).", "Give a full checkpoint.")
    return item.name


def _said(models: Sequence[Model]) -> list[Declared]:
    everyone = [Identity(m.name, m.path.stem, m.print.sha256, own_short_hash(m.path)) for m in models]
    return [
        d for m in models for d in declared(m.name, m.print.metadata, m.item.declared.get("base_model", ""), everyone)
    ]


def _known(
    said: Sequence[Declared], days: Mapping[str, date], chosen: Thresholds
) -> tuple[tuple[str, str, float], ...]:
    """(earlier, later, log-odds): what files and dates say of the order of two models."""
    pairs = [(parent, one.child, chosen.metadata) for one in said for parent in one.parents]
    pairs += [(a, b, chosen.dates) for a in days for b in days if days[a] < days[b]]
    return tuple(pairs)


def forest(models: Sequence[Model], options: Options, progress: Progress | None = None) -> Iterator[Tree]:
    """The trees of each group of models that can be compared."""
    groups: dict[str, list[Model]] = {}
    for m in models:
        groups.setdefault(m.item.group, []).append(m)
    done = 0
    for _, group in sorted(groups.items()):
        prints = {m.name: m.print for m in group}
        main = main_blocks(prints)
        gram = sketch_gram(prints) if len(group) <= MOST_SPLIT else None
        related = _related(prints, gram, set(main.values()), options.chosen)
        for a, b in permuted([m.print for m in group]):
            related[a, b] = related[b, a] = True
        grown = trees(related)
        del related  # of ten thousand models 100 MB
        for members in grown:
            done += len(members)
            if progress:
                progress(done, len(models), f"tree of {len(members)}")
            yield _tree([group[i] for i in members], gram, main, options)


def _related(prints: Mapping[str, Fingerprint], gram: Gram | None, main: Collection[str], chosen: Thresholds):
    """(n, n) whether two models are kin. gram: their table, None where they are too many for one."""
    if gram is None:
        return kinship(*screen(prints, main), chosen)
    rows = [i for i, block in enumerate(gram.blocks) if block in main]
    d = [gram.distances(gram.blocks[i]) for i in rows]
    return kinship(d, gram.norms[:, rows], gram.entries[rows], chosen)


def main_blocks(prints: Mapping[str, Fingerprint]) -> dict[str, str]:
    """Name -> block of the weights that say what models are: of their UNets, or all where they have none."""
    blocks = shared(prints).blocks
    first = next(iter(prints.values()))
    unet = {t.name for t in first.tensors if t.component == "unet"}
    return {name: block for name, block in blocks.items() if name in unet} or blocks


def _tree(members: list[Model], whole: Gram | None, main: Mapping[str, str], options: Options) -> Tree:
    prints = {m.name: m.print for m in members}
    with ExitStack() as stack:
        opened: list[Checkpoint | None] = [None for _ in members]
        gram = whole.part(list(prints)) if whole else sketch_gram(prints, split=MOST_MEMBERS)
        again = options.exact or choose([m.print.bytes for m in members], limit=options.limit).exact
        if again and len(members) > 1:
            opened = [stack.enter_context(open_checkpoint(m.path)) for m in members]
        if options.exact and len(members) > 1:
            gram = exact_gram({m.name: m.path for m in members}, prints=prints, device=options.device)
        kin = _kin(prints, opened, gram, main, options)
        base = list(prints).index(options.base) if options.base in prints else None
        found = grow(kin, base=base, ignore=options.ignore, seed=options.seed, chosen=options.chosen)
    return Tree(tuple(members), kin, found, gram, whole or gram)


def _kin(
    prints: Mapping[str, Fingerprint],
    opened: Sequence[Checkpoint | None],
    gram: Gram,
    main: Mapping[str, str],
    options: Options,
) -> Kin:
    """What the inference sees of a tree: the main component alone."""
    rows = [i for i, block in enumerate(gram.blocks) if block in main.values() or block == WHOLE]
    shapes = {t.name: t.shape for t in next(iter(prints.values())).tensors}
    where = {name: i for i, name in enumerate(prints)}
    return Kin(
        prints=tuple(prints.values()),
        models=opened,
        blocks=tuple(gram.blocks[i] for i in rows),
        # shared where it can be: of thousands of models it is gigabytes
        table=(gram.table if len(rows) == len(gram.blocks) else gram.table[rows]).astype(np.float64, copy=False),
        rounding=gram.rounding[:, rows].sum(1),
        matrices={name: block for name, block in main.items() if len(shapes[name]) > 1},
        vectors=tuple(sorted(name for name in main if len(shapes[name]) < 2)),
        known=tuple((where[a], where[b], w) for a, b, w in options.known if a in where and b in where),
    )
