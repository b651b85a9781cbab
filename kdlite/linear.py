"""NKD from hidden states: classifiers and loss together, for so many classes that the logits would not fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused import can_fuse, in_chunks, nkd_backward, nkd_forward
from .targets import ClassIndices, check_options, check_tensors, read_target, reduce
from .terms import nkd_rows

# Logits held at a time, of student and teacher each: 88 MiB in float32. Fewer, and going over the weights costs more.
LOGITS_AT_A_TIME = 22 * 2**20

Linear = tuple[Tensor, Tensor, Tensor | None]  # hidden as rows, weight, bias


def nkd_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ce_weight: float = 0.0,
    gamma: float = 1.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Normalized KD loss of ``linear(hidden, weight, bias)``, whose logits are never held whole.

    Equal to ``nkd_loss(logits, teacher_logits, target) + ce_weight * cross_entropy(logits, target)``, computed a few
    rows at a time, with the gradients. NKD is added to the cross-entropy, which would need the logits again: give
    ``ce_weight=1.0`` to have both. Under autocast the products are in its dtype, the loss is float32.

    Args:
        hidden: (..., D), the student's last hidden states, any floating dtype.
        weight: (C, D), the student's classifier; C >= 2.
        teacher_hidden: (..., E); no gradient flows into it, nor into the other arguments of the teacher.
        teacher_weight: (C, E).
        target: class indices, integers of shape (...).
        bias: (C,), the student's.
        teacher_bias: (C,).
        ce_weight: how much cross-entropy is added.
        gamma: as in :func:`kdlite.nkd_loss`.
        temperature: as in :func:`kdlite.nkd_loss`.
        ignore_index: targets of this class index add nothing and are not counted by "mean".
        reduction: "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 input); gradients have the dtypes of ``hidden``, ``weight`` and ``bias``.
        They can be taken once: a second derivative is an error.

    Raises:
        ValueError: shapes that do not fit, reduction="none", a weight or temperature out of range.
        TypeError: what should be floating point or an integer is not.

    Source: the loss, Yang et al., ICCV 2023, arXiv 2303.13005.

    Example:
        >>> hidden, weight = torch.eye(3)[:2], torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
        >>> loss = nkd_linear_loss(hidden, weight, hidden, 2 * weight, torch.tensor([0, 1]))
        >>> print(f"{loss:.4f}")
        1.2379
    """
    check_tensors(hidden=hidden, weight=weight, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    check_options(reduction, gamma=gamma, ce_weight=ce_weight)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0 and finite, got {temperature}")
    if reduction == "none":
        raise ValueError(
            'reduction must be "mean" or "sum": the gradient is computed with the loss, for all rows at once'
        )
    student = check_linear(hidden, weight, bias, target, "")
    teacher = check_linear(teacher_hidden, teacher_weight, teacher_bias, target, "teacher_")
    classes, teacher_classes = len(weight), len(teacher_weight)
    if classes != teacher_classes or classes < 2:
        fault = (
            f"weight and teacher_weight must have one number of classes, at least 2; got {tuple(weight.shape)} and "
            f"{tuple(teacher_weight.shape)}"
        )
        if classes != teacher_classes:
            longer = "weight" if classes > teacher_classes else "teacher_weight"
            fault += f": if the classes beyond are padding, pass {longer}[:{min(classes, teacher_classes)}]"
        raise ValueError(fault)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student, teacher = cast(student, dtype), cast(teacher, dtype)
    target = target.reshape(-1)
    like_logits = student[0].new_empty(target.numel(), 1).expand(-1, len(weight))
    rows = read_target(target, like_logits, ignore_index)
    assert isinstance(rows, ClassIndices)
    with torch.autocast(device, enabled=False):
        if not can_fuse(*(x for x in (*student, *teacher) if x is not None)):
            logits, teacher_logits = F.linear(*student), F.linear(*teacher)
            loss = nkd_rows(logits, teacher_logits, rows.label, gamma, temperature)
            wide = logits.to(loss.dtype)
            loss = loss + ce_weight * F.cross_entropy(wide, rows.label, reduction="none")
            return reduce(loss, rows, reduction, logits.shape)
        total: Tensor = NKDLinear.apply(
            *student, *teacher, *rows, ce_weight, gamma, None if temperature == 1 else temperature,
            torch.is_grad_enabled(),
        )  # fmt: skip
    if reduction == "sum":
        return total
    # as cross_entropy, NaN with a gradient of 0 where every target is ignored
    count = rows.valid.sum()
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


def cast(classifier: Linear, dtype: torch.dtype) -> Linear:
    hidden, weight, bias = classifier
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, prefix: str) -> Linear:
    """The arguments of a classifier as rows; raise unless they fit each other and the target."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{prefix}{name} must be floating point, got {tensor.dtype}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must be class indices, integers, got {target.dtype}")
    fits = weight.ndim == 2 and hidden.ndim >= 1 and hidden.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shape = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"{prefix}hidden must be (..., D), {prefix}weight (C, D) and {prefix}bias (C,) or None; got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {shape}"
        )
    if hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"target must have the shape of {prefix}hidden without its last dimension, {tuple(hidden.shape[:-1])}; got "
            f"{tuple(target.shape)}"
        )
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


class NKDLinear(torch.autograd.Function):
    """The sum over rows; its gradients, of that sum, are made in the forward, while the logits of a row exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
        teacher_bias: Tensor | None, label: Tensor, valid: Tensor, ce_weight: float, gamma: float,
        temperature: float | None, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden, d_weight, d_bias = (
            torch.empty_like(x, dtype=wide) if want and x is not None else None
            for x, want in zip((hidden, weight, bias), wanted)
        )
        total = hidden.new_zeros((), dtype=wide)
        size = max(1, LOGITS_AT_A_TIME // len(weight))
        # preallocate the logits: allocating per chunk costs more than the loss
        student_buffer, teacher_buffer = (x.new_empty(min(size, len(x)), len(weight)) for x in (hidden, teacher_hidden))
        for start in range(0, max(len(hidden), 1), size):
            i = slice(start, start + size)
            student = linear_out(student_buffer, hidden[i], weight, bias)
            teacher = linear_out(teacher_buffer, teacher_hidden[i], teacher_weight, teacher_bias)
            included = valid[i].unsqueeze(1)
            loss, *stats = in_chunks(nkd_forward, [student, teacher, label[i]], gamma, temperature, ce_weight)
            total = total + loss.where(included, 0.0).sum()
            if not any(wanted):
                continue
            rows = [student, teacher, label[i], included.to(wide), *stats]
            # the gradient takes the place of the student's logits
            (d_logits,) = in_chunks(nkd_backward, rows, gamma, temperature, into=(student,))
            if d_hidden is not None:
                d_hidden[i] = d_logits @ weight
            if d_weight is not None and d_weight.dtype == d_logits.dtype:
                d_weight.addmm_(d_logits.T, hidden[i], beta=0 if start == 0 else 1)
            elif d_weight is not None:
                part = d_logits.T @ hidden[i]
                d_weight.copy_(part) if start == 0 else d_weight.add_(part)
            if d_bias is not None:
                part = d_logits.sum(0, dtype=wide)
                d_bias.copy_(part) if start == 0 else d_bias.add_(part)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        # in place: autograd itself refuses a second backward, which would find them changed
        scale = torch.mul if torch.compiler.is_compiling() else Tensor.mul_
        grads = (None if x is None else scale(x, d_total).to(dtype) for x, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, *[None] * 9


def linear_out(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear in the first rows of ``buffer``."""
    logits = torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
    return logits if bias is None else logits.add_(bias)
