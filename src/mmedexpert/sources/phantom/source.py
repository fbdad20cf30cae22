"""`data=phantom`: drawn images with exact ground truth, guideline answers, traces in all four perspectives. # ours"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmedexpert.data.record import SPLITS, Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.sources.phantom.cases import draw_case
from mmedexpert.sources.phantom.families import PRACTICES, rules_of
from mmedexpert.sources.phantom.text import letter_of, options, question, trace

# Raised, and the test images so drawn anew, whenever a default was chosen with their scores in view.
TEST_DRAW = 2
TOP = ("adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery")  # the paper's four


def phantom(
    root: Path | None, out_dir: Path, *, seed: int, train: int, val: int, test: int
) -> tuple[list[Record], Path, list[tuple[str, str]]]:
    """Draw `train`, `val` and `test` images per specialty into `out_dir`/images, one question each; no image is reused.

    Within each split guidelines, what questions need (`groups.needs`) and the perspectives of the traces cycle; the
    rest is drawn at random. `root` is not used.
    """
    records: list[Record] = []
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for place, specialty in enumerate(TOP):
        rules = rules_of(specialty)
        for split, count in zip(SPLITS, (train, val, test), strict=True):
            rng = np.random.default_rng([seed, place, SPLITS.index(split), *([TEST_DRAW] if split == "test" else [])])
            for index in range(count):
                rule = rules[index % len(rules)]
                needs = PERSPECTIVES[index // len(rules) % 4]
                perspective = PERSPECTIVES[index // len(rules) // 4 % 4]
                case = draw_case(rule, needs, rng)
                identity = f"{specialty}-{split}-{index:04d}"
                path = f"images/{identity}.png"
                case.paint(rng).save(out_dir / path, compress_level=1)
                choices = options(case, rng)
                records.append(
                    Record(
                        id=identity,
                        images=(path,),
                        question=question(case, rng),
                        options=choices,
                        answer=letter_of(choices, case.gold),
                        specialties=PRACTICES[rule.id].specialties,
                        source="phantom",
                        license="Apache-2.0",
                        split=split,
                        image_group=identity,
                        modality=case.family.modality,
                        body_system=case.family.body_system,
                        trace=trace(case, choices, perspective),
                        latent={
                            "guideline": rule.id, "value": case.value, "population": rule.population,
                            "decisive": needs == "analytical",
                        },
                        groups={"needs": needs},
                    )
                )  # fmt: skip
    return records, out_dir, []
