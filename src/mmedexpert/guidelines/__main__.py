"""`python -m mmedexpert.guidelines FILE ...`: what the rubrics say of labelled rationales, and where they are wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmedexpert.errors import UserError
from mmedexpert.guidelines.labelled import Rationale, confusion, held, measures, read_labelled, worst
from mmedexpert.guidelines.perspectives import PERSPECTIVES

SHOWN = 300  # characters of a text


def main(arguments: Sequence[str] | None = None) -> int:
    """Print table, measures and worst cases of each file; exit code 2 and one line for a file that is none."""
    parser = argparse.ArgumentParser(prog="python -m mmedexpert.guidelines", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON lists of {strategy, completion, options}")
    parser.add_argument("--worst", type=int, default=5, help="how many texts to show that are scored wrongly")
    given = parser.parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=120)
    try:
        for path in given.files:
            show(read_labelled(path), str(path), given.worst, console)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def show(rationales: Sequence[Rationale], title: str, count: int, console: Console) -> None:
    """The table of labels against rubrics, the measures, how often each criterion holds, and the worst cases."""
    _table(f"{title}: mean score", confusion(rationales), console)
    for name, value in measures(rationales).items():
        console.print(f"  {name:<24} {value:.2f}", highlight=False)
    _table("\nShare of texts in which a criterion holds, by label", held(rationales), console)
    for one in worst(rationales, count):
        label = " and ".join(one.strategies) or "none of them"
        scores = ", ".join(f"{name} {one.scores[name]:.2f}" for name in PERSPECTIVES)
        told = [f"\n{one.id}: labelled {label}; {scores}"]
        for name in one.strategies or (max(one.scores, key=lambda key: one.scores[key]),):
            values = one.criteria.get(name, {}).items()
            told.append(f"  {name}: " + ", ".join(f"{what} {value:.2f}" for what, value in values if value is not None))
        if one.faults:
            told.append(f"  faults: {', '.join(one.faults)}")
        text = " ".join(one.completion.split())
        told.append("  " + (text if len(text) <= SHOWN else text[:SHOWN] + " ..."))
        console.print("\n".join(told), highlight=False, markup=False)


def _table(title: str, rows: Sequence[Mapping[str, str]], console: Console) -> None:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left")
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("labelled", "perspective", "criterion") else "right")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
