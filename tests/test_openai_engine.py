"""The openai engine against a server that misbehaves on purpose, and against a real `transformers serve`."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serving import closed_port

from mmedexpert.data.images import open_image
from mmedexpert.engines.asking import Ask, Reply
from mmedexpert.engines.messages import data_url, messages_of
from mmedexpert.engines.openai import OpenAIEngine
from mmedexpert.engines.replies import reply_of
from mmedexpert.engines.sending import GONE
from mmedexpert.errors import UserError

Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: str | None, finish: str | None = "stop", **more: Any) -> Answer:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}, **more}
    usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
    return 200, {}, json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode()


def prompt_of(body: dict[str, Any]) -> str:
    content = body["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


class Server:
    """A chat server whose answers a test decides: `answer(prompt, how often it was asked before, body)`."""

    def __init__(self) -> None:
        self.answer: Callable[[str, int, dict[str, Any]], Answer] = lambda prompt, before, body: completion(prompt)
        self.models: Answer = (
            200,
            {},
            json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode(),
        )
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.quit = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.keys.add(self.headers["Authorization"])
                self.reply(outer.models if self.path == "/v1/models" else (404, {}, b"{}"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer.lock:
                    before = outer.asked[prompt_of(body)]
                    outer.asked[prompt_of(body)] += 1
                    outer.bodies.append(body)
                    outer.busy += 1
                    outer.most_busy = max(outer.most_busy, outer.busy)
                answer = outer.answer(prompt_of(body), before, body)
                with outer.lock:
                    outer.busy -= 1
                self.reply(answer)

            def reply(self, answer: Answer) -> None:
                status, headers, body = answer
                self.send_response(status)
                for name, value in (
                    {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
                ).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            request_queue_size = 64  # the default 5 would itself refuse connections

            def handle_error(self, *_: Any) -> None:  # a client that has given up
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def engine(self, **settings: Any) -> OpenAIEngine:
        plain: dict[str, Any] = {"concurrency": 4, "timeout_s": 5.0, "retries": 1, "max_new_tokens": 64}
        return OpenAIEngine(self.base_url, "m", **plain | settings)


@pytest.fixture()
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.quit.set()
    server.http.shutdown()
    server.http.server_close()


def asks(*texts: str) -> list[Ask]:
    return [Ask(f"id-{text}", text, ()) for text in texts]


def ask_all(engine: OpenAIEngine, questions: list[Ask]) -> tuple[dict[int, Reply], str]:
    """The replies by place, and the text of the error at the end."""
    replies: dict[int, Reply] = {}
    try:
        for place, reply in engine(questions):
            assert place not in replies
            replies[place] = reply
    except UserError as error:
        assert "\n" not in str(error)
        return replies, str(error)
    return replies, ""


def test_every_question_gets_its_own_reply_and_is_asked_once_several_at_a_time(server):
    def answer(prompt: str, before: int, body: dict[str, Any]) -> Answer:
        time.sleep(0.03 if int(prompt) % 3 else 0.12)  # replies overtake one another
        return completion(f"about {prompt}")

    server.answer = answer
    questions = asks(*(str(number) for number in range(40)))
    order = [(place, reply.text) for place, reply in server.engine()(questions)]
    assert sorted(order) == [(place, f"about {place}") for place in range(40)]
    assert [place for place, _ in order] != list(range(40))
    assert set(server.asked.values()) == {1}
    assert 1 < server.most_busy <= 4


def test_what_is_sent_is_greedy_and_no_key_of_the_environment_leaves(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    list(server.engine(system_prompt="Be brief.", max_new_tokens=9)(asks("q")))
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"], body["logprobs"]) == ("m", 0.0, 9, True)
    assert body["frequency_penalty"] == 0.0  # what `transformers serve` derives its repetition penalty from
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    list(server.engine(api_key="mine")(asks("q")))
    assert server.keys == {"Bearer none", "Bearer mine"}


def test_replies_carry_tokens_finish_reason_logprobs_and_thoughts(server):
    logprobs = {
        "content": [{"token": t, "logprob": p, "bytes": None, "top_logprobs": []} for t, p in (("a", -1), ("b", -2))]
    }
    thought = {"message": {"role": "assistant", "content": "B", "reasoning_content": "hm"}}
    answers = {
        "long": completion("cut", "length"), "likely": completion("ab", logprobs=logprobs), "empty": completion(""),
        "none": completion(None), "huge": completion("x" * 100_000), "thinks": completion("B", **thought),
        "half": completion("a\ud800b"),
    }  # fmt: skip
    server.answer = lambda prompt, before, body: answers[prompt]
    questions = asks(*answers)
    replies, error = ask_all(server.engine(), questions)
    found = {questions[place].text: reply for place, reply in replies.items()}
    assert not error
    assert (found["long"].finish_reason, found["empty"].finish_reason) == ("length", "stop")
    assert found["likely"].mean_logp == -1.5 and found["long"].mean_logp is None
    assert (found["empty"].text, found["none"].text, found["empty"].tokens) == ("", "", 7)
    assert found["huge"].text == "x" * 100_000
    assert found["thinks"].text == "<think>hm</think>B"
    assert found["half"].text == "a?b"


@pytest.mark.parametrize("status", [500, 503, 408])
def test_a_passing_fault_is_tried_again(server, status):
    server.answer = lambda prompt, before, body: completion("fine") if before else (status, {}, b"{}")
    replies, error = ask_all(server.engine(), asks("a", "b"))
    assert [reply.text for reply in replies.values()] == ["fine", "fine"] and not error
    assert server.asked == {"a": 2, "b": 2}


def test_retry_after_is_obeyed(server):
    times: list[float] = []

    def answer(prompt: str, before: int, body: dict[str, Any]) -> Answer:
        times.append(time.monotonic())
        return completion("fine") if before else (429, {"Retry-After": "1.2"}, b"{}")

    server.answer = answer
    replies, error = ask_all(server.engine(), asks("a"))
    assert replies[0].text == "fine" and not error
    assert 1.1 < times[1] - times[0] < 10


def test_a_hang_is_cut_off_and_tried_again(server):
    def answer(prompt: str, before: int, body: dict[str, Any]) -> Answer:
        if not before:
            server.quit.wait(20)
        return completion("fine")

    server.answer = answer
    start = time.monotonic()
    replies, error = ask_all(server.engine(timeout_s=0.4), asks("a"))
    assert replies[0].text == "fine" and not error
    assert time.monotonic() - start < 15  # not the 20 s that the server takes


BAD = {
    "html": (200, {"Content-Type": "text/html"}, b"<html><body>Maintenance</body></html>"),
    "html as json": (200, {}, b"<html></html>"),
    "half": (200, {}, b'{"id": "x", "choices": [{"fini'),
    "short": (200, {"Content-Length": "5000"}, b'{"id": "x", "choices": ['),
    "other": (200, {}, b'{"hello": 1}'),
    "list": (200, {}, b"[1, 2]"),
    "null": (200, {}, b"null"),
    "no choice": (200, {}, b'{"choices": []}'),
    "number": completion(17),  # type: ignore[arg-type]
    "error as 200": (200, {}, b'{"error": {"message": "out of memory"}}'),
    "aborted": completion("par", "abort"),
    "unfinished": completion("par", None),
    "bytes": (200, {}, b"\xff\xfe\x00"),
    "deep": (200, {}, b"[" * 100_000),
    "always 500": (500, {}, b"boom"),
    "always 429": (429, {"Retry-After": "0"}, b"busy"),
}
REFUSED = (400, {}, b'{"error": {"message": "context length exceeded"}}')


def test_what_still_fails_is_left_out_and_counted_and_the_rest_goes_on(server):
    server.answer = lambda prompt, before, body: BAD.get(prompt, completion("fine"))
    questions = asks("good 1", *BAD, "good 2", "good 3")
    replies, error = ask_all(server.engine(), questions)
    assert {questions[place].text for place in replies} == {"good 1", "good 2", "good 3"}
    assert f"{len(BAD)} of {len(questions)} questions" in error and server.base_url in error
    assert "id-" in error and "same command" in error


def test_the_first_reason_is_told(server):
    server.answer = lambda prompt, before, body: BAD["always 500"]
    assert "id-a" in (error := ask_all(server.engine(retries=0), asks("a"))[1]) and "500 boom" in error


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_a_question_refused_for_good_is_a_reply_with_its_reason_and_asked_once(server, status):
    server.answer = lambda prompt, before, body: (status, {}, REFUSED[2]) if prompt == "a" else completion("fine")
    replies, error = ask_all(server.engine(), asks("a", "b"))
    refused = replies[0]
    assert not error and replies[1].refused == "" and server.asked["a"] == 1
    assert (refused.text, refused.tokens, refused.finish_reason, refused.mean_logp) == ("", 0, "refused", None)
    assert refused.refused.startswith(f"{status} ") and "context length exceeded" in refused.refused


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 503])
def test_a_server_that_is_overloaded_or_wrong_refuses_no_question(server, status):
    server.answer = lambda prompt, before, body: (
        (status, {"Retry-After": "0"}, b"{}") if prompt == "a" else completion("")
    )
    replies, error = ask_all(server.engine(retries=0), asks("a", "b"))
    assert set(replies) == {1} and "1 of 2 questions" in error and str(status) in error


def test_no_message_or_reply_tells_a_password(server):
    with_password = server.base_url.replace("://", "://me:s3cret@") + "?api_key=s3cret"
    engine = OpenAIEngine(with_password, "m", retries=0)
    assert engine.address == server.base_url.replace("://", "://***@") + "?api_key=***"
    told = []
    for models in ((401, {}, b"{}"), (404, {}, b"{}"), (200, {}, b"[]"), (200, {}, b'{"data": [{"id": "n"}]}')):
        server.models = models
        with pytest.raises(UserError) as caught:
            list(OpenAIEngine(server.base_url.replace("://", "://me:s3cret@"), "m", retries=0)(asks("a")))
        told.append(str(caught.value))
    server.models = (200, {}, b'{"data": [{"id": "m"}]}')
    for status in (400, 500):
        server.answer = lambda prompt, before, body, status=status: (status, {}, b"see http://me:s3cret@host/help")
        replies, error = ask_all(
            OpenAIEngine(server.base_url.replace("://", "://me:s3cret@"), "m", retries=0), asks("a")
        )
        told += [error, *(reply.refused for reply in replies.values())]
    with pytest.raises(UserError) as caught:
        OpenAIEngine("me:s3cret@localhost:8000/v1", "m")
    with pytest.raises(UserError) as gone:
        list(OpenAIEngine(f"http://me:s3cret@127.0.0.1:{closed_port()}/v1", "m", retries=0)(asks("a")))
    told += [str(caught.value), str(gone.value)]
    assert len("".join(told)) > 300 and "s3cret" not in "".join(told), told


def test_a_server_that_goes_away_is_not_asked_for_each_of_many_questions(server):
    server.answer = lambda prompt, before, body: completion("fine") if int(prompt) < 5 else BAD["html"]
    questions = asks(*(str(number) for number in range(500)))
    replies, error = ask_all(server.engine(), questions)
    assert set(replies) == set(range(5))
    assert (
        sum(server.asked.values()) <= 5 + GONE + 3 * 4
    )  # in flight at the last success, in a row, in flight at the end
    assert "495 of 500" in error and "not sent" in error


def test_questions_that_are_at_fault_themselves_do_not_stop_the_others(server, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    server.answer = lambda prompt, before, body: REFUSED if int(prompt) < 60 else completion("fine")
    broken = [Ask(f"b{n}", "999", (tmp_path / "broken.png",)) for n in range(40)]
    replies, error = ask_all(server.engine(), asks(*(str(n) for n in range(60))) + broken + asks("60", "61"))
    assert set(replies) == set(range(102)) and not error
    assert {place for place, reply in replies.items() if not reply.refused} == {100, 101}
    assert "truncated or damaged" in replies[60].refused or "not an image" in replies[60].refused


def test_a_server_that_refuses_logprobs_is_asked_without(server):
    refuse = (400, {}, b'{"error": {"message": "logprobs are not supported"}}')
    server.answer = lambda prompt, before, body: refuse if "logprobs" in body else completion("fine")
    replies, error = ask_all(server.engine(), asks(*"abcdefgh"))
    assert len(replies) == 8 and not error
    assert {reply.mean_logp for reply in replies.values()} == {None}
    assert sum("logprobs" in body for body in server.bodies) <= 4


def test_no_server_is_told_at_once():
    url = f"http://127.0.0.1:{closed_port()}/v1"
    start = time.monotonic()
    with pytest.raises(UserError, match=f"no server answers at {url}.*start the server"):
        list(OpenAIEngine(url, "m")(asks("a")))
    assert time.monotonic() - start < 20  # not the tries of a server that may come back


def test_a_base_url_without_scheme_is_told():
    with pytest.raises(UserError, match="http://localhost:8000/v1"):
        OpenAIEngine("localhost:8000/v1", "m")


@pytest.mark.parametrize(
    ("models", "told"),
    [
        ((401, {}, b'{"error": {"message": "bad key"}}'), "api_key.*bad key"),
        ((404, {}, b"{}"), "/v1"),
        ((200, {"Content-Type": "text/html"}, b"<html>login</html>"), "no OpenAI-compatible server"),
        ((200, {}, b"<html>login</html>"), "no OpenAI-compatible server"),
        ((200, {}, b'{"data": [{"id":'), "no OpenAI-compatible server"),
        ((200, {}, b"[]"), "no OpenAI-compatible server"),
        ((200, {}, b'{"data": null}'), "no OpenAI-compatible server"),
        ((200, {}, b'{"data": [{"id": "n1"}, {"id": "n2"}]}'), "does not serve 'm' but n1, n2"),
    ],
)
def test_a_wrong_server_is_told_before_any_question(server, models, told):
    server.models = models
    with pytest.raises(UserError, match=told) as caught:
        list(server.engine(retries=0)(asks("a")))
    assert "\n" not in str(caught.value)
    assert not server.asked


def test_a_local_folder_that_the_server_does_not_list_is_tried(server, tmp_path):
    for answer, works in ((completion("fine"), True), ((400, {}, b'{"detail": "pinned to other"}'), False)):
        server.answer = lambda prompt, before, body, answer=answer: answer
        engine = OpenAIEngine(server.base_url, str(tmp_path), retries=0)
        if works:
            assert [reply.text for _, reply in engine(asks("a"))] == ["fine"]
        else:
            with pytest.raises(UserError, match=r"does not serve .*pinned to other.* but m"):
                list(engine(asks("a")))


def test_nothing_is_asked_for_no_questions():
    assert list(OpenAIEngine(f"http://127.0.0.1:{closed_port()}/v1", "m")([])) == []


def test_few_questions_are_taken_ahead_of_the_reader(server):
    replies = server.engine()(asks(*(str(number) for number in range(200))))
    next(replies)
    time.sleep(0.5)
    assert sum(server.asked.values()) <= 1 + 2 * 4 + 1  # the one taken, those waiting, those in flight
    replies.close()


INTERRUPTED = """
import sys
from mmedexpert.engines.asking import Ask
from mmedexpert.engines.openai import OpenAIEngine
engine = OpenAIEngine(sys.argv[1], "m", concurrency=4, timeout_s=60)
for place, reply in engine([Ask(str(n), str(n), ()) for n in range(50)]):
    print(place, reply.text, flush=True)
"""


def test_ctrl_c_ends_at_once_and_keeps_what_was_yielded(server):
    def answer(prompt: str, before: int, body: dict[str, Any]) -> Answer:
        if int(prompt) >= 3:
            server.quit.wait(30)
        return completion("fine")

    server.answer = answer
    command = [sys.executable, "-c", INTERRUPTED, server.base_url]
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs are told to ignore it
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens
    ) as process:
        lines = {process.stdout.readline().strip() for _ in range(3)}
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert lines == {"0 fine", "1 fine", "2 fine"}
    assert time.monotonic() - start < 15  # not the 30 s that the server takes
    assert "KeyboardInterrupt" in errors and "never awaited" not in errors


HALF_READ = """
import sys
from mmedexpert.engines.asking import Ask
from mmedexpert.engines.openai import OpenAIEngine
replies = OpenAIEngine(sys.argv[1], "m", concurrency=2)([Ask(str(n), str(n), ()) for n in range(50)])
print(next(replies)[0], flush=True)
"""


def test_a_half_read_run_does_not_keep_the_program_from_ending(server):
    server.answer = lambda prompt, before, body: (
        completion("fine") if prompt == "0" or server.quit.wait(80) else BAD["null"]
    )
    command = [sys.executable, "-c", HALF_READ, server.base_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_replies_that_nobody_waits_for_are_dropped(server):
    replies = server.engine()(asks(*(str(number) for number in range(200))))
    next(replies)
    del replies
    deadline = time.monotonic() + 30
    while any("portal" in thread.name for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any("portal" in thread.name for thread in threading.enumerate())


# --- images -----------------------------------------------------------------------------------------------------------


def decoded(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_plain_png_and_jpeg_go_as_they_are(tmp_path, picture):
    for name, kind in (("a.png", "png"), ("b.jpg", "jpeg"), ("png inside.jpg", "png")):
        picture(1).save(tmp_path / name, kind.upper())
        url = data_url(tmp_path / name)
        assert url.startswith(f"data:image/{kind};base64,")
        assert base64.b64decode(url.partition(",")[2]) == (tmp_path / name).read_bytes()


def save_odd(path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    if kind == "16 bit":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 200).save(path, "PNG")
    elif kind == "transparent":
        Image.fromarray(noise, "RGBA").save(path, "PNG")
    elif kind == "one colour transparent":
        Image.fromarray(noise[..., 0] // 64).save(path, "PNG", transparency=1)
    elif kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(noise[..., :3]).save(path, "JPEG", exif=exif)
    else:
        Image.fromarray(noise[..., :3]).save(path, kind)


@pytest.mark.parametrize(
    "kind", ["16 bit", "transparent", "one colour transparent", "turned", "BMP", "TIFF", "WEBP", "GIF"]
)
def test_other_images_go_as_the_other_engine_sees_them(tmp_path, kind):
    save_odd(tmp_path / "image", kind)
    sent = decoded(data_url(tmp_path / "image"))
    assert sent.format == "PNG"
    assert np.array_equal(np.asarray(sent), np.asarray(open_image(tmp_path / "image")))


def test_a_missing_image_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no\.png is missing"):
        data_url(tmp_path / "no.png")


@given(count=st.integers(0, 4), text=st.text(max_size=20))
@settings(max_examples=20, deadline=None)
def test_several_images_are_announced_and_one_is_not(tmp_path_factory, count, text):
    path = tmp_path_factory.getbasetemp() / "one.png"
    if not path.exists():
        Image.new("RGB", (4, 4)).save(path)
    [message] = messages_of(Ask("a", text, (path,) * count), "")
    if not count:
        assert message["content"] == text
        return
    kinds = [part["type"] for part in message["content"]]
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert kinds.count("image_url") == count
    assert texts == ([f"<image_{n + 1}>: " for n in range(count)] if count > 1 else []) + [text]
    assert kinds == (["text", "image_url"] * count if count > 1 else ["image_url"] * count) + ["text"]


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
@settings(max_examples=50, deadline=None)
def test_no_malformed_body_is_taken_for_an_answer(body):
    with pytest.raises(ValueError):
        reply_of(body, 0.0)


# --- a real server ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_transformers_serve_answers_questions_about_images(real_server, tmp_path, picture):
    for place in range(2):
        picture(place).save(tmp_path / f"{place}.png")
    images = [(), (tmp_path / "0.png",), (tmp_path / "0.png", tmp_path / "1.png")]
    questions = [Ask(str(n), "what is this", images[n % 3]) for n in range(6)]
    engine = OpenAIEngine(real_server.base_url, real_server.model, max_new_tokens=4, concurrency=3, timeout_s=60)
    replies, error = ask_all(engine, questions)
    assert not error, (error, real_server.log.read_text()[-3000:])
    assert set(replies) == set(range(6))
    assert all(1 <= reply.tokens <= 4 and reply.seconds > 0 for reply in replies.values())
    assert [replies[n].text for n in range(3)] == [replies[n].text for n in range(3, 6)]  # greedy
    with pytest.raises(UserError, match="does not serve 'other/model'"):
        list(OpenAIEngine(real_server.base_url, "other/model", retries=0)(questions))
