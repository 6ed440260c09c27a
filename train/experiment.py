"""What a transfer experiment is: frozen settings, read from TOML; without a file, the quick miniature world.

[worlds]
size = "small"
seeds = [1, 2, 3]
[training]
steps = 150
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lineage import prediction
from lineage.errors import FileError, LineageError
from lineage.recipe import did_you_mean
from lineage.transfer_records import Design
from train.topology import SHAPES
from train.values import CHOICES, read_value


@dataclass(frozen=True)
class Worlds:
    """size and seeds of the miniature worlds; `confirmatory`: so many worlds whose seeds nobody chose, in place of
    `seeds`. `styles` and `characters`: how many targets of each kind in a world."""

    size: str = "quick"
    seeds: tuple[int, ...] = (0,)
    confirmatory: int = 0
    styles: int = 1
    characters: int = 0


@dataclass(frozen=True)
class Lessons:
    """One adapter per base, target and seed: `steps` on `pictures` pictures, with checkpoints at the steps `at`."""

    network: str = "loha"
    steps: int = 100
    batch: int = 16
    lr: float = 2e-2
    pictures: int = 100
    seeds: tuple[int, ...] = (0, 1)
    at: tuple[int, ...] = ()
    clip_skip: int = 1


@dataclass(frozen=True)
class Measures:
    """held_out pictures, each at `draws` timesteps; `drawn` pictures for the judges; weights as in Design."""

    held_out: int = 24
    draws: int = 4
    drawn: int = 6
    steps: int = 20
    guidance: float = 4.0
    weight: float = 0.65
    reference_weight: float = 1.0


LEAST = {
    "worlds.confirmatory": 0,
    "training.steps": 1,
    "training.batch": 1,
    "training.pictures": 1,
    "training.clip_skip": 1,
    "measures.held_out": 2,  # one picture has no standard error
    "measures.draws": 1,
    "measures.drawn": 1,
    "measures.steps": 1,
}
TABLES: dict[str, type] = {"worlds": Worlds, "training": Lessons, "measures": Measures}


@dataclass(frozen=True)
class Experiment:
    """All settings. LineageError where a value is not allowed, or nothing would be trained."""

    worlds: Worlds = field(default_factory=Worlds)
    training: Lessons = field(default_factory=Lessons)
    measures: Measures = field(default_factory=Measures)

    def __post_init__(self) -> None:
        if self.worlds.size not in SHAPES:
            raise LineageError(f"worlds.size: {self.worlds.size!r} is not known. Allowed: {', '.join(SHAPES)}.")
        for name, least in LEAST.items():
            if self._value(name) < least:
                raise LineageError(f"{name}: {self._value(name)} is too small. Allowed: {least} and more.")
        if self.training.network not in CHOICES["network.algo"]:
            raise LineageError(f"training.network: {self.training.network!r} is not known.")
        if not (self.measures.weight > 0 and self.measures.reference_weight > 0):
            raise LineageError("measures: weight and reference_weight must be more than 0.")
        if self.worlds.styles + self.worlds.characters < 1:
            raise LineageError("worlds: styles and characters are 0, so there is no target.")
        for name in ("worlds.seeds", "training.seeds"):
            if not self._value(name):
                raise LineageError(f"{name}: name at least one.")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the worlds. Confirmatory ones follow from the predictor's code and all other settings: what is changed
        after a look at results meets new worlds."""
        if not self.worlds.confirmatory:
            return self.worlds.seeds
        told = self.to_json()
        del told["worlds"]["confirmatory"], told["worlds"]["seeds"]
        made_of = prediction.code_hash() + json.dumps(told, sort_keys=True)
        numbers = (hashlib.sha256(f"{made_of} {n}".encode()) for n in range(self.worlds.confirmatory))
        return tuple(int(number.hexdigest()[:7], 16) for number in numbers)

    def _value(self, name: str) -> Any:
        table, key = name.split(".")
        return getattr(getattr(self, table), key)

    @classmethod
    def read(cls, path: Path | None) -> Experiment:
        """FileError, LineageError: what is wrong, where, and what is allowed."""
        if path is None:
            return cls()
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
            raise FileError(path, f"cannot be read as TOML: {e}.") from e
        try:
            return cls(**{name: _table(name, found) for name, found in tables.items()})
        except LineageError as e:
            raise LineageError(f"{path}: {e}") from None

    @property
    def design(self) -> Design:
        return Design(self.training.network, self.measures.weight, self.measures.reference_weight)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    @property
    def hash(self) -> str:
        """sha256 of all settings."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _table(name: str, found: Any) -> Any:
    if name not in TABLES:
        raise LineageError(f"unknown table [{name}]. {did_you_mean(name, TABLES)}")
    if not isinstance(found, Mapping):
        raise LineageError(f"{name} must be a table, [{name}]; it is {found!r}.")
    kinds = {f.name: str(f.type) for f in fields(TABLES[name])}
    for key in found:
        if key not in kinds:
            raise LineageError(f"unknown key {name}.{key}. {did_you_mean(key, kinds)}")
    return TABLES[name](**{k: read_value(f"{name}.{k}", kinds[k], v, Path()) for k, v in found.items()})
