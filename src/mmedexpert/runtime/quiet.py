"""What the user sees: one line for an error, and no chatter of libraries."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings

from yaml import MarkedYAMLError

from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.typos import told_of_hydra

NOISY = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "httpx", "huggingface_hub")


def silence(*, traceback: bool) -> None:
    """Libraries report errors only; all but bars is heard with `debug.traceback=true`."""
    if traceback:
        return
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it is not imported for this: a second
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_error()


def one_line(error: BaseException) -> str:
    """An error in one line that names the key, option, file or record and the fix; passwords in addresses are hidden.

    Ours say so themselves; of Hydra's and OmegaConf's `typos.told_of_hydra` says what is meant; anything else is a
    defect and says where its traceback lies.
    """
    return without_password(_one_line(error))


def _one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    module = type(error).__module__
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name} line {mark.line + 1}: this is not YAML: {error.problem}"
    if isinstance(error, AssertionError) and "Unexpected type for root: NoneType" in str(error):  # OmegaConf.update
        return "a key is given below one that is null with these options, such as merge.method.<key> with merge=none"
    if module.startswith("submitit"):  # raised in the midst of a job whose time is over
        return f"{' '.join(str(error).split())[:300]} (hydra.launcher.timeout_min, hydra.launcher.max_num_timeout)"
    if not module.startswith(("hydra", "omegaconf")):
        return (
            f"{type(error).__name__}: {' '.join(without_password(str(error)).split())[:300]} "
            "(unexpected: traceback.txt in the run's folder, or debug.traceback=true)"
        )
    cause = error.__cause__
    if cause is not None and (isinstance(cause, UserError) or type(error).__name__ == "InstantiationException"):
        # `build` unpacks these where the project calls Hydra; what else calls it is told by its cause, too
        at = re.search(r"full_key: (\S+)", str(error))
        return f"{at[1]}: {_one_line(cause)}" if at else _one_line(cause)
    return told_of_hydra(str(error), str(cause or ""))
