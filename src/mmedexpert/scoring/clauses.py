"""Protocol "robust": the one option that a response commits to, or none; it never guesses.  # ours

A response is cut into clauses. A clause *claims* options where it holds nothing but options and words of an answer; it
*states* one where it says what an image shows; it may take back what was claimed before it. Everything else (reasons,
negations, hedges, questions) is passed over. All claims must agree; statements count only where there is no claim.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

DASH = "\ue000"  # stands for the dash behind an answer
# Words, keeping "e.g", "2.5" and "isn't" whole; signs that tell options apart; ends of a sentence.
_TOKEN = re.compile(rf"[^\W_]+(?:[.'\u2019][^\W_]+)*|[<>\u2264\u2265\xb1+%{DASH}]|[.!?;\n\u3002]")
BOX = re.compile(r"\\boxed\s*+\{((?:[^{}]|\{[^{}]*\})*+)\}")
# "c) text", "c: text" and "c.text", but not "(c) text" or "e.g": the label ends a sentence.
_LABEL = re.compile(r"(?<![\w(\[.])([a-z])(?:[):]|\.(?=[a-z]{3}|\d))")
_PREFIX = re.compile(r"\s*\(?([A-Za-z])[.):]\s*")
_COMMA_BEFORE_ANSWER = re.compile(
    r",(?=\s{0,3}(?:(?:so|thus|hence|therefore|then|and|but|the|my|final|correct|right|best|most|likely)\s{1,3}){0,6}answer\b)"
)
# "I would pick B - a safe choice": a dash behind a letter that is chosen in so many words.
_REMARK = re.compile(
    r"(\b(?:answer\W{0,4}(?:is|:)|pick|choose|select|go with)\W{0,6}[a-z]\b[^\w\s\u2013\u2014-]{0,4})"
    r"(?:\s+-{1,3}\s|\s*[\u2013\u2014])"
)
_SENTENCE = re.compile(r" ([.!?;\n\u3002]) ")
_CLAUSE = re.compile(r"(?= (?:answer|because|since|as|due|因为\w*|由于\w*) )")
_ARTICLE = re.compile(r" a (?= (?:option|choice|letter|correct|right|best|final|most|likely) )")

# A clause is a claim only if it holds nothing but options and these words; so negations and reasons never are.
_ANSWER_WORDS = """
    the final correct right best most likely answer option choice letter diagnosis is it it's so therefore thus hence
    i my think believe choose select pick would be should must and or boxed text textbf mathrm mathbf
"""
_FILLERS = frozenset([*_ANSWER_WORDS.split(), DASH])
# Among Chinese a letter is a word of its own, and so is what follows "the answer is".
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_HAN_EDGE = re.compile(
    rf"(?<=[{_HAN}])(?=[a-z0-9])|(?<=[a-z0-9])(?=[{_HAN}])|(?<=\u7b54\u6848\u662f)|(?<=\u7b54\u6848\u4e3a)"
)
_HAN_FILLER = re.compile("(?:因此|所以|故|综上|所述|最终|正确|答案|选项|选择|选|应该|应|该|我|认为|为|是|的|项)+")

# "Answer: D, not B": one option chosen in so many words, and what it is not.
_CHOOSES = frozenset("answer option choice choose select pick diagnosis".split())
_INSTEAD = (("not",), ("rather", "than"), ("instead", "of"))
_LISTED = frozenset("or nor and option options".split())
# "I do not think the answer is B", "the wrong answer is B": words before "answer" that make it no claim.
_CONNECTORS = frozenset("so therefore thus hence then and but".split())
_DENIALS = frozenset(
    """not never cannot hardly doubt doubtful unsure uncertain unclear unlikely least worst wrong incorrect false
    impossible neither nor whether if unless possible plausible alternative another initial previous original""".split()
)
# Sentences without an option that take back what stands before them.
_REJECTS = frozenset(
    "no nope not wrong incorrect false unlikely impossible excluded rejected eliminated ruled out".split()
)
_REJECTING = _REJECTS | frozenset("this that was are has been actually".split())
_CORRECTS = re.compile(
    r" (?:(?:to|must|should|me|will) correct (?:this|that|it|my|myself|the)|correction|(?:second|further) thoughts?"
    r"|i (?:was|am) (?:wrong|mistaken)|(?:made|is|was) (?:a|an) (?:mistake|error)|scratch that"
    r"|(?:change|revise|reconsider|retract) (?:my|this|that|the|it)|let me re(?:check|consider|think)) |^ wait "
)
# "Based on the image, ...", "The chest radiograph is consistent with <option's text>"
_SHOWN = (
    r"(?: (?:the|this|these|both))(?: (?:provided|given|presented|medical|clinical|imaging|radiologic(?:al)?|plain"
    r"|chest|abdominal|brain|head|axial|coronal|sagittal|frontal|lateral|histologic(?:al)?|ct|mri?|x ray)){0,3}"
    r" (?:images?|pictures?|photo(?:graph)?s?|figures?|scans?|x rays?|radiographs?|films?|cts?|mri?|ultrasound|slides?"
    r"|sections?|biopsy|findings?|appearances?|features)(?: (?:provided|shown|given|above))?"
)
_BASED_ON = re.compile(rf"^ (?:based on|according to|given|looking at|from|in|on){_SHOWN}(?= )")
_STATES = re.compile(
    rf"^(?:{_SHOWN}| (?:the|this) (?:patient|child|man|woman|boy|girl|infant)| he| she| it)"
    r"(?: (?:most|likely|probably)){0,2}"
    r" (?:has|have|shows?|demonstrates?|reveals?|depicts?|displays?|indicates?|suggests?|represents?"
    r"|(?:is|are)(?: most)? (?:consistent|compatible) with|(?:is|are)(?: most)? (?:suggestive|indicative|typical) of)"
    r"(?: (?:a|an|the))?(?= [A-Z]+ )"
)
# With any of these words in the response, a statement is none.
_HEDGES = _DENIALS | _REJECTS | frozenset(
    """without unable exclude excludes rule rules however but although though or vs versus possibly may might could
    maybe perhaps either alternatively instead except ?""".split()
)  # fmt: skip


def pick(response: str, choices: Sequence[str]) -> str | None:
    """The letter of the one option that all answer spans of the response commit to, or None.

    `choices`: options in order, with or without their letter. Rules of our own, see the module's first lines.
    """
    spans = answer_spans(unicodedata.normalize("NFKC", response).casefold())
    picks = {_pick(span, choices) for span in spans}
    return picks.pop() if len(picks) == 1 else None


def answer_spans(text: str) -> list[str]:
    """The parts of a lower-cased response that may hold its answer: its closed answer tags outside any thought, else
    all of the text outside; none where tags are empty or one is left open. Two that disagree are no answer.
    """
    before, _, last = text.rpartition("</think>")
    # what stands before an opening tag is outside, too; without one it is a thought whose opening is missing
    outside = [part.partition("<think>")[0] for part in before.split("</think>") if "<think>" in part]
    visible = last.partition("<think>")[0]
    pieces = [piece for part in [*outside, visible] for piece in _tags(part)]
    if any(closed for _, closed in pieces) or "<answer>" in visible:
        whole = all(closed or not content.strip() for content, closed in pieces)
        return [content for content, closed in pieces if content.strip()] if whole else []
    return [visible.replace("</answer>", "\n")]


def _tags(text: str) -> list[tuple[str, bool]]:
    """What each answer tag holds, and whether it is closed."""
    found = []
    *closed, rest = text.split("</answer>")
    for part in closed:
        found += [(content, True) for content in part.split("<answer>")[1:]]
    return found + [(content, False) for content in rest.split("<answer>")[1:]]


def _pick(span: str, choices: Sequence[str]) -> str | None:
    marked = _REMARK.sub(rf"\1 {DASH} ", _COMMA_BEFORE_ANSWER.sub(";", span))
    text, named = _with_letters(_tokens(BOX.sub(r"\n\1\n", marked)), choices)
    claims: list[set[str]] = []
    statements: list[set[str]] = []
    doubts: list[set[str]] = []
    sentences = _SENTENCE.split(text)
    for sentence, end in zip(sentences[::2], [*sentences[1::2], ""], strict=True):
        before: list[str] = []  # the words that run on into the clause
        for clause in _CLAUSE.split(sentence):
            without_articles, articles = _ARTICLE.subn(" ", clause)
            words = without_articles.split()
            claimed, stated = ([], []) if end == "?" or _denied(before, words) else _read(words, named)
            claims, statements, before = claims + claimed, statements + stated, [] if claimed else words
            # "a final answer" may name option A: it is no claim of its own, and no room for another claim.
            doubts += [{"A"}] * (articles if claimed or all(map(_is_filler, words)) else 0)
            if not claimed and _takes_back(words, named):
                claims, statements = [], []
    if not claims and statements:
        words = text.split()
        if any(word in _HEDGES or word.endswith(("n't", "n\u2019t")) for word in words):
            return None
        claims = statements + [named[word] for word in words if word in named and word != "a"]
    picked = set.intersection(*claims, *doubts) if claims else set()
    return picked.pop() if len(picked) == 1 else None


def _with_letters(text: str, choices: Sequence[str]) -> tuple[str, dict[str, set[str]]]:
    """The text with option texts as their letters in upper case (all of them, where options share a text; the rest is
    lower case), and the options that a word names."""
    letters = ascii_uppercase[: len(choices)]
    named = {letter.lower(): {letter} for letter in letters}
    by_text: dict[str, str] = {}
    for letter, choice in zip(letters, choices, strict=True):
        prefix = _PREFIX.match(choice)
        bare = choice[prefix.end() :] if prefix and prefix[1].upper() == letter else choice
        tokens = _tokens(unicodedata.normalize("NFKC", bare).casefold())
        # An option whose text is itself an option's letter (a blood group) is read by its letter only.
        if tokens and tokens.strip() not in named:
            by_text[tokens] = by_text.get(tokens, "") + letter
    for tokens in sorted(by_text, key=len, reverse=True):
        text = text.replace(tokens, f" {by_text[tokens]} ")
        named[by_text[tokens]] = set(by_text[tokens])
    return text, named


def _read(words: Sequence[str], named: Mapping[str, set[str]]) -> tuple[list[set[str]], list[set[str]]]:
    """What a clause claims, and what it states."""
    if claimed := _claimed(words, named):
        return claimed, []
    plain = _BASED_ON.sub("", f" {' '.join(words)} ")
    if lead := _STATES.match(plain):
        return [], _claimed(plain[lead.end() :].split(), named)
    return _claimed(plain.split(), named), []


def _claimed(words: Sequence[str], named: Mapping[str, set[str]]) -> list[set[str]]:
    """The options of a clause of nothing but options and words of an answer, or of one that adds what it is not."""
    told = [word for word in words if word in named or not _is_filler(word)]
    if all(word in named for word in told):
        return [named[word] for word in told]
    for mark in (*_INSTEAD, (DASH,)):
        place = next((i for i in range(len(words)) if tuple(words[i : i + len(mark)]) == mark), None)
        if place is None:
            continue
        head, rest = list(words[:place]), words[place + len(mark) :]
        while head and head[-1] in ("and", "but"):
            head.pop()
        chosen = [word for word in head if word in named or not _is_filler(word)]
        if not _CHOOSES & set(head) or chosen != head[-1:] or chosen[0] not in named:
            return []
        if mark == (DASH,):  # "a" before a word is an article
            others = [word for word in [*rest[-1:], *(word for word in rest if word != "a")] if word in named]
            sound = not others and not any(word in _HEDGES for word in rest)
        else:
            others = [word for word in rest if word in named]
            sound = bool(others) and all(word in named or word in _LISTED for word in rest)
            sound = sound and not any(named[word] & named[chosen[0]] for word in others)
        return [named[chosen[0]]] if sound else []
    return []


def _is_filler(word: str) -> bool:
    return word in _FILLERS or _HAN_FILLER.fullmatch(word) is not None


def _denied(before: Sequence[str], words: Sequence[str]) -> bool:
    """Whether "answer ..." stands behind words that make it no claim, with no connector between."""
    if words[:1] != ["answer"]:
        return False
    start = max((place for place, word in enumerate(before) if word in _CONNECTORS), default=-1)
    return any(word in _DENIALS or word.endswith(("n't", "n\u2019t")) for word in before[start + 1 :])


def _takes_back(words: Sequence[str], named: Mapping[str, set[str]]) -> bool:
    """Whether a clause that names no option says that what came before it was wrong."""
    if {word for word in words if word in named} - {"a"}:
        return False
    rejects = _REJECTS & set(words) and all(word in _REJECTING or _is_filler(word) for word in words)
    return bool(rejects) or _CORRECTS.search(f" {' '.join(words)} ") is not None


def _tokens(text: str) -> str:
    """Tokens of a lower-cased text, each between two spaces of its own: replacing a phrase keeps to word boundaries."""
    return "".join(f" {token} " for token in _TOKEN.findall(_HAN_EDGE.sub(" ", _LABEL.sub(r"\1;", text))))
