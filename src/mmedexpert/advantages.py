"""The published names of the mathematics of GBA; it stands in `training/advantages.py`."""

from mmedexpert.training.advantages import group_relative, guideline_based, perspective_terms

__all__ = ["group_relative", "guideline_based", "perspective_terms"]
