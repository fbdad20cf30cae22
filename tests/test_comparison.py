"""The comparison of finished eval runs: which questions, which numbers, and the tables a paper takes."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.evaluation.comparison import accuracies, paired, paired_over_seeds, seed_rows
from mmedexpert.evaluation.finished import EvalRun, aligned, read_runs
from mmedexpert.evaluation.stats import cluster_bootstrap_ci, holm, mcnemar_exact, paired_cluster_bootstrap
from mmedexpert.reporting.tables import csv_text, latex, markdown
from mmedexpert.stages import report

ROOT = Path(__file__).parents[1]


def rows(correct, **more):
    """Prediction lines; two questions per image, medevalkit always right on the first."""
    return [
        {
            "id": f"q{i}", "image_group": f"image{i // 2}", "specialties": ["all"], "response": "x" * 50, "gold": "A",
            "robust": {"correct": bool(c), "picked": "A" if c else None, "parsed": bool(c)},
            "medevalkit": {"correct": bool(c) or i == 0, "picked": "A", "parsed": True},
            "finish_reason": "length" if i == 1 else "stop", **more,
        }
        for i, c in enumerate(correct)
    ]  # fmt: skip


def saved(folder: Path, lines, *, done=True, config="eval: {}\n", benchmark=None, **manifest) -> str:
    folder.mkdir(parents=True)
    if benchmark:
        manifest["name"] = f"{manifest['name']}-{benchmark}"
        asked = {"name": benchmark, "source": [f"{benchmark} test.json"], "left_out": 7}
        (folder / "summary.json").write_text(json.dumps({"question_set": asked}))
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(config)
    if manifest:
        manifest.setdefault("recipe", f"{manifest['name']} of {config}")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    if done:
        (folder / "DONE").touch()
    return str(folder)


def runs_of(*paths, common=False) -> list[EvalRun]:
    return aligned(read_runs(paths), common=common)[0]


def pick(numbers, **wanted):
    (found,) = [n for n in numbers if all(n.get(key) == value for key, value in wanted.items())]
    return found


@pytest.fixture()
def two(tmp_path):
    """Paths of two runs on 60 questions, and their verdicts."""
    rng = np.random.default_rng(0)
    a, b = rng.random(60) < 0.8, rng.random(60) < 0.5
    return (
        saved(tmp_path / "a-1", rows(a), name="a", seed=0),
        saved(tmp_path / "b-1", rows(b), name="b", seed=0),
        a, b,
    )  # fmt: skip


def config_for(tmp_path, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = ["stage=report", f"paths.outputs={tmp_path / 'outputs'}", "eval.num_resamples=200"]
        published = f"report.published={ROOT / 'experiments' / 'published.yaml'}"
        return typed(compose("config", overrides=[*fixed, published, *overrides]))


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_accuracy_under_both_protocols_with_the_image_as_cluster(two):
    path_a, _, a, _ = two
    numbers = accuracies(runs_of(path_a), num_resamples=300, seed=0)
    robust = pick(numbers, protocol="robust", group="")
    assert robust["accuracy"] == pytest.approx(a.mean()) and robust["n"] == 60
    # aligned() sorts by id; the interval depends on the clusters only
    expected = cluster_bootstrap_ci(a, np.arange(60) // 2, num_resamples=5000)
    assert (robust["ci_low"], robust["ci_high"]) == pytest.approx(expected[1:], abs=0.03)
    assert robust["unparsed"] == pytest.approx(1 - a.mean()) and robust["truncated"] == pytest.approx(1 / 60)
    right = a.copy()
    right[0] = True
    assert pick(numbers, protocol="medevalkit", group="")["accuracy"] == pytest.approx(right.mean())


def test_breakdowns_of_specialties_groups_and_kinds(tmp_path):
    lines = rows([True] * 4 + [False] * 4, groups={"language": "en"}, modality="CT")
    for i, line in enumerate(lines):
        line["specialties"] = ["cardiology", "pediatrics"] if i < 2 else ["cardiology"]
        line["kind"] = "open" if i % 2 else "choice"
    numbers = accuracies(runs_of(saved(tmp_path / "a", lines)), num_resamples=50, seed=0)
    parts = {(n["group"], n["value"]): (n["n"], n["accuracy"]) for n in numbers if n["protocol"] == "robust"}
    assert parts == {
        ("", ""): (8, 0.5), ("kind", "choice"): (4, 0.5), ("kind", "open"): (4, 0.5),
        ("specialty", "pediatrics"): (2, 1.0),
    }  # fmt: skip  # one value for all questions (cardiology, en, CT) would repeat the total


def test_old_rows_without_groups_and_kind_are_read(tmp_path):
    assert len(runs_of(saved(tmp_path / "a", rows([1, 0])))[0].questions) == 2


def test_paired_numbers_are_those_of_stats(two):
    path_a, path_b, a, b = two
    runs = runs_of(path_a, path_b)
    numbers, notes = paired(runs, runs[1], seed=0)
    robust = pick(numbers, protocol="robust")
    assert (robust["model"], robust["against"], notes) == ("a", "b", [])
    assert (robust["wins"], robust["losses"]) == ((a & ~b).sum(), (b & ~a).sum())
    assert robust["p_mcnemar"] == pytest.approx(mcnemar_exact(a, b))
    expected = paired_cluster_bootstrap(a, b, np.arange(60) // 2)
    got = [robust[key] for key in ("difference", "ci_low", "ci_high", "p_bootstrap")]
    assert got == pytest.approx(expected, abs=0.02)


def test_the_order_of_lines_changes_nothing(tmp_path, two):
    path_a, path_b, a, _ = two
    shuffled = saved(tmp_path / "shuffled", rows(a)[::-1], name="a", seed=0)
    numbers = [
        paired(runs, runs[1], seed=0)[0] + accuracies(runs, num_resamples=50, seed=0)
        for runs in (runs_of(path_a, path_b), runs_of(shuffled, path_b))
    ]
    assert numbers[0] == numbers[1]


def test_holm_runs_over_all_comparisons_of_one_protocol(tmp_path):
    rng = np.random.default_rng(1)
    paths = [
        saved(tmp_path / f"{model}-{bench}", rows(rng.random(40) < rate), name=model, benchmark=bench, seed=0)
        for bench in ("slake", "vqa_rad")
        for model, rate in (("base", 0.4), ("dsa", 0.7), ("gba", 0.8))
    ]
    runs = runs_of(*paths)
    numbers, _ = paired(runs, runs[0], seed=0)
    family = [n for n in numbers if n["protocol"] == "robust"]
    assert [(n["benchmark"], n["model"], n["against"]) for n in family] == [
        (bench, model, "base") for bench in ("slake", "vqa_rad") for model in ("dsa", "gba")
    ]
    for kind in ("mcnemar", "bootstrap"):
        assert [n[f"holm_{kind}"] for n in family] == pytest.approx(holm([n[f"p_{kind}"] for n in family]))


def test_a_benchmark_without_the_reference_is_said(tmp_path):
    a = saved(tmp_path / "1", rows([1, 0]), name="base", benchmark="slake", seed=0)
    b = saved(tmp_path / "2", rows([1, 1]), name="gba", benchmark="slake", seed=0)
    c = saved(tmp_path / "3", rows([1, 1]), name="gba", benchmark="path_vqa", seed=0)
    runs = runs_of(a, b, c)
    numbers, notes = paired(runs, runs[0], seed=0)
    assert {n["benchmark"] for n in numbers} == {"slake"} and "path_vqa" in notes[0] and "base" in notes[0]


def test_all_on_one_image_gives_no_bootstrap_p(tmp_path):
    paths = [
        saved(tmp_path / name, [line | {"image_group": "one"} for line in rows(right)])
        for name, right in (("a", [1, 1, 1]), ("b", [0, 0, 1]))
    ]
    runs = runs_of(*paths)
    number = pick(paired(runs, runs[1], seed=0)[0], protocol="robust")
    assert number["p_bootstrap"] is None and number["holm_bootstrap"] is None and number["p_mcnemar"] == 0.5


# --- which runs and questions -----------------------------------------------------------------------------------------


def test_seeds_are_one_model_and_reported_apart(tmp_path):
    right = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    paths = [saved(tmp_path / f"gba-{s}", rows(r), name="gba", seed=s) for s, r in enumerate(right)]
    runs = runs_of(*paths)
    assert [run.label for run in runs] == ["gba (seed 0)", "gba (seed 1)", "gba (seed 2)"]
    number = pick(seed_rows(runs), protocol="robust")
    assert (number["model"], number["seeds"], number["n"]) == ("gba", 3, 4)
    assert (number["accuracy"], number["std"]) == pytest.approx((0.5, 0.25)) and "ci_low" not in number
    assert "50.0 \u00b1 25.0" in markdown(report.sections(seed_rows(runs), [])[0][2])
    told = report.overview(accuracies(runs, num_resamples=20, seed=0) + seed_rows(runs))
    assert [row["model"] for row in told] == [*(run.label for run in runs), "gba (mean \u00b1 std of 3 seeds)"]
    assert told[-1]["robust [95% CI]"] == "50.0 \u00b1 25.0"


def arms(tmp_path, verdicts):
    """Runs of one name: (arm, seed) -> verdicts; each in its own folder with the tree of what it was made from."""
    paths = []
    for (weights, seed), right in verdicts.items():
        folder = tmp_path / "outputs" / "eval" / f"reasoner-{len(paths)}"
        saved(folder, rows(right), name="reasoner", seed=seed, recipe=f"recipe {weights}")
        tree = {"stage": "eval", "key": {"gba": {"weights": weights, "steps": 40}}, "seed": seed, "inputs": {}}
        (folder / "identity.json").write_text(json.dumps(tree))
        paths.append(str(folder))
    return paths


def test_arms_of_one_name_are_told_apart_and_never_averaged(tmp_path):
    plain, whole = (0, 0, 0, 0), (1, 1, 1, 1)
    paths = arms(tmp_path, {
        (plain, 0): [1, 0, 0, 0], (plain, 1): [1, 1, 0, 0], (whole, 0): [1, 1, 1, 0], (whole, 1): [1, 1, 1, 1],
    })  # fmt: skip
    runs = runs_of(*paths)
    families = ["reasoner (gba.weights=[0,0,0,0])", "reasoner (gba.weights=[1,1,1,1])"]
    assert [run.label for run in runs] == [f"{family} (seed {s})" for family in families for s in (0, 1)]
    found = {n["model"]: n for n in seed_rows(runs) if n["protocol"] == "robust"}
    assert list(found) == families and [n["accuracy"] for n in found.values()] == [0.375, 0.875]
    # each seed against the control's same seed, and over seeds
    tests = {n["model"]: n for n in paired(runs, runs[0], seed=0)[0] if n["protocol"] == "robust"}
    assert {name: (n["against"][-2], n["difference"]) for name, n in tests.items()} == {
        f"{families[1]} (seed 0)": ("0", 0.5), f"{families[1]} (seed 1)": ("1", 0.5),
    }  # fmt: skip
    (over,) = [n for n in paired_over_seeds(runs, runs[0], seed=0) if n["protocol"] == "robust"]
    assert (over["model"], over["against"], over["seeds"]) == (families[1], families[0], 2)
    assert over["difference"] == 0.5 and over["std"] == 0.0 and over["ci_low"] <= 0.5 <= over["ci_high"]


def test_namesakes_whose_making_is_not_told_keep_their_folders_names(tmp_path):
    paths = arms(tmp_path, {("[0]", 0): [1, 0], ("[1]", 0): [1, 1]})
    for path in paths:
        (Path(path) / "identity.json").unlink()
    assert [run.label for run in runs_of(*paths)] == ["reasoner-0", "reasoner-1"]


@pytest.mark.parametrize(
    ("config", "seed"), [("eval: {perspective: none}\n", 1), ("eval: {}\n", 0), ("eval: {}\n", None)]
)
def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path, config, seed):
    a = saved(tmp_path / "gba-x", rows([1, 0]), name="gba", seed=0)
    b = saved(tmp_path / "gba-y", rows([1, 1]), name="gba", seed=seed, config=config)
    runs = runs_of(a, b)
    assert seed_rows(runs) == [] and [run.label for run in runs] == ["gba-x", "gba-y"]


def test_what_was_asked_and_different_settings_are_told(tmp_path):
    a = saved(tmp_path / "a", rows([1, 0]), name="base", benchmark="slake", seed=0)
    b = saved(tmp_path / "b", rows([1, 1]), name="gba", benchmark="slake", seed=0)
    c = saved(tmp_path / "c", rows([1, 1]), name="dsa", benchmark="slake", seed=0, config="eval: {ask: other}\n")
    assert aligned(read_runs([a, b]), common=False)[1] == ["slake: slake test.json; left out: 7"]
    assert "settings differ" in aligned(read_runs([a, b, c]), common=False)[1][-1]


def test_labels_never_collide(tmp_path):
    paths = [saved(tmp_path / part / "gba", rows([1, 0]), name="gba", seed=0) for part in ("x", "y")]
    assert len({run.label for run in runs_of(*paths)}) == 2


def test_different_questions_are_refused_or_cut_to_the_common_ones(tmp_path):
    a = saved(tmp_path / "a", rows([1, 1, 1, 0]))
    b = saved(tmp_path / "b", rows([0, 1, 1, 1, 1, 1])[1:])
    with pytest.raises(UserError, match=r"3 of 6 questions .*q0, not in b.*report\.common=true.* 3 common"):
        runs_of(a, b)
    runs, notes = aligned(read_runs([a, b]), common=True)
    assert [list(run.questions) for run in runs] == [["q1", "q2", "q3"]] * 2 and "3 common" in notes[-1]
    numbers = accuracies(runs, num_resamples=20, seed=0)
    assert pick(numbers, model="a", protocol="robust", group="")["accuracy"] == pytest.approx(2 / 3)


def test_runs_without_a_common_question_are_refused_even_with_common(tmp_path):
    b = saved(tmp_path / "b", [line | {"id": f"other{i}"} for i, line in enumerate(rows([1, 0]))])
    with pytest.raises(UserError, match="no question in common"):
        runs_of(saved(tmp_path / "a", rows([1, 0])), b, common=True)


@pytest.mark.parametrize("key", ["gold", "image_group"])
def test_the_same_id_with_another_answer_or_image_is_refused(tmp_path, key):
    changed = rows([1, 0, 1])
    changed[1][key] = "B"
    with pytest.raises(UserError, match=r"1 questions have another gold answer or image.*q1"):
        runs_of(saved(tmp_path / "a", rows([1, 0, 1])), saved(tmp_path / "b", changed), common=True)


def test_bad_input_is_told_with_its_place(tmp_path, two):
    with pytest.raises(UserError, match=r"report\.runs is empty"):
        read_runs([])
    with pytest.raises(UserError, match="twice"):
        read_runs([two[0], f"{two[0]}/predictions.jsonl"])
    with pytest.raises(UserError, match=r"nowhere is not there"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="not finished"):
        read_runs([saved(tmp_path / "cut", rows([1]), done=False)])
    with pytest.raises(UserError, match="no prediction"):
        read_runs([saved(tmp_path / "empty", [])])
    broken = Path(saved(tmp_path / "manifest", rows([1]), name="a"))
    for content in ("{", "[1]"):
        (broken / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json is not a JSON object"):
            read_runs([broken])
    for i, line in enumerate(({"id": "q"}, [1], rows([1])[0] | {"robust": {"correct": "yes", "parsed": True}})):
        with pytest.raises(UserError, match="line 2 is no prediction"):
            read_runs([saved(tmp_path / f"odd{i}", [rows([1])[0], line])])


def test_a_line_cut_by_a_kill_is_left_out_and_told(tmp_path):
    folder = Path(saved(tmp_path / "a", rows([1, 0, 1]), name="a", seed=0))
    with (folder / "predictions.jsonl").open("a") as file:
        file.write('{"id": "q3", "rob')
    runs, notes = aligned(read_runs([folder]), common=False)
    assert len(runs[0].questions) == 3 and "1 unreadable" in notes[0]


def test_several_perspectives_are_one_vote(tmp_path):
    lines = []
    for perspective, right in zip("abc", ([1, 1], [1, 0], [0, 0]), strict=True):
        for line in rows(right, perspective=perspective, adherence={}, mean_logp=-1.0):
            line["robust"] = {"correct": line["robust"]["correct"], "parsed": True, "picked": "A"}
            line["robust"]["picked"] = "A" if line["robust"]["correct"] else "B"
            lines.append(line)
    (run,) = runs_of(saved(tmp_path / "vote", lines))
    assert [q.correct["robust"] for q in run.questions.values()] == [True, False]


# --- tables -----------------------------------------------------------------------------------------------------------


def test_latex_escapes_and_rules():
    table = latex([{"model": r"a_b & 50% \x{}~^#$", "p": "<0.001"}, {"model": "[q] Qwen-7B", "p": "-0.5 [-1.0, 2]"}])
    assert r"a\_b \& 50\% \textbackslash{}x\{\}\textasciitilde{}\textasciicircum{}\#\$" in table
    assert r"\textless{}0.001 \\" in table and "{}[q] Qwen-7B & $-$0.5 [$-$1.0, 2]" in table
    lines = table.splitlines()
    assert lines[0] == r"\begin{tabular}{lr}" and lines[1] == r"\toprule" and lines[3] == r"\midrule"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert "1 $\\pm$ 2" in latex([{"x": "1 \u00b1 2"}])


def test_markdown_and_csv_keep_odd_names_in_their_cell():
    assert markdown([{"model": "a|b\nc"}]).splitlines()[-1] == r"| a\|b c |"
    odd = [{"model": 'a,"b"', "n": 1}, {"model": "c", "p": None, "late": -0.5}]
    assert [*csv.reader(csv_text(odd).splitlines())] == [
        ["model", "n", "p", "late"], ['a,"b"', "1", "", ""], ["c", "", "", "-0.5"],
    ]  # fmt: skip


def test_the_stage_prints_and_writes_every_file(tmp_path, two, capsys):
    path_a, path_b, a, _ = two
    out = tmp_path / "out"
    config = config_for(tmp_path, f"report.runs=[{path_a},{path_b}]", f"report.against={path_b}", f"report.out={out}")
    assert report.run(config) == {}
    printed = capsys.readouterr().out
    assert f"{100 * a.mean():.1f} [" in printed and "wins/losses" in printed
    md, tex = (out / "comparison.md").read_text(), (out / "comparison.tex").read_text()
    assert md.count("\n| --- |") == tex.count(r"\toprule") == md.count("\n## ") > 10
    assert f"| a | 60 | {100 * (1 - a.mean()):.1f}% |" in md and "| not run | ours | - | - |" in md
    with (out / "comparison.csv").open() as file:
        numbers = [*csv.DictReader(file)]
    assert {n["table"] for n in numbers} == {"accuracy", "paired", "published"}
    assert float(pick(numbers, table="accuracy", model="a", protocol="robust")["accuracy"]) == a.mean()
    kept = json.loads((out / "comparison.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [run["label"] for run in kept["runs"]] == ["a", "b"] and len(kept["numbers"]) == 6


def test_the_stage_names_its_own_folder_and_checks_against(tmp_path, two, capsys):
    report.run(config_for(tmp_path, f"report.runs=[{two[0]}]", "report.published=null"))
    (folder,) = (tmp_path / "outputs" / "report").iterdir()
    assert (folder / "comparison.md").exists() and "Published" not in (folder / "comparison.md").read_text()
    for runs, against in ((two[0], two[0]), (f"{two[0]},{two[1]}", tmp_path)):
        with pytest.raises(UserError, match=r"report\.against"):
            report.run(config_for(tmp_path, f"report.runs=[{runs}]", f"report.against={against}"))


# --- published numbers ------------------------------------------------------------------------------------------------


def test_ours_stand_beside_the_published_rows(tmp_path):
    paths = [saved(tmp_path / f"gba-{s}", rows([1, 1, 1, s]), name="gba", benchmark="slake", seed=s) for s in (0, 1)]
    runs = runs_of(*paths)
    numbers = accuracies(runs, num_resamples=20, seed=0) + seed_rows(runs)
    source = report.Source("T", "", {"slake": "SLAKE", "pmc_vqa": "PMC"}, {"Peer": [82.5, None]})
    title, _, table = report.sections(numbers, [source])[-1]
    assert title == "Published: T" and table == [
        {"model": "gba", "source": "ours", "SLAKE": "87.5", "PMC": "-"},  # the mean over seeds, not each
        {"model": "Peer", "source": "published", "SLAKE": "82.5", "PMC": "-"},
    ]


def test_published_file_holds_what_the_notes_say(shared):
    paper = (shared / "docs" / "paper.md").read_text(encoding="utf-8").replace("*", "")
    tables = report.load_published(ROOT / "experiments" / "published.yaml")
    in_paper = {
        (cells[0], tuple(math.nan if c == "\u2013" else float(c) for c in cells[1:]))
        for line in paper.splitlines()
        if (cells := [c.strip() for c in line.strip("|").split("|")]) and len(cells) >= 7 and cells[1][:1].isdigit()
    }
    ours = {
        (model, tuple(math.nan if v is None else float(v) for v in values))
        for table in tables
        for model, values in table.rows.items()
        if len(values) >= 7 and model != "Lingshu-I-8B"
    }
    assert {repr(row) for row in ours} == {repr(row) for row in in_paper} and len(ours) == 32
    text = paper.split("# Numbers for the tables")[0] + paper.split("Weak evidence")[1]
    for table in tables:
        for model, values in table.rows.items():
            for value in values if len(values) < 7 or model == "Lingshu-I-8B" else []:
                assert value is None or str(value) in text or f"{value:.2f}" in text, (model, value)


def test_published_tables_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = Path("experiments/published.yaml")
    assert report.load_published(named) == report.load_published(ROOT / named) != []
    own = tmp_path / named
    own.parent.mkdir()
    own.write_text("tables: []")
    assert report.load_published(named) == []


def test_published_mistakes_are_told(tmp_path):
    good = {"source": "S", "note": "", "columns": {"slake": "SLAKE"}, "rows": {"M": [1.0]}}
    for fault, content in (
        ("needs 1 numbers", {"tables": [good | {"rows": {"M": [1, 2]}}]}),
        ("needs 1 numbers", {"tables": [good | {"rows": {"M": ["83%"]}}]}),
        ("needs 1 numbers", {"tables": [good | {"rows": {"M": 83}}]}),
        ("not a list", {"tables": [good | {"rows": ["M"]}]}),
        ("not a list", {"tables": [good | {"year": 2026}]}),
        ("not a list", {}),
        ("not a list", None),
    ):
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match=fault):
            report.load_published(tmp_path / "p.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        report.load_published(tmp_path / "none.yaml")
