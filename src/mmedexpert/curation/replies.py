"""Asking an engine several times about each record, some hundred records at a time, and keeping what it replied.

Two files, so that a killed run asks nothing twice and ends with the same bytes: one with a line a record, in their
order, `{"id", "asked", "replies": [{"kind", "text", "finish_reason", "right"}, ...]}`; beside it, while a batch is at
work, its replies as they come, in any order. Another model or another way of sampling needs another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Engine
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.scoring import robust
from mmedexpert.scoring.text import tokens

BATCH = 256  # ours: records asked about together
REFUSED_FIRST = 200  # ours, as in evaluation: so many refusals without one answer are not the questions' fault
REFUSED = "refused"  # a reply's finish_reason
NO_REPLY = "no reply"  # ours: of a question that the engine passed over
UNJUDGED = "no answer to it can be judged"  # a reason: the gold answer is none of the options, or neither yes nor no
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One ask of a `kind`, and the record as it is asked (its options in that order), by which the reply is judged."""

    kind: str
    record: Record
    ask: Ask

    @property
    def key(self) -> str:
        """16 hex digits of what is asked; the place of the images is no part of it."""
        told = [self.record.id, self.ask.text, self.record.images if self.ask.images else [], self.ask.sample]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def unjudged(record: Record) -> str:
    """Why no answer to the record can be judged, or nothing."""
    if record.asked_as == "open":
        return "" if tokens(record.answer, record.language) else "its gold answer has no word"
    if record.asked_as == "choice" and record.answer not in (record.options or {}):
        return f"its gold answer {record.answer!r} is none of its options"
    try:
        robust.judge(record, "")
    except ValueError as error:
        return str(error)
    return ""


def is_right(record: Record, response: str) -> bool:
    """The verdict of protocol robust; an open answer's by its exact match alone, without the slow text metrics."""
    if record.asked_as != "open":
        return robust.judge(record, response).correct
    read = robust.read_text(response, record.language)
    return read is not None and tokens(read, record.language) == tokens(record.answer, record.language)


def passed(row: Row, kind: str) -> int:
    """How many replies to a record's questions of a kind are right."""
    return sum(reply["right"] for reply in row["replies"] if reply["kind"] == kind)


def refusals(row: Row) -> list[str]:
    """Why questions about a record were refused, or had no reply: a reason each."""
    return [reply["refused"] for reply in row["replies"] if "refused" in reply]


def asked(
    records: Iterable[Record],
    questions_of: Callable[[Record], Sequence[Question]],
    engine: Engine,
    path: Path,
    *,
    batch: int = BATCH,
) -> Iterator[tuple[Record, Row]]:
    """Each record with its row of `path`: what is there is read, what is not is asked, judged and written.

    A refused question is neither right nor asked again. Raises UserError where everything is refused, where `path`
    holds replies to other questions, or is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(f"{path.stem}.asking.jsonl")
    kept, given = _kept(path), iter(records)
    answered, refused = False, 0
    while group := list(islice(given, batch)):
        rows: list[Row] = []
        todo: list[list[Question]] = []
        for record in group:
            questions = list(questions_of(record))
            row = None if todo else next(kept, None)  # what is missing is missing at the end
            if row is None:
                todo.append(questions)
            elif row["asked"] != _digest(questions):
                fix = "delete the file, and they are asked"
                raise UserError(f"{path} holds replies to other questions than those about {record.id}: {fix}")
            else:
                rows.append(row)
        if todo:
            new = _ask(engine, todo, working)
            asks = group[len(rows) :]
            rows += [_row(record, questions, new) for record, questions in zip(asks, todo, strict=True)]
        told = [reason for row in rows for reason in refusals(row)]
        answered = answered or len(told) < sum(len(row["replies"]) for row in rows)
        refused += len(told)
        if not answered and refused >= REFUSED_FIRST:
            fix = "look at the settings of the model or its server"
            raise UserError(f"all of the first {refused} questions were refused (first: {told[0]}): {fix}")
        if todo:
            with path.open("ab") as file:
                file.write(b"".join(_line(row) for row in rows[len(rows) - len(todo) :]))
                file.flush()
                os.fsync(file.fileno())
        yield from zip(group, rows, strict=True)
    working.unlink(missing_ok=True)


def rows_of(path: Path) -> Iterator[Row]:
    """The rows of a file that `asked` wrote, one at a time: replies to 100,000 records are some gigabytes."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                row["id"], row["asked"], row["replies"]
            except (ValueError, TypeError, KeyError) as error:
                fix = "delete the file, and all is asked again"
                raise UserError(f"{path} line {number} is damaged: {fix}") from error
            yield row


def _kept(path: Path) -> Iterator[Row]:
    """The rows of a file, without a last line that a kill cut off."""
    path.touch()
    with path.open("rb") as file:
        whole = sum(len(line) for line in file if line.endswith(b"\n"))
    os.truncate(path, whole)
    return rows_of(path)


def _ask(engine: Engine, todo: Sequence[Sequence[Question]], working: Path) -> dict[str, Row]:
    """The replies to all questions by their keys; those in `working` are not asked again, refused ones are."""
    replies = {row["key"]: row for row in read_lines(working, ("key", "text", "finish_reason"))}
    wanted = {question.key: question.ask for questions in todo for question in questions}
    replies = {key: row for key, row in replies.items() if key in wanted}
    write_atomic(working, b"".join(map(_line, replies.values())))
    keys = [key for key in wanted if key not in replies]
    with working.open("ab") as file:
        for place, reply in engine([wanted[key] for key in keys]):
            key = keys[place]
            replies[key] = {"key": key, "text": reply.text, "finish_reason": reply.finish_reason}
            if reply.finish_reason == REFUSED:
                replies[key][REFUSED] = reply.refused
                continue
            file.write(_line(replies[key]))
            file.flush()
    return replies


def _row(record: Record, questions: Sequence[Question], replies: dict[str, Row]) -> Row:
    silent = {"text": "", "finish_reason": NO_REPLY, REFUSED: NO_REPLY}
    found = []
    for question in questions:
        reply = {"kind": question.kind, **replies.get(question.key, silent)}
        reply.pop("key", None)
        reply["right"] = is_right(question.record, reply["text"])
        found.append(reply)
    return {"id": record.id, "asked": _digest(questions), "replies": found}


def _digest(questions: Sequence[Question]) -> str:
    return hashlib.sha256("".join(question.key for question in questions).encode()).hexdigest()[:16]


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
