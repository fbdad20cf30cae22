"""Merging LoRA experts and reasoners (CACI): rules on task vectors, adapters on disk, merged models."""

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
)

__all__ = [
    "breadcrumbs", "caci", "core_space", "dare_linear", "dare_ties", "della", "knots", "linear", "ram",
    "task_arithmetic", "ties", "wudi",
]  # fmt: skip
