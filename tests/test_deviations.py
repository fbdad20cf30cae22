"""docs/deviations.md names every file that holds a choice of ours, and quotes the configs as they are."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`((?:src|conf)/[^`]+\.(?:py|yaml))`", TEXT))
MARK = re.compile(r"# (?:ours|peers)\b")
MARKED = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("src", "conf")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml") and MARK.search(path.read_text(encoding="utf-8"))
)
ROWS = re.findall(r"^\| `(conf/[^`]+\.yaml)`[^|]* \| ((?:`[\w.]+` ?)+) \| (.+?) \|(?= )", TEXT, re.M)


def test_there_are_marked_files_and_rows_to_compare():
    assert len(MARKED) > 20 and len(ROWS) > 20


@pytest.mark.parametrize("path", MARKED)
def test_a_marked_file_is_named(path):
    assert path in NAMED, f"{path} has a mark `# ours` or `# peers`: add its row to docs/deviations.md"


@pytest.mark.parametrize("path", sorted(NAMED))
def test_a_named_file_exists(path):
    assert (ROOT / path).is_file(), f"docs/deviations.md names {path}, which is gone"


@pytest.mark.parametrize(("path", "keys", "values"), ROWS)
def test_a_quoted_config_value_is_the_configs(path, keys, values):
    quoted = [value.replace("\\|", "|") for value in re.findall(r"`([^`]+)`", values)]
    if not quoted:  # a value told in words
        assert values.startswith('"')
        return
    config = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    for key, value in zip(re.findall(r"`([^`]+)`", keys), quoted, strict=True):
        actual = config
        for part in key.split("."):
            actual = actual[part]
        # a regex is no YAML value, and Hydra reads numbers such as 1e-3 that YAML 1.1 does not
        assert str(actual) == value or actual == yaml.safe_load(value), f"{path}: {key} is {actual!r}, not {value}"
