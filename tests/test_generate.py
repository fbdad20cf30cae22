"""Our sampler against transformers' own `generate` and against a plain forward pass."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mmedexpert.models.encode import Encoder
from mmedexpert.models.generate import generate, prefill
from mmedexpert.models.packing import positions


def prompts(encoder, picture):
    one = encoder.patches(picture(1))
    wide = encoder.patches(picture(2, 84, 56))
    return [
        encoder.chat("heart rate", [one]),
        encoder.chat("the heart rate is low within high", [wide]),
        encoder.chat("two of a child", [one, wide]),
        encoder.chat("no picture at all", []),
    ]


def test_greedy_equals_transformers_generate(tiny, picture):
    model, encoder = tiny
    chosen = prompts(encoder, picture)
    batch = encoder.collate_prompts(chosen)
    ours = generate(model, encoder, chosen, max_new_tokens=12)
    theirs = model.generate(
        **batch, max_new_tokens=12, do_sample=False, eos_token_id=encoder.end_ids, pad_token_id=encoder.pad_id
    )[:, batch["input_ids"].shape[1] :]
    for row, mask, other in zip(ours.ids, ours.mask, theirs, strict=True):
        length = int(mask.sum())
        assert row[:length].tolist() == other[:length].tolist()


def test_an_image_is_encoded_once_and_its_features_change_nothing(tiny, picture, monkeypatch):
    model, encoder = copy.deepcopy(tiny[0]).requires_grad_(False), tiny[1]
    chosen = prompts(encoder, picture)
    batch, _ = encoder.collate(chosen, [encoder.completion("low"), encoder.completion("high")] * 2)
    with torch.no_grad():
        expected = model(**batch).logits
    calls = []
    original = model.model.visual.forward
    monkeypatch.setattr(model.model.visual, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    encoder.encode_images(model, chosen)
    encoder.encode_images(model, chosen)
    assert len(calls) == 2 and all(image.patches is None for prompt in chosen for image in prompt.images)
    batch, _ = encoder.collate(chosen, [encoder.completion("low"), encoder.completion("high")] * 2)
    assert "pixel_values" not in batch
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
    assert len(calls) == 2
    again = prompts(encoder, picture)
    encoder.encode_images(model, again, patches_together=10_000)  # both images in one call
    assert len(calls) == 3
    for one, other in zip(again[2].images, chosen[2].images, strict=True):
        assert torch.allclose(one.seen.pooler_output[0], other.seen.pooler_output[0], atol=1e-5)
    greedy = generate(model, encoder, chosen, max_new_tokens=8)
    plain = generate(model, encoder, prompts(encoder, picture), max_new_tokens=8)
    assert greedy.rows() == plain.rows()


def test_a_trained_vision_tower_is_never_cached(tiny, picture):
    model, encoder = copy.deepcopy(tiny[0]), tiny[1]
    chosen = prompts(encoder, picture)
    model.model.visual.requires_grad_(True)
    encoder.encode_images(model, chosen)
    assert all(image.seen is None for prompt in chosen for image in prompt.images)


def test_images_are_kept_up_to_a_number_of_bytes(tiny, picture, tmp_path):
    """The room of three images as patches; what was never kept, or is kept no more, takes none of it."""
    encoder = Encoder(tiny[1].tokenizer, tiny[1].image_processor, cache_bytes=3 * 16 * 1176 * 4)
    for seed in range(5):
        picture(seed).save(tmp_path / f"{seed}.png")
    images = [encoder.image(tmp_path / f"{seed}.png") for seed in (0, 1, 2, 0, 3)]
    assert images[3] is images[0]
    assert encoder.image(tmp_path / "0.png") is images[0] and encoder.image(tmp_path / "1.png") is not images[1]
    frozen = copy.deepcopy(tiny[0]).requires_grad_(False)
    encoder.encode_images(frozen, [encoder.chat("heart", [encoder.patches(picture(seed))]) for seed in range(20)])
    encoder.encode_images(frozen, [encoder.chat("heart", [images[1]])])
    names = [tmp_path / f"{seed}.png" for seed in (0, 1, 2, 3)]
    first = encoder.image(names[0])
    for name in names[1:]:
        encoder.image(name)
    assert encoder.image(names[0]) is not first


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_a_plain_forward_pass(tiny, picture, temperature):
    model, encoder = tiny
    chosen = prompts(encoder, picture)[:3]
    out = generate(
        model, encoder, chosen, max_new_tokens=10, num_generations=3, temperature=temperature,
        seeds=[0, 1, 2],
    )  # fmt: skip
    rows = out.rows()
    assert len(rows) == 9 and len({tuple(r) for r in rows[:3]}) > 1
    for index, row in enumerate(rows):
        prompt = chosen[index // 3]
        batch, _ = encoder.collate([prompt], [row])
        with torch.no_grad():
            logits = model(**batch).logits.float() / temperature
        expected = logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None])[0, -len(row) :, 0]
        assert torch.allclose(out.logps[index, : len(row)], expected, atol=1e-5)


def test_end_token_finishes_a_row_and_leaves_the_others(tiny, picture):
    model, encoder = tiny
    chosen = prompts(encoder, picture) * 5  # 20 rows: finished ones stay a while, then leave
    plain = generate(model, encoder, chosen, end_ids=[-1], max_new_tokens=12)
    stops = [plain.ids[0, 3].item(), plain.ids[1, 6].item()]  # tokens these rows really say
    out = generate(model, encoder, chosen, end_ids=stops, max_new_tokens=12)
    assert out.finished[0] and out.mask[0].sum() <= 4 and not out.finished.all()
    for before, after, logps, expected in zip(plain.rows(), out.rows(), out.logps, plain.logps, strict=True):
        length = next((i + 1 for i, token in enumerate(before) if token in stops), 12)
        assert after == before[:length]
        assert torch.allclose(logps[:length], expected[:length], atol=1e-5) and not logps[length:].any()


def test_top_k_one_is_greedy_and_top_p_bounds_the_choice(tiny, picture):
    model, encoder = tiny
    chosen = prompts(encoder, picture)
    greedy = generate(model, encoder, chosen, max_new_tokens=6)
    for warp in ({"top_k": 1}, {"top_p": 1e-6}):
        seeds = range(len(chosen))
        sampled = generate(model, encoder, chosen, max_new_tokens=6, temperature=1.0, seeds=seeds, **warp)
        assert sampled.rows() == greedy.rows()


def test_what_a_prompt_says_follows_from_its_seed_alone(tiny, picture):
    """Not from its company, nor from its place: so it is the same on any number of devices."""
    model, encoder = tiny
    chosen = prompts(encoder, picture)
    options = {"max_new_tokens": 6, "temperature": 1.0, "num_generations": 2}
    together = generate(model, encoder, chosen, seeds=range(len(chosen)), **options).rows()
    for place in range(len(chosen)):
        alone = generate(model, encoder, chosen[place : place + 1], seeds=[place], **options).rows()
        assert alone == together[2 * place : 2 * place + 2]
    other = generate(model, encoder, chosen, seeds=range(9, 9 + len(chosen)), **options).rows()
    assert other != together
    with pytest.raises(ValueError, match="a seed for each"):
        generate(model, encoder, chosen, seeds=[0], **options)


def test_sampling_leaves_training_mode_as_it_was(tiny, picture):
    model, encoder = tiny
    model.train()
    generate(model, encoder, prompts(encoder, picture)[:1], max_new_tokens=2)
    assert model.training
    model.eval()


def test_positions_are_three_dimensional(tiny, picture):
    """Without mm_token_type_ids transformers falls back to 1-D positions in silence."""
    model, encoder = tiny
    prompt = prompts(encoder, picture)[0]
    position_ids, following = positions(model, encoder, prompt)
    image = torch.tensor(prompt.input_ids) == encoder.image_token_id
    assert not torch.equal(position_ids[0, image], position_ids[1, image])
    assert following == position_ids.max() + 1


def test_banned_tokens_are_never_chosen(tiny, picture):
    model, encoder = tiny
    chosen = prompts(encoder, picture)
    said = {token for row in generate(model, encoder, chosen, max_new_tokens=8).rows() for token in row}
    banned = {"banned_ids": sorted(said), "max_new_tokens": 8}
    again = generate(model, encoder, chosen, **banned)
    assert not said & {token for row in again.rows() for token in row}
    seeds = range(len(chosen))
    sampled = generate(model, encoder, chosen, temperature=1.0, num_generations=4, seeds=seeds, **banned)
    assert not said & {token for row in sampled.rows() for token in row}


@pytest.mark.parametrize("warp", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.5, "top_k": 5}])
def test_banned_tokens_are_banned_before_top_p(tiny, picture, warp):
    """A token of 95 % that is banned: what is drawn, and how likely it is told to be, is as if it did not exist."""
    model, encoder = copy.deepcopy(tiny[0]), tiny[1]
    chosen = prompts(encoder, picture)[:1]
    banned = encoder.banned_ids
    with torch.no_grad():
        *_, last, _ = prefill(model, encoder, chosen)
        others = model.lm_head(last)[0].index_fill(0, torch.tensor(banned), -torch.inf).double().logsumexp(0)
        model.lm_head.weight[banned[2]] = last[0] / last[0].norm() ** 2 * float(others + math.log(19))
        logits = model.lm_head(last)[0].double()
        chances = logits.softmax(-1)
    assert chances[banned[2]] > 0.9
    allowed = logits.index_fill(0, torch.tensor(banned), -torch.inf).softmax(-1)
    ordered, order = allowed.sort(descending=True)
    count = warp.get("top_k", len(order))
    ordered = ordered[:count] / ordered[:count].sum()
    count = int((ordered.cumsum(0) - ordered < warp.get("top_p", 1.1)).sum())
    expected = dict(zip(order[:count].tolist(), (ordered[:count] / ordered[:count].sum()).tolist(), strict=True))

    out = generate(
        model, encoder, chosen, max_new_tokens=1, banned_ids=banned, temperature=1.0, num_generations=2000,
        seeds=[0], **warp,
    )  # fmt: skip
    drawn = out.ids[:, 0].tolist()
    assert set(drawn) <= {*expected} - {*banned}
    for token, logp in zip(drawn, out.logps[:, 0].tolist(), strict=True):
        assert logp == pytest.approx(math.log(expected[token]), abs=1e-4)
    likeliest = max(expected, key=lambda token: expected[token])
    assert drawn.count(likeliest) / 2000 == pytest.approx(expected[likeliest], abs=0.04)
    greedy = generate(model, encoder, chosen, max_new_tokens=1, banned_ids=banned)
    assert greedy.ids[0].tolist() == [likeliest]
    assert float(greedy.logps[0, 0]) == pytest.approx(math.log(float(allowed[likeliest])), abs=1e-4)


def test_patches_by_matrix_product_are_those_of_the_convolution(tiny, picture):
    projection = tiny[0].model.visual.patch_embed.proj
    stock = torch.nn.Conv3d(3, 32, projection.kernel_size, projection.stride, bias=False)
    stock.load_state_dict(projection.state_dict())
    patches = tiny[1].patches(picture(1)).patches.view(-1, 3, *projection.kernel_size)
    assert type(projection) is not torch.nn.Conv3d
    assert torch.allclose(projection(patches), stock(patches), atol=1e-5)
