"""Arms of an experiment: what one sets, what is refused, and that those of conf/experiment hold together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from commands import run
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from mmedexpert.checks import typed
from mmedexpert.errors import UserError

ROOT = Path(__file__).parents[1]
SAME = ("experts_mean", "four")  # arms that name the default, so that the file says what it is
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").glob("*.yaml"))


def config(*overrides: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def test_an_arm_sets_its_keys_and_what_follows_them():
    given = config("arms={short:{model.dsa_steps:7,gba.weights:[0,1,0,0]},plain:{}}", "arm=short")
    found = typed(given)
    assert (found.dsa.steps, found.model.dsa_steps, found.gba.weights) == (7, 7, [0, 1, 0, 0])
    assert typed(config("arms={short:{gba.steps:7},plain:{}}", "arm=plain")).gba == typed(config()).gba
    keep = typed(config("arms={some:{gba.keep:[1,7],eval.models:[start]}}", "arm=some"))
    assert keep.gba.keep == [1, 7] and keep.eval.models == ["start"]
    assert typed(config("arms={short:{gba.steps:7}}")).gba.steps != 7  # none chosen


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["arms={short:{gba.steps:7}}", "arm=shrt"], "arm=shrt is not known.*did you mean 'short'"),
        (["arm=short"], "arm=short is not known: add experiment="),
        (["arms={short:{gba.stepz:7}}", "arm=short"], "arm short: .*gba.stepz.*gba.steps"),
        (["arms={short:{gba.steps:many}}", "arm=short"], "gba.steps"),
        (["arms={short:{gba.steps:0}}", "arm=short"], "gba.steps=0 must be"),
        (
            ["arms={short:{gba.steps:7}}", "arm=short", "gba.steps=9"],
            "arm=short sets gba.steps, and so does the command",
        ),
        (["results.id=x", "results.against='caci (shrt)'", "arms={short:{}}"], "names no arm.*short"),
    ],
)
def test_a_mistake_in_an_arm_is_told(overrides, said):
    with pytest.raises(UserError, match=said):
        typed(config(*overrides), overrides)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_has_a_folder_a_claim_and_arms_that_fit(name):
    found = typed(config(f"experiment={name}"))
    if not found.results.claim:  # settings without a table over seeds
        return
    assert found.results.id == name
    folder = ROOT / "experiments" / name
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert expected["id"] == name and (expected["published"] or expected["why_none"])
    for row in expected["published"]:
        assert set(row) >= {"model", "set", "value", "source", "n"}
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert found.results.claim.rstrip(".").lower() in " ".join(text.split()).lower()
    assert f"experiment={name}" in text and "7B" in text
    assert found.stage.name == "eval"  # nothing is made that no row needs
    arms = list(found.arms or {})
    for more in ([], ["model=lingshu_7b", "trainer=gpu"]):  # as at_7b, whose benchmarks are on the hub
        given = config(f"experiment={name}", *more)  # once: half a second
        base = typed(given)
        whole = {arm: typed(OmegaConf.merge(given, {"arm": arm})) for arm in arms}
        asked = [one for with_it in whole.values() for one in with_it.eval.models or []]
        assert not arms or not found.results.against or found.results.against.partition(" (")[0] in [*asked, *arms]
        plain = {arm: json.dumps(asdict(replace(one, arm=None, arms=None)), default=str) for arm, one in whole.items()}
        for arm, text in plain.items():
            others = [other for other in arms if other != arm and plain[other] == text]
            assert not others, f"arms {arm} and {others[0]} are one"
            told = (found.arms or {})[arm]
            same = text == json.dumps(asdict(replace(base, arm=None, arms=None)), default=str)
            assert same <= (not told or arm in SAME), f"arm {arm} sets what stands there already"


def test_a_shell_completes_groups_choices_and_keys():
    """Hydra's completion, which is asked at every press of a key: nothing heavy may be imported before it answers."""
    cases = {"merge=reg": "merge=regmean", "gba.keep": "gba.keep_rollouts=", "experi": "experiment="}
    for typed_so_far, wanted in cases.items():
        done = subprocess.run(
            [sys.executable, "run.py", "-sc", "query=bash"], cwd=ROOT, capture_output=True, text=True, timeout=60,
            env={**os.environ, "COMP_LINE": f"python run.py {typed_so_far}"},
        )  # fmt: skip
        assert wanted in done.stdout.split(), done
    done = subprocess.run([sys.executable, "run.py", "-sc", "install=bash"], cwd=ROOT, capture_output=True, text=True)
    assert "hydra_bash_completion" in done.stdout


def test_every_arm_is_a_job_and_a_command_may_choose(tmp_path):
    done = run(tmp_path, "-m", "experiment=data_filtering", "stage=data", "runs.explain=true", "seed=0")
    assert all(f"arm={name}" in done.stdout for name in ("all", "sometimes", "hard", "easy"))
    done = run(tmp_path, "-m", "experiment=data_filtering", "stage=data", "runs.explain=true", "seed=0,1", "arm=hard")
    assert "seed=0" in done.stdout and "seed=1" in done.stdout and "arm=easy" not in done.stdout
