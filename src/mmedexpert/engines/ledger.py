"""What servers were asked and replied, in one SQLite file: nothing is paid twice, and a failure is on record, too."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from mmedexpert.errors import UserError

LEDGER = "ledger.sqlite"  # its name in an outputs folder
FORMAT = 1  # of the table, in the file's user_version
WAIT_SECONDS = 60.0  # ours: for another process that is writing
REPLIED, REFUSED, FAILED, FORGOTTEN = "replied", "refused", "failed", "forgotten"


@dataclass(frozen=True)
class Row:
    """One request and what became of it; the columns of the table `replies`.

    `key` is the SHA-256 of `request`: canonical JSON of model, revision, messages (each image as the hash of its
    file), sampling, response format and sample; never an address or an API key. `response` is the server's JSON with
    its reasoning, without log-probabilities, whose mean is `mean_logp`. `cost` is in USD by the price list `prices`;
    it and `attempts` (tries, with those after 429 or 5xx) are of all times that the request was sent. `latency` is
    that of the last try in seconds, `error` the class of a failure.

    `outcome`: `replied`, the reply holds for ever; `refused` for good by the server (HTTP 400, 413, 415, 422), asked
    again only on demand (`retry_refused`); `failed` otherwise (server gone, 429 after all tries, 5xx, time-out, no
    chat completion, a wrong key), asked again by the next run, and refused when the same question has brought a server
    that is there to HTTP 500 or no chat completion in three runs; `forgotten`, by a caller who cannot read it: asked
    again.
    """

    key: str
    outcome: str
    model: str
    request: str
    response: str | None = None
    finish_reason: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    mean_logp: float | None = None
    cost: float | None = None
    prices: str | None = None
    attempts: int = 1
    latency: float | None = None
    error: str | None = None
    error_text: str | None = None
    created: str = ""


COLUMNS = [field.name for field in fields(Row)]
_SUMS = {
    "attempts": "replies.attempts + excluded.attempts",
    "cost": "coalesce(replies.cost + excluded.cost, excluded.cost, replies.cost)",
}
_ADD = (
    f"INSERT INTO replies VALUES ({', '.join('?' for _ in COLUMNS)}) ON CONFLICT (key) DO UPDATE SET "
    + ", ".join(f"{name} = {_SUMS.get(name, f'excluded.{name}')}" for name in COLUMNS[1:])
    + f" WHERE replies.outcome != '{REPLIED}'"  # of two that ask at once, the first is kept
)


class Ledger:
    """The rows of `path`, a plain SQLite file that threads and processes of one machine share.

    In WAL mode (https://www.sqlite.org/wal.html), every commit synced: what `add` has returned from, a kill or a loss
    of power does not undo. The file is made when first needed. To read it: `export`, or

        sqlite3 outputs/ledger.sqlite "SELECT outcome, error, count(*), sum(cost) FROM replies GROUP BY 1, 2"

    Raises UserError for a damaged file, or one that is no ledger, which is not written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, ...] = ()

    def get(self, key: str) -> Row | None:
        """The row of a key, whatever its outcome."""
        with self._transaction() as database:
            row = database.execute("SELECT * FROM replies WHERE key = ?", (key,)).fetchone()
        return Row(*row) if row else None

    def add(self, rows: Sequence[Row]) -> None:
        """Keep rows in one commit; on the disk when this returns. A row that has replied already stays as it is."""
        with self._transaction() as database:
            database.executemany(_ADD, [astuple(row) for row in rows])

    def forget(self, keys: Iterable[str]) -> None:
        """Have requests asked again the next time; their rows stay to be read until then."""
        with self._transaction() as database:
            database.executemany("UPDATE replies SET outcome = ? WHERE key = ?", [(FORGOTTEN, key) for key in keys])

    def totals(self) -> dict[str, float]:
        """Over all rows: `requests`, how many of each outcome, tokens read and written, and `cost` in USD."""
        told = ", ".join(f"count(CASE WHEN outcome = '{one}' THEN 1 END)" for one in (REPLIED, REFUSED, FAILED))
        names = ("requests", REPLIED, REFUSED, FAILED, "prompt_tokens", "completion_tokens", "cost")
        sums = "total(prompt_tokens), total(completion_tokens), total(cost)"
        with self._transaction() as database:
            row = database.execute(f"SELECT count(*), {told}, {sums} FROM replies").fetchone()
        return dict(zip(names, map(float, row), strict=True))

    def export(self, path: Path) -> int:
        """Write all rows as JSON lines, by key; their number."""
        count, part = 0, path.with_name(f".{path.name}.part")
        with self._transaction() as database, part.open("w", encoding="utf-8") as file:
            for values in database.execute("SELECT * FROM replies ORDER BY key"):
                count += 1
                row = asdict(Row(*values))
                row |= {name: json.loads(row[name]) for name in ("request", "response") if row[name]}
                file.write(json.dumps(row) + "\n")
        part.replace(path)
        return count

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The open file, for one commit."""
        with self._lock:
            try:
                with self._database() as database:
                    yield database
            except sqlite3.DatabaseError as error:
                self.close()
                raise UserError(f"{self.path}: {_told(error)}") from error

    def _database(self) -> sqlite3.Connection:
        """The open file; opened anew in a forked process, or where somebody has moved or deleted it."""
        if self._connection is None or self._opened != self._place():
            self.close()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a change to WAL does not wait for others by itself
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                self._connection = _connected(self.path)
            self._opened = self._place()
        return self._connection

    def _place(self) -> tuple[int, ...]:
        try:
            found = self.path.stat()
        except OSError:
            return ()
        return os.getpid(), found.st_dev, found.st_ino

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None


def _connected(path: Path) -> sqlite3.Connection:
    """The open ledger; UserError for another program's file."""
    connection = sqlite3.connect(path, timeout=WAIT_SECONDS, check_same_thread=False)
    try:
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if found != FORMAT and (found or tables):
            raise UserError(f"{path} is no ledger of this version: move it away, or give another outputs folder")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        if not tables:
            with connection:
                connection.execute(f"CREATE TABLE replies ({', '.join(_COLUMN_TYPES)}) WITHOUT ROWID")
                connection.execute(f"PRAGMA user_version = {FORMAT}")
    except BaseException:
        connection.close()
        raise
    return connection


_COLUMN_TYPES = [
    f"{field.name} {'INTEGER' if 'int' in str(field.type) else 'REAL' if 'float' in str(field.type) else 'TEXT'}"
    f"{' PRIMARY KEY' if field.name == 'key' else ''}"
    for field in fields(Row)
]


def _told(error: sqlite3.DatabaseError) -> str:
    if isinstance(error, sqlite3.OperationalError):  # a full disk, no permission, a lock that nobody gives back
        return f"the ledger cannot be read or written ({error}): mend this, the same command goes on"
    return (
        f"the ledger is damaged ({error}): save what can be read with `sqlite3 <file> .recover | sqlite3 <new file>`, "
        "or move it away to ask everything again"
    )


def canonical(request: Any) -> str:
    """JSON of which there is one spelling."""
    return json.dumps(request, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_of(request: str) -> str:
    """The key of a request in canonical JSON."""
    return hashlib.sha256(request.encode()).hexdigest()


def now() -> str:
    """This moment, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
