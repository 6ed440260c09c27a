"""What a transfer experiment is: frozen settings, read from TOML; without a file, the quick miniature world.

[worlds]
size = "small"
seeds = [1, 2, 3]
[training]
steps = 150

or, of models and pictures of one's own,

[files]
models = "models/"
bases = ["nai", "AC"]
lesson = "train.toml"         # settings of `lineage train`
judges = ["clip:clip-vit-base-patch32/"]
[targets.yozora]
kind = "style"
pictures = "yozora/"          # folders as `lineage train` reads them
held_out = "yozora-held-out/"
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lineage import prediction
from lineage.errors import FileError, LineageError
from lineage.hypotheses import SETUPS
from lineage.recipe import did_you_mean
from lineage.transfer_records import KINDS, Design
from train.config import Config
from train.topology import SHAPES
from train.values import CHOICES, NO_NAME, read_value

ALGOS = CHOICES["network.algo"]
JUDGES = ("clip", "dino")


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
class Secondary:
    """Trainings beside the main matrix: other `networks` of equal size, and `setups` of lineage.hypotheses.SETUPS; on
    the first `bases`, each put on itself and on the first `models`."""

    networks: tuple[str, ...] = ()
    setups: tuple[str, ...] = ()
    bases: int = 4
    models: int = 6


@dataclass(frozen=True)
class Files:
    """One's own models in place of worlds. `models`: their folder; `bases`: names (stems) of those that adapters are
    trained on; `apply`: of those they are only put on (empty: all others). `lesson`: settings of `lineage train`, whose
    base, data, seed and folder are replaced. judges: "clip:FOLDER" or "dino:FOLDER", image models of transformers, to
    whom `references` shows what they judge by: a folder with a folder of pictures for each target, and for other
    styles and characters. own: a folder with kohya-style folders for each model that has pictures of its own kind.
    regularisation, photographs: kohya-style folders, for the setups that need them."""

    models: Path
    bases: tuple[str, ...]
    lesson: Path
    apply: tuple[str, ...] = ()
    judges: tuple[str, ...] = ()
    references: Path | None = None
    own: Path | None = None
    regularisation: Path | None = None
    photographs: Path | None = None


@dataclass(frozen=True)
class Target:
    """What an adapter is to learn: `pictures` to train on and `held_out` ones for the loss, both kohya-style folders,
    and `prompts` to draw (empty: the captions of the first held-out pictures)."""

    name: str
    kind: str
    pictures: Path
    held_out: Path
    prompts: tuple[str, ...] = ()


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
    "secondary.bases": 0,
    "secondary.models": 0,
    "measures.held_out": 2,  # one picture has no standard error
    "measures.draws": 1,
    "measures.drawn": 1,
    "measures.steps": 1,
}
TABLES: dict[str, type] = {
    "worlds": Worlds,
    "training": Lessons,
    "secondary": Secondary,
    "measures": Measures,
    "files": Files,
}
OF_THE_LESSON = {
    "network",
    "steps",
    "batch",
    "lr",
    "pictures",
    "clip_skip",
}  # [training] keys that [files] has no use for
CLIP_SKIP = "data.clip_skip=2"  # the article's, of models of full size


@dataclass(frozen=True)
class Experiment:
    """All settings. lesson: those of `files.lesson` as resolved. LineageError where a value is not allowed, or nothing
    would be trained."""

    worlds: Worlds = field(default_factory=Worlds)
    training: Lessons = field(default_factory=Lessons)
    secondary: Secondary = field(default_factory=Secondary)
    measures: Measures = field(default_factory=Measures)
    files: Files | None = None
    targets: tuple[Target, ...] = ()
    lesson: str = ""

    def __post_init__(self) -> None:
        for fault in _faults(self):
            raise LineageError(fault)

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

    def value(self, name: str) -> Any:
        """Of `table.key`."""
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
            return _experiment(tables, Path(os.path.abspath(path)).parent)
        except LineageError as e:
            raise LineageError(f"{path}: {e}") from None

    @property
    def design(self) -> Design:
        return Design(self.training.network, self.measures.weight, self.measures.reference_weight)

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self), default=str))

    @property
    def hash(self) -> str:
        """sha256 of all settings."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _faults(e: Experiment) -> Iterator[str]:
    if e.worlds.size not in SHAPES:
        yield f"worlds.size: {e.worlds.size!r} is not known. Allowed: {', '.join(SHAPES)}."
    for name, least in LEAST.items():
        if e.value(name) < least:
            yield f"{name}: {e.value(name)} is too small. Allowed: {least} and more."
    for name, known in (("training.network", ALGOS), ("secondary.networks", ALGOS), ("secondary.setups", SETUPS)):
        value = e.value(name)
        for one in value if isinstance(value, tuple) else (value,):
            if one not in known:
                yield f"{name}: {one!r} is not known. {did_you_mean(one, known)}"
    if not (e.measures.weight > 0 and e.measures.reference_weight > 0):
        yield "measures: weight and reference_weight must be more than 0."
    for name in ("worlds.seeds", "training.seeds"):
        if not e.value(name):
            yield f"{name}: name at least one."
    if e.files is None and e.worlds.styles + e.worlds.characters < 1:
        yield "worlds: styles and characters are 0, so there is no target."
    yield from _file_faults(e)


def _file_faults(e: Experiment) -> Iterator[str]:
    if e.files is None:
        if e.targets:
            yield "[targets] belong to models of your own: name these in a table [files]."
        return
    if not e.targets:
        yield "targets: name at least one, [targets.NAME]."
    if not e.files.bases:
        yield "files.bases: name at least one model."
    if e.files.judges and not e.files.references:
        yield "files.references: the judges need a folder with pictures of each target."
    for setup, folder in (("regularisation", "regularisation"), ("photo regularisation", "photographs")):
        if setup in e.secondary.setups and getattr(e.files, folder) is None:
            yield f"files.{folder}: the setup {setup!r} needs that folder."
    for judge in e.files.judges:
        if judge.partition(":")[0] not in JUDGES or not judge.partition(":")[2]:
            yield f"files.judges: {judge!r} is not known. Write {' or '.join(f'{kind}:FOLDER' for kind in JUDGES)}."
    for target in e.targets:
        if re.search(NO_NAME, target.name) or target.name.strip(" .") != target.name:
            yield f"targets: {target.name!r} cannot be part of a file's name."
        if target.kind not in KINDS:
            yield f"targets.{target.name}.kind: {target.kind!r} is not known. Allowed: {', '.join(KINDS)}."


def _experiment(tables: Mapping[str, Any], folder: Path) -> Experiment:
    """Of what TOML gave; relative paths start at `folder`."""
    found: dict[str, Any] = {n: _table(n, TABLES.get(n), t, folder) for n, t in tables.items() if n != "targets"}
    named = tables.get("targets", {})
    if not isinstance(named, Mapping) or not all(isinstance(table, Mapping) for table in named.values()):
        raise LineageError("targets must be tables, [targets.NAME].")
    found["targets"] = tuple(_table(f"targets.{n}", Target, {"name": n, **t}, folder) for n, t in named.items())
    if "files" not in found:
        return Experiment(**found)
    if doubled := [*(OF_THE_LESSON & tables.get("training", {}).keys()), *({"worlds"} & tables.keys())]:
        raise LineageError(f"{', '.join(sorted(doubled))}: [files] takes that from files.lesson and its folders.")
    files = replace(found["files"], judges=tuple(_placed(judge, folder) for judge in found["files"].judges))
    return Experiment(**found | {"files": files} | _of_the_lesson(files, found.get("training", Lessons())))


def _placed(judge: str, folder: Path) -> str:
    """A judge's name with its folder as seen from anywhere."""
    kind, colon, path = judge.partition(":")
    return f"{kind}:{os.path.abspath(folder / path)}" if colon and path else judge


def _of_the_lesson(files: Files, training: Lessons) -> dict[str, Any]:
    config = Config.read(files.lesson)
    if "clip_skip" not in tomllib.loads(files.lesson.read_text(encoding="utf-8-sig")).get("data", {}):
        config = Config.read(files.lesson, [CLIP_SKIP])
    if config.training.steps is None:
        raise LineageError(f"{files.lesson}: training.steps is needed here, not epochs: all adapters train as long.")
    told, lesson = config.training, config.data
    steps = replace(
        training,
        network=config.network.algo,
        steps=told.steps,
        batch=told.batch,
        lr=told.lr,
        clip_skip=lesson.clip_skip,
    )
    return {"training": steps, "lesson": config.to_toml()}


def _table(name: str, table: type | None, found: Any, folder: Path) -> Any:
    if table is None:
        raise LineageError(f"unknown table [{name}]. {did_you_mean(name, [*TABLES, 'targets'])}")
    if not isinstance(found, Mapping):
        raise LineageError(f"{name} must be a table, [{name}]; it is {found!r}.")
    known = {f.name: f for f in fields(table)}
    for key in found:
        if key not in known:
            raise LineageError(f"unknown key {name}.{key}. {did_you_mean(key, known)}")
    for key, f in known.items():
        if key not in found and f.default is MISSING:
            raise LineageError(f"{name}.{key} is missing.")
    return table(**{k: read_value(f"{name}.{k}", str(known[k].type), v, folder) for k, v in found.items()})
