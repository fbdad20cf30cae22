"""`stage=caci`: conflict-aware capability integration, the experts and the reasoner merged into one model."""

from __future__ import annotations

from dataclasses import replace

from mmedexpert.names import START
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import dsa, gba, merge
from mmedexpert.stages.distil import distilled

SUM = {"_target_": "mmedexpert.merging.methods.task_arithmetic", "_partial_": True, "scaling": 1.0}


def run(config: Config) -> dict[str, Run]:
    """The merged model in `<folder>/model`, distilled where `merge.distil_steps` says so; nothing with `merge=none`.

    With `gba.init=caci` the experts were merged, and taught, before RL: the model is that start and the RL update.
    """
    settings = config.merge
    if settings.method is None:
        return {}
    search = merge.ready(config)
    if config.gba.init == "caci":
        whole = replace(config, merge=replace(settings, method=SUM, grams=None))
        start = gba.start(config)
        assert start is not None
        return {settings.name: merge.merged(whole, {START: start}, gba.run(config))}
    experts = dsa.run(config)
    made = merge.merged(config, experts, gba.run(config), search)
    if settings.distil_steps:
        made = distilled(config, made, experts)
    return {settings.name: made}
