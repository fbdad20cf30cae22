"""`stage=pipeline`: pretrain -> data -> dsa -> gba -> caci -> eval, and one summary of it all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmedexpert import report
from mmedexpert.data.images import open_image
from mmedexpert.runs import Run, console, write_json
from mmedexpert.schema import Config
from mmedexpert.stages import caci, data, dsa, evaluation, gba, pretrain
from mmedexpert.stages.common import records_of, stage_logger, stage_run
from mmedexpert.stages.evaluation import flatten
from mmedexpert.stages.subjects import BASELINES, CONTROL, MULTI_TASK, START
from mmedexpert.tracking import log_metrics, log_table


def run(config: Config) -> dict[str, Run]:
    """Every stage in order (finished ones are reused), then `summary.json`, `table.md`, links to the merged
    model and, as `outputs/latest`, to the folder of it all."""
    dsa.ready(config, config.specialty.names)
    done: dict[str, dict[str, Run]] = {}
    for name, stage in (("data", data), ("pretrain", pretrain), ("dsa", dsa), ("gba", gba), ("caci", caci)):
        done[name] = stage.run(config)
    done["eval"] = evaluation.run(config)
    flat = {f"{stage}/{name}": r for stage, runs in done.items() for name, r in runs.items()}

    def work(run: Run) -> dict[str, float]:
        summary = summarise(done)
        write_json(run.folder / "summary.json", summary)
        rows = report.model_rows(summary)
        (run.folder / "table.md").write_text(report.markdown(rows), encoding="utf-8")
        metrics = flatten(
            {name: summary["models"][name] for name in ("base", "reasoner", "caci") if name in summary["models"]}
        )
        with stage_logger(config, run) as logger:
            log_metrics(logger, {f"eval/{key}": value for key, value in metrics.items()})
            log_table(logger, "models", rows)
        for merged in done["caci"].values():
            link(run.folder / "model", merged.folder / "model")
        records, image_root = records_of(done["data"]["data"], config.eval.split, config.specialty.names)
        open_image(image_root / records[0].images[0]).save(run.folder / "example.png")
        return metrics

    overall = stage_run(
        config, "pipeline", f"{config.model.name}-{config.data.name}", {}, work, {k: r.run_id for k, r in flat.items()}
    )
    if overall.done:  # or it was only asked what would be made
        link(overall.folder.parent.parent / "latest", overall.folder)
    return {"pipeline": overall, **flat}


def summarise(done: dict[str, dict[str, Run]]) -> dict[str, Any]:
    """The machine-readable result of a pipeline (DESIGN section 4)."""
    details = ("protocols", "baselines", "question_set", "contamination", "judged_by")  # in each model's own summary
    evaluated = {
        name: {key: value for key, value in r.summary.items() if key not in details} for name, r in done["eval"].items()
    }
    models: dict[str, Any] = {
        "base": evaluated["base"],
        "experts": {n: evaluated[n] for n in done["dsa"] if n in evaluated},
    }
    named = [START, *done["gba"], *done["caci"], MULTI_TASK, CONTROL, *BASELINES]
    models |= {name: evaluated[name] for name in named if name in evaluated}
    if len(done["gba"]) == 1:  # whatever gba.name and merge.name say, readers find these two keys
        models["reasoner"] = evaluated[next(iter(done["gba"]))]
    seconds = {stage: sum(r.manifest["wall_seconds"] for r in runs.values()) for stage, runs in done.items()}
    ids = {f"{stage}/{name}": r.run_id for stage, runs in done.items() for name, r in runs.items()}
    return {"models": models, "wall_seconds": seconds, "run_ids": ids}


def link(name: Path, target: Path) -> None:
    """A relative symbolic link, swapped in one step; a file system without links gets a warning."""
    part = name.with_name(f".{name.name}-{os.getpid()}")
    try:
        part.symlink_to(os.path.relpath(target, name.parent), target_is_directory=True)
        part.replace(name)
    except OSError as error:
        console.print(f"[yellow]{name} was not linked: {error}[/yellow]")
