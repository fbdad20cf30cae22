"""Step 1, ingest: the records of several sources under ids of their own, their images stored once under their content.

A picture's file is named by its bytes, so that no path tells a label; pictures are decoded and hashed once, here.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmedexpert.curation.steps import Verdict
from mmedexpert.data.record import TEXT, Record
from mmedexpert.data.validation import Bad, not_text
from mmedexpert.errors import UserError
from mmedexpert.runtime.fingerprints import folder_digest
from mmedexpert.runtime.orphans import follow
from mmedexpert.runtime.progress import SHORT, Bar
from mmedexpert.sources.pictures import MAX_SIDE, Stored, store_picture
from mmedexpert.sources.unpack import leaves_root

UNREADABLE = "source record cannot be read"
BROKEN_IMAGE = "image cannot be read"
TWICE = "id occurs twice in its source"

MAX_PIXELS = 40_000_000  # ours: above a mammogram (5,928 x 4,728), below slides: a tile or a region of these is wanted
BATCH = 256  # records  # ours: few enough to wait for, many enough that workers seldom do
TOGETHER = 4  # images a worker gets at once  # ours

# ours: licences under which a copy may be passed on, changed and sold; that of whoever made the images may differ
FREE = re.compile(
    r"(cc0|cc zero|public domain|cc by( sa)?|mit|apache|odbl|odc by|pddl|bsd)"
    r"( \d+| license| licence| international| unported| universal| igo| clause)*"
)

Load = Callable[[Path, Path], tuple[list[Record], Path, Bad]]
MapImages = Callable[[Callable[[Path], Any], Iterable[Path]], Iterable[Any]]


@dataclass(frozen=True)
class Source:
    """A data set: its id, its reader with all settings (`load(root, out_dir)`) and folder.

    `license` and `redistribute` replace what the records and `may_redistribute` say; `revision` is a commit of the hub,
    empty: the folder's digest.
    """

    name: str
    load: Load
    root: Path
    license: str = ""
    redistribute: bool | None = None
    revision: str = ""


def ingest(
    sources: Sequence[Source],
    out_dir: Path,
    image_dir: Path,
    *,
    processes: int = 1,
    max_side: int = MAX_SIDE,
    max_pixels: int = MAX_PIXELS,
    changed: Counter[str] | None = None,
) -> Iterator[Verdict]:
    """The records of all sources in order, ids as `<source>/<id>`, `images` below `image_dir`, provenance filled.

    Readers unpack to `out_dir/<source>`. What a reader found bad is a verdict, too, so that counts add up. Images are
    opened once by `processes` workers, made smaller where a side is above `max_side` (0: never), refused above
    `max_pixels`; what that changes is counted in `changed`. Splits are left as the reader has them.
    Raises UserError for a source's name that is no file name or not its own, and for what a reader cannot read at all.
    """
    names = [source.name for source in sources]
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or names.count(name) > 1:
            raise UserError(f"source {name!r} needs a name of letters, digits, - and _ that no other source has")
    store = partial(store_picture, image_dir=image_dir, max_side=max_side, max_pixels=max_pixels)
    with _workers(processes) as map_images:
        for source in sources:
            records, image_root, bad = source.load(source.root, out_dir / source.name)
            revision = source.revision or f"sha256:{folder_digest(source.root, leave_out=out_dir)}"
            counts = Counter[str]() if changed is None else changed
            counts.update(getattr(bad, "changed", {}))
            for record_id, why in bad:
                yield _unreadable(source, revision, record_id, why)
            with Bar(f"images of {source.name}", len(records), hidden=len(records) <= SHORT) as bar:
                yield from _stored(source, revision, records, image_root, partial(map_images, store), counts, bar)


def may_redistribute(license: str) -> bool:
    """Whether a licence lets a record be released; no for NC, ND, research only, unknown and unstated ones. # ours"""
    license = unicodedata.normalize("NFKC", license).casefold()
    if any(char.isalpha() and not char.isascii() for char in license):  # what another language adds is not read here
        return False
    words = " ".join(re.findall(r"[a-z]+\d*|\d+", license))
    return FREE.fullmatch(re.sub(r"^creative commons attribution( share ?alike)?", _short, words)) is not None


def _stored(
    source: Source, revision: str, records: list[Record], image_root: Path,
    store: Callable[[Iterable[Path]], Iterable[Stored | str]], counts: Counter[str], bar: Bar,
) -> Iterator[Verdict]:  # fmt: skip
    """A verdict for each record, its images stored a batch at a time."""
    stored: dict[str, Stored | str] = {}
    ids: set[str] = set()
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        named = dict.fromkeys(name for record in batch for name in record.images)
        new = [name for name in named if name not in stored]
        inside = [name for name in new if not leaves_root(name)]
        stored |= dict.fromkeys(new, "its path is absolute or leaves the image root")
        stored |= zip(inside, store(image_root / name for name in inside), strict=True)
        for name in new:
            if isinstance(found := stored[name], Stored):
                counts.update(f"images: {one}" for one in found.about.get("changes", ()))
        for number, record in enumerate(batch, start):
            bar.show(number)
            yield _verdict(source, revision, record, [stored[name] for name in record.images], ids)


def _verdict(source: Source, revision: str, record: Record, images: Sequence[Stored | str], ids: set[str]) -> Verdict:
    if fault := not_text(record):
        return _unreadable(source, revision, record.id, fault)
    license = source.license or record.license
    free = may_redistribute(license) if source.redistribute is None else source.redistribute
    about = {"source": source.name, "revision": revision, "redistribute": free}
    good = [image for image in images if isinstance(image, Stored)]
    made = replace(
        record,
        id=f"{source.name}/{record.id}",
        images=tuple(image.name for image in good),
        license=license,
        provenance={**record.provenance, **about, "images": [image.about for image in good]},
    )
    if record.id in ids:
        return Verdict(made, TWICE)
    ids.add(record.id)
    if not images and record.modality != TEXT:
        return Verdict(made, UNREADABLE, f"it names no image, and its modality is not {TEXT!r}")
    fault = next((f"{name}: {image}" for name, image in zip(record.images, images, strict=True)
                  if isinstance(image, str)), "")  # fmt: skip
    return Verdict(made, BROKEN_IMAGE if fault else "", fault)


def _unreadable(source: Source, revision: str, record_id: str, why: str) -> Verdict:
    """Of a record that could not be made there is but its id and the reason."""
    record_id, why = (text.encode(errors="replace").decode() for text in (record_id, why))
    record = Record(
        id=f"{source.name}/{record_id}", images=(), question="", options=None, answer="", specialties=(),
        source=source.name, license=source.license, split="", image_group="",
        provenance={"source": source.name, "revision": revision},
    )  # fmt: skip
    if source.root.is_absolute():  # where a folder lies is nobody's business
        why = why.replace(f"{source.root}/", "").replace(str(source.root), "its folder")
    return Verdict(record, UNREADABLE, why)


def _short(match: re.Match[str]) -> str:
    return "cc by sa" if match[1] else "cc by"


@contextmanager
def _workers(processes: int) -> Iterator[MapImages]:
    """A map over images, in order: here, or by so many processes."""
    if processes <= 1:
        yield map
        return
    context = get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(processes, mp_context=context, initializer=follow, initargs=(os.getpid(),)) as pool:
        try:
            yield partial(pool.map, chunksize=TOGETHER)
        except BrokenProcessPool as error:
            fix = "take fewer processes"
            raise UserError(f"a worker ended without a word, most often for want of memory: {fix}") from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
