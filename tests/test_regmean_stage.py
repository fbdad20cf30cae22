"""stage=caci with Gram matrices, and with distillation, on a model that answers: against plain torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import long
from plain import Plain, Weights, added, conversation, deltas
from recording import watch_steps
from safetensors.torch import load_file
from test_regmean import least_squares
from torch import Tensor
from transformers import AutoModelForImageTextToText

from mmedexpert.data.record import Record
from mmedexpert.data.records import load_records
from mmedexpert.errors import UserError
from mmedexpert.schema import Config
from mmedexpert.stages import caci, dsa, gba
from mmedexpert.stages.before import check_inputs
from mmedexpert.stages.data import dataset
from mmedexpert.training import sft

NAMES = ["pediatrics", "oncology_surgery", "brain_sensory"]
TRAINED = [f"specialty.names=[{','.join(NAMES)}]", "dsa.lr=0.02", "gba.lr=0.01", "gba.warmup_ratio=0"]
REGMEAN = [*TRAINED, "merge=regmean", "merge.gram_records=5", "merge.method.ridge=0.01"]
LAYERS = [f"model.language_model.layers.{place}.weight" for place in ("0.self_attn.q_proj", "1.mlp.down_proj")]


def weights_of(folder: Path) -> Weights:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    return {name: p.detach() for name, p in model.named_parameters()}


def plain_of(config: Config) -> Plain:
    return Plain(Path(str(config.model.name_or_path)), load_records(dataset(config).folder)[1])


def said(plain: Plain, record: Record) -> list[int]:
    assert record.trace is not None
    text = f"<think>{' '.join(record.trace.steps)}</think><answer>{record.answer}</answer><|im_end|>"
    return plain.ids(text)


def activations(plain: Plain, update: Weights, records: list[Record]) -> dict[str, Tensor]:
    """The inputs [in, tokens] of two layers under an update, by a hook on stock transformers, a record at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    handles = [
        plain.model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, x, name=name: seen[name].append(x[0][0, :-1])
        )
        for name in LAYERS
    ]
    for record in records:
        assert record.trace is not None
        plain.logps(plain.changed(update), [(record, record.trace.perspective)], [said(plain, record)])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).T.double() for name, parts in seen.items()}


class Merged:
    """A merge with what it was made of; `records` are those whose inputs were measured, by expert."""

    def __init__(self, answering: Any, *overrides: str) -> None:
        self.config: Config = answering(*REGMEAN, *overrides)
        self.records: dict[str, list[Record]] = {name: [] for name in NAMES}
        experts, (reasoner,) = dsa.run(self.config), gba.run(self.config).values()
        with pytest.MonkeyPatch.context() as patch:
            sample = sft.sample

            def watched(encoder: Any, image_root: Any, record: Record) -> Any:
                self.records[record.specialties[0]].append(record)
                return sample(encoder, image_root, record)

            patch.setattr("mmedexpert.training.sft.sample", watched)
            (self.run,) = caci.run(self.config).values()
        self.experts = [deltas(experts[name].folder / "adapter") for name in NAMES]
        self.update = deltas(reasoner.folder / "update")
        self.plain = plain_of(self.config)


@pytest.fixture(scope="module", params=[pytest.param("full", marks=long), "span"])
def merged(request, answering) -> Merged:
    return Merged(answering, f"merge.grams={request.param}")


@pytest.fixture(scope="module")
def seen(merged) -> list[dict[str, Tensor]]:
    """The inputs under each expert."""
    return [
        activations(merged.plain, update, merged.records[name])
        for name, update in zip(NAMES, merged.experts, strict=True)
    ]


def span_of(merged: Merged, name: str, updates: list[Weights]) -> Tensor:
    """Orthonormal directions [in, d]: of all inputs, or of the rows of updates."""
    if merged.config.merge.grams == "full":
        return torch.eye(updates[0][name].shape[1]).double()
    _, s, vh = torch.linalg.svd(torch.cat([u[name] for u in updates]).double(), full_matrices=False)
    return vh[s > 1e-6 * s.max()].T


def test_training_records_of_the_specialty_alone_are_read_each_once(merged):
    for name, records in merged.records.items():
        ids = [record.id for record in records]
        assert len(set(ids)) == len(ids) == 5
        assert {i.rpartition("-")[0] for i in ids} == {f"{name}-train"}


def test_the_merge_is_least_squares_on_the_experts_own_activations(merged, seen):
    base, found = merged.plain.weights, weights_of(merged.run.folder / "model")
    for name in LAYERS:
        v = span_of(merged, name, merged.experts)
        tasks = [one[name].double() @ v for one in merged.experts]
        wanted = least_squares(tasks, [v.T @ x[name] for x in seen], [1.0] * 3, 0.01) @ v.T
        off = found[name] - base[name] - merged.update[name] - wanted
        assert float(off.norm()) < 2e-3 * float(wanted.norm()), name
        mean = sum(one[name] for one in merged.experts).double() / 3
        assert float((wanted - mean).norm()) > 0.015 * float(mean.norm())  # so it is told from a mean
    assert all(torch.equal(found[name], weight) for name, weight in base.items() if name not in merged.update)


def test_interference_stands_in_the_report_with_its_meaning(merged, seen):
    rows = {row["tensor"]: row for row in csv.DictReader((merged.run.folder / "conflicts.csv").open())}
    base, found = merged.plain.weights, weights_of(merged.run.folder / "model")
    for name in LAYERS:
        v = span_of(merged, name, [*merged.experts, merged.update])
        for who, one, x in zip(NAMES, merged.experts, seen, strict=True):
            inside = v @ (v.T @ x[name])
            apart = (found[name] - base[name] - one[name]).double()
            wanted = float((apart @ inside).square().sum() / (one[name].double() @ inside).square().sum())
            assert float(rows[name][f"expert/{who}/interference"]) == pytest.approx(wanted, rel=0.02)
    content = json.loads((merged.run.folder / "conflicts.json").read_text())
    assert "own training records" in content["columns"]["<update>/interference"]
    assert 0 < content["all"]["interference"] == merged.run.metrics["interference"] < 2
    assert "layers/0/q_proj/interference" in merged.run.metrics


def test_another_ridge_reads_no_record_again_and_another_count_does(answering, merged):
    kind = f"merge.grams={merged.config.merge.grams}"
    assert sum(map(len, Merged(answering, kind, "merge.method.ridge=0.2").records.values())) == 0
    assert sum(map(len, Merged(answering, kind, "merge.gram_records=4").records.values())) == 12
    more = Merged(answering, kind, "merge.gram_records=1000")
    assert sum(map(len, more.records.values())) == 24  # all there are


def test_any_rule_tells_its_interference_where_inputs_are_measured(answering):
    config = answering(*TRAINED, "merge=ties", "merge.grams=full", "merge.gram_records=5")
    (run,) = caci.run(config).values()
    assert run.metrics["interference"] > 0
    (plain,) = caci.run(answering(*TRAINED, "merge=ties")).values()
    assert "interference" not in plain.metrics
    for name, weight in weights_of(plain.folder / "model").items():
        assert torch.equal(weights_of(run.folder / "model")[name], weight)


# --- distillation ----------------------------------------------------------------------------------------------------

DISTIL = [*TRAINED, "merge=linear", "merge.distil_steps=4", "dsa.checkpoint_every=3"]


@pytest.mark.parametrize("on_policy", [False, True])
def test_every_step_applies_the_gradient_of_the_kl_to_the_expert_of_its_record(answering, on_policy):
    config = answering(*DISTIL, f"merge.distil_on_policy={on_policy}", "trainer.micro_batch_tokens=100")
    encoded: list[Record] = []
    with pytest.MonkeyPatch.context() as patch:
        experts = dsa.run(config)
        gba.run(config)
        sample, steps = sft.sample, watch_steps(patch)

        def watched(encoder: Any, image_root: Any, record: Record) -> Any:
            encoded.append(record)
            return sample(encoder, image_root, record)

        patch.setattr("mmedexpert.training.sft.sample", watched)
        (run,) = caci.run(config).values()
    assert len(steps) == 4 and run.stage == "distil"
    merge = next(run.folder.parent.parent.glob("caci/linear-*/model"))
    plain = plain_of(config)
    start = {name: weight - plain.weights[name] for name, weight in weights_of(merge).items()}
    taught = {name: deltas(experts[name].folder / "adapter") for name in NAMES}
    seen = set()
    for number, step in enumerate(steps):
        factors = {name: p.clone().requires_grad_() for name, p in step.before.items()}
        learnt = {
            name.replace("lora_A.weight", "weight"): 2.0 * factors[name.replace("_A", "_B")] @ a
            for name, a in factors.items()
            if "lora_A" in name
        }
        total = torch.zeros(())
        completions = step.batch.completions
        chosen = encoded[4 * number : 4 * number + 4]
        for record, prompt, words, who in zip(
            chosen, step.batch.prompts, completions, step.batch.teachers, strict=True
        ):
            assert record.trace and record.split == "train" and record.specialties == (who,)
            assert plain.tokenizer.decode(prompt.input_ids) == conversation(record, record.trace.perspective)
            seen.add(who)
            if not on_policy:
                assert words == said(plain, record)
            logits = []
            for update in (added(start, learnt), taught[who]):
                ids = torch.tensor([[*prompt.input_ids, *words]])
                batch = plain._batch([ids[0].tolist()], [plain.image_root / record.images[0]], left=False)
                out = torch.func.functional_call(
                    plain.model, plain.changed(update), kwargs={**batch, "use_cache": False}
                )
                logits.append(out.logits[0, len(prompt.input_ids) - 1 : -1].float().log_softmax(-1))
            student, teacher = logits[0], logits[1].detach()
            total = total + (teacher.exp() * (teacher - student)).sum()
        loss = total / sum(map(len, completions))
        loss.backward()
        wanted = {name: p.grad for name, p in factors.items()}
        size = sum(float(g.square().sum()) for g in wanted.values()) ** 0.5
        share = min(1.0, config.dsa.max_grad_norm / size)
        off = sum(float((step.applied[n] - share * g).square().sum()) for n, g in wanted.items()) ** 0.5
        assert off < 0.02 * share * size
    assert run.metrics["kl"] == pytest.approx(float(loss), rel=1e-2)
    assert len(seen) == 3
    last = {
        name.replace("lora_A.weight", "weight"): 2.0 * steps[-1].after[name.replace("_A", "_B")] @ a
        for name, a in steps[-1].after.items()
        if "lora_A" in name
    }
    found = weights_of(run.folder / "model")
    for name, weight in weights_of(merge).items():
        wanted = weight + last[name] if name in last else weight
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)


def test_distillation_lowers_the_kl(answering):
    """From the base itself, which a merge of scaling 0 is."""
    config = answering(*TRAINED, "merge=task_arithmetic", "merge.method.scaling=0", "merge.distil_steps=30")
    with pytest.MonkeyPatch.context() as patch:
        dsa.run(config)
        gba.run(config)
        steps = watch_steps(patch)
        (run,) = caci.run(config).values()
    curve = [step.logged["kl"] for step in steps[1:]]  # what is logged there is of the step before
    assert run.metrics["kl"] < 0.5 * curve[0] and sum(curve[-5:]) < 0.5 * sum(curve[:5])


@pytest.mark.parametrize("on_policy", [pytest.param(False, marks=long), True])
def test_a_killed_distillation_goes_on_to_the_same_bits(answering, on_policy, monkeypatch):
    policy = f"merge.distil_on_policy={on_policy}"
    whole = answering(*DISTIL, policy, "dsa.weight_decay=0.01")
    (wanted,) = caci.run(whole).values()
    bits = load_file(wanted.folder / "model" / "model.safetensors")
    (wanted.folder / "DONE").unlink()
    for part in ("model", "update"):
        for path in (wanted.folder / part).iterdir():
            path.unlink()
        (wanted.folder / part).rmdir()
    from mmedexpert.training.distil import DistilModule

    step, done = DistilModule.training_step, []

    def killed(self: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 3 and not done:
            done.append(True)
            raise KeyboardInterrupt
        done.append(self.global_step) if done else None
        step(self, batch, batch_idx)

    monkeypatch.setattr(DistilModule, "training_step", killed)
    with pytest.raises(KeyboardInterrupt):
        caci.run(whole)
    assert (wanted.folder / "last.ckpt").exists() and not (wanted.folder / "model").exists()
    (again,) = caci.run(whole).values()
    assert done == [True, 3]  # one step was left to do
    found = load_file(again.folder / "model" / "model.safetensors")
    assert found.keys() == bits.keys() and all(torch.equal(found[name], bits[name]) for name in bits)


def test_without_steps_nothing_is_taught(answering):
    (run,) = caci.run(answering(*TRAINED, "merge=linear")).values()
    assert run.stage == "caci"


# --- RL after the merge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 3])
def test_gba_starts_from_the_experts_merge_and_what_it_was_taught(answering, steps):
    """Its start is the rule on the experts alone, then distilled; the pipeline's model is start and RL update."""
    config = answering(*REGMEAN, "gba.init=caci", f"merge.distil_steps={steps}")
    start, (reasoner,), (run,) = gba.start(config), gba.run(config).values(), caci.run(config).values()
    assert start is not None and reasoner.manifest["inputs"]["start"] == start.run_id
    plain, begun = plain_of(config), deltas(start.folder / "adapter")
    for name, weight in weights_of(start.folder / "model").items():
        torch.testing.assert_close(weight, plain.weights[name] + begun.get(name, 0.0), rtol=1e-4, atol=1e-5)
    update, found = deltas(reasoner.folder / "update"), weights_of(run.folder / "model")
    for name, weight in plain.weights.items():
        wanted = weight + begun[name] + update[name] if name in begun else weight
        torch.testing.assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
    (alone,) = caci.run(answering(*REGMEAN)).values()  # the same rule, with a reasoner that began at the mean
    rl = deltas(next(iter(gba.run(answering(*REGMEAN)).values())).folder / "update")
    name = LAYERS[0]
    merge = weights_of(alone.folder / "model")[name] - plain.weights[name] - rl[name]
    assert (float((begun[name] - merge).norm()) < 1e-3 * float(merge.norm())) == (steps == 0)
    assert float(update[name].norm()) > 1e-3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gba.init=caci", "merge=ties"], ["gba.init=caci", "merge=ties", "regmean"]),
        (["merge=regmean", "merge.grams=null"], ["merge=regmean", "merge.grams=full"]),
    ],
)
def test_a_merge_that_cannot_be_is_told_before_training(answering, overrides, words):
    with pytest.raises(UserError) as caught:
        check_inputs(answering(*TRAINED, "stage=caci", "data.source.val=8", *overrides))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["gba.init=caci", "merge=none"], ["gba.init=caci", "merge"]),
        (["gba.init=caci", "merge=regmean", "merge.search={ridge: [0.1]}"], ["merge.search=null"]),
        (["merge.grams=spam"], ["merge.grams", "span"]),
        (["merge.gram_records=0"], ["merge.gram_records"]),
        (["merge.distil_steps=-1"], ["merge.distil_steps"]),
        (["merge=regmean", "merge.method.expert_weights=[1,2]"], ["2 numbers for 3 updates"]),
    ],
)
def test_bad_values_are_told(answering, overrides, words):
    with pytest.raises(UserError) as caught:
        answering(*TRAINED, *overrides)
    assert all(word in str(caught.value) for word in words)
