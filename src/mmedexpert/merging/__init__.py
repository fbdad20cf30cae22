"""Merging LoRA experts and reasoners (CACI): rules on task vectors, adapters on disk, merged models."""

from mmedexpert.merging.methods import caci, dare_linear, dare_ties, linear, task_arithmetic, ties

__all__ = ["caci", "dare_linear", "dare_ties", "linear", "task_arithmetic", "ties"]
