"""Errors whose text is meant for the user, not for the developer."""

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake the user can mend, told in one line: what is wrong, where (key, file or record), and the fix.

    `run.py` prints it without a traceback and exits with code 2; `debug.traceback=true` shows the traceback.
    """


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean ...?` when something known is close, else the list of what is known."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(known)}"
