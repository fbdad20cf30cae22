"""`stage=pipeline`: pretrain -> data -> dsa -> gba -> caci -> eval, and one summary of it all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmedexpert.data.images import open_image
from mmedexpert.names import MAJORITY, reasoner_names, start_names
from mmedexpert.reporting import tables as report
from mmedexpert.reporting.tracking import log_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.schema import Config
from mmedexpert.stages import caci, data, dsa, evaluation, gba, pretrain
from mmedexpert.stages.common import begin_workers, records_of, stage_run, together
from mmedexpert.stages.evaluation import flatten


def run(config: Config) -> dict[str, Run]:
    """Every stage in order (finished ones are reused), then `summary.json`, `table.md`, links to the merged
    model and, as `outputs/latest`, to the folder of it all."""
    if not Path(config.paths.outputs, "data").is_dir():  # a first run: they start while the data are drawn
        begin_workers(config)
    dsa.ready(config, config.specialty.names)
    done: dict[str, dict[str, Run]] = {}
    for name, stage in (("data", data), ("pretrain", pretrain), ("dsa", dsa)):
        done[name] = stage.run(config)
    together(config, [gba.run, *_of_experts(config)])
    done |= {"gba": gba.run(config), "caci": caci.run(config)}
    done["eval"] = evaluation.run(replace(config, benchmark={}))
    if config.benchmark:
        done["benchmarks"] = evaluation.run(replace(config, eval=replace(config.eval, models=on_benchmarks(config))))
    flat = {f"{stage}/{name}": r for stage, runs in done.items() for name, r in runs.items()}

    def work(run: Run) -> dict[str, float]:
        summary = summarise(done) | {"missing_specialties": config.specialty.missing}
        write_json(run.folder / "summary.json", summary)
        rows = report.model_rows(summary)
        write_atomic(run.folder / "table.md", report.markdown(rows).encode())
        led = [name for name in ("base", "reasoner", *done["gba"], *done["caci"]) if name in summary["models"]]
        metrics = flatten({name: summary["models"][name] for name in led} | summary["benchmarks"])
        log_table(run.logger, "models", rows)
        for merged in done["caci"].values():
            link(run.folder / "model", merged.folder / "model")
        records, image_root = records_of(done["data"]["data"], config.eval.split, config.specialty.names)
        if shown := next((record.images[0] for record in records if record.images), None):
            open_image(image_root / shown).save(run.folder / "example.png")
        return metrics

    key = {"missing_specialties": config.specialty.missing} if config.specialty.missing else {}
    inputs = {name: r.run_id for name, r in flat.items()}
    overall = stage_run(config, "pipeline", f"{config.model.name}-{config.data.name}", key, work, inputs)
    if overall.done:  # or it was only asked what would be made
        link(overall.folder.parent.parent / "latest", overall.folder)
    return {"pipeline": overall, **flat}


def _of_experts(config: Config) -> list[Callable[[Config], Run]]:
    """The evaluations that need not wait for RL."""
    known = ("base", *config.specialty.names, *start_names(config))
    models = [name for name in known if config.eval.models is None or name in config.eval.models]
    asked = replace(config, benchmark={}, eval=replace(config.eval, models=models))
    return list(evaluation.evaluations_of(asked).values()) if models else []


def on_benchmarks(config: Config) -> list[str]:
    """Which models a pipeline asks benchmarks of: those of `eval.models`, else base and the pipeline's last."""
    if config.eval.models is None:
        return ["base", *([config.merge.name] if config.merge.method is not None else reasoner_names(config))]
    return [name for name in config.eval.models if name != MAJORITY] or ["base"]  # it is a column of their table


def summarise(done: dict[str, dict[str, Run]]) -> dict[str, Any]:
    """The machine-readable result of a pipeline (docs/usage.md); `benchmarks`: set to model to both protocols."""
    details = ("protocols", "baselines", "question_set", "contamination", "judged_by")  # in each model's own summary
    only = next(iter(done["gba"])) if len(done["gba"]) == 1 else None  # by whatever name, readers find `reasoner`
    models: dict[str, Any] = {
        "reasoner" if name == only else name: {key: value for key, value in r.summary.items() if key not in details}
        for name, r in done["eval"].items()
    }
    experts = {name: models.pop(name) for name in done["dsa"] if name in models}
    benchmarks: dict[str, Any] = {}
    for name, r in done.get("benchmarks", {}).items():
        if r.stage != "eval":  # a judge of pairs, whose numbers are in its own folder and table
            continue
        asked, model = name.split("/", 1)
        benchmarks.setdefault(asked, {})[model] = {"protocol": r.summary["protocol"], **r.summary["protocols"]}
    seconds = {stage: sum(r.manifest["wall_seconds"] for r in runs.values()) for stage, runs in done.items()}
    ids = {f"{stage}/{name}": r.run_id for stage, runs in done.items() for name, r in runs.items()}
    first = {"base": models.pop("base")} if "base" in models else {}
    return {
        "models": {**first, "experts": experts, **models}, "benchmarks": benchmarks, "wall_seconds": seconds,
        "run_ids": ids,
    }  # fmt: skip


def link(name: Path, target: Path) -> None:
    """A relative symbolic link, swapped in one step; a file system without links gets a warning."""
    part = name.with_name(f".{name.name}-{os.getpid()}")
    try:
        part.symlink_to(os.path.relpath(target, name.parent), target_is_directory=True)
        part.replace(name)
    except OSError as error:
        console.print(f"[yellow]{name} was not linked: {error}[/yellow]")
