"""Shared prefixes and packing: log-probabilities and gradients are those of whole padded sequences."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners import lora
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from mmedexpert.models.attention import Tree, by_family, by_kernel
from mmedexpert.models.backbone import add_lora, core_of
from mmedexpert.models.lean import LeanLora
from mmedexpert.models.packing import micro_batches, pack, token_logps

TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def whole_sequences(model, encoder, prompts, completions):
    """Log-probabilities of all completion tokens from one padded forward pass of stock transformers."""
    core = core_of(model)
    core.model.language_model.config._attn_implementation = "sdpa"
    batch, labels = encoder.collate(prompts, completions)
    hidden = core.model(**batch, use_cache=False).last_hidden_state
    logps = core.lm_head(hidden[:, :-1]).float().log_softmax(-1)
    kept = labels[:, 1:] != -100
    return logps.gather(2, batch["input_ids"][:, 1:, None])[..., 0][kept]


@pytest.fixture(params=[False, True], ids=["plain", "checkpointed"])
def policy(tiny, request):
    model = add_lora(
        copy.deepcopy(tiny[0]), r=8, alpha=16, dropout=0.0, target_modules=TARGETS,
        gradient_checkpointing=request.param, seed=0,
    )  # fmt: skip
    for name, parameter in model.named_parameters():  # a fresh adapter's B is zero, and so would be A's gradient
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return model


def asked(encoder, picture):
    """Two questions on one image, two instructions on one question, two images, none, and a prompt within another."""
    one, wide = encoder.patches(picture(1)), encoder.patches(picture(2, 84, 56))
    question = "the heart rate is low within high so a criterion of the child is high 0 1 2 3 4 5"
    longer = encoder.chat(question + " and adult", [one])
    within = type(longer)(longer.input_ids[:40], [one])
    prompts = [
        encoder.chat("heart rate", [one]), encoder.chat(question, [one]), encoder.chat(question + " low", [one]),
        encoder.chat(question + " high", [one]), longer, within,
        encoder.chat("two of a child", [one, wide]), encoder.chat("heart rate", [wide]),
        encoder.chat("no picture at all", []),
    ]  # fmt: skip
    return [prompts[i] for i in (0, 1, 1, 2, 3, 4, 5, 5, 6, 6, 7, 8, 8)]


def said(encoder, count):
    texts = ["low", "the heart rate is high", "", "a criterion of the child 0 1 2 3"]
    rows = [encoder.completion(texts[i % 4]) for i in range(count)]
    return [row if i != 3 else row * 5 for i, row in enumerate(rows)]


@pytest.mark.parametrize("max_tokens", [None, 150, 1])
def test_packed_equals_whole_sequences(policy, tiny, picture, max_tokens):
    encoder = tiny[1]
    prompts = asked(encoder, picture)
    completions = said(encoder, len(prompts))
    encoder.encode_images(core_of(policy), prompts)
    weights = torch.linspace(-1, 2, sum(map(len, completions)))
    expected = whole_sequences(policy, encoder, prompts, completions)
    (expected * weights).sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    policy.zero_grad()
    parts = micro_batches(encoder, prompts, completions, max_tokens)
    assert sorted(row for rows in parts for row in rows) == list(range(len(prompts)))
    width = max(map(len, completions))
    starts = torch.tensor([0, *map(len, completions)]).cumsum(0)
    found = torch.zeros(len(prompts), width)
    for rows in parts:
        packed = pack(policy, encoder, [prompts[r] for r in rows], [completions[r] for r in rows])
        tokens = packed.inputs["input_ids"].shape[1]
        assert max_tokens is None or tokens <= max_tokens or len(rows) == 1
        logps, entropy, _ = token_logps(policy, packed)
        assert (entropy >= 0).all()
        (logps * torch.cat([weights[starts[r] : starts[r + 1]] for r in rows])).sum().backward()
        found[rows] = packed.matrix(logps.detach(), width)
    kept = torch.arange(width) < torch.tensor([len(c) for c in completions])[:, None]
    assert (found[kept] - expected).abs().max() <= 1e-5
    gradients = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert wanted.norm() > 0 and (gradients - wanted).norm() / wanted.norm() <= 1e-5


def test_lean_lora_is_pefts(policy):
    lean = core_of(policy).model.language_model.layers[0].mlp.up_proj
    assert type(lean) is LeanLora
    x = torch.randn(2, 3, 64, requires_grad=True)
    found = []
    for kind in (LeanLora, lora.Linear):
        lean.__class__ = kind
        policy.zero_grad()
        out = lean(x)
        with policy.disable_adapter():
            plain = lean(x)
        (out.square().sum()).backward()
        grads = [x.grad.clone(), lean.lora_A["default"].weight.grad.clone(), lean.lora_B["default"].weight.grad.clone()]
        x.grad = None
        found.append([out, plain, *grads])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0][0], found[0][1])


def test_every_shared_token_is_read_once(tiny, picture):
    model, encoder = tiny
    one = encoder.patches(picture(1))
    prompts = [encoder.chat("heart rate is low within", [one]) for _ in range(4)]  # equal, and four objects
    other = encoder.chat("heart rate is low within", [encoder.patches(picture(2))])
    encoder.encode_images(copy.deepcopy(model).requires_grad_(False), [*prompts, other])
    packed = pack(model, encoder, [*prompts, other], [[5, 6, 7]] * 5)
    length = len(prompts[0].input_ids)
    assert packed.inputs["input_ids"].shape[1] == 2 * length + 5 * 2
    assert len(packed.inputs["image_grid_thw"]) == 2  # another image is never taken for this one
    assert [row.tolist() for row in packed.prompts[:4]] == [packed.prompts[0].tolist()] * 4


@st.composite
def trees(draw):
    """Lengths and parents of a random tree, level by level."""
    lengths, parents, level = [], [], [-1]
    for _ in range(draw(st.integers(1, 3))):
        following = []
        for parent in level:
            for _ in range(draw(st.integers(1, 3))):
                following.append(len(lengths))
                lengths.append(draw(st.integers(1, 5)))
                parents.append(parent)
        level = following
    return Tree(lengths, parents, torch.device("cpu"))


def dense(query, key, value, tree):
    """The definition: a mask of all pairs."""
    owner = torch.tensor([s for s, length in enumerate(tree.lengths) for _ in range(length)])
    place = torch.arange(len(owner))
    seen = torch.zeros(len(owner), len(owner), dtype=torch.bool)
    for s in range(len(tree.lengths)):
        for other in [*tree.ancestors(s), s]:
            seen |= (owner == s)[:, None] & (owner == other) & (place[:, None] >= place)
    k, v = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, k) * 0.3
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def as_documented(q, k, v, *, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, enable_gqa):
    """What `varlen_attn` promises, by torch's own sdpa and its lower-right causal bias, one segment after another.

    It has no CPU kernel; on a GPU the last test holds the real one to the definition.
    """
    assert window_size == (-1, 0) and max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and enable_gqa == (q.shape[1] != k.shape[1])
    out = []
    for a, b, c, d in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        one = [x.transpose(0, 1)[None] for x in (q[a:b], *(x[c:d].repeat_interleave(2, 1) for x in (k, v)))]
        bias = causal_lower_right(int(b - a), int(d - c))
        out.append(scaled_dot_product_attention(*one, attn_mask=bias, scale=scale)[0].transpose(0, 1))
    return torch.cat(out)


@settings(max_examples=40, deadline=None)
@given(trees(), st.integers(0, 99))
def test_tree_attention_is_the_masked_attention_of_all_pairs(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(tree.lengths), 4, 8, generator=generator)
    key, value = torch.randn(2, sum(tree.lengths), 2, 8, generator=generator)
    expected = dense(query, key, value, tree)
    assert torch.allclose(by_family(query, key, value, tree, 0.3), expected, atol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.attention.varlen, "varlen_attn", as_documented)
        assert torch.allclose(by_kernel(query, key, value, tree, 0.3), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "parents"),
    [([300, 40, 17, 60], [-1, 0, 0, 0]), ([90, 30, 1, 129, 7, 7, 64], [-1, 0, 0, 1, 1, 2, 2]), ([5, 70], [-1, -1])],
)
def test_the_flash_kernel_is_the_masked_attention_of_all_pairs_on_a_gpu(lengths, parents):
    """Outputs and gradients of the real kernel in bf16 against the definition in fp32."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tree, total = Tree(lengths, parents, torch.device("cuda")), sum(lengths)
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(total, heads, 64, generator=generator) for heads in (4, 2, 2)]
    upstream = torch.randn(total, 4, 64, generator=generator)
    ours = [x.to("cuda", torch.bfloat16).requires_grad_() for x in leaves]
    exact = [x.detach().float().cpu().requires_grad_() for x in ours]
    found, expected = by_kernel(*ours, tree, 0.3), dense(*exact, Tree(lengths, parents, torch.device("cpu")))
    found.backward(upstream.to(found))
    expected.backward(upstream)
    for one, other in [(found, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert (one.float().cpu() - other).norm() < 0.02 * other.norm()
