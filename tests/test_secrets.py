"""A secret lands in no folder, log, ledger or W&B file, nor on the screen: planted everywhere, looked for in all."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from conftest import long
from test_openai_engine import completion

from mmedexpert.engines.asking import Ask
from mmedexpert.engines.ledger import Ledger
from mmedexpert.engines.openai import OpenAIEngine
from mmedexpert.errors import UserError
from mmedexpert.runtime import privacy
from mmedexpert.runtime.privacy import hide, hide_address, hide_words, without_known, without_password

ENVIRONMENT = {
    "MY_JUDGE": "sk-4f1c-of-the-engine", "JUDGE_API_KEY": "sk-77aa-of-the-llm-judge", "HF_TOKEN": "hf_qWeRtYuIoPaSdF",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "OPENAI_API_KEY": "sk-openai-unasked",
    "DB_PASSWORD": "tr0ub4dor&3",
}  # fmt: skip
PASSWORD, TOKEN, TYPED = "hunter2horse", "tok-9d8e7f", "typed-into-the-shell"
BASIC = base64.b64encode(f"someone:{PASSWORD}".encode()).decode()
SECRETS = [*ENVIRONMENT.values(), PASSWORD, TOKEN, TYPED, BASIC]


@pytest.fixture()
def echo() -> Iterator[tuple[str, list[str]]]:
    """host:port of a chat server that sends back all it was told of who asks, and the headers it got; of model `flaky`
    every third question is refused (400), and every third one fails (500)."""
    got: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def told(self) -> str:
            return f"{self.path} {dict(self.headers)} {' '.join(ENVIRONMENT.values())}"

        def do_GET(self) -> None:
            got.append(str(dict(self.headers)))
            self.reply(200, {}, json.dumps({"object": "list", "data": [{"id": "m"}, {"id": "flaky"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(str(dict(self.headers)))
            turn = len(got) % 3 if body["model"] == "flaky" else 0
            if turn:
                self.reply(
                    (400, 500)[turn - 1],
                    {},
                    json.dumps({"error": {"message": f"{self.told()} http://x:{PASSWORD}@h"}}).encode(),
                )
            else:
                self.reply(*completion(f"<judge>0</judge> <answer>A</answer> {self.told()}", echoed=self.told()))

        def reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", got
    server.shutdown()
    server.server_close()


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **ENVIRONMENT, "WANDB_MODE": "offline", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, "trainer=cpu", "trainer.processes=1", "paths.outputs=outputs"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = [one for one in SECRETS if one in done.stdout + done.stderr]
    assert not found, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def leaks(folder: Path) -> list[tuple[str, str]]:
    """Files whose bytes, or names, hold a secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        (str(path.relative_to(folder)), one)
        for path in files for one in SECRETS if one.encode() in path.read_bytes() or one in str(path)
    ]  # fmt: skip


def served(address: str, model: str = "m", user: str = f"someone:{PASSWORD}@") -> list[str]:
    url = f"http://{user}{address}/v1?token={TOKEN}"
    return [
        "stage=eval", "engine=openai", f"engine.endpoint.base_url='{url}'", f"engine.endpoint.model={model}",
        f"eval.llm_judge.base_url='{url}'", "eval.llm_judge.model=m", "eval.llm_judge.api_key_env=JUDGE_API_KEY",
        "engine.endpoint.api_key_env=MY_JUDGE", "engine.endpoint.retries=0", "engine.endpoint.concurrency=1",
        "data.source.train=1", "data.source.val=1", "data.source.test=6",
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "user", "sent"), [
    pytest.param("m", "", ENVIRONMENT["MY_JUDGE"], marks=long), ("flaky", f"someone:{PASSWORD}@", BASIC),
])  # fmt: skip
def test_a_server_that_sends_secrets_back_puts_them_nowhere(tmp_path, echo, model, user, sent):
    address, got = echo
    done = command(tmp_path, *served(address, model, user), "logger=wandb")
    assert sent in str(got) and done.returncode == (0 if model == "m" else 2), done.stderr[-2000:]
    written = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert "config.yaml" in written and "predictions.jsonl" in written
    assert not leaks(tmp_path)
    assert "***" in (next(tmp_path.glob("outputs/eval/*/predictions.jsonl"))).read_text()  # and what it said is kept


def test_the_ledger_keeps_none_of_what_a_server_sends_back(tmp_path, echo):
    address, _ = echo
    for model in ("m", "flaky"):
        engine = OpenAIEngine(
            f"http://someone:{PASSWORD}@{address}/v1?token={TOKEN}", model, api_key=ENVIRONMENT["MY_JUDGE"],
            max_new_tokens=8, retries=0, concurrency=1, ledger=Ledger(tmp_path / "ledger.sqlite"),
        )  # fmt: skip
        with suppress(UserError):
            list(engine([Ask(str(n), f"What is {n}?", ()) for n in range(6)]))
        engine.ledger.export(tmp_path / f"{model}.jsonl")
        engine.ledger.close()
    rows = [json.loads(line) for line in (tmp_path / "flaky.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} == {"replied", "refused", "failed"}
    found = {secret for _, secret in leaks(tmp_path)} & {PASSWORD, TOKEN, BASIC, ENVIRONMENT["MY_JUDGE"]}
    assert not found


@long
def test_a_sweep_and_commands_that_fail_put_them_nowhere(tmp_path, echo):
    address, _ = echo
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments" / "published.yaml", tmp_path / "experiments")  # an experiment reads it here
    sweep = command(tmp_path, "-m", *served(address), "seed=0,1", "results.id=x", "logger=wandb")
    assert sweep.returncode == 0 and list(tmp_path.glob("outputs/experiments/x/table.md")), sweep.stderr[-2000:]
    for words in (
        ["-m", "seed=0,1", f"+logger.api_key={TYPED}"],  # Hydra refuses it before any of our code is asked
        ["stage=eval", "engine=openai", f"engine.endpoint.base_url=ftp://someone:{PASSWORD}@h/v1?token={TOKEN}"],
        [*served("127.0.0.1:9"), "logger=csv"],  # nobody answers
        [*served(address), f"engine.endpoint.model={TYPED}", f"+x.token={TYPED}"],
    ):
        assert command(tmp_path, *words).returncode != 0, words
    assert not leaks(tmp_path)


@pytest.fixture()
def unknown(monkeypatch):
    monkeypatch.setattr(privacy, "_known", set())


def test_what_is_hidden_and_what_is_not(unknown, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "abcdef-123456")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "falsehood")  # no key of anybody
    monkeypatch.setenv("KEYBOARD", "qwertyuiop")
    told = without_known("abcdef-123456 falsehood qwertyuiop hunter2horse EMPTY")
    assert told == "*** falsehood qwertyuiop hunter2horse EMPTY"
    hide(["EMPTY", None, "", 'a"b\\c def'])
    assert without_known("EMPTY " + json.dumps('a"b\\c def') + ' a"b\\c def a%22b%5Cc%20def') == 'EMPTY "***" *** ***'
    hide_address(f"https://me:{PASSWORD}@h/v1?x=1&access_token={TOKEN}#y")
    sent = base64.b64encode(f"me:{PASSWORD}".encode()).decode()
    assert without_known(f"me {PASSWORD} {TOKEN} {sent} x=1") == "me *** *** *** x=1"
    hide_words(["model.max_new_tokens=560000", f"+a.api_key='{TYPED}'", "b=http://k3y-alone@h"])
    assert without_known(f"560000 {TYPED} k3y-alone") == "560000 *** ***"


def test_a_secret_that_a_cut_would_split_is_hidden_whole(unknown):
    from mmedexpert.engines.replies import short
    from mmedexpert.runtime.quiet import one_line

    hide([PASSWORD])
    for place in range(1990, 2001):
        assert PASSWORD[:4] not in short(" " * place + PASSWORD)
    for place in range(280, 305):
        assert PASSWORD[:4] not in one_line(RuntimeError("x" * place + PASSWORD))
    assert PASSWORD[:4] not in without_password(f"Authorization: Bearer {PASSWORD}")
