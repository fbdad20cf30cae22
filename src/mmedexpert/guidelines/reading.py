"""A completion read for the rubrics: its options, cues and numbers as tokens, sentence by sentence. # ours

Every cue and window here is ours. Scans look at a fixed number of neighbours, so that time is linear in the text.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from mmedexpert.scoring import score_choice

LE, GE = "\u2264", "\u2265"
OPERATORS = frozenset(["<", ">", "=", "~", LE, GE])  # ~ is "between" or "within"

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


class Thought(NamedTuple):
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


def read(completion: str, options: Mapping[str, str] | None) -> Thought:
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
    return Thought(sentences, len(_WORD.findall(text)), first, answered, tails)


def _normal(text: str) -> str:
    """Lower case, one kind of dash, apostrophe, blank and negation, American spelling where it often differs."""
    text = unicodedata.normalize("NFKC", text).casefold().translate({0x2019: "'", 0x2013: "-", 0x2212: "-", 0x40: " "})
    for old, new in (("n't", " not"), ("cannot", "can not"), ("tumour", "tumor"), ("<=", LE), (">=", GE), ("==", "=")):
        text = text.replace(old, new)
    text = re.sub(r"[ao]e(?!s\b)", "e", re.sub(r"[^\S\n]+", " ", text))
    text = re.sub(r"\b(?:about|approximately|around|roughly|nearly) (?=\d)", "", text)
    return re.sub(r"(?<=\d) ?(?:%|per ?cent\b)", "%", text)


def numbers(sentence: list[str]) -> tuple[dict[int, float], dict[int, str]]:
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
