"""Four-option questions from labelled image folders, as OmniMedVQA's authors made theirs from classification sets."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mmedexpert.data.images import open_image
from mmedexpert.data.record import Record
from mmedexpert.data.records_io import Bad, write_atomic
from mmedexpert.data.splits import FRACTIONS, assign_splits, join_groups
from mmedexpert.errors import UserError
from mmedexpert.progress import track

LABELS, DESCRIPTION = "labels.csv", "dataset.yaml"
KNOWN_SETS = Path(__file__).with_name("labelled.yaml")
LETTERS = "ABCD"  # peers: OmniMedVQA asks with two to four options; ours: always four
MAX_SIDE = 448  # ours: 16 x 16 visual tokens of a Qwen2.5-VL
PATIENT_COLUMNS = ("patient", "patient_id", "lesion_id")
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
    """One distinct image of a set: its prepared copy, its label and the keys (content, patient) that group it."""

    set_name: str
    about: LabelSet
    image: str
    label: str
    texts: dict[str, str]
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
    """Records, image root (`out_dir`) and bad (id, reason) from `root`: a folder with `labels.csv`, or of such folders.

    Peers: OmniMedVQA's recipe (arXiv 2402.09181), gold label + three others of the set, shuffled. A cropped copy of
    each image, longest side at most `max_side`, goes to `out_dir/images` named by content, so no path holds a label.
    Files of equal bytes are one image; patients (or lesions) and images never cross splits. Raises UserError for a
    folder without `labels.csv`, without description, or with fewer than four options to choose from.
    """
    pictures: list[Picture] = []
    bad: Bad = []
    for folder in _folders(root):
        found, wrong = _read_set(folder, out_dir, max_side)
        pictures += found
        bad += wrong
    groups = join_groups([picture.keys for picture in pictures])
    strata = [f"{picture.set_name}/{picture.label}" for picture in pictures]
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
            re.compile(pattern)
    except (yaml.YAMLError, TypeError, ValueError, re.error) as error:
        keys = ", ".join(f.name for f in fields(LabelSet))
        raise UserError(f"{own}: {' '.join(str(error).split())}; its keys are {keys}") from error
    return about


def _yaml(path: Path) -> Any:
    # BaseLoader keeps every scalar a text: a label `no` or `0` must stay what labels.csv says, not become False or 0
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def _read_set(folder: Path, out_dir: Path, max_side: int) -> tuple[list[Picture], Bad]:
    about, name = _describe(folder), folder.resolve().name
    rows = _read_rows(folder / LABELS, about.label_column)
    texts = about.labels or {row[about.label_column]: row.get("label_text") or row[about.label_column] for row in rows}
    texts = {label: text.replace("_", " ") for label, text in texts.items() if label}
    if len({*texts.values(), *about.distractors}) < len(LETTERS):
        fix = f"add distractors: [...] to {folder / DESCRIPTION}"
        raise UserError(f"{folder} has fewer than {len(LETTERS)} labels ({', '.join(texts.values())}): {fix}")

    bad: Bad = []
    same: dict[str, list[tuple[dict[str, str], str]]] = {}  # content hash -> its rows, each with the prepared copy
    for row in track(rows, f"preparing {name}"):
        file, label = row["file"], row[about.label_column]
        try:
            if label not in texts:
                raise UserError(f"label {label!r} of {folder / file} is none of {', '.join(texts)}")
            digest, copy = _prepare(folder, file, about.crop, out_dir, max_side)
            same.setdefault(digest, []).append((row, copy))
        except UserError as error:
            bad.append((f"{name}/{file}", str(error)))

    pictures = []
    for digest, twins in same.items():
        labels = {row[about.label_column] for row, _ in twins}
        if len(labels) > 1:
            reason = f"the same image is labelled {' and '.join(sorted(labels))} in {folder / LABELS}"
            bad += [(f"{name}/{row['file']}", reason) for row, _ in twins]
            continue
        row, copy = twins[0]
        patients = {f"{name}:{patient}" for twin, _ in twins if (patient := _patient(twin, about))}
        pictures.append(Picture(name, about, copy, labels.pop(), texts, row, (f"image:{digest[:24]}", *patients)))
    return pictures, bad


def _read_rows(path: Path, label_column: str) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error}): save it anew") from error
    rows = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in table]
    if not rows:
        raise UserError(f"{path} has no rows: list the images with columns file,{label_column}")
    if missing := {"file", label_column} - set(rows[0]):
        raise UserError(f"{path} lacks the column {', '.join(sorted(missing))}: it has {', '.join(rows[0])}")
    return rows


def _prepare(folder: Path, file: str, crop: Sequence[float], out_dir: Path, max_side: int) -> tuple[str, str]:
    """Write the cropped, size-limited copy of one image; returns the content hash and the path under `out_dir`."""
    inside = PurePosixPath(file)
    if not file or inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"file {file!r} in {folder / LABELS} must be a path inside the folder")
    path = folder / file
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"image {path} of {LABELS} cannot be read ({error}): restore it or drop its row") from error
    name = f"images/{hashlib.sha256(f'{digest} {list(crop)} {max_side}'.encode()).hexdigest()[:24]}.png"
    target = out_dir / name
    if not target.is_file():
        picture = open_image(path)
        width, height = picture.size
        left, top, right, bottom = crop
        picture = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
        picture.thumbnail((max_side, max_side))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=1)  # a third of the time of the default, a tenth larger
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, buffer.getvalue())
    return digest, name


def _patient(row: dict[str, str], about: LabelSet) -> str:
    if about.patient_pattern and (match := re.search(about.patient_pattern, PurePosixPath(row["file"]).name)):
        return match.group(1)
    return next((row[column] for column in PATIENT_COLUMNS if row.get(column)), "")


def _ask(picture: Picture, name: str, group: str, split: str, number: int, seed: int) -> Record:
    about, rng = picture.about, random.Random(f"{seed}:{name}")
    gold = picture.texts[picture.label]
    also = picture.cells.get(about.also_column, "")
    true_too = {label for label, pattern in about.also_patterns.items() if re.search(pattern, also, re.IGNORECASE)}
    wrong = sorted({text for label, text in picture.texts.items() if label not in true_too} - {gold})
    spare = sorted(set(about.distractors) - {gold, *wrong})
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
    """For example "a female adult aged 60", with what is known of sex and age."""
    sex = cells.get("sex", "").lower()
    words = f"{sex} {person}" if sex in ("male", "female") else person
    try:
        age = float(cells.get("age", ""))
    except ValueError:
        age = 0.0
    known = f" aged {age:.0f}" if 1 <= age <= 120 else ""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{known}"
