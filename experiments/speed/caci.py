"""Time and memory of a TIES merge of five LoRA experts: ours against mergekit 0.1.5, in fresh processes, in turns.

The case: a Qwen2 of 155.7M parameters (90.2M under LoRA) in bf16 and five rank-16 adapters made by PEFT, one of them
20 times smaller (the RL one); both merge in fp32 with density 0.2 and write bf16. mergekit is `mergekit-yaml` of the
environment that runs this file (`pip install mergekit==0.1.5 peft==0.21.2`; mmedexpert on PYTHONPATH is enough).
Peak memory is the largest resident set of the process (`ru_maxrss`). The last line is one JSON object: `ratio` is of
CPU-seconds, `ideal_ratio` what it would be if we only copied the base and multiplied the factors, three times, at this
machine's rates. Before it a table over model size and number of experts (ours only).

    python experiments/speed/caci.py [--turns 3] [--inputs lora|full] [--no-table] [--folder work]
    python experiments/speed/caci.py --seven-b [--layers 28] [--folder work]     # ours only; 34 GB of disk
    python experiments/speed/caci.py --seven-b --rule caci       # RegMean in the span of the factors, likewise
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from caci_cases import Case, make, write, write_grams

DENSITY = 0.2
SEVEN_B = Case(3584, 18944, 28, 28, 4, 152064, 16, 5, vision=32)  # Qwen2.5-VL-7B: 8.29B parameters
TABLE = [Case(512, 1408, 8, 8, 2), Case(), Case(1536, 4224, 10, 12, 4)]


@dataclass(frozen=True)
class Cost:
    """What a process took; peak in GB (10^9 bytes)."""

    wall: float
    cpu: float
    peak: float
    output: str


def measured(command: list[str], **env: str) -> Cost:
    """Run a fresh process; a failing one ends this with what it said.

    This process imports no torch: the kernel counts the parent's memory at the start to a child's peak.
    """
    os.sync()
    with tempfile.TemporaryFile("w+") as out:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env})
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        out.seek(0)
        text = out.read()
    if status:
        sys.exit(f"{' '.join(command[:4])} failed:\n{text[-3000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9, text)


def child(task: str, *arguments: Any) -> Cost:
    """Run one of the functions below in a fresh process."""
    return measured([sys.executable, __file__, "--child", task, json.dumps(arguments)])


# --- run in children -------------------------------------------------------------------------------------------------


def merge(root: str, inputs: str, out: str) -> None:
    """Ours."""
    from functools import partial

    from mmedexpert.merging.apply import merge_adapters
    from mmedexpert.merging.methods import ties

    folders = sorted((Path(root) / inputs).iterdir())
    experts = {folder.name: folder for folder in folders}
    merge_adapters(Path(root) / "base", out, experts, {}, partial(ties, weights=None, density=DENSITY))


def merge_span(root: str, out: str) -> None:
    """Ours by CACI's rule: the last adapter is the reasoner, the Gram matrices lie in the span of all factors."""
    from functools import partial

    from mmedexpert.merging.activations import regmean
    from mmedexpert.merging.apply import merge_adapters
    from mmedexpert.merging.grams import Grams

    *experts, reasoner = sorted((Path(root) / "lora").iterdir())
    seen = Grams.load([Path(root) / "grams" / folder.name for folder in experts], spanned=True)
    roles = {folder.name: folder for folder in experts}, {reasoner.name: reasoner}
    merge_adapters(Path(root) / "base", out, *roles, partial(regmean), grams=seen)


def rates(root: str) -> None:
    """GB per CPU-second and per second of a file's copy, GFLOP the same of a 1024 cubed fp32 product."""
    import torch

    files = sorted((Path(root) / "base").glob("*.safetensors"))
    start, cpu = time.perf_counter(), time.process_time()
    for file in files:
        shutil.copyfile(file, Path(root) / "copy")
    size = sum(file.stat().st_size for file in files) / 1e9
    copy = size / (time.process_time() - cpu), size / (time.perf_counter() - start)
    (Path(root) / "copy").unlink()
    x = torch.randn(1024, 1024)
    x @ x
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(20):
        x @ x
    work = 20 * 2 * 1024**3 / 1e9
    gemm = work / (time.process_time() - cpu), work / (time.perf_counter() - start)
    print(json.dumps({"copy": copy, "gemm": gemm}))


def compare(base: str, ours: str, theirs: str) -> None:
    """How far two merged models are apart: share of unequal entries, and of the update's L2 norm."""
    from mmedexpert.models.checkpoint import read_checkpoint

    models = [read_checkpoint(Path(folder)) for folder in (base, ours, theirs)]
    unequal, total, apart, norm = 0, 0, 0.0, 0.0
    for name in models[0]:
        start, a, b = (model[name].rows().float() for model in models)
        unequal += int((a != b).sum())
        total += a.numel()
        apart += float((a - b).double().square().sum())
        norm += float((b - start).double().square().sum())
    print(json.dumps({"unequal_share": unequal / total, "update_difference": (apart / max(norm, 1e-30)) ** 0.5}))


# --- the benchmark ---------------------------------------------------------------------------------------------------


def mergekit(root: Path, inputs: str) -> list[str]:
    """The command that merges as ours does, with its config written beside the case."""
    script = Path(sys.executable).parent / "mergekit-yaml"
    if not script.exists():
        sys.exit(f"no {script}: run this with the Python of an environment that has mergekit==0.1.5 and peft")
    lines = ["merge_method: ties", f"base_model: {root / 'base'}", "models:"]
    for folder in sorted((root / inputs).iterdir()):
        model = f"{root / 'base'}+{folder}" if inputs == "lora" else str(folder)
        lines += [f"  - model: {model}", f"    parameters: {{weight: 1.0, density: {DENSITY}}}"]
    lines += ["parameters: {normalize: true, lambda: 1.0}", "dtype: float32", "out_dtype: bfloat16"]
    (root / "mergekit.yml").write_text("\n".join(lines) + "\n")
    cache = ["--lora-merge-cache", str(root / "cache"), "--no-copy-tokenizer", "--quiet"]
    return [str(script), str(root / "mergekit.yml"), str(root / "theirs"), *cache]


def remove(*folders: Path) -> None:
    """Delete what exists of these."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def work(case: Case, root: Path) -> tuple[float, float]:
    """GB read and written by ours, and its GFLOP: three passes over every pair of factors, and a look for NaN."""
    size = {
        folder: sum(f.stat().st_size for f in (root / folder).rglob("*.safetensors")) for folder in ("base", "lora")
    }
    entries = sum(rows * columns for rows, columns in case.linears().values())
    return (2 * size["base"] + 3 * size["lora"]) / 1e9, 3 * 2 * case.rank * entries * case.experts / 1e9


def ours_alone(root: Path, case: Case, rule: str = "ties") -> Cost:
    """One merge of a written case, told as a row of the table."""
    out = str(root / "ours")
    cost = child("merge", str(root), "lora", out) if rule == "ties" else child("merge_span", str(root), out)
    remove(root / "ours")
    moved, flop = work(case, root)
    billions = sum(f.stat().st_size for f in (root / "base").glob("*.safetensors")) / 2e9
    cells = (f"{billions:.3f}B", case.experts, *(round(x, 2) for x in (cost.wall, cost.cpu, cost.peak, moved, flop)))
    print("|", " | ".join(map(str, cells)), "|", flush=True)
    return cost


def table(root: Path) -> None:
    """Ours over sizes and numbers of experts."""
    print("| parameters | experts | wall s | CPU s | peak GB | GB read and written | GFLOP |")
    print("|---|---|---|---|---|---|---|")
    for size in TABLE:
        for experts in (2, 5, 10):
            case = Case(**{**asdict(size), "experts": experts})
            child("write", str(root), asdict(case))
            ours_alone(root, case)
            remove(root)


def seven_b(root: Path, layers: int, rule: str) -> dict[str, Any]:
    """Merge a model of Qwen2.5-VL-7B's shapes; the base is written once into the folder and used again."""
    case = Case(**{**asdict(SEVEN_B), "layers": layers})
    entries = sum(r * c for r, c in case.linears().values()) + 2 * case.vocab * case.hidden + 32 * 19_700_000
    needed = 4 * entries * 1.03 if not (root / "base").exists() else 2 * entries * 1.03
    free = shutil.disk_usage(root.parent).free
    if free < needed:
        return {"skipped": f"needs {needed / 1e9:.0f} GB of disk in {root.parent}, {free / 1e9:.0f} GB are free"}
    if not (root / "base").exists():
        child("write", str(root), asdict(case))
    if rule == "caci" and not (root / "grams").exists():
        child("write_grams", str(root), asdict(case))
    cost = ours_alone(root, case, rule)
    return {"rule": rule, "wall_s": round(cost.wall, 1), "cpu_s": round(cost.cpu, 1), "peak_gb": round(cost.peak, 3),
            "within_2_gb": cost.peak <= 2.0, "within_3_gb": cost.peak <= 3.0, "layers": layers}  # fmt: skip


def against(root: Path, inputs: str, turns: int) -> dict[str, Any]:
    """Both tools in turns on the case."""
    case = Case()
    if not (root / inputs).exists():
        remove(root)
        child("make", str(root), asdict(case), inputs == "full")
    command = mergekit(root, inputs)
    rows: list[tuple[Cost, Cost]] = []
    for turn in range(turns):
        remove(root / "ours", root / "theirs", root / "cache")
        pair = child("merge", str(root), inputs, str(root / "ours")), measured(command, HF_HUB_OFFLINE="1")
        rows.append(pair)
        for who, cost in zip(("ours", "mergekit"), pair, strict=True):
            print(f"turn {turn}, {who}: {cost.wall:.2f} s, {cost.cpu:.2f} CPU-s, peak {cost.peak:.2f} GB", flush=True)
    apart = json.loads(child("compare", *(str(root / f) for f in ("base", "ours", "theirs"))).output)
    rate, (moved, flop) = json.loads(child("rates", str(root)).output), work(case, root)
    print(
        f"ours: {moved:.2f} GB read and written, {flop:.1f} GFLOP; "
        f"this machine copies {rate['copy'][1]:.1f} GB/s and multiplies {rate['gemm'][1]:.0f} GFLOP/s"
    )
    ours, peer = ({k: median(asdict(pair[i])[k] for pair in rows) for k in ("wall", "cpu", "peak")} for i in (0, 1))
    ideal = moved / 2 / rate["copy"][0] + flop / rate["gemm"][0]
    return {
        "ours_cpu_s": round(ours["cpu"], 2), "peer_cpu_s": round(peer["cpu"], 2),
        "ratio": round(peer["cpu"] / ours["cpu"], 2), "ideal_ratio": round(peer["cpu"] / ideal, 1),
        "wall_ratio": round(peer["wall"] / ours["wall"], 2), "memory_ratio": round(peer["peak"] / ours["peak"], 2),
        "ours_wall_s": round(ours["wall"], 2), "peer_wall_s": round(peer["wall"], 2),
        "ours_peak_gb": round(ours["peak"], 3), "peer_peak_gb": round(peer["peak"], 3), "inputs": inputs, **apart,
    }  # fmt: skip


def main() -> None:
    """Measure, print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--inputs", choices=["lora", "full"], default="lora")
    parser.add_argument("--no-table", action="store_true")
    parser.add_argument("--seven-b", action="store_true")
    parser.add_argument("--rule", choices=["ties", "caci"], default="ties", help="of the 7B model")
    parser.add_argument("--layers", type=int, default=28, help="of the 7B model")
    parser.add_argument("--folder", type=Path, help="where the cases are written and stay; else a temporary folder")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        tasks = {
            "make": make, "write": write, "write_grams": write_grams, "merge": merge, "merge_span": merge_span,
            "rates": rates, "compare": compare,
        }  # fmt: skip
        tasks[options.child[0]](*json.loads(options.child[1]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if options.seven_b:
            result = seven_b(folder / f"seven_b_{options.layers}", options.layers, options.rule)
        else:
            if not options.no_table:
                table(folder / "table")
            result = against(folder / "case", options.inputs, options.turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
