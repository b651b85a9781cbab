"""Compute NKD with rules for gamma: train.py --kd examples/paper/gamma_rules.py:NAME --teacher ...

NAME is a name of RULES, all at temperature 1. The constants of the rules were chosen before their first run.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kdlite.terms import centred, cross_entropy, log_normalized, log_odds, nkd_rows

STEPS = 1000  # of a run, for the falling gamma


def mixed(student: Tensor, teacher: Tensor, target: Tensor, n_t: Tensor) -> Tensor:
    """Return L_nkd (eq. 7) of each row with gamma 1, temperature 1, and n_t, (N, C), instead of N(T)."""
    target_term = nkd_rows(student, teacher, target, 0.0, 1.0)
    return target_term + cross_entropy(n_t, log_normalized(centred(student), target))


def constant(student: Tensor, teacher: Tensor, target: Tensor, gamma: float) -> Tensor:
    return nkd_rows(student, teacher, target, gamma, 1.0)


def unsure(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return NKD with gamma 4 (1 - T_t). KD at temperature 1 is NKD with gamma 1 - T_t, plus one term."""
    return nkd_rows(student, teacher, target, 4 * log_odds(centred(teacher), target).neg().sigmoid(), 1.0)


def entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return NKD with gamma 6 (1 - H(N(T)) / log(C - 1)): it is 0 if the non-target classes are equal."""
    log_n = log_normalized(centred(teacher), target)
    gamma = 6 * (1 - cross_entropy(log_n.exp(), log_n) / math.log(teacher.shape[1] - 1))
    return nkd_rows(student, teacher, target, gamma, 1.0)


def sharp(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return NKD with gamma 1; only the teacher's non-target classes have temperature 0.5 (ATS, arXiv 2210.04427)."""
    return mixed(student, teacher, target, log_normalized(centred(teacher) / 0.5, target).exp())


class ClassMean:
    """Compute NKD with gamma 1, and with (N(T) + M) / 2 instead of N(T).

    M is the average N(T) of the images of the same class in the run so far.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # class -> sum of N(T), (C,)

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        n_t = log_normalized(centred(teacher), target).exp()
        for label, row in zip(target.tolist(), n_t):
            self.sums[label] = self.sums.get(label, 0) + row
        means = torch.stack([self.sums[label] / self.sums[label].sum() for label in target.tolist()])
        return mixed(student, teacher, target, (n_t + means) / 2)


class Falling:
    """Compute NKD with a gamma that falls from 3.5 to 0 in the steps of the run, as DWPose's weight of distillation."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        self.step += 1
        return nkd_rows(student, teacher, target, 3.5 * max(0.0, 1 - self.step / STEPS), 1.0)


CONSTANTS = {f"constant_{gamma:g}".replace(".", "_"): gamma for gamma in (0.25, 0.5, 1, 1.5, 3.5)}
RULES: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(constant, gamma=gamma) for name, gamma in CONSTANTS.items()},
    "unsure": unsure,
    "entropy": entropy,
    "sharp": sharp,
    "class_mean": ClassMean(),
    "falling": Falling(),
}
globals().update(RULES)  # train.py takes a loss by its name in the file
