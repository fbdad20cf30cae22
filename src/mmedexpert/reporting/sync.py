"""`python -m mmedexpert.reporting.sync outputs`: `wandb sync` of all offline runs, in the order of their making.

Its own order is any: a run would then be uploaded before what it was made from, or a continued one before its start.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmedexpert.errors import UserError
from mmedexpert.reporting.tracking import logged_in


def offline_runs(outputs: Path) -> list[Path]:
    """The folders of offline runs that were not uploaded yet, the oldest first; UserError without any."""
    found = outputs.glob("*/*/wandb/offline-run-*/run-*.wandb")
    folders = [path.parent for path in sorted(found, key=begun)]
    if not folders:
        raise UserError(f"{outputs} has no offline run of W&B: name the folder that paths.outputs named")
    return [folder for folder in folders if not list(folder.glob("*.synced"))]


def begun(path: Path) -> tuple[str, int]:
    """When the run of a file began, by its folder's name (`offline-run-<date>_<time>-<id>`), and when it ended."""
    return path.parent.name.split("-")[2], path.stat().st_mtime_ns


def main(arguments: Sequence[str] | None = None) -> int:
    """Upload them one by one; exit code 2 and one line without a login."""
    parser = argparse.ArgumentParser(prog="python -m mmedexpert.reporting.sync", description=__doc__)
    parser.add_argument("outputs", type=Path, help="paths.outputs of the runs")
    given = parser.parse_args(arguments)
    try:
        import wandb

        folders = offline_runs(given.outputs)
        if not logged_in(str(wandb.setup().settings.base_url)):
            raise UserError(f"{len(folders)} offline runs are uploaded to your W&B account: call wandb login first")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    codes = [subprocess.run([sys.executable, "-m", "wandb", "sync", str(folder)]).returncode for folder in folders]
    return max(codes, default=0)


if __name__ == "__main__":
    sys.exit(main())
