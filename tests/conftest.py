"""Shared by all tests: a tiny backbone without weights worth keeping, and the real records where they are present."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import run
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hypothesis import settings

# The same examples on every run, so that a change is never failed for another's bug; to search for new ones:
# pytest --hypothesis-profile=default
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")
# W&B reads the metadata of all installed packages at the start of each run, which takes half a second
os.environ |= {"WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1", "WANDB_X_SAVE_REQUIREMENTS": "false"}
torch.set_num_threads(1)
gc.set_threshold(10_000, 20, 50)  # as run.py
# A test ends processes, never the machine's power: what was written is read back without waiting for the disk, which a
# pipeline does 1400 times. (os.fsync as it is: processes that tests start.)
os.fsync = lambda file: None


def read_once() -> None:
    """Hydra reads the same thirty files for each of a thousand configurations: a quarter of a composition's time."""
    Plugins.instance()
    source = SourcesRegistry.instance().resolve("file")
    read, known = source.load_config, {}

    def load_config(self: Any, config_path: str) -> Any:
        path = Path(self.path, self._normalize_file_name(config_path))
        key = (path, path.stat().st_mtime_ns, self.provider) if path.exists() else None
        if key not in known:
            found = read(self, config_path)  # which raises where there is none
            known[key] = copy.deepcopy(found)
            return found
        return copy.deepcopy(known[key])

    source.load_config = load_config


read_once()


# What takes a minute by itself, and has shorter tests beside it; .ci/run leaves these out
long = pytest.mark.skipif("MMEDEXPERT_LONG" not in os.environ, reason="takes a minute: MMEDEXPERT_LONG=1")


# Files whose tests share what is trained or served once (the fixtures `outputs`, `answering`, `real_server`) are one
# worker's, as are those of any one file. These take longest: they come first, and are left out with -m "not slow".
GROUPS = {
    "outputs": ["test_pipeline", "test_dashboards", "test_benchmark_stage", "test_merge_search"],
    "answering": [
        "test_caci_stage", "test_regmean_stage", "test_identity", "test_gba_learning", "test_gba_stage",
        "test_eval_stage", "test_dsa_stage", "test_durable", "test_faults",
    ],
    "real_server": ["test_curate_stage", "test_judge_grader", "test_openai_engine"],
    "distributed": ["test_distributed"],
}  # fmt: skip
# hundreds of configurations, each composed in half a second; servers; workers; real images; the longest first
LONG = [
    "test_workers", "test_config", "test_speed_gpu", "test_real_model", "test_documented", "test_traces", "test_unread",
    "test_grading", "test_vllm", "test_before", "test_best_of", "test_judge_training", "test_rubrics", "test_stream",
    "test_contamination", "test_clusters", "test_names", "test_runs", "test_merge_files",
    "test_secrets",
]  # fmt: skip
GROUP = {file: name for name, files in GROUPS.items() for file in files}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that no worker is left with it at the end."""
    order = [*GROUPS, *LONG, ""]
    items.sort(
        key=lambda item: order.index(GROUP.get(item.path.stem, item.path.stem if item.path.stem in LONG else ""))
    )


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no pass of the garbage collector looks at it again."""
    gc.freeze()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marked before -m chooses."""
    if item.path.stem in (*GROUP, *LONG):
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By group; xdist's own loadgroup knows marks alone, and loses them under pytest 9."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0]).stem
            return GROUP.get(file, file)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real development data; the test is skipped where it is absent."""
    folder = Path(os.environ.get("MMEDEXPERT_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("real development data is not here (MMEDEXPERT_SHARED)")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """(model, encoder) of a random Qwen2.5-VL with few channels, in eval mode."""
    from mmedexpert.models.encode import Encoder
    from mmedexpert.models.tiny import build_image_processor, build_model, build_tokenizer

    words = "the heart rate is low within high so a criterion of adult child 0 1 2 3 4 5 6 7 8 9 A B C D".split()
    tokenizer = build_tokenizer([" ".join(words)] * 4, 400)
    model = build_model(
        tokenizer, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, vision_hidden_size=32, vision_depth=2,
        vision_num_heads=2, seed=0,
    )  # fmt: skip
    return model.eval(), Encoder(tokenizer, build_image_processor(56))


@pytest.fixture()
def picture():
    """A function that makes a noise image of a size from a seed."""
    from PIL import Image

    def make(seed: int, width: int = 56, height: int = 56) -> Image.Image:
        return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))

    return make


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """The folder of one smoke pipeline, logged to W&B offline."""
    folder = tmp_path_factory.mktemp("pipeline")
    done = run(folder, logger="wandb")
    assert "macro accuracy" in done.stdout and "expert: pediatric" in done.stdout
    return folder


@pytest.fixture(scope="session")
def answering_model(tmp_path_factory) -> Path:
    """The folder of the tiny model that answers (see answering.py), taught once."""
    from answering import teach

    folder = tmp_path_factory.mktemp("answering") / "model"
    teach(folder)
    return folder


@pytest.fixture(scope="session")
def answering(answering_model, tmp_path_factory):
    """A function that composes the config of a command on the model that answers; all share one outputs folder, so
    that what one test has trained serves the others."""
    from functools import partial

    from answering import composed

    return partial(composed, answering_model, tmp_path_factory.mktemp("answers"))


@pytest.fixture(scope="session")
def real_server(tmp_path_factory):
    """A `transformers serve` whose model knows nothing (see serving.py); the test is skipped where it cannot be had."""
    from serving import serving
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        pytest.skip("transformers serve needs fastapi, uvicorn and openai (requirements-dev.txt)")
    with serving(tmp_path_factory.mktemp("served")) as served:
        yield served
