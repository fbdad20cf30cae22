"""Runs `python run.py` as a user types it, on the smoke settings."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[1]
# smaller still than debug=smoke: its numbers mean nothing either
SMOKE = [
    "debug=smoke", "trainer.accelerator=cpu", "trainer.threads=1", "model.max_new_tokens=16",
    "model.architecture.hidden_size=64", "model.architecture.num_hidden_layers=2",
    "model.architecture.vision_hidden_size=48", "model.architecture.vision_depth=2",
    "pretrain.reading_steps=4", "pretrain.looking_steps=6", "pretrain.batch_size=4",
    "pretrain.text_batch_size=8", "data.source.train=48", "data.source.val=16",
    "data.source.test=16",
]  # fmt: skip
Done = subprocess.CompletedProcess[str]


def words(outputs: Path, *overrides: str, logger: str = "none") -> list[str]:
    multirun = [word for word in overrides if word == "-m"]  # argparse wants it before all overrides
    rest = [word for word in overrides if word != "-m"]
    given = {word.split("=")[0] for word in rest}
    if "data" in given:  # other sources and models take none of these
        given |= {"data.source.train", "data.source.val", "data.source.test"}
    if "engine=openai" in rest:  # a served model has a limit of its own
        given |= {"model.max_new_tokens"}
    if given & {"model", "model.name_or_path"}:
        given |= {word.split("=")[0] for word in SMOKE if word.startswith(("model.architecture", "pretrain"))}
    small = SMOKE[:3] if "stage=report" in rest else [word for word in SMOKE if word.split("=")[0] not in given]
    return [*multirun, *small, f"paths.outputs={outputs}", f"logger={logger}", *rest]


def run(outputs: Path, *overrides: str, code: int = 0, logger: str = "none", process: bool = False) -> Done:
    """In this process, as the jobs of a sweep follow each other in one (one import of torch); with `process` apart."""
    given = words(outputs, *overrides, logger=logger)
    done = _apart(given) if process else _here(given)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout
    return done


def _apart(given: list[str]) -> Done:
    command = [sys.executable, "run.py", *given]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


def _here(given: list[str]) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["run.py", *given])
        before = dict(os.environ)
        GlobalHydra.instance().clear()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                runpy.run_path("run.py", run_name="__main__")
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        finally:
            GlobalHydra.instance().clear()
            os.environ.clear()
            os.environ.update(before)
    return Done(given, code, out.getvalue(), err.getvalue())
