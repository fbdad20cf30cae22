"""Arms of an experiment that differ in single keys and are no grid: `arms` of conf/experiment, `arm=<name>`."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mmedexpert.errors import UserError, suggestion
from mmedexpert.runtime.typos import no_such_key


def with_arm(composed: DictConfig) -> DictConfig:
    """The config with the values that its arm gives to single keys; as it is without one.

    Raises:
        UserError: an arm that the experiment has not, or a key that no config has.
    """
    name, arms = composed.get("arm"), composed.get("arms") or {}
    if name is None:
        return composed
    if name not in arms:
        hint = suggestion(str(name), [str(one) for one in arms]) if arms else ": add experiment=<one with arms>"
        raise UserError(f"arm={name} is not known{hint}")
    found = composed.copy()
    OmegaConf.update(found, "arms", OmegaConf.to_container(arms, resolve=True), merge=False)  # by the values before it
    for key, value in (arms[name] or {}).items():
        missing = object()
        if OmegaConf.select(found, str(key), default=missing) is missing:
            raise UserError(f"arm {name}: {no_such_key(str(key))}")
        try:
            with open_dict(found):
                OmegaConf.update(found, str(key), value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"arm {name}: {key}: {str(error).splitlines()[0]}") from error
    return found
