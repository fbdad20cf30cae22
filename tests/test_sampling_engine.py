"""The local engine samples: each sample its own, the same in any company; temperature 0 is greedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mmedexpert.engines.asking import Ask
from mmedexpert.engines.transformers import TransformersEngine, seed_of
from mmedexpert.models.generate import generate

WORDS = ["heart rate", "the heart rate is low within high", "two of a child"]


@pytest.fixture()
def asks(picture, tmp_path):
    for number in range(2):
        picture(number).save(tmp_path / f"{number}.png")
    shown = [(tmp_path / "0.png",), (tmp_path / "1.png", tmp_path / "0.png"), ()]
    return [
        Ask(f"q{i}", text, images, sample)
        for i, (text, images) in enumerate(zip(WORDS, shown, strict=True))
        for sample in range(4)
    ]


def texts(tiny, asks, batch_size=4, **settings):
    engine = TransformersEngine(*tiny, batch_size=batch_size, max_new_tokens=8, **settings)
    replies = dict(engine(asks))
    return [replies[place].text for place in range(len(asks))]


def test_a_sample_is_the_same_alone_and_in_any_company(tiny, asks):
    whole = texts(tiny, asks, temperature=1.0, seed=3)
    assert whole == texts(tiny, asks, batch_size=1, temperature=1.0, seed=3)
    assert whole == texts(tiny, asks[::-1], batch_size=5, temperature=1.0, seed=3)[::-1]
    assert whole[6] == texts(tiny, [asks[6]], temperature=1.0, seed=3)[0]


def test_samples_seeds_and_questions_differ(tiny, asks):
    whole = texts(tiny, asks, temperature=1.0)
    assert len(set(whole)) == len(asks)
    other = texts(tiny, asks, temperature=1.0, seed=1)
    assert not any(one == another for one, another in zip(whole, other, strict=True))
    renamed = texts(tiny, [replace(ask, id="other") for ask in asks], temperature=1.0)
    assert not any(one == another for one, another in zip(whole, renamed, strict=True))


def test_a_seed_is_of_the_question_not_of_where_its_images_lie(tmp_path):
    ask = Ask("q", "text", (tmp_path / "a.png",), 1)
    assert seed_of(5, ask) == seed_of(5, replace(ask, images=(tmp_path / "moved" / "a.png",)))
    others = [replace(ask, sample=2), replace(ask, text="text "), replace(ask, id="r")]
    assert len({seed_of(5, one) for one in [ask, *others]} | {seed_of(6, ask)}) == 5
    assert all(0 <= seed_of(5, one) < 2**63 for one in others)


def test_temperature_zero_is_greedy_whatever_the_sample(tiny, asks):
    model, encoder = tiny
    found = texts(tiny, asks)
    prompts = [encoder.chat(ask.text, [encoder.image(path) for path in ask.images]) for ask in asks[::4]]
    encoder.encode_images(model, prompts)
    out = generate(model, encoder, prompts, banned_ids=encoder.banned_ids, max_new_tokens=8)
    assert found == [encoder.decode(ids) for ids in out.rows() for _ in range(4)]
    assert found == texts(tiny, asks, temperature=0.0, top_k=3, top_p=0.5, seed=9)


def test_top_k_and_top_p_narrow_what_is_drawn(tiny, asks):
    greedy = texts(tiny, asks)
    assert texts(tiny, asks, temperature=1.0, top_k=1) == greedy
    assert texts(tiny, asks, temperature=1.0, top_p=1e-6) == greedy
    assert texts(tiny, asks, temperature=1e-4) == greedy
    assert texts(tiny, asks, temperature=1.0, top_k=5) != greedy


def test_the_samples_of_a_question_share_its_prompt(tiny, asks, monkeypatch):
    encoder = tiny[1]
    told = []
    chat = encoder.chat
    monkeypatch.setattr(encoder, "chat", lambda text, images: told.append(text) or chat(text, images))
    texts(tiny, asks, temperature=1.0)
    assert sorted(told) == sorted(WORDS)


def test_replies_tell_the_length_and_the_log_probability_sampled(tiny, asks):
    engine = TransformersEngine(*tiny, batch_size=4, max_new_tokens=8, temperature=1.0)
    replies = [reply for _, reply in engine(asks)]
    assert all(1 <= reply.tokens <= 8 and reply.mean_logp < 0 for reply in replies)
    assert {reply.finish_reason for reply in replies} <= {"stop", "length"}
    assert torch.is_grad_enabled()
