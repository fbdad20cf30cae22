"""Ask a model every question of a split, keep every prediction, and turn predictions into numbers with intervals."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmedexpert.data.encode import Encoder, prompt_text, to_device
from mmedexpert.data.record import Record
from mmedexpert.engines.generate import generate
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import adherence
from mmedexpert.progress import Bar
from mmedexpert.scoring import Protocol, score_choice
from mmedexpert.stats import cluster_bootstrap_ci, macro_bootstrap_ci

Prediction = dict[str, Any]


def perspective_of(identity: str, setting: str) -> str | None:
    """The perspective a question is asked under: one of the four by a hash of its id (rotate), none, or always one.

    A hash, because the place in the list would tie perspectives to guidelines. # ours
    """
    if setting == "rotate":
        return PERSPECTIVES[zlib.crc32(identity.encode()) % len(PERSPECTIVES)]
    return None if setting == "none" else setting


def predict(
    model: Any,
    encoder: Encoder,
    records: Sequence[Record],
    image_root: Path,
    path: Path,
    *,
    perspective: str,
    batch_size: int,
    max_new_tokens: int,
    device: str,
    title: str,
    blank_images: bool = False,
) -> list[Prediction]:
    """Greedy answers to all records, one JSON line each in `path`; questions already answered there are kept.

    `blank_images` shows a grey image instead (a baseline: what the text alone gives away).
    """
    kept = read_predictions(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in kept.values()), encoding="utf-8")
    asked = [(record, perspective_of(record.id, perspective)) for record in records]
    todo = [(record, name) for record, name in asked if record.id not in kept]
    todo.sort(key=lambda item: len(prompt_text(item[0])))  # equal lengths together: less padding
    correct = 0
    with Bar(f"eval {title}", len(todo)) as bar, path.open("a") as file:
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            prompts = []
            for record, name in batch:
                text = instructions()[name] if name else ""
                if blank_images:
                    sizes = [Image.new("RGB", (112, 112), (128, 128, 128))] * len(record.images)
                    prompts.append(encoder.chat(prompt_text(record, text), [encoder.patches(image) for image in sizes]))
                else:
                    prompts.append(encoder.prompt(record, image_root, text))
            out = generate(
                model, to_device(encoder.collate_prompts(prompts), device),
                end_ids=encoder.end_ids, pad_id=encoder.pad_id,
                banned_ids=encoder.banned_ids, max_new_tokens=max_new_tokens,
            )  # fmt: skip
            for (record, name), ids, finished in zip(batch, out.rows(), out.finished.tolist(), strict=True):
                row = _row(record, name, encoder.decode(ids), len(ids), finished)
                correct += row["robust"]["correct"]
                file.write(json.dumps(row) + "\n")
                kept[record.id] = row
            file.flush()
            os.fsync(file.fileno())
            done = start + len(batch)
            bar.show(done, {"accuracy": correct / done})
    return [kept[record.id] for record in records]


def _row(record: Record, perspective: str | None, response: str, tokens: int, finished: bool) -> Prediction:
    options = record.options or {}
    choices = [f"{letter}. {text}" for letter, text in options.items()]
    protocols: tuple[Protocol, ...] = ("robust", "medevalkit")
    verdicts = {name: score_choice(response, choices, record.answer, name) for name in protocols}
    asked = [perspective] if perspective else list(PERSPECTIVES)
    return {
        "id": record.id,
        "image_group": record.image_group,
        "specialties": list(record.specialties),
        "perspective": perspective,
        "response": response,
        "gold": record.answer,
        **{name: {"correct": v.correct, "picked": v.picked, "parsed": v.parsed} for name, v in verdicts.items()},
        "adherence": {name: adherence(response, options, name) for name in asked},
        "tokens": tokens,
        "finish_reason": "stop" if finished else "length",
    }


def read_predictions(path: Path) -> dict[str, Prediction]:
    """The complete lines of a predictions file by question id; a line cut off by a kill is dropped."""
    rows: dict[str, Prediction] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows[row["id"]] = row
    return rows


def summarise(
    predictions: Sequence[Prediction], specialties: Sequence[str], *, protocol: str, num_resamples: int, seed: int
) -> dict[str, Any]:
    """DESIGN's M: macro accuracy and accuracy per specialty with 95 % intervals (bootstrap clustered on images)."""
    per: dict[str, Any] = {}
    rows: list[tuple[bool, str, str]] = []
    for name in specialties:
        members = [row for row in predictions if name in row["specialties"]]
        correct = [row[protocol]["correct"] for row in members]
        clusters = [row["image_group"] for row in members]
        mean, low, high = cluster_bootstrap_ci(correct, clusters, num_resamples=num_resamples, seed=seed)
        per[name] = {"accuracy": mean, "ci_low": low, "ci_high": high, "n": len(members)}
        rows += [(c, g, name) for c, g in zip(correct, clusters, strict=True)]
    flags, groups, strata = zip(*rows, strict=True)
    macro, low, high = macro_bootstrap_ci(flags, groups, strata, num_resamples=num_resamples, seed=seed)
    return {
        "macro_accuracy": macro,
        "macro_ci_low": low,
        "macro_ci_high": high,
        "per_specialty": per,
        "parse_failure_rate": float(np.mean([not row["robust"]["parsed"] for row in predictions])),
        "truncation_rate": float(np.mean([row["finish_reason"] == "length" for row in predictions])),
        "adherence": {
            name: float(np.mean(scores))
            for name in PERSPECTIVES
            if (scores := [row["adherence"][name] for row in predictions if name in row["adherence"]])
        },
        "n": len(predictions),
    }


def majority_predictions(train: Sequence[Record], test: Sequence[Record]) -> list[Prediction]:
    """The baseline that never looks: of a question's options, the one most often right in training (first on ties)."""
    counts: Counter[str] = Counter((record.options or {}).get(record.answer, record.answer) for record in train)
    rows = []
    for record in test:
        options = record.options or {}
        letter = max(options, key=lambda key: counts[options[key]], default="")
        rows.append(_row(record, None, f"<answer>{letter}</answer>", 0, True) | {"adherence": {}})
    return rows
