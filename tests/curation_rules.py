"""What the steps of the funnel make of invented records: reference outputs for test_versions.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import test_decontaminate as asked
import test_duplicates as copies
import test_structure as sound
from asking_rules import ASKING, found, told
from reading_rules import PAIR, READING, image
from releasing import draft, written

from mmedexpert.curation import balance, decontaminate, duplicates, release
from mmedexpert.curation import structure as structures
from mmedexpert.curation.steps import run_step
from mmedexpert.data import specialties
from mmedexpert.data.record import Trace
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.runtime.versions import digest


def duplicate(folder: Path) -> Any:
    """Copies, contradictions, near images and near questions on both sides of each threshold."""
    four = {"A": "oedema", "B": "mass", "C": "effusion", "D": "none of these"}
    words = copies.LONG.split()
    one, far = copies.picture(1), copies.picture(9)

    def near(bits: int) -> dict[str, Any]:
        return copies.picture(100 + bits, copies.flipped(one["phash"], bits))

    def swapped(*places: int) -> str:
        return " ".join("zeta" if place in places else word for place, word in enumerate(words))

    records = [
        copies.record("b", "Is it normal?", "yes", [one]), copies.record("a", "Is it normal ?", "Yes.", [one]),
        copies.record("a", "Which plane?", "axial", [one]), copies.record("c", "Which plane?", "axial", [far]),
        copies.record("d", "What is it?", "a mass", [one], source="t"),
        copies.record("e", "What is it?", "mass", [one]),
        copies.record("f", "Where is it?", "left", [far]), copies.record("g", "Where is it?", "right", [far]),
        *(copies.record(f"n{bits}", copies.LONG, "oedema", [near(bits)]) for bits in (0, 6, 8, 10, 16)),
        copies.record("flat", copies.LONG, "oedema", [copies.picture(3, one["phash"], 1.0)]),
        *(copies.record(f"w{n}", swapped(*range(2, 2 + 6 * n, 6)), "oedema", [one]) for n in (1, 2, 3)),
        copies.record("plural", copies.LONG.replace("fever", "fevers").replace("cough", "coughs"), "oedema", [one]),
        copies.record("left", copies.LONG.replace("fever", "left"), "oedema", [one]),
        copies.record("digit", copies.LONG.replace("fever", "3"), "oedema", [one]),
        copies.record("text", copies.LONG, "A", options=four), copies.record("again", copies.LONG, "A", options=four),
        copies.record("more", copies.LONG, "A", options={**four, "D": "mass of the lung"}),
        copies.record("pair", "Are they alike?", "yes", [one, far]),
    ]  # fmt: skip
    given = copies.kept_in(folder / "in", records)
    kept = run_step("duplicates", duplicates.duplicates, given, folder / "out")
    by_t = told(duplicates.duplicates(given, sources=("t", "s")))
    return [told(duplicates.duplicates(given), "image_group"), by_t, duplicates.report(kept)]


def decontaminated(folder: Path) -> Any:
    """Images, passages and near questions of two benchmarks, on both sides of each threshold."""
    case = asked.CASE.split()
    options = {"A": "lead", "B": "zinc"}
    phrases = [asked.record(f"p{n}", f"Case {n} of nine. {asked.PHRASES}") for n in range(5)]
    bench = [asked.record("t1", "Is it normal?", [asked.picture(1)]), asked.record("t2", asked.CASE, options=options),
             asked.record("t3", "Which metal should be looked for first?", options=options), *phrases]  # fmt: skip
    known = decontaminate.Benchmarks([("bench", bench, None), ("other", bench[:2], folder / "no images")])
    filler = [f"word{n}" for n in range(60)]
    records = [
        *(asked.record(f"i{flip}", "Which plane is this?", [asked.picture(1, flip)]) for flip in (0, 6, 8, 10)),
        asked.record("flat", "Is it normal?", [asked.picture(1, 2, grey_std=1.0)]),
        asked.record("second", "Why?", [asked.picture(5), asked.picture(1, 4)]), asked.record("short", "Is it normal?"),
        *(asked.record(f"cut{n}", " ".join(case[:n] + filler[: len(case) - n])) for n in (8, 20, 22, 30, 50)),
        *(asked.record(f"each{n}", " ".join("zeta" if i % n == 3 else w for i, w in enumerate(case))) for n in (7, 14)),
        asked.record("phrase", f"Another patient coughs. {asked.PHRASES}"), asked.record("p", phrases[0].question),
        asked.record("like", phrases[0].question.replace("nine", "many"), [asked.picture(4)]),
        *(asked.record(f"m{n}", " ".join(case[-n:]), [asked.picture(4)]) for n in (15, 16, 24)),
        asked.record("same", "Which metal should be looked for first?", options=options),
        asked.record("more", "Which metal should be looked for first?", options={"A": "lead", "B": "tin"}),
        asked.record("image", "Which metal should be looked for first?", [asked.picture(4)], options),
    ]  # fmt: skip
    given = copies.kept_in(folder, records)
    return [told(decontaminate.decontaminate(given, benchmarks=known)), known.report()]


def structured(folder: Path) -> Any:
    """What is no question, what answers itself, and in which order options end."""
    record, four = sound.record, sound.FOUR
    long = " ".join(["He was well."] * 12)
    records = [
        record(question=" "), record(options={**four, "C": " "}), record(options={"A": "Mass"}), record(answer="E"),
        record(options=None, answer="B"), record(options=None, answer="mass"), record(provenance={}),
        *(record(provenance={"images": [sound.picture(grey)]}) for grey in (1.9, 2.0)),
        *(record(options={**four, "D": text}) for text in ("pneumonia.", "Pneumonia", "-Pneumonia", "Pneu-monia")),
        record(options={**four, "A": "T-cell mass", "B": "T cell mass"}), record(options={**four, "A": "1", "B": "-1"}),
        record("Is a pneumonia seen?"), record("Is it pneumonia or oedema?"),
        record("Is T2 shown?", {"A": "T2", "B": "T1"}),
        record(f"{long} A pneumonia follows. What is it?"), record(f"{long} Which pneumonia is it?"),
        record("Is it normal?", {"A": "normal", "B": "abnormal"}), record("Is it a mass? A) mass B) cyst", PAIR, "B"),
        record(options={**four, "D": "None of the above"}), record(options={"A": "1 cm", "B": "2 cm", "C": "3 cm"}),
        record(options={**four, "C": "A and B"}), record("See option A: what is it?"),
        record(options={**four, "D": "2"}),
        record(trace=Trace("analytical", ("So A.",))),
        *(record(id=f"s{n}", answer="ABCD"[n % 4]) for n in range(8)),
    ]  # fmt: skip
    given = copies.kept_in(folder / "in", [replace(one, id=f"{n}-{one.id}") for n, one in enumerate(records)])
    step = partial(structures.structure, shuffle_options=True)
    kept = run_step("structure", step, given, folder / "out")
    rows = told(structures.structure(given)), found(step(given), "options", "answer")
    return [*rows, structures.report(given, kept)]


QUESTIONS: list[tuple[str, dict[str, str] | None, str, dict[str, Any]]] = [
    ("A 7-year-old boy limps. What does the film show?", {"A": "Perthes disease", "B": "Sprain"}, "A", {}),
    ("A 54-year-old man has chest pain. What is next?", {"A": "Coronary angiography", "B": "Rest"}, "A", {}),
    ("A 40-year-old woman has a headache and papilledema. What is seen?", None, "a glioblastoma", {}),
    ("A mother brings her 3-week-old son, who vomits. What is it?", {"A": "Pyloric stenosis", "B": "Reflux"}, "A", {}),
    ("A 60-year-old smoker has a lung mass. Which stage of carcinoma is it?", None, "T2", {}),
    ("A 30-year-old denies headache and vertigo. His mother had a stroke. What fits?", None, "anemia", {}),
    ("Which finding is shown in this fundus photograph?", None, "diabetic retinopathy", {"modality": "Fundus"}),
    ("What is shown?", {"A": "Pneumonia", "B": "Normal"}, "A", {"dataset": "Chest X-Ray PA"}),
    ("What is shown?", None, "a fracture of the femur", {"patient_age": "006Y"}),
    ("What is shown?", None, "cirrhosis", {"body_system": "Nervous", "medical_task": "Treatment"}),
    ("A 25-year-old at 30 weeks of gestation bleeds.\nAnswer Choices: (A) Abruption (B) Tumour", None, "Abruption", {}),
    ("His medical history includes a craniotomy. Now he coughs. What is it?", None, "tuberculosis", {}),
    ("Which drug treats gout?", None, "allopurinol", {}),
    ("A 70-year-old needs surgery for a torn meniscus. Which operation?", None, "arthroscopy", {}),
]  # fmt: skip


def specialty_rules(_: Path) -> Any:
    return [
        [one.as_dict() for one in specialties.labels(question=question, options=options, answer=answer, metadata=about)]
        for question, options, answer, about in QUESTIONS
    ]


def chosen(folder: Path) -> Any:
    """Who is kept under quotas and caps, in which split, and the counts of all."""
    perspectives = [*PERSPECTIVES, None]
    records = [
        draft(
            f"r{n}", ("pediatrics", "brain_sensory", "adult_medicine")[n % 7 % 3], perspectives[n % 5],
            image=f"{n // 6}.png", kind="choice" if n % 2 else "yes_no", modality=("CT", "MRI", "")[n % 4 % 3],
        )
        for n in range(60)
    ]  # fmt: skip
    records[4:50:9] = [replace(one, provenance={**one.provenance, "source": "rest"}) for one in records[4:50:9]]
    given = written(records, folder / "in")
    kept = run_step("balance", partial(balance.balance, target=32), given, folder / "out")
    weights = {"pediatrics": 2.0, "brain_sensory": 1.0}
    other = balance.balance(
        given, target=12, specialty=weights, perspective=dict.fromkeys(PERSPECTIVES, 1.0), fill=("rest",), seed=1,
        per_image=2, modality=0.3, kind={"yes_no": 0.5},
    )  # fmt: skip
    shares = {"pediatrics": 3.0, "brain_sensory": 1.0, "adult_medicine": 1.0}
    turns = dict.fromkeys(PERSPECTIVES, 1.0) | {"differential": 3.0}
    free = balance.balance(given, target=13, specialty=shares, perspective=turns, modality=1.0, kind={}, per_image=60)
    parted = [told(balance.split(kept, seed=seed), "split", "image_group") for seed in (0, 1)]
    chosen_freely = [v.record.id for v in free if not v.reason]
    rows = [told(balance.balance(given, target=32)), told(other), chosen_freely, parted]
    return [*rows, balance.make_up(given), balance.quotas(10, {"a": 1.0, "b": 1.0, "c": 2.5})]


def released(folder: Path) -> Any:
    """Columns, rows and the order of a release, and what is told of it; one row in full."""
    images, records = folder / "images", []
    images.mkdir()
    for n in range(12):
        one = draft(f"r{n}", "pediatrics", (*PERSPECTIVES, None)[n % 5], kind=("choice", "yes_no")[n % 5 == 3],
                    split=("train", "val", "test")[n % 7 % 3], redistribute=n % 4 != 1)  # fmt: skip
        (images / f"{n}.png").write_bytes(image(n))
        records.append(replace(one, images=(f"{n}.png",), image_group=f"g{n}"))
    summary = release.release(written(records, folder / "in", images), folder / "set", shard_bytes=30)
    files = [path for split in ("train", "val", "test") for path in sorted((folder / "set/data").glob(f"{split}-*"))]
    tables = [pq.read_table(path) for path in files]
    columns = [[field.name, str(field.type)] for field in tables[0].schema]
    rows = [
        [path.name, digest(as_text(row))] for path, one in zip(files, tables, strict=True) for row in one.to_pylist()
    ]
    about = {name: part for name, part in summary.items() if name != "files"}
    return [columns, as_text(tables[0].to_pylist()[0]), rows, about, sorted(summary["files"])]


def as_text(value: Any) -> Any:
    """A row with its images as hex digits."""
    if isinstance(value, dict):
        return {key: as_text(one) for key, one in value.items()}
    if isinstance(value, list):
        return [as_text(one) for one in value]
    return value.hex() if isinstance(value, bytes) else value


CURATION: dict[str, Callable[[Path], Any]] = {
    **READING,
    **ASKING,
    "duplicates": duplicate,
    "decontaminate": decontaminated,
    "structure": structured,
    "specialties": specialty_rules,
    "balance": chosen,
    "release": released,
}
