"""trainer.micro_batch_tokens=auto: a step that runs out of memory is done again in smaller passes, and is the step of a
run that had them from the start."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from test_config import composed
from test_distributed import TRAINING, given_rollout, policy_of, samples
from test_distributed import gba_module as gba

from mmedexpert.errors import UserError
from mmedexpert.models.backbone import core_of
from mmedexpert.runtime.curve import STEPS, read_curve
from mmedexpert.stages.common import training_key
from mmedexpert.training import memory
from mmedexpert.training.batches import Samples
from mmedexpert.training.fit import fit, trained_weights
from mmedexpert.training.memory import AUTO, MicroBatches, setup_of
from mmedexpert.training.sft import SftModule


class Device:
    """Room for passes of so many tokens, and none for those whose numbers are given; what was asked, and refused."""

    def __init__(self, model, room, without=()):
        self.room, self.without, self.asked, self.refused = room, without, [], []
        core_of(model).model.language_model.register_forward_pre_hook(self.look, with_kwargs=True)

    def look(self, _, given, named):
        self.asked.append(named["inputs_embeds"].shape[1])
        if self.asked[-1] > self.room or len(self.asked) in self.without:
            self.refused.append(self.asked[-1])
            raise torch.OutOfMemoryError(f"{self.asked[-1]} tokens")


@pytest.fixture()
def pictures(picture):
    return [picture(n) for n in range(3)]


def trained(tiny, pictures, folder, tokens, room=10**6, *, kind="dsa", dropout=False, steps=3, stop=None, without=()):
    """(weights, metrics, its Device) of a run."""
    policy, encoder = policy_of(tiny), tiny[1]
    for layer in policy.modules() if dropout else ():
        if hasattr(layer, "lora_dropout"):
            layer.lora_dropout["default"] = torch.nn.Dropout(0.3)
    device = Device(policy, room, without)
    if kind == "dsa":
        batch = Samples(*zip(*samples(encoder, pictures), strict=True))
        module = SftModule(policy, encoder, steps=steps, micro_batch_tokens=tokens, **TRAINING)
    else:
        batch, module = given_rollout(encoder, pictures), gba(policy, encoder, "grpo")
        module.steps, module.passes = steps, MicroBatches(tokens)

    def stream(step):
        for number in itertools.count(step):
            if number == stop:
                raise KeyError("killed")
            yield batch

    folder.mkdir(exist_ok=True)
    metrics = fit(module, stream, folder=folder, checkpoint_every=2, accelerator="cpu")
    return trained_weights(policy), metrics, device


@pytest.mark.parametrize("kind", ["dsa", "gba"])
@pytest.mark.parametrize("dropout", [False, True])
def test_a_step_without_room_is_that_of_smaller_passes(tiny, pictures, tmp_path, capsys, kind, dropout):
    found, metrics, device = trained(tiny, pictures, tmp_path / "a", AUTO, 100, kind=kind, dropout=dropout)
    tokens = int(metrics["memory/micro_batch_tokens"])
    assert device.refused and metrics["memory/halved"] == len(device.refused) >= 1 and tokens <= 100
    told = " ".join(capsys.readouterr().err.split())
    assert "auto: a step is one pass, on a CPU" in told and f"again in passes of at most {tokens} tokens" in told
    wanted, plain, other = trained(tiny, pictures, tmp_path / "b", tokens, kind=kind, dropout=dropout)
    assert not other.refused and device.asked[-len(other.asked) :] == other.asked
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    same = [name for name in plain if not name.startswith(("timing_s", "perf")) and name != "step_time"]
    assert {name: metrics[name] for name in same} == {name: plain[name] for name in same}
    assert [row["memory/halved"] for row in read_curve(tmp_path / "a" / STEPS)] == [metrics["memory/halved"]] * 3


def test_a_pass_that_fails_behind_another_leaves_nothing_of_it(tiny, pictures, tmp_path):
    """The third pass of all is the second of its try: gradients and random numbers of the first are not kept."""
    found, metrics, device = trained(tiny, pictures, tmp_path / "a", AUTO, 100, dropout=True, without=(3,))
    assert len(device.refused) == metrics["memory/halved"] == 2 and device.asked[1] not in device.refused
    tokens = int(metrics["memory/micro_batch_tokens"])
    wanted = trained(tiny, pictures, tmp_path / "b", tokens, dropout=True)[0]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    other = trained(tiny, pictures, tmp_path / "c", 2 * tokens, dropout=True)[0]
    assert not all(torch.equal(other[name], wanted[name]) for name in wanted)  # how it is cut decides masks


def test_a_resumed_run_keeps_its_passes(tiny, pictures, tmp_path):
    whole, metrics, _ = trained(tiny, pictures, tmp_path / "a", AUTO, 100, dropout=True, steps=4)
    with pytest.raises(KeyError):
        trained(tiny, pictures, tmp_path / "b", AUTO, 100, dropout=True, steps=4, stop=3)
    rest, again, device = trained(tiny, pictures, tmp_path / "b", AUTO, 100, dropout=True, steps=4)
    assert not device.refused and all(torch.equal(whole[name], rest[name]) for name in whole)
    assert again["memory/halved"] == metrics["memory/halved"] >= 1


def test_what_never_fits_ends_in_one_line(tiny, pictures, tmp_path):
    with pytest.raises(UserError, match=r"step 1: a sequence of \d+ tokens alone does not fit.*gradient_checkpointing"):
        trained(tiny, pictures, tmp_path / "a", AUTO, 10)
    with pytest.raises(UserError, match=r"step 1 ran out of memory: .*smaller number than 10000, or auto"):
        trained(tiny, pictures, tmp_path / "b", 10_000, 50)


def test_auto_takes_what_the_plan_leaves_of_a_device(tiny, monkeypatch):
    """On a card that says it has so many bytes free: weights and LoRA are there, the moments only once begun."""
    policy, free = policy_of(tiny), 3 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    setup, card = setup_of(policy, 2, 1), torch.device("cuda")
    assert setup.checkpointing and setup.computed == 2 and setup.weights == setup.trained == 4
    assert setup.lora_bytes == sum(p.nbytes for p in policy.parameters() if p.requires_grad)

    def room(begun):
        left = free + 4000 - setup.gradient_bytes - memory.CACHE_BYTES - (0 if begun else setup.state_bytes)
        return setup.fitting_tokens(0.9 * left)

    for begun in (False, True):
        assert memory.fitting(policy, card, computed=2, begun=begun, devices=1) == room(begun) > 100_000
    held = replace(setup, checkpointing=False)
    assert held.fitting_tokens(2**30) < setup.fitting_tokens(2**30)
    free = 0
    assert memory.fitting(policy, card, computed=2, begun=True, devices=1) == 1
    assert memory.fitting(policy, torch.device("cpu"), computed=None, begun=True, devices=1) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0", "above 0, auto, or null"), ("many", "above 0, auto, or null"), ("-3", "above 0"),
        ("auto trainer=fsdp", "meet in each layer"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        composed(*f"trainer.micro_batch_tokens={given}".split())
    assert composed("trainer.micro_batch_tokens=auto").trainer.micro_batch_tokens == AUTO


def test_auto_is_part_of_an_identity_as_the_word_and_only_with_dropout():
    """A number that a device gave would make another run of the same command on every card."""
    keys = [
        training_key(composed(f"model.lora.dropout={dropout}", f"trainer.micro_batch_tokens={tokens}"))
        for dropout in (0.0, 0.1) for tokens in ("auto", 8192)
    ]  # fmt: skip
    assert keys[0] == keys[1] == {"precision": "32-true"}
    assert [key["micro_batch_tokens"] for key in keys[2:]] == [AUTO, 8192]
