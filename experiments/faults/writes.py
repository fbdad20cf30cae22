"""`python experiments/faults/writes.py`: every stage made to fail at each of its file operations, and run again.

An operation is the opening of a file for writing, a renaming, removal, new folder, link or fsync below the outputs
folder, in the order in which the stage does them; Python's audit hooks tell of them and may forbid them. At the k-th

    die     the process ends before it
    torn    the process ends within the next write of more than a few bytes (RLIMIT_FSIZE), whichever library writes
    full    it and all later ones raise ENOSPC, renamings and removals but not
    once    it alone raises ENOSPC

Then the stage runs without a fault, and has to leave what an undisturbed run leaves (same.py). A full disk has to be
told in one line. Each of them is a process of its own, forked where the libraries are imported.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
sys.path.append(str(HERE))
from kill import SETTINGS as OF_KILL  # noqa: E402
from kill import imported  # noqa: E402
from same import differences  # noqa: E402

# every stage, with few images and questions: an operation more is a trial more
FEW = [
    "data.source.train=4", "data.source.val=1", "data.source.test=1", "pretrain.looking_steps=2", "dsa.steps=2",
    "dsa.checkpoint_every=1", "gba.steps=2", "gba.checkpoint_every=1", "eval.models=[caci,majority]",
    "merge.distil_steps=0",
]  # fmt: skip
SETTINGS = [word for word in OF_KILL if word.split("=")[0] not in {one.split("=")[0] for one in FEW}] + FEW
MODES = ("die", "torn", "full", "once")
STAGES = ("data", "pretrain", "dsa", "gba", "caci", "eval")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.symlink", "os.link")
NEED_ROOM = ("open", "os.mkdir", "os.symlink", "os.link", "fsync")
TORN_BYTES = 300  # at most so many are written of a file that is torn
DIED, FAILED = 9, 3  # exit codes of a process that was made to end, and of one whose stage raised


class Faults:
    """Counts the operations on files below `folder`; the k-th of them fails in a way of MODES."""

    def __init__(self, folder: Path, mode: str = "", at: int = -1, torn_bytes: int = 1) -> None:
        self.folder, self.mode, self.at, self.torn_bytes = str(folder.resolve()), mode, at, torn_bytes
        self.seen: list[str] = []
        fsync = os.fsync

        def synced(file: Any) -> None:
            number = file if isinstance(file, int) else file.fileno()
            self("fsync", (os.readlink(f"/proc/self/fd/{number}"),))
            fsync(file)

        os.fsync = synced
        sys.addaudithook(self)

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and not (isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        if event not in ("open", "fsync", *CHANGES) or threading.current_thread() is not threading.main_thread():
            return  # the clock's own thread takes its turn at any time
        if isinstance(given[0], int) or not os.path.abspath(os.fsdecode(given[0])).startswith(self.folder):
            return
        self.seen.append(f"{event} {os.path.relpath(os.fsdecode(given[0]), self.folder)}")
        here = len(self.seen) - 1
        if here < self.at or not self.mode:
            return
        if self.mode == "die":
            os._exit(DIED)
        if self.mode == "torn" and here == self.at:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with suppress(OSError):
                self.torn_bytes += os.path.getsize(given[0]) if event == "open" else 0
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.torn_bytes, resource.RLIM_INFINITY))
        if (self.mode == "once" and here == self.at) or (self.mode == "full" and event in NEED_ROOM):
            raise OSError(errno.ENOSPC, "No space left on device", os.fsdecode(given[0]))


def forked(work: Callable[[], str]) -> tuple[int, str]:
    """The exit code of `work` in a process of its own (minus a signal), and what it returned or how it failed."""
    out, into = os.pipe()
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        code = 0
        try:
            with open(os.devnull, "w") as void, redirect_stdout(void), redirect_stderr(void):
                told = work()
        except BaseException as error:
            code, told = FAILED, f"{type(error).__name__}: {error}"
        os.write(into, told.encode()[:60000])
        os._exit(code)
    os.close(into)
    with os.fdopen(out, "rb") as file:
        told = file.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), told


def composed(stage: str, outputs: Path, settings: Sequence[str]) -> Any:
    """The config of a stage's command."""
    from hydra import compose, initialize_config_dir

    import mmedexpert.resolvers
    import mmedexpert.schema  # noqa: F401
    from mmedexpert.checks import typed

    words = [word for word in settings if not word.startswith("paths.outputs=")]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose("config", [*words, f"stage={stage}", f"paths.outputs={outputs}"]))


def run(config: Any, outputs: Path, mode: str = "", at: int = -1, torn_bytes: int = 1) -> str:
    """A stage with a fault, as `run.py` begins and ends it; the operations that it did, a line each."""
    import torch

    from mmedexpert.runtime import runs
    from mmedexpert.runtime.build import build
    from mmedexpert.runtime.quiet import one_line, silence

    silence(traceback=False)
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    runs.console.quiet = True
    faults = Faults(outputs, mode, at, torn_bytes)
    try:
        build(config.stage.run, "stage.run")(config)
    except Exception as error:
        raise SystemExit(one_line(error)) from error
    return "\n".join(faults.seen)


class Trial:
    """One stage, whose inputs `before` has, run in `work` with a fault and then without one."""

    def __init__(self, stage: str, before: Path, folder: Path, settings: Sequence[str] = SETTINGS) -> None:
        self.before, self.work, self.whole = before, folder / "work", folder / "whole"
        self.config = composed(stage, self.work, settings)
        code, told = self.again()
        if code:
            raise SystemExit(f"{stage} fails undisturbed: {told}")
        self.operations = told.splitlines()
        self.work.rename(self.whole)

    def again(self, **fault: Any) -> tuple[int, str]:
        """The stage anew, from its inputs."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.before, self.work, symlinks=True)
        return forked(lambda: run(self.config, self.work, **fault))

    def at(self, mode: str, place: int, torn_bytes: int = 1) -> list[str]:
        """What is wrong where the operation at `place` fails; nothing where all is right."""
        code, told = self.again(mode=mode, at=place, torn_bytes=torn_bytes)
        wrong = []
        ended = {"die": (DIED,), "torn": (-signal.SIGXFSZ, 0), "full": (FAILED, 0), "once": (FAILED, 0)}[mode]
        if code not in ended:
            wrong.append(f"ended with {code}: {told[:300]}")
        elif code == FAILED and ("disk" not in told or "unexpected" in told or "\n" in told):
            wrong.append(f"a full disk is told so: {told[:300]}")
        code, told = forked(lambda: run(self.config, self.work))
        if code:
            wrong.append(f"does not go on: {told[:300]}")
        return [*wrong, *(f"differs: {name}" for name in differences(self.whole, self.work))]


def main() -> None:
    """Every stage, every mode, every n-th operation; writes writes.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="operations, from a first one that the seed draws")
    parser.add_argument("--stages", nargs="*", default=STAGES)
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/faults_writes"), help="a folder that is made anew")
    parser.add_argument("--out", type=Path, default=HERE / "writes.json")
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    before = given.work.resolve() / "before"
    before.mkdir(parents=True)
    imported()
    rows = []
    for stage in STAGES:
        if stage in given.stages:
            folder = given.work.resolve() / stage
            folder.mkdir()
            trial = Trial(stage, before, folder)
            for mode in given.modes:
                rng = random.Random(f"{given.seed} {stage} {mode}")
                places = range(rng.randrange(given.every), len(trial.operations), given.every)
                found = {place: trial.at(mode, place, rng.randrange(1, TORN_BYTES)) for place in places}
                wrong = {f"{place} {trial.operations[place]}": one for place, one in found.items() if one}
                row = {
                    "stage": stage, "mode": mode, "operations": len(trial.operations), "tried": len(places),
                    "equal": len(places) - len(wrong), "wrong": wrong,
                }  # fmt: skip
                rows.append(row)
                print(json.dumps(row, indent=1 if wrong else None), flush=True)
            shutil.rmtree(folder)
        if forked(lambda stage=stage: run(composed(stage, before, SETTINGS), before))[0]:
            raise SystemExit(f"{stage} fails undisturbed")
    result = {
        "command": "python experiments/faults/writes.py " + " ".join(sys.argv[1:]), "settings": SETTINGS,
        "seed": given.seed, "tried": sum(row["tried"] for row in rows), "equal": sum(row["equal"] for row in rows),
        "rows": rows,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
