"""The GPU measurements of experiments/speed run on the CPU: values, what is told of a failing part, and the JSON."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import long

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "speed"))
import gpu
import gpu_attention
import gpu_merge
import gpu_steps
import gpu_wheels

OURS = ["attention", "merge", "dsa s", "gba s"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """All of our parts, one of which fails behind its first row."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"

    def broken(device, *, tiny):
        yield next(whole(device, tiny=tiny))
        raise RuntimeError("no such kernel")

    whole = gpu_merge.rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_merge, "rows", broken)
        found = gpu.main(["--tiny", "--out", str(out), "--parts", *OURS])
    assert json.loads(out.read_text()) == found
    return found


def test_a_failing_part_is_told_and_the_others_go_on(results, capsys):
    assert [*results["parts"]] == OURS
    assert {name: part["status"] for name, part in results["parts"].items()} == {
        **dict.fromkeys(OURS, "ok"), "merge": "failed (RuntimeError: no such kernel)",
    }  # fmt: skip
    assert len(results["parts"]["merge"]["rows"]) == 1  # what it had computed stays
    assert results["tiny"] and results["device"] == "CPU" and results["cuda"] is None
    assert results["torch"] == torch.__version__
    assert results["command"].startswith("python experiments/speed/gpu.py --tiny")
    table = gpu.table(results).splitlines()
    assert sum(line.startswith("| merge: failed (RuntimeError") for line in table) == 1
    assert len({line.count("|") for line in table if line.startswith("|")}) == 1


def test_packed_attention_is_within_its_tolerance_and_a_wrong_one_is_not(results, monkeypatch):
    rows = results["parts"]["attention"]["rows"]
    assert [row["case"] for row in rows] == [
        f"{tree}, {dtype}, {path}"
        for tree in ("group", "ragged") for dtype in ("bfloat16", "float32") for path in ("sdpa", "by_family")
    ]  # fmt: skip
    for row in rows:
        assert row["within"] and 0 < row["relative_error"] <= row["tolerance"] and row["seconds"] > 0
        assert [*row["errors"]] == [*gpu_attention.NAMES]
        assert row["relative_error"] == max(error["relative"] for error in row["errors"].values())
    exact = [row["relative_error"] for row in rows if "float32" in row["case"]]
    assert max(exact) < 1e-6 < 1e-3 < min(row["relative_error"] for row in rows if "bfloat16" in row["case"])

    def blind(query, key, value, tree, scaling):  # completions do not see the prompt
        alone = gpu_attention.Tree(tree.lengths, [-1] * len(tree.lengths), tree.device)
        return honest(query, key, value, alone, scaling)

    honest = gpu_attention.by_family
    monkeypatch.setattr(gpu_attention, "by_family", blind)
    assert [row["within"] for row in gpu_attention.rows("cpu", tiny=True)] == [True, False] * 4


def test_updates_and_sampling_are_plausible(results):
    own, batch = results["parts"]["dsa s"]["rows"]
    shapes = gpu_steps.TINY
    length = shapes.prompt + shapes.answer - 1  # the last token predicts nothing
    assert own["tokens"] == 2 * length and batch["tokens"] == 3 * length
    update, sampling, step = results["parts"]["gba s"]["rows"]
    assert update["tokens"] == shapes.groups * (shapes.prompt + shapes.group * (shapes.completion - 1))
    assert sampling["new_tokens"] == shapes.completion
    assert sampling["tokens"] == step["tokens"] == shapes.groups * shapes.group * shapes.completion
    assert step["seconds"] > update["seconds"] + sampling["seconds"]
    for row in (own, batch, update):
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["mfu_gemm"] < 1.5 and row["mfu"] is None  # no datasheet of this CPU; rates of busy cores waver
        assert 0 < row["grad_norm"] < math.inf
        assert row["tflops"] < row["hardware_tflops"] < 1.5 * row["tflops"]
        assert row["mfu_gemm"] == pytest.approx(row["tflops"] / row["gemm_tflops"])
    for row in (own, batch, update, sampling):
        assert 0.1 < row["peak_gib"] < 50 and row["estimate_gib"] is None and row["device_gib"] is None
    # one pass over the packed row says what prefill and decoding said
    assert 0 <= sampling["logp_difference_mean"] <= sampling["logp_difference_max"] < 1e-4


@long
@pytest.mark.slow
def test_the_same_in_bf16_as_on_cuda(monkeypatch):
    """Weights in bf16, LoRA in fp32, under autocast: what differs from fp32 is rounding."""
    monkeypatch.setattr(gpu_steps, "dtype_of", lambda device: torch.bfloat16)
    monkeypatch.setattr(gpu_steps, "gemm_rate", lambda device: 1e12)
    policy = gpu_steps.build("s", "cpu", gpu_steps.TINY)
    kinds = {(p.requires_grad, p.dtype) for p in policy.model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    update, sampling, _ = gpu_steps.gba("cpu", size="s", shapes=gpu_steps.TINY, sampling_s=60.0)
    assert 0 < update["grad_norm"] < math.inf
    assert 1e-4 < sampling["logp_difference_mean"] < 0.05


@long
@pytest.mark.slow
def test_the_peer_takes_the_same_steps(tmp_path):
    """As a command: the peer silences logging. That it trains on the tokens asked for is asserted there."""
    pytest.importorskip("trl")
    command = [sys.executable, gpu.__file__, "--tiny", "--parts", "trl dsa s", "trl gba s", "--out", "gpu.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    for name, tokens in (("trl dsa s", 2 * (64 + 24)), ("trl gba s", 2 * 4 * 16)):
        (row,) = parts[name]["rows"]
        assert parts[name]["status"] == "ok" and row["case"].startswith("trl 1")
        assert row["tokens"] == tokens and row["seconds"] > 0 and row["peak_gib"] > 0.1


def test_flops_are_four_for_a_frozen_weight_and_six_for_loras():
    policy = gpu_steps.build("s", "cpu", gpu_steps.TINY)
    (prompt,), _ = gpu_steps.asked(policy, 1, gpu_steps.TINY)
    done = gpu_steps.work(policy, [prompt], gpu_steps.said(1, 16), 1000)
    layers = gpu_steps.core_of(policy.model).model.language_model.layers
    linears = [layer.weight for layer in layers.modules() if isinstance(layer, torch.nn.Linear)]
    trained = sum(weight.numel() for weight in linears if weight.requires_grad)
    assert trained == sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    tokens, every = gpu_steps.TINY.prompt + 15, sum(weight.numel() for weight in linears)
    head = 4 * 16 * policy.core.lm_head.weight.numel()
    assert done["tokens"] == tokens
    wanted = (4 * every + 2 * trained) * tokens + head
    assert done["flops"] == pytest.approx(wanted, rel=0.05)  # attention more, the first layer's input gradients less
    assert done["again"] == pytest.approx(2 * every * tokens, rel=0.05)


def test_the_merge_agrees_with_fp64():
    single, double = gpu_merge.rows("cpu", tiny=True)
    assert double["within"] and double["differing_share"] <= gpu_merge.TOLERANCE
    assert single["parameters"] == 2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 768
    assert single["gb_per_s"] == pytest.approx(7 * 4 * single["parameters"] / single["seconds"] / 1e9)
    seven = sum(math.prod(shape) for shape in gpu_merge.shapes(gpu_steps.SIZES["7b"]))
    assert seven == 233_046_016  # a layer of Qwen2.5-VL-7B without biases and norms


@pytest.mark.parametrize(("size", "wanted"), [("3b", (11.0, 13.5, 12.4)), ("7b", (20.5, 24.4, 22.7)), ("s", None)])
def test_estimates_are_those_of_the_plan(size, wanted):
    assert gpu_steps.planned(size, gpu_steps.GPU) == ((None,) * 3 if wanted is None else pytest.approx(wanted, abs=0.1))
    settings = gpu_steps.settings(size)
    assert settings["gradient_checkpointing"] is True and settings["lora"]["r"] == 64


def test_what_cannot_run_is_not_a_failure_and_time_ends(monkeypatch, tmp_path):
    def parts(tiny):
        return {
            "peer": gpu.Part("no_such_package", "rows", 5),
            "slow": gpu.Part("gpu_merge", "rows", 0.2),
            "late": gpu.Part("gpu_merge", "rows", 5),
            "never": gpu.Part("gpu_merge", "rows", 5),
        }

    def slow(device, *, tiny):
        yield {"case": "first"}
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(gpu, "parts", parts)
    monkeypatch.setattr(gpu, "LIMIT", 0.3)
    monkeypatch.setattr(gpu_merge, "rows", slow)
    found = gpu.main(["--tiny", "--out", str(tmp_path / "gpu.json")])["parts"]
    assert found["peer"]["status"] == "not run (No module named 'no_such_package')"
    assert found["slow"]["status"] == "failed (TimeoutError: over its 0.2 seconds)" and len(found["slow"]["rows"]) == 1
    assert found["late"]["status"].startswith("failed (TimeoutError: over its 0.")  # what is left for all parts
    assert found["never"]["status"] == "failed (TimeoutError: no time was left)"


def test_parts_fit_into_eight_minutes_at_most():
    assert gpu.LIMIT <= 480
    assert [*gpu.parts(tiny=False)][:2] == [*gpu.parts(tiny=True)][:2] == ["attention", "merge"]
    assert {name.split()[-1] for name in [*gpu.parts(tiny=False)][2:]} == {"3b", "7b"}


def test_the_wheels_bring_all_but_torch():
    found = gpu_wheels.closure(gpu_wheels.NEEDED)
    assert {"transformers", "peft", "accelerate", "tokenizers", "safetensors", "huggingface-hub"} <= {*found}
    assert "torch" not in found
