"""What the losses are made of, for class indices: the loss of a row in ordinary autograd, with the paper's symbols.

These are the definitions. :mod:`kdlite.fused` computes the same with less memory and fewer passes, and falls back to
them. Rows are (R, C) logits; ``label``, (R,), is the class t of each. S, T and W are the softmax of the student's (or
USKD's strong), the teacher's and the weak head's logits; N(.) renormalises over the C - 1 classes other than t. Losses
are (R,), float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .zipf import zipf_weights


def nkd_rows(student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float) -> Tensor:
    """- T_t log S_t  -  gamma temperature^2 sum_{i != t} N(T^temperature)_i log N(S^temperature)_i."""
    student = centred(student)
    teacher = centred(teacher.detach()).to(student.dtype)
    target = -log_odds(teacher, label).sigmoid() * F.logsigmoid(log_odds(student, label))
    n_t = log_normalized(teacher / temperature, label).exp()
    return target + gamma * temperature**2 * cross_entropy(n_t, log_normalized(student / temperature, label))


def uskd_rows(
    strong: Tensor, weak: Tensor, label: Tensor, counted: Tensor, alpha: float, beta: float, mu: float, smoothing: float
) -> Tensor:
    """- alpha P_t log S_t  -  beta sum_{i != t} N(Z)_i log N(S)_i  -  mu sum_i V~_i log W_i; see ``target_weight``."""
    strong = centred(strong)
    weak = centred(weak).to(strong.dtype)
    minus_log_s = -F.logsigmoid(log_odds(strong, label))
    with torch.no_grad():
        z = zipf_weights(odds(strong, label) + odds(weak, label)).masked_fill(is_class(strong, label), 0.0)
        n_z = z / z.sum(1, keepdim=True)  # the sum of Z itself cancels
    non_target = cross_entropy(n_z, log_normalized(strong, label))
    weak_term = F.cross_entropy(weak, label, label_smoothing=smoothing, reduction="none")
    return alpha * target_weight(minus_log_s, counted) * minus_log_s + beta * non_target + mu * weak_term


def target_weight(minus_log_s: Tensor, counted: Tensor) -> Tensor:
    """P_t = S_t^2 + 1 - mean(S_t^2), (R,), without gradient, the mean over the rows ``counted`` (R,) bool."""
    squared = (-2 * minus_log_s.detach()).exp()
    # the clamp: with no row counted, 0/0 here would turn the gradient to NaN
    return squared + 1 - squared.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def centred(rows: Tensor) -> Tensor:
    """float32 at least, the largest logit of a row at 0.

    Every loss here is unchanged by a shift common to a row, so the shift carries no gradient; it keeps float32
    exact where all logits share a large offset.
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows - rows.detach().amax(1, keepdim=True)


def is_class(logits: Tensor, label: Tensor) -> Tensor:
    """(R, C) bool: True in the column of each row's label."""
    return torch.arange(logits.shape[1], device=logits.device, dtype=torch.int32) == label.int().unsqueeze(1)


def log_sum_others(logits: Tensor, label: Tensor) -> Tensor:
    """log sum_{i != label} exp z_i, (R, 1), never by subtraction from the whole sum."""
    return logits.masked_fill(is_class(logits, label), -torch.inf).logsumexp(1, keepdim=True)


def odds(logits: Tensor, label: Tensor) -> Tensor:
    """p_i / (1 - p_t) of every class i, (R, C), t included: exp(z_i) / sum_{j != t} exp(z_j)."""
    return (logits - log_sum_others(logits, label)).exp()


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """log(p / (1 - p)) of each row's label, (R,): p is its sigmoid, log p its logsigmoid, however near 0 or 1."""
    # gather is what refuses a label out of range: with an error on CPU, a device assert on CUDA
    return (logits.gather(1, label.unsqueeze(1)) - log_sum_others(logits, label)).squeeze(1)


def log_normalized(logits: Tensor, label: Tensor) -> Tensor:
    """log N(.) of the paper, (R, C): the log-softmax over the classes other than the label, -inf at the label."""
    return logits.masked_fill(is_class(logits, label), -torch.inf).log_softmax(1)


def cross_entropy(weights: Tensor, log_probs: Tensor) -> Tensor:
    """- sum_i weights_i log_probs_i, (R,), where a weight of 0 takes its class out, even if its log is -inf."""
    return -(weights * log_probs.masked_fill(weights == 0, 0.0)).sum(1)
