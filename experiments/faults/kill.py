"""`python experiments/faults/kill.py`: a pipeline killed at random instants, started again until it ends, and compared.

The command is `run.py` with `SETTINGS`: every stage. It runs once undisturbed; then `--pipelines` times anew, each
killed (SIGKILL to its process group) `--kills` times, at instants drawn evenly over the first third of the seconds that
the undisturbed command took, and started again, which goes on from where it was. What it leaves has to be what the
undisturbed run left (same.py). Most tries are forked from a process that has imported the libraries, so that instants
fall into work; the first of each pipeline is a new process, whose instant falls anywhere into its start and its work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import counted
from same import differences

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
EVERY = 2  # optimiser steps between checkpoints: the most that a kill may cost, beside the step at work
SETTINGS = [
    "debug=smoke", "specialty.names=[pediatrics,oncology_surgery]", "trainer=cpu", "trainer.threads=1", "logger=csv",
    "paths.outputs=outputs", "model.max_new_tokens=8", "model.architecture.hidden_size=64",
    "model.architecture.num_hidden_layers=2", "model.architecture.vision_hidden_size=48",
    "model.architecture.vision_depth=2", "pretrain.reading_steps=2", "pretrain.looking_steps=4",
    "pretrain.batch_size=4", "pretrain.text_batch_size=4", "data.source.train=16", "data.source.val=4",
    "data.source.test=4", "dsa.steps=6", "gba.steps=5", f"pretrain.checkpoint_every={EVERY}",
    f"dsa.checkpoint_every={EVERY}", f"gba.checkpoint_every={EVERY}", "merge.distil_steps=4",
]  # fmt: skip


def imported() -> float:
    """What each process would import and draw anew; the seconds that this took."""
    begun = time.monotonic()
    import mmedexpert.stages.pipeline
    import mmedexpert.training.gba
    import mmedexpert.training.sft  # noqa: F401
    from mmedexpert.stages.pretrain import corpus

    corpus(0)
    return time.monotonic() - begun


def start(folder: Path, *, anew: bool = False) -> int:
    """The command, at work in `folder`, in a process group of its own: forked, where the libraries are imported, or
    `anew`, where they are not."""
    if (child := os.fork()) > 0:
        return child
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        told = os.open("told", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(told, stream)
        words = ["counts", str(ROOT / "run.py"), *SETTINGS]
        if anew:
            os.environ["PYTHONPATH"] = f"{HERE}{os.pathsep}{ROOT / 'src'}"
            code = f"import counted, sys; counted.main({words[0]!r}, sys.argv[1], sys.argv[2:])"
            os.execv(sys.executable, [sys.executable, "-c", code, *words[1:]])
        counted.main(words[0], words[1], words[2:])
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    finally:
        os._exit(status)


def left(process: int, seconds: float = float("inf")) -> int | None:
    """The exit code of a process, waited for so many seconds; None where it goes on."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def ended(process: int, folder: Path) -> None:
    """Wait for a command that is left alone."""
    if left(process) != 0:
        raise SystemExit(f"the command fails: see {folder / 'told'}")


def counts(folder: Path) -> Counter[str]:
    """How often each step, reply and run was done."""
    return Counter((folder / "counts").read_text(encoding="utf-8").splitlines())


def killed(folder: Path, instants: list[float], anew: int = 1) -> list[float]:
    """Start the command in `folder` and kill it after each of `instants` seconds, the first `anew` as new processes;
    then let it end. Those that it lived to see."""
    met = []
    for number, instant in enumerate(instants):
        process = start(folder, anew=number < anew)
        if left(process, instant) is not None:
            break  # it had ended before
        with suppress(ProcessLookupError):  # it has no group of its own yet
            os.killpg(process, signal.SIGKILL)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        met.append(instant)
    ended(start(folder), folder)
    return met


def of(found: Counter[str], kind: str) -> int:
    """How many were done, those done twice counted twice."""
    return sum(count for name, count in found.items() if name.startswith(f"{kind} "))


def main() -> None:
    """Kill, compare, and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipelines", type=int, default=10)
    parser.add_argument("--kills", type=int, default=6, help="of each pipeline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/faults"), help="a folder that is made anew")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    given = parser.parse_args()
    given.work = given.work.resolve()
    begins = imported()
    shutil.rmtree(given.work, ignore_errors=True)
    given.work.mkdir(parents=True)
    whole, work = given.work / "whole", given.work / "work"  # of one path: some files tell where they lie
    work.mkdir()
    begun = time.monotonic()
    ended(start(work), work)
    seconds, needed = time.monotonic() - begun, counts(work)
    work.rename(whole)
    rows: list[dict[str, Any]] = []
    for number in range(given.pipelines):
        rng, folder = random.Random(f"{given.seed} {number}"), given.work / f"{number:02d}"
        work.mkdir()
        met = killed(work, [rng.uniform(0, seconds / 3 + (not place) * begins) for place in range(given.kills)])
        work.rename(folder)
        found = counts(folder)
        row = {
            "pipeline": number, "kills": [round(one, 2) for one in met],
            "differences": differences(whole / "outputs", folder / "outputs"),
            **{f"{kind}s_redone": of(found, kind) - of(needed, kind) for kind in ("step", "run")},
            "replies_redone": of(found, "reply") - of(needed, "reply"),
        }  # fmt: skip
        rows.append(row)
        print(json.dumps(row), flush=True)
        if not row["differences"]:
            shutil.rmtree(folder)
        result = {
            "command": "python experiments/faults/kill.py " + " ".join(sys.argv[1:]),
            "settings": SETTINGS, "seed": given.seed, "seconds_undisturbed": round(seconds, 1),
            "seconds_of_start": round(begins, 1),
            "steps_needed": of(needed, "step"), "replies_needed": of(needed, "reply"), "runs_needed": of(needed, "run"),
            "kills": sum(len(one["kills"]) for one in rows), "pipelines": len(rows),
            "equal": sum(not one["differences"] for one in rows),
            **{key: sum(one[key] for one in rows) for key in ("steps_redone", "replies_redone", "runs_redone")},
            "rows": rows,
        }  # fmt: skip
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
