"""What is known of a released set, in words: the datasheet and the responsible-AI part of its metadata.

Questions after Gebru et al. (2021), "Datasheets for Datasets". What nobody has looked into is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmedexpert.curation.balance import UNKNOWN
from mmedexpert.data.record import NO_TRACE

NOT_CLINICAL = (
    "Not for clinical use. This is research data: nobody may use it, or a model trained on it, for diagnosis, "
    "treatment, triage or advice to patients without a validation of its own."
)
BY_RULES = "rules of this project, without a language model"


def facts(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]], teacher: str | None) -> dict[str, Any]:
    """The statements by topic, texts or lists of texts; `summary` is a release's, `steps` the counts of its funnel.

    `teacher` says in words who wrote the traces; None: rules.
    """
    made = summary["make_up"]
    names = sorted(made.get("source", {}))
    traced = summary["records"] - made.get("perspective", {}).get(NO_TRACE, 0)
    first = steps[0]["in"] if steps else summary["records"]
    writer = teacher or BY_RULES
    modality = made.get("modality", {})
    unknown = modality.get(UNKNOWN, 0)
    local = sum(row["records"] for row in summary["local"])
    return {
        "what": (
            f"{_number(summary['records'], 'medical question')} with their images, {_number(traced, 'trace')} of "
            "step-by-step reasoning from a clinical perspective; each record has a primary specialty and its evidence."
        ),
        "collection": (
            f"No data were collected from people for it. {_number(first, 'record')} of {_number(len(names), 'source')} "
            "were read and passed through a funnel of programs; each record tells its source, the source's revision, "
            "the id there and its licence."
        ),
        "sources": f"Sources: {', '.join(names) or 'none'}.",
        "missing": (
            f"{_number(local, 'record')} that came through the funnel may not be redistributed, and are left out. The "
            f"modality of {_number(unknown, 'record')} is not known."
        ),
        "preprocessing": [f"{step['step']}: {step['in']} in, {step['out']} out" for step in steps],
        "annotation": [
            "Right answers are the sources'; they were not checked by a physician.",
            "Specialties: by rules, with the words that decided, and where configured by a language model.",
            f"Traces: by {writer}. One is kept only if the steps before found nothing against it.",
        ],
        "analysis": [
            "Counts by step and reason are in the card. Agreement with physicians was not measured for this release."
        ],
        "per_item": "one answer, one trace, one primary specialty and any number of further ones",
        "tools": ["mmedexpert", writer],
        "biases": [
            f"Specialties: {_counts(made.get('specialty', {}))}; perspectives: {_counts(made.get('perspective', {}))}. "
            "They are balanced by quota and are no estimate of what is seen in practice.",
            f"Modalities: {_counts(modality)}.",
            "Sources are mostly teaching files and public collections of few hospitals; age, sex, origin and devices "
            "are mostly not recorded, so that their balance is unknown.",
            "Steps that ask a model drop what that model cannot do or does too easily: the set leans to its abilities.",
        ],
        "uses": [
            "Training and studying vision-language models that reason about medical images, as research.",
            "Not for clinical use, and not as a benchmark: it was made to be trained on.",
        ],
        "limits": [
            "A trace shows how an answer can be argued for, not that a model or a physician saw it in the image.",
            "Traces are written by programs; fluent statements in them can be wrong.",
            "Answers are as in the sources, whose errors stay.",
            "Copies that were cropped, turned or mirrored, and other images of one patient, can be in several splits "
            "or in a benchmark where the source does not tell patients.",
        ],
        "impact": (
            "It can make models argue better and sound surer than they are. Whoever shows such arguments to people "
            "should say what they rest on."
        ),
        "personal": [
            "Images are of patients, de-identified by their sources. Image files are passed on as they were ingested; "
            "burnt-in text was not searched for.",
            "Ages and sexes occur in questions, as published by the sources.",
        ],
        "maintenance": (
            "Made by a program from a configuration: it can be made again when a source is corrected or withdrawn. "
            "Nobody has promised to maintain it; errors can be reported where it is published."
        ),
    }


def sheet(said: Mapping[str, Any], licences: int, splits: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """(Section, question, answer) of the datasheet."""
    parts = ", ".join(f"{name} {count:,}" for name, count in splits.items()) or "none"
    return [
        ("Motivation", "Why was it made?", "To train models that reason by clinical perspective and specialty."),
        ("Motivation", "Who made it, and who paid?", "Whoever ran the program: not recorded by it."),
        ("Composition", "What is a record?", said["what"]),
        ("Composition", "How many are there?", f"By split: {parts}. Records on one image are in one split."),
        ("Composition", "What is missing?", said["missing"]),
        ("Composition", "Are there errors or redundancies?", " ".join(said["limits"][1:])),
        ("Composition", "Does it hold personal data?", " ".join(said["personal"])),
        ("Collection", "How were the data acquired?", said["collection"]),
        ("Collection", "Were people asked for consent?", "By the sources, if at all."),
        ("Preprocessing", "What was done to the data?", "The funnel above; each dropped record has a reason."),
        ("Preprocessing", "Who labelled?", " ".join(said["annotation"])),
        ("Uses", "What is it for?", said["uses"][0]),
        ("Uses", "What must it not be used for?", said["uses"][1]),
        ("Uses", "What can go wrong?", said["impact"]),
        ("Distribution", "Under which terms?", f"Of each record's source: {_number(licences, 'licence')}."),
        ("Maintenance", "Who maintains it?", said["maintenance"]),
    ]  # fmt: skip


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _counts(row: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in row.items()) or "none"
