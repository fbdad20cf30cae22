"""Clinical guidelines, the four reasoning perspectives, and the rubrics that score a completion by them."""

from mmedexpert.guidelines.perspectives import PERSPECTIVES, instructions
from mmedexpert.guidelines.rubrics import adherence
from mmedexpert.guidelines.rules import Guideline, guidelines

__all__ = ["PERSPECTIVES", "Guideline", "adherence", "guidelines", "instructions"]
