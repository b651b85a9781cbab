"""Fit the length of a run to a time (--epochs 30min), from the measured seconds of its steps and epochs."""

from __future__ import annotations

import argparse
import math
import time

import torch

from deploy.flags import stretch_epochs
from kdlite.training.checkpoint import Progress
from kdlite.training.distributed import gather, log

FEWEST = 5  # if fewer epochs fit, each epoch uses only a part of the images, so that the last one also ends in time
WARM_UP = 5  # steps that are not measured: the first ones start processes and allocate memory
MEASURED = 50  # number of measured steps; a shorter epoch is measured as a whole


class Length:
    """Set the number of epochs of a run, and of optimizer steps in an epoch, fixed or fitted to a time.

    The fit runs after the first MEASURED steps, or after a shorter first epoch, and again after each epoch. It sets
    args.epochs, and stretches warm-up and milestones in proportion.

    Args:
        args: epochs, and time_limit in seconds (None: no limit)
        steps: optimizer steps in an epoch over all images
        progress: progress of the run, with the plan, which a resumed run keeps unless --epochs gives another time
        started: time.monotonic() at the start of this process's run
        val_share: a guess for the first plan: seconds of an evaluation, divided by those of a training epoch
    """

    def __init__(
        self, args: argparse.Namespace, steps: int, progress: Progress, started: float, val_share: float
    ) -> None:
        self.args, self.progress, self.val_share = args, progress, val_share
        self.steps = self.all_steps = steps
        self.marked, self.before = 0.0, progress.step  # before: steps of this epoch before a resume
        self.began = started - progress.seconds - sum(row["seconds"] for row in progress.rows)
        if args.time_limit and progress.epochs:
            self.steps = progress.steps
            stretch_epochs(args, progress.epochs)
        if args.time_limit and progress.rows and progress.time_limit != args.time_limit:  # a resume with another time
            self.refit(epoch_ended=True)

    def refit(self, epoch_ended: bool = False) -> bool:
        """Plan the run if a plan is due; return whether the plan has changed. Call it after each step and epoch."""
        now, progress, old = time.monotonic(), self.progress, (self.args.epochs, self.steps)
        done = progress.step - self.before
        if not self.args.time_limit or not (epoch_ended or (not progress.epochs and done <= MEASURED)):
            return False
        if not epoch_ended and done == WARM_UP:
            self.marked = synchronised_time()
        if epoch_ended:
            row = progress.rows[-1]
            epoch = row["seconds"]
            validation = epoch - self.steps * self.args.batch_size / row["images_per_s"]
        elif done == MEASURED:
            training = self.steps * (synchronised_time() - self.marked) / (MEASURED - WARM_UP)
            epoch, validation = training * (1 + self.val_share), training * self.val_share
        else:
            return False
        remaining = self.args.time_limit - (now - self.began) + progress.seconds  # from the start of this epoch
        remaining, epoch, validation = (max(values) for values in zip(*gather((remaining, epoch, validation))))
        if progress.time_limit not in (0, self.args.time_limit) and not progress.step:  # all images may fit now
            whole = validation + (epoch - validation) * self.all_steps / self.steps
            if remaining >= FEWEST * whole:
                epoch, self.steps = whole, self.all_steps
        left = remaining / epoch
        if not progress.epochs and left < FEWEST:
            count = max(1 - progress.epoch, math.ceil(left - 0.05), 0)
            if count:  # 0: the run ends here with all steps, so that a resume with more time uses all images
                share = (remaining / count - validation) / (epoch - validation)
                self.steps = min(self.steps, max(1, progress.step, round(share * self.steps)))
        else:
            count = max(1 - progress.epoch, 0, round(left))
        stretch_epochs(self.args, progress.epoch + count)
        is_new = not progress.epochs or progress.time_limit != self.args.time_limit or old[1] != self.steps
        progress.epochs, progress.steps, progress.time_limit = self.args.epochs, self.steps, self.args.time_limit
        if old == (self.args.epochs, self.steps):
            return False
        if is_new:  # a mere correction needs no line: the log of each epoch shows the number of epochs
            plan = f"{self.args.epochs} epochs of {self.steps} steps in {self.args.time_limit / 60:.3g} min"
            log(f"plan: {plan}; each epoch corrects the number of epochs")
        return True


def synchronised_time() -> float:
    """Wait until the device has done its work, and return the time."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()
