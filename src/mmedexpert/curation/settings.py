"""Which settings of the funnel are possible: what the types of `CurateConfig` cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmedexpert.data.record import KINDS, NO_TRACE
from mmedexpert.errors import UserError, suggestion
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.schema_data import CurateConfig

MOST_BITS = 64  # ours: a quarter; other images of one kind start at 10 to 44 (data/overlap.py)
MODELS = ("labels", "blind", "difficulty", "teacher", "verifier")  # who asks one


def check_settings(curate: CurateConfig) -> None:
    """UserError for a choice or number that is none, and for a step that asks two models, here and at an address."""
    choices = {
        "untraced": (curate.untraced, ("keep", "drop")), "blind.mode": (curate.blind.mode, ("drop", "flag")),
        "difficulty.mode": (curate.difficulty.mode, ("drop", "flag")),
        "teacher.verify": (curate.teacher.verify, ("none", "rules", "model")),
        **{f"teacher.perspectives: {name}": (name, PERSPECTIVES) for name in curate.teacher.perspectives},
        **{
            f"balance.perspective: {name}": (name, (*PERSPECTIVES, NO_TRACE))
            for name in (curate.balance.perspective if isinstance(curate.balance.perspective, Mapping) else ())
        },
        **{f"balance.kind: {name}": (name, KINDS) for name in curate.balance.kind},
    }  # fmt: skip
    for key, (value, known) in choices.items():
        if value not in known:
            raise UserError(f"data.curate.{key}={value!r} is not known{suggestion(value, known)}")
    for name in MODELS:
        asked, where = getattr(curate, name), f"data.curate.{name}"
        if (asked.base_url is None) != (asked.model is None):
            raise UserError(f"{where} needs both base_url=<...>/v1 and model=<served name>, or neither")
        if asked.local and asked.base_url is not None:
            raise UserError(f"{where} asks the model here (local=true) or the one at base_url: give one of them")
        for key in ("concurrency", "timeout_s", "max_new_tokens"):
            if not getattr(asked, key) > 0:
                raise UserError(f"{where}.{key}={getattr(asked, key)} must be above 0")
    teacher, verifier = curate.teacher, curate.verifier
    if (teacher.base_url or teacher.local) and teacher.verify == "model" and not (verifier.base_url or verifier.local):
        raise UserError(
            "data.curate.teacher.verify=model needs data.curate.verifier.base_url and .model (the same server will "
            "do), or data.curate.teacher.verify=rules"
        )
    counts = {
        "blind.tries": curate.blind.tries, "difficulty.rollouts": curate.difficulty.rollouts,
        "teacher.candidates": teacher.candidates, "balance.target": curate.balance.target,
        "balance.per_image": curate.balance.per_image, "samples": curate.samples,
    }  # fmt: skip
    for key, count in counts.items():
        if count < 1:
            raise UserError(f"data.curate.{key}={count} must be at least 1")
    if not 1 <= teacher.per_question <= len(set(teacher.perspectives)):
        raise UserError(
            f"data.curate.teacher.per_question={teacher.per_question} must lie in 1..{len(set(teacher.perspectives))}, "
            "the number of data.curate.teacher.perspectives, each named once"
        )
    for key, ends in (("keep", curate.difficulty.keep), ("hard", curate.difficulty.hard)):
        if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= curate.difficulty.rollouts:
            raise UserError(
                f"data.curate.difficulty.{key}={ends} must be two numbers, from and to, in "
                f"0..{curate.difficulty.rollouts}"
            )
    for path in teacher.statements:
        if not Path(path).is_file():
            raise UserError(f"data.curate.teacher.statements: {path} is not a file: give a YAML file of statements")
    balance, duplicates, decontaminate = curate.balance, curate.duplicates, curate.decontaminate
    for key, weights in (("specialty", balance.specialty), ("perspective", balance.perspective)):
        if weights is not None and not _shares(weights):
            raise UserError(
                f"data.curate.balance.{key}={weights} must give names shares of 0 or more, one above 0, such as "
                "{pediatrics: 1}, or be null"
            )
    shares = {
        "balance.modality": balance.modality, **{f"balance.kind.{name}": x for name, x in balance.kind.items()},
        "duplicates.min_jaccard": duplicates.min_jaccard, "duplicates.min_ratio": duplicates.min_ratio,
        "decontaminate.min_jaccard": decontaminate.min_jaccard, "decontaminate.min_ratio": decontaminate.min_ratio,
        "decontaminate.min_share": decontaminate.min_share, "teacher.min_adherence": teacher.min_adherence,
    }  # fmt: skip
    for key, share in shares.items():
        if not 0 <= share <= 1:
            raise UserError(f"data.curate.{key}={share} must lie in 0..1")
    fractions = balance.fractions
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(f"data.curate.balance.fractions={fractions} must be three numbers (train, val, test), sum 1")


def _shares(weights: Any) -> bool:
    """Whether these are names with numbers of 0 or more, not all 0."""
    if not isinstance(weights, Mapping):
        return False
    numbers = [n for n in weights.values() if isinstance(n, int | float) and not isinstance(n, bool) and n >= 0]
    return len(numbers) == len(weights) and 0 < sum(numbers) < math.inf
