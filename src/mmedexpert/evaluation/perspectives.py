"""What a perspective changes: each one alone, how often they agree, and what they reach together. # ours"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from mmedexpert.evaluation.predict import PROTOCOLS, Prediction, vote
from mmedexpert.guidelines import PERSPECTIVES

Asked = Sequence[Sequence[Prediction]]  # per question, its answers under two perspectives or more
Mean = Callable[[Sequence[float], Sequence[Prediction]], dict[str, float]]  # Summary.mean
MEASURES = ("vote", "mean", "best", "oracle", "gain", "agreement")  # of `together`, each with an interval


def measured(predictions: Sequence[Prediction], mean: Mean) -> dict[str, Any]:
    """`each`: perspective to its numbers over what was asked under it; `together`: protocol to `_together`, empty where
    no question was asked under two perspectives (needed, rotate: each has questions of its own); `groups`: a record's
    group, its value, the perspective and the protocol to an accuracy.

    A refused question is wrong and has neither adherence nor criteria. A criterion that could not be checked in an
    answer (None) does not count in its mean; its n says in how many it could.
    """
    rows_of: dict[str, list[Prediction]] = {name: [] for name in PERSPECTIVES}
    answers_of: dict[str, list[Prediction]] = defaultdict(list)
    for row in predictions:
        if row.get("perspective") is not None:
            rows_of.setdefault(row["perspective"], []).append(row)
            answers_of[row["id"]].append(row)
    each = {name: _alone(name, rows, mean) for name, rows in rows_of.items() if rows}
    several = [answers for answers in answers_of.values() if len(answers) > 1]
    together = {protocol: _together(several, each, mean, protocol) for protocol in PROTOCOLS} if several else {}
    return {"each": each, "together": together, "groups": _in_groups(predictions, mean) if len(each) > 1 else {}}


def _in_groups(predictions: Sequence[Prediction], mean: Mean) -> dict[str, Any]:
    """Accuracy by a group of the records (`Record.groups`) that has several values, and by perspective."""
    rows_of: dict[tuple[str, str, str], list[Prediction]] = defaultdict(list)
    for row in predictions:
        if row.get("perspective") is not None:
            for key, value in (row.get("groups") or {}).items():
                rows_of[key, str(value), row["perspective"]].append(row)
    found: dict[str, Any] = {}
    for (key, value, name), rows in sorted(rows_of.items()):
        scores = {protocol: mean([row[protocol]["correct"] for row in rows], rows) for protocol in PROTOCOLS}
        found.setdefault(key, {}).setdefault(value, {})[name] = scores
    return {key: values for key, values in found.items() if len(values) > 1}


def _alone(name: str, rows: Sequence[Prediction], mean: Mean) -> dict[str, Any]:
    adherence = [row["adherence"][name] for row in rows if name in row["adherence"]]
    checked: dict[str, list[float]] = {}
    for row in rows:
        for criterion, value in row.get("criteria", {}).items():  # rows of older runs have none
            checked.setdefault(criterion, []).extend([] if value is None else [value])
    return {
        **{protocol: mean([row[protocol]["correct"] for row in rows], rows) for protocol in PROTOCOLS},
        "adherence": float(np.mean(adherence)) if adherence else None,
        "criteria": {
            criterion: {"mean": float(np.mean(values)) if values else None, "n": len(values)}
            for criterion, values in checked.items()
        },
        "n": len(rows),
        "judged": len(adherence),
    }


def _together(asked: Asked, each: dict[str, Any], mean: Mean, protocol: str) -> dict[str, Any]:
    """Of questions asked under several perspectives: accuracy of the vote, of the mean over perspectives, of the best
    one (chosen on these very questions, so that it flatters) and of the oracle (any of them right); the gain (vote
    minus mean, question by question), agreement, kappa, and how many questions each one alone has right.
    """
    right = [[float(row[protocol]["correct"]) for row in answers] for answers in asked]
    voted = [float(vote(answers)[protocol]["correct"]) for answers in asked]
    first = [answers[0] for answers in asked]  # of the same image as the others
    means = [float(np.mean(one)) for one in right]
    best = max(each, key=lambda name: each[name][protocol]["accuracy"])
    alone = Counter(
        answers[one.index(1.0)]["perspective"] for answers, one in zip(asked, right, strict=True) if sum(one) == 1
    )
    differences = {
        "gain": [a - b for a, b in zip(voted, means, strict=True)],
        "agreement": [agreement(answers, protocol) for answers in asked],
    }
    return {
        "vote": mean(voted, first),
        "mean": mean(means, first),
        "best": {"perspective": best, **each[best][protocol]},
        "oracle": mean([max(one) for one in right], first),
        **{name: _as_mean(mean(values, first)) for name, values in differences.items()},
        "kappa": kappa(asked, protocol),
        "alone": {name: alone[name] for name in each},
    }


def _as_mean(found: dict[str, float]) -> dict[str, float]:
    return {"mean" if name == "accuracy" else name: value for name, value in found.items()}


def agreement(answers: Sequence[Prediction], protocol: str) -> float:
    """Share of the pairs of a question's answers that pick the same, in [0, 1]; an unparsed one agrees with nothing.

    Source: Fleiss, Psychological Bulletin 76 (1971), P_i; unparsed and refused answers are ours.
    """
    pairs = [*combinations((_picked(row, protocol) for row in answers), 2)]
    return sum(a is not None and a == b for a, b in pairs) / len(pairs)


def kappa(asked: Asked, protocol: str) -> float | None:
    """Fleiss' kappa over picks, at most 1: agreement beyond that of picks drawn from all picks, 0 if there is none.

    Source: Fleiss, Psychological Bulletin 76 (1971), equation 7. Chance is taken within each kind of question and
    weighed by its share of them, since yes can never meet B; an unparsed answer agrees with nothing by chance either.
    # ours

    Returns:
        None where it is undefined: every answer to every question of a kind is the same.
    """
    of_kind: dict[Any, list[Sequence[Prediction]]] = defaultdict(list)
    for answers in asked:
        of_kind[answers[0].get("kind")].append(answers)
    chance = 0.0
    for part in of_kind.values():
        picks = [_picked(row, protocol) for answers in part for row in answers]
        counts = Counter(pick for pick in picks if pick is not None)
        chance += len(part) / len(asked) * sum((count / len(picks)) ** 2 for count in counts.values())
    observed = float(np.mean([agreement(answers, protocol) for answers in asked]))
    return None if 1 - chance < 1e-12 else (observed - chance) / (1 - chance)


def _picked(row: Prediction, protocol: str) -> str | None:
    return row[protocol]["picked"] if row[protocol]["parsed"] else None


def rows_of_numbers(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """`measured`, one row per number: perspective (empty: of all together), measure, protocol (empty: by the text
    alone), score, its interval where it has one, and n."""
    for name, one in found["each"].items():
        yield {"perspective": name, "measure": "adherence", "score": one["adherence"], "n": one["judged"]}
        for criterion, value in one["criteria"].items():
            yield {
                "perspective": name, "measure": f"criterion {criterion}", "score": value["mean"], "n": value["n"],
            }  # fmt: skip
        for protocol in PROTOCOLS:
            yield {"perspective": name, "measure": "accuracy", "protocol": protocol, **_score(one[protocol])}
    for key, values in found.get("groups", {}).items():
        for value, by_name in values.items():
            for name, of in by_name.items():
                for protocol in PROTOCOLS:
                    cell = {"perspective": name, "measure": f"accuracy, {key} {value}", "protocol": protocol}
                    yield cell | _score(of[protocol])
    for protocol, one in found["together"].items():
        for measure in MEASURES:
            yield {"measure": measure, "protocol": protocol, **_score(one[measure])}
        n = one["oracle"]["n"]
        yield {"measure": "kappa", "protocol": protocol, "score": one["kappa"], "n": n}
        for name, count in one["alone"].items():
            yield {"perspective": name, "measure": "right alone", "protocol": protocol, "score": count, "n": n}


def _score(entry: dict[str, Any]) -> dict[str, Any]:
    value = entry["accuracy"] if "accuracy" in entry else entry["mean"]
    best = {"perspective": entry["perspective"]} if "perspective" in entry else {}
    return best | {"score": value} | {key: entry[key] for key in ("ci_low", "ci_high", "n")}
