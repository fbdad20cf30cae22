"""Data -> adapters -> reasoner -> merged -> predictions as W&B artifacts: a run_id each, and nothing of their content.

An artifact holds one reference, `mmedexpert:<stage>/<run_id>`, which names no machine and no file: W&B draws the graph,
and the outputs folder has the rest. Equal run_ids are one artifact, whoever logs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS = {
    "data": "dataset", "benchmark": "dataset", "pretrain": "model", "dsa": "adapter", "start": "adapter",
    "gba": "adapter", "caci": "model", "distil": "model", "eval": "predictions",
}  # fmt: skip


def artifact(stage: str, run_id: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """The artifact of a run: what it is, under a name that every run that uses it finds again."""
    import wandb

    made = wandb.Artifact(f"{stage}-{run_id}", type=KINDS[stage], metadata=dict(metadata or {}))
    made.add_reference(f"mmedexpert:{stage}/{run_id}", name=f"{stage}-{run_id}")
    return made


def log_lineage(experiment: Any, stage: str, run_id: str, used: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """What a W&B run used (run_id -> stage) and made.

    `use_artifact` refuses to work offline. A draft that is logged with `use_after_commit` is what it does itself
    online, is kept offline, and is linked when `wandb sync` uploads it: the server finds the one that is there by its
    digest, or makes it.
    """
    for other, where in used.items():
        if where in KINDS:
            experiment._log_artifact(artifact(where, other), is_user_created=True, use_after_commit=True)
    if stage in KINDS:
        experiment.log_artifact(artifact(stage, run_id, metadata))
