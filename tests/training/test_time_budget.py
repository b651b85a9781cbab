"""Test --epochs 30min, which fits the length of a run to a time."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from running import refused, rows, run

from kdlite.training import time_budget
from kdlite.training.checkpoint import Progress
from kdlite.training.time_budget import Length

MODELS = Path(__file__).parents[1].joinpath("own_models.py")


class Machine:
    """Simulate train.py's loop on a clock, with a known time for each step and each evaluation."""

    def __init__(self, monkeypatch, step, evaluation):
        self.now, self.step, self.evaluation = 100.0, step, evaluation
        monkeypatch.setattr(time_budget.time, "monotonic", lambda: self.now)

    def start(self, limit, steps, progress=None, started=None):
        self.args = SimpleNamespace(epochs=45, warmup_epochs=2.25, step_epochs=[22.5], time_limit=limit, batch_size=8)
        self.progress = progress or Progress()
        guess = self.evaluation / (self.step * steps)
        self.length = Length(self.args, steps, self.progress, started or self.now, guess)

    def train(self, slower_after=None, until=None):
        progress, length = self.progress, self.length
        while progress.epoch < self.args.epochs:
            began = self.now - progress.seconds
            while progress.step < length.steps:
                self.now += self.step * (3 if slower_after is not None and progress.epoch >= slower_after else 1)
                progress.step, progress.seconds = progress.step + 1, self.now - began
                length.refit()
                if until == (progress.epoch, progress.step):
                    return
            row = {"images_per_s": length.steps * 8 / progress.seconds}
            self.now += self.evaluation
            progress.rows.append(row | {"seconds": self.now - began})
            progress.epoch, progress.step, progress.seconds = progress.epoch + 1, 0, 0.0
            length.refit(epoch_ended=True)


@pytest.mark.parametrize(
    ("limit", "steps", "step", "evaluation"),
    [(1800, 31, 0.4, 4), (100, 31, 0.4, 4), (600, 500, 1.0, 60), (60, 5000, 0.1, 20), (36000, 1000, 1.0, 100)],
)
def test_a_run_takes_its_time_limit_within_10_percent(monkeypatch, limit, steps, step, evaluation):
    machine = Machine(monkeypatch, step, evaluation)
    machine.start(limit, steps)
    machine.train()
    assert machine.now - 100 == pytest.approx(limit, rel=0.1)


def test_a_machine_that_becomes_slower_gets_fewer_epochs(monkeypatch):
    machine = Machine(monkeypatch, step=0.4, evaluation=4)
    machine.start(1800, 31)
    machine.train(slower_after=30)
    assert machine.now - 100 == pytest.approx(1800, rel=0.1)


def test_warm_up_and_milestones_keep_their_share_of_a_fitted_run(monkeypatch):
    machine = Machine(monkeypatch, step=0.4, evaluation=4)
    machine.start(300, 31)
    machine.train()
    assert machine.args.warmup_epochs == pytest.approx(machine.args.epochs / 20)
    assert machine.args.step_epochs == [pytest.approx(machine.args.epochs / 2)]


def test_a_resumed_run_keeps_its_plan_and_ends_in_time(monkeypatch):
    machine = Machine(monkeypatch, step=0.5, evaluation=10)
    machine.start(400, 300)
    machine.train(until=(1, 40))
    planned = machine.args.epochs, machine.length.steps
    machine.now += 5000  # the time between two processes does not count
    machine.start(400, 300, machine.progress)
    assert (machine.args.epochs, machine.length.steps) == planned
    machine.train()
    assert machine.now - 5100 == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("stop", [3, 20, 49])
def test_a_run_stopped_before_its_first_plan_keeps_its_time_limit_after_a_resume(monkeypatch, stop):
    machine = Machine(monkeypatch, step=1.0, evaluation=60)
    machine.start(600, 5000)
    machine.train(until=(0, stop))
    machine.now += 5000
    machine.start(600, 5000, machine.progress)
    machine.train()
    assert machine.now - 5100 == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize(("limit", "steps"), [(8, 40), (30, 400)])
def test_a_resume_with_more_time_trains_all_steps_of_an_epoch_again(monkeypatch, limit, steps):
    machine = Machine(monkeypatch, step=0.25, evaluation=1)
    machine.start(limit, steps)
    machine.train()
    machine.now += 5000
    machine.start(3600, steps, machine.progress)
    machine.train()
    assert machine.length.steps == steps
    used = sum(row["seconds"] for row in machine.progress.rows)
    assert used == pytest.approx(3600, rel=0.1)


def test_a_run_with_a_number_of_epochs_keeps_that_number(monkeypatch):
    machine = Machine(monkeypatch, step=0.4, evaluation=4)
    machine.start(None, 31)
    machine.train()
    assert machine.args.epochs == 45
    assert machine.progress.epochs == 0


@pytest.mark.slow
def test_a_run_with_a_time_limit_ends_and_its_resume_trains_nothing(tmp_path, capsys):
    flags = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--img-size", 16, "--reference", 0]
    run(*flags, "--epochs", "3s", "--output", tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("plan: ") == 1  # later plans change only the total in the lines "epoch 1/9"
    (epochs,) = {int(last) for last in re.findall(r"^epoch \d+/(\d+) ", printed, re.M)[-1:]}
    assert len(rows(tmp_path / "run")) == epochs
    run("--output", tmp_path / "run", "--resume", "--model", f"{MODELS}:tiny", "--device", "cpu")
    assert "a larger --epochs continues it" in capsys.readouterr().out
    assert len(rows(tmp_path / "run")) == epochs


@pytest.mark.parametrize("text", ["0min", "5 min", "-3s", "1d", "min", "1e3s", "infh"])
def test_a_text_that_is_not_a_time_is_refused(text, capsys):
    assert "--epochs" in refused(capsys, "--epochs", text)


@pytest.mark.parametrize("limit", [900, 150])
def test_a_resume_with_another_time_limit_ends_within_10_percent_of_it(monkeypatch, limit):
    machine = Machine(monkeypatch, step=0.4, evaluation=4)
    machine.start(300, 31)
    machine.train(until=(5, 20) if limit < 300 else None)
    machine.now += 5000
    machine.start(limit, 31, machine.progress)
    machine.train()
    assert machine.now - 5100 == pytest.approx(limit, rel=0.1)
