"""Rollouts through vLLM servers: the same as the policy's own, or a clear error; nothing is lost with a server.

Against the real thing: MMEDEXPERT_VLLM="<command that serves a model folder on $PORT>" (docs/vllm.md).
"""

from __future__ import annotations

import copy
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gba import TARGETS
from vllm_server import ScriptedVllm, cut, garbage, half, hangs, lost, refuses

from mmedexpert.data.record import Record
from mmedexpert.engines import vllm
from mmedexpert.engines.vllm import Servers
from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.models.backbone import add_lora
from mmedexpert.models.encode import Encoder
from mmedexpert.training import sampler as samplers
from mmedexpert.training.grading import RulesGrader
from mmedexpert.training.rollouts import Guidance, roll_out
from mmedexpert.training.sampler import IN_PROCESS, Sampling, Served

NAME = "start-abc"


class World:
    """A policy that has learnt something, its questions, and servers of the model that it started from."""

    def __init__(self, tiny: Any, picture: Any, root: Path, count: int = 1) -> None:
        self.model, self.encoder = copy.deepcopy(tiny[0]), copy.copy(tiny[1])
        self.encoder._memory = type(self.encoder._memory)(2**20)
        self.root = root
        start = copy.deepcopy(self.model)
        self.policy = add_lora(
            self.model, r=4, alpha=8, dropout=0.5, target_modules=TARGETS, gradient_checkpointing=False, seed=0
        )
        self.learn(1)
        self.records = []
        for index in range(3):  # larger than the model sees them, one of them longer than wide
            picture(index, 200, 90 + 40 * index).save(root / f"{index}.png")
            self.records.append(
                Record(
                    id=str(index), images=(f"{index}.png",), question="heart rate" + " is low" * index,
                    options={"A": "high", "B": "low"}, answer="A", specialties=("x",), source="s", license="l",
                    split="train", image_group=str(index),
                )
            )  # fmt: skip
        encoders = [Encoder(tiny[1].tokenizer, tiny[1].image_processor) for _ in range(count)]
        self.servers = [ScriptedVllm(start, encoder, NAME) for encoder in encoders]

    def learn(self, seed: int) -> None:
        """Another update, as an optimiser makes it: in place."""
        drawn = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.policy.named_parameters():
                if "lora_B" in name:
                    weight.copy_(torch.randn(weight.shape, generator=drawn) * 0.2)

    def client(self, **settings: Any) -> Servers:
        urls = [server.url for server in self.servers]
        return Servers(urls, NAME, **{"timeout_s": 20.0, "patience_s": 20.0, **settings})

    def served(self, **settings: Any) -> Served:
        return Served(self.client(**settings), self.root / "served", "run", lambda: 100)

    def sample(self, sampler: Any, seed: int = 0, **options: Any) -> Any:
        settings = {"num_generations": 8, "max_new_tokens": 6, "temperature": 1.3, "top_p": 1.0, "top_k": 0, **options}
        return roll_out(
            self.policy, self.encoder, self.records, self.root, sampling=Sampling(**settings),
            guidance=Guidance((1, 1, 1, 1), 1.0, "none", "prompted", "group"),
            reward_weights={"accuracy": 1.0, "format": 0.2}, protocol="robust", grader=RulesGrader(),
            seeds=[seed, seed + 1, seed + 2], sampler=sampler,
        )  # fmt: skip


@pytest.fixture()
def world(tiny, picture, tmp_path):
    found = World(tiny, picture, tmp_path)
    with found.servers[0]:
        yield found


@pytest.fixture()
def two(tiny, picture, tmp_path):
    found = World(tiny, picture, tmp_path, count=2)
    with ExitStack() as stack:
        for server in found.servers:
            stack.enter_context(server)
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(vllm, "POLL_SECONDS", 0.05)


def equal(one: Any, other: Any) -> None:
    assert one.completions == other.completions and one.texts == other.texts
    assert (one.sampling_logps - other.sampling_logps).abs().max() < 1e-5
    for name in ("mask", "finished", "outcome", "advantages"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_rollout_through_a_server_is_the_policys_own(world):
    """Prompt, images, instructions, seeds, temperature, banned tokens, adapter: all of it goes over."""
    own, through = world.sample(IN_PROCESS), world.sample(world.served())
    equal(own, through)
    assert len({tuple(row) for row in own.completions}) > 6, "they must differ to be compared"
    assert not through.finished.all() or not own.finished.all()


def test_answers_follow_the_adapter_and_only_a_changed_one_travels(world):
    sampler, server = world.served(), world.servers[0]
    first = world.sample(sampler)
    world.sample(sampler, seed=9)
    assert len(server.loaded) == 2, "the probe, and the policy once"
    world.learn(2)
    equal(world.sample(IN_PROCESS), world.sample(sampler))
    assert world.sample(sampler).completions != first.completions
    for seed in (3, 4):
        world.learn(seed)
        world.sample(sampler)
    assert len(set(server.loaded)) == len(server.loaded) == 5, "a name is used once"
    assert set(server.adapted) == {NAME, server.loaded[-1]}, "the ones before are unloaded"
    assert sorted(path.name for path in (world.root / "served").iterdir()) == sorted(server.loaded[-2:])


def test_two_samplers_of_one_run_share_no_name(world):
    """A resumed process has other weights under the same number."""
    world.sample(world.served())
    world.learn(5)
    equal(world.sample(IN_PROCESS), world.sample(world.served()))


@pytest.mark.parametrize(
    ("fault", "timeout"), [(one, 60.0) for one in (refuses, half, cut, garbage, lost)] + [(hangs(5.0), 3.0)]
)
def test_what_a_server_fails_is_sent_again(world, fault, timeout):
    own, sampler = world.sample(IN_PROCESS), world.served(timeout_s=timeout)
    world.sample(sampler)
    world.servers[0].faults += [fault, lambda answer: answer, fault]
    equal(own, world.sample(sampler))
    assert world.servers[0].faults == []


def test_a_server_that_died_gets_the_adapter_again(world):
    own, sampler, server = world.sample(IN_PROCESS), world.served(), world.servers[0]
    world.sample(sampler)

    def dies(answer: Any) -> None:
        server.stop()
        threading.Timer(0.5, server.start).start()

    server.faults.append(dies)
    equal(own, world.sample(sampler))
    assert set(server.adapted) == {NAME, server.loaded[-1]}


def test_a_server_that_forgot_its_adapter_never_answers_as_the_base(world):
    own, sampler, server = world.sample(IN_PROCESS), world.served(), world.servers[0]
    world.sample(sampler)
    del server.adapted[server.loaded[-1]]
    equal(own, world.sample(sampler))


def test_of_two_servers_each_has_its_records_and_one_may_die(two):
    own, sampler = two.sample(IN_PROCESS), two.served()
    equal(own, two.sample(sampler))
    images = [{str(body["messages"][0]["content"][0]) for body in server.seen} for server in two.servers]
    assert sorted(map(len, images)) == [1, 2] and not images[0] & images[1], "an image is seen by one server"
    two.servers[1].stop()
    equal(own, two.sample(sampler))
    two.learn(7)
    equal(two.sample(IN_PROCESS), two.sample(sampler))
    two.servers[1].start()
    two.learn(8)
    equal(two.sample(IN_PROCESS), two.sample(sampler))
    assert two.servers[1].adapted.keys() == two.servers[0].adapted.keys(), "who comes back has the same adapter"


def test_patience_ends_with_a_line_that_says_what_to_do(world):
    sampler = world.served(patience_s=0.3)
    world.sample(sampler)
    world.servers[0].stop()
    with pytest.raises(UserError, match=r"127\.0\.0\.1.*start it again and run the same command"):
        world.sample(sampler)
    world.servers[0].start()


def test_a_server_that_is_well_and_never_answers_is_given_up(world):
    sampler = world.served()
    world.sample(sampler)
    world.servers[0].faults += [refuses] * 100
    with pytest.raises(UserError, match=r"is well and failed 3 times to answer .*\.png"):
        world.sample(sampler)


def test_what_is_no_vllm_is_given_up(world, monkeypatch):
    """It is healthy, and has no log-probabilities to tell: nothing waits for it for ever."""
    monkeypatch.setattr(world.servers[0], "first", lambda body: {"choices": []})
    with pytest.raises(UserError, match="is well and fails"):
        world.sample(world.served())


def test_a_password_is_not_told(world):
    client = Servers([f"http://me:hunter2@127.0.0.1:{world.servers[0].port}"], "other")
    with pytest.raises(UserError) as told:
        client.check(10)
    assert "hunter2" not in str(told.value) and NAME in str(told.value)


def wrong_weights(world: World) -> None:
    world.servers[0].model = copy.deepcopy(world.servers[0].model)
    with torch.no_grad():
        for weight in world.servers[0].model.model.language_model.layers[0].mlp.parameters():
            weight.mul_(3.0)


def banned_token(answer: Any) -> Any:
    choices = [{**row, "token_ids": [BANNED, *row["token_ids"][1:]]} for row in answer[1]["choices"]]
    return 200, {**answer[1], "choices": choices}


BANNED = -1
GUARDS = {
    "another model": (lambda w: setattr(w.servers[0], "name", "other"), "serves other and not start-abc.*stage=serve"),
    "no room": (lambda w: setattr(w.servers[0], "room", 20), "room for 20 tokens.*--max-model-len"),
    "raw log-probabilities": (lambda w: setattr(w.servers[0], "raw", True), "--logprobs-mode processed_logprobs"),
    "rank": (lambda w: setattr(w.servers[0], "max_rank", 2), "refuses the adapter.*--max-lora-rank"),
    "silent adapter": (lambda w: setattr(w.servers[0], "silent", True), "answers like its base"),
    "other weights": (wrong_weights, "is not the policy: .* nats a token"),
    "prompt": (lambda w: setattr(w.encoder, "system_prompt", None) or w.servers[0].encoder.__dict__.update(
        chat=lambda text, images, chat=w.servers[0].encoder.chat: chat(text + "!", images)), "reads another prompt"),
    "image size": (lambda w: w.servers[0].encoder.__dict__.update(
        patches=lambda image, patches=w.servers[0].encoder.patches: patches(image.resize((28, 28)))),
        "reads another prompt"),
    "banned token": (lambda w: w.servers[0].faults.extend([banned_token] * 100), "not as asked"),
}  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
def test_guards(world, monkeypatch, guard):
    """Each silent way to sample from something else is found out before a completion counts."""
    change, words = GUARDS[guard]
    monkeypatch.setitem(globals(), "BANNED", world.encoder.banned_ids[0])
    change(world)
    if guard == "another model":
        world.servers[0].adapted = {"other": world.servers[0].model}
    with pytest.raises(UserError, match=words):
        world.sample(world.served())


def test_room_is_asked_for_the_longest_prompt_of_all_records(world, tmp_path):
    """Not of those of the first step: a question too long would be found hours later."""
    from types import SimpleNamespace

    from test_config import composed

    from mmedexpert.stages.policy import servers_of

    long = replace(world.records[1], question="heart rate is low " * 40)
    records, run = [world.records[0], long], SimpleNamespace(folder=tmp_path, run_id="run")
    lengths = [
        len(world.encoder.prompt(record, world.root, told).input_ids)
        for record in records
        for told in world.encoder.instructions.values()
    ]
    given = ("sampler=vllm", f"sampler.base_urls=[{world.servers[0].url}]")
    sampler = servers_of(composed(*given), None, run, world.encoder, records, world.root)
    assert sampler.longest() == max(lengths)
    free = servers_of(composed(*given, "gba.conditioning=free"), None, run, world.encoder, records, world.root)
    assert free.longest() == len(world.encoder.prompt(long, world.root).input_ids)
    sampler = Served(world.client(), tmp_path, "run", lambda: 4096 - 5)
    with pytest.raises(UserError, match=r"room for 4096 tokens, .* may take 4097"):
        world.sample(sampler)
    assert not world.servers[0].seen and not world.servers[0].loaded


def test_images_are_resized_by_the_client(world, monkeypatch):
    """The server's processor has nothing left to do: its patches are the trainer's to the bit."""
    sampler, server = world.served(), world.servers[0]
    seen: list[torch.Tensor] = []
    patches = server.encoder.patches
    monkeypatch.setattr(server.encoder, "patches", lambda image: seen.append(patches(image).patches) or patches(image))
    world.sample(sampler)
    own = [world.encoder.patches(samplers_image(world, index)).patches for index in range(3)]
    assert all(any(torch.equal(one, mine) for mine in own) for one in seen) and len(seen) >= 12


def samplers_image(world: World, index: int) -> Any:
    from mmedexpert.data.images import open_image

    return open_image(world.root / f"{index}.png")


def test_banned_tokens_are_told_to_the_server(world):
    world.sample(world.served())
    wanted = {str(token): -100 for token in world.encoder.banned_ids}
    assert all(body["logit_bias"] == wanted for body in world.servers[0].seen)
    assert {body["n"] for body in world.servers[0].seen} == {8 // len(PERSPECTIVES)}


def test_the_comparison_leaves_the_policy_in_training(world):
    world.policy.train()
    world.sample(world.served())
    assert world.policy.training and samplers.APART < 1


def written(config: Any, start: Any) -> tuple[Path, str]:
    """The folder of stage=serve, and what it is served as."""
    from mmedexpert.stages import serve

    made = serve.written(config, start)
    assert serve.name_of(made) == serve.served_name(config, start)
    return made.folder / "model", serve.name_of(made)


@pytest.fixture(scope="module")
def stage(answering):
    """Two updates of stage=gba, through a server of what stage=serve wrote and in process, from the same start."""
    from mmedexpert.models.backbone import load_encoder, load_model
    from mmedexpert.stages import gba
    from mmedexpert.stages.common import loading

    settings = ["stage=gba", "gba.temperature=1.2", "gba.lr=0.003", "logger.name=csv", "gba.num_iterations=1"]
    own = gba.run(answering(*settings))["reasoner"]
    config = answering(*settings, "sampler=vllm", "sampler.base_urls=[http://127.0.0.1:1]")
    folder, name = written(config, gba.start(config))
    with ScriptedVllm(load_model(folder, loading(config)), load_encoder(folder, loading(config)), name) as server:
        config.sampler.base_urls = [server.url]
        through = gba.run(config)["reasoner"]
        server.left = [*server.adapted]
    return config, own, through, server


def update_of(run: Any) -> dict[str, torch.Tensor]:
    from mmedexpert.models.adapters import LoraAdapter

    adapter = LoraAdapter.load(run.folder / "update")
    return {name: adapter.delta(name) for name in adapter.modules}


def test_a_reasoner_trained_through_a_server_is_the_one_trained_in_process(stage):
    _, own, through, server = stage
    assert own.run_id != through.run_id and len(server.seen) > 0
    one, other = update_of(own), update_of(through)
    assert max(float(delta.abs().max()) for delta in one.values()) > 1e-4
    for name, delta in one.items():
        assert torch.allclose(delta, other[name], atol=1e-3 * float(delta.abs().max())), name
    curves = [(run.folder / "curve.jsonl").read_text() for run in (own, through)]
    assert curves[0] == curves[1]


def test_weights_of_the_mismatch_are_logged_and_adapters_do_not_stay(stage):
    import csv

    _, _, through, server = stage
    rows = list(csv.DictReader(next(through.folder.rglob("metrics.csv")).open()))
    assert len(rows) == 2
    for row in rows:
        for name in ("min", "mean", "max"):
            assert float(row[f"sampling/importance_sampling_ratio/{name}"]) == pytest.approx(1, abs=1e-3)
        assert float(row["sampling/effective_sample_size"]) == pytest.approx(1, abs=1e-3)
    assert not (through.folder / "served").exists() and server.left == [server.name]


def test_what_samples_and_how_it_is_weighed_is_part_of_a_reasoner_and_where_is_not(stage):
    from mmedexpert.stages.reasoner_key import reasoner_key

    def key(**changes: Any) -> Any:
        other = copy.deepcopy(config)
        for name, value in changes.items():
            setattr(other.sampler, name, value)
        return reasoner_key(other, ["x"])

    config = stage[0]
    for same in ({"base_urls": ["http://b"]}, {"patience_s": 1.0}, {"adapters": "/x"}, {"mask_above": 9.0}):
        assert key(**same) == key()
    for other in ({"correction": "none"}, {"truncate_at": 5.0}, {"correction": "sequence_mask"}):
        assert key(**other) != key()
    assert "sampler" not in key(name="transformers") and key(name="transformers") != key()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage=gba", "sampler=vllm"], "sampler.base_urls"),
        (["stage=gba", "sampler=vllm", "sampler.base_urls=[here]"], "no web address"),
        (["stage=gba", "sampler=vllm", "sampler.base_urls=[http://a]", "gba.top_p=0.9"], "gba.top_p=0.9"),
        (["stage=gba", "sampler=vllm", "sampler.base_urls=[http://a]", "gba.top_k=20"], "gba.top_k=20"),
        (["stage=gba", "sampler=vllm", "sampler.base_urls=[http://a]", "gba.init=each"], "gba.init=each"),
        (["stage=serve"], "add sampler=vllm"),
        (["stage=gba", "sampler=vllm", "sampler.base_urls=[http://a]", "sampler.correction=clip"], "sequence_mask"),
    ],
)
def test_what_cannot_be_sampled_by_servers_is_refused_before_anything_is_done(answering, overrides, words):
    with pytest.raises(UserError, match=words):
        answering(*overrides)


@pytest.fixture(scope="module")
def asked(answering, stage):
    """The same models asked here and through a server of the base, and the reasoner through one of RL's start."""
    from mmedexpert.models.backbone import load_encoder, load_model
    from mmedexpert.stages import evaluation, gba
    from mmedexpert.stages.common import loading

    settings = ["stage=eval", "gba.temperature=1.2", "gba.lr=0.003", "eval.contamination=false"]
    names = "eval.models=[base,pediatrics,reasoner]"
    here = evaluation.run(answering(*settings, names))
    plain = answering("stage=serve", "sampler=vllm", "gba.init=base")
    folder, name = written(plain, None)
    found = {}
    with ScriptedVllm(load_model(folder, loading(plain)), load_encoder(folder, loading(plain)), name) as server:
        through = [*settings, "engine=vllm", f"engine.base_urls=[{server.url}]"]
        found = evaluation.run(answering(*through, names))
        server.left = [one for one in server.adapted if one != name]
        with pytest.raises(UserError, match=r"caci_vote is a whole model.*engine=openai"):
            evaluation.run(answering(*through, "eval.models=[caci_vote]"))
    config = answering(*settings)
    folder, name = written(config, gba.start(config))
    with ScriptedVllm(load_model(folder, loading(config)), load_encoder(folder, loading(config)), name) as start:
        through = [*settings, "engine=vllm", f"engine.base_urls=[{start.url}]", "seed=0", "eval.split=val"]
        on_start = evaluation.run(answering(*through, "eval.models=[reasoner]"))["reasoner"]
        with pytest.raises(UserError, match="is a whole model"):
            evaluation.run(answering(*through, f"eval.models=[{folder}]"))
        with pytest.raises(UserError, match=r"serves start-.* and not start-"):
            evaluation.run(answering(*through, "eval.models=[pediatrics]"))
    own = evaluation.run(answering(*settings, "eval.split=val", "eval.models=[reasoner]"))["reasoner"]
    return here, found, server, own, on_start, start


def test_an_evaluation_asks_for_room_before_its_first_question(world):
    from mmedexpert.engines.asking import Ask
    from mmedexpert.engines.served import ServedEngine

    client = world.client()
    client.check(8)
    engine = ServedEngine(client, world.encoder, max_new_tokens=8)
    asks = [Ask(str(n), "heart rate " * n, (world.root / "0.png",)) for n in (1, 200)]
    world.servers[0].room = 300
    assert [place for place, _ in engine(asks[:1])] == [0]
    seen = len(world.servers[0].seen)
    with pytest.raises(UserError, match=r"has room for 300 tokens, .*--max-model-len"):
        list(engine(asks))
    assert len(world.servers[0].seen) == seen


def responses(run: Any) -> list[Any]:
    from mmedexpert.runtime.jsonl import read_lines

    return [(row["id"], row["response"], row["tokens"]) for row in read_lines(run.folder / "predictions.jsonl", ())]


def test_models_asked_of_servers_answer_as_they_do_here(asked):
    here, through, server, *_ = asked
    for name in ("base", "pediatrics", "reasoner"):
        assert here[name].run_id != through[name].run_id
        assert sorted(responses(here[name])) == sorted(responses(through[name])), name
    assert responses(here["base"]) != responses(here["pediatrics"])
    assert len(server.loaded) == 2, "an adapter each, and none for the base"
    assert server.left == [], "each was taken back when its questions were answered"


def test_a_reasoner_is_asked_of_servers_of_its_start_by_its_update(asked):
    *_, own, on_start, start = asked
    assert sorted(responses(own)) == sorted(responses(on_start)) and len(start.loaded) == 1
