"""On which model of a folder an adapter was trained, by what its metadata and card say; weights do not tell it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from lineage.folder import Item, stem
from lineage.hashing import own_short_hash
from lineage.predict_result import CERTAIN, GUESS, LIKELY, UNKNOWN, TrainingBase

CLOSE = 0.6  # likeness of two file names at which one may stand in for the other
LONGEST = 200  # characters of a name that are looked at
WHOLE, SHORT = 64, 8  # digits of a sha256, and of the web UI's old hash


@dataclass(frozen=True)
class Candidate:
    """A model that may be the base, and its file's own metadata."""

    name: str
    path: Path
    sha256: str
    metadata: Mapping[str, str]

    @cached_property
    def short(self) -> str:
        """The web UI's old hash, or ""."""
        return own_short_hash(self.path)

    def has(self, digest: str) -> bool:
        """Whether a hash is its own: the sha256, the beginning of it, or the old one."""
        return self.sha256.lower().startswith(digest) or (len(digest) == SHORT and self.short == digest)

    def mentions(self, digest: str) -> bool:
        """Whether its metadata holds that hash, as records of merges do."""
        return any(digest in text.lower() for text in self.metadata.values())


@dataclass(frozen=True)
class Claim:
    """By which hashes and names an adapter calls its base, the most telling first."""

    hashes: tuple[str, ...]
    names: tuple[str, ...]

    def base(self, model: str | None, sure: str, words: str) -> TrainingBase:
        """The record of a finding."""
        digest, name = next(iter(self.hashes), None), next(iter(self.names), None)
        return TrainingBase(model, sure == GUESS, sure, digest, name, words)

    def called_so(self, models: Sequence[Candidate]) -> list[str]:
        """Models whose file goes by one of the names."""
        wanted = {stem(name) for name in self.names}
        return sorted(m.name for m in models if wanted & {stem(m.name), stem(m.path.name)})


def training_base(adapter: Item, models: Sequence[Candidate]) -> TrainingBase:
    """The base that `adapter` declares or, where no file here is it, the one that may stand in for it."""
    said = adapter.declared
    hashes = filter(None, map(_hash, (said.get("sha256"), said.get("short_hash"))))
    claim = Claim(tuple(hashes), tuple(said[key][:LONGEST] for key in ("name", "base_model") if said.get(key)))
    return _by_hash(claim, models) or _by_name(claim, models) or _missing(claim, models)


def _hash(text: str | None) -> str | None:
    found = (text or "").strip().lower()
    return found if re.fullmatch(f"[0-9a-f]{{{SHORT},{WHOLE}}}", found) else None


def _by_hash(claim: Claim, models: Sequence[Candidate]) -> TrainingBase | None:
    for digest in claim.hashes:
        if found := sorted(m.name for m in models if m.has(digest)):
            sure = CERTAIN if len(digest) == WHOLE else LIKELY
            return claim.base(found[0], sure, f"the adapter names {found[0]} by its hash {digest[:10]}")
    return None


def _by_name(claim: Claim, models: Sequence[Candidate]) -> TrainingBase | None:
    """Where there is no hash, a name that one file alone has."""
    found = claim.called_so(models)
    if claim.hashes or len(found) != 1:
        return None
    return claim.base(found[0], LIKELY, f"the adapter names {found[0]}, without a hash")


def _missing(claim: Claim, models: Sequence[Candidate]) -> TrainingBase:
    if not claim.hashes and not claim.names:
        return claim.base(None, UNKNOWN, "neither the adapter's metadata nor a card says on what it was trained")
    known_as = next(iter(claim.names), "its base") + "".join(f" (hash {h[:10]})" for h in claim.hashes[:1])
    nearest, why = _stand_in(claim, models)
    if nearest is None:
        return claim.base(None, UNKNOWN, f"{known_as} is not in the folder, and nothing here is known to be near to it")
    return claim.base(nearest, GUESS, f"{known_as} is not found in the folder; {nearest} stands in for it, {why}")


def _stand_in(claim: Claim, models: Sequence[Candidate]) -> tuple[str | None, str]:
    """(a model made of the base, called as it is, or called nearly so; why it was chosen)."""
    if made := sorted(m.name for m in models if any(map(m.mentions, claim.hashes))):
        return made[0], "as its own metadata names that hash among what it was made of"
    if same := claim.called_so(models):
        return same[0], "a file of the same name, but not known to be the same"
    stems = {stem(m.name): m.name for m in sorted(models, key=lambda m: m.name)}
    close = [c for name in claim.names for c in get_close_matches(stem(name), list(stems), 1, CLOSE)]
    return (stems[close[0]], "guessed by its name") if close else (None, "")
