"""Compute NKD from hidden states and classifiers, for vocabularies whose logits do not fit in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused import can_fuse, in_chunks, nkd_backward, nkd_forward
from .inputs import (
    ClassIndices,
    check_integers,
    check_options,
    check_positive,
    check_tensors,
    cut_hint,
    read_target,
    reduce,
)
from .terms import nkd_rows
from .topk import check_top_k, largest_class, nkd_rows_topk

# Logits in memory at a time, for student and teacher each: 88 MiB in float32. A smaller number makes more chunks, and
# each chunk reads the weights.
LOGITS_AT_A_TIME = 22 * 2**20


class Linear(NamedTuple):
    """Hold a classifier and its input; the logits are softcap(scale * linear(hidden, weight, bias))."""

    hidden: Tensor  # (R, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    scale: float
    softcap: float | None


class TopK(NamedTuple):
    """Hold a teacher's log-probabilities of the target and of k classes."""

    target: Tensor  # log T_t, (R,)
    top: Tensor  # log T_i, (R, k)
    indices: Tensor  # (R, k)


@dataclass(frozen=True)
class Weights:
    """Hold the weights and options of the loss."""

    gamma: float
    temperature: float | None  # None stands for 1
    ce_weight: float


def nkd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    target: Tensor | None,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    teacher_top_k: tuple[Tensor | None, Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    ce_weight: float = 0.0,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Return the NKD loss of ``linear(hidden, weight, bias)`` without all logits in memory.

    The loss equals ``nkd_loss(logits, teacher_logits, target) + ce_weight * cross_entropy(logits, target)``. It is
    computed a few rows at a time, together with the gradients. Training needs NKD and the cross-entropy: pass
    ``ce_weight=1.0`` for their sum. Under autocast the matrix products have autocast's dtype, and the loss is float32.

    If a server returns the teacher's log-probabilities, pass them as ``teacher_top_k``, and None as ``teacher_hidden``
    and ``teacher_weight``. The loss is then :func:`kdlite.nkd_topk_loss`, at temperature 1.

    Args:
        hidden: (..., D), the student's last hidden states, any floating dtype.
        weight: (C, D), the student's classifier; C >= 2.
        teacher_hidden: (..., E); no gradient flows into it or the teacher's other arguments.
        teacher_weight: (C, E), the teacher's classifier.
        target: class indices, integers of shape (...); None: the teacher's most probable class (for unlabelled data).
        bias: (C,), of the student's classifier; None: no bias.
        teacher_bias: (C,), of the teacher's classifier; None: no bias.
        teacher_top_k: log T_t (...), log T_i (..., k) and their indices (..., k), as for :func:`kdlite.nkd_topk_loss`,
            but with k in the last dimension. Under torch.compile all logits of the student are then in memory.
        logit_scale: number by which the student's logits are multiplied.
        softcap: the student's scaled logits become ``softcap * tanh(logits / softcap)``; None: no cap.
        teacher_logit_scale: as ``logit_scale``, for the teacher.
        teacher_softcap: as ``softcap``, for the teacher.
        ce_weight: weight of the cross-entropy in the sum; 0: NKD alone.
        gamma: as in :func:`kdlite.nkd_loss`.
        temperature: as in :func:`kdlite.nkd_loss`.
        ignore_index: class index of the targets to ignore: they add 0, and "mean" does not count them. Their hidden
            states must be finite, also the teacher's.
        reduction: "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 input outside autocast); gradients have the dtypes of ``hidden``,
        ``weight`` and ``bias``. A second derivative, or a second backward, raises an error. Under torch.compile each
        number of rows compiles once: pad to a few numbers.

    Raises:
        ValueError: shapes that do not fit, reduction="none", a weight or temperature out of range, a missing or a
            second teacher.
        TypeError: a tensor of the wrong dtype, a tensor as gamma, ce_weight, temperature, scale or cap.

    Source: the loss, Yang et al., ICCV 2023, arXiv 2303.13005.

    Example:
        >>> hidden, weight = torch.eye(3)[:2], torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
        >>> loss = nkd_linear_loss(hidden, weight, hidden, 2 * weight, torch.tensor([0, 1]))
        >>> print(f"{loss:.4f}")
        1.2379
    """
    check_tensors(hidden=hidden, weight=weight)
    check_options(reduction, gamma=gamma, ce_weight=ce_weight)
    caps = {"softcap": softcap, "teacher_softcap": teacher_softcap}
    check_positive(
        temperature=temperature,
        logit_scale=logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        **{name: cap for name, cap in caps.items() if cap is not None},
    )
    if reduction == "none":
        raise ValueError('reduction must be "mean" or "sum", because the gradient is computed with the loss')
    shape = hidden.shape[:-1] if target is None else target_shape(target)
    student = check_linear(Linear(hidden, weight, bias, logit_scale, softcap), shape, "")
    teacher: Linear | TopK
    if teacher_top_k is None:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("a teacher is missing: pass teacher_hidden and teacher_weight, or teacher_top_k")
        check_tensors(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
        teacher = Linear(teacher_hidden, teacher_weight, teacher_bias, teacher_logit_scale, teacher_softcap)
        teacher = check_linear(teacher, shape, "teacher_")
        if len(weight) != len(teacher_weight):
            raise ValueError(
                f"weight and teacher_weight must have the same number of classes, got {tuple(weight.shape)} and "
                f"{tuple(teacher_weight.shape)}" + cut_hint(weight.shape[:1], teacher_weight.shape[:1])
            )
    else:
        if any(x is not None for x in (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)):
            raise ValueError("teacher_top_k replaces the teacher's other arguments: pass None for them")
        if temperature != 1 or teacher_logit_scale != 1:
            raise ValueError(
                "teacher_top_k requires temperature=1 and teacher_logit_scale=1: see kdlite/README.md#questions"
            )
        teacher, target, ignore_index = read_top_k(teacher_top_k, target, shape, ignore_index)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student, teacher = cast(student, dtype), teacher if isinstance(teacher, TopK) else cast(teacher, dtype)
    rows = None if target is None else as_indices(target.reshape(-1), student, ignore_index)
    weights = Weights(gamma, None if temperature == 1 else temperature, ce_weight)
    with torch.autocast(device, enabled=False):
        if must_hold_logits(student, teacher):
            return loss_of_logits(student, teacher, rows, weights, reduction)
        total = sum_of_rows(student, teacher, rows, weights)
    if reduction == "sum":
        return total
    count = rows.valid.sum() if rows else torch.full_like(total, len(student.hidden))
    # if every target is ignored, the loss is NaN with a gradient of 0, as in cross_entropy
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


# ---- arguments ----------------------------------------------------------------------------------------------------


def target_shape(target: Tensor) -> torch.Size:
    check_tensors(target=target)
    check_integers(target, "target")
    return target.shape


def as_indices(target: Tensor, student: Linear, ignore_index: int) -> ClassIndices:
    like_logits = student.hidden.new_empty(target.numel(), 1).expand(-1, len(student.weight))
    rows = read_target(target, like_logits, ignore_index)
    assert isinstance(rows, ClassIndices)
    return rows


def read_top_k(
    given: tuple[Tensor | None, Tensor, Tensor], target: Tensor | None, shape: torch.Size, ignore_index: int
) -> tuple[TopK, Tensor, int]:
    """Return the teacher as rows, the target (if None: the teacher's most probable classes) and the index to ignore."""
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise ValueError("teacher_top_k must be three tensors: log T_t (or None), log T_i and their indices")
    target_logprob, logprobs, indices = given
    check_top_k(target_logprob, logprobs, indices, target, shape, dim=len(shape))
    if target_logprob is None or target is None:
        target_logprob, target = largest_class(logprobs, indices, -1)
        ignore_index = -100
    k = logprobs.shape[-1]
    return TopK(target_logprob.reshape(-1), logprobs.reshape(-1, k), indices.reshape(-1, k)), target, ignore_index


def cast(linear: Linear, dtype: torch.dtype) -> Linear:
    bias = None if linear.bias is None else linear.bias.to(dtype)
    return linear._replace(hidden=linear.hidden.to(dtype), weight=linear.weight.to(dtype), bias=bias)


def check_linear(linear: Linear, shape: torch.Size, prefix: str) -> Linear:
    """Return the classifier with its hidden states as rows; raise unless they fit a target of ``shape``."""
    hidden, weight, bias = linear[:3]
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{prefix}{name} must be floating point, got {tensor.dtype}")
    fits = weight.ndim == 2 and hidden.ndim >= 1 and hidden.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{prefix}hidden must be (..., D), {prefix}weight (C, D) and {prefix}bias (C,) or None; got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise TypeError(
            f"{prefix}hidden and {prefix}weight must have one dtype outside autocast, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if hidden.shape[:-1] != shape:
        raise ValueError(
            f"target must have the shape of {prefix}hidden without its last dimension, {tuple(hidden.shape[:-1])}; got "
            f"{tuple(shape)}"
        )
    if len(weight) < 2:
        raise ValueError(f"{prefix}weight must have at least 2 classes, got {tuple(weight.shape)}")
    return linear._replace(hidden=hidden.reshape(-1, hidden.shape[-1]))


# ---- all logits at once, in plain autograd ------------------------------------------------------------------------


def must_hold_logits(student: Linear, teacher: Linear | TopK) -> bool:
    """Return True if can_fuse() is False, or for a TopK under a compiler, which cannot trace topk_rows."""
    tensors = [x for x in (*student, *teacher) if isinstance(x, Tensor)]
    return not can_fuse(*tensors) or (isinstance(teacher, TopK) and torch.compiler.is_compiling())


def loss_of_logits(
    student: Linear, teacher: Linear | TopK, rows: ClassIndices | None, weights: Weights, reduction: str
) -> Tensor:
    logits = whole_logits(student)
    if isinstance(teacher, TopK):
        assert rows is not None
        loss = nkd_rows_topk(logits, rows, *teacher, weights.gamma)
    else:
        teacher_logits = whole_logits(teacher)
        rows = rows or as_indices(teacher_logits.argmax(1), student, -100)
        loss = nkd_rows(logits, teacher_logits, rows.label, weights.gamma, weights.temperature or 1.0)
    ce = F.cross_entropy(logits.to(loss.dtype), rows.label, reduction="none")
    return reduce(loss + weights.ce_weight * ce, rows, reduction, logits.shape)


def whole_logits(linear: Linear) -> Tensor:
    hidden, weight, bias, scale, softcap = linear
    logits = F.linear(hidden, weight, bias)
    logits = logits if scale == 1 else scale * logits
    return logits if softcap is None else softcap * (logits / softcap).tanh()


# ---- a few rows at a time -----------------------------------------------------------------------------------------


def sum_of_rows(student: Linear, teacher: Linear | TopK, rows: ClassIndices | None, weights: Weights) -> Tensor:
    """Return the sum of the losses, with gradients that are computed while the logits of a chunk are in memory."""
    inputs = student[:3]
    wide = torch.promote_types(student.hidden.dtype, torch.float32)
    grads = [
        torch.zeros_like(x, dtype=wide) if x is not None and x.requires_grad and torch.is_grad_enabled() else None
        for x in inputs
    ]
    with torch.no_grad():
        total = student.hidden.new_zeros((), dtype=wide)
        count, classes = len(student.hidden), len(student.weight)
        size = max(1, LOGITS_AT_A_TIME // classes)
        # allocate the logits once: an allocation per chunk costs more time than the loss
        buffer = student.hidden.new_empty(min(size, count), classes)
        teacher_buffer = teacher.hidden.new_empty(buffer.shape) if isinstance(teacher, Linear) else None
        for start in range(0, count, size):
            i = slice(start, start + size)
            logits = logits_of_rows(student, i, buffer)
            slope = cap_slope(student, logits)
            if isinstance(teacher, Linear):
                assert teacher_buffer is not None
                teacher_logits = logits_of_rows(teacher, i, teacher_buffer)
                part = None if rows is None else ClassIndices(rows.label[i], rows.valid[i])
                loss, d_logits = dense_rows(logits, teacher_logits, part, weights, any(g is not None for g in grads))
            else:
                assert rows is not None
                part = ClassIndices(rows.label[i], rows.valid[i])
                loss, d_logits = topk_rows(logits, TopK(*(x[i] for x in teacher)), part, weights)
            total = total + loss
            if d_logits is not None:
                accumulate(grads, d_logits if slope is None else d_logits.mul_(slope), student, i)
    result: Tensor = WithGradients.apply(total, *inputs, *grads)
    return result


def logits_of_rows(linear: Linear, i: slice, buffer: Tensor) -> Tensor:
    """Write the logits of the rows ``i`` into the first rows of ``buffer``, and return them."""
    hidden = linear.hidden[i]
    logits = torch.mm(hidden, linear.weight.T, out=buffer[: len(hidden)])
    logits = logits if linear.bias is None else logits.add_(linear.bias)
    logits = logits if linear.scale == 1 else logits.mul_(linear.scale)
    return logits if linear.softcap is None else logits.div_(linear.softcap).tanh_().mul_(linear.softcap)


def cap_slope(linear: Linear, logits: Tensor) -> Tensor | float | None:
    """Return d logits / d linear(...), computed from the logits; None stands for 1."""
    if linear.softcap is None:
        return None if linear.scale == 1 else linear.scale
    return linear.scale * (1 - (logits / linear.softcap).square_())


def dense_rows(
    student: Tensor, teacher: Tensor, rows: ClassIndices | None, weights: Weights, needs_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the sum of the rows' losses, and its gradient, which overwrites the student's logits."""
    wide = torch.promote_types(student.dtype, torch.float32)
    label = teacher.argmax(1) if rows is None else rows.label
    included = torch.ones_like(label, dtype=wide) if rows is None else rows.valid.to(wide)
    options = weights.gamma, weights.temperature
    loss, *stats = in_chunks(nkd_forward, [student, teacher, label], *options, weights.ce_weight)
    loss = loss.squeeze(1).where(included > 0, 0.0).sum()
    if not needs_gradient:
        return loss, None
    saved = [student, teacher, label, included.unsqueeze(1), *stats]
    return loss, in_chunks(nkd_backward, saved, *options, into=(student,))[0]


def topk_rows(student: Tensor, teacher: TopK, rows: ClassIndices, weights: Weights) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' losses, and its gradient."""
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        loss = nkd_rows_topk(logits, rows, *teacher, weights.gamma)
        ce = F.cross_entropy(logits.to(loss.dtype), rows.label, reduction="none")
        loss = (loss + weights.ce_weight * ce).where(rows.valid, 0.0).sum()
        (d_logits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), d_logits


def accumulate(grads: list[Tensor | None], d_logits: Tensor, student: Linear, i: slice) -> None:
    """Add the rows ``i`` to the gradients of hidden, weight and bias."""
    d_hidden, d_weight, d_bias = grads
    if d_hidden is not None:
        d_hidden[i] = d_logits @ student.weight
    if d_weight is not None and d_weight.dtype == d_logits.dtype:
        d_weight.addmm_(d_logits.T, student.hidden[i])
    elif d_weight is not None and d_logits.dtype == torch.float16:  # a sum over rows may be above 65504
        d_weight.addmm_(d_logits.T.to(d_weight.dtype), student.hidden[i].to(d_weight.dtype))
    elif d_weight is not None:
        d_weight.add_(d_logits.T @ student.hidden[i])
    if d_bias is not None:
        d_bias.add_(d_logits.sum(0, dtype=d_bias.dtype))


class WithGradients(torch.autograd.Function):
    """Return the total, with the gradients for hidden, weight and bias that are computed already."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *inputs_and_grads: Tensor | None) -> Tensor:
        ctx.save_for_backward(*inputs_and_grads[3:])
        ctx.dtypes = [None if x is None else x.dtype for x in inputs_and_grads[:3]]
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # in place is safe: a second backward raises an error before it reads the changed gradients
        scale = torch.mul if torch.compiler.is_compiling() else Tensor.mul_
        grads = (None if x is None else scale(x, d_total).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return None, *grads, None, None, None
