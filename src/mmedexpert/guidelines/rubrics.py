"""How far a completion follows each clinical reasoning perspective: criteria that plain rules check in its text. # ours

The paper names the perspectives and publishes no rubric: every criterion and window below is ours, as are the cues in
`reading`. A criterion asks for substance beside its cue: a finding, a number that agrees with another one, an answer
the reasoning arrived at. Whether a stated finding is in the image no text shows; that is the outcome reward's part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from mmedexpert.guidelines.perspectives import PERSPECTIVES
from mmedexpert.guidelines.reading import (
    AFTER_OPTION,
    BEFORE_OPTION,
    EMPTY,
    GE,
    JOIN,
    LE,
    OPERATORS,
    Place,
    Thought,
    numbers,
    read,
)

INSTANT_WORDS, BRIEF_WORDS, LONG_WORDS = 25, 30, 60
UPDATE_TOLERANCE = 0.02
STOP = OPERATORS | {"criterion", "normal", ":", "("}


def adherence(completion: str, options: Mapping[str, str] | None, perspective: str) -> float:
    """How far a completion reasons in the manner of a perspective: the mean of its criteria, in [0, 1]. # ours"""
    scores = criteria(completion, options, perspective)
    return sum(scores.values()) / len(scores)


def criteria(completion: str, options: Mapping[str, str] | None, perspective: str) -> dict[str, float]:
    """The criteria of one perspective, each in [0, 1]; all zero where the completion holds no thought. # ours

    `completion` is `<think>...</think><answer>C</answer>` (without think tags what precedes the answer is the thought),
    `options` maps letters to texts; None for an open question. Raises ValueError for an unknown perspective.
    """
    if perspective not in PERSPECTIVES:
        raise ValueError(f"perspective must be one of {', '.join(PERSPECTIVES)}, got {perspective!r}")
    scores = RUBRICS[perspective](read(completion, options))
    return {name: float(score) for name, score in scores.items()}


def _differential(thought: Thought) -> Mapping[str, float]:
    """Two options or more are candidates, all but one are excluded with a finding, and the answer is not."""
    excluded: set[int] = set()
    for sentence in filter(_substance, thought.sentences):
        for i, token in enumerate(sentence):
            if token == "excluded":
                excluded |= _excluded_at(sentence, i, thought.tails)
    tokens = {token for sentence in thought.sentences for token in sentence}
    named = {int(token[1:]) for token in tokens if token[0] == "@"} | excluded
    many = len(named) >= 2 and not tokens.isdisjoint(("candidate", "excluded"))
    share = len(excluded - {thought.answered}) / (len(named) - 1) if many else 0.0
    remains = share > 0 and thought.answered in named - excluded
    return {"candidates": many, "exclusion": min(1.0, share), "conclusion": remains}


def _excluded_at(sentence: list[str], i: int, tails: Mapping[str, int]) -> set[int]:
    """The options that the exclusion at `i` is about: those right after it, else those it is said of."""
    if "not" in sentence[max(0, i - 3) : i]:
        return set()
    found: list[int] = []
    for side, skip in ((sentence[i + 1 : i + 12], BEFORE_OPTION), (sentence[max(0, i - 12) : i][::-1], AFTER_OPTION)):
        for token in side if not found else ():
            option = int(token[1:]) if token[0] == "@" else tails.get(token)
            if option is not None:
                found.append(option)
            elif token not in (JOIN if found else skip):
                break
    if not found and "it" in sentence[max(0, i - 2) : i + 2]:  # the option last named before
        found = [int(token[1:]) for token in sentence[max(0, i - 40) : i] if token[0] == "@"][-1:]
    return set(found)


def _intuitive(thought: Thought) -> Mapping[str, float]:
    """A pattern is named, the answer is the first option named and soon, and little else is said.

    A short text that names no pattern is a guess, so that the other two count only with the first.
    """
    pattern = any(
        token == "pattern" and "not" not in sentence[max(0, i - 2) : i]
        for sentence in filter(_substance, thought.sentences)
        for i, token in enumerate(sentence)
    )
    option, before = thought.first
    brevity = min(1.0, max(0.0, (LONG_WORDS - thought.words) / (LONG_WORDS - BRIEF_WORDS)))
    committed = option == thought.answered and before < INSTANT_WORDS
    return {"pattern": pattern, "commitment": pattern and committed, "brevity": pattern * brevity}


def _analytical(thought: Thought) -> Mapping[str, float]:
    """Measurement and criterion are stated, compared with each other and rightly, and the answer comes after that."""
    measured: list[float] = []
    cuts: set[float] = set()
    relations: list[tuple[float, str, float, Place]] = []
    for n, sentence in enumerate(thought.sentences):
        values, roles = numbers(sentence)
        for i, token in enumerate(sentence):
            if roles.get(i) == "measurement":
                measured.append(values[i])
            elif roles.get(i) == "criterion":
                cuts.add(values[i])
            elif token in OPERATORS:
                left, right = _operands(sentence, i, values, measured[-1:])
                signs = [token] if token != "~" else [GE, LE] if len(right) == 2 else []
                if left is None:  # "a ratio above 0.50 is abnormal" names a criterion
                    cuts.update(values[j] for j in right if roles[j] == "")
                else:
                    relations += [(left, sign, values[j], (n, j)) for sign, j in zip(signs, right, strict=False)]
    holds = [{"<": a < b, ">": a > b, "=": a == b, LE: a <= b, GE: a >= b}[sign] for a, sign, b, _ in relations]
    true = bool(holds) and all(holds)
    at = [at for a, _, b, at in relations if (a in measured and b in cuts) or (b in measured and a in cuts)]
    stated = {"measurement": bool(measured), "criterion": bool(cuts), "comparison": true}
    return stated | {"agreement": true and bool(at), "conclusion": true and bool(at) and thought.concludes(at[0])}


def _operands(
    sentence: list[str], i: int, values: Mapping[int, float], latest: Sequence[float]
) -> tuple[float | None, list[int]]:
    """The value before the operator at `i` (by a pronoun, the latest measurement); indices of the one or two after."""
    if sentence[i] == "=" and (i - 1 not in values or i - 2 in values or sentence[i - 2 : i - 1] == ["/"]):
        return None, []  # a definition, or arithmetic such as 14 / 25 = 0.56
    left: float | None = None
    for j in range(i - 1, max(i - 7, -1), -1):
        token, before = sentence[j], sentence[j - 1] if j else ""
        pronoun = token in ("this", "it") or (token == "which" and before == ",")
        if j in values or (pronoun and latest and before not in ("if", "when", "whether", "unless")):
            left = values.get(j, latest[0] if latest else None)
        if j in values or pronoun or token in STOP or (token == "," and j < i - 1):
            break
    right: list[int] = []
    for j in range(i + 1, min(i + 10, len(sentence))):
        if sentence[j] in OPERATORS or sentence[j] == ",":
            break
        right += [j] if j in values else []
    return left, right[:2]


def _bayesian(thought: Thought) -> Mapping[str, float]:
    """Prior, effect of a finding and posterior are stated, they agree, and the answer comes after them.

    With likelihood ratios: posterior odds = prior odds * their product, to two percentage points; else the direction is
    that of the verb. A posterior above one half must be that of the answer, where the prior says whose it is.
    """
    found: dict[str, list[tuple[float, Place]]] = {"prior": [], "posterior": [], "lr": []}
    direction, effect, finding = 0, False, False
    for n, sentence in enumerate(thought.sentences):
        values, roles = numbers(sentence)
        for i, role in roles.items():
            if role in found and values[i] > 0:
                found[role].append((values[i], (n, i)))
        about = not {"probability", "prior", "posterior"}.isdisjoint(sentence)
        verb = about * (("raise" in sentence) - ("reduce" in sentence))
        direction = direction or verb
        previous, finding = finding, _substance(sentence)
        effect = effect or ((verb != 0 or "lr" in roles.values()) and (finding or previous))
    stated = {"prior": bool(found["prior"]), "effect": effect, "posterior": bool(found["posterior"])}
    if not (found["prior"] and found["posterior"]):
        return stated | {"update": False, "conclusion": False}
    (prior, start), (posterior, end) = found["prior"][0], found["posterior"][-1]
    ratios = [value for value, _ in found["lr"]]
    odds = [prior / (1 - prior) * math.prod(chosen) for chosen in (ratios, set(ratios))]  # one may be stated twice
    nearest = min(abs(posterior - 1 + 1 / (1 + x)) for x in odds)
    consistent = nearest <= UPDATE_TOLERANCE + 1e-9 if ratios else direction * (posterior - prior) > 0
    subjects = {token for token in thought.sentences[start[0]] if token[0] == "@"}
    of_another = posterior > 0.5 and bool(subjects) and f"@{thought.answered}" not in subjects
    return stated | {"update": consistent, "conclusion": consistent and thought.concludes(end) and not of_another}


def _substance(sentence: list[str]) -> bool:
    """Whether a sentence holds a word that may be a finding."""
    return any(len(token) > 2 and token[0].isalpha() and token not in EMPTY for token in sentence)


RUBRICS: dict[str, Callable[[Thought], Mapping[str, float]]] = {
    "differential": _differential, "intuitive": _intuitive, "analytical": _analytical, "bayesian": _bayesian,
}  # fmt: skip
