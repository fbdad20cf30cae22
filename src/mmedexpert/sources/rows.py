"""Rows of tables that nobody checked: a broken line is left out and told; options and answers however they are written.

The readers of benchmarks refuse a damaged file as a whole (`unpack.py`, `parquet.py`): there every question counts.
"""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmedexpert.data.table import alike
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.medr1 import parse_problem
from mmedexpert.sources.parquet import read_parquet, text_of
from mmedexpert.sources.unpack import MAX_CELL

Choices = list[tuple[str, str]]  # an option's key in its source, and its text
KEYS, TEXTS = ("letter", "key", "label", "id", "index"), ("content", "text", "value", "option")
MARKED = re.compile(r"\s*\(?([A-Z])\s*[).:]\s*(.*\S)\s*", re.DOTALL)
BARE = re.compile(r"\s*\(?([A-Za-z])\s*[).:]?\s*")


def rows_of(path: Path, bad: Bad) -> Iterator[tuple[str, dict[str, Any]]]:
    """(Place, row) of each row of a json, jsonl, csv, tsv or Parquet file; what cannot be read is added to `bad`.

    Of a json file a list, or an object's one list, is read. Text is UTF-8, or UTF-16 with its mark. UserError for
    another kind of file, and one that is not there.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path} is none of {', '.join(READERS)}: convert it, or name another file")
    if not path.is_file():
        raise UserError(f"{path} is missing: check the folder and the file's name")
    try:
        for where, row in read(path, bad):
            if not isinstance(row, dict):
                bad.append((where, "it is no object"))
            elif path.suffix.lower() != ".parquet" and not _is_text(row):
                bad.append((where, "its text is neither UTF-8 nor UTF-16: save the file in UTF-8"))
            else:
                yield where, row
    except (UserError, UnicodeError, OSError) as error:  # what is left of the file is lost
        bad.append((path.name, str(error)))


def choices_of(value: Any) -> Choices:
    """Options out of a mapping, a list of texts, a list of {letter, content}, or a text that holds one of these (JSON,
    Python) or "A) ..., B) ..."; none for an empty cell. ValueError for anything else."""
    if isinstance(value, str) and value.strip():
        value = _unpacked(value)
    if value is None or value == "" or value != value:  # a missing number is not itself
        return []
    if isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
        return _choices([(_first(item, KEYS), _first(item, TEXTS)) for item in value])
    if isinstance(value, list | tuple):
        marked = [MARKED.fullmatch(text_of(item)) for item in value]
        if all(mark and mark[1] == letter for mark, letter in zip(marked, ascii_uppercase, strict=False)):
            return _choices([(mark[1], mark[2]) for mark in marked if mark])
        if len(value) > len(ascii_uppercase):
            raise ValueError(f"it has {len(value)} options, a choice needs two to {len(ascii_uppercase)}")
        return _choices(list(zip(ascii_uppercase, value, strict=False)))
    if isinstance(value, Mapping):
        return _choices(list(value.items()))
    raise ValueError(f"options {str(value)[:80]!r} are neither a mapping nor a list")


def gold_of(choices: Choices, answer: str) -> tuple[dict[str, str], str]:
    """Options lettered from A without a gap, and the letter of the answer, which may be told as key or text or both.

    ValueError where that is no option, or more than one.
    """
    if not 2 <= len(choices) <= 26:
        raise ValueError(f"it has {len(choices)} option(s), a choice needs two to 26")
    options = dict(zip(ascii_uppercase, (text for _, text in choices), strict=False))
    letter_of = {key.strip().casefold(): letter for letter, (key, _) in zip(options, choices, strict=True)}
    told = answer.strip()
    bare, marked = BARE.fullmatch(told), MARKED.fullmatch(told)
    found = {letter for letter, text in options.items() if alike(text, told)}
    key = letter_of.get(bare[1].casefold() if bare else told.casefold())
    if key:
        found.add(key)
    elif not found and marked and (letter := letter_of.get(marked[1].casefold())):
        found = {letter} & {one for one, text in options.items() if alike(text, marked[2])}
    if len(found) != 1:
        what = "several" if found else "none"
        raise ValueError(f"answer {told[:80]!r} is {what} of the options {', '.join(options.values())[:200]}")
    return options, found.pop()


def _choices(pairs: Sequence[tuple[Any, Any]]) -> Choices:
    """Options that are there: Parquet and tables give every letter, with nothing where a question has fewer."""
    found = [(text_of(key), text_of(text).strip()) for key, text in pairs]
    return [(key, text) for key, text in found if text]


def _unpacked(text: str) -> Any:
    for parse in (json.loads, ast.literal_eval, lambda inline: parse_problem(inline)[1]):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
        if isinstance(value, dict | list | tuple):
            return value
    raise ValueError(f"options {text[:80]!r} are no list, no mapping and not like A)..., B)...")


def _first(item: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((item[name] for name in names if item.get(name) is not None), "")


def _is_text(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _open(path: Path) -> Any:
    """The file as text; bytes that are none become halves of surrogate pairs, so that only their row is lost."""
    with path.open("rb") as file:
        utf_16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    return path.open(encoding="utf-16" if utf_16 else "utf-8-sig", errors="surrogateescape", newline="")


def _json(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        try:
            whole = json.load(file)
        except (ValueError, RecursionError) as error:
            bad.append((path.name, f"it is not JSON: {error}"))
            return
    lists = [value for value in whole.values() if isinstance(value, list)] if isinstance(whole, dict) else [whole]
    if len(lists) != 1 or not isinstance(lists[0], list):
        bad.append((path.name, "it is neither a list of entries nor an object with one"))
        return
    yield from ((f"{path.name} entry {number}", entry) for number, entry in enumerate(lists[0]))


def _json_lines(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path.name} line {number}"
            try:
                if line.strip():
                    yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                bad.append((where, f"it is not JSON: {error}"))


def _table(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    limit = csv.field_size_limit(MAX_CELL)
    try:
        with _open(path) as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header: list[str] = []
            while True:
                try:
                    cells = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    bad.append((f"{path.name} line {reader.line_num}", str(error)))
                    continue
                where = f"{path.name} line {reader.line_num}"
                if not header:
                    header = [name.strip() for name in cells]
                elif cells and len(cells) != len(header):
                    fault = f"{len(cells)} cells instead of {len(header)}: quote a text that holds the delimiter"
                    bad.append((where, fault))
                elif cells:
                    yield where, dict(zip(header, cells, strict=True))
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path, bad: Bad) -> Iterator[tuple[str, Any]]:
    yield from ((f"{path.name} row {number}", row) for number, row in enumerate(read_parquet(path)))


READERS: dict[str, Callable[[Path, Bad], Iterator[tuple[str, Any]]]] = {
    ".json": _json, ".jsonl": _json_lines, ".csv": _table, ".tsv": _table, ".parquet": _parquet,
}  # fmt: skip
