"""Versions of rules: a rule whose outputs change cannot keep its number, and so cannot reuse what it made before.

`python tests/test_versions.py` writes the outputs of every rule whose number was raised; it refuses the others.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_benchmarks_choice as choice
import test_benchmarks_open as open_
import torch
import yaml
from curation_rules import CURATION
from judging_rules import JUDGING
from PIL import Image

from mmedexpert.data import overlap
from mmedexpert.data.images import open_image
from mmedexpert.data.record import Record, Trace
from mmedexpert.data.records import plain
from mmedexpert.data.splits import assign_splits
from mmedexpert.engines.asking import Ask, Reply
from mmedexpert.evaluation import best_of, stats
from mmedexpert.evaluation.predict import QuestionSet, majority_engine, perspectives_of, predict
from mmedexpert.evaluation.summary import Summary
from mmedexpert.evaluation.swap import swapped
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.rubrics import adherence
from mmedexpert.merging import low_rank, methods
from mmedexpert.merging.activations import regmean
from mmedexpert.models.encode import prompt_text, target_text
from mmedexpert.models.flight import draw, uniform, warp
from mmedexpert.runtime.build import build
from mmedexpert.runtime.versions import VERSIONS, rule_followed_by, rule_of, text_of, versions
from mmedexpert.scoring import medevalkit, robust
from mmedexpert.scoring import text as metrics
from mmedexpert.sources import gmai, medxpertqa, mmmu, omnimedvqa, path_vqa, pmc_vqa, slake, vqa_rad
from mmedexpert.sources.phantom import lessons
from mmedexpert.stages.measured import weights_of
from mmedexpert.training import losses, rewards
from mmedexpert.training.advantages import followed_and_right, group_relative, guideline_based
from mmedexpert.training.batches import batch_indices, step_seed
from mmedexpert.training.rollouts import assign_perspectives
from mmedexpert.training.sft import MuonWithAdamW

REFERENCES = Path(__file__).parent / "references" / "versions.json"
CONF = Path(__file__).parents[1] / "conf"
OPTIONS = {"A": "normal heart", "B": "cardiomegaly", "C": "myxoma", "D": "dextrocardia"}
TEXTS = [
    "<think>Ratio 0.57. Criterion 0.50. 0.57 > 0.50 so cardiomegaly B.</think><answer>B</answer>",
    "<think>A wide heart shadow is the pattern of cardiomegaly.</think><answer>B</answer>",
    "<think>normal heart unlikely because 0.57 > 0.50. So cardiomegaly.</think><answer>B</answer>",
    "<think>Prior 50%. Ratio 0.57 likelihood ratio 9. Posterior 90% cardiomegaly.</think><answer>B</answer>",
    "The answer is (C).", "A or B", "", "<answer>A</answer>", "Answer: D, not B", "It is cardiomegaly.",
]  # fmt: skip
OPEN = [("left lower lobe", "lower lobe of the left lung"), ("yes", "Yes."), ("pneumonia", "effusion")]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def record(index: int = 0, **changes: Any) -> Record:
    values = {
        "id": f"q{index}", "images": (f"{index}.png",), "question": "Adult. What follows?", "options": OPTIONS,
        "answer": "B", "specialties": ("adult_medicine",), "source": "s", "license": "l", "split": "train",
        "image_group": f"{index}", "trace": Trace("analytical", ("Ratio 0.57.", "0.57 > 0.50.")),
    }  # fmt: skip
    return Record(**{**values, **changes})


def told(records: list[Record], root: Path) -> Any:
    """What a source made, and a coarse look at its pictures: another Pillow may draw an edge otherwise."""
    looks = [
        np.asarray(open_image(root / r.images[0]).resize((2, 2)), dtype=float).mean(axis=2).tolist() for r in records
    ]
    lines = [
        [r.id if r.source == "phantom" else "", r.question, r.options, r.answer, list(r.specialties), r.split,
         list(r.trace.steps) if r.trace else None, r.latent.get("value")]
        for r in records
    ]  # fmt: skip
    return {"records": lines, "looks": looks}


def phantom(folder: Path) -> Any:
    from mmedexpert.sources.phantom.source import phantom

    records, root, _ = phantom(None, folder, seed=0, train=8, val=1, test=2)
    return told(records, root)


def noise(path: Path, seed: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def labelled(folder: Path) -> Any:
    from mmedexpert.sources.labelled import labelled_images

    rows = ["file,label,patient,age,sex"]
    for i, label in enumerate(["mass", "cyst", "normal", "stone", "No Finding"] * 4):
        noise(folder / "set" / f"{i}.png", i)
        rows.append(f"{i}.png,{label},p{i // 2},{40 + i},{'male' if i % 2 else 'female'}")
    (folder / "set" / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "set" / "dataset.yaml").write_text("specialties: [adult_medicine]\n")
    records, root, *_ = labelled_images(folder / "set", folder / "out", seed=0)
    return told(sorted(records, key=lambda r: r.images), root)


def medr1(folder: Path) -> Any:
    from mmedexpert.sources.medr1 import medr1

    lines = []
    for i in range(12):
        noise(folder / "Images" / "Set" / f"{i}.png", i)
        problem = f"What is seen in {i}? A)cyst, B)mass, T2 N0 M0, C)stone, D)nothing"
        lines.append(
            {"image": f"Images/Set/{i}.png", "problem": problem, "solution": f"<answer> {'ABCD'[i % 4]} </answer>"}
        )
        lines[-1]["modality"] = ["CT", "MRI", "Fundus Photography"][i % 3]
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records, root, *_ = medr1(folder, None, seed=0)
    return told(records, root)


def images(folder: Path) -> Any:
    sixteen = (np.random.default_rng(0).integers(0, 2**16, (24, 32))).astype(np.uint16)
    Image.fromarray(sixteen).save(folder / "16.png")
    for mode in ("L", "RGB", "RGBA", "P", "1"):
        noise(folder / f"{mode}.png", 1, mode)
    return [
        [list(open_image(p).size), np.asarray(open_image(p).resize((2, 2), Image.Resampling.BOX)).tolist()]
        for p in sorted(folder.glob("*.png"))
    ]


def taught(_: Path) -> Any:
    rng = np.random.default_rng(0)
    read, look = lessons.reading(rng), lessons.looking(rng)
    return [read.prompt, read.completion, look.prompt, look.completion]


def optimiser(_: Path) -> Any:
    """Four steps of the training loop's own step on a small net: rates, clipped gradients, AdamW; and Muon's step."""
    import lightning as L
    from torch import nn

    from mmedexpert.training.module import TrainingModule

    class Line(TrainingModule):
        lr, weight_decay = 0.1, 0.01

        def __init__(self) -> None:
            super().__init__(seed=0, steps=4, warmup_ratio=0.5, max_grad_norm=0.3)
            self.model = nn.Linear(3, 1)
            for parameter in self.model.parameters():
                nn.init.constant_(parameter, 0.5)
            self.seen: list[list[float]] = []

        def training_step(self, batch: torch.Tensor, _: int) -> None:
            rate = self.optimizers().param_groups[0]["lr"]
            self.descend(iter([(self.model(batch) ** 2).mean()]), 1)
            self.seen.append([rate, *self.model.weight.flatten().tolist()])

    line = Line()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_steps=4, accelerator="cpu", enable_checkpointing=False, barebones=False, **options)
    trainer.fit(line, torch.utils.data.DataLoader([randn(5, 3, seed=i) for i in range(4)], batch_size=None))
    matrix, rest = torch.nn.Parameter(randn(4, 3)), torch.nn.Parameter(randn(3, seed=1))
    muon = MuonWithAdamW([matrix], [rest], muon_lr=0.02, lr=0.1, weight_decay=0.01)
    (matrix @ rest).square().sum().backward()
    muon.step()
    return [line.seen, matrix.tolist(), rest.tolist()]


def small_model() -> Any:
    from mmedexpert.models.encode import Encoder
    from mmedexpert.models.tiny import build_image_processor, build_model, build_tokenizer

    tokenizer = build_tokenizer(["the heart rate is low within high so A B C D 0 1 2 3"] * 4, 300)
    model = build_model(
        tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vision_hidden_size=32, vision_depth=1,
        vision_num_heads=2, seed=0,
    )  # fmt: skip
    return model.eval(), Encoder(tokenizer, build_image_processor(56))


def policy_of(model: Any) -> Any:
    from mmedexpert.models.backbone import add_lora

    return add_lora(
        model, r=2, alpha=4, dropout=0.0, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)",
        gradient_checkpointing=False, seed=0,
    )  # fmt: skip


def asked(folder: Path, encoder: Any, *texts: str) -> list[Any]:
    noise(folder / "a.png", 0)
    return [encoder.chat(text, [encoder.image(folder / "a.png")]) for text in texts]


def curve(module: Any, stream: Any, folder: Path, *names: str) -> list[list[float]]:
    """What the module logs at each of its steps."""
    from mmedexpert.training.fit import fit

    seen: list[list[float]] = []
    step = module.training_step

    def watched(batch: Any, batch_idx: int) -> None:  # a name Lightning looks for
        step(batch, batch_idx)
        seen.append([float(module.trainer.callback_metrics[name]) for name in names])

    module.training_step = watched
    fit(module, stream, folder=folder, checkpoint_every=100, accelerator="cpu")
    return seen


def sft(folder: Path) -> Any:
    """Four steps on one batch: the loss, which falls, and its gradient's norm."""
    from mmedexpert.training.batches import Samples
    from mmedexpert.training.sft import SftModule

    model, encoder = small_model()
    samples = Samples(
        asked(folder, encoder, "the heart", "the heart rate is", "low"),
        [encoder.completion(f"so {letter} is high") for letter in "ABC"],
    )
    module = SftModule(
        policy_of(model), encoder, lr=0.01, weight_decay=0.0, seed=0, steps=4, warmup_ratio=0.0, max_grad_norm=1.0
    )
    return curve(module, lambda step: iter([samples] * 4), folder, "loss", "grad_norm", "entropy")


def distil(folder: Path) -> Any:
    """Four steps under two experts on one lesson: the divergence, which falls, and its gradient's norm."""
    from mmedexpert.training.distil import DistilModule, Lesson

    model, encoder = small_model()
    teacher = policy_of(small_model()[0])
    teacher.add_adapter("b", teacher.peft_config["default"])
    for place, (name, parameter) in enumerate(teacher.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(0.3 * randn(*parameter.shape, seed=place))
        if "lora_A.b" in name:
            parameter.data.copy_(randn(*parameter.shape, seed=place))
    lesson = Lesson(
        asked(folder, encoder, "the heart", "the heart rate is", "low"),
        [encoder.completion(f"so {letter} is high") for letter in "ABC"], ["default", "b", "default"],
    )  # fmt: skip
    training: dict[str, Any] = {"seed": 0, "steps": 4, "warmup_ratio": 0.0, "max_grad_norm": 1.0}
    module = DistilModule(policy_of(model), teacher, encoder, lr=0.02, weight_decay=0.0, **training)
    return curve(module, lambda step: iter([lesson] * 4), folder, "kl", "grad_norm", "agreement")


def gba(folder: Path) -> Any:
    """Four updates on one rollout with a cut-off completion and KL: loss, gradient, clipping, KL, entropy."""
    from mmedexpert.training.gba import GbaModule, Objective
    from mmedexpert.training.rollouts import Rollout

    model, encoder = small_model()
    prompts = [prompt for prompt in asked(folder, encoder, "the heart", "the heart rate is") for _ in range(2)]
    words = [encoder.completion(f"so {letter} is high") for letter in "ABCD"]
    mask = torch.zeros(4, max(map(len, words)), dtype=torch.long)
    for row, ids in enumerate(words):
        mask[row, : len(ids)] = 1
    finished, scores = torch.tensor([True, True, False, True]), torch.tensor([[1.0, 0.0], [0.2, 1.0]])
    rollout = Rollout(
        prompts, words, [""] * 4, [None] * 4, torch.zeros(mask.shape), mask, finished, scores,
        {"accuracy": [1.0, 0.0, 0.0, 1.0]}, torch.full((2, 2, 4), torch.nan), torch.zeros(2, 2, 4),
        torch.full((2, 2), torch.nan), torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [2.0, -0.5]]),
        {"gen": 0.0, "reward": 0.0},
    )  # fmt: skip
    objective = Objective(
        "grpo", epsilon=0.01, epsilon_high=0.02, beta=0.1, temperature=0.8, max_completion_length=8,
        mask_truncated_completions=True,
    )  # fmt: skip
    training: dict[str, Any] = {"seed": 0, "steps": 4, "warmup_ratio": 0.0, "max_grad_norm": 1.0}
    module = GbaModule(policy_of(model), encoder, objective, lr=0.02, weight_decay=0.0, **training)
    names = ("loss", "grad_norm", "clip_ratio/region_mean", "kl", "entropy", "reward")
    return curve(module, lambda step: iter([rollout] * 4), folder, *names)


def sampling(_: Path) -> Any:
    logits, chance = randn(5, 300) * 3, torch.linspace(0.01, 0.99, 5, dtype=torch.float64)
    drawn = {}
    for name, (temperature, top_p, top_k) in {"plain": (1.0, 1.0, 0), "p": (0.7, 0.8, 0), "k": (1.3, 1.0, 7)}.items():
        chances = warp(logits, temperature, top_p, top_k)
        drawn[name] = [draw(chances, chance).tolist(), chances.max(1).values.tolist()]
    seeds = [step_seed(3, 7), step_seed(3, 7, 1, 0)]
    return [drawn, seeds, uniform([3, 4], 2, 3).tolist(), assign_perspectives([1, 0, 0, 1], 8, "prompted")]


def advantages(_: Path) -> Any:
    outcome, style, gate = randn(3, 8).abs(), randn(3, 8, 4, seed=1).abs(), randn(3, 8, seed=2) > 0
    style[0, :4, 1:] = math.nan
    weights = [1.0, 0.5, 0.0, 2.0]
    plain = [group_relative(outcome, scale).tolist() for scale in ("group", "batch", "none")]
    return [plain, guideline_based(outcome, style, weights, scale=0.5, gate=gate).tolist()]


def learned_weights(_: Path) -> Any:
    style, right = randn(5, 8, 4, seed=1).abs(), (randn(5, 8, seed=2) > 0).float()
    style[:, :4, 1:] = math.nan
    return weights_of(followed_and_right(style, right).mean(0).tolist())


def all_losses(_: Path) -> Any:
    logps, old, ref = (-randn(4, 6, seed=i).abs() for i in range(3))
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1, 3:] = False
    mask[2] = False
    out = {}
    for kind in ("grpo", "dr_grpo", "dapo", "gspo"):
        loss, found = losses.policy_loss(
            logps, old, torch.tensor([1.0, -0.5, 0.3, -2.0]), mask, loss_type=kind, epsilon=0.2, epsilon_high=0.3,
            beta=0.1, ref_per_token_logps=ref, max_completion_length=6,
        )  # fmt: skip
        out[kind] = [float(loss), {name: float(value) for name, value in found.items()}]
    return out


def merged(rule: Callable[..., Any], **options: Any) -> Any:
    return rule([randn(4, 6, seed=i) for i in range(3)], **options).tolist()


def merged_factors(rule: Callable[..., Any], **options: Any) -> Any:
    from inspect import signature

    factors = [(randn(2, 6, seed=i), randn(4, 2, seed=10 + i)) for i in range(3)]
    assert next(iter(signature(rule).parameters)) == "factors"
    a, b = rule(factors, **options)
    return (b @ a).tolist()


def of_conf(rule: str) -> dict[str, Any]:
    for path in (CONF / "merge").glob("*.yaml"):
        method = yaml.safe_load(path.read_text())["method"] or {}
        if rule_of(method.get("_target_", "")).keys() == {rule}:
            return {key: value for key, value in method.items() if not key.startswith("_")}
    raise AssertionError(f"no file of conf/merge calls {rule}")


def merge_rule(rule: str, _: Path) -> Any:
    options = of_conf(rule)
    if rule == "regmean":
        pairs = [(randn(2, 6, seed=i), randn(4, 2, seed=10 + i)) for i in range(3)]
        inputs = [randn(6, 5, seed=20 + i) for i in range(2)]
        a, b = regmean(pairs[:2], pairs[2:], grams=[x @ x.T for x in inputs], **options)
        return (b @ a).tolist()
    if rule == "winner_take_all":
        deltas = [randn(4, 6, seed=i) for i in range(3)]
        return methods.winner_take_all(deltas[:2], [0.1 * deltas[2]], **options).tolist()
    if hasattr(low_rank, rule) and not hasattr(methods, rule):
        return merged_factors(getattr(low_rank, rule), **options)
    if rule == "caci":
        options.pop("scope", None)
        deltas = [randn(4, 6, seed=i) for i in range(3)]
        return methods.caci(deltas[:2], [0.1 * deltas[2]], **options).tolist()
    options.pop("scope", None)
    if rule in ("dare_linear", "dare_ties", "della"):
        options["name"] = "layer.weight"
    return merged(getattr(methods, rule), **options)


def grams(folder: Path) -> Any:
    """Gram matrices of two layers' inputs, whole and in the span of factors."""
    from safetensors.torch import load_file

    from mmedexpert.merging.collect import collect

    model, encoder = small_model()
    texts = asked(folder, encoder, "the heart", "the heart rate is")
    widths = {f"model.language_model.layers.{i}.mlp.up_proj.weight": 32 for i in range(2)}
    words = [encoder.completion(f"so {letter} is high") for letter in "AB"]
    found = []
    for place, stacks in enumerate((None, lambda name: randn(3, 32))):
        out = folder / str(place)
        collect(model, encoder, lambda: zip(texts, words, strict=True), 2, widths, stacks, out)
        made = load_file(out / "00000.safetensors")
        found.append({name: made[name][:3, :3].tolist() for name in sorted(made)})
    return found


def start(folder: Path) -> Any:
    """The mean of two adapters as one, as stages/gba.start makes it."""
    import copy

    from mmedexpert.models.adapters import LoraAdapter, concatenate_lora
    from mmedexpert.models.backbone import add_lora

    model, _ = small_model()
    for number in range(2):
        expert = add_lora(
            copy.deepcopy(model), r=2, alpha=4, dropout=0.0, target_modules=r".*layers\.0.*q_proj",
            gradient_checkpointing=False, seed=0,
        )  # fmt: skip
        for name, parameter in expert.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(randn(*parameter.shape, seed=number + ("lora_B" in name) * 10))
        expert.save_pretrained(folder / f"{number}")
    concatenate_lora([LoraAdapter.load(folder / f"{i}") for i in range(2)], [0.5, 0.5], folder / "mean")
    mean = LoraAdapter.load(folder / "mean")
    return mean.delta(next(name for name in mean.modules if "language_model" in name))[:4, :4].tolist()


def majority(_: Path) -> Any:
    train = [record(i, answer="ABBC"[i]) for i in range(4)]
    asks = [Ask(f"q{i}", "", ()) for i in range(2)]
    return [
        reply.text
        for _, reply in majority_engine(train, [record(0), record(1, options={"A": "x", "B": "myxoma"})])(asks)
    ]


def judged(judge: Callable[..., Any], _: Path) -> Any:
    asked = [(record(options=OPTIONS), text) for text in TEXTS]
    asked += [(record(options=None, answer=gold, kind="open"), text) for gold, text in OPEN]
    asked += [(record(options=None, answer="yes", kind="yes_no"), text) for _, text in OPEN]
    return [
        [v.correct, v.picked, v.parsed, {k: s for k, s in (v.scores or {}).items()}] for v in (judge(*a) for a in asked)
    ]


def numbers(_: Path) -> Any:
    right, other = np.arange(40) % 3 > 0, np.arange(40) % 4 > 0
    groups = [str(i // 2) for i in range(40)]
    return [
        stats.cluster_bootstrap_ci(right, groups, num_resamples=500, seed=0),
        stats.paired_cluster_bootstrap(right, other, groups, num_resamples=500, seed=0),
        stats.mcnemar_exact(right, other), stats.holm([0.01, 0.04, 0.03]), stats.across_seeds([0.1, 0.2, 0.4]),
    ]  # fmt: skip


MERGING = tuple(
    name for path in sorted((CONF / "merge").glob("*.yaml"))
    for name in rule_of((yaml.safe_load(path.read_text())["method"] or {}).get("_target_", "none")) if name in VERSIONS
)  # fmt: skip


def read(make: Callable[[Path], Any], load: Callable[..., Any], folder: Path, **options: Any) -> Any:
    """What a benchmark's reader makes of files in its published layout, the odd ones among them."""
    root = make(folder / "root")
    records, _, bad = load(root, folder / "out", **options)
    return [[json.loads(json.dumps(plain(one))) for one in records], sorted(reason[:40] for _, reason in bad)]


def gmai_files(root: Path) -> Path:
    rows = [choice.gmai_row(0, choice.picture(3)), choice.gmai_row(1, "0", D="d", answer="D"), choice.gmai_row(2, "x")]
    choice.table(root / gmai.FILE, rows, "\t")
    return root


def medxpertqa_files(root: Path) -> Path:
    rows = [choice.medxpert(0), choice.medxpert(1, label="Z"), choice.medxpert(2)]
    choice.put(root / "MM" / "test.jsonl", "\n".join(json.dumps(row) for row in rows))
    choice.zipped(root / "images.zip", choice.medxpert_images(2))
    return root


def omnimedvqa_files(root: Path) -> Path:
    for name, data in choice.omni_files().items():
        choice.put(root / name, data)
    return root


def pmc_vqa_files(root: Path) -> Path:
    choice.table(root / "test_2.csv", [choice.pmc(0, 2), choice.pmc(1, 2, " D "), choice.pmc(2, 2)])
    for n in range(2):
        choice.put(root / "figures" / f"PMC{n}_F1.jpg", choice.picture(n, "JPEG"))
    return root


def path_vqa_files(root: Path) -> Path:
    rows = open_.vqa_rows(("Is it big?", "Yes "), ("What is it?", "a cyst"), ("", "no"))
    open_.write_parquet(root / "data/test-00000-of-00001.parquet", rows)
    return root


def vqa_rad_files(root: Path) -> Path:
    rows = [open_.native(), open_.native(qid="2", answer=4), open_.native(qid=3, phrase_type="para", answer="No")]
    return open_.native_folder(root, {vqa_rad.NATIVE: rows})


def judged_by(module: Any, asked: list[Record]) -> Any:
    answers = [*TEXTS, "B", "(C)", "The image shows a mass."]
    verdicts = [[module.judge(one, text) for text in answers] for one in asked]
    return [[module.ask(one) for one in asked], [[[v.correct, v.picked, v.parsed] for v in row] for row in verdicts]]


def gmai_rule(folder: Path) -> Any:
    return [read(gmai_files, gmai.load, folder), judged_by(gmai, [choice.GMAI])]


def mmmu_rule(folder: Path) -> Any:
    files = partial(open_.mmmu_folder, rows=[open_.mmmu_row(1, "Pharmacy"), open_.mmmu_row(2, "Pharmacy", answer="Z")])
    return [read(files, mmmu.load, folder), judged_by(mmmu, [open_.choice(), open_.open_question()])]


def summary(folder: Path) -> Any:
    """Everything that is told of twelve questions, each asked under all perspectives."""
    names = ("adult_medicine", "pediatrics")
    asked = [
        record(i, specialties=names[i % 2 :], image_group=f"{i // 2}", answer="ABCD"[i % 4], modality="CT" * (i % 3))
        for i in range(12)
    ]
    for one in asked:
        noise(folder / one.images[0], 0)
    questions = QuestionSet("q", asked, folder, medevalkit.ask, medevalkit.judge)

    def engine(asks: list[Ask]) -> Any:
        for place, _ in enumerate(asks):
            yield place, Reply(TEXTS[place % len(TEXTS)], 3, ("stop", "length")[place % 5 == 0], 0.0, -place / 9)

    options: dict[str, Any] = {"protocol": "robust", "perspectives": "vote", "style": "small", "title": "q"}
    rows = predict(engine, questions, folder / "predictions.jsonl", **options)
    clean = {one.id for one in asked[::3]}
    drawn = Summary(num_resamples=200, seed=0)
    return drawn.of(rows, asked, protocol="robust", specialties=names, breakdowns=(), clean=clean)


def several(_: Path) -> Any:
    """Eight questions of four samples: what is picked of them, and what that comes to."""
    picks = ["ABBA", "BABC", "CCAB", "AAAA"]
    rows = [
        {"image_group": f"{i // 2}", "greedy": i % 3 > 0, "picked": [None if x == "C" else x for x in picks[i % 4]],
         "correct": [one == "A" for one in picks[i % 4]], "scores": [None if j == i else (i * j) % 3 for j in range(4)]}
        for i in range(8)
    ]  # fmt: skip
    chosen = [[best_of.voted(row["picked"]), best_of.chosen(row["scores"])] for row in rows]
    return [chosen, best_of.numbers_of(rows, picked=True, num_resamples=100, seed=0)]


def seen_before(folder: Path) -> Any:
    for i in range(6):
        Image.fromarray(np.kron(np.random.default_rng(i % 4).integers(0, 255, (6, 6), np.uint8), np.ones((8, 8)))
                        .astype(np.uint8)).save(folder / f"{i}.png")  # fmt: skip
    questions = ["Is the heart of this adult wide?", "Which finding is seen in the left lung?"]
    train, test = ([record(i, question=questions[i % 2]) for i in part] for part in ((0, 1, 2), (3, 4, 5)))
    found = overlap.overlap(*(overlap.fingerprints(part, folder, None) for part in (train, test)))
    return [overlap.report(found), sorted(found.clean)]


BENCHMARKS: dict[str, Callable[[Path], Any]] = {
    "gmai": gmai_rule,
    "medxpertqa": partial(read, medxpertqa_files, medxpertqa.load),
    "mmmu": mmmu_rule,
    "omnimedvqa": partial(read, omnimedvqa_files, omnimedvqa.load),
    "path_vqa": partial(read, path_vqa_files, path_vqa.load),
    "pmc_vqa": partial(read, pmc_vqa_files, partial(pmc_vqa.load, file="test_2.csv")),
    "slake": partial(read, open_.slake_folder, slake.load),
    "vqa_rad": partial(read, vqa_rad_files, vqa_rad.load),
}

RULES: dict[str, Callable[[Path], Any]] = {
    "phantom": phantom,
    "labelled_images": labelled,
    "medr1": medr1,
    "splits": lambda _: assign_splits(
        [f"g{i // 2}" for i in range(40)], seed=0, strata=["ab"[i % 2] for i in range(40)]
    ),
    "images": images,
    "prompts": lambda _: [prompt_text(record(), "Say so."), target_text(record()), target_text(record(trace=None))],
    "lessons": taught,
    "batches": lambda _: list(islice(batch_indices(7, 3, 1, 2), 5)),
    "optimiser": optimiser,
    "sft": sft,
    "sampling": sampling,
    "rewards": lambda _: rewards.outcome(
        TEXTS, record=[record(0, options=OPTIONS, answer="B")] * len(TEXTS), weights={"accuracy": 1.0, "format": 0.2}
    ),
    "open_rewards": lambda _: [
        rewards.outcome(
            [text for _, text in OPEN],
            record=[record(0, options=None, answer=gold, kind=kind) for gold, _ in OPEN],
            weights={"accuracy": 1.0},
        )
        for kind in ("open", "closed")
    ],
    "rubrics": lambda _: [[adherence(text, OPTIONS, name) for name in PERSPECTIVES] for text in TEXTS],
    "advantages": advantages,
    "learned_weights": learned_weights,
    "losses": all_losses,
    "gba": gba,
    "start": start,
    "grams": grams,
    "distil": distil,
    "rotate": lambda _: [[perspectives_of(record(0, id=f"q{i}"), way) for way in ("rotate", "vote")] for i in range(6)],
    "majority": majority,
    "swap": lambda _: swapped(
        [record(i, images=(f"{i}.png",), image_group=str(i // 2), modality="CT" if i < 5 else "MRI") for i in range(7)]
    ),
    "robust": partial(judged, robust.judge),
    "medevalkit": partial(judged, medevalkit.judge),
    "metrics": lambda _: [metrics.open_scores(text, gold, "en") for gold, text in OPEN],
    "stats": numbers,
    "summary": summary,
    "best_of": several,
    "overlap": seen_before,
    **{rule: partial(merge_rule, rule) for rule in MERGING},
    **BENCHMARKS,
    **CURATION,
    **JUDGING,
}


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=float))


def same(one: Any, other: Any) -> bool:
    """Equal but for roundings: 1e-3 of a number, and a grey level of a picture."""
    if isinstance(one, float | int) and isinstance(other, float | int) and not isinstance(one, bool):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4) or (one != one and other != other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        if "looks" in one:
            close = np.allclose(np.array(one["looks"]), np.array(other["looks"]), atol=2.0)
            return close and same(one["records"], other["records"])
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


def test_every_rule_has_reference_outputs() -> None:
    assert set(RULES) == set(VERSIONS) == set(json.loads(REFERENCES.read_text()))


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_that_changed_has_another_number(rule: str, tmp_path: Path) -> None:
    reference = json.loads(REFERENCES.read_text())[rule]
    if VERSIONS[rule] != reference["version"]:
        pytest.fail(f"{rule} is version {VERSIONS[rule]}: write its outputs with python {Path(__file__).name}")
    assert same(as_json(RULES[rule](tmp_path)), reference["outputs"]), (
        f"{rule} gives other results than as version {VERSIONS[rule]}: raise it in versions.py, then run this file"
    )


@pytest.mark.parametrize(
    "path",
    [*CONF.glob("merge/*.yaml"), *CONF.glob("data/*.yaml"), *CONF.glob("benchmark/*.yaml")],
    ids=lambda p: p.stem,
)
def test_what_a_config_calls_has_a_number(path: Path) -> None:
    part = yaml.safe_load(path.read_text())
    named = [part.get(key) or {} for key in ("method", "source", "load", "ask", "judge")]
    several = [one for key in ("sources", "benchmarks") for one in (part.get(key) or {}).values()]
    for target in [one.get("_target_") for one in [*named, *several]]:
        assert target is None or isinstance(*rule_of(target).values(), int), f"{target} needs a number in versions.py"


def test_a_function_of_the_users_own_is_known_by_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_source_a.py").write_text("def load(): return 1\n")
    (tmp_path / "my_source_b.py").write_text("def load(): return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    (known,) = rule_of("my_source_a.load").values()
    assert len(str(known)) == 16 and rule_of("my_source_a.load").keys() == {"my_source_a.load"}
    assert [*rule_of("my_source_b.load").values()] != [known]
    assert rule_of("mmedexpert.merging.methods.ties") == {"ties": VERSIONS["ties"]}
    assert rule_of("mmedexpert.sources.slake.load") == {"slake": VERSIONS["slake"]}
    judge = build({"_target_": "mmedexpert.scoring.medevalkit.judge", "_partial_": True}, "benchmark.x.judge")
    assert rule_followed_by(judge) == rule_followed_by(medevalkit.judge) == {"medevalkit": VERSIONS["medevalkit"]}
    assert rule_followed_by(partial(judge, strict=True)) == {**rule_followed_by(judge), "values": {"strict": True}}
    assert text_of("perspectives.yaml") != text_of("guidelines.yaml")
    with pytest.raises(KeyError):
        versions("no such rule")


def main() -> int:
    before = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
    kept, stuck = {}, []
    for rule, outputs in RULES.items():
        known = before.get(rule)
        with tempfile.TemporaryDirectory() as folder:
            made = as_json(outputs(Path(folder)))
        if known is not None and known["version"] == VERSIONS[rule]:
            kept[rule] = known
            stuck += [] if same(made, known["outputs"]) else [rule]
        else:
            kept[rule] = {"version": VERSIONS[rule], "outputs": made}
    REFERENCES.write_text(
        "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(kept.items())) + "\n}\n"
    )
    for rule in stuck:
        print(
            f"{rule} gives other results under its old number {VERSIONS[rule]}: raise it in versions.py",
            file=sys.stderr,
        )
    return 1 if stuck else 0


if __name__ == "__main__":
    sys.exit(main())
