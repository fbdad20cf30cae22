"""`benchmark=phantom_pairs`: pairs of answers about drawn images, of which one is better by construction. # ours

Five kinds, each with labels in the dimensions that it decides and in no other:

    finding        the answer that says what is seen, against one as sound about what is not
    contradiction  the same reasoning with its own conclusion, against the other one
    partial        reasoning and conclusion, against the conclusion alone
    padded         the answer, against the same with sentences that have nothing to do with the question
    insight        the answer and what would change it, against the answer and its first sentence again
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mmedexpert.data.pairs import record_of
from mmedexpert.data.record import Record
from mmedexpert.data.validation import Bad
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.sources.phantom.cases import Case, draw_case
from mmedexpert.sources.phantom.families import rules_of
from mmedexpert.sources.phantom.source import TOP
from mmedexpert.sources.phantom.text import letter_of, listed, measured, options, question, trace, upper

KINDS = {
    "finding": ("accuracy", "overall"),
    "contradiction": ("accuracy", "overall"),
    "partial": ("comprehensiveness", "overall"),
    "padded": ("relevance", "responsiveness", "overall"),
    "insight": ("creativity", "overall"),
}
# why the better answer is it, in words that the tiny base can say (judging/lessons.py)
REASONS = {
    "finding": "{worse} against it.",
    "contradiction": "{worse} against {worse}.",
    "partial": "{worse} undecided.",
    "padded": "{worse} beside it.",
    "insight": "{better} follow.",
}
PADDING = (
    "The picture was taken with care.", "Many patients ask about this.", "Imaging has a long history.",
    "The report was typed in the evening.", "Colleagues often discuss such pictures.", "It is a common examination.",
)  # fmt: skip
SPLITS = ("train", "val", "test")
FORMS = ("plain", "completion", "both")


def load(
    root: Path | None, out_dir: Path, *, split: str = "test", count: int = 60, seed: int = 0, form: str = "plain"
) -> tuple[list[Record], Path, Bad]:
    """Draw `count` pairs of each specialty, one image each, kinds and what questions need in turn; half of the better
    answers stand first. `root` is not used. The three splits share no draw.

    `form`: plain answers; completions, to a question with its options, as the models of this repo write them; or both,
    each by a coin. ValueError for another split or form.
    """
    for name, value, known in (("split", split, SPLITS), ("form", form, FORMS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    images = out_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for place, specialty in enumerate(TOP):
        rules = rules_of(specialty)
        rng = np.random.default_rng([seed, place, SPLITS.index(split), 2_000])  # apart from the questions' own
        for index in range(count):
            kind = list(KINDS)[index % len(KINDS)]
            rule = rules[index // len(KINDS) % len(rules)]
            case = draw_case(rule, PERSPECTIVES[index // (len(KINDS) * len(rules)) % 4], rng)
            identity = f"{specialty}-pairs-{split}-{index:04d}"
            case.paint(rng).save(images / f"{identity}.png", compress_level=1)
            tagged = form == "completion" or (form == "both" and bool(rng.integers(2)))
            choices = _choices(case, rng) if tagged else None
            better, worse = _answers(case, kind, rng, choices)
            first = bool(rng.integers(2))
            answers = {"A": better if first else worse, "B": worse if first else better}
            asked = question(case, rng) + (f"\n{listed(choices)}" if choices else "")
            record = record_of(
                identity=identity, images=[f"{identity}.png"], question=asked, answers=answers,
                labels=dict.fromkeys(KINDS[kind], "A" if first else "B"), source="phantom pairs", license="Apache-2.0",
                specialty=specialty, groups={"kind": kind}, reason=_reason(case, kind, choices),
            )  # fmt: skip
            records.append(replace(record, split=split))
    return records, images, []


def _choices(case: Case, rng: np.random.Generator) -> dict[str, str]:
    """The options of a question, the labels of the contrary case among them."""
    choices = options(case, rng)
    for label in _otherwise(case).labels:
        if label not in choices.values():
            spare = next(letter for letter, text in choices.items() if text not in case.labels)
            choices[spare] = label
    return choices


def _answers(case: Case, kind: str, rng: np.random.Generator, choices: dict[str, str] | None) -> tuple[str, str]:
    """The better answer and the worse one; with `choices` as completions."""
    steps, label = _told(case, rng, choices)
    whole, other = " ".join([*steps, _so(label)]), label
    if kind == "finding":
        other_steps, other = _told(_otherwise(case), rng, choices)
        found = whole, " ".join([*other_steps, _so(other)])
    elif kind == "contradiction":
        other = next(one for one in case.labels if one != label)
        found = whole, " ".join([*steps, _so(other)])
    elif kind == "partial":
        found = whole, _so(label)
    elif kind == "padded":
        chosen = rng.permutation(len(PADDING))[:4]
        found = whole, " ".join([PADDING[chosen[0]], PADDING[chosen[1]], whole, PADDING[chosen[2]], PADDING[chosen[3]]])
    else:
        found = f"{whole} {_would_change(case, label)}", f"{whole} {steps[0]}"
    if choices is None:
        return found
    return _completion(found[0], label, choices), _completion(found[1], other, choices)


def _reason(case: Case, kind: str, choices: dict[str, str] | None) -> str:
    """What a judge would write down: of a finding first what is seen, else what is amiss."""
    if kind != "finding":
        return REASONS[kind]
    steps, label = _told(case, np.random.default_rng(0), choices)
    return " ".join([*steps, _so(label), REASONS[kind]])


def _completion(text: str, label: str, choices: dict[str, str]) -> str:
    letter = letter_of(choices, label)
    return f"<think>{text.replace(_so(label), f'So {label} {letter}.')}</think><answer>{letter}</answer>"


def _told(case: Case, rng: np.random.Generator, choices: dict[str, str] | None) -> tuple[list[str], str]:
    """The steps of the perspective that decides the case, and the label that they come to."""
    steps = list(trace(case, choices or options(case, rng), case.needs).steps[:-1])
    return steps, case.gold


def _otherwise(case: Case) -> Case:
    """The case whose picture would show the contrary of what decides this one, and whose answer is the other label."""
    cut, family = case.rule.cuts[case.pair], case.family
    if case.needs == "differential":
        return replace(case, sign=not case.sign)
    if case.needs == "intuitive":
        return replace(case, look=1 - case.look)
    if case.needs == "analytical":
        return replace(case, value=round(2 * cut - case.value, family.decimals))
    # a weak finding does not overcome what is stated: it takes one of another strength, or on the other side
    middles = [sum(family.far) / 2, sum(family.near) / 2]
    values = [round(cut + side * middle, family.decimals) for middle in middles for side in (1, -1)]
    return next(other for value in values if (other := replace(case, value=value)).likely != case.likely)


def _so(label: str) -> str:
    return f"So {label}."


def _would_change(case: Case, label: str) -> str:
    """What would have to be seen for the other label."""
    other = next(one for one in case.labels if one != label)
    if case.needs == "differential":
        return f"{upper(other)} if it had {'no ' if case.sign else ''}{case.family.sign}."
    if case.needs == "intuitive":
        looks = case.family.looks
        return f"{upper(other)} if it showed {looks[bool(1 - case.look) == case.brighter_below]}."
    cut = measured(case.family, case.rule, case.rule.cuts[case.pair])
    return f"{upper(other)} on the other side of {cut[0].lower()}{cut[1:]}."
