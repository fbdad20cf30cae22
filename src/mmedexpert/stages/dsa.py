"""`stage=dsa`: domain-specific adaptation, one LoRA expert per specialty by SFT on reasoning traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.guidelines import instructions
from mmedexpert.models.adapters import LoraAdapter, concatenate_lora, record_base
from mmedexpert.models.backbone import add_lora, load_encoder, load_model
from mmedexpert.models.checkpoint import fingerprint_base, new_folder
from mmedexpert.models.encode import Encoder
from mmedexpert.reporting.cards import write_card
from mmedexpert.runtime.ranks import rank, ranks
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import digest, versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import (
    content_of,
    fit_options,
    loading,
    model_key,
    records_of,
    stage_run,
    together,
    training_key,
)
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import base_of

if TYPE_CHECKING:
    from peft import PeftModel

_told: set[Path] = set()  # data sets without traces that this command has named


def run(config: Config) -> dict[str, Run]:
    """One expert for each name in `specialty`."""
    ready(config, config.specialty.names)  # every specialty is checked before the first is trained
    base_of(config)  # what all of them wait for
    together(config, [partial(expert, name=name, specialties=[name]) for name in config.specialty.names])
    return {name: expert(config, name, [name]) for name in config.specialty.names}


def ready(config: Config, specialties: list[str]) -> None:
    """Build the data set and see that experts can be trained on it, before anything is trained or downloaded.

    UserError for a specialty without training records, and for records without a reasoning trace, from which a real
    model would learn not to reason; the tiny one, which has no reasoning to lose, goes on, and a line tells it.
    """
    data = dataset(config)
    records = {record.id: record for name in specialties for record in records_of(data, "train", [name])[0]}
    bare = sum(not (record.trace and any(map(str.strip, record.trace.steps))) for record in records.values())
    allowed = config.dsa.allow_untraced
    if bare and allowed is None and config.model.architecture is not None:
        if rank() == 0 and data.folder not in _told:
            _told.add(data.folder)
            line = f"{bare} of {len(records)} training records of data {data.name} have no reasoning trace"
            console.print(f"[yellow]{line}: the experts learn answers alone[/yellow]", highlight=False, soft_wrap=True)
    elif bare and not allowed:
        raise UserError(
            f"{bare} of {len(records)} training records of data {data.name} have no reasoning trace, and DSA would "
            "teach the model to answer without reasoning: give them traces, start RL from the base with stage=gba "
            "gba.init=base, or accept it with dsa.allow_untraced=true"
        )


def expert(config: Config, name: str, specialties: list[str]) -> Run:
    """The expert `name`, trained on the records of `specialties`; its adapter is `<folder>/adapter`."""
    ready(config, specialties)
    base, data = base_of(config), dataset(config)
    settings, lora = config.dsa, config.model.lora
    key = {
        "specialties": specialties,
        "dsa": {k: v for k, v in asdict(settings).items() if k not in ("checkpoint_every", "allow_untraced")},
        "lora": asdict(lora),
        "model": model_key(config),
        "trainer": training_key(config),
        "rules": versions("prompts", "batches", "optimiser", "sft"),
        "instructions": digest(instructions(config.model.instructions)),
    }

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.training.fit import fit  # Lightning, which takes seconds
        from mmedexpert.training.sft import SftModule, sft_stream

        records, image_root = records_of(data, "train", specialties)
        encoder = load_encoder(base.folder, loading(config))
        model = add_lora(
            load_model(base.folder, loading(config, trained=True)), r=lora.r, alpha=lora.alpha, dropout=lora.dropout,
            target_modules=lora.target_modules, gradient_checkpointing=config.model.gradient_checkpointing,
            seed=config.seed,
        )  # fmt: skip
        module = SftModule(
            model, encoder, lr=settings.lr, weight_decay=settings.weight_decay, seed=config.seed, steps=settings.steps,
            warmup_ratio=settings.warmup_ratio, max_grad_norm=settings.max_grad_norm,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
        )  # fmt: skip
        stream = sft_stream(
            records, encoder, image_root, batch_size=settings.batch_size, seed=config.seed, rank=rank(), ranks=ranks()
        )
        with run.phase("train"):
            metrics = fit(
                module, stream, folder=run.folder, title=f"dsa {name}", checkpoint_every=settings.checkpoint_every,
                logger=run.logger, **fit_options(config),
            )  # fmt: skip
        save_adapter(run.folder / "adapter", model, encoder, base.folder)
        if rank() > 0:
            return metrics
        write_card(
            run.folder / "adapter", kind="adapter", title=f"{name} expert (DSA)", base_model=config.model.name_or_path,
            base_fingerprint=fingerprint_base(base.folder), method="LoRA SFT on reasoning traces (DSA)",
            data={f"{data.name} ({len(records)} training records)": licences(records)}, specialty=name,
            ingredients={}, metrics=None, library_name="peft",
        )  # fmt: skip
        return {"train_records": float(len(records)), **metrics}

    inputs = {"base": base.identity, "data": content_of(data, "train", specialties)}
    return stage_run(config, "dsa", name, key, work, inputs, sources={"data": data}, every_rank=True)


def licences(records: list[Record]) -> str:
    """The licences of the records, each once."""
    return ", ".join(sorted({record.license for record in records}))


def save_adapter(folder: Path, model: PeftModel, encoder: Encoder, base_folder: Path) -> None:
    """A PEFT folder with tokenizer and image processor, and with its base's fingerprint: a merge refuses another's.

    It appears when complete, in the place of what a dead try left. All ranks gather the weights, rank 0 writes them.
    """
    from mmedexpert.training.fit import trained_weights

    weights = trained_weights(model)
    if rank() > 0:
        return
    config: Any = model.peft_config["default"]
    config.base_model_name_or_path = str(base_folder)
    with new_folder(folder, sum(weight.nbytes for weight in weights.values()), replace=True) as new:
        model.save_pretrained(str(new), state_dict=weights)
        encoder.save_pretrained(new)
        record_base(new, fingerprint_base(base_folder))


def save_sum(
    folder: Path, adapters: Sequence[LoraAdapter], weights: Sequence[float], base: Path, config: Config
) -> None:
    """A weighted sum of adapters as one adapter, with tokenizer and image processor like any other."""
    concatenate_lora(adapters, weights, folder, replace=True)
    load_encoder(base, loading(config)).save_pretrained(folder)
    record_base(folder, fingerprint_base(base))
