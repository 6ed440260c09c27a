"""What every file of a folder is: each lands in exactly one bucket, with the reason, before any tensor is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from lineage.adapters import kind_of
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import FileError, LineageError
from lineage.filesets import Fileset, filesets, is_weights, lone
from lineage.fingerprint import is_weight
from lineage.raw import PICKLES
from lineage.sidecars import json_of, text_of

Progress = Callable[[int, int, str], None]
Weights = frozenset[tuple[str, int, int]]  # name, rows, entries

BUCKETS = ("model", "adapter", "vae", "other", "unreadable", "ignored")
ALIKE = 0.5  # of the larger model's entries: two models that share so many are compared
_WHOLE_MODELS = {"sd3", "flux"}
_EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "string_to_param"}
_CARD = re.compile(r"\A---[ \t]*\r?\n(.*?)\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SCRATCH = re.compile(r"\btrained\s+(?:entirely\s+|completely\s+)?from\s+scratch\b", re.IGNORECASE)
_DECLARED = {"ss_new_sd_model_hash": "sha256", "ss_sd_model_hash": "short_hash", "ss_sd_model_name": "name"}


@dataclass(frozen=True)
class Item:
    """One model, or one file that is none. path: of the file or folder; files: how many belong to it.

    bucket: one of BUCKETS. kind: architecture, kind of adapter, or what else it is. group: of models that are compared.
    declared: what it says of its parent: sha256, short_hash (8 digits), name or base_model, or that it has none
    (scratch). licence: of its card."""

    name: str
    path: Path
    bucket: str
    kind: str = ""
    reason: str = ""
    files: int = 1
    components: tuple[str, ...] = ()
    group: str = ""
    declared: Mapping[str, str] = field(default_factory=dict)
    licence: str = ""


@dataclass(frozen=True)
class Folder:
    """All that lies in a folder, sorted by path."""

    path: Path
    items: tuple[Item, ...]

    @property
    def files(self) -> int:
        """How many there are."""
        return sum(item.files for item in self.items)

    @property
    def counts(self) -> dict[str, int]:
        """Files in each bucket; they add up to `files`."""
        found = Counter[str]()
        for item in self.items:
            found[item.bucket] += item.files
        return {bucket: found[bucket] for bucket in BUCKETS}

    @property
    def groups(self) -> dict[str, tuple[Item, ...]]:
        """Full models by group; models of different groups are never compared."""
        models = self.of("model")
        return {name: tuple(m for m in models if m.group == name) for name in sorted({m.group for m in models})}

    def of(self, bucket: str) -> tuple[Item, ...]:
        """Everything in one bucket."""
        return tuple(item for item in self.items if item.bucket == bucket)


def scan(
    folder: str | Path, *, also: str | Path | None = None, jobs: int = 1, progress: Progress | None = None
) -> Folder:
    """What everything below `folder` is, from headers, and `also` one more model from elsewhere. A diffusers or
    transformers folder and a set of shards count as one; links to folders are followed, loops do no harm. LineageError
    where `folder` is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise LineageError(f"{folder}: is no folder. Name the folder that holds the models.")
    found = filesets(folder)
    if also is not None and not any(one.path.samefile(also) for one in found):
        found = sorted([*found, lone(Path(also))], key=lambda one: one.path.as_posix())
    parallel: Any = Parallel(jobs, return_as="generator")
    items, known = list[tuple[Item, Weights]](), dict[Weights, Weights]()
    for i, (item, weights) in enumerate(parallel(delayed(_look)(one) for one in found), 1):
        items.append((item, known.setdefault(weights, weights)))
        if progress:
            progress(i, len(found), item.path.name)
    return Folder(folder, tuple(_named(_grouped(items), folder)))


def look(path: str | Path) -> Item:
    """What one file or model folder is, from its header; `reason` says why where it cannot be read."""
    path = Path(path)
    return replace(_look(lone(path))[0], name=_own_name(path, path.parent))


def declared_parent(item: Item, models: Mapping[str, str], short: Mapping[str, str] | None = None) -> str | None:
    """The name of the model that `item` declares as its parent, if it is among them. models: name -> sha256; short:
    name -> the web UI's old 8-digit hash. A hash, or its first eight
    digits or more, counts before a name; a name that fits several counts for nothing."""
    whole, old = (item.declared.get(key, "").lower() for key in ("sha256", "short_hash"))
    by_hash = (name for name in sorted(models) if len(whole) >= 8 and models[name].lower().startswith(whole))
    by_old = (name for name in sorted(short or {}) if old and short and short[name].lower() == old)
    if found := next(by_hash, None) or next(by_old, None):
        return found
    said = {stem(item.declared[key]) for key in ("name", "base_model") if item.declared.get(key)}
    named = [name for name in models if stem(name) in said]
    return named[0] if len(named) == 1 else None


def stem(name: str) -> str:
    """The last part of a path or repository name, without the ending of a model file, in lower case."""
    last = re.split(r"[/\\]", name)[-1].lower()
    return last.rpartition(".")[0] if last.endswith((".safetensors", *PICKLES)) else last


def _look(one: Fileset) -> tuple[Item, Weights]:
    plain = Item("", one.path, "unreadable", reason=one.problem, files=one.files)
    if one.problem:
        return plain, frozenset()
    if not one.path.is_dir() and not is_weights(one.path):
        return replace(plain, bucket="ignored", kind=one.path.suffix.lower(), reason="not a model file"), frozenset()
    try:
        with open_checkpoint(one.path) as checkpoint:
            item = _of(checkpoint, plain, _card_of(one))
            return item, _weights(checkpoint) if item.bucket == "model" else frozenset()
    except LineageError as e:
        return replace(plain, reason=str(e)), frozenset()
    except OSError as e:
        return replace(plain, reason=str(FileError(one.path, f"cannot be read ({e.strerror or e})."))), frozenset()


def _of(checkpoint: Checkpoint, plain: Item, card: Mapping[str, str]) -> Item:
    bucket, kind, reason = _bucket(checkpoint)
    return replace(
        plain,
        bucket=bucket,
        kind=kind,
        reason=reason,
        components=tuple(sorted({p.component for p in checkpoint.specs.values()} - {"other"})),
        declared=_declared(checkpoint, card),
        licence=card.get("license", ""),
    )


def _bucket(checkpoint: Checkpoint) -> tuple[str, str, str]:
    """(bucket, kind, reason)."""
    architecture, specs = checkpoint.architecture, checkpoint.specs.values()
    components = {p.component for p in specs if is_weight(p.component, p.dtype)}
    if adapter := kind_of(checkpoint.raw):
        return "adapter", adapter, "factors of an adapter"
    if set(checkpoint.raw) <= _EMBEDDINGS:
        return "other", "embedding", "a textual inversion"
    if not components and architecture not in _WHOLE_MODELS:
        return "other", architecture, "no weights in floating point"
    if "unet" in components or architecture in _WHOLE_MODELS:
        return "model", architecture, ""
    if components == {"vae"}:
        return "vae", architecture, "a VAE without a model"
    if architecture in ("clip", "controlnet"):
        return "other", architecture, "a text encoder alone" if architecture == "clip" else "a ControlNet"
    return "model", architecture, ""


def _weights(checkpoint: Checkpoint) -> Weights:
    specs = checkpoint.specs.values()
    chosen = (p for p in specs if is_weight(p.component, p.dtype))
    return frozenset((p.name, p.shape[0] if p.shape else 1, p.numel) for p in chosen)


def _declared(checkpoint: Checkpoint, card: Mapping[str, str]) -> dict[str, str]:
    """What a file, or what lies beside it, says of its parent."""
    found = {ours: checkpoint.metadata.get(theirs, "") for theirs, ours in _DECLARED.items()}
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    peft = json_of(folder / "adapter_config.json").get("base_model_name_or_path")
    found["base_model"] = card.get("base_model") or (peft if isinstance(peft, str) else "")
    found["scratch"] = card.get("scratch", "")
    return {key: value for key, value in found.items() if value and value != "None"}


def _card_of(one: Fileset) -> dict[str, str]:
    """base_model and license of a model card's YAML, of a list the first; and its words "trained from scratch"."""
    text = text_of(one.card) if one.card else ""
    header, scratch = _CARD.match(text), _SCRATCH.search(text)
    found, key = {"scratch": "trained from scratch"} if scratch else dict[str, str](), ""
    for line in header[1].splitlines() if header else ():
        if pair := re.match(r"([A-Za-z_]{1,40}):[ \t]*(.*)", line):
            key, value = pair[1], pair[2]
        else:
            value = line.strip().removeprefix("- ") if line.strip().startswith("- ") else ""
        value = value.strip().strip("[]").split(",")[0].strip(" \"'")
        if key in ("base_model", "license") and value:
            found.setdefault(key, value)
    return found


def _grouped(found: Iterable[tuple[Item, Weights]]) -> list[Item]:
    """Items with their group: architecture, components, and a number where models of both share too few weights."""
    found = list(found)
    kinds: dict[str, list[Weights]] = {}
    for item, weights in found:
        if item.bucket == "model":
            kinds.setdefault(_kind(item), []).append(weights)
    number = {kind: _alike(weights) for kind, weights in kinds.items()}
    out = []
    for item, weights in found:
        many = len(set(number.get(_kind(item), {}).values())) > 1
        own = f" {number[_kind(item)][weights]}" if many and item.bucket == "model" else ""
        out.append(replace(item, group=_kind(item) + own if item.bucket == "model" else ""))
    return out


def _kind(item: Item) -> str:
    return f"{item.kind} {'+'.join(item.components)}"


def _alike(models: Iterable[Weights]) -> dict[Weights, int]:
    """Number (from 1, the largest first) of the group of each: models that share ALIKE of their entries, directly or
    through others."""
    groups: list[list[Weights]] = []
    for weights in sorted(set(models), key=lambda w: (-_entries(w), sorted(w))):
        near = [g for g in groups if any(_entries(weights & other) >= ALIKE * _entries(other) for other in g)]
        groups = [g for g in groups if g not in near] + [[w for g in near for w in g] + [weights]]
    groups.sort(key=lambda g: (-_entries(g[0]), sorted(g[0])))
    return {weights: i for i, group in enumerate(groups, 1) for weights in group}


def _entries(weights: Weights) -> int:
    return sum(n for _, _, n in weights)


def _named(items: Iterable[Item], folder: Path) -> list[Item]:
    """Names: file stems; with their folder where two collide; the whole path where that collides too."""
    items = list(items)
    spellings = [(_own_name(i.path, folder), _with_folder(i.path, folder), _whole(i.path, folder)) for i in items]
    shown = [k for k, item in enumerate(items) if item.bucket != "ignored"]
    names = [whole for _, _, whole in spellings]
    for level in (1, 0):
        count = Counter(spellings[k][level] for k in shown)
        for k in shown:
            names[k] = spellings[k][level] if count[spellings[k][level]] == 1 else names[k]
    return [replace(item, name=name) for item, name in zip(items, names, strict=True)]


def _own_name(path: Path, folder: Path) -> str:
    name = path.name if path != folder else path.resolve().name
    if path.is_dir():
        return name
    return name.split(".safetensors.index.")[0] if ".safetensors.index." in name else Path(name).stem


def _with_folder(path: Path, folder: Path) -> str:
    own = _own_name(path, folder)
    return own if path.parent == folder or path == folder else f"{path.parent.name}/{own}"


def _whole(path: Path, folder: Path) -> str:
    inside = path != folder and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside else _own_name(path, folder)
