"""Several devices: two gloo processes give the loss and gradients of one, and a command leaves one folder."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT, run, words
from conftest import long
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import multiprocessing
from vllm_server import ScriptedVllm

from mmedexpert.checks import typed
from mmedexpert.data.record import Record
from mmedexpert.engines.vllm import Servers
from mmedexpert.errors import UserError
from mmedexpert.models.backbone import add_lora
from mmedexpert.models.packing import token_logps
from mmedexpert.stages import common
from mmedexpert.training.batches import Samples, share
from mmedexpert.training.fit import fit, trained_weights
from mmedexpert.training.gba import GbaModule, Objective, rollout_stream
from mmedexpert.training.grading import RulesGrader
from mmedexpert.training.rollouts import Guidance, Rollout, Sampling, roll_out
from mmedexpert.training.sampler import IN_PROCESS, Sampler, Served
from mmedexpert.training.sft import SftModule

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
TRAINING = {"lr": 0.01, "weight_decay": 0.0, "seed": 0, "warmup_ratio": 0.0, "max_grad_norm": 1e9}
CASES = ("dsa", "grpo", "dapo")
NAME = "start-two"
BUDGET = 70  # tokens: several micro-batches, more of them on the rank that has more prompts


def policy_of(tiny: Any) -> Any:
    """A LoRA away from its start, with gradient checkpointing, which FSDP2 must get along with."""
    model = add_lora(
        copy.deepcopy(tiny[0]), r=4, alpha=8, dropout=0.0, target_modules=TARGETS, gradient_checkpointing=True, seed=0
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return model


def samples(encoder: Any, pictures: list[Any]) -> list[tuple[Any, list[int]]]:
    """Five samples of three images: an image may be on both ranks."""
    images = [encoder.patches(picture) for picture in pictures]
    texts = ["heart rate is low", "the heart rate is high so a b c", "adult", "child 1 2 3 4 5", "within"]
    answers = [[11, 12, 13], [21] * 9, [31, 32], [41, 42, 43, 44, 45, 46], [51]]
    return [(encoder.chat(text, [images[n % 3]]), answers[n]) for n, text in enumerate(texts)]


def given_rollout(encoder: Any, pictures: list[Any]) -> Rollout:
    """Three prompts with four completions of different lengths each, some of them cut off."""
    draw = torch.Generator().manual_seed(1)
    prompts = [prompt for prompt, _ in samples(encoder, pictures)[:3] for _ in range(4)]
    lengths = torch.randint(1, 8, (12,), generator=draw)
    mask = (torch.arange(7) < lengths[:, None]).long()
    completions = [torch.randint(10, 60, (int(n),), generator=draw).tolist() for n in lengths]
    return Rollout(
        prompts, completions, ["text"] * 12, [None] * 12, torch.zeros(12, 7), mask, lengths < 7,
        torch.rand(3, 4, generator=draw), {"accuracy": [0.0] * 12}, torch.full((3, 4, 4), torch.nan),
        torch.zeros(3, 4, 4), torch.full((3, 4), torch.nan), torch.zeros(3, 4), torch.randn(3, 4, generator=draw),
        {"gen": 0.0, "reward": 0.0},
    )  # fmt: skip


def gba_module(policy: Any, encoder: Any, loss_type: Any, *, masks: bool = True) -> GbaModule:
    objective = Objective(
        loss_type, epsilon=0.2, epsilon_high=None, beta=0.1, temperature=1.0, max_completion_length=7,
        mask_truncated_completions=masks,
    )  # fmt: skip
    return GbaModule(policy, encoder, objective, steps=2, micro_batch_tokens=BUDGET, **TRAINING)


def update(case: str, tiny: Any, pictures: list[Any], folder: Path, rank: int = 0, **devices: Any) -> dict[str, Any]:
    """Two steps of plain gradient descent: the weights at the end, and what was logged."""
    policy, encoder, ranks = policy_of(tiny), tiny[1], devices.get("devices", 1)
    batch: Any
    if case == "dsa":
        batch = Samples(*zip(*share(samples(encoder, pictures), rank, ranks), strict=True))
        module: Any = SftModule(policy, encoder, steps=2, micro_batch_tokens=BUDGET, **TRAINING)
    else:
        batch = given_rollout(encoder, pictures).take(share(range(3), rank, ranks))
        module = gba_module(policy, encoder, case)
    module.optimizer = lambda: torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.5)
    folder /= f"{case}-{devices.get('strategy')}"
    fit(module, lambda step: itertools.repeat(batch), folder=folder, checkpoint_every=9, accelerator="cpu", **devices)
    numbers = {name: torch.as_tensor(value).float() for name, value in module.trainer.callback_metrics.items()}
    return trained_weights(policy) | numbers


def resumed(tiny: Any, pictures: list[Any], folder: Path, rank: int, **devices: Any) -> list[dict[str, Any]]:
    """The weights of a run of four steps, and of one that was broken off after its checkpoint."""
    batch = Samples(*zip(*share(samples(tiny[1], pictures), rank, 2), strict=True))

    def train(stop: int | None, name: str) -> dict[str, Any]:
        def stream(step: int) -> Any:
            for number in itertools.count(step):
                if number == stop:
                    raise KeyError("broken off")
                yield batch

        policy = policy_of(tiny)
        module = SftModule(policy, tiny[1], steps=4, **TRAINING)
        (folder / name).mkdir(exist_ok=True)
        fit(module, stream, folder=folder / name, checkpoint_every=2, accelerator="cpu", **devices)
        return trained_weights(policy)

    whole = train(None, "a")
    with pytest.raises(KeyError):
        train(3, "b")
    assert (folder / "b/last.ckpt").exists()
    return [whole, train(None, "b")]


def sampled(tiny: Any, root: Path, sampler: Sampler = IN_PROCESS, **devices: Any) -> str:
    """What the completions of three prompts say, before and after an update."""
    policy, encoder, said = policy_of(tiny), tiny[1], []
    records = [
        Record(
            id=str(n), images=(f"{n}.png",), question="heart rate" + " is low" * n, options={"A": "high", "B": "low"},
            answer="A", specialties=("x",), source="s", license="l", split="train", image_group=str(n),
        )
        for n in range(3)
    ]  # fmt: skip

    def sample(batch: list[Record], seeds: list[int]) -> Rollout:
        return roll_out(
            policy, encoder, batch, root, sampling=Sampling(4, 6, 1.0, 1.0, 0), protocol="robust",
            grader=RulesGrader(), guidance=Guidance((0.0,) * 4, 1.0, "none", "free", "group"),
            reward_weights={"accuracy": 1.0, "format": 0.2}, seeds=seeds, sampler=sampler,
        )  # fmt: skip

    def reward(texts: list[str], **_: Any) -> tuple[list[float], dict[str, list[float]]]:
        scores = [float(len(text) % 7) for text in texts]
        return scores, {"accuracy": scores, "format": scores}

    module = gba_module(policy, encoder, "grpo", masks=False)  # six tokens end in nothing
    stream = rollout_stream(
        records, sample, prompts_per_step=3, num_iterations=1, seed=0,
        watch=lambda number, batch, rollout: said.extend([*rollout.texts, *(record.id for record in batch)]),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmedexpert.training.rewards.outcome", reward)
        folder = root / f"sampled-{devices.get('strategy')}-{type(sampler).__name__}"
        before = {name: weight.clone() for name, weight in trained_weights(policy).items()}
        fit(module, stream, folder=folder, checkpoint_every=9, accelerator="cpu", **devices)
    after = trained_weights(policy)
    assert any(not torch.equal(after[name], weight) for name, weight in before.items()), "there was no update"
    return "\n".join(said)


def short_of_memory(at: int) -> Any:
    """`token_logps` that runs out of memory at one call."""
    calls = itertools.count(1)

    def look(model: Any, packed: Any, *given: Any, **named: Any) -> Any:
        if next(calls) == at:
            raise torch.OutOfMemoryError
        return token_logps(model, packed, *given, **named)

    return look


def work(rank: int, port: int, folder: Path, tiny: Any, pictures: list[Any], url: str) -> None:
    """One of two ranks: every case under both strategies."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    Fabric(accelerator="cpu", devices=2, strategy="ddp").launch()
    for strategy in ("ddp", "fsdp"):
        devices: dict[str, Any] = {"devices": 2, "strategy": strategy}
        for case in CASES:
            found = update(case, tiny, pictures, folder, rank, **devices)
            save_file(found, folder / f"{case}-{strategy}-{rank}.safetensors")
        if strategy == "ddp":  # the second rank alone runs out of memory, in its second step
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:
                    patch.setattr("mmedexpert.training.sft.token_logps", short_of_memory(at=2))
                patch.setattr(f"{__name__}.BUDGET", "auto")
                found = update("dsa", tiny, pictures, folder / "auto", rank, **devices)
            save_file(found, folder / f"auto-{rank}.safetensors")
        whole, again = resumed(tiny, pictures, folder / strategy, rank, **devices)
        assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)
        texts = sampled(tiny, folder, **devices)
        (folder / f"texts-{strategy}-{rank}").write_text(texts, encoding="utf-8")
        servers = Servers([url], NAME, timeout_s=60, patience_s=60)
        through = Served(servers, folder / "served" / strategy, "two", lambda: 100)
        texts = sampled(tiny, folder, through, **devices)
        (folder / f"texts-{strategy}-served-{rank}").write_text(texts, encoding="utf-8")
        through.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def two(tiny: Any, tmp_path_factory: Any) -> tuple[Path, list[Any]]:
    """The folder in which two ranks have left what they found, and their images."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("two")
    noise = [np.random.default_rng(n).integers(0, 255, (56, 56, 3), dtype=np.uint8) for n in range(3)]
    pictures = [Image.fromarray(pixels) for pixels in noise]
    for n, picture in enumerate(pictures):
        picture.save(folder / f"{n}.png")
    for strategy in ("ddp", "fsdp"):
        (folder / strategy).mkdir()
    model = copy.deepcopy(tiny[0])
    with ScriptedVllm(model, copy.deepcopy(tiny[1]), NAME) as server:
        multiprocessing.spawn(work, (free_port(), folder, tiny, pictures, server.url), nprocs=2)
        (folder / "loaded").write_text(json.dumps([server.loaded, [*server.adapted]]))
    return folder, pictures


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_take_the_steps_of_one(two, tiny, tmp_path, case, strategy):
    """Unequal shares and numbers of micro-batches, two updates; loss, gradients and what is logged."""
    folder, pictures = two
    start, one = trained_weights(policy_of(tiny)), update(case, tiny, pictures, tmp_path)
    first, second = (load_file(folder / f"{case}-{strategy}-{rank}.safetensors") for rank in range(2))
    moved = torch.cat([(one[name] - start[name]).flatten() for name in start])
    for other in (first, second):
        apart = torch.cat([(other[name] - one[name]).flatten() for name in start])
        assert moved.norm() > 0 and apart.norm() / moved.norm() <= 1e-5
    logged = set(one) - set(start)
    timed = {name for name in logged if name.startswith(("timing_s", "perf")) or name == "step_time"}
    assert set(first) - set(start) == logged and {"loss", "entropy", "grad_norm"} <= logged
    for name in logged - timed:
        assert torch.allclose(first[name], one[name], rtol=1e-4, atol=1e-6, equal_nan=True), name


def test_ranks_agree_on_smaller_passes_where_one_of_them_has_no_room(two, tiny, tmp_path):
    """In the second step of two, which is that of one rank all the same; both say how often."""
    folder, pictures = two
    start, one = trained_weights(policy_of(tiny)), update("dsa", tiny, pictures, tmp_path)
    for rank in range(2):
        other = load_file(folder / f"auto-{rank}.safetensors")
        apart, moved = (
            torch.cat([(values[name] - before[name]).flatten() for name in start])
            for values, before in ((other, one), (one, start))
        )
        assert apart.norm() / moved.norm() <= 1e-5
        assert other["memory/halved"] == 1 and other["memory/micro_batch_tokens"] > 0


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_servers_answer_all_ranks_as_one_policy(two, strategy):
    """Rank 0 alone sends the adapters, before and after the update, and takes them back."""
    folder, _ = two
    for rank in range(2):
        own, served = ((folder / f"texts-{strategy}-{kind}{rank}").read_text() for kind in ("", "served-"))
        assert served == own
    loaded, left = json.loads((folder / "loaded").read_text())
    assert left == [NAME]
    assert len(loaded) == 6 and len({name.rpartition("-v")[0] for name in loaded}) == 2  # probe and two, by strategy
    assert not list((folder / "served" / strategy).glob("*"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_completions_do_not_depend_on_the_number_of_ranks(two, tiny, strategy):
    """Also where weights are sharded, and ranks decode different numbers of tokens."""
    folder, _ = two
    # of the other strategy: it would go on from there
    shutil.rmtree(folder / "sampled-None-InProcess", ignore_errors=True)
    texts = sampled(tiny, folder)
    for rank in range(2):
        assert (folder / f"texts-{strategy}-{rank}").read_text(encoding="utf-8") == texts
    assert len(set(texts.split("\n"))) > 12


SMALL = ("specialty=cardiology", "pretrain.reading_steps=1", "pretrain.looking_steps=1",
         "data.source.train=8", "data.source.val=4", "dsa.steps=3")  # fmt: skip
BOTH = ("trainer=ddp", "trainer.devices=2")


def test_one_command_on_two_ranks_leaves_one_folder(tmp_path):
    done = run(tmp_path, "stage=dsa", *SMALL, *BOTH, logger="csv", process=True)
    assert done.stdout.count("Runs") == 1 and done.stderr.count("->") == 3, done.stdout + done.stderr
    (folder,) = (tmp_path / "dsa").glob("cardiology-*")
    files = sorted(path.name for path in folder.iterdir())
    assert [name for name in files if name != "csv"] == [
        "DONE", "adapter", "config.yaml", "identity.json", "manifest.json", "metrics.json", "steps.jsonl",
    ]  # fmt: skip
    assert "devices" not in (folder / "identity.json").read_text()  # the same folder whatever their number


@long
def test_a_rank_that_fails_is_told_by_the_first(tmp_path):
    failing = tmp_path / "failing.py"
    failing.write_text(
        "import os\n"
        "from mmedexpert.training.sft import SftModule\n"
        "step = SftModule.training_step\n"
        "def training_step(self, samples, batch_idx):\n"
        "    if batch_idx == 1 and os.environ['LOCAL_RANK'] == '1':\n"
        "        raise KeyError('of one rank')\n"
        "    step(self, samples, batch_idx)\n"
        "SftModule.training_step = training_step\n"
        f"path = {str(ROOT / 'run.py')!r}\n"
        "exec(compile(open(path).read(), path, 'exec'))\n"
    )
    given = words(tmp_path, "stage=dsa", *SMALL, *BOTH, "dsa.lr=0.002")
    done = subprocess.run([sys.executable, str(failing), *given], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "rank 1: KeyError: 'of one rank'" in line
    (failed,) = (tmp_path / "dsa").glob("cardiology-*/FAILED")
    assert "of one rank" in (failed.parent / "traceback.txt").read_text() and not (failed.parent / "DONE").exists()


def composed(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return typed(compose("config", [*overrides, "trainer.accelerator=cpu"]))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (("trainer.devices=3", "gba.prompts_per_step=2"), "gba.prompts_per_step=2 leaves some of 3 devices"),
        (("trainer.devices=0",), "trainer.devices=0 must be above 0"),
        (("trainer=fsdp", "trainer.devices=2", "gba.dynamic_sampling=2"), "use trainer.strategy=ddp, or gba.dyn"),
    ],
)
def test_devices_that_do_not_fit_are_told_at_once(overrides, told):
    with pytest.raises(UserError, match=told):
        common.launch(composed(*overrides))


def test_a_rank_that_trains_shards_loads_none_of_the_rest(monkeypatch, tiny, tmp_path):
    """Under FSDP2 weights stay in their file until each rank has taken its own, with a GPU too; all else as it was."""
    from mmedexpert.models.backbone import load_model, save_backbone

    config = composed("trainer=fsdp", "trainer.devices=2")
    monkeypatch.setattr(common, "device_of", lambda config: "cuda")
    assert common.loading(config, trained=True).device == "cuda"  # one rank alone
    monkeypatch.setattr(common, "ranks", lambda: 2)
    assert common.loading(config).device == "cuda"
    assert common.loading(composed("trainer=ddp"), trained=True).device == "cuda"
    loading = common.loading(config, trained=True)
    assert loading.device == "cpu"
    save_backbone(tmp_path, *tiny)
    model, maps = load_model(tmp_path, loading), Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no list of mapped files")
    mapped = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith(".safetensors")]
    for parameter in model.model.language_model.parameters():
        assert any(int(begin, 16) <= parameter.data_ptr() < int(end, 16) for begin, end in mapped)


def test_more_devices_than_gpus_and_than_processes(monkeypatch):
    config = composed("trainer.devices=4", "gba.prompts_per_step=8")
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"2 processes are at work, trainer.devices=4"):
        common.launch(config)
    monkeypatch.setattr(torch.distributed, "is_torchelastic_launched", lambda: False)
    monkeypatch.setattr(common, "device_of", lambda config: "cuda")
    with pytest.raises(UserError, match=r"trainer.devices=4: only 0 CUDA devices"):
        common.launch(config)
