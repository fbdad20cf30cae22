"""Identity of files and folders: what they hold, behind links too; not their place, their times or hidden files."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

from mmedexpert.errors import UserError
from mmedexpert.runtime.progress import track

SMALL = 2**16  # ours: bytes below which reading is as fast as remembering on disk
# ours: a file changed so lately may change again within one tick of its clock, and look the same (git's "racy" files)
SETTLED_SECONDS = 2.0
_COLUMNS = "device, inode, size, mtime_ns, ctime_ns"
_Stat = tuple[int, int, int, int, int]
_small: dict[_Stat, str] = {}  # digests of small files that this process has read


def file_digest(path: Path) -> str:
    """sha256 of a file's content, 64 hex digits; a file that has not changed since it was last read is not read again.

    Remembered by device, inode, size, mtime and ctime: the kernel sets ctime at every change of content and no program
    can set it back, so a file overwritten under its old size and mtime is read. Raises OSError where it cannot be read.
    """
    before = _stat(path)
    if before[2] < SMALL:
        if before not in _small:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if _stat(path) != before or time.time() - before[4] / 1e9 <= SETTLED_SECONDS:
                return digest
            _small[before] = digest
        return _small[before]
    known = _recall(before)
    if known is not None:
        return known
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stat(path) == before and time.time() - before[4] / 1e9 > SETTLED_SECONDS:
        _remember(before, digest)
    return digest


def folder_digest(root: Path, *, leave_out: Path | None = None) -> str:
    """sha256 over the relative names and contents of all files of a folder, behind links, whatever their suffix.

    Hidden files and folders (.DS_Store, .git, ..) and the folder `leave_out` (results that lie in it) are no part, nor
    is the place of the folder. UserError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    files = sorted(_files(root, "", (), leave_out and leave_out.resolve()))
    for name, path in track(files, "reading what the data set is made of"):
        try:
            content = file_digest(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): restore it or move it away") from error
        digest.update(f"{name}\0{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _files(folder: Path, prefix: str, above: tuple[Path, ...], leave_out: Path | None) -> Iterator[tuple[str, Path]]:
    here = folder.resolve()
    if here in above:  # a link to a folder that holds it
        return
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        if entry.is_dir():
            if leave_out is None or path.resolve() != leave_out:
                yield from _files(path, f"{prefix}{entry.name}/", (*above, here), leave_out)
        elif entry.is_file():
            yield f"{prefix}{entry.name}", path


def _stat(path: Path) -> _Stat:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _memory() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "mmedexpert" / "digests.sqlite"


def _recall(stat: _Stat) -> str | None:
    with suppress(sqlite3.Error, OSError, RuntimeError), closing(sqlite3.connect(_memory(), timeout=10)) as memory:
        row = memory.execute(f"SELECT sha256 FROM files WHERE ({_COLUMNS}) = (?, ?, ?, ?, ?)", stat).fetchone()
        return row[0] if row else None
    return None


def _remember(stat: _Stat, digest: str) -> None:
    """A memory that cannot be written only costs time."""
    with suppress(sqlite3.Error, OSError, RuntimeError):
        _memory().parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(_memory(), timeout=10)) as memory, memory:
            memory.execute(f"CREATE TABLE IF NOT EXISTS files ({_COLUMNS}, sha256, PRIMARY KEY ({_COLUMNS}))")
            memory.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (*stat, digest))
