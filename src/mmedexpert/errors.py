"""Errors whose text is meant for the user, not for the developer."""


class UserError(Exception):
    """A mistake the user can mend, told in one line: what is wrong, where (key, file or record), and the fix.

    `run.py` prints it without a traceback and exits with code 2; `debug.traceback=true` shows the traceback.
    """
