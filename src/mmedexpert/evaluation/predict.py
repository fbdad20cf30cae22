"""Ask a model every question of a set, keep each reply as it comes, judge it under both protocols."""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.errors import UserError
from mmedexpert.evaluation.asked import REFUSED, ask_missing, lines
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import grades
from mmedexpert.guidelines.truth import truth_of
from mmedexpert.models.encode import prompt_text
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.scoring import robust
from mmedexpert.scoring.judged import Judged

PROTOCOLS = ("robust", "medevalkit")
UNANSWERED = {"correct": False, "picked": None, "parsed": False}
Prediction = dict[str, Any]


@dataclass(frozen=True)
class QuestionSet:
    """Questions asked together, how MedEvalKit asks and judges them, and the breakdowns they support (keys of
    Record.groups)."""

    name: str
    records: list[Record]
    image_root: Path
    ask: Callable[[Record], str]
    judge: Callable[[Record, str], Judged]
    breakdowns: tuple[str, ...] = ()


def perspectives_of(record: Record, setting: str) -> tuple[str | None, ...]:
    """The perspectives a question is asked under: the one that it says it needs, else one of the four by a hash of its
    id (needed), always by the hash (rotate), all four (vote), none, or always one.

    A hash, because the place in the list would tie perspectives to guidelines. # ours
    """
    if setting == "vote":
        return PERSPECTIVES
    if setting == "needed" and record.groups.get("needs") in PERSPECTIVES:
        return (record.groups["needs"],)
    if setting in ("needed", "rotate"):
        return (PERSPECTIVES[zlib.crc32(record.id.encode()) % len(PERSPECTIVES)],)
    return (None if setting == "none" else setting,)


def asks_of(
    questions: QuestionSet,
    *,
    protocol: str,
    perspectives: str,
    style: str,
    shown: Mapping[str, tuple[Path, ...]] | None = None,
) -> list[tuple[Record, str | None, Ask]]:
    """What a model is asked: each record under each of its perspectives, in order (see `predict`)."""
    told = instructions(style)
    asked: list[tuple[Record, str | None, Ask]] = []
    for record in questions.records:
        images = shown[record.id] if shown else tuple(questions.image_root / name for name in record.images)
        for perspective in (None,) if protocol == "medevalkit" else perspectives_of(record, perspectives):
            if protocol == "medevalkit":
                text = questions.ask(record)
            else:
                text = prompt_text(record, told[perspective] if perspective else "")
            asked.append((record, perspective, Ask(record.id, text, images)))
    return asked


def predict(
    engine: Engine,
    questions: QuestionSet,
    path: Path,
    *,
    protocol: str,
    perspectives: str,
    style: str,
    title: str,
    shown: Mapping[str, tuple[Path, ...]] | None = None,
) -> list[Prediction]:
    """Greedy answers to all questions, one JSON line each in `path`, on disk as soon as it is there.

    Questions already answered in `path` are not asked again but judged by today's rules; those refused are asked. A
    refused question is a row like the others, wrong and unparsed, with the reason in `refused`; UserError where most
    are refused, which is a setting's fault. Protocol medevalkit asks in MedEvalKit's words and without perspectives,
    robust in those of training, with the perspectives' instructions of `style` (small, full). `shown` are the images
    of each question in place of its own (a baseline: what the text alone gives away).
    """
    asked = asks_of(questions, protocol=protocol, perspectives=perspectives, style=style, shown=shown)
    record_of = {record.id: record for record in questions.records}
    items = {(record.id, perspective): (record, perspective, ask) for record, perspective, ask in asked}
    kept = (
        _judged_again(questions, record_of[row["id"]], row) if row["id"] in record_of else row
        for row in read_predictions(path)
    )
    return ask_missing(
        engine, {key: ask for key, (*_, ask) in items.items()}, kept, path,
        key_of=lambda row: (row["id"], row["perspective"]),
        row_of=lambda key, reply: _row(questions, *items[key], reply),
        right=lambda row: row[protocol]["correct"], doing="eval", title=title,
    )  # fmt: skip


def _row(questions: QuestionSet, record: Record, perspective: str | None, ask: Ask, reply: Reply) -> Prediction:
    return {
        "id": record.id,
        "image_group": record.image_group,
        "specialties": list(record.specialties),
        "modality": record.modality,
        "body_system": record.body_system,
        "kind": record.asked_as,
        "groups": record.groups,
        "perspective": perspective,
        "prompt_sha256": hashlib.sha256(ask.text.encode()).hexdigest(),
        "image_sha256": [_sha256(path) for path in ask.images],
        "response": reply.text,
        "gold": record.answer,
        **({REFUSED: reply.refused} if reply.finish_reason == REFUSED else {}),
        **judgement(questions, record, reply.text, perspective, refused=reply.finish_reason == REFUSED),
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        "seconds": round(reply.seconds, 4),
        "mean_logp": reply.mean_logp,
        **({} if reply.image_tokens is None else {"image_tokens": reply.image_tokens}),
    }


def judgement(
    questions: QuestionSet, record: Record, response: str, perspective: str | None, *, refused: bool
) -> dict[str, Any]:
    """What rules say of a response: both protocols' verdicts, an open answer's text metrics, and of the perspective it
    was asked under the adherence in [0, 1] and the criteria (name to value in [0, 1], None where it cannot be checked).

    A refused question is wrong and unparsed under both (MedEvalKit would read A out of an empty response), and has
    neither adherence nor criteria.  # ours
    """
    judged = {"robust": robust.judge(record, response), "medevalkit": questions.judge(record, response)}
    scores = {name: one.scores for name, one in judged.items()}
    if refused:
        return {**{name: dict(UNANSWERED) for name in judged}, "scores": scores, "adherence": {}, "criteria": {}}
    plain = {name: {k: v for k, v in asdict(one).items() if k != "scores"} for name, one in judged.items()}
    followed: dict[str, Any] = {"adherence": {}, "criteria": {}}
    if perspective:
        found = grades(response, record.options, truth_of(record))
        followed = {
            "adherence": {perspective: found.scores[perspective]}, "criteria": dict(found.criteria[perspective]),
        }  # fmt: skip
    return {**plain, "scores": scores, **followed}


def _judged_again(questions: QuestionSet, record: Record, row: Prediction) -> Prediction:
    refused = row.get("finish_reason") == REFUSED
    return row | judgement(questions, record, row["response"], row["perspective"], refused=refused)


def judge_again(path: Path, questions: QuestionSet) -> list[Prediction]:
    """The predictions in `path`, judged by today's rules without asking; the file is rewritten where they differ.

    Verdicts, scores, adherence and criteria follow from the responses alone. UserError for a file of other questions.
    """
    record_of = {record.id: record for record in questions.records}
    before = read_predictions(path)
    if other := sorted({row["id"] for row in before} ^ set(record_of)):
        fix = "delete the run's folder to have them asked again"
        raise UserError(f"{path} does not hold the questions of {questions.name} (such as {other[0]}): {fix}")
    rows = [_judged_again(questions, record_of[row["id"]], row) for row in before]
    if rows != before:
        write_atomic(path, lines(rows))
    return rows


@cache
def _sha256(path: Path) -> str | None:
    """Of a file's bytes, None where it cannot be read (its question was then refused)."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def read_predictions(path: Path) -> list[Prediction]:
    """The lines of a predictions file; a last line that a kill cut off is dropped. UserError for other damage."""
    return read_lines(path, ("id", "perspective", "response"))


def majority_engine(train: Sequence[Record], test: Sequence[Record]) -> Engine:
    """The baseline that never looks: of a question's options, the one most often right in training (first on ties)."""
    counts: Counter[str] = Counter((record.options or {}).get(record.answer, record.answer) for record in train)
    options_of = {record.id: record.options or {} for record in test}

    def engine(asks: Sequence[Ask]) -> Any:
        for place, ask in enumerate(asks):
            options = options_of[ask.id]
            answer = max(options or counts, key=lambda key: counts[str(options.get(key, key))])
            yield place, Reply(f"<answer>{answer}</answer>", 0, "stop", 0.0, None)

    return engine


def vote(rows: Sequence[Prediction]) -> Prediction:
    """One question's answers under several perspectives as one: the outcome picked most often; on ties the one whose
    answers have the highest mean token log-probability. Answers that cannot be parsed have no vote."""
    adherences = {k: v for row in rows for k, v in row["adherence"].items()}
    voted = {**rows[0], "perspective": "vote", "adherence": adherences, "criteria": {}}  # each perspective has its own
    for protocol in PROTOCOLS:
        outcomes: dict[str, list[Prediction]] = {}
        for row in rows:
            if row[protocol]["parsed"]:
                outcomes.setdefault(row[protocol]["picked"], []).append(row)
        if outcomes:
            winner = max(outcomes.values(), key=lambda group: (len(group), _mean_logp(group)))[0]
            voted[protocol] = winner[protocol]
    return voted


def _mean_logp(rows: Sequence[Prediction]) -> float:
    known = [row["mean_logp"] for row in rows if row["mean_logp"] is not None]
    return sum(known) / len(known) if known else float("-inf")
