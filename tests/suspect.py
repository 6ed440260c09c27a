"""Looking at a file that may be broken or hostile, and writing such files."""

from __future__ import annotations

import io
import time
import tracemalloc
import zipfile
from pathlib import Path

import torch

import lineage
from lineage.errors import LineageError
from lineage.results import dumps

SECONDS, MEGABYTES = 30, 96


def looked_at(path: Path) -> dict[str, torch.Tensor] | None:
    """Everything that can be asked of a file; None where it is refused. Any other exception is a failure."""
    tracemalloc.start()
    begun = time.perf_counter()
    try:
        with lineage.open_checkpoint(path) as checkpoint:
            found = {n: checkpoint[n].clone() for n in checkpoint}
            found |= {n: checkpoint.raw[n].clone() for n in checkpoint.raw}
        dumps(lineage.inspect(path))
        return found
    except LineageError as refusal:
        return _checked(refusal, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEGABYTES * 2**20
        assert time.perf_counter() - begun < SECONDS


def _checked(refusal: LineageError, path: Path) -> None:
    """It names the file and stays readable."""
    assert path.name in str(refusal)
    assert len(str(refusal)) < 2000


def zipped(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


def legacy(content: object) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def archive(pickled: bytes, storages: tuple[bytes, ...] = (b"\0" * 16,), compress: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip around any pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as z:
        z.writestr("a/data.pkl", pickled)
        z.writestr("a/byteorder", "little")
        for i, storage in enumerate(storages):
            z.writestr(f"a/data/{i}", storage)
    return out.getvalue()
