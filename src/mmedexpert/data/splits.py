"""Leak-free splits: whole groups (an image, a patient) go to one split, by a hash, never by row order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from mmedexpert.data.record import SPLITS

FRACTIONS = (0.7, 0.1, 0.2)  # ours: train, val, test
MINIMUM_ORDER = (0, 2, 1)  # ours: a small stratum fills train first, then test, then val


def assign_splits(
    groups: Sequence[str],
    *,
    fractions: tuple[float, float, float] = FRACTIONS,
    seed: int,
    strata: Sequence[str] | None = None,
) -> list[str]:
    """One split name per row, the same for all rows of a group; ours (the paper does not describe its splits).

    Groups of a stratum are ordered by a seeded hash and cut by `fractions` (train, val, test). A stratum of three or
    more groups has at least one group in each wanted split. A group seen in several strata belongs to the first by
    name. Raises ValueError for fractions that are negative or do not sum to 1, or strata of another length.
    """
    if len(fractions) != len(SPLITS) or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions {fractions} must be three numbers >= 0 (train, val, test) that sum to 1")
    if strata is None:
        strata = [""] * len(groups)
    stratum_of: dict[str, str] = {}
    for group, stratum in zip(groups, strata, strict=True):
        stratum_of[group] = min(stratum, stratum_of.get(group, stratum))
    members: dict[str, list[str]] = {}
    for group, stratum in stratum_of.items():
        members.setdefault(stratum, []).append(group)

    split_of: dict[str, str] = {}
    for same in members.values():
        same.sort(key=lambda group: (hashlib.sha256(f"{seed}:{group}".encode()).hexdigest(), group))
        names = [name for name, count in zip(SPLITS, _counts(len(same), fractions), strict=True) for _ in range(count)]
        split_of.update(zip(same, names, strict=True))
    return [split_of[group] for group in groups]


def join_groups(keys: Sequence[Sequence[str]]) -> list[str]:
    """One group name per row such that rows sharing any key share the group (for example an image hash or a patient).

    The name is the smallest key of the group, so it does not depend on row order. Raises ValueError for a row
    without keys.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for row in keys:
        if not row:
            raise ValueError("a row without keys belongs to no group")
        roots = sorted({root(key) for key in row})
        for other in roots[1:]:
            parent[other] = roots[0]
    return [root(row[0]) for row in keys]


def _counts(n: int, fractions: tuple[float, ...]) -> list[int]:
    """`n` groups over the splits: largest remainders, with at least one for each wanted split where `n` allows."""
    wanted = [index for index in MINIMUM_ORDER if fractions[index] > 0]
    if n < len(wanted):
        return [int(index in wanted[:n]) for index in range(len(fractions))]
    counts = [int(n * fraction + 1e-9) for fraction in fractions]
    remainders = sorted(wanted, key=lambda index: (counts[index] - n * fractions[index], MINIMUM_ORDER.index(index)))
    for step in range(n - sum(counts)):
        counts[remainders[step % len(wanted)]] += 1
    for index in wanted:
        if counts[index] == 0:
            counts[max(wanted, key=lambda other: counts[other])] -= 1
            counts[index] = 1
    return counts
