"""Several samples of each question: what any of them, their vote, and a judge's pick among them are worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.errors import UserError
from mmedexpert.evaluation.asked import REFUSED, Row, ask_missing
from mmedexpert.evaluation.comparison import PAIRED_RESAMPLES
from mmedexpert.evaluation.predict import UNANSWERED, QuestionSet
from mmedexpert.evaluation.stats import holm, paired_cluster_bootstrap
from mmedexpert.evaluation.summary import Summary
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.scoring import robust

FILE, COLUMNS = "samples.jsonl", ("id", "sample", "response", "finish_reason", "tokens", "seconds")
PAIRED = (("pick", "vote"), ("pick", "greedy"), ("vote", "greedy"))
Asked = Sequence[tuple[Record, str | None, Ask]]  # `predict.asks_of`, each question once


def sample(engine: Engine, asked: Asked, path: Path, *, count: int, title: str) -> list[Row]:
    """`count` replies to each question, one JSON line each in `path` as soon as it is there; kept ones are not asked
    again (`ask_missing`)."""
    items = {
        (record.id, number): (perspective, replace(ask, sample=number))
        for record, perspective, ask in asked
        for number in range(count)
    }

    def row_of(key: tuple[str, int], reply: Reply) -> Row:
        return {
            "id": key[0], "sample": key[1], "perspective": items[key][0], "response": reply.text,
            "tokens": reply.tokens, "finish_reason": reply.finish_reason, "seconds": round(reply.seconds, 4),
            "mean_logp": reply.mean_logp, **({REFUSED: reply.refused} if reply.finish_reason == REFUSED else {}),
        }  # fmt: skip

    return ask_missing(
        engine, {key: ask for key, (_, ask) in items.items()}, read_lines(path, COLUMNS), path,
        key_of=lambda row: (row["id"], row["sample"]), row_of=row_of, doing="sample", title=title,
    )  # fmt: skip


def read_samples(path: Path, records: Sequence[Record], *, count: int) -> dict[str, list[Row]]:
    """Of each question its samples in order, as `sample` kept them; UserError for a file that lacks one."""
    rows = {(row["id"], row["sample"]): row for row in read_lines(path, COLUMNS)}
    keys = [(record.id, number) for record in records for number in range(count)]
    if lost := next((key for key in keys if key not in rows), None):
        raise UserError(f"{path} lacks sample {lost[1]} of {lost[0]}: delete the folder, and it is asked again")
    return {record.id: [rows[record.id, number] for number in range(count)] for record in records}


def read_answers(questions: QuestionSet, samples: dict[str, list[Row]], *, protocol: str) -> list[Row]:
    """Of each question what its samples answered (`picked`, None: unparsed or refused) and whether that is right."""
    judge = questions.judge if protocol == "medevalkit" else robust.judge
    rows = []
    for record in questions.records:
        told: list[dict[str, Any]] = []
        for one in samples[record.id]:
            if one["finish_reason"] == REFUSED:
                told.append(UNANSWERED)
                continue
            found = judge(record, one["response"])
            told.append({"correct": found.correct, "picked": found.picked if found.parsed else None})
        rows.append({
            "id": record.id, "image_group": record.image_group, "perspective": samples[record.id][0]["perspective"],
            "picked": [one["picked"] for one in told], "correct": [bool(one["correct"]) for one in told],
        })  # fmt: skip
    return rows


def voted(picked: Sequence[str | None]) -> int:
    """The place of the majority vote: the earliest sample with the answer that is given most often, on ties with the
    answer that is given first. What cannot be read has no vote; where nothing can, the first sample. # ours

    Source: Wang et al., self-consistency, arXiv 2203.11171.
    """
    known = [one for one in picked if one is not None]
    return picked.index(max(known, key=known.count)) if known else 0


def chosen(scores: Sequence[float | None]) -> int | None:
    """The place of the highest score, the first of equal ones; None where the judge scored nothing."""
    known = [(score, -place) for place, score in enumerate(scores) if score is not None]
    return -max(known)[1] if known else None


def pass_at(k: int, right: int, count: int) -> float:
    """The chance, in [0, 1], that of `k` of `count` samples, drawn without replacement, at least one of the `right` is.

    Source: Chen et al., arXiv 2107.03374, equation 1: unbiased over draws of the `count` samples.
    """
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def sizes(count: int) -> list[int]:
    """1, 2, 4, ... below `count`, and `count`."""
    return [*(2**power for power in range((count - 1).bit_length())), count]


def numbers_of(
    rows: Sequence[Row], *, picked: bool, num_resamples: int, seed: int, alone: bool = True
) -> dict[str, Any]:
    """`scores`: greedy, mean (of the single samples: pass@1), and for each k of `sizes` pass@k over all samples, vote@k
    and with `picked` pick@k among the first k (without `alone`, where scores came of comparing all samples, of all),
    each the accuracy over questions in [0, 1] with its 95% interval by bootstrap over images; `differences` between
    them at k = all; `missing`: the share of questions whose pick fell back to the first sample, because the judge
    scored none.

    p is adjusted by Holm over a model's differences (`p_holm`), not over models. # ours
    """
    count = len(rows[0]["correct"])
    values: dict[str, list[float]] = {
        "greedy": [float(row["greedy"]) for row in rows],
        "mean": [sum(row["correct"]) / count for row in rows],
    }

    for k in sizes(count):
        values[f"pass@{k}"] = [pass_at(k, sum(row["correct"]), count) for row in rows]
        values[f"vote@{k}"] = [float(row["correct"][voted(row["picked"][:k])]) for row in rows]
        if picked and (alone or k == count):
            values[f"pick@{k}"] = [float(row["correct"][chosen(row["scores"][:k]) or 0]) for row in rows]
    draw = Summary(num_resamples=num_resamples, seed=seed)
    found: dict[str, Any] = {
        "samples": count, "n": len(rows), "scores": {name: draw.mean(each, rows) for name, each in values.items()},
        "differences": _differences(values, rows, count, seed),
    }  # fmt: skip
    if picked:
        found["missing"] = float(np.mean([chosen(row["scores"]) is None for row in rows]))
    return found


def _differences(
    values: dict[str, list[float]], rows: Sequence[Row], count: int, seed: int
) -> dict[str, dict[str, float | None]]:
    """`pick_minus_vote` and so on, question by question, with interval and p by bootstrap over images."""
    groups = [row["image_group"] for row in rows]
    found: dict[str, tuple[float, float, float, float]] = {}
    for one, other in PAIRED:
        first, second = (values.get(name if name == "greedy" else f"{name}@{count}") for name in (one, other))
        if first is not None and second is not None:
            found[f"{one}_minus_{other}"] = paired_cluster_bootstrap(
                first, second, groups, num_resamples=PAIRED_RESAMPLES, seed=seed
            )
    adjusted = holm([p for *_, p in found.values()])
    return {
        name: {
            "difference": difference, "ci_low": low, "ci_high": high,
            "p": None if math.isnan(p) else p, "p_holm": None if math.isnan(p) else p_holm,
        }
        for (name, (difference, low, high, p)), p_holm in zip(found.items(), adjusted, strict=True)
    }  # fmt: skip


def flat(found: dict[str, Any]) -> dict[str, float]:
    """A summary's numbers, each by one name: `best_of/pick@8`, `best_of/pick@8/ci_low`, `best_of/cost/judge/calls`."""
    told: dict[str, float | None] = {
        key: found[key] for key in ("missing", "unparsed", "truncated", "n") if key in found
    }
    for name, one in {**found["scores"], **found["differences"]}.items():
        told[name] = one["accuracy"] if "accuracy" in one else one["difference"]
        told |= {f"{name}/{key}": one.get(key) for key in ("ci_low", "ci_high", "p", "p_holm")}
    told |= {f"cost/{who}/{key}": value for who, cost in found["cost"].items() for key, value in cost.items()}
    return {f"best_of/{name}": float(value) for name, value in told.items() if value is not None}
