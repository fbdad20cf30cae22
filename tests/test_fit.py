"""The training loop: a run cut in two equals an uninterrupted one bit for bit; bad steps are skipped and counted."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys

import pytest
import torch
from torch import nn

from mmedexpert.reporting.loggers import CsvLogger, read_rows
from mmedexpert.runtime.curve import STEPS, read_curve
from mmedexpert.training.batches import batch_indices
from mmedexpert.training.fit import Checkpoint, damage, fit
from mmedexpert.training.module import TrainingModule
from mmedexpert.training.sft import MuonWithAdamW


class Toy(TrainingModule):
    """Regression with dropout, so that randomness matters for the resume."""

    def __init__(self, steps, muon=False, stop_at=None):
        super().__init__(seed=3, steps=steps, warmup_ratio=0.1, max_grad_norm=1.0)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.muon, self.stop_at = muon, stop_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.stop_at:
            raise KeyError("killed")
        self.descend(iter([self.loss(batch)]), 1)

    def loss(self, batch):
        return ((self.net(batch) - batch.sum(1, keepdim=True)) ** 2).mean()

    def optimizer(self):
        if not self.muon:
            return torch.optim.AdamW(self.parameters(), lr=0.05)
        matrices = [p for p in self.parameters() if p.ndim == 2]
        rest = [p for p in self.parameters() if p.ndim != 2]
        return MuonWithAdamW(matrices, rest, muon_lr=0.02, lr=0.05, weight_decay=0.0)


DATA = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))


def stream(step):
    for chosen in batch_indices(len(DATA), 8, 0, step):
        yield DATA[chosen]


@pytest.mark.parametrize("muon", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, muon):
    whole = Toy(12, muon)
    fit(whole, stream, folder=tmp_path / "a", checkpoint_every=5, accelerator="cpu")
    (tmp_path / "b").mkdir()
    with pytest.raises(KeyError):
        fit(Toy(12, muon, stop_at=8), stream, folder=tmp_path / "b", checkpoint_every=5, accelerator="cpu")
    assert (tmp_path / "b" / "last.ckpt").exists()
    rest = Toy(12, muon)
    fit(rest, stream, folder=tmp_path / "b", checkpoint_every=5, accelerator="cpu")
    for one, two in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(one, two)
    assert (tmp_path / "b" / "last.ckpt").exists()


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_last_step_is_in_the_checkpoint_and_not_trained_again(tmp_path):
    """Whoever dies while saving the result gets it, and its numbers, without a step."""
    whole = Toy(7)
    metrics = fit(whole, stream, folder=tmp_path, checkpoint_every=5, accelerator="cpu")
    rest = Toy(7, stop_at=0)

    def nothing(step):
        raise AssertionError(f"a batch was asked for at step {step}")
        yield

    assert fit(rest, nothing, folder=tmp_path, checkpoint_every=5, accelerator="cpu") == metrics
    assert {"learning_rate", "grad_norm"} <= set(metrics)
    assert torch.equal(weights(whole), weights(rest)) and rest.global_step == 7


def test_a_kill_while_a_checkpoint_is_written_costs_the_steps_since_the_one_before(tmp_path, monkeypatch):
    whole = Toy(12)
    fit(whole, stream, folder=tmp_path / "a", checkpoint_every=5, accelerator="cpu")
    saved = []

    def half(self, path, *_, **__):
        original(self, path)
        saved.append(path)
        if len(saved) == 2:
            os.truncate(path, 1000)
            raise KeyError("killed")

    with monkeypatch.context() as patch:
        import lightning as L

        original = L.Trainer.save_checkpoint
        patch.setattr(L.Trainer, "save_checkpoint", half)
        with pytest.raises(KeyError):
            fit(Toy(12), stream, folder=tmp_path / "b", checkpoint_every=5, accelerator="cpu")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["last.ckpt", STEPS]
    assert torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)["global_step"] == 5
    rest = Toy(12)
    fit(rest, stream, folder=tmp_path / "b", checkpoint_every=5, accelerator="cpu")
    assert torch.equal(weights(whole), weights(rest))
    curves = [read_curve(tmp_path / name / STEPS) for name in "ab"]
    assert curves[0] == curves[1] and [row["step"] for row in curves[0]] == [*range(1, 13)]


def test_every_step_keeps_its_numbers_whatever_the_logger(tmp_path, monkeypatch):
    logger = CsvLogger(tmp_path / "metrics.csv")
    fit(Toy(4), stream, folder=tmp_path, checkpoint_every=2, accelerator="cpu", logger=logger)
    rows, curve = read_rows(tmp_path / "metrics.csv"), read_curve(tmp_path / STEPS)
    assert [[row["step"], row["learning_rate"], row["grad_norm"]] for row in curve] == [
        [place, float(row["learning_rate"]), float(row["grad_norm"])] for place, row in enumerate(rows, start=1)
    ]
    with (tmp_path / STEPS).open("a") as file:
        file.write('{"step": 5, "loss": 0.')  # cut off
    assert [row["step"] for row in read_curve(tmp_path / STEPS)] == [1, 2, 3, 4]
    (tmp_path / "b" / STEPS).mkdir(parents=True)  # cannot be written
    fit(Toy(4), stream, folder=tmp_path / "b", checkpoint_every=2, accelerator="cpu")
    assert (tmp_path / "b" / "last.ckpt").exists()


@pytest.mark.parametrize("fault", ["cut", "flipped"])
def test_a_damaged_checkpoint_is_told_and_training_starts_again(tmp_path, capsys, fault):
    whole = Toy(6)
    fit(whole, stream, folder=tmp_path / "a", checkpoint_every=5, accelerator="cpu")
    assert damage(tmp_path / "a" / "last.ckpt") is None
    (tmp_path / "b").mkdir()
    path = tmp_path / "b" / "last.ckpt"
    shutil.copy(tmp_path / "a" / "last.ckpt", path)
    if fault == "cut":
        os.truncate(path, path.stat().st_size // 2)
    else:
        weight = weights(whole)[:8].numpy().tobytes()
        data = bytearray(path.read_bytes())
        place = data.find(weight)
        assert place > 0
        data[place] ^= 1
        path.write_bytes(data)
        torch.load(path, weights_only=True)  # takes it
    rest = Toy(6)
    fit(rest, stream, folder=tmp_path / "b", checkpoint_every=5, accelerator="cpu", title="toy")
    told = " ".join(capsys.readouterr().err.split())
    assert "is damaged" in told and "toy starts again at step 0" in told
    assert torch.equal(weights(whole), weights(rest))


def test_the_row_of_a_step_is_logged_before_the_checkpoint_that_passes_it(tmp_path, monkeypatch):
    """Else a kill between the two loses the row for good."""
    logger, seen, original = CsvLogger(tmp_path / "metrics.csv"), [], Checkpoint.save

    def save(self, trainer):
        seen.append((trainer.global_step, len(read_rows(tmp_path / "metrics.csv"))))
        original(self, trainer)

    monkeypatch.setattr(Checkpoint, "save", save)
    fit(Toy(4), stream, folder=tmp_path, checkpoint_every=2, accelerator="cpu", logger=logger)
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_parts_of_a_loss_are_one_optimiser_step(tmp_path):
    ends = []
    for parts in (1, 2):

        class Parts(Toy):
            def training_step(self, batch, batch_idx, parts=parts):
                assert self.global_step == batch_idx
                self.descend((self.loss(batch) / parts for _ in range(parts)), parts)

        module = Parts(3)
        module.net[1].p = 0.0
        fit(module, stream, folder=tmp_path / str(parts), checkpoint_every=100, accelerator="cpu")
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.allclose(*ends, atol=1e-6)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    class Broken(Toy):
        def loss(self, batch):
            return super().loss(batch) * (float("nan") if self.global_step == 1 else 1.0)

    module = Broken(4)
    fit(module, stream, folder=tmp_path, checkpoint_every=100, accelerator="cpu")
    assert module.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_a_batch_is_made_after_the_update_before_it(tmp_path):
    """Lightning fetches one batch ahead of a loader without a length: a rollout would be of the policy before."""
    module, made = Toy(4), []

    def watched(step):
        for batch in stream(step):
            made.append(module.global_step)
            yield batch

    fit(module, watched, folder=tmp_path, checkpoint_every=100, accelerator="cpu")
    assert made == [0, 1, 2, 3]


def test_batches_are_the_same_from_any_start():
    whole = list(itertools.islice(batch_indices(10, 4, 1, 0), 9))
    assert list(itertools.islice(batch_indices(10, 4, 1, 5), 4)) == whole[5:]
    assert sorted(list(itertools.chain.from_iterable(whole))[:10]) == list(range(10))
    few = next(batch_indices(3, 8, 1, 0))  # fewer than a batch: pass after pass, each in an order of its own
    assert [sorted(few[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2 and len(few) == 8
    assert list(itertools.islice(batch_indices(10, 4, 2, 0), 9)) != whole


@pytest.fixture()
def handled():
    """Sets what takes a signal, as submitit does before a job begins, until the test ends."""
    before = {}

    def take(number, handler):
        before.setdefault(number, signal.getsignal(number))
        signal.signal(number, handler)

    yield take
    for number, handler in before.items():
        signal.signal(number, handler)


class Signalled(Toy):
    """Gets a signal in its fourth step."""

    def __init__(self, steps, number):
        super().__init__(steps)
        self.number = number

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        if self.global_step == 4:
            os.kill(os.getpid(), self.number)


def test_a_warning_that_a_launcher_takes_does_not_end_the_training(tmp_path, handled):
    """SLURM's SIGTERM before a preemption: submitit passes over it, and Lightning must, or the job counts as ended."""
    heard = []
    handled(signal.SIGTERM, lambda *_: heard.append("term"))
    module = Signalled(8, signal.SIGTERM)
    fit(module, stream, folder=tmp_path, checkpoint_every=9, accelerator="cpu")
    assert heard == ["term"] and module.trainer.global_step == 8


def test_without_a_launcher_a_sigterm_interrupts(tmp_path, handled):
    handled(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(KeyboardInterrupt):
        fit(Signalled(8, signal.SIGTERM), stream, folder=tmp_path, checkpoint_every=9, accelerator="cpu")


def test_a_launchers_exit_keeps_its_code(tmp_path, handled):
    """submitit's handler of USR2 requeues the job and leaves with a code that says so."""
    handled(signal.SIGUSR2, lambda *_: sys.exit(144))
    with pytest.raises(SystemExit) as caught:
        fit(Signalled(8, signal.SIGUSR2), stream, folder=tmp_path, checkpoint_every=2, accelerator="cpu")
    assert caught.value.code == 144 and (tmp_path / "last.ckpt").exists()
