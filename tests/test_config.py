"""Every file in conf/ composes, fits the schema, and mistakes are told in one line that says the fix."""

from __future__ import annotations

import os
import pwd
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate

from mmedexpert.checks import home, typed
from mmedexpert.errors import UserError
from mmedexpert.runtime.quiet import one_line
from mmedexpert.schema import Config, keys

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("experiment", "sweep", "hydra")
]


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option, tmp_path):
    served = ["engine.endpoint.model=tiny", "stage=eval"] if option == "openai" else []  # it has no default
    config = composed(f"{group}={option}", f"data.root={tmp_path}", *served)
    if group not in ("logger", "debug", "stage", "paths", "trainer", "specialty"):
        assert getattr(config, group).name if hasattr(getattr(config, group), "name") else True


@pytest.mark.parametrize("path", sorted([*CONF.glob("experiment/*.yaml"), *CONF.glob("sweep/*.yaml")]), ids=str)
def test_every_experiment_composes_and_says_its_command(path):
    composed(f"+{path.parent.name}={path.stem}")
    assert any(
        line.startswith("# python run.py") and f"+{path.parent.name}={path.stem}" in line
        for line in path.read_text().splitlines()
    )


@pytest.mark.parametrize("path", sorted(CONF.glob("stage/*.yaml")), ids=lambda p: p.stem)
def test_stage_targets_exist(path):
    assert callable(get_method(composed(f"stage={path.stem}").stage.target))


@pytest.mark.parametrize("path", sorted(CONF.glob("merge/*.yaml")), ids=lambda p: p.stem)
def test_merge_methods_instantiate(path):
    method = composed(f"merge={path.stem}").merge.method
    assert (method is None) == (path.stem == "none")
    if method is not None:
        assert callable(instantiate(method))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("gba.wieghts=[1,1,1,1]", ["gba.wieghts", "gba.weights"]),
        ("specialty=cardiolgy", ["specialty=cardiolgy", "cardiology"]),
        ("merge=tie", ["merge=tie", "ties"]),
        ("gba.weights=[1,1,1]", ["gba.weights", "4"]),
        ("gba.weights=[1,-1,0,0]", ["gba.weights", "intuitive"]),
        ("gba.weights=[1,nan,0,0]", ["gba.weights", "intuitive"]),
        ("gba.weights=[inf,0,0,0]", ["gba.weights", "differential"]),
        ("gba.weights=abc", ["gba.weights"]),
        ("gba.beta=abc", ["gba.beta", "abc"]),
        ("gba.gate=corect", ["gba.gate", "correct"]),
        ("gba.num_generations=1", ["gba.num_generations"]),
        ("gba.num_generations=4", ["gba.num_generations", "8"]),
        ("gba.top_p=1.5", ["gba.top_p"]),
        ("gba.num_iterations=3", ["gba.checkpoint_every", "3"]),
        ("dsa.lr=0", ["dsa.lr"]),
        ("dsa.steps=-1", ["dsa.steps"]),
        ("data.root=/not/here", ["data.root", "/not/here"]),
        ("data.on_bad_record=ignore", ["data.on_bad_record", "error"]),
        ("model.architecture=null", ["model.name_or_path", "model=tiny"]),
        ("specialty.names=[]", ["specialty.names"]),
        ("eval.split=train", ["eval.split", "test"]),
        ("paths.outputs=~/x", ["paths.outputs=~/x", "quote"]),
        ("paths.outputs='~nobody-of-this-name/x'", ["~nobody-of-this-name/x", "in full"]),
        ("engine.endpoint.model=m", ["engine.endpoint.model", "conf/engine"]),
        ("merge.method.reasoner_densty=1", ["merge.method.reasoner_densty", "conf/merge"]),
        ("data.source.foo=1", ["data.source.foo", "conf/data"]),
        ("benchmark.slake.root=tests", ["benchmark.slake.root", "add benchmark=slake"]),
        ("gba={steps: 3, foo: 2}", ["gba", "gba.<key>"]),
        ("specialty.on_missing=drop", ["specialty.on_missing", "skip"]),
        ("+specialty.missing=[x]", ["specialty.missing", "specialty.names"]),
        ("dsa.warmup_ratio=1.5", ["dsa.warmup_ratio", "at most 1"]),
        ("gba.max_grad_norm=0", ["gba.max_grad_norm", "above 0"]),
        ("model.lora.dropout=-1", ["model.lora.dropout"]),
        ("data.limit=0", ["data.limit", "null"]),
        ("model.min_pixels=20000", ["model.min_pixels", "model.max_pixels"]),
        ("trainer.precision=bf15-mixed", ["trainer.precision", "bf16-mixed"]),
        ("trainer.accelerator=cuda0", ["trainer.accelerator", "cuda"]),
        ("trainer.threads=-1", ["trainer.threads"]),
        ("gba.epsilon_high=0", ["gba.epsilon_high"]),
    ],
)
def test_a_mistake_is_one_line_with_its_key(override, words):
    with pytest.raises(Exception) as caught:
        composed(override)
    line = one_line(caught.value)
    assert "\n" not in line and len(line) < 320
    for word in words:
        assert word in line, line


@pytest.mark.parametrize("tilde", ["~", "~{user}"])
def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tilde, tmp_path, monkeypatch):
    user = pwd.getpwuid(os.getuid())
    monkeypatch.setenv("HOME", str(tmp_path))
    short = tilde.format(user=user.pw_name)
    home = tmp_path if tilde == "~" else Path(user.pw_dir)
    monkeypatch.setattr(Path, "is_dir", lambda path: path.is_relative_to(home))
    path = f"'{short}/a'"
    config = composed(
        "benchmark=slake", f"paths.outputs={path}", f"data.root={path}", f"benchmark.slake.root={path}",
        f"model.name_or_path={path}", f"report.runs=[{path},b]", f"report.against={path}", f"report.out={path}",
        f"report.published={path}", f"eval.models=[base,{path}]",
    )  # fmt: skip
    full = str(home / "a")
    report = config.report
    assert [config.paths.outputs, config.data.root, config.model.name_or_path] == [full] * 3
    assert config.benchmark["slake"].root == full
    assert [report.runs, report.against, report.out, report.published] == [[full, "b"], full, full, full]
    assert config.eval.models == ["base", full]


def test_other_tildes_are_left_alone():
    assert [home("./~"), home("a/~/b"), home("a~")] == ["./~", "a/~/b", "a~"]


def test_specialties_named_one_by_one_must_be_there():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides, right in (
            ([], "skip"), (["specialty=cardiology"], "error"), (["specialty.names=[a,b]"], "error"),
            (["specialty.names=[a,b]", "specialty.on_missing=skip"], "skip"),
        ):  # fmt: skip
            assert typed(compose("config", overrides=overrides), overrides).specialty.on_missing == right


def test_keys_lists_nested_ones():
    assert {"gba.weights", "model.lora.r", "model.architecture.hidden_size", "seed"} <= set(keys())


def test_weights_of_the_users_command():
    assert composed("gba.weights=[1,0,0,0]").gba.weights == [1.0, 0.0, 0.0, 0.0]


def test_an_unexpected_error_says_where_its_traceback_is():
    assert "debug.traceback=true" in one_line(RuntimeError("boom\nbang"))
    assert one_line(UserError("a\n b")) == "a b"
