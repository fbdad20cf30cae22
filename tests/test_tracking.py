"""Loggers: what W&B is asked to do, what reaches it, and that none of its failures stops a run."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
from PIL import Image

from mmedexpert.reporting import tracking
from mmedexpert.reporting.tracking import log_metrics, log_table, logger_for, public, wandb_mode
from mmedexpert.runtime.runs import Run

CONFIG = {
    "data": {"root": "/home/someone/patients", "name": "labelled_images"},
    "engine": {"endpoint": {"base_url": "http://user:hunter2@host:8000/v1?api_key=sesame"}},
    "eval": {"models": ["base", "~/models/mine", "../theirs", "outputs/caci/caci-1"]},
    "seed": 0,
}
HIDDEN = ("/home/someone", "hunter2", "sesame", "mine", "theirs")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(tracking, "_told", set())
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture()
def run(tmp_path):
    folder = tmp_path / "outputs" / "dsa" / "x-1"
    folder.mkdir(parents=True)
    return Run("dsa", "x", "1", folder)


@pytest.mark.parametrize(
    ("environment", "login", "network", "mode", "told"),
    [
        ({}, True, True, "online", ""),
        ({}, False, True, "offline", ""),
        ({}, True, False, "offline", "no answer from"),
        ({"WANDB_MODE": "online"}, True, True, "online", ""),
        ({"WANDB_MODE": "online"}, False, True, "offline", "wandb login"),
        ({"WANDB_MODE": "online"}, True, False, "offline", "no answer from"),
        ({"WANDB_MODE": "shared"}, True, True, "shared", ""),
        ({"WANDB_MODE": "offline"}, True, True, "offline", ""),
        ({"WANDB_MODE": "dryrun"}, True, True, "offline", ""),
        ({"WANDB_MODE": "disabled"}, True, True, "disabled", ""),
        ({"WANDB_MODE": "onlin"}, True, True, "offline", "WANDB_MODE=onlin"),
        ({"WANDB_DISABLED": "true"}, True, True, "disabled", ""),
        ({"WANDB_DISABLED": "false"}, True, True, "online", ""),
    ],
)
def test_what_wandb_is_asked_to_do(monkeypatch, capsys, environment, login, network, mode, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "_logged_in", lambda server: login)
    monkeypatch.setattr(tracking, "answers", lambda server: network)
    assert wandb_mode() == mode
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told) and told in "".join(lines)


def test_a_server_answers_whatever_it_says_and_one_that_does_not_is_left_in_time(monkeypatch):
    class Refuses(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.handle_request, daemon=True).start()
        assert tracking.answers(f"http://127.0.0.1:{server.server_port}")
    assert not tracking.answers("http://127.0.0.1:9/")
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: time.sleep(30))
    start = time.monotonic()
    assert not tracking.answers("http://slow.example/") and time.monotonic() - start < 5


def test_disabled_writes_nothing(monkeypatch, run):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with logger_for(run, kind="wandb", project="p", group="g", config=CONFIG) as logger:
        assert logger is None
    assert list(run.folder.rglob("*")) == []


@pytest.mark.parametrize("images", [False, True])
def test_the_offline_file_holds_numbers_and_no_path_password_argument_or_image(monkeypatch, run, tmp_path, images):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("sys.argv", ["run.py", "engine.endpoint.api_key=open-sesame"])
    monkeypatch.setattr("socket.gethostname", lambda: "my-workstation")
    picture = tmp_path / "jane_doe_1970.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), dtype=np.uint8)).save(picture)
    row = {"step": 3, "record": "jane_doe_1970.png", "image": str(picture), "completion": "So normal."}
    with logger_for(run, kind="wandb", project="p", group="g", config=CONFIG) as logger:
        log_metrics(logger, {"loss_of_the_day": 0.5})
        log_table(logger, "completions", [row], images=images)
    assert tracking._told == set()
    import wandb

    wandb.teardown()  # its process has written all
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".log"]  # these stay
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert (b"media/images" in content) == images
    assert b"loss_of_the_day" in content and b"So normal." in content and b"labelled_images" in content
    for word in (*HIDDEN, "jane_doe", "open-sesame", "my-workstation", str(tmp_path), "run.py"):
        assert word.encode() not in content, word
    assert not [path for path in files if "jane" in path.name or path.name == "wandb-metadata.json"]


def test_a_config_without_folders_and_passwords_is_otherwise_as_it_is():
    shown = public(CONFIG)
    assert shown["data"] == {"root": "<folder>", "name": "labelled_images"} and shown["seed"] == 0
    assert shown["eval"]["models"] == ["base", "<folder>", "<folder>", "outputs/caci/caci-1"]
    assert not any(word in str(shown) for word in HIDDEN) and "host:8000/v1" in str(shown)


def test_an_error_of_wandb_is_told_once_and_stops_nothing(monkeypatch, run, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with logger_for(run, kind="wandb", project="p", group="g", config={}) as logger:

        def broken(*_, **__):
            raise BrokenPipeError("the service is gone: http://u:hunter2@host")

        monkeypatch.setattr(logger.experiment, "log", broken)
        monkeypatch.setattr(logger.experiment, "finish", broken)
        for step in range(3):
            logger.log_metrics({"loss": 1.0}, step)
        log_table(logger, "completions", [{"a": 1}])
    told = [line for line in capsys.readouterr().err.splitlines() if "the run goes on" in line]
    assert len(told) == 1 and "hunter2" not in told[0]
    import wandb

    wandb.teardown()


@pytest.mark.parametrize("working", [["offline"], []])
def test_a_wandb_that_does_not_start_is_offline_or_nothing(monkeypatch, run, capsys, working):
    import wandb

    started = wandb.init

    def init(**options):
        if options["mode"] not in working:
            raise wandb.errors.CommError("invalid key")
        return started(**options)

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "wandb_mode", lambda: "online")
    with logger_for(run, kind="wandb", project="p", group="g", config={}) as logger:
        assert (logger is None) == (not working)
    assert "W&B (online) fails" in capsys.readouterr().err


def test_an_error_in_the_block_is_the_blocks_own(monkeypatch, run):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for kind in ("wandb", "csv", "none"):
        with pytest.raises(KeyError), logger_for(run, kind=kind, project="p", group="g", config={}):
            raise KeyError


def test_csv_keeps_the_config_too_and_a_full_disk_costs_no_row(monkeypatch, run):
    with logger_for(run, kind="csv", project="p", group="g", config=CONFIG) as logger:
        assert "hunter2" not in (run.folder / "csv" / "hparams.yaml").read_text()
        logger.log_metrics({"loss": 1.0}, 0)
        with monkeypatch.context() as patch:

            def full(*_, **__):
                raise OSError(28, "No space left on device")

            patch.setattr("pathlib.Path.open", full)
            logger.log_metrics({"loss": 2.0}, 1)
        logger.log_metrics({"loss": 3.0}, 2)
    rows = (run.folder / "csv" / "metrics.csv").read_text().splitlines()
    assert rows == ["step,loss", "0,1.0", "1,2.0", "2,3.0"]
