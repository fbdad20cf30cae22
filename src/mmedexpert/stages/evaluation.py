"""`stage=eval`: every model of the pipeline on the same questions; one folder and one predictions file per model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from mmedexpert.errors import UserError
from mmedexpert.evaluate import majority_predictions, predict, summarise
from mmedexpert.modules.backbone import load_encoder, load_model
from mmedexpert.runs import Run, write_json
from mmedexpert.schema import Config, suggestion
from mmedexpert.stages import caci, dsa, gba
from mmedexpert.stages.common import device_of, loading, model_key, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import base_of


def run(config: Config) -> dict[str, Run]:
    """Evaluate base, experts, reasoner and merged model (or those named in `eval.models`), and two baselines."""
    wanted = config.eval.models
    runs: dict[str, Run] = {}
    kinds: dict[str, dict[str, Run]] = {
        "experts": dsa.run(config),
        "reasoners": gba.run(config),
        "merged": caci.run(config),
    }
    known = ["base", *(name for group in kinds.values() for name in group), "majority", "blank_image"]
    for name in wanted or []:
        if name not in known:
            raise UserError(f"eval.models: {name!r} is not a model of this pipeline{suggestion(name, known)}")
    last = [*kinds["reasoners"], *kinds["merged"]][-1]
    for name in known:
        if wanted is None or name in wanted:
            runs[name] = _evaluate(config, name, kinds, blank_of=last)
    return runs


def _evaluate(config: Config, name: str, kinds: dict[str, dict[str, Run]], *, blank_of: str) -> Run:
    """One model's run; `majority` and `blank_image` (of the last model, shown grey images) are the baselines."""
    base, data, settings = base_of(config), dataset(config), config.eval
    shown = blank_of if name == "blank_image" else name
    source = next((group[shown] for group in kinds.values() if shown in group), None)
    adapter = source.folder / "adapter" if source and shown not in kinds["merged"] else None
    folder = source.folder / "model" if source and adapter is None else base.folder
    key: dict[str, Any] = {
        "eval": {k: v for k, v in asdict(settings).items() if k not in ("models", "batch_size")},
        "specialties": config.specialty.names,
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "baseline": name if name in ("majority", "blank_image") else None,
    }

    def work(run: Run) -> dict[str, float]:
        records, image_root = records_of(data, settings.split, config.specialty.names)
        if name == "majority":
            train, _ = records_of(data, "train", config.specialty.names)
            predictions = majority_predictions(train, records)
        else:
            device = device_of(config)
            encoder, model = load_encoder(folder, loading(config)), load_model(folder, loading(config))
            answering = PeftModel.from_pretrained(model, adapter) if adapter else model
            with run.phase("generate"):
                predictions = predict(
                    answering, encoder, records, image_root, run.folder / "predictions.jsonl",
                    perspective=settings.perspective, batch_size=settings.batch_size,
                    max_new_tokens=config.model.max_new_tokens, device=device, title=name,
                    blank_images=name == "blank_image",
                )  # fmt: skip
        summary = summarise(
            predictions, config.specialty.names, protocol=settings.protocol, num_resamples=settings.num_resamples,
            seed=config.seed,
        )  # fmt: skip
        write_json(run.folder / "summary.json", summary)
        return flatten(summary)

    inputs = {"base": base.identity, "data": data.run_id, **({"model": source.run_id} if source else {})}
    return stage_run(config, "eval", f"{name}-{data.name}-{settings.split}", key, work, inputs)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names joined by slashes."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = float(value)
    return flat


def summary_of(run: Run) -> dict[str, Any]:
    """What `work` wrote to summary.json."""
    return json.loads(Path(run.folder / "summary.json").read_text(encoding="utf-8"))
