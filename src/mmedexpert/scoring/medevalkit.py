"""Asking and judging as MedEvalKit does (commit 9b12e3b, without its LLM judge), quirks included.

Multiple choice is judged by `scoring.score_choice`; here are the prompts, and the yes/no, closed and open questions.
"""

from __future__ import annotations

from rouge import Rouge

from mmedexpert.data.record import Record
from mmedexpert.scoring import score_choice
from mmedexpert.scoring.choice import MEDEVALKIT_CUES, answer_tags, boxed_content
from mmedexpert.scoring.judged import Judged
from mmedexpert.scoring.text import bleu

# The Chinese wording (only SLAKE needs it) is as in public copies of MedEvalKit's question_formats.py.
_HEADINGS = {"en": ("Question: ", "Options: "), "zh": ("\u95ee\u9898\uff1a ", "\u9009\u9879\uff1a ")}
_INSTRUCTIONS = {
    ("choice", "en"): "Answer with the option's letter from the given choices directly.",
    ("yes_no", "en"): "Please output 'yes' or 'no'(no extra output).",
    ("closed", "en"): "Answer the question using a single word or phrase.",
    ("open", "en"): "Please answer the question concisely.",
    ("choice", "zh"): "请直接使用给定选项中的选项字母来回答该问题。",
    ("yes_no", "zh"): "请输出'是'或'否'(不要有任何其它输出)。",
    ("closed", "zh"): "请用一个单词或者短语回答该问题。",
    ("open", "zh"): "请简要回答该问题。",
}
_ROUGE = Rouge()
# The rouge package recurses once per word of a sentence and would crash on more; and its time is quadratic.
_LONGEST_SENTENCE = 400  # ours
_LONGEST_TEXT = 20_000  # ours: characters


def ask(record: Record, *, own_letters: bool = False, yes_no_as: str = "yes_no") -> str:
    """The user prompt's text, without images: MedEvalKit's question_formats with REASONING=False.

    `own_letters`: the options carry their own `A:` (PMC-VQA). `yes_no_as`: the wording of yes/no questions, "yes_no" or
    "closed" (SLAKE).
    """
    kind = yes_no_as if record.asked_as == "yes_no" else record.asked_as
    instruction = _INSTRUCTIONS[kind, record.language]
    if kind != "choice":
        return f"{record.question}\n{instruction}"
    question, options = _HEADINGS[record.language]
    return "\n".join((f"\n{question}{record.question}", options, *choice_texts(record, own_letters), instruction))


def choice_texts(record: Record, own_letters: bool = False) -> list[str]:
    """The options as shown and judged: `A. text`, or as they are where they carry their own `A:`."""
    options = record.options or {}
    return list(options.values()) if own_letters else [f"{letter}. {text}" for letter, text in options.items()]


def judge(
    record: Record, response: str, *, own_letters: bool = False, search_tags: bool = True, strip: bool = True
) -> Judged:
    """MedEvalKit's verdict; `scores` only for open questions, whose verdict is the exact match.

    `picked`: the letter, yes or no (None where neither or both occur), or the text that is compared (None if empty).
    What its files for single data sets do otherwise: `own_letters`, the options carry their own `A:`, and
    `search_tags=False`, `<answer>` is not looked for first (PMC-VQA); `strip=False`, blanks around an answer count
    (SLAKE).
    """
    if record.asked_as == "choice":
        if not search_tags:
            # The search for tags is case-sensitive and comes before lower-casing: so it finds none, and all else stays.
            response = response.replace("<answer>", "<ANSWER>")
        verdict = score_choice(response, choice_texts(record, own_letters), record.answer, "medevalkit")
        return Judged(verdict.correct, verdict.picked, verdict.parsed)

    text, gold = boxed_content(response).strip(), record.answer.lower()
    if text == "None":
        text = answer_tags(response) or response
    if strip:
        text, gold = text.strip(), gold.strip()
    text = _parse(text)
    if record.asked_as == "open":
        return Judged(text == gold, text or None, bool(text), _open_scores(text, gold))

    text = text.replace("\n", "").replace(".", "")
    # SLAKE's Yes and No, in capitals, are compared as any other text.
    if record.asked_as == "closed" and record.answer not in ("yes", "no"):
        return Judged(text == gold, text or None, bool(text))
    found = [word for word in ("yes", "no") if word in text]
    picked = found[0] if len(found) == 1 else None
    return Judged(picked is not None and gold in text, picked, picked is not None)


def _parse(text: str) -> str:
    text = text.lower()
    text = boxed_content(text).strip() if "boxed" in text else answer_tags(text) or text
    for cue in MEDEVALKIT_CUES:
        text = text.rpartition(cue)[2]
    return text


def _open_scores(text: str, gold: str) -> dict[str, float]:
    """The names are `text.open_scores`'; the numbers are MedEvalKit's, by the packages it uses (NLTK and rouge).

    It unpacks its token F1 in the wrong order, so "precision" is the F1, "recall" the precision and "f1" the recall.
    Where it would crash (no token; very long sentences), ours is 0, or reads the beginning. # ours
    """
    given, wanted = set(text.split()), set(gold.split())
    precision = len(given & wanted) / max(len(given), 1)
    recall = len(given & wanted) / max(len(wanted), 1)
    f1 = 2 * precision * recall / (precision + recall) if given & wanted else 0.0
    scores = {"exact_match": float(text == gold), "precision": f1, "recall": precision, "f1": recall}
    scores |= bleu(_bleu_tokens(text), _bleu_tokens(gold))
    rouge = {name: {"f": 0.0} for name in ("rouge-1", "rouge-2", "rouge-l")}
    if text.strip(".") and gold.strip("."):
        rouge = _ROUGE.get_scores(_shortened(text), _shortened(gold))[0]
    return scores | {"rouge1": rouge["rouge-1"]["f"], "rouge2": rouge["rouge-2"]["f"], "rougeL": rouge["rouge-l"]["f"]}


def _bleu_tokens(text: str) -> list[str]:
    return text.replace(".", " .").split(" ")


def _shortened(text: str) -> str:
    sentences = text[:_LONGEST_TEXT].split(".")
    return ".".join(" ".join(sentence.split(" ")[:_LONGEST_SENTENCE]) for sentence in sentences)
