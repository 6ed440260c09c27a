"""What was read once is not read again: entries by content hash, and an index from a file's state to that hash.

Entries appear whole or not at all, carry their own checksum, and are only ever replaced by equal ones, so concurrent
runs and killed ones do no harm; a damaged entry counts as absent. A cache that cannot be written costs only time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from lineage import hashing
from lineage.errors import FileError
from lineage.target import Target

_MAGIC = b"lineage1"
_DIGEST = 32
State = tuple[int, int, int]


def default_folder() -> Path:
    """LINEAGE_CACHE; else the user's cache folder as the system has it (XDG_CACHE_HOME on Linux and BSD)."""
    if chosen := os.environ.get("LINEAGE_CACHE"):
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir()) / "lineage"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lineage" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "lineage"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "lineage"


def cached_sha256(path: str | os.PathLike, cache: Cache | None = None) -> str:
    """`hashing.sha256` of a file or folder; a file that is as it was at the last run is not read again.

    As it was: same path, size, and times of change to the nanosecond."""
    cache, path = cache or Cache(), Path(path)
    if path.is_dir():
        files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.is_file())
        lines = "".join(f"{cached_sha256(f, cache)}  {name}\n" for name, f in files)
        return hashlib.sha256(lines.encode()).hexdigest()
    known = cache.known(path)
    if known is None:
        before = state_of(path)
        known = hashing.sha256(path)
        cache.remember(path, before, known)
    return known


def identify(path: str | os.PathLike) -> dict[str, Any]:
    """What a result says of an input: its name, bytes and sha256."""
    path = Path(path)
    return {"path": path.name, "bytes": hashing.size(path), "sha256": cached_sha256(path)}


def begin(*paths: str | os.PathLike) -> None:
    """`hashing.begin` of the files whose hash is not known yet."""
    cache = Cache()
    hashing.begin(*(path for path in map(Path, paths) if cache.known(path) is None))


def state_of(path: Path) -> State:
    """Size and times of change (modified, and of the entry itself) in nanoseconds."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Cache:
    """A folder of entries. Safe to use from many processes; never raises for what the disk refuses."""

    def __init__(self, folder: str | os.PathLike | None = None):
        self.folder = Path(folder) if folder is not None else default_folder()

    def load(self, kind: str, key: str) -> bytes | None:
        """The bytes stored under `key`; None where there are none, or damaged ones."""
        return self._read(self._entry(kind, key))

    def store(self, kind: str, key: str, data: bytes) -> None:
        """Keep `data` under `key` (letters and digits)."""
        self._write(self._entry(kind, key), data)

    def known(self, path: Path) -> str | None:
        """The sha256 of a file that is as it was when `remember` was told."""
        try:
            line = (self._read(self._index(path)) or b"").decode("utf-8", "replace")
            return line.partition(" ")[0] if line == self._line(path, state_of(path), line.partition(" ")[0]) else None
        except OSError:
            return None

    def remember(self, path: Path, before: State, digest: str) -> None:
        """A file's sha256, if its state is still that of `before` the reading."""
        with contextlib.suppress(OSError):
            if state_of(path) == before:
                self._write(self._index(path), self._line(path, before, digest).encode("utf-8", "replace"))

    def _entry(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / key

    def _index(self, path: Path) -> Path:
        return self._entry("index", hashlib.sha256(_absolute(path).encode("utf-8", "replace")).hexdigest()[:32])

    @staticmethod
    def _line(path: Path, state: State, digest: str) -> str:
        return " ".join([digest, *map(str, state), _absolute(path)]).encode("utf-8", "replace").decode()

    @staticmethod
    def _read(entry: Path) -> bytes | None:
        try:
            found = entry.read_bytes()
        except OSError:
            return None
        data = found[len(_MAGIC) + _DIGEST :]
        whole = found[: len(_MAGIC) + _DIGEST] == _MAGIC + hashlib.sha256(data).digest()
        return data if whole else None

    @staticmethod
    def _write(entry: Path, data: bytes) -> None:
        with contextlib.suppress(OSError, FileError), Target(entry) as target:
            target.file.write(_MAGIC + hashlib.sha256(data).digest() + data)
            target.commit()


def _absolute(path: Path) -> str:
    return os.path.abspath(path)
