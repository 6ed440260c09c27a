"""Hashes of whole files, begun early: reading and hashing need no torch, so they can run while torch is imported."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread

_begun: dict[tuple, Future[str]] = {}


def begin(*paths: str | os.PathLike) -> None:
    """Start to hash the files in the background, as many at once as there are processors; `sha256` then waits for what
    was begun. The threads do not keep the process alive."""
    work = SimpleQueue[tuple[Path, Future[str]]]()
    for path in map(Path, paths):
        if path.is_file() and _key(path) not in _begun:
            future = _begun[_key(path)] = Future()
            work.put((path, future))
    for _ in range(min(work.qsize(), os.cpu_count() or 1)):
        Thread(target=_work, args=(work,), daemon=True).start()


def _work(work: SimpleQueue[tuple[Path, Future[str]]]) -> None:
    with suppress(Empty):
        while True:
            path, future = work.get_nowait()
            try:
                future.set_result(_digest(path))
            except OSError as e:
                future.set_exception(e)


def sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, hexadecimal; of a folder: of the lines "<sha256>  <relative path>" of its files."""
    path = Path(path)
    if path.is_dir():
        files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.is_file())
        return hashlib.sha256("".join(f"{sha256(f)}  {name}\n" for name, f in files).encode()).hexdigest()
    begun = _begun.pop(_key(path), None)
    return begun.result() if begun else _digest(path)


def short_hash(path: str | os.PathLike) -> str:
    """The web UI's old 8-digit hash: of bytes 0x100000 to 0x110000."""
    with open(path, "rb") as f:
        f.seek(0x100000)
        return hashlib.sha256(f.read(0x10000)).hexdigest()[:8]


def own_short_hash(path: Path) -> str:
    """`short_hash` of a file that is large enough to have one of its own; else, and of a folder, ""."""
    return short_hash(path) if path.is_file() and path.stat().st_size > 0x100000 else ""


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())


def _key(path: Path) -> tuple:
    """A file as it is now: what is hashed in the background is not taken for what was written there since."""
    found = path.stat()
    return os.path.realpath(path), found.st_size, found.st_mtime_ns


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
