"""Our merge rules against mergekit's own merge of the same fp32 checkpoints, tensor by tensor.

pip install -r requirements-bench.txt, then pytest tests/test_merge_parity.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mmedexpert.merging.methods import breadcrumbs, dare_linear, dare_ties, linear, ram, task_arithmetic, ties
from mmedexpert.merging.sparsify import uniform

pytest.importorskip("mergekit", reason="mergekit is a peer to measure against: pip install -r requirements-bench.txt")

EXPERTS = {
    "chest": 1e-2,
    "skin": 1e-2,
    "eye": 3e-3,
    "heart": 1e-2,
    "reasoner": 5e-4,
}  # standard deviation of each update
WEIGHTS = [1.0, 0.7, 1.3, 0.5, 2.0]
DENSITY = [0.2, 0.5, 0.8, 0.33, 0.5]
Rule = Callable[[list[Tensor]], Tensor]
Models = dict[str, dict[str, Tensor]]


def tiny_qwen2() -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = dict(vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4)
    return Qwen2ForCausalLM(Qwen2Config(**text, num_key_value_heads=2, tie_word_embeddings=False))


def tiny_qwen2_5_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(
        vocab_size=48, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_scaling={"type": "mrope", "mrope_section": [2, 1, 1], "rope_type": "default"},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=56, num_heads=2, out_hidden_size=32, fullatt_block_indexes=[1]
    )
    tokens = dict(image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens, tie_word_embeddings=False)
    return Qwen2_5_VLForConditionalGeneration(config)


@pytest.fixture(scope="module", params=[tiny_qwen2, tiny_qwen2_5_vl], ids=["qwen2", "qwen2_5_vl"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Models]:
    """A base and five experts of it on disk, every tensor changed; some entries far below RAM's epsilon."""
    root = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    model = request.param().float()
    model.save_pretrained(root / "base")
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, std in EXPERTS.items():
        for key, p in model.named_parameters():
            p.data = base[key] + std * torch.randn_like(p) * (torch.rand_like(p) < 0.7)
        model.save_pretrained(root / name)
    return root, {name: load_file(root / name / "model.safetensors") for name in ["base", *EXPERTS]}


def mergekit(root: Path, method: str, shared: dict[str, Any], own: list[dict[str, Any]]) -> dict[str, Tensor]:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = {
        "merge_method": method,
        "models": [{"model": str(root / n), "parameters": p} for n, p in zip(EXPERTS, own, strict=True)],
        "parameters": shared,
        "dtype": "float32",
    }
    if method != "linear":
        config["base_model"] = str(root / "base")
    out = root / f"out_{method}"
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False, quiet=True))
    return {k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()}


def per_expert(**values: list[float]) -> list[dict[str, float]]:
    return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]


def compare(models: Models, theirs: dict[str, Tensor], rule: Rule | Callable[..., Tensor]) -> None:
    """Every tensor bit for bit; of a small one that is no multiple of 32 torch.sum adds five by fours: one rounding."""
    assert set(theirs) == set(models["base"])
    for key, base in models["base"].items():
        ours = base + rule([models[name][key] - base for name in EXPERTS])
        if base.numel() % 32:
            assert float((ours - theirs[key]).abs().max()) <= steps(theirs[key].abs().amax()), key
        else:
            assert torch.equal(ours, theirs[key]), f"{key}: {int((ours != theirs[key]).sum())} entries differ"


def test_ties(models: tuple[Path, Models]) -> None:
    root, tensors = models
    for shared, ours in (
        ({"normalize": True, "lambda": 1.0}, {}),
        ({"normalize": False, "lambda": 0.7}, {"normalize": False, "scaling": 0.7}),
    ):
        theirs = mergekit(root, "ties", shared, per_expert(weight=WEIGHTS, density=DENSITY))
        compare(tensors, theirs, functools.partial(ties, weights=WEIGHTS, density=DENSITY, **ours))


def test_task_arithmetic(models: tuple[Path, Models]) -> None:
    root, tensors = models
    theirs = mergekit(root, "task_arithmetic", {"lambda": 0.3}, per_expert(weight=WEIGHTS))
    compare(tensors, theirs, functools.partial(task_arithmetic, weights=WEIGHTS, scaling=0.3))


def test_linear(models: tuple[Path, Models]) -> None:
    """mergekit averages models, we add the mean of their differences to the base: other roundings.

    They differ by at most one fp32 step at the tensor's largest value, and ours are nearer to the exact mean.
    """
    root, tensors = models
    theirs = mergekit(root, "linear", {"normalize": True}, per_expert(weight=WEIGHTS))
    errors = []
    for key, base in tensors["base"].items():
        experts = torch.stack([tensors[name][key] for name in EXPERTS])
        ours = base + linear([e - base for e in experts], WEIGHTS)
        assert float((ours - theirs[key]).abs().max()) <= steps(experts.abs().amax()), key
        exact = linear(list(experts.double()), WEIGHTS)
        own_steps = steps(experts.abs().amax(0))
        errors.append([float(((x - exact).abs() / own_steps).max()) for x in (ours, theirs[key])])
    assert max(mine for mine, _ in errors) < min(1.5, max(their for _, their in errors))


def steps(size: Tensor) -> Tensor:
    """The distance from one fp32 number of that size to the next."""
    return torch.nextafter(size, torch.tensor(torch.inf)) - size


def test_breadcrumbs(models: tuple[Path, Models]) -> None:
    root, tensors = models
    own = per_expert(weight=WEIGHTS, density=DENSITY, gamma=[0.1] * len(EXPERTS))
    theirs = mergekit(root, "breadcrumbs", {"lambda": 0.5}, own)
    compare(tensors, theirs, functools.partial(breadcrumbs, weights=WEIGHTS, density=DENSITY, gamma=0.1, scaling=0.5))


@pytest.mark.parametrize(("method", "r"), [("ram", 0.0), ("ramplus_tl", 0.3)])
def test_ram(models: tuple[Path, Models], method: str, r: float) -> None:
    root, tensors = models
    shared = {"epsilon": 5e-3} | ({"r": r, "alpha": 2.0} if r else {})
    theirs = mergekit(root, method, shared, per_expert(weight=WEIGHTS))
    compare(tensors, theirs, functools.partial(ram, r=r, alpha=2.0, epsilon=5e-3))


@pytest.mark.parametrize("method", [dare_linear, dare_ties])
def test_dare_given_the_masks(
    models: tuple[Path, Models], method: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without mergekit's rescale, which is by L1 norm: its lambda then stands for our 1 / density, exactly for 1/2."""
    root, tensors = models
    kept = {}
    for key, base in tensors["base"].items():
        for i, name in enumerate(EXPERTS):
            delta = tensors[name][key] - base
            kept[delta.flatten().numpy().tobytes()] = uniform(delta, f"0:{key}:{i}") < 0.5

    def ours(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return tensor * kept[tensor.flatten().numpy().tobytes()].view_as(tensor)

    monkeypatch.setattr("mergekit.sparsify.bernoulli", ours)
    shared = {"rescale": False, "normalize": method is dare_ties, "lambda": 2.0}
    own = per_expert(weight=WEIGHTS, density=[0.5] * len(EXPERTS))
    theirs = mergekit(root, method.__name__, shared, own)
    masks = {
        key: [kept[(tensors[n][key] - base).flatten().numpy().tobytes()] for n in EXPERTS]
        for key, base in tensors["base"].items()
    }
    by_shape = iter(masks.values())
    compare(tensors, theirs, lambda deltas: method(deltas, WEIGHTS, 0.5, masks=next(by_shape)))
