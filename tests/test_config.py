"""Every file in conf/ composes, fits the schema, and mistakes are told in one line that says the fix."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from commands import _here
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mmedexpert.checks import home, typed
from mmedexpert.errors import UserError
from mmedexpert.runtime.quiet import one_line
from mmedexpert.schema import Config, GbaConfig, keys
from mmedexpert.stages.common import loading

CONF = Path(__file__).parents[1] / "conf"
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONF.glob("*/*.yaml"))
    if path.parent.name not in ("experiment", "hydra") and not path.stem.startswith("_")  # what others are made of
]


def composed(*overrides: str, conf: Path = CONF) -> Config:
    with initialize_config_dir(str(conf), version_base="1.3"):
        return typed(compose("config", overrides=list(overrides)))


APART = ("merge", "benchmark", "gba", "specialty", "logger")  # groups whose files touch no key of another group
TOGETHER = list(zip_longest(*([one for one in OPTIONS if one[0] == group] for group in APART)))
TOGETHER = [[one for one in row if one] for row in TOGETHER] + [[one] for one in OPTIONS if one[0] not in APART]


WITHOUT_DEFAULT = {
    ("engine", "openai"): ["engine.endpoint.model=tiny", "stage=eval"],
    ("engine", "vllm"): ["engine.base_urls=[http://localhost:8000]"],
    ("sampler", "vllm"): ["sampler.base_urls=[http://localhost:8000]"],
    ("stage", "serve"): ["sampler=vllm"],
}


@pytest.mark.parametrize("options", TOGETHER, ids=lambda options: ",".join("=".join(one) for one in options))
def test_every_option_composes(options, tmp_path):
    served = [word for option in options for word in WITHOUT_DEFAULT.get(option, [])]
    config = asdict(composed(*("=".join(one) for one in options), f"data.root={tmp_path}", *served))
    for group, option in options:
        text = (CONF / group / f"{option}.yaml").read_text()
        written = yaml.safe_load(text) or {}
        written.pop("defaults", None)
        whole = "@package _global_" in text
        reached = config if whole else config[group][option] if group == "benchmark" else config[group]
        assert differences(written, reached) == [], f"{group}={option}"


def test_every_option_is_among_them():
    assert sorted(one for row in TOGETHER for one in row) == OPTIONS


def differences(written: dict, reached: dict, at: str = "") -> list[str]:
    """The keys of a file whose value is not what was composed; those that the command sets here aside."""
    found: list[str] = []
    for key, value in written.items():
        if key not in reached:
            found.append(f"{at}{key} is missing")
        elif isinstance(value, dict) and isinstance(reached[key], dict):
            found += differences(value, reached[key], f"{at}{key}.")
        elif (
            value != reached[key]
            and "${" not in str(value)
            and f"{at}{key}" not in ("root", "endpoint.model", "base_urls")
        ):
            found.append(f"{at}{key}: {value} is {reached[key]}")
    return found


@pytest.mark.parametrize("path", sorted(CONF.glob("experiment/*.yaml")), ids=lambda p: p.stem)
def test_every_experiment_composes_and_says_its_command_and_cost(path):
    composed(f"experiment={path.stem}")
    text = path.read_text()
    assert re.search(rf"^# python run.py .*\bexperiment=\S*{path.stem}\b", text, re.M)
    assert "cost: " in text and "expected: " in text


def test_an_experiment_overrides_its_groups_and_debug_overrides_it():
    table = composed("experiment=[table_main,at_7b]")
    assert (table.stage.name, table.model.name, table.trainer.accelerator) == ("eval", "lingshu_7b", "gpu")
    assert list(table.benchmark) == ["medxpertqa_mm", "pmc_vqa", "omnimedvqa"] and table.results.id == "table_main"
    assert composed("experiment=[table_main,at_7b]", "model=tiny", "protocol=robust").model.name == "tiny"
    assert composed("experiment=table_main").model.name == "tiny"
    assert composed("experiment=medevalkit", "model=qwen2_vl_2b").eval.max_new_tokens == 8192
    assert composed("experiment=ablation_merge", "debug=smoke").dsa.steps == 8


def test_real_models_are_told_more_than_the_tiny_one():
    assert loading(composed("model=qwen2_vl_2b")).instructions == "full"
    assert loading(composed()).instructions == "small"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "run.py", *words]
    return subprocess.run(command, cwd=CONF.parent, capture_output=True, text=True, timeout=300)


def here(*words: str) -> subprocess.CompletedProcess[str]:
    return _here(list(words))


@pytest.mark.parametrize(("plus", "command"), [("", run), ("+", here)])
def test_an_experiment_is_chosen_with_and_without_a_plus(plus, command):
    done = command(f"{plus}experiment=medevalkit", "--cfg", "job")
    assert done.returncode == 0 and "protocol: medevalkit" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("gba.wieghts=[1,1,1,1]", run),
        ("trainer.devcies=2", here),
        ("+experiment=table_mian", here),
    ],
)
def test_a_typo_is_one_line_and_exit_code_2_and_shown_by_cfg_too(word, command):
    for more in ([], ["--cfg", "job"]):
        done = command(word, *more)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "did you mean" in done.stderr


@pytest.mark.parametrize("path", sorted(CONF.glob("stage/*.yaml")), ids=lambda p: p.stem)
def test_stage_targets_exist(path):
    more = WITHOUT_DEFAULT.get(("stage", path.stem), [])
    assert callable(instantiate(composed(f"stage={path.stem}", *more).stage.run))


def test_the_schema_is_the_base_of_what_is_composed():
    """`--cfg job` shows exactly what will run: every key of the schema, with its type."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        shown = compose("config", overrides=["benchmark=slake", "gba.weights=[1,0,0,0]"])
    assert OmegaConf.get_type(shown) is Config and OmegaConf.get_type(shown.gba) is GbaConfig
    assert OmegaConf.to_yaml(shown, resolve=True) == OmegaConf.to_yaml(OmegaConf.create(asdict(typed(shown))))
    assert shown.gba.weights == [1.0, 0.0, 0.0, 0.0] and "endpoint" in shown.engine  # the type's, and the schema's own


def test_a_merge_file_sets_its_own_search(tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    search = {"density": [0.5, 1.0]}
    text = yaml.safe_dump({"defaults": ["ties", "_self_"], "search": search, "lora_rank": 8})
    (conf / "merge" / "ties_searched.yaml").write_text(text)
    assert composed().merge.search is None
    found = composed("merge=ties_searched", conf=conf).merge
    assert (found.name, found.search, found.lora_rank) == ("ties", search, 8)
    assert composed("merge=ties_searched", "merge.search=null", conf=conf).merge.search is None


def test_models_of_one_family_differ_in_what_their_files_say():
    models = {name: composed(f"model={name}").model for name in ("qwen2_vl_2b", "qwen3_vl_4b", "lingshu_7b")}
    same = [replace(one, name="", name_or_path="", revision="") for one in models.values()]
    assert same[0] == same[1] == same[2] and same[0].lora.r == 64 and same[0].max_pixels == 401408
    assert len({(one.name, one.name_or_path, one.revision) for one in models.values()}) == 3
    for path in CONF.glob("model/*.yaml"):
        if path.stem not in ("tiny", "_qwen"):
            assert set(yaml.safe_load(path.read_text())) == {"defaults", "name", "name_or_path", "revision"}
            assert f"stage=plan model={path.stem}" in path.read_text()


def test_code_is_named_in_one_way():
    """Every dotted path of the package in conf/ is a `_target_`."""
    for path in CONF.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            assert set(re.findall(r"([^\s{,]*):\s+mmedexpert\.", line)) <= {"_target_"}, f"{path}: {line}"


def test_help_names_every_group_and_choice():
    text = yaml.safe_load((CONF / "hydra/help/mmedexpert.yaml").read_text())["header"]
    told = {
        part.split()[0]: set(re.findall(r"\w+", part))
        for part in re.split(r"\n  (?=\w+ +\w)", text.partition("Groups")[2].replace("\n    ", "\n  "))[1:]
    }
    files = [*OPTIONS, *(("experiment", path.stem) for path in CONF.glob("experiment/*.yaml"))]
    assert [f"{group}={option}" for group, option in files if option not in told.get(group, ())] == []
    assert set(told) == {group for group, _ in files}


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
        ("gba={grouping: perspective, conditioning: free}", ["gba.grouping=perspective", "prompted"]),
        ("gba={grouping: perspective, weights: [0,0,0,0]}", ["gba.grouping=perspective", "weights"]),
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
        ("trainer.devcies=2", ["trainer.devcies", "did you mean 'trainer.devices'"]),
        ("model.lora.rr=3", ["model.lora.rr", "did you mean 'model.lora.r'"]),
        ("+gba.wieghts=[1,1,1,1]", ["gba.wieghts", "did you mean 'gba.weights'"]),
        ("+seeed=3", ["seeed", "did you mean 'seed'"]),
        ("merge.search=3", ["merge.search=3", "scaling"]),
        ("lr=1", ["'lr'", "'gba.lr'", "'dsa.lr'"]),
        ("eval.protocol=robust", ["eval.protocol", "did you mean 'protocol'"]),
        ("trainer.devices=two", ["trainer.devices=two", "Integer"]),
        ("data.seed=null", ["data.seed=null", "not Optional"]),
        ("benchmark=[slak]", ["benchmark=slak", "did you mean 'slake'"]),
        ("experiment=table_mian", ["experiment=table_mian", "did you mean 'table_main'"]),
        ("model=qwen2_vl", ["model=qwen2_vl", "did you mean 'qwen2_vl_2b'"]),
        (
            "merge.method.reasoner_scalng=1",
            ["merge.method.reasoner_scalng", "did you mean 'merge.method.reasoner_scaling'"],
        ),
        ("merge.method.density=1", ["merge.method.density", "ties"]),
        ("data.source.trian=1", ["data.source.trian", "did you mean 'data.source.train'"]),
        ("benchmark.slkae.root=tests", ["benchmark.slkae.root", "did you mean 'benchmark.slake.root'"]),
        ("benchmark.slake.root=tests", ["benchmark.slake.root", "add benchmark=slake"]),
        ("gba={steps: 3, stesp: 2}", ["gba.stesp", "did you mean 'gba.steps'"]),
        ("specialty.on_missing=drop", ["specialty.on_missing", "skip"]),
        ("+specialty.missing=[x]", ["specialty.missing", "specialty.names"]),
        ("dsa.warmup_ratio=1.5", ["dsa.warmup_ratio", "at most 1"]),
        ("gba.max_grad_norm=0", ["gba.max_grad_norm", "above 0"]),
        ("model.lora.dropout=-1", ["model.lora.dropout"]),
        ("data.limit=0", ["data.limit", "null"]),
        ("model.min_pixels=20000", ["model.min_pixels", "model.max_pixels"]),
        ("trainer.precision=bf15-mixed", ["trainer.precision", "bf16-mixed"]),
        ("trainer.precision=16-mixed", ["trainer.precision", "bf16-mixed"]),
        ("gba.weights_from=validation  eval.split=val", ["gba.weights_from", "eval.split=test"]),
        ("eval.max_pixels=0", ["eval.max_pixels"]),
        ("engine=vllm  engine.base_urls=[http://a]  eval.max_pixels=99999", ["eval.max_pixels", "stage=serve"]),
        ("trainer.accelerator=cuda0", ["trainer.accelerator", "cuda"]),
        ("trainer.threads=-1", ["trainer.threads"]),
        ("gba.epsilon_high=0", ["gba.epsilon_high"]),
    ],
)
def test_a_mistake_is_one_line_with_its_key(override, words):
    with pytest.raises(Exception) as caught:
        composed(*override.split("  "))
    line = one_line(caught.value)
    assert "\n" not in line and len(line) < 320
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("gba: {wieghts: [1, 1, 1, 1]}", ["conf/experiment/mine.yaml", "gba.wieghts", "did you mean 'gba.weights'"]),
        ("sed: 1", ["conf/experiment/mine.yaml", "did you mean 'seed'"]),
        ("gba: {beta: abc}", ["conf/experiment/mine.yaml", "gba.beta", "abc"]),
        ("merge: {methd: null}", ["conf/experiment/mine.yaml", "did you mean 'merge.method'"]),
        ("defaults: [override /model: qwen2_vl]", ["model=qwen2_vl", "did you mean 'qwen2_vl_2b'"]),
        ("defaults: [override /benchmark: [slake, vqa_rd]]", ["benchmark=vqa_rd", "did you mean 'vqa_rad'"]),
        ("defaults: [override /modle: tiny]", ["conf/experiment/mine.yaml", "did you mean 'model'"]),
        ("defaults: [/modle: tiny]", ["conf/experiment/mine.yaml", "modle=tiny", "did you mean 'model'"]),
        ("gba: [1", ["experiment/mine.yaml line", "not YAML"]),
    ],
)
def test_a_mistake_in_an_experiments_file_names_file_and_key(body, words, tmp_path):
    conf = shutil.copytree(CONF, tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{body}\n")
    with pytest.raises(Exception) as caught:
        composed("experiment=mine", conf=conf)
    line = one_line(caught.value)
    assert "\n" not in line and "unexpected" not in line
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


def test_a_mistake_is_found_without_the_libraries_of_training():
    heavy = "[name for name in ('numpy', 'torch', 'transformers', 'lightning') if name in sys.modules]"
    told = subprocess.run(
        [sys.executable, "-c", f"import sys, mmedexpert.checks, mmedexpert.unread; print({heavy})"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told == "[]\n"


def test_questions_of_a_server_and_of_the_funnel_stand_behind_the_same_system_prompt():
    found = composed(
        "stage=eval",
        "data=mmedexpert",
        "data.root=.",
        "engine=openai",
        "engine.endpoint.model=m",
        "model=qwen2_5_vl_7b",
    )
    asked = (found.engine.endpoint, found.data.curate.blind, found.data.curate.difficulty)
    assert {one.system_prompt for one in asked} == {found.model.system_prompt} != {None}
