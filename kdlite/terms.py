"""Compute the loss of each row in plain autograd, with the paper's symbols.

These functions define the losses; :mod:`kdlite.fused` computes the hard-label losses with less memory and fewer passes.

Rows are (R, C) logits. S, T and W are the softmax of the logits: S of the student (USKD's strong logits), T of the
teacher, W of the weak head. A target is the class t, ``label`` (R,), or the class probabilities V, ``probs`` (R, C).
N(.) renormalises over the C - 1 classes other than t. Losses are (R,), float32 at least. Source: Yang et al., arXiv
2303.13005, section 3.1 (NKD; its loss is eq. 7) and section 3.2 (USKD).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

# ---- NKD ----------------------------------------------------------------------------------------------------------


def nkd_rows(student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float) -> Tensor:
    """Return L_nkd of each row (eq. 7)::

    L_nkd = - T_t log S_t  -  gamma temperature^2 sum_{i != t} N(T^temperature)_i log N(S^temperature)_i
    """
    student = centred(student)
    teacher = centred(teacher.detach()).to(student.dtype)
    target_term = -log_odds(teacher, label).sigmoid() * F.logsigmoid(log_odds(student, label))
    n_t = log_normalized(teacher / temperature, label).exp()
    non_target_term = cross_entropy(n_t, log_normalized(student / temperature, label))
    return target_term + gamma * temperature**2 * non_target_term


def nkd_rows_soft(student: Tensor, teacher: Tensor, probs: Tensor, gamma: float, temperature: float) -> Tensor:
    """Return sum_k V_k L_nkd(t = k), the expectation over the label."""
    student = centred(student)
    teacher = centred(teacher.detach()).to(student.dtype)
    target_term = cross_entropy(probs * teacher.softmax(1), student.log_softmax(1))
    non_target_term = expected_non_target(student / temperature, teacher / temperature, probs)
    return target_term + gamma * temperature**2 * non_target_term


def expected_non_target(student: Tensor, teacher: Tensor, probs: Tensor) -> Tensor:
    """Return - sum_k V_k sum_{i != k} N_k(T)_i log N_k(S)_i, (R,), where N_k excludes class k.

    Two equations reduce the double sum to one pass over the classes: log N_k(S)_i = log S_i - log(1 - S_k), and

        sum_k V_k N_k(T)_i = T_i * (sum_k V_k / (1 - T_k)  -  V_i / (1 - T_i)).

    Both lose all digits for a class with a probability near 1. Only the largest class of a row can have a probability
    above one half. The code computes that class separately; for the others 1 - S_k and 1 - T_k are at least one half.
    """
    student_top, teacher_top = student.detach().argmax(1), teacher.argmax(1)

    # k = the student's largest class
    top_term = pick(probs, student_top).squeeze(1) * cross_entropy(
        log_normalized(teacher, student_top).exp(), log_normalized(student, student_top)
    )

    # the other classes k: `rest` is V, `mixed` is sum_k V_k N_k(T); the teacher's largest class is added separately
    rest = drop(probs, student_top)
    t, log_s = teacher.softmax(1), student.log_softmax(1)
    ratio = drop(rest / (1 - t), teacher_top)
    mixed = pick(rest, teacher_top) * log_normalized(teacher, teacher_top).exp()
    mixed = mixed + t * (ratio.sum(1, keepdim=True) - ratio)
    log_one_minus_s = torch.log1p(-drop(log_s.exp(), student_top))
    rest_term = cross_entropy(mixed, log_s) + (rest * log_one_minus_s).sum(1)

    return top_term + rest_term


# ---- USKD ---------------------------------------------------------------------------------------------------------


class USKDWeights(NamedTuple):
    """Hold the weights of the three terms, the smoothing of V~, and the processes that share a batch."""

    alpha: float
    beta: float
    mu: float
    label_smoothing: float
    group: Any = None  # a ProcessGroup; None: this process alone


def uskd_rows(strong: Tensor, weak: Tensor, label: Tensor, valid: Tensor, weights: USKDWeights) -> Tensor:
    """Return L_uskd = - alpha P_t log S_t  -  beta sum_{i != t} N(Z)_i log N(S)_i  -  mu sum_i V~_i log W_i.

    valid: (R,) bool; the mean in P_t is over the rows where it is True.
    """
    alpha, beta, mu, smoothing, group = weights
    strong = centred(strong)
    weak = centred(weak).to(strong.dtype)
    minus_log_s = -F.logsigmoid(log_odds(strong, label))
    target_term = target_weight(minus_log_s, valid, group) * minus_log_s
    weak_term = F.cross_entropy(weak, label, label_smoothing=smoothing, reduction="none")
    return alpha * target_term + beta * uskd_non_target(strong, weak, label) + mu * weak_term


def uskd_rows_soft(strong: Tensor, weak: Tensor, probs: Tensor, weights: USKDWeights) -> Tensor:
    """Return the expectation of L_uskd over the label; the non-target term uses a row's two most probable labels."""
    alpha, beta, mu, smoothing, group = weights
    strong = centred(strong)
    weak = centred(weak).to(strong.dtype)
    log_s = strong.log_softmax(1)
    squared = log_s.detach().exp().square()
    expected = (probs * squared).sum(1)
    p = squared + 1 - batch_mean(expected, torch.ones_like(expected), group)  # P_k
    target_term = cross_entropy(probs * p, log_s)

    shares, labels = probs.topk(2, dim=1)
    shares = shares / shares.sum(1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
    non_target_term = torch.zeros_like(target_term)
    for share, label in zip(shares.unbind(1), labels.unbind(1)):
        non_target_term = non_target_term + share * uskd_non_target(strong, weak, label)

    smoothed = (1 - smoothing) * probs + smoothing / weak.shape[1]  # V~
    weak_term = cross_entropy(smoothed, weak.log_softmax(1))
    return alpha * target_term + beta * non_target_term + mu * weak_term


def uskd_non_target(strong: Tensor, weak: Tensor, label: Tensor) -> Tensor:
    """Return - sum_{i != t} N(Z)_i log N(S)_i; Z are the Zipf weights of R_i = W_i / (1 - W_t) + S_i / (1 - S_t)."""
    with torch.no_grad():
        r = odds(strong, label) + odds(weak, label)
        z = zipf_weights(r).masked_fill(is_class(strong, label), 0.0)
        n_z = z / z.sum(1, keepdim=True)  # the normalisation of Z cancels
    return cross_entropy(n_z, log_normalized(strong, label))


def target_weight(minus_log_s: Tensor, valid: Tensor, group: Any = None) -> Tensor:
    """Return P_t = S_t^2 + V_t - mean(S_t^2) with V_t = 1, (R,), without gradient; the mean is over ``valid`` rows."""
    squared = (-2 * minus_log_s.detach()).exp()
    return squared + 1 - batch_mean(squared.where(valid, 0.0), valid, group)


def batch_mean(values: Tensor, counted: Tensor, group: Any) -> Tensor:
    """Return sum(values) / sum(counted) over the rows of all processes in the group (None: this process)."""
    totals = torch.stack([values.sum(), counted.sum().to(values.dtype)])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return totals[0] / totals[1].clamp(min=1)  # without rows, 0/0 would make the gradient NaN


@torch.no_grad()
def zipf_weights(scores: Tensor) -> Tensor:
    """Return 1 / rank_i by descending score, (R, C), for scores >= 0; ties are ranked by class index.

    The caller divides by their sum.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    reciprocals = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype).reciprocal_()
    return torch.empty_like(scores).scatter_(1, order, reciprocals.expand_as(scores))


# ---- rows ---------------------------------------------------------------------------------------------------------


def centred(rows: Tensor) -> Tensor:
    """Return the rows minus their largest logit, in float32 at least.

    Such a shift does not change a loss, so it needs no gradient. Without it, float32 loses digits if all logits
    share a large offset.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows - rows.detach().amax(1, keepdim=True)


def is_class(logits: Tensor, label: Tensor) -> Tensor:
    """Return a mask, (R, C) bool, that is True in the column of each row's label."""
    return torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32) == label.int().unsqueeze(1)


def pick(values: Tensor, label: Tensor) -> Tensor:
    """Return the value in the column of each row's label, (R, 1)."""
    return values.gather(1, label.unsqueeze(1))


def drop(values: Tensor, label: Tensor) -> Tensor:
    """Return the values with 0 in the column of each row's label."""
    return values.masked_fill(is_class(values, label), 0.0)


def log_sum_others(logits: Tensor, label: Tensor) -> Tensor:
    """Return log sum_{i != label} exp z_i, (R, 1), without a subtraction from the whole sum."""
    return logits.masked_fill(is_class(logits, label), -torch.inf).logsumexp(1, keepdim=True)


def odds(logits: Tensor, label: Tensor) -> Tensor:
    """Return p_i / (1 - p_t) of every class i, including t, (R, C): exp(z_i) / sum_{j != t} exp(z_j)."""
    return (logits - log_sum_others(logits, label)).exp()


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of each row's label, (R,); its sigmoid is p, its logsigmoid is log p, to all digits."""
    # a label out of range fails in gather: with an error on CPU, with a device assert on CUDA
    return (logits.gather(1, label.unsqueeze(1)) - log_sum_others(logits, label)).squeeze(1)


def log_normalized(logits: Tensor, label: Tensor) -> Tensor:
    """Return log N(.), (R, C): the log-softmax over the classes other than the label; -inf at the label."""
    return logits.masked_fill(is_class(logits, label), -torch.inf).log_softmax(1)


def cross_entropy(weights: Tensor, log_probs: Tensor) -> Tensor:
    """Return - sum_i weights_i log_probs_i over the last dimension; a weight of 0 adds 0, even if its log is -inf."""
    return -(weights * log_probs.masked_fill(weights == 0, 0.0)).sum(-1)
