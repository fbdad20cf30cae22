"""The card of a released data set (`README.md`): what is in it, how it was made, under which licences, its limits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from mmedexpert.curation import datasheet
from mmedexpert.curation.funnel import funnel_markdown
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.privacy import redacted

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))  # the hub's words
LOAD = """from datasets import load_dataset

data = load_dataset("<this folder>")
row = data["train"][0]
row["images"][0]     # a PIL image
row["question"], row["options"], row["answer"]
row["completion"]    # <think>...</think><answer>...</answer>; None without a trace"""
COLUMNS = {
    "id": "of the record", "images": "PIL images, named by their content", "question": "without the options",
    "options": "a list of `letter` and `text`; none for an open question",
    "answer, answer_text": "the right letter and its text",
    "trace, perspective": "the steps, and the clinical perspective they are written from",
    "trace_answer": "what the trace comes to where that is not the answer",
    "completion": "trace and answer as they are trained", "primary, evidence": "specialty, and what decided for it",
    "specialties, labels": "all that apply, and (JSON) score, method, evidence and version of each",
    "modality, body_system, kind, language": "as far as the source tells",
    "source, source_text, source_id, revision, license": "where it comes from, and under which terms",
    "image_sha256, image_group": "hashes of the image files; what never crosses splits",
    "checks": "JSON: what each step found out", "groups, latent, provenance": "JSON: all else that is known",
}  # fmt: skip


def write_card(
    folder: Path,
    *,
    summary: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Mapping[str, Any]],
    teacher: str | None,
    command: Sequence[str],
    commit: str | None,
    figure: str | None = None,
) -> Path:
    """Write the card of a released folder, with the hub's metadata; returns its path.

    `summary` is the release's (`release.json`), `steps` the counts of its funnel, `settings` each step's thresholds,
    `teacher` says in words who wrote the traces (None: rules), `figure` names a picture of the funnel in the folder.
    """
    made, splits = summary["make_up"], summary["splits"]
    said = datasheet.facts(summary, steps, teacher)
    configs = [
        {
            "config_name": "default",
            "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits],
        }
    ]
    metadata = DatasetCardData(
        language=sorted(made.get("language", {})) or None,
        license="other",  # ours: each record's own; the card lists them
        license_name="see-sources-and-licences",
        annotations_creators="machine-generated",
        source_datasets=["extended"],
        task_categories=["visual-question-answering", "image-text-to-text"],
        size_categories=next((word for limit, word in SIZES if summary["records"] < limit), "n>1M"),
        pretty_name=summary["name"],
        tags=["medical", "reasoning", "mmedexpert", "not-for-clinical-use"],
        configs=configs if splits else None,
    )
    sections = [
        f"# {_line(summary['name'])}",
        f"**{datasheet.NOT_CLINICAL}**",
        said["what"],
        "" if summary["records"] else "**No record may be released: there are no data in this folder.**",
        _table(("Split", "Records"), splits.items()),
        "## What is in it",
        _cells(made.get("cells", {}), list(splits)),
        *(
            _table((what, "Records"), made.get(key, {}).items())
            for what, key in (("Modality", "modality"), ("Question type", "kind"))
        ),
        "## How it was made",
        funnel_markdown(steps) if steps else "",
        f"![Records kept and dropped by each step]({figure})" if figure else "",
        "Thresholds and settings of the steps:",
        _table(
            ("Step", "Setting", "Value"),
            [(step, key, value) for step, row in settings.items() for key, value in row.items()],
        ),
        f"Traces were written by {_line(teacher or datasheet.BY_RULES)}.",
        f"Command: `{' '.join(map(_public, redacted(command)))}`",
        f"Commit: `{commit or 'not recorded'}`",
        "## Sources and licences",
        "Each record is under the licence of its source; what was written for this set does not change that.",
        _table(
            ("Source", "Revision", "Licence", "Records"),
            [(row["source"], row["revision"] or "-", row["licence"], row["records"]) for row in summary["licences"]],
        ),
        "Left out, since the licence forbids redistribution or is not known:" if summary["local"] else "",
        _table(
            ("Source", "Licence", "Records"),
            [(row["source"], row["licence"], row["records"]) for row in summary["local"]],
        ),
        "## How to load",
        f"```python\n{LOAD}\n```",
        _table(
            ("Column", "What it holds"), [(f"`{name.replace(', ', '` `')}`", what) for name, what in COLUMNS.items()]
        ),
        "## Known limits",
        "\n".join(f"- {line}" for line in (*said["limits"], *said["biases"])),
        "## Datasheet",
        "Questions after Gebru et al. (2021), Datasheets for Datasets.",
        *_sheet(datasheet.sheet(said, len({row["licence"] for row in summary["licences"]}), splits)),
    ]
    card = DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")
    path = folder / "README.md"
    write_atomic(path, str(card).encode())
    return path


def _cells(cells: Mapping[str, int], splits: Sequence[str]) -> str:
    """Records by specialty and perspective, a column for each split."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for key, count in cells.items():
        specialty, perspective, split = key.split("|")
        counts.setdefault((specialty, perspective), {})[split] = count
    rows = [(*names, *(row.get(split, 0) for split in splits), sum(row.values())) for names, row in counts.items()]
    return _table(("Specialty", "Perspective", *splits, "all"), rows)


def _sheet(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    parts = []
    for section, answers in groupby(rows, key=lambda row: row[0]):
        parts.append(f"### {section}")
        parts += [f"*{question}* {_line(answer)}" for _, question, answer in answers]
    return parts


def _table(head: Sequence[str], rows: Any) -> str:
    """A Markdown table; nothing for no rows."""
    lines = [[_line(str(f"{cell:,}" if type(cell) is int else cell)) for cell in row] for row in rows]
    if not lines:
        return ""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in cells)


def _line(text: str) -> str:
    """Text on one line, and no HTML: names come from data sets."""
    return " ".join(text.split()).replace("<", "&lt;")


def _public(word: str) -> str:
    """A word of the command, its value hidden where it may be a place or an address: those are no part of a set."""
    key, equals, value = word.partition("=")
    shown = value if equals else key
    if not re.search(r"[/\\~@\s]|\w:\w", shown):
        return word
    return f"{key}=<not shown>" if equals else Path(key).name if key.endswith(".py") else "<not shown>"
