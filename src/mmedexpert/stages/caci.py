"""`stage=caci`: conflict-aware capability integration, the experts and the reasoner merged into one model."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from typing import Any

from hydra.utils import instantiate

from mmedexpert.cards import write_card
from mmedexpert.merging.adapters import LoraAdapter
from mmedexpert.merging.apply import merge_adapters
from mmedexpert.merging.checkpoint import fingerprint_base
from mmedexpert.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import dsa, gba
from mmedexpert.stages.common import stage_run
from mmedexpert.stages.pretrain import base_of


def run(config: Config) -> dict[str, Run]:
    """The merged model in `<folder>/model`; nothing with `merge=none`."""
    if config.merge.method is None:
        return {}
    return {config.merge.name: merged(config)}


def merged(config: Config) -> Run:
    """Experts and reasoner updates, merged by `merge.method` into a copy of the base."""
    base, experts, reasoners = base_of(config), dsa.run(config), gba.run(config)
    method: dict[str, Any] = dict(config.merge.method or {})
    runs = {**experts, **reasoners}

    def work(run: Run) -> dict[str, float]:
        sources = {name: r.folder / "adapter" for name, r in experts.items()}
        updates = {name: r.folder / "update" for name, r in reasoners.items()}
        shutil.rmtree(run.folder / "model", ignore_errors=True)  # left by a try that died after the merge
        with run.phase("merge"):
            report = merge_adapters(
                base.folder, run.folder / "model", sources, updates, instantiate(method, _convert_="all")
            )
        write_card(
            run.folder / "model", kind="merged", title=f"merged model ({config.merge.name})",
            base_model=config.model.name_or_path, base_fingerprint=fingerprint_base(base.folder),
            method=f"CACI, {method.get('_target_', '').rpartition('.')[2]}: "
            + ", ".join(f"{k}={v}" for k, v in method.items() if not k.startswith("_")),
            data={"data of the experts": "see their cards"}, specialty=None, library_name="transformers",
            ingredients={name: LoraAdapter.load(path).fingerprint for name, path in {**sources, **updates}.items()},
            metrics=None,
        )  # fmt: skip
        return report

    inputs = {"base": base.identity, **{name: r.run_id for name, r in runs.items()}}
    return stage_run(config, "caci", config.merge.name, {"merge": asdict(config.merge)["method"]}, work, inputs)
