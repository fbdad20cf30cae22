"""What the user sees: one line for an error, and no chatter of libraries."""

from __future__ import annotations

import difflib
import logging
import re
import warnings

from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password

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
    cause = error.__cause__
    if cause is not None and (isinstance(cause, UserError) or type(error).__name__ == "InstantiationException"):
        # `build` unpacks these where the project calls Hydra; what else calls it is told by its cause, too
        at = re.search(r"full_key: (\S+)", str(error))
        return f"{at[1]}: {_one_line(cause)}" if at else _one_line(cause)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    option = re.search(r"Could not find '([\w-]+)/([\w-]+)'", str(error))
    if option:
        known = [line for line in lines if re.fullmatch(r"[\w-]+", line)]
        return f"{option[1]}={option[2]}: no such option{_suggest(option[2], known)}"
    if "LexerNoViableAlt" in str(error):  # such as an unquoted ~
        return f"{lines[0].partition(': ')[2]}: this is not readable; quote its value twice, \"key='value'\""
    key = re.search(r"(?:Key '([\w.-]+)' is not in struct|Could not override '([\w.@/-]+)')", str(error))
    if key:
        whole = re.search(r"full_key: ([\w.-]+)", str(error))
        return _no_such_key(whole[1] if whole else key[2] or key[1])
    return " ".join(lines[:2])[:300]


def _no_such_key(word: str) -> str:
    """A key that is unknown, or known to another option of its group alone."""
    from mmedexpert.schema import keys

    group, _, rest = word.partition(".")
    name = rest.partition(".")[0]
    if group == "benchmark" and name and name not in ("name", "root"):
        return f"no such config key {word!r} in this command; add benchmark={name}"
    if word in keys() and not rest:
        return f"{word}={{...}} holds something that is no config key; give each as {word}.<key>=<value>"
    if word in keys() or word.startswith(("data.source.", "merge.method.")):
        return f"no such config key {word!r} with this choice of {group}; choose another, {group}=<one of conf/{group}>"
    return f"no such config key {word!r}{_suggest(word, keys())}"


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; use one of {', '.join(known)}" if 0 < len(known) < 30 else "; see python run.py --cfg job"
