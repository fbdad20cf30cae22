"""The four policy losses against independent float64 numpy, and the chunked log-probabilities against the full ones."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmedexpert.models.logps import selected_logps
from mmedexpert.training.losses import kl_k3, masked_mean, policy_loss, sampler_weights

N, T = 5, 7
LOSS_TYPES = ["grpo", "dr_grpo", "dapo", "gspo"]


def batch(seed: int = 0, spread: float = 1.0) -> dict[str, Any]:
    """Off-policy log-probabilities whose ratios fall inside and outside the clip range; the last row is truncated."""
    rng = np.random.default_rng(seed)
    logps = -rng.exponential(1.0, (N, T))
    mask = np.arange(T) < rng.integers(1, T + 1, (N, 1))
    mask[-1] = False
    arrays = {
        "per_token_logps": logps,
        "old_per_token_logps": logps - rng.normal(0, spread, (N, T)),
        "ref_per_token_logps": logps - rng.normal(0, spread, (N, T)),
        "advantages": np.array([1.3, -0.7, 0.4, -1.1, 2.0]),
        "completion_mask": mask,
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def reference(
    data: dict[str, Any],
    loss_type: str,
    low: float,
    high: float,
    beta: float,
    max_length: int,
    num_items: int | None,
) -> tuple[float, dict[str, float]]:
    """The losses as sums over single tokens, in Python floats."""
    logps, old, ref, advantages, mask = (
        data[name].detach().numpy()
        for name in ("per_token_logps", "old_per_token_logps", "ref_per_token_logps", "advantages", "completion_mask")
    )
    per_sequence, tokens, below, above, kls, sequences = [], 0, [], [], [], 0.0
    shares_below, shares_above = [], []
    for n in range(N):
        kept = [t for t in range(T) if mask[n, t]]
        mean_log_ratio = sum(logps[n, t] - old[n, t] for t in kept) / max(len(kept), 1)
        terms, before = [], len(below)
        for t in kept:
            ratio = np.exp(mean_log_ratio if loss_type == "gspo" else logps[n, t] - old[n, t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            delta = ref[n, t] - logps[n, t]
            kls.append(np.exp(delta) - delta - 1)
            terms.append(-min(ratio * advantages[n], clipped * advantages[n]) + beta * kls[-1])
            if loss_type != "gspo" or t == kept[0]:
                below.append(ratio < 1 - low and advantages[n] < 0)
                above.append(ratio > 1 + high and advantages[n] > 0)
        if kept:
            shares_below.append(np.mean(below[before:]))
            shares_above.append(np.mean(above[before:]))
        tokens += len(kept)
        sequences += sum(terms)
        per_sequence.append(sum(terms) / max(len(kept), 1))
    loss = {
        "grpo": sum(per_sequence) / N,
        "gspo": sum(per_sequence) / N,
        "dapo": sequences / (num_items or tokens),
        "dr_grpo": sequences / (N * max_length),
    }[loss_type]
    metrics = {"clip_ratio/low_mean": np.mean(below), "clip_ratio/high_mean": np.mean(above), "kl": np.mean(kls)}
    metrics |= {"clip_ratio/low_min": min(shares_below), "clip_ratio/high_max": max(shares_above)}
    return loss, metrics | {"clip_ratio/region_mean": np.mean(below) + np.mean(above)}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize(("beta", "epsilon_high", "num_items"), [(0.0, None, None), (0.04, 0.28, None), (0.1, 0.5, 99)])
@pytest.mark.parametrize("seed", range(3))
def test_policy_loss_is_the_definition(
    loss_type: Any, beta: float, epsilon_high: float | None, num_items: int | None, seed: int
) -> None:
    data = batch(seed)
    loss, metrics = policy_loss(
        **data, loss_type=loss_type, beta=beta, epsilon_high=epsilon_high, max_completion_length=11, num_items=num_items
    )
    expected, expected_metrics = reference(data, loss_type, 0.2, epsilon_high or 0.2, beta, 11, num_items)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected_metrics, rel=1e-12)


@pytest.mark.parametrize("name", ["clip_ratio/low_mean", "clip_ratio/high_mean"])
@pytest.mark.parametrize("loss_type", ["grpo", "gspo"])
def test_the_batches_above_are_clipped_on_both_sides(loss_type: Any, name: str) -> None:
    assert sum(policy_loss(**batch(seed), loss_type=loss_type)[1][name].item() for seed in range(3)) > 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("seed", range(3))
def test_gradients_match_finite_differences(loss_type: Any, seed: int) -> None:
    data = batch(seed)
    logps = data.pop("per_token_logps").requires_grad_()

    def loss(values: Tensor) -> Tensor:
        return policy_loss(values, **data, loss_type=loss_type, beta=0.04, max_completion_length=11)[0]

    assert torch.autograd.gradcheck(loss, (logps,))


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    """At ratio 1 nothing is clipped, so d loss / d logp = -A / (N * length) for grpo and gspo alike."""
    data = batch()
    logps, mask, advantages = data["per_token_logps"].requires_grad_(), data["completion_mask"], data["advantages"]
    expected = -advantages[:, None] * mask / mask.sum(1, keepdim=True).clamp(min=1) / N
    options: list[dict[str, Any]] = [{"loss_type": "grpo"}, {"loss_type": "gspo"}]
    for option in options:
        loss, metrics = policy_loss(logps, logps.detach(), advantages, mask, **option)
        torch.testing.assert_close(torch.autograd.grad(loss, logps)[0], expected)
        assert metrics["clip_ratio/region_mean"] == 0 and "kl" not in metrics


def test_gspo_uses_one_ratio_per_completion() -> None:
    """Token log-ratios that cancel leave the sequence's ratio at 1, where grpo clips both."""
    old = torch.full((1, 2), -3.0)
    logps, mask = old + torch.tensor([[1.0, -1.0]]), torch.ones(1, 2)
    sequence, metrics = policy_loss(logps, old, torch.ones(1), mask, loss_type="gspo")
    assert sequence.item() == pytest.approx(-1.0) and metrics["clip_ratio/region_mean"] == 0
    token, metrics = policy_loss(logps, old, torch.ones(1), mask, loss_type="grpo")
    assert token.item() == pytest.approx(-(1.2 + np.exp(-1)) / 2) and metrics["clip_ratio/high_mean"] == 0.5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf")])
def test_masked_positions_and_truncated_rows_add_nothing(loss_type: Any, junk: float) -> None:
    clean, dirty = batch(), batch()
    for name in ("per_token_logps", "old_per_token_logps", "ref_per_token_logps"):
        dirty[name] = dirty[name].masked_fill(~dirty["completion_mask"], junk)
    results = []
    for data in (clean, dirty):
        logps = data["per_token_logps"].requires_grad_()
        loss, metrics = policy_loss(**data, loss_type=loss_type, beta=0.1, max_completion_length=11)
        gradient = torch.autograd.grad(loss, logps)[0]
        assert torch.equal(gradient[~data["completion_mask"]], torch.zeros_like(gradient[~data["completion_mask"]]))
        results.append((loss, gradient, metrics))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_of_truncated_rows_has_zero_loss_and_gradient(loss_type: Any) -> None:
    data = batch()
    data["completion_mask"] = torch.zeros(N, T, dtype=torch.bool)
    logps = data["per_token_logps"].requires_grad_()
    loss, metrics = policy_loss(**data, loss_type=loss_type, beta=0.1, max_completion_length=11)
    assert loss.item() == 0 and all(value.item() == 0 for value in metrics.values())
    assert torch.equal(torch.autograd.grad(loss, logps)[0], torch.zeros(N, T, dtype=torch.float64))


def test_dapo_micro_batches_add_up_to_the_batch() -> None:
    data = batch()
    num_items = data["completion_mask"].sum()
    whole, _ = policy_loss(**data, loss_type="dapo")
    parts = [
        policy_loss(**{name: value[rows] for name, value in data.items()}, loss_type="dapo", num_items=num_items)[0]
        for rows in (slice(0, 2), slice(2, N))
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_kl_is_k3_clamped() -> None:
    logps, ref = torch.tensor([-1.0, -1.0, -50.0, -0.1]), torch.tensor([-1.0, -1.5, -0.1, -50.0])
    expected = torch.tensor([0.0, np.exp(-0.5) + 0.5 - 1, 10.0, 10.0], dtype=torch.float32)
    torch.testing.assert_close(kl_k3(logps, ref), expected)


def test_a_wild_ratio_stays_finite() -> None:
    old, mask = torch.full((1, 1), -500.0), torch.ones(1, 1)
    loss, _ = policy_loss(torch.zeros(1, 1), old, torch.zeros(1), mask, beta=0.1, ref_per_token_logps=old)
    assert torch.isfinite(loss)


def test_masked_mean() -> None:
    values = torch.tensor([[1.0, 3.0, torch.nan], [torch.nan, torch.inf, -torch.inf]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert masked_mean(values, mask).item() == 2
    assert masked_mean(values, mask, dim=1).tolist() == [2, 0]


def test_bad_arguments_are_refused() -> None:
    data = batch()
    with pytest.raises(ValueError, match="loss_type"):
        policy_loss(**data, loss_type="ppo")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_completion_length"):
        policy_loss(**data, loss_type="dr_grpo")
    with pytest.raises(ValueError, match="ref_per_token_logps"):
        policy_loss(**(data | {"ref_per_token_logps": data["ref_per_token_logps"][:1]}))
    with pytest.raises(ValueError, match="advantages"):
        policy_loss(**(data | {"advantages": torch.ones(N, T)}))
    with pytest.raises(ValueError, match="share one shape"):
        policy_loss(**(data | {"completion_mask": torch.ones(N, T + 1)}))
    del data["ref_per_token_logps"]
    with pytest.raises(ValueError, match="beta"):
        policy_loss(**data, beta=0.1)


# --- selected_logps ---------------------------------------------------------------------------------------------------

H, V = 6, 50


def head(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    ids = torch.randint(V, (3, 4), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), ids


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 12, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_in_blocks_are_the_full_ones(rows: int, temperature: float, trained_head: bool) -> None:
    hidden, weight, ids = head()
    weight.requires_grad_(trained_head)
    logps, entropy, likeliest = selected_logps(hidden, weight, ids, temperature, rows)

    logits = hidden.detach().numpy() @ weight.detach().numpy().T / temperature
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.log(np.take_along_axis(probabilities, ids.numpy()[..., None], -1)[..., 0])
    np.testing.assert_allclose(logps.detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(entropy.numpy(), -(probabilities * np.log(probabilities)).sum(-1), rtol=1e-10)
    assert not entropy.requires_grad
    assert torch.equal(likeliest, torch.from_numpy(logits.argmax(-1)) == ids)

    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = torch.log_softmax(hidden @ weight.t() / temperature, -1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    leaves = (hidden, weight) if trained_head else (hidden,)
    expected_gradients = torch.autograd.grad((full * upstream).sum(), leaves)
    gradients = torch.autograd.grad((logps * upstream).sum(), leaves)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("rows", [5, 1024])
def test_banned_ids_have_no_chance(rows: int, trained_head: bool) -> None:
    """Values and gradients are those of a head without their rows; the entropy stays a number."""
    hidden, weight, ids = head()
    weight.requires_grad_(trained_head)
    banned = [0, 7, V - 1]
    kept = torch.tensor([i for i in range(V) if i not in banned])
    ids = kept[ids % len(kept)]
    logps, entropy, likeliest = selected_logps(hidden, weight, ids, 0.7, rows, banned_ids=banned)
    columns = torch.searchsorted(kept, ids)
    expected, spread, best = selected_logps(hidden, weight[kept], columns, 0.7, rows)
    assert not torch.allclose(logps, selected_logps(hidden, weight, ids, 0.7, rows)[0])
    torch.testing.assert_close((logps, entropy), (expected, spread))
    assert torch.equal(likeliest, best)
    upstream = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaves = (hidden, weight) if trained_head else (hidden,)
    found = torch.autograd.grad((logps * upstream).sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad((expected * upstream).sum(), leaves))


class LargestTensor(TorchDispatchMode):
    """Records the largest floating tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("trained_head", [False, True])
def test_no_tensor_over_all_positions_and_the_vocabulary_is_ever_made(trained_head: bool) -> None:
    rows, hidden, ids = 8, torch.randn(4, 16, H, requires_grad=True), torch.zeros(4, 16, dtype=torch.long)
    weight = torch.randn(V, H, requires_grad=trained_head)
    with LargestTensor() as forward_and_backward:
        logps, _, _ = selected_logps(hidden, weight, ids, rows=rows)
        logps.sum().backward()
    assert forward_and_backward.numel == rows * V
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):  # type: ignore[func-returns-value]
        selected_logps(hidden, weight, ids, rows=rows)
    assert max(saved, default=0) < rows * V


@pytest.mark.parametrize("trained_head", [False, True])
def test_half_precision_states_give_fp32_logps(trained_head: bool) -> None:
    hidden, weight, ids = head(torch.bfloat16)
    logps, entropy, _ = selected_logps(hidden, weight.detach().requires_grad_(trained_head), ids)
    assert logps.dtype == entropy.dtype == torch.float32
    exact, _, _ = selected_logps(*head())
    torch.testing.assert_close(logps.double(), exact, atol=0.1, rtol=0)
    logps.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_bad_logp_arguments_are_refused() -> None:
    hidden, weight, ids = head()
    with pytest.raises(ValueError, match="expected hidden"):
        selected_logps(hidden, weight, ids[:2])
    with pytest.raises(ValueError, match="temperature"):
        selected_logps(hidden, weight, ids, temperature=0.0)


@pytest.mark.parametrize("correction", ["truncate", "sequence_mask"])
def test_weights_of_a_mismatch_are_the_published_ones(correction):
    """verl's truncated importance sampling, min(w, 2) a token; TRL's sequence_mask, 0 where the sequence is above 3."""
    data = batch(spread=0.9)
    logps, sampled, mask = (data[name] for name in ("per_token_logps", "old_per_token_logps", "completion_mask"))
    sampled = sampled.masked_fill(~mask, torch.nan)  # what a server says of no token does not count
    found = sampler_weights(logps.requires_grad_(), sampled, mask, correction)
    assert not found.requires_grad
    cut = kept = 0
    for n in range(N):
        apart = [float(logps[n, t] - sampled[n, t]) for t in range(T) if mask[n, t]]
        if correction == "sequence_mask":
            ratio = np.exp(sum(apart))
            assert float(found[n, 0]) == pytest.approx(0.0 if ratio > 3 else ratio)
            cut, kept = cut + (ratio > 3), kept + (ratio <= 3)
            continue
        wanted = iter(min(np.exp(one), 2.0) for one in apart)
        for t in range(T):
            assert float(found[n, t]) == pytest.approx(next(wanted) if mask[n, t] else 1.0)
        cut, kept = cut + sum(np.exp(one) > 2 for one in apart), kept + sum(np.exp(one) <= 2 for one in apart)
    assert cut and kept, "both sides of the limit are seen"
    with pytest.raises(ValueError, match="truncate or sequence_mask"):
        sampler_weights(logps, sampled, mask, "none")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_weights_act_on_the_clipped_term_and_not_on_the_kl(loss_type):
    data, options = batch(), {"loss_type": loss_type, "max_completion_length": 11, "beta": 0.1}
    mask = data["completion_mask"]
    plain, _ = policy_loss(**data, **options)
    ones, _ = policy_loss(**data, **options, weights=torch.ones(N, T))
    assert torch.equal(plain, ones), "weight 1 changes nothing, to the bit"
    gone, metrics = policy_loss(**data, **options, weights=torch.zeros(N, 1))
    kl = kl_k3(data["per_token_logps"], data["ref_per_token_logps"])
    wanted = {
        "grpo": masked_mean(kl, mask, dim=1).sum() / N, "gspo": masked_mean(kl, mask, dim=1).sum() / N,
        "dapo": (kl * mask).sum() / mask.sum(), "dr_grpo": (kl * mask).sum() / (N * 11),
    }[loss_type]  # fmt: skip
    assert gone.item() == pytest.approx(0.1 * wanted.item()) and metrics["kl"] > 0
    data["advantages"] = torch.zeros(N)  # the clipped term is linear in its weight
    without, _ = policy_loss(**data, **options)
    data = batch()
    half, _ = policy_loss(**data, **options, weights=torch.full((N, T), 0.5))
    assert half.item() == pytest.approx((plain.item() + without.item()) / 2)
