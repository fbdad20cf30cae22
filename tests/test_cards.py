import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmedexpert.reporting.cards import record_evaluation, write_card

SHA = "ab" * 32
SECTIONS = ["What it is", "Data and licences", "Method", "Metrics", "Limits", "How to load"]
ARGUMENTS = {
    "kind": "adapter",
    "title": "Cardiology expert",
    "base_model": "Qwen/Qwen2.5-VL-7B-Instruct",
    "base_fingerprint": SHA,
    "method": "DSA: SFT of LoRA r=64 on reasoning traces, 120 steps.",
    "data": {"phantom (400 training records)": "Apache-2.0", "VQA-RAD": "CC0-1.0"},
    "specialty": "cardiology",
    "ingredients": {},
    "metrics": {"test/macro_accuracy": 0.8125},
    "library_name": "peft",
}


def card(folder: Path, **changes) -> tuple[dict, str]:
    path = write_card(folder, **{**ARGUMENTS, **changes})
    assert path == folder / "README.md"
    _, front, body = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), body


def test_an_adapters_card_has_the_hubs_metadata_and_every_section(tmp_path):
    front, body = card(tmp_path)
    assert front["base_model"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert front["base_model_relation"] == "adapter"
    assert front["library_name"] == "peft"
    assert front["pipeline_tag"] == "image-text-to-text"
    assert {"medical", "cardiology", "not-for-clinical-use"} <= set(front["tags"])
    assert re.findall(r"^## (.*)", body, re.M) == SECTIONS
    assert "**Not for clinical use.**" in body
    assert "| test/macro_accuracy | 0.8125 |" in body
    assert "| phantom (400 training records) | Apache-2.0 |" in body and "| VQA-RAD | CC0-1.0 |" in body
    assert SHA in body and 'from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")' in body


def test_huggingface_hub_reads_the_card_back(tmp_path):
    card(tmp_path)
    loaded = ModelCard.load(tmp_path / "README.md")
    assert loaded.data.base_model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert loaded.data.license == "other"


def test_a_merged_model_lists_its_ingredients_and_loads_without_peft(tmp_path):
    ingredients = {"expert/cardiology": "1" * 64, "reasoner/gba": "2" * 64}
    front, body = card(tmp_path, kind="merged", specialty=None, ingredients=ingredients, library_name="transformers")
    assert front["base_model_relation"] == "merge"
    assert all(f"| {name} | `{digest}` |" in body for name, digest in ingredients.items())
    assert "| Specialty | all |" in body
    assert "PeftModel" not in body


@pytest.mark.parametrize("metrics", [None, {}])
def test_what_was_not_evaluated_says_so_and_shows_no_number(tmp_path, metrics):
    _, body = card(tmp_path, metrics=metrics)
    section = body.split("## Metrics")[1].split("##")[0]
    assert "not run" in section and "| - |" in section
    assert not re.search(r"\d", section)


def test_evaluations_come_into_the_card_a_row_for_each_set_of_questions(tmp_path):
    card(tmp_path, metrics=None)
    found = {"macro_accuracy": 0.8125, "macro_ci_low": 0.7, "macro_ci_high": 0.9, "n": 480, "protocol": "robust"}
    found["parse_failure_rate"] = 0.05
    record_evaluation(tmp_path, "phantom-test", found)
    record_evaluation(tmp_path, "slake", found | {"macro_accuracy": 0.25, "n": 7})
    record_evaluation(tmp_path, "phantom-test", found | {"macro_accuracy": 0.75})
    body = (tmp_path / "README.md").read_text()
    section = body.split("## Metrics")[1].split("## Limits")[0]
    assert "not run" not in section and "| - |" not in section
    assert re.findall(r"^\| (\S+) \| macro accuracy (\S+) \[0.700, 0.900\], (\d+) questions", section, re.M) == [
        ("phantom-test", "0.750", "480"), ("slake", "0.250", "7"),
    ]  # fmt: skip
    assert re.findall(r"^## (.*)", body, re.M) == SECTIONS


def test_a_folder_without_our_card_is_left_alone(tmp_path):
    record_evaluation(tmp_path, "slake", {})
    assert not list(tmp_path.iterdir())
    (tmp_path / "README.md").write_text("# a model of others\n")
    record_evaluation(tmp_path, "slake", {})
    assert (tmp_path / "README.md").read_text() == "# a model of others\n"


@pytest.mark.parametrize("base_model", ["/home/someone/models/qwen", "outputs/pretrain/qwen", "../qwen"])
def test_a_base_that_is_no_hub_id_stays_out_of_the_metadata_and_hides_its_path(tmp_path, base_model):
    front, body = card(tmp_path, base_model=base_model)
    assert "base_model" not in front and "base_model_relation" not in front
    assert "someone" not in body and "outputs/pretrain" not in body and "../" not in body
    assert "| Base model | `qwen` |" in body and '"<folder of the base model>"' in body


def test_without_a_named_base_only_a_base_counts_as_trained_from_random_weights(tmp_path):
    _, adapter = card(tmp_path, base_model=None)
    _, base = card(tmp_path, kind="base", base_model=None, base_fingerprint=None, library_name="transformers")
    assert "| Base model | none: trained from random weights |" in base
    assert "random weights" not in adapter and "None" not in adapter


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    front, body = card(tmp_path, base_model="models/qwen")
    assert "base_model" not in front and "| Base model | `qwen` |" in body


def test_it_replaces_the_card_peft_wrote(tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: x\n---\n# Model Card for Model ID\n")
    _, body = card(tmp_path)
    assert "Model ID" not in body
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(st.characters(codec="utf-8"), max_size=40))
def test_no_name_breaks_the_metadata_the_headings_or_the_tables(tmp_path, name):
    named = {"title": name, "specialty": name, "data": {name: name}, "ingredients": {name: SHA}, "metrics": {name: 0.5}}
    front, body = card(tmp_path, **named)
    assert front["library_name"] == "peft"
    assert re.findall(r"^## (.*)", body, re.M) == SECTIONS
    for row in re.findall(r"^\|.*", body, re.M):
        assert row.count("|") == 3 and row.endswith("|")
