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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lineage.cache import Cache
from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.engines import in_parallel
from lineage.errors import FileError, LineageError
from lineage.keys import Param
from lineage.moments import Tally, tame
from lineage.reading import Reading, content_hash, files_of
from lineage.sketch import LEAST, SLOTS, Hash, allocate

Progress = Callable[[int, int, str], None]
Slots = tuple[tuple[str, int, int], ...]

KIND = "fingerprint1"  # raise the number whenever a field's meaning changes
MOST_BLOCKS = SLOTS // LEAST // 4


@dataclass(frozen=True, slots=True)  # thousands of models have millions of them
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
    files = files_of(path) if path.exists() else []
    return content_hash(path, cache) if files and all(cache.known(f) for f in files) else None


def _read(checkpoint: Checkpoint, cache: Cache, seed: int, progress: Progress | None) -> Fingerprint:
    params = list(checkpoint.specs.values())
    slots = _slots(checkpoint.specs)
    width = {block: stop - start for block, start, stop in slots}
    sketch = {block: np.zeros(n) for block, n in width.items()}
    own = block_of(checkpoint.specs)
    prints: list[TensorPrint] = []
    with ExitStack() as stack:
        reading = Reading(checkpoint, cache, stack)
        for i, param in enumerate(params, 1):
            block = own(param)
            weight = is_weight(param.component, param.dtype)
            hashed = partial(Hash, param.name, param.numel, width[block], seed) if weight else None
            found, part = _print(param, block, reading, hashed)
            prints.append(found)
            if weight:
                sketch[block] += part
            if progress:
                progress(i, len(params), param.name)
        digest = reading.finish()
    return Fingerprint(
        sha256=digest,
        bytes=sum(f.stat().st_size for f in files_of(checkpoint.path)),
        layout=checkpoint.layout,
        architecture=checkpoint.architecture,
        prediction_type=checkpoint.prediction_type,
        metadata=checkpoint.metadata,
        tensors=tuple(sorted(prints, key=lambda t: t.name)),
        sketch=np.concatenate([np.zeros(0), *sketch.values()]).astype(np.float32),
        slots=slots,
    )


def _print(
    param: Param, block: str, reading: Reading, hashed: Callable[[], Hash] | None
) -> tuple[TensorPrint, NDArray]:
    """What one parameter's entries tell, and their sketch; a part at a time."""
    digest, sketch = hashlib.sha256(str(param.dtype).encode()), hashed() if hashed else None
    tally = Tally(param.dtype.to_real())
    for part in reading.parts(param):
        digest.update(zlib.crc32(part.view(torch.uint8).numpy().data).to_bytes(4, "little"))
        tally.add(part)
        if sketch:
            sketch.take(part)
    moments = tally.moments()
    if hashed and moments.wild:
        sketch = hashed()
        sketch.take(tame(reading.entries(param)))
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


def _stored(found: Fingerprint) -> bytes:
    """Compressed JSON (as columns: they compress well), then the sketch."""
    fields = {k: v for k, v in vars(found).items() if k not in ("tensors", "sketch")}
    fields["tensors"] = {k: [getattr(t, k) for t in found.tensors] for k in TensorPrint.__dataclass_fields__}
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
