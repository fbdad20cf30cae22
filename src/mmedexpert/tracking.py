"""Where metrics go: Weights & Biases (online when logged in, else offline), CSV files, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger

from mmedexpert.runs import Run


def _logged_in() -> bool:
    """A key in the environment or in the netrc file; asked without a request and without a question."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    from wandb.sdk.lib import wbauth

    try:
        return wbauth.read_netrc_auth(host=os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is not None
    except (OSError, ValueError, AttributeError):
        return False


@contextmanager
def logger_for(run: Run, *, kind: str, project: str, group: str, config: Mapping[str, Any]) -> Iterator[Logger | None]:
    """The logger of one stage's run, finished when the block ends, also by an error (else job 2 of a multirun breaks).

    W&B: group = pipeline, job_type = stage, id = run_id with resume, so that a continued run continues its curves.
    """
    if kind == "none":
        yield None
        return
    if kind == "csv":
        logger = CSVLogger(run.folder, name="csv", version="")
        yield logger
        logger.finalize("success")
        return
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")
    offline = os.environ.get("WANDB_MODE") == "offline" or not _logged_in()
    settings = wandb.Settings(console="off", x_disable_stats=offline, init_timeout=60)
    options: dict[str, Any] = {"mode": "offline"} if offline else {}
    code = 1
    try:
        wandb_run = wandb.init(
            project=project, group=group, job_type=run.stage, name=f"{run.stage}-{run.name}",
            id=f"{run.stage}-{run.run_id}", resume="allow", config=dict(config), dir=run.folder, tags=[run.stage],
            settings=settings, **options,
        )  # fmt: skip
        yield WandbLogger(experiment=wandb_run)
        code = 0
    finally:
        wandb.finish(exit_code=code)


def log_metrics(logger: Logger | None, metrics: Mapping[str, float]) -> None:
    """Numbers outside a training loop."""
    if logger is not None:
        logger.log_metrics(dict(metrics))
        logger.save()


def log_table(logger: Logger | None, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of rows with equal keys; a cell may be a path to an image under the key `image` (W&B only)."""
    if not isinstance(logger, WandbLogger) or not rows:
        return
    import wandb

    columns = list(rows[0])
    data = [[wandb.Image(str(row[c])) if c == "image" and row[c] else row[c] for c in columns] for row in rows]
    logger.experiment.log({key: wandb.Table(columns=[*columns], data=data)})


def group_name(model: str, data: str, seed: int) -> str:
    """The W&B group of one pipeline."""
    return f"{model}-{data}-s{seed}"
