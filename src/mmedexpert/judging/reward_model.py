"""A trained reward head as a judge: the better answer is that with the higher score, whichever stands first."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmedexpert.data.pairs import DIMENSIONS, OTHER, TIE, A, B, Pair
from mmedexpert.judging.ask import COLUMNS, Judgement, with_verdicts
from mmedexpert.judging.lessons import answer_of, question_of
from mmedexpert.judging.prompts import orders_of
from mmedexpert.models.backbone import core_of
from mmedexpert.models.encode import PATCHES, Encoder
from mmedexpert.models.reward_head import RewardHead, scores
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.progress import Bar


class RewardModel:
    """Scores answers in DIMENSIONS; `batch_size` answers in a pass."""

    def __init__(self, model: Any, encoder: Encoder, head: RewardHead, *, batch_size: int) -> None:
        self.model, self.encoder, self.head, self.batch_size = model, encoder, head, batch_size
        encoder.share_images(core_of(model))

    @torch.no_grad()
    def __call__(self, questions: Sequence[tuple[str, Sequence[Path], Sequence[str]]]) -> list[list[list[float]]]:
        """Question to answer to score [D], of (question, images, answers).

        UserError for an image that cannot be opened, ValueError for one that the processor refuses.
        """
        prompts, words, sizes = [], [], []
        for question, images, answers in questions:
            prompt = question_of(self.encoder, question, images)
            prompts += [prompt] * len(answers)
            words += [answer_of(self.encoder, answer) for answer in answers]
            sizes.append(len(answers))
        found: list[list[float]] = []
        for first in range(0, len(prompts), self.batch_size):
            part = prompts[first : first + self.batch_size]
            self.encoder.encode_images(core_of(self.model), part, patches_together=PATCHES)
            found += scores(self.model, self.encoder, self.head, part, words[first : first + self.batch_size]).tolist()
        ends = [sum(sizes[: place + 1]) for place in range(len(sizes))]
        return [found[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def scored(
    judge: RewardModel, pairs: Sequence[Pair], image_root: Path, path: Path, *, protocol: str, blind: bool, title: str
) -> list[Judgement]:
    """A row for each pair and order as `ask.judge` gives them, with the scores; those in `path` are not made again."""
    kept = {(row["id"], row["order"]): row for row in read_lines(path, COLUMNS)}
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.values()).encode())
    orders = orders_of(protocol)
    todo = [pair for pair in pairs if any((pair.id, order) not in kept for order in orders)]
    step = max(1, judge.batch_size // 2)
    with Bar(f"judge {title}", len(todo)) as bar, path.open("a", encoding="utf-8") as file:
        for first in range(0, len(todo), step):
            part, start = todo[first : first + step], time.perf_counter()
            images = [() if blind else [image_root / name for name in pair.images] for pair in part]
            asked = [(p.question, shown, [p.answers[A], p.answers[B]]) for p, shown in zip(part, images, strict=True)]
            found = judge(asked)
            seconds = round((time.perf_counter() - start) / len(part) / len(orders), 4)
            for pair, (one, other) in zip(part, found, strict=True):
                for order in orders:
                    row = _row(pair, order == "ba", one, other)
                    kept[pair.id, order] = {"id": pair.id, "order": order, **row, "seconds": seconds}
                    file.write(json.dumps(kept[pair.id, order], ensure_ascii=False) + "\n")
            file.flush()
            bar.show(first + len(part), {})
    return [with_verdicts(kept[pair.id, order], protocol) for pair in pairs for order in orders]


def _row(pair: Pair, turned: bool, one: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """The scores as a reply: the letter of the slot in which the better answer stands."""
    verdicts = {}
    for name in DIMENSIONS:
        if name in pair.labels:
            a, b = one[DIMENSIONS.index(name)], other[DIMENSIONS.index(name)]
            better = TIE if a == b else A if a > b else B
            verdicts[name] = OTHER.get(better, better) if turned else better
    told = {letter: dict(zip(DIMENSIONS, map(float, row), strict=True)) for letter, row in ((A, one), (B, other))}
    return {
        "dimensions": list(verdicts), "response": json.dumps(verdicts), "tokens": 0, "finish_reason": "stop",
        "scores": told,
    }  # fmt: skip
