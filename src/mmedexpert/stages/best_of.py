"""`stage=eval eval.best_of=8`: several samples of each question, and which a judge picks, beside the greedy answers.

Two runs a model and set: the samples, drawn once, and `best_of`, what a judge and the rules of scoring make of them and
of the greedy evaluation: another judge asks the model nothing anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from mmedexpert.evaluation.asked import REFUSED, Row, lines
from mmedexpert.evaluation.best_of import FILE, flat, numbers_of, read_answers, read_samples, sample
from mmedexpert.evaluation.predict import asks_of, read_predictions
from mmedexpert.judging.picking import FILE as SCORES
from mmedexpert.judging.picking import scores_of
from mmedexpert.judging.scorer import Group, Scorer
from mmedexpert.models.encode import prompt_text
from mmedexpert.reporting.best_of import cost_rows, difference_rows, figure, model_rows, size_rows
from mmedexpert.reporting.tables import markdown, print_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, write_json
from mmedexpert.runtime.versions import rule_followed_by, versions
from mmedexpert.schema import Config
from mmedexpert.stages.answering import (
    Subject,
    answering_key,
    asking,
    engine_of,
    is_reward_model,
    longest_reply,
    style_of,
    tell_kept,
)
from mmedexpert.stages.common import model_key, stage_run, together
from mmedexpert.stages.questions import QuestionSource, protocol_of, system_prompt_of, words_of
from mmedexpert.stages.scorers import loaded_late, scorer_of, subject_of

STAGE, SAMPLES = "best_of", "samples"
SAID = (
    "Accuracy over questions, 95% intervals by bootstrap over images. pass@n: any of n samples right; vote@n: the "
    "answer given most often; pick@n: the judge's (a dash: no judge)."
)


def scorer_for(config: Config) -> Scorer | None:
    """The judge that picks, where one is asked; a server's is made before anything else, so that its mistakes are told
    at once, a trained one is loaded when it first scores: two models need not be in memory."""
    judge = config.eval.picker
    if config.eval.best_of == 1 or config.runs.explain or not (judge.model or judge.run):
        return None
    return loaded_late(config, judge, "eval.picker") if judge.run else scorer_of(config, judge, "eval.picker")


def run(
    config: Config, asked: Mapping[str, tuple[Subject, QuestionSource, Run]], scorer: Scorer | None
) -> dict[str, Run]:
    """The samples of each model on each set beside its greedy evaluation, and a table a set; of no baseline."""
    models = {name: one for name, one in asked.items() if one[0].baseline is None}
    together(config, [partial(_samples, subject=subject, asked=source) for subject, source, _ in models.values()])
    picker = _picker(config) if models else (None, False)  # once: a trained judge's pairs are read to know it
    done = {name: _best_of(config, *one, scorer, *picker) for name, one in models.items()}
    if config.runs.explain or rank() > 0:
        return done
    for name in dict.fromkeys(source.questions.name for _, source, _ in models.values()):
        one = {
            subject.name: done[key].summary
            for key, (subject, source, _) in models.items()
            if source.questions.name == name
        }
        print_table(model_rows(one), f"Best of {config.eval.best_of} on {name}", SAID)
        print_table(difference_rows(one), "Differences at all samples", "p by bootstrap over images, Holm over a row")
        print_table(cost_rows(one), "Cost")
    return done


def _samples(config: Config, subject: Subject, asked: QuestionSource) -> Run:
    """One model's samples of one question set."""
    settings, questions, protocol = config.eval, asked.questions, protocol_of(config, asked)
    asks = asks_of(questions, protocol=protocol, perspectives=settings.perspectives, style=style_of(config, subject))
    prompt = system_prompt_of(config, protocol)
    key = {
        "asked": words_of(asks), "engine": config.engine.name, "count": settings.best_of,
        "temperature": settings.temperature, "top_p": settings.top_p, **answering_key(asking(config), subject, prompt),
    }  # fmt: skip

    def work(run: Run) -> dict[str, float]:
        engine = engine_of(asking(config), subject, prompt, temperature=settings.temperature, top_p=settings.top_p)
        with run.phase("ask"):
            rows = sample(
                engine, asks, run.folder / FILE, count=settings.best_of, title=f"{subject.name} {questions.name}"
            )
        return {"samples": len(rows), "refused": sum(row["finish_reason"] == REFUSED for row in rows), **_cost(rows)}

    inputs = {"questions": asked.identity, "model": subject.identity}
    done = stage_run(config, SAMPLES, f"{subject.name}-{questions.name}", key, work, inputs)
    tell_kept(subject, done)
    return done


def _best_of(
    config: Config, subject: Subject, asked: QuestionSource, greedy: Run, scorer: Scorer | None,
    picker: list[Any] | None, alone: bool,
) -> Run:  # fmt: skip
    """What the samples are worth beside the greedy evaluation, by today's rules and this judge (see `_picker`)."""
    settings, questions, protocol = config.eval, asked.questions, protocol_of(config, asked)
    title, samples = f"{subject.name} {questions.name}", _samples(config, subject, asked)
    key = {
        "protocol": protocol, "picker": picker, "num_resamples": settings.num_resamples,
        "rules": {
            **versions("best_of", "robust", "medevalkit", "metrics", "stats"), **rule_followed_by(questions.judge)
        },
    }  # fmt: skip

    def work(run: Run) -> dict[str, float]:
        drawn = read_samples(samples.folder / FILE, questions.records, count=settings.best_of)
        rows, first = (
            read_answers(questions, drawn, protocol=protocol),
            read_predictions(greedy.folder / "predictions.jsonl"),
        )
        right = {row["id"]: row[protocol]["correct"] for row in first}
        everything = [one for each in drawn.values() for one in each]
        cost = {"greedy": _cost(first), "samples": _cost(everything)}
        rows = [row | {"greedy": right[row["id"]]} for row in rows]
        if scorer is not None:
            with run.phase("judge"):
                scores, cost["judge"] = scores_of(scorer, _groups(asked, drawn), run.folder / SCORES, title=title)
            rows = [row | {"scores": _scores(drawn[row["id"]], scores[row["id"]])} for row in rows]
        write_atomic(run.folder / "answers.jsonl", lines(rows))
        found = numbers_of(
            rows, picked=scorer is not None, num_resamples=settings.num_resamples, seed=config.seed,
            alone=alone,
        ) | {
            "protocol": protocol, "picker": picker, "cost": cost,
            "unparsed": float(np.mean([one is None for row in rows for one in row["picked"]])),
            "truncated": float(np.mean([one["finish_reason"] == "length" for one in everything])),
        }  # fmt: skip
        write_json(run.folder / "summary.json", found)
        table = markdown(model_rows({subject.name: found})) + "\n" + markdown(size_rows(found))
        write_atomic(run.folder / "table.md", table.encode())
        figure(found, f"Best of {settings.best_of}: {title}", run.folder / "best_of.png")
        return flat(found)

    inputs = {"questions": asked.identity, "samples": samples.run_id, "greedy": greedy.run_id}
    return stage_run(config, STAGE, f"{subject.name}-{questions.name}", key, work, inputs)


def _picker(config: Config) -> tuple[list[Any] | None, bool]:
    """What decides the judge's scores: not its speed, nor how it is logged in to; whether they are of single answers,
    or came of comparing all."""
    judge = config.eval.picker
    if judge.run:
        subject = subject_of(config, judge, "eval.picker")
        told: list[Any] = [subject.identity, model_key(config), config.model.system_prompt]
        told += [] if is_reward_model(subject) else [longest_reply(config, subject)]
        return [*told, versions("judge_scores", "pairwise")], is_reward_model(subject)
    if not judge.model:
        return None, False
    address = without_password(judge.base_url or "").rstrip("/")
    told = [address, judge.model, judge.revision, judge.max_new_tokens, judge.shows_images]
    return [*told, versions("judge_scores", "pairwise")], False


def _groups(asked: QuestionSource, drawn: Mapping[str, list[Row]]) -> list[Group]:
    """What the judge is shown: the question without an instruction, its images, the answers as they are."""
    return [
        Group(
            record.id, prompt_text(record), tuple(asked.questions.image_root / name for name in record.images),
            tuple(one["response"] for one in drawn[record.id] if one["finish_reason"] != REFUSED),
        )
        for record in asked.questions.records
    ]  # fmt: skip


def _scores(drawn: list[Row], scores: Mapping[str, float | None]) -> list[float | None]:
    """Of each sample its score; a refused one has none."""
    return [None if one["finish_reason"] == REFUSED else scores[one["response"]] for one in drawn]


def _cost(rows: list[Row]) -> dict[str, float]:
    return {name: float(sum(row[name] for row in rows)) for name in ("tokens", "seconds")}
