"""Text metrics of an open answer against its gold answer: exact match, token F1, BLEU and ROUGE."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from typing import Any

# One Chinese character, a number, a word, or a sign that tells answers apart (HER2+ and HER2, < and >).
_CHINESE = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(
    rf"[{_CHINESE}]|(?:(?<![\w)])-)?(?:\d+(?:,\d{{3}})*(?:\.\d+)?|\.\d+)"
    rf"|[^\W\d_{_CHINESE}]+(?:['\u2019][^\W\d_{_CHINESE}]+)*|[<>\u2264\u2265\xb1+%]"
)
_NUMBER_WORDS = {  # peers: the VQA evaluation
    word: str(value) for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
_LONGEST = 1000  # ours: tokens that BLEU and ROUGE read; ROUGE-L takes quadratic time
_ORDERS = (1, 2, 3, 4)


class _Words:
    tokenize = staticmethod(str.split)


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # it imports NLTK, a second that only open answers need

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_Words())


def open_scores(response: str, gold: str, language: str) -> dict[str, float]:
    """How near an answer is to the gold answer, by name, each in [0, 1]; all are 0 where either text has no token.

    exact_match, precision, recall and f1 over normalised tokens as in SQuAD; bleu1 to bleu4 by NLTK, without smoothing,
    and of no higher order than the shorter text has tokens, so that an exact match scores 1 # ours; rouge1, rouge2 and
    rougeL F-measures by Google's rouge-score. Chinese by characters. `language` is "en" or "zh".
    """
    given, wanted = tokens(response, language), tokens(gold, language)
    shared = sum((Counter(given) & Counter(wanted)).values())
    precision, recall = shared / max(len(given), 1), shared / max(len(wanted), 1)
    scores = {
        "exact_match": float(bool(given) and given == wanted),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if shared else 0.0,
    }
    given, wanted = given[:_LONGEST], wanted[:_LONGEST]
    highest = max(min(len(given), len(wanted)), 1)
    scores |= bleu(given, wanted, [min(order, highest) for order in _ORDERS])
    rouge = _rouge().score(" ".join(wanted), " ".join(given))
    return scores | {name: float(rouge[name].fmeasure) for name in ("rouge1", "rouge2", "rougeL")}


def bleu(response: Sequence[str], gold: Sequence[str], orders: Sequence[int] = _ORDERS) -> dict[str, float]:
    """Unsmoothed sentence BLEU of tokens in [0, 1], as bleu1 to bleu4; the n-th uses n-grams up to the n-th of orders.

    Papineni et al. 2002, by NLTK.
    """
    from nltk.translate.bleu_score import sentence_bleu

    weights = [(1 / order,) * order for order in orders]
    values = sentence_bleu([gold], response, weights, smoothing_function=_unsmoothed)
    return {f"bleu{n}": float(value) for n, value in enumerate(values, start=1)}


def _unsmoothed(precisions: list[Fraction], **_: Any) -> list[Fraction | float]:
    # What NLTK does without smoothing, but for a warning at every answer.
    return [precision if precision.numerator else sys.float_info.min for precision in precisions]


def tokens(text: str, language: str) -> list[str]:
    """Normalised tokens: no case, width, punctuation or articles; numbers as digits; Chinese by characters.

    After SQuAD's normalisation. Ours: hyphens part words; `+ % < >` and minus signs stay; "a" goes only at the start
    and before another token (hepatitis A), "an" and "the" everywhere. `language` is "en" or "zh". # ours
    """
    found = [_plain(token) for token in _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())]
    if language == "zh":
        return found
    found = [_NUMBER_WORDS.get(token, token) for token in found if token not in ("an", "the")]
    return found[1:] if len(found) > 1 and found[0] == "a" else found


def _plain(token: str) -> str:
    if not token[-1].isdigit():
        return re.sub("['\u2019]", "", token)
    sign, digits = ("-", token[1:]) if token[0] == "-" else ("", token)
    whole, _, decimals = digits.replace(",", "").partition(".")
    decimals = decimals.rstrip("0")
    return sign + (whole.lstrip("0") or "0") + (f".{decimals}" if decimals else "")
