"""Finding families: what is drawn, which guidelines judge it, and the words the traces use. # ours

A family may serve several populations: the same drawing of a heart is judged by one threshold in adults and by another
in newborns, so that a specialist of one must fail on the look-alikes of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mmedexpert.guidelines import Guideline, guidelines
from mmedexpert.sources.phantom import draw

Range = tuple[float, float]


@dataclass(frozen=True)
class Family:
    """One kind of picture with one measurement.

    `ranges[guideline][level]` are the values drawn for each label, away from the cuts; `lookalike` is the range in
    which two populations disagree; `patterns` are what each label looks like at a glance; `distractors` are labels of
    the same modality that no phantom shows.
    """

    modality: str
    body_system: str
    paint: Callable[[float, np.random.Generator], Image.Image]
    decimals: int
    span: Range
    ranges: dict[str, tuple[Range, ...]]
    patterns: tuple[str, ...]
    distractors: tuple[str, ...]
    lookalike: tuple[Range, ...] = ()

    def text(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"


FAMILIES: dict[str, Family] = {
    "heart": Family(
        "chest radiograph",
        "cardiovascular",
        draw.chest_heart,
        2,
        (0.34, 0.78),
        {"ctr_adult": ((0.36, 0.47), (0.53, 0.72)), "ctr_newborn": ((0.42, 0.57), (0.63, 0.76))},
        ("slim heart shadow", "wide heart shadow"),
        ("dextrocardia", "pericarditis", "myxoma"),
        ((0.53, 0.57),),
    ),
    "ecg": Family(
        "ECG strip",
        "cardiovascular",
        draw.ecg_strip,
        0,
        (36, 210),
        {"heart_rate_adult": ((36, 54), (66, 94), (108, 180)), "heart_rate_infant": ((50, 92), (108, 148), (174, 210))},
        ("widely spaced beats", "evenly spaced beats", "crowded beats"),
        ("fibrillation", "asystole", "flutter"),
        ((66, 92), (108, 148)),
    ),
    "pleura": Family(
        "lung radiograph",
        "respiratory",
        draw.chest_rim,
        1,
        (0.6, 4.4),
        {"pneumothorax_adult": ((0.6, 1.7), (2.3, 4.4))},
        ("narrow dark rim", "broad dark rim"),
        ("effusion", "atelectasis", "empyema"),
    ),
    "head": Family(
        "head CT",
        "nervous",
        draw.head_shift,
        1,
        (0.4, 9.6),
        {"midline_shift": ((0.4, 3.5), (6.5, 9.6))},
        ("central septum", "displaced septum"),
        ("stenting", "shunting", "steroids"),
    ),
    "disc": Family(
        "fundus photograph",
        "eye",
        draw.fundus_disc,
        2,
        (0.22, 0.92),
        {"cup_disc": ((0.22, 0.56), (0.64, 0.90))},
        ("small pale cup", "large pale cup"),
        ("detachment", "drusen", "neuritis"),
    ),
    "nodule": Family(
        "chest CT",
        "respiratory",
        draw.ct_nodule,
        1,
        (2.8, 9.9),
        {"lung_nodule": ((2.8, 5.0), (6.3, 7.7), (9.0, 9.9))},
        ("tiny round nodule", "medium round nodule", "big round nodule"),
        ("bronchoscopy", "radiotherapy", "antibiotics"),
    ),
    "aorta": Family(
        "abdominal ultrasound",
        "cardiovascular",
        draw.aorta_section,
        1,
        (1.6, 7.6),
        {"aortic_diameter": ((1.6, 2.7), (3.3, 5.1), (5.9, 7.6))},
        ("narrow dark lumen", "widened dark lumen", "huge dark lumen"),
        ("dissection", "thrombosis", "embolism"),
    ),
}

SPECIALTIES_OF: dict[str, tuple[str, ...]] = {
    "ctr_adult": ("adult_medicine", "cardiology"),
    "heart_rate_adult": ("adult_medicine", "cardiology"),
    "pneumothorax_adult": ("adult_medicine",),
    "ctr_newborn": ("pediatrics",),
    "heart_rate_infant": ("pediatrics",),
    "midline_shift": ("brain_sensory",),
    "cup_disc": ("brain_sensory",),
    "lung_nodule": ("oncology_surgery",),
    "aortic_diameter": ("oncology_surgery",),
}


def family_of(guideline: str) -> Family:
    """The family a guideline judges; KeyError when no phantom shows it."""
    return next(family for family in FAMILIES.values() if guideline in family.ranges)


def draw_value(family: Family, guideline: Guideline, level: int, rng: np.random.Generator) -> float:
    """A value of the wanted label; where populations disagree, half of them come from the look-alike range. # ours"""
    low, high = family.ranges[guideline.id][level]
    shared = [span for span in family.lookalike if low <= span[0] and span[1] <= high]
    if shared and rng.random() < 0.5:
        low, high = shared[rng.integers(len(shared))]
    return round(float(rng.uniform(low, high)), family.decimals)


def rules_of(specialty: str) -> list[Guideline]:
    """The guidelines of a specialty, in file order."""
    return [guidelines()[key] for key, names in SPECIALTIES_OF.items() if specialty in names]
