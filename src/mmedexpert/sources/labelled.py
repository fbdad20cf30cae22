"""Four-option questions from labelled image folders, as OmniMedVQA's authors made theirs from classification sets."""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmedexpert.data.images import ONE_COLOUR, changes, check_shape
from mmedexpert.data.record import Record
from mmedexpert.data.splits import FRACTIONS, assign_splits, join_groups
from mmedexpert.data.table import fold, patients, read_table
from mmedexpert.data.validation import Bad, LeftOut
from mmedexpert.errors import UserError
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.progress import track
from mmedexpert.sources.dicom import numbered, open_picture, patient_of
from mmedexpert.sources.labels import Labels, read_labels

LABELS, DESCRIPTION = "labels.csv", "dataset.yaml"
KNOWN_SETS = Path(__file__).with_name("labelled.yaml")
LETTERS = "ABCD"  # peers: OmniMedVQA asks with two to four options; ours: always four
MAX_SIDE = 448  # ours: 16 x 16 visual tokens of a Qwen2.5-VL
# ours: an age in a cell is in years, or in months as DICOM ("018M") and people write it
AGE = re.compile(r"0*(\d{1,3}(?:\.\d+)?)\s*(y|m|years?|months?|yrs?|mos?)?(?:\s+old)?", re.IGNORECASE)
SEXES = {"male": "male", "m": "male", "female": "female", "f": "female"}
QUESTIONS = (  # ours
    "What does this medical image of {patient} show?",
    "Which of the following fits this medical image of {patient}?",
    "Which option describes this medical image of {patient} best?",
)


@dataclass(frozen=True)
class LabelSet:
    """What a labelled folder shows and how to ask about it; the keys are explained in `labelled.yaml`."""

    specialties: Sequence[str]
    modality: str = ""
    body_system: str = ""
    license: str = "not stated"
    person: str = "patient"
    label_column: str = "label"
    labels: dict[str, str] = field(default_factory=dict)
    distractors: Sequence[str] = ()
    questions: Sequence[str] = QUESTIONS
    crop: Sequence[float] = (0.0, 0.0, 1.0, 1.0)
    patient_pattern: str = ""
    also_column: str = ""
    also_patterns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """One distinct image of a set: its prepared copy, what is true of it and the keys (content, patient) that group
    it."""

    set_name: str
    about: LabelSet
    image: str
    true: tuple[str, ...]
    labels: Labels
    cells: dict[str, str]
    keys: tuple[str, ...]


def labelled_images(
    root: Path,
    out_dir: Path,
    *,
    seed: int,
    questions_per_image: int = 1,
    fractions: tuple[float, float, float] = FRACTIONS,
    max_side: int = MAX_SIDE,
) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`out_dir`) and bad (id, reason) from `root`: a folder with `labels.csv`, or of such folders,
    of image files or DICOM.

    Peers: OmniMedVQA's recipe (arXiv 2402.09181), gold label + three others of the set, shuffled. A cropped copy of
    each image, longest side at most `max_side`, goes to `out_dir/images` named by content, so no path holds a label.
    Files of equal bytes are one image; patients (or lesions) and images never cross splits. Labels that differ by case
    or underscores alone are one class. Of several findings in a cell one is asked, and no other that is true of the
    image is offered. What was folded, split or scaled is counted in `changed` of what is left out. Raises UserError for
    a folder without `labels.csv`, without description, or with fewer than four options to choose from.
    """
    pictures: list[Picture] = []
    bad = LeftOut()
    for folder in _folders(root):
        found, wrong = _read_set(folder, out_dir, max_side, bad.changed)
        pictures += found
        bad += wrong
    groups = join_groups([picture.keys for picture in pictures])
    strata = [f"{picture.set_name}/{picture.true[0]}" for picture in pictures]
    splits = assign_splits(groups, fractions=fractions, seed=seed, strata=strata)
    records = []
    for picture, group, split in zip(pictures, groups, splits, strict=True):
        for number in range(questions_per_image):
            name = f"{picture.set_name}-{Path(picture.image).stem}-{number}"
            try:
                records.append(_ask(picture, name, group, split, number, seed))
            except ValueError as error:
                bad.append((name, str(error)))
    return records, out_dir, bad


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise UserError(f"data root {root} is not a folder: give the folder that holds {LABELS} or one folder per set")
    if (root / LABELS).is_file():
        return [root]
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"data root {root} holds neither {LABELS} nor folders: put one folder per image set there")
    for folder in folders:
        if not (folder / LABELS).is_file():
            raise UserError(f"{folder} has no {LABELS}: add one with columns file,label, or move the folder away")
    return folders


def _describe(folder: Path) -> LabelSet:
    own = folder / DESCRIPTION
    try:
        known = _yaml(KNOWN_SETS)
        data = _yaml(own) if own.is_file() else known.get(folder.resolve().name)
        if not data:
            names = ", ".join(known)
            example = "specialties: [adult_medicine]"
            raise UserError(f"{folder} is none of the known sets ({names}): write `{example}` (or another) to {own}")
        about = LabelSet(**data)
        listed = (about.specialties, about.distractors, about.questions, about.crop)
        if not all(isinstance(value, list | tuple) for value in listed):
            raise TypeError("specialties, distractors, questions and crop are lists")
        if not all(isinstance(value, dict) for value in (about.labels, about.also_patterns)):
            raise TypeError("labels and also_patterns map a label to a text")
        about = replace(about, crop=[float(edge) for edge in about.crop])
        left, top, right, bottom = about.crop
        if not (about.specialties and about.questions and 0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise ValueError("needs a specialty, a question, and a crop of rising fractions between 0 and 1")
        for pattern in (about.patient_pattern, *about.also_patterns.values()):
            compiled = re.compile(pattern)
            if pattern == about.patient_pattern and pattern and not compiled.groups:
                raise ValueError("patient_pattern needs a group (in brackets): the patient")
    except (yaml.YAMLError, TypeError, ValueError, re.error) as error:
        keys = ", ".join(f.name for f in fields(LabelSet))
        raise UserError(f"{own}: {' '.join(str(error).split())}; its keys are {keys}") from error
    return about


def _yaml(path: Path) -> Any:
    # BaseLoader keeps every scalar a text: a label `no` or `0` must stay what labels.csv says, not become False or 0
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def _read_set(folder: Path, out_dir: Path, max_side: int, changed: Counter[str]) -> tuple[list[Picture], Bad]:
    about, name = _describe(folder), folder.resolve().name
    column = about.label_column.lower()
    rows, torn = read_table(folder / LABELS, ("file", column))
    bad: Bad = [(f"{name}/{LABELS} line {line}", reason) for line, reason in torn]
    labels = read_labels([(row[column], row.get("label_text", "")) for row in rows], about.labels, about.also_patterns)
    if strange := [label for label in about.also_patterns if not labels.classes[label]]:
        raise UserError(f"{folder / DESCRIPTION}: also_patterns has {', '.join(strange)}, which is no label of the set")
    if len({fold(text) for text in (*labels.texts.values(), *about.distractors)}) < len(LETTERS):
        fix = f"add distractors: [...] to {folder / DESCRIPTION}"
        raise UserError(f"{folder} has fewer than {len(LETTERS)} labels ({', '.join(labels.texts.values())}): {fix}")
    named = numbered([patient_of([folder / row["file"]]) for row in rows])  # of DICOM files
    whose = [_patient(row["file"], about) or who for row, who in zip(rows, named, strict=True)]
    people = patients(rows, whose, changed)

    same: dict[str, list[tuple[int, str]]] = {}  # content hash -> its rows, each with the prepared copy
    for number, row in enumerate(track(rows, f"preparing {name}")):
        file, cell = row["file"], row[column]
        try:
            if not labels.classes[cell]:
                known = ", ".join(labels.texts)
                raise UserError(f"label {cell!r} of {folder / file} is none of {known}: mend it or drop the row")
            digest, copy, told = _prepare(folder, file, about.crop, out_dir, max_side)
            if digest not in same:
                changed.update(f"images: {one}" for one in told)
            same.setdefault(digest, []).append((number, copy))
        except UserError as error:
            bad.append((f"{name}/{file}", str(error)))

    pictures = []
    for digest, twins in same.items():
        cells = [rows[number][column] for number, _ in twins]
        true = {frozenset(labels.classes[cell]) for cell in cells}
        if len(true) > 1:
            reason = f"the same image is labelled {' and '.join(sorted(set(cells)))} in {folder / LABELS}"
            bad += [(f"{name}/{rows[number]['file']}", reason) for number, _ in twins]
            continue
        if any(map(labels.folded, cells)):
            changed["labels: another spelling, folded"] += 1
        if len(labels.classes[cells[0]]) > 1:
            changed["labels: several findings, one of them asked"] += 1
        if len(twins) > 1:
            changed["rows: an equal file, asked once"] += len(twins) - 1
        number, copy = twins[0]
        keys = sorted({f"{name}:{key}" for twin, _ in twins for key in people[twin]})
        found = labels.classes[cells[0]]
        pictures.append(Picture(name, about, copy, found, labels, rows[number], (f"image:{digest[:24]}", *keys)))
    return pictures, bad


def _prepare(
    folder: Path, file: str, crop: Sequence[float], out_dir: Path, max_side: int
) -> tuple[str, str, tuple[str, ...]]:
    """Write the cropped, size-limited copy of one image: content hash, path under `out_dir`, and its `changes`."""
    inside = PurePosixPath(file)
    if not file or inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"file {file!r} in {folder / LABELS} must be a path inside the folder")
    path = folder / file
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"image {path} of {LABELS} cannot be read ({error}): restore it or drop its row") from error
    name = f"images/{hashlib.sha256(f'{digest} {list(crop)} {max_side}'.encode()).hexdigest()[:24]}.png"
    picture = open_picture(path)
    told = tuple(one for one in changes(picture) if one != ONE_COLOUR)  # that the copy will tell
    width, height = picture.size
    left, top, right, bottom = crop
    picture = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    if 0 not in picture.size:
        picture.thumbnail((max_side, max_side))
    check_shape(picture, f"{path}, cropped,")
    target = out_dir / name
    if not target.is_file():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)  # a third of the time of the default, a tenth larger
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, buffer.getvalue())
    return digest, name, told


def _patient(file: str, about: LabelSet) -> str:
    match = re.search(about.patient_pattern, PurePosixPath(file).name) if about.patient_pattern else None
    return (match[1] or "") if match else ""


def _ask(picture: Picture, name: str, group: str, split: str, number: int, seed: int) -> Record:
    about, labels, rng = picture.about, picture.labels, random.Random(f"{seed}:{name}")
    asked = picture.true[number % len(picture.true)]
    gold = labels.texts[asked]
    also = picture.cells.get(about.also_column.lower(), "")
    patterns = about.also_patterns.items()
    named = [label for cell, p in patterns if re.search(p, also, re.IGNORECASE) for label in labels.classes[cell]]
    true_too = {*named, *picture.true, *(other for label in picture.true for other in labels.implied[label])}
    wrong = sorted({text for label, text in labels.texts.items() if label not in true_too})
    known = {fold(text) for text in labels.texts.values()}
    spare = sorted({fold(text): text for text in about.distractors if fold(text) not in known}.values())
    wanted = len(LETTERS) - 1
    if len(wrong) + len(spare) < wanted:
        raise ValueError(f"fewer than {len(LETTERS)} options are left for {picture.set_name}/{picture.cells['file']}")
    from_set = rng.sample(wrong, min(wanted, len(wrong)))  # the set's own labels first: they need the image to exclude
    chosen = [gold, *from_set, *rng.sample(spare, wanted - len(from_set))]
    rng.shuffle(chosen)
    first = random.Random(f"{seed}:{picture.image}").randrange(len(about.questions))
    question = about.questions[(first + number) % len(about.questions)]
    return Record(
        id=name,
        images=(picture.image,),
        question=question.replace("{patient}", _who(picture.cells, about.person)),
        options=dict(zip(LETTERS, chosen, strict=True)),
        answer=LETTERS[chosen.index(gold)],
        specialties=tuple(about.specialties),
        source=picture.set_name,
        license=about.license,
        split=split,
        image_group=group,
        modality=about.modality,
        body_system=about.body_system,
    )


def _who(cells: dict[str, str], person: str) -> str:
    """For example "a female adult aged 60", with what is known of sex and age; what cannot be read is not told."""
    sex = SEXES.get(cells.get("sex", "").lower(), "")
    words = f"{sex} {person}".strip()
    age = AGE.fullmatch(cells.get("age", ""))
    known = ""
    if age:
        # in completed years, or months; "0" is as often an unknown age as an infant's
        number, unit = int(float(age[1])), "" if (age[2] or "y").lower().startswith("y") else " months"
        known = f" aged {number}{unit}" if 1 <= number <= 120 else ""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{known}"
