"""Cases: one picture with all that can be read from it, and the one thing that decides its question. # ours

Each question needs what one of the four perspectives goes by, and that alone decides it:

    analytical    the measurement and the criterion of this population
    bayesian      a stated prevalence and how strong the finding is: a weak one does not overcome a rare disease
    differential  a second sign, which turns the first diagnosis into its rival
    intuitive     the look of a picture that cannot be measured

What the others go by is drawn at random beside it, so that each of them is right half of the time: no picture, and no
question without its picture, gives the answer to another.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmedexpert.guidelines import Guideline
from mmedexpert.sources.phantom import draw
from mmedexpert.sources.phantom.families import PRACTICES, Family, family_of

RARE, FREQUENT, USUAL = 10, 90, 90  # per cent: stated prevalences; the prior of the common label where none is stated
STRONG, WEAK = 20.0, 3.0  # likelihood ratios of far and near values


@dataclass(frozen=True)
class Case:
    """One picture and its question, which asks for one of the guideline's labels `pair` and `pair + 1`.

    `look` is the label of the pair (0 or 1) that the look stands for, and `brighter_below` whether a picture brighter
    below stands for the upper one; `sign` turns the label into `rival`; `common` is the label that is usual;
    `prevalence` that of the upper label in per cent.
    """

    rule: Guideline
    family: Family
    needs: str
    pair: int
    value: float
    look: int
    brighter_below: bool
    sign: bool
    rival: str
    common: int
    prevalence: int | None = None

    @property
    def labels(self) -> tuple[str, str]:
        """The two labels in question; of a differential the measurement's and its rival."""
        if self.needs == "differential":
            return self.measured, self.rival
        return self.rule.labels[self.pair], self.rule.labels[self.pair + 1]

    @property
    def measured(self) -> str:
        """The label of the measurement."""
        return self.rule.labels[self.rule.level(self.value)]

    @property
    def looks_like(self) -> str:
        """The label that the look stands for."""
        return self.rule.labels[self.pair + self.look]

    @property
    def prior(self) -> tuple[str, int]:
        """A label and its chance in per cent before the finding: as stated, else the usual one's."""
        if self.prevalence is not None:
            return self.labels[1], self.prevalence
        if self.needs == "differential":
            return self.measured, USUAL
        return self.rule.labels[self.common if self.common in (self.pair, self.pair + 1) else self.pair], USUAL

    @property
    def ratio(self) -> float:
        """The finding's likelihood ratio for the label of the prior."""
        distance = abs(self.value - self.rule.cuts[self.pair])
        strength = STRONG if self.prevalence is not None and distance > self.family.weak else WEAK
        return strength if self.measured == self.prior[0] else 1 / strength

    @property
    def posterior(self) -> int:
        """The chance of the prior's label after the finding, in per cent (Bayes)."""
        odds = self.prior[1] / (100 - self.prior[1]) * self.ratio
        return round(100 * odds / (1 + odds))

    @property
    def likely(self) -> str:
        """The label whose chance is above one half after the finding."""
        label, other = self.prior[0], next(label for label in self.labels if label != self.prior[0])
        return label if self.posterior > 50 else other

    @property
    def gold(self) -> str:
        """The right answer, by what the question needs."""
        if self.needs == "differential":
            return self.rival if self.sign else self.measured
        return {"analytical": self.measured, "intuitive": self.looks_like, "bayesian": self.likely}[self.needs]

    def paint(self, rng: np.random.Generator) -> Image.Image:
        """The picture."""
        family, below = self.family, bool(self.look) == self.brighter_below
        image, at = family.paint(self.value, rng), family.sign_at if self.sign else None
        return draw.finish(image, rng, noise=family.noise, sign=at, brighter_below=below)


def draw_case(rule: Guideline, needs: str, rng: np.random.Generator) -> Case:
    """A case of a guideline as its specialists know it."""
    family, practice = family_of(rule.id), PRACTICES[rule.id]
    pair = int(rng.integers(len(rule.cuts)))
    return completed(
        rule,
        family,
        needs,
        pair,
        rng,
        brighter_below=practice.brighter_below,
        rival=family.rival,
        common=practice.common,
    )


def completed(
    rule: Guideline, family: Family, needs: str, pair: int, rng: np.random.Generator, *, brighter_below: bool,
    rival: str, common: int,
) -> Case:  # fmt: skip
    """The rest at random: value, look, sign, prevalence; a differential's look and measurement agree."""
    upper, far, look, sign = (bool(rng.integers(2)) for _ in range(4))
    prevalence = None
    if needs == "bayesian":  # rare and found, or frequent and not found: the finding's strength decides
        prevalence = RARE if upper else FREQUENT
    low, high = family.far if far and needs == "bayesian" else family.near
    distance = rng.uniform(low, high)
    value = round(float(rule.cuts[pair] + (distance if upper else -distance)), family.decimals)
    if needs == "differential":
        look = upper
    return Case(rule, family, needs, pair, value, int(look), brighter_below, sign, rival, common, prevalence)
