"""Normalized knowledge distillation: a teacher's target probability and its distribution over the other classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .fused import nkd_rows
from .targets import ClassIndices, as_rows, check_logits, check_options, read_target, reduce
from .terms import centred, cross_entropy, is_class, log_normalized


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Normalized KD loss; ADD it to the cross-entropy, it does not replace it.

    With S and T the softmax of student and teacher, t the target class, and N(.) the renormalisation over the
    C - 1 classes other than t, where a power is a temperature before the softmax::

        L_nkd = - T_t log S_t  -  gamma * temperature^2 * sum_{i != t} N(T^temperature)_i log N(S^temperature)_i

    The first term is at temperature 1. The second is a cross-entropy, so L_nkd does not reach 0 when student and
    teacher agree. For class probabilities V the loss is its expectation over the label, ``sum_k V_k L_nkd(t = k)``,
    exact for mixup and cutmix, and equal to the hard-label loss for a one-hot row.

    Args:
        student_logits: (N, C), (N, C, d1, ...) or (C,), any floating dtype; C >= 2.
        teacher_logits: the same shape, of any floating dtype; no gradient flows into it.
        target: class indices, (N,), (N, d1, ...) or (), or class probabilities of the logits' shape, constant.
        gamma: weight of the non-target term. The paper's: 1.5 for ImageNet CNNs, 1.0 for ViTs, 3.5 for CIFAR-100.
        temperature: of the non-target term. The paper's: 1.0 on ImageNet, 3.0 on CIFAR-100.
        ignore_index: targets of this class index add nothing and are not counted by "mean".
        reduction: "none" (the target's shape), "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 logits); its gradient has the dtype of ``student_logits``.

    Raises:
        ValueError: shapes that do not fit, one class, gamma < 0, temperature <= 0, an unknown reduction.
        TypeError: logits that are not floating point, class indices that are not integers.

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss = nkd_loss(student, teacher, torch.tensor([0]))
        >>> print(f"{loss:.4f}")
        1.9104
    """
    check_logits(student_logits, teacher_logits, "student_logits", "teacher_logits")
    check_options(reduction, gamma=gamma)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    rows = read_target(target, student_logits, ignore_index)
    student, teacher = as_rows(student_logits), as_rows(teacher_logits)

    if isinstance(rows, ClassIndices):
        loss = nkd_rows(student, teacher, rows.label, gamma, temperature)
    else:
        student = centred(student)
        teacher = centred(teacher.detach()).to(student.dtype)
        target_term = cross_entropy(rows.probs * teacher.softmax(1), student.log_softmax(1))
        non_target_term = _expected_non_target_term(student / temperature, teacher / temperature, rows.probs)
        loss = target_term + gamma * temperature**2 * non_target_term
    return reduce(loss, rows, reduction, student_logits.shape)


def _expected_non_target_term(student: Tensor, teacher: Tensor, probs: Tensor) -> Tensor:
    """- sum_k V_k sum_{i != k} N_k(T)_i log N_k(S)_i, (R,), where N_k leaves out class k.

    Two facts make it one pass over the classes. log N_k(S)_i = log S_i - log(1 - S_k), and the N_k(T) mix to

        sum_k V_k N_k(T)_i = T_i * (sum_k V_k / (1 - T_k)  -  V_i / (1 - T_i)).

    Both lose every digit for a class near certainty. At most one class of a row is above one half, the largest:
    that one is taken out by masking, and what is left has 1 - S_k and 1 - T_k of at least one half.
    """
    student_top, teacher_top = student.detach().argmax(1), teacher.argmax(1)

    def at(values: Tensor, label: Tensor) -> Tensor:
        return values.gather(1, label.unsqueeze(1))

    def without(values: Tensor, label: Tensor) -> Tensor:
        return values.masked_fill(is_class(values, label), 0.0)

    # k = the student's largest class
    top_term = at(probs, student_top).squeeze(1) * cross_entropy(
        log_normalized(teacher, student_top).exp(), log_normalized(student, student_top)
    )

    # every other k: V is `rest`, sum_k V_k N_k(T) is `mixed`, again with the teacher's largest class by itself
    rest = without(probs, student_top)
    t, log_s = teacher.softmax(1), student.log_softmax(1)
    ratio = without(rest / (1 - t), teacher_top)
    mixed = at(rest, teacher_top) * log_normalized(teacher, teacher_top).exp()
    mixed = mixed + t * (ratio.sum(1, keepdim=True) - ratio)
    log_one_minus_s = torch.log1p(-without(log_s.exp(), student_top))
    rest_term = cross_entropy(mixed, log_s) + (rest * log_one_minus_s).sum(1)

    return top_term + rest_term
