"""What GBA does to a model that answers: it gets better; and the settings whose traces only a whole run shows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from plain import Plain, conversation, deltas
from safetensors.torch import load_file

from mmedexpert.data.records import load_records
from mmedexpert.models import generate as generating
from mmedexpert.stages import dsa, gba
from mmedexpert.stages import policy as policies
from mmedexpert.stages.data import dataset
from mmedexpert.training import gba as gba_module
from mmedexpert.training import rollouts


def watch_rollouts(patch: pytest.MonkeyPatch) -> list[Any]:
    """Every call of `roll_out` from now on: (policy's weights, records, rollout)."""
    seen: list[Any] = []
    roll_out = policies.roll_out

    def watched(policy: Any, encoder: Any, records: Any, image_root: Any, **options: Any) -> Any:
        weights = {
            name.removeprefix("base_model.model.")
            .replace(".base_layer.", ".")
            .replace(".default.", "."): p.detach().clone()
            for name, p in policy.named_parameters()
        }
        seen.append((weights, list(records), roll_out(policy, encoder, records, image_root, **options)))
        return seen[-1][2]

    patch.setattr(policies, "roll_out", watched)
    return seen


def test_sampled_answers_get_clearly_better(answering):
    """Twenty steps from the base, which answers rightly about half of the time."""
    config = answering(
        "gba.init=base", "gba.steps=20", "gba.prompts_per_step=6", "gba.lr=0.01", "gba.warmup_ratio=0.1",
        "gba.checkpoint_every=100",
    )  # fmt: skip
    (run,) = gba.run(config).values()
    rows = [json.loads(line) for line in (run.folder / "curve.jsonl").read_text().splitlines()]
    first, last = (sum(row["accuracy"] for row in part) / 6 for part in (rows[:6], rows[-6:]))
    assert 0.2 < first < 0.7 and last > first + 0.1, [row["accuracy"] for row in rows]
    assert run.metrics["accuracy/end"] > run.metrics["accuracy/start"]


@pytest.fixture(scope="module")
def odd(answering):
    """Two steps from the base, of a thin adapter, where SFT would drop half of it."""
    config = answering(
        "gba.init=base", "gba.steps=2", "gba.lr=0.05", "gba.warmup_ratio=0", "model.lora.dropout=0.5",
        "model.lora.r=2", "model.lora.alpha=6", "model.lora.target_modules='.*layers.1.*(q_proj|down_proj)'",
        "gba.num_generations=16", "model.gradient_checkpointing=true",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_rollouts(patch)
        (run,) = gba.run(config).values()
    return config, run, seen


def test_what_sft_drops_is_dropped_neither_in_the_update_nor_while_sampling(odd):
    config, run, seen = odd
    plain = Plain(config.model.name_or_path, load_records(dataset(config).folder)[1])
    weights, records, rollout = seen[1]  # the adapter is no longer zero
    update = {
        name.replace("lora_A.weight", "weight"): 3.0 * weights[name.replace("_A", "_B")] @ a
        for name, a in weights.items()
        if "lora_A" in name
    }
    asked = [(records[row // 16], told) for row, told in enumerate(rollout.perspectives)]
    banned = plain.tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    )
    logps = plain.logps(plain.changed(update), asked, rollout.completions, banned=banned)
    torch.testing.assert_close(rollout.sampling_logps, logps, rtol=1e-3, atol=1e-3)
    assert run.metrics["sampling/sampling_logp_difference/mean"] < 1e-4  # 1e-2 with dropout
    assert sum(float(d.norm()) for d in update.values()) > 0.1


def test_the_adapter_is_as_wide_as_the_config_says_and_where_it_says(odd):
    _, run, _ = odd
    tensors = load_file(run.folder / "update" / "adapter_model.safetensors")
    names = {key.removeprefix("base_model.model.model.language_model.").rpartition(".lora_")[0] for key in tensors}
    assert names == {"layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"}
    assert {min(t.shape) for t in tensors.values()} == {2}


def test_from_the_base_means_from_the_base(odd):
    config, run, seen = odd
    plain = Plain(config.model.name_or_path, dataset(config).folder)
    for name, weight in plain.weights.items():
        assert torch.equal(seen[0][0][name], weight)
    saved = {part: deltas(run.folder / part) for part in ("update", "adapter")}
    for name, delta in saved["update"].items():
        torch.testing.assert_close(saved["adapter"][name], delta, rtol=1e-5, atol=1e-7)


def test_each_expert_is_the_start_of_a_reasoner_of_its_own_specialty(answering):
    config = answering("gba.init=each", "specialty.names=[pediatrics,brain_sensory]", "dsa.lr=0.02", "gba.steps=1")
    experts = dsa.run(config)
    plain = Plain(config.model.name_or_path, dataset(config).folder)
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_rollouts(patch)
        runs = gba.run(config)
    assert list(runs) == ["reasoner-pediatrics", "reasoner-brain_sensory"]
    for name, (weights, records, _) in zip(config.specialty.names, seen, strict=True):
        assert {record.id.rpartition("-")[0] for record in records} == {f"{name}-train"}
        for weight, delta in deltas(experts[name].folder / "adapter").items():
            torch.testing.assert_close(weights[weight], plain.weights[weight] + delta, rtol=1e-5, atol=1e-6)


def test_precision_refills_protocol_and_system_prompt_reach_the_bottom(answering):
    """bf16 while training, three refills, the other protocol's verdict, and a system turn before the question."""
    config = answering(
        "gba.init=base", "gba.steps=1", "trainer.precision=bf16-mixed", "gba.dynamic_sampling=3",
        "reward.protocol=medevalkit", "model.system_prompt='Be brief.'", "gba.prompts_per_step=4",
    )  # fmt: skip
    computed, protocols, prompts = [], set(), []
    with pytest.MonkeyPatch.context() as patch:
        seen, policy_loss, generate = watch_rollouts(patch), gba_module.token_logps, generating.generate
        outcome = rollouts.rewards.outcome

        def logps(*args: Any, **options: Any) -> Any:
            computed.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return policy_loss(*args, **options)

        def paid(texts: Any, *, protocol: str, **options: Any) -> Any:
            protocols.add(protocol)
            total, parts = outcome(texts, protocol=protocol, **options)
            # all of the first two groups are alike, so that these are refilled
            calm = [0.0 if len(seen) == 0 and row < 16 else float(row % 2) for row in range(len(total))]
            return calm, parts | {"accuracy": [0.0] * len(calm)}

        def sampled(model: Any, encoder: Any, asked: Any, **options: Any) -> Any:
            prompts.extend(encoder.tokenizer.decode(prompt.input_ids) for prompt in asked)
            return generate(model, encoder, asked, **options)

        patch.setattr(gba_module, "token_logps", logps)
        patch.setattr(rollouts.rewards, "outcome", paid)
        patch.setattr(generating, "generate", sampled)
        gba.run(config)
    assert set(computed) == {(True, torch.bfloat16)} and protocols == {"medevalkit"}
    assert [len(records) for _, records, _ in seen] == [4, 2]
    turn = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert prompts[0] == turn + conversation(seen[0][1][0], "differential")
