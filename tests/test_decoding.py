"""Rows in flight: who waits takes the place of who has ended, in a cache that is allocated once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmedexpert.models import generate as sampler
from mmedexpert.models.cache import RowCache, move_up
from mmedexpert.models.generate import decode, generate

ENDS = [*range(0, 1000, 9)]  # often: completions of very different lengths
VIEWS = {"view", "_unsafe_view", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "t", "alias"}


def prompts(encoder, picture, count=9):
    images = [encoder.patches(picture(seed)) for seed in range(3)]
    words = ["heart rate" + " is low" * (number * 5 % 7) for number in range(count)]
    return [encoder.chat(text, [images[n % 3]] if n % 4 else []) for n, text in enumerate(words)]


def options(encoder, count=9, **more):
    drawn = {"temperature": 1.0, "seeds": range(count), "num_generations": 3}
    return {"max_new_tokens": 14, "end_ids": ENDS, "banned_ids": encoder.banned_ids, **drawn, **more}


@pytest.mark.parametrize("rows", [1, 2, 5, 11, 26, 40])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_says_the_same_whoever_else_is_in_flight(tiny, picture, rows, temperature):
    """Fewer places than completions of a prompt, places left over, all in flight at once."""
    model, encoder = tiny
    chosen, told = prompts(encoder, picture), options(encoder, temperature=temperature)
    whole, some = generate(model, encoder, chosen, **told), generate(model, encoder, chosen, rows=rows, **told)
    assert len({len(row) for row in whole.rows()}) > 3 and not whole.finished.all() and whole.finished.any()
    assert some.rows() == whole.rows() and torch.equal(some.finished, whole.finished)
    assert torch.allclose(some.logps, whole.logps, atol=1e-5)


def test_at_most_so_many_rows_and_one_place_for_each(tiny, picture, monkeypatch):
    """Every place is taken again at once, in tensors that are never made anew, and prompts come in the order given."""
    model, encoder = tiny
    seen, places, orders = [], set(), []
    advance, read = RowCache.advance, sampler.Reader.read

    def watched(cache):
        prefix = advance(cache)
        seen.append(len(cache))
        places.update((layer.own[0].data_ptr(), layer.own[0].shape) for layer in cache.own if layer.own)
        return prefix

    monkeypatch.setattr(RowCache, "advance", watched)
    monkeypatch.setattr(
        sampler.Reader, "read", lambda self, wanted, *a: orders.extend(wanted) or read(self, wanted, *a)
    )
    told = options(encoder, num_generations=1)
    left = list(decode(model, encoder, prompts(encoder, picture), rows=4, **told))
    assert max(seen) == 4 and seen == sorted(seen, reverse=True) and orders == [*range(9)]
    assert len(places) == len(model.model.language_model.layers) and len(left) > 2
    assert sorted(row for group in left for row, _ in group) == [*range(9)]


def test_no_prompt_one_token_and_all_at_once(tiny, picture):
    model, encoder = tiny
    chosen = prompts(encoder, picture)
    assert generate(model, encoder, [], max_new_tokens=3).ids.shape == (0, 0)
    one = generate(model, encoder, chosen, rows=2, max_new_tokens=1)
    assert one.ids.shape == (9, 1) and torch.equal(one.ids, generate(model, encoder, chosen, max_new_tokens=1).ids)
    everything = range(model.lm_head.out_features)  # all rows end with their first token, those that wait too
    done = generate(model, encoder, chosen, rows=4, max_new_tokens=5, end_ids=everything)
    assert done.finished.all() and torch.equal(done.ids, one.ids)


def test_prompts_are_read_in_parts_of_so_many_tokens(tiny, picture, monkeypatch):
    model, encoder = tiny
    chosen, told = prompts(encoder, picture), options(encoder)
    whole, read, prefill = generate(model, encoder, chosen, **told), [], sampler.prefill

    def watched(model, encoder, part):
        read.append(sum(len(prompt.input_ids) for prompt in part))
        return prefill(model, encoder, part)

    monkeypatch.setattr(sampler, "prefill", watched)
    monkeypatch.setattr(sampler, "PREFILL", 60)
    longest = max(len(prompt.input_ids) for prompt in chosen)
    in_parts = generate(model, encoder, chosen, **told)
    assert len(read) > 3 and max(read) <= 60 + longest  # a shared beginning counts once
    assert in_parts.rows() == whole.rows() and torch.allclose(in_parts.logps, whole.logps, atol=1e-5)


def test_the_rows_in_flight_fit_into_memory(tiny, picture, monkeypatch):
    """Prompts and completions at their longest; a prompt's keys are held once for all of its rows."""
    model, encoder = tiny
    text = model.config.get_text_config()
    token = 2 * text.num_hidden_layers * text.hidden_size * 4  # bytes
    monkeypatch.setattr(sampler, "CACHE_BYTES", 1000 * token)
    assert sampler.fitting(model, 9, 60, 40) == 11  # 9 prompts of 60 tokens: 460 left for rows of 40
    assert sampler.fitting(model, 100, 60, 40) == 10 and sampler.fitting(model, 9, 5000, 40) == 1
    monkeypatch.setattr(sampler, "CACHE_BYTES", 200 * token)
    told, most = options(encoder), []
    advance = RowCache.advance
    monkeypatch.setattr(RowCache, "advance", lambda cache: most.append(len(cache)) or advance(cache))
    assert generate(model, encoder, prompts(encoder, picture), **told).rows() and 1 <= max(most) <= 4


def test_rows_move_up_and_those_that_stay_are_not_copied():
    held = torch.arange(12).view(6, 2)
    move_up(held, [0, 1, 3, 5])
    assert held[:4].tolist() == [[0, 1], [2, 3], [6, 7], [10, 11]]
    move_up(held, [0, 1])
    assert held[:2].tolist() == [[0, 1], [2, 3]]


class Calls(TorchDispatchMode):
    """Counts what would be a kernel: calls that are no view."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.count[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


def calls_a_step(model, encoder, chosen, **told):
    """Of a decoding step, as the difference of two lengths."""
    totals = []
    for tokens in (6, 7):
        with Calls() as calls:
            generate(model, encoder, chosen, end_ids=[-1], **{**told, "max_new_tokens": tokens})
        totals.append(sum(calls.count.values()))
    return totals[1] - totals[0]


def test_kernels_of_a_decoding_step(tiny, picture):
    """48 a layer and 61 beside them: each is a launch, which is what a GPU waits for (experiments/speed)."""
    model, encoder = tiny
    told = options(encoder)
    del told["end_ids"]
    steps = calls_a_step(model, encoder, prompts(encoder, picture), **told)
    assert steps <= 48 * len(model.model.language_model.layers) + 61, steps
