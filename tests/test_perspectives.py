"""What a perspective changes, on predictions made by hand: every number here was worked out on paper."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from test_comparison import config_for, saved
from test_evaluate import prediction, record

from mmedexpert.evaluation.perspectives import kappa, measured, rows_of_numbers
from mmedexpert.evaluation.predict import UNANSWERED, perspectives_of
from mmedexpert.evaluation.stats import cluster_bootstrap_ci
from mmedexpert.evaluation.summary import Summary
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.perspectives import group_rows, perspective_rows
from mmedexpert.reporting.tables import markdown, print_result
from mmedexpert.runtime.runs import Run
from mmedexpert.stages import report

D, I, A, B = PERSPECTIVES  # noqa: E741
DRAWN = {"num_resamples": 60, "seed": 3}
# per question: image, then what was picked under each perspective; gold is B, "" unparsed, "!" refused, None not asked
PICKS = [
    ("g0", "B", "B", "B", "A"),  # vote right; three of six pairs agree
    ("g0", "A", "B", "", "A"),  # vote wrong; one pair; intuitive alone right
    ("g1", "!", "C", "C", "B"),  # vote wrong; one pair; bayesian alone right
    ("g2", "A", "A", "B", None),  # vote wrong; one of three pairs; analytical alone right
    ("g3", "A", "A", "A", "A"),  # none right; all pairs
    ("g4", "B", "B", "B", "B"),  # all right; all pairs
]


def answers(picks=PICKS, **fields) -> list[dict]:
    rows = []
    for i, (image, *said) in enumerate(picks):
        for k, (name, pick) in enumerate(zip(PERSPECTIVES, said, strict=True)):
            if pick is None:
                continue
            row = prediction(pick.strip("!") or None, -1.0, id=f"q{i}", image_group=image, perspective=name, **fields)
            row |= {"adherence": {name: (i + k) / 10}, "criteria": {"named": float(i % 2), "checked": None}}
            if i == 4:
                row["criteria"] |= {"checked": 0.5}
            if pick == "!":
                row |= {"adherence": {}, "criteria": {}, "finish_reason": "refused", "refused": "400 too long"}
                row |= {"robust": dict(UNANSWERED), "medevalkit": dict(UNANSWERED)}
            rows.append(row)
    return rows


def found(rows) -> dict:
    return measured(rows, Summary(**DRAWN).mean)


def test_each_perspective_alone():
    each = found(answers())["each"]
    assert list(each) == list(PERSPECTIVES)
    assert [(each[p]["robust"]["accuracy"], each[p]["n"]) for p in PERSPECTIVES] == [
        (2 / 6, 6), (3 / 6, 6), (3 / 6, 6), (2 / 5, 5),
    ]  # fmt: skip
    # differential was refused question 2, bayesian was not asked question 3
    assert each[D]["adherence"] == pytest.approx((0.0 + 0.1 + 0.3 + 0.4 + 0.5) / 5) and each[D]["judged"] == 5
    assert each[B]["adherence"] == pytest.approx((0.3 + 0.4 + 0.5 + 0.7 + 0.8) / 5)
    assert each[D]["criteria"] == {"named": {"mean": 3 / 5, "n": 5}, "checked": {"mean": 0.5, "n": 1}}
    assert each[B]["criteria"]["named"] == {"mean": 2 / 5, "n": 5}
    interval = cluster_bootstrap_ci([1, 0, 0, 0, 0, 1], ["g0", "g0", "g1", "g2", "g3", "g4"], **DRAWN)
    assert tuple(each[D]["robust"][key] for key in ("accuracy", "ci_low", "ci_high")) == interval


@pytest.mark.parametrize("protocol", ["robust", "medevalkit"])
def test_what_the_perspectives_reach_together(protocol):
    rows = answers()
    if protocol == "medevalkit":  # the numbers of a protocol are its own
        for row in rows:
            row["robust"] = dict(UNANSWERED)
    both = found(rows)["together"]
    one, images = both[protocol], ["g0", "g0", "g1", "g2", "g3", "g4"]
    values = {
        "vote": [1, 0, 0, 0, 0, 1],
        "mean": [3 / 4, 1 / 4, 1 / 4, 1 / 3, 0, 1],
        "oracle": [1, 1, 1, 1, 0, 1],
        "gain": [1 / 4, -1 / 4, -1 / 4, -1 / 3, 0, 0],
        "agreement": [3 / 6, 1 / 6, 1 / 6, 1 / 3, 1, 1],
    }
    for name, of in values.items():
        mean = "mean" if name in ("gain", "agreement") else "accuracy"
        got = tuple(one[name][key] for key in (mean, "ci_low", "ci_high"))
        assert got == pytest.approx(cluster_bootstrap_ci(of, images, **DRAWN)) and one[name]["n"] == 6
    assert one["oracle"]["accuracy"] == 5 / 6 and one["agreement"]["mean"] == pytest.approx(19 / 36)
    assert one["best"]["perspective"] == I and one["best"]["accuracy"] == 0.5  # the first of two that are best
    assert one["alone"] == {D: 0, I: 1, A: 1, B: 1}
    # picks: 9 A, 10 B, 2 C, 2 unparsed: chance is (81 + 100 + 4) / 23^2
    assert one["kappa"] == pytest.approx((19 / 36 - 185 / 529) / (1 - 185 / 529)) == pytest.approx(3391 / 12384)


def test_kappa_is_that_of_a_published_table():
    """Ten subjects, fourteen raters, five categories: 0.210 (the worked example of Wikipedia's Fleiss' kappa)."""
    counts = [
        "0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
        "6 5 2 1 0", "0 2 2 3 7",
    ]  # fmt: skip
    asked = [
        [prediction("ABCDE"[k]) for k, count in enumerate(line.split()) for _ in range(int(count))] for line in counts
    ]
    assert kappa(asked, "robust") == pytest.approx(0.210, abs=5e-4)


def test_chance_is_that_of_the_kind_of_question():
    """Yes/no: yes yes, yes no; choice: B B, A A. By chance 5/8 and 1/2, together 9/16; observed 3/4."""
    pairs = [("yes_no", "yes", "yes"), ("yes_no", "yes", "no"), ("choice", "B", "B"), ("choice", "A", "A")]
    asked = [[prediction(pick, kind=kind) for pick in picks] for kind, *picks in pairs]
    assert kappa(asked, "robust") == pytest.approx(3 / 7)
    assert kappa([asked[2]], "robust") is None and kappa([asked[0], asked[2]], "robust") is None
    unparsed = [[prediction(None), prediction(None)], [prediction("A"), prediction("B")]]
    assert kappa(unparsed, "robust") == pytest.approx(-(1 / 8) / (7 / 8))  # never alike, where 2/16 would be by chance


def rotated() -> list[dict]:
    """Questions 0 and 4 under differential, 1 and 5 under intuitive, 2 under analytical, none under bayesian."""
    return [row for row in answers() if row["perspective"] == PERSPECTIVES[int(row["id"][1]) % 4]]


def test_rotated_questions_are_each_perspectives_own():
    out = found(rotated())
    assert out["together"] == {} and {name: one["n"] for name, one in out["each"].items()} == {D: 2, I: 2, A: 1}
    assert [out["each"][name]["medevalkit"]["accuracy"] for name in (D, I, A)] == [0.5, 1.0, 0.0]
    assert out["each"][D]["criteria"] == {"named": {"mean": 0.0, "n": 2}, "checked": {"mean": 0.5, "n": 1}}
    assert out["each"][I]["criteria"]["checked"] == {"mean": None, "n": 0}


def test_the_summary_holds_them_and_their_adherence():
    rows = answers()
    one = Summary(**DRAWN).of(rows, [record(i) for i in range(6)], protocol="robust", specialties=["all"])
    assert one["perspectives"] == found(rows) and "vote" not in one
    assert one["adherence"] == {name: one["perspectives"]["each"][name]["adherence"] for name in PERSPECTIVES}
    vote = one["perspectives"]["together"]["robust"]["vote"]
    assert vote == {key: one["protocols"]["robust"][key] for key in vote}
    plain = [prediction("B", id=f"q{i}", perspective=None) for i in range(6)]
    none = Summary(**DRAWN).of(plain, [record(i) for i in range(6)], protocol="robust", specialties=["all"])
    assert none["perspectives"] == {"each": {}, "together": {}, "groups": {}} and none["adherence"] == {}
    json.dumps(one, allow_nan=False)


def test_the_table_has_a_dash_where_nothing_was_asked():
    one = found([prediction("B", id=f"q{i}", image_group=f"{i}", perspective=I) for i in range(3)])
    table = perspective_rows({"vote": found(answers()), "rotate": found(rotated()), "one": one, "none": found([])})
    cells = {(row["model"], row["asked under"]): row for row in table}
    assert len(cells) == len(table) == (4 + 7) + 4 + 4 + 1
    first = cells["vote", D]
    assert first["robust [95% CI]"].startswith("0.33 [") and (first["n"], first["questions"]) == ("6", "the same")
    assert (first["right alone"], first["adherence"]) == ("0/0", "0.26")
    assert first["criteria"] == "named 0.60, checked 0.50 (1)" and cells["vote", I]["right alone"] == "1/1"
    assert cells["vote", "any of them (oracle)"]["medevalkit [95% CI]"].startswith("0.83 [")
    assert cells["vote", "best one"]["robust [95% CI]"].endswith(f"] {I}")
    assert cells["vote", "Fleiss' kappa"]["robust [95% CI]"] == "0.27"
    assert cells["vote", "gain of the vote"]["robust [95% CI]"].startswith("-0.10 [")
    assert cells["rotate", I]["questions"] == "different" and cells["rotate", I]["right alone"] == "-"
    assert cells["rotate", I]["criteria"] == "named 1.00, checked -"
    assert cells["one", I]["questions"] == "-" and cells["one", I]["n"] == "3"
    for name, perspective in (("rotate", B), ("one", D), ("none", "-")):
        rest = {key: cell for key, cell in cells[name, perspective].items() if key not in ("model", "asked under")}
        assert set(rest.values()) == {"-"}
    assert perspective_rows({"none": found([]), "majority": found([])}) == [] == perspective_rows({})
    assert markdown(table).count("\n") == len(table) + 2


def test_the_evaluation_prints_the_table(tmp_path, capsys):
    summary = Summary(**DRAWN).of(answers(), [record(i) for i in range(6)], protocol="robust", specialties=["all"])
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"question_set": {"public": False}}))
    print_result({"base": Run("eval", "base", "id", tmp_path)})
    said = capsys.readouterr().out
    assert "Perspectives" in said and "any of them (oracle)" in said and "different" in said.split("Models")[0]


def test_the_report_has_the_table_over_the_questions_compared(tmp_path, capsys):
    """Of runs that lack question 5, in Markdown, LaTeX and CSV; a run asked under no perspective has a dash."""
    fewer = [row for row in answers() if row["id"] != "q5"]
    plain = [row | {"perspective": None} for row in answers() if row["perspective"] == D]
    paths = [
        saved(tmp_path / name, [row | {"response": "x"} for row in rows], name=name, seed=0)
        for name, rows in (("vote", answers()), ("fewer", fewer), ("plain", plain))
    ]
    out = tmp_path / "out"
    config = config_for(
        tmp_path, f"report.runs=[{','.join(paths)}]", f"report.out={out}", "report.common=true",
        "report.published=null",
    )  # fmt: skip
    report.run(config)
    assert "Perspectives" in capsys.readouterr().out
    md, tex = (out / "comparison.md").read_text(), (out / "comparison.tex").read_text()
    section = md.split("## Perspectives\n")[1].split("\n## ")[0]
    assert "hash of the id" in section and "| plain | - | - | - |" in section
    assert "| vote | any of them (oracle) | 5 | the same | 80.0 [" in section and "| fewer | vote | 5 |" in section
    assert r"Fleiss' kappa" in tex
    with (out / "comparison.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "perspectives" and row["model"] == "vote"]
    numbers = {(row["measure"], row["perspective"], row["protocol"]): row for row in rows}
    assert len(numbers) == len(rows)
    assert float(numbers["accuracy", D, "robust"]["score"]) == 0.2 and numbers["accuracy", D, "robust"]["ci_low"]
    assert float(numbers["oracle", "", "medevalkit"]["score"]) == 0.8 and numbers["oracle", "", "robust"]["n"] == "5"
    assert float(numbers["best", I, "robust"]["score"]) == 0.4
    assert float(numbers["right alone", B, "robust"]["score"]) == 1
    assert numbers["criterion checked", D, ""]["n"] == "1" and float(numbers["adherence", D, ""]["score"]) == 0.2
    kept = json.loads((out / "comparison.json").read_text())["numbers"]
    assert sum(number["table"] == "perspectives" for number in kept) == 2 * len(rows)


def test_predictions_of_older_runs_are_read(tmp_path):
    """Without criteria; and of perspectives that are no longer there."""
    lines = [row | {"response": "x", "criteria": None} for row in rotated()]
    lines = [{key: value for key, value in row.items() if key != "criteria"} for row in lines]
    lines[0] |= {"perspective": "older", "adherence": {"older": 1.0}}
    out = found(lines)
    assert out["each"][D]["criteria"] == {} and out["each"]["older"]["adherence"] == 1.0
    assert {row["asked under"] for row in perspective_rows({"base": out})} == {*PERSPECTIVES, "older"}
    assert {row["perspective"] for row in rows_of_numbers(out)} == {D, I, A, "older"}
    path = Path(saved(tmp_path / "old", lines, name="old", seed=0))
    report.run(config_for(tmp_path, f"report.runs=[{path}]", "report.published=null"))


def test_kinds_of_questions_by_perspective():
    """Group `needs`: q0 to q2 need intuition, the others nothing."""
    rows = answers()
    for row in rows:
        row["groups"] = {"needs": "intuition" if row["id"] < "q3" else "nothing", "set": "one"}
    groups = found(rows)["groups"]
    assert list(groups) == ["needs"]  # `set` has one value
    cell = groups["needs"]["intuition"]
    assert [cell[p]["robust"]["accuracy"] for p in PERSPECTIVES] == [pytest.approx(x / 3) for x in (1, 2, 1, 1)]
    assert [groups["needs"]["nothing"][p]["robust"]["n"] for p in PERSPECTIVES] == [3, 3, 3, 2]
    shown = group_rows({"model": found(rows)}, "robust")
    assert shown[0] == {
        "model": "model", "questions": "needs intuition", D: "0.33 (3)", I: "0.67 (3)", A: "0.33 (3)", B: "0.33 (3)",
    }  # fmt: skip
    numbers = [one for one in rows_of_numbers(found(rows)) if one["measure"] == "accuracy, needs intuition"]
    assert [one["score"] for one in numbers if one["protocol"] == "robust" and one["perspective"] == I] == [
        pytest.approx(2 / 3)
    ]
    assert found([row for row in rows if row["perspective"] == D])["groups"] == {}
    assert group_rows({"model": found(answers())}, "robust") == []


def test_a_question_is_asked_under_the_perspective_that_it_needs():
    """`needed`: the record's own, whatever the hash of its id says; the hash where it names none or no perspective."""
    for needs in PERSPECTIVES:
        assert perspectives_of(replace(record(0), groups={"needs": needs}), "needed") == (needs,)
        asked = replace(record(0), groups={"needs": needs})
        assert perspectives_of(asked, "rotate") == perspectives_of(record(0), "rotate")
    for groups in ({}, {"needs": "luck"}):
        asked = replace(record(0), groups=groups)
        assert perspectives_of(asked, "needed") == perspectives_of(asked, "rotate")
