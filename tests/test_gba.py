"""The GBA module: its log-probabilities are the sampler's, no weights is plain GRPO, and it learns what is rewarded."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.models.adapters import LoraAdapter, concatenate_lora
from mmedexpert.models.backbone import add_lora
from mmedexpert.models.lean import start_from_
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.training.advantages import group_relative, guideline_based
from mmedexpert.training.fit import fit
from mmedexpert.training.gba import GbaModule, Objective, rollout_stream
from mmedexpert.training.grading import Grading, RulesGrader
from mmedexpert.training.rollout_report import report
from mmedexpert.training.rollouts import Guidance, Sampling, assign_perspectives, roll_out

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


def sample(
    parts,
    *,
    weights=(0.0, 0.0, 0.0, 0.0),
    conditioning="prompted",
    seed=0,
    group=4,
    tokens=6,
    scale=1.0,
    gate="correct",
    grader=None,
):
    policy, encoder, records, root = parts
    return roll_out(
        policy, encoder, records, root, sampling=Sampling(group, tokens, 1.0, 1.0, 0),
        guidance=Guidance(weights, scale, gate, conditioning, "group"),
        reward_weights={"accuracy": 1.0, "format": 0.2},
        protocol="robust", grader=grader or RulesGrader(),
        seeds=[100 * seed + place for place in range(len(records))],
    )  # fmt: skip


def module(parts, **changes):
    objective = {
        "loss_type": "grpo", "epsilon": 0.2, "epsilon_high": None, "beta": 0.0, "temperature": 1.0,
        "max_completion_length": 6, "mask_truncated_completions": False,
    }  # fmt: skip
    training = {"lr": 0.01, "weight_decay": 0.0, "seed": 0, "steps": 10, "warmup_ratio": 0.0, "max_grad_norm": 1.0}
    objective |= {name: value for name, value in changes.items() if name in objective}
    training |= {name: value for name, value in changes.items() if name not in objective}
    return GbaModule(parts[0], parts[1], Objective(**objective), **training)


@pytest.mark.parametrize("weights", [(0.0,) * 4, (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)])
def test_update_sees_the_log_probabilities_of_the_sampler(parts, weights):
    policy, encoder = parts[:2]
    rollout = sample(parts, weights=weights, group=8)
    packed = pack(policy, encoder, rollout.prompts, rollout.completions)
    logps = packed.matrix(token_logps(policy, packed, banned_ids=encoder.banned_ids)[0], rollout.mask.shape[1])
    assert torch.allclose(logps, rollout.sampling_logps, atol=1e-5)
    assert rollout.advantages.shape == (3, 8)


@pytest.mark.slow
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
    rollout = sample(parts, group=8)
    assert torch.equal(rollout.advantages, group_relative(rollout.outcome))


def test_every_arm_is_asked_the_same_and_only_its_own_terms_differ(parts):
    """One factor an arm: prompts, completions and outcome do not depend on the weights, and no term on another's."""
    arms = {weights: sample(parts, weights=weights, group=8) for weights in itertools.product((0.0, 1.0), repeat=4)}
    whole = arms[1.0, 1.0, 1.0, 1.0]
    assert whole.perspectives == [name for name in PERSPECTIVES for _ in range(2)] * 3
    for weights, rollout in arms.items():
        assert [p.input_ids for p in rollout.prompts] == [p.input_ids for p in whole.prompts]
        assert rollout.texts == whole.texts and rollout.perspectives == whole.perspectives
        assert torch.equal(rollout.outcome, whole.outcome)
        for k, weight in enumerate(weights):
            assert torch.equal(rollout.terms[..., k], weight * whole.terms[..., k])


@pytest.mark.parametrize("gate", ["correct", "none"])
def test_training_calls_the_published_function(parts, monkeypatch, gate):
    """Advantages of a rollout with answers right and wrong are `guideline_based` of its rewards and adherence."""
    rng = torch.Generator().manual_seed(3)
    right = (torch.rand(24, generator=rng) < 0.5).float().tolist()
    style = torch.rand(24, 4, generator=rng)

    def grader(cases):
        asked = torch.tensor([[case.perspective == name for name in PERSPECTIVES] for case in cases])
        return Grading(style.masked_fill(~asked, torch.nan).tolist(), [{}] * len(cases), {})

    monkeypatch.setattr(
        "mmedexpert.training.rewards.outcome", lambda *_, **__: (right, {"accuracy": right, "format": right})
    )
    weights = (1.0, 0.5, 0.0, 2.0)
    rollout = sample(parts, weights=weights, group=8, scale=0.7, gate=gate, grader=grader)
    outcome = torch.tensor(right).view(3, 8)
    wanted = guideline_based(
        outcome, rollout.adherence, weights, scale=0.7, gate=outcome == 1.0 if gate == "correct" else None
    )
    assert torch.equal(rollout.advantages, wanted) and not torch.equal(wanted, group_relative(outcome))
    torch.testing.assert_close(rollout.advantages.sum(1), torch.zeros(3), atol=1e-4, rtol=0)


def test_perspectives_are_spread_over_all_in_every_arm():
    everyone = [p for p in PERSPECTIVES for _ in range(2)]
    for weights in ([1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]):
        assert assign_perspectives(weights, 8, "prompted") == everyone
        assert assign_perspectives(weights, 8, "free") == [None] * 8
    assert assign_perspectives([1, 0, 0, 1], 4, "prompted_weighted") == ["differential"] * 2 + ["bayesian"] * 2
    assert assign_perspectives([0, 0, 0, 0], 4, "prompted_weighted") == [None] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rms", [3e-4, 3e-3])
def test_the_trained_policy_is_the_saved_one_at_any_dtype(tiny, tmp_path, dtype, rms):
    """Start and update put together as GBA trains them, against the adapter it saves: the same update of every weight.

    Baked into bf16 weights a start with B of rms 3e-4 loses most of itself (relative error 0.9).
    """
    rng, starts = torch.Generator().manual_seed(0), []
    for number in range(2):
        expert = add_lora(
            copy.deepcopy(tiny[0]), r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False,
            seed=number,
        )  # fmt: skip
        for name, parameter in expert.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=rms, generator=rng)
        expert.save_pretrained(tmp_path / f"expert{number}")
        starts.append(LoraAdapter.load(tmp_path / f"expert{number}"))
    concatenate_lora(starts, [0.5, 0.5], tmp_path / "start")
    model = copy.deepcopy(tiny[0]).to(dtype)
    plain = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    start_from_(model, LoraAdapter.load(tmp_path / "start"))
    policy = add_lora(
        model, r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False, seed=5
    )  # fmt: skip
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=rms, generator=rng)
    policy.save_pretrained(tmp_path / "update")
    update = LoraAdapter.load(tmp_path / "update")
    assert update.shapes == starts[0].shapes  # the start is no part of what was trained
    concatenate_lora([LoraAdapter.load(tmp_path / "start"), update], [1.0, 1.0], tmp_path / "adapter")
    saved = LoraAdapter.load(tmp_path / "adapter")
    for name in saved.modules:
        layer = policy.get_submodule("base_model.model." + name.removesuffix(".weight"))
        eye = torch.eye(saved.shapes[name][1], dtype=dtype)
        # what the layer does beyond the base's own weight, without the rounding of a sum with that weight
        if dtype == torch.float32:
            acted = layer(eye).detach().T - plain[name]
        else:
            base = layer.base_layer
            acted = ((eye @ base.start_A.T) @ base.start_B.T).T.float() + update.delta(name)
            assert torch.equal(base.weight.float(), plain[name])
        wanted = saved.delta(name)
        assert (acted - wanted).norm() / wanted.norm() < (1e-4 if dtype == torch.float32 else 1e-2), name


def test_the_start_acts_in_bf16(tiny, tmp_path):
    """In bf16 the start's forward pass is that of the fp32 start, as near as the base's own is; with the trained
    adapter off it is still there (the reference of the KL term)."""
    model = copy.deepcopy(tiny[0])
    expert = add_lora(
        copy.deepcopy(model), r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False, seed=0
    )  # fmt: skip
    for name, parameter in expert.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    expert.save_pretrained(tmp_path / "start")
    start = LoraAdapter.load(tmp_path / "start")
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    outs = {}
    for dtype in (torch.float32, torch.bfloat16):
        mine = copy.deepcopy(model).to(dtype)
        plain = mine.model.language_model.layers[0].self_attn.q_proj(hidden.to(dtype)).float()
        start_from_(mine, start)
        policy = add_lora(
            mine, r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False, seed=1
        )  # fmt: skip
        layer = policy.base_model.model.model.language_model.layers[0].self_attn.q_proj
        with policy.disable_adapter():
            off = layer(hidden.to(dtype)).float()
        outs[dtype] = layer(hidden.to(dtype)).float()
        assert torch.equal(off, outs[dtype]) and (off - plain).norm() / plain.norm() > 0.3
        assert {n for n, p in policy.named_parameters() if p.requires_grad and "lora_" not in n} == set()
    assert (outs[torch.bfloat16] - outs[torch.float32]).norm() / outs[torch.float32].norm() < 0.01


def test_report_has_trls_names(parts):
    names = set(report(sample(parts, weights=(1.0, 1.0, 1.0, 1.0), group=8)))
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy/mean", "completions/mean_length"} <= names
    assert {"reward_std_group", "completions/clipped_ratio", "completions/max_terminated_length"} <= names
    assert {f"advantages/{name}/mean" for name in PERSPECTIVES} <= names


def test_the_terms_share_of_the_advantage_is_told(parts):
    """None without scale; with it the size of the terms against that of the whole."""
    plain = sample(parts, weights=(1.0, 1.0, 1.0, 1.0), group=8, scale=0.0)
    assert report(plain)["advantages/share"] == 0.0
    plain.terms = torch.tensor([0.5, -0.5, 0.0, 0.25]).expand_as(plain.terms)
    plain.advantages = torch.ones_like(plain.advantages)
    assert report(plain)["advantages/share"] == pytest.approx(0.25)


@pytest.mark.slow
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

    monkeypatch.setattr("mmedexpert.training.rewards.outcome", share)
    seen = []

    def draw(batch, seeds):
        rollout = sample(parts, seed=seeds[0] % 2**31, group=16)
        seen.append(float(rollout.outcome.mean()))
        return rollout

    stream = rollout_stream(records, draw, prompts_per_step=3, num_iterations=1, seed=0)
    fit(module(parts, steps=30, lr=0.02), stream, folder=tmp_path, checkpoint_every=100, accelerator="cpu")
    assert sum(seen[-5:]) / 5 > sum(seen[:5]) / 5 + 0.05, seen


def test_each_rollout_serves_num_iterations_updates(parts):
    calls = []
    stream = rollout_stream(
        parts[2], lambda batch, seeds: calls.append([r.id for r in batch]) or len(calls), prompts_per_step=2,
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

    def draw(batch, seeds):
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


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_modules_update_is_of_the_distribution_that_was_sampled(parts, tmp_path, temperature):
    """The random policy gives image tokens a percent or more; the sampler bans them, and so must the update."""
    policy, encoder, records, root = parts
    rollout = roll_out(
        policy, encoder, records, root, sampling=Sampling(8, 6, temperature, 1.0, 0),
        guidance=Guidance((1.0,) * 4, 1.0, "correct", "prompted", "group"), reward_weights={"accuracy": 1.0},
        protocol="robust", grader=RulesGrader(), seeds=range(len(records)),
    )  # fmt: skip
    packed = pack(policy, encoder, rollout.prompts, rollout.completions)
    plain = packed.matrix(token_logps(policy, packed, temperature)[0], rollout.mask.shape[1])
    assert (plain - rollout.sampling_logps).abs().max() > 1e-3
    learner = module(parts, steps=1, temperature=temperature)
    fit(learner, lambda step: itertools.repeat(rollout), folder=tmp_path, checkpoint_every=100, accelerator="cpu")
    assert float(learner.trainer.callback_metrics["sampling/sampling_logp_difference/max"]) < 1e-5
