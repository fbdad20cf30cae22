"""JSON objects that a model is asked for, and those in what it says: bare, in a code fence or between words."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

MAX_REPLY = 40_000  # ours: characters of a reply that are read, its end
MOST_OBJECTS = (
    200  # ours: beginnings of objects, the last ones, that are tried in a reply; each may cost its whole length
)
_OBJECT = re.compile(r"\{(?=\s*[\"}])")


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects that stand in a text, one after the other; one in which a key stands twice is none."""
    decoder, end = json.JSONDecoder(object_pairs_hook=unique_keys, strict=False), 0
    for start in deque(_OBJECT.finditer(text), MOST_OBJECTS):
        if start.start() < end:
            continue  # part of the one before
        try:
            value, end = decoder.raw_decode(text, start.start())
        except (ValueError, RecursionError):
            continue
        yield value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For a decoder's `object_pairs_hook`: ValueError for an object in which a key stands twice."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def visible(text: str) -> str:
    """What stands outside of any thought, at the end."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def whole(properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object of these properties, all required, and no others."""
    return {
        "type": "object", "properties": dict(properties), "required": list(properties), "additionalProperties": False,
    }  # fmt: skip


def reply_format(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """A reply that is such an object, as OpenAI's `response_format`."""
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": whole(properties)}}
