"""Versions of the rules and losses that make results: part of the identity of every run that they make.

A rule that gives other results gets another number, so that nothing it made before is reused as its own;
`tests/test_versions.py` holds each to reference outputs, and fails where these change and the number does not.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from importlib import import_module
from importlib.resources import files

VERSIONS: dict[str, int] = {
    # data
    "data.phantom.source.phantom": 1,  # drawings, questions, traces
    "data.labelled.labelled_images": 2,
    "data.medr1.medr1": 2,
    "splits": 1,
    "images": 2,  # what an image file becomes
    # training
    "prompts": 2,  # layout of question, options and instruction; what SFT trains
    "lessons": 1,  # of the tiny base, and its first weights
    "batches": 1,  # order of records, seeds of steps
    "optimiser": 2,  # schedule, clipping, AdamW, Muon; 1: Muon in bf16
    "sft": 1,
    "sampling": 2,
    "rewards": 2,
    "rubrics": 1,
    "advantages": 2,  # 1: weights divided by their sum, not centred behind the gate
    "losses": 1,
    "gba": 2,  # how an update uses a rollout
    # merging
    "start": 1,
    "merging.methods.breadcrumbs": 1,
    "merging.methods.caci": 1,
    "merging.methods.dare_linear": 1,
    "merging.methods.dare_ties": 1,
    "merging.methods.della": 1,
    "merging.methods.linear": 1,
    "merging.methods.ram": 1,
    "merging.methods.task_arithmetic": 1,
    "merging.methods.ties": 1,
    "merging.low_rank.core_space": 1,
    "merging.low_rank.knots": 1,
    "merging.low_rank.wudi": 1,
    # evaluation
    "rotate": 1,  # the perspective a question is asked under
    "majority": 1,
    "robust": 2,
    "medevalkit": 1,
    "metrics": 1,
    "stats": 1,
}
PACKAGE = "mmedexpert."


def versions(*rules: str) -> dict[str, int]:
    """The numbers of these rules, for a run's key. KeyError for a rule without one."""
    return {rule: VERSIONS[rule] for rule in rules}


def version_of(target: str) -> int | str:
    """The number of the function a config names by `_target_`; of one that has none (a loader, a user's own), the
    sha256 of its module's source: any change of it counts."""
    known = VERSIONS.get(target.removeprefix(PACKAGE))
    return known if known is not None else source_of(target.rpartition(".")[0])


@cache
def source_of(module: str) -> str:
    """16 hex digits of a module's source; of one without source, its name."""
    try:
        text = inspect.getsource(import_module(module))
    except (ImportError, OSError, TypeError):
        text = module
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def text_of(name: str) -> str:
    """16 hex digits of the content of `guidelines/<name>`: guidelines and instructions are data that decide results."""
    return hashlib.sha256(files("mmedexpert.guidelines").joinpath(name).read_bytes()).hexdigest()[:16]
