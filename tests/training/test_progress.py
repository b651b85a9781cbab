"""Test the progress of a command: a bar on a terminal, lines elsewhere, and no output with --quiet or --json."""

import io
import sys

import pytest

from deploy import cli


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Replace time.monotonic by a number that the test sets."""
    now = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_lines_are_printed_less_and_less_often(clock, capsys):
    for _ in cli.ProgressBar(range(3000), "ask the teacher", each=64, unit="images"):
        clock[0] += 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "ask the teacher: 960 of 192,000 images, 32 images a second, 99.5 min left"
    assert 15 < len(lines) < 30  # in 100 minutes


def test_a_line_is_printed_at_least_every_ten_minutes_and_a_large_rate_has_no_decimals(clock, capsys):
    for _ in cli.ProgressBar(range(1000), "epoch 1", each=100_000, unit="images"):
        clock[0] += 60
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 100
    assert ", 1,667 images a second, " in lines[-1]


def test_a_loop_shorter_than_half_a_minute_prints_nothing(clock, capsys):
    assert list(cli.ProgressBar(range(29), "load")) == list(range(29))
    assert capsys.readouterr() == ("", "")


def test_earlier_steps_are_in_the_count_but_not_in_the_rate(clock, capsys):
    progress = cli.ProgressBar(iter(range(50)), "epoch 3", total=1000, each=10, first=50, unit="images")
    for _ in progress:
        progress.postfix = "loss 1.25"
        clock[0] += 40
    first = capsys.readouterr().err.splitlines()[0]
    assert first == "epoch 3: 510 of 1,000 images, 0.25 images a second, 32.7 min left, loss 1.25"


def test_a_loop_of_unknown_length_prints_its_count_without_a_total(clock, capsys):
    for _ in cli.ProgressBar(iter(range(2)), "read"):
        clock[0] += 40
    assert capsys.readouterr().err.splitlines()[0] == "read: 1, 0.025 a second"


def test_a_bar_on_a_terminal_is_erased_at_the_end(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = cli.ProgressBar(range(5), "measure", each=2, unit="images")
    for _ in progress:
        progress.postfix = "loss 1.25"
    text = sys.stderr.getvalue()
    assert "measure" in text
    assert "/10" in text
    assert text.endswith("\r")


def test_a_loop_that_breaks_early_erases_its_bar(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in cli.ProgressBar(range(5), "measure"):
        break
    assert sys.stderr.getvalue().endswith("\r")


def test_quiet_and_json_hide_messages_and_progress(clock, capsys):
    def work(args):
        cli.log("a remark")
        for _ in cli.ProgressBar(range(3), "work"):
            clock[0] += 100
        print("the result")

    parser = cli.make_parser("", "benchmark", "--quiet", "--json")
    for flags in (["--quiet"], ["--json"]):
        assert cli.command(parser, work, flags) == 0
        assert capsys.readouterr() == ("the result\n", "")
    assert cli.command(parser, work, []) == 0
    out, err = capsys.readouterr()
    assert out == "a remark\nthe result\n"
    assert len(err.splitlines()) == 3
