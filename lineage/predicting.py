"""`lineage predict`: on which models of a folder an adapter will work, or on which of them to train one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lineage.adapters import NO_MODULE, Adapter, bind, open_adapter
from lineage.advice import advise, named
from lineage.cache import identify
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.cluster_result import ClusterModel, ClusterResult, Edge
from lineage.clustering import cluster
from lineage.errors import FileError, LineageError
from lineage.fingerprint import fingerprints
from lineage.folder import look, scan
from lineage.gram import Gram, sketch_gram
from lineage.predict_result import (
    BASE_UNKNOWN,
    OTHER_ARCHITECTURE,
    AdapterFacts,
    Constants,
    Forecast,
    ListedModel,
    PredictResult,
    TrainingBase,
)
from lineage.prediction import CONSTANTS, FamilyTree, code_hash, family_tree, predict_pair
from lineage.results import provenance
from lineage.training_base import Candidate, training_base

Progress = Callable[[int, int, str], None]
FITS = 0.5  # of the adapter's layers that a model must have for it to be meant for such models
V_METADATA = "ss_v_parameterization"


@dataclass(frozen=True)
class Header:
    """What a model's header tells. fits: share of the adapter's layers that find a place; clash: one that finds another
    shape there, or ""."""

    metadata: Mapping[str, str]
    prediction_type: str | None
    fits: float
    clash: str


def predict(
    adapter: str | Path | None,
    folder: str | Path,
    *,
    targets: Sequence[str | Path] = (),
    constants: Constants = CONSTANTS,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> PredictResult:
    """How strong `adapter` (LoRA, LoCon, LoHa, LoKr) will be on every model of `folder`, and how much of their own
    style they keep; or, with `targets` (names or files of the folder) and no adapter, which base to train on for them.

    Each model is read once; what is cached, not at all. LineageError for an adapter that is none, for unknown targets,
    and where both or neither are given."""
    if (adapter is None) == (not targets):
        raise LineageError("predict: give an adapter file, or targets to train for; one of the two.")
    began, folder = time.monotonic(), Path(folder)
    opened = None if adapter is None else _adapter(Path(adapter))
    found = cluster(folder, sketch=True, cache=cache, progress=progress)
    models = {m.name: m for m in found.models if m.kind == "model"}
    tree = family_tree(found, () if found.distances.models else _grams(folder, cache))
    listed, wanted = tuple(_listed(models, tree)), tuple(dict.fromkeys(named(t, tree.names) for t in targets))
    told = (None, None, ())
    if opened is not None:
        told = _told(opened, {m.name: folder / m.file for m in listed}, models, tree, constants)
    made = provenance("predict", _inputs(opened, found), seconds=round(time.monotonic() - began, 3))
    advice = advise(tree, wanted, constants)
    return PredictResult(made, found.folder, listed, *told, wanted, advice, constants, code_hash())


def _told(
    adapter: Adapter, files: Mapping[str, Path], models: Mapping[str, ClusterModel], tree: FamilyTree, c: Constants
) -> tuple[AdapterFacts, TrainingBase, tuple[Forecast, ...]]:
    """What is said of an adapter, and what it will do on each of `files` (name -> path)."""
    headers = {name: _header(path, adapter) for name, path in files.items()}
    candidates = [Candidate(n, path, models[n].sha256 or "", headers[n].metadata) for n, path in files.items()]
    base = training_base(look(adapter.path), candidates)
    facts = _facts(adapter, headers.get(base.model or ""), base)
    return facts, base, tuple(_forecast(name, facts, base, header, tree, c) for name, header in headers.items())


def _adapter(path: Path) -> Adapter:
    item = look(path) if path.exists() else None
    if item is not None and item.bucket not in ("adapter", "unreadable"):
        raise FileError(path, f"is no adapter ({item.kind or item.bucket}).", "Give a LoRA, LoCon, LoHa or LoKr file.")
    return open_adapter(path)


def _inputs(adapter: Adapter | None, found: ClusterResult) -> dict:
    own = {} if adapter is None else {"adapter": identify(adapter.path)}
    return {**own, **found.provenance.inputs}


def _grams(folder: Path, cache: str | Path | None) -> list[Gram]:
    """Distances of folders too large for the family tree's result to keep them; everything read is cached by now."""
    made = []
    for items in scan(folder).groups.values():
        prints, _ = fingerprints([i.path for i in items], cache=Path(cache) if cache else None)
        made.append(sketch_gram({i.name: prints[i.path] for i in items if i.path in prints}))
    return made


def _listed(models: Mapping[str, ClusterModel], tree: FamilyTree) -> Iterator[ListedModel]:
    """Depth first, the largest tree first, children below their main parent and by name."""
    parent = {name: _main_parent(tree, name) for name in sorted(models)}
    size = Counter(m.root for m in models.values())
    heads = sorted(parent, key=lambda n: (parent[n] is not None, -size[models[n].root], n))
    seen: set[str] = set()
    for head in heads:  # all of them, as a circle has no first one
        open_ = [(head, 0)]
        while open_:
            name, depth = open_.pop()
            if name not in seen:
                seen.add(name)
                m = models[name]
                yield ListedModel(name, m.file, m.architecture, m.root or name, m.family or name, depth)
                open_ += [(child, depth + 1) for child in reversed(parent) if parent[child] == name]


def _main_parent(tree: FamilyTree, name: str) -> str | None:
    """The one with the largest share; None for a root, and below an ancestor that is in no file."""
    above: list[Edge] = [e for _, _, e in tree.descent.in_edges(name, data="edge") if e.parent in tree.at]
    best = max(above, key=lambda e: (1.0 if e.weight is None else e.weight, e.confidence, e.parent), default=None)
    return best.parent if best else None


def _header(path: Path, adapter: Adapter) -> Header:
    with open_checkpoint(path) as checkpoint:
        return Header(checkpoint.metadata, checkpoint.prediction_type, *_fit(adapter, checkpoint))


def _fit(adapter: Adapter, checkpoint: Checkpoint) -> tuple[float, str]:
    bound, unmatched = bind(adapter, checkpoint.specs)
    clashes = [row["name"] for row in unmatched if row["name"] in adapter.modules and row["reason"] != NO_MODULE]
    return len(bound) / len(adapter.modules), min(clashes, default="")


def _facts(adapter: Adapter, base: Header | None, found: TrainingBase) -> AdapterFacts:
    said = adapter.metadata.get(V_METADATA, "").lower()
    own = {"true": "v", "false": "epsilon"}.get(said)
    of_base = base.prediction_type if base and not found.stands_in else None
    path = adapter.path
    return AdapterFacts(path.stem, path.name, adapter.kind, len(adapter.modules), own or of_base)


def _forecast(
    model: str, adapter: AdapterFacts, base: TrainingBase, header: Header, tree: FamilyTree, constants: Constants
) -> Forecast:
    if why := _misfit(adapter, header):
        return Forecast(model, OTHER_ARCHITECTURE, f"refused: {why}", header.fits)
    warnings = tuple(_warnings(adapter, header))
    if base.model is None:
        words = "its layers fit; whether it works depends on the base it was trained on"
        return Forecast(model, BASE_UNKNOWN, words, header.fits, warnings)
    p = predict_pair(tree, base.model, model, constants)
    stands_in = base.stands_in and base.model == model
    reason = "stands in for the missing base: near to it, as far as is known" if stands_in else p.reason
    sure = None if base.stands_in else p.confidence
    return Forecast(
        model, p.verdict, reason, header.fits, warnings, p.strength, p.retention, p.relation, p.features.distance, sure
    )


def _misfit(adapter: AdapterFacts, header: Header) -> str:
    if header.clash:
        return f"{header.clash} has another shape there"
    return "" if header.fits >= FITS else f"{header.fits:.0%} of the {adapter.modules} layers it changes exist there"


def _warnings(adapter: AdapterFacts, header: Header) -> Iterator[str]:
    ours, theirs = adapter.prediction_type, header.prediction_type
    if ours and theirs and ours != theirs:
        yield f"predicts {_kind(theirs)}, and the adapter was trained to predict {_kind(ours)}: pictures will break"
    elif ours == "v" and theirs is None:
        yield "no word of v-prediction, for which the adapter was trained"
    if header.fits < 1:
        yield f"lacks {1 - header.fits:.0%} of the layers that the adapter changes"


def _kind(prediction_type: str) -> str:
    return {"v": "v", "epsilon": "noise (epsilon)"}.get(prediction_type, prediction_type)
