"""Files that survive a crash: written whole or not at all, and on the disk before they are told of."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, finds the old content or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk: else a loss of power may undo a renaming."""
    try:
        opened = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder on Windows, which has no such call
        return
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
