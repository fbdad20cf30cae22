"""From predictions to numbers: both protocols, intervals, breakdowns, baselines, the part not seen in training."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from mmedexpert.data.record import Record
from mmedexpert.evaluation.asked import REFUSED
from mmedexpert.evaluation.perspectives import measured
from mmedexpert.evaluation.predict import PROTOCOLS, Prediction, vote
from mmedexpert.evaluation.stats import cluster_bootstrap_ci, macro_bootstrap_ci


class Summary:
    """How intervals are drawn, so that every number of one evaluation is drawn alike."""

    def __init__(self, *, num_resamples: int, seed: int) -> None:
        self.options: dict[str, Any] = {"num_resamples": num_resamples, "seed": seed}

    def accuracy(self, rows: Sequence[Prediction], protocol: str) -> dict[str, float]:
        """Accuracy with its 95% interval by bootstrap over images, and n; empty without rows."""
        if not rows:
            return {}
        return self.mean([row[protocol]["correct"] for row in rows], rows)

    def mean(self, values: Sequence[float], rows: Sequence[Prediction]) -> dict[str, float]:
        """As `accuracy`, of any number per row."""
        mean, low, high = cluster_bootstrap_ci(values, [row["image_group"] for row in rows], **self.options)
        return {"accuracy": mean, "ci_low": low, "ci_high": high, "n": len(rows)}

    def of(
        self,
        predictions: Sequence[Prediction],
        records: Sequence[Record],
        *,
        protocol: str,
        specialties: Sequence[str],
        breakdowns: Sequence[str] = (),
        clean: Collection[str] | None = None,
    ) -> dict[str, Any]:
        """A model's numbers under `protocol`, and under `protocols` the same for both, with breakdowns and baselines;
        under `perspectives` what each of them changes (`perspectives.measured`).

        `clean` are the ids of questions whose images were not in training (None: not compared).
        """
        asked: dict[str, list[Prediction]] = defaultdict(list)
        for row in predictions:
            asked[row["id"]].append(row)
        rows = [vote(group) if len(group) > 1 else group[0] for group in asked.values()]
        perspectives = measured(predictions, self.mean)
        out = self._macro(rows, specialties, protocol)
        return out | {
            "protocol": protocol,
            "parse_failure_rate": float(np.mean([not row["robust"]["parsed"] for row in rows])),
            "truncation_rate": float(np.mean([row["finish_reason"] == "length" for row in predictions])),
            "unanswered": len({row["id"] for row in predictions if row["finish_reason"] == REFUSED}),
            "refused": [
                {name: row[name] for name in ("id", "perspective", REFUSED)}
                for row in predictions
                if row["finish_reason"] == REFUSED
            ],
            "adherence": {
                name: one["adherence"] for name, one in perspectives["each"].items() if one["adherence"] is not None
            },
            "n": len(rows),
            "protocols": {name: self._protocol(rows, name, breakdowns, clean) for name in PROTOCOLS},
            "baselines": {"random": random_accuracy(records), "majority": majority_accuracy(records)},
            "perspectives": perspectives,
        }

    def _macro(self, rows: Sequence[Prediction], specialties: Sequence[str], protocol: str) -> dict[str, Any]:
        members = [(row, name) for name in specialties for row in rows if name in row["specialties"]]
        per = {name: self.accuracy([row for row, other in members if other == name], protocol) for name in specialties}
        macro, low, high = macro_bootstrap_ci(
            [row[protocol]["correct"] for row, _ in members], [row["image_group"] for row, _ in members],
            [name for _, name in members], **self.options,
        )  # fmt: skip
        return {"macro_accuracy": macro, "macro_ci_low": low, "macro_ci_high": high, "per_specialty": per}

    def _protocol(
        self, rows: Sequence[Prediction], protocol: str, breakdowns: Sequence[str], clean: Collection[str] | None
    ) -> dict[str, Any]:
        out: dict[str, Any] = self.accuracy(rows, protocol)
        for key in ("kind", "modality", "body_system", *breakdowns):
            groups: dict[str, list[Prediction]] = defaultdict(list)
            for row in rows:
                value = row["groups"].get(key, "") if key in breakdowns else row[key]
                groups[value or "not stated"].append(row)
            if len(groups) > 1:
                out[f"by_{key}"] = {value: self.accuracy(groups[value], protocol) for value in sorted(groups)}
        if scored := [row["scores"][protocol] for row in rows if row["scores"][protocol]]:
            out["open"] = {key: float(np.mean([scores[key] for scores in scored])) for key in scored[0]}
        if clean is not None:
            out["clean"] = self.accuracy([row for row in rows if row["id"] in clean], protocol)
        return out


def random_accuracy(records: Sequence[Record]) -> float:
    """Expected accuracy of guessing an option, or yes or no; open and closed answers are never guessed."""
    chances = [1 / len(r.options) if r.options else 0.5 * (r.asked_as == "yes_no") for r in records]
    return float(np.mean(chances))


def majority_accuracy(records: Sequence[Record]) -> float:
    """Accuracy of always giving a kind's most frequent answer (option letter or text) of these very questions."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        counts[record.asked_as][record.answer.strip().casefold()] += 1
    return sum(max(answers.values()) for answers in counts.values()) / len(records)
