"""The processes of a command on several devices: who they are, what they tell each other, whose error is told."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from torch import distributed as dist

from mmedexpert.errors import UserError
from mmedexpert.runtime.quiet import one_line

GRACE_SECONDS = 5.0  # ours: in which a rank may fail by itself before it is ended for the failure of another
T = TypeVar("T")
Tell = Callable[[str, str], None]
_alone = False  # rank 0 works while the others wait for it
_works = 0  # of all ranks together, so far
_parted = False  # by a failure of some: what the others had begun with them is left undone


def rank() -> int:
    """The number of this process among those that work together; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def gather(value: T) -> list[T]:
    """The values of all ranks in their order, at every rank; each waits here for the others, however long."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value, group=_host_group())
    return found


def shutdown() -> None:
    """The end of a command: ranks wait for the last of them, and leave each other."""
    if ranks() > 1:
        with suppress(RuntimeError):  # one has gone already
            gather(None)
        dist.destroy_process_group()


@cache
def _host_group() -> Any:
    """A group of all ranks that waits without a device, and longer than a collective call of the training may."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=30))


@cache
def _store() -> Any:
    """What the ranks tell each other while one of them may hang."""
    host = os.environ["MASTER_ADDR"]
    first = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if rank() == 0 else None
    port = gather(first.port if first else 0)[0]
    return first or dist.TCPStore(host, port, is_master=False)


def on_first(work: Callable[[], T]) -> T | None:
    """`work` on rank 0, while the others wait for it; all raise its error."""
    global _alone
    if ranks() == 1:
        return work()
    value, failure = None, None
    if rank() == 0:
        _alone = True
        try:
            value = work()
        except Exception as error:
            failure = error
        finally:
            _alone = False
    failed = gather(None if failure is None else _told_by(failure))[0]
    if failure is not None:
        raise failure
    if failed is not None:
        raise _error(failed)
    return value


def on_all(work: Callable[[], T], failed: Tell) -> T | None:
    """`work` on every rank; all raise the error of the first that fails.

    Where ranks wait for it in vain, in a collective call, they are ended: rank 0 with `failed(error, traceback)`, the
    error in one line, and exit code 2.
    """
    global _parted, _works
    if ranks() == 1:
        return work()
    if _parted:
        raise UserError("another job of this command failed on some of its devices: run the command again for this one")
    store, over, _works = _store(), threading.Event(), _works + 1
    key, value, failure = f"failure/{_works}", None, None
    threading.Thread(target=_guard, args=(store, key, over, failed), daemon=True).start()
    try:
        value = work()
    except Exception as error:
        failure = error
        store.compare_set(key, "", _told_by(error))  # the first is kept
    try:
        failures = gather(failure is not None)
    except RuntimeError as error:  # a rank has gone
        store.compare_set(key, "", _told_by(error))
        failures = [True, False]
    over.set()
    if any(failures):
        _parted = not all(failures)
        raise _error(store.get(key).decode()) from failure
    return value


def _guard(store: Any, key: str, over: threading.Event, failed: Tell) -> None:
    """Ends this process where another rank has failed and this one hangs in a collective call with it."""
    try:
        while not over.wait(1.0):
            if store.check([key]) and not over.wait(GRACE_SECONDS):
                if rank() == 0:
                    error = _error(store.get(key).decode())
                    failed(str(error), "".join(error.__notes__))
                    print(f"error: {one_line(error)}", file=sys.stderr, flush=True)
                os._exit(2 if rank() == 0 else 0)  # rank 0 tells it: a launcher that sees another code kills rank 0
    except RuntimeError:  # the store went with rank 0
        os._exit(1)


def _told_by(error: Exception) -> str:
    text = str(error) if isinstance(error, UserError) else f"rank {rank()}: {type(error).__name__}: {error}"
    return json.dumps([isinstance(error, UserError), text, "".join(traceback.format_exception(error))])


def _error(told: str) -> Exception:
    """An error that another rank may have told."""
    users, text, trace = json.loads(told)
    error = UserError(text) if users else RuntimeError(text)
    error.add_note(trace)
    return error
