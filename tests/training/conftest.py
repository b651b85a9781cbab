"""Shorten the runs of train.py that tests start in their own process."""

import functools

import pytest

from kdlite.training import data
from kdlite.training.data import Digits


@pytest.fixture(autouse=True)
def small_runs(request, monkeypatch):
    """Make runs of train.py in this process cheap: use 200 training and 60 validation digits, and draw no pictures.

    All 1,797 digits and the three pictures take three quarters of the time of a small run. Tests that need them have
    the marker `whole_runs`.
    """
    if request.node.get_closest_marker("whole_runs"):
        return
    monkeypatch.setattr(data, "Digits", SmallDigits)
    for place in ("kdlite.training.outputs.plot_curves", "kdlite.training.outputs.batch_picture",
                  "deploy.per_class.confusion_picture"):  # fmt: skip
        monkeypatch.setattr(place, make_empty)


def make_empty(path, *_):
    path.touch()


class SmallDigits(Digits):
    """Hold the first digits of a part. A process reads them once."""

    def __init__(self, train):
        self.images, self.targets = small_digits(train)


@functools.cache
def small_digits(train):
    whole, count = Digits(train), 200 if train else 60
    return whole.images[:count], whole.targets[:count]
