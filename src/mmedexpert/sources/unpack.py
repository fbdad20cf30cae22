"""What benchmark loaders share: images out of zips or folders, rows out of csv, tsv, json and jsonl files."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from string import ascii_uppercase
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.runtime.progress import SHORT, Bar, track

MAX_ENTRY = 256 * 2**20  # bytes  # ours: MAX_PIXELS of `open_image` as an uncompressed bitmap fit
MAX_RATIO = 500  # ours: uncompressed to compressed; what deflate makes of nothing but zeros is 1032
RATIO_FROM = 2**20  # bytes  # ours: no small entry can fill a disk, whatever its ratio
MAX_CELL = MAX_ENTRY * 4 // 3 + 4  # characters: such an image in base64
_without_images = False


@contextmanager
def names_alone() -> Iterator[None]:
    """Within it `place_images` looks for none: records name them as published, for reading texts without images."""
    global _without_images
    before, _without_images = _without_images, True
    try:
        yield
    finally:
        _without_images = before


def unpack_images(archives: Sequence[Path], out: Path, wanted: Callable[[str], str | None]) -> set[str]:
    """Extract from zips to `out`, entry by entry; entries whose target exists with the right size are passed over.

    `wanted` maps an entry's name (POSIX) to its target relative to `out`, or to None to leave it out; where several
    archives have one target, the first counts. Returns the targets that entries of one archive with different content
    share: none of these is extracted, for nothing tells which is meant. The archives are untrusted.
    Raises UserError, before anything is written, for a broken zip, too little disk, and an entry that leaves `out`, is
    a link, encrypted, larger than MAX_ENTRY or compressed more than MAX_RATIO; later for an entry that is damaged.
    """
    targets: dict[str, tuple[Path, int, int]] = {}
    unclear: set[str] = set()
    jobs: list[tuple[Path, zipfile.ZipInfo, Path]] = []
    for archive in archives:
        try:
            with zipfile.ZipFile(archive) as file:
                entries = file.infolist()
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise UserError(f"{archive} cannot be opened as a zip ({error}): download it again") from error
        for entry in entries:
            name = entry.filename.replace("\\", "/")
            # macOS adds a resource fork "._x.jpg" beside each "x.jpg"
            if entry.is_dir() or name.startswith("__MACOSX/") or PurePosixPath(name).name.startswith("._"):
                continue
            target = wanted(name)
            if target is None:
                continue
            content = (archive, entry.CRC, entry.file_size)
            if target in targets:
                if targets[target][0] == archive and targets[target] != content:
                    unclear.add(target)
                continue
            if fault := _fault(entry, name, target):
                raise UserError(f"{archive}: entry {name[:200]!r} {fault}; nothing was extracted, get a sound archive")
            targets[target] = content
            if not _is_there(out / target, entry.file_size):
                jobs.append((archive, entry, out / target))
    jobs = [job for job in jobs if job[2].relative_to(out).as_posix() not in unclear]
    _check_disk(out, sum(entry.file_size for _, entry, _ in jobs))

    opened: zipfile.ZipFile | None = None
    try:
        for archive, entry, path in track(jobs, "extracting images"):
            if opened is None or opened.filename != os.fspath(archive):
                if opened is not None:
                    opened.close()
                opened = zipfile.ZipFile(archive)
            try:
                data = opened.read(entry)
            except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
                fix = "download the archive again"
                raise UserError(f"{archive}: entry {entry.filename[:200]!r} is damaged ({error}): {fix}") from error
            write_image(path, data)
    finally:
        if opened is not None:
            opened.close()
    return unclear


def write_image(path: Path, data: bytes) -> None:
    """Write `data` to `path` (folders are made): never a part of it; a file of the same size is left as it is."""
    if _is_there(path, len(data)):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.part")  # not the name plus a suffix: that may be too long for a file name
    try:
        part.write_bytes(data)  # without fsync, which would take longer than the rest: a wrong size is written again
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def place_images(
    records: Sequence[Record], root: Path, out_dir: Path, *, folders: Sequence[str], archives: Sequence[Path]
) -> tuple[list[Record], Path, Bad]:
    """Records whose `images` are names as published, with paths instead; the image root; records without their image.

    Images are used in place where `root` has all of them (each in the first of `folders` that holds it), or where
    there are no `archives`; else they are extracted to `out_dir/images`. An entry is an image's where its path ends in
    the image's name. A second record of one id is bad, too.
    """
    if _without_images:
        return list({record.id: record for record in records}.values()), root, []
    asked = {name for record in records for name in record.images}
    names = sorted(name for name in asked if not leaves_root(name))
    path_of: dict[str, str] = {}
    for name in track(names, "looking for images"):
        places = (str(PurePosixPath(folder) / name) for folder in folders)
        found = next((place for place in places if (root / place).is_file()), None)
        if found is not None:
            path_of[name] = found
    unclear: set[str] = set()
    image_root, looked_in = root, ", ".join(str(root / folder) for folder in folders)
    if archives and len(path_of) < len(names):
        image_root, looked_in = out_dir, ", ".join(map(str, archives))
        wanted = frozenset(names)

        def target(entry: str) -> str | None:
            parts = entry.split("/")
            ends = ("/".join(parts[start:]) for start in range(len(parts)))
            return next((f"images/{end}" for end in ends if end in wanted), None)

        unclear = unpack_images(archives, out_dir, target)
        there = [name for name in names if f"images/{name}" not in unclear]
        path_of = {name: f"images/{name}" for name in there if (out_dir / "images" / name).is_file()}

    placed: dict[str, Record] = {}
    bad: Bad = []
    for record in records:
        missing = next((name for name in record.images if name not in path_of), None)
        if missing is not None:
            what = "has several files of that name" if f"images/{missing}" in unclear else "is missing"
            bad.append((record.id, f"image {missing[:200]} {what} (looked in {looked_in})"))
        elif record.id in placed:
            bad.append((record.id, f"the id occurs twice (here with image {', '.join(record.images)})"))
        else:
            placed[record.id] = replace(record, images=tuple(path_of[name] for name in record.images))
    return list(placed.values()), image_root, bad


def read_rows(path: Path, needed: Sequence[str], *, delimiter: str = ",") -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and {column in lower case: cell as it is} of each row, streamed.

    Raises UserError naming file and line for a missing file, missing columns (`needed`, in lower case), a row that is
    cut short or too long, and text that is not UTF-8.
    """
    number = 0
    limit = csv.field_size_limit(MAX_CELL)
    try:
        size = path.stat().st_size
        with path.open("rb") as raw, Bar(f"reading {path.name} (MB)", size >> 20, hidden=size >> 20 < SHORT) as bar:
            reader = csv.reader(io.TextIOWrapper(raw, encoding="utf-8-sig", newline=""), delimiter=delimiter)
            header = [name.strip().lower() for name in next(reader, [])]
            if missing := [name for name in needed if name not in header]:
                fix = f"it has {', '.join(header)[:300] or 'no header'}; get the file as published"
                raise UserError(f"{path} line 1: unknown schema, no column {', '.join(missing)} ({fix})")
            for cells in reader:
                number = reader.line_num
                bar.show(raw.tell() >> 20)
                if not cells:
                    continue
                if len(cells) != len(header):
                    fault = f"{len(cells)} columns instead of {len(header)}"
                    raise UserError(
                        f"{path} line {number}: {fault}; the file is cut short or damaged, download it again"
                    )
                yield number, dict(zip(header, cells, strict=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the root, or download it") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} after line {number}: {error}; the file is damaged, download it again") from error
    finally:
        csv.field_size_limit(limit)


def read_objects(path: Path, needed: Sequence[str]) -> list[tuple[str, Any]]:
    """(Place, object) of each entry of a json list, or of each line of a jsonl file.

    Raises UserError naming file and line for what cannot be read, and where no entry has the keys `needed`.
    """
    fix = "it is cut short or damaged, download it again"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8 ({error}): check the root, or download it") from error
    objects: list[tuple[str, Any]] = []
    if path.suffix == ".json":
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON ({error}): {fix}") from error
        if not isinstance(whole, list):
            raise UserError(f"{path}: unknown schema, not a list of entries; get the file as published")
        objects = [(f"{path.name} entry {number}", entry) for number, entry in enumerate(whole)]
    else:
        for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 in a text
            try:
                objects += [(f"{path.name} line {number}", json.loads(line))] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not JSON ({error}): {fix}") from error
    if not any(isinstance(data, dict) and all(key in data for key in needed) for _, data in objects):
        found = f"the first is {str(objects[0][1])[:200]!r}" if objects else "it is empty"
        raise UserError(
            f"{path}: unknown schema, no entry has {', '.join(needed)} ({found}); get the file as published"
        )
    return objects


def lettered(texts: Sequence[str | None]) -> tuple[dict[str, str], list[int]]:
    """Options from A over the texts that are there, and the position in `texts` of each.

    A gap moves later options up  # ours: scorers count letters from A without one
    """
    kept = [position for position, text in enumerate(texts) if text is not None and text.strip()]
    return {ascii_uppercase[n]: str(texts[position]) for n, position in enumerate(kept)}, kept


def leaves_root(name: str) -> bool:
    """Whether a relative POSIX path would be outside the folder that it is relative to, or is no usable path."""
    path = PurePosixPath(name)
    too_long = len(name) > 1024 or any(len(part.encode(errors="replace")) > 255 for part in path.parts)
    return path.is_absolute() or ".." in path.parts or "\0" in name or not path.name or too_long


def _fault(entry: zipfile.ZipInfo, name: str, target: str) -> str | None:
    if leaves_root(name) or leaves_root(target):
        return "leaves the folder it is extracted to"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a symbolic link"
    if entry.flag_bits & 1:
        return "is encrypted"
    if entry.file_size > MAX_ENTRY:
        return f"has {entry.file_size} bytes, above the limit of {MAX_ENTRY}"
    if entry.file_size > RATIO_FROM and entry.file_size > MAX_RATIO * entry.compress_size:
        return f"grows more than {MAX_RATIO} times, as a decompression bomb does"
    return None


def _is_there(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _check_disk(out: Path, needed: int) -> None:
    folder = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{out} needs {needed / 1e9:.1f} GB for images, {free / 1e9:.1f} GB are free: make room")
