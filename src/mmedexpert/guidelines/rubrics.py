"""How far a completion follows each clinical reasoning perspective: criteria that plain rules check in its text. # ours

The paper names the perspectives and publishes no rubric: every criterion, cue and window below is ours. A criterion
asks for substance beside its cue: a finding, a number that agrees with another one, an answer the reasoning arrived
at. Whether a stated finding is in the image no text shows; that is the outcome reward's part. Scans look at a fixed
number of neighbours, so that time is linear in the text.
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
STOP = OPERATORS | {"criterion", "normal", ":", "("}

# Synonyms become one token. The first that matches counts, so that a phrase stands before its parts.
_MORE, _LESS = "(?:greater|higher|larger|wider|longer|faster|more)", "(?:less|lower|smaller|narrower|shorter|slower)"
_VOCABULARY = {
    LE: rf"not (?:above|exceed(?:ing)?|{_MORE} than)|no {_MORE} than|at most|{_LESS} than or equal to",
    GE: rf"not (?:below|{_LESS} than)|no {_LESS} than|at least|{_MORE} than or equal to",
    ">": rf"above|exceed(?:s|ed|ing)?|{_MORE} than|(?<=is )over",
    "<": rf"below|{_LESS} than|(?<=is )under",
    "=": "equals?(?: to)?",
    "~": "between|within",
    "excluded": "rul(?:e|es|ed|ing) out|exclud(?:e|es|ed|ing)|(?:less|not|not very) likely|unlikely"
    "|im(?:prob|plaus)[ai]ble|(?:(?:argu|speak|count|point)(?:e|es|s|ing)? )?against|rather than|more likely than"
    "|in(?:consistent|compatible)|not (?:fit|match|support(?:ed)?|suggest|consistent|compatible)"
    "|(?:eliminat|reject|dismiss)(?:e|es|ed|s|ing)",
    "candidate": "candidates?|differentials?|consider(?:ed|ing|ations?)?|possib(?:le|ility|ilities)|either|versus|vs"
    "|may|might|could|includes?",
    "pattern": "patterns?|(?:look|appear)(?:s|ing)? like|typical|classic(?:al)?|characteristic|resembles"
    "|pathognomonic|hallmark|reminiscent|glance|recogni[sz]e|unmistakable|textbook|gestalt",
    "criterion": "criteri(?:on|a)|thresholds?|cut-? ?offs?|limits?|range|reference|guidelines?|norm|normally",
    "lr": "likelihood ratios?|bayes factor",
    "prior": "pre-? ?test|base rate|baseline(?= prob| risk| odds| likelihood)|a priori|prevalence",
    "posterior": "post-? ?test|(?:updated|revised)(?= prob| odds| likelihood)",
    "probability": "probabilit(?:y|ies)|odds|likelihood|chance|suspicion",
    "raise": "rais(?:e|es|ed|ing)|increas(?:e|es|ed|ing)",
    "reduce": "lower(?:s|ed|ing| the)|decreas(?:e|es|ed|ing)|reduc(?:e|es|ed|ing)",
}
_SYNONYM = re.compile(r"\b(?:" + "|".join(f"({phrases})" for phrases in _VOCABULARY.values()) + r")\b")
_WORD = re.compile(r"[^\W_]+")
_NUMBER = re.compile(r"-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?")
_LETTER = r"[^\W\d_][^\W_]*"
_TOKEN = re.compile(rf"@\d+|{_LETTER}(?:['-]{_LETTER})*|(?<![^\W_]){_NUMBER.pattern}|[<>=~{LE}{GE}:,(/-]")
_END = re.compile(r"[!?;\n]|\.(?!\d)")
_OPEN_LIST = re.compile(r"\b(?:candidates?|differential(?: diagnos[ei]s)?)(?: is| are| includes?)?:? ([^.;\n]{1,300})")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROLES = {"normal": "criterion"} | {word: word for word in ("criterion", "lr", "prior", "posterior", "probability")}
COPULA = _words("is are was were be been being has have had seems appears looks remains does do did")
JOIN = _words("and or nor the a an both ,")  # between options that one cue excludes
BEFORE_OPTION = _words("the a an any both of with for candidate")
AFTER_OPTION = COPULA | _words("would can should therefore thus hence very also then made deemed now candidate : - ,")
# No finding: function words, talk about reasoning, and the cues themselves.
EMPTY = frozenset(_VOCABULARY).union(COPULA, JOIN, BEFORE_OPTION, AFTER_OPTION, ROLES)
EMPTY |= _words(
    "to in on by as at it its this that these those which not no than from so because since due given here there"
)
EMPTY |= _words(
    "such about answer option options choice diagnosis image picture finding findings evidence reason reasons"
)
EMPTY |= _words("case patient step number value measurement measured best final correct conclusion high low true false")
EMPTY |= _words("probable likely upper")
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
    """The criteria of one perspective, each in [0, 1]; all zero where the completion holds no thought. # ours

    `completion` is `<think>...</think><answer>C</answer>` (without think tags what precedes the answer is the thought),
    `options` maps letters to texts; None for an open question. Raises ValueError for an unknown perspective.
    """
    if perspective not in PERSPECTIVES:
        raise ValueError(f"perspective must be one of {', '.join(PERSPECTIVES)}, got {perspective!r}")
    rubric = (_differential, _intuitive, _analytical, _bayesian)[PERSPECTIVES.index(perspective)]
    return {name: float(score) for name, score in rubric(_read(completion, options)).items()}


def _differential(thought: _Thought) -> Mapping[str, float]:
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


def _intuitive(thought: _Thought) -> Mapping[str, float]:
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


def _analytical(thought: _Thought) -> Mapping[str, float]:
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


def _bayesian(thought: _Thought) -> Mapping[str, float]:
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


def _numbers(sentence: list[str]) -> tuple[dict[int, float], dict[int, str]]:
    """Values and roles of the numbers of a sentence, by token index; a per cent is a hundredth, no role is ""."""
    values: dict[int, float] = {}
    roles: dict[int, str] = {}
    moving = "probability" in sentence and ("raise" in sentence or "reduce" in sentence)
    for i, token in enumerate(sentence):
        value = float(token.rstrip("%").replace(",", "")) if _NUMBER.fullmatch(token) else math.inf
        if math.isfinite(value):
            values[i] = value / 100 if token[-1] == "%" else value
            moved = {"from": "prior", "to": "posterior"}.get(sentence[i - 1]) if moving and i else None
            roles[i] = moved if moved and 0 < values[i] < 1 else _role(sentence, i, values[i], roles)
    return values, roles


def _role(sentence: list[str], i: int, value: float, roles: Mapping[int, str]) -> str:
    """What the number at `i` is by the words before it, else right after it; `roles` are those of earlier numbers."""

    def cue(j: int) -> str:
        role = ROLES.get(sentence[j], "")
        return "" if role in ("prior", "posterior", "probability") and not 0 < value < 1 else role

    weak, named, compared = "", False, False
    for j in range(i - 1, max(i - 12, -1), -1):
        token = sentence[j]
        if roles.get(j) == "criterion" and i - j <= 4 and not {"to", "-", "and"}.isdisjoint(sentence[j + 1 : i]):
            return "criterion"  # a range: 60 to 100
        if token == "," or j in roles:
            break
        if cue(j) == "probability":
            weak = "probability"  # whose, an earlier word may say: pretest probability
        elif cue(j) and not (token == "normal" and j and sentence[j - 1] in COPULA):
            return cue(j)
        compared = compared or token in OPERATORS - {"="}
        named = named or (i - j <= 6 and len(token) > 1 and token[0].isalpha() and token not in EMPTY)
    for j in range(i + 1, min(i + 3, len(sentence))):
        if cue(j) and sentence[j] != "normal":
            return weak or cue(j)
        if sentence[j] in COPULA or not sentence[j][0].isalpha():
            break
    after = " ".join(sentence[i + 1 : i + 3])
    unit = after.split(" ")[0] in UNITS
    stated = (named or unit) and not compared and not re.search("year|month|week|day", after)
    return weak or ("measurement" if stated else "")


def _read(completion: str, options: Mapping[str, str] | None) -> _Thought:
    """Normalise, mark the options, unify synonyms, cut into sentences of tokens."""
    text = _normal(completion.partition("</think>")[0].rpartition("<think>")[2].partition("<answer>")[0])
    if options:
        picked = score_choice(completion, [f"{k}. {v}" for k, v in options.items()], "A", "robust").picked
        names, chosen = list(options.values()), options.get(picked or "", "")
    else:  # an open question: its candidates are those that the thought lists
        chosen = completion.partition("<answer>")[2].partition("</answer>")[0][:200]
        listed = re.split(r", (?:and |or )?| and | or | versus | vs ", m[1]) if (m := _OPEN_LIST.search(text)) else []
        names = [*(name for name in listed if len(name.split()) <= 6), chosen]
    keys = [" ".join(_WORD.findall(re.sub(r"^(?:the|an?) ", "", _normal(name)))) for name in names]
    order = sorted((i for i, key in enumerate(keys) if len(key) > 1), key=lambda i: -len(keys[i]))
    patterns = [f"(?P<o{i}>" + r"[\W_]{0,3}".join(map(re.escape, keys[i].split())) + "(?:s|es)?)" for i in order]
    patterns += [rf"(?P<l{i}>(?:option|choice) \(?{re.escape(k.lower())}\)?)" for i, k in enumerate(options or ())]
    option = re.compile(rf"(?<!\w)(?:{'|'.join(patterns)})(?!\w)" if patterns else r"(?!)")

    def index(match: re.Match[str]) -> int:
        return keys.index(keys[int((match.lastgroup or "")[1:])])

    mentions = [(index(match), match.start()) for match in option.finditer(text)]
    first = (mentions[0][0], len(_WORD.findall(text[: mentions[0][1]]))) if mentions else (-1, 0)
    marked = option.sub(lambda match: f" @{index(match)} ", text)
    unified = _SYNONYM.sub(lambda match: f" {tuple(_VOCABULARY)[(match.lastindex or 1) - 1]} ", marked)
    sentences = [tokens for part in _END.split(unified) if (tokens := _TOKEN.findall(part))]
    every = " ".join(keys).split()
    last = {keys[i].split()[-1]: i for i in {i for i, _ in mentions} if " " in keys[i]}
    tails = {word: i for word, i in last.items() if len(word) > 3 and every.count(word) == 1}
    answered = keys.index(keys[names.index(chosen)]) if chosen else None
    return _Thought(sentences, len(_WORD.findall(text)), first, answered, tails)


def _normal(text: str) -> str:
    """Lower case, one kind of dash, apostrophe, blank and negation, American spelling where it often differs."""
    text = unicodedata.normalize("NFKC", text).casefold().translate({0x2019: "'", 0x2013: "-", 0x2212: "-", 0x40: " "})
    for old, new in (("n't", " not"), ("cannot", "can not"), ("tumour", "tumor"), ("<=", LE), (">=", GE), ("==", "=")):
        text = text.replace(old, new)
    text = re.sub(r"[ao]e(?!s\b)", "e", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"\b(?:about|approximately|around|roughly|nearly) (?=\d)", "", text)
    return re.sub(r"(?<=\d) ?(?:%|per ?cent\b)", "%", text)
