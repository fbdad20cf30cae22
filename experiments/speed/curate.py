"""The funnel of `data=mmedexpert` on invented records: seconds, CPU-seconds and memory of each step, at several sizes.

    python experiments/speed/curate.py 1000 10000 100000

Half as many images as records, noise of 96 x 96 pixels, questions of invented words; no models are asked. Each size is
a command of its own; seconds and peak memory are those of the steps' manifests. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 96


def main() -> None:
    """Measure each size, print a table, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", type=int, nargs="*", default=[1000])
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    found = {}
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            invent(Path(folder) / "root" / "invented", size)
            found[size] = measured(Path(folder), given.processes)
        print(f"{size:,} records: {found[size]['wall_s']:.0f} s, {found[size]['cpu_s']:.0f} CPU-s")
        for row in found[size]["steps"]:
            print(f"  {row['step']:<14} {row['wall_s']:8.1f} s  peak {row['peak_mb']:6.0f} MB")
    print(json.dumps({str(size): rows for size, rows in found.items()}))


def invent(folder: Path, size: int) -> None:
    """A jsonl table of `size` questions, and the images they are about."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range((size + 1) // 2):
        coarse = rng.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    words = np.array([f"{a}{b}{c}" for a in "bdfglmnprst" for b in ("ano", "eri", "ula", "ito") for c in "lmnrst"])
    organs = ("eye", "skin", "heart", "brain", "femur", "kidney")
    with (folder / "table.jsonl").open("w") as file:
        for number in range(size):
            case = " ".join(rng.choice(words, 24))
            options = dict(zip("ABCD", map(str, rng.choice(words, 4, replace=False)), strict=True))
            asked = f"A case of the {organs[number % 6]}: {case}. What is shown?"
            row = {"image": f"{number // 2}.png", "question": asked, "options": options}
            row |= {"answer": "ABCD"[number % 4], "license": "CC0 1.0"}
            file.write(json.dumps(row) + "\n")


def measured(folder: Path, processes: int) -> dict:
    """Seconds and memory of one command and its steps."""
    columns = "{image: image, question: question, options: options, answer: answer, license: license}"
    reader = f"{{_target_: mmedexpert.sources.vqa_table.load, files: table.jsonl, columns: {columns}}}"
    words = [
        "stage=data", "data=mmedexpert", f"data.root={folder / 'root'}", "trainer.threads=1", "logger=none",
        f"trainer.processes={processes}", "data.curate.balance.modality=1", f"paths.outputs={folder / 'outputs'}",
        "~data.sources.phantom", "data.curate.balance.target=10000",
        f"+data.sources.invented={reader}",
    ]  # fmt: skip
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "run.py", *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    steps = []
    for path in sorted(folder.glob("outputs/*/*/manifest.json"), key=lambda path: path.stat().st_mtime):
        told = json.loads(path.read_text())
        name = told["name"].rpartition("-")[0] or "data set"
        steps.append({"step": name, "wall_s": told["wall_seconds"], "peak_mb": told["peak_memory_bytes"] / 2**20})
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "steps": steps}


if __name__ == "__main__":
    main()
