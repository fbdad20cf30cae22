"""Scores of several answers: a reward model's are kept, a judge of pairs goes around them, a failure is no zero."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.engines.asking import BudgetReached, Reply, refusal
from mmedexpert.errors import UserError
from mmedexpert.judging.scorer import Group, RewardScorer, VerdictScorer

IMAGE = (Path("a.png"),)


def group(*answers: str, question: str = "Large?") -> Group:
    return Group("q", question, IMAGE, answers)


class Judge:
    """Prefers the answer with the larger number; `broken` answers get a reply that nobody can read."""

    def __init__(self, broken: str = "-", always: str = "", kept: bool = False) -> None:
        self.asked: list[str] = []
        self.images: list[tuple[Path, ...]] = []
        self.broken, self.always, self.kept = broken, always, kept

    def __call__(self, asks):
        for place, ask in enumerate(asks):
            self.asked.append(ask.text)
            self.images.append(ask.images)
            first, second = (json.loads(line[10:]) for line in ask.text.splitlines() if line.startswith("Answer "))
            better = self.always or ("tie" if first == second else "A" if float(first) > float(second) else "B")
            text = "hm" if self.broken in (first, second) else json.dumps({"accuracy": better, "overall": better})
            yield place, Reply(text, 7, "stop", 0.1, None, prompt_tokens=50, kept=self.kept)


def scorer(judge, **more) -> VerdictScorer:
    return VerdictScorer(judge, name="m", where="reward.judge", style="full", **more)


def test_each_answer_meets_the_next_one_in_both_orders():
    judge = Judge()
    found = scorer(judge)([group("1", "3", "2", "4")])  # 1 < 3 > 2 < 4 > 1
    assert found.values == [[0.0, 1.0, 0.0, 1.0]]
    assert len(judge.asked) == 8 and set(judge.images) == {IMAGE}
    assert found.counts["calls"] == 8 and found.counts["tokens"] == 56 and found.counts["prompt_tokens"] == 400
    assert found.counts["judged"] == 4 and found.counts["missing"] == 0 == found.counts["cached"]


def test_a_judge_that_goes_by_place_says_nothing():
    found = scorer(Judge(always="A"))([group("1", "3", "2", "4"), group("5", "6")])
    assert found.values == [[0.5] * 4, [0.5] * 2]


def test_equal_answers_share_a_score_and_one_alone_is_not_asked():
    judge = Judge()
    found = scorer(judge)([group("2", "1", "2"), group("7", "7", "7")])
    assert found.values == [[1.0, 0.0, 1.0], [0.5, 0.5, 0.5]] and len(judge.asked) == 2


def test_nothing_is_asked_twice():
    judge = Judge()
    ask = scorer(judge)
    one = ask([group("1", "2", "3")])
    again = ask([group("1", "2", "3"), group("1", "2", question="Small?")])
    assert len(judge.asked) == 6 + 2 and again.values[0] == one.values[0]
    assert again.counts["cached"] == 6 and again.counts["calls"] == 2


def test_what_a_ledger_gives_costs_nothing():
    found = scorer(Judge(kept=True))([group("1", "2")])
    assert found.counts["cached"] == 2 and found.counts["calls"] == 0 == found.counts["tokens"]


def test_a_reply_that_cannot_be_read_is_missing_and_never_a_zero():
    """Of 1, x, 2, 3 the pair of 2 and 3 and that of 3 and 1 are read: x met nobody."""
    forgotten = []
    found = scorer(Judge(broken="9"), forget=forgotten.append)([group("1", "9", "2", "3")])
    assert found.values[0][0] == 0.0 and math.isnan(found.values[0][1]) and found.values[0][2:] == [0.0, 1.0]
    assert found.counts["missing"] == 1 and len(forgotten) == 4


def test_a_judge_that_says_nothing_at_all_stops_the_run_at_once():
    with pytest.raises(UserError, match=r"reward.judge: m compared none of 1 pairs of answers \(its reply cannot be"):
        scorer(Judge(broken="1"))([group("1", "2")])


def test_a_lost_server_is_missing_once_it_has_been_heard():
    judge = Judge()
    ask = scorer(judge)
    ask([group("1", "2")])

    def gone(asks):
        raise UserError("the server is gone")
        yield

    ask.engine = gone
    assert all(map(math.isnan, ask([group("3", "4")]).values[0]))
    with pytest.raises(UserError, match="the server is gone"):  # of more than a handful
        ask([group(*map(str, range(10, 20)))])

    def spent(asks):
        raise BudgetReached("enough")
        yield

    ask.engine = spent
    with pytest.raises(BudgetReached):
        ask([group("5", "6")])


def test_a_refused_question_is_missing():
    ask = scorer(Judge())
    ask([group("1", "2")])
    ask.engine = lambda asks: iter([(place, refusal("too long")) for place in range(len(asks))])
    assert all(map(math.isnan, ask([group("3", "4")]).values[0]))


def test_without_images():
    judge = Judge()
    scorer(judge, shows_images=False)([group("1", "2")])
    assert set(judge.images) == {()}


class Rewards:
    """Scores an answer by its number, in overall twice that."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, questions):
        found = []
        for _, _, answers in questions:
            self.read += answers
            rows = [[0.0] * len(DIMENSIONS) for _ in answers]
            for row, answer in zip(rows, answers, strict=True):
                row[DIMENSIONS.index("accuracy")], row[DIMENSIONS.index("overall")] = float(answer), 2 * float(answer)
            found.append(rows)
        return found


def test_a_reward_model_reads_an_answer_once():
    rewards = Rewards()
    ask = RewardScorer(rewards)  # type: ignore[arg-type]
    found = ask([group("1", "2", "1"), group("4", question="Small?")])
    assert found.values == [[1.5, 3.0, 1.5], [6.0]] and rewards.read == ["1", "2", "4"]
    again = ask([group("2", "3")])
    assert again.values == [[3.0, 4.5]] and rewards.read == ["1", "2", "4", "3"]
    assert again.counts["cached"] == 1 and again.counts["calls"] == 1 and again.counts["missing"] == 0
