"""`python experiments/perspectives/fit.py`: the weights of the rubrics, fitted to the labelled texts of this folder.

Writes `src/mmedexpert/guidelines/weights.yaml` and prints how well the fit tells the perspectives apart on texts of an
author that it has not seen (each of the four left out once) and on all of them. `--check` writes nothing and fails
where the file differs. Logistic regressions with an L2 penalty: four styles on texts that follow one or two
perspectives, soundness on all; texts with a fault (`guidelines.soundness`) are left out, they score 0 anyhow.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml
from scipy.optimize import minimize

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.labelled import Rationale, measures
from mmedexpert.guidelines.rubrics import measured, weighed
from mmedexpert.guidelines.soundness import faults

HERE = Path(__file__).parent
AUTHORS = ("internist", "chain_of_thought", "educator", "emergency")
DRAWN = "drawn"  # traces of drawn records, by the wording that they had at b2f24b6
WEIGHTS = HERE.parents[1] / "src/mmedexpert/guidelines/weights.yaml"
PENALTY = 0.0007  # ours, as are all below: chosen by the texts of authors left out
TWO_WEIGHT, DRAWN_WEIGHT = 3.0, 7.0  # of a text that follows two perspectives, of a drawn record's trace
ROUNDING = 0.05
SOUND = (  # what soundness is weighed by; styles are weighed by everything
    "findings", "concrete", "generic", "talk", "retold", "connected", "named", "concluded",
    "weighed", "argued", "updated", "holds", "mechanism", "at_once",
)  # fmt: skip
HEADER = """# Fitted by experiments/perspectives/fit.py to the labelled texts beside it and to traces of drawn records:
# not to be edited. A row is a logistic regression over the criteria of perspectives.yaml and the signs of measures.py.
# ours
"""
Row = tuple[str, str, dict[str, str] | None, tuple[str, ...], float]  # author, completion, options, strategies, weight


def labelled() -> list[Row]:
    """The texts of all authors, and 96 traces of drawn records."""
    rows: list[Row] = []
    for author in (*AUTHORS, DRAWN):
        for entry in json.loads((HERE / f"{author}.json").read_text(encoding="utf-8")):
            given = entry["strategy"]
            names = tuple(given) if isinstance(given, list) else (given,) if given else ()
            weight = DRAWN_WEIGHT if author == DRAWN else TWO_WEIGHT if len(names) == 2 else 1.0
            rows.append((author, entry["completion"], entry["options"], names, weight))
    return rows


class Texts:
    """Rows as numbers: `features` [N, F] of `names`, `follows` [N, 4], `sound` [N] without a fault, `weight` [N]."""

    def __init__(self, rows: Sequence[Row]) -> None:
        read = [measured(completion, options) for _, completion, options, _, _ in rows]
        self.rows = list(rows)
        self.names = list(read[0][1])
        self.features = np.array([[found[name] for name in self.names] for _, found in read])
        self.sound = np.array([not faults(thought) for thought, _ in read])
        self.follows = np.array([[name in row[3] for name in PERSPECTIVES] for row in rows], dtype=float)
        self.weight = np.array([row[4] for row in rows])
        self.author = np.array([row[0] for row in rows])

    def fit(self, chosen: np.ndarray) -> dict[str, dict[str, float]]:
        """The weights by perspective and `sound`, from the chosen rows."""
        chosen = chosen & self.sound
        real = chosen & self.follows.any(1)
        every = np.ones(len(self.names), dtype=bool)
        model = {
            name: self._regress(real, self.follows[:, k], every) for k, name in enumerate(PERSPECTIVES)
        }  # fmt: skip
        model["sound"] = self._regress(
            chosen, self.follows.any(1).astype(float), np.array([name in SOUND for name in self.names])
        )
        return model

    def _regress(self, rows: np.ndarray, target: np.ndarray, columns: np.ndarray) -> dict[str, float]:
        x, sign = self.features[rows][:, columns], 2 * target[rows] - 1
        weight = self.weight[rows] / self.weight[rows].sum()

        def loss(beta: np.ndarray) -> tuple[float, np.ndarray]:
            margin = sign * (x @ beta[1:] + beta[0])
            slope = -weight * sign / (1 + np.exp(margin))
            gradient = np.concatenate([[slope.sum()], x.T @ slope + 2 * PENALTY * beta[1:]])
            return float((weight * np.logaddexp(0, -margin)).sum() + PENALTY * (beta[1:] ** 2).sum()), gradient

        found = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B", options={"maxiter": 5000}).x
        names = [name for name, used in zip(self.names, columns, strict=True) if used]
        return {"bias": round(float(found[0]), 3)} | {
            name: round(float(value), 3) for name, value in zip(names, found[1:], strict=True)
        }

    def scored(self, place: int, model: dict[str, dict[str, float]]) -> Rationale:
        """A row as `python -m mmedexpert.guidelines` measures it."""
        _, completion, options, strategies, _ = self.rows[place]
        styles, sound = weighed(dict(zip(self.names, self.features[place], strict=True)), model)
        scores = {name: float(style * sound * self.sound[place]) for name, style in styles.items()}
        return Rationale(str(place), completion, options, strategies, scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the file differs")
    given = parser.parse_args(arguments)
    texts = Texts(labelled())
    own = texts.author != DRAWN
    unseen: list[Rationale] = []
    for author in AUTHORS:
        without = texts.fit(texts.author != author)
        part = [texts.scored(place, without) for place in np.flatnonzero(texts.author == author).tolist()]
        print(f"{author}, left out:", _told(part))
        unseen += part
    print("all authors, each left out once:", _told(unseen))
    model = texts.fit(np.ones(len(texts.author), dtype=bool))
    print("all authors, fitted to all:", _told([texts.scored(place, model) for place in np.flatnonzero(own).tolist()]))
    print("traces of drawn records:", _told([texts.scored(place, model) for place in np.flatnonzero(~own).tolist()]))
    if given.check:
        return int(not same(model, yaml.safe_load(WEIGHTS.read_text(encoding="utf-8"))))
    WEIGHTS.write_text(HEADER + yaml.safe_dump(model, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return 0


def same(model: dict[str, dict[str, float]], written: dict[str, dict[str, float]]) -> bool:
    """Whether two fits have the same weights, but for how another machine rounds."""
    return {k: set(v) for k, v in model.items()} == {k: set(v) for k, v in written.items()} and all(
        abs(value - written[name][key]) <= ROUNDING for name, row in model.items() for key, value in row.items()
    )


def _told(part: Sequence[Rationale]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in measures(part).items())


if __name__ == "__main__":
    sys.exit(main())
