"""What is measured of RL's start before RL, by completions sampled from it under RL's prompts: how hard questions are
(`gba.keep`), and how well following a perspective goes with being right (`gba.weights_from=validation`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mmedexpert.data.record import Record
from mmedexpert.errors import UserError
from mmedexpert.evaluation.stats import cluster_bootstrap_ci
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.models.adapters import LoraAdapter
from mmedexpert.models.backbone import load_encoder
from mmedexpert.reporting.tables import print_table
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.progress import Bar
from mmedexpert.runtime.runs import Run, console
from mmedexpert.runtime.versions import text_of, versions
from mmedexpert.schema import Config, RewardConfig
from mmedexpert.stages.common import content_of, device_of, ledger_of, loading, model_key, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.policy import policy_of, sampler_of, servers_of
from mmedexpert.stages.pretrain import base_of
from mmedexpert.stages.reasoner_key import acting_reward, instructed, read_by, reward_key
from mmedexpert.training.advantages import followed_and_right
from mmedexpert.training.batches import step_seed
from mmedexpert.training.grading import grader_of
from mmedexpert.training.rollouts import Rollout

DIFFICULTY, COLUMNS = "difficulty.jsonl", ("id", "passed", "of")
FOLLOWED, WEIGHTS = "followed.jsonl", "weights.json"
SPLIT = "val"  # never test, and never trained on
Sample = Callable[[list[Record], list[int]], Rollout]
Line = Callable[[Rollout, int, list[float]], dict[str, Any]]  # of a rollout, a question's place in it, its verdicts


def difficulty(config: Config, name: str, specialties: list[str], start: Run | None) -> Run:
    """How many of `gba.keep_rollouts` completions of each training question are right, sampled from the start under
    RL's prompts: a line each in `<folder>/difficulty.jsonl`.

    MedVLThinker filters its RL data so (UCSC-VLAA/MedVLThinker@a3163b1), by a base model without perspectives: ours is
    the policy itself.  # ours
    Questions that a killed run has written are not sampled again.
    """
    settings, data = config.gba, dataset(config)
    # weights decide which perspectives are asked for with `prompted_weighted` alone
    weights = ("weights",) if settings.conditioning == "prompted_weighted" else ()
    key = _key(config, "train", specialties, "keep_rollouts", *weights)
    key["rules"] |= versions("difficulty")

    def work(run: Run) -> dict[str, float]:
        records, image_root = records_of(data, "train", specialties)
        reward = RewardConfig(grader="rules")
        with _sampling(config, start, run, records, image_root, reward, settings.keep_rollouts) as sample:
            lines = _measured(
                run.folder / DIFFICULTY, COLUMNS, records, sample, settings.prompts_per_step, config.seed,
                _passed,
            )  # fmt: skip
        solved = sum(line["passed"] for line in lines) / len(records) / settings.keep_rollouts
        return {"questions": float(len(records)), "solved": solved}

    return stage_run(
        config, "difficulty", name, key, work, _inputs(config, "train", specialties, start), sources={"data": data}
    )


def learned_weights(config: Config, name: str, specialties: list[str], start: Run | None) -> Run:
    """Weights of the perspectives from validation questions: of each how much more often completions of the start are
    right the more they follow it, per standard deviation within a group; below 0 is 0, and they sum to the number of
    perspectives, as those of `uniform` do.  # ours

    `<folder>/weights.json` has them, `<folder>/followed.jsonl` the verdicts and adherences of every question. All
    perspectives are asked for. Questions that a killed run has written are not sampled again.
    """
    uniform = with_weights(config, [1.0] * len(PERSPECTIVES))
    settings, data = uniform.gba, dataset(config)
    key = _key(uniform, "val", specialties, "num_generations")
    key["rules"] |= versions("rubrics", "advantages", "learned_weights")
    key["reward"] = reward_key(replace(uniform, reward=replace(config.reward, weights={}, judge_weight=0.0)))
    key["guidelines"] = {part: text_of(part) for part in DATA}

    def work(run: Run) -> dict[str, float]:
        records, image_root = records_of(data, SPLIT, specialties)
        with _sampling(
            uniform, start, run, records, image_root, acting_reward(uniform), settings.num_generations
        ) as sample:
            lines = _measured(
                run.folder / FOLLOWED, ("id", "right", "adherence"), records, sample, settings.prompts_per_step,
                config.seed, _followed, _graded,
            )  # fmt: skip
        adherence = torch.tensor([[_numbers(row) for row in line["adherence"]] for line in lines], dtype=torch.float64)
        right = torch.tensor([line["right"] for line in lines], dtype=torch.float64)
        pays = followed_and_right(adherence, right)
        found = weights_of(pays.mean(0).tolist())
        clusters = [record.image_group for record in records]
        rows = {}
        for place, perspective in enumerate(PERSPECTIVES):
            mean, low, high = cluster_bootstrap_ci(pays[:, place].numpy(), clusters, seed=config.seed)
            rows[perspective] = {"weight": found[place], "pays": mean, "low": low, "high": high}
        write_atomic(run.folder / WEIGHTS, (json.dumps(rows, indent=2) + "\n").encode())
        _tell(rows, len(records))
        return {"questions": float(len(records)), **{f"weight/{one}": row["weight"] for one, row in rows.items()}}

    inputs = _inputs(config, SPLIT, specialties, start)
    return stage_run(config, "weights", name, key, work, inputs, sources={"data": data})


def with_weights(config: Config, weights: list[float]) -> Config:
    """As with these weights given."""
    return replace(config, gba=replace(config.gba, weights=weights, weights_from="given"))


def weights_of(pays: Sequence[float]) -> list[float]:
    """In proportion to what each perspective pays, none below 0, their sum that of as many ones; all 0 where none
    pays."""
    paying = [max(0.0, one) for one in pays]
    total = sum(paying)
    return [len(paying) * one / total if total else 0.0 for one in paying]


def weights_in(run: Run) -> list[float]:
    """The weights that a run of `learned_weights` found, in the order of `gba.weights`."""
    told = json.loads((run.folder / WEIGHTS).read_text())
    return [float(told[name]["weight"]) for name in PERSPECTIVES]


def passed(path: Path) -> dict[str, int]:
    """Question to how many of its completions were right, from the file of a run of `difficulty`."""
    return {row["id"]: row["passed"] for row in read_lines(path, COLUMNS)}


def within(records: Sequence[Record], counts: Mapping[str, int], keep: Sequence[int]) -> list[Record]:
    """The questions solved `keep[0]` to `keep[1]` times, both included; UserError where that leaves none."""
    kept = [record for record in records if keep[0] <= counts[record.id] <= keep[1]]
    if not kept:
        found = ", ".join(f"{n} times: {list(counts.values()).count(n)}" for n in sorted(set(counts.values())))
        raise UserError(f"gba.keep={list(keep)} leaves no training question; solved {found}: give a wider range")
    return kept


def _key(config: Config, split: str, specialties: list[str], *asked: str) -> dict[str, Any]:
    """What decides completions sampled from the start."""
    questions, _ = records_of(dataset(config), split, specialties)
    settings = config.gba
    names = ("conditioning", "temperature", "top_p", "top_k", *asked)
    return {
        "specialties": specialties,
        "sampled": {name: getattr(settings, name) for name in names},
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "rules": versions("prompts", "sampling", "rewards", *read_by(config, questions)),
        "instructions": instructed(config),
        **({"sampler": "vllm"} if config.sampler.name == "vllm" else {}),
    }


def _inputs(config: Config, split: str, specialties: list[str], start: Run | None) -> dict[str, str]:
    found = {"base": base_of(config).identity, "data": content_of(dataset(config), split, specialties)}
    return found | ({"start": start.run_id} if start else {})


@contextmanager
def _sampling(
    config: Config,
    start: Run | None,
    run: Run,
    records: Sequence[Record],
    image_root: Path,
    reward: RewardConfig,
    completions: int,
) -> Iterator[Sample]:
    """What samples and scores groups of the start, which is not trained here."""
    base = base_of(config)
    starts = [LoraAdapter.load(start.folder / "adapter")] if start else []
    encoder = load_encoder(base.folder, loading(config))
    policy = policy_of(config, base, starts).to(device_of(config))
    grader = grader_of(reward, ledger_of(config))
    sampler = servers_of(config, start, run, encoder, records, image_root)
    with closing(sampler), run.phase("sample"):
        yield sampler_of(config, policy, encoder, image_root, grader, completions, sampler=sampler)


def _measured(
    path: Path,
    columns: Sequence[str],
    records: Sequence[Record],
    sample: Sample,
    batch: int,
    seed: int,
    line: Line,
    whole: Callable[[dict[str, Any]], bool] = lambda row: True,
) -> list[dict[str, Any]]:
    """A line for each question, in their order; each batch is on disk before the next is sampled. Of those that a
    killed run has written the `whole` ones stay."""
    kept = [row for row in read_lines(path, columns) if whole(row)]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept).encode())  # without a line that a kill has cut
    found = {row["id"]: row for row in kept}
    parts = [list(records[first : first + batch]) for first in range(0, len(records), batch)]
    solved, asked = 0.0, 0
    with Bar(path.stem, len(records)) as bar, path.open("a", encoding="utf-8") as file:
        for number, part in enumerate(parts):
            if all(record.id in found for record in part):
                continue
            seeds = [step_seed(seed, number * batch + place) for place in range(len(part))]
            rollout = sample(part, seeds)
            right = rollout.parts["accuracy"]
            of = len(right) // len(part)
            for place, record in enumerate(part):
                found[record.id] = {"id": record.id, **line(rollout, place, right[place * of : (place + 1) * of])}
                file.write(json.dumps(found[record.id]) + "\n")
            file.flush()
            solved, asked = solved + sum(right), asked + len(right)
            bar.show(min((number + 1) * batch, len(records)), {"solved": solved / asked})
    return [found[record.id] for record in records]


def _passed(rollout: Rollout, place: int, right: list[float]) -> dict[str, Any]:
    return {"passed": int(sum(right)), "of": len(right)}


def _followed(rollout: Rollout, place: int, right: list[float]) -> dict[str, Any]:
    """Verdicts and adherences of a question's completions; NaN, which JSON has not, as null."""
    rows = rollout.adherence[place].tolist()
    return {"right": right, "adherence": [[None if math.isnan(one) else one for one in row] for row in rows]}


def _graded(row: dict[str, Any]) -> bool:
    """Whether no grade is missing: a judge is asked again for those that are."""
    return all(any(one is not None for one in scores) for scores in row["adherence"])


def _numbers(row: Sequence[float | None]) -> list[float]:
    return [math.nan if one is None else one for one in row]


def _tell(rows: Mapping[str, Mapping[str, float]], questions: int) -> None:
    table = [
        {"perspective": name, "weight": f"{row['weight']:.3f}",
         "pays (points per SD)": f"{100 * row['pays']:+.1f} [{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"}
        for name, row in rows.items()
    ]  # fmt: skip
    print_table(table, f"Weights from {questions} validation questions")
    if not any(row["weight"] for row in rows.values()):
        console.print(
            "[yellow]no perspective's followers are right more often: all weights are 0, which is plain GRPO[/yellow]"
        )
