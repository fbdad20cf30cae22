"""How far a completion follows each clinical reasoning perspective: criteria that plain rules check in its text. # ours

The paper names the perspectives and publishes no rubric: every criterion, cue word and window below is ours. A criterion
asks for substance beside the cue: a finding, a number that agrees with another number, an answer that the reasoning
arrived at. Whether a stated finding or measurement is in the image is not for the text to show: that is the outcome
reward's part. All scans look at a fixed number of neighbours, so that time is linear in the text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.scoring import score_choice

INSTANT_WORDS, BRIEF_WORDS, LONG_WORDS = 25, 30, 60
UPDATE_TOLERANCE = 0.02
LE, GE = "\u2264", "\u2265"
OPERATORS = frozenset(["<", ">", "=", "~", LE, GE])  # ~ is "between" or "within"

# Synonyms become one token. The first that matches counts, so a phrase stands before its parts.
_MORE, _LESS = "(?:greater|higher|larger|wider|longer|faster|more)", "(?:less|lower|smaller|narrower|shorter|slower)"
_VOCABULARY = {
    LE: rf"not (?:above|exceed(?:ing)?|{_MORE} than)|no {_MORE} than|at most|{_LESS} than or equal to",
    GE: rf"not (?:below|{_LESS} than)|no {_LESS} than|at least|{_MORE} than or equal to",
    ">": rf"above|exceed(?:s|ed|ing)?|{_MORE} than|(?<=is )over",
    "<": rf"below|{_LESS} than|(?<=is )under",
    "=": "equals?(?: to)?",
    "~": "between|within",
    "excluded": "rul(?:e|es|ed|ing) out|exclud(?:e|es|ed|ing)|(?:less|not|not very) likely|unlikely|im(?:prob|plaus)(?:a|i)ble"
    "|(?:(?:argu|speak|count|point|weigh)(?:e|es|s|ing)? )?against|rather than|more likely than|in(?:consistent|compatible)"
    "|not (?:fit|match|support(?:ed)?|suggest|consistent|compatible)|(?:eliminat|reject|dismiss)(?:e|es|ed|s|ing)",
    "candidate": "candidates?|differentials?|consider(?:ed|ing|ations?)?|possib(?:le|ility|ilities)|either|versus|vs|could|may"
    "|might|includes?",
    "pattern": "patterns?|(?:look|appear)(?:s|ing)? like|typical(?:ly)?|classic(?:al|ally)?|characteristic|pathognomonic"
    "|hallmark|resembles|reminiscent|glance|recogni[sz]e|unmistakable|textbook|gestalt",
    "criterion": "criteri(?:on|a)|thresholds?|cut-? ?offs?|limits?|range|reference|guidelines?|norm|normally|upper limit",
    "lr": "likelihood ratios?|bayes factor",
    "prior": "pre-? ?test|base rate|a priori|prevalence",
    "posterior": "post-? ?test|(?:updated|revised)(?= prob| odds| likelihood)",
    "probability": "probabilit(?:y|ies)|odds|likelihood|chance|suspicion",
    "raise": "rais(?:e|es|ed|ing)|increas(?:e|es|ed|ing)",
    "reduce": "lower(?:s|ed|ing| the)|decreas(?:e|es|ed|ing)|reduc(?:e|es|ed|ing)",
}
_SYNONYM = re.compile(r"\b(?:" + "|".join(f"({phrases})" for phrases in _VOCABULARY.values()) + r")\b")
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?")
_TOKEN = re.compile(
    rf"@\d+|[^\W\d_][^\W_]*(?:['-][^\W\d_][^\W_]*)*|(?<![^\W_]){_NUMBER.pattern}|[<>=~\u2264\u2265:,(/-]|[.!?;\n]"
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES = {"normal": "criterion"} | {word: word for word in ("criterion", "lr", "prior", "posterior", "probability")}
COPULA = _words("is are was were be been being has have had seems appears looks remains does do did")
JOIN = _words("and or nor the a an both ,")  # between options that one cue excludes
BEFORE_OPTION = _words("the a an any both of with for candidate")
AFTER_OPTION = COPULA | _words("would can should therefore thus hence very also then made deemed this now candidate : - ,")
# No finding: function words, talk about reasoning, and the cues themselves.
EMPTY = COPULA | JOIN | BEFORE_OPTION | AFTER_OPTION | _VOCABULARY.keys() | ROLES.keys() | _words(
    """to in on by as at it its that these those which not no than from so because since due given here there such about
    answer option options choice diagnosis image picture finding findings evidence reason reasons case patient step value
    number measurement measured best final correct conclusion high low true false probable likely approximately"""
)  # fmt: skip
UNITS = _words("mm cm m ml l bpm hu mmhg ms s mv kg g degrees beats /")
Place = tuple[int, int]  # sentence, token


class _Thought(NamedTuple):
    """A thought, read: options are the tokens `@0`, `@1`, ...; `tails` are options by their last word ("oedema")."""

    sentences: list[list[str]]
    words: int
    first: Place  # the first option named, and the words before it
    answered: int | None
    tails: dict[str, int]

    def concludes(self, after: Place) -> bool:
        """Whether the answered option is named after a place."""
        rest = [self.sentences[after[0]][after[1] + 1 :], *self.sentences[after[0] + 1 :]]
        return any(f"@{self.answered}" in sentence for sentence in rest)


def adherence(completion: str, options: Mapping[str, str] | None, perspective: str) -> float:
    """How far a completion reasons in the manner of a perspective: the mean of its criteria, in [0, 1]. # ours"""
    scores = criteria(completion, options, perspective)
    return sum(scores.values()) / len(scores)


def criteria(completion: str, options: Mapping[str, str] | None, perspective: str) -> dict[str, float]:
    """The criteria of one perspective, each in [0, 1]; all zero where the completion holds no thought.

    `completion` is `<think>...</think><answer>C</answer>` (without think tags all but the answer tag is the thought),
    `options` maps letters to texts; None for an open question. Raises ValueError for an unknown perspective.
    """
    if perspective not in PERSPECTIVES:
        raise ValueError(f"perspective must be one of {', '.join(PERSPECTIVES)}, got {perspective!r}")
    thought = _read(completion, options)
    if perspective == "differential":
        return _differential(thought)
    if perspective == "intuitive":
        return _intuitive(thought)
    return _analytical(thought) if perspective == "analytical" else _bayesian(thought)


def _differential(thought: _Thought) -> dict[str, float]:
    """Two options or more are candidates, all but one are excluded with a finding, and the answer is not."""
    excluded: set[int] = set()
    for sentence in filter(_substance, thought.sentences):
        for i, token in enumerate(sentence):
            if token == "excluded":
                excluded |= _excluded_at(sentence, i, thought.tails)
    tokens = {token for sentence in thought.sentences for token in sentence}
    named = {int(token[1:]) for token in tokens if token[0] == "@"} | excluded
    many = len(named) >= 2 and bool(tokens & {"candidate", "excluded"})
    return {
        "candidates": float(many),
        "exclusion": min(1.0, len(excluded) / (len(named) - 1)) if many else 0.0,
        "conclusion": float(many and bool(excluded) and thought.answered in named - excluded),
    }


def _excluded_at(sentence: Sequence[str], i: int, tails: Mapping[str, int]) -> set[int]:
    """The options that the exclusion at `i` is about: those right after it, else those it is said of."""
    if "not" in sentence[max(0, i - 3) : i]:
        return set()
    for side, skip in ((sentence[i + 1 : i + 12], BEFORE_OPTION), (sentence[max(0, i - 12) : i][::-1], AFTER_OPTION)):
        found: set[int] = set()
        for token in side:
            option = int(token[1:]) if token[0] == "@" else tails.get(token)
            if option is not None:
                found.add(option)
            elif token not in (JOIN if found else skip):
                break
        if found:
            return found
    return set()


def _intuitive(thought: _Thought) -> dict[str, float]:
    """A pattern is named, the answer is the first option named and soon, and little else is said.

    A short text that names no pattern is a guess, so that the other two count only with the first.
    """
    pattern = any(
        token == "pattern" and "not" not in sentence[max(0, i - 2) : i]
        for sentence in filter(_substance, thought.sentences)
        for i, token in enumerate(sentence)
    )
    option, before = thought.first
    return {
        "pattern": float(pattern),
        "commitment": float(pattern and option == thought.answered and before < INSTANT_WORDS),
        "brevity": pattern * min(1.0, max(0.0, (LONG_WORDS - thought.words) / (LONG_WORDS - BRIEF_WORDS))),
    }


def _analytical(thought: _Thought) -> dict[str, float]:
    """Measurement and criterion are stated, compared with each other and rightly, and the answer comes after that."""
    measured: list[float] = []
    cuts: set[float] = set()
    relations: list[tuple[float, str, float, Place]] = []
    for n, sentence in enumerate(thought.sentences):
        values, roles = _numbers(sentence)
        for i, token in enumerate(sentence):
            if roles.get(i) == "measurement":
                measured.append(values[i])
            elif roles.get(i) == "criterion":
                cuts.add(values[i])
            elif token in OPERATORS:
                right, left = _right_operands(sentence, i, values), _left_operand(sentence, i, values, measured[-1:])
                signs = [token] if token != "~" else [GE, LE] if len(right) == 2 else []
                if left is None:  # "a ratio above 0.50 is abnormal" names a criterion
                    cuts.update(values[j] for j in right if roles[j] == "")
                else:
                    relations += [(left, sign, values[j], (n, j)) for sign, j in zip(signs, right, strict=False)]
    true = bool(relations) and all(
        {"<": a < b, ">": a > b, "=": a == b, LE: a <= b, GE: a >= b}[sign] for a, sign, b, _ in relations
    )
    agreeing = [at for a, _, b, at in relations if true and ((a in measured and b in cuts) or (b in measured and a in cuts))]
    return {
        "measurement": float(bool(measured)),
        "criterion": float(bool(cuts)),
        "comparison": float(true),
        "agreement": float(bool(agreeing)),
        "conclusion": float(bool(agreeing) and thought.concludes(agreeing[0])),
    }


def _bayesian(thought: _Thought) -> dict[str, float]:
    """Prior, effect of a finding and posterior are stated, they agree, and the answer comes after them.

    With likelihood ratios: posterior odds = prior odds * their product, to two percentage points; else the direction is
    that of the verb. A posterior above one half must be that of the answer, where the prior says whose it is.
    """
    found: dict[str, list[tuple[float, Place]]] = {"prior": [], "posterior": [], "lr": []}
    direction, effect, finding = 0, False, False
    for n, sentence in enumerate(thought.sentences):
        values, roles = _numbers(sentence)
        for i, role in roles.items():
            if role in found and values[i] > 0:
                found[role].append((values[i], (n, i)))
        verb = ("raise" in sentence) - ("reduce" in sentence)
        verb *= not {"probability", "prior", "posterior"}.isdisjoint(sentence)
        direction = direction or verb
        previous, finding = finding, _substance(sentence)
        effect = effect or ((verb != 0 or "lr" in roles.values()) and (finding or previous))
    consistent = follows = False
    if found["prior"] and found["posterior"]:
        (prior, start), (posterior, end) = found["prior"][0], found["posterior"][-1]
        ratios = [value for value, _ in found["lr"]]
        odds = [prior / (1 - prior) * math.prod(chosen) for chosen in (ratios, set(ratios))]  # one may be stated twice
        nearest = min(abs(posterior - 1 + 1 / (1 + x)) for x in odds)
        consistent = nearest <= UPDATE_TOLERANCE + 1e-9 if ratios else direction * (posterior - prior) > 0
        subjects = {token for token in thought.sentences[start[0]] if token[0] == "@"}
        of_another = posterior > 0.5 and bool(subjects) and f"@{thought.answered}" not in subjects
        follows = consistent and thought.concludes(end) and not of_another
    return {
        "prior": float(bool(found["prior"])),
        "effect": float(effect),
        "posterior": float(bool(found["posterior"])),
        "update": float(consistent),
        "conclusion": float(follows),
    }


def _substance(sentence: Sequence[str]) -> bool:
    """Whether a sentence holds a word that may be a finding."""
    return any(len(token) > 2 and token[0].isalpha() and token not in EMPTY for token in sentence)


def _numbers(sentence: Sequence[str]) -> tuple[dict[int, float], dict[int, str]]:
    """Values and roles of the numbers of a sentence, by token index; a per cent is a hundredth, no role is ""."""
    values: dict[int, float] = {}
    roles: dict[int, str] = {}
    moving = "probability" in sentence and ("raise" in sentence or "reduce" in sentence)
    for i, token in enumerate(sentence):
        if _NUMBER.fullmatch(token) and math.isfinite(float(token.rstrip("%").replace(",", ""))):
            values[i] = float(token.rstrip("%").replace(",", "")) / (100 if token[-1] == "%" else 1)
            moved = {"from": "prior", "to": "posterior"}.get(sentence[i - 1]) if moving and i and 0 < values[i] < 1 else None
            roles[i] = moved or _role(sentence, i, values[i], roles)
    return values, roles


def _role(sentence: Sequence[str], i: int, value: float, roles: Mapping[int, str]) -> str:
    """What the number at `i` is by the words before it, else right after it; `roles` are those of earlier numbers."""

    def cue(j: int) -> str:
        role = ROLES.get(sentence[j], "")
        return "" if role in ("prior", "posterior", "probability") and not 0 < value < 1 else role

    weak, named, compared = "", False, False
    for j in range(i - 1, max(i - 12, -1), -1):
        token = sentence[j]
        if token == "," or j in roles:
            if roles.get(j) == "criterion" and i - j <= 4 and not {"to", "-", "and"}.isdisjoint(sentence[j + 1 : i]):
                return "criterion"  # a range: 60 to 100
            break
        if cue(j) == "probability":
            weak = "probability"  # whose, an earlier word may say: pretest probability
        elif cue(j) and not (token == "normal" and j and sentence[j - 1] in COPULA):
            return cue(j)
        compared = compared or token in OPERATORS
        named = named or (i - j <= 6 and len(token) > 1 and token[0].isalpha() and token not in EMPTY)
    after = range(i + 1, min(i + 3, len(sentence)))
    for j in after:
        if cue(j) and sentence[j] != "normal":
            return weak or cue(j)
        if sentence[j] in COPULA or not sentence[j][0].isalpha():
            break
    age = any(sentence[j].startswith(("year", "month", "week", "day")) for j in after)
    unit = i + 1 < len(sentence) and sentence[i + 1] in UNITS
    return weak or ("measurement" if (named or unit) and not compared and not age else "")


def _left_operand(
    sentence: Sequence[str], i: int, values: Mapping[int, float], latest: Sequence[float]
) -> float | None:
    """The number that the operator at `i` is said of: just before it, or the latest measurement by a pronoun."""
    for j in range(i - 1, max(i - 7, -1), -1):
        token, before = sentence[j], sentence[j - 1] if j else ""
        if j in values:
            return values[j]
        if token in ("this", "it") or (token == "which" and before == ","):
            return latest[0] if latest and before not in ("if", "when", "whether", "unless") else None
        if token in OPERATORS or token in ("criterion", "normal", ":", "(") or (token == "," and j < i - 1):
            break
    return None


def _right_operands(sentence: Sequence[str], i: int, values: Mapping[int, float]) -> list[int]:
    """Token indices of the number, or the two numbers of a range, that the operator at `i` compares with."""
    found: list[int] = []
    for j in range(i + 1, min(i + 10, len(sentence))):
        if j in values:
            found.append(j)
        elif sentence[j] in OPERATORS or sentence[j] == ",":
            break
    return found[:2]


_OPEN_LIST = re.compile(r"\b(?:candidates?|differential(?: diagnos[ei]s)?)(?: (?:is|are|includes?))?:? ([^.;\n]{1,300})")


def _read(completion: str, options: Mapping[str, str] | None) -> _Thought:
    """Normalise, mark the options, unify synonyms, cut into sentences of tokens."""
    thought = completion.partition("</think>")[0].rpartition("<think>")[2]
    text = _normal(thought.partition("<answer>")[0])
    if options:
        picked = score_choice(completion, [f"{k}. {v}" for k, v in options.items()], "A", "robust").picked
        names, chosen = list(options.values()), options.get(picked or "")
    else:  # an open question: its candidates are those that the thought lists
        chosen = completion.rpartition("<answer>")[2].partition("</answer>")[0][:200] if "<answer>" in completion else None
        listed = re.split(r", (?:and |or )?| and | or | versus | vs ", m[1]) if (m := _OPEN_LIST.search(text)) else []
        names = [name for name in listed if len(name.split()) <= 6][:12] + ([chosen] if chosen else [])
    keys = [" ".join(re.findall(r"[^\W_]+", re.sub(r"^(?:the|an?) ", "", _normal(name)))) for name in names]
    answered = keys.index(keys[names.index(chosen)]) if chosen else None

    order = sorted((i for i, key in enumerate(keys) if len(key) > 1), key=lambda i: -len(keys[i]))
    patterns = [f"(?P<o{i}>" + r"[\W_]{0,3}".join(map(re.escape, keys[i].split())) + "(?:s|es)?)" for i in order]
    patterns += [rf"(?P<l{i}>(?:option|choice) \(?{re.escape(k.lower())}\)?)" for i, k in enumerate(options or ())]
    option = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)" if patterns else r"(?!)")

    def index(match: re.Match[str]) -> int:
        return keys.index(keys[int((match.lastgroup or "")[1:])])

    start = option.search(text)
    first = (index(start), len(_TOKEN.findall(text[: start.start()]))) if start else (-1, 0)
    named = {index(match) for match in option.finditer(text)}
    last = [keys[i].split()[-1] for i in named if " " in keys[i]]
    everywhere = " ".join(keys).split()
    tails = {word: i for i, word in zip([i for i in named if " " in keys[i]], last, strict=True)}
    tails = {word: i for word, i in tails.items() if len(word) > 3 and everywhere.count(word) == 1}

    marked = option.sub(lambda match: f" @{index(match)} ", text)
    unified = _SYNONYM.sub(lambda match: f" {tuple(_VOCABULARY)[(match.lastindex or 1) - 1]} ", marked)
    sentences: list[list[str]] = [[]]
    for token in _TOKEN.findall(unified):
        if token in ".!?;\n":
            sentences.append([])
        else:
            sentences[-1].append(token)
    return _Thought([s for s in sentences if s], len(re.findall(r"[^\W_]+", text)), first, answered, tails)


def _normal(text: str) -> str:
    """Lower case, one kind of dash, apostrophe, blank and negation, American spelling where it often differs."""
    text = unicodedata.normalize("NFKC", text).casefold().translate({0x2019: "'", 0x2013: "-", 0x2212: "-", 0x40: " "})
    for old, new in (("n't", " not"), ("cannot", "can not"), ("tumour", "tumor"), ("<=", LE), (">=", GE), ("==", "=")):
        text = text.replace(old, new)
    text = re.sub(r"[ao]e(?!s\b)", "e", re.sub(r"[^\S\n]+", " ", text))
    return re.sub(r"(?<=\d) ?(?:%|per ?cent\b)", "%", text)
