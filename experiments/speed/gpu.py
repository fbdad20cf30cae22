"""All that needs a GPU, in one command of at most eight minutes on one H100 or H200.

    python experiments/speed/gpu.py [--out experiments/speed/gpu.json] [--parts attention merge ..] [--tiny]

Parts, each with a time of its own: attention over packed rows against sdpa (gpu_attention.py), a CACI merge against the
CPU (gpu_merge.py), a DSA and a GBA step at 3B and 7B shapes (gpu_steps.py), then TRL's (gpu_peer.py). A part that
fails, or for which a package is missing, is told and the others go on; the JSON is written after every row. Last a
Markdown table is printed. Without CUDA, or with `--tiny`, the same runs on the CPU with tiny shapes, in seconds.

It needs torch with CUDA as in requirements.txt, and transformers and peft with what they need; Hydra is not among it.
For a machine without network, carry them along; `trl datasets` behind gpu_wheels.py brings the peer:

    pip download --no-deps -d wheels $(python experiments/speed/gpu_wheels.py)
    pip install --no-deps wheels/*.whl    # there; its torch stays as it is
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]
from gpu_clock import release  # noqa: E402

LIMIT = 460  # ours: seconds for all parts; with the imports eight minutes
COLUMNS = (
    "seconds", "tokens_per_s", "gb_per_s", "tflops", "mfu", "peak_gib", "device_gib", "estimate_gib", "relative_error",
    "within",
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A generator of rows, `function` of `module`, and the seconds it may take."""

    module: str
    function: str
    seconds: float
    arguments: dict[str, Any] = field(default_factory=dict)

    def rows(self, device: str, tiny: bool) -> Iterator[dict[str, Any]]:
        """Its rows, one after another; imports only now, so that what one part lacks stops no other."""
        module = import_module(self.module)
        arguments = dict(self.arguments)
        if "size" in arguments:
            arguments["shapes"] = module.TINY if tiny else module.GPU
        else:
            arguments["tiny"] = tiny
        return getattr(module, self.function)(device, **arguments)


def parts(tiny: bool) -> dict[str, Part]:
    """All parts in order, the peer last: what is over `LIMIT` does not run."""
    sizes = ("s",) if tiny else ("3b", "7b")
    slack = 5.0 if tiny else 1.0  # on a CPU, which may be busy, no lent minutes are to be kept
    dsa, gba, sampling = 40.0 * slack, 100.0 * slack, 65.0  # ours, as the other seconds
    found = {"attention": Part("gpu_attention", "rows", 40 * slack), "merge": Part("gpu_merge", "rows", 60 * slack)}
    for size in sizes:
        found[f"dsa {size}"] = Part("gpu_steps", "dsa", dsa, {"size": size})
        found[f"gba {size}"] = Part("gpu_steps", "gba", gba, {"size": size, "sampling_s": sampling})
    for size in sizes:
        for stage, seconds in (("dsa", dsa), ("gba", gba)):
            found[f"trl {stage} {size}"] = Part("gpu_peer", "step", seconds, {"size": size, "stage": stage})
    return found


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread once the seconds are over, and again every five where it was swallowed."""
    if seconds <= 0:
        raise TimeoutError("no time was left")

    def over(*_: Any) -> None:
        raise TimeoutError(f"over its {seconds:.1f} seconds")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(device: str) -> dict[str, Any]:
    """Command, commit, device and versions."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    cuda = device.startswith("cuda")
    return {
        "commit": commit,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def table(results: dict[str, Any]) -> str:
    """All rows as Markdown for README.md, and how they were made."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    lines = ["| case | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, part in results["parts"].items():
        for row in part["rows"]:
            lines.append("| " + " | ".join([row["case"], *(shown(row.get(column)) for column in COLUMNS)]) + " |")
        if part["status"] != "ok":
            lines.append(f"| {name}: {part['status']} |" + " - |" * len(COLUMNS))
    made = ", ".join(f"{name} {results[name]}" for name in ("commit", "device", "torch", "cuda") if results[name])
    return "\n".join([*lines, "", f"`{results['command']}`, {made}"])


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the parts; returns what the JSON holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these alone, by name, as in the JSON")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, as without CUDA")
    options = parser.parse_args(arguments)
    tiny = options.tiny or not torch.cuda.is_available()
    device = "cpu" if tiny else "cuda"
    chosen = parts(tiny)
    if unknown := {*(options.parts or ())} - {*chosen}:
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(chosen)}")
    command = shlex.join(["python", "experiments/speed/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    results: dict[str, Any] = {"command": command, **machine(device), "tiny": tiny, "parts": {}}
    began = time.monotonic()
    for name, part in chosen.items():
        if options.parts and name not in options.parts:
            continue
        start = time.monotonic()
        left = min(part.seconds, LIMIT - (start - began))
        found: dict[str, Any] = {"status": "ok", "budget_s": part.seconds, "seconds": 0.0, "rows": []}
        results["parts"][name] = found

        def write(found: dict[str, Any] = found, start: float = start) -> None:
            found["seconds"] = round(time.monotonic() - start, 2)
            results["seconds"] = round(time.monotonic() - began, 2)
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

        try:
            release()  # what the last part held must not count against this one
            with within(left):
                for row in part.rows(device, tiny):
                    found["rows"].append(row)
                    write()
        except ImportError as error:
            found["status"] = f"not run ({error})"
        except Exception as error:  # told, and the next part runs
            found["status"] = f"failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        write()
        print(f"{name}: {found['status']}, {len(found['rows'])} rows in {found['seconds']} s", flush=True)
    print(table(results))
    return results


if __name__ == "__main__":
    results = main()
    sys.exit(any(part["status"].startswith("failed") for part in results["parts"].values()))
