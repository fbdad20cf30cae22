"""Judging pairs of answers, as Med-RewardBench does: what is asked, how a reply is read, what is counted."""
