"""Reading the chosen option out of a model's response; shared by evaluation and by the reward.

Two protocols. "medevalkit" gives MedEvalKit's verdicts, quirks included, so that scores compare with published ones.
"robust" (`clauses`) reads every usual way to write an answer, and says *unparsed* where a response does not
commit to one option.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from string import ascii_uppercase
from typing import Literal

from mmedexpert.scoring import clauses

Protocol = Literal["medevalkit", "robust"]


@dataclass(frozen=True)
class Verdict:
    """`picked` is the option letter read from the response, None when there is none; `parsed` says whether one was."""

    correct: bool
    picked: str | None
    parsed: bool


def score_choice(response: str, choices: Sequence[str], gold: str, protocol: Protocol) -> Verdict:
    """Score one multiple-choice response.

    Args:
        response: the model's text.
        choices: options in order, each like `A. Pneumonia` (a text without its letter will do).
        gold: the right option's letter.
        protocol: "medevalkit" (MedEvalKit 9b12e3b: `extract`, then `judge_multi_choice`; never unparsed, and an empty
            response picks A) or "robust" (ours).

    Raises:
        ValueError: gold is not the letter of a choice, or the protocol is unknown.
    """
    letters = ascii_uppercase[: len(choices)]
    gold = gold.upper()
    if len(gold) != 1 or gold not in letters:
        raise ValueError(f"gold must be one of {', '.join(letters)}, got {gold!r}")
    if protocol == "medevalkit":
        picked: str | None = _pick_medevalkit(response, choices)
    elif protocol == "robust":
        picked = clauses.pick(response, choices)
    else:
        raise ValueError(f"protocol must be medevalkit or robust, got {protocol!r}")
    return Verdict(correct=picked == gold, picked=picked, parsed=picked is not None)


_TAG = re.compile(r"(</?(?:think|answer)>)")


def has_format(response: str) -> bool:
    """Whether the response is one `<think>...</think>`, one `<answer>...</answer>`, and otherwise only whitespace."""
    pieces = _TAG.split(response)
    tags, outside = pieces[1::2], pieces[0::4]
    return tags == ["<think>", "</think>", "<answer>", "</answer>"] and not "".join(outside).strip()


# --- medevalkit -------------------------------------------------------------------------------------------------------

# In this order: each one that is present keeps only what follows its last occurrence.
MEDEVALKIT_CUES = (
    "**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "\u7b54\u6848:", "final answer",
    "final answer is",
)  # fmt: skip


def _pick_medevalkit(response: str, choices: Sequence[str]) -> str:
    letters = ascii_uppercase[: len(choices)].lower()
    text = answer_tags(response).lower()
    paragraphs = text.split("\n\n")
    for candidate in (paragraphs[0], paragraphs[-1].split(".")[0]):
        if len(candidate) == 1 and candidate in letters:
            return candidate.upper()

    text = boxed_content(text) if "boxed" in text else answer_tags(text)
    for cue in MEDEVALKIT_CUES:
        text = text.rpartition(cue)[2]
    text = text.strip().lower().replace("\n", "")

    short = text.partition(".")[0].rpartition(":")[2]
    if len(short) == 1 and short in letters:
        return short.upper()
    options = [choice.lower() for choice in choices]
    if short in options:
        return letters[options.index(short)].upper()
    return letters[_most_similar(options, text)].upper()


def answer_tags(text: str) -> str:
    """Contents of all closed answer tags joined by a space, or the whole text where they hold nothing."""
    contents, end = [], 0
    # Not a regex: a lazy one is quadratic in unclosed tags.
    while (start := text.find("<answer>", end)) >= 0 and (close := text.find("</answer>", start)) >= 0:
        contents.append(text[start + len("<answer>") : close])
        end = close + len("</answer>")
    return " ".join(contents).strip() or text


def boxed_content(text: str) -> str:
    r"""What the last `\boxed{` holds up to its matching brace, or the string "None" (mathruler 0.1.0)."""
    start = text.rfind("\\boxed{")
    depth = 0
    for brace in re.finditer(r"[{}]", text[start:]) if start >= 0 else ():
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start + len("\\boxed{") : start + brace.start()]
    return "None"


def _most_similar(options: Sequence[str], text: str) -> int:
    """Index of the first option with the highest difflib ratio to the text; 0 where all ratios are 0."""
    matcher = SequenceMatcher(None, "", text)
    best, best_ratio = 0, 0.0
    for index, option in enumerate(options):
        matcher.set_seq1(option)
        # The two quick ratios are upper bounds, so skipping on them changes no verdict.
        if matcher.real_quick_ratio() > best_ratio and matcher.quick_ratio() > best_ratio:
            ratio = matcher.ratio()
            if ratio > best_ratio:
                best, best_ratio = index, ratio
    return best
