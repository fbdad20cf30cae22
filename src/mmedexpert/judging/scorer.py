"""How good each of several answers to one question is, by a judge: what a reward and the best of n are chosen by."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmedexpert.data.pairs import DIMENSIONS, INVALID, ORDERS, TIE, A, B, Order, Pair
from mmedexpert.engines.asking import Ask, Engine, while_there
from mmedexpert.errors import UserError
from mmedexpert.judging.prompts import ask_of
from mmedexpert.judging.reward_model import RewardModel
from mmedexpert.judging.verdicts import canonical, read

SCORED_BY = ("accuracy", "overall")  # ours: the dimensions that make a score, each as much as the other
HANDFUL = 5  # ours: so many answers may all stay without a score by bad luck
WON = {A: 1.0, TIE: 0.5, B: 0.0}


@dataclass(frozen=True)
class Group:
    """A question and its answers, which are compared with each other alone. `id` names it in errors."""

    id: str
    question: str
    images: tuple[Path, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """`values`: a number for each answer of each group, higher is better, comparable within a group alone; NaN where
    the judge failed, which is never a bad answer. `counts`: calls, cached, tokens, prompt_tokens, seconds, judged and
    missing (answers), which add up over batches and ranks."""

    values: list[list[float]]
    counts: dict[str, float]


COUNTS = ("calls", "cached", "tokens", "prompt_tokens", "seconds", "judged", "missing")
Scorer = Callable[[Sequence[Group]], Scores]


class RewardScorer:
    """A reward model's scores, the mean over `SCORED_BY`; an answer that it has scored is not read again."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.kept: dict[tuple[str, tuple[Path, ...], str], float] = {}

    def __call__(self, groups: Sequence[Group]) -> Scores:
        start = time.perf_counter()
        counts = dict.fromkeys(COUNTS, 0.0)
        wanted: dict[tuple[str, tuple[Path, ...]], dict[str, None]] = {}
        for one in groups:
            wanted.setdefault((one.question, one.images), {}).update(dict.fromkeys(one.answers))
        asked = [
            (*key, fresh)
            for key, answers in wanted.items()
            if (fresh := [answer for answer in answers if (*key, answer) not in self.kept])
        ]
        places = [DIMENSIONS.index(name) for name in SCORED_BY]
        for (question, images, answers), found in zip(asked, self.model(asked), strict=True):
            for answer, row in zip(answers, found, strict=True):
                self.kept[question, images, answer] = sum(row[place] for place in places) / len(places)
        values = [[self.kept[one.question, one.images, answer] for answer in one.answers] for one in groups]
        counts["judged"] = float(sum(map(len, values)))
        counts["calls"] = float(sum(len(answers) for *_, answers in asked))
        counts["cached"] = counts["judged"] - counts["calls"]
        counts["seconds"] = time.perf_counter() - start
        return Scores(values, counts)


class VerdictScorer:
    """A judge of pairs: each distinct answer is compared with the next one around the group, in both orders.  # ours

    An answer's score is the share of its comparisons that it wins, in [0, 1], a tie half; of two answers both are
    compared once. G answers take 2 G calls, where all pairs would take G (G - 1). An answer none of whose verdicts can
    be read is missing; one that is alone is 0.5, unasked. What was asked is kept by content: by the engine's ledger
    where it has one, else while this lives.

    Raises UserError where nothing of the first batch can be read, or nothing of a later one of more than HANDFUL
    answers; BudgetReached where the engine may ask no more.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str,
        where: str,
        style: str,
        ties: bool = True,
        shows_images: bool = True,
        forget: Callable[[Ask], None] | None = None,
    ) -> None:
        self.engine, self.name, self.where, self.style, self.shows_images = engine, name, where, style, shows_images
        self.ties = ties  # offered, as where the judge was trained
        self.forget = forget  # has a ledger ask again what could not be read
        self.kept: dict[tuple[str, tuple[Path, ...], str, str], float] = {}  # the first answer's win over the second
        self.heard = False  # has it said anything yet?

    def __call__(self, groups: Sequence[Group]) -> Scores:
        start = time.perf_counter()
        counts = dict.fromkeys(COUNTS, 0.0)
        rounds = [_around(list(dict.fromkeys(one.answers))) for one in groups]
        shown = [one.images if self.shows_images else () for one in groups]
        keys = [
            (one.question, images, *pair)
            for one, images, met in zip(groups, shown, rounds, strict=True)
            for pair in met
        ]
        fresh = [key for key in dict.fromkeys(keys) if key not in self.kept]
        reasons = self._compare(fresh, counts)
        counts["cached"] += float(len(ORDERS) * (len(keys) - len(fresh)))
        values = []
        for one, images, met in zip(groups, shown, rounds, strict=True):
            wins: dict[str, list[float]] = {answer: [] for answer in one.answers}
            for first, second in met:
                won = self.kept.get((one.question, images, first, second), math.nan)
                if not math.isnan(won):
                    wins[first].append(won)
                    wins[second].append(1 - won)
            found = {answer: sum(won) / len(won) if won else math.nan for answer, won in wins.items()}
            values.append([found[answer] if met else 0.5 for answer in one.answers])
        counts["judged"] = float(sum(map(len, values)))
        counts["missing"] = float(sum(math.isnan(value) for row in values for value in row))
        if fresh and not any(key in self.kept for key in fresh) and (len(fresh) > HANDFUL or not self.heard):
            raise UserError(
                f"{self.where}: {self.name} compared none of {len(fresh)} pairs of answers "
                f"({next(iter(reasons), 'no reply')}): look at the judge, or do without it"
            )
        self.heard = self.heard or bool(fresh)
        counts["seconds"] = time.perf_counter() - start
        return Scores(values, counts)

    def _compare(self, fresh: Sequence[tuple[str, tuple[Path, ...], str, str]], counts: dict[str, float]) -> list[str]:
        """Ask of each pair in both orders, and keep what can be read; why the others cannot."""
        asked = [_ask(key, order, self.style, self.ties) for key in fresh for order in ORDERS]
        won: dict[int, list[float]] = {}
        reasons: list[str] = []
        for place, reply in while_there(self.engine, [ask for ask, _ in asked], reasons):
            counts["cached" if reply.kept else "calls"] += 1
            if not reply.kept:
                counts["tokens"] += reply.tokens
                counts["prompt_tokens"] += reply.prompt_tokens
            number, order = divmod(place, len(ORDERS))
            found = read(reply.text, asked[place][1], "pairwise", finish_reason=reply.finish_reason)
            said = [canonical(letter, ORDERS[order]) for letter in found.said.values() if letter != INVALID]
            won.setdefault(number, []).extend(WON[letter] for letter in said)
            if not said:
                if self.forget is not None:
                    self.forget(asked[place][0])
                reasons.append(reply.refused or f"its reply cannot be read ({found.rule}): {reply.text[:80]!r}")
        self.kept |= {fresh[number]: sum(said) / len(said) for number, said in won.items() if said}
        return reasons


def _around(answers: list[str]) -> list[tuple[str, str]]:
    """Each answer with the next one; of two the one pair."""
    if len(answers) < 3:
        return [(answers[0], answers[1])] if len(answers) == 2 else []
    return list(zip(answers, [*answers[1:], answers[0]], strict=True))


def _ask(
    key: tuple[str, tuple[Path, ...], str, str], order: Order, style: str, ties: bool
) -> tuple[Ask, tuple[str, ...]]:
    question, images, first, second = key
    pair = Pair(
        "answers", tuple(map(str, images)), question, {A: first, B: second}, dict.fromkeys(SCORED_BY, A), group=""
    )
    return ask_of(pair, order, Path(), protocol="pairwise", ties=ties, seed=0, blind=False, style=style)
