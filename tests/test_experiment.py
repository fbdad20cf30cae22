"""The table of an experiment: arms over seeds, by hand; what is shown, what is missing, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t
from test_comparison import rows, saved
from test_config import composed

from mmedexpert.errors import UserError
from mmedexpert.evaluation.finished import aligned, read_runs
from mmedexpert.evaluation.seeds import arms_of, best_first, named, paired
from mmedexpert.reporting.arms import as_json, kind_rows, matrix_rows, resolution, rows_of, together_rows
from mmedexpert.runtime.runs import Run
from mmedexpert.stages.experiment import conclude

QUESTIONS, FEW = 40, range(4)


def macro(right):
    """Mean over the two specialties, by seed."""
    return (right[:, FEW].mean(1) + right[:, FEW.stop :].mean(1)) / 2


def evaluation(folder: Path, model: str, seed: int, right, *, recipe="", benchmark="set", asked=None) -> Path:
    """A finished evaluation of a small specialty and a large one: its macro accuracy is not its share of right ones."""
    lines = rows(right)
    for number, line in enumerate(lines):
        line["specialties"] = ["pediatrics" if number in FEW else "adult_medicine"]
        line["groups"] = {"needs": "bayesian" if number < QUESTIONS // 4 else "intuitive"}
    path = Path(saved(
        folder / f"{model}-{benchmark}-{seed}{recipe}", lines, name=model, seed=seed, benchmark=benchmark,
        recipe=recipe or model,
    ))  # fmt: skip
    summary = {
        "question_set": {"name": benchmark, "source": ["drawn"], "left_out": 0, "public": False}, "protocol": "robust",
        "perspectives": asked or {"each": {}, "together": {}},
        "macro_accuracy": float(macro(np.asarray(right)[None])[0]),
        "per_specialty": {"pediatrics": {}, "adult_medicine": {}},
    }  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture()
def folders(tmp_path):
    """Three seeds of an arm and of its reference, two of a third arm; the verdicts of the first two by seed."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.random((3, QUESTIONS)) < 0.6, rng.random((3, QUESTIONS)) < 0.5
    ours[:, FEW], theirs[:, FEW] = True, False
    paths = [evaluation(tmp_path, "ours", seed, ours[seed]) for seed in range(3)]
    paths += [evaluation(tmp_path, "theirs", seed, theirs[seed]) for seed in range(3)]
    paths += [evaluation(tmp_path, "third", seed, ours[seed]) for seed in (1, 2)]
    return paths, ours, theirs


def arms(paths):
    return arms_of(aligned(read_runs(paths), common=False)[0])


def in_order(verdicts):
    """As `aligned` orders questions: by id."""
    return verdicts[..., np.argsort([f"q{i}" for i in range(QUESTIONS)])]


def test_the_difference_is_of_the_same_seeds_with_an_interval_over_them(folders):
    paths, ours, theirs = folders
    first, reference, third = arms(paths)
    one = paired(first, reference)
    over = 100 * (macro(ours) - macro(theirs))
    assert one.seeds == (0, 1, 2) and one.difference == pytest.approx(over.mean())
    assert one.half == pytest.approx(t.ppf(0.975, 2) * over.std(ddof=1) / 3**0.5)
    assert one.low < one.difference < one.high and one.high - one.low < 40  # of the same quantity
    assert one.low > 100 * (ours.mean() - theirs.mean())
    assert paired(third, reference).seeds == (1, 2)
    assert paired(third, reference).difference == pytest.approx(over[1:].mean())
    assert paired(reference, reference) is None
    alone = arms([paths[0], *paths[3:6]])
    assert paired(alone[0], alone[1]).half is None


def test_scores_are_the_runs_macro_accuracy_and_parts_are_counted(folders):
    paths, ours, _ = folders
    first = arms(paths)[0]
    assert first.scores() == pytest.approx(dict(enumerate(100 * macro(ours))))
    parts = first.parts()
    assert parts["specialty", "pediatrics"] == pytest.approx(100 * ours[:, FEW].mean())
    assert parts["needs", "bayesian"] == pytest.approx(100 * ours[:, : QUESTIONS // 4].mean())
    assert len(parts) == 4


def test_rows_show_each_arm_once_with_its_spread(folders):
    found = best_first(arms(folders[0]))
    reference = named(found, "theirs")
    against = {arm.label: paired(arm, reference) for arm in found}
    shown = {row["model"]: row for row in rows_of(found, against, "theirs")}
    assert list(shown)[-1] == "theirs" and shown["theirs"]["against theirs"] == "-"
    scores = list(found[0].scores().values())
    assert shown[found[0].label]["spread"] == f"{np.std(scores, ddof=1):.1f}"
    assert shown["third"]["seeds"] == "2" and shown["ours"]["each seed"].count(",") == 2
    assert {"adult", "pediatric"} <= set(shown["ours"])
    assert [set(row) for row in kind_rows(found)] == [{"model", "needs bayesian", "needs intuitive"}] * 3
    assert "would be found four times in five" in resolution(against) and resolution({"a": None}) == ""
    held = as_json(found, against, "theirs")["arms"]["ours"]
    assert held["seeds"]["2"]["run"] == "ours-set-2" and held["questions"] == QUESTIONS
    assert held["against_reference"]["difference"] == pytest.approx(against["ours"].difference)


def test_two_runs_of_one_seed_are_no_seeds(folders, tmp_path):
    paths, ours, _ = folders
    again = evaluation(tmp_path / "again", "ours", 1, ours[0])
    found = arms([*paths, again])
    assert all(len(arm.runs) < 3 for arm in found if arm.label != "theirs")


def concluded(folders, tmp_path, *overrides: str, failed=()):
    paths, *_ = folders
    config = composed(
        "results.id=claim",
        "eval.num_resamples=100",
        "report.published=null",
        f"paths.outputs={tmp_path / 'out'}",
        *overrides,
    )
    return conclude(config, [(config, [Run("eval", path.name, "x", path) for path in paths])], failed)


def test_the_folder_holds_table_figure_and_numbers(folders, tmp_path, capsys):
    folder = concluded(
        folders,
        tmp_path,
        "results.against=theirs",
        "results.claim=it works",
        failed=["seed=4 data.root=/home/maria/films"],
    )
    assert folder == tmp_path / "out/experiments/claim"
    made = {"table.md", "results.json", "set.tex", "set.png", "set.svg", "report.html"}
    assert {path.name for path in folder.iterdir()} == made | {
        f"comparison.{kind}" for kind in ("md", "tex", "csv", "json")
    }
    page = (folder / "report.html").read_text()
    assert "ours (seed 2)" in page
    begins = page[page.index("<h1>") : page.index('id="headline"')]  # what it is about, and the table over seeds first
    assert "maria" not in page and "failed, so not in it: seed=4" in begins
    assert "<h1>claim</h1>" in begins and "Claim under test: it works" in begins and "each seed" in begins
    text = (folder / "table.md").read_text()
    assert "it works" in text and "| ours | 3 |" in text and "failed, so not in it: seed=4" in text
    assert "settings differ" not in text and "by bootstrap over images" in text
    assert text.index("| ours | 3 |") < text.index("| theirs | 3 |")
    assert r"\begin{tabular}" in (folder / "set.tex").read_text()
    assert json.loads((folder / "results.json").read_text())["sets"]["set"]["reference"] == "theirs"
    assert "claim on set" in capsys.readouterr().out


def test_scores_and_differences_are_of_the_same_questions(folders, tmp_path):
    """One run has asked more questions, of another specialty: over the common ones it equals the other."""
    _, ours, _ = folders
    evaluation(tmp_path, "plain", 0, ours[0])
    more = evaluation(tmp_path, "more", 0, ours[0])
    lines = (more / "predictions.jsonl").read_text().splitlines()
    extra = {**json.loads(lines[0]), "id": "another", "specialties": ["oncology_surgery"]}
    extra["robust"] = {**extra["robust"], "correct": True}
    (more / "predictions.jsonl").write_text("\n".join([*lines, json.dumps(extra)]) + "\n")
    summary = json.loads((more / "summary.json").read_text())
    summary |= {"macro_accuracy": 0.99, "per_specialty": {**summary["per_specialty"], "oncology_surgery": {}}}
    (more / "summary.json").write_text(json.dumps(summary))
    found, _ = aligned(read_runs([more, tmp_path / "plain-set-0"]), common=True)
    one, other = arms_of(found)
    assert one.scores() == pytest.approx(other.scores()) and one.parts() == other.parts()
    assert paired(one, other).difference == 0


def test_a_finer_specialty_beside_the_four_is_no_column(tmp_path, folders):
    _, ours, _ = folders
    path = evaluation(tmp_path, "finer", 0, ours[0])
    lines = [json.loads(line) for line in (path / "predictions.jsonl").read_text().splitlines()]
    for line in lines[10:20]:
        line["specialties"] = [*line["specialties"], "cardiology"]
    (path / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (one,) = arms([path])
    assert {name for group, name in one.parts() if group == "specialty"} == {"pediatrics", "adult_medicine"}
    values = [value for (group, _), value in one.parts().items() if group == "specialty"]
    assert one.scores()[0] == pytest.approx(np.mean(values))


def test_each_row_may_be_compared_with_its_own_model_in_an_arm(tmp_path):
    """`results.against=plain`, an arm: the reasoner of each arm with the plain one, and so the merges."""
    rng = np.random.default_rng(3)
    right = {(model, arm): rng.random(QUESTIONS) < 0.5 for model in ("reasoner", "caci") for arm in ("plain", "more")}
    jobs = []
    for seed in (0, 1):
        for arm in ("plain", "more"):
            made = [
                evaluation(tmp_path, model, seed, right[model, arm], recipe=f"{model}-{arm}")
                for model in ("reasoner", "caci")
            ]
            config = composed(
                "results.id=claim", "results.against=plain", "eval.num_resamples=100", "report.published=null",
                f"paths.outputs={tmp_path / 'out'}", "arms={plain:{},more:{}}", f"arm={arm}",
            )  # fmt: skip
            jobs.append((config, [Run("eval", path.name, "x", path) for path in made]))
    folder = conclude(jobs[0][0], jobs)
    found = json.loads((folder / "results.json").read_text())["sets"]["set"]["arms"]
    assert found["reasoner (plain)"]["against_reference"] is None is found["caci (plain)"]["against_reference"]
    for model in ("reasoner", "caci"):
        wanted = 100 * (macro(right[model, "more"][None]) - macro(right[model, "plain"][None]))[0]
        assert found[f"{model} (more)"]["against_reference"]["difference"] == pytest.approx(wanted)
    assert "against plain" in (folder / "table.md").read_text()


def test_one_arm_alone_is_called_by_its_name_and_a_missing_reference_is_told(tmp_path):
    right = np.random.default_rng(1).random(QUESTIONS) < 0.5
    path = evaluation(tmp_path, "caci", 0, right)
    config = composed(
        "results.id=claim", "results.against='caci (plain)'", "eval.num_resamples=100", "report.published=null",
        f"paths.outputs={tmp_path / 'out'}", "arms={plain:{},more:{}}", "arm=more",
    )  # fmt: skip
    table = (conclude(config, [(config, [Run("eval", path.name, "x", path)])]) / "table.md").read_text()
    assert "| caci (more) |" in table and "nothing to compare with: caci (plain) is not among these runs" in table


def test_the_command_stands_in_the_table_without_secrets_and_places(folders, tmp_path, monkeypatch):
    words = [
        "run.py",
        "-m",
        f"paths.outputs={tmp_path}",
        "engine.endpoint.base_url=http://u:secret@host/v1",
        "gba.steps=7",
    ]
    monkeypatch.setattr("sys.argv", words)
    folder = concluded(folders, tmp_path)
    for text in ((folder / "table.md").read_text(), json.loads((folder / "results.json").read_text())["command"]):
        assert "gba.steps=7" in text and "secret" not in text and str(tmp_path) not in text


def test_only_the_models_asked_for_are_shown_beside_the_reference(folders, tmp_path):
    text = (concluded(folders, tmp_path, "results.against=theirs", "results.models=[third]") / "table.md").read_text()
    assert "| third |" in text and "| theirs |" in text and "| ours |" not in text


def shares(value: float) -> dict:
    return {"robust": {"accuracy": value}, "medevalkit": {"accuracy": 0.0}}


def asked_under_all(own: float, other: float, vote: float) -> dict:
    """A summary's `perspectives`: right by `own` where a question needs it, by `other` elsewhere."""
    names = ("differential", "intuitive", "analytical", "bayesian")
    together = {
        "vote": {"accuracy": vote}, "mean": {"accuracy": (own + 3 * other) / 4},
        "best": {"accuracy": own - 0.1}, "oracle": {"accuracy": own + 0.2},
        "agreement": {"mean": 0.5}, "kappa": 0.25,
    }  # fmt: skip
    return {
        "each": {name: shares((own + 3 * other) / 4) for name in names},
        "together": {"robust": together, "medevalkit": {}},
        "groups": {"needs": {n: {m: shares(own if m == n else other) for m in names} for n in names}},
    }


def test_what_perspectives_know_together_is_a_mean_over_seeds(tmp_path, folders):
    _, ours, _ = folders
    for seed, own in enumerate((0.6, 0.7, 0.8)):
        asked = asked_under_all(own, 0.5, vote=own - 0.2)
        evaluation(tmp_path / "vote", "all", seed, ours[seed], asked=asked)
    paths = [tmp_path / f"vote/all-set-{seed}" for seed in range(3)]
    row, *rest = together_rows(arms([*paths, *folders[0]]))
    assert not rest  # those asked under one perspective are in no such row
    assert (row["best"], row["vote"], row["oracle"], row["kappa"]) == ("60.0", "50.0", "90.0", "0.25")
    assert row["oracle - best"] == "+30.0 [+30.0, +30.0]" and row["analytical"] == "55.0"
    found = matrix_rows(arms(paths))
    assert [one["needs"] for one in found] == ["differential", "intuitive", "analytical", "bayesian"]
    assert (found[1]["intuitive"], found[1]["bayesian"]) == ("70.0", "50.0")
    half = t.ppf(0.975, 2) * 10 / 3**0.5
    assert found[1]["own - next"] == f"+20.0 [{20 - half:+.1f}, {20 + half:+.1f}]"


def test_a_part_of_a_table_does_not_take_its_place(folders, tmp_path):
    paths, ours, theirs = folders
    whole = concluded(folders, tmp_path, "results.against=theirs")
    before = (whole / "table.md").read_text()
    part = concluded((paths[:2], ours, theirs), tmp_path)
    assert part.name == "claim-part" and (whole / "table.md").read_text() == before
    other = evaluation(tmp_path / "new", "fourth", 0, ours[0])  # one more, without those that are there
    assert concluded(([other], ours, theirs), tmp_path).name == "claim-part"
    assert (whole / "table.md").read_text() == before and "Command: run.py" in before
    assert concluded(folders, tmp_path) == whole and (whole / "table.md").read_text() != before


def test_a_model_that_some_arms_have_is_called_by_them(tmp_path, capsys):
    """`start` is in every arm; each arm has a reasoner of its own, `few` a second model; in seed 1 `many` failed."""
    right = np.random.default_rng(1).random((5, QUESTIONS)) < 0.5
    jobs = []
    for seed in (0, 1):
        shared = evaluation(tmp_path, "start", seed, right[0])
        for place, arm in enumerate(("few", "many")):
            if (seed, arm) == (1, "many"):
                continue
            made = [shared, evaluation(tmp_path, "reasoner", seed, right[1 + place], recipe=arm)]
            made += [evaluation(tmp_path, "caci", seed, right[3])] if arm == "few" else []
            kinds = (("30", 3), ("90", 4)) if arm == "few" else ()  # two of one model in one arm
            made += [evaluation(tmp_path, "sft_all", seed, right[place], recipe=kind) for kind, place in kinds]
            config = composed(
                "results.id=claim", "results.against='reasoner (few)'", "eval.num_resamples=100",
                "report.published=null", f"paths.outputs={tmp_path / 'out'}", "arms={few:{},many:{}}", f"arm={arm}",
            )  # fmt: skip
            jobs.append((config, [Run("eval", path.name, "x", path) for path in made]))
    folder = conclude(jobs[0][0], jobs, ["seed=1 arm=many"])
    table = (folder / "table.md").read_text()
    for row in ("| start | 2 |", "| reasoner (few) | 2 |", "| reasoner (many) | 1 |", "| caci | 2 |"):
        assert row in table
    assert "| sft_all (few) |" not in table and table.count("\n| sft_all") >= 2
    assert "against reasoner (few)" in table and "failed, so not in it: seed=1 arm=many" in table


def test_the_cost_of_all_that_a_table_was_made_of_is_told(folders, tmp_path):
    paths, *_ = folders
    outputs = tmp_path / "out"
    upstream = outputs / "gba/default-0123456789"
    upstream.mkdir(parents=True)
    told = {"wall_seconds": 600, "git_sha": "b" * 40, "device": "cpu", "inputs": {}}
    (upstream / "manifest.json").write_text(json.dumps(told))
    for path in paths:
        manifest = json.loads((path / "manifest.json").read_text())
        manifest |= {"wall_seconds": 60, "git_sha": "a" * 40, "device": "cpu", "inputs": {"model": "0123456789"}}
        (path / "manifest.json").write_text(json.dumps(manifest))
    folder = concluded(folders, tmp_path)
    made_of = json.loads((folder / "results.json").read_text())["made_of"]
    assert made_of == {"runs": 9, "minutes": 18.0, "commits": ["a" * 40, "b" * 40], "devices": ["cpu"]}
    assert (
        "Made of 9 runs, 18 minutes one after the other on cpu; code at aaaaaaa, bbbbbbb."
        in (folder / "table.md").read_text()
    )


def test_without_a_reference_or_evaluations_there_is_less(folders, tmp_path):
    text = (concluded(folders, tmp_path) / "table.md").read_text()
    assert "against" not in text.partition("Percent of")[0]
    assert concluded(([],), tmp_path / "none") is None and not (tmp_path / "none/out").exists()


def test_a_reference_that_is_not_asked_is_told_before_any_work():
    with pytest.raises(UserError, match=r"results\.against: grop .* did you mean 'grpo'"):
        composed("results.id=x", "results.against=grop", "eval.models=[start,grpo]")
    for merge in ("caci", "ties", "regmean"):  # the reference is another job's
        composed("experiment=ablation_merge", f"merge={merge}")
    with pytest.raises(UserError, match=r"results\.against: cacy .* did you mean 'caci'"):
        composed("experiment=ablation_merge", "merge=ties", "results.against=cacy")
    composed("experiment=ablation_gba_weights")


@pytest.mark.parametrize("name", ["../up", "a/b", ".."])
def test_an_id_is_the_name_of_a_folder(name):
    with pytest.raises(UserError, match=r"results\.id"):
        composed(f"results.id={name}")
