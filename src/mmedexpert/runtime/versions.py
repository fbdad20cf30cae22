"""Versions of the rules and losses that make results: part of the identity of every run that they make.

A rule that gives other results gets another number, so that nothing it made before is reused as its own;
`tests/test_versions.py` holds each to reference outputs, and fails where these change and the number does not.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.resources import files
from typing import Any

VERSIONS: dict[str, int] = {
    # data
    "phantom": 2,  # drawings, questions, traces
    "labelled_images": 2,
    "medr1": 2,
    "gmai": 2,  # what is read, asked and how it is judged; 1: an answer tag hid its letter
    "medxpertqa": 1,
    "mmmu": 1,
    "omnimedvqa": 2,  # 1: did not say of which set a question is
    "path_vqa": 1,
    "pmc_vqa": 1,
    "slake": 1,
    "vqa_rad": 1,
    "splits": 1,
    "images": 2,  # what an image file becomes
    # curation
    "vqa_table": 1,
    "medvlthinker": 1,
    "gmai_reasoning": 1,
    "reasoning_text": 1,
    "dicom": 1,
    "ingest": 1,
    "duplicates": 1,
    "decontaminate": 1,
    "structure": 2,  # 1: options were shuffled with labels of their own on them
    "specialties": 1,
    "label": 1,
    "needs_image": 1,
    "difficulty": 1,
    "traces": 1,
    "statements": 1,
    "balance": 1,
    "release": 1,
    # training
    "prompts": 2,  # layout of question, options and instruction; what SFT trains
    "lessons": 2,  # of the tiny base, and its first weights
    "batches": 1,  # order of records, seeds of steps
    "optimiser": 2,  # schedule, clipping, AdamW, Muon; 1: Muon in bf16
    "sft": 1,
    "sampling": 3,  # 2: random numbers by the batch instead of by the prompt
    "rewards": 2,
    "rubrics": 6,  # 1: the phantoms' wording alone; 3: no threshold was no false one; 5: none on a cut was seen
    "advantages": 2,  # 1: weights divided by their sum, not centred behind the gate
    "open_rewards": 2,  # of no or labelled options; 1: exact text, read as English, also of yes or no
    "losses": 1,
    "learned_weights": 1,  # of the perspectives, from verdicts and adherences
    "gba": 2,  # how an update uses a rollout
    # merging
    "start": 1,
    "grams": 1,  # what of which inputs they sum
    "distil": 1,
    "breadcrumbs": 1,
    "caci": 2,  # and dare_ties, della, ties; 1: five or more summed as torch does, by fours where a tensor is small
    "dare_linear": 1,
    "dare_ties": 2,
    "della": 2,
    "linear": 1,
    "ram": 1,
    "regmean": 1,
    "task_arithmetic": 1,
    "ties": 2,
    "winner_take_all": 1,
    "core_space": 1,
    "knots": 1,
    "wudi": 1,
    # evaluation
    "rotate": 1,  # the perspective a question is asked under
    "majority": 1,
    "robust": 2,
    "medevalkit": 2,  # 1: own letters and SLAKE were told by the look of options and source
    "metrics": 1,
    "stats": 1,
    "summary": 3,  # 1: of the perspectives, single accuracies and the vote's gain alone
    "best_of": 1,  # the vote, the pick and pass@k
    "pairwise": 2,  # 1: no answer tag; what a judge is asked of a pair, and how its reply is read
    "med_rewardbench": 1,
    "judge_controls": 1,
    "pair_numbers": 1,
    "judge_sft": 1,  # what judges are trained on, and how
    "judge_dpo": 1,
    "judge_scalar": 1,
    "judge_scores": 1,  # what of a judge's opinion is a score
    "preference_pairs": 1,
    "phantom_pairs": 3,  # 1: without reasons; 2: others
    "vl_rewardbench": 1,
    "multimodal_rewardbench": 1,
    "swap": 1,  # whose image stands in for a question's own
    "overlap": 1,  # which test questions count as seen in training
}
PACKAGE = "mmedexpert."
PARTS = ("load", "ask", "judge")  # of a benchmark: what a module does has one number


def versions(*rules: str) -> dict[str, int]:
    """The numbers of these rules, for a run's key. KeyError for a rule without one."""
    return {rule: VERSIONS[rule] for rule in rules}


def rule_of(target: str) -> dict[str, int | str]:
    """The rule that a config names by a dotted path, and its number, for a run's key: wherever the code stands.

    A function without a number (a user's own) is known by its path and the sha256 of its module's source: any change
    of it counts.
    """
    module, _, name = target.rpartition(".")
    rule = module.rpartition(".")[2] if name in PARTS else name
    if target.startswith(PACKAGE) and rule in VERSIONS:
        return {rule: VERSIONS[rule]}
    return {target: _source_of(module)}


def rule_followed_by(function: Callable[..., Any]) -> dict[str, Any]:
    """As `rule_of`, for what `build` made of a config: a function, or a partial of one, whose values count, too."""
    values: dict[str, Any] = {}
    while isinstance(function, partial):
        values = {**function.keywords, **values}
        function = function.func
    return rule_of(f"{function.__module__}.{function.__name__}") | ({"values": values} if values else {})


@cache
def _source_of(module: str) -> str:
    try:
        text = inspect.getsource(import_module(module))
    except (ImportError, OSError, TypeError, ValueError):
        text = module
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(value: Any) -> str:
    """16 hex digits of what `value` is as JSON: data that decides a result, for a run's key."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def text_of(name: str) -> str:
    """16 hex digits of the content of `guidelines/<name>`: guidelines and instructions are data that decide results."""
    return hashlib.sha256(files("mmedexpert.guidelines").joinpath(name).read_bytes()).hexdigest()[:16]
