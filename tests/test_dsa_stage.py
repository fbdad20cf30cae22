"""stage=dsa on a model that answers, number by number: which records are taught, what is scored, what is learnt."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from plain import Plain, conversation, cosine_schedule, deltas
from recording import Step, adamw, norm, watch_steps

from mmedexpert.data.record import Record
from mmedexpert.data.records import load_records
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import dsa
from mmedexpert.stages.data import dataset
from mmedexpert.training import sft


@dataclass
class Taught:
    config: Config
    run: Run
    records: list[list[Record]]  # of each step
    steps: list[Step]
    plain: Plain


@pytest.fixture(scope="module")
def taught(answering) -> Taught:
    """One expert with every setting unlike the default."""
    config = answering(
        "specialty.names=[pediatrics]", "seed=5", "dsa.steps=5", "dsa.batch_size=3", "dsa.lr=0.03",
        "dsa.warmup_ratio=0.4", "dsa.weight_decay=0.2", "dsa.max_grad_norm=0.2", "model.lora.r=3",
        "model.lora.alpha=9", "trainer.micro_batch_tokens=100",
    )  # fmt: skip
    encoded: list[Record] = []
    with pytest.MonkeyPatch.context() as patch:
        sample = sft.sample

        def watched(encoder: Any, image_root: Any, record: Record) -> Any:
            encoded.append(record)
            return sample(encoder, image_root, record)

        patch.setattr(sft, "sample", watched)
        steps = watch_steps(patch)
        (run,) = dsa.run(config).values()
    batches = [encoded[i : i + 3] for i in range(0, len(encoded), 3)][: len(steps)]
    return Taught(
        config, run, batches, steps, Plain(config.model.name_or_path, load_records(dataset(config).folder)[1])
    )


def completion(plain: Plain, record: Record) -> list[int]:
    assert record.trace is not None
    text = f"<think>{' '.join(record.trace.steps)}</think><answer>{record.answer}</answer><|im_end|>"
    return plain.ids(text)


def loss(taught: Taught, records: list[Record], update: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean over all tokens of the completions, and over no other, of the negative log-probability."""
    said = [completion(taught.plain, record) for record in records]
    asked = [(record, record.trace.perspective) for record in records if record.trace]
    return -taught.plain.logps(taught.plain.changed(update), asked, said).sum() / sum(map(len, said))


def update_of(taught: Taught, factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """alpha / r * B A, with 9 / 3."""
    return {
        name.replace("lora_A.weight", "weight"): 3.0 * factors[name.replace("_A", "_B")] @ a
        for name, a in factors.items()
        if "lora_A" in name
    }


def test_the_training_records_of_the_specialty_alone_are_taught_each_once_an_epoch(taught):
    ids = [record.id for batch in taught.records for record in batch]
    assert len(taught.steps) == 5 and all(len(batch) == 3 for batch in taught.records)
    assert sorted(ids[:8]) == [f"pediatrics-train-{i:03d}" for i in range(8)] != ids[:8]
    assert {i.rpartition("-")[0] for i in ids} == {"pediatrics-train"} and ids[:3] != ids[8:11]


def test_a_sample_is_the_prompt_of_its_perspective_and_the_trace_with_its_answer(taught):
    for batch, step in zip(taught.records, taught.steps, strict=True):
        decode = taught.plain.tokenizer.decode
        for record, prompt, said in zip(batch, step.batch.prompts, step.batch.completions, strict=True):
            assert decode(prompt.input_ids) == conversation(record, record.trace.perspective)
            assert said == completion(taught.plain, record)
            assert re.fullmatch(r"<think>.+</think><answer>[ABCD]</answer><\|im_end\|>", decode(said))
        assert step.batch.scored is None  # the completion's tokens, all of them


def test_every_step_applies_the_gradient_of_the_completions_loss(taught):
    clipped, sizes = 0, []
    for batch, step in zip(taught.records, taught.steps, strict=True):
        factors = {name: p.clone().requires_grad_() for name, p in step.before.items()}
        value = loss(taught, batch, update_of(taught, factors))
        value.backward()
        wanted = {name: p.grad for name, p in factors.items()}
        size = norm(wanted)
        clipped += size > 0.2
        sizes.append(size)
        share = min(1.0, 0.2 / size)
        assert norm({name: step.applied[name] - share * g for name, g in wanted.items()}) < 0.01 * share * size
    assert 1 <= clipped < 5, sizes
    assert taught.run.metrics["loss"] == pytest.approx(float(value), rel=1e-3)


def test_rates_warm_up_and_fall_and_steps_are_adamws(taught):
    rates = [cosine_schedule(n, steps=5, warmup=2, lr=0.03) for n in range(5)]
    assert [step.rate for step in taught.steps] == pytest.approx(rates)
    for step, after in zip(taught.steps, adamw(taught.steps, weight_decay=0.2), strict=True):
        for name, value in after.items():
            torch.testing.assert_close(step.after[name], value, rtol=1e-4, atol=1e-6)


def test_the_saved_expert_is_what_was_trained(taught):
    saved, last = deltas(taught.run.folder / "adapter"), update_of(taught, taught.steps[-1].after)
    assert saved.keys() == last.keys() and len(saved) == 14
    for name, wanted in last.items():
        torch.testing.assert_close(saved[name], wanted, rtol=1e-4, atol=1e-6)
    assert taught.steps[0].before["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 3


def test_another_seed_is_another_order_and_another_start(taught, answering):
    with pytest.MonkeyPatch.context() as patch:
        steps = watch_steps(patch)
        dsa.run(
            answering("specialty.names=[pediatrics]", "seed=6", "dsa.steps=1", "dsa.batch_size=3", "model.lora.r=3")
        )
    decode = taught.plain.tokenizer.decode
    first = [[decode(said) for said in one[0].batch.completions] for one in (steps, taught.steps)]
    assert first[0] != first[1]
    name = "model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    assert not torch.equal(steps[0].before[name], taught.steps[0].before[name])


def test_the_loss_of_records_never_taught_falls(answering, taught):
    """Twenty steps on the answering model: the traces always answer rightly, which it does half of the time."""
    many = ["data.source.train=60", "data.source.val=20", "dsa.steps=20", "dsa.batch_size=8", "dsa.lr=0.002"]
    config = answering("specialty.names=[brain_sensory]", *many)
    (run,) = dsa.run(config).values()
    records, image_root = load_records(dataset(config).folder)
    taught = replace(taught, plain=Plain(config.model.name_or_path, image_root))
    held_out = [r for r in records if r.split == "val" and r.specialties == ("brain_sensory",)]
    with torch.no_grad():
        before, after = (float(loss(taught, held_out, one)) for one in ({}, deltas(run.folder / "adapter")))
    assert len(held_out) == 20 and after < 0.9 * before
