"""Compute NKD from a teacher's top-k: stored labels, or the answers of a server.

The inputs are the teacher's log-probabilities of the target t and of a set K of k other classes. For teacher and
student, all remaining classes count as one class r (the rest), with probabilities T_r and S_r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .inputs import (
    ClassIndices,
    as_rows,
    check_classes,
    check_floating,
    check_integers,
    check_options,
    check_tensors,
    class_dim,
    label_shape_of,
    read_target,
    reduce,
)
from .terms import centred, cross_entropy, is_class, log_odds

# Rounding to bfloat16 can raise the sum of a row's probabilities to this value. A larger sum makes the loss NaN.
MOST_PROBABILITY = 1.05


def nkd_topk_loss(
    student_logits: Tensor,
    teacher_target_logprob: Tensor | None,
    teacher_logprobs: Tensor,
    teacher_indices: Tensor,
    target: Tensor | None,
    *,
    gamma: float = 1.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""Return NKD from a teacher's log-probabilities of the target and of k classes; ADD it to the cross-entropy.

    K is the set of the k classes without the target; r is one class that stands for all others::

        L_nkd = - T_t log S_t  -  gamma * sum_{i in K or i = r} N(T)_i log N(S)_i

    The loss equals :func:`kdlite.nkd_loss` at temperature 1 if K holds every other class. Other temperatures are
    impossible, because the mass of the rest at another temperature is unknown. A softmax over K alone gives another
    loss, in which the rest has probability 0.

    The target may be among the k classes; that entry is ignored. Entries with index -1 or log-probability -inf are
    padding. Log-probabilities are at temperature 1, of any floating dtype; use float32 if the target's probability is
    near 1. A NaN log-probability makes the loss NaN, and so do probabilities with a sum above 1.05.

    Args:
        student_logits: (N, C), (N, C, d1, ...) or (C,), any floating dtype; C >= 2.
        teacher_target_logprob: log T_t, of the target's shape; None if ``target`` is None.
        teacher_logprobs: log T_i, (N, k, d1, ...), with k in the place of C.
        teacher_indices: the classes i, distinct integers in a tensor of the same shape.
        target: class indices, (N,), (N, d1, ...) or (); None: the teacher's most probable class (for unlabelled data).
        gamma: as in :func:`kdlite.nkd_loss`.
        ignore_index: class index of the targets to ignore: they add 0, and "mean" does not count them.
        reduction: "none" (the target's shape), "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 logits); its gradient has the dtype of ``student_logits``.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, a target of class probabilities, gamma < 0, an
            unknown reduction.
        TypeError: logits or log-probabilities that are not floating point, indices or targets that are not integers, a
            gamma that is a tensor.

    Source: the loss, Yang et al., ICCV 2023, arXiv 2303.13005, eq. 7.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0, 0.5]]), torch.tensor([[3.0, 1.0, 0.0, -1.0]])
        >>> target = torch.tensor([0])
        >>> loss = nkd_topk_loss(student, *top_k_logprobs(teacher, target, k=2), target)
        >>> print(f"{loss:.4f}")
        2.5395
    """
    check_tensors(student_logits=student_logits)
    check_floating(student_logits, "student_logits")
    check_classes(student_logits, "student_logits")
    check_options(reduction, gamma=gamma)
    dim = class_dim(student_logits)
    label_shape = label_shape_of(student_logits)
    check_top_k(teacher_target_logprob, teacher_logprobs, teacher_indices, target, label_shape, dim)
    if teacher_target_logprob is None or target is None:
        teacher_target_logprob, target = largest_class(teacher_logprobs, teacher_indices, dim)
        ignore_index = -100
    rows = read_target(target, student_logits, ignore_index)
    if not isinstance(rows, ClassIndices):
        raise ValueError("target must be class indices, got class probabilities: pass indices, or use nkd_loss")
    top, index = as_rows(teacher_logprobs), as_rows(teacher_indices)
    loss = nkd_rows_topk(as_rows(student_logits), rows, teacher_target_logprob.reshape(-1), top, index, gamma)
    return reduce(loss, rows, reduction, student_logits.shape)


def nkd_from_logprobs(
    student_target: Tensor, student_top: Tensor, teacher_target: Tensor, teacher_top: Tensor, *, gamma: float = 1.5
) -> Tensor:
    """Return the loss of :func:`nkd_topk_loss` from log-probabilities alone, one value per prediction.

    Use it if the logits are not in one tensor, as with a vocabulary split over devices or a fused classifier. The
    student's probability of the rest is 1 - S_t - sum_K S_i. In float32, N(S) has a relative error of 1e-7 / (1 - S_t).
    If S_t may be above 0.9999, pass log-probabilities that were computed in float64.

    Args:
        student_target: log S_t, (...).
        student_top: log S_i of the k classes, (..., k), without the target.
        teacher_target: log T_t, (...); no gradient flows into it or into teacher_top.
        teacher_top: log T_i of the same classes, (..., k); -inf is padding.
        gamma: as in :func:`kdlite.nkd_loss`.

    Returns:
        The loss, (...), in float32 at least.

    Raises:
        ValueError: shapes that do not fit, gamma < 0.
        TypeError: log-probabilities that are not floating point.

    Source: the loss, Yang et al., ICCV 2023, arXiv 2303.13005, eq. 7.

    Example:
        >>> s, t = torch.tensor([0.5, 0.2, 0.2, 0.1]).log(), torch.tensor([0.7, 0.2, 0.06, 0.04]).log()
        >>> print(f"{nkd_from_logprobs(s[0], s[1:3], t[0], t[1:3]):.4f}")
        1.9983
    """
    given = dict(
        student_target=student_target, student_top=student_top, teacher_target=teacher_target, teacher_top=teacher_top
    )
    check_tensors(**given)
    for name, tensor in given.items():
        check_logprob(tensor, name)
    check_options("none", gamma=gamma)
    shapes = [tuple(tensor.shape) for tensor in given.values()]
    if shapes[0] != shapes[2] or shapes[1] != shapes[3] or shapes[1][:-1] != shapes[0] or not shapes[1]:
        raise ValueError(f"{', '.join(given)} must be (...), (..., k), (...) and (..., k), got {shapes}")
    dtype = torch.promote_types(student_target.dtype, torch.float32)
    given_top = teacher_top != -math.inf
    student_target = student_target.to(dtype).clamp(max=-torch.finfo(dtype).tiny)
    student_top = student_top.to(dtype)
    # after rounding, the student's probabilities of K may sum to more than 1 - S_t; that sum then replaces 1 - S_t
    of_k = student_top.masked_fill(~given_top, -torch.finfo(dtype).max).logsumexp(-1)
    log_n = student_top - torch.maximum(log1mexp(student_target), of_k).unsqueeze(-1)
    sum_n = log_n.masked_fill(~given_top, -torch.finfo(dtype).max).logsumexp(-1)
    log_n_rest = log1mexp(sum_n.clamp(max=-torch.finfo(dtype).eps))
    return nkd_terms(student_target, log_n, log_n_rest, teacher_target, teacher_top, gamma)


def top_k_logprobs(teacher_logits: Tensor, target: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the teacher's arguments of :func:`nkd_topk_loss` from its logits, to store or to send them.

    Args:
        teacher_logits: (N, C), (N, C, d1, ...) or (C,).
        target: class indices, (N,), (N, d1, ...) or (); targets that the loss ignores may have any index, such as -100.
        k: number of classes, at most C - 1.

    Returns:
        log T_t in the target's shape; log T_i and the indices (int64) of the k largest other classes, (N, k, d1, ...).
        The log-probabilities are float32 at least.

    Raises:
        ValueError: fewer than two classes, a target of another shape, k outside 1 to C - 1.
        TypeError: logits that are not floating point, a target that is not integers.

    Example:
        >>> top_k_logprobs(torch.tensor([0.0, 2.0, 1.0]), torch.tensor(1), k=1)
        (tensor(-0.4076), tensor([-1.4076]), tensor([2]))
    """
    check_tensors(teacher_logits=teacher_logits, target=target)
    check_floating(teacher_logits, "teacher_logits")
    check_classes(teacher_logits, "teacher_logits")
    check_integers(target, "target")
    dim = class_dim(teacher_logits)
    classes, label_shape = teacher_logits.shape[dim], label_shape_of(teacher_logits)
    if target.shape != label_shape:
        raise ValueError(f"target must be class indices of shape {tuple(label_shape)}, got {tuple(target.shape)}")
    if not 0 < k < classes:
        raise ValueError(f"k must be from 1 to C - 1 = {classes - 1}, got {k}")
    logits = centred(as_rows(teacher_logits.detach()))
    label = target.reshape(-1).long().clamp(0, classes - 1)
    target_logprob = F.logsigmoid(log_odds(logits, label))  # exact near 1, where log_softmax rounds to 0
    top, index = logits.masked_fill(is_class(logits, label), -math.inf).topk(k, 1)
    top = top - logits.logsumexp(1, keepdim=True)
    shape = (*target.shape, k)
    return (
        target_logprob.reshape(target.shape),
        top.reshape(shape).movedim(-1, dim),
        index.reshape(shape).movedim(-1, dim),
    )


# ---- the mathematics ----------------------------------------------------------------------------------------------


def nkd_rows_topk(
    student: Tensor, rows: ClassIndices, teacher_target: Tensor, teacher_top: Tensor, index: Tensor, gamma: float
) -> Tensor:
    """Return the loss of each row, (R,), from the student's logits (R, C) and the teacher's k classes, (R, k)."""
    student, label, index = centred(student), rows.label.unsqueeze(1), index.long()
    is_target = (index == label) & ~teacher_top.isnan()  # a NaN of the target's entry must reach the loss too
    given = rows.valid.unsqueeze(1) & (index != -1) & ~is_target & (teacher_top != -math.inf)
    index = index.where(given, label)  # padding points at the target, which is masked below
    teacher_target = teacher_target.where(rows.valid, 0.0)  # any value is allowed in ignored rows
    teacher_top = teacher_top.where(given, -math.inf)

    top = student.gather(1, index).masked_fill(~given, -math.inf)
    known = torch.zeros_like(student, dtype=torch.bool).scatter(1, torch.cat([index, label], 1), True)
    rest = student.masked_fill(known, -math.inf)
    # the gradient of logsumexp is NaN if all its values are -inf
    no_rest = (rest == -math.inf).all(1, keepdim=True)
    log_rest = rest.masked_fill(no_rest, 0.0).logsumexp(1, keepdim=True).masked_fill(no_rest, -math.inf)
    log_others = torch.cat([top, log_rest], 1).logsumexp(1, keepdim=True)  # all classes except the target

    log_s_t = F.logsigmoid((student.gather(1, label) - log_others).squeeze(1))
    return nkd_terms(log_s_t, top - log_others, (log_rest - log_others).squeeze(1), teacher_target, teacher_top, gamma)


def nkd_terms(
    log_s_t: Tensor, log_n: Tensor, log_n_rest: Tensor, teacher_target: Tensor, teacher_top: Tensor, gamma: float
) -> Tensor:
    """Return - T_t log S_t  -  gamma * (sum_{i in K} N(T)_i log N(S)_i  +  N(T)_r log N(S)_r).

    log_n: log N(S) of K, (..., k); log_n_rest: log N(S)_r, (...), -inf if K holds every other class. After
    rounding, the teacher's probabilities of K may sum to more than 1 - T_t; that sum then replaces 1 - T_t.
    """
    teacher_target, teacher_top = (x.detach().to(log_s_t.dtype) for x in (teacher_target, teacher_top))
    given = teacher_top != -math.inf
    # invalid log-probabilities make the loss NaN, because a check that raises would wait for the device
    total = teacher_target.exp() + teacher_top.exp().sum(-1)
    teacher_target = teacher_target.clamp(max=0).where(total <= MOST_PROBABILITY, math.nan)
    log_others = torch.maximum(log1mexp(teacher_target), teacher_top.logsumexp(-1))
    n_t = (teacher_top - log_others.unsqueeze(-1)).exp().where(given, 0.0)
    n_t_rest = (1 - n_t.sum(-1)).clamp(min=0).where(log_n_rest > -math.inf, 0.0)
    weights = torch.cat([n_t, n_t_rest.unsqueeze(-1)], -1)
    log_n = torch.cat([log_n, log_n_rest.unsqueeze(-1)], -1)
    return -teacher_target.exp() * log_s_t + gamma * cross_entropy(weights, log_n)


def log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x <= 0, exact over the whole range; x = 0 gives -inf."""
    near = x > -math.log(2)
    return torch.where(near, (-torch.expm1(x.where(near, -1.0))).log(), torch.log1p(-x.where(~near, -1.0).exp()))


# ---- arguments ----------------------------------------------------------------------------------------------------


def check_top_k(
    target_logprob: Tensor | None,
    logprobs: Tensor,
    indices: Tensor,
    target: Tensor | None,
    label_shape: torch.Size,
    dim: int,
) -> None:
    """Raise unless the tensors fit a target of ``label_shape``, with the k classes in dimension ``dim``."""
    check_tensors(teacher_logprobs=logprobs, teacher_indices=indices)
    if (target_logprob is None) != (target is None):
        raise ValueError("teacher_target_logprob and target go together: pass both, or None for both")
    if target_logprob is not None:
        check_tensors(teacher_target_logprob=target_logprob)
    for name, tensor in (("teacher_target_logprob", target_logprob), ("teacher_logprobs", logprobs)):
        if tensor is not None:
            check_logprob(tensor, name)
    check_integers(indices, "teacher_indices")
    shape = tuple(logprobs.shape)
    fits = logprobs.ndim == len(label_shape) + 1 and shape[:dim] + shape[dim + 1 :] == tuple(label_shape)
    if not fits or indices.shape != logprobs.shape or not shape[dim]:
        wanted = list(map(str, label_shape))
        wanted.insert(dim, "k")
        raise ValueError(
            f"teacher_logprobs and teacher_indices must be ({', '.join(wanted)}) with k >= 1, got {shape} and "
            f"{tuple(indices.shape)}" + (f": move the k classes to dimension {dim}" if logprobs.ndim > 2 else "")
        )
    if target_logprob is not None and target_logprob.shape != label_shape:
        raise ValueError(
            f"teacher_target_logprob must have the shape of the target, {tuple(label_shape)}, got "
            f"{tuple(target_logprob.shape)}"
        )


def largest_class(logprobs: Tensor, indices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Return the log-probability and the index of the teacher's most probable class.

    The index is -100, which the loss ignores, if all entries are padding.
    """
    indices = indices.long()
    logprob, best = logprobs.masked_fill(indices == -1, -math.inf).max(dim, keepdim=True)
    label = indices.gather(dim, best).where(logprob != -math.inf, -100)
    return logprob.squeeze(dim), label.squeeze(dim)


def check_logprob(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
