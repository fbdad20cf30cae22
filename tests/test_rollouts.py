"""What a rollout holds: groups taken and joined row by row, what is logged of them, how completions are asked for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.models import generate as generating
from mmedexpert.models.encode import Encoder
from mmedexpert.models.generate import Completions
from mmedexpert.training import rollouts
from mmedexpert.training.advantages import group_relative
from mmedexpert.training.batches import step_seed
from mmedexpert.training.grading import PAIRS, Case, Grading, RulesGrader
from mmedexpert.training.rollout_report import completion_rows, repetition, report
from mmedexpert.training.rollouts import Guidance, Rollout, Sampling, advantages, roll_out

B, G, K = 3, 4, 4
UNEVEN = ["differential"] * 3 + ["intuitive"] * 3 + ["analytical"] * 2


def made(tokens: int = 5, seed: int = 0, old: bool = True) -> Rollout:
    """Three groups of four in which no two values are alike."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (B * G,), generator=draw)
    lengths[0] = tokens
    rows = range(100 * seed, 100 * seed + B * G)
    adherence = torch.rand(B, G, K, generator=draw)
    adherence[..., 3] = torch.nan  # nobody was asked for the last perspective
    adherence[0, 0, 0] = torch.nan
    return Rollout(
        [f"prompt {n}" for n in rows], [[n] * int(length) for n, length in zip(rows, lengths, strict=True)],  # type: ignore[misc]
        [f"text {n}" for n in rows], [PERSPECTIVES[n % 3] if n % 4 else None for n in rows],
        torch.randn(B * G, tokens, generator=draw), (torch.arange(tokens) < lengths[:, None]).long(),
        torch.arange(B * G) % 5 > 0, torch.rand(B, G, generator=draw),
        {"accuracy": [float(n % 3 == 0) for n in rows], "format": [float(n) for n in rows]}, adherence,
        torch.randn(B, G, K, generator=draw), torch.rand(B, G, generator=draw), torch.rand(B, G, generator=draw),
        torch.randn(B, G, generator=draw), {"gen": 2.0 + seed, "reward": 0.5},
        torch.randn(B * G, tokens, generator=draw) if old else None,
        [{PERSPECTIVES[n % 3]: {"first": n / 1000, "second": None}} for n in rows],
        {"judged": 12.0, "missing": 3.0 + seed, "calls": 9.0, "cached": 2.0, "tokens": 50.0}
        | {"prompt_tokens": 7.0, "seconds": 0.25}
        | dict(zip(PAIRS, (20.0, 5.0, 10.0, 15.0), strict=True)),
        {"judged": 12.0, "missing": 3.0, "calls": 24.0, "tokens": 7.0},
    )  # fmt: skip


def rows_of(rollout: Rollout) -> list[list[Any]]:
    """Everything a rollout holds of each completion, padding cut off."""
    found = []
    for i in range(len(rollout.texts)):
        b, g, n = i // G, i % G, len(rollout.completions[i])
        row: list[Any] = [rollout.prompts[i], rollout.completions[i], rollout.texts[i], rollout.perspectives[i]]
        row += [rollout.sampling_logps[i, :n].tolist(), rollout.mask[i].sum().item(), rollout.finished[i].item()]
        row += [rollout.old_logps[i, :n].tolist() if rollout.old_logps is not None else None]
        row += [float(rollout.outcome[b, g]), rollout.adherence[b, g].nan_to_num(-1).tolist()]
        row += [rollout.criteria[i], rollout.terms[b, g].tolist(), float(rollout.advantages[b, g])]
        row += [float(rollout.judged[b, g]), float(rollout.judge_term[b, g])]
        found.append([*row, {name: values[i] for name, values in rollout.parts.items()}])
    return found


@pytest.mark.parametrize("old", [True, False])
def test_groups_are_taken_and_joined_with_all_that_belongs_to_them(old):
    one, other = made(old=old), made(tokens=8, seed=1, old=old)
    whole, more = rows_of(one), rows_of(other)
    assert rows_of(one.take([2, 0])) == whole[2 * G :] + whole[:G]
    assert one.take([1]).seconds == one.seconds and (one.take([1]).old_logps is None) == (not old)
    for first, second, expected in ((one, other, whole + more), (other, one, more + whole)):
        both = first.join(second)
        assert rows_of(both) == expected and both.mask.shape == (2 * B * G, 8)
        assert both.sampling_logps.shape == both.mask.shape and both.outcome.shape == (2 * B, G)
        assert both.seconds == {"gen": 5.0, "reward": 1.0}
        assert both.graded == {
            "judged": 24.0, "missing": 7.0, "calls": 18.0, "cached": 4.0, "tokens": 100.0,
            "prompt_tokens": 14.0, "seconds": 0.5, "both": 40.0,
            "rules_alone": 10.0, "judge_alone": 20.0, "neither": 30.0,
        }  # fmt: skip
        assert both.scored == {"judged": 24.0, "missing": 6.0, "calls": 48.0, "tokens": 14.0}
    assert (
        one.take([1]).scored == one.scored and one.take([1]).graded == one.graded
    )  # of all that were graded, as seconds are
    plain = replace(one, criteria=[], graded={})
    assert plain.take([1]).criteria == [] and plain.join(replace(other, criteria=[])).graded == other.graded


def test_groups_without_an_advantage_do_not_move_the_policy():
    rollout = made()
    rollout.advantages = torch.tensor([[0.0, 0.0, 0.0, 1e-9], [0.0] * 4, [-1.0, 0.0, 0.0, 0.0]])
    assert rollout.informative() == [0, 2]


def test_the_report_is_of_what_its_names_say():
    rollout = made()
    found, lengths = report(rollout), [len(row) for row in rollout.completions]
    ended = [n for n, finished in zip(lengths, rollout.finished, strict=True) if finished]
    rewards, asked = rollout.outcome, rollout.adherence
    expected = {
        "reward": rewards.mean(), "reward_std": rewards.std(),
        "reward_std_group": sum(group.std() for group in rewards) / B, "frac_reward_zero_std": 0.0,
        "completions/mean_length": sum(lengths) / len(lengths), "completions/min_length": min(lengths),
        "completions/max_length": max(lengths), "completions/clipped_ratio": 1 - len(ended) / len(lengths),
        "completions/mean_terminated_length": sum(ended) / len(ended), "completions/min_terminated_length": min(ended),
        "completions/max_terminated_length": max(ended), "advantages/std": rollout.advantages.std(),
        "advantages/share": rollout.terms.sum(2).abs().mean() / rollout.advantages.abs().mean(),
        "adherence": asked[~asked.isnan()].mean(), "rewards/accuracy/mean": 1 / 3, "rewards/format/mean": 5.5,
        "rewards/accuracy/std": torch.tensor(rollout.parts["accuracy"]).std(),
        "rewards/format/std": torch.arange(12.0).std(), "grader/missing": 0.25, "grader/calls": 9.0,
        "grader/cached": 2.0, "grader/tokens": 50.0, "grader/prompt_tokens": 7.0, "grader/seconds": 0.25,
        "grader/kappa": 0.4, "rewards/judge/mean": rollout.judged.mean(), "rewards/judge/std": rollout.judged.std(),
        "advantages/judge/share": rollout.judge_term.abs().mean() / rollout.advantages.abs().mean(),
        "judge/calls": 24.0, "judge/tokens": 7.0, "judge/missing": 0.25,
    }  # fmt: skip
    for k, name in enumerate(PERSPECTIVES[:3]):
        followed = asked[..., k]
        expected[f"adherence/{name}"] = followed[~followed.isnan()].mean()
        expected[f"advantages/{name}/mean"] = rollout.terms[..., k].mean()
        expected[f"advantages/{name}/mean_abs"] = rollout.terms[..., k].abs().mean()
    assert set(found) == set(expected)  # nothing of the perspective that nobody was asked for
    assert found == pytest.approx({name: float(value) for name, value in expected.items()})


def test_rules_report_nothing_of_a_grader():
    assert not [name for name in report(replace(made(), graded={}, scored={})) if "grader" in name or "judge" in name]


def test_the_report_of_groups_that_agree_and_of_completions_that_never_end():
    rollout = made()
    rollout.outcome, rollout.finished = torch.ones(B, G), torch.zeros(B * G, dtype=torch.bool)
    rollout.outcome[0, 1] = 0.0
    found = report(rollout)
    assert found["frac_reward_zero_std"] == pytest.approx(2 / 3)
    assert found["completions/clipped_ratio"] == 1.0 and found["completions/max_terminated_length"] == 0.0
    assert found["completions/mean_terminated_length"] == found["completions/min_terminated_length"] == 0.0


def records(count: int = B) -> list[Record]:
    return [
        Record(
            id=f"r{n}", images=(f"{n}.png",), question="heart rate" + " is low" * n, options={"A": "high", "B": "low"},
            answer="AB"[n % 2], specialties=("x",), source="s", license="l", split="train", image_group=str(n),
        )
        for n in range(count)
    ]  # fmt: skip


def test_a_row_of_the_table_is_one_completion(tmp_path):
    rollout, asked = made(), records()
    rows = completion_rows(7, asked, rollout, tmp_path)
    assert len(rows) == B * G
    for i, row in enumerate(rows):
        record = asked[i // G]
        adherence = rollout.adherence[i // G, i % G].nan_to_num(-1).tolist()
        shown = [row[f"adherence_{name}"] for name in PERSPECTIVES]
        assert [-1 if value != value else value for value in shown] == adherence
        assert {name: value for name, value in row.items() if not name.startswith("adherence")} == {
            "step": 7, "record": record.id, "image": str(tmp_path / record.images[0]), "question": record.question,
            "perspective": rollout.perspectives[i] or "none", "completion": f"text {i}", "answer": record.answer,
            "accuracy": float(i % 3 == 0), "format": float(i),
            "judge": float(rollout.judged[i // G, i % G]), "criteria": f"first={i / 1000:.2g} second=-",
            "advantage": float(rollout.advantages[i // G, i % G]),
        }  # fmt: skip


@pytest.mark.parametrize("gate", ["correct", "none"])
def test_the_terms_that_are_logged_add_up_to_the_advantage(gate):
    draw = torch.Generator().manual_seed(0)
    outcome, adherence = torch.rand(B, G, generator=draw), torch.rand(B, G, K, generator=draw)
    correct = torch.rand(B, G, generator=draw) > 0.5
    correct[1] = False
    for scale_rewards in ("group", "none"):
        guidance = Guidance((1.0, 0.5, 0.0, 2.0), 0.7, gate, "prompted", scale_rewards)
        total, terms, judge = advantages(outcome, adherence, outcome, guidance, correct)
        assert not judge.any()
        base = group_relative(outcome, scale=scale_rewards)
        assert torch.allclose(base + terms.sum(2), total) and not torch.allclose(base, total)
        assert bool((terms[1] == 0).all()) == (gate == "correct")  # a group without a right answer


def test_outcomes_are_compared_by_the_perspective_that_was_asked():
    """With gba.grouping=perspective, weights and all; the terms are what they are within a question."""
    draw = torch.Generator().manual_seed(1)
    outcome, adherence = torch.rand(B, 8, generator=draw), torch.rand(B, 8, K, generator=draw)
    weights, correct = (1.0, 0.5, 0.0, 2.0), torch.rand(B, 8, generator=draw) > 0.5
    settings = Guidance(weights, 0.7, "correct", "prompted", "group")
    by_perspective = replace(settings, grouping="perspective")
    total, terms, _ = advantages(outcome, adherence, outcome, by_perspective, correct)
    of_each = [weight * group_relative(outcome[:, 2 * k : 2 * k + 2]) for k, weight in enumerate(weights)]
    torch.testing.assert_close(total, torch.cat(of_each, 1) + terms.sum(2))
    torch.testing.assert_close(terms, advantages(outcome, adherence, outcome, settings, correct)[1])


def test_a_judges_scores_are_normalised_in_their_group_and_added_with_their_weight():
    """A score that failed adds nothing to its completion, and is no bad score for the others to be compared with."""
    draw = torch.Generator().manual_seed(2)
    outcome, adherence, judged = (torch.rand(*size, generator=draw) for size in ((B, G), (B, G, K), (B, G)))
    judged[0, 1] = torch.nan
    correct = outcome > 0.5
    settings = Guidance((1.0, 1.0, 1.0, 1.0), 0.5, "none", "prompted", "group")
    plain, terms, _ = advantages(outcome, adherence, judged, settings, correct)
    for weight in (0.5, 2.0):
        total, same, judge = advantages(outcome, adherence, judged, replace(settings, judge_weight=weight), correct)
        torch.testing.assert_close(total, plain + judge)
        torch.testing.assert_close(same, terms)
        torch.testing.assert_close(judge, weight * group_relative(judged))
        assert judge[0, 1] == 0 and abs(float(judge[0].sum())) < 1e-6
        kept = [0, 2, 3]
        torch.testing.assert_close(judge[:1, kept], weight * group_relative(judged[:1, kept]))


def test_what_repeats_itself_is_measured():
    assert repetition("one two three four five six") == 0 == repetition("too short")
    assert repetition("the heart is large the heart is large") == pytest.approx(1 / 5)
    assert repetition("so " * 20) > 0.9


def test_an_open_question_with_two_images_takes_the_same_path(tiny, picture, tmp_path, monkeypatch):
    model, encoder = copy.deepcopy(tiny[0]), tiny[1]
    for n in range(2):
        picture(n).save(tmp_path / f"{n}.png")
    record = replace(records(1)[0], images=("0.png", "1.png"), options=None, answer="Pneumonia")
    thought = (
        "The differential includes pneumonia, edema and embolism. Edema would be bilateral with a large heart, and is "
        "unlikely here. Embolism is ruled out by quiet legs. Fever and a dense lower lobe leave pneumonia."
    )
    right, wrong = (f"<think>{thought}</think><answer>{answer}</answer>" for answer in ("pneumonia", "embolism"))

    def generate(model: Any, encoder: Any, prompts: Any, **options: Any) -> Completions:
        assert [len(prompt.images) for prompt in prompts] == [2] * 4
        ids = [encoder.tokenizer(text).input_ids for text in (right, wrong) * 4]
        width = max(map(len, ids))
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
        padded = torch.tensor([row + [encoder.pad_id] * (width - len(row)) for row in ids])
        return Completions(padded, mask, torch.zeros(mask.shape), torch.ones(8).bool())

    monkeypatch.setattr(generating, "generate", generate)
    rollout = roll_out(
        model, encoder, [record], tmp_path, sampling=Sampling(8, 300, 1.0, 1.0, 0),
        guidance=Guidance((1.0, 1.0, 1.0, 1.0), 1.0, "none", "prompted", "group"), reward_weights={"accuracy": 1.0},
        protocol="robust", grader=RulesGrader(), seeds=[1],
    )  # fmt: skip
    assert rollout.texts == [right, wrong] * 4
    assert rollout.outcome.tolist() == [[1.0, 0.0] * 4]
    followed = rollout.adherence[0, :2, 0]  # asked for a differential: the second gives what it has put aside
    assert followed[0] > 0.5 and followed[1] < 0.5
    assert rollout.advantages[0, 0] > 0 > rollout.advantages[0, 1]
    assert completion_rows(1, [record], rollout, tmp_path)[0]["criteria"].count("=") == 6 + 2


@pytest.mark.parametrize(
    ("conditioning", "weights", "distinct", "each"),
    [
        ("prompted", (1.0, 0.0, 0.0, 0.0), list(PERSPECTIVES), 2),
        ("prompted_weighted", (0.0, 1.0, 0.0, 1.0), ["intuitive", "bayesian"], 4),
        ("prompted_weighted", (1.0, 1.0, 1.0, 0.0), UNEVEN, 1),
        ("free", (1.0,) * 4, [None], 8),
    ],
)  # fmt: skip
@pytest.mark.parametrize("style", ["small", "full"])
def test_what_is_sampled_and_how(tiny, picture, tmp_path, monkeypatch, style, conditioning, weights, distinct, each):
    """Every setting of the sampler arrives; completions that share an instruction are asked for together."""
    model, encoder = copy.deepcopy(tiny[0]), Encoder(tiny[1].tokenizer, tiny[1].image_processor, style=style)
    asked, group = records(2), 8
    for n in range(2):
        picture(n).save(tmp_path / f"{n}.png")
    calls: list[dict[str, Any]] = []

    def generate(model: Any, encoder: Any, prompts: Any, **options: Any) -> Completions:
        calls.append({"prompts": prompts, **options})
        count = 2 * group
        ids = torch.full((count, 3), 50)
        return Completions(ids, torch.ones_like(ids), torch.zeros(count, 3), torch.ones(count).bool())

    graded: list[Case] = []

    def grader(cases: Any) -> Grading:
        graded.extend(cases)
        return RulesGrader()(cases)

    paid: list[dict[str, Any]] = []
    outcome = rollouts.rewards.outcome
    monkeypatch.setattr(generating, "generate", generate)
    monkeypatch.setattr(
        rollouts.rewards, "outcome", lambda texts, **given: paid.append(given) or outcome(texts, **given)
    )
    rollout = roll_out(
        model, encoder, asked, tmp_path, sampling=Sampling(group, 3, 0.9, 0.8, 7),
        guidance=Guidance(weights, 1.0, "none", conditioning, "group"), reward_weights={"accuracy": 1.0},
        protocol="medevalkit", grader=grader, seeds=[11, 12],
    )  # fmt: skip
    (call,) = calls
    (given,) = paid
    assert given["protocol"] == "medevalkit" and given["weights"] == {"accuracy": 1.0}
    assert [one.answer for one in given["record"]] == ["A"] * group + ["B"] * group
    settings = {name: call[name] for name in ("max_new_tokens", "num_generations", "temperature", "top_p", "top_k")}
    assert settings == {
        "max_new_tokens": 3, "num_generations": each, "temperature": 0.9, "top_p": 0.8, "top_k": 7,
    }  # fmt: skip
    assert call["banned_ids"] == encoder.banned_ids
    assert call["seeds"] == [step_seed(seed, place) for seed in (11, 12) for place in range(len(distinct))]
    told = [instructions(style)[name] if name else "" for name in distinct]
    expected = [encoder.prompt(record, tmp_path, text).input_ids for record in asked for text in told]
    assert [prompt.input_ids for prompt in call["prompts"]] == expected
    images = [(tmp_path / f"{n}.png",) for n in range(2) for _ in range(group)]
    repeated = [record for record in asked for _ in range(group)]
    rows = zip(repeated, rollout.texts, rollout.perspectives, images, strict=True)
    assert graded == [Case(*row) for row in rows]
    assert [set(found) for found in rollout.criteria] == [set(case.asked) for case in graded]
    assert rollout.perspectives == [name for name in distinct for _ in range(each)] * 2
    assert [p.input_ids for p in rollout.prompts] == [ids for ids in expected for _ in range(each)]
    assert set(rollout.seconds) == {"gen", "reward"} and all(0 <= value < 60 for value in rollout.seconds.values())
