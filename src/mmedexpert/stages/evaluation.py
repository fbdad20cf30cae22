"""`stage=eval`: models on the same questions, of the own data set or of benchmarks; one folder per model and set."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mmedexpert.engines.asking import Engine
from mmedexpert.evaluation.judge import LLMJudge
from mmedexpert.evaluation.predict import Prediction, QuestionSet, asks_of, judge_again, majority_engine, predict
from mmedexpert.evaluation.summary import Summary
from mmedexpert.evaluation.swap import swapped
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.names import BLANK_IMAGE, MAJORITY, SWAPPED_IMAGE
from mmedexpert.reporting.cards import record_evaluation
from mmedexpert.runtime.privacy import without_password
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, write_json
from mmedexpert.runtime.versions import rule_followed_by, text_of, versions
from mmedexpert.schema import Config
from mmedexpert.schema_data import EndpointConfig
from mmedexpert.stages import benchmark, best_of, judging
from mmedexpert.stages.answering import Subject, answering_key, asking, engine_of, style_of, tell_kept
from mmedexpert.stages.common import content_of, ledger_of, records_of, stage_run, together
from mmedexpert.stages.data import dataset
from mmedexpert.stages.logged import tell_evaluated
from mmedexpert.stages.overlap import clean_part
from mmedexpert.stages.questions import (
    QuestionSource,
    own_questions,
    protocol_of,
    public_questions,
    system_prompt_of,
    words_of,
)  # fmt: skip
from mmedexpert.stages.subjects import subjects_of


def run(config: Config) -> dict[str, Run]:
    """Evaluate the models of `eval.models` on the benchmarks of the config, without any on the own data set."""
    scorer = best_of.scorer_for(config)
    evaluations = evaluations_of(config)
    together(config, list(evaluations.values()))
    done = {name: evaluate(config) for name, evaluate in evaluations.items()}
    judging.compare(config, {name: run for name, run in done.items() if run.stage == judging.STAGE})
    for name, evaluate in evaluations.items():
        subject: Subject = evaluate.keywords["subject"]
        if done[name].stage == "eval" and subject.made_by is not None and subject.baseline is None:
            tell_evaluated(config, subject.made_by, done[name])
    if config.eval.best_of > 1:
        asked = {
            name: (one.keywords["subject"], one.keywords["asked"], done[name]) for name, one in evaluations.items()
        }
        best_of.run(config, asked, scorer)
    return done


def evaluations_of(config: Config) -> dict[str, partial[Run]]:
    """What `run` does, one model on one set each; the models are trained, and the benchmarks read."""
    subjects = subjects_of(config)
    if not config.benchmark:
        own = own_questions(config)
        return {subject.name: partial(_evaluate, subject=subject, asked=own) for subject in subjects}
    sets, found = [], dict[str, partial[Run]]()
    for one in config.benchmark.values():  # every benchmark is read before the first question is asked
        source = benchmark.prepared(config, one)
        if one.pairs:
            found |= judging.evaluations_of(config, one, source, subjects)
            continue
        sets.append(public_questions(one, source))
    return found | {
        f"{asked.questions.name}/{subject.name}": partial(_evaluate, subject=subject, asked=asked)
        for asked in sets for subject in subjects
    }  # fmt: skip


def _shown(subject: Subject, questions: QuestionSet, folder: Path) -> dict[str, tuple[Path, ...]] | None:
    """The images of each question in place of its own, for the baselines that see others."""
    if subject.baseline == BLANK_IMAGE:
        blank = folder / "blank.png"
        Image.new("RGB", (112, 112), (128, 128, 128)).save(blank)
        return {record.id: (blank,) * len(record.images) for record in questions.records}
    if subject.baseline == SWAPPED_IMAGE:
        images = swapped(questions.records)
        return {name: tuple(questions.image_root / one for one in images[name]) for name in images}
    return None


def _evaluate(config: Config, subject: Subject, asked: QuestionSource) -> Run:
    """One model's run on one question set; judged anew, without asking, where the rules or settings changed since."""
    settings, questions = config.eval, asked.questions
    protocol = protocol_of(config, asked)
    perspectives = "none" if subject.baseline == MAJORITY else settings.perspectives
    asks = asks_of(questions, protocol=protocol, perspectives=perspectives, style=style_of(config, subject))
    key: dict[str, Any] = {
        "asked": words_of(asks),
        "specialties": asked.specialties,
        "engine": config.engine.name,
        "blank": subject.baseline == BLANK_IMAGE,
    }
    if subject.baseline == SWAPPED_IMAGE:
        key["swapped"] = versions("swap")
    inputs = {"questions": asked.identity, "model": subject.identity}
    if subject.baseline == MAJORITY:
        key["rules"] = versions("majority")
        inputs["train"] = content_of(dataset(config), "train", config.specialty.names)
    else:
        key |= answering_key(asking(config), subject, system_prompt_of(config, protocol))
    data = dataset(config) if settings.contamination or subject.baseline == MAJORITY else None

    # own questions have their own training part beside them; those of a benchmark any that the command names
    rules = _rules(config, questions, data.run_id if data and settings.contamination and asked.public else None)

    def summarise(rows: list[Prediction]) -> dict[str, Any]:
        overlap = clean_part(config, data, questions, asked.identity) if data and settings.contamination else None
        numbers = Summary(num_resamples=settings.num_resamples, seed=config.seed)
        found = numbers.of(
            rows, questions.records, protocol=protocol, specialties=asked.specialties,
            breakdowns=questions.breakdowns, clean=set(overlap["clean"]) if overlap else None,
        )  # fmt: skip
        if settings.llm_judge.base_url is not None:
            found["llm_judge"], found["llm_judge_refused"] = _second_opinion(config, questions, rows, numbers)
        found["question_set"] = {
            "name": questions.name, "source": sorted({r.source for r in questions.records}), "left_out": asked.left_out,
            "folder": str(asked.source.folder), "public": asked.public,
            "own_training_part": asked.source.manifest.get("own_training_part"),
        }  # fmt: skip
        found["contamination"] = overlap["found"] if overlap else None
        found["compared_with"] = data.name if data and overlap else None
        found["judged_by"] = rules
        return found

    def work(run: Run) -> dict[str, float]:
        shown = _shown(subject, questions, run.folder)
        with run.phase("ask"):
            rows = predict(
                _engine(config, subject, questions, protocol), questions, run.folder / "predictions.jsonl",
                protocol=protocol, title=f"{subject.name} {questions.name}",
                perspectives=perspectives, style=style_of(config, subject), shown=shown,
            )  # fmt: skip
        with run.phase("summarise"):
            found = summarise(rows)
            write_json(run.folder / "summary.json", found)
            return flatten(found)

    sources = {"questions": asked.source}
    done = stage_run(config, "eval", f"{subject.name}-{questions.name}", key, work, inputs, sources=sources)
    tell_kept(subject, done)
    if rank() == 0 and done.reused and done.summary["judged_by"] != rules:
        rows = judge_again(done.folder / "predictions.jsonl", questions)
        found = summarise(rows)
        write_json(done.folder / "metrics.json", flatten(found))
        write_json(done.folder / "summary.json", found)  # last: what it says it was judged by says that all was
    if rank() == 0 and subject.baseline is None and not config.runs.explain:
        _note_in_card(config, subject, questions.name, done)
    return done


def _note_in_card(config: Config, subject: Subject, questions: str, done: Run) -> None:
    """The evaluation in the model's own card; a folder that is not of this outputs folder is another's and stays."""
    folder = subject.adapter or subject.folder
    if folder is not None and folder.resolve().is_relative_to(Path(config.paths.outputs).resolve()):
        record_evaluation(folder, questions, done.summary)


def _engine(config: Config, subject: Subject, questions: QuestionSet, protocol: str) -> Engine:
    if subject.baseline == MAJORITY:
        train, _ = records_of(dataset(config), "train", config.specialty.names)
        return majority_engine(train, questions.records)
    return engine_of(asking(config), subject, system_prompt_of(config, protocol))


def _second_opinion(
    config: Config, questions: QuestionSet, rows: list[Prediction], numbers: Summary
) -> tuple[dict[str, float], dict[str, str]]:
    """An LLM judge's accuracy on the open answers, and why it did not judge some of them, by id."""
    from mmedexpert.engines.openai import engine_of as server

    record_of = {record.id: record for record in questions.records}
    judge = LLMJudge(server(config.eval.llm_judge, "eval.llm_judge", max_new_tokens=256, ledger=ledger_of(config)))
    open_rows = [row for row in rows if row["kind"] == "open"]
    right = judge.judge([(record_of[row["id"]], row["response"]) for row in open_rows])
    judged = [row for row in open_rows if row["id"] in right]
    mean = numbers.mean([float(right[row["id"]]) for row in judged], judged) if judged else {}
    return mean, judge.refused


def _rules(config: Config, questions: QuestionSet, compared_with: str | None) -> str:
    """What verdicts and numbers depend on beside the replies: rules, guidelines, the settings of the summary, and the
    data set in which test images were looked for."""
    settings = {**asdict(config.eval), "protocol": config.protocol}
    settings["llm_judge"] = _without_secrets(config.eval.llm_judge)
    told = {
        "rules": {
            **versions("robust", "medevalkit", "metrics", "stats", "rubrics", "summary"),
            **rule_followed_by(questions.judge),
        },
        "guidelines": {name: text_of(name) for name in DATA},
        "settings": {k: settings[k] for k in ("num_resamples", "contamination", "llm_judge", "protocol")},
        "seed": config.seed,
        **({"compared_with": compared_with} if compared_with else {}),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _without_secrets(endpoint: EndpointConfig) -> list[str | None]:
    """What of a judge's server decides its verdicts: not its speed, nor how it is logged in to."""
    return [endpoint.base_url and without_password(endpoint.base_url), endpoint.model, endpoint.revision]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names joined by slashes; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat
