"""Tables that people typed: rows of a labels.csv, and what its cells say."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmedexpert.errors import UserError

# ours: cells that say that nothing is known; "none" and zeros may be a label or a number, so they are told apart
UNKNOWN = frozenset(
    "unknown|unk|nan|na|n/a|n.a.|null|nil|-|--|?|??|.|not available|not known|not stated|missing|undefined".split("|")
)
NOBODY = UNKNOWN | frozenset("none|anonymous|anonymized|anonymised|anon|anonym|no id|noid|x|xx|xxx".split("|"))
DELIMITERS = ",;\t"
PATIENT_COLUMNS = ("patient", "patientid", "subject", "subjectid")  # compared without blanks, dashes, underscores
LESION_COLUMNS = ("lesion", "lesionid")
ZEROS = 3  # ours: zeros are nobody's id where they stand on more than so many times the rows of any other id
MOST = 1 / 2  # ours: an id on more of the rows is told
JOINER = re.compile(r"(?<=\w)[-_](?=\w)|_")


def fold(text: str) -> str:
    """A text without what tells no two labels apart: case, underscores and dashes between words, blanks. # ours"""
    return " ".join(JOINER.sub(" ", unicodedata.normalize("NFKC", text).casefold()).split())


def alike(one: str, other: str) -> bool:
    """Whether two options say the same: equal but for blanks and, unless a letter's case is its meaning, case. # ours

    It is in symbols: "Aa" and "AA", "rS" and "RS", "mV" and "MV".
    """
    one, other = (" ".join(unicodedata.normalize("NFKC", text).split()) for text in (one, other))
    symbol = any(re.search(r"[a-z][A-Z]", text) or not re.search(r"[^\W\d_]{3}", text) for text in (one, other))
    return one == other or (not symbol and one.casefold() == other.casefold())


def is_unknown(cell: str) -> bool:
    """Whether a cell is empty or says that nothing is known."""
    return not fold(cell) or cell.strip().casefold() in UNKNOWN


def read_table(path: Path, needed: Sequence[str]) -> tuple[list[dict[str, str]], list[tuple[int, str]]]:
    """Rows {column in lower case: cell without outer blanks}, and (line, reason) of rows that cannot be told apart.

    Columns are parted by comma, semicolon or tab, whichever the header has most of. Raises UserError for a file that
    is no such table, lacks a column of `needed` (in lower case), names one twice, or has no rows.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", b"\0", 0, 1, "a zero byte")
        header_line = text.lstrip("\r\n").split("\n", 1)[0]
        delimiter = max(DELIMITERS, key=header_line.count)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        table = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error}): save it anew") from error
    header = [name.strip().lower() for name in (table[0][1] if table else [])]
    if missing := sorted(set(needed) - set(header)):
        if len(table) < 2:
            raise UserError(f"{path} has no rows: list the images with columns {','.join(needed)}")
        raise UserError(f"{path} lacks the column {', '.join(missing)}: it has {', '.join(header)}")
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise UserError(f"{path} names the column {', '.join(twice)} twice: rename one of them")
    rows, bad = [], []
    for line, cells in table[1:]:
        if any(cell.strip() for cell in cells[len(header) :]):
            bad.append(
                (line, f"it has {len(cells)} cells and the header {len(header)}: quote a text that holds a comma")
            )
        else:
            cells += [""] * (len(header) - len(cells))
            rows.append({name: cell.strip() for name, cell in zip(header, cells, strict=False) if name})
    if not rows and not bad:
        raise UserError(f"{path} has no rows: list the images with columns {','.join(needed)}")
    return rows, bad


def patients(rows: Sequence[dict[str, str]], found: Sequence[str], changed: Counter[str]) -> list[set[str]]:
    """Keys of each row that a patient's (or lesion's) other rows share; none for a cell that names nobody.

    `found` [rows] are patients known otherwise ("" where not), which go before the columns. `changed` counts the cells
    that name nobody, and the rows of an id that has more than half of them; it never holds an id.
    """
    plain = {column: re.sub(r"[\W_]", "", column) for column in (rows[0] if rows else {})}
    columns = {
        kind: next((column for name in names for column in plain if plain[column] == name), "")
        for kind, names in (("", PATIENT_COLUMNS), ("lesion ", LESION_COLUMNS))
    }
    keys: list[set[str]] = [set() for _ in rows]
    for kind, column in columns.items():
        cells = [("" if kind else found[number]) or row.get(column, "") for number, row in enumerate(rows)]
        prefix = kind if columns[""] or any(found) else ""  # both kinds: number 5 of one is not that of the other
        counts = Counter(cell.casefold() for cell in cells if cell and cell.casefold() not in NOBODY)
        zeros = [name for name in counts if re.fullmatch(r"[-+]?0+(\.0*)?|-1|9{3,}", name)]
        others = max((count for name, count in counts.items() if name not in zeros), default=0)
        nobody = NOBODY | {name for name in zeros if counts[name] > ZEROS * others}
        spelling: dict[str, str] = {}
        for key, cell in zip(keys, cells, strict=True):
            if cell.casefold() in nobody:
                changed["rows whose patient or lesion is unknown: grouped by image alone"] += 1
            elif cell:
                key.add(prefix + spelling.setdefault(cell.casefold(), cell))
        for name, count in counts.items():
            if name not in nobody and count > MOST * len(rows) and len(rows) > 1:
                changed["rows of one patient or lesion, more than half of a set: all in one split"] += count
    return keys
