"""Frozen records of all that is saved, their JSON, and its atomic writing.

Schema number: MAJOR.MINOR.PATCH. MAJOR changes when a field is removed, renamed or changes meaning (old readers must
refuse); MINOR when a field or kind is added (old readers still work); PATCH when only documentation changes.
Numbers that a method cannot know are null, never a placeholder; NaN and infinities are never written.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from lineage.errors import FileError

SCHEMA = "1.2.0"


@dataclass(frozen=True)
class Provenance:
    """Where a result comes from. `inputs`: role -> {path (file name only), sha256, bytes}."""

    command: str
    inputs: dict[str, dict[str, Any]]
    device: str
    seed: int | None = None
    version: str = ""
    torch: str = ""
    date: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Interval:
    """A value with a certified interval: low <= truth <= high."""

    low: float
    value: float
    high: float


@dataclass(frozen=True)
class LayerSpectrum:
    """Spectrum of one parameter's delta, seen as a matrix (out, in * kh * kw). Null: this solver cannot know it.

    energy[k]: share of ||D||_F^2 in the k largest singular values (raw delta, rounding noise included).
    signal_energy[k]: the same of the cleaned signal above the rounding edge (Gavish & Donoho 2017).
    signal_rank_at_least: singular values surely above the edge; equal to signal_rank where that is not null.
    solver: "identical", "gram32", "gram64", "randomized", "full" or "factors".
    """

    name: str
    component: str
    block: str
    role: str
    shape: tuple[int, ...]
    frobenius: float
    relative: float | None
    entries: int
    identical_entries: int | None
    noise_energy: float | None
    noise_edge: float | None
    signal_rank: int | None
    signal_rank_at_least: int | None
    below_storage_precision: bool
    numerical_rank: int | None
    stable_rank: float | None
    effective_rank: float | None
    participation_ratio: float | None
    k_90: int | None
    k_99: int | None
    k_90_at_least: int | None
    k_99_at_least: int | None
    signal_k_90: int | None
    signal_k_99: int | None
    energy: dict[str, Interval]
    signal_energy: dict[str, float] | None
    gaussian_energy: dict[str, float]
    singular_values: tuple[float, ...]
    solver: str


@dataclass(frozen=True)
class VectorDelta:
    """Delta of a parameter with fewer than two dimensions (norm scale, bias): it has no spectrum."""

    name: str
    component: str
    block: str
    role: str
    shape: tuple[int, ...]
    frobenius: float
    relative: float | None
    identical_entries: int | None


@dataclass(frozen=True)
class Within:
    """Of `layers` layers, the share (and the share of their delta energy) whose 90 % / 99 % lies within k ranks."""

    layers: int
    layers_90: float | None
    layers_99: float | None
    energy_90: float | None
    energy_99: float | None
    mean_energy: float | None


@dataclass(frozen=True)
class Group:
    """One component or block: counts, ||D||_F, ||D||_F / ||W||_F, weighted share of energy at k, median ranks."""

    layers: int
    frobenius: float
    relative: float | None
    energy: float | None
    signal_energy: float | None
    median_signal_rank: float | None
    identical_layers: int


@dataclass(frozen=True)
class SvdSummary:
    """The article's claim, answered: does the delta live in fewer than k = 64 ranks? Only matrices of short side > k
    count; the rest and the vectors are counted apart. `gaussian` is the null: a Gaussian matrix of the same shapes."""

    k: int
    answer: str
    signal: Within
    raw: Within
    gaussian: Within
    median_signal_rank: float | None
    signal_rank_unknown: int
    matrices: int
    small_matrices: int
    vectors: int
    identical_matrices: int
    identical_vectors: int
    frobenius: float
    relative: float | None
    components: dict[str, Group]
    blocks: dict[str, Group]


@dataclass(frozen=True)
class SvdResult:
    """What `lineage svd` found. `unmatched`: [{name, side: "base" | "tuned", reason}]; `notes`: plain sentences."""

    provenance: Provenance
    base: str
    tuned: str
    rank: int
    tolerance: float
    summary: SvdSummary
    layers: tuple[LayerSpectrum, ...]
    vectors: tuple[VectorDelta, ...]
    unmatched: tuple[dict[str, str], ...]
    notes: tuple[str, ...] = ()
    kind: str = "svd"


@dataclass(frozen=True)
class ComponentFacts:
    """One component of a file: parameters' tensors, entries, and dtype -> tensors."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class InspectResult:
    """What `lineage inspect` found. records: the metadata that tells of origins, read as JSON where it is JSON."""

    provenance: Provenance
    name: str
    layout: str
    architecture: str
    prediction_type: str | None
    zero_terminal_snr: bool
    bytes: int
    sha256: str
    short_hash: str | None
    components: dict[str, ComponentFacts]
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    metadata: dict[str, str]
    records: dict[str, Any]
    notes: tuple[str, ...] = ()
    kind: str = "inspect"


@dataclass(frozen=True)
class MergeInput:
    """One original model of a recipe. `name`: as the recipe writes it; `file`: file name; `keys`: tensors in it."""

    name: str
    file: str
    sha256: str | None
    bytes: int
    keys: int
    architecture: str
    prediction_type: str | None


@dataclass(frozen=True)
class MergeStep:
    """One merge of a recipe. `inputs`: names of original models, or of earlier steps (then `from_steps` holds their
    index, else null). `policy`: how many keys were "merged", "kept" (from the first operand), "unhalved" (of the kept
    ones: left in single precision although fp16 was asked), "dropped", "widened" (only the shared channels merged),
    "taken" (component taken whole), "adapted". `blocks`: pattern -> weight; `take`: component -> model;
    `adapters`: file -> weight. `changed_keys`: up to 200 [{name, policy, reason}] that were not plainly merged."""

    name: str
    method: str
    weight: float
    inputs: tuple[str, ...]
    from_steps: tuple[int | None, ...]
    half: bool
    policy: dict[str, int]
    blocks: dict[str, float]
    take: dict[str, str]
    adapters: dict[str, float]
    changed_keys: tuple[dict[str, str], ...] = ()


@dataclass(frozen=True)
class BlockChange:
    """How far an output moved from one original input: ||output - input||_F / ||input||_F, whole and by block, over
    the keys both have; null where the input's norm is 0. Estimated from a sample of the entries of large tensors."""

    input: str
    whole: float | None
    blocks: dict[str, float | None]


@dataclass(frozen=True)
class MergeOutput:
    """One output. `step`: index into steps; `file`: null in a dry run. `coefficients`: original
    input -> factor, summing to 1 (of the default weight; `block_coefficients` where blocks differ);
    `absolute_sum`: sum of |coefficients|, above 2 a blow-up; `dtypes`: dtype -> number of keys; `changes`: one per
    original input, empty in a dry run."""

    name: str
    step: int
    file: str | None
    bytes: int
    container: str
    keys: int
    dtypes: dict[str, int]
    coefficients: dict[str, float]
    block_coefficients: dict[str, dict[str, float]]
    absolute_sum: float
    blow_up: bool
    changes: tuple[BlockChange, ...] = ()


@dataclass(frozen=True)
class MergeResult:
    """What `lineage merge` or `lineage apply` did, or would do (`dry_run`). The steps are the merge tree: each names
    its inputs, outputs name their step. `arithmetic`: "webui" (stored dtype, rounded per operation and per line) or
    "float32" (rounded once); `warnings`: plain sentences; `recipe`: its text."""

    provenance: Provenance
    recipe: str
    recipe_name: str
    arithmetic: str
    dry_run: bool
    inputs: tuple[MergeInput, ...]
    steps: tuple[MergeStep, ...]
    outputs: tuple[MergeOutput, ...]
    warnings: tuple[str, ...] = ()
    kind: str = "merge"


class Result(Protocol):
    """Anything with a `kind` and a provenance: one per verb."""

    @property
    def kind(self) -> str: ...

    @property
    def provenance(self) -> Provenance: ...


def provenance(command: str, inputs: dict[str, dict[str, Any]], device: str = "cpu", **more: Any) -> Provenance:
    """Provenance with today's date and the versions of this package and of torch filled in."""
    return Provenance(
        command,
        inputs,
        device,
        version=_version("model-lineage"),
        torch=_version("torch"),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        **more,
    )


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"


def to_json(result: Any) -> dict[str, Any]:
    """The plain JSON form of a result: {"schema": ..., "kind": ..., fields}. Non-finite numbers become null."""
    return {"schema": SCHEMA, **_plain(result)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def dumps(result: Any) -> str:
    """JSON text of a result, one trailing newline, valid for strict parsers."""
    return json.dumps(to_json(result), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def load_json(path: str | os.PathLike) -> dict[str, Any]:
    """Read a result.json of this schema's MAJOR number; FileError otherwise."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise FileError(path, f"cannot be read as a result ({e}).", "Give the result.json that a verb wrote.") from e
    schema = found.get("schema") if isinstance(found, dict) else None
    if not isinstance(schema, str) or "kind" not in found:
        raise FileError(path, "is JSON, but not a result of lineage.", "Give the result.json that a verb wrote.")
    if schema.split(".")[0] != SCHEMA.split(".")[0]:
        raise FileError(path, f"has schema {schema}, this version reads {SCHEMA}.", "Use a matching version.")
    return found


def check_target(folder: str | os.PathLike, names: list[str], force: bool) -> None:
    """Refuse a target before any work: `names` exist in it and `force` is off, or nothing can be written there."""
    folder = Path(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise FileError(folder, "is a file, a folder is needed.", "Name another folder with -o.")
    there = [n for n in names if os.path.lexists(folder / n)]
    if there and not force:
        raise FileError(folder, f"already holds {', '.join(there)}.", "Name another folder with -o, or add --force.")
    held = next((p for p in (folder, *folder.absolute().parents) if os.path.exists(p)), folder)
    if not os.path.isdir(held) or not os.access(held, os.W_OK | os.X_OK):
        raise FileError(folder, f"{held} is not a writable folder.", "Name another folder with -o.")


def write_files(folder: str | os.PathLike, files: Mapping[str, str | bytes], force: bool = False) -> None:
    """Write all `files` (name -> content) into `folder`, or none: a new folder appears by one rename; in an existing
    one every file is complete and synced before the first is put in place, and a failure puts the old ones back.
    Killed between two renames, an existing folder can hold new files beside old ones, each of them whole."""
    check_target(folder, list(files), force)
    target = Path(folder).resolve()
    try:
        with _staging(target) as staging:
            for name, content in files.items():
                _write_synced(staging / name, content)
            if target.exists():
                _put_in_place(staging, target, list(files))
            else:
                staging.rename(target)
    except OSError as e:
        raise FileError(folder, f"cannot be written ({e.strerror}).", "Is a file there open, or the disk full?") from e


@contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A new folder on the file system of `target`, gone afterwards, and with it what a killed run left of the same."""
    parent = target if target.exists() else target.parent
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".lineage-{zlib.crc32(target.name.encode(errors='surrogateescape')):08x}-"
    for left in parent.glob(f"{prefix}*"):
        shutil.rmtree(left, ignore_errors=True)
    staging = parent / (prefix + secrets.token_hex(4))
    staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(staging: Path, folder: Path, names: list[str]) -> None:
    """Rename `names` from `staging` into `folder`; an OSError (a file held open on Windows) undoes those done."""
    kept = staging / ".replaced"
    kept.mkdir()
    with ExitStack() as undo:
        for name in names:
            if os.path.lexists(folder / name):
                shutil.copy2(folder / name, kept / name)
                undo.callback(os.replace, kept / name, folder / name)
            else:
                undo.callback((folder / name).unlink, missing_ok=True)
            os.replace(staging / name, folder / name)
        undo.pop_all()


def _write_synced(path: Path, content: str | bytes) -> None:
    # A file name that is not UTF-8 comes with lone surrogates; \udcff is their spelling in JSON, and legible in HTML
    with open(path, "wb") as f:
        f.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        f.flush()
        os.fsync(f.fileno())
