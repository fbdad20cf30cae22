"""What a judge is trained on: the right reply to a pair in one order, the wrong one, and the labels of both answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mmedexpert.data.pairs import DIMENSIONS, ORDERS, OTHER, TIE, A, B, Order, Pair
from mmedexpert.judging.ask import asks_of
from mmedexpert.judging.prompts import MAX_CHARACTERS
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.training.batches import Preferences, Samples, Stream, batch_indices, share

CHANCE = {A: 1.0, B: 0.0, TIE: 0.5}  # that the pair's first answer is the better one


def replies(pair: Pair, order: Order, names: Sequence[str], style: str) -> tuple[str, str]:
    """The right and the wrong reply to a pair asked in an order and these dimensions, the reason first.  # ours

    JSON; of style small `<think>reason</think><answer>A, B</answer>` with the letters in the order of the dimensions,
    for the tiny base gives no character a chance above a third that its lessons did not let it say. The wrong one turns
    every verdict around, and letters in the reason with them; where the label is a tie it decides.
    """
    right = {name: _slot(pair.labels[name], order) for name in names}
    wrong = {name: OTHER.get(letter, A if order == "ab" else B) for name, letter in right.items()}
    decided = [letter for letter in (right.get("overall"), *right.values()) if letter in OTHER]
    told = pair.reason if decided else ""
    better = decided[0] if decided else A
    return _reply(told, better, right, style), _reply(told, OTHER[better], wrong, style)


def _slot(label: str, order: Order) -> str:
    return OTHER.get(label, label) if order == "ba" else label


def _reply(reason: str, better: str, verdicts: dict[str, str], style: str) -> str:
    told = reason.replace("{better}", better).replace("{worse}", OTHER[better])
    if style == "small":
        return f"<think>{told}</think><answer>{', '.join(verdicts.values())}</answer>"
    return json.dumps(({"reason": told} if told else {}) | verdicts, ensure_ascii=False)


def verdict_stream(
    pairs: Sequence[Pair], encoder: Encoder, image_root: Path, *, batch_size: int, seed: int, style: str, rank: int,
    ranks: int,
) -> Stream:  # fmt: skip
    """Batches of right replies, for SFT. Every pair comes in both orders, equally often."""

    def stream(step: int) -> Iterator[Samples]:
        for batch in reply_stream(
            pairs, encoder, image_root, batch_size=batch_size, seed=seed, style=style, rank=rank, ranks=ranks
        )(step):
            yield Samples(batch.prompts, batch.first)

    return stream


def reply_stream(
    pairs: Sequence[Pair], encoder: Encoder, image_root: Path, *, batch_size: int, seed: int, style: str, rank: int,
    ranks: int,
) -> Stream:  # fmt: skip
    """Batches of right replies against wrong ones, for DPO. Every pair comes in both orders, equally often."""
    asked = asks_of(pairs, image_root, protocol="pairwise", seed=seed, style=style)
    assert len(asked) == len(pairs) * len(ORDERS)

    def stream(step: int) -> Iterator[Preferences]:
        for chosen in batch_indices(len(asked), batch_size, seed, step):
            prompts: list[Prompt] = []
            right: list[list[int]] = []
            wrong: list[list[int]] = []
            for place in share(chosen, rank, ranks):
                pair, order, ask, names = asked[place]
                prompts.append(encoder.chat(ask.text, [encoder.image(path) for path in ask.images]))
                for text, found in zip(replies(pair, order, names, style), (right, wrong), strict=True):
                    found.append(encoder.completion(text))
            yield Preferences(prompts, right, wrong)

    return stream


def score_stream(
    pairs: Sequence[Pair], encoder: Encoder, image_root: Path, *, batch_size: int, seed: int, rank: int, ranks: int
) -> Stream:
    """Batches of both answers with the labels of all DIMENSIONS, for a reward head."""

    def stream(step: int) -> Iterator[Preferences]:
        for chosen in batch_indices(len(pairs), batch_size, seed, step):
            mine = [pairs[place] for place in share(chosen, rank, ranks)]
            prompts = [question_of(encoder, pair.question, [image_root / one for one in pair.images]) for pair in mine]
            first, second = ([answer_of(encoder, pair.answers[letter]) for pair in mine] for letter in (A, B))
            told = [[CHANCE.get(pair.labels.get(name, ""), math.nan) for name in DIMENSIONS] for pair in mine]
            yield Preferences(prompts, first, second, torch.tensor(told))

    return stream


def question_of(encoder: Encoder, question: str, images: Sequence[Path]) -> Prompt:
    """The question alone, to which a reward head reads an answer."""
    return encoder.chat(question, [encoder.image(path) for path in images])


def answer_of(encoder: Encoder, answer: str) -> list[int]:
    """An answer as the model would have said it."""
    return encoder.completion(answer[:MAX_CHARACTERS])
