"""How a model that is asked answers: loaded here, or at its server; a reward model scores."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.engines.asking import Engine
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.errors import UserError
from mmedexpert.judging.reward_model import RewardModel
from mmedexpert.models.adapters import CONFIG, check_compatible
from mmedexpert.models.backbone import load_encoder, load_model
from mmedexpert.models.checkpoint import fingerprint_model, read_json
from mmedexpert.models.dense import FILE as DENSE
from mmedexpert.models.dense import DenseUpdate, update_in
from mmedexpert.models.encode import Encoder
from mmedexpert.models.reward_head import FILE as HEAD
from mmedexpert.models.reward_head import RewardHead
from mmedexpert.runtime.fingerprints import file_digest
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import Base, loading, model_key
from mmedexpert.stages.pretrain import base_of

PARTS = ("exact", "model", "adapter")  # of a run's folder, what is asked first
JUDGE = "judge.json"  # beside the adapter of a trained judge: what kind it is


@dataclass(frozen=True)
class Subject:
    """What is asked: a model folder with or without an update, a served model, or a baseline of `names.BASELINES`."""

    name: str
    identity: str
    folder: Path | None = None
    adapter: Path | None = None  # or, of a merge that no adapter holds, its rows (`models/dense.py`)
    baseline: str | None = None
    made_by: Run | None = None  # the run that made it; none of a base or a folder
    judge: Mapping[str, Any] | None = None  # of a trained judge: its `judge.json`

    @property
    def served(self) -> bool:
        """Whether a server answers, whose model may change behind its name."""
        return self.folder is None and self.baseline is None


def from_folder(folder: Path, base: Base) -> Subject:
    """A merged or adapter run, a PEFT folder or a model folder."""
    inner = next((folder / part for part in PARTS if (folder / part).is_dir()), folder)
    name = folder.name if inner == folder else folder.name.rpartition("-")[0]
    if not any((inner / file).is_file() for file in (CONFIG, DENSE)):
        return Subject(name, fingerprint_model(inner), inner)
    adapter = update_in(inner)
    check_compatible([adapter], base.folder)
    judge, identity = judge_in(inner), f"{adapter.fingerprint}@{base.identity}"
    if judge is not None:
        parts = [inner / part for part in (JUDGE, HEAD) if (inner / part).is_file()]
        identity = "+".join([identity, *(file_digest(part) for part in parts)])
        name = f"judge_{judge['kind']}" if name == inner.name else f"judge_{name}"
    return Subject(name, identity, base.folder, inner, judge=judge)


def judge_subject(config: Config, run: Run, base: Base) -> Subject:
    """A judge that `train_judge.trained` made; how long its replies may get says this command."""
    adapter = run.folder / "adapter"
    settings = config.judge  # of one that `runs.explain` does not train, what decides how it would be asked
    style = None if settings.name == "scalar" else config.model.instructions
    told = {"kind": settings.name, "style": style, **(judge_in(adapter) or {})}
    told["max_new_tokens"] = settings.max_new_tokens
    return Subject(f"judge_{run.name}", run.run_id, base.folder, adapter, made_by=run, judge=told)


def judge_in(folder: Path) -> dict[str, Any] | None:
    """What a folder says of the judge that it is; None where it is none. UserError for one of an older version."""
    if not (folder / JUDGE).is_file():
        return None
    told = read_json(folder / JUDGE)
    if missing := [key for key in ("kind", "style", "ties", "max_new_tokens", "trained_groups") if key not in told]:
        raise UserError(f"{folder / JUDGE} does not say {', '.join(missing)}: train the judge again (stage=judge)")
    return dict(told)


def answering_key(config: Config, subject: Subject, system_prompt: str | None) -> dict[str, Any]:
    """What decides a model's answers beside its weights and what it is asked, for a run's key."""
    told: dict[str, Any] = {"system_prompt": system_prompt, "max_new_tokens": longest_reply(config, subject)}
    if subject.served:
        return {"model": told}
    return {"model": {**model_key(config), **told}, "rules": versions("prompts", "sampling", "images")}


def tell_kept(subject: Subject, run: Run) -> None:
    """A line where a served model's answers are those of an earlier command."""
    if run.reused and subject.served:
        console.print(
            f"[yellow]{subject.name}: the server was not asked, its answers are kept from {run.manifest['finished']}; "
            "if it has another model by now, engine.endpoint.revision=<any new name> asks again[/yellow]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def engine_of(
    config: Config, subject: Subject, system_prompt: str | None, *, temperature: float = 0.0, top_p: float = 1.0
) -> Engine:
    """What answers for a subject: its server, or the model loaded here; greedily, or above temperature 0 by `seed`.

    UserError for a reward model, which answers nothing.
    """
    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": config.seed} if temperature else {}
    if is_reward_model(subject):
        raise UserError(f"{subject.name} scores answers and gives none: ask it of pairs, benchmark=phantom_pairs")
    longest = longest_reply(config, subject)
    if subject.served:
        from mmedexpert.engines.openai import engine_of as server  # its library takes two seconds to import

        return server(
            config.engine.endpoint, "engine.endpoint", system_prompt=system_prompt or "",
            max_new_tokens=longest, **drawn,
        )  # fmt: skip
    if config.engine.name == "vllm":
        return _served(config, subject, system_prompt, longest, drawn)
    model, encoder = _loaded(config, subject, system_prompt)
    return TransformersEngine(model, encoder, batch_size=config.engine.batch_size, max_new_tokens=longest, **drawn)


def _served(
    config: Config, subject: Subject, system_prompt: str | None, longest: int, drawn: Mapping[str, Any]
) -> Engine:
    """vLLM servers of the base, or of the model that RL starts from, with the subject as an adapter."""
    from mmedexpert.engines.served import ServedEngine  # its library takes a second to import
    from mmedexpert.engines.vllm import Servers
    from mmedexpert.stages.serve import adapters_of

    rows = subject.adapter is not None and (subject.adapter / DENSE).is_file()
    if subject.folder is None or rows or (subject.adapter is None and subject.folder != base_of(config).folder):
        raise UserError(
            f"{subject.name} is a whole model, and engine=vllm has one base with adapters: serve its folder and ask it "
            "with engine=openai, or use engine=transformers"
        )
    settings, endpoint = config.engine, config.engine.endpoint
    servers = Servers(
        settings.base_urls, "", api_key=os.environ.get(endpoint.api_key_env or ""), concurrency=endpoint.concurrency,
        timeout_s=endpoint.timeout_s, patience_s=endpoint.timeout_s, setting="engine",
    )  # fmt: skip
    encoder = load_encoder(subject.folder, loading(config))
    encoder.system_prompt = system_prompt
    choices = adapters_of(config, subject.adapter, subject.made_by)
    servers.choose(list(choices), longest)
    adapter = choices[servers.model]
    named = (f"{adapter.parent.name}-{secrets.token_hex(3)}", adapter.resolve()) if adapter else None
    return ServedEngine(servers, encoder, adapter=named, max_new_tokens=longest, **drawn)


def longest_reply(config: Config, subject: Subject) -> int:
    """The most tokens of an answer: a trained judge's verdicts take what it was trained with."""
    if subject.judge is not None:
        return int(subject.judge["max_new_tokens"])
    if subject.served:
        return config.eval.max_new_tokens or config.engine.endpoint.max_new_tokens
    return config.model.max_new_tokens


def asking(config: Config) -> Config:
    """The config that a model is asked with, where evaluation has other limits than training."""
    model, limits = config.model, config.eval
    pixels, tokens = limits.max_pixels or model.max_pixels, limits.max_new_tokens or model.max_new_tokens
    return replace(config, model=replace(model, max_pixels=pixels, max_new_tokens=tokens))


def style_of(config: Config, subject: Subject) -> str:
    """The wording of instructions; a served model, whatever `model` is here, and a trained judge have their own."""
    if subject.judge is not None:
        return str(subject.judge["style"])
    return "full" if subject.served else config.model.instructions


def is_reward_model(subject: Subject) -> bool:
    """Whether it is a reward model."""
    return subject.judge is not None and subject.judge["kind"] == "scalar"


def reward_model_of(config: Config, subject: Subject) -> RewardModel:
    """The reward head and backbone of a trained judge of kind scalar. UserError where a file is missing or damaged."""
    assert subject.adapter is not None
    model, encoder = _loaded(config, subject, config.model.system_prompt)
    head = RewardHead.load(subject.adapter, DIMENSIONS).to(loading(config).device).requires_grad_(False)
    return RewardModel(model, encoder, head, batch_size=config.engine.batch_size)


def _loaded(config: Config, subject: Subject, system_prompt: str | None) -> tuple[Any, Encoder]:
    assert subject.folder is not None
    encoder, model = load_encoder(subject.folder, loading(config)), load_model(subject.folder, loading(config))
    encoder.system_prompt = system_prompt
    from peft import PeftModel  # lazily, as models/backbone.py says

    from mmedexpert.models.lean import start_from_, streamline

    answering: Any = model
    if subject.adapter and (subject.adapter / DENSE).is_file():
        start_from_(model, DenseUpdate.load(subject.adapter))
    elif subject.adapter:
        answering = PeftModel.from_pretrained(model, subject.adapter)
        streamline(answering)
    return answering.requires_grad_(False), encoder
