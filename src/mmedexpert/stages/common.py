"""What the stages share: how a config becomes plain arguments, and what a stage hands to the next."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint, load_records
from mmedexpert.engines.ledger import LEDGER, Ledger
from mmedexpert.errors import UserError, suggestion
from mmedexpert.models.backbone import Loading, attention
from mmedexpert.runtime import runs, workers
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.ranks import rank, ranks
from mmedexpert.runtime.runs import Run, console, execute
from mmedexpert.schema import BASE, Config
from mmedexpert.stages.logged import stage_logger, tell_end, tell_reused

REPEAT = f"""\
# python run.py --config-path <this folder> --config-name config    repeats the command, and finds this run finished
defaults:
- {BASE}
- override hydra/job_logging: none
- override hydra/hydra_logging: none
- _self_
hydra:  # as in conf/config.yaml
  output_subdir: null
  run: {{dir: .}}
  sweep: {{dir: "${{home:${{paths.outputs}}}}/multirun/${{now:%Y-%m-%d_%H-%M-%S-%f}}", subdir: .}}
"""


MOST_PROCESSES = 4  # ours: each holds a model, and most of a gigabyte


@dataclass(frozen=True)
class Base:
    """The model everything starts from: its folder and an identity that changes with its weights."""

    folder: Path
    identity: str


def launch(config: Config) -> None:
    """Let the ranks of a command on several devices meet: those torchrun started, else Lightning starts them.

    UserError where processes, devices and settings do not agree.
    """
    trainer, devices = config.trainer, devices_of(config)
    wanted = devices * trainer.num_nodes
    if devices < 1:
        raise UserError(f"trainer.devices={devices} must be above 0, or null for all")
    met = torch.distributed.is_initialized()
    torchrun = torch.distributed.is_torchelastic_launched()
    started = ranks() if met else int(os.environ["WORLD_SIZE"]) if torchrun else wanted
    if started != wanted:
        raise UserError(
            f"{started} processes are at work, trainer.devices={devices} trainer.num_nodes={trainer.num_nodes} needs "
            f"{wanted}: give all jobs of a command the same; under torchrun trainer=ddp takes the processes it started"
        )
    if wanted == 1:
        return
    if device_of(config) == "cuda" and devices > torch.cuda.device_count():
        raise UserError(f"trainer.devices={devices}: only {torch.cuda.device_count()} CUDA devices here")
    for key, size in (
        ("dsa.batch_size", config.dsa.batch_size), ("gba.prompts_per_step", config.gba.prompts_per_step),
        ("judge.batch_size", config.judge.batch_size),
    ):  # fmt: skip
        if size < wanted:
            raise UserError(f"{key}={size} leaves some of {wanted} devices without work: give at least {wanted}")
    if not met:
        from lightning.fabric import Fabric

        Fabric(accelerator=device_of(config), devices=devices, num_nodes=trainer.num_nodes, strategy="ddp").launch()


def devices_of(config: Config) -> int:
    """`trainer.devices`; without it as many as torchrun started processes here, else all GPUs."""
    if config.trainer.devices is not None:
        return config.trainer.devices
    if torch.distributed.is_torchelastic_launched():
        return int(os.environ["LOCAL_WORLD_SIZE"])
    return torch.cuda.device_count() if device_of(config) == "cuda" else 1


def device_of(config: Config) -> str:
    """`cuda` where the trainer would use it, else `cpu`."""
    wanted = config.trainer.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={wanted}: no CUDA device here; use trainer.accelerator=cpu")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def together(config: Config, works: Sequence[Callable[[Config], Run | dict[str, Run]]]) -> None:
    """Make the runs of works that do not wait for each other side by side, in `trainer.processes` processes.

    They are found done by who calls each work afterwards; with one process that call makes them. The first works are
    begun first. Works are picklable, and with `runs.explain` they tell whether they are done.
    """
    count = processes_of(config)
    if count == 1:
        return
    missing, told = [], len(runs.explained)
    for work in works:
        found = work(replace(config, runs=replace(config.runs, explain=True)))
        if not all(run.done for run in (found.values() if isinstance(found, dict) else [found])):
            missing.append(partial(work, config))
    del runs.explained[told:]
    if len(missing) > 1:
        begin_workers(config)
        workers.side_by_side(missing)


def begin_workers(config: Config) -> None:
    """Let the processes for `together` start while this one goes on."""
    if (count := processes_of(config)) > 1:
        workers.start(count, config.trainer.threads or max(1, _cores() // count), _imported)


def _imported() -> None:
    """What a worker does first: the stages' libraries take seconds, which its first work would wait for."""
    import mmedexpert.stages.pipeline
    import mmedexpert.training.gba
    import mmedexpert.training.sft  # noqa: F401


def processes_of(config: Config) -> int:
    """`trainer.processes`; without it one a core for the tiny model on a CPU, at most four, and one for all else."""
    if ranks() > 1 or config.trainer.devices != 1 or config.runs.explain:
        return 1
    if config.trainer.processes is not None:
        return config.trainer.processes
    if config.model.architecture is None or config.engine.name != "transformers" or device_of(config) != "cpu":
        return 1
    return min(_cores(), MOST_PROCESSES)


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loading(config: Config, *, trained: bool = False) -> Loading:
    """How the config's model is loaded. One that is to be trained under FSDP2 stays on the CPU, where its weights are
    pages of its files that nobody has read: each rank reads its shards alone (`TrainingModule.configure_model`)."""
    model, device = config.model, device_of(config)
    shared = trained and config.trainer.strategy == "fsdp" and ranks() > 1
    return Loading(
        model.dtype,
        attention(model.attn_implementation, device),
        model.min_pixels,
        model.max_pixels,
        model.system_prompt,
        "cpu" if shared else device,
        model.instructions,
    )


def model_key(config: Config) -> dict[str, Any]:
    """What of the model's config changes a result: not its name or path."""
    model = config.model
    key = {key: getattr(model, key) for key in ("dtype", "min_pixels", "max_pixels", "system_prompt")}
    return {**key, "attention": attention(model.attn_implementation, device_of(config))}


def training_key(config: Config, *, dropout: bool = True) -> dict[str, Any]:
    """What of the trainer's config changes a result: precision; and where dropout draws masks pass by pass, how a step
    is cut into passes and devices (elsewhere both move nothing but roundings)."""
    trainer = config.trainer
    key: dict[str, Any] = {"precision": trainer.precision}
    if dropout and config.model.lora.dropout:
        key |= {"micro_batch_tokens": trainer.micro_batch_tokens, "devices": ranks()}
    return key


def tidy() -> None:
    """Free what a finished stage leaves on a GPU: a trained module and its trainer hold each other until collected."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def stage_run(
    config: Config,
    stage: str,
    name: str,
    key: Mapping[str, Any],
    work: Callable[[Run], Mapping[str, float]],
    inputs: Mapping[str, str] | None = None,
    *,
    sources: Mapping[str, Run] | None = None,
    seed: int | None = None,
    every_rank: bool = False,
) -> Run:
    """`runs.execute` with the config's output folder and, if no other is given, its seed, that of training; logged.

    `sources` are the runs behind inputs that are contents.
    """

    def logged(run: Run) -> Mapping[str, float]:
        with stage_logger(config, run) as run.logger:
            metrics = work(run)
            tell_end(config, run, metrics, sources or {})
        tidy()
        return metrics

    made = execute(
        stage, name, key, logged, outputs=config.paths.outputs, seed=config.seed if seed is None else seed,
        inputs=inputs, every_rank=every_rank, trains=seed is None, explain=config.runs.explain,
        config=partial(repeatable, config),
    )  # fmt: skip
    if not config.runs.explain:
        tell_reused(config, made, sources or {})
    return made


def repeatable(config: Config) -> str:
    """The command's whole config as a primary config of Hydra, which composes it again without conf/.

    Passwords in addresses are not kept: a repeat has to be given them.
    """
    values = asdict(config)
    if config.specialty.missing:  # they are looked for anew
        names = [*config.specialty.names, *config.specialty.missing]
        values["specialty"] |= {"names": names, "on_missing": "skip", "missing": []}
    return REPEAT + without_password(yaml.safe_dump(values, sort_keys=False))


def ledger_of(config: Config) -> Ledger:
    """What servers were asked, of all runs in this outputs folder; caches of earlier versions are not read."""
    outputs = Path(config.paths.outputs)
    old = [name for name in ("grades.jsonl", "llm_judge.jsonl") if (outputs / name).exists()]
    if old and rank() == 0:
        console.print(
            f"[yellow]{' and '.join(old)} in {outputs}: not read any more, what judges say is now kept in {LEDGER}; "
            "delete them[/yellow]",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return Ledger(outputs / LEDGER)


def records_of(data: Run, split: str, specialties: list[str]) -> tuple[list[Record], Path]:
    """The records of a split that belong to any of the specialties, and the image root; UserError without any."""
    records, image_root = load_records(data.folder)
    chosen = [r for r in records if r.split == split and set(r.specialties) & set(specialties)]
    missing = [name for name in specialties if not any(name in r.specialties for r in chosen)]
    if missing:
        known = sorted({name for r in records for name in r.specialties})
        raise UserError(
            f"specialty {missing[0]!r} has no {split} record in data {data.name}{suggestion(missing[0], known)} "
            f"(data set folder {data.folder})"
        )
    return chosen, image_root


def content_of(data: Run, split: str, specialties: list[str]) -> str:
    """The identity of these records and their images as they lie there now: what a stage reads, and no more."""
    return fingerprint(*records_of(data, split, specialties))


def fit_options(config: Config) -> dict[str, Any]:
    """Lightning's part of `training.fit.fit`; a stage that trains on rank 0 alone uses one device."""
    trainer = config.trainer
    options: dict[str, Any] = {"accelerator": trainer.accelerator, "precision": trainer.precision}
    if ranks() == 1:
        return options
    return options | {
        "accelerator": device_of(config), "devices": devices_of(config), "num_nodes": trainer.num_nodes,
        "strategy": trainer.strategy,
    }  # fmt: skip
