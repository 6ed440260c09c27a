"""One read of one model file: hashes, statistics and sketch, from which its relations to other models can be told.

The file is read once, in the order of its bytes, one tensor at a time; what comes out is kept in the user's cache under
the hash of the content.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lineage.cache import Cache, State, cached_sha256, state_of
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.engines import in_parallel
from lineage.errors import FileError, LineageError
from lineage.hashing import size
from lineage.keys import Param
from lineage.moments import PART, Tally, tame
from lineage.raw import Joined
from lineage.sketch import LEAST, SLOTS, Hash, allocate

Progress = Callable[[int, int, str], None]
Slots = tuple[tuple[str, int, int], ...]

KIND = "fingerprint1"  # raise the number whenever a field's meaning changes
MOST_BLOCKS = SLOTS // LEAST // 4


@dataclass(frozen=True)
class TensorPrint:
    """One parameter, under its canonical name. Statistics as in moments.Moments.

    hash: of dtype and entries in order, 128 bits hexadecimal; against accidents, not forgery."""

    name: str
    component: str
    block: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    hash: str
    values_hash: str
    norm: float
    mean: float
    std: float
    skewness: float
    kurtosis: float
    largest: float
    zeros: int
    wild: int
    rounding_energy: float

    @property
    def entries(self) -> int:
        return math.prod(self.shape)

    @property
    def compared(self) -> bool:
        """Whether it takes part in comparisons."""
        return is_weight(self.component, self.dtype)


@dataclass(frozen=True)
class Fingerprint:
    """What one read of a model tells. tensors: sorted by name. metadata: of the header.

    sketch: (slots,) float32, linear in the weights (lineage.sketch). slots: (block, start, stop) of its parts."""

    sha256: str
    bytes: int
    layout: str
    architecture: str
    prediction_type: str | None
    metadata: dict[str, str]
    tensors: tuple[TensorPrint, ...]
    sketch: NDArray[np.float32]
    slots: Slots

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(block for block, _, _ in self.slots)


def fingerprint(
    path: str | Path, *, cache: Path | Cache | None = None, seed: int = 0, progress: Progress | None = None
) -> Fingerprint:
    """The fingerprint of a model file or folder, from the cache where it is known. seed: of the sketch's hash.

    cache: its folder, or a Cache; default: the user's. FileError for what cannot be read, or changes meanwhile."""
    path, cache = Path(path), cache if isinstance(cache, Cache) else Cache(cache)
    kind = KIND if seed == 0 else f"{KIND}-{seed}"
    if (digest := _known(path, cache)) and (found := _loaded(cache.load(kind, digest))):
        return found
    with open_checkpoint(path) as checkpoint, torch.inference_mode():
        found = _read(checkpoint, cache, seed, progress)
    cache.store(kind, found.sha256, _stored(found))
    return found


def fingerprints(
    paths: Sequence[str | Path],
    *,
    cache: Path | None = None,
    jobs: int = 1,
    engine: str | None = None,
    address: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[Path, Fingerprint], dict[Path, str]]:
    """(path -> fingerprint, path -> why it has none) of many models; see engines.in_parallel for jobs and engines."""
    plain = [Path(path) for path in paths]
    one = partial(_fingerprint_or_reason, cache=cache)
    found = in_parallel(one, plain, jobs=jobs, engine=engine, address=address, progress=progress)
    pairs = list(zip(plain, found, strict=True))
    return {p: f for p, f in pairs if isinstance(f, Fingerprint)}, {p: f for p, f in pairs if isinstance(f, str)}


def _fingerprint_or_reason(path: Path, cache: Path | None) -> Fingerprint | str:
    """On one thread: the processes are the parallel work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fingerprint(path, cache=cache)
    except LineageError as e:
        return str(e)
    except OSError as e:
        return str(FileError(path, f"cannot be read ({e.strerror or e})."))
    finally:
        torch.set_num_threads(before)


def is_weight(component: str, dtype: str | torch.dtype) -> bool:
    """Whether a parameter of this component and dtype is a weight: schedules, counters and indexes are not."""
    return component != "other" and str(dtype).removeprefix("torch.").startswith(("float", "bfloat"))


def block_of(specs: Mapping[str, Param]) -> Callable[[Param], str]:
    """How the weights of a model are split: by block; by component where there are too many blocks."""
    many = len({p.block or p.component for p in specs.values()}) > MOST_BLOCKS
    return (lambda p: p.component) if many else (lambda p: p.block or p.component)


def _known(path: Path, cache: Cache) -> str | None:
    """The content's hash, if every file is as it was at the last run."""
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return cached_sha256(path, cache) if files and all(cache.known(f) for f in files) else None


def _read(checkpoint: Checkpoint, cache: Cache, seed: int, progress: Progress | None) -> Fingerprint:
    params = list(checkpoint.specs.values())
    slots = _slots(checkpoint.specs)
    width = {block: stop - start for block, start, stop in slots}
    sketch = {block: np.zeros(n) for block, n in width.items()}
    own = block_of(checkpoint.specs)
    prints: list[TensorPrint] = []
    with ExitStack() as stack:
        files = _Files(checkpoint, cache, stack)
        for i, param in enumerate(params, 1):
            files.reach(param.stored)
            block = own(param)
            entries = _flat(param.view(checkpoint.raw[param.stored]))
            weight = is_weight(param.component, param.dtype)
            hashed = partial(Hash, param.name, param.numel, width[block], seed) if weight else None
            found, part = _print(param, block, entries, hashed)
            prints.append(found)
            if weight:
                sketch[block] += part
            if progress:
                progress(i, len(params), param.name)
        digest = files.finish()
    return Fingerprint(
        sha256=digest,
        bytes=size(checkpoint.path),
        layout=checkpoint.layout,
        architecture=checkpoint.architecture,
        prediction_type=checkpoint.prediction_type,
        metadata=checkpoint.metadata,
        tensors=tuple(sorted(prints, key=lambda t: t.name)),
        sketch=np.concatenate([np.zeros(0), *sketch.values()]).astype(np.float32),
        slots=slots,
    )


def _print(param: Param, block: str, entries: Tensor, hashed: Callable[[], Hash] | None) -> tuple[TensorPrint, NDArray]:
    """What one parameter's entries tell, and their sketch; a part at a time."""
    digest, tally, sketch = hashlib.sha256(str(param.dtype).encode()), Tally(entries.dtype), hashed and hashed()
    for part in entries.split(PART):
        digest.update(zlib.crc32(part.view(torch.uint8).numpy().data).to_bytes(4, "little"))
        tally.add(part)
        if sketch:
            sketch.take(part)
    moments = tally.moments()
    if hashed and sketch and moments.wild:
        sketch = hashed()
        sketch.take(tame(entries))
    digest.update(moments.values_hash.encode())
    found = TensorPrint(
        name=param.name,
        component=param.component,
        block=block,
        role=param.role,
        shape=tuple(param.shape),
        dtype=_name(param.dtype),
        hash=digest.hexdigest()[:32],
        **vars(moments),
    )
    return found, sketch.sketch() if sketch else np.zeros(0)


def _flat(tensor: Tensor) -> Tensor:
    """(n,) contiguous; a complex number is two entries."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).contiguous()


def _slots(specs: Mapping[str, Param]) -> Slots:
    own, entries = block_of(specs), dict[str, int]()
    for param in specs.values():
        if is_weight(param.component, param.dtype):
            entries[own(param)] = entries.get(own(param), 0) + param.numel
    ends, out = 0, []
    for block, n in allocate(entries).items():
        out.append((block, ends, ends + n))
        ends += n
    return tuple(out)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Files:
    """Hashes a model's files while their tensors are read: each file up to a tensor's end before that tensor is taken,
    so that its bytes come from the disk once."""

    def __init__(self, checkpoint: Checkpoint, cache: Cache, stack: ExitStack):
        self._path, self._cache = checkpoint.path, cache
        self._hashing: dict[Path, _Hashing] = {}
        self._ends: dict[str, tuple[Path, int]] = {}
        for prefix, raw in parts(checkpoint.raw):
            self._hashing[raw.path] = stack.enter_context(_Hashing(raw.path))
            for name, spec in raw.specs.items():
                self._ends[prefix + name] = raw.path, (spec.offset or 0) + spec.nbytes

    def reach(self, stored: str) -> None:
        """Read on to the end of the tensor of this stored name."""
        path, end = self._ends[stored]
        self._hashing[path].reach(end)

    def finish(self) -> str:
        """sha256 of the whole; FileError where a file has changed."""
        for path, hashing in self._hashing.items():
            self._cache.remember(path, *hashing.finish())
        lone = self._hashing.get(self._path)
        return lone.finish()[1] if lone else cached_sha256(self._path, self._cache)


def parts(raw: Any) -> Iterator[tuple[str, Any]]:
    """(prefix, reader) of each file."""
    if not isinstance(raw, Joined):
        yield "", raw
        return
    for prefix, part in raw.named:
        yield from ((prefix + inner, leaf) for inner, leaf in parts(part))


class _Hashing:
    """sha256 of a file that is read bit by bit; a context manager."""

    def __init__(self, path: Path):
        self._path, self._digest, self._at = path, hashlib.sha256(), 0
        self._before: State = state_of(path)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._buffer = memoryview(bytearray(1 << 18))

    def __enter__(self) -> _Hashing:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def reach(self, end: int) -> None:
        while self._at < end and (got := self._file.readinto(self._buffer[: end - self._at])):
            self._digest.update(self._buffer[:got])
            self._at += got

    def finish(self) -> tuple[State, str]:
        """The file's state and hash, once all of it is read."""
        self.reach(self._before[0])
        if state_of(self._path) != self._before or self._at != self._before[0]:
            raise FileError(self._path, "changed while it was read.", "Run again when it is at rest.")
        return self._before, self._digest.hexdigest()


def _stored(found: Fingerprint) -> bytes:
    """Compressed JSON (as columns: they compress well), then the sketch."""
    fields = {k: v for k, v in vars(found).items() if k not in ("tensors", "sketch")}
    rows = [vars(t) for t in found.tensors]
    fields["tensors"] = {k: [row[k] for row in rows] for k in TensorPrint.__dataclass_fields__}
    text = zlib.compress(json.dumps(fields).encode())
    return len(text).to_bytes(8, "little") + text + found.sketch.astype("<f4").tobytes()


def _loaded(data: bytes | None) -> Fingerprint | None:
    if data is None:
        return None
    stream = io.BytesIO(data)
    fields = json.loads(zlib.decompress(stream.read(int.from_bytes(stream.read(8), "little"))))
    columns = fields.pop("tensors")
    columns["shape"] = [tuple(shape) for shape in columns["shape"]]
    rows = zip(*columns.values(), strict=True)
    tensors = tuple(TensorPrint(**dict(zip(columns, row, strict=True))) for row in rows)
    slots = tuple((block, start, stop) for block, start, stop in fields.pop("slots"))
    sketch = np.frombuffer(stream.read(), "<f4").astype(np.float32)
    return Fingerprint(**fields, tensors=tensors, sketch=sketch, slots=slots)
