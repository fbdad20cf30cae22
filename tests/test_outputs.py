"""`stage=list` and `stage=clean`: every run is shown as it is, and only what nothing needs is ever deleted."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
from commands import _here
from filelock import FileLock

from mmedexpert.runtime.inventory import DONE, FAILED, RUNNING, UNFINISHED, needed, runs_in
from mmedexpert.runtime.runs import Run, execute


def made(outputs, stage: str, name: str, *inputs: Run, metrics: dict[str, float] | None = None, seed: int = 0) -> Run:
    """A finished run that was made of others."""

    def work(run: Run) -> dict[str, float]:
        (run.folder / "weights").write_bytes(bytes(2000))
        return metrics or {"x": 1.0}

    given = {f"in/{one.name}": one.run_id for one in inputs}
    return execute(stage, name, {"name": name}, work, outputs=outputs, seed=seed, inputs=given)


def broken(outputs, name: str, error: BaseException) -> None:
    def work(run: Run) -> dict[str, float]:
        raise error

    with pytest.raises(type(error)):
        execute("gba", name, {"name": name}, work, outputs=outputs, seed=3)


def age(outputs) -> None:
    """All of it is two days old."""
    for path in [*outputs.glob("*/*"), *outputs.glob("*/*/DONE")]:
        os.utime(path, (time.time() - 2 * 86400,) * 2)


@pytest.fixture()
def outputs(tmp_path):
    """A pipeline with what it is made of, and beside it an adapter, what failed, what was stopped."""
    data = made(tmp_path, "data", "phantom", metrics={"records/test": 3.0, "records/train": 9.0})
    expert = made(tmp_path, "dsa", "pediatrics", metrics={"grad_norm": 3.0, "loss": 0.25})
    merged = made(tmp_path, "caci", "ties", expert, made(tmp_path, "gba", "default", expert))
    evaluated = made(tmp_path, "eval", "ties-phantom", merged, data, metrics={"n": 4.0, "macro_accuracy": 0.61234})
    made(tmp_path, "pipeline", "tiny-phantom", evaluated, merged)
    other = made(tmp_path, "dsa", "cardiology", seed=7)
    made(tmp_path, "eval", "cardiology-phantom", other, data)
    broken(tmp_path, "failing", ValueError("boom"))
    broken(tmp_path, "stopped", KeyboardInterrupt())
    age(tmp_path)
    return tmp_path


def command(outputs, *words: str):
    return _here([*words, f"paths.outputs={outputs}"])


def named(outputs) -> set[str]:
    return {one.name for one in runs_in(outputs)}


def test_every_run_is_found_with_its_state_and_number(outputs):
    found = {one.name: one for one in runs_in(outputs)}
    assert len(found) == 10
    assert found["failing"].state == FAILED and found["stopped"].state == UNFINISHED
    assert {one.state for name, one in found.items() if name not in ("failing", "stopped")} == {DONE}
    numbers = {"phantom": "records/train 9", "pediatrics": "loss 0.25", "ties-phantom": "macro_accuracy 0.6123"}
    assert {name: found[name].number for name in numbers} == numbers and found["default"].number == "x 1"
    assert found["cardiology"].seed == 7 and found["stopped"].number == ""
    assert 2000 < found["pediatrics"].size < 12_000 and 172_700 < found["pediatrics"].seconds_old < 173_000
    (outputs / "gba" / "link").symlink_to(found["pediatrics"].folder)
    assert len(runs_in(outputs)) == 10


def test_a_run_that_is_worked_on_is_running(outputs):
    stopped = next(one for one in runs_in(outputs) if one.name == "stopped")
    with FileLock(stopped.folder.parent / f".{stopped.run_id}.lock"):
        assert next(one.state for one in runs_in(outputs) if one.name == "stopped") == RUNNING
        done = command(outputs, "stage=clean", "runs.delete=true")
        assert done.returncode == 0 and "stopped" not in done.stdout
    assert "stopped" in named(outputs) and "failing" not in named(outputs)


def under_way(outputs, expert: Run) -> None:
    """A reasoner that was stopped half-way, made from an expert."""

    def work(run: Run) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute("gba", "half", {}, work, outputs=outputs, seed=0, inputs={"start": expert.run_id})


def test_what_is_under_way_young_compared_or_data_stays(outputs):
    before = named(outputs)
    expert, compared = (made(outputs, "dsa", name) for name in ("needed", "compared"))
    evaluated = made(outputs, "eval", "table", compared)
    made(outputs, "benchmark", "slake")
    made(outputs, "curate", "traces")
    under_way(outputs, expert)
    (outputs / "experiments" / "mine").mkdir(parents=True)
    told = {"runs": [{"path": str(evaluated.folder / "predictions.jsonl")}]}
    (outputs / "experiments/mine/comparison.json").write_text(json.dumps(told))
    every = named(outputs)
    assert every == before | {"needed", "compared", "table", "slake", "traces", "half"}
    age(outputs)
    made(outputs, "dsa", "young")
    command(outputs, "stage=clean", "runs.delete=true")
    assert named(outputs) == every - {"cardiology", "cardiology-phantom", "failing"} | {"young"}


def test_a_finished_run_that_does_not_tell_its_inputs_stops_everything(outputs):
    (pipeline,) = outputs.glob("pipeline/tiny*")
    (pipeline / "identity.json").write_text("{")
    assert needed(runs_in(outputs), [pipeline.name[-10:]]) > {pipeline.name[-10:]}  # its manifest tells them, too
    (pipeline / "manifest.json").unlink()
    every = {path for path in outputs.glob("*/*")}
    done = command(outputs, "stage=clean", "runs.delete=true")
    assert done.returncode == 2 and "does not tell what it was made of" in done.stderr
    assert every == {path for path in outputs.glob("*/*")}


def test_what_a_run_was_made_of_is_needed_through_every_step(outputs):
    found = {one.name: one for one in runs_in(outputs)}
    reached = needed(found.values(), [found["ties-phantom"].run_id])
    names = {name for name, one in found.items() if one.run_id in reached}
    assert names == {"ties-phantom", "ties", "default", "pediatrics", "phantom"}  # an evaluation's data by run, here


def test_the_list_is_a_table_and_changes_nothing(outputs):
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    done = command(outputs, "stage=list")
    assert done.returncode == 0
    for one in runs_in(outputs):
        (line,) = [line for line in done.stdout.splitlines() if one.run_id in line and "FAILED" not in line]
        assert re.search(rf"{one.stage} +{one.name} +{one.run_id} +{one.state} +{one.seed} ", line), line
    assert re.search(r"10 runs, \d+ kB", done.stdout) and "FAILED says why" in done.stdout
    assert before == {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}


def test_only_what_nothing_needs_is_deleted_and_it_is_shown_first(outputs):
    spare = {"cardiology", "cardiology-phantom", "failing"}
    every = named(outputs)
    done = command(outputs, "stage=clean")
    assert done.returncode == 0 and "runs.delete=true" in done.stderr and named(outputs) == every
    shown = {one.name for one in runs_in(outputs) if one.run_id in done.stdout}
    assert shown == spare
    done = command(outputs, "stage=clean", "runs.delete=true")
    assert done.returncode == 0 and "deleted 3 runs" in done.stderr
    assert named(outputs) == every - spare
    done = command(outputs, "stage=clean", "runs.delete=true")
    assert done.returncode == 0 and "every run is needed" in done.stderr and named(outputs) == every - spare


def test_what_is_kept_keeps_what_it_was_made_of(outputs):
    (kept,) = [one for one in runs_in(outputs) if one.name == "cardiology-phantom"]
    for given in (kept.run_id, kept.folder.name, str(kept.folder)):
        done = command(outputs, "stage=clean", f"runs.keep=[{given}]")
        assert done.returncode == 0 and "cardiology" not in done.stdout and "failing" in done.stdout
    command(outputs, "stage=clean", f"runs.keep=[{kept.run_id}]", "runs.delete=true")
    assert {"cardiology", "cardiology-phantom"} <= named(outputs)


def test_mistakes_are_one_line_and_delete_nothing(outputs, tmp_path):
    every = named(outputs)
    for words, told in (
        (["stage=clean", "runs.keep=[nothing-abc]", "runs.delete=true"], "nothing-abc is no run in"),
        (["stage=clean", "dsa.lr=1", "runs.delete=true"], "reads the outputs folder alone"),
        (["stage=dsa", "runs.delete=true"], "only stage=clean reads it"),
    ):
        done = command(outputs, *words)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and told in line
    assert named(outputs) == every
    for pipeline in outputs.glob("pipeline/*/DONE"):
        pipeline.unlink()
    done = command(outputs, "stage=clean", "runs.delete=true")
    assert done.returncode == 2 and "holds no finished pipeline" in done.stderr and named(outputs) == every
    done = command(tmp_path / "nowhere", "stage=list")
    assert done.returncode == 2 and "nowhere holds no run" in done.stderr
