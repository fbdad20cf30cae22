"""The models that steps of the funnel ask: this command's own, or one at an address, whose replies the ledger keeps."""

from __future__ import annotations

from typing import Any

from mmedexpert.engines.asking import Engine
from mmedexpert.schema import Config
from mmedexpert.schema_data import AskedConfig
from mmedexpert.stages.common import ledger_of, loading, model_key
from mmedexpert.stages.pretrain import base_of


def identity_of(config: Config, asked: AskedConfig) -> dict[str, Any] | None:
    """What of a step's model decides its replies, not where it is served; None where the step has none."""
    if asked.local:
        return {"base": base_of(config).identity, **model_key(config), "max_new_tokens": asked.max_new_tokens}
    if asked.base_url is None:
        return None
    return {"model": asked.model, "revision": asked.revision, "max_new_tokens": asked.max_new_tokens}


def engine_for(config: Config, asked: AskedConfig, where: str, *, temperature: float = 0.0) -> Engine | None:
    """The step's model: this command's own, one at an address (kept in the ledger), or none."""
    if asked.local:
        from mmedexpert.engines.transformers import TransformersEngine
        from mmedexpert.models.backbone import load_encoder, load_model

        base = base_of(config)
        model = load_model(base.folder, loading(config)).requires_grad_(False)
        return TransformersEngine(
            model, load_encoder(base.folder, loading(config)), batch_size=config.engine.batch_size,
            max_new_tokens=asked.max_new_tokens, temperature=temperature, seed=config.data.seed,
        )  # fmt: skip
    if asked.base_url is None:
        return None
    from mmedexpert.engines.openai import engine_of

    return engine_of(
        asked, f"data.curate.{where}", max_new_tokens=asked.max_new_tokens, temperature=temperature,
        seed=config.data.seed, ledger=ledger_of(config),
        retry_refused=config.data.curate is not None and config.data.curate.retry_refused,
    )  # fmt: skip
