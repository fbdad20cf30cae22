"""What Hydra builds keeps its errors' types, and a user's mistake is one line that names the key."""

from __future__ import annotations

import errno
from functools import partial
from pathlib import Path

import pytest
import yaml
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from mmedexpert.errors import UserError
from mmedexpert.runtime.build import build, function, method
from mmedexpert.runtime.quiet import one_line

HERE = __name__


def source(root: str, *, count: int, share: float = 0.5, name: str = "a", seed: int = 0) -> tuple[str, int, float, str]:
    """Stands for a data source; what `root` says decides how it fails."""
    errors = {
        "user": UserError("record q7: no image"), "value": ValueError("count must be even"),
        "full": OSError(errno.ENOSPC, "No space left on device"), "defect": KeyError("x"),
    }  # fmt: skip
    if root in errors:
        raise errors[root]
    return root, count, share, name


def anything(**values: int) -> dict[str, int]:
    return values


def config(**values: object) -> dict[str, object]:
    return {"_target_": f"{HERE}.source", "count": 2, **values}


def test_values_and_arguments_arrive():
    assert build(config(share=1), "data.source", root="here") == ("here", 2, 1, "a")
    assert build({"_target_": f"{HERE}.anything", "a": 1}, "x", b=2) == {"a": 1, "b": 2}
    made = build(config(_partial_=True), "merge.method")
    assert isinstance(made, partial) and made("there") == ("there", 2, 0.5, "a")
    assert function({"_target_": f"{HERE}.source", "_partial_": True}, "x") is source
    assert function(config(share=1), "x")("there") == ("there", 2, 1, "a")


def test_every_error_keeps_its_type():
    for root, kind in (("user", UserError), ("full", OSError), ("defect", KeyError)):
        with pytest.raises(kind) as caught:
            build(config(), "data.source", root=root)
        assert not isinstance(caught.value, InstantiationException)
        assert caught.value.__traceback__ is not None
    with pytest.raises(OSError) as full:
        build(config(), "data.source", root="full")
    assert full.value.errno == errno.ENOSPC  # which `runs.execute` tells by the number
    with pytest.raises(UserError, match="record q7: no image"):
        build(config(), "data.source", root="user")


@pytest.mark.parametrize(
    ("values", "root", "told"),
    [
        ({"foo": 1}, "here", "data.source.foo: .*takes no such value"),
        ({"cuont": 1}, "here", "data.source.cuont: .*did you mean 'count'"),
        ({"root": "mine"}, "here", "data.source.root: .*takes no such value"),  # given from elsewhere
        ({"count": "x"}, "here", "data.source.count='x' must be a whole number"),
        ({"count": True}, "here", "data.source.count=True must be a whole number"),
        ({"count": 1.5}, "here", "data.source.count=1.5 must be a whole number"),
        ({"name": 3}, "here", "data.source.name=3 must be a text"),
        ({}, "value", "data.source: count must be even"),
        ({"_target_": f"{HERE}.gone"}, "here", "data.source._target_='.*gone' is not found"),
        ({"_target_": "no.such.module"}, "here", "data.source._target_"),
        ({"_target_": None}, "here", "data.source._target_=None is not found"),
        ({"_target_": f"{HERE}.HERE"}, "here", "data.source._target_.*no function"),
    ],
)
def test_a_users_mistake_is_one_line_that_names_the_key(values, root, told):
    with pytest.raises(UserError, match=told) as caught:
        build(config(**values), "data.source", root=root)
    assert "unexpected" not in one_line(caught.value)


CONF = Path(__file__).parents[1] / "conf"
MADE = [
    pytest.param(part[key], f"{path.parent.name}.{path.stem}.{key}", id=f"{path.parent.name}-{path.stem}-{key}")
    for path in sorted(CONF.glob("*/*.yaml"))
    if isinstance(part := yaml.safe_load(path.read_text()), dict)
    for key in ("source", "load", "method", "ask", "judge", "run")
    if isinstance(part.get(key), dict) and path.parent.name != "reward"  # whose judge is a server, and no function
]


@pytest.mark.parametrize(("described", "where"), MADE)
def test_every_config_fits_what_it_names_and_a_misspelt_key_does_not(described, where):
    plain = {key: value for key, value in described.items() if key in ("_target_", "_partial_") or key[0] != "_"}
    assert callable(build(plain | {"_partial_": True}, where))
    with pytest.raises(UserError, match=f"{where}.misspelt"):
        build(plain | {"misspelt": 1, "_partial_": True}, where)


def test_a_missing_value_is_named():
    with pytest.raises(UserError, match=r"data\.source\.count is missing"):
        build({"_target_": f"{HERE}.source"}, "data.source", root="here")
    assert method(f"{HERE}.source", "benchmark.x.ask") is source


def test_one_line_tells_the_cause_of_what_hydra_wraps():
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": f"{HERE}.source", "root": "user", "count": 1})
    assert one_line(caught.value) == "record q7: no image"
    with pytest.raises(InstantiationException) as caught:
        instantiate({"a": {"_target_": f"{HERE}.source", "root": "value", "count": 1}})
    assert one_line(caught.value).startswith("a: ValueError: count must be even")
