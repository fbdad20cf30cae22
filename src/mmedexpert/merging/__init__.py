"""Merging LoRA experts and reasoners (CACI): rules on task vectors, adapters on disk, merged models."""

from mmedexpert.merging.activations import regmean
from mmedexpert.merging.low_rank import core_space, knots, wudi
from mmedexpert.merging.methods import (
    breadcrumbs,
    caci,
    dare_linear,
    dare_ties,
    della,
    linear,
    ram,
    task_arithmetic,
    ties,
    winner_take_all,
)

__all__ = [
    "breadcrumbs", "caci", "core_space", "dare_linear", "dare_ties", "della", "knots", "linear", "ram", "regmean",
    "task_arithmetic", "ties", "winner_take_all", "wudi",
]  # fmt: skip
