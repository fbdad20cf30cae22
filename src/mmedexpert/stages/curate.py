"""`data=mmedexpert`: the funnel that makes the data set out of its sources, a run a step, and the folder to release."""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from mmedexpert.curation import (
    balance,
    blind,
    card,
    croissant,
    decontaminate,
    difficulty,
    duplicates,
    funnel,
    labels,
    page,
    release,
    retrieval,
    structure,
    traces,
)
from mmedexpert.curation.ingest import Source, ingest
from mmedexpert.curation.steps import COUNTS, DROPPED, Records, Verdict, run_step, write_step
from mmedexpert.data.records import fingerprint, save_records
from mmedexpert.engines.asking import Engine
from mmedexpert.errors import UserError
from mmedexpert.runtime.build import function, values_of
from mmedexpert.runtime.fingerprints import file_digest, folder_digest
from mmedexpert.runtime.runs import Run, console, git_sha, write_json
from mmedexpert.runtime.versions import digest, rule_of, text_of, versions
from mmedexpert.schema import AskedConfig, Config, CurateConfig
from mmedexpert.stages.common import processes_of, stage_run

REPORT = "report.json"  # what a step's counts do not tell: thresholds, histograms
Made = tuple[Run, Records]


def curated(config: Config) -> Run:
    """The data set: every step of the funnel in order (finished ones are reused), then its records, page and release."""
    steps = [_ingest(config)]
    for name, make in _steps(config).items():
        steps.append(make(name, steps[-1]))
    return _data_set(config, steps)
