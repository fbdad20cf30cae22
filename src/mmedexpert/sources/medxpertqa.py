"""MedXpertQA-MM (arXiv 2501.18362): five-option questions with one to six images each, 2,000 for test, 5 for dev."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.errors import UserError
from mmedexpert.sources.parquet import read_parquet
from mmedexpert.sources.unpack import place_images, read_objects

# The hub's layout, then the file of the GitHub repository (`eval/data/medxpertqa/input`); the first that is there.
FILES = {
    "test": ("MM/test.jsonl", "MM/test.json", "MM/test*.parquet", "medxpertqa_mm_input.jsonl"),
    "dev": ("MM/dev.jsonl", "MM/dev.json", "MM/dev*.parquet"),
}
NEEDED = ("id", "question", "options", "label", "images")
GROUPS = ("question_type", "medical_task", "body_system")


def load(root: Path, out_dir: Path, *, split: str = "test") -> tuple[list[Record], Path, Bad]:
    """Records, image root, bad (id, reason); images from `root/images`, else out of `root/images.zip`.

    Source: hub data set TsinghuaC3I/MedXpertQA, config MM, and the evaluation input of its GitHub repository. The
    question already ends in "Answer Choices: (A) ...", and stays so: MedEvalKit shows options twice.
    The records of dev are for training. Raises UserError for another split, a root without a known file, a file that is
    cut short, and a file of another schema.
    """
    if split not in FILES:
        raise UserError(f"medxpertqa has no split {split!r}: choose one of {', '.join(FILES)}")
    paths = next((found for pattern in FILES[split] if (found := sorted(root.glob(pattern)))), None)
    if paths is None:
        raise UserError(f"{root} holds none of {', '.join(FILES[split])}: give the folder of TsinghuaC3I/MedXpertQA")
    drafts: list[Record] = []
    bad: Bad = []
    for path in paths:
        for where, data in _read(path):
            try:
                draft = _parse(data, f"MedXpertQA-MM {path.relative_to(root).as_posix()}")
                drafts.append(draft if split == "test" else replace(draft, split="train"))
            except ValueError as error:
                bad.append((str(data.get("id") or where) if isinstance(data, dict) else where, f"{where}: {error}"))
    archives = [path for path in (root / "images.zip", root / "MM" / "images.zip") if path.is_file()]
    records, image_root, missing = place_images(
        drafts, root, out_dir, folders=("images", "MM/images"), archives=archives
    )
    return records, image_root, bad + missing


def _read(path: Path) -> list[tuple[str, Any]]:
    if path.suffix != ".parquet":
        return read_objects(path, NEEDED)
    return [(f"{path.name} row {number}", row) for number, row in enumerate(read_parquet(path, NEEDED, GROUPS))]


def _parse(data: Any, source: str) -> Record:
    if not isinstance(data, dict) or not isinstance(data.get("question"), str) or not data.get("id"):
        raise ValueError("not an object with id and question")
    options = data.get("options")
    if isinstance(options, list) and all(isinstance(option, dict) for option in options):
        options = {str(option.get("letter")): option.get("content") for option in options}  # the GitHub file
    if not isinstance(options, dict):
        raise ValueError("options are neither {letter: text} nor a list of letter and content")
    # parquet gives every letter of the schema, with null where a question has fewer options
    options = {letter: text for letter, text in options.items() if text is not None}
    if len(options) < 2 or not all(isinstance(text, str) and text.strip() for text in options.values()):
        raise ValueError("options are not two texts or more")
    if list(options) != list(ascii_uppercase[: len(options)]):
        raise ValueError(f"options are lettered {', '.join(options)}, not from A upwards")
    label = data.get("label")
    answer = label[0] if isinstance(label, list) and len(label) == 1 else label
    if not isinstance(answer, str) or answer not in options:
        raise ValueError(f"answer {label!r} is none of the options {', '.join(options)}")
    if not data["question"].strip():
        raise ValueError("the question is empty")
    listed = data.get("images")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("image_path") if isinstance(entry, dict) else entry for entry in entries]
    images = tuple(name for name in names if isinstance(name, str) and name)
    if not images or len(images) < len(names):
        raise ValueError("it names no image, or one without a file name")
    groups = {name: data[name] for name in GROUPS if isinstance(data.get(name), str)}
    return Record(
        id=str(data["id"]),
        images=images,
        question=data["question"],
        options=options,
        answer=answer,
        specialties=("all",),
        source=source,
        license="MIT",
        split="test",
        image_group="+".join(images),
        body_system=groups.get("body_system", ""),
        kind="choice",
        groups=groups,
    )
