"""Reading and judging answers; `score_choice` is the one that evaluation and reward share."""

from mmedexpert.scoring.choice import Protocol, Verdict, score_choice

__all__ = ["Protocol", "Verdict", "score_choice"]
