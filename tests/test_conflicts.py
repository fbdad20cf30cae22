"""What a merge shows: conflict statistics by hand and by chance, from factors as from whole updates; its figures."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mmedexpert.merging import conflicts as module
from mmedexpert.merging.conflicts import COLUMNS, Conflicts, place

few = settings(max_examples=40, deadline=None)
Q3, UP3 = (f"model.language_model.layers.3.{part}.weight" for part in ("self_attn.q_proj", "mlp.up_proj"))


def randn(*shape: int, n: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(n)]


def factors(rank: int, rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


def test_by_hand() -> None:
    # column: + -, + +, + 0, 0 0, - -  -> three overlaps, one conflict, chance 1/2
    a, b = torch.tensor([[3.0, 1.0, 2.0, 0.0, -1.0]]), torch.tensor([[-1.0, 1.0, 0.0, 0.0, -1.0]])
    conflicts = Conflicts(["a", "b"])
    conflicts.add(Q3, [a, b], None, a)
    report = conflicts.report()
    assert report["sign_conflict_rate"] == pytest.approx(1 / 3) and report["sign_conflict_chance"] == 0.5
    assert report["mean_cosine"] == pytest.approx(-1 / math.sqrt(15 * 3))
    assert report["a/norm"] == pytest.approx(math.sqrt(15)) and report["merged_norm"] == pytest.approx(math.sqrt(15))
    assert report["a/kept_share"] == report["a/trim_share"] == 1 and report["b/kept_share"] == pytest.approx(2 / 3)
    assert report["layers/3/q_proj/sign_conflict_rate"] == pytest.approx(1 / 3)
    assert not any("overlap" in name for name in report)  # unknown without factors


def test_conflict_is_counted_after_the_trim_and_cosines_before_it() -> None:
    a, b = torch.tensor([[4.0, -1.0, 2.0, 0.0]]), torch.tensor([[-4.0, 1.0, 0.1, 0.0]])
    trimmed = [torch.tensor([[4.0, 0.0, 2.0, 0.0]]), torch.tensor([[-4.0, 1.0, 0.0, 0.0]])]
    merged = torch.tensor([[4.0, 1.0, 2.0, 0.0]])
    conflicts = Conflicts(["a", "b"])
    conflicts.add(Q3, [a, b], trimmed, merged)
    (row,) = conflicts.table()
    assert row["sign_conflict_rate"] == 1 and row["sign_conflict_chance"] == 0.5  # only the first is shared after it
    assert row["a/trim_share"] == row["a/kept_share"] == row["b/trim_share"] == pytest.approx(2 / 3)
    assert row["b/kept_share"] == pytest.approx(1 / 3)
    assert row["cosine a, b"] == row["mean_cosine"] == pytest.approx(-16.8 / math.sqrt(21 * 17.01))


def test_independent_updates_conflict_at_chance() -> None:
    deltas = randn(400, 400, n=5)
    conflicts = Conflicts(list("abcde"))
    for rows in (slice(0, 80), slice(80, 400)):
        conflicts.add(Q3, [d[rows] for d in deltas], None, sum(deltas)[rows])
    report = conflicts.report()
    assert report["sign_conflict_chance"] == 1 - 2**-4
    assert report["sign_conflict_rate"] == pytest.approx(1 - 2**-4, abs=0.003)
    assert abs(report["mean_cosine"]) < 0.01


@few
@given(
    n=st.integers(1, 5),
    cut=st.integers(1, 8),
    density=st.floats(0.1, 1),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([7, 2**17]),
)
def test_blocks_of_rows_add_up_to_what_numpy_counts(n: int, cut: int, density: float, seed: int, chunk: int) -> None:
    deltas = randn(9, 11, n=n, seed=seed)
    masks = [noise.abs() < density for noise in randn(9, 11, n=n, seed=seed + 1)]
    trimmed = [delta * mask for delta, mask in zip(deltas, masks, strict=True)]
    (merged,) = randn(9, 11, n=1, seed=seed + 2)
    conflicts = Conflicts([str(i) for i in range(n)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        for rows in (slice(0, cut), slice(cut, 9)):
            conflicts.add(UP3, [d[rows] for d in deltas], [t[rows] for t in trimmed], merged[rows])
    (row,) = conflicts.table()
    signs = torch.stack(trimmed).sign().numpy()
    voters, up, down = (abs(signs)).sum(0), (signs > 0).sum(0), (signs < 0).sum(0)
    shared = voters >= 2
    if shared.any():
        assert row["sign_conflict_rate"] == pytest.approx(((up > 0) & (down > 0)).sum() / shared.sum())
        assert row["sign_conflict_chance"] == pytest.approx((1 - 2.0 ** (1 - voters[shared])).mean())
    else:
        assert row["sign_conflict_rate"] is None
    for i in range(n):
        assert row[f"{i}/trim_share"] == pytest.approx((signs[i] != 0).mean())
        assert row[f"{i}/kept_share"] == pytest.approx((signs[i] * merged.sign().numpy() > 0).mean())
        assert row[f"{i}/norm"] == pytest.approx(float(deltas[i].norm()), rel=1e-5)
    assert row["entries"] == 99


@few
@given(seed=st.integers(0, 1000), ranks=st.lists(st.integers(1, 6), min_size=2, max_size=4), order=st.booleans())
def test_factors_give_the_norms_and_cosines_of_the_whole_updates(seed: int, ranks: list[int], order: bool) -> None:
    pairs = [factors(rank, 20, 30, seed + i) for i, rank in enumerate(ranks)]
    deltas, names = [b @ a for a, b in pairs], [str(i) for i in range(len(pairs))]
    whole, thin = Conflicts(names), Conflicts(names)
    whole.add(Q3, deltas, None, deltas[0])
    steps = [lambda: thin.overlap(Q3, pairs), lambda: thin.add(Q3, deltas, None, deltas[0])]
    for step in steps if order else reversed(steps):
        step()
    for row, same in zip(whole.cosines(), thin.cosines(), strict=True):
        assert row == pytest.approx(same, abs=1e-5)
    for name in names:
        assert whole.report()[f"{name}/norm"] == pytest.approx(thin.report()[f"{name}/norm"], rel=1e-5)


def test_subspace_overlap() -> None:
    (a, b), (c, d) = factors(4, 40, 60, 1), factors(4, 40, 60, 2)
    mixed = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    for other, rows, columns in (
        ((mixed @ a, b), 1.0, 1.0),  # another basis of the same spaces
        ((torch.cat([a, c]), torch.cat([b, d], 1)), 1.0, 1.0),  # contains them
        ((a, d), 1.0, None),
        ((c, b), None, 1.0),
    ):
        conflicts = Conflicts(["x", "y"])
        conflicts.overlap(Q3, [(a, b), other])
        report = conflicts.report()
        assert report["row_overlap"] == (pytest.approx(rows, abs=1e-4) if rows else pytest.approx(4 / 60, abs=0.1))
        assert report["column_overlap"] == (
            pytest.approx(columns, abs=1e-4) if columns else pytest.approx(0.1, abs=0.15)
        )


def test_random_subspaces_overlap_at_chance() -> None:
    conflicts = Conflicts([str(i) for i in range(6)])
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        conflicts.overlap(name, [factors(4 + i, 100, 50, 10 * layer + i) for i in range(6)])
    report = conflicts.report()
    for space in ("row_overlap", "column_overlap"):
        assert report[space] == pytest.approx(report[f"{space}_chance"], rel=0.1)


def test_an_update_of_lower_rank_than_its_factors_has_only_the_spaces_it_uses() -> None:
    (a, b), (c, d) = factors(2, 30, 30, 1), factors(2, 30, 30, 2)
    start_and_back = torch.cat([a, c, c]), torch.cat([b, d, -d], 1)  # the second part cancels itself
    conflicts = Conflicts(["x", "y"])
    conflicts.overlap(Q3, [(a, b), start_and_back])
    report = conflicts.report()
    assert report["row_overlap"] == pytest.approx(1, abs=1e-4)
    assert report["row_overlap_chance"] == pytest.approx(2 / 30)
    assert report["y/norm"] == pytest.approx(report["x/norm"], rel=1e-4)


def test_an_update_that_is_zero_or_touches_nothing_is_harmless() -> None:
    a, b = factors(3, 8, 9, 0)
    conflicts = Conflicts(["x", "zero", "absent"])
    conflicts.overlap(Q3, [(a, b), (a, torch.zeros(8, 3)), None])
    conflicts.add(Q3, [b @ a, torch.zeros(8, 9), torch.zeros(8, 9)], None, b @ a)
    conflicts.add("lm_head.weight", [torch.zeros(4, 4)] * 3, None, torch.zeros(4, 4))
    report, rows = conflicts.report(), conflicts.table()
    assert all(math.isfinite(value) for value in report.values())
    assert report["zero/norm"] == 0 and report["absent/kept_share"] == 0 and report["sign_conflict_rate"] == 0
    assert rows[0]["layer"] == 3 and rows[0]["cosine x, zero"] is None and rows[0]["row_overlap"] is None
    assert rows[1]["layer"] is None and rows[1]["sign_conflict_rate"] is None and rows[1]["x/kept_share"] is None


def test_every_column_is_explained() -> None:
    conflicts = Conflicts(["x", "y"])
    conflicts.overlap(Q3, [factors(2, 5, 6, i) for i in range(2)])
    conflicts.add(Q3, randn(5, 6, n=2), None, torch.ones(5, 6))
    (row,) = conflicts.table()
    names = {
        "<update>/" + name.split("/")[1] if "/" in name else name for name in row if not name.startswith("cosine ")
    }
    assert names == set(COLUMNS)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (Q3, (3, "q_proj")),
        ("model.layers.12.mlp.down_proj.weight", (12, "down_proj")),
        ("model.visual.blocks.3.attn.qkv.weight", (3, "visual.blocks.qkv")),
        ("model.visual.deepstack_merger_list.0.linear_fc1.weight", (0, "visual.deepstack_merger_list.linear_fc1")),
        ("lm_head.weight", (None, "lm_head")),
    ],
)
def test_place(name: str, wanted: tuple[int | None, str]) -> None:
    assert place(name) == wanted


def test_threads_may_add_at_the_same_time() -> None:
    deltas = randn(64, 50, n=4)
    alone, together = Conflicts(list("abcd")), Conflicts(list("abcd"))
    blocks = [[delta[row : row + 1] for delta in deltas] for row in range(64)]
    for block in blocks:
        alone.add(Q3, block, None, block[0])
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda block: together.add(Q3, block, None, block[0]), blocks))
    assert together.report() == pytest.approx(alone.report(), abs=1e-9)


def test_another_number_of_updates_is_refused() -> None:
    conflicts = Conflicts(["x", "y"])
    with pytest.raises(ValueError, match="of 2 updates"):
        conflicts.add(Q3, randn(2, 2, n=3), None, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="of 2 updates"):
        conflicts.add(Q3, randn(2, 2, n=2), randn(2, 2, n=1), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="of 2 updates"):
        conflicts.overlap(Q3, [None])


def test_figures_are_drawn_with_names_and_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from mmedexpert.merging.figures import conflict_figures

    names = ["expert/pediatrics", "expert/adult_medicine", "reasoner/reasoner"]
    conflicts = Conflicts(names)
    for layer, part in ((0, "q_proj"), (0, "v_proj"), (7, "q_proj")):  # layer 7 has no v_proj: an empty cell
        deltas = randn(30, 30, n=3, seed=layer)
        conflicts.add(f"model.layers.{layer}.self_attn.{part}.weight", deltas, None, deltas[0])
    paths = conflict_figures(tmp_path, conflicts.table(), names, conflicts.cosines(), "ties: density=0.8")
    assert set(paths) == {"conflict_heatmap", "update_cosines"}
    for path in paths.values():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.with_suffix(".svg").read_text().count("<path") > 20
