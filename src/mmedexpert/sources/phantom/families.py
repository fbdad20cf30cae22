"""Finding families: what is drawn, which guidelines judge it, and the words the traces use. # ours

A family may serve several populations: the same drawing of a heart is judged by one threshold in adults and by another
in newborns, and its look means one thing in the ones and the contrary in the others, so that a specialist of one must
fail on the look-alikes of the other.
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
    """One kind of picture: a measurement, a sign that is there or not, and one of two looks.

    `near` and `far` are how far from a cut values are drawn, the weak and the strong findings; `sign_at` is a place in
    pixels that nothing else is drawn at; `rival` is the diagnosis that the sign turns the first one into; `looks` are
    brighter above and brighter below; `unmeasurable` is why a picture shows its look alone; `distractors` are labels of
    the same modality that no phantom shows.
    """

    modality: str
    body_system: str
    paint: Callable[[float, np.random.Generator], Image.Image]
    decimals: int
    span: Range
    near: Range
    far: Range
    looks: tuple[str, str]
    sign: str
    sign_at: tuple[int, int]
    rival: str
    unmeasurable: str
    distractors: tuple[str, str]
    noise: float = 6.0

    def text(self, value: float) -> str:
        return f"{value:.{self.decimals}f}"

    @property
    def weak(self) -> float:
        """The distance from a cut up to which a finding is weak: halfway between near and far."""
        return (self.near[1] + self.far[0]) / 2


FAMILIES: dict[str, Family] = {
    "heart": Family(
        "chest radiograph", "cardiovascular", draw.chest_heart, 2, (0.34, 0.78), (0.03, 0.07), (0.12, 0.16),
        ("bright lung apices", "hazy lung bases"), "calcified heart border", (12, 12), "pericarditis", "oblique film",
        ("dextrocardia", "myxoma"),
    ),
    "ecg": Family(
        "ECG strip", "cardiovascular", draw.ecg_strip, 0, (36, 210), (8, 14), (22, 24),
        ("bright atrial tracing", "bright ventricular tracing"), "sawtooth wave mark", (56, 100), "flutter",
        "unknown paper speed",
        ("fibrillation", "asystole"), 4.0,
    ),
    "pleura": Family(
        "lung radiograph", "respiratory", draw.chest_rim, 1, (0.6, 4.4), (0.3, 0.6), (1.1, 1.4),
        ("bright lung apex", "hazy lung sulcus"), "basal fluid pocket", (36, 24), "empyema", "supine film",
        ("effusion", "atelectasis"),
    ),
    "head": Family(
        "head CT", "nervous", draw.head_shift, 1, (0.4, 9.6), (1.2, 2.0), (3.6, 4.6),
        ("bright skull vertex", "bright skull floor"), "enhancing cortical focus", (18, 56), "steroids", "tilted scan",
        ("stenting", "shunting"),
    ),
    "disc": Family(
        "fundus photograph", "eye", draw.fundus_disc, 2, (0.22, 0.92), (0.04, 0.08), (0.20, 0.30),
        ("pale superior rim", "pale inferior rim"), "splinter rim bleed", (12, 12), "neuritis", "oblique view",
        ("detachment", "drusen"),
    ),
    "nodule": Family(
        "chest CT", "respiratory", draw.ct_nodule, 1, (2.8, 9.9), (0.4, 0.7), (1.3, 1.7),
        ("hazy ventral lung", "hazy dorsal lung"), "subpleural air pocket", (12, 12), "antibiotics", "no scale",
        ("bronchoscopy", "radiotherapy"),
    ),
    "aorta": Family(
        "abdominal ultrasound", "cardiovascular", draw.aorta_section, 1, (1.6, 7.6), (0.4, 0.6), (1.1, 1.4),
        ("bright near wall", "bright far wall"), "mobile flap echo", (11, 11), "dissection", "no scale",
        ("thrombosis", "embolism"), 14.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Practice:
    """What the specialists of a guideline know beside its cuts: whose question it is, which of its labels is the common
    one, and whether a picture brighter below stands for the upper label of a pair."""

    family: str
    specialties: tuple[str, ...]
    common: int = 0
    brighter_below: bool = True


PRACTICES: dict[str, Practice] = {
    "ctr_adult": Practice("heart", ("adult_medicine", "cardiology")),
    "heart_rate_adult": Practice("ecg", ("adult_medicine", "cardiology"), common=1),
    "pneumothorax_adult": Practice("pleura", ("adult_medicine",)),
    "ctr_newborn": Practice("heart", ("pediatrics",), brighter_below=False),
    "heart_rate_infant": Practice("ecg", ("pediatrics",), common=1, brighter_below=False),
    "midline_shift": Practice("head", ("brain_sensory",)),
    "cup_disc": Practice("disc", ("brain_sensory",)),
    "lung_nodule": Practice("nodule", ("oncology_surgery",)),
    "aortic_diameter": Practice("aorta", ("oncology_surgery",)),
}


def family_of(guideline: str) -> Family:
    """The family a guideline judges; KeyError when no phantom shows it."""
    return FAMILIES[PRACTICES[guideline].family]


def rules_of(specialty: str) -> list[Guideline]:
    """The guidelines of a specialty, in file order."""
    return [guidelines()[key] for key, practice in PRACTICES.items() if specialty in practice.specialties]
