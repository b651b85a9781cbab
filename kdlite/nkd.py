"""Compute NKD (normalized knowledge distillation, ICCV 2023), the loss of a student with a teacher."""

from __future__ import annotations

from torch import Tensor

from . import fused, terms
from .inputs import ClassIndices, as_rows, check_logits, check_options, check_positive, class_dim, read_target, reduce


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Return the normalized KD loss; ADD it to the cross-entropy, which it does not replace.

    S and T are the softmax of student and teacher, t is the target class, and N(.) renormalises over the C - 1 classes
    other than t. T^temperature is the softmax of the logits divided by the temperature (the paper's lambda; eq. 7)::

        L_nkd = - T_t log S_t  -  gamma * temperature^2 * sum_{i != t} N(T^temperature)_i log N(S^temperature)_i

    The first term is at temperature 1. The second term is a cross-entropy, so L_nkd does not reach 0 if student and
    teacher agree. For class probabilities V the loss is the expectation over the label, ``sum_k V_k L_nkd(t = k)``. The
    expectation is exact, also for mixup and cutmix. For a one-hot row it equals the hard-label loss.

    Args:
        student_logits: (N, C), (N, C, d1, ...) or (C,), any floating dtype; C >= 2.
        teacher_logits: the same shape, of any floating dtype; no gradient flows into it.
        target: class indices, (N,), (N, d1, ...) or (); or class probabilities of the logits' shape, without gradient;
            or None: the teacher's most probable class (for unlabelled data).
        gamma: weight of the non-target term. The paper uses 1.5 for ImageNet CNNs, 1.0 for ViTs, 3.5 for CIFAR-100.
        temperature: temperature of the non-target term. The paper uses 1.0 on ImageNet, 3.0 on CIFAR-100.
        ignore_index: class index of the targets to ignore: they add 0, and "mean" does not count them. Their logits
            must be finite, also the teacher's.
        reduction: "none" (the target's shape), "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 logits); its gradient has the dtype of ``student_logits``.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, gamma < 0, temperature <= 0, an unknown reduction.
        TypeError: logits that are not floating point, class indices that are not integers, a gamma or temperature that
            is not a Python number (a tensor would get no gradient).

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> loss = nkd_loss(student, teacher, torch.tensor([0]))
        >>> print(f"{loss:.4f}")
        1.9104
    """
    check_logits(student_logits, teacher_logits, "student_logits", "teacher_logits")
    check_options(reduction, gamma=gamma)
    check_positive(temperature=temperature)
    if target is None:
        target, ignore_index = teacher_logits.argmax(class_dim(teacher_logits)), -100
    rows = read_target(target, student_logits, ignore_index)
    student, teacher = as_rows(student_logits), as_rows(teacher_logits)
    if isinstance(rows, ClassIndices):
        nkd_rows = fused.nkd_rows if fused.can_fuse(student, teacher) else terms.nkd_rows
        loss = nkd_rows(student, teacher, rows.label, gamma, temperature)
    else:
        loss = terms.nkd_rows_soft(student, teacher, rows.probs, gamma, temperature)
    return reduce(loss, rows, reduction, student_logits.shape)
