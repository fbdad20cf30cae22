"""Worker processes that do not outlive the process that started them. Imports little: each worker does it anew."""

from __future__ import annotations

import os
import signal
import threading
import time


def follow(parent: int) -> None:
    """Let this process end when its parent has ended, however that was, and leave signals to the parent: interruptions,
    and USR2, by which SLURM tells all processes of a job that its time is over."""
    for name in ("SIGINT", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
