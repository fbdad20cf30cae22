"""The step that tells which specialties a record belongs to: its source's word, rules, and a model's opinion."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from mmedexpert.curation.steps import Records, Verdict, checked
from mmedexpert.data.record import Record
from mmedexpert.data.specialties import SPECIALTIES, Label, labels
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.engines.objects import reply_format

DISAGREE = "rules and model disagree on the specialty"
SOURCE, LLM = "source", "llm"  # methods beside those of data/specialties.py
LLM_VERSION = 1  # of PROMPT and FORMAT
LLM_SCORE = 0.7  # ours: of a model's label, which has no score of its own
BATCH = 512  # ours: records asked about at a time
MAX_CHARACTERS = 200  # ours: of a model's reason that is kept
PROMPT = """Which medical specialty does this question belong to? Choose the first that fits:
1. pediatrics: the patient is younger than 18 years, whatever the disease
2. brain_sensory: brain, spinal cord, nerves, eye, ear, nose, throat or larynx
3. oncology_surgery: cancer, an operation, trauma, or a disease that is treated by operating
4. adult_medicine: everything else
Name any other of the four that fits, too, under "others".

Question: {question}
Right answer: {answer}

Reply with JSON only: {{"primary": "...", "others": ["..."], "reason": "..."}}"""
_NAME = {"type": "string", "enum": list(SPECIALTIES)}
_OTHERS = {"type": "array", "items": _NAME}
FORMAT = reply_format("specialty", {"primary": _NAME, "others": _OTHERS, "reason": {"type": "string"}})


def label(
    records: Records,
    *,
    engine: Engine | None = None,
    trusted: Collection[str] = (),
    also: float = 0.6,
    show_images: bool = False,
    drop_disagreement: bool = False,
    batch: int = BATCH,
) -> Iterator[Verdict]:
    """Each record with its specialties, the primary one first, then others of a score of `also` or more.

    Records of the sources in `trusted` keep the specialties that these gave them. With an `engine` a model is asked as
    well; whether it names the same primary stands in the record's check `label` (`agreed`, null where it gave no
    usable reply). The rules' primary stays first. Only with `drop_disagreement` are records dropped (DISAGREE).
    """
    rows = iter(records)
    while part := list(islice(rows, batch)):
        yield from _label(part, records.image_root, engine, trusted, also, show_images, drop_disagreement)


def _label(
    part: Sequence[Record], image_root: Path, engine: Engine | None, trusted: Collection[str], also: float,
    show_images: bool, drop_disagreement: bool,
) -> Iterator[Verdict]:  # fmt: skip
    kept = {place for place, record in enumerate(part) if _is_told(record, trusted)}
    asked = [place for place in range(len(part)) if place not in kept]
    asks = [_ask(part[place], image_root if show_images else None) for place in asked]
    replies = {asked[place]: reply for place, reply in engine(asks)} if engine is not None and asks else {}
    for place, record in enumerate(part):
        if place in kept:
            source = _source(record)
            names = sorted(record.specialties, key=lambda name: name not in SPECIALTIES)  # finer ones behind their own
            told = [Label(name, 1.0, SOURCE, f"source: {source}", 1) for name in names]
            yield Verdict(_labelled(record, told, names))
            continue
        found = ruled = rule_labels(record)
        primary = ruled[0].label
        if engine is not None:
            opinions, said = opinions_of(replies.get(place))
            agreed = opinions[0].label == primary if opinions else None
            found = [*ruled, *opinions]
            record = checked(record, "label", agreed=agreed, **({"reply": said} if said else {}))
            if agreed is False and drop_disagreement:
                yield Verdict(record, DISAGREE, f"{primary} by {ruled[0].evidence}; {opinions[0].label} by the model")
                continue
        others = [entry.label for entry in sorted(found, key=lambda entry: -entry.score) if entry.score >= also]
        yield Verdict(_labelled(record, found, (primary, *others)))


def rule_labels(record: Record) -> list[Label]:
    """What the rules say of a record: its texts, and all that its benchmark tells."""
    source = f"{record.source} . {record.provenance.get('source', '')}"
    told = {"body_system": record.body_system, "modality": record.modality, "set": source}
    return labels(
        question=record.question, options=record.options, answer=record.answer,
        metadata={**record.groups, **{key: value for key, value in told.items() if value}},
    )  # fmt: skip


def opinions_of(reply: Reply | None) -> tuple[list[Label], str]:
    """A model's labels, the primary one first, and why there are none."""
    if reply is None or reply.refused:
        return [], reply.refused if reply is not None else "no reply"
    text = reply.text.rpartition("</think>")[2]
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        data = json.loads(match[0]) if match else None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("primary") not in SPECIALTIES:
        return [], "no JSON that names one of the specialties"
    others = data.get("others")
    names = [data["primary"], *(others if isinstance(others, list) else ())]
    why = f"model: {str(data.get('reason', ''))[:MAX_CHARACTERS]}"
    known = dict.fromkeys(name for name in names if name in SPECIALTIES)
    return [
        Label(name, LLM_SCORE if place == 0 else LLM_SCORE / 2, LLM, why, LLM_VERSION)
        for place, name in enumerate(known)
    ], ""


def _is_told(record: Record, trusted: Collection[str]) -> bool:
    return _source(record) in trusted and bool(record.specialties) and record.specialties != ("all",)


def _source(record: Record) -> str:
    return str(record.provenance.get("source", record.source))


def _ask(record: Record, image_root: Path | None) -> Ask:
    answer = (record.options or {}).get(record.answer, record.answer)
    images = tuple(image_root / name for name in record.images) if image_root is not None else ()
    return Ask(record.id, PROMPT.format(question=record.question, answer=answer), images, format=FORMAT)


def _labelled(record: Record, found: Iterable[Label], names: Iterable[str]) -> Record:
    provenance = {**record.provenance, "labels": [entry.as_dict() for entry in found]}
    return replace(record, specialties=tuple(dict.fromkeys(names)), provenance=provenance)
