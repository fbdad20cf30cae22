"""Traces: what a teacher writes is read, checked, and kept or dropped for a reason of its own."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from mmedexpert.curation.candidates import Candidate, answer_of, candidate_of, sentences_of, tidied
from mmedexpert.curation.copies import Copies
from mmedexpert.curation.retrieval import Statements, own_statements
from mmedexpert.curation.steps import run_step, write_step
from mmedexpert.curation.traces import (
    COPY,
    CUT_OFF,
    DISAGREES,
    DRIFTS,
    GUESSED,
    MANNER,
    NO_TEACHER,
    NO_VERDICT,
    REASONS,
    REFUSED,
    UNDERIVED,
    UNPARSED,
    UNSOUND,
    WRONG,
    Verdict,
    write_traces,
)  # fmt: skip
from mmedexpert.curation.verifier import derived, essentials
from mmedexpert.curation.verify import without_conclusion
from mmedexpert.data.record import Record, Trace
from mmedexpert.engines.asking import Reply, refusal
from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.sources.phantom.source import phantom

QUESTION = "A 30-year-old man has sudden chest pain; his chest film is shown. What is the diagnosis?"
OPTIONS = {"A": "Pneumonia", "B": "Pulmonary embolism", "C": "Tension pneumothorax", "D": "Rib fracture"}
ANALYTICAL = [
    "Air enters the pleural space with each breath and cannot leave, so pressure rises on the left.",
    "The rising pressure collapses the left lung, because no negative pressure opposes its elastic recoil.",
    "It pushes the mediastinum to the right and kinks the great veins, which lowers venous return and cardiac output.",
    "Therefore the tracheal shift and the absent lung markings come from air under pressure: tension pneumothorax.",
]
BAYESIAN = [
    "Before any finding about 5% of such men have a tension pneumothorax.",
    "Absent lung markings on the left raise the probability of tension pneumothorax from 5% to 50%.",
    "A shifted trachea has a likelihood ratio of 9 and raises it to 90%.",
    "The posterior probability of tension pneumothorax is 90%, so this is the answer.",
]
LEAK = ["The answer is C.", "It is option C, tension pneumothorax."]


def record(name="r-1", **changes):
    made = Record(
        id=name, images=("secret-label-pneumothorax/1.png",), question=QUESTION, options=OPTIONS, answer="C",
        specialties=("adult_medicine",), source="x", license="CC0-1.0", split="train", image_group=name,
    )  # fmt: skip
    return replace(made, **changes)


def said(steps, answer="C"):
    return json.dumps({"steps": steps, "answer": answer})


def reply(text, finish="stop"):
    return text if isinstance(text, Reply) else Reply(text, 9, finish, 0.0, None)


class Teacher:
    """Answers sample k with reply k, or the last one; in reverse order, as servers may."""

    def __init__(self, *replies):
        self.replies, self.asks = replies, []

    def __call__(self, asks):
        self.asks += asks
        for place, ask in reversed(list(enumerate(asks))):
            yield place, reply(self.replies[min(ask.sample, len(self.replies) - 1)])


class Verifier:
    """Derives the answer and finds every check passed, unless told otherwise."""

    def __init__(self, derives=('{"answer": "C"}',), checks=None):
        self.derives = derives
        self.checks = checks or (json.dumps(dict.fromkeys(essentials(), True)),)
        self.asks = []

    def __call__(self, asks):
        self.asks += asks
        for place, ask in enumerate(asks):
            told = self.derives if ask.id.endswith("/derive") else self.checks
            yield place, reply(told[min(ask.sample, len(told) - 1)])


@pytest.fixture()
def folder(tmp_path):
    def make(*records):
        return write_step("before", map(Verdict, records), tmp_path / "before", tmp_path / "images", given=None)

    return make


def written(records, teacher, verifier=None, **settings):
    settings = {"perspectives": ["analytical"], "candidates": 1, **settings}
    return list(write_traces(records, teacher, verifier=verifier or Verifier(), **settings))


def test_a_sound_trace_makes_a_record_of_its_question_and_perspective(folder):
    (one,) = written(folder(record()), Teacher(said(ANALYTICAL)), written_by="teacher-7b")
    assert (one.reason, one.record.id) == ("", "r-1#analytical")
    assert one.record.trace == Trace("analytical", tuple(ANALYTICAL))
    found = one.record.provenance["checks"]["traces"]
    assert found["adherence"] >= 0.7
    assert found == {
        "statements": [], "asked": 1, "parsed": 1, "right": 1, "held": 1, "derived": True, "essentials": True,
        "written_by": "teacher-7b", "sample": 0, "adherence": found["adherence"],
    }  # fmt: skip


NOT_ALL = json.dumps({**dict.fromkeys(essentials(), True), "clinical_validity": False})
FAILURES = {
    REFUSED: (Teacher(refusal("HTTP 400: the image is too large")), None),
    CUT_OFF: (Teacher(Reply('{"steps": ["Air', 9, "length", 0.0, None)), None),
    UNPARSED: (Teacher("I would say that it is C."), None),
    DRIFTS: (Teacher(said([*ANALYTICAL[:2], "Wait, let me re-read the question.", *ANALYTICAL[2:]])), None),
    WRONG: (Teacher(said(ANALYTICAL, "B")), None),
    DISAGREES: (Teacher(said([*ANALYTICAL[:3], "So the answer is B."])), None),
    MANNER: (Teacher(said(BAYESIAN)), None),
    NO_VERDICT: (Teacher(said(ANALYTICAL)), Verifier(derives=("It is C, I think.",))),
    UNDERIVED: (Teacher(said(ANALYTICAL)), Verifier(derives=('{"answer": "B"}',))),
    UNSOUND: (Teacher(said(ANALYTICAL)), Verifier(checks=(NOT_ALL,))),
}


@pytest.mark.parametrize("reason", FAILURES)
def test_each_kind_of_failure_has_its_own_reason(folder, reason):
    teacher, verifier = FAILURES[reason]
    (one,) = written(folder(record()), teacher, verifier)
    assert (one.reason, one.record.id) == (reason, "r-1#analytical")


def test_details_say_what_failed(folder):
    def detail(reason):
        return written(folder(record()), *FAILURES[reason])[0].detail

    assert detail(REFUSED) == "HTTP 400: the image is too large"
    assert detail(UNSOUND) == "clinical_validity"
    assert detail(DISAGREES) == "its last step concludes B, its answer is C"
    assert detail(WRONG) == "its answer is B"
    assert detail(DRIFTS) == "it corrects itself"


def test_of_several_candidates_the_one_that_came_furthest_says_why(folder):
    teacher = Teacher("no JSON", said(ANALYTICAL, "B"), said(BAYESIAN), refusal("broken"))
    (one,) = written(folder(record()), teacher, candidates=4)
    assert one.reason == MANNER


def test_one_sound_candidate_among_several_is_enough(folder):
    verifier = Verifier()
    (one,) = written(
        folder(record()), Teacher("no JSON", said(ANALYTICAL, "A"), said(ANALYTICAL)), verifier, candidates=3
    )
    assert one.record.trace.steps == tuple(ANALYTICAL)
    found = one.record.provenance["checks"]["traces"]
    assert (found["asked"], found["parsed"], found["right"], found["held"], found["sample"]) == (3, 2, 1, 1, 2)
    assert len(verifier.asks) == 2  # only what passed the rules is verified


def test_of_several_sound_candidates_the_one_most_in_its_manner_stays(folder):
    teacher = Teacher(said(BAYESIAN), said(ANALYTICAL))
    (one,) = written(folder(record()), teacher, candidates=2, verify="rules", min_adherence=0.0)
    assert one.record.trace.steps == tuple(ANALYTICAL)


def test_where_the_verifier_rejects_one_candidate_the_next_is_asked_of(folder):
    other = ["The left lung has collapsed since air under pressure fills the pleural space.", *ANALYTICAL[1:]]

    def verifier(asks):
        for place, ask in enumerate(asks):
            text = json.dumps(dict.fromkeys(essentials(), True))
            if ask.id.endswith("/derive"):
                text = json.dumps({"answer": "B" if "enters the pleural" in ask.text else "C"})
            yield place, reply(text)

    (one,) = written(folder(record()), Teacher(said(ANALYTICAL), said(other)), verifier, candidates=2)
    assert one.record.trace.steps == tuple(other)


def test_a_trace_that_leaks_its_answer_without_reasoning_is_dropped(folder):
    (one,) = written(folder(record()), Teacher(said(LEAK)))
    assert (one.reason, one.detail) == (MANNER, "few findings")


def test_a_near_copy_of_a_kept_trace_is_dropped_and_says_of_which(folder):
    slightly = [ANALYTICAL[0].replace("left", "left side"), *ANALYTICAL[1:]]

    def teacher(asks):
        for place, ask in enumerate(asks):
            yield place, reply(said(ANALYTICAL if ask.id.startswith("r-1") else slightly))

    first, second = written(folder(record(), record("r-2")), teacher)
    assert (first.reason, second.reason, second.detail) == ("", COPY, "of r-1#analytical")
    assert all(not one.reason for one in written(folder(record(), record("r-2")), teacher, verify="none"))


def test_copies_are_told_from_other_cases():
    copies = Copies()
    copies.keep("first", " ".join(ANALYTICAL))
    assert copies.near(" ".join(ANALYTICAL).upper()) == "first"
    assert copies.near(" ".join(BAYESIAN)) is None
    assert copies.near(" ".join([ANALYTICAL[0], *BAYESIAN[:3]])) is None
    # most of its word 3-grams are the same, and it is proposed; the ratio tells that its steps are in another order
    assert copies.near(" ".join([*ANALYTICAL[2:], *ANALYTICAL[:2]])) is None


def test_every_wanted_perspective_is_asked_for_in_its_own_words_and_turns_balance(folder):
    teacher = Teacher(said(ANALYTICAL))
    records = folder(*(record(f"r-{n}") for n in range(80)))
    list(write_traces(records, teacher, verify="none", candidates=1))
    turns = Counter(ask.id.partition("#")[2] for ask in teacher.asks)
    assert set(turns) == set(PERSPECTIVES) and min(turns.values()) > 10
    assert all(("Reason analytically" in ask.text) == ask.id.endswith("analytical") for ask in teacher.asks)

    teacher = Teacher(said(ANALYTICAL))
    list(write_traces(folder(record()), teacher, verify="rules", candidates=2, per_question=4))
    assert Counter(ask.id for ask in teacher.asks) == {f"r-1#{name}": 2 for name in PERSPECTIVES}
    assert [ask.sample for ask in teacher.asks] == [0, 1] * 4


def test_the_prompt_holds_question_options_and_statements_but_neither_answer_nor_path(folder):
    teacher, statements = Teacher(said(ANALYTICAL)), Statements()
    question = "A rim of air lies at the pleural margin of this pneumothorax. What follows?"
    asked = record(question=question, options={"A": "observation", "B": "drainage"}, answer="B")
    written(folder(asked), teacher, statements=statements)
    (ask,) = teacher.asks
    assert "A rim of 2 cm or more at the level of the hilum" in ask.text
    assert json.dumps(question) in ask.text and json.dumps(asked.options) in ask.text
    assert "secret-label" not in ask.text and "Right answer" not in ask.text
    assert ask.images[0].name == "1.png"
    assert ask.format["json_schema"]["schema"]["properties"]["answer"] == {"type": "string", "enum": ["A", "B"]}

    written(folder(asked), teacher, shows_answer=True, shows_images=False)
    assert 'on its own: {"B": "drainage"}' in teacher.asks[1].text.replace("by itself", "on its own")
    assert teacher.asks[1].images == () and "image" not in teacher.asks[1].text.replace(QUESTION, "")


def test_no_question_of_the_verifier_holds_a_path_and_only_the_checks_see_the_image(folder):
    verifier = Verifier()
    written(folder(record()), Teacher(said(ANALYTICAL)), verifier)
    derive, check = verifier.asks
    assert derive.images == () and check.images[0].name == "1.png"
    assert "secret-label" not in derive.text + check.text
    reasoning = derive.text.partition("Reasoning, without its conclusion: ")[2]
    assert ANALYTICAL[0] in reasoning and "tension pneumothorax" not in reasoning.lower()


def test_a_malformed_verdict_is_asked_once_more_and_then_given_up(folder):
    good = json.dumps(dict.fromkeys(essentials(), True))
    verifier = Verifier(checks=('{"stem_self_contained": true}', good))
    assert written(folder(record()), Teacher(said(ANALYTICAL)), verifier)[0].reason == ""
    assert [ask.sample for ask in verifier.asks] == [0, 0, 1]

    verifier = Verifier(checks=("yes", '{"stem_self_contained": true}', good))
    (one,) = written(folder(record()), Teacher(said(ANALYTICAL)), verifier)
    assert (one.reason, one.detail) == (NO_VERDICT, "of the essential checks")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ('{"answer": "C"}', True), ('<think>{"answer": "B"}</think>{"answer": "(c)"}', True),
        ('{"answer": "A"}', False),
        ('{"answer": "none"}', False), ('{"answer": "C"} {"answer": "A"}', None), ("C", None), ('{"answer": 3}', None),
    ],
)  # fmt: skip
def test_a_derivation_is_read_as_right_wrong_or_missing(text, verdict):
    assert derived(record(), reply(text)) is verdict
    assert derived(record(), reply(text, "length")) is None


def test_with_rules_alone_no_verifier_is_asked_and_with_none_the_manner_is_free(folder):
    verifier = Verifier(derives=('{"answer": "A"}',))
    assert written(folder(record()), Teacher(said(ANALYTICAL)), verifier, verify="rules")[0].reason == ""
    assert written(folder(record()), Teacher(said(BAYESIAN)), verifier, verify="none")[0].reason == ""
    assert written(folder(record()), Teacher(said(BAYESIAN, "A")), verifier, verify="none")[0].reason == WRONG
    assert not verifier.asks


def test_batches_and_repetition_change_nothing(folder):
    records = folder(*(record(f"r-{n}", question=f"{QUESTION} Case {n}.") for n in range(7)))

    def teacher(asks):
        for place, ask in reversed(list(enumerate(asks))):
            number = int(ask.id.partition("#")[0][2:])
            steps = [f"Finding number {number} was seen at level {number * 7} of the film.", *ANALYTICAL]
            yield place, reply(said(steps if number % 3 else BAYESIAN, "C" if ask.sample else "D"))

    def lines(batch):
        return written(records, teacher, candidates=2, batch=batch)

    assert lines(1) == lines(3) == lines(32) == lines(32)


def test_counts_of_the_step_add_up_by_reason(folder, tmp_path):
    step = partial(
        write_traces, teacher=Teacher(said(ANALYTICAL)), verifier=Verifier(), perspectives=["analytical"], candidates=1
    )
    after = run_step("traces", step, folder(record(), record("r-2")), tmp_path / "after")
    assert after.counts == {"step": "traces", "in": 2, "out": 1, "reasons": {COPY: 1}}
    assert [one.trace.perspective for one in after] == ["analytical"]
    assert COPY in REASONS


def test_impossible_settings_are_refused(folder):
    for settings in (
        {"verify": "all"}, {"perspectives": ["guessing"]}, {"per_question": 2}, {"candidates": 0}, {"batch": 0},
        {"verifier": None, "verify": "model"},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            settings = {"verifier": Verifier(), "perspectives": ["analytical"], **settings}
            list(write_traces(folder(record()), Teacher(""), **settings))


# --- records that came with a trace -----------------------------------------------------------------------------------


def test_drawn_records_keep_the_traces_that_decide_their_question_and_are_right(folder, tmp_path):
    drawn, _, _ = phantom(None, tmp_path, seed=0, train=48, val=0, test=0)
    found = list(write_traces(folder(*drawn), None))
    decided = [one for one in drawn if one.groups["needs"] == one.trace.perspective]
    right = [one for one in decided if one.trace.answer is None]
    assert Counter(one.reason for one in found) == Counter(
        {"": len(right), WRONG: len(decided) - len(right), GUESSED: len(drawn) - len(decided)}
    )
    kept = [one.record for one in found if not one.reason]
    assert [(one.id, one.trace) for one in kept] == [(one.id, one.trace) for one in right]
    assert any(one.trace.answer is None for one in drawn if one not in decided), "right by luck does not count"
    assert all(one.provenance["checks"]["traces"]["adherence"] >= 0.7 for one in kept)
    assert any(one.reason == COPY for one in write_traces(folder(*drawn), None, ready_copies=False))


def test_a_ready_trace_must_pass_the_checks_that_need_no_engine(folder):
    def reason(trace, **settings):
        return next(write_traces(folder(record(trace=trace)), None, **settings)).reason

    assert reason(Trace("analytical", tuple(ANALYTICAL))) == ""
    assert reason(Trace("intuitive", tuple(ANALYTICAL))) == MANNER
    assert reason(Trace("analytical", tuple(ANALYTICAL), "B")) == WRONG
    assert reason(Trace("analytical", (" ",))) == UNPARSED
    assert reason(Trace("guessing", tuple(ANALYTICAL))) == DRIFTS
    assert reason(None) == NO_TEACHER


# --- reading a reply --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"steps": ["One.", "Two."], "answer": "C"}',
        '<think>{"steps": ["No."], "answer": "A"}</think>\n```json\n{"steps": ["One.", "Two."], "answer": "(c)"}\n```',
        'Here it is: {"steps": ["One.", "Two."], "answer": "C. Tension pneumothorax"} Done.',
        '{"answer": "tension pneumothorax", "steps": ["One.", "Two."], "more": {"steps": 1}}',
        "<think>One. Two.</think><answer>C</answer>",
        "<think>\nOne.\n\nTwo.\n</think>\n<answer> C </answer>",
    ],
)
def test_a_candidate_is_read_in_every_usual_form(text):
    assert candidate_of(text, record()) == Candidate(("One.", "Two."), "C")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "One. Two. The answer is C.",
        '{"steps": ["One."], "answer": "E"}',
        '{"steps": [], "answer": "C"}',
        '{"steps": ["One.", 2], "answer": "C"}',
        '{"steps": "One.", "answer": "C"}',
        '{"steps": ["One."], "answer": "C", "answer": "B"}',
        '{"steps": ["One."], "answer": "C"} {"steps": ["One."], "answer": "B"}',
        '{"steps": ["One."], "answer": "C"',
        '<think>{"steps": ["One."], "answer": "C"}',
        "<think>One.</think><answer>C or B</answer>",
        "{" * 50_000,
        '{"' * 25_000,
        '{"steps": ' + "[" * 50_000,
    ],
)
def test_what_is_no_candidate_is_not_guessed_at(text):
    assert candidate_of(text, record()) is None


def test_half_a_surrogate_pair_does_not_break_the_file(folder, tmp_path):
    teacher = Teacher('{"steps": ["The lung is dark.", "\\ud800"], "answer": "C"}')
    step = partial(write_traces, teacher=teacher, verify="none", candidates=1)
    (one,) = run_step("traces", step, folder(record()), tmp_path / "after")
    assert one.trace.steps[-1] == "?"
    step = partial(write_traces, teacher=Teacher("The lung is dark \ud800"), verify="none", candidates=1)
    assert run_step("traces", step, folder(record()), tmp_path / "after").counts["reasons"] == {UNPARSED: 1}


def test_open_and_yes_no_questions_are_answered_in_text():
    asked = record(options=None, answer="yes", kind="yes_no")
    assert (answer_of("Yes.", asked), answer_of("No", asked), answer_of("perhaps", asked)) == ("yes", "no", None)
    asked = record(options=None, answer="Left lung", kind="open")
    assert answer_of("the left lung", asked) == "the left lung" and answer_of(" ", asked) is None


def test_form_is_tidied_and_drift_is_told():
    steps = (
        "## Findings",
        "**Step 1:** Air enters the `pleura`.",
        "2) Pressure rises.",
        "- It was 2.5 cm.",
        "Conclusion:",
    )
    tidy, drifts = tidied(Candidate(steps, "C"))
    assert tidy.steps == ("Air enters the pleura.", "Pressure rises.", "It was 2.5 cm.") and not drifts

    def drift(step):
        return tidied(Candidate((step,), "C"))[1]

    assert drift("Hmm, the lung is dark.") == drift("It is. Wait, no: it is not.") == "it corrects itself"
    assert drift("<think>The lung is dark.") == "tags inside its steps"
    assert drift("The reference answer is C.") == "it speaks of its task"
    assert drift("# Title") == "its steps are headers alone"
    for sound in ("One must not wait for a film.", "A wait-and-see approach fails.", "The prompt rise hints at it."):
        assert drift(sound) == ""


def test_sentences_are_cut_where_they_end():
    text = "The rim is 2.5 cm vs. 1 cm in E. coli sepsis. It grows! Does it?\nYes"
    assert sentences_of(text) == ["The rim is 2.5 cm vs. 1 cm in E. coli sepsis.", "It grows!", "Does it?", "Yes"]


def test_a_conclusion_is_taken_away_wherever_it_stands():
    def left(*steps):
        return without_conclusion(record(), steps)

    assert left("So the answer is C.", "The lung is dark.") == "The lung is dark."
    assert left("The lung is dark.", "All points to tension pneumothorax.", "Nothing else fits.") == "The lung is dark."
    assert left("Pneumonia would be white.", "The lung is dark, so option C.") == "Pneumonia would be white."
    assert left("A dark lung and a shifted trachea suggest tension pneumothorax.") == (
        "A dark lung and a shifted trachea suggest [...]."
    )
    named_early = "Tension pneumothorax is one candidate, pneumonia the other."
    assert left(named_early, "The lung is dark.", "Its markings are gone.", "So C.").startswith(named_early)


# --- statements -------------------------------------------------------------------------------------------------------


def test_statements_are_found_by_terms_and_specialty():
    own = Statements()
    found = own.for_question("Is the abdominal aorta enlarged, an aneurysm?", "oncology_surgery", 3)
    assert [one.id for one in found] == ["mmedexpert:aortic_diameter"] and "5.5 cm" in found[0].text and found[0].source
    assert own.for_question("Is the abdominal aorta enlarged, an aneurysm?", "pediatrics", 3) == []
    assert own.for_question("What is the most likely diagnosis of this 50-year-old man?", "adult_medicine", 3) == []
    assert own.for_question("", "adult_medicine", 3) == [] and Statements(own=False).for_question("aorta", "x", 3) == []
    vital = "Her heart rate is 80 per minute, she has a painful knee."
    assert own.for_question(vital, "adult_medicine", 3) == []  # two words in common, which are not rare
    assert Statements(min_score=0.5).for_question(vital, "adult_medicine", 1)[0].id == "mmedexpert:heart_rate_adult"
    assert len(own_statements()) == 9


def test_a_users_own_statements_are_searched_too_and_ties_go_by_id(tmp_path):
    path = tmp_path / "own.yaml"
    row = "text: Haematuria with a flank mass asks for sonography., specialty: any, source: Own 2026, licence: CC0-1.0"
    path.write_text(f"- {{id: b, {row}}}\n- {{id: a, {row}}}\n", encoding="utf-8")
    found = Statements([path]).for_question("Hematuria and flank masses in a toddler", "pediatrics", 5)
    assert [one.id for one in found] == ["a", "b"]
    assert [one.id for one in Statements([path]).for_question("Hematuria, flank mass", "pediatrics", 1)] == ["a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no YAML"),
        ("id: a", "hold no list"),
        ("- a", "entry 1 is no mapping"),
        ("- {id: a, text: the of, specialty: any, source: c, licence: d}", "no word to find it by"),
        ("- {id: a, text: gout, specialty: any, source: c}", "entry 1 has no licence"),
        ("- {id: 1, text: gout, specialty: any, source: c, licence: d}", "entry 1 has no id"),
        ("- {id: a, text: gout, specialty: any, source: c, licence: d, colour: red}", "'colour' is none of"),
        ("- &x {id: a, text: gout, specialty: any, source: c, licence: d}\n- *x", "'a' is taken"),
    ],
)
def test_broken_statements_are_one_line(tmp_path, text, told):
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=told) as error:
        Statements([path])
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        Statements([Path(tmp_path / "none.yaml")])
