"""TRL's own GRPOTrainer and DPOTrainer and ours agree to 1e-5 on advantages, log-probabilities, losses and gradients.

Both get the same tiny Qwen2.5-VL with the same adapter, the same completions and the same rewards.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from mmedexpert.models.backbone import core_of
from mmedexpert.models.packing import pack, token_logps
from mmedexpert.training.advantages import group_relative
from mmedexpert.training.batches import Preferences
from mmedexpert.training.losses import policy_loss
from mmedexpert.training.preferences import dpo_loss

pytest.importorskip("trl", reason="TRL is not installed (requirements-bench.txt)")
sys.path.append(str(Path(__file__).parents[1] / "experiments" / "speed"))

from datasets import Dataset
from datasets import Image as ImageColumn
from tiny_vl import Size, build_encoder, build_model, build_processor, byte_tokenizer, lora_config, text, write_images
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

SMALL = Size(64, 128, 2, 2, 1, 320, False, 32, 64, 2, 2, (1,))
GROUP = 4
LONGEST = 9
TOLERANCE = 1e-5
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "gspo"]


class Parity:
    """A GRPOTrainer whose sampler gives fixed completions, and our side's model with the same weights."""

    def __init__(self, folder: Path) -> None:
        tokenizer = byte_tokenizer()
        self.encoder = build_encoder(tokenizer, 56)
        base = [build_model(SMALL, tokenizer, dtype=torch.float32, device="cpu") for _ in range(2)]
        rows, self.prompts = [], []
        for number, image in enumerate(write_images(folder, 2, 56)):
            question = text(number, 30 - 13 * number)  # of different lengths: the shorter one is padded
            rows.append({"prompt": [{"role": "user", "content": question}], "image": str(image)})
            self.prompts += [self.encoder.chat(question, [self.encoder.image(image)])] * GROUP
        data = Dataset.from_list(rows).cast_column("image", ImageColumn())
        self.rewards: list[float | None] = [0.0] * 2 * GROUP
        settings = GRPOConfig(
            output_dir=str(folder), per_device_train_batch_size=2 * GROUP, num_generations=GROUP, use_cpu=True,
            max_completion_length=LONGEST, beta=0.04, use_bias_correction_kl=False, report_to="none", bf16=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        self.trainer = GRPOTrainer(
            model=base[0], reward_funcs=lambda **_: self.rewards, args=settings, train_dataset=data,
            processing_class=build_processor(tokenizer, 56), peft_config=lora_config(),
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = 1
        self.rows = [row for row in data for _ in range(GROUP)]
        draw = torch.Generator().manual_seed(0)
        end = self.encoder.end_ids[0]
        self.completions = []
        for number in range(2 * GROUP):  # some end, some are cut off
            length = int(torch.randint(2, LONGEST + 1, (1,), generator=draw)) if number % 3 else LONGEST
            words = torch.randint(0, 256, (length,), generator=draw).tolist()
            self.completions.append([*words[:-1], end] if number % 2 else words)
        self.trainer._generate_single_turn = lambda *_, **__: (self.completions, None)
        self.theirs = self.trainer.model.train()
        self.ours = get_peft_model(base[1], lora_config()).train()
        theirs = dict(self.theirs.named_parameters())
        for name, parameter in self.ours.named_parameters():
            if "lora_B" in name:  # a fresh B is zero: the policy would be its own reference
                parameter.data.normal_(std=0.2, generator=draw)
            if parameter.requires_grad:
                theirs[name].data.copy_(parameter.data)
            assert torch.equal(parameter, theirs[name])

        made = self.inputs()
        self.mask = made["completion_mask"]
        noise = torch.randn(self.mask.shape, generator=draw)
        self.old = self.their_logps(made)[0].detach() + 0.3 * noise * self.mask

    def inputs(self) -> dict[str, Any]:
        """What TRL makes of the prompts, completions and rewards."""
        return self.trainer._generate_and_score_completions(self.rows)

    def their_logps(self, made: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        logps, entropy, _ = self.trainer._get_per_token_logps_and_entropies(
            self.theirs,
            torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1),
            torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1),
            made["completion_ids"].shape[1],
            compute_entropy=True,
            **{key: made[key] for key in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")},
        )
        return logps, entropy

    def our_logps(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.encoder.encode_images(core_of(self.ours), self.prompts)
        packed = pack(self.ours, self.encoder, self.prompts, self.completions)
        logps, entropy, _ = token_logps(self.ours, packed)
        width = max(map(len, self.completions))
        return packed.matrix(logps, width), packed.matrix(entropy, width)


@pytest.fixture(scope="module")
def parity(tmp_path_factory) -> Parity:
    return Parity(tmp_path_factory.mktemp("parity"))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal to 1e-5, absolutely where the size is 1 or less."""
    ours, theirs = ours.detach(), theirs.detach()
    return bool((ours - theirs).abs().max() <= TOLERANCE * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards",
    [
        [0.0, 1.0, 1.2, 0.2, 1.2, 0.0, 0.0, 0.1],
        [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0],
        [None, 1.0, 0.0, 0.3, 0.7, None, None, 0.1],
    ],
)
def test_advantages(parity, scale, rewards):
    parity.rewards = rewards
    parity.trainer.scale_rewards = scale
    theirs = parity.inputs()["advantages"]
    ours = group_relative(torch.tensor([float("nan") if r is None else r for r in rewards]).view(2, GROUP), scale)
    assert theirs.abs().max() > 0.1 and close(ours.flatten(), theirs)


def test_log_probabilities_and_entropy(parity):
    made = parity.inputs()
    assert [len(row) for row in parity.completions] == made["completion_mask"].sum(1).tolist()
    for prompt, ids, mask in zip(parity.prompts, made["prompt_ids"], made["prompt_mask"], strict=True):
        assert prompt.input_ids == ids[mask.bool()].tolist()
    for ours, theirs in zip(parity.our_logps(), parity.their_logps(made), strict=True):
        assert close(ours * parity.mask, theirs * parity.mask)
    with parity.ours.disable_adapter(), torch.no_grad():
        reference, _ = parity.our_logps()
    assert close(reference * parity.mask, made["ref_per_token_logps"] * parity.mask)
    assert (reference - parity.old).abs().max() > 0.1  # the adapter and the noise do something


def losses(parity, loss_type, *, epsilon_high=None, beta=0.0, accumulate=1, mask_truncated=False):
    """Loss, gradients and metrics of TRL, then ours."""
    parity.rewards = [0.0, 1.0, 1.2, 0.2, 1.2, 0.0, 0.0, 0.1]
    trainer = parity.trainer
    trainer.scale_rewards = "group"
    trainer.loss_type = "grpo" if loss_type == "gspo" else loss_type
    trainer.importance_sampling_level = "sequence" if loss_type == "gspo" else "token"
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = 0.1, epsilon_high or 0.1, beta
    trainer.mask_truncated_completions = mask_truncated
    trainer.current_gradient_accumulation_steps = trainer.args.steps_per_generation = accumulate
    made = {**parity.inputs(), "old_per_token_logps": parity.old}
    trainer._metrics["train"].clear()
    theirs = sum(trainer._compute_loss(parity.theirs, part) for part in parts(made, accumulate))
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}

    logps, _ = parity.our_logps()
    reference = None
    if beta:
        with parity.ours.disable_adapter(), torch.no_grad():
            reference, _ = parity.our_logps()
    finished = torch.tensor([row[-1] in parity.encoder.end_ids for row in parity.completions])
    ours, our_metrics = policy_loss(
        logps,
        parity.old,
        group_relative(torch.tensor(parity.rewards).view(2, GROUP)).flatten(),
        parity.mask * finished[:, None] if mask_truncated else parity.mask,
        loss_type=loss_type,
        epsilon=0.1,
        epsilon_high=epsilon_high,
        beta=beta,
        ref_per_token_logps=reference,
        max_completion_length=LONGEST,
    )
    return (
        (theirs.detach(), gradients(parity.theirs, theirs), metrics),
        (ours.detach(), gradients(parity.ours, ours), our_metrics),
    )


def agree(theirs, ours) -> bool:
    """Losses to 1e-5, gradients to 1e-5 of their size; neither is about nothing."""
    assert theirs[0].abs() > 1e-3 and theirs[1].norm() > 1e-3
    return (ours[0] - theirs[0]).abs() <= TOLERANCE and (ours[1] - theirs[1]).norm() <= TOLERANCE * theirs[1].norm()


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("epsilon_high", [None, 0.28])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_loss_gradient_and_metrics(parity, loss_type, epsilon_high, beta):
    theirs, ours = losses(parity, loss_type, epsilon_high=epsilon_high, beta=beta)
    assert agree(theirs, ours)
    same = set(ours[2]) & set(theirs[2])
    assert {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"} <= same
    assert (beta > 0) == ("kl" in same)
    for name in same:
        assert abs(float(ours[2][name]) - theirs[2][name]) <= TOLERANCE, name
    assert float(ours[2]["clip_ratio/region_mean"]) > 0  # or epsilon would not matter


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_two_micro_batches_of_trl_are_one_of_ours(parity, loss_type):
    assert agree(*losses(parity, loss_type, beta=0.1, accumulate=2))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_truncated_completions_masked(parity, loss_type):
    assert agree(*losses(parity, loss_type, beta=0.1, mask_truncated=True))


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """Those of all trained parameters, in the order of their names."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters()) if p.requires_grad])


def parts(made: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """A generation batch as so many micro-batches, as TRL splits it."""
    from trl.trainer.utils import split_pixel_values_by_grid, split_tensor_dict, unsplit_pixel_values_by_grid

    if count == 1:
        return [made]
    return [unsplit_pixel_values_by_grid(part) for part in split_tensor_dict(split_pixel_values_by_grid(made), count)]


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
def test_dpo(tmp_path, sft_weight):
    """Loss, gradient and margins of its DPOTrainer, from its own batch and ours of the same texts and images."""
    tokenizer = byte_tokenizer()
    encoder = build_encoder(tokenizer, 56)
    base = [build_model(SMALL, tokenizer, dtype=torch.float32, device="cpu") for _ in range(2)]
    said = [("A, for it is large", "B"), ("B", "A it is"), ("A", "B")]
    rows, prompts = [], []
    for number, image in enumerate(write_images(tmp_path, 3, 56)):
        question = text(number, 30 - 9 * number)
        turns = {"chosen": said[number][0], "rejected": said[number][1]}
        rows.append({
            "prompt": [{"role": "user", "content": question}], "image": str(image),
            **{name: [{"role": "assistant", "content": words}] for name, words in turns.items()},
        })  # fmt: skip
        prompts.append(encoder.chat(question, [encoder.image(image)]))
    options = DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, use_cpu=True, report_to="none", bf16=False, beta=0.3,
        gradient_checkpointing=False, loss_type=["sigmoid", "sft"], loss_weights=[1.0, sft_weight], max_length=None,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=base[0], args=options, train_dataset=Dataset.from_list(rows).cast_column("image", ImageColumn()),
        processing_class=build_processor(tokenizer, 56), peft_config=lora_config(),
    )  # fmt: skip
    theirs, ours = trainer.model.train(), get_peft_model(base[1], lora_config()).train()
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        dict(theirs.named_parameters())[name].data.copy_(parameter.data)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(3)])
    words = [[encoder.completion(one) for one in pair] for pair in said]
    for place, row in enumerate((*(pair[0] for pair in words), *(pair[1] for pair in words))):
        ids = batch["input_ids"][place][batch["completion_mask"][place].bool()].tolist()
        assert ids[: len(row)] == row, "the same completions, up to a line break after the end of turn"
        batch["completion_mask"][place, batch["completion_mask"][place].nonzero()[len(row) :]] = 0
    loss = trainer._compute_loss(theirs, batch, return_outputs=False)
    encoder.encode_images(core_of(ours), prompts)
    given = Preferences(prompts, [pair[0] for pair in words], [pair[1] for pair in words])
    packed = pack(ours, encoder, *given.rows(range(3)))
    whole = torch.zeros(6).index_add(0, packed.rows, token_logps(ours, packed)[0]).view(3, 2)
    with torch.no_grad(), ours.disable_adapter():
        found = torch.zeros(6).index_add(0, packed.rows, token_logps(ours, packed)[0]).view(3, 2)
    losses, margins = dpo_loss(*whole.T, *found.T, beta=0.3)
    ours_loss = losses.mean() - sft_weight * whole[:, 0].sum() / sum(len(pair[0]) for pair in words)
    assert abs(float(ours_loss.detach()) - float(loss.detach())) <= TOLERANCE
    assert abs(float(margins.mean()) - trainer._metrics["train"]["rewards/margins"][0]) <= TOLERANCE
    wanted, gradient = gradients(theirs, loss), gradients(ours, ours_loss)
    assert wanted.norm() > 1e-3 and (gradient - wanted).norm() <= TOLERANCE * wanted.norm()
