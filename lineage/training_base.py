"""On which model of a folder an adapter was trained, by what its metadata and card say; weights do not tell it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from lineage.folder import Item, stem
from lineage.hashing import short_hash
from lineage.predict_result import CERTAIN, GUESS, LIKELY, UNKNOWN, TrainingBase

CLOSE = 0.6  # likeness of two file names at which one may stand in for the other
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
        """The web UI's old hash; "" of a folder, and of files too small to have one of their own."""
        whole = self.path.is_file() and self.path.stat().st_size > 0x100000
        return short_hash(self.path) if whole else ""

    def has(self, digest: str) -> bool:
        """Whether a hash is its own: the sha256, the beginning of it, or the old one."""
        return self.sha256.lower().startswith(digest) or (len(digest) == SHORT and self.short == digest)

    def mentions(self, digest: str) -> bool:
        """Whether its metadata holds that hash, as records of merges do."""
        return any(digest in text.lower() for text in self.metadata.values())


def training_base(adapter: Item, models: Sequence[Candidate]) -> TrainingBase:
    """The base that `adapter` declares or, where no file here is it, the one that may stand in for it."""
    said = adapter.declared
    hashes = [h for h in map(_hash, (said.get("sha256"), said.get("short_hash"))) if h]
    names = [said[key] for key in ("name", "base_model") if said.get(key)]
    digest, name = next(iter(hashes), None), next(iter(names), None)
    if not hashes and not names:
        return TrainingBase(
            None, False, UNKNOWN, None, None, "neither its metadata nor a card says on what it was trained"
        )
    for h in hashes:
        if found := sorted(m.name for m in models if m.has(h)):
            sure = CERTAIN if len(h) == WHOLE else LIKELY
            return TrainingBase(found[0], False, sure, h, name, f"its metadata names that file by its hash {h[:10]}")
    same = _called(names, models)
    if not hashes and len(same) == 1:
        return TrainingBase(same[0], False, LIKELY, None, name, f"it names {name!r}; a name is no proof")
    nearest, why = _stand_in(hashes, names, same, models)
    missing = f"{name or 'its base'}{f' (hash {digest[:10]})' if digest else ''} is not in the folder"
    if nearest is None:
        return TrainingBase(
            None, False, UNKNOWN, digest, name, f"{missing}, and nothing here is known to be near to it"
        )
    return TrainingBase(nearest, True, GUESS, digest, name, f"{missing}; {nearest} stands in for it, {why}")


def _hash(text: str | None) -> str | None:
    found = (text or "").strip().lower()
    return found if re.fullmatch(f"[0-9a-f]{{{SHORT},{WHOLE}}}", found) else None


def _called(names: Sequence[str], models: Sequence[Candidate]) -> list[str]:
    wanted = {stem(name) for name in names}
    return sorted(m.name for m in models if stem(m.name) in wanted or stem(m.path.name) in wanted)


def _stand_in(
    hashes: Sequence[str], names: Sequence[str], same: Sequence[str], models: Sequence[Candidate]
) -> tuple[str | None, str]:
    """(a model made of the base, called as it is, or called nearly so; why it was chosen)."""
    if made := sorted(m.name for m in models if any(map(m.mentions, hashes))):
        return made[0], "as its own metadata names that hash among what it was made of"
    if same:
        return same[0], "another file of the same name"
    stems = {stem(m.name): m.name for m in sorted(models, key=lambda m: m.name)}
    close = [c for name in names for c in get_close_matches(stem(name), list(stems), 1, CLOSE)]
    return (stems[close[0]], "guessed by its name") if close else (None, "")
