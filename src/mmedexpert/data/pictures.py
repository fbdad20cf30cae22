"""Pictures by their pixels and their perceptual hash, remembered in a file by the content of theirs."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, ImageStat

from mmedexpert.data.images import open_image
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic

HASH_SIDE = 16  # ours: 256 bits; with the usual 64, 72 pairs of different ECG sheets have the same hash
BITS = HASH_SIDE**2
MIN_GREY_STD = 4.0  # ours, of 0..255: the flattest of 2,378 real images has 8.4; what is flatter hashes to its noise
KIND = '{"format": "mmedexpert image fingerprints '
# raise the number when `open_image` shows other pixels: a cache of an older number is made anew
HEADER = f'{KIND}2", "hash": "imagehash.phash {BITS} bits"}}'
CACHED = re.compile(r'{"file": "\w{64}", "pixels": "\w{64}", "phash": "[0-9a-f]{64}", "grey_std": \d+\.\d+}')


@dataclass(frozen=True)
class Picture:
    """One image: sha256 of its RGB pixels, phash (64 hex digits), standard deviation of its grey values (0..255)."""

    pixels: str
    phash: str
    grey_std: float

    @property
    def comparable(self) -> bool:
        """False where it is nearly flat, or its hash not split by the median (a plain gradient): only pixels count."""
        return self.grey_std >= MIN_GREY_STD and int(self.phash, 16).bit_count() == BITS // 2


def picture_of(image: Image.Image) -> Picture:
    """The fingerprint of an image as `open_image` gives it."""
    grey = image.convert("L")
    pixels = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    phash = np.packbits(imagehash.phash(grey, HASH_SIDE).hash).tobytes().hex()
    return Picture(pixels, phash, round(ImageStat.Stat(grey).stddev[0], 3))


def picture_at(path: Path, known: dict[str, Picture], cache: Path | None) -> Picture:
    """The image's fingerprint from the cache, else made, and added to it."""
    try:
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"image {path} cannot be read ({error.strerror}): restore it, or check the root") from error
    if content not in known:
        known[content] = picture_of(open_image(path))
        if cache:
            line = json.dumps({"file": content, **asdict(known[content])})
            with cache.open("ab", buffering=0) as file:  # one write, line end first: a line cut short spoils no other
                file.write(b"\n" + line.encode())
    return known[content]


def read_cache(cache: Path) -> dict[str, Picture]:
    """File content (sha256) to fingerprint; makes the file where there is none. Damaged lines are left out."""
    try:
        if not cache.exists():
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cache, HEADER.encode())
        header, *lines = cache.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"the cache {cache} cannot be used ({error.strerror}): check path and permissions") from error
    if header != HEADER and header.startswith(KIND):
        write_atomic(cache, HEADER.encode())
        return {}
    if header != HEADER:
        raise UserError(f"{cache} is no cache of image fingerprints of this version: delete it, or name another")
    rows = [json.loads(line) for line in filter(CACHED.fullmatch, lines)]  # what is damaged is hashed anew
    return {row.pop("file"): Picture(**row) for row in rows}
