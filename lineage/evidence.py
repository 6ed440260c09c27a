"""What files say of their own origin: metadata records of merges and training, and dates. Evidence, never proof."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from lineage.cluster_result import Contradiction, Edge, Evidence
from lineage.errors import FileError, LineageError
from lineage.graph import ancestors
from lineage.recipe import did_you_mean

MERGE_HASHES = ("primary_model_hash", "secondary_model_hash", "tertiary_model_hash")
_MECHA = re.compile(r'^model "([^"\n]{1,500})"', re.MULTILINE)


@dataclass(frozen=True)
class Identity:
    """By what others may call a model: its name here, file stem, sha256 and the web UI's old 8-digit hash."""

    name: str
    stem: str
    sha256: str
    short: str = ""


@dataclass(frozen=True)
class Declared:
    """What one file says: its parents' names as found in this folder, those not found, and which record says so."""

    child: str
    parents: tuple[str, ...]
    unknown: tuple[str, ...]
    source: str


def declared(name: str, metadata: Mapping[str, str], card: str, models: Sequence[Identity]) -> list[Declared]:
    """Every record of parents in a file's metadata, and the base that its card names ("" for none)."""
    found = []
    for source, mentions in _mentions(metadata, card):
        known = [next((m.name for m in models if _is(m, mention) and m.name != name), None) for mention in mentions]
        parents = tuple(dict.fromkeys(k for k in known if k))
        unknown = tuple(m for m, k in zip(mentions, known, strict=True) if not k)
        if parents or unknown:
            found.append(Declared(name, parents, unknown, source))
    return found


def _is(model: Identity, mention: str) -> bool:
    """By sha256, by old hash, or by file name or the last part of a hub name."""
    said = mention.strip().casefold()
    if len(said) >= 8 and re.fullmatch("[0-9a-f]+", said):
        return model.sha256.startswith(said) or model.short == said
    stem = re.sub(r"\.(safetensors|ckpt|pt|pth|bin)$", "", re.split(r"[/\\]", said)[-1])
    return stem in (model.name.casefold(), model.stem.casefold())


def _mentions(metadata: Mapping[str, str], card: str) -> Iterator[tuple[str, list[str]]]:
    recipe = _json(metadata.get("sd_merge_recipe"))
    if hashes := [str(recipe[key]) for key in MERGE_HASHES if recipe.get(key)]:
        yield "sd_merge_recipe", hashes
    elif isinstance(recipe.get("inputs"), dict):
        yield "sd_merge_recipe", [_input(name, said) for name, said in recipe["inputs"].items()]
    if mecha := _MECHA.findall(metadata.get("mecha_recipe") or ""):
        yield "mecha_recipe", list(dict.fromkeys(mecha))
    if merged := metadata.get("modelspec.merged_from"):
        yield "modelspec.merged_from", [part for part in re.split(r"\s*,\s*", merged) if part]
    if trained := metadata.get("ss_new_sd_model_hash") or metadata.get("ss_sd_model_hash"):
        yield "ss_new_sd_model_hash" if metadata.get("ss_new_sd_model_hash") else "ss_sd_model_hash", [trained]
    if card:
        yield "model card", [card]


def _input(name: str, said: Any) -> str:
    return str(said["sha256"]) if isinstance(said, dict) and said.get("sha256") else str(name)


def _json(text: str | None) -> dict[str, Any]:
    """A JSON object from a stranger's metadata; {} for anything else."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_dates(path: str | Path, names: Iterable[str]) -> dict[str, date]:
    """name -> day from a CSV of `name,date` (ISO dates; a header line is allowed). LineageError for another form, or
    for a name that is no model of the folder."""
    known, found = set(names), {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise FileError(path, f"cannot be read as a CSV ({e}).", "Give lines of name,date.") from e
    if rows and [cell.strip().casefold() for cell in rows[0][:2]] == ["name", "date"]:
        rows = rows[1:]
    for number, row in enumerate(rows, 1):
        if len(row) < 2:
            raise FileError(path, f"line {number} holds {row!r}.", "Each line is name,date.")
        name = row[0].strip()
        if name not in known:
            raise LineageError(f"{path}: line {number}: no model {name!r}. {did_you_mean(name, known)}")
        try:
            found[name] = date.fromisoformat(row[1].strip()[:10])
        except ValueError as e:
            raise FileError(path, f"line {number}: {row[1]!r} is no date.", "Write 2023-03-31.") from e
    return found


def reconcile(
    edges: Sequence[Edge], said: Sequence[Declared], root_of: Mapping[str, str | None]
) -> tuple[list[Edge], list[Contradiction]]:
    """Edges with what the files say added to their evidence, edges that only files declare, and what contradicts.

    root_of: model -> root of its tree; None for adapters, whose relation only files can tell."""
    kept = {(e.parent, e.child): e for e in edges}
    against: list[Contradiction] = []
    for one in said:
        for parent in one.parents:
            pair = parent, one.child
            words = Evidence("metadata", f"{one.source} of the child names the parent")
            if pair in kept:
                kept[pair] = _confirmed(kept[pair], words)
            elif root_of.get(one.child) is None:
                kept[pair] = Edge(*pair, "adapter", None, None, None, True, 0.9, (words,), declared=True)
            elif fault := _fault(one.child, parent, kept, root_of):
                against.append(Contradiction(one.child, one.source, f"made from {parent}", fault))
    return sorted(kept.values(), key=lambda e: (e.child, e.parent, e.relation)), against


def not_from_scratch(claims: Mapping[str, str], edges: Sequence[Edge]) -> Iterator[Contradiction]:
    """Where weights show parents of a model whose card says that it has none. claims: model -> the card's words."""
    for name, words in sorted(claims.items()):
        above = sorted({e.parent for e in edges if e.child == name and e.directed and e.relation != "component"})
        if words and above:
            yield Contradiction(name, "card", words, f"made from {', '.join(above)}")


def _confirmed(edge: Edge, words: Evidence) -> Edge:
    """Two kinds of evidence agree: what is left of the doubt is a third."""
    sure = round(1 - (1 - edge.confidence) / 3, 4)
    return replace(edge, directed=True, confidence=sure, evidence=(*edge.evidence, words))


def _fault(
    child: str, parent: str, kept: Mapping[tuple[str, str], Edge], root_of: Mapping[str, str | None]
) -> str | None:
    """What weights show instead of a declared parent, or None where they leave room for it."""
    if root_of.get(child) != root_of.get(parent):
        return "the weights share no initialisation"
    if (child, parent) in kept:
        return f"the weights show {parent} as made from {child}"
    above = {c: [p for p, d in kept if d == c] for c in {d for _, d in kept}}
    if parent in ancestors(above, child):
        return None
    found = ", ".join(sorted(above.get(child, []))) or "no parent in the folder"
    return f"the weights show {found} as its parent"
