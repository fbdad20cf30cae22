"""Identity of files and folders: every byte that is read counts, behind links too; names of places do not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mmedexpert.errors import UserError
from mmedexpert.runtime import fingerprints
from mmedexpert.runtime.fingerprints import SMALL, file_digest, folder_digest


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settled(path: Path, monkeypatch) -> None:
    """As if the file had last been changed a while ago."""
    now = time.time()
    monkeypatch.setattr(fingerprints.time, "time", lambda: now + 60)


def count_reads(monkeypatch) -> list[str]:
    read = []
    digest = fingerprints.hashlib.file_digest

    def counted(file, name):
        read.append(file.name)
        return digest(file, name)

    monkeypatch.setattr(fingerprints.hashlib, "file_digest", counted)
    return read


def test_an_unchanged_file_is_read_once(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"x" * SMALL)
    settled(path, monkeypatch)
    read = count_reads(monkeypatch)
    assert file_digest(path) == file_digest(path) and len(read) == 1
    path.rename(tmp_path / "moved")  # a new ctime: it is read again, and gives the same
    first = file_digest(tmp_path / "moved")
    assert len(read) == 2 and first == file_digest(tmp_path / "moved")


def test_a_file_overwritten_under_its_size_and_time_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"x" * SMALL)
    settled(path, monkeypatch)
    before, stat = file_digest(path), path.stat()
    with path.open("r+b") as file:  # in place: the same inode
        file.write(b"y")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    assert file_digest(path) != before


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    path = tmp_path / "large"
    path.write_bytes(b"x" * SMALL)
    read = count_reads(monkeypatch)
    file_digest(path)
    file_digest(path)
    assert len(read) == 2


def test_a_memory_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    path = tmp_path / "large"
    path.write_bytes(b"x" * SMALL)
    settled(path, monkeypatch)
    assert file_digest(path) == file_digest(path)


@pytest.fixture()
def root(tmp_path):
    folder = tmp_path / "root"
    (folder / "images").mkdir(parents=True)
    (folder / "labels.tsv").write_text("a\tb\n")
    (folder / "images" / "1.png").write_bytes(b"one")
    return folder


@pytest.mark.parametrize("name", ["labels.tsv", "images/1.png"])
def test_every_file_counts_whatever_its_suffix(root, name):
    before = folder_digest(root)
    path = root / name
    stat = path.stat()
    path.write_bytes(bytes(len(path.read_bytes())))  # equal size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert folder_digest(root) != before


def test_names_count_and_places_do_not(root, tmp_path):
    before = folder_digest(root)
    root.rename(tmp_path / "elsewhere")
    assert folder_digest(tmp_path / "elsewhere") == before
    (tmp_path / "elsewhere" / "images" / "1.png").rename(tmp_path / "elsewhere" / "images" / "2.png")
    assert folder_digest(tmp_path / "elsewhere") != before


def test_links_are_followed_and_loops_end(root, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "labels.csv").write_text("one")
    (root / "set").symlink_to(tmp_path / "store")
    (root / "loop").symlink_to(root)
    before = folder_digest(root)
    (tmp_path / "store" / "labels.csv").write_text("two")
    assert folder_digest(root) != before
    # the same content without links
    plain = tmp_path / "plain"
    (plain / "set").mkdir(parents=True)
    (plain / "images").mkdir()
    for name in ("labels.tsv", "images/1.png", "set/labels.csv"):
        (plain / name).write_bytes((root / name).read_bytes())
    (root / "loop").unlink()
    assert folder_digest(root) == folder_digest(plain)


def test_hidden_files_and_results_are_no_part(root):
    before = folder_digest(root, leave_out=root / "results")
    (root / ".DS_Store").write_text("Mac")
    (root / ".git").mkdir()
    (root / ".git" / "HEAD").write_text("ref")
    (root / "results" / "data").mkdir(parents=True)
    (root / "results" / "data" / "x.json").write_text("{}")
    assert folder_digest(root, leave_out=root / "results") == before != folder_digest(root)


def test_a_file_that_cannot_be_read_is_named(root, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fingerprints, "file_digest", refuse)
    with pytest.raises(UserError, match=r"1\.png cannot be read \(Permission denied\)"):
        folder_digest(root)
