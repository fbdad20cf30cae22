"""What the user sees: one line for an error, and no chatter of libraries."""

from __future__ import annotations

import difflib
import logging
import re
import warnings

from mmedexpert.errors import UserError
from mmedexpert.privacy import without_password

NOISY = ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "httpx", "huggingface_hub")


def silence(*, traceback: bool) -> None:
    """Libraries report errors only; everything is heard with `debug.traceback=true`."""
    if traceback:
        return
    warnings.filterwarnings("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def one_line(error: BaseException) -> str:
    """An error in one line that names the key, option, file or record and the fix; passwords in addresses are hidden.

    Ours say so themselves; Hydra's and OmegaConf's are shortened, with the closest known name; anything else is a
    defect and says where its traceback lies.
    """
    return without_password(_one_line(error))


def _one_line(error: BaseException) -> str:
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    module = type(error).__module__
    if not module.startswith(("hydra", "omegaconf")):
        return (
            f"{type(error).__name__}: {' '.join(str(error).split())[:300]} "
            "(unexpected: traceback.txt in the run's folder, or debug.traceback=true)"
        )
    if error.__cause__ is not None and isinstance(error.__cause__, UserError):
        return _one_line(error.__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    option = re.search(r"Could not find '([\w-]+)/([\w-]+)'", str(error))
    if option:
        known = [line for line in lines if re.fullmatch(r"[\w-]+", line)]
        return f"{option[1]}={option[2]}: no such option{_suggest(option[2], known)}"
    key = re.search(r"(?:Key '([\w.-]+)' is not in struct|Could not override '([\w.@/-]+)')", str(error))
    if key:
        from mmedexpert.schema import keys

        word = key[2] or key[1]
        return f"no such config key {word!r}{_suggest(word, keys())}"
    return " ".join(lines[:2])[:300]


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; use one of {', '.join(known)}" if 0 < len(known) < 30 else "; see python run.py --cfg job"
