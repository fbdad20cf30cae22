"""Independent work side by side, each in a process of its own; the first process shows the others' lines and bars."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from mmedexpert.errors import UserError
from mmedexpert.runtime import identity, progress, runs
from mmedexpert.runtime.orphans import follow
from mmedexpert.runtime.quiet import silence

Work = Callable[[], Any]
_pool: ProcessPoolExecutor | None = None
_told: Any = None  # what the workers tell: a queue of lines and of where their bars stand


def start(count: int, threads: int, first: Work) -> None:
    """Let `count` workers start, each with so many threads of torch, while this process goes on; once in a command.

    `first` is what each of them does before all else: what it needs is imported so.
    """
    global _pool, _told
    if _pool is not None:
        return
    context = get_context("spawn")  # a fork of a process with threads may hang
    _told = context.SimpleQueue()
    settings = (_told, sys.stderr.isatty(), threads, os.getpid())
    _pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=settings)
    for _ in range(count):  # a worker starts where work is waiting and none is idle
        _pool.submit(first)


def side_by_side(works: Sequence[Work]) -> None:
    """Do all of `works` (picklable) by the workers of `start`, the first ones first; nothing comes back.

    The first error ends the others where they are, and is raised; so does an interruption.
    """
    assert _pool is not None and _told is not None
    with _shown():
        futures: list[Future[Any]] = [
            _pool.submit(_work, work, set(runs._named), dict(identity._recipes)) for work in works
        ]
        try:
            for future in _as_they_end(futures):
                told, made = future.result()
                runs._named |= told
                runs.by_workers |= made
        except BaseException as error:
            stop()
            if isinstance(error, BrokenProcessPool):
                fix = "trainer.processes=1 goes on from where it stood"
                raise UserError(f"a worker ended without a word, most often for want of memory: {fix}") from error
            raise


def stop() -> None:
    """End the workers, whatever they do: files are whole or not there, and a run goes on from its checkpoint."""
    global _pool
    if _pool is not None:
        for process in list((_pool._processes or {}).values()):
            process.kill()
        _pool.shutdown(cancel_futures=True)
        _pool = None


def _as_they_end(futures: list[Future[Any]]) -> Iterator[Future[Any]]:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=1.0, return_when="FIRST_COMPLETED")
        yield from done


@contextmanager
def _shown() -> Iterator[None]:
    """Shows what workers tell, until the block ends and all of it was read."""
    over = threading.Event()  # no word in the queue: a worker that was killed may hold its lock
    listener = threading.Thread(target=_listen, args=(_told, over), daemon=True)
    listener.start()
    try:
        yield
    finally:
        over.set()
        listener.join()


def _listen(told: Any, over: threading.Event) -> None:
    with progress.Bars() as bars:
        while not (told.empty() and over.wait(0.1)):
            if told.empty():
                continue
            message = told.get()
            if isinstance(message, str):
                bars.line(message)
            else:
                bars.show(*message)


class _Lines:
    """A file whose lines the first process writes."""

    def __init__(self, told: Any, terminal: bool) -> None:
        self.told, self.terminal, self.part = told, terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        *lines, self.part = (self.part + text).split("\n")
        for line in lines:
            self.told.put(line)
        return len(text)

    def flush(self) -> None:
        pass


def _begin(told: Any, terminal: bool, threads: int, parent: int) -> None:
    """A worker's start: it is quiet, tells the first process what it has to tell, and does not outlive it."""
    import torch

    follow(parent)
    torch.set_num_threads(threads)
    runs.console.file = _Lines(told, terminal)  # type: ignore[assignment]
    runs.console._force_terminal = terminal
    progress.relay = told.put


def _work(work: Work, told: set[Path], recipes: dict[str, str]) -> tuple[set[Path], set[str]]:
    """Work, with what the first process has told and found so far; returns what has been told and made since."""
    runs._named |= told
    for name, recipe in recipes.items():
        identity.remember(name, recipe)
    silence(traceback=False)  # of libraries that are imported by now
    work()
    return runs._named, runs._made
