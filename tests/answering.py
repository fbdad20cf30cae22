"""A tiny model that answers, and questions it can answer: grey lamps, how bright are they?

Smoke models say nothing that can be read: every reward is 0, every gradient is 0, and no test sees the method. This one
writes the final format, under all four instructions, is right about half of the time, and follows its perspective now
and then. It is taught in seconds by the SFT module itself, and saved as a Hugging Face folder for whole stages.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from PIL import Image

from mmedexpert.checks import typed
from mmedexpert.data.record import SPLITS, Record, Trace
from mmedexpert.guidelines import PERSPECTIVES, instructions
from mmedexpert.models import tiny
from mmedexpert.models.backbone import save_backbone
from mmedexpert.models.encode import Encoder, prompt_text
from mmedexpert.schema import Config
from mmedexpert.training.batches import Samples, batch_indices
from mmedexpert.training.fit import fit
from mmedexpert.training.sft import SftModule

CONF = Path(__file__).parents[1] / "conf"
SPECIALTIES = ("adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery")
PLACES = ("ward", "nursery", "clinic", "theatre")
OPTIONS = {"A": "black", "B": "dim", "C": "bright", "D": "white"}
GREYS = {"A": 15, "B": 90, "C": 165, "D": 240}
ANSWERS = {
    "train": "ABACADABCD",
    "val": "BABCBDBACD",
    "test": "DADBDCDABC",
}  # over and over; each split favours another
RIGHT, FOLLOWED = 0.7, 0.6


def lamps(
    root: Path | None, out_dir: Path, *, seed: int, train: int, val: int, test: int
) -> tuple[list[Record], Path, list[tuple[str, str]]]:
    """A data source like `phantom`: `train`, `val` and `test` questions per specialty, all perspectives in turn."""
    records = []
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    for specialty in SPECIALTIES:
        for split, count in zip(SPLITS, (train, val, test), strict=True):
            rng = np.random.default_rng([seed, SPECIALTIES.index(specialty), SPLITS.index(split)])
            for index in range(count):
                letter = ANSWERS[split][index % 10]
                name = f"{specialty}-{split}-{index:03d}"
                lamp(letter, rng).save(out_dir / "images" / f"{name}.png")
                perspective = PERSPECTIVES[index // 2 % 4]
                records.append(
                    Record(
                        id=name, images=(f"images/{name}.png",), question=question(specialty), options=OPTIONS,
                        answer=letter, specialties=(specialty,), source="lamps", license="Apache-2.0", split=split,
                        image_group=name, trace=Trace(perspective, tuple(reasons(letter, perspective, True, rng))),
                    )
                )  # fmt: skip
    return records, out_dir, []


def question(specialty: str) -> str:
    return f"A lamp in the {PLACES[SPECIALTIES.index(specialty)]}. How bright?"


def lamp(letter: str, rng: np.random.Generator) -> Image.Image:
    """A square of one grey, with a little noise."""
    noise = rng.normal(0, 6, (28, 28, 1)) + rng.normal(0, 20)
    return Image.fromarray(np.repeat((GREYS[letter] + noise).clip(0, 255), 3, axis=2).astype(np.uint8))


def reasons(letter: str, perspective: str, followed: bool, rng: np.random.Generator) -> list[str]:
    """The thought that leads to an answer: in the manner of its perspective, or in none."""
    said = OPTIONS[letter]
    if not followed:
        return [f"Lamp seen, so {said}."]
    if perspective == "differential":
        rival = str(rng.choice([text for text in OPTIONS.values() if text != said]))
        return [f"Candidates {said}, {rival}.", f"Against {rival}: red lung glow.", f"So {said}."]
    if perspective == "intuitive":
        return [f"Pattern: red lung glow, {said}."]
    if perspective == "analytical":
        value = "ABCD".index(letter) * 2 + 1
        return [f"Red lung glow {value}.", f"Criterion {value - 1}.", f"{value} > {value - 1} so {said}."]
    return [f"Prior of {said} 50%.", "Red lung glow, likelihood ratio 4.", "Posterior 80%.", f"So {said}."]


def lesson(encoder: Encoder, rng: np.random.Generator) -> tuple[Any, list[int]]:
    """One question with an answer that is right, and a thought that follows the instruction, as often as wanted."""
    gold, perspective = str(rng.choice(list(OPTIONS))), PERSPECTIVES[rng.integers(4)]
    others = [letter for letter in OPTIONS if letter != gold]
    said = gold if rng.random() < RIGHT else str(rng.choice(others))
    thought = " ".join(reasons(said, perspective, bool(rng.random() < FOLLOWED), rng))
    record = Record(
        id="", images=(), question=question(str(rng.choice(SPECIALTIES))), options=OPTIONS, answer=gold,
        specialties=(), source="", license="", split="train", image_group="",
    )  # fmt: skip
    prompt = encoder.chat(prompt_text(record, instructions()[perspective]), [encoder.patches(lamp(gold, rng))])
    return prompt, encoder.completion(f"<think>{thought}</think><answer>{said}</answer>")


def teach(folder: Path, *, lessons: int = 600, steps: int = 220, batch_size: int = 16, lr: float = 4e-3) -> None:
    """Build the model, teach it, and save it in `folder`; the same weights on every run of one machine."""
    rng = np.random.default_rng(0)
    words = [text for p in PERSPECTIVES for x in OPTIONS for text in reasons(x, p, True, rng)]
    words += [*instructions().values(), *map(question, SPECIALTIES), "Lamp seen, so", "user\n", "assistant\n", *"ABCD."]
    tokenizer = tiny.build_tokenizer([" ".join(words)] * 4 + words * 4, 420)
    model = tiny.build_model(
        tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vision_hidden_size=32, vision_depth=1,
        vision_num_heads=2, seed=0,
    )  # fmt: skip
    encoder = Encoder(tokenizer, tiny.build_image_processor(28))
    pool = [lesson(encoder, rng) for _ in range(lessons)]

    def stream(step: int) -> Any:
        for chosen in batch_indices(len(pool), batch_size, 0, step):
            yield Samples(*zip(*(pool[i] for i in chosen), strict=True))

    module = SftModule(
        model, encoder, lr=lr, weight_decay=0.0, seed=0, steps=steps, warmup_ratio=0.1, max_grad_norm=1.0
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    fit(module, stream, folder=folder, checkpoint_every=10**6, accelerator="cpu")
    save_backbone(folder, model, encoder)


def composed(model: Path, outputs: Path, *overrides: str) -> Config:
    """The config of a command on this model and its questions, small."""
    plain = [
        f"model.name_or_path={model}", "model.max_new_tokens=32", "model.min_pixels=784", "model.max_pixels=784",
        "model.lora.r=4", "model.lora.alpha=8", "data.source._target_=answering.lamps", "data.source.train=8",
        "data.source.val=4", "data.source.test=6", "dsa.steps=3", "dsa.batch_size=4", "gba.steps=2",
        "gba.prompts_per_step=2", "gba.num_generations=8", "eval.num_resamples=50", "logger=none",
        "trainer.accelerator=cpu", "trainer.processes=1", f"paths.outputs={outputs}",
    ]  # fmt: skip
    if not any(word.startswith("merge=") for word in overrides):
        plain.append("merge=caci_vote")  # a sum of updates, without lessons after it
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config", overrides=[*plain, *overrides]))
