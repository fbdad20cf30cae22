"""Who says how far a completion follows its perspective: rules, hybrid, kappa, missing grades, the config's part."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_config import composed

from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Ask, Reply
from mmedexpert.engines.ledger import Ledger
from mmedexpert.engines.openai import OpenAIEngine
from mmedexpert.engines.replies import Prices
from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.perspectives import perspectives
from mmedexpert.guidelines.rubrics import Grades, adherence, criteria
from mmedexpert.models import generate as generating
from mmedexpert.models.generate import Completions
from mmedexpert.stages.before import check_inputs
from mmedexpert.stages.reasoner_key import acting_reward, reasoner_key, reward_key
from mmedexpert.training import grading, rollouts
from mmedexpert.training.advantages import group_relative
from mmedexpert.training.grading import (
    PAIRS,
    Case,
    Grading,
    HybridGrader,
    RulesGrader,
    grader_of,
    kappa,
    pairs_of,
    report_of,
)
from mmedexpert.training.judge import JudgeGrader
from mmedexpert.training.rollout_report import completion_rows, criteria_text, report
from mmedexpert.training.rollouts import Guidance, Rollout, Sampling, roll_out

OPTIONS = {"A": "Normal heart", "B": "Cardiomegaly"}
TEXTS = [
    "<think>Pattern: wide heart shadow. So cardiomegaly B.</think><answer>B</answer>",
    "<think>The prior of cardiomegaly is 20%; the wide shadow raises it to 80%.</think><answer>B</answer>",
    "The answer is B.",
    "I cannot help with that.",
    "",
]
JUDGED = ["reward.grader=judge", "reward.judge.base_url=http://localhost:1/v1", "reward.judge.model=m"]


def record(options: dict[str, str] | None = OPTIONS, name: str = "r") -> Record:
    return Record(
        id=name, images=("0.png",), question="heart rate", options=options, answer="B" if options else "wide",
        specialties=("x",), source="s", license="l", split="train", image_group=name,
    )  # fmt: skip


def case(text: str, perspective: str | None = "intuitive") -> Case:
    return Case(record(), text, perspective)


# --- rules ------------------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(st.sampled_from(TEXTS), st.sampled_from([None, *PERSPECTIVES]), st.sampled_from([OPTIONS, None])),
        max_size=6,
    )
)
@settings(max_examples=30, deadline=None)
def test_rules_score_what_was_asked(rows: list[tuple[str, str | None, dict[str, str] | None]]) -> None:
    found = RulesGrader()([Case(record(options), text, asked) for text, asked, options in rows])
    assert len(found.scores) == len(found.criteria) == len(rows) and found.counts == {}
    for (text, prompted, options), row, held in zip(rows, found.scores, found.criteria, strict=True):
        asked = [name for name in PERSPECTIVES if prompted in (None, name)]
        assert held == {name: criteria(text, options, name) for name in asked}
        for name, score in zip(PERSPECTIVES, row, strict=True):
            assert score == adherence(text, options, name) if name in asked else math.isnan(score)


def test_rules_check_by_the_ground_truth_of_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def grades(completion: str, options: Any, truth: Any) -> Grades:
        seen.append((completion, options, truth))
        return Grades(dict.fromkeys(PERSPECTIVES, 0.5), {name: {"c": None} for name in PERSPECTIVES}, ())

    monkeypatch.setattr(grading, "truth_of", lambda record: f"truth of {record.id}")
    monkeypatch.setattr(grading, "grades", grades)
    assert RulesGrader()([case("text", None)]).scores == [[0.5] * 4]
    assert seen == [("text", OPTIONS, "truth of r")]


def test_a_perspective_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="lateral"):
        case("text", "lateral")


# --- rules and judge --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # 50 texts: both yes 20, rules alone 5, judge alone 10, neither 15: p_o = 0.7, p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
        ((20, 5, 10, 15), 0.4),
        ((45, 15, 25, 15), 0.1304348),  # p_o = 0.6, p_e = 0.6 * 0.7 + 0.4 * 0.3 = 0.54
        ((3, 0, 0, 3), 1.0),
        ((0, 3, 3, 0), -1.0),
        ((1, 0, 3, 0), 0.0),  # the judge always says yes
        ((4, 0, 0, 0), math.nan),
        ((0, 0, 0, 4), math.nan),
        ((0, 0, 0, 0), math.nan),
    ],
)
def test_kappa_by_hand(counts: tuple[int, int, int, int], expected: float) -> None:
    assert kappa(*counts) == pytest.approx(expected, nan_ok=True)


def scripted(monkeypatch: pytest.MonkeyPatch, faults: str = "unsound", **values: float | None) -> None:
    """Rules that say `values` of every perspective, and find faults in a text with that word."""

    def grades(completion: str, options: Any, truth: Any) -> Grades:
        wrong = ("refusal",) if faults in completion else ()
        score = 0.0 if wrong else 0.25
        return Grades(dict.fromkeys(PERSPECTIVES, score), {name: values for name in PERSPECTIVES}, wrong)

    monkeypatch.setattr(grading, "grades", grades)


def test_what_both_could_judge_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, a=1.0, b=0.5, c=0.49, d=0.0, e=None)
    judged = {"intuitive": {"a": True, "b": False, "c": True, "d": False, "e": True, "unknown": True}}
    assert pairs_of(case("text"), judged) == {"both": 1, "rules_alone": 1, "judge_alone": 1, "neither": 1}
    several = {name: {"a": True} for name in PERSPECTIVES}
    assert pairs_of(case("text", None), several) == {"both": 4, "rules_alone": 0, "judge_alone": 0, "neither": 0}


class Scripted:
    """A judge that says all holds, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def __call__(self, cases: Sequence[Case]) -> Grading:
        self.shown += [one.completion for one in cases]
        counts = {
            "judged": float(len(cases)),
            "missing": 0.0,
            "calls": 1.0,
            "cached": 0.0,
            "tokens": 9.0,
            "prompt_tokens": 70.0,
        }
        counts |= {"seconds": 0.5, **dict.fromkeys(PAIRS, 0.0)}
        return Grading(
            [[1.0 if name in one.asked else math.nan for name in PERSPECTIVES] for one in cases],
            [{name: {"a": 1.0} for name in one.asked} for one in cases], counts,
        )  # fmt: skip


def test_rules_veto_what_is_unsound_and_the_judge_grades_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, a=1.0, b=None)
    judge, nan = Scripted(), math.nan
    found = HybridGrader(judge)([case("unsound one"), case("fine"), case("unsound, too", None), case("good")])
    assert judge.shown == ["fine", "good"]
    expected = [[nan, 0.0, nan, nan], [nan, 1.0, nan, nan], [0.0] * 4, [nan, 1.0, nan, nan]]
    assert [[str(v) for v in row] for row in found.scores] == [[str(v) for v in row] for row in expected]
    assert found.criteria[0] == {"intuitive": {"a": 0.0, "b": None}} and found.criteria[1] == {"intuitive": {"a": 1.0}}
    told = report_of(found.counts)
    assert told["grader/vetoed"] == 0.5 and told["grader/calls"] == 1.0 and told["grader/missing"] == 0.0
    nothing = HybridGrader(judge)([case("unsound")])
    assert nothing.scores[0][1] == 0.0 and judge.shown == ["fine", "good"]
    assert report_of(nothing.counts)["grader/vetoed"] == 1.0


def test_the_report_leaves_out_what_is_undefined() -> None:
    counts = dict.fromkeys(("judged", "missing", "calls", "cached", "tokens", "prompt_tokens", "seconds", *PAIRS), 0.0)
    assert report_of({}) == {}
    assert set(report_of(counts)) == {
        f"grader/{n}" for n in ("missing", "calls", "cached", "tokens", "prompt_tokens", "seconds")
    }
    told = report_of(counts | {"judged": 8.0, "missing": 2.0, "both": 1.0, "neither": 1.0})
    assert told["grader/missing"] == 0.25 and told["grader/kappa"] == 1.0


# --- in a rollout -----------------------------------------------------------------------------------------------------


class Judge(OpenAIEngine):
    """Says how many criteria hold by the length of a completion, and nothing of one with a word of `lost`."""

    def __init__(self, lost: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        super().__init__("http://localhost:1/v1", "m")
        self.lost = lost

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        for place, ask in enumerate(asks):
            assert ask.format is not None
            whole = ask.format["json_schema"]["schema"]["properties"]
            said = ask.text.split("\nCompletion: ")[1].split("\n")[0]
            held = len(said) % 4
            reply = {p: {c: n < held for n, c in enumerate(one["properties"])} for p, one in whole.items()}
            bad = any(word in said for word in self.lost)
            yield place, Reply("no idea" if bad else json.dumps(reply), 5, "stop", 0.1, None)


def rolled(
    tiny: Any, picture: Any, root: Path, monkeypatch: pytest.MonkeyPatch, grader: Any, *, gate: str = "none",
    conditioning: str = "prompted",
) -> Rollout:  # fmt: skip
    """Two groups of eight completions, the same in every call."""
    model, encoder = copy.deepcopy(tiny[0]), tiny[1]
    picture(0).save(root / "0.png")
    said = [f"text {'x' * (n * n % 7)} {n}!" for n in range(16)]

    def generate(*_: Any, **__: Any) -> Completions:
        ids = torch.full((16, 3), 50)
        return Completions(ids, torch.ones_like(ids), torch.zeros(16, 3), torch.ones(16).bool())

    outcome = [float(n % 3 == 0) for n in range(16)]
    with monkeypatch.context() as patch:
        patch.setattr(generating, "generate", generate)
        patch.setattr(rollouts.rewards, "outcome", lambda *_, **__: (outcome, {"accuracy": outcome}))
        turn = iter(said)
        patch.setattr(encoder, "decode", lambda _: next(turn))
        return roll_out(
            model, encoder, [record(name="r0"), record(name="r1")], root, sampling=Sampling(8, 3, 1.0, 1.0, 0),
            guidance=Guidance((1.0, 2.0, 0.5, 1.0), 0.7, gate, conditioning, "group"), protocol="robust",
            reward_weights={"accuracy": 1.0}, grader=grader, seeds=[1, 2],
        )  # fmt: skip


@pytest.mark.parametrize("gate", ["none", "correct"])
def test_a_missing_grade_moves_the_others_by_its_absence_alone(tiny, picture, tmp_path, monkeypatch, gate):
    """It is a completion whose perspective was not asked: of the same rollout, one reply malformed."""

    def judged(lost: set[str]) -> Rollout:
        grader = JudgeGrader(Judge(lost))
        return rolled(tiny, picture, tmp_path, monkeypatch, grader, gate=gate)

    whole, less = judged(set()), judged({" 3!"})
    place = (0, 3, 1)  # the fourth of the first group: intuitive has its third and fourth
    assert not whole.adherence[place].isnan() and less.adherence[place].isnan() and less.criteria[3] == {}
    there = torch.ones(2, 8, 4, dtype=torch.bool)
    there[place] = False
    assert torch.equal(less.adherence.nan_to_num(-1)[there], whole.adherence.nan_to_num(-1)[there])
    assert not less.advantages.isnan().any()
    assert torch.equal(less.advantages[1], whole.advantages[1])  # the other group
    base = group_relative(less.outcome)
    right = less.outcome if gate == "correct" else torch.ones(2, 8)
    # by hand: each perspective among those that have a grade, centred over the group
    weights, u = (1.0, 2.0, 0.5, 1.0), torch.zeros(8)
    for k, weight in enumerate(weights):
        scores = less.adherence[0, :, k]
        have = ~scores.isnan()
        if have.sum() > 1:
            u[have] += weight * (scores[have] - scores[have].mean()) / (scores[have].std() + 1e-4)
    u = u * right[0]
    torch.testing.assert_close(less.advantages[0], base[0] + 0.7 * (u - u.mean()), atol=1e-5, rtol=0)
    if gate == "none":
        others = [g for g in range(8) if whole.perspectives[g] != "intuitive"]
        torch.testing.assert_close(less.advantages[0, others], whole.advantages[0, others], atol=1e-6, rtol=0)
        assert whole.terms[0, 2:4, 1].abs().min() > 0 and (less.terms[0, 2:4, 1] == 0).all()  # nobody to compare with
    told = report(less)
    assert told["grader/missing"] == 1 / 16 and told["grader/calls"] == 16 and told["grader/tokens"] == 80
    assert report(whole)["grader/missing"] == 0


def test_free_completions_are_graded_by_all_four_in_one_call(tiny, picture, tmp_path, monkeypatch):
    grader = JudgeGrader(Judge({" 3!"}))
    rollout = rolled(tiny, picture, tmp_path, monkeypatch, grader, conditioning="free")
    assert report(rollout)["grader/calls"] == 16
    assert rollout.adherence[0, 3].isnan().all() and rollout.adherence.isnan().sum() == 4
    assert (rollout.terms[0, 3] - rollout.terms[0, 3].mean()).isfinite().all()
    assert set(rollout.criteria[0]) == set(PERSPECTIVES)
    rows = completion_rows(0, [record(), record()], rollout, tmp_path)
    assert rows[3]["criteria"] == ""
    first = next(iter(perspectives()["differential"].criteria))
    assert rows[0]["criteria"].startswith(f"differential/{first}=")


def test_a_cell_says_what_held() -> None:
    assert criteria_text({}) == ""
    assert criteria_text({"intuitive": {"a": 1.0, "b": 0.256, "c": None, "d": 0.0}}) == "a=1 b=0.26 c=- d=0"
    assert criteria_text({"intuitive": {"a": 1.0}, "bayesian": {"a": 0.0}}) == "intuitive/a=1 bayesian/a=0"


# --- the config -------------------------------------------------------------------------------------------------------


def test_the_config_names_the_grader(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    assert isinstance(grader_of(composed().reward, ledger), RulesGrader)
    more = ["concurrency=3", "timeout_s=4", "retries=2", "max_new_tokens=99", "revision=new", "shows_images=false",
            "shows_answer=true", "api_key_env=JUDGE_KEY", "requests_per_minute=60", "tokens_per_minute=1e5",
            "max_requests=7", "max_cost=2.5", "prices={input: 1, output: 3, version: mine}"]  # fmt: skip
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    reward = composed(*JUDGED, *(f"reward.judge.{one}" for one in more)).reward
    grader = grader_of(reward, ledger)
    assert isinstance(grader, JudgeGrader)
    engine = grader.engine
    assert (engine.base_url, engine.model, engine.api_key) == ("http://localhost:1/v1", "m", "s3cret")
    assert (engine.concurrency, engine.timeout_s, engine.retries, engine.max_new_tokens) == (3, 4.0, 2, 99)
    assert (engine.revision, grader.shows_images, grader.shows_answer) == ("new", False, True)
    assert (engine.requests_per_minute, engine.tokens_per_minute) == (60.0, 1e5)
    assert (engine.max_requests, engine.max_cost, engine.prices) == (7, 2.5, Prices(1.0, 3.0, "mine"))
    assert engine.ledger is ledger and not ledger.path.exists()
    hybrid = grader_of(replace(reward, grader="hybrid"), ledger)
    assert isinstance(hybrid, HybridGrader) and isinstance(hybrid.judge, JudgeGrader)
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match=r"JUDGE_KEY \(reward.judge.api_key_env\) is empty"):
        grader_of(reward, ledger)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.grader=judg"], ["reward.grader", "did you mean 'judge'"]),
        (JUDGED[:2], ["reward.judge.base_url", "reward.judge.model"]),
        ([JUDGED[0], JUDGED[2]], ["reward.judge.base_url", "reward.judge.model"]),
        ([*JUDGED, "reward.judge.concurrency=0"], ["reward.judge.concurrency"]),
        ([*JUDGED, "reward.judge.timeout_s=0"], ["reward.judge.timeout_s"]),
        ([*JUDGED, "reward.judge.max_new_tokens=0"], ["reward.judge.max_new_tokens"]),
        ([*JUDGED, "reward.judge.retries=-1"], ["reward.judge.retries"]),
        ([*JUDGED, "reward.judge.requests_per_minute=0"], ["reward.judge.requests_per_minute"]),
        ([*JUDGED, "reward.judge.max_requests=0"], ["reward.judge.max_requests"]),
        ([*JUDGED, "reward.judge.max_cost=1"], ["reward.judge.max_cost", "prices"]),
        ([*JUDGED, "reward.judge.prices.input=1"], ["reward.judge.prices", "version"]),
        ([*JUDGED, "reward.judge.prices={input: -1, output: 1, version: a}"], ["reward.judge.prices.input"]),
    ],
)
def test_a_grader_that_cannot_be_is_refused_at_once(overrides, words):
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reward.judge.base_url=me:s3cret@localhost:1"], ["reward.judge.base_url", "http://"]),
        (["reward.judge.api_key_env=NO_SUCH_KEY"], ["NO_SUCH_KEY", "reward.judge.api_key_env"]),
    ],
)
def test_its_address_and_key_are_looked_at_before_anything_is_trained(overrides, words, tmp_path):
    given = [f"paths.outputs={tmp_path}", "stage=gba", "data.source.train=4", *JUDGED, *overrides]
    with pytest.raises(UserError) as caught:
        check_inputs(composed(*given))
    assert all(word in str(caught.value) for word in words) and "s3cret" not in str(caught.value)
    with pytest.raises(UserError, match="NO_SUCH_KEY"):
        check_inputs(composed(f"paths.outputs={tmp_path}", *JUDGED, "reward.judge.api_key_env=NO_SUCH_KEY"))
    check_inputs(composed(f"paths.outputs={tmp_path}", "stage=pretrain", *JUDGED, *overrides))  # it asks no judge


def test_the_runs_key_holds_what_decides_the_grades():
    def key(*overrides: str) -> Any:
        return reward_key(composed(*overrides))

    plain = key()
    assert plain == {"weights": {"accuracy": 1.0, "format": 0.2}, "protocol": "robust"}  # as before there were judges
    judged = key(*JUDGED)
    assert judged != plain and key(*JUDGED, "reward.grader=hybrid") != judged
    same = ("concurrency=1", "timeout_s=9", "retries=0", "api_key_env=KEY", "base_url=http://me:s3cret@localhost:1/v1/")
    for change in same[:4]:
        assert key(*JUDGED, f"reward.judge.{change}") == judged, change
    with_password = str(key(*JUDGED, f"reward.judge.{same[4]}"))
    assert "s3cret" not in with_password
    assert with_password == str(key(*JUDGED, "reward.judge.base_url=http://me:other@localhost:1/v1"))
    changes = ("base_url=http://localhost:2/v1", "model=n", "revision=r", "shows_images=false", "shows_answer=true",
               "max_new_tokens=9")  # fmt: skip
    found = [str(key(*JUDGED, f"reward.judge.{change}")) for change in changes]
    assert len({*found, str(judged)}) == len(changes) + 1


def test_rubrics_decide_a_reasoner_only_where_a_perspective_has_weight():
    weighted, plain = (reasoner_key(composed(*arm), ["x"]) for arm in ([], ["gba=outcome_only"]))
    assert "rubrics" in weighted["rules"] and set(weighted["guidelines"]) >= {"cues.yaml", "weights.yaml"}
    assert "rubrics" not in plain["rules"] and plain["guidelines"] is None


def test_the_wording_of_the_prompt_is_part_of_the_key(monkeypatch):
    before = reward_key(composed(*JUDGED))
    monkeypatch.setattr("mmedexpert.stages.reasoner_key.VERSION", "other")
    assert reward_key(composed(*JUDGED)) != before


@pytest.mark.parametrize("overrides", [["gba.weights=[0,0,0,0]"], ["gba.scale=0"]])
def test_no_judge_is_paid_where_no_perspective_has_weight(overrides):
    config = composed(*JUDGED, *overrides)
    assert acting_reward(config).grader == "rules" and reward_key(config) == reward_key(composed())
    assert acting_reward(composed(*JUDGED)).grader == "judge"
