"""What steps that ask a model make of invented engines, and what these are asked: outputs for test_versions.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import test_trace_writing as tracing
from solving import Fake, letter_of, record, stored

from mmedexpert.curation import blind, difficulty, labels
from mmedexpert.curation.replies import rows_of
from mmedexpert.curation.retrieval import Statements, own_statements
from mmedexpert.curation.steps import Verdict
from mmedexpert.curation.traces import write_traces
from mmedexpert.curation.verifier import essentials
from mmedexpert.data.record import Trace
from mmedexpert.data.records import plain
from mmedexpert.engines.asking import Ask, Reply, refusal
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.runtime.versions import digest


def told(verdicts: Iterable[Verdict], *more: str) -> list[Any]:
    """Of each verdict id, reason and detail, and these fields of its record."""
    return [[v.record.id, v.reason, v.detail, *(plain(v.record).get(name) for name in more)] for v in verdicts]


def found(verdicts: Iterable[Verdict], *more: str) -> list[Any]:
    """The same, and what steps found out."""
    every = list(verdicts)
    facts = [{key: v.record.provenance.get(key) for key in ("labels", "checks")} for v in every]
    return [[*row, fact] for row, fact in zip(told(every, *more), facts, strict=True)]


def sent(asks: Iterable[Ask], whole: Collection[str]) -> list[Any]:
    """What an engine was asked, sorted, of an image the name: in full what has an id of `whole` and is no further
    sample; of the others their number and a digest."""
    every = ([a.id, a.sample, a.text, [path.name for path in a.images], a.format] for a in asks)
    rows = sorted(every, key=lambda row: row[:3])
    shown = [row for row in rows if row[0] in whole and row[1] == 0]
    others = [row for row in rows if row not in shown]
    return [*shown, len(others), digest(others)]


def labelled(folder: Path) -> Any:
    """Labels of the source, of the rules, and of a model that agrees, does not, names others, or is no use."""
    replies = {
        "agrees": '<think>{"primary": "pediatrics"}</think>Here: {"primary": "adult_medicine", "others": '
        '["pediatrics", "dentistry"], "reason": "Gout."}',
        "differs": '{"primary": "oncology_surgery", "others": "pediatrics", "reason": "' + "long " * 60 + '"}',
        "other": '{"primary": "dentistry"}', "words": "It is pediatrics.", "torn": '{"primary": "pediatrics"',
        "refuses": None,
    }  # fmt: skip
    gout = {"question": "Which drug treats gout?", "options": {"A": "Allopurinol", "B": "Aspirin"}, "answer": "A"}
    records = [record(0, id=name, **gout) for name in replies]
    records += [
        record(1, id="child", question="A 4-year-old has a brain tumor. What is it?", options=None, answer="glioma"),
        record(2, id="told", specialties=("cardiology", "adult_medicine"), provenance={"source": "own"}),
        record(3, id="all", specialties=("all",), provenance={"source": "own"}, modality="MRI", body_system="Nervous",
               groups={"dataset": "Chest X-Ray PA"}),
    ]  # fmt: skip
    given = stored(folder, records)
    model = Fake(lambda ask: replies.get(ask.id, '{"primary": "pediatrics", "others": ["brain_sensory"]}'))
    with_model = labels.label(given, engine=model, trusted=["own"], show_images=True)
    rows = found(with_model, "specialties")
    dropped = told(labels.label(given, engine=Fake(model.say), drop_disagreement=True, also=0.7), "specialties")
    return [rows, dropped, told(labels.label(given), "specialties"), sent(model.asked, ["agrees", "child"])]


def without_image(folder: Path) -> Any:
    """A model that knows what is most likely, one that has a habit, and one that refuses; all orders it is shown."""
    records = [
        record(1), record(2, "A"), record(3, "D"), record(4, images=(), modality="text"),
        record(5, "yes", options=None, kind="yes_no"), record(6, "Normal lung.", options=None), record(7, "E"),
        record(8, options={"A": "A: one", "B": "B: two", "C": "A and B"}),
        record(9, options={"A": "A. x", "B": "B. y"}),
        record(10, "C", question="Refused?"), record(11, "D", question="Sometimes?"),
    ]  # fmt: skip

    def say(ask: Ask) -> str | None:
        if "Refused?" in ask.text and ask.sample == 2:
            return None
        if "D" in ask.text and blind.WHICH in ask.text:
            return f"<answer>{letter_of(ask, 'large pleural effusion')}</answer>" if "effusion" in ask.text else "A"
        if "Sometimes?" in ask.text:
            return (
                f"<answer>{letter_of(ask, 'large pleural effusion')}</answer>" if ask.sample else "<answer>B</answer>"
            )
        if "normal lung" in ask.text:
            return f"<answer>{letter_of(ask, 'normal lung')}</answer>"
        return "<answer>yes</answer>" if ask.id == "q5" else "<answer>normal lung</answer>" if ask.id == "q6" else "B"

    model, kept = Fake(say), folder / "replies.jsonl"
    given = stored(folder, records)
    rows = found(blind.needs_image(given, model, kept))
    flagged = told(blind.needs_image(given, Fake(say), folder / "flag.jsonl", tries=2, mode="flag"))
    judged = [[reply["right"] for reply in row["replies"]] for row in rows_of(kept)]
    return [
        rows,
        flagged,
        sent(model.asked, ["q1", "q5", "q8"]),
        judged,
        blind.report(given, kept, 4),
        [blind.chance(one, 4) for one in records],
    ]


def sampled(folder: Path) -> Any:
    """Records solved so many times of sixteen as their ids say, and some that have no count."""
    records = [record(n, "B") for n in (0, 1, 2, 7, 8, 15, 16)]
    records += [record(90, "E"), record(91), record(92, "Yes", options=None, kind="yes_no")]

    def say(ask: Ask) -> str | None:
        number = int(ask.id[1:])
        if number == 91 and ask.sample == 3:
            return None
        return "<answer>B</answer>" if ask.sample < number else "<answer>A</answer>"

    model, kept = Fake(say), folder / "replies.jsonl"
    given = stored(folder, records)
    rows = found(difficulty.difficulty(given, model, kept))
    other = difficulty.difficulty(
        given, Fake(say), folder / "other.jsonl", rollouts=4, keep=(2, 3), hard=(0, 2), mode="flag"
    )
    return [rows, found(other), difficulty.histogram(kept), sent(model.asked, ["q1", "q92"])]


class Replies:
    """Says to each question the reply of its sample, by the beginning of its id; the last one ever after."""

    def __init__(self, by_id: dict[str, Sequence[str | Reply]]) -> None:
        self.by_id, self.asks = by_id, list[Ask]()

    def __call__(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Reply]]:
        self.asks += asks
        for place, ask in enumerate(asks):
            replies = next((one for name, one in self.by_id.items() if ask.id.startswith(name)), self.by_id[""])
            yield place, tracing.reply(replies[min(ask.sample, len(replies) - 1)])


def traced(folder: Path) -> Any:
    """A trace for each reason to drop one, those that are kept, and all that teacher and verifier read."""
    said, right, other = tracing.said, tracing.ANALYTICAL, tracing.BAYESIAN
    passed = json.dumps(dict.fromkeys(essentials(), True))
    slightly = [right[0].replace("left", "left side"), *right[1:]]
    labels_ = [f"{n}. **Step {n}:** {step}" for n, step in enumerate(right, start=1)]
    tagged = f"<think>{' '.join(right)}</think><answer>C</answer>"
    replies: dict[str, Sequence[str | Reply]] = {
        "kept": ["none", said(other), said(right, "B"), said(right)],
        "cut": [Reply('{"steps": ["Air', 9, "length", 0.0, None)],
        "refused": [refusal("HTTP 400: too large")], "words": ["I would say that it is C."],
        "drifts": [said([*right[:2], "Wait, let me re-read the question.", *right[2:]])],
        "wrong": [said(right, "B"), "none"], "disagrees": [said([*right[:3], "So the answer is B."])],
        "manner": [said(other)], "leak": [said(tracing.LEAK)], "copy": [said(slightly)],
        "numbered": [f"Here you are:\n```json\n{said(labels_)}\n```"], "tagged": [tagged],
        "two": [said(right) + said(right, "A")],
        "several": ["none", said(other), said(right, "B"), said([*right[:3], "So the answer is B."])],
        "lower": [said(right, "c")], "less": [said(right[:2])],
        "enough": [said(right[1:3])], "": [said(right)],
    }  # fmt: skip
    names = [name for name in replies if name] + ["mute", "underived", "unsound", "second"]
    records = [tracing.record(name, question=f"{tracing.QUESTION} Case {name}.") for name in names]
    checks = {
        "mute": ["It is C."], "underived": ['{"answer": "none"}'],
        "unsound#analytical/e": [passed.replace("true", "false", 1)],
        "second#analytical/d": ["C", '{"answer": "C"}'], "": ['{"answer": "C"} ' + passed],
    }  # fmt: skip
    teacher, verifier = Replies(replies), Replies(checks)
    given = tracing.write_step("before", map(Verdict, records), folder / "a", folder / "images", given=None)
    rows = found(
        write_traces(given, teacher, verifier=verifier, perspectives=["analytical"], copy_ratio=101.0), "trace"
    )
    copies = told(write_traces(given, Replies(replies), verify="rules", perspectives=["analytical"]))

    rim = "A rim of air lies at the pleural margin of this pneumothorax. What follows?"
    ready = [
        tracing.record("ready", trace=Trace("analytical", tuple(right))),
        tracing.record("again", trace=Trace("analytical", tuple(right))),
        tracing.record("guess", trace=Trace("guess", ("So.",))),
        tracing.record("none", trace=Trace("intuitive", (" ",))),
        tracing.record("rim", question=rim, options={"A": "observation", "B": "drainage"}, answer="B"),
        tracing.record("open", images=("1.png", "2.png"), options=None, answer="pneumothorax"),
        tracing.record("yes", question="Is it free?", images=(), options=None, answer="yes", kind="yes_no"),
    ]  # fmt: skip
    given = tracing.write_step("before", map(Verdict, ready), folder / "b", folder / "images", given=None)
    answers = {"open": [said(right, "Pneumothorax.")], "yes": [said(right, "Yes")], "": [said(right, "B")]}
    shown, hidden = Replies(answers), Replies(answers)
    more = [
        told(write_traces(given, shown, verify="none", statements=Statements(), per_question=4)),
        told(write_traces(given, hidden, verify="rules", shows_answer=True, shows_images=False, style="small",
                          candidates=1, per_question=2, ready_copies=False, written_by="t-7b")),
        told(write_traces(given, None)),
    ]  # fmt: skip
    wanted = [
        "kept#analytical",
        "kept#analytical/derive",
        "kept#analytical/essentials",
        "rim#bayesian",
        "open#intuitive",
        "yes#analytical",
    ]
    asks = [sent(one.asks, whole=wanted) for one in (teacher, verifier, shown, hidden)]
    return [rows, copies, more, asks, PERSPECTIVES]


def stated(folder: Path) -> Any:
    """The project's own statements, and which of these and of a user's are found for a question."""
    (folder / "mine.yaml").write_text(
        "- {id: gout, text: Allopurinol lowers urate in gout., specialty: any, source: 'Society, 2020', licence: CC0}\n"
        "- {id: eye, text: The optic disc is cupped., specialty: brain_sensory, source: 'Trial, 2021', licence: MIT}\n"
        "- {id: twin, text: Allopurinol lowers urate in gout., specialty: any, source: 'Society, 2022', licence: CC0}\n"
    )
    questions = [
        ("A rim of air at the pleural margin: how wide is a pneumothorax?", "adult_medicine"),
        ("What is the heart rate of this newborn infant?", ["pediatrics", "adult_medicine"]),
        ("How wide is the abdominal aorta, an aneurysm?", "oncology_surgery"),
        ("How wide is the abdominal aorta, an aneurysm?", "pediatrics"),
        ("Her heart rate is 80 per minute. What is seen?", "adult_medicine"),
        ("Is the midline shifted, and the optic disc cupped?", "brain_sensory"),
        ("Which drug lowers the urates of goutS?", "adult_medicine"), ("Gout?", "adult_medicine"),
        ("Why?", "pediatrics"),
        ("Solid lung nodules of 7 mm: what follows?", "oncology_surgery"), ("A cardiothoracic ratio", "pediatrics"),
    ]  # fmt: skip
    own, both = Statements(), Statements([folder / "mine.yaml"])
    ids = [
        [[one.id for one in statements.for_question(*asked)] for asked in questions]
        for statements in (own, both, Statements([folder / "mine.yaml"], own=False, min_score=0.0))
    ]
    return [[[one.id, one.text, one.source, one.specialty] for one in own_statements()], ids]


ASKING: dict[str, Callable[[Path], Any]] = {
    "label": labelled,
    "needs_image": without_image,
    "difficulty": sampled,
    "traces": traced,
    "statements": stated,
}
