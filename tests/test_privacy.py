"""Secrets of a command line and of addresses are hidden; nothing else is changed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from commands import ROOT

from mmedexpert.runtime.privacy import redacted, without_password
from mmedexpert.runtime.quiet import one_line
from mmedexpert.runtime.runs import execute


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://me:pass@host:8000/v1", "http://***@host:8000/v1"),
        ("https://me:p@ss@host/v1", "https://***@host/v1"),
        ("https://token@host/v1?api_key=abc&x=1", "https://***@host/v1?api_key=***&x=1"),
        ("no server answers at http://a:b@h/v1 (refused)", "no server answers at http://***@h/v1 (refused)"),
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("mail me@example.org", "mail me@example.org"),
    ],
)
def test_addresses_lose_their_secrets(text, told):
    assert without_password(text) == told


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("engine.endpoint.base_url=http://u:p@h/v1", "engine.endpoint.base_url=http://***@h/v1"),
        ("+logger.api_key=abc", "+logger.api_key=***"),
        ("hf_token=hf_abc", "hf_token=***"),
        ("engine.endpoint.api_key_env=MY_KEY", "engine.endpoint.api_key_env=MY_KEY"),
        ("model.max_new_tokens=56", "model.max_new_tokens=56"),
        ("trainer.micro_batch_tokens=8192", "trainer.micro_batch_tokens=8192"),
        ("trainer.micro_batch_tokens=null", "trainer.micro_batch_tokens=null"),
        ("gba.weights=[1,0,0,0]", "gba.weights=[1,0,0,0]"),
    ],
)
def test_a_command_line_loses_its_secrets(word, told):
    assert redacted([word]) == [told]


@pytest.mark.slow
def test_a_sweep_tells_and_keeps_no_secret(tmp_path):
    """Hydra would keep every option of a sweep as it was typed, in multirun.yaml."""
    secret = "engine.endpoint.base_url=http://me:hunter2@host/v1"
    served = ["engine=openai", "engine.endpoint.model=x", secret]
    command = [sys.executable, "run.py", "-m", "seed=0,1", *served, "gba.beta=-1", f"paths.outputs={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("gba.beta=-1") >= 2
    assert "hunter2" not in done.stderr + done.stdout
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.name for path in files) == ["0.json", "1.json"]
    assert not any("hunter2" in path.read_text() for path in files)


def test_a_failure_and_a_manifest_hide_passwords(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "engine.endpoint.base_url=http://me:hunter2@host/v1"])

    def work(run):
        raise ValueError("no server answers at http://me:hunter2@host/v1")

    with pytest.raises(ValueError) as caught:
        execute("eval", "x", {}, work, outputs=tmp_path, seed=0)
    assert "hunter2" not in one_line(caught.value) and "***@host/v1" in one_line(caught.value)
    done = execute("eval", "y", {}, lambda run: {}, outputs=tmp_path, seed=0)
    assert done.manifest["command"][1].endswith("http://***@host/v1")
    texts = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(texts) >= 5 and not any("hunter2" in text for text in texts)
