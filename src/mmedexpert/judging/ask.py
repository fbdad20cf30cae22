"""Ask a judge every pair in every order, keep each reply as it comes, read its verdicts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import TIE, Order, Pair
from mmedexpert.engines.asking import Ask, Engine, Reply
from mmedexpert.errors import UserError
from mmedexpert.evaluation.predict import REFUSED, REFUSED_FIRST, REFUSED_SHARE
from mmedexpert.judging.controls import CONTROLS
from mmedexpert.judging.prompts import ask_of, orders_of
from mmedexpert.judging.verdicts import canonical, read
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.progress import Bar

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
    kept = {_key(row): row for row in read_lines(path, COLUMNS) if row["finish_reason"] != REFUSED}
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept.values()).encode())
    todo = [item for item in asked if (item[0].id, item[1]) not in kept]
    done = refused = 0
    with Bar(f"judge {title}", len(todo)) as bar, path.open("a", encoding="utf-8") as file:
        for place, reply in engine([ask for _, _, ask, _ in todo]):
            row = _row(*todo[place], reply)
            kept[_key(row)] = row
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
            done, refused = done + 1, refused + (row["finish_reason"] == REFUSED)
            bar.show(done, {"refused": refused})
            if refused == len(kept) == REFUSED_FIRST:
                break
    if refused and (refused == len(kept) == REFUSED_FIRST or refused > REFUSED_SHARE * len(asked)):
        first = next(row for row in kept.values() if row["finish_reason"] == REFUSED)
        raise UserError(
            f"{title}: {refused} of {len(kept)} questions were refused (first: {first['id']}: {first[REFUSED]}): look "
            "at the settings of the server or the data; the same command asks only these again"
        )
    found = [kept[pair.id, order] for pair, order, _, _ in asked]
    return [with_verdicts(row, protocol) for row in found]


def with_verdicts(row: Judgement, protocol: str) -> Judgement:
    """A row with what today's rules read in its response."""
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


def _key(row: Judgement) -> tuple[str, str]:
    return row["id"], row["order"]


def _row(pair: Pair, order: Order, ask: Ask, names: Sequence[str], reply: Reply) -> Judgement:
    return {
        "id": pair.id, "order": order, "dimensions": list(names), "response": reply.text, "tokens": reply.tokens,
        "finish_reason": reply.finish_reason, "seconds": round(reply.seconds, 4),
        "prompt_sha256": hashlib.sha256(ask.text.encode()).hexdigest(),
        **({REFUSED: reply.refused} if reply.finish_reason == REFUSED else {}),
    }  # fmt: skip
