"""Runs `python run.py` as a user does, on the smoke settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SMOKE = ["debug=smoke", "trainer.accelerator=cpu", "trainer.threads=1"]


def run(outputs: Path, *overrides: str, code: int = 0, logger: str = "none") -> subprocess.CompletedProcess[str]:
    multirun = [word for word in overrides if word == "-m"]  # argparse wants it before all overrides
    rest = [word for word in overrides if word != "-m"]
    command = [sys.executable, "run.py", *multirun, *SMOKE, f"paths.outputs={outputs}", f"logger={logger}", *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr + done.stdout
    return done
