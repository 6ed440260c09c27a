"""Files that appear whole or not at all: a temporary name, synced, then renamed; litter of killed runs is removed."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from lineage.errors import FileError

_PART = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.lineage-part")
_SYNC_EVERY = 1 << 28
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _SyncingFile(io.FileIO):
    """A file that is brought to the disk while it grows: else all of it would wait for the last sync."""

    def __init__(self, path: Path):
        super().__init__(path, "xb")
        self._behind, self._written = ThreadPoolExecutor(1), 0
        self._pending: Future[None] | None = None

    def write(self, data) -> int:
        written = super().write(data)
        self._written += written
        if self._written >= _SYNC_EVERY and (self._pending is None or self._pending.done()):
            self.join()
            self._written = 0
            self._pending = self._behind.submit(os.fsync, self.fileno())
        return written

    def join(self) -> None:
        """Wait for a sync under way; its failure is told here, as a later sync would not repeat it."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def close(self) -> None:
        self._behind.shutdown()
        super().close()


class Target:
    """A file that appears whole or not at all; a context manager giving a Target whose `file` is open for writing."""

    def __init__(self, path: Path):
        self.path = path
        self._part = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.lineage-part")

    def __enter__(self) -> Target:
        with self._clear():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_litter(self.path.parent)
            self._raw = _SyncingFile(self._part)
            self.file = io.BufferedWriter(self._raw)
        return self

    def __exit__(self, kind, error, trace) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise FileError(self.path, f"cannot be written ({error.strerror}).", "Nothing was left behind.") from error

    def reserve(self, size: int) -> None:
        """Take `size` bytes of the disk at once, where the system can: writing them is faster, and does not run out."""
        allocate = getattr(os, "posix_fallocate", None)  # not on every system
        if allocate:
            try:
                allocate(self._raw.fileno(), 0, size)
            except OSError as e:
                if e.errno in _FULL:
                    raise

    @property
    def part(self) -> Path:
        """Where the bytes lie before `commit`."""
        return self._part

    def sync(self) -> None:
        """All bytes on the disk, still under the temporary name."""
        self.file.flush()
        self._raw.join()
        os.fsync(self.file.fileno())

    def commit(self) -> None:
        """The file takes its name, replacing an older one."""
        self.file.close()
        with self._clear():
            os.replace(self._part, self.path)
        _sync_folder(self.path.parent)

    @contextlib.contextmanager
    def _clear(self):
        try:
            yield
        except OSError as e:
            advice = "Is it open elsewhere, or the folder read-only? Name another with -o."
            raise FileError(self.path, f"cannot be written ({e.strerror}).", advice) from e


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; the rename is journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_litter(folder: Path) -> None:
    """Remove temporary files of runs that were killed; those of living processes stay."""
    for path in folder.glob(".*.lineage-part"):
        found = _PART.fullmatch(path.name)
        if found and not _alive(int(found[1])):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # a file open in a living process cannot be removed there, and os.kill would end that process
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def check_space(folder: Path, needed: int) -> None:
    """LineageError unless the disk of `folder` (which may not exist yet) has `needed` bytes free."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise FileError(folder, f"needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free.", "Make room, or use -o.")
