"""The models that steps of the funnel ask: this command's own, or one at an address, whose replies the ledger keeps."""

from __future__ import annotations

from typing import Any

from mmedexpert.engines.asking import Engine
from mmedexpert.schema import Config
from mmedexpert.schema_data import AskedConfig
from mmedexpert.stages.common import ledger_of, loading, model_key
from mmedexpert.stages.pretrain import base_of


def prompt_of(config: Config, asked: AskedConfig) -> str | None:
    """What stands before a step's questions: a step that has them answered asks the command's own model under its own,
    one that wants JSON (labels, teacher, verifier) under none."""
    return config.model.system_prompt if asked.local and asked.system_prompt else asked.system_prompt


def identity_of(config: Config, asked: AskedConfig) -> dict[str, Any] | None:
    """What of a step's model decides its replies, not where it is served; None where the step has none."""
    prompt = prompt_of(config, asked)
    if asked.local:
        told = {**model_key(config), "system_prompt": prompt, "max_new_tokens": asked.max_new_tokens}
        return {"base": base_of(config).identity, **told}
    if asked.base_url is None:
        return None
    told = {"model": asked.model, "revision": asked.revision, "max_new_tokens": asked.max_new_tokens}
    return told | ({"system_prompt": prompt} if prompt else {})


def engine_for(config: Config, asked: AskedConfig, where: str, *, temperature: float = 0.0) -> Engine | None:
    """The step's model: this command's own, one at an address (kept in the ledger), or none."""
    if asked.local:
        from mmedexpert.engines.transformers import TransformersEngine
        from mmedexpert.models.backbone import load_encoder, load_model

        base = base_of(config)
        model, encoder = load_model(base.folder, loading(config)), load_encoder(base.folder, loading(config))
        encoder.system_prompt = prompt_of(config, asked)
        return TransformersEngine(
            model.requires_grad_(False), encoder, batch_size=config.engine.batch_size,
            max_new_tokens=asked.max_new_tokens, temperature=temperature, seed=config.data.seed,
        )  # fmt: skip
    if asked.base_url is None:
        return None
    from mmedexpert.engines.openai import engine_of

    return engine_of(
        asked, f"data.curate.{where}", max_new_tokens=asked.max_new_tokens, temperature=temperature,
        seed=config.data.seed, ledger=ledger_of(config), system_prompt=prompt_of(config, asked) or "",
        retry_refused=config.data.curate is not None and config.data.curate.retry_refused,
    )  # fmt: skip
