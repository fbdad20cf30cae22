"""A table over training seeds from finished evaluations: mean, spread, and every arm paired against one of them.

    python experiments/over_seeds.py outputs --against sft_all [--models caci regmean] [--out experiments/..]

A row is a model with the settings in which the evaluations of its name differ. Spread: standard deviation over seeds.
Paired: difference to the reference of the same seed on the same questions; first the 95% interval by Student's t over
seeds (what training does), then by bootstrap over images of each question's mean over seeds (what questions do). Under
it the smallest difference that the t interval resolves at the median pair. The largest of several rows flatters itself.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from scipy.stats import t

from mmedexpert.evaluation.stats import paired_cluster_bootstrap
from mmedexpert.reporting.tables import markdown

# what may tell two evaluations of one name apart, as far as the model of that name depends on it
GBA = ("gba.weights", "gba.scale", "gba.conditioning", "gba.grouping", "gba.init", "gba.steps")
SETTINGS = {"sft_all": ("dsa.steps",), "reasoner": GBA, "grpo": GBA[2:], "start": ("gba.init",)}
MERGED = ("merge.distil_steps", "gba.init")
SHORT = {"adult_medicine": "adult", "pediatrics": "pediatric", "brain_sensory": "brain", "oncology_surgery": "oncology"}


def read(folder: Path, split: str) -> list[dict[str, Any]]:
    """Every finished evaluation: name, seed, settings, macro accuracy, accuracy by kind, verdicts."""
    found = []
    for done in sorted(folder.glob(f"eval/*-phantom-{split}-*/DONE")):
        run, config = done.parent, yaml.safe_load((done.parent / "config.yaml").read_text())
        manifest, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("manifest", "summary"))
        name = manifest["name"].removesuffix(f"-phantom-{split}")
        keys = SETTINGS.get(name, MERGED if name == config["merge"]["name"] else ())
        chosen = {key: config[key.split(".")[0]][key.split(".")[1]] for key in keys}
        asked = config["eval"]["perspectives"]
        chosen["eval.perspectives"] = None if asked == "needed" else asked  # the default is not told
        if "gba.scale" in chosen and (not chosen["gba.scale"] or not any(chosen["gba.weights"])):
            chosen |= {
                "gba.scale": 0.0,
                "gba.weights": None if chosen["gba.grouping"] == "question" else chosen["gba.weights"],
            }
        rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
        kinds = {
            f"needs {kind}": of
            for kind, by in summary["perspectives"]["groups"].get("needs", {}).items()
            for of in [by[kind]["robust"]["accuracy"]] if kind in by
        }  # fmt: skip
        found.append({
            "name": name, "seed": manifest["seed"], "settings": chosen, "macro": 100 * summary["macro_accuracy"],
            "per": {SHORT[key]: 100 * one["accuracy"] for key, one in summary["per_specialty"].items()} | {
                key: 100 * value for key, value in kinds.items()},
            "adherence": summary["adherence"], "commit": manifest["git_sha"],
            "verdicts": {row["id"]: (row["robust"]["correct"], row["image_group"]) for row in rows},
        })  # fmt: skip
    return found


def labelled(runs: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Row label -> seed -> evaluation; a setting is named where evaluations of one name differ in it."""
    arms: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for one in runs:
        same = [other["settings"] for other in runs if other["name"] == one["name"]]
        varied = [key for key in one["settings"] if len({str(settings[key]) for settings in same}) > 1]
        told = " ".join(f"{key}={one['settings'][key]}" for key in varied if one["settings"][key] is not None)
        label = f"{one['name']} {told}".strip()
        if one["seed"] in arms[label]:
            raise SystemExit(f"two evaluations are row {label!r} of seed {one['seed']}: they differ in another setting")
        arms[label][one["seed"]] = one
    return arms


def paired(arm: dict[int, dict[str, Any]], reference: dict[int, dict[str, Any]]) -> tuple[str, float | None]:
    """The difference with both intervals, and half the width of that over seeds."""
    seeds = sorted(set(arm) & set(reference))
    if not seeds or arm is reference:
        return "-", None
    over = np.array([arm[seed]["macro"] - reference[seed]["macro"] for seed in seeds])
    ids = sorted(set(arm[seeds[0]]["verdicts"]) & set(reference[seeds[0]]["verdicts"]))
    mine, theirs = (
        np.mean([[of[seed]["verdicts"][one][0] for one in ids] for seed in seeds], 0) for of in (arm, reference)
    )
    _, low, high, _ = paired_cluster_bootstrap(mine, theirs, [arm[seeds[0]]["verdicts"][one][1] for one in ids])
    half = float(t.ppf(0.975, len(seeds) - 1) * over.std(ddof=1) / len(seeds) ** 0.5) if len(seeds) > 1 else None
    seen = "-" if half is None else f"[{over.mean() - half:+.1f}, {over.mean() + half:+.1f}]"
    return f"{over.mean():+.1f} {seen} [{100 * low:+.1f}, {100 * high:+.1f}]", half


def main() -> None:
    """Print the table; with `--out` also table.md and results.json there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", required=True, help="a row's label")
    parser.add_argument("--models", nargs="*", help="rows whose label begins so; all without")
    parser.add_argument("--kinds", action="store_true", help="columns by kind of question instead of by specialty")
    parser.add_argument("--split", default="test")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    arms = labelled(read(given.folder, given.split))
    if given.against not in arms:
        parser.error(f"no row {given.against!r} in {given.folder}; there are: {', '.join(sorted(arms))}")
    reference = arms[given.against]
    kept = {
        label: arm for label, arm in arms.items()
        if not given.models or label == given.against or any(label.startswith(start) for start in given.models)
    }  # fmt: skip
    kept = dict(sorted(kept.items(), key=lambda item: -np.mean([one["macro"] for one in item[1].values()])))
    rows, halves = [], []
    for label, arm in kept.items():
        macros = [arm[seed]["macro"] for seed in sorted(arm)]
        row = {"model": label, "seeds": str(len(arm))}
        for column in next(iter(arm.values()))["per"]:
            if column.startswith("needs") == given.kinds:
                row[column] = f"{np.mean([one['per'][column] for one in arm.values()]):.1f}"
        row["macro"] = f"{np.mean(macros):.1f}"
        row["SD"] = f"{np.std(macros, ddof=1):.1f}" if len(macros) > 1 else "-"
        row[f"against {given.against}"], half = paired(arm, reference)
        halves += [] if half is None else [half]
        row["each seed"] = ", ".join(f"{macro:.1f}" for macro in macros)
        rows.append(row)
    text = markdown(rows)
    if halves:
        text += f"\nThe median pair resolves a difference of {np.median(halves):.1f} points over seeds.\n"
    commits = sorted({one["commit"] for arm in kept.values() for one in arm.values() if one["commit"]})
    print(text + f"commits: {', '.join(commits)}")
    if given.out:
        name = "kinds" if given.kinds else "table"
        (given.out / f"{name}.md").write_text(text)
        shown = ("macro", "per", "adherence", "settings", "commit")
        plain = {
            label: {seed: {key: one[key] for key in shown} for seed, one in arm.items()} for label, arm in kept.items()
        }
        (given.out / "results.json").write_text(json.dumps(plain, indent=1) + "\n")


if __name__ == "__main__":
    main()
