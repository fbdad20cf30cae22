"""Faults that make a text worthless as reasoning, whatever it says: placeholders, refusal, repetition, contradiction.

A text with a fault scores 0 on every perspective. Each rule is for a kind of text that a policy may try.  # ours
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mmedexpert.guidelines.numbers import Number
from mmedexpert.guidelines.reading import Sentence, Thought

FEWEST_FINDINGS, FEWEST_CLINICAL = 3, 4
DISTINCT_SENTENCES, DISTINCT_FOURS = 0.6, 0.55  # shares, below which a text repeats itself
_BRACKETS = re.compile(
    r"\[[^\W\d][^\]\n]{0,40}\]|_{2,}|\{[a-z ]+\}"
    r"|<(?:symptom|treatment|condition|option|finding|diagnosis|value|disease|feature|result|number|name|test|organ|sign"
    r"|age|drug)s?>"
)
# Each alternative begins with a letter that the search can skip to: \b before it would be tried at every character.
_DUMMY = re.compile(
    "|".join(
        [
            *(rf"{word} (?:[0-9]|[xyzabc]\b(?! ))" for word in "diagnosis finding condition disease feature".split()),
            *(rf"{letter}(?<!\w.) (?:is|percent|and (?:y|z))\b" for letter in "xyz"),
            r"x(?<!\w.)xx+\b", r"x(?<!\w.) ?%", r"n(?<!\w.)/a\b", r"t(?<!\w.)bd\b", r"\.\.\.\.",
        ]
    )
)  # fmt: skip
_REFUSAL = re.compile(
    r"\bas an? (?:ai|language)\b|\bconsult (?:a|your|with)\b|\bseek (?:medical|professional)"
    r"|\b(?:can not|not able to|unable to|will not|must decline to|do not feel able to) "
    r"(?:(?:provid|giv|offer|mak)\w* (?:an?|any|the|you|medical|further)?[ ]?(?:\w+ )?"
    r"(?:diagnos|advice|answer|opinion|interp|judg)"
    r"|(?:view|see|open|access|interpret|assess) (?:the |this |any |medical |an? )?(?:\w+ )?"
    r"(?:image|picture|scan|photo|radiograph)"
    r"|commit to any|diagnose (?:this|you|patients|anyone)|help with)"
    r"|\bnot (?:enough|sufficient) information\b|\bsorry\b[^.]{0,60}\b(?:can not|unable)\b"
)
# One of these stands in every refusal: most texts need no search.
_REFUSING = (
    "n ai",
    "a ai",
    "language",
    "consult",
    "seek ",
    "can not",
    "able to",
    "will not",
    "decline",
    "sorry",
    "info",
)
_OTHER_SCRIPT, _FALSE_SHARE = re.compile(r"[^\W\d_\u0000-\u03ff]"), 0.2  # letters but Latin and Greek
_CONCESSIONS = frozenset("but yet although though".split())
_DENIALS = frozenset("not never without hard cannot".split())


def faults(thought: Thought) -> tuple[str, ...]:
    """The names of the faults of a thought, none where it is sound."""
    return tuple(name for name, found in FAULTS.items() if found(thought))


def _few_findings(thought: Thought) -> bool:
    """Fewer than three things are stated: words that are no talk about reasoning, or measurements."""
    return len(thought.findings) + thought.measured < FEWEST_FINDINGS


def _off_the_subject(thought: Thought) -> bool:
    """No option is named, and hardly anything concrete of medicine is said."""
    stated = len(thought.clinical) + thought.measured
    return stated < FEWEST_CLINICAL and not any(sentence.options for sentence in thought.sentences)


def _placeholder(thought: Thought) -> bool:
    """ "[finding]", "____", "Diagnosis 1", "X%"."""
    raw = thought.raw.casefold()
    return (not {"[", "_", "{", "<"}.isdisjoint(raw) and _BRACKETS.search(raw) is not None) or bool(_DUMMY.search(raw))


def _refusal(thought: Thought) -> bool:
    """ "As an AI I cannot interpret images." """
    return any(word in thought.text for word in _REFUSING) and _REFUSAL.search(thought.text) is not None


def _repeats(thought: Thought) -> bool:
    """The same sentence again and again, be it with other options and numbers, or the same four words."""
    masked = [sentence.masked for sentence in thought.sentences]
    words = thought.words
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return _distinct(masked) < DISTINCT_SENTENCES or _distinct(fours) < DISTINCT_FOURS


def _distinct(items: Sequence[object]) -> float:
    return len(set(items)) / len(items) if items else 1.0


def _template(thought: Thought) -> bool:
    """Half of the sentences have one build, with other options, findings and numbers: a form that is filled in."""
    builds = Counter(sentence.build for sentence in thought.sentences if sentence.words >= 4)
    return bool(builds) and builds.most_common(1)[0][1] >= max(3, builds.total() / 2)


def _language(thought: Thought) -> bool:
    """Another script, or many function words of other languages: the cues are English."""
    foreign = 0 if thought.text.isascii() else len(_OTHER_SCRIPT.findall(thought.text))
    return foreign > _FALSE_SHARE * len(thought.text) or thought.cue("foreign") >= max(4, 0.06 * len(thought.words))


def _false_comparison(thought: Thought) -> bool:
    """As many comparisons are false as true ("0.42, above the limit of 0.50")."""
    compared = [truth for sentence in thought.sentences for _, _, truth in sentence.compared]
    return compared.count(False) > max(0, compared.count(True) - 1)


def _copied(thought: Thought) -> bool:
    """The options are listed, and not one word connects a finding with any of them."""
    connected = thought.cue("cause", "arrow", "against", "exclude", "update", "instant", "picture")
    return not thought.open and not connected and any(len(sentence.options) >= 3 for sentence in thought.sentences)


def _answer_excluded(thought: Thought) -> bool:
    """The answer was put aside for good before it is given."""
    current: int | None = None
    for sentence in thought.sentences:
        if sentence.options:
            current = next(iter(sentence.options)) if len(sentence.options) == 1 else None
        if thought.answered is None or current != thought.answered:
            continue
        if sentence.options and _denied(sentence, sentence.options[current]):
            return True
        if "ruled" in sentence.cues and (sentence.options or len(sentence.tokens) <= 5):
            at = sentence.first["ruled"]
            if _DENIALS.isdisjoint(sentence.tokens[max(0, at - 3) : at]):
                return True
    return False


def _denied(sentence: Sentence, place: int) -> bool:
    """ "Measles: no." """
    tokens = sentence.tokens
    said = any(
        tokens[at : at + 2] in ([":", "no"], ["-", "no"], [":", "not"]) and at - place <= 6 for at in range(len(tokens))
    )
    return said and _CONCESSIONS.isdisjoint(tokens)


def _flipped(thought: Thought) -> bool:
    """One option is argued for to the end, and another one is given."""
    answered, sentences = thought.answered, thought.sentences
    if answered is None or not sentences:
        return False
    named: dict[int, list[int]] = {}
    for place, sentence in enumerate(sentences):
        for option in sentence.options:
            named.setdefault(option, []).append(place)
    own, last = named.get(answered, []), sentences[-1]
    bare = list(last.options) == [answered] and len(last.findings) <= 2  # the answer and no more
    for option, places in named.items():
        about = [sentences[place] for place in places]
        if option == answered or len(places) < 2 or thought.naming.share(option) <= 0.5 or _argued_down(about):
            continue
        late = places[-1] >= len(sentences) - 4
        if late and len(named) <= 2 and (not own or (own == [len(sentences) - 1] and bare)):
            return True
        just_before = any(list(one.options) == [option] for one in sentences[-3:-1])
        if bare and just_before and len(own) > 1 and all(_rejected(sentences[place], option) for place in own[:-1]):
            return True
    return False


def _another_named(thought: Thought) -> bool:
    """Another option is the one that stays or is recognised, and the answer is not named after it."""
    answered = thought.answered
    if answered is None:
        return False
    last_own = max((place for place, one in enumerate(thought.sentences) if answered in one.options), default=-1)
    for place, sentence in enumerate(thought.sentences):
        if len(sentence.options) != 1 or answered in sentence.options or {"exclude", "ruled"} & sentence.marks:
            continue
        stays = "stays" in sentence.cues and place >= len(thought.sentences) - 3
        if place > last_own and (stays or ("instant" in sentence.cues and last_own < 0)):
            return True
    return False


def _argued_down(about: Sequence[Sentence]) -> bool:
    """Whether an option is put aside in one of the sentences about it, or argued against in most."""
    against = sum("against" in one.marks for one in about)
    return against * 2 > len(about) or any({"exclude", "ruled"} & one.marks for one in about)


def _rejected(sentence: Sentence, option: int) -> bool:
    """A sentence that names the answer to argue it down, or in favour of another option."""
    argued = "against" in sentence.marks and ("would" in sentence.tokens or option in sentence.options)
    return "exclude" in sentence.marks or argued


def _wrong_way(thought: Thought) -> bool:
    """Chances move against what is said of them: a finding that supports a disease makes it less likely, twice."""
    last: dict[int | None, float] = {}
    right = wrong = 0
    for sentence in thought.sentences:
        if len(sentence.options) > 1 or not sentence.chances:
            continue
        option = next(iter(sentence.options), None)
        before, after = last.get(option, last.get(None)), sentence.chances[-1]
        if len(sentence.chances) > 1 and "from" in sentence.tokens:
            before = sentence.chances[0]
            stated = [number for number in sentence.numbers if number.chance]
            if stated[-1].place and sentence.tokens[stated[-1].place - 1] == "from":  # "now 13%, up from 60%"
                before, after = after, before
        up, down = "up" in sentence.cues, "down" in sentence.cues
        if before is not None and up != down and after != before:
            right, wrong = right + ((after > before) == up), wrong + ((after > before) != up)
        last[option] = last[None] = sentence.chances[-1]
    return wrong >= 2 and wrong > right


def _still(thought: Thought) -> bool:
    """One prior and one posterior that are the same number, or that move against the likelihood ratios between them."""
    held = [sentence for sentence in thought.sentences if sentence.chances]
    stated = [chance for sentence in held for chance in sentence.chances]
    if len(stated) != 2 or "prior" not in held[0].cues or "posterior" not in held[-1].cues:
        return False
    ratios = [number.value for sentence in thought.sentences for number in sentence.numbers if _ratio(sentence, number)]
    strength, (first, last) = math.prod(ratios), stated
    return first == last or (bool(ratios) and strength != 1 and (last > first) != (strength > 1))


def _ratio(sentence: Sentence, number: Number) -> bool:
    before = sentence.tokens[max(0, number.place - 3) : number.place]
    return number.strength and not number.percent and not {"sensitivity", "specificity"} & set(before)


def _falls(thought: Thought) -> bool:
    """The answer ends less likely than it began, and below one half."""
    first: dict[int | None, float] = {}
    last: dict[int | None, float] = {}
    for sentence in thought.sentences:
        if len(sentence.options) <= 1 and sentence.chances:
            option = next(iter(sentence.options), None)
            first.setdefault(option, sentence.chances[0])
            last[option] = last[None] = sentence.chances[-1]
    own = thought.answered
    return own is not None and own in last and last[own] < min(0.5, first[own]) and last[None] == last[own]


FAULTS: Mapping[str, Callable[[Thought], bool]] = {
    "few findings": _few_findings,
    "off the subject": _off_the_subject,
    "placeholder": _placeholder,
    "refusal": _refusal,
    "repetition": _repeats,
    "one build": _template,
    "language": _language,
    "false comparison": _false_comparison,
    "options copied": _copied,
    "answer excluded": _answer_excluded,
    "another option argued for": lambda thought: _flipped(thought) or _another_named(thought),
    "chances against the words": _wrong_way,
    "answer grows unlikely": _falls,
    "chances that do not follow": _still,
}
