"""Med-R1's OmniMedVQA records as they are: options inline in the problem, the answer in an `<answer>` tag."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.records import RECORDS
from mmedexpert.data.splits import FRACTIONS, assign_splits, join_groups
from mmedexpert.data.table import fold
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.runtime.progress import track

LETTERS = "ABCDEFGH"
# What separates options and how a letter is marked: ", B)" as published, then the forms copies are found in.
FORMS = [(apart, mark) for mark in (r"{}\)", r"\({}\)", r"{}\.", "{}:") for apart in (r"(?:[,;]\s*|\n\s*)", r"\s+")]
TAGGED = re.compile(r"<answer>\s*\(?([A-Z])\s*(?:[).:]([^<]*))?</answer>", re.IGNORECASE)
BARE = re.compile(r"\s*\(?([A-Z])[).:]?\s*", re.IGNORECASE)
# ours: three OmniMedVQA sets hold Kermany's films of the same children; named as `labelled_images` names them
KERMANY_PATIENT = re.compile(r"^(person\d+(?=_(?:bacteria|virus))|(?:NORMAL2-)?IM-\d+)")

# ours: (data set, modality, specialty); the first row whose two patterns are found, where a record names no specialty
SPECIALTIES = (
    ("", "fundus|optical coherence|^oct", "brain_sensory"),
    ("", "dermoscopy", "oncology_surgery"),
    ("CoronaHack|OCT & X-Ray 2017|Chest X-Ray PA|RUS", "", "pediatrics"),
    ("Chest CT Scan|MIAS", "", "oncology_surgery"),
    ("", "^x-?ray|^ct", "adult_medicine"),
    ("", "^mr", "brain_sensory"),
    ("", "microscop|ultrasound", "oncology_surgery"),
)
LICENSES = {
    "OCT & X-Ray 2017": "CC BY 4.0",
    "MIAS": "CC BY 4.0",
    "Chest CT Scan": "ODbL 1.0",
    "Covid CT": "research only",
}


def medr1(
    root: Path, out_dir: Path | None, *, seed: int, fractions: tuple[float, float, float] = FRACTIONS
) -> tuple[list[Record], Path, Bad]:
    """Records, image root (`root`), bad (id, reason) from `root/records.jsonl`, else from all .json lists and .jsonl.

    Source: Med-R1 (arXiv 2503.13939), keys `image, problem, solution` and where present `dataset, specialty,
    modality, license`. `out_dir` is not used: images stay where they are. Its published train and test share images, so
    its `split` is not used: we split by image content and, where file names tell it, by patient. A question listed
    again (Med-R1 files each by modality and by question type) is read once; with another answer it is bad, as are
    records that cannot be parsed.
    Raises UserError for a root without record files.
    """
    lines, bad = _read(root)
    records: dict[str, Record] = {}
    strata: dict[str, str] = {}
    conflicting: set[str] = set()
    hash_of: dict[str, str] = {}
    for data, where in track(lines, "reading Med-R1 records"):
        try:
            record = _parse(data, root, hash_of)
        except ValueError as error:
            bad.append((where, str(error)))
            continue
        if records.setdefault(record.id, record).answer != record.answer:
            bad.append((record.id, f"{where}: asked before about {record.images[0]}, with another answer"))
            conflicting.add(record.id)
        strata[record.id] = f"{record.specialties[0]}/{_dataset(data)}"
    kept = [record for record in records.values() if record.id not in conflicting]
    groups = join_groups([_group_keys(record) for record in kept])
    splits = assign_splits(groups, fractions=fractions, seed=seed, strata=[strata[record.id] for record in kept])
    placed = zip(kept, groups, splits, strict=True)
    return [replace(record, image_group=group, split=split) for record, group, split in placed], root, bad


def parse_problem(problem: str) -> tuple[str, dict[str, str]]:
    """Question and options of "What ...? A)Mass, T2 N0 M0, B)Cyst": letters count up from A, commas may be inside.

    Of the known forms ("A)", "(A)", "A.", "A:", with or without comma) the one that finds most letters is taken.
    Raises ValueError where fewer than two options or an empty one are found.
    """
    text = problem.replace("<image>", " ")
    marks = max((_marks(text, apart, mark) for apart, mark in FORMS), key=len)
    if len(marks) < 2:
        raise ValueError(f"no options like A)..., B)... in the problem {problem[:80]!r}")
    ends = [start for start, _ in marks[1:]] + [len(text)]
    found = [text[start:end].strip().rstrip(",;").rstrip() for (_, start), end in zip(marks, ends, strict=True)]
    if not all(found):
        raise ValueError(f"an empty option in the problem {problem[:80]!r}")
    return text[: marks[0][0]].strip(), dict(zip(LETTERS, found, strict=False))


def parse_solution(solution: str) -> str:
    """The letter of "<answer> D </answer>" (or of a bare "D"); ValueError where there is none, or several."""
    found = {match[1].upper() for match in TAGGED.finditer(solution)}
    bare = BARE.fullmatch(solution)
    if not found and bare:
        found = {bare[1].upper()}
    if len(found) != 1:
        what = f"the letters {' and '.join(sorted(found))}" if found else "no <answer> letter </answer>"
        raise ValueError(f"{what} in the solution {solution[:80]!r}")
    return found.pop()


def gold_letter(solution: str, options: dict[str, str]) -> str:
    """The solution's letter, which must be one of the options and, where its text is told, too, go with that text."""
    letter = parse_solution(solution)
    if letter not in options:
        raise ValueError(f"answer {letter} is none of the options {', '.join(options)}")
    plain = {key: fold(text).strip(" .,;") for key, text in options.items()}
    for match in TAGGED.finditer(solution):
        told = fold(match[2] or "").strip(" .,;")
        others = [text for key, text in plain.items() if key != letter]
        if told and told != plain[letter] and (told in others or not (told in plain[letter] or plain[letter] in told)):
            raise ValueError(f"the solution says {letter}, which is {options[letter][:80]!r}, but {match[2].strip()!r}")
    return letter


def _marks(text: str, apart: str, mark: str) -> list[tuple[int, int]]:
    """Start and end of each option mark in the text, from A upwards without a gap."""
    marks: list[tuple[int, int]] = []
    position = 0
    for letter in LETTERS:
        lead = r"(?:^|\s+|(?<=\?))" if letter == "A" else apart
        match = re.compile(lead + mark.format(letter)).search(text, position)
        if match is None:
            break
        marks.append((match.start(), match.end()))
        position = match.end()
    return marks


def _read(root: Path) -> tuple[list[tuple[Any, str]], Bad]:
    """Each JSON object under `root` with the place it comes from."""
    if not root.is_dir():
        raise UserError(f"Med-R1 root {root} is not a folder: give the folder that holds {RECORDS} and the images")
    paths = [root / RECORDS]
    if not paths[0].is_file():
        paths = sorted(path for suffix in ("*.json", "*.jsonl") for path in root.rglob(suffix))
    lines: list[tuple[Any, str]] = []
    bad: Bad = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".json":
                whole = json.loads(text)
                if isinstance(whole, list):  # other JSON (a data set card, a config) holds no records
                    lines += [(data, f"{name} entry {number}") for number, data in enumerate(whole)]
                continue
        except (OSError, ValueError) as error:
            bad.append((name, f"cannot be read as JSON in UTF-8: {error}"))
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                lines += [(json.loads(line), f"{name} line {number}")] if line.strip() else []
            except ValueError as error:
                bad.append((f"{name} line {number}", f"not JSON: {error}"))
    if not lines and not bad:
        raise UserError(f"Med-R1 root {root} holds no records: put {RECORDS} (or Med-R1's split .json files) there")
    return lines, bad


def _parse(data: Any, root: Path, hash_of: dict[str, str]) -> Record:
    """One record, its split still open; ValueError says what is wrong with it."""
    if not isinstance(data, dict) or not all(isinstance(data.get(k), str) for k in ("image", "problem", "solution")):
        raise ValueError("needs the texts image, problem and solution")
    image = PurePosixPath(data["image"].replace("\\", "/"))
    if image.is_absolute() or ".." in image.parts:
        raise ValueError(f"image path {data['image']!r} is absolute or leaves the root")
    question, options = parse_problem(data["problem"])
    answer = gold_letter(data["solution"], options)
    name = image.as_posix()
    if name not in hash_of:
        try:
            hash_of[name] = hashlib.sha256((root / name).read_bytes()).hexdigest()[:24]
        except OSError as error:
            raise ValueError(f"image {root / name} cannot be read ({error.strerror})") from error
    specialty = data.get("specialty") or _specialty(data)
    if not specialty:
        raise ValueError(f"no specialty, and none is known for {_dataset(data)!r}: add the key specialty")
    return Record(
        id="medr1-" + hashlib.sha256(f"{name}\0{data['problem']}".encode()).hexdigest()[:16],
        images=(name,),
        question=question,
        options=options,
        answer=answer,
        specialties=tuple(specialty) if isinstance(specialty, list) else (str(specialty),),
        source="medr1",
        license=str(data.get("license") or LICENSES.get(_dataset(data), "not stated")),
        split="",
        image_group=f"image:{hash_of[name]}",
        modality=str(data.get("modality") or ""),
    )


def _group_keys(record: Record) -> list[str]:
    """The image's content, and its patient where the file name tells it."""
    patient = KERMANY_PATIENT.search(PurePosixPath(record.images[0]).name)
    return [record.image_group, f"cxr_pediatric:{patient[1]}"] if patient else [record.image_group]


def _dataset(data: dict[str, Any]) -> str:
    """The OmniMedVQA data set: named, or the folder below `Images` in the image path."""
    parts = PurePosixPath(data["image"]).parts
    return str(data.get("dataset") or (parts[1] if len(parts) > 2 else parts[0]))


def _specialty(data: dict[str, Any]) -> str:
    dataset, modality = _dataset(data), str(data.get("modality") or "")
    for in_dataset, in_modality, specialty in SPECIALTIES:
        if re.search(in_dataset, dataset, re.IGNORECASE) and re.search(in_modality, modality, re.IGNORECASE):
            return specialty
    return ""
