"""Tables a person reads: every model and job has a row of its own, whatever is asked and however things are named."""

from __future__ import annotations

import json

from test_config import composed

from mmedexpert.reporting.tables import job_rows, model_rows, print_jobs, short_names
from mmedexpert.runtime.jobs import Job, varied
from mmedexpert.runtime.runs import Run
from mmedexpert.stages.pipeline import on_benchmarks, summarise


def result(score: float, *specialties: str) -> dict:
    entry = {"accuracy": score, "ci_low": score, "ci_high": score, "n": 4}
    macro = {"macro_accuracy": score, "macro_ci_low": score, "macro_ci_high": score}
    return {**macro, "per_specialty": {name: entry for name in specialties}, "parse_failure_rate": 0, "adherence": {}}


def test_a_short_name_that_is_anothers_is_not_used():
    assert short_names(["adult_medicine", "brain_sensory"]) == {"adult_medicine": "adult", "brain_sensory": "brain"}
    both = ("adult", "adult_medicine")
    assert short_names(both) == {"adult": "adult", "adult_medicine": "adult_medicine"}
    models = {
        "experts": {"adult": result(0.1, *both), "adult_medicine": result(0.2, *both)},
        "caci": result(0.3, *both),
    }
    rows = model_rows({"models": models})
    assert [row["model"] for row in rows] == ["expert: adult", "expert: adult_medicine", "caci"]
    assert all({"adult", "adult_medicine"} <= set(row) for row in rows)


def test_rows_keep_their_order_and_need_no_base():
    names = ("base", "majority", "reasoner", "other")
    models = {"experts": {}, **{name: result(0.5, "x") for name in names}}
    assert [row["model"] for row in model_rows({"models": models})] == [
        "base", "reasoner", "other", "majority (baseline)",
    ]  # fmt: skip
    del models["base"]
    assert next(row["model"] for row in model_rows({"models": models})) == "reasoner"


def pipeline(folder, models) -> dict[str, Run]:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"models": models}))
    return {"pipeline": Run("pipeline", "x", "id", folder)}


def test_jobs_show_what_was_varied_also_in_values_with_spaces(tmp_path, capsys):
    grids = ["merge.search={density: [0.5, 1.0]}", "merge.search={density: [0.5, 0.8]}"]
    models = {"experts": {}, "ties": result(0.25, "x")}
    jobs = [(["merge=ties", grid], pipeline(tmp_path / str(i), models)) for i, grid in enumerate(grids)]
    commands = [overrides for overrides, _ in jobs]
    assert varied(commands) == grids and varied([["a", "x=[1]"], ["a", "x=[2]"], ["a"]]) == ["x=[1]", "x=[2]", ""]
    rows = job_rows(list(zip(varied(commands), (runs for _, runs in jobs), strict=True)))
    assert [row["job"] for row in rows] == grids  # two merges of one name: two rows
    assert {row["ties [95% CI]"] for row in rows} == {"0.25 [0.25, 0.25]"} and "base" not in rows[0]
    with_experts = {"base": result(0.1, "x"), "experts": {"a": result(0.2, "x"), "b": result(0.4, "x")}}
    (row,) = job_rows([("seed=1", pipeline(tmp_path / "c", with_experts))])
    assert row["base"] == "0.10" and row["best expert"] == "0.40"
    failed = Job(["merge=ties", "merge.search=[red]"], error="no colour")
    print_jobs([*(Job(overrides, runs) for overrides, runs in jobs), failed])
    said = capsys.readouterr().out
    assert "failed: merge.search=[red]: no colour" in said and all(grid in said for grid in grids)


def test_which_models_a_pipeline_asks_benchmarks_of():
    assert on_benchmarks(composed("merge=ties")) == ["base", "ties"]
    assert on_benchmarks(composed("merge=none")) == ["base", "reasoner"]
    assert on_benchmarks(composed("eval.models=[caci,majority]")) == ["caci"]
    assert on_benchmarks(composed("eval.models=[majority]")) == ["base"]


def test_the_summary_holds_every_model_that_was_evaluated(tmp_path):
    def run(name: str, **more) -> Run:
        folder = tmp_path / name.replace("/", "_")
        folder.mkdir(exist_ok=True)
        content = result(0.5, "x") | {"protocols": {"robust": {"n": 3}}, "protocol": "robust"} | more
        (folder / "summary.json").write_text(json.dumps(content))
        (folder / "manifest.json").write_text('{"wall_seconds": 2.0}')
        return Run("eval", name, f"id-{name}", folder)

    names = ("caci", "a", "reasoner-a", "base", "some-folder", "majority")
    evaluated = {name: run(name) for name in names}
    one = {"dsa": {"a": evaluated["a"]}, "gba": {"reasoner-a": evaluated["reasoner-a"]}, "caci": {}, "eval": evaluated}
    asked = {f"slake/{name}": run(f"slake/{name}") for name in ("a.model", "b.model")}
    found = summarise(one | {"benchmarks": asked})
    assert list(found["models"]) == ["base", "experts", "caci", "reasoner", "some-folder", "majority"]
    assert set(found["models"]["experts"]) == {"a"} and "protocols" not in found["models"]["caci"]
    assert set(found["benchmarks"]["slake"]) == {"a.model", "b.model"}
    assert found["benchmarks"]["slake"]["a.model"] == {"protocol": "robust", "robust": {"n": 3}}
    assert found["wall_seconds"]["eval"] == 12.0 and found["run_ids"]["eval/caci"] == "id-caci"
