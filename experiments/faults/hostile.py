"""`python experiments/faults/hostile.py`: ten thousand hostile rows, responses, judge's replies and servers' bodies.

Each is drawn from its kind's seed and number out of fragments that such texts are made of and of what breaks readers:
unclosed and nested tags, half objects, NULs, halves of surrogate pairs, NaN, deep nesting, long runs. What is checked
stands with each kind. Nothing may raise but what a caller expects, and reading a text again gives the same.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drawn import OPTIONS, WEIRD, WORDS, text, value
from tables import hub_files, prepared, table

from mmedexpert.curation.verifier import derived, essentials, examined
from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.data.record import Record
from mmedexpert.engines.asking import Reply
from mmedexpert.engines.ledger import canonical
from mmedexpert.engines.replies import Sent, body_of, kept_reply, replied_row, reply_of
from mmedexpert.evaluation.judge import verdict_of
from mmedexpert.guidelines.rubrics import grades
from mmedexpert.judging.verdicts import read
from mmedexpert.scoring import medevalkit, robust


def question(rng: random.Random) -> Record:
    """A question of any kind whose gold answer can be judged."""
    kind, answer = rng.choice(
        [
            ("choice", "B"),
            ("yes_no", "yes"),
            ("closed", "no"),
            ("closed", "left lung"),
            ("open", "a cyst"),
            ("open", "\0."),
        ]
    )
    return Record(
        "q", (), "What is it?", OPTIONS if kind == "choice" else None, answer, ("all",), "made up", "CC0", "test", "q",
        modality="text", kind=kind, language=rng.choice(["en", "zh"]),
    )  # fmt: skip


def response(rng: random.Random, folder: Path) -> str:
    """A response under both protocols and the rubrics: an allowed verdict, right only where it is the gold answer."""
    record, said = question(rng), text(rng, WORDS)
    told = []
    for protocol in (robust, medevalkit):
        found = protocol.judge(record, said)
        assert found == protocol.judge(record, said), "another verdict of the same response"
        assert isinstance(found.correct, bool) and found.parsed == (found.picked is not None), "parsed without a pick"
        if record.kind == "choice":
            assert found.picked in (None, *OPTIONS), f"picked {found.picked!r}"
            assert found.correct == (found.picked == record.answer), "right with another letter"
        if record.kind == "yes_no":
            assert found.picked in (None, "yes", "no"), f"picked {found.picked!r}"
        assert found.parsed or not found.correct, "right without an answer"
        assert all(0 <= score <= 1 + 1e-9 for score in found.scores.values()), "a score outside [0, 1]"
        told.append("right" if found.correct else "wrong" if found.parsed else "unparsed")
    found = grades(said, record.options)
    assert all(0 <= score <= 1 for score in found.scores.values()), "an adherence outside [0, 1]"
    assert found == grades(said, record.options), "other grades of the same response"
    return told[0]


def verdict(rng: random.Random, folder: Path) -> str:
    """A judge's or verifier's reply: of each dimension A, B, tie or invalid."""
    names = rng.sample(DIMENSIONS, rng.randrange(1, len(DIMENSIONS) + 1))
    whole = json.dumps({name: rng.choice(["A", "b", " tie", "AB", None, {"verdict": "A"}, 1]) for name in names})
    words = [whole, whole[: rng.randrange(len(whole))], *(f"{name}: {rng.choice('ABab')}\n" for name in names), "[[A]]"]
    said = text(rng, [*words, "<judge>0</judge>", "<judge>", "{", "}", json.dumps(dict.fromkeys(essentials(), True))])
    rules = ""
    for protocol in ("pairwise", "med_rewardbench"):
        found = read(said, names, protocol, finish_reason=rng.choice(["stop", "length", "refused"]))
        wanted = {*names} if protocol == "pairwise" or "refused" in found.rule else {*DIMENSIONS}
        assert {*found.said} == wanted and {*found.said.values()} <= {"A", "B", "tie", "invalid"}, f"said {found.said}"
        rules = rules or found.rule
    record, reply = question(rng), Reply(said, 1, "stop", 0.0, None)
    assert verdict_of(said) in (True, False, None) and derived(record, reply) in (True, False, None)
    assert examined(record, reply) is None or {*examined(record, reply)} == {*essentials()}
    return rules


def body(rng: random.Random, folder: Path) -> str:
    """A server's body: a reply that can be written and read again, or a ValueError."""
    usage = {"completion_tokens": rng.choice([1, 1, 2.0, *WEIRD, 10**30]), "prompt_tokens": rng.choice([1, 1, *WEIRD])}
    choice = {
        "finish_reason": rng.choice(["stop"] * 5 + ["length", "abort", *WEIRD[:4]]), 
        "message": {"content": text(rng, WORDS)},
        "logprobs": rng.choice([None, None, None, {"content": [{"logprob": rng.choice([-1.0, *WEIRD])}]}, value(rng)]),
    }  # fmt: skip
    whole: Any = {"choices": [choice], "usage": rng.choice([usage, None, None, {"completion_tokens": 3}])}
    for _ in range(rng.randrange(3)):  # something is lost, or another thing
        place = rng.choice([whole, choice, choice["message"] if isinstance(choice.get("message"), dict) else choice])
        if place:
            place[rng.choice([*place])] = value(rng)
    sent = json.dumps(whole, ensure_ascii=rng.random() < 0.5)
    sent = sent.encode(errors="replace").decode()  # what comes as UTF-8 has halves of surrogate pairs as escapes alone
    sent = sent[: rng.randrange(len(sent))] if rng.random() < 0.1 else "[" * 5000 if rng.random() < 0.01 else sent
    try:
        reply = reply_of(body_of(sent), 0.0)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500, "more than a line"
        return "refused"
    reply.text.encode()
    row = replied_row(canonical({"x": 1}), "m", Sent(sent, 1, 0.0, 0.0), reply, None)
    again = kept_reply(row, retry_refused=False)
    assert again is not None and again.text == reply.text and again.tokens == reply.tokens, "the ledger's is another"
    return "read"


Draw = Callable[[random.Random, Path], str | Counter[str]]
KINDS: dict[str, Draw] = {"response": response, "verdict": verdict, "body": body}
ROWS = 50  # of a file
FILES: dict[str, Draw] = {"row": table, "parquet": hub_files}


def hostile(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many of each kind: what they came to, the slowest one's CPU seconds, and what went wrong, by its number."""
    root = prepared(folder)
    found: dict[str, Any] = {}
    for kind, drawn in {**KINDS, **FILES}.items():
        came_to: Counter[str] = Counter()
        wrong, slowest, size = {}, 0.0, ROWS if kind in FILES else 1
        for number in range(math.ceil(count / size)):
            rng, begun = random.Random(f"{seed} {kind} {number}"), time.process_time()
            try:
                told = drawn(rng, root)
                came_to += told if isinstance(told, Counter) else Counter([told])
            except Exception as error:  # whatever a reader lets through
                wrong[number] = f"{type(error).__name__}: {error}"[:300]
            slowest = max(slowest, time.process_time() - begun)
        given = math.ceil(count / size) * size
        found[kind] = {
            "given": given,
            "came_to": dict(sorted(came_to.items())),
            "slowest_cpu_s": round(slowest, 3),
            "wrong": wrong,
        }
    return found


def main() -> int:
    """All kinds; writes hostile.json, and exits with 1 where something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("outputs/faults_hostile"), help="a folder that is made anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("hostile.json"))
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    found = hostile(given.count, given.seed, given.work)
    told = {
        "command": "python experiments/faults/hostile.py " + " ".join(sys.argv[1:]),
        "seed": given.seed,
        "kinds": found,
    }
    given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
    return int(any(one["wrong"] for one in found.values()))


if __name__ == "__main__":
    sys.exit(main())
