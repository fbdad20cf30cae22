"""`data=phantom`: drawn images with exact ground truth, guideline answers, traces in all four perspectives. # ours"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmedexpert.data.record import SPLITS, Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.sources.phantom.families import SPECIALTIES_OF, draw_value, family_of, rules_of
from mmedexpert.sources.phantom.text import options, question, trace

# Raised, and the test images so drawn anew, whenever a default was chosen with their scores in view.
TEST_DRAW = 1
TOP = ("adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery")  # the paper's four


def phantom(
    root: Path | None, out_dir: Path, *, seed: int, train: int, val: int, test: int
) -> tuple[list[Record], Path, list[tuple[str, str]]]:
    """Draw `train`, `val` and `test` images per specialty into `out_dir`/images, one question each; no image is reused.

    Within each split guidelines and perspectives cycle; labels are drawn at random. `root` is not used.
    """
    records: list[Record] = []
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for place, specialty in enumerate(TOP):
        rules = rules_of(specialty)
        for split, count in zip(SPLITS, (train, val, test), strict=True):
            rng = np.random.default_rng([seed, place, SPLITS.index(split), *([TEST_DRAW] if split == "test" else [])])
            for index in range(count):
                rule = rules[index % len(rules)]
                perspective = PERSPECTIVES[index // len(rules) % len(PERSPECTIVES)]
                level = int(rng.integers(len(rule.labels)))
                family = family_of(rule.id)
                value = draw_value(family, rule, level, rng)
                identity = f"{specialty}-{split}-{index:04d}"
                path = f"images/{identity}.png"
                family.paint(value, rng).save(out_dir / path, compress_level=1)
                choices, letter = options(family, rule.labels, rule.labels[level], rng)
                records.append(
                    Record(
                        id=identity,
                        images=(path,),
                        question=question(family, rule, rng),
                        options=choices,
                        answer=letter,
                        specialties=SPECIALTIES_OF[rule.id],
                        source="phantom",
                        license="Apache-2.0",
                        split=split,
                        image_group=identity,
                        modality=family.modality,
                        body_system=family.body_system,
                        trace=trace(family, rule, value, letter, perspective, rng),
                        latent={"guideline": rule.id, "value": value, "population": rule.population},
                    )
                )
    return records, out_dir, []
