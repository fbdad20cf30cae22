"""`stage=serve`: the model that RL starts from, written once for `sampler=vllm`, and the command that serves it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import load_encoder, load_model, save_backbone
from mmedexpert.models.checkpoint import new_folder
from mmedexpert.models.deltas import apply_deltas_
from mmedexpert.runtime import runs
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import loading, stage_run
from mmedexpert.stages.merge import TOLD
from mmedexpert.stages.pretrain import base_of

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's choices of --max-lora-rank
STORED = ("dtype", "min_pixels", "max_pixels")  # of the model's config
TEXT = 1024  # ours: tokens of a question, its options and instruction, beside image and completion


def run(config: Config) -> dict[str, Run]:
    """Write the model that `gba` of this config starts from; prints vLLM's command."""
    from mmedexpert.stages.gba import start

    made = written(config, start(config))
    if not config.runs.explain:
        if (lost := made.metrics.get("rounding_lost", 0.0)) > TOLD:
            console.print(
                f"[yellow]its 16 bits change the start by {100 * lost:.0f}% of its squared norm: what is sampled of it "
                "is weighed against the policy by sampler.correction[/yellow]", highlight=False, soft_wrap=True,
            )  # fmt: skip
        print_command(config, made.folder / "model", name_of(made))
    return {"serve": made}


def adapters_of(config: Config, adapter: Path | None, made_by: Run | None) -> dict[str, Path | None]:
    """As what a model can be asked of servers: by the name of what they serve, the adapter to load there. On the base
    its own; a reasoner on the model that RL starts from its update alone, where that model is not rounded to 16 bits:
    else it would be another than the adapter that is asked in process."""
    from mmedexpert.stages.gba import start

    plain = replace(config, gba=replace(config.gba, init="base"))
    found = {served_name(plain, None): adapter}
    whole = config.model.dtype == "float32"
    if whole and made_by is not None and made_by.stage == "gba" and config.gba.init not in ("base", "each"):
        found[served_name(config, start(config))] = made_by.folder / "update"
    return found


def served_name(config: Config, start: Run | None) -> str:
    """What servers must call the model of a reasoner that starts from `start` (None: the base), which need not be on
    this disk; it changes with the weights, so that no other model is sampled from."""
    told = len(runs.explained)
    made = written(replace(config, runs=replace(config.runs, explain=True)), start)
    del runs.explained[told:]
    return name_of(made)


def name_of(made: Run) -> str:
    """What a served model is called."""
    return f"start-{made.run_id}"


def written(config: Config, start: Run | None) -> Run:
    """The base with the start summed in, `<folder>/model`, in the dtype of the config, so that RL's own LoRA is the one
    adapter that travels. In 16 bits the sum is rounded, where the trainer keeps the start's factors (models/lean.py):
    the correction of `sampler` weighs the difference."""
    base = base_of(config)

    def work(run: Run) -> Mapping[str, float]:
        here = replace(loading(config), device="cpu")
        model, encoder = load_model(base.folder, here), load_encoder(base.folder, here)
        lost = None
        if start:
            adapter = LoraAdapter.load(start.folder / "adapter")
            lost = apply_deltas_(model, ((name, adapter.delta(name)) for name in adapter.modules))
        with new_folder(run.folder / "model", model.get_memory_footprint(), replace=True) as folder:
            save_backbone(folder, model, encoder)
        told = {} if lost is None else {"rounding_lost": lost}
        return {"gigabytes": sum(file.stat().st_size for file in (run.folder / "model").iterdir()) / 1e9, **told}

    inputs = {"base": base.identity, **({"start": start.run_id} if start else {})}
    # what changes the folder alone: servers and trainers may be other machines, and a base is the same for every seed
    key = {"model": [getattr(config.model, name) for name in STORED], "rules": versions("start")}
    return stage_run(config, "serve", config.gba.init, key, work, inputs, seed=0)


def print_command(config: Config, folder: Path, name: str) -> None:
    """How to start a server; one for each GPU that samples, each on a port of its own."""
    # on the base a reasoner is as wide as the experts that it starts from and its own update, a taught merge wider
    taught = config.merge.exact and config.merge.distil_steps > 0
    parts = len(config.specialty.names) + 1 + taught if config.gba.init == "base" else 1
    rank = next((rank for rank in RANKS if rank >= config.model.lora.r * parts), RANKS[-1])
    longest = config.model.max_pixels // 28**2 + TEXT + config.model.max_new_tokens
    words = [
        "vllm", "serve", str(folder.resolve()), "--served-model-name", name, "--dtype", config.model.dtype,
        "--max-model-len", str(longest), "--enable-lora", "--max-lora-rank", str(rank), "--max-loras", "2",
        "--max-cpu-loras", "4", "--logprobs-mode", "processed_logprobs", "--generation-config", "vllm",
        "--port", "8000",
    ]  # fmt: skip
    console.print(
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True {shlex.join(words)}", highlight=False, soft_wrap=True, markup=False
    )
    console.print("then: stage=gba sampler=vllm 'sampler.base_urls=[http://localhost:8000]'", markup=False)
