"""The data of the page's browser: questions, what each model said and got for it, and kept rollouts."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmedexpert.data.images import thumbnail
from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.evaluation.finished import EvalRun, by_benchmark
from mmedexpert.evaluation.predict import PROTOCOLS, Prediction
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.answers import QUESTIONS, Answers, Asked
from mmedexpert.reporting.lineage import Made
from mmedexpert.runtime.curve import read_curve
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.pages import data_url
from mmedexpert.runtime.privacy import without_places
from mmedexpert.runtime.progress import track

SIDE, QUALITY = 224, 60  # ours: longest side of a picture on the page, and its WebP quality: about 4 kB
LETTERS = 4_000  # ours: of a response; the rest is in predictions.jsonl
ALL_LETTERS = 40_000_000  # ours: of all responses on a page; what a browser opens in seconds
GROUPS = 400  # ours: groups of rollouts shown of a run, evenly over its steps
NOT_STATED = "not stated"
Item = dict[str, Any]


@dataclass
class Pictures:
    """Thumbnails as addresses, each content once, until `budget` bytes are spent; how many could not be shown."""

    budget: float
    urls: list[str] = field(default_factory=list)
    spent: int = 0
    full: bool = False
    left_out: int = 0
    unreadable: int = 0
    _places: dict[str, int] = field(default_factory=dict)

    def place(self, path: Path) -> int | None:
        """Where a picture stands in `urls`; None where it is not shown."""
        try:
            digest = file_digest(path)
            if digest not in self._places:
                content = b"" if self.full else thumbnail(path, SIDE, "WEBP", QUALITY)[0]
                self.full |= self.spent + len(content) > self.budget
                if self.full:
                    self.left_out += 1
                    return None
                self._places[digest] = len(self.urls)
                self.urls.append(data_url("webp", content))
                self.spent += len(content)
        except (OSError, UserError):
            self.unreadable += 1
            return None
        return self._places[digest]


def browser_data(
    runs: Sequence[EvalRun],
    answers: Mapping[Path, Answers],
    asked: Mapping[str, Asked],
    made: Sequence[Made],
    *,
    image_bytes: float,
) -> dict[str, Any]:
    """All that the browser shows: `sets`, `models`, `items`, `pictures`, `notes` on what is left out, and whether the
    page must stay `private`."""
    models = [run.label for run in runs]
    sets, items, notes = [], list[Item](), list[str]()
    wanted: list[tuple[Item, list[Path]]] = []
    licences: Counter[str] = Counter()
    private = False  # whether an image may not be redistributed
    for benchmark, members in by_benchmark(runs):
        sets.append(benchmark or "predictions")
        known = asked[benchmark]
        shown = _within(members, answers, ALL_LETTERS // len(by_benchmark(runs)))
        total = len(members[0].questions)
        if len(shown) < total:
            limits = f"at most {QUESTIONS:,} questions and {ALL_LETTERS / 1e6:g} million letters of answers"
            drawn = f"{len(shown):,} of {total:,} questions of {sets[-1]} are here, drawn by a hash of their ids"
            notes.append(f"{drawn} ({limits}).")
        if known.why:
            notes.append(f"{sets[-1]}: no question texts and images, {known.why}.")
        for identity in shown:
            record = known.records.get(identity)
            item = _item(identity, record, answers[members[0].path].shown[identity][0]) | {"set": len(sets) - 1}
            item["answers"] = [
                _answer(run, runs.index(run), answers[run.path].shown.get(identity, []), identity) for run in members
            ]
            items.append(item)
            wanted.append((item, _paths(record, known.image_root)))
            if record:
                licences[record.license or NOT_STATED] += 1
                private |= record.provenance.get("redistribute") is False
    records = {i: (record, one.image_root) for one in asked.values() for i, record in one.records.items()}
    for run in (one for one in made if one.stage == "gba"):
        groups, told = _rollouts(run)
        if groups:
            sets.append(f"rollouts of {run.name} ({run.run_id})")
            models.append(f"completions of {run.name} ({run.run_id})")
            notes += told
        for rows in groups:
            record, root = records.get(str(rows[0].get("record")), (None, None))
            item = _group(rows, record, len(models) - 1) | {"set": len(sets) - 1}
            items.append(item)
            image = Path(str(rows[0].get("image") or ""))
            wanted.append((item, [image] if image.is_file() else _paths(record, root)))
    pictures = Pictures(image_bytes)
    # in the order of a hash: a budget that does not reach for all shows some of each specialty
    for item, paths in track(sorted(wanted, key=lambda pair: _hash(pair[0]["id"])), "pictures of the report"):
        item["pictures"] = [place for place in map(pictures.place, paths) if place is not None]
        item["hidden"] = len(paths) - len(item["pictures"])
    return {
        "sets": sets, "models": models, "items": items, "pictures": pictures.urls, "protocols": PROTOCOLS,
        "notes": [*notes, *_told(pictures, licences)], "private": private and bool(pictures.urls),
    }  # fmt: skip


def _within(members: Sequence[EvalRun], answers: Mapping[Path, Answers], letters: int) -> list[str]:
    """The questions whose responses fit on the page, in the order of the file; where not all do, by a hash."""
    shown = list(answers[members[0].path].shown)
    chosen: set[str] = set()
    for identity in sorted(shown, key=_hash):
        rows = (row for run in members for row in answers[run.path].shown.get(identity, ()))
        letters -= sum(min(LETTERS, len(str(row.get("response") or ""))) for row in rows)
        if letters < 0:
            break
        chosen.add(identity)
    return [identity for identity in shown if identity in chosen]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _paths(record: Record | None, root: Path | None) -> list[Path]:
    return [root / name for name in record.images] if record and root else []


def _item(identity: str, record: Record | None, row: Prediction) -> Item:
    """A question; without its record what the prediction tells of it."""
    groups = row.get("groups") or {}
    return {
        "id": without_places(identity),
        "specialties": [str(name) for name in row.get("specialties") or ()],
        "modality": str(row.get("modality") or NOT_STATED),
        "kind": str(row.get("kind") or NOT_STATED),
        "groups": [f"{name} {value}" for name, value in groups.items()],
        "question": record.question if record else "",
        "options": [[letter, text] for letter, text in (record.options or {}).items()] if record else [],
        "gold": str(row["gold"]),
    }


def _answer(run: EvalRun, model: int, rows: Sequence[Prediction], identity: str) -> Item:
    """What one model said, in the order of the perspectives; `right` is the vote's verdict under each protocol."""
    order = {name: place for place, name in enumerate(PERSPECTIVES)}
    ordered = sorted(rows, key=lambda row: order.get(str(row.get("perspective")), len(order)))
    correct = run.questions[identity].correct
    replies = [_reply(row) for row in ordered]
    return {"model": model, "right": [correct[p] for p in PROTOCOLS], "by": "by vote", "replies": replies}


def _reply(row: Prediction) -> Item:
    perspective, text = row.get("perspective"), str(row.get("response") or "")
    told = {"refused": without_places(str(row["refused"]))} if row.get("refused") else {}
    return {
        "perspective": perspective,
        "right": [bool(row[p]["correct"]) for p in PROTOCOLS],
        "picked": [None if row[p].get("picked") is None else str(row[p]["picked"]) for p in PROTOCOLS],
        "parsed": bool(row["robust"].get("parsed")),
        "text": text[:LETTERS],
        "more": max(0, len(text) - LETTERS),
        "tokens": row.get("tokens"),
        "cut": row.get("finish_reason") == "length",
        "adherence": (row.get("adherence") or {}).get(perspective),
        "criteria": [[name, value] for name, value in (row.get("criteria") or {}).items()],
        **told,
    }


def _rollouts(run: Made) -> tuple[list[list[Item]], list[str]]:
    """The kept groups of completions of a reasoner's training, evenly over its steps where there are many."""
    groups: dict[tuple[int, str], list[Item]] = {}
    for path in sorted(run.folder.glob("completions-*.jsonl")):
        for row in read_curve(path):
            groups.setdefault((row["step"], str(row.get("record"))), []).append(row)
    found = list(groups.values())
    if len(found) <= GROUPS:
        return found, []
    told = f"{GROUPS} of {len(found):,} kept groups of rollouts of {run.name} are here, evenly over its steps."
    return [found[place * len(found) // GROUPS] for place in range(GROUPS)], [told]


def _group(rows: Sequence[Item], record: Record | None, model: int) -> Item:
    """A question of training with its group of completions; right where at least half of them are."""
    first = rows[0]
    replies = [_completion(row) for row in rows]
    right = 2 * sum(reply["right"][0] for reply in replies) >= len(replies)
    return {
        "id": without_places(str(first.get("record"))),
        "specialties": list(record.specialties) if record else [],
        "modality": (record.modality if record else "") or NOT_STATED,
        "kind": record.asked_as if record else NOT_STATED,
        "groups": [f"rollout {first['step']}"],
        "question": str(first.get("question") or ""),
        "options": [[letter, text] for letter, text in (record.options or {}).items()] if record else [],
        "gold": str(first.get("answer") or ""),
        "answers": [{"model": model, "right": [right] * len(PROTOCOLS), "by": "by at least half", "replies": replies}],
    }


def _completion(row: Item) -> Item:
    perspective, text = row.get("perspective"), str(row.get("completion") or "")
    named = [part.partition("=") for part in str(row.get("criteria") or "").split()]
    return {
        "perspective": None if perspective == "none" else perspective,
        "right": [row.get("accuracy") == 1.0] * len(PROTOCOLS),
        "picked": [None] * len(PROTOCOLS),
        "parsed": True,
        "text": text[:LETTERS],
        "more": max(0, len(text) - LETTERS),
        "tokens": None,
        "cut": False,
        "adherence": row.get(f"adherence_{perspective}"),
        "criteria": [[name, None if value == "-" else _number(value)] for name, _, value in named],
        "advantage": row.get("advantage"),
    }


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _told(pictures: Pictures, licences: Counter[str]) -> list[str]:
    """What of the pictures is here, and under which licences."""
    told = [
        f"{len(pictures.urls):,} pictures of at most {SIDE} px, each once: {pictures.spent / 1e6:.1f} MB of at most "
        f"{pictures.budget / 1e6:g} MB (report.image_mb)."
    ]
    told += [f"{pictures.left_out:,} pictures are left out: the budget is spent."] if pictures.left_out else []
    told += [f"{pictures.unreadable:,} pictures could not be read."] if pictures.unreadable else []
    if licences:
        named = ", ".join(f"{name} ({count:,})" for name, count in licences.most_common())
        told.append(f"Licences of the questions: {named}. Look at them before you pass this page on.")
    return told


def share(benchmarks: int) -> int:
    """How many questions each of so many benchmarks may show."""
    return QUESTIONS // max(1, benchmarks)
