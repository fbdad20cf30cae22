"""What `stage=eval` asks: questions of the own data set or of a benchmark, in whose words, and who judges answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from mmedexpert.data.record import Record
from mmedexpert.data.records import fingerprint
from mmedexpert.engines.asking import Ask
from mmedexpert.evaluation.predict import QuestionSet
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import BenchmarkConfig, Config
from mmedexpert.scoring import medevalkit
from mmedexpert.stages import benchmark
from mmedexpert.stages.common import records_of
from mmedexpert.stages.data import dataset


@dataclass(frozen=True)
class QuestionSource:
    """A question set, the run it comes from, and its identity (which follows its content)."""

    questions: QuestionSet
    source: Run
    identity: str
    left_out: int
    specialties: list[str]
    public: bool


def own_questions(config: Config) -> QuestionSource:
    """Those of the data set's `eval.split`."""
    data, names = dataset(config), config.eval.specialties or config.specialty.names
    records, image_root = records_of(data, config.eval.split, names)
    name = f"{data.name}-{config.eval.split}"
    questions = QuestionSet(name, records, image_root, medevalkit.ask, medevalkit.judge)
    return QuestionSource(questions, data, fingerprint(records, image_root), 0, names, public=False)


def public_questions(one: BenchmarkConfig, source: Run) -> QuestionSource:
    """Those of a benchmark, which the run `source` has prepared."""
    questions, left_out = benchmark.question_set(one, source), len(source.manifest["left_out"])
    identity = fingerprint(questions.records, questions.image_root)
    return QuestionSource(questions, source, identity, left_out, ["all"], public=True)


def protocol_of(config: Config, asked: QuestionSource) -> str:
    """`protocol`; where it is auto MedEvalKit's on benchmarks, ours on own data."""
    if config.protocol != "auto":
        return config.protocol
    return "medevalkit" if asked.public else "robust"


def system_prompt_of(config: Config, protocol: str) -> str | None:
    """The model's own, a served one's that of its endpoint; MedEvalKit asks without."""
    if protocol == "medevalkit":
        return None
    return config.engine.endpoint.system_prompt if config.engine.name == "openai" else config.model.system_prompt


def words_of(asks: Sequence[tuple[Record, str | None, Ask]]) -> str:
    """The identity of what is asked, word by word."""
    words = json.dumps([(record.id, perspective, ask.text) for record, perspective, ask in asks])
    return hashlib.sha256(words.encode()).hexdigest()[:16]
