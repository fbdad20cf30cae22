"""What would stop a later stage is found before the first step is trained, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_config import composed

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.runtime.quiet import one_line
from mmedexpert.runtime.runs import Run
from mmedexpert.stages import before
from mmedexpert.stages.before import check_inputs, missing_note

FOUR = ["adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery"]


def record(number: int, specialty: str, split: str, options: bool = True) -> Record:
    return Record(
        str(number), ("a.png",), "q?", {"A": "x", "B": "y"} if options else None, "A", (specialty,), "made", "none",
        split, str(number),
    )  # fmt: skip


@pytest.fixture()
def with_records(monkeypatch, tmp_path):
    """A function that lets the data set hold records of (specialty, splits)."""

    def hold(*held: tuple[str, str], options: bool = True) -> None:
        records = [
            record(100 * i + j, specialty, split, options)
            for i, (specialty, splits) in enumerate(held)
            for j, split in enumerate(splits.split())
        ]
        monkeypatch.setattr(before, "dataset", lambda config: Run("data", config.data.name, "id", tmp_path))
        monkeypatch.setattr(before, "load_records", lambda folder: (records, tmp_path))

    return hold


WHOLE = "train val test"


def test_all_goes_on_with_the_specialties_that_the_data_have_and_says_so(with_records, capsys):
    with_records(("adult_medicine", WHOLE), ("oncology_surgery", WHOLE), ("pediatrics", "train val"), ("x", WHOLE))
    found = check_inputs(composed())
    assert found.specialty.names == ["adult_medicine", "oncology_surgery"]
    assert found.specialty.missing == ["pediatrics", "brain_sensory"]
    told = " ".join(capsys.readouterr().err.split())
    assert "pediatrics (no test record)" in told and "brain_sensory (no train and no test record)" in told
    assert "going on with adult_medicine, oncology_surgery" in told
    assert "pediatrics, brain_sensory" in missing_note(found)
    # every stage of a pipeline works on the same ones
    assert check_inputs(composed("stage=dsa")).specialty == found.specialty == check_inputs(found_again()).specialty


def found_again():
    return composed("stage=gba", "gba.init=base")


def test_nothing_is_left_out_where_nothing_is_missing(with_records, capsys):
    with_records(*((name, WHOLE) for name in FOUR))
    config = composed()
    assert check_inputs(config) is config and config.specialty.names == FOUR
    assert missing_note(config) == "" == capsys.readouterr().err


def test_a_search_needs_validation_records(with_records):
    with_records(("adult_medicine", WHOLE), ("pediatrics", "train test"))
    assert check_inputs(composed()).specialty.names == ["adult_medicine", "pediatrics"]
    searched = composed("merge.search={expert_scaling: [1.0]}")
    assert check_inputs(searched).specialty.names == ["adult_medicine"]


def test_a_list_with_one_number_per_specialty_must_fit_those_that_are_left(with_records):
    with_records(("adult_medicine", WHOLE), ("pediatrics", WHOLE))
    with pytest.raises(UserError, match="4 numbers for 2 updates"):
        check_inputs(composed("merge.method.expert_weights=[1,1,1,1]"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["specialty=brain_sensory"], ["'brain_sensory'", "no train record", "medr1"]),
        (["specialty.names=[pediatrcs]", "specialty.on_missing=error"], ["did you mean 'pediatrics'?"]),
        (["specialty=pediatrics"], ["'pediatrics'", "no test record"]),
        (["specialty=pediatrics", "stage=eval", "eval.models=[base]"], ["'pediatrics'", "no test record"]),
        (["specialty=pediatrics", "merge.search={expert_scaling: [1.0]}", "stage=caci"], ["no val record"]),
        (["specialty.names=[x,y]", "specialty.on_missing=skip"], ["none of the specialties x, y", "adult_medicine"]),
    ],
)  # fmt: skip
def test_a_specialty_by_name_must_be_there(overrides, words, with_records, tmp_path):
    with_records(("adult_medicine", WHOLE), ("pediatrics", "train"))
    with pytest.raises(UserError) as caught:
        check_inputs(composed("data=medr1", f"data.root={tmp_path}", *overrides))
    for word in words:
        assert word in str(caught.value), caught.value


def test_training_alone_needs_no_question(with_records):
    with_records(("pediatrics", "train"))
    assert check_inputs(composed("specialty=pediatrics", "stage=dsa")).specialty.names == ["pediatrics"]


def test_open_questions_are_trained_on_like_others(with_records):
    with_records(("pediatrics", WHOLE), options=False)
    assert check_inputs(composed("specialty=pediatrics")).specialty.names == ["pediatrics"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+data.source.tarin=3"], ["data.source.tarin", "'train'"]),
        (["data.source.train=many"], ["data.source.train='many'", "whole number"]),
        (["merge=ties", "+merge.method.densty=1"], ["merge.method.densty", "density"]),
        (["merge=ties", "merge.method.vote=loud"], ["loud", "merge.method"]),
        (["merge=ties", "merge.search={vote: [mass, loud]}"], ["loud"]),
        (["merge=linear", "merge.method.weights=[1,-1,1,-1,0]"], ["the merge method refused"]),
        (["benchmark=slake", "+benchmark.slake.load.langs=[en]"], ["benchmark.slake.load.langs", "languages"]),
        (["eval.models=[bse]"], ["'bse'", "'base'"]),
        (["eval.models=[caci,nowhere/model]"], ["nowhere/model", "neither a folder nor a model"]),
        (["eval.models=[tests]"], ["tests", "config.json", "adapter_config.json"]),
        (["eval.models=[ties]", "stage=eval"], ["'ties'"]),
        (["eval.llm_judge.base_url=http://x/v1", "eval.llm_judge.model=m", "eval.llm_judge.api_key_env=NO_SUCH_KEY"],
         ["NO_SUCH_KEY", "eval.llm_judge.api_key_env"]),
        (["eval.llm_judge.base_url=localhost:8000", "eval.llm_judge.model=m"], ["eval.llm_judge.base_url", "http://"]),
        (["stage=eval", "engine=openai", "engine.endpoint.model=m", "engine.endpoint.api_key_env=NO_SUCH_KEY"],
         ["NO_SUCH_KEY", "engine.endpoint.api_key_env"]),
        (["benchmark=omnimedvqa_medr1"], ["benchmark.omnimedvqa_medr1.root"]),
        (["stage=eval", "eval.models=[caci]", "benchmark=[omnimedvqa_medr1]"], ["benchmark.omnimedvqa_medr1.root"]),
        (["benchmark=pmc_vqa", "benchmark.pmc_vqa.root=tests"], ["test_2.csv"]),
        (["model.name_or_path=nowhere/at/all"], ["model.name_or_path=nowhere/at/all"]),
    ],
)  # fmt: skip
def test_a_later_mistake_is_told_first(overrides, words, with_records, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with_records(*((name, WHOLE) for name in FOUR))
    with pytest.raises(Exception) as caught:  # one of a loader comes wrapped by Hydra
        check_inputs(composed(f"paths.outputs={tmp_path}", *overrides))
    for word in words:
        assert word in one_line(caught.value), caught.value
    assert not list(tmp_path.glob("[pdgc]*/*/DONE"))  # nothing was trained


def test_a_merge_that_may_not_fit_on_the_disk_is_told(with_records, tmp_path, monkeypatch, capsys):
    with_records(*((name, WHOLE) for name in FOUR))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(3000))
    monkeypatch.setattr(before.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5999}))
    config = composed(f"model.name_or_path={tmp_path}", f"paths.outputs={tmp_path / 'out'}")
    check_inputs(config)
    assert "merged model takes" in capsys.readouterr().err
    monkeypatch.setattr(
        before.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 6000})
    )  # the merge, and what it is taught
    check_inputs(config)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("merge", sorted(path.stem for path in (Path(__file__).parents[1] / "conf/merge").glob("*")))
def test_every_merge_as_it_is_passes_the_trial(merge, with_records):
    with_records(*((name, WHOLE) for name in FOUR))
    check_inputs(composed(f"merge={merge}"))
