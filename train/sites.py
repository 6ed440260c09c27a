"""Where an experiment takes place: the models, what their adapters are taught, and who judges what is drawn.

A site is a miniature world, made on the spot, or models and pictures of one's own (train.own_files). Pictures for
training and for loss lie in kohya-style folders.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lineage.transfer_records import CHARACTER, STYLE, WorldFacts, world_facts
from train import lessons, pictures, topology, world
from train.captions import parse
from train.config import Config, DataConfig, ModelConfig, SaveConfig
from train.judge import KINDS
from train.measures import Judge, held_out
from train.pictures import CHARACTERS
from train.showcase import world_judge

if TYPE_CHECKING:
    from lineage.cluster_result import ClusterResult
    from train.experiment import Experiment
    from train.folders import Picture

Progress = Callable[[int, int, str], None]


class Site(Protocol):
    """All that cells are measured with. Two sites are equal where they hold the same."""

    @property
    def name(self) -> str: ...

    @property
    def models(self) -> tuple[str, ...]: ...

    @property
    def bases(self) -> tuple[str, ...]:
        """Those of `models` whose adapters are put on all others; an adapter of the rest is only put on itself."""
        ...

    @property
    def targets(self) -> Mapping[str, str]:
        """Name -> "style" or "character"."""
        ...

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of drawn pictures."""
        ...

    @property
    def light(self) -> bool:
        """Whether all models fit into memory at once."""
        ...

    @property
    def precision(self) -> str:
        """In which models are drawn with and measured: fp32, fp16 or bf16."""
        ...

    def make(self, progress: Progress | None) -> Path:
        """The folder of the models, when all that is missing of it is made."""
        ...

    def hashes(self) -> dict[str, str]:
        """sha256 of the models that are not made here."""
        ...

    def facts(self, found: ClusterResult) -> WorldFacts:
        """What is known of the models: the truth, else what their weights tell."""
        ...

    def lesson(self, target: str, base: str, save: SaveConfig, seed: int) -> Config:
        """Settings that train the target's adapter on `base`."""
        ...

    def model(self, name: str) -> ModelConfig: ...

    def held_out(self, target: str) -> tuple[Picture, ...]: ...

    def own(self, model: str) -> tuple[Picture, ...]:
        """Held-out pictures of what a model draws by itself; none where nobody knows."""
        ...

    def prompts(self, target: str) -> tuple[str, ...]: ...

    def other(self, photographic: bool) -> Path | None:
        """Folder of regularisation pictures, which show no target; None where nobody named one."""
        ...

    def judges(self) -> Mapping[str, Judge]: ...


@dataclass(frozen=True)
class WorldSite:
    """The miniature world of `seed` below an experiment's `folder`."""

    experiment: Experiment
    seed: int
    folder: Path
    light: bool = True
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.experiment.worlds.size}-{self.seed}"

    @property
    def home(self) -> Path:
        return self.folder / "worlds" / self.name

    @property
    def plan(self) -> topology.World:
        return topology.draw(self.experiment.worlds.size, self.seed)

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.plan.models)

    @property
    def bases(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.plan.models if m.use != "apply")

    @property
    def targets(self) -> dict[str, str]:
        plan, worlds = self.plan, self.experiment.worlds
        styles, names = plan.targets[: worlds.styles], plan.characters[: worlds.characters]
        return dict.fromkeys(styles, STYLE) | dict.fromkeys(names, CHARACTER)

    @property
    def size(self) -> tuple[int, int]:
        return pictures.SIZE, pictures.SIZE

    def make(self, progress: Progress | None) -> Path:
        """Worlds of one size share their autoencoder: where another one has it, it is not trained again."""
        world.claim(self.home, "world.json", topology.to_json(self.plan), "world")
        own = self.home / world.AUTOENCODER
        if not own.exists() and (other := next(self.home.parent.glob(f"*/{own.name}"), None)):
            shutil.copyfile(other, own)  # world.build looks whether it is the right one, and whole
        return world.build(self.plan, self.home, progress) / "models"

    def hashes(self) -> dict[str, str]:
        return {}

    def facts(self, found: ClusterResult) -> WorldFacts:
        return world_facts(self.name, json.loads((self.home / "truth.json").read_text(encoding="utf-8")))

    def model(self, name: str) -> ModelConfig:
        return ModelConfig(world.model_file(self.home, name))

    def lesson(self, target: str, base: str, save: SaveConfig, seed: int) -> Config:
        told = self.experiment.training
        shown = self._shelf("lessons", f"{target}-{told.pictures}", lambda: self._gallery(target, "lesson"))
        file, algo = self.model(base).base, told.network
        usual = lessons.lesson(file, shown, save, steps=told.steps, algo=algo, seed=seed)
        data = replace(usual.data, clip_skip=told.clip_skip, **_words(target))
        return replace(usual, data=data, training=replace(usual.training, batch=told.batch, lr=told.lr))

    def _gallery(self, target: str, part: str) -> list[pictures.Picture]:
        """Of the target: a style's own, or a character in the styles that the world shows it in; its traits are in the
        captions, for the trainer to prune."""
        measured = self.experiment.measures
        counts = {"lesson": self.experiment.training.pictures, "test": measured.held_out, "prompts": measured.drawn}
        count = counts[part]
        if self.targets[target] == STYLE:
            return pictures.gallery([target], count, self.seed, part)
        styles = world.portraying(self.plan, target)
        shown = pictures.portraits([target], styles, -(-count // len(styles)), self.seed, part)
        return [replace(p, told=True) for p in shown]

    @cache  # noqa: B019  the sites of a process are few and live as long as it does
    def held_out(self, target: str) -> tuple[Picture, ...]:
        count = self.experiment.measures.held_out
        shelf = self._shelf("held-out", f"{target}-{count}", lambda: self._gallery(target, "test"))
        return held_out(lessons.data(shelf, **_words(target)), count)

    @cache  # noqa: B019
    def own(self, model: str) -> tuple[Picture, ...]:
        """No caption holds a target's word."""
        styles = self.plan.own_styles(model)
        each = -(-self.experiment.measures.held_out // (2 * len(styles)))
        shelf = self._shelf("held-out", f"own-{model}", lambda: pictures.gallery(styles, each, self.seed, "test"))
        return held_out(lessons.data(shelf), each * len(styles))

    @cache  # noqa: B019
    def prompts(self, target: str) -> tuple[str, ...]:
        read = DataConfig(self.home, **_words(target))
        shown = self._gallery(target, "prompts")[: self.experiment.measures.drawn]
        return tuple(", ".join(parse(p.caption, read).tags) for p in shown)

    def other(self, photographic: bool) -> Path:
        """Pictures in the styles of the first model; photographic: in the first of them, which in the article's world
        plays photographs."""
        styles = self.plan.trained[0].styles
        return self._shelf(
            "lessons",
            "photographs" if photographic else "others",
            lambda: pictures.gallery(styles[:1] if photographic else styles, 40, self.seed, "regularisation"),
        )

    def judges(self) -> dict[str, Judge]:
        return {kind: world_judge(self.plan, self.home, kind) for kind in KINDS}

    def _shelf(self, part: str, name: str, drawn: Callable[[], Sequence[pictures.Picture]]) -> Path:
        """A folder of pictures, drawn once; it appears whole, as other processes may look."""
        folder = self.home / part / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=folder.parent))
            lessons.write_pictures(made, name, drawn())
            try:
                os.rename(made, folder)
            except OSError:  # another process was first
                shutil.rmtree(made)
        return folder


def _words(target: str) -> dict[str, Any]:
    """How captions of a target are read: its word stays, and what always belongs to a character is pruned."""
    traits = tuple(CHARACTERS[target].values()) if target in CHARACTERS else ()
    return {"trigger_words": (target if traits else f"by {target}",), "prune": {target: traits} if traits else {}}
