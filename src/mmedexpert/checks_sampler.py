"""Which settings go with servers that sample (`checks.py` has the rest)."""

from __future__ import annotations

from mmedexpert.errors import UserError
from mmedexpert.runtime.privacy import without_password
from mmedexpert.schema import Config

NO_ADDRESS = (
    "sampler=vllm needs the addresses of its servers, sampler.base_urls=[http://localhost:8000]; stage=serve prints "
    "the command that starts one"
)


def check_sampler(config: Config) -> None:
    """UserError for servers without an address, and for a distribution whose log-probabilities no server tells."""
    sampler, gba, stage = config.sampler, config.gba, config.stage.name
    for key, urls in (("sampler", sampler.base_urls), ("engine", config.engine.base_urls)):
        for url in urls:
            if not url.startswith(("http://", "https://")):
                shown = without_password(url)
                raise UserError(f"{key}.base_urls: {shown} is no web address: write it as http://localhost:8000")
    if config.engine.name == "vllm" and not config.engine.base_urls:
        raise UserError(
            "engine=vllm needs the addresses of its servers, engine.base_urls=[http://localhost:8000]; "
            "stage=serve sampler=vllm gba.init=base prints the command that starts one"
        )
    if stage == "serve" and sampler.name != "vllm":
        raise UserError("stage=serve writes the model that servers sample from: add sampler=vllm")
    if sampler.name != "vllm":
        return
    if gba.init == "each":
        raise UserError(
            "gba.init=each starts a reasoner from each expert, and servers have one model: use sampler=transformers, "
            "or another gba.init"
        )
    if gba.top_p < 1 or gba.top_k > 0:
        given = f"gba.top_p={gba.top_p} gba.top_k={gba.top_k}"
        raise UserError(
            f"{given}: vLLM's log-probabilities are then of the cut distribution, and the update's are not: sample "
            "from the whole one with gba.top_p=1 gba.top_k=0, or use sampler=transformers"
        )
    if not sampler.base_urls and stage in ("gba", "pipeline", "caci"):
        raise UserError(NO_ADDRESS)
