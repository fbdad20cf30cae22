"""The table of this experiment from finished evaluations: methods x specialties, mean and spread over training seeds.

    python experiments/ablation_merge/table.py <outputs folder> [<outputs folder> ..]

Writes results.json and table.md beside this file. Each seed's interval (95%, bootstrap over images) says how much the
questions matter, the spread over seeds how much the training does. The best single expert is the one of highest macro
accuracy on these same questions, so it flatters the experts.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
ORDER = ["sft_all", "best single expert", "reasoner"]  # the references, before the methods by their mean


def collect(folders: list[Path]) -> dict[str, dict[int, dict[str, float]]]:
    """model -> seed -> {specialty: accuracy, "macro": .., "low": .., "high": ..}."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(p for folder in folders for p in folder.glob("eval/*-phantom-test-*/DONE")):
        manifest = json.loads((path.parent / "manifest.json").read_text())
        summary = json.loads((path.parent / "summary.json").read_text())
        row = {name: part["accuracy"] for name, part in summary["per_specialty"].items()}
        row |= {
            "macro": summary["macro_accuracy"],
            "low": summary["macro_ci_low"],
            "high": summary["macro_ci_high"],
        }
        found.setdefault(manifest["name"].removesuffix("-phantom-test"), {})[manifest["seed"]] = row
    return found


def main() -> None:
    """Write both files and print the table."""
    found = collect([Path(folder) for folder in sys.argv[1:]])
    specialties = ["adult_medicine", "pediatrics", "brain_sensory", "oncology_surgery"]
    experts = [found.pop(name) for name in specialties]
    best = {seed: max((e[seed] for e in experts), key=lambda row: row["macro"]) for seed in experts[0]}
    found["best single expert"] = best
    for name in ("base", "majority", "blank_image"):
        found.pop(name, None)
    mean = {name: statistics.fmean(row["macro"] for row in rows.values()) for name, rows in found.items()}
    names = ORDER + sorted((n for n in found if n not in ORDER), key=lambda n: -mean[n])
    lines = ["| model | " + " | ".join(specialties) + " | macro | std over seeds | macro of each seed [95% CI] |"]
    lines.append("|" + " --- |" * (len(specialties) + 4))
    for name in names:
        rows = [found[name][seed] for seed in sorted(found[name])]
        cells = [f"{100 * statistics.fmean(row[s] for row in rows):.1f}" for s in specialties]
        spread = f"{100 * statistics.stdev(row['macro'] for row in rows):.1f}" if len(rows) > 1 else "-"
        each = ", ".join(f"{100 * r['macro']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]" for r in rows)
        lines.append(f"| {name} | {' | '.join(cells)} | {100 * mean[name]:.1f} | {spread} | {each} |")
    (HERE / "table.md").write_text("\n".join(lines) + "\n")
    (HERE / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
