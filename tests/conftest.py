"""Two test processes on two cores: one thread each, or they would spin against one another."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
