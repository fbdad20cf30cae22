"""The GBA module: its log-probabilities are the sampler's, no weights is plain GRPO, and it learns what is rewarded."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mmedexpert.advantages import group_relative
from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.modules.backbone import add_lora
from mmedexpert.modules.fit import fit
from mmedexpert.modules.gba import GbaModule, report, rollout_stream
from mmedexpert.packing import pack, token_logps
from mmedexpert.rollouts import Guidance, Sampling, assign_perspectives, roll_out

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture()
def parts(tiny, picture, tmp_path):
    model, encoder = copy.deepcopy(tiny[0]), tiny[1]
    policy = add_lora(model, r=8, alpha=16, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False, seed=0)
    records = []
    for index in range(3):
        picture(index).save(tmp_path / f"{index}.png")
        records.append(
            Record(
                id=str(index), images=(f"{index}.png",), question="heart rate" + " is low" * index,
                options={"A": "high", "B": "low"}, answer="A", specialties=("x",), source="s", license="l",
                split="train",
                image_group=str(index),
            )
        )  # fmt: skip
    return policy, encoder, records, tmp_path


def sample(parts, *, weights=(0.0, 0.0, 0.0, 0.0), conditioning="prompted", seed=0, group=4, tokens=6):
    policy, encoder, records, root = parts
    return roll_out(
        policy, encoder, records, root, sampling=Sampling(group, tokens, 1.0, 1.0, 0),
        guidance=Guidance(weights, 1.0, "correct", conditioning, "group"), 
        reward_weights={"accuracy": 1.0, "format": 0.2},
        protocol="robust", generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def module(parts, **changes):
    settings = {
        "lr": 0.01, "weight_decay": 0.0, "loss_type": "grpo", "epsilon": 0.2, "epsilon_high": None, "beta": 0.0,
        "temperature": 1.0, "max_completion_length": 6, "mask_truncated_completions": False, "seed": 0, "steps": 10,
        "warmup_ratio": 0.0, "max_grad_norm": 1.0,
    }  # fmt: skip
    return GbaModule(parts[0], parts[1], **{**settings, **changes})


@pytest.mark.parametrize("weights", [(0.0,) * 4, (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)])
def test_update_sees_the_log_probabilities_of_the_sampler(parts, weights):
    policy, encoder = parts[:2]
    rollout = sample(parts, weights=weights, group=8)
    packed = pack(policy, encoder, rollout.prompts, rollout.completions)
    logps = packed.matrix(token_logps(policy, packed)[0], rollout.mask.shape[1])
    assert torch.allclose(logps, rollout.sampling_logps, atol=1e-5)
    assert rollout.advantages.shape == (3, 8)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_micro_batches_change_no_update(parts, tmp_path, loss_type):
    """The same rollout, in one pack and in packs of a few tokens, moves the weights alike; two updates, with KL."""
    for name, parameter in parts[0].named_parameters():  # away from the reference
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    start = copy.deepcopy({n: p.data for n, p in parts[0].named_parameters() if p.requires_grad})
    rollout = sample(parts, weights=(1.0, 1.0, 1.0, 1.0), group=8)
    rollout.advantages = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    ends = []
    for budget in (None, 60):
        for name, parameter in parts[0].named_parameters():
            if name in start:
                parameter.data.copy_(start[name])
        rollout.old_logps = None
        learner = module(parts, steps=2, loss_type=loss_type, beta=0.1, micro_batch_tokens=budget)
        learner.optimizer = lambda: torch.optim.SGD([p for p in parts[0].parameters() if p.requires_grad], lr=1.0)
        folder = tmp_path / str(budget)
        fit(learner, lambda step: itertools.repeat(rollout), folder=folder, checkpoint_every=100, accelerator="cpu")
        ends.append(torch.cat([p.detach().flatten() for n, p in parts[0].named_parameters() if n in start]))
        metrics = {k: float(v) for k, v in learner.trainer.callback_metrics.items()}
        assert metrics["kl"] > 0 and rollout.old_logps is not None
    moved = ends[0] - torch.cat([start[n].flatten() for n, p in parts[0].named_parameters() if n in start])
    assert moved.norm() > 0 and (ends[0] - ends[1]).norm() / moved.norm() <= 1e-5


def test_without_weights_advantages_are_grpo_bit_for_bit(parts):
    rollout = sample(parts)
    assert rollout.perspectives == [None] * 12
    assert torch.equal(rollout.advantages, group_relative(rollout.outcome))


def test_perspectives_are_spread_over_those_with_weight():
    assert assign_perspectives([1, 1, 1, 1], 8, "prompted") == [p for p in PERSPECTIVES for _ in range(2)]
    assert assign_perspectives([1, 0, 0, 1], 4, "prompted") == ["differential"] * 2 + ["bayesian"] * 2
    assert assign_perspectives([1, 1, 1, 0], 8, "prompted").count(None) == 0
    assert assign_perspectives([1, 1, 1, 1], 8, "free") == [None] * 8


def test_report_has_trls_names(parts):
    names = set(report(sample(parts, weights=(1.0, 1.0, 1.0, 1.0), group=8)))
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "completions/mean_length"} <= names
    assert {"reward_std_group", "completions/clipped_ratio", "completions/max_terminated_length"} <= names
    assert {f"advantages/{name}/mean" for name in PERSPECTIVES} <= names


def test_it_learns_to_say_what_is_rewarded(parts, monkeypatch, tmp_path):
    """Reward: the share of one token among those sampled. Ten updates must raise it clearly."""
    _, encoder, records, _ = parts
    wanted = encoder.tokenizer("heart", add_special_tokens=False)["input_ids"][0]

    def share(completions, **_):
        values = [
            sum(t == wanted for t in encoder.tokenizer(c, add_special_tokens=False)["input_ids"]) / 6
            for c in completions
        ]
        return values, {"accuracy": values, "format": values}

    monkeypatch.setattr("mmedexpert.rewards.outcome", share)
    seen = []

    def draw(batch, generator):
        rollout = sample(parts, seed=int(generator.initial_seed() % 2**31), group=16)
        seen.append(float(rollout.outcome.mean()))
        return rollout

    stream = rollout_stream(records, draw, prompts_per_step=3, num_iterations=1, seed=0)
    fit(module(parts, steps=30, lr=0.02), stream, folder=tmp_path, checkpoint_every=100, accelerator="cpu")
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.05, seen


def test_each_rollout_serves_num_iterations_updates(parts):
    calls = []
    stream = rollout_stream(
        parts[2], lambda batch, generator: calls.append([r.id for r in batch]) or len(calls), prompts_per_step=2,
        num_iterations=3, seed=0,
    )  # fmt: skip
    assert list(itertools.islice(stream(0), 7)) == [1, 1, 1, 2, 2, 2, 3]
    again = list(calls)
    calls.clear()
    next(stream(3))
    assert calls == again[1:2]


def test_groups_without_signal_are_replaced_by_other_records(parts):
    """A rollout keeps its size; what moves the policy stays, the rest is sampled again for other records."""
    whole = sample(parts, group=4, tokens=6)
    whole.advantages = torch.tensor([[0.0] * 4, [1.0, -1.0, 0.5, -0.5], [0.0] * 4])
    drawn = []

    def draw(batch, generator):
        drawn.append([record.id for record in batch])
        if len(drawn) == 1:
            return whole
        shorter = sample((*parts[:2], batch, parts[3]), group=4, tokens=4, seed=len(drawn))
        shorter.advantages = torch.zeros(len(batch), 4)
        shorter.advantages[0, 0] = 1.0
        return shorter

    seen = []
    stream = rollout_stream(
        parts[2], draw, prompts_per_step=3, num_iterations=1, seed=0, dynamic_sampling=2,
        watch=lambda number, batch, rollout: seen.append([record.id for record in batch]),
    )  # fmt: skip
    rollout = next(stream(0))
    assert [len(ids) for ids in drawn] == [3, 2, 1]
    assert rollout.outcome.shape == (3, 4) and rollout.mask.shape == rollout.sampling_logps.shape == (12, 6)
    assert len(rollout.completions) == len(rollout.texts) == len(rollout.parts["accuracy"]) == 12
    assert rollout.completions[:4] == whole.completions[4:8] and rollout.informative() == [0, 1, 2]
    assert [int(n) for n in rollout.mask.sum(1)] == [len(words) for words in rollout.completions]
    assert seen[0] == [drawn[0][1], drawn[1][0], drawn[2][0]]
    assert [parts[1].decode(words) for words in rollout.completions] == rollout.texts
