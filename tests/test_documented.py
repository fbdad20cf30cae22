"""Every command that a file of the repository shows composes, can be typed, and gives no option that nothing reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from mmedexpert.checks import typed
from mmedexpert.unread import notes

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
FILES = [
    *sorted(CONF.rglob("*.yaml")),
    *(
        ROOT / name
        for name in (
            "README.md",
            "AGENTS.md",
            "docs/usage.md",
            "docs/dataset.md",
            "docs/judges.md",
            "docs/vllm.md",
            "docs/clusters.md",
        )
    ),
    *sorted(ROOT.glob("experiments/*/README.md")),
]


def shown() -> Iterator[tuple[Path, str]]:
    """File and what follows `python run.py`, without a comment or what stands in a column of its own; a line once."""
    seen = set()
    for path in FILES:
        for line in path.read_text(encoding="utf-8").splitlines():
            if match := re.search(r"^(?:#| {2,}|.*\| `).*?python run\.py(.*)", line.replace("[" * 2, "[")):
                words = re.split(r" {2,}|`|\s#|; ", match[1])[0].strip()
                whole = not re.search(r"\$|\.\.\.|--", words)
                if whole and (words not in seen or path.parent.parent == CONF):
                    yield path, words
                seen.add(words)


SHOWN = list(shown())


def test_every_file_of_a_model_or_data_set_shows_its_command():
    showing = {path for path, _ in SHOWN}
    for path in [*CONF.glob("model/[!_]*.yaml"), CONF / "data/labelled_images.yaml", CONF / "data/medr1.yaml"]:
        assert path in showing, path
    assert len(SHOWN) > 65


@pytest.mark.parametrize(("path", "line"), SHOWN, ids=[f"{p.parent.name}/{p.stem}:{w[:60]}" for p, w in SHOWN])
def test_a_shown_command_composes_and_is_used_whole(path, line, tmp_path):
    line = re.sub(r"\[(benchmark\.\w+\.root=<.*>)\]", r"\1", line)  # what may be left out
    for placeholder in set(re.findall(r"<[^<>]*(?:<\w+>)?[^<>]*>", line)):
        line = line.replace(placeholder, str(tmp_path) if "folder" in placeholder else "x")
    overrides = []
    for word in shlex.split(line.replace("data=mine", "data=mmedexpert")):  # a file of the reader's own
        if word == "-m":
            continue
        one = OverridesParser.create().parse_override(word.removeprefix("+") if "experiment=" in word else word)
        first = next(iter(one.sweep_string_iterator())) if one.is_sweep_override() else one.get_value_string()
        overrides.append(f"{one.input_line.partition('=')[0]}={first}" if "=" in word else word)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = typed(compose("config", overrides=overrides), overrides)
    assert notes(config, overrides, ()) == []
    if path.parent == CONF / "model":
        assert config.model.name == path.stem
        if path.stem != "tiny" and config.stage.name != "plan":
            assert config.data.root == str(tmp_path) and config.trainer.accelerator == "gpu"
    if path.parent == CONF / "data":
        assert config.data.name == path.stem == yaml.safe_load(path.read_text(encoding="utf-8"))["name"]
    trains = config.stage.name in ("pipeline", "dsa", "caci") or (
        config.stage.name == "gba" and config.gba.init != "base"
    )
    drawn = config.data.name in ("phantom", "mmedexpert")
    if trains and not drawn and config.model.architecture is None:  # no real source has traces
        assert config.dsa.allow_untraced
