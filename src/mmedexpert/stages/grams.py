"""Gram matrices of each expert's inputs: what `merge.grams` asks for, one run per expert, used by any merge of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from mmedexpert.errors import UserError
from mmedexpert.guidelines import instructions
from mmedexpert.merging.collect import collect
from mmedexpert.merging.grams import Grams
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import load_encoder, load_model
from mmedexpert.models.encode import Prompt
from mmedexpert.runtime.runs import Run
from mmedexpert.runtime.versions import digest, versions
from mmedexpert.schema import Config
from mmedexpert.stages.common import content_of, loading, model_key, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import base_of
from mmedexpert.training.batches import batch_indices


def grams(config: Config, experts: Mapping[str, Run], reasoners: Mapping[str, Run]) -> dict[str, Run]:
    """For each expert the run whose `<folder>/grams` holds its Gram matrices; none without `merge.grams`."""
    if config.merge.grams is None:
        return {}
    others = {**experts, **reasoners} if config.merge.grams == "span" else {}
    return {name: _of_expert(config, name, expert, others) for name, expert in experts.items()}


def opened(config: Config, runs: Mapping[str, Run]) -> Grams | None:
    """The Gram matrices of these runs, to merge with; None without any."""
    folders = [run.folder / "grams" for run in runs.values()]
    return Grams.load(folders, spanned=config.merge.grams == "span") if folders else None


def _of_expert(config: Config, name: str, expert: Run, others: Mapping[str, Run]) -> Run:
    """The inputs under one expert on its own records; in the span of the factors of `others`, in their order."""
    base, data = base_of(config), dataset(config)

    def work(run: Run) -> dict[str, float]:
        from mmedexpert.training.sft import sample  # Lightning, which takes seconds

        records, image_root = records_of(data, "train", [name])
        count = min(config.merge.gram_records, len(records))
        chosen = [records[i] for i in next(batch_indices(len(records), count, config.seed, 0))]
        encoder, model = load_encoder(base.folder, loading(config)), load_model(base.folder, loading(config))
        adapter = LoraAdapter.load(expert.folder / "adapter")
        if any(".visual." in weight for weight in adapter.shapes):
            raise UserError(
                "merge.grams measures the language model's layers, and model.lora.target_modules reaches the vision "
                "tower: leave it out, or merge with merge.grams=null and another rule than regmean"
            )
        from mmedexpert.models.lean import start_from_  # lazily, as models/backbone.py says

        start_from_(model, adapter)
        updates = [LoraAdapter.load(_update(other)) for other in others.values()]

        def samples() -> Iterator[tuple[Prompt, list[int]]]:
            return (sample(encoder, image_root, record) for record in chosen)

        def stack(weight: str) -> torch.Tensor:
            return torch.cat([update.factors(weight)[0] for update in updates if weight in update.shapes])

        widths = {weight: shape[1] for weight, shape in adapter.shapes.items()}
        with run.phase("collect"):
            collect(
                model, encoder, samples, count, widths, stack if others else None, run.folder / "grams",
                title=f"grams {name}",
            )  # fmt: skip
        return {"records": float(count), "layers": float(len(widths))}

    key = {
        "records": config.merge.gram_records,
        "space": config.merge.grams,
        "model": model_key(config),
        "rules": versions("prompts", "batches", "grams"),
        "instructions": digest(instructions(config.model.instructions)),
    }
    inputs = {"base": base.identity, "data": content_of(data, "train", [name]), "expert": expert.run_id}
    inputs |= {f"span/{place}": other.run_id for place, other in enumerate(others.values())}
    return stage_run(config, "grams", name, key, work, inputs)


def _update(run: Run) -> Path:
    """The adapter that is merged of an expert, or of a reasoner."""
    update = run.folder / "update"
    return update if update.is_dir() else run.folder / "adapter"
