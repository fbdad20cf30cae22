"""`python -m mmedexpert.guidelines FILE`: the measures by hand, the worst cases, and files that are none."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from mmedexpert.errors import UserError
from mmedexpert.guidelines.__main__ import main
from mmedexpert.guidelines.labelled import Rationale, confusion, held, measures, read_labelled, worst

D, INT, A, B = "differential", "intuitive", "analytical", "bayesian"


def rationale(name: str, *strategies: str, **scores: float) -> Rationale:
    return Rationale(name, "text", None, strategies, {D: 0.0, INT: 0.0, A: 0.0, B: 0.0, **scores})


TEXTS = [
    rationale("good", D, differential=0.6, analytical=0.5),
    rationale("tie", D, differential=0.4, bayesian=0.4),
    rationale("other", A, analytical=0.1, intuitive=0.9),
    rationale("both", D, A, differential=0.5, analytical=0.7),
    rationale("one of two", D, A, differential=1.0, analytical=0.3),
    rationale("silent"),
    rationale("quarter", bayesian=0.25),
    rationale("loud", bayesian=0.8),
]


def test_measures_by_hand():
    found = measures(TEXTS)
    assert found["own strategy highest"] == 1 / 3  # a tie is not highest
    assert found["none: at most 0.25"] == 2 / 3 and found["two: both at least 0.5"] == 1 / 2
    # differential: 0.6, 0.4, 0.5, 1.0 against four zeros; analytical: 0.1, 0.7, 0.3 against 0.5 and four zeros
    assert found["AUC differential"] == 1.0 and found["AUC analytical"] == pytest.approx(13 / 15)
    assert "AUC bayesian" not in found and "AUC intuitive" not in found  # no text of theirs


def test_table_and_worst_cases():
    rows = {row["labelled"]: row for row in confusion(TEXTS)}
    assert list(rows) == [D, A, "two of them", "none of them"]
    assert rows[D] == {"labelled": D, "n": "2", D: "0.50", INT: "0.00", A: "0.25", B: "0.20", "as it should be": "0.50"}
    assert rows["two of them"]["as it should be"] == "0.50" and rows["none of them"]["n"] == "3"
    assert [one.id for one in worst(TEXTS, 3)] == ["other", "loud", "one of two"]
    assert {one.id for one in worst(TEXTS, 99)} == {one.id for one in TEXTS if not one.right()}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_file_is_scored_and_shown(tmp_path, capsys):
    thought = (
        "Prior 50% of cancer in a woman of sixty. Spicules about a dense core in the left breast, likelihood ratio 4. "
        "Posterior 80%. So cancer."
    )
    entries = [
        {"strategy": B, "rationale": thought, "answer": "cancer"},
        {"id": "[x]", "strategy": [A, D], "completion": "<think>A mass.</think>", "options": {"A": "mass"}},
        {"strategy": None, "completion": ""},
    ]  # fmt: skip
    path = write(tmp_path / "own.json", entries)
    first, second, third = read_labelled(path)
    assert first.scores[B] == 1.0 and first.right() and third.right() and not second.right()
    assert second.strategies == (A, D) and second.options == {"A": "mass"} and first.id == "0"
    assert main([str(path), "--worst", "2"]) == 0
    said = capsys.readouterr().out
    assert "own strategy highest     1.00" in said and "AUC bayesian" in said
    assert said.count("[x]: labelled analytical and differential") == 1 and "mechanism 0.00" in said
    assert "faults: few findings" in said


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read as JSON"), ("[]", "no list of rationales"), ("{}", "no list of rationales"),
        ('[{"completion": "x"}]', "entry 0 has no strategy"), ('[{"strategy": "analytic"}]', "'analytic' is none of"),
        ('[{"strategy": null}]', "entry 0 has no text"), ('[{"strategy": null, "completion": ""}, 3]', "entry 1 has"),
        ('[{"strategy": null, "completion": "", "options": ["a"]}]', "options must map letters"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_line(tmp_path, capsys, content, told):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"bad\.json"):
        read_labelled(path)
    assert main([str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert main([str(tmp_path / "none.json")]) == 2


def test_criteria_are_counted_by_label(tmp_path):
    entries = [
        {"strategy": A, "completion": "<think>2.1 cm > 2.0 cm, the limit of a rim.</think>", "options": None},
        {"strategy": B, "completion": "<think>The rim is 2.1 cm wide.</think>", "options": None},
        {"strategy": None, "completion": "<think>3 cm > 2 cm</think>", "options": None},
    ]  # fmt: skip
    rows = {row["criterion"]: row for row in held(read_labelled(write(tmp_path / "x.json", entries)))}
    assert rows["holds"] == {"perspective": A, "criterion": "holds", "own": "1.00", "others": "0.00", "none": "1.00"}
    assert rows["compared"]["none"] == "1.00" and rows["chain"]["own"] == "0.00" and len(rows) == 22


@pytest.mark.slow
def test_the_weights_are_what_the_labelled_texts_give(monkeypatch, capsys):
    """Also where an author is left out, the others tell the perspectives apart."""
    folder = Path(__file__).parents[1] / "experiments" / "perspectives"
    monkeypatch.syspath_prepend(str(folder))
    fit = importlib.import_module("fit")
    assert fit.main(["--check"]) == 0
    (unseen,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("all authors, each left out")]
    found = [float(number) for number in re.findall(r" (\d\.\d\d)(?:,|$)", unseen)]
    assert all(value >= bound for value, bound in zip(found, (0.85, 0.85, 0.7, 0.85, 0.85, 0.85, 0.85), strict=True)), (
        unseen
    )
    written = fit.yaml.safe_load(fit.WEIGHTS.read_text())
    written["sound"]["talk"] += 0.2
    assert not fit.same(fit.yaml.safe_load(fit.WEIGHTS.read_text()), written)
