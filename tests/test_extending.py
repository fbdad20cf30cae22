"""The worked changes of docs/extending.md, applied to a copy of the code: each is small, and adds what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = re.findall(r"^## (.+?)\n.*?```diff\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.M | re.S)
USED = {
    "A reward": "from mmedexpert.training.rewards import REWARDS, outcome; "
    "print(outcome([], record=[], weights={'brevity': 2.0})[0], REWARDS['brevity'](['x']))",
    "A perspective": "from mmedexpert.guidelines import PERSPECTIVES, adherence; print(len(PERSPECTIVES), "
    "adherence('<think>Fluid fills the lower lobe of the left lung. Fluid also lies behind the stiff heart.</think>"
    "<answer>A</answer>', {'A': 'Edema', 'B': 'Fracture'}, PERSPECTIVES[4]))",
    "A merge method": "import torch; from mmedexpert.merging.stream import call_method; "
    "from mmedexpert.merging.methods import median; one, other = torch.tensor([1., -3.]), torch.tensor([-2., 1.]); "
    "print(call_method(median, [one], [other], 'x').tolist())",
    "A benchmark": "from mmedexpert.sources.mini_vqa import load; print(load.__name__)",
    "A data source": "from pathlib import Path; from mmedexpert.sources.quiz import quiz; Path('quiz.csv').write_text("
    "'image,question,right,wrong\\na.png,What?,x,y\\n'); print(quiz(Path('.'), Path('.'), seed=0)[0][0].options)",
    "A model": "",
    "A logged metric": "import inspect; from mmedexpert.training import rollout_report; "
    "print('completions/distinct' in inspect.getsource(rollout_report.report))",
    "A specialty": "",
}
SHOWN = {
    "A reward": "[] [1.0]",
    "A perspective": "5 1.0",
    "A merge method": "[-2.0, -3.0]",
    "A benchmark": "load",
    "A data source": "{'A': 'x', 'B': 'y'}",
    "A logged metric": "True",
}
COMPOSED = {
    "A reward": "reward=brief",
    "A merge method": "merge=median",
    "A benchmark": "benchmark=mini_vqa",
    "A data source": "data=quiz",
    "A model": "model=my_qwen",
    "A specialty": "specialty=neonatology",
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory) -> Path:
    """A copy of the code with all changes in it: they do not meet."""
    folder = tmp_path_factory.mktemp("extended")
    for name in ("src", "conf"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for title, diff in SECTIONS:
        done = subprocess.run(["git", "apply", "-"], cwd=folder, input=diff, capture_output=True, text=True)
        assert done.returncode == 0, f"{title} does not apply any more: {done.stderr}"
    return folder


def python(folder: Path, code: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder / "src")})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_kind_of_addition_has_a_worked_change_in_two_files_at_most():
    assert {title for title, _ in SECTIONS} == set(USED)
    for title, diff in SECTIONS:
        assert 1 <= len(re.findall(r"^\+\+\+ b/", diff, re.M)) <= 2, title


@pytest.mark.slow
def test_what_the_changes_add_is_used(extended):
    lines = [f"exec({code!r}); print('--')" for code in USED.values()]
    shown = [part.strip() for part in python(extended, "\n".join(lines)).split("--")]
    assert {title: said for title, said in zip(USED, shown, strict=False) if said} == SHOWN


@pytest.mark.slow
def test_their_options_compose(extended):
    words = list(COMPOSED.values())
    code = (
        "import os; from omegaconf import OmegaConf; from hydra import compose, initialize_config_dir; "
        "import mmedexpert.schema; OmegaConf.register_new_resolver('home', os.path.expanduser)\n"
        f"with initialize_config_dir({str(extended / 'conf')!r}, version_base='1.3'):\n"
        f"    config = compose('config', {words!r})\n"
        "    print(config.reward.weights.brevity, config.merge.name, list(config.benchmark), config.data.name, "
        "config.model.lora.r, config.specialty.names)"
    )
    assert python(extended, code) == "0.1 median ['mini_vqa'] quiz 64 ['neonatology']"
