"""A DSA step and a GBA step of a random Qwen2.5-VL, beside what models/plan.py plans for them.

The model is built on the device from its sizes, in bf16, with the LoRA and the gradient checkpointing of conf/model,
and trained under bf16 autocast. Its images are encoded and seen beforehand (`images_s`). Completions of an update are
random tokens of full length; sampling then draws as many tokens a row as the time it is given allows.

FLOPs of an update are counted by gba_flops.py: with N weights of the linear layers, n of them LoRA's, and T tokens of
the packed rows, forward 2 N T and backward 2 (N + n) T (the frozen have no gradient of their own: 4 N T, not 6), and
attention over the pairs of the tree, the head on scored tokens alone. `mfu` is these over seconds and the datasheet's
dense bf16 rate, `mfu_gemm` over the rate of a large product in the same process; checkpointing's second forward pass
(2 N T more) is in the seconds and in `hardware_tflops` alone.

`peak_gib` is the most that torch had allocated, `device_gib` all that is taken on the device, CUDA's own and the
allocator's reserve too: the one to hold against `estimate_gib`.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from gba_flops import reading
from gpu_clock import release, timed
from tiny_vl import (
    LR,
    MAX_GRAD_NORM,
    SIZES,
    build_encoder,
    build_model,
    byte_tokenizer,
    text,
    text_length,
    write_images,
)
from torch import Tensor

from mmedexpert.models.backbone import add_lora, core_of
from mmedexpert.models.cards import card
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.generate import generate
from mmedexpert.models.packing import Pack, micro_batches, pack, token_logps
from mmedexpert.models.plan import GIB, Setup, passes
from mmedexpert.models.shapes import known
from mmedexpert.training.losses import policy_loss

CONF = Path(__file__).parents[2] / "conf" / "model"
DATASHEET = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}  # NVIDIA: dense bf16 FLOP/s of the SXM cards


@dataclass(frozen=True)
class Shapes:
    """Tokens of a prompt, a completion and a DSA answer; completions of a group, groups, records of both DSA cases."""

    prompt: int
    completion: int
    answer: int
    group: int
    groups: int
    records: tuple[int, int]
    max_tokens: int  # of one pass of DSA
    image_size: int
    warm_up: int = 32  # ours: tokens sampled to see how many there is time for


# ours: two records, and a whole step; batch 16 and 8,192 tokens are conf/dsa's and conf/trainer's
GPU = Shapes(700, 1024, 836, 8, 8, (2, 16), 8192, 633)
TINY = Shapes(64, 16, 24, 4, 2, (2, 3), 200, 56, 2)


@dataclass(frozen=True)
class Policy:
    """A model with its LoRA, and what trains it."""

    model: Any
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    estimates: tuple[float | None, ...]  # GiB: DSA of two records, GBA's update, sampling
    device: str

    @property
    def core(self) -> Any:
        """The transformers model inside."""
        return core_of(self.model)


def settings(size: str) -> dict[str, Any]:
    """conf/model of a size; the tiny one has the LoRA of 3b."""
    content = (CONF / f"qwen2_5_vl_{'3b' if size == 's' else size}.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load((CONF / "_qwen.yaml").read_text(encoding="utf-8")), **yaml.safe_load(content)}


def planned(size: str, shapes: Shapes) -> tuple[float | None, ...]:
    """GiB of the device for a DSA step on two records, GBA's update a group a pass, and its sampling; none for tiny."""
    if size == "s":
        return None, None, None
    model = settings(size)
    shape, lora = known()[model["name_or_path"]], model["lora"]
    setup = Setup(shape, lora["r"], shape.lora(lora["r"], lora["target_modules"]), 2, 4, 2, True, True)
    prompt, width, group = shapes.prompt, shapes.completion, shapes.group
    (two,) = passes(prompt, shapes.answer, 1, 2, None)
    each, *others = passes(prompt, width, group, shapes.groups, prompt + group * width)
    drawn = setup.sampling_bytes(shapes.groups, prompt, shapes.groups * group, width, shapes.groups * prompt)
    held = (
        setup.training_bytes(two.tokens, two.scored, 1),
        setup.training_bytes(each.tokens, each.scored, 1 + len(others)),
        {**drawn, "AdamW": setup.state_bytes},
    )
    return tuple((sum(one.values()) + card("h100").own) / GIB for one in held)


def dtype_of(device: str) -> torch.dtype:
    """bf16 on CUDA; fp32 on the CPU, which may emulate bf16."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def build(size: str, device: str, shapes: Shapes) -> Policy:
    """A random model of a size as `load_model` and `add_lora` would make it, without a file."""
    model_settings = settings(size)
    tokenizer = byte_tokenizer()
    base = build_model(SIZES[size], tokenizer, dtype=dtype_of(device), device=device)
    checkpointing = model_settings["gradient_checkpointing"]
    model = add_lora(base, **model_settings["lora"], gradient_checkpointing=checkpointing, seed=0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, fused=True)
    policy = Policy(model, build_encoder(tokenizer, shapes.image_size), optimizer, planned(size, shapes), device)
    asked(policy, 1, shapes)  # the vision tower's kernels are loaded
    return policy


def asked(policy: Policy, count: int, shapes: Shapes) -> tuple[list[Prompt], float]:
    """Prompts of exactly the tokens asked for, each with an image of its own, which the model has seen; seconds."""
    encoder = policy.encoder

    def read(images: Sequence[Path], length: int) -> list[Prompt]:
        prompts = [encoder.chat(text(n, length), [encoder.image(image)]) for n, image in enumerate(images)]
        encoder.encode_images(policy.core, prompts)
        return prompts

    with tempfile.TemporaryDirectory() as folder:
        images = write_images(Path(folder), count, shapes.image_size)
        other = build_encoder(encoder.tokenizer, shapes.image_size)
        return timed(policy.device, read, images, text_length(other, images[0], shapes.prompt))


def said(count: int, length: int) -> list[list[int]]:
    """Random completions, of the tokenizer's bytes."""
    return torch.randint(256, (count, length), generator=torch.Generator().manual_seed(0)).tolist()


def packs(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], max_tokens: int
) -> Iterator[tuple[list[int], Pack]]:
    """The step in packs of at most so many tokens, with the rows of each."""
    for chosen in micro_batches(policy.encoder, prompts, completions, max_tokens):
        some, words = [prompts[row] for row in chosen], [completions[row] for row in chosen]
        yield chosen, pack(policy.model, policy.encoder, some, words)


def update(
    policy: Policy,
    prompts: Sequence[Prompt],
    completions: Sequence[Sequence[int]],
    max_tokens: int,
    loss: Callable[[Pack, Tensor, list[int]], Tensor],
) -> float:
    """One optimiser step as SftModule and GbaModule take it under Lightning's bf16-mixed; the gradient's norm."""
    sixteen = dtype_of(policy.device) == torch.bfloat16
    with torch.autocast(policy.device, torch.bfloat16, enabled=sixteen):
        for chosen, packed in packs(policy, prompts, completions, max_tokens):
            logps, _, _ = token_logps(policy.model, packed, banned_ids=policy.encoder.banned_ids)
            loss(packed, logps, chosen).backward()
    norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_GRAD_NORM)
    policy.optimizer.step()
    policy.optimizer.zero_grad()
    return float(norm)


def work(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], max_tokens: int
) -> dict[str, float]:
    """Tokens of the packed rows, FLOPs of the update, and those of a second forward pass."""
    tokens = flops = again = 0.0
    for _, packed in packs(policy, prompts, completions, max_tokens):
        forward, backward = reading(policy.core, packed.inputs["tree"])
        tokens += sum(packed.inputs["tree"].lengths)
        flops += forward + backward + 4 * len(packed.targets) * policy.core.lm_head.weight.numel()
        again += forward
    return {"tokens": tokens, "flops": flops, "again": again}


@cache
def gemm_rate(device: str) -> float:
    """FLOP/s of a large matrix product in the model's dtype: the fastest of five."""
    side = 8192 if device.startswith("cuda") else 1024
    one, other = (torch.randn(side, side, device=device, dtype=dtype_of(device)) for _ in range(2))
    return 2 * side**3 / min(timed(device, torch.mm, one, other)[1] for _ in range(5))


def paced(policy: Policy, seconds: float, done: dict[str, float]) -> dict[str, float | None]:
    """Tokens a second and MFU of an update."""
    gemm = gemm_rate(policy.device)
    sheet = DATASHEET.get(torch.cuda.get_device_name()) if policy.device.startswith("cuda") else None
    return {
        "tokens": done["tokens"],
        "seconds": seconds,
        "tokens_per_s": done["tokens"] / seconds,
        "tflops": done["flops"] / seconds / 1e12,
        "hardware_tflops": (done["flops"] + done["again"]) / seconds / 1e12,
        "gemm_tflops": gemm / 1e12,
        "mfu": sheet and done["flops"] / seconds / sheet,
        "mfu_gemm": done["flops"] / seconds / gemm,
    }


def memory(device: str, estimate: float | None) -> dict[str, float | None]:
    """GiB at their most since the clock began, beside the estimate; on the CPU those of the process."""
    if not device.startswith("cuda"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {"peak_gib": peak, "device_gib": None, "estimate_gib": estimate}
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"peak_gib": peak, "device_gib": (total - free) / 2**30, "estimate_gib": estimate}


def dsa(device: str, *, size: str, shapes: Shapes) -> Iterator[dict[str, Any]]:
    """The update on the records of the estimate in one pass, then on a whole batch."""
    policy = build(size, device, shapes)
    for records, estimate in zip(shapes.records, (policy.estimates[0], None), strict=True):
        release()
        prompts, images_s = asked(policy, records, shapes)
        answers, count = said(records, shapes.answer), records * shapes.answer

        def loss(packed: Pack, logps: Tensor, chosen: list[int], count: int = count) -> Tensor:
            return -logps.sum() / count

        step = (policy, prompts, answers, shapes.max_tokens)
        laps = [timed(device, update, *step, loss) for _ in range(3)]  # the first loads kernels
        row = {"case": f"dsa {size}, {records} records of {shapes.prompt + shapes.answer} tokens", "images_s": images_s}
        row |= {"grad_norm": laps[-1][0], **memory(device, estimate)}
        yield row | paced(policy, min(spent for _, spent in laps[1:]), work(*step))


def gba(device: str, *, size: str, shapes: Shapes, sampling_s: float) -> Iterator[dict[str, Any]]:
    """The update on all groups, a group a pass; sampling in about `sampling_s` at most; if all was drawn, the step.

    The sampling row also tells how far the update's log-probabilities of what was drawn are from the sampler's.
    """
    policy = build(size, device, shapes)
    group, total, width = shapes.group, shapes.groups * shapes.group, shapes.completion
    case = f"gba {size}, {shapes.groups} groups of {group}, {shapes.prompt} + {width} tokens"
    prompts, images_s = asked(policy, shapes.groups, shapes)
    repeated = [prompt for prompt in prompts for _ in range(group)]
    completions, max_tokens = said(total, width), shapes.prompt + group * width
    advantages = torch.linspace(-1, 1, group, device=device).repeat(shapes.groups)
    mask = torch.ones(total, width, device=device)

    def loss(packed: Pack, logps: Tensor, chosen: list[int]) -> Tensor:
        now = packed.matrix(logps, width)
        return policy_loss(now, now.detach(), advantages[chosen], mask[chosen], num_completions=total)[0]

    release()
    update(policy, repeated[:group], completions[:group], max_tokens, loss)  # kernels are loaded
    step = (policy, repeated, completions, max_tokens)
    norm, update_s = timed(device, update, *step, loss)
    row = {"case": f"{case}: update", "grad_norm": norm, **memory(device, policy.estimates[1])}
    yield row | paced(policy, update_s, work(*step))

    def sample(tokens: int) -> Any:
        return generate(
            policy.model, policy.encoder, prompts, max_new_tokens=tokens, num_generations=group, temperature=1.0,
            end_ids=(), banned_ids=policy.encoder.banned_ids, seeds=range(len(prompts)),
        )  # fmt: skip

    sample(2)  # kernels are loaded
    _, spent = timed(device, sample, shapes.warm_up)
    tokens = max(2, min(width, int(sampling_s / spent * shapes.warm_up)))
    release()
    sampled, drawing_s = timed(device, sample, tokens)
    held = memory(device, policy.estimates[2] if tokens == width else None)
    off = difference(policy, repeated[:group], sampled.rows()[:group], sampled.logps[:group], max_tokens)
    yield {
        "case": f"{case}: sampling",
        "tokens": total * tokens,
        "new_tokens": tokens,
        "seconds": drawing_s,
        "tokens_per_s": total * tokens / drawing_s,
        **held,
        **off,
    }
    if tokens == width:
        seconds = images_s + drawing_s + update_s
        rate = total * width / seconds
        yield {"case": f"{case}: step", "tokens": total * width, "seconds": seconds, "tokens_per_s": rate}


@torch.no_grad()
def difference(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], logps: Tensor, max_tokens: int
) -> dict[str, float]:
    """How far log-probabilities of the packed row are from the sampler's: decoding and prefill against one pass."""
    policy.model.eval()  # no dropout, as when sampling
    ((_, packed),) = packs(policy, prompts, completions, max_tokens)
    now, _, _ = token_logps(policy.model, packed, banned_ids=policy.encoder.banned_ids)
    policy.model.train()
    off = (packed.matrix(now, logps.shape[1]) - logps).abs()
    return {"logp_difference_mean": float(off.mean()), "logp_difference_max": float(off.max())}
