"""A scripted vLLM: the endpoints that `engines/vllm.py` uses, around a tiny model, with faults to order.

It draws with our own generator, so that what comes through it can be compared with what the policy samples itself; it
reads prompt, images and adapters from what is sent to it alone.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from serving import closed_port

from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import core_of
from mmedexpert.models.deltas import apply_deltas_
from mmedexpert.models.encode import Encoder
from mmedexpert.models.generate import generate, prefill

Answer = tuple[int, Any]
Fault = Callable[[Answer], Answer | None]  # what becomes of an answer; None: the connection is closed without one


class ScriptedVllm:
    """Serves `model` as `name` at `url`. `faults` act on the next completions, one each; `silent` takes adapters and
    does not apply them; `raw` tells log-probabilities before temperature; `seen` are the bodies of completions."""

    def __init__(self, model: Any, encoder: Encoder, name: str, *, max_rank: int = 64, room: int = 4096) -> None:
        self.model, self.encoder, self.name, self.max_rank, self.room = model, encoder, name, max_rank, room
        self.port = closed_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.faults: list[Fault] = []
        self.silent = self.raw = False
        self.seen: list[dict[str, Any]] = []
        self.left: list[str] = []  # what a test found loaded at the end
        self.loaded: list[str] = []  # every adapter that ever was
        self.lock = threading.Lock()

    def __enter__(self) -> ScriptedVllm:
        self.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def start(self) -> None:
        """Come up, with no adapter, as a server does that was started again."""
        self.adapted, self.dead = {self.name: self.model}, False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                self.give(outer.get(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.give(outer.post(self.path, body))

            def give(self, answer: Answer | None) -> None:
                if answer is None or outer.dead:
                    self.close_connection = True
                    return
                status, body = answer
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            allow_reuse_address = daemon_threads = True

            def handle_error(self, *_: Any) -> None: ...  # a client that did not wait

        self.httpd = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.httpd.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Die, with all adapters and whatever is being answered."""
        self.dead = True
        self.httpd.shutdown()
        self.httpd.server_close()

    def get(self, path: str) -> Answer:
        if path == "/health":
            return 200, ""
        rows = [{"id": name, "max_model_len": self.room if name == self.name else None} for name in self.adapted]
        return 200, {"data": rows}

    def post(self, path: str, body: dict[str, Any]) -> Answer | None:
        if path == "/v1/unload_lora_adapter":
            self.adapted.pop(body["lora_name"], None)
            return 200, "Success"
        if path == "/v1/load_lora_adapter":
            return self.load(body["lora_name"], Path(body["lora_path"]))
        if body["model"] not in self.adapted:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if body.get("top_logprobs"):
            return 200, self.first(body)
        self.seen.append(body)
        answer: Answer | None = 200, self.complete(body)
        return self.faults.pop(0)(answer) if self.faults and answer else answer

    def load(self, name: str, folder: Path) -> Answer:
        if name in self.adapted:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        if not folder.is_dir():
            return 404, {"error": {"message": f"Loading lora {name} failed: No adapter found for {folder}"}}
        adapter = LoraAdapter.load(folder)
        if adapter.config["r"] > self.max_rank:
            return 500, {"error": {"message": f"LoRA rank {adapter.config['r']} is greater than max_lora_rank"}}
        model = copy.deepcopy(self.model)
        if not self.silent:
            apply_deltas_(model, ((one, adapter.delta(one)) for one in adapter.modules))
        self.adapted[name] = model
        self.loaded.append(name)
        return 200, "Success"

    def prompt(self, body: dict[str, Any]) -> Any:
        """The prompt of a chat, by this server's own tokenizer and image processor."""
        *before, user = body["messages"]
        self.encoder.system_prompt = before[0]["content"] if before else None
        parts = user["content"] if isinstance(user["content"], list) else [{"type": "text", "text": user["content"]}]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        return self.encoder.chat(parts[-1]["text"], [self.encoder.patches(image) for image in images])

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        with self.lock:
            prompt = self.prompt(body)
            drawn = generate(
                self.adapted[body["model"]], self.encoder, [prompt], max_new_tokens=body["max_tokens"],
                num_generations=body["n"], temperature=body["temperature"], end_ids=body["stop_token_ids"],
                banned_ids=[int(token) for token in body["logit_bias"]], seeds=[body["seed"]],
            )  # fmt: skip
        rows = zip(drawn.rows(), drawn.logps.tolist(), drawn.finished.tolist(), strict=True)
        choices = [
            {
                "index": place, "token_ids": ids, "finish_reason": "stop" if ended else "length",
                "logprobs": {"content": [{"logprob": logp} for logp in logps[: len(ids)]]},
                "message": {"role": "assistant", "content": self.encoder.decode(ids)},
            }
            for place, (ids, logps, ended) in enumerate(rows)
        ]  # fmt: skip
        return {"prompt_token_ids": prompt.input_ids, "choices": choices}

    @torch.no_grad()
    def first(self, body: dict[str, Any]) -> dict[str, Any]:
        model = self.adapted[body["model"]]
        with self.lock:
            last = prefill(model, self.encoder, [self.prompt(body)])[2]
            logits = core_of(model).lm_head(last)[0] / (1.0 if self.raw else body["temperature"])
        best = logits.log_softmax(-1).topk(body["top_logprobs"])
        tokens = [{"token": str(int(i)), "logprob": float(p)} for i, p in zip(best.indices, best.values, strict=True)]
        return {"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}


def refuses(answer: Answer) -> Answer:
    return 500, "Internal Server Error"


def half(answer: Answer) -> Answer:
    """One completion fewer than asked for."""
    return 200, {**answer[1], "choices": answer[1]["choices"][:-1]}


def cut(answer: Answer) -> Answer:
    """A completion without its last token."""
    first, *others = answer[1]["choices"]
    return 200, {**answer[1], "choices": [{**first, "token_ids": first["token_ids"][:-1]}, *others]}


def garbage(answer: Answer) -> Answer:
    return 200, "<html>"


def lost(answer: Answer) -> None:
    return None


def hangs(seconds: float) -> Fault:
    def wait(answer: Answer) -> Answer:
        time.sleep(seconds)
        return answer

    return wait
