"""The baseline that is shown another question's image: what the text and a kind of image give away."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from mmedexpert.data.record import Record


def swapped(records: Sequence[Record]) -> dict[str, tuple[str, ...]]:
    """Question to the images of another question: the next one, by id, on another image, of the same number of images
    and modality, else of the same number; its own where there is none.  # ours

    The same modality, so that the kind of image still tells what it told.
    """
    alike, numbered = defaultdict(list), defaultdict(list)
    for record in sorted(records, key=lambda one: one.id):
        alike[len(record.images), record.modality].append(record)
        numbered[len(record.images)].append(record)
    return {
        record.id: _next(record, alike[len(record.images), record.modality])
        or _next(record, numbered[len(record.images)])
        or record.images
        for record in records
    }


def _next(record: Record, others: Sequence[Record]) -> tuple[str, ...] | None:
    place = others.index(record)
    rest = [*others[place + 1 :], *others[:place]]
    return next((one.images for one in rest if one.image_group != record.image_group), None)
