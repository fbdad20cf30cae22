"""`stage=plan`: will it fit, and how long does it take? Memory and time of each part of the work, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from mmedexpert.errors import UserError
from mmedexpert.merging.rule import declared
from mmedexpert.models.cards import CPU, Card, card, named, told
from mmedexpert.models.encode import CACHE_BYTES
from mmedexpert.models.plan import GIB, ROWS, Setup, passes
from mmedexpert.models.shapes import found_shape
from mmedexpert.reporting.tables import Row, print_table
from mmedexpert.runtime.build import build
from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages.answering import asking
from mmedexpert.stages.pretrain import SHIPPED
from mmedexpert.training.rollouts import assign_perspectives

ENTRY = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
HELD = (
    "Held against one H100 with random weights: memory within 3 %, seconds within 15 %. Other cards and hosts, several "
    "devices, distil and the tiny model's seconds are not."
)  # tests/test_plan.py


@dataclass(frozen=True)
class Part:
    """A part of the work on one device: bytes by what holds them, and seconds of its step."""

    held: Mapping[str, float]
    seconds: float
    times: float  # steps
    room: str = "-"  # tokens of the largest training pass that fits

    @property
    def total(self) -> float:
        """All bytes."""
        return sum(self.held.values())


def run(config: Config) -> dict[str, Run]:
    """Print the plan of this command's configuration; loads no weights and downloads nothing."""
    device, setup = card_of(config), setup_of(config)
    rows = rows_of(parts(config, device, setup), device.memory)
    print_table(rows, f"{config.model.name} on {_devices(setup)}one {device.name}", _caption(config, setup))
    return {}


def card_of(config: Config) -> Card:
    """The card of `plan.card`; null: the GPU that is here and known, a CPU for the embedded model, else an H100."""
    name, memory = config.plan.card, config.plan.memory_gib
    if name is None and torch.cuda.is_available():
        name = named(torch.cuda.get_device_name())
    name = name or (CPU if config.model.architecture is not None else "h100")
    return card(name, None if memory is None else memory * GIB)


def setup_of(config: Config) -> Setup:
    """How the config's model is held and trained on one of its devices."""
    model, trainer, lora = config.model, config.trainer, config.model.lora
    if model.taught_here:
        raise UserError("model.shipped=null is taught here and has no shape yet: give its folder, model.name_or_path")
    shape = found_shape(model.name_or_path, SHIPPED)
    weights, trained = ENTRY[model.dtype], 4
    if trainer.precision in ("bf16-true", "16-true", "64-true"):  # Lightning converts all
        weights = trained = 8 if trainer.precision == "64-true" else 2
    computed = 2 if trainer.precision in ("bf16-mixed", "bf16") else weights
    devices = (trainer.devices or max(1, torch.cuda.device_count())) * trainer.num_nodes
    return Setup(
        shape, lora.r, shape.lora(lora.r, lora.target_modules), weights, trained, computed, lora.dropout > 0,
        model.gradient_checkpointing, devices, sharded=trainer.strategy == "fsdp" and devices > 1,
    )  # fmt: skip


def parts(config: Config, device: Card, setup: Setup) -> dict[str, Part]:
    """DSA, GBA's sampling and update, evaluation, the merge and its teaching, each with what it holds and takes.

    Completions are of full length, and no row ends before: at most.
    """
    asks, dsa, gba, experts = config.plan, config.dsa, config.gba, len(config.specialty.names)
    one, tested = _question(config, device, setup), _question(asking(config), device, setup)
    width, prompt, seeing = one.width, one.prompt, one.seeing
    taught_merge = experts + (config.merge.distil_steps > 0)
    started = replace(setup, started={"merged_experts": experts, "caci": taught_merge, "base": 0}.get(gba.init, 1))
    records, asked = _share(gba.prompts_per_step, setup), config.engine.batch_size
    rollouts = gba.steps / gba.num_iterations * (experts if gba.init == "each" else 1)
    layout = set(assign_perspectives(gba.weights, gba.num_generations, gba.conditioning))

    def kept(questions: float, of: Question = one) -> dict[str, float]:
        return {"images": setup.image_bytes(round(questions), of.image, CACHE_BYTES), "CUDA": device.own}

    def sampling(
        by: Setup,
        prompts: int,
        rows: int,
        questions: int,
        times: float,
        others: Mapping[str, float],
        of: Question = one,
    ) -> Part:
        by = replace(by, computed=by.weights)  # outside of autocast
        step = (prompts, of.prompt, rows, of.width, questions * of.prompt)
        return Part({**by.sampling_bytes(*step), **others}, device.sampling(by, *step) + questions * of.seeing, times)

    taught, seen = _share(dsa.batch_size, setup), kept(rollouts * records)
    answer = asks.answer_tokens or width
    experts_part = _training(config, device, setup, (prompt, answer, 1, taught), kept(dsa.steps * taught))
    policy = replace(started, dropout=False)
    update = _training(
        config, device, policy, (prompt, width, gba.num_generations, records), seen, again=int(gba.beta > 0)
    )
    merged, rows = _with_merge(config, setup, {"": taught_merge + 1, "each": taught_merge + experts})
    merge = told()["merge"]
    changed = sum(one.weights for one, _ in setup.lora) / 1e9
    return {
        "dsa": replace(experts_part, seconds=experts_part.seconds + taught * seeing, times=experts * dsa.steps),
        "sampling": sampling(
            started, records * len(layout), records * gba.num_generations, records, rollouts,
            {"AdamW": started.state_bytes, **seen},
        ),
        "update": replace(update, times=rollouts * gba.num_iterations),
        "eval": sampling(
            merged, asked, asked, asked, math.ceil(asks.questions / asked), {**rows, **kept(asks.questions, tested)},
            tested,
        ),
        "caci": Part({"RAM": merge["ram_gib"] * GIB}, merge["seconds"] * changed, 1),
        **_distilling(config, device, setup, (prompt, answer), seeing),
    }  # fmt: skip


def _distilling(config: Config, device: Card, setup: Setup, tokens: tuple[int, int], seeing: float) -> dict[str, Part]:
    """Where the merge is taught: its training beside the base with the experts' adapters, both whole, on one device."""
    settings, experts, count = config.merge, len(config.specialty.names), config.dsa.batch_size
    if not settings.distil_steps:
        return {}
    alone = replace(setup, devices=1, sharded=False)
    image = config.plan.images * alone.shape.image_tokens(config.model.max_pixels)
    others = {
        "teacher": teacher_bytes(alone, experts) + alone.head_bytes(ROWS),
        "images": alone.image_bytes(settings.distil_steps * count, image, CACHE_BYTES), "CUDA": device.own,
    }  # fmt: skip
    alone, rows = _with_merge(config, alone, {"": experts + 1, "caci": experts, "each": 2 * experts})
    step = _training(config, device, alone, (*tokens, 1, count), {**others, **rows}, again=1)
    return {"distil": replace(step, seconds=step.seconds + count * seeing, times=settings.distil_steps)}


def _with_merge(config: Config, setup: Setup, parts: Mapping[str, int]) -> tuple[Setup, dict[str, float]]:
    """A model that holds the merge beside its 16-bit weights: of so many LoRAs by `gba.init` (""
    another), or, where no adapter is the merge, its rows."""
    settings = config.merge
    if not settings.exact or setup.weights == 4 or settings.method is None:
        return setup, {}
    if declared(build(settings.method, "merge.method")).keeps_adapters:
        return replace(setup, started=parts.get(config.gba.init, parts[""])), {}
    return setup, {"merge": sum(one.weights for one, _ in setup.lora) * setup.weights}


def teacher_bytes(setup: Setup, experts: int) -> int:
    """The base with an adapter for each expert, which PEFT keeps in fp32."""
    return setup.shape.parameters * setup.weights + experts * setup.lora_parameters * 4


def _training(
    config: Config,
    device: Card,
    setup: Setup,
    step: tuple[int, int, int, int],
    others: Mapping[str, float],
    again: int = 0,
) -> Part:
    """An optimiser step on (tokens of a prompt, of a completion, completions of a prompt, prompts), which `again`
    models read beside the one that is trained."""
    prompt, width, group, count = step
    fixed = setup.weight_bytes + setup.gathered_bytes + setup.started_bytes + setup.lora_bytes + setup.state_bytes
    room = setup.fitting_tokens(device.memory - sum(others.values()) - fixed - setup.gradient_bytes)
    most = config.trainer.micro_batch_tokens
    cut = passes(prompt, width, group, count, max(room, 1) if isinstance(most, str) else most)
    largest, whole = max(cut, key=lambda one: one.tokens), passes(prompt, width, group, count, None)[0].tokens
    fits = f"all {whole:,}" if room >= whole else f"{room // 100 * 100:,}" if room >= prompt + width else "none"
    held = {**setup.training_bytes(largest.tokens, largest.scored, len(cut)), **others}
    return Part(held, device.training(setup, cut, again), 1, fits)


@dataclass(frozen=True)
class Question:
    """A question at a model's limits: tokens of its prompt, its images and a completion, and seconds to see it."""

    prompt: int
    image: int
    width: int
    seeing: float


def _question(config: Config, device: Card, setup: Setup) -> Question:
    asks, pixels = config.plan, config.model.max_pixels
    image = asks.images * setup.shape.image_tokens(pixels)
    seeing = asks.images * device.seeing(setup, pixels // setup.shape.patch**2)
    return Question(image + asks.text_tokens, image, _width(config), seeing)


def _share(count: int, setup: Setup) -> int:
    return math.ceil(count / setup.devices)


def _width(config: Config) -> int:
    return config.plan.completion_tokens or config.model.max_new_tokens


def rows_of(work: Mapping[str, Part], memory: float) -> list[Row]:
    """A line for what holds memory, then totals, what fits, and time; small models in MiB."""
    names = list(dict.fromkeys(name for part in work.values() for name in part.held))
    names.sort(key=lambda name: name in ("images", "CUDA", "RAM"))
    small = max(part.total for part in work.values()) < GIB
    unit, name_of = (2**20, "MiB") if small else (GIB, "GiB")
    lines: dict[str, Callable[[Part], str]] = {
        **{name: partial(_size, name, unit) for name in names},
        "total": lambda part: f"{part.total / unit:,.1f}",
        f"fits in {memory / unit:,.1f}": lambda part: (
            "-" if "RAM" in part.held else "yes" if part.total <= memory else "NO"
        ),
        "tokens of a pass": lambda part: part.room,
        "steps": lambda part: f"{part.times:,.0f}",
        "seconds a step": lambda part: f"{part.seconds:.3g}",
        "hours": lambda part: _hours(part.seconds * part.times / 3600),
    }
    return [{name_of: name, **{column: tell(part) for column, part in work.items()}} for name, tell in lines.items()]


def _size(name: str, unit: int, part: Part) -> str:
    return f"{part.held[name] / unit:,.1f}" if name in part.held else "-"


def _hours(hours: float) -> str:
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}" if hours >= 0.01 else "<0.01"


def _devices(setup: Setup) -> str:
    return f"each of {setup.devices} under {'fsdp' if setup.sharded else 'ddp'}: " if setup.devices > 1 else ""


def _caption(config: Config, setup: Setup) -> str:
    asks, shape, width = config.plan, setup.shape, _width(config)
    image, answer = shape.image_tokens(config.model.max_pixels), asks.answer_tokens or width
    lines = [
        f"{shape.parameters / 1e9:.3g} B parameters, LoRA {setup.lora_parameters / 1e6:.3g} M. A question: "
        f"{asks.images} image(s) of {image:,} tokens and {asks.text_tokens} of text; completions of {width:,} tokens, "
        f"traces of {answer:,}, none of them shorter: at most.",
        f"dsa: {len(config.specialty.names)} expert(s). sampling and update: gba={config.gba.name} from "
        f"{config.gba.init}. eval: {asks.questions:,} questions to one model. caci: two CPU cores, RAM. distil: the "
        "merged model and its teachers, on one device. tokens of a pass: the largest trainer.micro_batch_tokens that "
        "fits; all: a whole step.",
        HELD,
    ]
    return "\n".join(lines)
