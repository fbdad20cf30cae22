"""stage=data data=mmedexpert end to end: faults of files and of servers, kills at every step, what is given away."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from commands import _here
from conftest import long
from curating import (
    CONF,
    FAILED,
    GOLD,
    KEPT,
    PRIVATE,
    REJECTED,
    SOUND,
    Models,
    composed,
    files,
    lines,
    make_root,
    words,
)  # fmt: skip
from hydra import compose, initialize_config_dir

from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.runtime.quiet import one_line
from mmedexpert.runtime.runs import Run
from mmedexpert.sources.mmedexpert import load
from mmedexpert.stages import curate, sources
from mmedexpert.stages import release as stage
from mmedexpert.stages.data import dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return make_root(tmp_path_factory.mktemp("sources"))


@pytest.fixture(autouse=True)
def _new_command(monkeypatch):
    """Each call of the stage is a command of its own, and all are the same one."""
    monkeypatch.setattr(sources, "_told", set())
    monkeypatch.setattr(sys, "argv", ["run.py", "stage=data", "data=mmedexpert"])


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(root, tmp_path_factory) -> Run:
    """Without any server: what has no trace stays without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "stage=data", "data=mmedexpert"])
        return dataset(composed(root, tmp_path_factory.mktemp("plain")))


def test_every_record_is_kept_or_rejected_once_for_its_own_reason(plain):
    rows = lines(plain.folder / "rejected.jsonl")
    found = {row["id"]: (row["step"], row["reason"]) for row in rows}
    assert found == {name: told[:2] for name, told in REJECTED.items()} and len(rows) == len(REJECTED)
    assert all(REJECTED[row["id"]][2] in row["detail"] for row in rows)
    kept = Counter(row["provenance"]["source"] for row in lines(plain.folder / "records.jsonl"))
    assert kept == {name: n if isinstance(n, int) else len(n) for name, n in KEPT.items()}
    mine = {row["id"] for row in lines(plain.folder / "records.jsonl") if row["provenance"]["source"] == "mine"}
    assert mine == {f"mine/{name}" for name in KEPT["mine"]}


def test_counts_add_up_from_step_to_step(plain):
    steps = json.loads((plain.folder / "funnel.json").read_text())
    names = "ingest duplicates decontaminate structure labels traces balance split fields".split()
    assert [step["step"] for step in steps] == names
    assert steps[0]["in"] == len(REJECTED) + steps[-1]["out"] == plain.metrics["read"]
    for before, after in pairwise(steps):
        assert after["in"] == before["out"]
    assert all(step["in"] == step["out"] + sum(step["reasons"].values()) for step in steps)


def test_what_is_told_of_an_image_that_was_changed(plain):
    records = {row["id"]: row for row in lines(plain.folder / "records.jsonl")}
    (image,) = records["mine/sixteen"]["provenance"]["images"]
    assert image["changes"] == ["deep grey, scaled by its bit depth"]
    assert records["mine/jane"]["provenance"]["images"][0]["changes"]
    assert not records["mine/right"]["provenance"]["images"][0].get("changes")


def test_the_release_loads_and_has_its_page_card_and_pictures(plain):
    from datasets import load_dataset

    release = plain.folder / "release"
    rows = [
        row
        for split in load_dataset(str(release), cache_dir=str(plain.folder.parent / "cache")).values()
        for row in split
    ]
    kept = lines(plain.folder / "records.jsonl")
    free = {row["id"] for row in kept if row["provenance"]["redistribute"]}
    assert {row["id"] for row in rows} == free and 0 < len(free) == plain.metrics["released"]
    assert {row["source"] for row in rows} == {"mine", "phantom"}  # the others' licence forbids it, or is not told
    assert all(row["images"] or row["modality"] == "text" for row in rows)
    again, _, bad = load(release, plain.folder / "again")
    assert len(again) == len(free) and not bad
    card = (release / "README.md").read_text()
    assert "| labelled | CC BY-NC 4.0 | 8 |" in card
    assert "8000 x 6500" not in card and "question asked before 1" in card and "`run.py stage=data" in card
    assert {"README.md", "croissant.json", "release.json", "funnel.png"} <= {path.name for path in release.iterdir()}
    page = (plain.folder / "page.html").read_text()
    assert page.count("<img") >= 20 and "case right" in page.lower()


def test_nothing_private_is_given_away(plain, root):
    told = [*PRIVATE, str(root), str(plain.folder.parents[1]), "Doe^", "Jane", "cell-", "right.png"]
    for name, content in files(plain.folder / "release").items():
        if name.endswith(".parquet"):
            import pyarrow.parquet as pq

            content = json.dumps(pq.read_table(plain.folder / "release" / name).to_pylist(), default=str).encode()
        assert not [one for one in told if one.encode() in content], name


def test_equal_settings_elsewhere_give_equal_bytes_and_a_second_time_nothing_is_done(plain, root, tmp_path):
    twin = dataset(composed(root, tmp_path))
    assert files(twin.folder / "release") == files(plain.folder / "release") and not twin.reused
    for name in ("records.jsonl", "rejected.jsonl", "funnel.md", "page.html"):
        assert (twin.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert dataset(composed(root, tmp_path)).reused


def test_what_a_step_left_decides_what_the_next_ones_reuse(root, tmp_path):
    """Not its settings alone: a step that was deleted and made anew may leave other records."""
    config = composed(root, tmp_path)
    before = dataset(config)
    traces = next((tmp_path / "curate").glob("traces-*"))
    rows = (traces / "records.jsonl").read_bytes().splitlines(keepends=True)
    (traces / "records.jsonl").write_bytes(b"".join(rows[:-1]))
    counts = json.loads((traces / "counts.json").read_text())
    (traces / "counts.json").write_text(json.dumps(counts | {"out": counts["out"] - 1}))
    after = dataset(config)
    assert after.run_id != before.run_id
    assert len(lines(after.folder / "records.jsonl")) == len(lines(before.folder / "records.jsonl")) - 1


def test_with_a_limit_what_is_above_it_is_rejected_too(plain, root):
    limited = dataset(composed(root, plain.folder.parents[1], "data.limit=2"))
    kept, rows = lines(limited.folder / "records.jsonl"), lines(limited.folder / "rejected.jsonl")
    assert max(Counter((row["split"], row["specialties"][0]) for row in kept).values()) == 2
    above = {row["id"] for row in rows if (row["step"], row["reason"]) == ("fields", "above data.limit")}
    assert {row["id"] for row in kept} | above == {row["id"] for row in lines(plain.folder / "records.jsonl")}
    assert len(kept) + len(rows) == plain.metrics["read"] == limited.metrics["read"]


# --- servers ----------------------------------------------------------------------------------------------------------


@pytest.fixture()
def server() -> Iterator[Models]:
    models = Models()
    yield models
    models.quit.set()
    models.http.shutdown()
    models.http.server_close()


@pytest.fixture(scope="module")
def taught(root, tmp_path_factory) -> Iterator[tuple[Run, Models, Path]]:
    """With a model for each step, by a server that shows every fault; its run, the server, and the outputs."""
    models, outputs = Models(), tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["run.py", "stage=data", "data=mmedexpert"])
        run = dataset(composed(root, outputs, *models.asked_by()))
    yield run, models, outputs
    models.quit.set()


def test_the_right_traces_stay_and_each_failure_has_its_own_reason(taught):
    run, _, _ = taught
    records = {row["id"]: row for row in lines(run.folder / "records.jsonl")}
    mine = {name: row for name, row in records.items() if row["provenance"]["source"] == "mine"}
    assert {name: row["trace"]["steps"] for name, row in mine.items()} == {
        f"mine/{mark}#analytical": steps for mark, steps in SOUND.items()
    }
    for row in mine.values():
        assert row["options"][row["answer"]] == GOLD
        assert row["provenance"]["checks"]["difficulty"] == {"passed": 2, "of": 4, "hard": True}
        assert row["provenance"]["checks"]["traces"]["written_by"] == "teacher"
    assert mine["mine/sixteen#analytical"]["provenance"]["checks"]["traces"]["sample"] == 1
    assert {row["provenance"]["source"] for row in records.values()} == {"mine", "phantom"}
    rejected = {row["id"].removesuffix("#analytical"): row for row in lines(run.folder / "rejected.jsonl")}
    for mark, told in FAILED.items():
        assert (rejected[f"mine/{mark}"]["step"], rejected[f"mine/{mark}"]["reason"]) == told or mark == "twice"
    steps = json.loads((run.folder / "funnel.json").read_text())
    assert all(step["in"] == step["out"] + sum(step["reasons"].values()) for step in steps)


def test_nothing_is_asked_twice_even_where_the_runs_are_deleted(taught, root):
    run, models, outputs = taught
    assert set(models.given.values()) == {1}
    before, asked = files(run.folder / "release"), len(models.bodies)
    for name in ("curate", "data"):
        shutil.rmtree(outputs / name)
    again = dataset(composed(root, outputs, *models.asked_by()))
    assert len(models.bodies) == asked and files(again.folder / "release") == before


@pytest.mark.slow
@pytest.mark.parametrize("die_after", [3, pytest.param(290, marks=long)])
def test_a_server_that_dies_is_told_in_one_line_and_the_same_command_goes_on(taught, root, tmp_path, server, die_after):
    run, _, _ = taught
    server.die_after = die_after
    config = composed(root, tmp_path, *server.asked_by(), "data.curate.labels.retries=0")
    with pytest.raises(UserError, match=r"no answer|no server answers") as stopped:
        dataset(config)
    assert "\n" not in str(stopped.value) and server.base_url in str(stopped.value)
    server.revive()
    again = dataset(config)
    assert set(server.given.values()) == {1}
    assert files(again.folder / "release") == files(run.folder / "release")


# --- kills ------------------------------------------------------------------------------------------------------------

STEPS = (
    "ingest", "duplicates", "decontaminate", "structure", "labels", "needs_image", "difficulty", "traces", "balance",
    "split", "fields", "release", "card",
)  # fmt: skip


def dies_at(patch: pytest.MonkeyPatch, name: str) -> None:
    """The process is killed half-way through a step: what it has written stays as it is, no handler runs."""

    def half(verdicts, given):
        for number, verdict in enumerate(verdicts):
            if number >= given // 2:
                os._exit(9)
            yield verdict

    def dying(real):
        def run(step, how, records, *rest):
            return real(step, (lambda given: half(how(given), len(records))) if step == name else how, records, *rest)

        return run

    def made(real):
        return lambda step, verdicts, *rest, **more: real(step, half(verdicts, 20), *rest, **more)

    def late(real):
        def call(*args, **more):
            real(*args, **more)
            os._exit(9)

        return call

    if name == "ingest":
        patch.setattr(sources, "write_step", made(sources.write_step))
    elif name in ("release", "card"):
        where = {"release": "release", "card": "write_card"}[name]
        patch.setattr(stage, where, late(getattr(stage, where)))
    else:
        patch.setattr(curate, "run_step", dying(curate.run_step))
        patch.setattr(stage, "run_step", dying(stage.run_step))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.slow
def test_killed_in_each_step_in_turn_the_release_is_that_of_an_uninterrupted_run(taught, root, tmp_path, server):
    run, _, _ = taught
    config = composed(root, tmp_path, *server.asked_by())
    for name in STEPS:
        child = os.fork()
        if child == 0:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    dies_at(patch, name)
                    dataset(config)
            finally:
                os._exit(1)  # it did not die where it should
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, name
    again = dataset(config)
    assert set(server.given.values()) == {1}
    for name in ("records.jsonl", "rejected.jsonl", "funnel.json", "funnel.md", "page.html"):
        assert (again.folder / name).read_bytes() == (run.folder / name).read_bytes()
    assert files(again.folder / "release") == files(run.folder / "release")
    assert not [path for path in tmp_path.rglob("*.part*")]


@long
@pytest.mark.slow
def test_two_processes_equal_one(plain, root, tmp_path):
    twin = dataset(composed(root, tmp_path, "trainer.processes=2"))
    assert files(twin.folder / "release") == files(plain.folder / "release")
    assert (twin.folder / "rejected.jsonl").read_bytes() == (plain.folder / "rejected.jsonl").read_bytes()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("+data.sources.slip={_folder_: ward-seven}", "data.sources.slip needs a _target_"),
        ("+data.sources.slip={_target_: mmedexpert.sources.vqa_tabel.load}", "vqa_tabel"),
        ("+data.sources.slip={_target_: mmedexpert.sources.vqa_table.load, file: x}", "data.sources.slip.file"),
        ("+data.benchmarks.slip={_target_: mmedexpert.sources.vqa_table.load, file: x}", "data.benchmarks.slip.file"),
        ("+data.sources.mine._licence_=none", "did you mean '_license_'"),
        ("+data.sources.mine._redistribute_=no", "_redistribute_='no' must be true, false or null"),
        ("data.curate.teacher.statements=[/nowhere.yaml]", "/nowhere.yaml is not a file"),
        ("data.curate.balance.specialty={pediatrics: -1}", "must give names shares of 0 or more"),
        ("data.curate.balance.perspective={differental: 1}", "did you mean 'differential'?"),
        ("data.curate.balance.kind={yesno: 0.2}", "did you mean 'data.curate.balance.kind.yes_no'?"),
        ("data.curate.balance.modality=50", "data.curate.balance.modality=50"),
        ("data.root=null", "give data.root=<folder with"),
        ("data.root=/nowhere/at/all", "data.root=/nowhere/at/all is not a folder"),
        ("data.curate.traces=1", "data.curate.traces"),
        ("data.curate.teacher.base_url=http://localhost:1/v1", "data.curate.teacher needs both"),
        ("data.curate.untraced=maybe", "data.curate.untraced"),
        ("data.curate.teacher.perspectives=[analytic]", "data.curate.teacher.perspectives"),
        ("data.curate.balance.fractions=[0.5,0.1,0.1]", "data.curate.balance.fractions"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(root, tmp_path, given, told):
    key = given.split("=")[0]
    command = [*(word for word in words(root, tmp_path) if not word.startswith(f"{key}=")), given]
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            typed(compose("config", overrides=command), command)
    except Exception as error:  # told before anything starts (tests/test_config.py: as a line, with exit code 2)
        assert told in one_line(error)
        return
    done = _here(command)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and told in line and "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.glob("curate/*/DONE"))


def test_a_folder_without_any_source_is_told(root, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds none of medxpertqa_dev, .*, mine$"):
        dataset(composed(tmp_path / "empty", tmp_path, "~data.sources.phantom"))


def test_where_no_record_is_left_the_step_that_took_the_last_one_is_named(root, tmp_path):
    table = tmp_path / "root" / "ward-seven"
    table.mkdir(parents=True)
    (table / "table.jsonl").write_text(
        "{\n"
        + json.dumps({"id": "x", "image": "x.png", "question": "Q?", "answer": "yes", "options": None, "patient": "1"})
    )
    with pytest.raises(UserError, match="step ingest left none of 2 records") as told:
        dataset(composed(tmp_path / "root", tmp_path, "~data.sources.phantom"))
    assert "\n" not in str(told.value)


# --- a real server, and what comes after ------------------------------------------------------------------------------


@long
@pytest.mark.slow
def test_a_real_server_that_knows_nothing_leaves_no_trace_and_says_so(real_server, root, tmp_path):
    ends = [
        f"data.curate.{step}.{what}" for step in ("teacher", "verifier")
        for what in (f"base_url={real_server.base_url}", f"model={real_server.model}", "max_new_tokens=8",
                     "concurrency=2")
    ]  # fmt: skip
    done = _here(words(root, tmp_path / "out", "~data.sources.phantom", "data.curate.teacher.candidates=1", *ends))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "step traces left none of 30 records" in line and "dropped.jsonl" in line
    (step,) = (tmp_path / "out" / "curate").glob("traces-*")
    rows = lines(step / "dropped.jsonl")
    assert len(rows) == 30 and {row["reason"] for row in rows} <= {"cut off", "no candidate parses"}
    assert not list((tmp_path / "out").glob("data/*/release"))


@pytest.mark.slow
def test_experts_and_the_reasoner_learn_from_it_as_from_any_set(taught, root, answering_model):
    from mmedexpert.stages import dsa, gba

    _, models, outputs = taught
    small = [
        f"model.name_or_path={answering_model}", "model.max_new_tokens=16", "model.min_pixels=784",
        "model.max_pixels=784", "model.lora.r=4", "specialty.names=[adult_medicine,pediatrics]", "dsa.steps=2",
        "dsa.batch_size=2", "gba.steps=1", "gba.prompts_per_step=1", "gba.num_generations=8",
        "data.curate.balance.fractions=[1.0,0.0,0.0]",
    ]  # fmt: skip
    config = composed(root, outputs, *models.asked_by(), *small)
    asked = len(models.bodies)
    data = dataset(config)
    assert len(models.bodies) == asked
    experts = dsa.run(config)
    assert set(experts) == {"adult_medicine", "pediatrics"} and all(
        (e.folder / "adapter").is_dir() for e in experts.values()
    )
    assert all(one.manifest["inputs"] for one in experts.values())
    reasoners = gba.run(config)
    assert all(one.done for one in reasoners.values()) and data.done
