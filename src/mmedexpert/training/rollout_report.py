"""What is told of a rollout: metrics by TRL's names and ours, and the table of its completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmedexpert.data.record import Record
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.training.grading import Criteria, report_of
from mmedexpert.training.rollouts import Rollout


def report(rollout: Rollout) -> dict[str, float]:
    """TRL's metric names, and ours under `advantages/`, `adherence/` and, where a judge graded, `grader/`.

    `reward_std` is the deviation of all rewards, as in TRL; `reward_std_group` the mean of those within groups.
    """
    lengths = rollout.mask.sum(1).float()
    ended = lengths[rollout.finished] if rollout.finished.any() else torch.zeros(1)
    rewards = rollout.outcome
    metrics = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(),
        "reward_std_group": rewards.std(dim=1).mean(),
        "frac_reward_zero_std": (rewards.amax(1) == rewards.amin(1)).float().mean(),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": 1 - rollout.finished.float().mean(),
        "completions/mean_terminated_length": ended.mean(),
        "completions/min_terminated_length": ended.min(),
        "completions/max_terminated_length": ended.max(),
        "advantages/std": rollout.advantages.std(),
        # how much of the advantage is the perspectives': mean sizes, 0 without their terms
        "advantages/share": rollout.terms.sum(2).abs().mean() / rollout.advantages.abs().mean().clamp(min=1e-8),
        "adherence": rollout.adherence.nanmean().nan_to_num(),
    }
    for name, values in rollout.parts.items():
        metrics[f"rewards/{name}/mean"] = torch.tensor(values).mean()
        metrics[f"rewards/{name}/std"] = torch.tensor(values).std()
    if rollout.scored:
        metrics["rewards/judge/mean"] = rollout.judged.nanmean().nan_to_num()
        metrics["rewards/judge/std"] = rollout.judged[~rollout.judged.isnan()].std().nan_to_num()
        share = rollout.judge_term.abs().mean() / rollout.advantages.abs().mean().clamp(min=1e-8)
        metrics["advantages/judge/share"] = share
    for k, name in enumerate(PERSPECTIVES):
        if not rollout.adherence[..., k].isnan().all():
            metrics[f"adherence/{name}"] = rollout.adherence[..., k].nanmean()
            # the mean of centred terms says little: their mean size says how much a perspective steers
            metrics[f"advantages/{name}/mean"] = rollout.terms[..., k].mean()
            metrics[f"advantages/{name}/mean_abs"] = rollout.terms[..., k].abs().mean()
    return {key: float(value) for key, value in metrics.items()} | report_of(rollout.graded) | scored_of(rollout)


def scored_of(rollout: Rollout) -> dict[str, float]:
    """The cost of the judge's scores, `judge/calls` and so on, and the share of the answers that it did not score."""
    found = {f"judge/{name}": value for name, value in rollout.scored.items() if name not in ("judged", "missing")}
    if judged := rollout.scored.get("judged"):
        found["judge/missing"] = rollout.scored["missing"] / judged
    return found


def repetition(text: str) -> float:
    """The share of a text's runs of four words that stand in it before, in [0, 1].  # ours

    A policy that is paid for length or for words repeats itself.
    """
    words = text.split()
    runs = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def completion_rows(step: int, records: Sequence[Record], rollout: Rollout, image_root: Any) -> list[dict[str, Any]]:
    """The completions table: a row per completion, with its image, rewards, adherence, criteria and advantage."""
    group = rollout.outcome.shape[1]
    rows = []
    for i, text in enumerate(rollout.texts):
        record, b, g = records[i // group], i // group, i % group
        image = str(image_root / record.images[0]) if record.images else ""
        row: dict[str, Any] = {"step": step, "record": record.id, "image": image, "question": record.question}
        row |= {"perspective": rollout.perspectives[i] or "none", "completion": text, "answer": record.answer}
        row |= {name: values[i] for name, values in rollout.parts.items()}
        row |= {f"adherence_{name}": float(rollout.adherence[b, g, k]) for k, name in enumerate(PERSPECTIVES)}
        row["judge"] = float(rollout.judged[b, g])
        row["criteria"] = criteria_text(rollout.criteria[i]) if rollout.criteria else ""
        rows.append({**row, "advantage": float(rollout.advantages[b, g])})
    return rows


def criteria_text(criteria: Criteria) -> str:
    """What held, in one cell: `candidates=1 exclusion=0.5 conclusion=-`, a dash where a criterion cannot be checked;
    with the perspective before each where several were asked, empty where the grade is missing."""
    cells = [
        f"{perspective}/{name}={'-' if value is None else f'{value:.2g}'}"
        for perspective, found in criteria.items()
        for name, value in found.items()
    ]
    return " ".join(cells if len(criteria) > 1 else [cell.partition("/")[2] for cell in cells])
