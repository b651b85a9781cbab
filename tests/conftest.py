"""Two test processes on two cores: one thread each; tests that share a costly fixture run in one process."""

import os

import pytest
import torch

SHARED = ("trained", "deployed")  # fixtures of minutes: what uses them is slow, and in one group

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # more would spin against one another


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        if set(SHARED) & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.xdist_group("trained"))
        if any(mark.kwargs.get("reason") == "needs a CUDA GPU" for mark in item.iter_markers("skipif")):
            item.add_marker(pytest.mark.gpu)
