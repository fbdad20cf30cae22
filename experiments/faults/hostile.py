"""`python experiments/faults/hostile.py`: ten thousand hostile rows, responses, judge's replies and servers' bodies.

Each is drawn from its kind's seed and number out of fragments that such texts are made of and of what breaks readers:
unclosed and nested tags, half objects, NULs, halves of surrogate pairs, NaN, deep nesting, long runs. What is checked
stands with each kind. Nothing may raise but what a caller expects, and reading a text again gives the same.
"""

from __future__ import annotations

import argparse
import csv
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

import numpy as np
from PIL import Image

from mmedexpert.curation.verifier import derived, essentials, examined
from mmedexpert.data.pairs import DIMENSIONS
from mmedexpert.data.record import Record
from mmedexpert.data.records import line_of, record_of
from mmedexpert.data.validation import validate
from mmedexpert.engines.asking import Reply
from mmedexpert.engines.ledger import canonical
from mmedexpert.engines.replies import Sent, body_of, kept_reply, replied_row, reply_of
from mmedexpert.evaluation.judge import verdict_of
from mmedexpert.guidelines.rubrics import grades
from mmedexpert.judging.verdicts import read
from mmedexpert.scoring import medevalkit, robust
from mmedexpert.sources import vqa_table

OPTIONS = {"A": "Cyst", "B": "Mass (2 cm)", "C": "cyst", "D": "None of these"}
ODD = ["\0", "\ud800", "\udfff", "\u2028", "\u202e", "\ufeff", "\u0130", "e\u0301", "\U0001f9e0", "\r", "\x85", "  \n"]
TAGS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<ANSWER>",
    "\\boxed{",
    "}",
    "**",
    "```json\n",
    "```",
    "</",
    "<",
]
WORDS = """A B C D E (A) B. C: answer is the not no yes or and neither cyst mass none of these 2 cm because However ,
Option differential most likely probability 0.7 95% rules out therefore""".split()
LONG = [
    "<answer>",
    "A or ",
    "not ",
    "(",
    "{",
    "[[",
    "\\boxed{",
    "the answer is ",
    "cyst, ",
    " ",
    "1",
    "\n",
    "A B C D ",
    '"a":',
]
WEIRD: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "\0",
    "A",
    {},
    [],
    [[]],
    [None],
    {"A": None},
]


def text(rng: random.Random, words: list[str]) -> str:
    """A text of such words; one in twenty has a run of some thousand."""
    made = [
        rng.choice(rng.choice([words, TAGS, ODD] if rng.random() < 0.5 else [words, TAGS]))
        for _ in range(rng.randrange(40))
    ]
    if rng.random() < 0.05:
        made.insert(rng.randrange(len(made) + 1), rng.choice(LONG) * rng.randrange(100, 5000))
    return rng.choice(["", " "]).join(made)


def value(rng: random.Random, depth: int = 3) -> Any:
    """Any JSON value, and some that are none."""
    if depth == 0 or rng.random() < 0.4:
        return rng.choice(WEIRD) if rng.random() < 0.6 else text(rng, WORDS)
    if rng.random() < 0.5:
        return [value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {str(rng.choice(["A", "a", "", "text", "verdict"])): value(rng, depth - 1) for _ in range(rng.randrange(4))}


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


def row(rng: random.Random) -> Any:
    """A row of a table, most of them with something odd in a cell or two."""
    made: dict[str, Any] = {
        "id": f"q{rng.randrange(10**9)}", "image": "a.png", "question": "What is it?", "answer": "B",
        "options": {"A": "Cyst", "B": "Mass"},
    }  # fmt: skip
    for _ in range(rng.randrange(3)):
        name = rng.choice([*made])
        odd = {
            "image": ["../a.png", "/etc/hostname", "link.png", "a.png\0", "x/../../a.png", "bad.png", "", "sub"],
            "options": [{"A": "x"}, {"A": "x", "B": "x"}, "A) x, B) y", '{"A": "x"', ["x", "y"], [{"letter": "A"}]],
            "answer": ["A", "b", "C", "Mass", "x" * 20000, "Cyst and Mass"], "id": ["q1", "../q", "q\n1"],
        }.get(name, [])  # fmt: skip
        made[name] = rng.choice([*odd, value(rng)])
        if rng.random() < 0.1:
            del made[name]
    return made if rng.random() < 0.97 else value(rng)


def table(rng: random.Random, folder: Path, size: int = 50) -> Counter[str]:
    """A file of rows, read as a data set: every row is a record or refused with one line, and no record leaves the
    root; those that are usable can be written and read again."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    given, kind = [row(rng) for _ in range(size)], rng.choice(["jsonl", "csv", "json"])
    path = folder / f"rows.{kind}"
    if kind == "csv":
        rows = [
            {k: v if isinstance(v, str) else json.dumps(v) for k, v in one.items()}
            for one in given
            if isinstance(one, dict)
        ]
        given = [one for one in rows if any(one.get(name) for name in ("id", "image", "question", "options", "answer"))]
        with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
            writer = csv.DictWriter(file, ["id", "image", "question", "options", "answer"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(given)
    else:
        lines = [json.dumps(one, ensure_ascii=rng.random() < 0.5) for one in given]
        whole = "\n".join(lines) + "\n" if kind == "jsonl" else f"[{','.join(lines)}]"
        path.write_bytes(whole.encode("utf-8", "surrogatepass"))
    columns = {name: name for name in ("id", "image", "question", "options", "answer")}
    records, root, bad = vqa_table.load(folder, folder / "out", files=path.name, columns=columns)
    path.unlink()
    assert len(records) + len(bad) == len(given), (
        f"{len(given)} rows, {len(records)} records and {len(bad)} refused ({kind})"
    )
    good, left = validate(records, root, bad=bad, on_bad_record="skip")
    assert len(good) + len(left) == len(given), f"{len(given)} rows, {len(good)} usable and {len(left)} left out"
    for record in good:
        assert record_of(line_of(record)) == record, "it is not read as it was written"
        inside = [not Path(name).is_absolute() and ".." not in Path(name).parts for name in record.images]
        assert all(inside), f"an image outside of the root: {record.images}"  # links are the user's own
        robust.judge(record, "A")
    assert len({record.id for record in good}) == len(good), "an id stands twice"
    return Counter(usable=len(good), refused=len(left))


def prepared(folder: Path) -> Path:
    """The images that rows name, in `folder`/root, and one outside of it."""
    root = folder / "root"
    root.mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "../a.png")):
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / name)
    (root / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (root / "link.png").symlink_to("../a.png")
    (root / "sub").mkdir()
    return root


KINDS: dict[str, Callable[[random.Random, Path], str]] = {"response": response, "verdict": verdict, "body": body}


def hostile(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """So many of each kind: what they came to, the slowest one's CPU seconds, and what went wrong, by its number."""
    root = prepared(folder)
    found: dict[str, Any] = {}
    for kind in (*KINDS, "row"):
        came_to: Counter[str] = Counter()
        wrong, slowest, size = {}, 0.0, 1 if kind != "row" else 50
        for number in range(math.ceil(count / size)):
            rng, begun = random.Random(f"{seed} {kind} {number}"), time.process_time()
            try:
                came_to += table(rng, root) if kind == "row" else Counter([KINDS[kind](rng, root)])
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
