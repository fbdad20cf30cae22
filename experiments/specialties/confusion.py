"""`python experiments/specialties/confusion.py ROOT`: the specialty rules against the labels of this folder.

ROOT holds the real records: `medxpertqa/medxpertqa_mm_input.jsonl`, `vqa_rad/split_testset.json`,
`omnimedvqa/records.jsonl`, as published (Med-R1's schema for the last). A question is found by its id (line number for
OmniMedVQA) and must have the digest that labels.csv states. `--half development|held|fresh|all`; `--errors` lists each
row where rules and labels differ, by id, with the rules' evidence.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.specialties import SPECIALTIES, Label, labels

LABELS = Path(__file__).with_name("labels.csv")
Row = tuple[Mapping[str, str], list[Label]]  # a line of labels.csv, and what the rules say


def questions(root: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Arguments of `labels` by source and id."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (root / "medxpertqa/medxpertqa_mm_input.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        options = {option["letter"]: option["content"] for option in row["options"]}
        told = {key: row[key] for key in ("body_system", "medical_task", "question_type")}
        found["medxpertqa", row["id"]] = _question(row["question"], options, row["label"][0], told)
    for row in json.loads((root / "vqa_rad/split_testset.json").read_text(encoding="utf-8")):
        told = {key: row[key] for key in ("image_organ", "question_type")}
        found["vqa_rad", str(row["qid"])] = _question(row["question"], None, str(row["answer"]), told)
    for number, line in enumerate((root / "omnimedvqa/records.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        told = {key: row[key] for key in ("dataset", "question_type", "modality")}
        stem, *texts = _parts(row["problem"])
        options = dict(zip("ABCDEFGH", texts, strict=False))
        answer = row["solution"].replace("<answer>", "").replace("</answer>", "").strip()
        found["omnimedvqa", str(number)] = _question(stem, options, answer, told) | {"digest": _digest(row["problem"])}
    return found


def _question(question: str, options: Mapping[str, str] | None, answer: str, told: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {"question": question, "options": options, "answer": answer, "metadata": told}
    return {"arguments": arguments, "digest": _digest(question)}


def _parts(problem: str) -> list[str]:
    """The stem and the options of Med-R1's "stem A)one, B)two"."""
    parts, rest = [], problem
    for letter in "ABCDEFGH":
        part, mark, rest = rest.partition(f"{letter})")
        parts.append(part.strip().rstrip(","))
        if not mark:
            break
    return parts


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:12]


def labelled(root: Path, half: str) -> list[Row]:
    """Each labelled question with the rules' labels; exits naming the first that is not the one labelled."""
    known = questions(root)
    rows: list[Row] = []
    for line in csv.DictReader(LABELS.read_text(encoding="utf-8").splitlines()):
        if half in ("all", line["half"]):
            entry = known.get((line["source"], line["id"]))
            if entry is None or entry["digest"] != line["question_sha256"]:
                sys.exit(f"{line['source']} {line['id']} is not under {root}, or is another question")
            rows.append((line, labels(**entry["arguments"])))
    return rows


def _told(rows: Sequence[Row]) -> str:
    strict = sum(said[0].label == line["primary"] for line, said in rows)
    lenient = sum(said[0].label in (line["primary"], line["second"]) for line, said in rows)
    second = sum(
        bool({line["primary"], line["second"]} & {label.label for label in said[:2]} - {""}) for line, said in rows
    )
    count = len(rows)
    return (
        f"primary right {strict}/{count} = {strict / count:.3f}; primary is either label {lenient / count:.3f}; "
        f"one of the rules' first two is either label {second / count:.3f}"
    )


def report(rows: Sequence[Row]) -> str:
    """Accuracy by source, the confusion table (lines: labelled, columns: rules), recall and precision."""
    told = [f"{'all':<12}{_told(rows)}"]
    for source in sorted({line["source"] for line, _ in rows}):
        told.append(f"{source:<12}{_told([row for row in rows if row[0]['source'] == source])}")
    table = Counter((line["primary"], said[0].label) for line, said in rows)
    told += ["", "| labelled, rules | " + " | ".join(SPECIALTIES) + " | recall |", "|---" * 6 + "|"]
    for place, name in enumerate(SPECIALTIES):
        counts = [table[name, other] for other in SPECIALTIES]
        told.append(f"| {name} | " + " | ".join(map(str, counts)) + f" | {_share(counts[place], sum(counts))} |")
    given = Counter(said[0].label for _, said in rows)
    right = [_share(table[name, name], given[name]) for name in SPECIALTIES]
    return "\n".join([*told, "| precision | " + " | ".join(right) + " | |"])


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.2f}" if whole else "-"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--half", choices=("development", "held", "fresh", "all"), default="all")
    parser.add_argument("--errors", action="store_true")
    chosen = parser.parse_args()
    rows = labelled(chosen.root, chosen.half)
    print(report(rows))
    for line, said in rows:
        if chosen.errors and said[0].label != line["primary"]:
            names = "/".join(filter(None, (line["primary"], line["second"])))
            print(f"{line['source']} {line['id']}: labelled {names} ({line['confidence']})")
            for label in said:
                print(f"    {label.label} {label.score} {label.evidence}")


if __name__ == "__main__":
    main()
