"""Distillation of the experts into their merge: each teaches it on its own training records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmedexpert.models.attention import enable
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.generate import generate
from mmedexpert.models.packing import Pack, pack
from mmedexpert.training.batches import Stream, batch_indices, step_seed
from mmedexpert.training.module import TrainingModule

LOGITS, POSITIONS = 2**22, 256  # ours: logits of each model at a time, and positions at least, as models/logps.py

Sample = tuple[Prompt, list[int]]


@dataclass(frozen=True)
class Lesson:
    """The prompts of one optimiser step, a completion of each, and the name of the expert that teaches it."""

    prompts: Sequence[Prompt]
    completions: Sequence[Sequence[int]]
    teachers: Sequence[str]


class DistilModule(TrainingModule):
    """A LoRA on the merged model learns each expert's distribution of the next token; logs `kl` and `agreement`.

    Knowledge distillation (arXiv 1503.02531, at temperature 1) by token, as generalised to completions of the student's
    own by GKD (arXiv 2306.13649): the loss is the mean of KL(expert || student) over the whole vocabulary and all
    completion tokens of the step, however it is cut into micro-batches. `teacher` is the base with the experts as
    adapters of their names.
    """

    def __init__(
        self,
        model: nn.Module,
        teacher: PeftModel,
        encoder: Encoder,
        *,
        lr: float,
        weight_decay: float,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        self.model, self.encoder, self.lr, self.weight_decay = model, encoder, lr, weight_decay
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: it is not trained, moved or saved

    def update(self, lesson: Lesson) -> None:
        self.encoder.encode_images(core_of(self.model), lesson.prompts)
        total, sums = sum(map(len, lesson.completions)), torch.zeros(2, device=self.device)
        parts = [(name, rows) for name in dict.fromkeys(lesson.teachers) for rows in self._cut(lesson, name)]

        def losses() -> Iterator[Tensor]:
            for name, rows in parts:
                packed = pack(
                    self.model, self.encoder, [lesson.prompts[row] for row in rows],
                    [lesson.completions[row] for row in rows],
                )  # fmt: skip
                kl, agreed = self._kl(name, packed)
                sums.add_(torch.stack([kl.detach().sum(), agreed.sum()]))
                yield kl.sum() / total

        self.descend(losses(), len(parts))
        kl, agreement = sums / total
        self.log_dict({"kl": kl, "agreement": agreement}, prog_bar=True)

    def _cut(self, lesson: Lesson, name: str) -> list[list[int]]:
        """The rows of one expert, in micro-batches."""
        rows = [row for row, teacher in enumerate(lesson.teachers) if teacher == name]
        own = [lesson.prompts[row] for row in rows], [lesson.completions[row] for row in rows]
        return [[rows[i] for i in part] for part in self.passes.cut(self.encoder, *own)]

    def _kl(self, name: str, packed: Pack) -> tuple[Tensor, Tensor]:
        """KL to an expert and whether both find the same token likeliest, of each completion token: two [S]."""
        (teacher,) = self._teacher
        teacher.set_adapter(name, inference_mode=True)
        core, expert = core_of(self.model), core_of(teacher)
        enable(expert)
        with torch.no_grad():
            wanted = expert.model(**packed.inputs, scored=packed.at, use_cache=False).last_hidden_state[0]
        hidden = core.model(**packed.inputs, scored=packed.at, use_cache=False).last_hidden_state[0]
        return divergence(hidden, core.lm_head.weight, wanted, expert.lm_head.weight)


def divergence(hidden: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) in nats of the next token, and whether both find the same one likeliest: fp32, bool [S].

    sum_v p_v (log p_v - log q_v) over the vocabulary, p of the teacher's hidden states `wanted` [S, H], q of the
    student's `hidden` [S, H], heads [V, H]. Some positions at a time, whose logits the backward pass computes again:
    no [S, V] tensor of all exists.
    """
    rows = max(POSITIONS, LOGITS // len(head))
    blocks = zip(hidden.split(rows), wanted.split(rows), strict=True)
    found = [checkpoint(_divergence, q, head, p, wanted_head, use_reentrant=False) for q, p in blocks]
    return torch.cat([kl for kl, _ in found]), torch.cat([agreed for _, agreed in found])


def _divergence(hidden: Tensor, head: Tensor, wanted: Tensor, wanted_head: Tensor) -> tuple[Tensor, Tensor]:
    student, teacher = ((x @ w.T).float().log_softmax(-1) for x, w in ((hidden, head), (wanted, wanted_head)))
    kl = (teacher.exp() * (teacher - student)).sum(-1)
    return kl, student.argmax(-1) == teacher.argmax(-1)


def lesson_stream(
    pupils: Sequence[tuple[str, Any]],
    encode: Callable[[Any], Sample],
    *,
    batch_size: int,
    seed: int,
    complete: Callable[[list[Prompt], list[int]], list[list[int]]] | None = None,
) -> Stream:
    """Lessons of (expert, record) pairs in a shuffled order that depends on the seed alone.

    `encode` gives a record's prompt and completion; with `complete` the completions are sampled from prompts and seeds
    in its place, on-policy, when the step begins.
    """

    def stream(step: int) -> Iterator[Lesson]:
        for number, chosen in enumerate(batch_indices(len(pupils), batch_size, seed, step), step):
            prompts, completions = (
                list(column) for column in zip(*(encode(pupils[i][1]) for i in chosen), strict=True)
            )
            if complete is not None:
                completions = complete(prompts, [step_seed(seed, number, place) for place in range(len(chosen))])
            yield Lesson(prompts, completions, [pupils[i][0] for i in chosen])

    return stream


def completer(
    model: Any, encoder: Encoder, max_new_tokens: int
) -> Callable[[list[Prompt], list[int]], list[list[int]]]:
    """What samples one completion of each prompt from the model as it is, at temperature 1."""

    def complete(prompts: list[Prompt], seeds: list[int]) -> list[list[int]]:
        encoder.encode_images(core_of(model), prompts)
        sampled = generate(
            model, encoder, prompts, max_new_tokens=max_new_tokens, temperature=1.0, seeds=seeds,
            banned_ids=encoder.banned_ids,
        )  # fmt: skip
        return sampled.rows()

    return complete
