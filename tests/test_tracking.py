"""Loggers: what W&B is asked to do, what reaches it, and that none of its failures stops a run."""

from __future__ import annotations

import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest
import wandb_files
from PIL import Image

from mmedexpert.reporting import tracking
from mmedexpert.reporting.shown import Shown
from mmedexpert.reporting.tracking import keep, kept, log_table, logger_for, public, wandb_mode
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import LoggerConfig

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


def logged(run, kind="wandb", *, config=None, experiment=None):
    settings = LoggerConfig(kind, project="p", experiment=experiment)
    return logger_for(run, settings, Shown("name", "g", ["dsa"], config or {}))


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
    monkeypatch.setattr(tracking, "logged_in", lambda server: login)
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
    with logged(run, config=CONFIG) as logger:
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
    row |= {"question": "What ails the tall man?", "answer": "His knee."}
    with logged(run, config=CONFIG) as logger:
        logger.finish({"loss_of_the_day": 0.5})
        log_table(logger, "completions", [row], images=images)
    assert tracking._told == set()
    import wandb

    wandb.teardown()  # its process has written all
    files = [path for path in run.folder.rglob("*") if path.is_file() and path.suffix != ".log"]  # these stay
    assert any(path.suffix == ".wandb" for path in files)
    content = b"".join(path.read_bytes() for path in files)
    assert (b"media/images" in content) == images
    assert (b"the tall man" in content) == images and (b"His knee" in content) == images
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
    with logged(run) as logger:

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
    with logged(run) as logger:
        assert (logger is None) == (not working)
    assert "W&B (online) fails" in capsys.readouterr().err


def test_an_error_in_the_block_is_the_blocks_own(monkeypatch, run):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for kind in ("wandb", "csv", "none"):
        with pytest.raises(KeyError), logged(run, kind):
            raise KeyError


def test_csv_keeps_the_config_too_and_a_full_disk_costs_no_row(monkeypatch, run):
    with logged(run, "csv", config=CONFIG) as logger:
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


def test_an_id_is_the_folders_own_and_goes_on_where_it_was(run, tmp_path):
    """Equal run_ids on two machines are two curves; a continued run is one, and each experiment has its own."""
    import wandb

    other = Run(run.stage, run.name, run.run_id, tmp_path / "other" / "dsa" / "x-1")
    other.folder.mkdir(parents=True)
    ids = []
    for one, experiment in ((run, None), (run, None), (run, "sweep"), (other, None)):
        with logged(one, experiment=experiment) as logger:
            ids.append(logger.experiment.id)
    wandb.teardown()
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(name.startswith("dsa-1-") for name in ids)
    keep(run, "told", f"{ids[0]}: test", {"test/n": 4.0})
    assert set(kept(run, "ids")) == {"p/", "p/sweep"} and kept(run, "told") == {f"{ids[0]}: test": {"test/n": 4.0}}


def test_the_summary_of_a_curve_is_no_noisy_step_and_its_axis_the_trainers(run, tmp_path):
    import wandb

    with logged(run) as logger:
        for step, reward in enumerate([0.0, 0.2, 0.9, 0.5, 0.4]):
            logger.log_metrics({"reward": reward, "grad_norm": 1.0}, step)
            log_table(logger, "completions", [{"a": 1}])
        logger.finish({"reward": 0.4, "accuracy/gain": 0.1})
    wandb.teardown()
    (told,) = wandb_files.told(tmp_path / "outputs")
    came_to = {name: told.summary.get(f"reward/{name}") for name in ("start", "end", "gain", "best")}
    assert came_to == {"start": 0.0, "end": 0.4, "gain": 0.4, "best": 0.9}
    assert "reward" not in told.summary and told.summary["accuracy/gain"] == 0.1 and told.summary["grad_norm"] == 1.0
    curve = [(row["trainer/global_step"], row["reward"]) for row in told.history if "reward" in row]
    assert curve == [(0, 0.0), (1, 0.2), (2, 0.9), (3, 0.5), (4, 0.4)]
    assert [row["_step"] for row in told.history if "reward" in row] != [0, 1, 2, 3, 4]  # W&B's own is shifted
    assert {told.metrics[name].step_metric for name in ("*", "reward")} == {"trainer/global_step"}
    memory = {"perf/cpu_memory_used_gb", "perf/max_memory_allocated_gb"}
    assert all(memory & set(row) for row in told.history if "reward" in row)


def test_a_resumed_curve_tells_no_start(run, tmp_path):
    import wandb

    with logged(run) as logger:
        logger.log_metrics({"loss": 2.0}, 7)
        logger.log_metrics({"loss": 1.0}, 8)
        logger.finish({})
    wandb.teardown()
    (told,) = wandb_files.told(tmp_path / "outputs")
    assert {name for name in told.summary if name.startswith("loss")} == {"loss/end", "loss/best"}
    assert told.summary["loss/best"] == 1.0
