"""Ask an engine what a file of rows lacks, and keep each reply as it comes: a killed run asks nothing twice."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.progress import Bar

REFUSED_FIRST = 200  # ours: so many refusals without one answer are not the questions' fault
REFUSED_SHARE = 0.5  # ours: nor are more than this share of all questions
REFUSED = "refused"  # a reply's finish_reason
Row = dict[str, Any]  # of a reply; with its finish_reason, and where that is refused the reason in `refused`
Key = TypeVar("Key", bound=Hashable)


def ask_missing(
    engine: Engine,
    asks: Mapping[Key, Ask],
    kept: Iterable[Row],
    path: Path,
    *,
    key_of: Callable[[Row], Key],
    row_of: Callable[[Key, Reply], Row],
    doing: str,
    title: str,
    right: Callable[[Row], bool] | None = None,
) -> list[Row]:
    """A row for each ask, in their order; one JSON line each in `path`, on the disk as soon as it is there.

    `kept` are the rows that `path` holds, which is written anew with them (without a line that a kill cut off): only
    what is refused or missing there is asked. With `right` the progress bar tells the share of right answers.

    UserError where most are refused, which is a setting's fault.
    """
    rows = {key_of(row): row for row in kept if row.get("finish_reason") != REFUSED}
    write_atomic(path, lines(rows.values()))
    todo = [key for key in asks if key not in rows]
    done = correct = refused = 0
    replies = engine([asks[key] for key in todo])
    with Bar(f"{doing} {title}", len(todo)) as bar, path.open("ab") as file, closed(replies):
        for place, reply in replies:
            rows[todo[place]] = row = row_of(todo[place], reply)
            file.write(lines([row]))
            file.flush()
            os.fsync(file.fileno())
            done, refused = done + 1, refused + (row["finish_reason"] == REFUSED)
            correct += right is not None and right(row)
            bar.show(done, {"refused": refused} if right is None else {"accuracy": correct / done})
            if refused == len(rows) == REFUSED_FIRST:
                break
    if refused and (refused == len(rows) == REFUSED_FIRST or refused > REFUSED_SHARE * len(asks)):
        first = next(row for row in rows.values() if row["finish_reason"] == REFUSED)
        raise UserError(
            f"{title}: {refused} of {len(rows)} questions were refused (first: {first['id']}: {first[REFUSED]}): look"
            " at the settings of the server or the data; the same command asks only these again"
        )
    return [rows[key] for key in asks]


@contextmanager
def closed(replies: Iterator[Any]) -> Iterator[None]:
    """What answers gives back what it has taken, also where the caller stops or fails."""
    try:
        yield
    finally:
        if isinstance(replies, Generator):
            replies.close()


def lines(rows: Iterable[Row]) -> bytes:
    """Rows as the lines of a file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
