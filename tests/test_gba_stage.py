"""stage=gba on a model that answers, number by number: what the config says is what is sampled, paid and learnt.

Two arms (gba_arms.py) are run once and written down; each test compares a part of them with plain torch (plain.py).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from gba_arms import ARMS, Arm, Sampled, trained
from plain import added, conversation, cosine_schedule, deltas, scaled
from recording import adamw, norm

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.rubrics import adherence
from mmedexpert.scoring import score_choice
from mmedexpert.stages import gba
from mmedexpert.stages import policy as policies
from mmedexpert.stages.pretrain import base_of
from mmedexpert.stages.reasoner_key import reasoner_key


@pytest.fixture(scope="module", params=list(ARMS))
def arm(request, answering) -> Arm:
    return trained(request.param, answering)


def test_only_training_questions_of_the_specialty_are_asked_each_once_an_epoch(arm):
    ids = [record.id for one in arm.sampled for record in one.records]
    known = {f"{name}-train-{i:03d}" for name in arm.config.specialty.names for i in range(8)}
    assert set(ids) <= known and len(set(ids)) == len(ids) < len(known)
    assert ids != sorted(ids)
    assert len(arm.steps) == arm.config.gba.steps
    assert len(arm.sampled) * arm.config.gba.num_iterations == arm.config.gba.steps


def test_the_seed_decides_which_are_asked(answering):
    first = []
    for seed in (3, 4):
        with pytest.MonkeyPatch.context() as patch:

            def sample(policy, encoder, records, image_root, *, seeds, **_):
                first.append(([record.id for record in records], list(seeds)))
                raise InterruptedError

            patch.setattr(policies, "roll_out", sample)
            with pytest.raises(InterruptedError):
                gba.run(answering(f"seed={seed}", "gba.init=base", "gba.prompts_per_step=6"))
    assert first[0][0] != first[1][0] and first[0][1] != first[1][1]


def test_the_policy_drops_nothing_whatever_sft_does(answering):
    """Its log-probabilities are compared with the sampler's and the reference's."""
    plain, dropping = answering("gba.init=base"), answering("gba.init=base", "model.lora.dropout=0.5")
    policy = policies.policy_of(dropping, base_of(dropping), []).train()
    assert not [one for one in policy.modules() if isinstance(one, torch.nn.Dropout) and one.p]
    assert reasoner_key(dropping, ["pediatrics"]) == reasoner_key(plain, ["pediatrics"])


def test_prompts_end_with_the_instruction_each_perspective_asked_alike(arm):
    group = arm.config.gba.num_generations
    told = [None] * group if arm.config.gba.conditioning == "free" else np.repeat(PERSPECTIVES, group // 4).tolist()
    for one in arm.sampled:
        assert one.rollout.perspectives == told * len(one.records)
        distinct = list(dict.fromkeys(told))
        assert one.asked["prompts"] == [conversation(r, p) for r in one.records for p in distinct]
        assert one.asked["num_generations"] == group // len(distinct)


def test_the_policy_starts_at_the_base_and_what_was_trained_before(arm):
    """The mean of the experts for merged_experts, the one adapter for sft_all; frozen through all of training."""
    assert sum(float(delta.norm()) for delta in arm.start.values()) > 1
    wanted = arm.plain.changed(arm.start)
    for one in (arm.sampled[0], arm.sampled[-1]):
        assert one.weights.keys() == wanted.keys()
        for name, weight in wanted.items():
            torch.testing.assert_close(one.weights[name], weight, rtol=1e-5, atol=1e-6)
    assert all(not p.any() for name, p in arm.steps[0].before.items() if "lora_B" in name)


def test_completions_are_sampled_from_the_policy_at_the_temperature(arm):
    settings = arm.config.gba
    for number, one in enumerate(arm.sampled):
        step = arm.steps[number * settings.num_iterations]
        asked = list(zip(np.repeat(one.records, settings.num_generations), one.rollout.perspectives, strict=True))
        vision = arm.plain.tokenizer.convert_tokens_to_ids(
            ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        )
        logps = arm.plain.logps(
            arm.policy(step.before), asked, one.rollout.completions, settings.temperature, banned=vision
        )
        assert len(set(map(tuple, one.rollout.completions))) > len(one.asked["prompts"])
        if settings.top_p == 1:
            torch.testing.assert_close(one.rollout.sampling_logps, logps, rtol=1e-3, atol=1e-3)
        else:  # the kept tokens have all of the chances
            assert (one.rollout.sampling_logps - logps >= -1e-3).all() and (one.rollout.sampling_logps <= 0).all()
        assert one.asked["temperature"] == settings.temperature
        assert sorted(one.asked["banned_ids"]) == sorted(vision)
        assert (one.asked["top_p"], one.asked["top_k"]) == (settings.top_p, settings.top_k)
        assert max(map(len, one.rollout.completions)) <= one.asked["max_new_tokens"] == arm.config.model.max_new_tokens
        said = [arm.plain.tokenizer.decode(ids) for ids in one.rollout.completions]
        assert one.rollout.finished.tolist() == ["<|im_end|>" in text for text in said]
    ended = torch.cat([one.rollout.finished for one in arm.sampled])
    assert ended.any() and not ended.all()


FORMAT = re.compile(r"<think>((?:(?!</?think>|</?answer>).)*)</think><answer>((?:(?!</?think>|</?answer>).)*)</answer>")


def paid(arm: Arm, one: Sampled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcome reward [B, G], adherence [B, G, K] and whether the answer is right, read from the texts."""
    settings, group = arm.config.gba, arm.config.gba.num_generations
    right, form, style = [], [], []
    for row, ids in enumerate(one.rollout.completions):
        record, told = one.records[row // group], one.rollout.perspectives[row]
        text = arm.plain.tokenizer.decode(ids).replace("<|im_end|>", "")
        clean = FORMAT.fullmatch(text)
        options = [f"{letter}. {said}" for letter, said in record.options.items()]
        right.append(
            clean[2] == record.answer if clean else score_choice(text, options, record.answer, "robust").correct
        )
        form.append(bool(clean))
        style.append([adherence(text, record.options, p) if told in (None, p) else np.nan for p in PERSPECTIVES])
    shape = (len(one.records), settings.num_generations)
    accuracy, format_ = np.array(right, float).reshape(shape), np.array(form, float).reshape(shape)
    outcome = arm.config.reward.weights["accuracy"] * accuracy + arm.config.reward.weights["format"] * format_
    return outcome, np.array(style).reshape(*shape, 4), accuracy


def test_rewards_are_those_of_the_config(arm):
    found = []
    for one in arm.sampled:
        outcome, style, right = paid(arm, one)
        found.append(right.mean())
        np.testing.assert_allclose(one.rollout.outcome.numpy(), outcome, rtol=1e-5)
        np.testing.assert_allclose(one.rollout.adherence.numpy(), style, rtol=1e-5)
    assert 0.1 < np.mean(found) < 0.9


def test_advantages_are_the_formula_of_the_config(arm):
    """docs/usage.md: A(r) + scale * (u - mean u), u = gate / n * sum_k w_k A(s_k)."""
    settings = arm.config.gba
    for one in arm.sampled:
        outcome, style, right = paid(arm, one)
        whole = settings.scale_rewards == "batch"
        gate = right if settings.gate == "correct" else np.ones_like(right)
        asked = (~np.isnan(style)).sum(2)
        u = sum(w * scaled(style[..., k], whole) for k, w in enumerate(settings.weights)) * gate / asked
        styled = settings.scale * (u - u.mean(1, keepdims=True))
        assert np.abs(styled).max() > 0.1
        np.testing.assert_allclose(one.rollout.advantages.numpy(), scaled(outcome, whole) + styled, atol=2e-3)
        if settings.gate == "correct":  # style never pays for a wrong answer
            for b, group in enumerate(styled):
                assert len(np.unique(group[right[b] == 0].round(6))) <= 1


def loss_of(arm: Arm, number: int, factors: dict[str, torch.Tensor], **other: Any) -> torch.Tensor:
    """The loss of an update, from texts to the number, with the config's settings or `other` ones."""
    gba_, group = arm.config.gba, arm.config.gba.num_generations
    keys = ("temperature", "epsilon", "epsilon_high", "beta", "mask_truncated_completions")
    settings = {key: getattr(gba_, key) for key in keys} | other
    one = arm.sampled[number // gba_.num_iterations]
    asked = [(one.records[row // group], told) for row, told in enumerate(one.rollout.perspectives)]
    said = one.rollout.completions

    def logps(weights: Any) -> torch.Tensor:
        return arm.plain.logps(weights, asked, said, settings["temperature"])

    now = logps(arm.policy(factors))
    with torch.no_grad():
        first = arm.steps[number // gba_.num_iterations * gba_.num_iterations]
        old, reference = logps(arm.policy(first.before)), logps(arm.plain.changed(arm.start))
    mask = torch.arange(now.shape[1]) < torch.tensor([len(ids) for ids in said])[:, None]
    if settings["mask_truncated_completions"]:
        mask = mask & torch.tensor(["<|im_end|>" in arm.plain.tokenizer.decode(ids) for ids in said])[:, None]
    ratio, advantage = (now - old).exp(), one.rollout.advantages.flatten()[:, None]
    high = settings["epsilon"] if settings["epsilon_high"] is None else settings["epsilon_high"]
    each = -torch.minimum(ratio * advantage, ratio.clamp(1 - settings["epsilon"], 1 + high) * advantage)
    away = reference - now
    each = (each + settings["beta"] * (away.exp() - away - 1).clamp(max=10)) * mask
    if gba_.loss_type == "grpo":
        return (each.sum(1) / mask.sum(1).clamp(min=1)).mean()
    return each.sum() / (len(said) * arm.config.model.max_new_tokens)


def gradient(arm: Arm, number: int, **other: Any) -> dict[str, torch.Tensor]:
    factors = arm.weights(arm.steps[number])
    loss_of(arm, number, factors, **other).backward()
    return {name: p.grad for name, p in factors.items()}


def apart(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return norm({name: found[name] - wanted[name] for name in wanted}) / norm(wanted)


def test_every_update_applies_the_gradient_of_the_formula_clipped_to_its_norm(arm):
    limit = arm.config.gba.max_grad_norm
    for number, step in enumerate(arm.steps):
        wanted = gradient(arm, number)
        size = norm(wanted)
        factor = min(1.0, limit / size)
        assert (size > limit) == (limit < 1), size  # one arm is clipped, the other is not
        assert apart(step.applied, {name: factor * g for name, g in wanted.items()}) < 0.01, number
        assert norm(step.applied) == pytest.approx(min(size, limit), rel=0.01)


def test_another_setting_would_be_another_gradient(arm):
    """So the test above sees each of them; in `guided` at the second update of a rollout, when the policy has moved."""
    others = [{"temperature": 1.0}, {"mask_truncated_completions": not arm.config.gba.mask_truncated_completions}]
    if arm.config.gba.num_iterations > 1:
        others += [{"epsilon": 0.2, "epsilon_high": 0.2}, {"epsilon_high": 0.02}, {"beta": 0.0}]
    number = arm.config.gba.steps - 1
    own = gradient(arm, number)
    for other in others:
        assert apart(gradient(arm, number, **other), own) > 0.02, other


def test_what_was_better_than_its_group_is_likelier_afterwards(arm):
    number = next(n for n, step in enumerate(arm.steps) if step.rate > 0)
    one, step = arm.sampled[number // arm.config.gba.num_iterations], arm.steps[number]
    asked = list(zip(np.repeat(one.records, arm.config.gba.num_generations), one.rollout.perspectives, strict=True))
    before, after = (arm.plain.logps(arm.policy(p), asked, one.rollout.completions) for p in (step.before, step.after))
    risen, advantages = (after - before).sum(1), one.rollout.advantages.flatten()
    counted = one.rollout.finished | (not arm.config.gba.mask_truncated_completions)
    assert risen[counted & (advantages > 0.3)].mean() > 0 > risen[counted & (advantages < -0.3)].mean()


def test_rates_warm_up_and_fall_and_steps_are_adamws(arm):
    settings = arm.config.gba
    warmup = round(settings.warmup_ratio * settings.steps)
    rates = [cosine_schedule(n, steps=settings.steps, warmup=warmup, lr=settings.lr) for n in range(settings.steps)]
    assert [step.rate for step in arm.steps] == pytest.approx(rates)
    assert settings.lr in [pytest.approx(rate) for rate in rates]
    for step, after in zip(arm.steps, adamw(arm.steps, weight_decay=settings.weight_decay), strict=True):
        for name, value in after.items():
            torch.testing.assert_close(step.after[name], value, rtol=1e-4, atol=1e-6)


def test_micro_batches_hold_as_many_tokens_as_the_config_says(arm):
    limit, rows = arm.config.trainer.micro_batch_tokens, len(arm.sampled[0].rollout.texts)
    for number in range(arm.config.gba.steps):
        packs = [(count, packed.inputs["input_ids"].numel()) for at, count, packed in arm.packs if at == number]
        assert sum(count for count, _ in packs) == rows
        if limit is None:
            assert len(packs) == 1
        else:  # an end of a prompt shorter than 16 tokens may be read again for each completion
            assert len(packs) > 1 and all(size <= limit + 16 * count for count, size in packs)


def test_what_is_saved_is_what_was_trained(arm):
    """`update` is the RL update alone, `adapter` start and update: the policy, as one LoRA on the base."""
    lora, last = arm.config.model.lora, arm.steps[-1].after
    update = deltas(arm.run.folder / "update")
    assert len(update) == 14
    for name, found in update.items():
        a, b = (last[name.replace("weight", f"lora_{letter}.weight")] for letter in "AB")
        assert a.shape[0] == lora.r
        torch.testing.assert_close(found, lora.alpha / lora.r * b @ a, rtol=1e-4, atol=1e-6)
    whole = deltas(arm.run.folder / "adapter")
    assert whole.keys() == added(arm.start, update).keys()
    for name, wanted in added(arm.start, update).items():
        torch.testing.assert_close(whole[name], wanted, rtol=1e-4, atol=1e-5)
