"""What a training run is: frozen settings, read from TOML, with the article's values as defaults.

[model]
base = "nai.safetensors"      # paths are relative to the file they stand in
[data]
folder = "pictures"           # holds <repeats>_<class tokens> folders
[training]
steps = 10000                 # or epochs
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from lineage.errors import FileError, LineageError
from lineage.recipe import did_you_mean
from train.values import GRID, check, read_value, toml_text


@dataclass(frozen=True)
class Section:
    """A table of the file. LineageError at a value that is not allowed, whether it was read or passed."""

    def __post_init__(self) -> None:
        for f in fields(self):
            check(f"{section_name(type(self))}.{f.name}", getattr(self, f.name))


@dataclass(frozen=True)
class ModelConfig(Section):
    """`base`: a checkpoint or a diffusers folder; `config`: a folder with tokenizer and configurations, for a single
    file that carries neither; `vae`: another autoencoder. `prediction` and `zero_terminal_snr`: as the base says,
    unless they are set."""

    base: Path
    config: Path | None = None
    vae: Path | None = None
    prediction: str = "auto"
    zero_terminal_snr: bool | None = None


@dataclass(frozen=True)
class NetworkConfig(Section):
    """`dim` and `alpha` hold for linear layers and 1x1 convolutions, conv_* for the other convolutions; conv_dim 0
    leaves those alone, as "lora" always does. `pivotal`: new words whose embeddings are learned beside the network, of
    `pivotal_vectors` vectors each, which start as those of `pivotal_init` (a word; "": the mean embedding)."""

    algo: str = "loha"
    dim: int = 8
    alpha: float = 1.0
    conv_dim: int = 4
    conv_alpha: float = 1.0
    tucker: bool = False
    init: str = "lycoris"
    unet: bool = True
    text_encoder: bool = True
    pivotal: tuple[str, ...] = ()
    pivotal_vectors: int = 1
    pivotal_init: str = ""

    @property
    def scale(self) -> float:
        return self.alpha / self.dim

    @property
    def kernel_dim(self) -> int:
        """Dim of convolutions wider than 1x1; 0: they are not trained."""
        return 0 if self.algo == "lora" else self.conv_dim

    @property
    def conv_scale(self) -> float:
        return self.conv_alpha / self.conv_dim if self.conv_dim else 0.0


@dataclass(frozen=True)
class TrainingConfig(Section):
    """`steps` or `epochs`, of optimiser steps on batch * accumulation pictures. Learning rates left out are `lr`;
    `warmup` counts steps; `clip_grad` is the largest norm, 0: none; `weight_decay` left out: the optimiser's own."""

    steps: int | None = None
    epochs: int | None = None
    batch: int = 1
    optimizer: str = "adam8bit"
    lr: float = 2e-4
    unet_lr: float | None = None
    text_encoder_lr: float | None = None
    pivotal_lr: float | None = None
    scheduler: str = "constant"
    warmup: int = 0
    weight_decay: float | None = None
    clip_grad: float = 1.0
    accumulation: int = 1
    gradient_checkpointing: bool = False
    precision: str = "fp32"
    seed: int = 0

    @property
    def pictures_per_step(self) -> int:
        return self.batch * self.accumulation


@dataclass(frozen=True)
class DataConfig(Section):
    """`folder` and `reg` hold <repeats>_<class tokens> folders. `resolution`: the side of the square of a
    bucket's area. The first `keep_tokens` tags and all `trigger_words` stand first, unshuffled, and are never dropped.
    `prune`: trigger -> tags taken out of the captions that hold it ("*": out of all). `clip_skip` 1: the last layer."""

    folder: Path
    reg: Path | None = None
    reg_weight: float = 1.0
    resolution: int = 512
    buckets: bool = True
    bucket_min: int = 256
    bucket_max: int = 1024
    bucket_step: int = 64
    upscale: bool = True
    shuffle: bool = False
    keep_tokens: int = 0
    trigger_words: tuple[str, ...] = ()
    prune: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tag_dropout: float = 0.0
    caption_dropout: float = 0.0
    flip: bool = False
    clip_skip: int = 1
    cache_latents: bool = True
    cache_text: bool = False


@dataclass(frozen=True)
class SampleConfig(Section):
    """Pictures drawn every `every` steps (0: never), after the steps `at` and at the end, of each prompt and seed.
    `size` in pixels; left out, the training resolution."""

    prompts: tuple[str, ...] = ()
    negative: str = ""
    every: int = 0
    at: tuple[int, ...] = ()
    steps: int = 20
    guidance: float = 7.0
    seeds: tuple[int, ...] = (0,)
    size: int | None = None


@dataclass(frozen=True)
class SaveConfig(Section):
    """The run's `folder`; the adapter is saved every `every` steps (0: never), after the steps `at` and at the end, as
    `name` (left out: what differs from the defaults). `state_every`: steps between the states a run resumes from."""

    folder: Path = Path("run")
    every: int = 0
    at: tuple[int, ...] = (6000, 10000)
    name: str = ""
    dtype: str = "fp16"
    state_every: int = 200


SECTIONS: dict[str, type[Section]] = {
    "model": ModelConfig,
    "network": NetworkConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "sample": SampleConfig,
    "save": SaveConfig,
}


@dataclass(frozen=True)
class Config:
    """All settings of one run. LineageError where two of them contradict each other."""

    model: ModelConfig
    data: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    save: SaveConfig = field(default_factory=SaveConfig)

    def __post_init__(self) -> None:
        for fault in _contradictions(self):
            raise LineageError(fault)

    @classmethod
    def read(cls, path: Path | str, changes: Sequence[str] = ()) -> Config:
        """The settings in a TOML file, with `changes` (see `assign`) made. FileError, LineageError: what is wrong,
        where, and what is allowed."""
        path = Path(path)
        try:
            return cls.parse(path.read_text(encoding="utf-8-sig"), Path(os.path.abspath(path)).parent, changes)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as e:
            raise FileError(path, f"cannot be read as TOML: {e}.") from e
        except LineageError as e:
            raise LineageError(f"{path}: {e}") from None

    @classmethod
    def parse(cls, text: str, folder: Path, changes: Sequence[str] = ()) -> Config:
        """`read` of a text whose relative paths start at `folder`; those in `changes` start at the working folder."""
        tables = tomllib.loads(text)
        for change in changes:
            assign(tables, change)
        for name, table in tables.items():
            if name not in SECTIONS:
                raise LineageError(f"unknown table [{name}]. {did_you_mean(name, SECTIONS)}")
            if not isinstance(table, dict):
                raise LineageError(f"{name} must be a table, [{name}]; it is {table!r}.")
        made: dict[str, Any] = {name: _section(name, tables.get(name, {}), folder) for name in SECTIONS}
        return cls(**made)

    def to_toml(self) -> str:
        """Every setting that has a value, so that `read` gives this configuration again wherever the file lies."""
        parts = []
        for name in SECTIONS:
            section = getattr(self, name)
            rows = [(f.name, getattr(section, f.name)) for f in fields(section)]
            parts.append("\n".join([f"[{name}]", *(f"{k} = {toml_text(v)}" for k, v in rows if v is not None)]))
        return "\n\n".join(parts) + "\n"

    def changed(self) -> dict[str, Any]:
        """`section.key` -> value of all that differs from the defaults, in the order of the sections."""
        return {
            f"{name}.{f.name}": value
            for name in SECTIONS
            for f in fields(SECTIONS[name])
            if (value := getattr(getattr(self, name), f.name)) != _default(f)
        }

    @property
    def name(self) -> str:
        """Stem of the files of this run: save.name, or the algorithm and what of it and of the training differs from
        the defaults, as `loha-dim32-lr0.0005`."""
        if self.save.name:
            return self.save.name
        unnamed = {"network.algo", "training.steps", "training.epochs", "training.gradient_checkpointing"}
        told = [
            (k, v) for k, v in self.changed().items() if k.startswith(("network.", "training.")) and k not in unnamed
        ]
        return "-".join([self.network.algo, *(re.sub(r"[^\w.+]+", "", k.split(".")[1] + _short(v)) for k, v in told)])

    @property
    def unet_lr(self) -> float:
        return self.training.unet_lr or self.training.lr

    @property
    def text_encoder_lr(self) -> float:
        return self.training.text_encoder_lr or self.training.lr

    @property
    def pivotal_lr(self) -> float:
        return self.training.pivotal_lr or self.training.lr

    @property
    def sample_size(self) -> int:
        return self.sample.size or self.data.resolution


def section_name(section: type[Section]) -> str:
    return section.__name__.removesuffix("Config").lower()


def assign(tables: dict[str, Any], change: str) -> None:
    """Make one change, "section.key=value": the value as in TOML, or plain text without quotes."""
    where, equals, value = change.partition("=")
    section, dot, key = where.strip().partition(".")
    if not (equals and dot and key and isinstance(tables.setdefault(section, {}), dict)):
        raise LineageError(f"{change!r}: write section.key=value, such as training.lr=5e-4.")
    try:
        read = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        read = value.strip()
    kinds = {f.name: str(f.type) for f in fields(SECTIONS[section])} if section in SECTIONS else {}
    is_path = kinds.get(key, "").startswith("Path") and isinstance(read, str) and read
    tables[section][key] = os.path.abspath(read) if is_path else read


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _short(value: Any) -> str:
    return "+".join(value) if isinstance(value, tuple) else str(value)


def _contradictions(config: Config) -> Iterator[str]:
    network, training, data = config.network, config.training, config.data
    if (training.steps is None) == (training.epochs is None):
        yield "training: give either steps or epochs."
    if not (network.unet or network.text_encoder or network.pivotal):
        yield "network: unet and text_encoder are both off and no pivotal word is given."
    if data.bucket_min > data.bucket_max:
        yield f"data.bucket_min: {data.bucket_min} is above data.bucket_max, {data.bucket_max}."
    for key in ("resolution", "bucket_step"):
        if getattr(data, key) % GRID:
            yield f"data.{key}: {getattr(data, key)} is not a multiple of {GRID}."
    if config.sample_size % GRID:
        yield f"sample.size: {config.sample_size} is not a multiple of {GRID}."
    triggers = {*data.trigger_words, *data.prune}
    for tag in (tag for tags in data.prune.values() for tag in tags if tag in triggers):
        yield f"data.prune: {tag!r} is a trigger itself and would be taken out."
    if data.cache_text and (network.text_encoder or network.pivotal or data.shuffle or data.tag_dropout):
        yield (
            "data.cache_text: what the text encoder says can be kept only while it stays the same. Allowed with "
            "network.text_encoder = false, no network.pivotal, data.shuffle = false and data.tag_dropout = 0."
        )


def _section(name: str, table: Mapping[str, Any], folder: Path) -> Section:
    known = {f.name: f for f in fields(SECTIONS[name])}
    for key in table:
        if key not in known:
            raise LineageError(f"unknown key {name}.{key}. {_nearest(key, known)}")
    table = {f.name: str(f.default) for f in known.values() if isinstance(f.default, Path)} | dict(table)
    for f in known.values():
        if f.name not in table and f.default is MISSING and f.default_factory is MISSING:
            raise LineageError(f"{name}.{f.name} is missing: {NEEDED[f'{name}.{f.name}']}.")
    return SECTIONS[name](
        **{key: read_value(f"{name}.{key}", str(known[key].type), value, folder) for key, value in table.items()}
    )


NEEDED = {
    "model.base": "the checkpoint or the diffusers folder to train on",
    "data.folder": "the folder that holds the <repeats>_<class tokens> folders",
}


def _nearest(key: str, known: Mapping[str, Field]) -> str:
    elsewhere = [name for name, section in SECTIONS.items() if key in {f.name for f in fields(section)}]
    return f"It belongs in [{elsewhere[0]}]." if elsewhere else did_you_mean(key, known)
