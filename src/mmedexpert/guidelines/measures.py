"""How much of each criterion, and of each sign of substance, a thought holds: numbers in [0, 1].  # ours

The criteria and how they are measured stand in `perspectives.yaml`; those measured by a function have it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmedexpert.guidelines.perspectives import perspectives
from mmedexpert.guidelines.reading import Thought

STRETCH = 40  # words of a stretch that density is taken over: a text may be brief in one part and dense in another


def criteria_of(thought: Thought) -> dict[str, float]:
    """Every criterion of all four perspectives, and `concluded`, which all share."""
    found = {
        name: measure(criterion.measure, thought)
        for one in perspectives().values()
        for name, criterion in one.criteria.items()
    }
    return found | {"concluded": _concluded(thought)}


def measure(spec: Mapping[str, Any], thought: Thought) -> float:
    """One measure of `perspectives.yaml`. n sentences or words count n / (n + 1): the first tells most."""
    if "text" in spec:
        return FUNCTIONS[spec["text"]](thought)
    if "stretch" in spec:
        return _densest(thought, spec["stretch"], spec["words"])
    if "cues" in spec:
        return _saturating(thought.cue(*spec["cues"]))
    needed, any_of = spec["sentences"], spec.get("any")
    held = [one.marks for one in thought.sentences if one.marks.issuperset(needed)]
    found = len(held) if any_of is None else sum(not marks.isdisjoint(any_of) for marks in held)
    return _saturating(found)


def signs_of(thought: Thought) -> dict[str, float]:
    """Signs of substance: concrete words against talk that fits every case, and the task told again."""
    sentences, size = thought.sentences, max(1, len(thought.words))
    findings, clinical, measured = len(thought.findings), len(thought.clinical), thought.measured
    told = thought.cue("restate")
    connected = thought.cue("cause", "arrow", "against", "exclude", "update", "instant", "picture")
    return {
        "findings": min(1.0, (clinical + measured) / 10),
        "concrete": min(1.0, (clinical + measured) / size / 0.35),
        "content": min(1.0, (findings + measured) / size / 0.6),
        "thin": float((findings + measured) / size < 0.2),
        "generic": thought.generic / size,
        "talk": min(1.0, thought.cue("talk") / size / 0.25),
        "restated": min(1.0, told / 3),
        "retold": min(1.0, told / size / 0.08),
        "stated": min(1.0, sum(bool(one.clinical) and "restate" not in one.cues for one in sentences) / 4),
        "named": float(any(thought.answered in one.options for one in sentences)),
        "connected": min(1.0, connected * 15 / size),
        "length": size / (size + 60),
    }


def _saturating(count: float, half: float = 1.0) -> float:
    return count / (count + half)


def _densest(thought: Thought, cues: list[str], words: float) -> float:
    """The stretch richest in cues; 1 where one of so many `words` is one."""
    if not thought.cue(*cues):
        return 0.0
    rows = [(sum([one.cues.get(cue, 0) for cue in cues]), one.words) for one in thought.sentences]
    shortest = min(STRETCH, max(1, len(thought.words)))
    best, start, hits, size = 0.0, 0, 0, 0
    for place, (hit, length) in enumerate(rows):
        hits, size = hits + hit, size + length
        while size - rows[start][1] >= STRETCH:
            hits, size, start = hits - rows[start][0], size - rows[start][1], start + 1
        if size >= STRETCH or place == len(rows) - 1:
            best = max(best, hits * words / max(size, shortest))
    return min(1.0, best)


def _others(thought: Thought) -> set[int]:
    return {option for sentence in thought.sentences for option in sentence.options} - {thought.answered}


def _candidates(thought: Thought) -> float:
    return min(1.0, len(_others(thought)) / 3)


def _weighed(thought: Thought) -> float:
    """Options other than the answer about which a run of sentences states two findings and argues against; of two."""
    stated: dict[int, set[str]] = {}
    argued: set[int] = set()
    current: int | None = None
    for sentence in thought.sentences:
        options = list(sentence.options)
        if options:
            current = options[0] if len(options) == 1 else None
        about = options if 0 < len(options) <= 2 else [] if options or current is None else [current]
        for option in about:
            stated.setdefault(option, set()).update(sentence.findings)
            if "against" in sentence.marks or "exclude" in sentence.marks:
                argued.add(option)
    weighed = [one for one in argued if one != thought.answered and len(stated[one]) >= 2]
    return min(1.0, len(weighed) / 2)


def _at_once(thought: Thought) -> float:
    answers = [place for place, one in enumerate(thought.sentences) if thought.answered in one.options]
    early = [place for place, one in enumerate(thought.sentences[:4]) if "instant" in one.cues]
    return float(any(abs(place - answer) <= 1 for place in early for answer in answers))


def _committed(thought: Thought) -> float:
    """The first option named is the answer."""
    first = next((one.options for one in thought.sentences if one.options), {})
    return float(bool(first) and min(first, key=lambda option: first[option]) == thought.answered)


def _brief(thought: Thought) -> float:
    return min(1.0, max(0.0, (90 - len(thought.words)) / 60))


def _holds(thought: Thought) -> float:
    """A true comparison of what was measured: of a number beside a name, in its own sentence or in one before it."""
    named: set[float] = set()
    for sentence in thought.sentences:
        about = bool(sentence.findings or any(number.unit for number in sentence.numbers))
        if about and "limit" not in sentence.cues:
            named |= {number.value for number in sentence.numbers}
        for one, other, truth in sentence.compared:
            if truth and (about or one in named or other in named):
                return 1.0
    return 0.0


def _prior(thought: Thought) -> float:
    return float(any(one.marks.issuperset(("prior", "p")) for one in thought.sentences[:6]))


def _posterior(thought: Thought) -> float:
    last = thought.sentences[-3:]
    return float(any("p" in one.marks and ("posterior" in one.marks or "answer" in one.marks) for one in last))


def _chances(thought: Thought) -> float:
    return _saturating(sum(len(one.chances) + one.told for one in thought.sentences), 2.0)


def _concluded(thought: Thought) -> float:
    """The answer is named in the last sentences."""
    return float(any("answer" in one.marks for one in thought.sentences[-3:]))


FUNCTIONS: Mapping[str, Callable[[Thought], float]] = {
    "candidates": _candidates,
    "weighed": _weighed,
    "at_once": _at_once,
    "single": lambda thought: float(not _others(thought)),
    "committed": _committed,
    "brief": _brief,
    "holds": _holds,
    "prior": _prior,
    "posterior": _posterior,
    "chances": _chances,
}
