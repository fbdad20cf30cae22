"""Training on preferences: the losses are their papers' and TRL's, and packing changes none of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from test_packing import TARGETS, whole_sequences

from mmedexpert.errors import UserError
from mmedexpert.models.backbone import add_lora, core_of
from mmedexpert.models.reward_head import FILE, RewardHead, scores
from mmedexpert.training.batches import Preferences
from mmedexpert.training.fit import fit
from mmedexpert.training.preferences import DpoModule, RewardModule, bradley_terry, dpo_loss

NAN = math.nan
TRAINING = {"seed": 0, "steps": 1, "warmup_ratio": 0.0, "max_grad_norm": 1e9, "lr": 0.01, "weight_decay": 0.0}


@pytest.fixture()
def policy(tiny):
    """A LoRA that has moved from its base: a fresh one would be its own reference."""
    model = add_lora(
        copy.deepcopy(tiny[0]), r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture()
def batch(tiny, picture):
    """Three prompts on two images, two continuations of different lengths each."""
    encoder = tiny[1]
    one, other = encoder.patches(picture(1)), encoder.patches(picture(2, 84, 56))
    prompts = [
        encoder.chat("the heart rate is", [one]), encoder.chat("the heart is low", [one]), encoder.chat("so", [other]),
    ]  # fmt: skip
    first, second = (
        [encoder.completion(text) for text in texts]
        for texts in (("high", "a criterion of the child", "low 0 1 2"), ("low", "high", "low 0 1 2 3 4"))
    )
    return Preferences(prompts, first, second)


def sums_of(model, encoder, batch):
    """Log-probabilities of whole replies from plain padded passes: [P, 2]."""
    encoder.encode_images(core_of(model), batch.prompts)
    prompts, words = batch.rows(range(3))
    values = whole_sequences(model, encoder, prompts, words)
    return torch.stack([part.sum() for part in values.split([len(one) for one in words])]).view(3, 2)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


def stepped(module, batch, folder):
    """What one step logs, and the gradient that it took."""
    seen = {}
    module.on_before_optimizer_step = lambda *_: None
    descend = module.descend

    def watched(losses, parts):
        descend(losses, parts)
        seen["gradient"] = gradient_of(module)

    module.descend = watched
    fit(module, lambda step: iter([batch]), folder=folder, checkpoint_every=100, accelerator="cpu")
    return module.metrics, seen["gradient"]


def test_dpo_is_its_papers_formula():
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor([[-3.0, -9.0], [-4.0, -5.0], [-3.5, -8.0], [-3.0, -7.0]])
    loss, margins = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.2)
    expected = [0.2 * ((-3 + 3.5) - (-4 + 3)), 0.2 * ((-9 + 8) - (-5 + 7))]
    assert margins.tolist() == pytest.approx(expected)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-margin)) for margin in expected])


def test_bradley_terry_leaves_out_what_nobody_said_and_splits_a_tie():
    first, second = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 5.0, 3.0]])
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    assert float(bradley_terry(first, second, torch.tensor([[1.0, NAN, NAN]]))) == pytest.approx(-math.log(sigma(1)))
    assert float(bradley_terry(first, second, torch.tensor([[NAN, 0.0, NAN]]))) == pytest.approx(-math.log(sigma(3)))
    tie = -0.5 * math.log(sigma(-3)) - 0.5 * math.log(sigma(3))
    assert float(bradley_terry(first, second, torch.tensor([[NAN, NAN, 0.5]]))) == pytest.approx(tie)
    assert float(bradley_terry(first, second, torch.full((1, 3), NAN))) == 0.0


@pytest.mark.parametrize("budget", [None, 1])
def test_a_step_of_dpo_is_that_of_whole_padded_sequences(policy, tiny, batch, tmp_path, budget):
    encoder, words = tiny[1], sum(map(len, batch.first))
    plain = copy.deepcopy(policy)
    logps = sums_of(plain, encoder, batch)
    with torch.no_grad(), plain.disable_adapter():
        reference = sums_of(plain, encoder, batch)
    loss, margins = dpo_loss(*logps.T, *reference.T, beta=0.3)
    nll = -logps[:, 0].sum() / words
    (loss.mean() + 0.5 * nll).backward()
    wanted = gradient_of(plain)
    module = DpoModule(policy, encoder, beta=0.3, sft_weight=0.5, micro_batch_tokens=budget, **TRAINING)
    found, gradient = stepped(module, batch, tmp_path)
    assert found["loss"] == pytest.approx(float(loss.mean() + 0.5 * nll), abs=1e-5)
    assert found["nll_loss"] == pytest.approx(float(nll), abs=1e-5)
    assert found["rewards/margins"] == pytest.approx(float(margins.mean()), abs=1e-5)
    assert found["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    assert float((reference - logps).abs().max()) > 0.01  # the adapter does something
    assert wanted.norm() > 0 and (gradient - wanted).norm() / wanted.norm() < 1e-4


def head_of(tiny):
    head = RewardHead(64, ("accuracy", "overall"))
    for parameter in head.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.ndim))
    return head


def plain_scores(model, encoder, head, batch):
    """Each answer read alone, up to its last token before the end of turn."""
    core, found = core_of(model), []
    core.model.language_model.config._attn_implementation = "sdpa"
    for prompt, words in zip(*batch.rows(range(3)), strict=True):
        inputs, _ = encoder.collate([prompt], [words[:-1]])
        found.append(head(core.model(**inputs, use_cache=False).last_hidden_state[0, -1]))
    return torch.stack(found).view(3, 2, 2)


@pytest.mark.parametrize("budget", [None, 1])
def test_a_step_of_the_reward_model_is_that_of_answers_read_alone(policy, tiny, batch, tmp_path, budget):
    encoder, head = tiny[1], head_of(tiny)
    labels = torch.tensor([[1.0, NAN], [0.0, 0.5], [NAN, 1.0]])
    batch = Preferences(batch.prompts, batch.first, batch.second, labels)
    encoder.encode_images(core_of(policy), batch.prompts)
    found = scores(policy, encoder, head, *batch.rows(range(3))).view(3, 2, 2)
    plain, other = copy.deepcopy(policy), copy.deepcopy(head)
    expected = plain_scores(plain, encoder, other, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    loss = bradley_terry(expected[:, 0], expected[:, 1], labels) / 4
    loss.backward()
    wanted = torch.cat([gradient_of(plain), gradient_of(other)])
    module = RewardModule(policy, encoder, head, micro_batch_tokens=budget, **TRAINING)
    told, gradient = stepped(module, batch, tmp_path)
    assert told["loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert (gradient - wanted).norm() / wanted.norm() < 1e-4
    assert float((head.shared - other.shared).abs().max()) > 0  # the head is trained, too


def test_a_head_is_saved_and_a_damaged_one_refused(tmp_path):
    head = head_of(None)
    head.save(tmp_path)
    again = RewardHead.load(tmp_path, ("accuracy", "overall"))
    assert torch.equal(head.shared, again.shared) and torch.equal(head.own, again.own)
    with pytest.raises(UserError, match="no usable reward head"):
        RewardHead.load(tmp_path, ("accuracy",))
    (tmp_path / FILE).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="no usable reward head"):
        RewardHead.load(tmp_path, ("accuracy", "overall"))
    with pytest.raises(UserError, match="no usable reward head"):
        RewardHead.load(tmp_path / "elsewhere", ("accuracy", "overall"))


def test_a_head_scores_in_full_precision_under_autocast(tiny):
    """Two close scores are subtracted: in bf16 they would be one."""
    head, hidden = head_of(tiny), torch.randn(4, 64, generator=torch.Generator().manual_seed(3)) * 8
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(hidden.bfloat16())
    assert found.dtype == torch.float32 and torch.equal(found, head(hidden.bfloat16()))
