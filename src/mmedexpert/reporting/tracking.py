"""Where metrics go: Weights & Biases (online when logged in and reachable, else offline), CSV files, or nowhere.

What leaves the machine: numbers, the config without paths and passwords, texts of completions; images and the texts of
records only if asked.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml

from mmedexpert.data.images import open_image
from mmedexpert.reporting.shown import Shown
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.runs import Run, console
from mmedexpert.schema import LoggerConfig

if TYPE_CHECKING:  # its import takes seconds, which a command that finds all done need not wait for
    from lightning.pytorch.loggers import Logger

ANSWER_SECONDS = 5.0  # ours: in which the W&B server must answer, else runs are logged offline
START_SECONDS, UPLOAD_SECONDS = 30.0, 300.0  # ours: waited for W&B at a run's start and end; the rest stays on disk
KEPT = "wandb.json"  # in a run's folder: its ids in W&B
OF_RECORD = ("image", "question", "answer")
TRUE = ("1", "on", "yes", "true")
Mode = Literal["online", "shared", "offline", "disabled"]
_told: set[str] = set()


@contextmanager
def logger_for(run: Run, settings: LoggerConfig, shown: Shown) -> Iterator[Logger | None]:
    """The logger of one stage's run, finished when the block ends, also by an error (else job 2 of a multirun breaks).

    W&B: group = pipeline, job_type = stage, and an id that the folder keeps, so that a continued run continues its
    curves. No error of a logger stops the run: it is told once.
    """
    if settings.name == "csv":
        from mmedexpert.reporting.loggers import Csv

        folder = run.folder / "csv"
        folder.mkdir(exist_ok=True)
        write_atomic(folder / "hparams.yaml", yaml.safe_dump(public(shown.config), sort_keys=False).encode())
        yield Csv(folder / "metrics.csv")
        return
    mode = wandb_mode() if settings.name == "wandb" else "disabled"
    started = _start(run, mode, settings, shown) if mode != "disabled" else None
    if started is None:
        yield None
        return
    from mmedexpert.reporting.loggers import Wandb

    code = 1
    try:
        yield Wandb(started, run.folder, _told_until(run, started))
        code = 0
    finally:
        with no_stop("W&B"):
            started.finish(exit_code=code)


def _told_until(run: Run, started: Any) -> int:
    """The last step that W&B was told of this run by an earlier try; -1 where that is none."""
    from mmedexpert.reporting.finals import STEP
    from mmedexpert.reporting.offline import last_step

    with no_stop("W&B"):
        online = started.summary.get(STEP, -1) if started.resumed else -1
        return max(int(online), last_step(run.folder, started.id))
    return -1


def kept(run: Run, what: str) -> dict[str, Any]:
    """What the folder knows of itself in W&B: its `ids` by scope; by id its `summary`, and what was `told` later."""
    try:
        found: dict[str, dict[str, Any]] = json.loads((run.folder / KEPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found.get(what, {})


def keep(run: Run, what: str, name: str, value: Any) -> None:
    """Note it in the folder."""
    with no_stop(str(run.folder / KEPT)):
        found = {part: kept(run, part) for part in ("ids", "summary", "told")}
        found[what][name] = value
        write_atomic(run.folder / KEPT, (json.dumps(found, indent=1) + "\n").encode())


def scope_of(settings: LoggerConfig) -> str:
    """Where a run is shown: a project, and in it an experiment."""
    return f"{settings.project}/{settings.experiment or ''}"


def id_of(run: Run, settings: LoggerConfig) -> str | None:
    """The run's id in W&B: in this experiment, or without one anywhere in the project; None if it was never there."""
    ids, scope = kept(run, "ids"), scope_of(settings)
    near = [ids[name] for name in ids if not settings.experiment and name.startswith(scope)]
    return ids.get(scope) or next(iter(near), None)


def wandb_mode() -> Mode:
    """`online`, `shared`, `offline` or `disabled`: what WANDB_MODE and WANDB_DISABLED ask for, as far as it goes.

    Without a login, or without an answer of the server in five seconds, offline, without a question.
    """
    asked = os.environ.get("WANDB_MODE", "").strip().lower()
    if asked == "disabled" or os.environ.get("WANDB_DISABLED", "").strip().lower() in TRUE:
        return "disabled"
    if asked in ("offline", "dryrun"):
        return "offline"
    if asked not in ("", "online", "run", "shared"):
        _tell(f"WANDB_MODE={asked} is not known: W&B works offline; use online, offline, shared or disabled")
        return "offline"
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # before its session starts: a pipeline has dozens of runs
    server = str(wandb.setup().settings.base_url)
    if not logged_in(server):
        if asked:
            _tell(f"WANDB_MODE={asked} needs an account: W&B works offline until you call wandb login")
        return "offline"
    if not answers(server):
        _tell(f"no answer from {without_password(server)}: W&B works offline; wandb sync uploads its folders later")
        return "offline"
    return "shared" if asked == "shared" else "online"


def logged_in(server: str) -> bool:
    """A key in the environment or in the netrc file; asked without a request and without a question."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    from wandb.sdk.lib import wbauth

    try:
        return wbauth.read_netrc_auth(host=server) is not None
    except (OSError, ValueError, AttributeError):
        return False


@cache  # once a command, not at each of its stages
def answers(url: str) -> bool:
    """Whether a web server answers in five seconds, whatever it says; in a thread: a name look-up has no time-out."""
    found: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=ANSWER_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not isinstance(getattr(error, "reason", None), ssl.SSLError):  # W&B may know its certificate
                return
        found.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    return bool(found)


def _start(run: Run, mode: Mode, settings: LoggerConfig, shown: Shown) -> Any:
    """A started W&B run, offline where the mode fails (a wrong key, a server that refuses); None if that fails, too.

    Its id is of this folder alone: the same run_id on another machine is another curve.
    """
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    if (identity := id_of(run, settings)) is None:
        identity = f"{run.stage}-{run.run_id}-{secrets.token_hex(3)}"
        keep(run, "ids", scope_of(settings), identity)
    modes: tuple[Mode, Mode] = (mode, "offline")
    for attempt in dict.fromkeys(modes):
        with no_stop(f"W&B ({attempt})"):
            options = wandb.Settings(
                console="off", x_disable_stats=attempt == "offline", init_timeout=START_SECONDS,
                finish_timeout=UPLOAD_SECONDS,
                # the command line, paths, user and host names of this machine are nobody's business
                x_disable_meta=True, x_disable_machine_info=True, disable_git=True, disable_code=True, save_code=False,
                host="hidden",
            )  # fmt: skip
            return wandb.init(
                project=settings.project, group=shown.group, job_type=run.stage, name=shown.name, id=identity,
                resume="allow", config=public(shown.config), dir=run.folder, tags=shown.tags, settings=options,
                mode=attempt,
            )  # fmt: skip
    return None


@contextmanager
def no_stop(what: str) -> Iterator[None]:
    """An error of a logger is told, once, and training goes on."""
    try:
        yield
    except Exception as error:
        reason = without_password(" ".join(str(error).split()))[:200]
        _tell(f"{what} fails, and the run goes on without it ({type(error).__name__}: {reason})")


def _tell(line: str) -> None:
    if line not in _told:
        console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)
        _told.add(line)


def public(value: Any) -> Any:
    """A config as it may leave the machine: folders outside the working one and passwords in addresses are hidden."""
    if isinstance(value, Mapping):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if not isinstance(value, str | Path):
        return value
    path = Path(value)
    if path.is_absolute() or path.parts[:1] in (("~",), ("..",)) or str(value).startswith("file:"):
        return "<folder>"
    return without_password(str(value))


def log_table(logger: Logger | None, key: str, rows: Sequence[Mapping[str, Any]], *, images: bool = False) -> None:
    """A table of rows with equal keys (W&B only).

    Of a record nothing is sent without `images`. A cell `image` is the path of an image: its pixels are sent, never its
    name. A cell `record` is an id, which may hold a file name: it is sent as a hash.
    """
    if logger is None or not rows:
        return
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    if not isinstance(logger, WandbLogger):
        return

    def cell(column: str, value: Any) -> Any:
        if column == "image" and value:
            return wandb.Image(np.asarray(open_image(Path(value))))
        return hashlib.sha256(str(value).encode()).hexdigest()[:10] if column == "record" else value

    columns: list[str | int] = [column for column in rows[0] if column not in OF_RECORD or images]
    with no_stop("W&B"):
        data: list[Any] = [[cell(str(column), row[str(column)]) for column in columns] for row in rows]
        logger.experiment.log({key: wandb.Table(columns=columns, data=data)})
