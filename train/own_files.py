"""An experiment on models and pictures of one's own: a train.sites.Site of files that are there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from lineage.cache import Cache
from lineage.errors import LineageError
from lineage.folder import scan
from lineage.graph import ancestors
from lineage.reading import content_hash
from lineage.recipe import did_you_mean
from lineage.transfer_records import Member, WorldFacts
from train import folders
from train.config import Config, ModelConfig, SaveConfig
from train.image_judge import ImageJudge, references
from train.measures import Judge, held_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from lineage.cluster_result import ClusterResult, Edge
    from train.experiment import Experiment, Files, Target
    from train.folders import Picture


@dataclass(frozen=True)
class FilesSite:
    """What an experiment's [files] and [targets] name. LineageError, from `make`, for what is not there."""

    experiment: Experiment
    light: bool = False

    @property
    def _files(self) -> Files:
        assert self.experiment.files
        return self.experiment.files

    @property
    def name(self) -> str:
        return self._files.models.name

    @cached_property
    def config(self) -> Config:
        return Config.parse(self.experiment.lesson, Path())

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Model -> its file."""
        return {item.name: item.path for item in scan(self._files.models).of("model")}

    @property
    def bases(self) -> tuple[str, ...]:
        return self._files.bases

    @property
    def models(self) -> tuple[str, ...]:
        others = self._files.apply or tuple(self.paths)
        return (*self.bases, *(name for name in others if name not in self.bases))

    @property
    def targets(self) -> dict[str, str]:
        return {target.name: target.kind for target in self.experiment.targets}

    @property
    def size(self) -> tuple[int, int]:
        return self.config.sample_size, self.config.sample_size

    @property
    def precision(self) -> str:
        return self.config.training.precision

    def make(self, progress: Callable[[int, int, str], None] | None) -> Path:
        """Nothing is made; all that will be read is looked at once, before the first training."""
        for name in self.models:
            if name not in self.paths:
                raise LineageError(f"{name!r}: no model in {self._files.models}. {did_you_mean(name, self.paths)}")
        for target in self.experiment.targets:
            folders.pictures(replace(self.config.data, folder=target.pictures), progress)
            if len(self.held_out(target.name)) < 2:
                raise LineageError(f"{target.held_out}: at least two held-out pictures are needed.")
        for name in self.models:
            self.own(name)
        self.judges()
        return self._files.models

    def hashes(self) -> dict[str, str]:
        return {name: content_hash(self.paths[name], Cache()) for name in self.models}

    def facts(self, found: ClusterResult) -> WorldFacts:
        """As `lineage cluster` found it: the truth about files of one's own is not known."""
        return WorldFacts(self.name, tuple(_members(found, self.bases, self.models)), self.targets)

    def model(self, name: str) -> ModelConfig:
        return replace(self.config.model, base=self.paths[name])

    def lesson(self, target: str, base: str, save: SaveConfig, seed: int) -> Config:
        config = self.config
        return replace(
            config,
            model=self.model(base),
            data=replace(config.data, folder=self._target(target).pictures),
            training=replace(config.training, seed=seed),
            sample=replace(config.sample, prompts=()),
            save=save,
        )

    def _target(self, name: str) -> Target:
        return next(target for target in self.experiment.targets if target.name == name)

    @cache  # noqa: B019  a process has one such site, and keeps it
    def held_out(self, target: str) -> tuple[Picture, ...]:
        folder = self._target(target).held_out
        return held_out(replace(self.config.data, folder=folder), self.experiment.measures.held_out)

    @cache  # noqa: B019
    def own(self, model: str) -> tuple[Picture, ...]:
        folder = self._files.own and self._files.own / model
        if not folder or not folder.is_dir():
            return ()
        return held_out(replace(self.config.data, folder=folder), self.experiment.measures.held_out)

    def prompts(self, target: str) -> tuple[str, ...]:
        shown = [", ".join(p.caption.tags) for p in self.held_out(target)]
        return (self._target(target).prompts or tuple(shown))[: self.experiment.measures.drawn]

    def other(self, photographic: bool) -> Path | None:
        return self._files.photographs if photographic else self._files.regularisation

    def judges(self) -> dict[str, Judge]:
        files = self._files
        shown = references(files.references, self.targets) if files.references else {}
        named = (judge.partition(":") for judge in files.judges)
        return {f"{kind} {Path(folder).name}": ImageJudge(Path(folder), shown) for kind, _, folder in named}


def _members(found: ClusterResult, bases: tuple[str, ...], models: tuple[str, ...]) -> list[Member]:
    """Of all models of the tree, parents before children as far as that is known."""
    listed = {m.name: m for m in found.models if m.kind == "model"}
    above: dict[str, list[Edge]] = {name: [] for name in listed}
    for edge in found.edges:
        if edge.directed and not edge.declared and edge.child in above and edge.parent in listed:
            above[edge.child].append(edge)
    parents = {name: [edge.parent for edge in edges] for name, edges in above.items()}
    members = []
    for name in sorted(listed, key=lambda name: (len(ancestors(parents, name)), name)):
        m, edges = listed[name], above[name]
        relation = edges[0].relation if edges and edges[0].relation in ("merge", "permuted") else "finetune"
        use = "base" if name in bases else "apply"
        members.append(
            Member(
                name, name, m.root or name, m.family or m.root or name, tuple(parents[name]),
                relation if edges or m.root != name else "root", "control" if relation == "permuted" else use,
            )
        )  # fmt: skip
    return [m for m in members if m.name in models or any(m.name in other.parents for other in members)]
