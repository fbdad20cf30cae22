"""Model cards: what an adapter or a merged model is, what it was made from, and that it is not for clinical use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from mmedexpert.runtime.files import write_atomic

PAPER = "[MMedExpert-R1](https://arxiv.org/abs/2601.10949)"
NOT_RUN = "-"
INTERVAL = "Intervals: 95%, bootstrap over images."

Kind = Literal["adapter", "update", "merged", "base"]
WHAT: dict[Kind, str] = {
    "adapter": "A LoRA adapter in PEFT's format; it needs its base model.",
    "update": "Changes of its base model's matrices, row by row, that no adapter holds; it needs its base model.",
    "merged": "A complete vision-language model: the base with the updates of several adapters merged into it.",
    "base": "A complete vision-language model, the base that adapters are trained on.",
}
RELATION: dict[Kind, str] = {  # the hub's words
    "adapter": "adapter", "update": "merge", "merged": "merge", "base": "finetune"
}  # fmt: skip
LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "<this folder>")"""
LOAD_MODEL = """from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("<this folder>")"""
LOAD_UPDATE = """from mmedexpert.models.dense import DenseUpdate
from mmedexpert.models.lean import start_from_
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{base}")
start_from_(model, DenseUpdate.load("<this folder>"))"""
LOAD: dict[Kind, str] = {
    "adapter": LOAD_ADAPTER, "update": LOAD_UPDATE, "merged": LOAD_MODEL, "base": LOAD_MODEL
}  # fmt: skip
LIMITS = """**Not for clinical use.** This is a research artefact. Nobody may use it for diagnosis, treatment, triage
or advice to patients. It is no medical device and has not been validated on patients, and:

- it states wrong findings, measurements and probabilities in fluent, confident prose;
- its reasoning is trained to look like clinical reasoning, which does not show that its answer follows from the image;
- it was trained on questions with options: it always answers, also when no option is right or the image is unfit;
- where people, devices or diseases are rare or absent in its data it is at its worst, and gives no sign of it."""


def write_card(
    folder: str | Path,
    *,
    kind: Kind,
    title: str,
    base_model: str | None,
    base_fingerprint: str | None,
    method: str,
    data: Mapping[str, str],
    specialty: str | None,
    ingredients: Mapping[str, str],
    metrics: Mapping[str, float] | None,
    library_name: Literal["peft", "transformers"] | None,
) -> Path:
    """Write the model card `README.md` of a saved model, with the Hugging Face hub's metadata; returns its path.

    `base_model` is a hub id or a folder: only a hub id goes into the metadata, and of a folder only the last name is
    shown. `data` maps each source, with its number of records, to its licence; `ingredients` each adapter that went in
    to its sha256; `metrics` flat names to numbers (None: not run). Replaces the card that PEFT writes.
    """
    on_hub = base_model if base_model and _is_hub_id(base_model) else None
    if base_model:
        base = f"`{on_hub or Path(base_model).name}`"
    else:
        base = "none: trained from random weights" if kind == "base" else "unnamed: see its fingerprint"
    load = LOAD[kind].format(base=on_hub or "<folder of the base model>")
    metadata = ModelCardData(
        base_model=on_hub,
        library_name=library_name,
        pipeline_tag="image-text-to-text",
        license="other",  # ours: the base's and the data's licences bind together, the card lists them
        license_name="see-data-and-licences",
        tags=["medical", "mmedexpert", kind, *([specialty] if specialty else []), "not-for-clinical-use"],
        base_model_relation=RELATION[kind] if on_hub else None,
    )
    facts = {
        "Kind": kind,
        "Specialty": specialty or "all",
        "Base model": base,
        "Base fingerprint (sha256)": f"`{base_fingerprint}`" if base_fingerprint else "not recorded",
    }
    sections = [
        f"# {_line(title)}",
        "## What it is",
        f"{WHAT[kind]} Made with `mmedexpert`, an open reproduction of {PAPER}; not by that paper's authors.",
        _table(("", ""), facts),
        "## Data and licences",
        _table(("Data", "Licence"), data),
        "The base model's licence applies as well.",
        "## Method",
        method.strip(),
        _table(("Ingredient", "Fingerprint"), {name: f"`{digest}`" for name, digest in ingredients.items()}),
        "## Metrics",
        *_metrics(metrics),
        "## Limits",
        LIMITS,
        "## How to load",
        f"```python\n{load}\n```",
    ]
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, sections)) + "\n")
    path = Path(folder) / "README.md"
    write_atomic(path, str(card).encode())
    return path


def record_evaluation(folder: Path, questions: str, summary: Mapping[str, Any]) -> None:
    """Put an evaluation into the card of the model in `folder`: macro accuracy with its interval, one row for each set
    of questions; nothing where the folder has no card of ours."""
    path = folder / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
        head, rest = text.split("## Metrics\n", 1)
        section, limits = rest.split("\n## Limits", 1)
    except (OSError, ValueError):
        return
    known = dict(re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.M))
    rows = {name: value for name, value in known.items() if name not in ("Metric", "---") and value != NOT_RUN}
    low, high = summary["macro_ci_low"], summary["macro_ci_high"]
    rows[_line(questions)] = (
        f"macro accuracy {summary['macro_accuracy']:.3f} [{low:.3f}, {high:.3f}], {summary['n']} questions, "
        f"protocol {summary['protocol']}, {100 * summary['parse_failure_rate']:.0f}% unparsed"
    )
    table = _table(("Metric", "Value"), rows)
    write_atomic(path, f"{head}## Metrics\n\n{table}\n\n{INTERVAL}\n\n## Limits{limits}".encode())


def _metrics(metrics: Mapping[str, float] | None) -> list[str]:
    if not metrics:
        return [_table(("Metric", "Value"), {"accuracy": NOT_RUN}), "Evaluation: not run."]
    return [_table(("Metric", "Value"), {name: f"{value:.4g}" for name, value in metrics.items()})]


def _table(head: tuple[str, str], rows: Mapping[str, str]) -> str:
    """A two-column Markdown table; nothing for no rows."""
    if not rows:
        return ""
    lines = [head, ("---", "---"), *rows.items()]
    return "\n".join(f"| {' | '.join(_line(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def _line(text: str) -> str:
    """Text on one line: names come from configs and data sets, and a line break would end a heading or a table."""
    return " ".join(text.split())


def _is_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name)) and not Path(name).exists()
