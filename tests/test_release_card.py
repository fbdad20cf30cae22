"""What a release says of itself: the card, read by `datasets` and the hub, and Croissant, read by `mlcroissant`."""

from __future__ import annotations

import json
import logging
import re

import datasets
import mlcroissant
import pytest
from huggingface_hub import DatasetCard
from PIL import Image
from releasing import draft, pictured, written

from mmedexpert.curation.card import write_card
from mmedexpert.curation.croissant import CONTEXT, write_croissant
from mmedexpert.curation.release import features, release

STEPS = [
    {"step": "ingest", "in": 40, "out": 30, "reasons": {"no answer": 10}},
    {"step": "traces", "in": 30, "out": 12, "reasons": {"wrong answer": 18}},
]
SETTINGS = {"duplicates": {"min_jaccard": 0.8}, "decontaminate": {"max_distance": 8}}
SHEET = ("Motivation", "Composition", "Collection", "Preprocessing", "Uses", "Distribution", "Maintenance")
COMMAND = ["run.py", "stage=data", "data.root=/home/someone/private/images", "token=abc"]


def about(folder, summary, **given):
    return write_card(
        folder, summary=summary, steps=STEPS, settings=SETTINGS, teacher=None, command=COMMAND, commit="abc123", **given
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    rows = [
        pictured(
            draft(f"r{n}", perspective=("feature", "mechanistic")[n % 2], split=("train", "val")[n > 8]), folder, n
        )
        for n in range(12)
    ]
    rows.append(pictured(draft("local", redistribute=False, license="none | stated"), folder, 90))
    summary = release(written(rows, folder / "balance", folder), folder / "out")
    about(folder / "out", summary, figure="funnel.png")
    write_croissant(folder / "out", summary=summary, steps=STEPS, teacher="a model")
    return folder / "out", summary


def test_the_card_is_one_of_the_hub_and_says_what_it_must(made):
    folder, _ = made
    card = DatasetCard.load(folder / "README.md")
    assert card.data.license == "other" and card.data.size_categories == "n<1K" and card.data.language == ["en"]
    text = card.text
    for wanted in (
        "Not for clinical use", "| ingest | 40 | 10 | 30 | no answer 10 |", "| decontaminate | max_distance | 8 |",
        "| invented | 0f3a | CC BY 4.0 | 12 |", "| invented | none &#124; stated | 1 |", "abc123", "funnel.png",
        "| pediatrics | feature | 5 | 1 | 6 |", "load_dataset", "Known limits",
        *(f"### {part}" for part in SHEET),
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "someone" not in text and "token=abc" not in text and "data.root=<not shown>" in text


def test_the_cards_table_of_columns_is_that_of_the_files(made):
    text = (made[0] / "README.md").read_text()
    table = text[text.index("| Column |") : text.index("## Known limits")]
    told = {
        name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if "|" in row else "")
    }
    assert told - {"letter", "text"} == set(features()) - {"redistribute", "split"}


def test_the_folder_loads_with_its_card_beside_the_files(made, tmp_path):
    loaded = datasets.load_dataset(str(made[0]), cache_dir=str(tmp_path))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 9, "val": 3}
    assert isinstance(loaded["val"][0]["images"][0], Image.Image)


def test_croissant_is_valid_and_its_records_can_be_read(made, caplog):
    folder, summary = made
    with caplog.at_level(logging.WARNING):
        found = mlcroissant.Dataset(jsonld=folder / "croissant.json")
    assert not found.metadata.ctx.issues.errors
    assert "not standard" not in caplog.text and str(found.metadata.ctx.conforms_to).endswith("V_1_1")
    for split, count in summary["splits"].items():
        rows = list(found.records(record_set=split))
        assert len(rows) == count
        assert isinstance(rows[0][f"{split}/images"][0], Image.Image)
        assert rows[0][f"{split}/option_letter"] == [b"A", b"B"]


def test_croissant_answers_the_responsible_ai_questions(made):
    data = json.loads((made[0] / "croissant.json").read_text())
    assert data["@context"] == CONTEXT
    told = {key for key in data if key.startswith("rai:")}
    assert told >= {
        f"rai:{name}"
        for name in (
            "dataCollection", "dataBiases", "dataLimitations", "personalSensitiveInformation", "dataAnnotationPlatform",
            "machineAnnotationTools", "dataUseCases", "dataSocialImpact", "dataReleaseMaintenancePlan",
        )
    }  # fmt: skip
    assert all(data[key] for key in told) and "a model" in data["rai:machineAnnotationTools"]
    metadata = mlcroissant.Dataset(jsonld=data).metadata
    assert metadata.data_biases == data["rai:dataBiases"] and metadata.data_collection == data["rai:dataCollection"]


def test_card_and_croissant_are_equal_for_an_equal_release(made):
    folder, summary = made
    before = [(folder / name).read_bytes() for name in ("README.md", "croissant.json")]
    about(folder, summary, figure="funnel.png")
    write_croissant(folder, summary=summary, steps=STEPS, teacher="a model")
    assert before == [(folder / name).read_bytes() for name in ("README.md", "croissant.json")]


def test_an_empty_release_says_so_and_is_valid(tmp_path):
    summary = release(written([], tmp_path / "b"), tmp_path / "out")
    assert "No record may be released" in about(tmp_path / "out", summary).read_text()
    path = write_croissant(tmp_path / "out", summary=summary, steps=[], teacher=None)
    assert not mlcroissant.Dataset(jsonld=path).metadata.ctx.issues.errors
