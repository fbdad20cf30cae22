"""Small run folders as the stages leave them, for the page of `stage=report`."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hydra import compose, initialize_config_dir
from PIL import Image

from mmedexpert.checks import typed
from mmedexpert.data.record import Record
from mmedexpert.data.records import save_records
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.lineage import Made
from mmedexpert.stages import report

LETTERS = "ABCD"
OPTIONS = {"A": "pneumonia", "B": "oedema", "C": "fibrosis", "D": "atelectasis"}
MODALITIES = ("CT", "MRI")
SPECIALTIES = ("cardiology", "pediatrics")
HOSTILE = "</script><img src=x onerror=\"window.hit=1\"><!--<script>window.hit=1</script> & 'q' \u2028"
# what must not be on the page: places and hosts
PLACES = ("gpu7.clinic.example", "hunter2", "/home/someone")


def records(count: int, **changes: Any) -> list[Record]:
    """Questions 0, 1, ..; two share an image, and all of them alternate between specialties and modalities."""
    return [
        Record(**{
            "id": f"q{i:04d}", "images": (f"images/{i // 2}.png",), "question": f"What is shown in case {i}?",
            "options": OPTIONS, "answer": LETTERS[i % 4], "specialties": (SPECIALTIES[i % 2],), "source": "drawn",
            "license": "CC0", "split": "test", "image_group": f"image{i // 2}", "modality": MODALITIES[i // 2 % 2],
            "groups": {"needs": PERSPECTIVES[i % 4]}, **changes,
        })
        for i in range(count)
    ]  # fmt: skip


def folder_of(outputs: Path, stage: str, name: str, inputs: dict[str, str], *, seed: int = 0, **more: Any) -> Path:
    """A finished run's folder; its run id follows from its name."""
    identity = run_id(f"{stage}{name}{seed}")
    folder = outputs / stage / f"{name}-{identity}"
    folder.mkdir(parents=True)
    command = [
        "run.py",
        f"paths.outputs={outputs}",
        "engine.endpoint.base_url=http://me:hunter2@gpu7.clinic.example/v1",
    ]
    manifest = {
        "run_id": identity, "stage": stage, "name": name, "git_sha": "a" * 40, "versions": {"torch": "2.13.0"},
        "command": [*command, "data.root=/home/someone/my data"], "seed": seed, "device": "NVIDIA H100",
        "inputs": inputs,
        "recipe": f"{stage}{name}", "finished": "2026-11-01 10:00:00", "wall_seconds": 12.5, "tries": 1, **more,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "DONE").touch()
    return folder


def run_id(text: str) -> str:
    """Ten hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_run(outputs: Path, asked: list[Record]) -> Path:
    """Records and their images, each of its own grey."""
    folder = folder_of(outputs, "data", "drawn", {}, data_fingerprint="f" * 64)
    (folder / "images").mkdir()
    for n, name in enumerate(dict.fromkeys(name for record in asked for name in record.images)):
        Image.new("RGB", (300, 200), (n * 37 % 256, n * 11 % 256, 90)).save(folder / name)
    save_records(asked, folder, folder)
    return folder


def reply(record: Record, perspective: str | None, right: bool, text: str) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    pick = record.answer if right else LETTERS[(LETTERS.index(record.answer) + 1) % 4]
    verdict = {"correct": right, "picked": pick, "parsed": True}
    followed = {
        "adherence": {perspective: 0.5},
        "criteria": {"named": 1.0, "weighed": 0.5, "argued": 0.0, "seen": None},
    }
    return {
        "id": record.id, "image_group": record.image_group, "specialties": list(record.specialties),
        "modality": record.modality, "body_system": "", "kind": record.asked_as, "groups": record.groups,
        "perspective": perspective,
        "image_sha256": [hashlib.sha256(name.encode()).hexdigest() for name in record.images],
        "response": text, "gold": record.answer, "robust": verdict,
        "medevalkit": {"correct": True, "picked": record.answer, "parsed": True}, "scores": {}, "tokens": 7,
        "finish_reason": "stop", "seconds": 0.1, "mean_logp": -1.0,
        **(followed if perspective else {"adherence": {}, "criteria": {}}),
    }  # fmt: skip


def eval_run(outputs: Path, name: str, model: str, data: Path, rows: list[dict[str, Any]], *, seed: int = 0) -> Path:
    """An evaluation of these lines on the set `test`."""
    inputs = {"questions": "e" * 64, "model": model}
    folder = folder_of(outputs, "eval", f"{name}-test", inputs, seed=seed)
    lines(folder / "predictions.jsonl", rows)
    asked = {"name": "test", "source": ["drawn"], "left_out": 0, "folder": str(data), "public": False}
    (folder / "summary.json").write_text(json.dumps({"question_set": asked}))
    return folder


def gba_run(outputs: Path, start: str, asked: list[Record], image_root: Path) -> Path:
    """A reasoner with its steps and one kept group of completions."""
    folder = folder_of(outputs, "gba", "default", {"start": start})
    numbers = {
        "loss": 0.1,
        "reward": 0.5,
        "entropy": 1.5,
        "kl": 0.02,
        "completions/mean_length": 40.0,
        "grad_norm": 1.0,
    }
    gap = "sampling/sampling_logp_difference"
    steps = [
        {"step": s, **{k: v * s for k, v in numbers.items()}, f"{gap}/mean": 0.001 * s, f"{gap}/max": 0.01 * s}
        | {f"adherence/{p}": 0.1 * s for p in PERSPECTIVES}
        for s in range(1, 6)
    ]
    lines(folder / "steps.jsonl", steps)
    record = asked[0]
    rows = [
        {"step": 0, "record": record.id, "image": str(image_root / record.images[0]), "question": record.question,
         "perspective": p, "completion": f"rollout under {p}", "answer": record.answer, "accuracy": float(n < 2),
         "format": 1.0, **{f"adherence_{o}": 0.25 if o == p else float("nan") for o in PERSPECTIVES},
         "criteria": "named=1 seen=-", "advantage": 0.5 - n}
        for n, p in enumerate(PERSPECTIVES)
    ]  # fmt: skip
    lines(folder / "completions-00000.jsonl", rows)
    return folder


def merge_run(outputs: Path, experts: dict[str, str]) -> Path:
    """A merge and its conflicts."""
    folder = folder_of(outputs, "caci", "caci", experts)
    rows = [
        {"layer": layer, "module": module, "sign_conflict_rate": 0.5 + 0.1 * layer, "sign_conflict_chance": 0.45}
        for layer in (0, 1)
        for module in ("down_proj", "q_proj")
    ]
    found = {
        "merge": "caci: ridge=0.01", "updates": ["expert/cardiology", "expert/pediatrics"], "rows": rows,
        "cosines": [[1.0, 0.25], [0.25, 1.0]], "all": {"sign_conflict_rate": 0.55, "row_overlap": None},
    }  # fmt: skip
    (folder / "conflicts.json").write_text(json.dumps(found))
    return folder


def written(folder: Path, *runs: Path, against: Path | None = None, **options: Any) -> Path:
    """The page that the stage makes of these runs."""
    out = folder / "report"
    given = [f"report.runs=[{','.join(str(run) for run in runs)}]", f"report.out={out}"]
    given += [f"report.against={against}"] if against else []
    given += [f"{name}={value}" for name, value in options.items()]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        fixed = ["stage=report", "eval.num_resamples=50", "report.published=null", f"paths.outputs={folder}"]
        report.run(typed(compose("config", overrides=[*fixed, *given])))
    return out / "report.html"


def data_of(path: Path) -> dict[str, Any]:
    """What the page's script reads."""
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)
    return json.loads(block[1], parse_constant=lambda name: pytest.fail(name))


def whole_report(outputs: Path) -> Path:
    """A base, a reasoner asked under four perspectives, a merge and its grey image."""
    asked = records(12)
    data = data_run(outputs, asked)
    experts = {}
    for name in ("cardiology", "pediatrics"):
        made = folder_of(outputs, "dsa", name, {"data": "d" * 64})
        experts[name] = run_id(f"dsa{name}0")
        if name == "cardiology":
            lines(made / "steps.jsonl", [{"step": s, "loss": 3.0 / s} for s in range(1, 9)])
    gba = gba_run(outputs, experts["cardiology"], asked, data)
    merge = merge_run(outputs, experts | {"reasoner": Made(gba).run_id})
    voting = [
        reply(r, p, right=(i + k) % 3 != 0, text=f"under {p}")
        for i, r in enumerate(asked)
        for k, p in enumerate(PERSPECTIVES)
    ]
    plain = [reply(r, None, right=i < 4, text=f"the base says zebra{i}") for i, r in enumerate(asked)]
    merged = [
        reply(r, None, right=i < 9, text="the merge says so") | {"image_tokens": 16 * (i % 3)}
        for i, r in enumerate(asked)
    ]  # fmt: skip
    grey = [reply(r, None, right=i < 2, text="it is grey") | {"image_sha256": ["0"]} for i, r in enumerate(asked)]
    base, reasoner, caci, blank = (
        eval_run(outputs, name, model, data, rows)
        for name, model, rows in (
            ("base", "b" * 64, plain), ("reasoner", Made(gba).run_id, voting), ("caci", Made(merge).run_id, merged),
            ("blank_image", Made(merge).run_id, grey),
        )
    )  # fmt: skip
    return written(outputs.parent, base, reasoner, caci, blank, against=base)
