"""Scores a taught base on lessons it has not seen, and makes it the one that comes with the package.

    python run.py stage=pretrain
    python experiments/base/ship.py outputs/pretrain/tiny-<run id> [--score-only]

Weights are rounded to bfloat16. It prints the sha256 that conf/model/tiny.yaml pins as `shipped`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from mmedexpert.engines.asking import Ask
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.guidelines import PERSPECTIVES, guidelines
from mmedexpert.models.backbone import Loading, load_encoder, load_model, save_backbone
from mmedexpert.sources.phantom.families import PRACTICES, family_of
from mmedexpert.sources.phantom.lessons import lesson, lesson_case
from mmedexpert.stages.pretrain import SHIPPED

SEED = 12345  # no lesson of the base's training is drawn from it
LOADING = Loading("float32", "sdpa", 784, 12544, None, "cpu")


def scores(folder: Path, *, each: int = 45, seed: int = SEED) -> dict[str, dict[str, float]]:
    """By what a lesson needs and the perspective it is asked under: the share of answers that are as taught; and
    `measured`: the share of measurements within half the nearest distance that is drawn, by guideline."""
    model, encoder = load_model(folder, LOADING).requires_grad_(False), load_encoder(folder, LOADING)
    engine, rng = TransformersEngine(model, encoder, batch_size=32, max_new_tokens=64), np.random.default_rng(seed)
    rules = [guidelines()[name] for name in PRACTICES]
    right: dict[str, dict[str, list[bool]]] = {}
    near: dict[str, list[bool]] = {}
    with tempfile.TemporaryDirectory() as images:
        asks, taught = [], []
        for needs in PERSPECTIVES:
            for perspective in PERSPECTIVES:
                for number in range(each):
                    case = lesson_case(rules[number % len(rules)], needs, rng)
                    one = lesson(case, perspective, rng)
                    assert one.image is not None
                    path = Path(images) / f"{len(asks)}.png"
                    one.image.save(path)
                    asks.append(Ask(str(len(asks)), one.prompt, (path,)))
                    taught.append((needs, perspective, case, one.completion))
        for place, reply in engine(asks):
            needs, perspective, case, completion = taught[place]
            answer = re.search("<answer>(.*)</answer>", reply.text)
            same = answer is not None and f"<answer>{answer[1]}</answer>" in completion
            right.setdefault(needs, {}).setdefault(perspective, []).append(same)
            if perspective == "analytical":
                number = re.search(rf"{case.rule.finding} ([\d.]+\d|\d)", reply.text, re.IGNORECASE)
                off = abs(float(number[1]) - case.value) if number else float("inf")
                near.setdefault(case.rule.id, []).append(off <= family_of(case.rule.id).near[0] / 2)
    found = {needs: {name: float(np.mean(of)) for name, of in row.items()} for needs, row in right.items()}
    return {**found, "measured": {name: float(np.mean(of)) for name, of in near.items()}}


def table(found: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for what lessons need, a column for the perspective; then the measurements."""
    lines = ["| needs | " + " | ".join(PERSPECTIVES) + " |", "|---" * 5 + "|"]
    lines += [f"| {n} | " + " | ".join(f"{found[n][p]:.2f}" for p in PERSPECTIVES) + " |" for n in PERSPECTIVES]
    told = ", ".join(f"{name} {value:.2f}" for name, value in found["measured"].items())
    return "\n".join([*lines, "", f"Measured within half the nearest distance that is drawn: {told}."])


def main() -> None:
    """Score, round and ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a finished stage=pretrain")
    parser.add_argument("--score-only", action="store_true", help="leave the shipped base as it is")
    options = parser.parse_args()
    source = options.run / "model"
    if not (options.run / "DONE").exists():
        parser.error(f"{options.run} is no finished run of stage=pretrain")
    with tempfile.TemporaryDirectory() as folder:
        rounded = Path(folder) / "model"
        model, encoder = load_model(source, LOADING), load_encoder(source, LOADING)
        save_backbone(rounded, model.to(torch.bfloat16), encoder)
        found = scores(rounded)
        print(table(found))
        if options.score_only:
            return
        manifest = json.loads((options.run / "manifest.json").read_text(encoding="utf-8"))
        (rounded / "README.md").write_text((source / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        about = {
            "command": "python run.py stage=pretrain",
            "commit": manifest.get("git_sha"),
            "minutes": round(manifest["wall_seconds"] / 60, 1),
            "scores": found,
        }
        (rounded / "scores.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(SHIPPED, ignore_errors=True)
        shutil.copytree(rounded, SHIPPED)
    print("shipped:", hashlib.sha256((SHIPPED / "model.safetensors").read_bytes()).hexdigest())


if __name__ == "__main__":
    main()
