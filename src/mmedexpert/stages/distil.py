"""After the merge, with `merge.distil_steps`: the experts teach the merged model, each on its own training records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from mmedexpert.guidelines import instructions
from mmedexpert.merging.apply import merge_adapters
from mmedexpert.merging.methods import task_arithmetic
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import add_lora, load_encoder, load_model
from mmedexpert.models.checkpoint import fingerprint_base
from mmedexpert.models.dense import update_in
from mmedexpert.reporting.cards import write_card
from mmedexpert.runtime.runs import Run, clean
from mmedexpert.runtime.versions import digest, versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import (
    content_of,
    fit_options,
    loading,
    model_key,
    records_of,
    stage_run,
    training_key,
)
from mmedexpert.stages.data import dataset
from mmedexpert.stages.dsa import licences, save_adapter, save_sum
from mmedexpert.stages.merge import held_in, tell_rounding
from mmedexpert.stages.pretrain import base_of

if TYPE_CHECKING:
    from peft import PeftModel


def distilled(config: Config, merged: Run, experts: Mapping[str, Run]) -> Run:
    """The merged model after `merge.distil_steps` steps under its experts, in `<folder>/model`; what it learnt is the
    adapter in `<folder>/update`, and with a merge that is an adapter, too, both as one in `<folder>/adapter`. With
    `merge.exact` it is taught on the base and the merge that is not rounded, and `<folder>/exact` is both as one.

    Learning rate, batch and the like are those of DSA, and the LoRA is the model's. # ours
    """
    base, data, settings, lora = base_of(config), dataset(config), config.dsa, config.model.lora
    exact = config.merge.exact
    taught = base.folder if exact else merged.folder / "model"  # beside it, the merge
    steps, on_policy = config.merge.distil_steps, config.merge.distil_on_policy
    names = config.specialty.names
    key: dict[str, Any] = {
        "specialties": names,
        "distil": {"steps": steps, "on_policy": on_policy},
        "dsa": {k: v for k, v in asdict(settings).items() if k not in ("steps", "checkpoint_every", "allow_untraced")},
        "lora": asdict(lora),
        "model": model_key(config),
        "trainer": training_key(config),
        "rules": versions("prompts", "batches", "optimiser", "distil", *(("sampling",) if on_policy else ())),
        "instructions": digest(instructions(config.model.instructions)),
    }
    if exact:
        key["exact"] = True
    if on_policy:
        key["model"]["max_new_tokens"] = config.model.max_new_tokens

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.models.lean import start_from_  # lazily, as models/backbone.py says
        from mmedexpert.training.distil import DistilModule, completer, lesson_stream  # Lightning, which takes seconds
        from mmedexpert.training.fit import fit
        from mmedexpert.training.sft import sample

        own = {name: records_of(data, "train", [name])[0] for name in names}
        image_root = records_of(data, "train", names)[1]
        encoder, student = load_encoder(taught, loading(config)), load_model(taught, loading(config, trained=True))
        if exact:
            start_from_(student, update_in(merged.folder / "exact"))
        model = add_lora(
            student, r=lora.r, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules,
            gradient_checkpointing=config.model.gradient_checkpointing, seed=config.seed,
        )  # fmt: skip
        stream = lesson_stream(
            [(name, record) for name, records in own.items() for record in records],
            lambda record: sample(encoder, image_root, record),
            batch_size=settings.batch_size, seed=config.seed,
            complete=completer(model, encoder, config.model.max_new_tokens) if on_policy else None,
        )  # fmt: skip
        module = DistilModule(
            model, _teacher(config, experts), encoder, lr=settings.lr, weight_decay=settings.weight_decay,
            seed=config.seed, steps=steps, warmup_ratio=settings.warmup_ratio, max_grad_norm=settings.max_grad_norm,
            micro_batch_tokens=config.trainer.micro_batch_tokens,
        )  # fmt: skip
        with run.phase("train"):
            metrics = fit(
                module, stream, folder=run.folder, title=f"distil {merged.name}",
                checkpoint_every=settings.checkpoint_every, logger=run.logger, **fit_options(config),
            )  # fmt: skip
        save_adapter(run.folder / "update", model, encoder, taught)
        clean(run.folder, ("model", "exact"))  # left by a try that died after the merge
        ingredients = {"merge": merged.folder / "exact"} if exact else {}
        ingredients["learnt"] = run.folder / "update"
        with run.phase("merge"):
            metrics |= merge_adapters(taught, run.folder / "model", ingredients, {}, task_arithmetic)
            if exact:
                merge_adapters(taught, run.folder / "exact", ingredients, {}, task_arithmetic, exact=True)
            tell_rounding(config, metrics, run.folder)
        if (merged.folder / "adapter").is_dir():
            learnt = replace(LoraAdapter.load(run.folder / "update"), base_fingerprint=None)  # that of the merged model
            parts = [LoraAdapter.load(merged.folder / "adapter"), learnt]
            save_sum(run.folder / "adapter", parts, [1.0, 1.0], base.folder, config)
        way = "completions of its own" if on_policy else "the records' traces"
        adapters = {name: LoraAdapter.load(expert.folder / "adapter") for name, expert in experts.items()}
        for part in ("update", "model", *(part for part in ("adapter", "exact") if (run.folder / part).is_dir())):
            kind, library = held_in(run.folder / part)
            write_card(
                run.folder / part, kind=kind,
                title=f"merged model ({merged.name}), distilled" + (": what it learnt" if part == "update" else ""),
                base_model=config.model.name_or_path, base_fingerprint=fingerprint_base(base.folder), specialty=None,
                method=f"{steps} steps of KL to each expert on its own training records, on {way}",
                data={f"{data.name} ({sum(map(len, own.values()))} training records)":
                      licences([record for records in own.values() for record in records])},
                ingredients={f"merge ({merged.name})": fingerprint_base(merged.folder / "model"),
                             **{name: adapter.fingerprint for name, adapter in adapters.items()}},
                metrics=None, library_name=library,
            )  # fmt: skip
        return metrics

    inputs = {"base": base.identity, "merged": merged.run_id, "data": content_of(data, "train", names)}
    inputs |= {name: expert.run_id for name, expert in experts.items()}
    return stage_run(config, "distil", merged.name, key, work, inputs, sources={"data": data})


def _teacher(config: Config, experts: Mapping[str, Run]) -> PeftModel:
    """The base with every expert's adapter under its name; one of them acts at a time."""
    from peft import PeftModel  # lazily, as models/backbone.py says

    from mmedexpert.models.lean import streamline

    places = {name: expert.folder / "adapter" for name, expert in experts.items()}
    first, *others = places
    model = load_model(base_of(config).folder, loading(config))
    teacher = PeftModel.from_pretrained(model, places[first], adapter_name=first)
    for name in others:
        teacher.load_adapter(places[name], adapter_name=name)
    streamline(teacher)
    return teacher
