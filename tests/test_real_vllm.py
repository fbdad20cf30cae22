"""Rollouts through a real vLLM: `MMEDEXPERT_VLLM="<command>" python -m pytest tests/test_real_vllm.py`.

The command is followed by a model folder and vLLM's options, and serves on $PORT (docs/vllm.md has one for a CPU).
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import closed_port
from test_vllm import World, equal

from mmedexpert.models.backbone import save_backbone
from mmedexpert.training.sampler import IN_PROCESS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        "MMEDEXPERT_VLLM" not in os.environ, reason="MMEDEXPERT_VLLM names no command that serves (docs/vllm.md)"
    ),
]
UPDATES = 4


class RealVllm:
    """A vLLM server of a folder, on a port that stays when it is started again."""

    def __init__(self, folder: Path, name: str, log: Path) -> None:
        self.folder, self.name, self.log, self.port = folder, name, log, closed_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            *shlex.split(os.environ["MMEDEXPERT_VLLM"]), str(self.folder), "--served-model-name", self.name,
            "--dtype", "float32", "--max-model-len", "512", "--enable-lora", "--max-lora-rank", "16",
            "--max-loras", "2", "--max-cpu-loras", "4", "--logprobs-mode", "processed_logprobs",
            "--generation-config", "vllm",
        ]  # fmt: skip
        told = {"PORT": str(self.port), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                command, env=os.environ | told, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + 600
        while True:
            try:
                if httpx.get(f"{self.url}/health", timeout=5).is_success:
                    return
            except httpx.TransportError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.5)

    def stop(self) -> None:
        """Kill it with all its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory):
    """A policy, its questions, and a real server of what it started from."""
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("real")

    def picture(seed: int, width: int, height: int) -> Any:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))

    save_backbone(root / "model", tiny[0], tiny[1])
    world = World(tiny, picture, root, count=0)
    server = RealVllm(root / "model", "start-abc", root / "log")
    server.start()
    world.servers = [server]  # type: ignore[list-item]
    yield world
    server.stop()


def test_greedy_completions_are_the_policys_own(real):
    """One a prompt: vLLM draws no two greedy ones."""
    options = {"num_generations": 4, "temperature": 0.0}
    own, through = real.sample(IN_PROCESS, **options), real.sample(real.served(timeout_s=300.0), **options)
    equal(own, through)


def test_log_probabilities_are_the_policys_to_1e_5(real):
    """Of what it samples at a temperature, with banned tokens, under four instructions."""
    rollout = real.sample(real.served(timeout_s=300.0))
    own = logps(real, rollout)
    mask = rollout.mask.bool()
    assert float((own - rollout.sampling_logps)[mask].abs().max()) < 1e-5
    assert len({tuple(row) for row in rollout.completions}) > 6


def test_answers_follow_the_adapter_through_updates_and_a_crash(real):
    """Four updates; the server is killed in the middle of the third and started again."""
    sampler, server, seen = real.served(timeout_s=300.0, patience_s=600.0), real.servers[0], []
    for update in range(UPDATES):
        real.learn(100 + update)
        if update == 2:

            def crash() -> None:
                time.sleep(0.3)
                server.stop()
                server.start()

            thread = threading.Thread(target=crash)
            thread.start()
        rollout = real.sample(sampler, seed=update, max_new_tokens=24)
        if update == 2:
            thread.join()
        apart = (logps(real, rollout) - rollout.sampling_logps)[rollout.mask.bool()].abs()
        assert float(apart.max()) < 2e-5, f"update {update}: the adapter that answers is not the policy's"
        seen.append(rollout.completions)
    assert all(one != other for one, other in pairwise(seen))


@torch.no_grad()
def logps(world: World, rollout: Any) -> torch.Tensor:
    """What the policy says of a rollout's completions, as the update computes it."""
    from mmedexpert.models.packing import pack, token_logps

    was_training = world.policy.training
    world.policy.eval()
    packed = pack(world.policy, world.encoder, rollout.prompts, rollout.completions)
    values, _, _ = token_logps(world.policy, packed, TEMPERATURE, banned_ids=world.encoder.banned_ids)
    world.policy.train(was_training)
    return packed.matrix(values, rollout.mask.shape[1])


TEMPERATURE = 1.3  # of World.sample
