"""Pictures of any source stored under their content, so that no path tells a label, with their fingerprints.

Imports little: each worker process does it anew.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmedexpert.data.images import changes, is_plain
from mmedexpert.data.pictures import picture_of
from mmedexpert.errors import UserError
from mmedexpert.sources.dicom import is_dicom, open_picture
from mmedexpert.sources.unpack import write_image

MAX_SIDE = 1024  # peers: MedVLThinker's longest side
SMALLER = "made smaller: longest side {}"
JPEG = b"\xff\xd8\xff"


@dataclass(frozen=True)
class Stored:
    """A picture's file below the image folder, and what `Record.provenance` says of it (curation/steps.py)."""

    name: str
    about: dict[str, Any]


def store_picture(path: Path, *, image_dir: Path, max_side: int, max_pixels: int) -> Stored | str:
    """Write a picture to `image_dir/<first two of its hash>/<hash>.<png|jpg>`, or say what is wrong with it.

    The file's own bytes where every reader sees in them what is shown and nothing else, else a PNG of that.
    """
    try:
        picture = open_picture(path, max_pixels=max_pixels)
    except UserError as error:
        return str(error).replace(f"{path} ", "", 1)
    told = changes(picture)
    own = not is_dicom(path) and is_plain(path)
    if max_side and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side))
        told, own = (*told, SMALLER.format(max_side)), False
    if own:
        data = path.read_bytes()
    else:
        picture.info.clear()
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)  # a third of the time of the default, a tenth larger
        data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    name = f"{digest[:2]}/{digest[:32]}{'.jpg' if data.startswith(JPEG) else '.png'}"
    write_image(image_dir / name, data)
    about = {"sha256": digest, **asdict(picture_of(picture))}
    return Stored(name, about | ({"changes": list(told)} if told else {}))
