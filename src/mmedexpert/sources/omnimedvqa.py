"""OmniMedVQA (arXiv 2402.09181), open-access part: 89,195 questions in 42 files; also in Med-R1's schema."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.records import RECORDS
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.runtime.progress import track
from mmedexpert.sources.medr1 import KERMANY_PATIENT, LICENSES, gold_letter, parse_problem
from mmedexpert.sources.unpack import lettered, place_images, read_objects, unpack_images

NEEDED, NEEDED_MEDR1 = ("question", "gt_answer", "image_path"), ("image", "problem", "solution")
QUESTIONS = "QA_information/Open-access"
OPTION_KEYS = ("option_A", "option_B", "option_C", "option_D")
MEDR1_GROUPS = {"question_type": "question_type", "modality_type": "modality", "dataset": "dataset"}
SPLIT_IN_NAME = re.compile(r"(?:^|[/_. -])(train|val|test)(?=[/_. -])", re.IGNORECASE)


def load(root: Path, out_dir: Path, split: str = "test") -> tuple[list[Record], Path, Bad]:
    """Records, image root, bad (id, reason).

    Source: hub data set foreverbeliever/OmniMedVQA, as its zip or unpacked (`QA_information/Open-access/*.json` and
    `Images/`, in `root` or in a folder of it); else `root/records.jsonl` or the json and jsonl files of Med-R1 (arXiv
    2503.13939; keys image, problem, solution), of which those of `split` are read: by their key split, else by a folder
    or file name. The gold option is the last whose text is `gt_answer`, as in MedEvalKit.
    Raises UserError for a root without either, a file that is cut short, and a file of another schema.
    """
    if not root.is_dir():
        raise UserError(f"OmniMedVQA root {root} is not a folder: give the one that holds OmniMedVQA.zip or Images/")
    home = next((folder for folder in (root, *_subfolders(root)) if (folder / QUESTIONS).is_dir()), None)
    archives = sorted(root.glob("*.zip"))
    if home is None and archives:
        if unclear := unpack_images(archives, out_dir, _question_file):
            raise UserError(f"OmniMedVQA root {root}: several files are {min(unclear)}; get one sound archive")
        home = out_dir if (out_dir / QUESTIONS).is_dir() else None
    if home is None:
        return _load_medr1(root, out_dir, split, archives)

    drafts: list[Record] = []
    bad: Bad = []
    seen: Counter[str] = Counter()
    paths = sorted((home / QUESTIONS).glob("*.json"))
    if not paths:
        raise UserError(f"{home / QUESTIONS} holds no .json file: get the open-access part as published")
    for path in track(paths, "reading OmniMedVQA"):
        drafts += _read(path, bad, seen)
    folders = [home.relative_to(root).as_posix()] if home.is_relative_to(root) else ["."]
    records, image_root, missing = place_images(drafts, root, out_dir, folders=folders, archives=archives)
    return records, image_root, bad + missing


def _subfolders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir())


def _question_file(entry: str) -> str | None:
    folder, _, name = entry.rpartition("/")
    return f"{QUESTIONS}/{name}" if f"/{folder}".endswith(f"/{QUESTIONS}") and name.endswith(".json") else None


def _read(path: Path, bad: Bad, seen: Counter[str]) -> list[Record]:
    """The records of one file; what is wrong with the others is added to `bad`."""
    records = []
    for where, data in read_objects(path, NEEDED):
        name = str(data.get("question_id") or where) if isinstance(data, dict) else where
        seen[name] += 1
        record_id = name if seen[name] == 1 else f"{name} #{seen[name]}"  # every question counts, also under a used id
        try:
            records.append(replace(_parse(data, record_id), source=f"OmniMedVQA {path.name}"))
        except ValueError as error:
            bad.append((record_id, f"{where}: {error}"))
    return records


def _parse(data: Any, record_id: str) -> Record:
    if not isinstance(data, dict):
        raise ValueError("not an object")
    if missing := [key for key in NEEDED if not isinstance(data.get(key), str)]:
        raise ValueError(f"no text {', '.join(missing)}")
    if not data["question"].strip():
        raise ValueError("the question is empty")
    texts = [None if data.get(key) is None else str(data[key]) for key in OPTION_KEYS]
    options, _ = lettered(texts)
    if len(options) < 2:
        raise ValueError(f"it has {len(options)} option(s), a choice needs two or more")
    answer = _last_equal(options, data["gt_answer"])
    if answer is None:
        raise ValueError(
            f"answer {data['gt_answer'][:80]!r} is none of the options {', '.join(options.values())[:200]}"
        )
    image = _posix(data["image_path"])
    modality = data.get("modality_type", data.get("modality"))  # `modality` in "Chest CT Scan.json"
    dataset = str(data.get("dataset") or "")
    groups = {"question_type": data.get("question_type"), "modality_type": modality, "dataset": dataset}
    return Record(
        id=record_id,
        images=(image,),
        question=data["question"],
        options=options,
        answer=answer,
        specialties=("all",),
        source="",
        license=LICENSES.get(dataset, "not stated"),
        split="test",
        image_group=_image_group(image),
        modality=str(modality or ""),
        kind="choice",
        groups={key: value for key, value in groups.items() if isinstance(value, str) and value},
    )


def _last_equal(options: dict[str, str], text: str) -> str | None:
    """The last option equal to the text, else the last that differs from it in blanks at its ends only."""
    exact = [letter for letter, option in options.items() if option == text]
    # ours: MedEvalKit finds no gold option for these, so that no response to them can be right
    alike = [letter for letter, option in options.items() if option.strip() == text.strip()]
    return next(reversed(exact or alike), None)


def _image_group(image: str) -> str:
    """The patient where the file name tells it, else the image."""
    patient = KERMANY_PATIENT.search(PurePosixPath(image).name)
    return f"cxr_pediatric:{patient[1]}" if patient else image


def _posix(path: str) -> str:
    return path.strip().replace("\\", "/").removeprefix("./")


def _load_medr1(root: Path, out_dir: Path, split: str, archives: Sequence[Path]) -> tuple[list[Record], Path, Bad]:
    """Questions in Med-R1's schema; one listed again (by modality and by question type) is read once."""
    paths = [root / RECORDS]
    if not paths[0].is_file():
        paths = sorted(path for suffix in ("*.json", "*.jsonl") for path in root.rglob(suffix))
    found: dict[str, Record] = {}
    conflicting: set[str] = set()
    bad: Bad = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        in_name = SPLIT_IN_NAME.findall(name)
        if in_name and in_name[-1].lower() != split:
            continue
        for where, data in read_objects(path, NEEDED_MEDR1):
            if isinstance(data, dict) and data.get("split", split) != split:
                continue
            try:
                record = replace(_parse_medr1(data), source=f"OmniMedVQA {name}", split=split)
            except ValueError as error:
                bad.append((where, str(error)))
                continue
            known = found.setdefault(record.id, record)
            if known.answer != record.answer:
                bad.append((record.id, f"{where}: asked before about {record.images[0]}, with another answer"))
                conflicting.add(record.id)
            found[record.id] = replace(known, groups={**record.groups, **known.groups})
    if not found and not bad:
        fix = f"put OmniMedVQA.zip, {QUESTIONS}/ with Images/, or Med-R1's split files there"
        raise UserError(f"OmniMedVQA root {root} holds no question of split {split!r}: {fix}")
    drafts = [record for record in found.values() if record.id not in conflicting]
    records, image_root, missing = place_images(drafts, root, out_dir, folders=["."], archives=archives)
    return records, image_root, bad + missing


def _parse_medr1(data: Any) -> Record:
    if not isinstance(data, dict) or not all(isinstance(data.get(key), str) for key in NEEDED_MEDR1):
        raise ValueError(f"needs the texts {', '.join(NEEDED_MEDR1)}")
    question, options = parse_problem(data["problem"])
    if not question:
        raise ValueError("the question is empty")
    answer = gold_letter(data["solution"], options)
    image = _posix(data["image"])
    groups = {key: data.get(name) for key, name in MEDR1_GROUPS.items()}
    return Record(
        # as in `mmedexpert.sources.medr1`: a question has one id in training and in evaluation
        id="medr1-" + hashlib.sha256(f"{image}\0{data['problem']}".encode()).hexdigest()[:16],
        images=(image,),
        question=question,
        options=options,
        answer=answer,
        specialties=("all",),
        source="",
        license=str(data.get("license") or LICENSES.get(str(data.get("dataset")), "not stated")),
        split="test",
        image_group=_image_group(image),
        modality=str(data.get("modality") or ""),
        kind="choice",
        groups={key: value for key, value in groups.items() if isinstance(value, str) and value},
    )
