"""Ask a model every question of a set, keep each reply as it comes, judge it under both protocols."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmedexpert.benchmarks import robust
from mmedexpert.benchmarks.judged import Judged
from mmedexpert.data.encode import prompt_text
from mmedexpert.data.record import Record
from mmedexpert.data.records_io import write_atomic
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import adherence
from mmedexpert.progress import Bar

PROTOCOLS = ("robust", "medevalkit")
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


def perspectives_of(identity: str, setting: str) -> tuple[str | None, ...]:
    """The perspectives a question is asked under: one of the four by a hash of its id (rotate), all four (vote), none,
    or always one.

    A hash, because the place in the list would tie perspectives to guidelines. # ours
    """
    if setting == "vote":
        return PERSPECTIVES
    if setting == "rotate":
        return (PERSPECTIVES[zlib.crc32(identity.encode()) % len(PERSPECTIVES)],)
    return (None if setting == "none" else setting,)


def asks_of(
    questions: QuestionSet, *, protocol: str, perspectives: str, blank: Path | None = None
) -> list[tuple[Record, str | None, Ask]]:
    """What a model is asked: each record under each of its perspectives, in order (see `predict`)."""
    asked: list[tuple[Record, str | None, Ask]] = []
    for record in questions.records:
        images = tuple(blank or questions.image_root / name for name in record.images)
        for perspective in (None,) if protocol == "medevalkit" else perspectives_of(record.id, perspectives):
            if protocol == "medevalkit":
                text = questions.ask(record)
            else:
                text = prompt_text(record, instructions()[perspective] if perspective else "")
            asked.append((record, perspective, Ask(record.id, text, images)))
    return asked


def predict(
    engine: Engine,
    questions: QuestionSet,
    path: Path,
    *,
    protocol: str,
    perspectives: str,
    title: str,
    blank: Path | None = None,
) -> list[Prediction]:
    """Greedy answers to all questions, one JSON line each in `path`, on disk as soon as it is there.

    Questions already answered in `path` are not asked again. Protocol medevalkit asks in MedEvalKit's words and without
    perspectives, robust in those of training. `blank` is shown in place of every image (a baseline: what the text
    alone gives away).
    """
    asked = asks_of(questions, protocol=protocol, perspectives=perspectives, blank=blank)
    kept = {_key(row): row for row in read_predictions(path)}
    write_atomic(path, _lines(list(kept.values())))  # without a line that a kill cut off
    todo = [item for item in asked if (item[0].id, item[1]) not in kept]
    correct = done = 0
    with Bar(f"eval {title}", len(todo)) as bar, path.open("a", encoding="utf-8") as file:
        for place, reply in engine([ask for _, _, ask in todo]):
            row = _row(questions, *todo[place], reply)
            kept[_key(row)] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done, correct = done + 1, correct + row[protocol]["correct"]
            bar.show(done, {"accuracy": correct / done})
    return [kept[record.id, perspective] for record, perspective, _ in asked]


def _key(row: Prediction) -> tuple[str, str | None]:
    return row["id"], row["perspective"]


def _lines(rows: Sequence[Prediction]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


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
        **verdicts(questions, record, reply.text),
        "adherence": {perspective: adherence(reply.text, record.options or {}, perspective)} if perspective else {},
        "tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        "seconds": round(reply.seconds, 4),
        "mean_logp": reply.mean_logp,
    }


def verdicts(questions: QuestionSet, record: Record, response: str) -> dict[str, Any]:
    """The verdicts of both protocols, and an open answer's text metrics."""
    judged = {"robust": robust.judge(record, response), "medevalkit": questions.judge(record, response)}
    plain = {name: {k: v for k, v in asdict(one).items() if k != "scores"} for name, one in judged.items()}
    return {**plain, "scores": {name: one.scores for name, one in judged.items()}}


def judge_again(path: Path, questions: QuestionSet) -> list[Prediction]:
    """The predictions in `path`, judged by today's rules without asking; the file is rewritten where they differ."""
    record_of = {record.id: record for record in questions.records}
    before = read_predictions(path)
    rows = [row | verdicts(questions, record_of[row["id"]], row["response"]) for row in before]
    if rows != before:
        write_atomic(path, _lines(rows))
    return rows


@cache
def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_predictions(path: Path) -> list[Prediction]:
    """The complete lines of a predictions file; a line cut off by a kill is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


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
    voted = {**rows[0], "perspective": "vote", "adherence": {k: v for row in rows for k, v in row["adherence"].items()}}
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
