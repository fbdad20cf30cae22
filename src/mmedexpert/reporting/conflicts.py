"""What conflicted in the merges behind compared models, from `conflicts.json` in their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mmedexpert.merging.figures import KINDS
from mmedexpert.reporting.lineage import Made
from mmedexpert.reporting.markup import folded, heat_map, missing, number, paragraph, table
from mmedexpert.runtime.jsonl import read_object
from mmedexpert.runtime.privacy import without_places

Cells = dict[str, dict[str, tuple[float | None, str, str]]]
NO_MERGE = "No merge is behind these models, or its folder holds no conflicts.json."


def conflicts_section(made: Sequence[Made]) -> list[str]:
    """Of each merge: sign conflicts above chance by layer and module, cosines of updates, and all other measures."""
    parts = []
    for run in made:
        found = read_object(run.folder / "conflicts.json")
        try:
            drawn = _merge(found) if found else []
        except (KeyError, TypeError, ValueError, AttributeError):
            drawn = [missing("Its conflicts.json is not one of ours.")]
        if drawn:
            told = paragraph(without_places(str(found.get("merge", ""))))
            parts += [f"<h3>{escape(f'{run.name} ({run.run_id})')}</h3>", told, *drawn]
    return parts or [missing(NO_MERGE)]


def _merge(found: Mapping[str, Any]) -> list[str]:
    signs, most = _signs(found["rows"])
    whole = [
        {"measure": str(name), "value": f"{value:.4g}"} for name, value in found["all"].items() if value is not None
    ]
    return [
        heat_map(
            signs, "Entries whose signs differ, above (+) or below (-) chance, in percentage points", corner="layer",
            low=-most, high=most, colours="PuOr_r",
        ),
        heat_map(
            _cosines(found["updates"], found["cosines"]), "Cosine of the updates, from -1 to 1", corner="update",
            low=-1.0, colours="PuOr_r",
        ),
        folded("All measures of this merge", table(whole, "Over all layers; conflicts.json says what each means")),
    ]  # fmt: skip


def _signs(rows: Sequence[Mapping[str, Any]]) -> tuple[Cells, float]:
    """Layer to module to the conflict above chance, mean over their tensors, and the largest size of one."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row["sign_conflict_rate"] is not None:
            layer = "other" if row["layer"] is None else f"layer {row['layer']}"
            above = 100 * (row["sign_conflict_rate"] - row["sign_conflict_chance"])
            found.setdefault(layer, {}).setdefault(str(row["module"]), []).append(above)
    modules = sorted({module for cells in found.values() for module in cells}, key=_order)
    means = {layer: {m: sum(cells[m]) / len(cells[m]) for m in modules if m in cells} for layer, cells in found.items()}
    most = max((abs(value) for cells in means.values() for value in cells.values()), default=1.0)
    return {layer: {m: (v, number(v, "+.1f"), "") for m, v in cells.items()} for layer, cells in means.items()}, most


def _order(module: str) -> tuple[int, str]:
    """As data pass through a layer."""
    return (KINDS.index(module) if module in KINDS else len(KINDS)), module


def _cosines(updates: Sequence[str], cosines: Sequence[Sequence[float | None]]) -> Cells:
    short = [name.rpartition("/")[2] for name in updates]  # "expert/pediatrics": the role is no news here
    names = short if len(set(short)) == len(short) else list(updates)
    return {
        name: {other: (v, "-" if v is None else number(v, ".2f"), "") for other, v in zip(names, line, strict=True)}
        for name, line in zip(names, cosines, strict=True)
    }
