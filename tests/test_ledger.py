"""The ledger of what servers were asked: keys, rows, several processes, kills, budgets and rates."""

from __future__ import annotations

import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from serving import closed_port
from test_openai_engine import BAD, Answer, Server, ask_all, asks, completion

from mmedexpert.engines.asking import Ask, BudgetReached, Reply
from mmedexpert.engines.ledger import FAILED, REFUSED, REPLIED, Ledger, Row, canonical, key_of
from mmedexpert.engines.openai import OpenAIEngine
from mmedexpert.engines.replies import Prices
from mmedexpert.engines.sending import GONE
from mmedexpert.errors import UserError

PRICES = Prices(1.0, 2.0, "2026-11")  # a scripted reply reads 1 token and writes 7: 15e-6 USD


@pytest.fixture()
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.quit.set()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture()
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "outputs" / "ledger.sqlite")


def numbered(count: int) -> list[Ask]:
    return asks(*(str(n) for n in range(count)))


def rows(ledger: Ledger) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(ledger.path)) as database:
        database.row_factory = sqlite3.Row
        return [dict(row) for row in database.execute("SELECT * FROM replies ORDER BY created, key")]


def row(key: str, outcome: str = REPLIED, **more: Any) -> Row:
    return Row(key, outcome, "m", "{}", response="{}" if outcome == REPLIED else None, **more)


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_a_row_holds_request_reply_reasoning_usage_cost_and_tries(server, ledger):
    logprobs = {"content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []} for t, p in (("a", -3),)]}
    thought = {"role": "assistant", "content": "B", "reasoning_content": "hm"}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "completion_tokens_details": {"reasoning_tokens": 40}}
    body = json.loads(completion("", "length", message=thought, logprobs=logprobs)[2]) | {"usage": usage}

    def answer(prompt: str, before: int, _: Any) -> Answer:
        return (200, {}, json.dumps(body).encode()) if before else (429, {"Retry-After": "0"}, b"busy")

    server.answer = answer
    [(_, reply)] = server.engine(ledger=ledger, prices=PRICES, seed=5)(asks("q"))
    [found] = rows(ledger)
    assert (found["outcome"], found["model"], found["finish_reason"]) == ("replied", "m", "length")
    assert (found["prompt_tokens"], found["completion_tokens"], found["reasoning_tokens"]) == (100, 50, 40)
    assert (found["cost"], found["prices"], found["attempts"]) == (pytest.approx(200e-6), "2026-11", 2)
    assert found["latency"] > 0 and found["created"].startswith("20") and found["error"] is None
    assert found["key"] == hashlib.sha256(found["request"].encode()).hexdigest()
    request = json.loads(found["request"])
    assert request["sampling"] == {"temperature": 0.0, "max_tokens": 64, "seed": 5} and request["sample"] == 0
    raw = json.loads(found["response"])
    assert raw["choices"][0]["message"] == thought and "logprobs" not in raw["choices"][0]
    server.http.shutdown()
    [(_, again)] = server.engine(ledger=ledger, seed=5)(asks("q"))
    assert reply.text == "<think>hm</think>B" and (reply.kept, again.kept) == (False, True)
    assert again == replace(reply, seconds=0.0, kept=True) and again.mean_logp == -3.0


def test_all_that_is_known_needs_no_server_and_comes_in_order(server, ledger):
    replies, _ = ask_all(server.engine(ledger=ledger), numbered(8))
    gone = OpenAIEngine(f"http://127.0.0.1:{closed_port()}/v1", "m", max_new_tokens=64, ledger=ledger)
    again = list(gone(list(reversed(numbered(8)))))
    assert [place for place, _ in again] == list(range(8))
    assert [reply.text for _, reply in again] == [replies[7 - n].text for n in range(8)]
    with pytest.raises(UserError, match="no server answers"):
        list(gone(numbered(9)))


def test_one_question_that_stands_twice_is_asked_once(server, ledger):
    replies, error = ask_all(server.engine(ledger=ledger), [*asks("a", "b"), Ask("other id", "a", ())])
    assert not error and (replies[0].text, replies[2].text) == ("a", "a") and server.asked == {"a": 1, "b": 1}
    assert (replies[0].kept, replies[2].kept) == (False, True)


def test_a_reply_is_on_the_disk_before_it_is_given(server, ledger):
    for place, _ in (replies := server.engine(ledger=ledger)(numbered(40))):
        assert str(place) in {json.loads(one["request"])["messages"][0]["content"] for one in rows(ledger)}
        if place > 20:
            break
    replies.close()  # type: ignore[attr-defined]


def test_replies_that_had_come_when_a_run_was_stopped_are_kept(server, ledger, monkeypatch):
    add = ledger.add

    def slow(rows: Any) -> None:  # replies wait for the commit of others
        time.sleep(1.0)
        add(rows)

    monkeypatch.setattr(ledger, "add", slow)
    replies = server.engine(ledger=ledger, concurrency=8)(numbered(100))
    next(replies)
    time.sleep(0.6)
    replies.close()  # type: ignore[attr-defined]
    assert ledger.totals()["replied"] == len(server.asked) == 9


def test_samples_are_drawn_with_their_own_seeds_and_rows(server, ledger):
    server.answer = lambda prompt, before, body: completion(str(body["seed"]))
    questions = [Ask(f"{n}", "q", (), sample=n) for n in range(3)]
    for _ in range(2):
        replies = dict(server.engine(ledger=ledger, temperature=0.7, top_p=0.9, seed=40)(questions))
        assert [replies[n].text for n in range(3)] == ["40", "41", "42"]
    assert len(server.bodies) == 3 and {(body["temperature"], body["top_p"]) for body in server.bodies} == {(0.7, 0.9)}


def test_without_a_ledger_nothing_is_kept_and_nothing_new_is_sent(server, tmp_path):
    for _ in range(2):
        assert not ask_all(server.engine(), asks("a", "a"))[1]
    assert server.asked["a"] == 4 and not {"seed", "top_p", "response_format"} & set(server.bodies[0])
    assert not list(tmp_path.iterdir())


# --- the key ----------------------------------------------------------------------------------------------------------


def test_the_key_knows_no_address_no_key_and_no_place_of_an_image(tmp_path, picture):
    for name in ("a.png", "b.png"):
        picture(1).save(tmp_path / name)
    one = OpenAIEngine("http://me:s3cret@here:1/v1", "m", api_key="k3y").request(Ask("x", "q", (tmp_path / "a.png",)))
    other = OpenAIEngine("https://there/v1", "m").request(Ask("y", "q", (tmp_path / "b.png",)))
    assert one == other
    assert not [word for word in ("s3cret", "k3y", "here", str(tmp_path), ".png") if word in one]
    assert hashlib.sha256((tmp_path / "a.png").read_bytes()).hexdigest() in one


ASK = Ask("x", "q", (), format={"type": "json_object"})


@pytest.mark.parametrize(
    ("settings", "ask"),
    [({"model": "n"}, {}), ({"revision": "r"}, {}), ({"system_prompt": "s"}, {}), ({"max_new_tokens": 9}, {}),
     ({"temperature": 1.0}, {}), ({"top_p": 0.5}, {}), ({"seed": 1}, {}), ({}, {"text": "p"}), ({}, {"sample": 1}),
     ({}, {"format": None}), ({}, {"format": {"type": "text"}})],
)  # fmt: skip
def test_the_key_follows_what_decides_a_reply(settings, ask):
    def key(settings: dict[str, Any], ask: Ask) -> str:
        return key_of(OpenAIEngine("http://x/v1", **{"model": "m"} | settings).request(ask))

    assert key(settings, replace(ASK, **ask)) != key({}, ASK)
    assert key({"concurrency": 3, "retries": 0, "timeout_s": 1.0, "max_requests": 4}, ASK) == key({}, ASK)
    assert key({"temperature": 0}, replace(ASK, id="y")) == key({}, ASK)


def test_the_key_follows_the_bytes_of_an_image(tmp_path, picture):
    engine, found = OpenAIEngine("http://x/v1", "m"), set()
    for n in range(3):
        picture(n).save(tmp_path / "0.png")
        found.add(key_of(engine.request(Ask("x", "q", (tmp_path / "0.png",)))))
    assert len(found) == 3
    assert canonical({"b": 1.0, "a": "é"}) == '{"a":"é","b":1.0}'


def test_an_image_that_is_gone_or_broken_is_refused_and_no_row(server, ledger, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    questions = [Ask("a", "q", (tmp_path / "gone.png",)), Ask("b", "q", (tmp_path / "broken.png",)), *asks("c")]
    replies, error = ask_all(server.engine(ledger=ledger), questions)
    assert not error and [bool(replies[n].refused) for n in range(3)] == [True, True, False]
    assert "gone.png" in replies[0].refused and len(rows(ledger)) == 1


# --- failures ---------------------------------------------------------------------------------------------------------

FAULTS = {
    "busy": ((429, {"Retry-After": "0"}, b"busy"), "RateLimitError", 2),
    "broken": ((500, {}, b"boom"), "InternalServerError", 2),
    "malformed": (BAD["half"], "ValueError", 1),
    "aborted": (BAD["aborted"], "ValueError", 1),
    "key": ((401, {}, b"no"), "AuthenticationError", 1),
}


@pytest.mark.parametrize(("answer", "error", "tries"), FAULTS.values(), ids=FAULTS)
def test_a_failure_is_on_record_and_asked_again_by_the_next_run(server, ledger, answer, error, tries):
    server.answer = lambda prompt, before, body: answer if prompt == "bad" else completion("fine")
    replies, told = ask_all(server.engine(ledger=ledger), asks("bad", "good"))
    assert set(replies) == {1} and "1 of 2 questions" in told
    bad = ledger.get(key_of(server.engine().request(asks("bad")[0])))
    assert bad is not None and (bad.outcome, bad.error, bad.attempts) == (FAILED, error, tries) and bad.error_text
    server.answer = lambda prompt, before, body: completion("fine")
    server.asked.clear()
    assert not ask_all(server.engine(ledger=ledger), asks("bad", "good"))[1] and server.asked == {"bad": 1}
    mended = ledger.get(bad.key)
    assert mended is not None and (mended.outcome, mended.error, mended.attempts) == (REPLIED, None, tries + 1)


STUBBORN = {"broken": FAULTS["broken"][0], "malformed": FAULTS["malformed"][0]}
PASSING = {
    "busy": FAULTS["busy"][0],
    "key": FAULTS["key"][0],
    "aborted": FAULTS["aborted"][0],
    "down": (503, {}, b"500 soon"),
    "gateway": (502, {}, b""),
    "page": BAD["html"],
    "busy, as 200": (200, {}, b'{"error": {"code": 429, "message": "later"}}'),
}


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("answer", STUBBORN.values(), ids=STUBBORN)
def test_a_question_that_fails_in_three_runs_is_refused(server, ledger, answer, retries):
    server.answer = lambda prompt, before, body: answer if prompt == "bad" else completion("fine")
    engine = partial(server.engine, ledger=ledger, retries=retries)
    for _ in range(2):
        replies, told = ask_all(engine(), asks("bad", "good"))
        assert set(replies) == {1} and "1 of " in told
    replies, told = ask_all(engine(), asks("bad", "good"))
    assert not told and replies[0].refused.startswith("failed in 3 runs: ") and replies[1].text == "fine"
    tried = server.asked["bad"]
    again, told = ask_all(engine(), asks("bad", "good"))
    assert not told and again[0].refused == replies[0].refused and server.asked["bad"] == tried
    server.answer = lambda prompt, before, body: completion("fine")
    assert ask_all(engine(retry_refused=True), asks("bad"))[0][0].text == "fine"


@pytest.mark.parametrize("answer", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_asked_again_by_every_run(server, ledger, answer):
    server.answer = lambda prompt, before, body: answer if prompt == "bad" else completion("fine")
    for _ in range(4):
        assert "1 of " in ask_all(server.engine(ledger=ledger, retries=0), asks("bad", "good"))[1]


def test_an_outage_does_not_count_against_a_question(server, ledger):
    down, broken = PASSING["down"], STUBBORN["broken"]
    answers = iter([down, down, broken, broken, down, broken, STUBBORN["malformed"], broken])
    server.answer = lambda *_: next(answers)
    for _ in range(7):
        assert "1 of 1" in ask_all(server.engine(ledger=ledger, retries=0), asks("bad"))[1]
    replies, told = ask_all(server.engine(ledger=ledger, retries=0), asks("bad"))
    assert not told and replies[0].refused.startswith("failed in 3 runs: 500 boom")


def test_tries_of_one_run_are_one_run(server, ledger):
    server.answer = lambda *_: STUBBORN["broken"]
    for retries in (3, 0):
        assert "1 of 1" in ask_all(server.engine(ledger=ledger, retries=retries), asks("bad"))[1]


def test_where_a_server_is_broken_not_every_question_is_given_up(server, ledger):
    server.answer = lambda *_: STUBBORN["broken"]
    questions = asks(*(str(n) for n in range(80)))
    for _ in range(4):
        replies, told = ask_all(server.engine(ledger=ledger, retries=0, concurrency=1), questions)
    assert len(replies) <= GONE + 1 and "not sent" in told


def test_a_slow_server_is_a_failure_with_its_class(server, ledger):
    server.answer = lambda *_: completion("late") if server.quit.wait(20) else completion("")
    assert "1 of 1" in ask_all(server.engine(ledger=ledger, timeout_s=0.3, retries=0), asks("a"))[1]
    [found] = rows(ledger)
    assert (found["outcome"], found["error"], found["latency"]) == ("failed", "APITimeoutError", None)


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_refusal_is_kept_and_asked_again_only_on_demand(server, ledger, status):
    server.answer = lambda *_: (status, {}, b"too long")
    first, _ = ask_all(server.engine(ledger=ledger), asks("a"))
    again, _ = ask_all(server.engine(ledger=ledger), asks("a"))
    assert first[0].refused == again[0].refused == f"{status} too long" and again[0].kept
    assert server.asked["a"] == 1 and rows(ledger)[0]["outcome"] == REFUSED
    server.answer = lambda *_: completion("fine")
    assert ask_all(server.engine(ledger=ledger, retry_refused=True), asks("a"))[0][0].text == "fine"
    assert ask_all(server.engine(ledger=ledger), asks("a"))[0][0].text == "fine" and server.asked["a"] == 2


def test_what_is_forgotten_is_asked_again_and_can_be_read_until_then(server, ledger):
    engine = server.engine(ledger=ledger, prices=PRICES)
    list(engine(asks("a", "b")))
    engine.forget(asks("a")[0])
    assert sorted(one["outcome"] for one in rows(ledger)) == ["forgotten", "replied"]
    assert {place: reply.kept for place, reply in engine(asks("a", "b"))} == {0: False, 1: True}
    assert server.asked == {"a": 2, "b": 1} and ledger.totals()["cost"] == pytest.approx(45e-6)  # both of a
    server.engine().forget(asks("a")[0])  # without a ledger there is nothing to forget


# --- kills and several processes --------------------------------------------------------------------------------------

KILLED = """
import sys
from functools import partial
from pathlib import Path
from mmedexpert.engines.asking import Ask
from mmedexpert.engines.ledger import Ledger
from mmedexpert.engines.openai import OpenAIEngine
engine = OpenAIEngine(sys.argv[1], "m", concurrency=4, max_new_tokens=64, ledger=Ledger(Path(sys.argv[2])))
for place, reply in engine([Ask(f"id-{n}", str(n), ()) for n in range(40)]):
    print(place, flush=True)
"""


def test_a_killed_run_asks_nothing_twice(server, ledger):
    server.answer = lambda prompt, before, body: (
        completion(prompt) if int(prompt) < 25 or server.quit.is_set() or server.quit.wait(30) else completion("")
    )
    command = [sys.executable, "-c", KILLED, server.base_url, str(ledger.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        given = {int(process.stdout.readline()) for _ in range(25)}
        process.send_signal(signal.SIGKILL)
    assert given == set(range(25))
    server.answer = lambda prompt, before, body: completion(prompt)
    replies, error = ask_all(server.engine(ledger=ledger), numbered(40))
    assert not error and [replies[n].text for n in range(40)] == [str(n) for n in range(40)]
    assert {server.asked[str(n)] for n in range(25)} == {1} and {n for n in range(40) if replies[n].kept} == given


WRITER = """
import sys
from pathlib import Path
from mmedexpert.engines.ledger import REPLIED, Ledger, Row
ledger, first = Ledger(Path(sys.argv[1])), int(sys.argv[2])
for n in range(first, first + 40):
    ledger.add([Row(f"key {n}", REPLIED, "m", "{}"), Row(f"twin {n}", REPLIED, "m", "{}")])
    ledger.add([Row("contested", REPLIED, "m", "{}")])
"""


def test_two_processes_write_at_once_and_nothing_is_lost(ledger):
    commands = [[sys.executable, "-c", WRITER, str(ledger.path), str(first)] for first in (0, 1000)]
    writers = [subprocess.Popen(command) for command in commands]
    ledger.add([row("mine")])
    assert [writer.wait(120) for writer in writers] == [0, 0]
    names = {f"{word} {first + n}" for word in ("key", "twin") for first in (0, 1000) for n in range(40)}
    assert {one["key"] for one in rows(ledger)} == {"mine", "contested", *names}
    with closing(sqlite3.connect(ledger.path)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_what_another_process_asked_meanwhile_is_taken_from_it(server, ledger):
    """A second engine answers all while the first has asked one: the first asks no other."""
    mine = server.engine(ledger=ledger, concurrency=1)(numbered(12))
    next(mine)
    list(server.engine(ledger=ledger)(numbered(12)))
    rest = dict(mine)
    assert len(rest) == 11 and sum(server.asked.values()) <= 12 + 3  # the one in flight and those that wait
    assert sum(reply.kept for reply in rest.values()) >= 8


def test_of_two_replies_to_one_question_the_first_stays(ledger):
    ledger.add([row("k", FAILED, error="X", attempts=3)])
    ledger.add([row("k", REPLIED, finish_reason="first", attempts=1)])
    ledger.add([row("k", REPLIED, finish_reason="second"), row("k", FAILED, error="Y"), row("j", REFUSED)])
    kept = ledger.get("k")
    assert kept is not None and (kept.outcome, kept.finish_reason, kept.attempts) == (REPLIED, "first", 4)
    assert ledger.get("j") is not None and ledger.get("none") is None


# --- limits -----------------------------------------------------------------------------------------------------------


def ask_to_the_limit(engine: OpenAIEngine, questions: list[Ask]) -> tuple[dict[int, Reply], str]:
    replies: dict[int, Reply] = {}
    try:
        replies |= dict(iter_into(replies, engine, questions))
    except BudgetReached as error:
        assert "\n" not in str(error)
        return replies, str(error)
    return replies, ""


def iter_into(replies: dict[int, Reply], engine: OpenAIEngine, questions: list[Ask]) -> Iterator[tuple[int, Reply]]:
    for place, reply in engine(questions):
        replies[place] = reply
        yield place, reply


def test_a_budget_of_requests_stops_cleanly_and_the_same_command_goes_on(server, ledger):
    given = 0
    for left in (15, 5, 0):
        engine = server.engine(ledger=ledger, max_requests=10)
        replies, told = ask_to_the_limit(engine, numbered(25))
        assert len(replies) == 25 - left and sum(not reply.kept for reply in replies.values()) == 25 - left - given
        given = 25 - left
        assert sum(server.asked.values()) == given and max(server.asked.values()) == 1
        if left:
            assert f"max_requests=10 is reached: {left} of {left + 10} questions were not sent" in told
            assert "the same command goes on" in told
            assert ask_to_the_limit(engine, numbered(25))[1]  # the engine's budget, not the call's
            assert sum(server.asked.values()) == given
        else:
            assert not told


def test_a_budget_of_money_stops_when_it_is_spent(server, ledger):
    engine = server.engine(ledger=ledger, max_cost=100e-6, prices=PRICES, concurrency=2)
    replies, told = ask_to_the_limit(engine, numbered(25))
    assert 7 <= len(replies) <= 8  # 7 x 15e-6 is more than 100e-6, one more may be in flight
    assert "max_cost=0.0001 (spent: 0.0001 USD) is reached" in told
    assert ledger.totals()["cost"] == pytest.approx(len(replies) * 15e-6) == pytest.approx(engine.spent)
    free = server.engine(ledger=ledger, max_cost=100e-6, prices=Prices(0.0, 0.0, "own"))
    assert not ask_to_the_limit(free, numbered(25))[1]
    with pytest.raises(UserError, match="max_cost needs prices"):
        server.engine(max_cost=1.0)


def test_a_budget_works_without_a_ledger(server):
    replies, told = ask_to_the_limit(server.engine(max_requests=3), numbered(5))
    assert len(replies) == 3 and "2 of 5 questions" in told


def test_failures_before_a_budget_are_told_too(server, ledger):
    server.answer = lambda prompt, before, body: BAD["html"] if prompt == "0" else completion("fine")
    told = ask_to_the_limit(server.engine(ledger=ledger, max_requests=3, retries=0), numbered(5))[1]
    assert "2 of 5" in told and "1 failed" in told and "id-0" in told


def arrivals(server: Server, answer: Answer | None = None) -> list[float]:
    times: list[float] = []

    def note(prompt: str, before: int, body: dict[str, Any]) -> Answer:
        times.append(time.monotonic())
        return completion("fine") if before or answer is None else answer

    server.answer = note
    return times


def test_requests_keep_their_distance_and_tries_again_count(server):
    times = arrivals(server, (429, {"Retry-After": "0"}, b""))
    engine = server.engine(requests_per_minute=1200, concurrency=8)  # 50 ms apart
    for _ in range(2):  # over two calls
        assert not ask_all(engine, numbered(4))[1]
    assert len(times) == 12 and times[-1] - times[0] > 0.9 * 0.05 * 10
    assert min(later - time for time, later in zip(times, times[3:], strict=False)) > 0.05


def test_tokens_keep_their_rate(server):
    start = time.monotonic()
    assert not ask_all(server.engine(tokens_per_minute=1200, concurrency=2), numbered(10))[1]  # 20 tokens a second
    assert time.monotonic() - start > 2.8  # 80 tokens, of which a second's worth is free


def test_without_limits_nothing_waits(server):
    def slow(*_: Any) -> Answer:
        time.sleep(0.05)
        return completion("fine")

    server.answer = slow
    assert not ask_all(server.engine(concurrency=8), numbered(16))[1]
    assert server.most_busy > 1


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 4096 + 200])
def test_a_damaged_file_is_told_with_the_fix(ledger, place):
    ledger.add([row(f"{n:040d}", error_text="x" * 200) for n in range(200)])
    ledger.close()
    data = bytearray(ledger.path.read_bytes())
    data[place : place + 3000] = b"\xff" * 3000
    ledger.path.write_bytes(data)
    with pytest.raises(UserError, match=r"ledger\.sqlite: the ledger is damaged .*\.recover.*move it away"):
        [Ledger(ledger.path).get(f"{n:040d}") for n in range(200)]
    assert ledger.path.read_bytes() == bytes(data)


def test_another_programs_database_is_not_written_to(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE replies (a)")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"ledger\.sqlite is no ledger of this version: move it away"):
        Ledger(path).add([row("k")])
    assert path.read_bytes() == before


def test_a_file_that_cannot_be_opened_is_told(tmp_path):
    (tmp_path / "ledger.sqlite").mkdir()
    with pytest.raises(UserError, match="cannot be read or written"):
        Ledger(tmp_path / "ledger.sqlite").get("k")


def test_a_ledger_that_fails_in_the_middle_stops_the_run_with_its_reason(server, ledger, monkeypatch):
    """No reply is given that is not on the disk."""
    add, calls = ledger.add, []

    def full(rows: Any) -> None:
        calls.append(rows)
        if len(calls) > 3:
            raise UserError("ledger.sqlite: disk full")
        add(rows)

    monkeypatch.setattr(ledger, "add", full)
    given = 0
    with pytest.raises(UserError, match="disk full"):
        for _ in server.engine(ledger=ledger, concurrency=2)(numbered(40)):
            given += 1
    assert 1 <= given <= ledger.totals()["replied"] < 10


def test_a_file_that_is_moved_away_in_the_middle_is_begun_anew(ledger):
    ledger.add([row("a")])
    for path in ledger.path.parent.glob("ledger.sqlite*"):
        path.unlink()
    ledger.add([row("b")])
    assert [one["key"] for one in rows(ledger)] == ["b"]


def test_it_can_be_read_without_us(server, ledger, tmp_path):
    list(server.engine(ledger=ledger, prices=PRICES)(asks("b", "a")))
    assert ledger.export(tmp_path / "all.jsonl") == 2
    lines = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(line["key"] for line in lines)
    assert {line["response"]["choices"][0]["message"]["content"] for line in lines} == {"a", "b"}
    assert {key_of(canonical(line["request"])) for line in lines} == {line["key"] for line in lines}
    totals = ledger.totals()
    assert (totals["requests"], totals["replied"], totals["completion_tokens"]) == (2, 2, 14)
    query = "SELECT outcome, error, count(*), sum(cost) FROM replies GROUP BY 1, 2"
    with closing(sqlite3.connect(ledger.path)) as database:
        assert database.execute(query).fetchall() == [("replied", None, 2, pytest.approx(30e-6))]
