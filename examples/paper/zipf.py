"""Compute USKD's non-target term with another ranking of the classes: train.py --kd examples/paper/zipf.py:NAME

NAME is WHO_BETA. WHO ranks the classes: random, student or teacher. BETA is the weight: 01 (which means 0.1) or 1. Only
teacher_BETA needs --teacher or --teacher-labels.
"""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlite.terms import cross_entropy, is_class, log_normalized, odds, zipf_weights


def zipf_rows(student: Tensor, ranking: Tensor, target: Tensor, beta: float) -> Tensor:
    """Return - beta sum_{i != t} N(Z)_i log N(S)_i of each row; `ranking` has the logits that rank the classes."""
    z = zipf_weights(odds(ranking.detach(), target)).masked_fill(is_class(student, target), 0.0)
    return beta * cross_entropy(z / z.sum(1, keepdim=True), log_normalized(student, target))


def by_random(student: Tensor, teacher: Tensor | None, target: Tensor, beta: float) -> Tensor:
    return zipf_rows(student, torch.rand_like(student), target, beta)


def by_student(student: Tensor, teacher: Tensor | None, target: Tensor, beta: float) -> Tensor:
    return zipf_rows(student, student, target, beta)


def by_teacher(student: Tensor, teacher: Tensor, target: Tensor, beta: float) -> Tensor:
    return zipf_rows(student, teacher, target, beta)


def cross_entropy_again(student: Tensor, teacher: Tensor | None, target: Tensor) -> Tensor:
    """Return the cross-entropy of each row; USKD's target term with alpha 1 is nearly the same."""
    return F.cross_entropy(student, target, reduction="none")


random_01, student_01, teacher_01 = (functools.partial(who, beta=0.1) for who in (by_random, by_student, by_teacher))
random_1, student_1, teacher_1 = (functools.partial(who, beta=1.0) for who in (by_random, by_student, by_teacher))
