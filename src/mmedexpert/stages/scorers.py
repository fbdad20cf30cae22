"""The judge that a key names (`reward.judge`, `eval.picker`) as a scorer of answers: a trained one, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.judging.scorer import Group, RewardScorer, Scorer, Scores, VerdictScorer
from mmedexpert.models.encode import prompt_text
from mmedexpert.names import JUDGES
from mmedexpert.runtime.privacy import without_password
from mmedexpert.schema import Config, JudgeConfig
from mmedexpert.stages import train_judge
from mmedexpert.stages.answering import Subject, engine_of, from_folder, is_reward_model, judge_subject, reward_model_of
from mmedexpert.stages.common import ledger_of
from mmedexpert.stages.pretrain import base_of
from mmedexpert.training.rollouts import Judge

if TYPE_CHECKING:  # its library takes a second to import
    from mmedexpert.engines.served import ServedEngine


def subject_of(config: Config, judge: JudgeConfig, where: str) -> Subject:
    """Which judge it is; one of JUDGES is trained first where it is not there yet.

    UserError for a folder that is no judge's, or another base's.
    """
    if judge.run is None:
        assert judge.base_url is not None and judge.model is not None  # checks.check
        address = without_password(judge.base_url).rstrip("/")
        return Subject(Path(judge.model).name, f"served:{judge.model}@{address}#{judge.revision or ''}")
    base = base_of(config)
    if judge.run in JUDGES:
        kind = replace(config.judge, name=judge.run.removeprefix("judge_"))
        return judge_subject(config, train_judge.trained(replace(config, judge=kind)), base)
    found = from_folder(Path(judge.run), base)
    if found.judge is None:
        raise UserError(f"{where}.run={judge.run} is no trained judge: give a folder that stage=judge made")
    return found


def scorer_of(config: Config, judge: JudgeConfig, where: str, subject: Subject | None = None) -> Scorer:
    """What scores answers for the judge of this key, which is `subject` where it is known."""
    subject = subject or subject_of(config, judge, where)
    if is_reward_model(subject):
        return RewardScorer(reward_model_of(config, subject))
    if (told := subject.judge) is not None:
        engine = engine_of(config, subject, config.model.system_prompt)
        if config.engine.name == "vllm":
            cast("ServedEngine", engine).hold()
        return VerdictScorer(engine, name=subject.name, where=where, style=told["style"], ties=told["ties"])
    from mmedexpert.engines.openai import engine_of as server  # its library takes two seconds to import

    asked = server(judge, where, max_new_tokens=judge.max_new_tokens, ledger=ledger_of(config))
    return VerdictScorer(
        asked,
        name=f"{judge.model} at {asked.address}",
        where=where,
        style="full",
        shows_images=judge.shows_images,
        forget=asked.forget,
    )


def loaded_late(config: Config, judge: JudgeConfig, where: str) -> Scorer:
    """The same, loaded when it is first asked; a judge of JUDGES is trained now."""
    made: list[Scorer] = []
    subject = subject_of(config, judge, where)

    def scorer(groups: Sequence[Group]) -> Scores:
        if not made:
            made.append(scorer_of(config, judge, where, subject))
        return made[0](groups)

    return scorer


def judge_of(config: Config, subject: Subject) -> Judge:
    """What scores completions in RL for `reward.judge`, which is `subject`: the question as the policy read it, without
    an instruction."""
    scorer = scorer_of(config, config.reward.judge, "reward.judge", subject)

    def judge(
        records: Sequence[Record], image_root: Path, completions: Sequence[Sequence[str]]
    ) -> tuple[list[list[float]], dict[str, float]]:
        found = scorer([
            Group(record.id, prompt_text(record), tuple(image_root / one for one in record.images), tuple(texts))
            for record, texts in zip(records, completions, strict=True)
        ])  # fmt: skip
        return found.values, found.counts

    return judge
