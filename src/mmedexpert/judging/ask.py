"""Ask a judge every pair in every order, keep each reply as it comes, read its verdicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import TIE, Order, Pair
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.evaluation.asked import REFUSED, ask_missing
from mmedexpert.judging.controls import CONTROLS
from mmedexpert.judging.prompts import ask_of, orders_of
from mmedexpert.judging.verdicts import canonical, read
from mmedexpert.runtime.jsonl import read_lines

FILE, COLUMNS = "judgements.jsonl", ("id", "order", "dimensions", "response", "finish_reason")
Judgement = dict[str, Any]  # a row: a pair in one order, `verdicts` of the pair's own answers


def asks_of(
    pairs: Sequence[Pair], image_root: Path, *, protocol: str, seed: int, style: str = "full", blind: bool = False
) -> list[tuple[Pair, Order, Ask, tuple[str, ...]]]:
    """What a judge is asked: pair, order, question, and its dimensions as they stand there."""
    ties = any(TIE in pair.labels.values() for pair in pairs)
    asked = []
    for pair in pairs:
        for order in orders_of(protocol):
            ask, names = ask_of(
                pair, order, image_root, protocol=protocol, ties=ties, seed=seed, blind=blind, style=style
            )
            asked.append((pair, order, ask, names))
    return asked


def judge(
    engine: Engine, asked: Sequence[tuple[Pair, Order, Ask, tuple[str, ...]]], path: Path, *, protocol: str, title: str
) -> list[Judgement]:
    """A row for each ask, in order; those in `path` are not asked again, but for refused ones.

    UserError where most are refused, which is a setting's fault.
    """
    items = {(pair.id, order): (pair, order, ask, names) for pair, order, ask, names in asked}
    found = ask_missing(
        engine, {key: ask for key, (_, _, ask, _) in items.items()}, read_lines(path, COLUMNS), path,
        key_of=lambda row: (row["id"], row["order"]), row_of=lambda key, reply: _row(*items[key], reply),
        doing="judge", title=title,
    )  # fmt: skip
    return [with_verdicts(row, protocol) for row in found]


def with_verdicts(row: Judgement, protocol: str) -> Judgement:
    """A row with what today's rules read in its response; what a reward model scored needs no reading."""
    if "scores" in row:
        said = json.loads(row["response"])
        return {**row, "rule": "scores", "verdicts": {name: canonical(one, row["order"]) for name, one in said.items()}}
    found = read(row["response"], row["dimensions"], protocol, finish_reason=row["finish_reason"])
    verdicts = {name: canonical(said, row["order"]) for name, said in found.said.items()}
    return {**row, "rule": found.rule, "verdicts": verdicts}


def controlled(name: str, pairs: Sequence[Pair], *, protocol: str, seed: int) -> list[Judgement]:
    """The rows of a judge that needs no model (`controls.CONTROLS`)."""
    choose = CONTROLS[name]
    return [
        {
            "id": pair.id, "order": order, "dimensions": list(pair.labels), "response": "", "finish_reason": "stop",
            "rule": name, "verdicts": {one: choose(pair, order, one, seed) for one in pair.labels},
        }
        for pair in pairs
        for order in orders_of(protocol)
    ]  # fmt: skip


def _row(pair: Pair, order: Order, ask: Ask, names: Sequence[str], reply: Reply) -> Judgement:
    return {
        "id": pair.id, "order": order, "dimensions": list(names), "response": reply.text, "tokens": reply.tokens,
        "finish_reason": reply.finish_reason, "seconds": round(reply.seconds, 4),
        "prompt_sha256": hashlib.sha256(ask.text.encode()).hexdigest(),
        **({REFUSED: reply.refused} if reply.finish_reason == REFUSED else {}),
    }  # fmt: skip
