"""NKD from hidden states: classifiers and loss together, for so many classes that the logits would not fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .fused import can_fuse, in_chunks, nkd_backward, nkd_forward
from .inputs import ClassIndices, check_integers, check_options, check_tensors, read_target, reduce
from .terms import nkd_rows
from .topk import check_top_k, largest, nkd_rows_topk

# Logits held at a time, of student and teacher each: 88 MiB in float32. Fewer, and going over the weights costs more.
LOGITS_AT_A_TIME = 22 * 2**20

Linear = tuple[Tensor, Tensor, Tensor | None]  # hidden as rows, weight, bias
TopK = tuple[Tensor, Tensor, Tensor]  # log T_t (R,), log T_i (R, k), indices (R, k)
Cap = tuple[float, float | None]  # logit scale and softcap


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
    """Normalized KD loss of ``linear(hidden, weight, bias)``, whose logits are never held whole.

    Equal to ``nkd_loss(logits, teacher_logits, target) + ce_weight * cross_entropy(logits, target)``, computed a few
    rows at a time, with the gradients. NKD is added to the cross-entropy, which would need the logits again: give
    ``ce_weight=1.0`` to have both. Under autocast the products are in its dtype, the loss is float32.

    A served teacher hands out no hidden states: give None for them and for its weight, and ``teacher_top_k``. The loss
    is then :func:`kdlite.nkd_topk_loss`, at temperature 1.

    Args:
        hidden: (..., D), the student's last hidden states, any floating dtype.
        weight: (C, D), the student's classifier; C >= 2.
        teacher_hidden: (..., E); no gradient flows into it, nor into the other arguments of the teacher.
        teacher_weight: (C, E).
        target: class indices, integers of shape (...); None takes the teacher's largest class.
        bias: (C,), the student's.
        teacher_bias: (C,).
        teacher_top_k: log T_t (...), log T_i (..., k) and their indices (..., k), as :func:`kdlite.nkd_topk_loss`
            takes them, but with k last; under torch.compile the student's logits are then held whole.
        logit_scale: the logits are ``logit_scale * linear(...)``,
        softcap: and then ``softcap * tanh(logits / softcap)``; None: no cap.
        teacher_logit_scale: the teacher's.
        teacher_softcap: the teacher's.
        ce_weight: how much cross-entropy is added.
        gamma: as in :func:`kdlite.nkd_loss`.
        temperature: as in :func:`kdlite.nkd_loss`.
        ignore_index: targets of this class index add nothing and are not counted by "mean".
        reduction: "mean" (over the targets that are not ignored) or "sum".

    Returns:
        The loss, float32 (float64 for float64 input); gradients have the dtypes of ``hidden``, ``weight`` and ``bias``.
        They can be taken once: a second derivative is an error.

    Raises:
        ValueError: shapes that do not fit, reduction="none", a weight or temperature out of range, a teacher given
            twice or not at all.
        TypeError: what should be floating point or an integer is not.

    Source: the loss, Yang et al., ICCV 2023, arXiv 2303.13005.

    Example:
        >>> hidden, weight = torch.eye(3)[:2], torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 2.0]])
        >>> loss = nkd_linear_loss(hidden, weight, hidden, 2 * weight, torch.tensor([0, 1]))
        >>> print(f"{loss:.4f}")
        1.2379
    """
    check_tensors(hidden=hidden, weight=weight)
    check_options(reduction, gamma=gamma, ce_weight=ce_weight)
    caps = {"logit_scale": logit_scale, "softcap": softcap, "teacher_logit_scale": teacher_logit_scale,
            "teacher_softcap": teacher_softcap}  # fmt: skip
    for name, value in (caps | {"temperature": temperature}).items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if reduction == "none":
        raise ValueError(
            'reduction must be "mean" or "sum": the gradient is computed with the loss, for all rows at once'
        )
    shape = hidden.shape[:-1] if target is None else target_shape(target)
    student = check_linear(hidden, weight, bias, shape, "")
    teacher: Linear | TopK
    if teacher_top_k is None:
        if teacher_hidden is None or teacher_weight is None:
            raise ValueError("a teacher is missing: give teacher_hidden and teacher_weight, or teacher_top_k")
        check_tensors(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
        teacher = check_linear(teacher_hidden, teacher_weight, teacher_bias, shape, "teacher_")
        check_as_many(weight, teacher_weight)
    else:
        if any(x is not None for x in (teacher_hidden, teacher_weight, teacher_bias, teacher_softcap)):
            raise ValueError("teacher_top_k takes the place of the teacher's other arguments: give None for them")
        if not isinstance(teacher_top_k, (tuple, list)) or len(teacher_top_k) != 3:
            raise ValueError("teacher_top_k must be three tensors: log T_t (or None), log T_i and their indices")
        if temperature != 1 or teacher_logit_scale != 1:
            raise ValueError("teacher_top_k is of temperature 1: what the rest would weigh at another, nobody knows")
        teacher, target, ignore_index = read_top_k(*teacher_top_k, target, shape, ignore_index)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        student, teacher = cast(student, dtype), teacher if teacher_top_k else cast(teacher, dtype)
    rows = None if target is None else as_indices(target.reshape(-1), student, ignore_index)
    cap, teacher_cap = (logit_scale, softcap), (teacher_logit_scale, teacher_softcap)
    plain = not can_fuse(*(x for x in (*student, *teacher) if x is not None))
    with torch.autocast(device, enabled=False):
        if plain or (teacher_top_k and torch.compiler.is_compiling()):
            logits = capped(F.linear(*student), *cap)
            if teacher_top_k:
                assert rows is not None  # target is
                loss = nkd_rows_topk(logits, rows, *teacher, gamma)  # type: ignore[arg-type]
            else:
                teacher_logits = capped(F.linear(*teacher), *teacher_cap)
                rows = rows or as_indices(teacher_logits.argmax(1), student, -100)
                loss = nkd_rows(logits, teacher_logits, rows.label, gamma, temperature)
            loss = loss + ce_weight * F.cross_entropy(logits.to(loss.dtype), rows.label, reduction="none")
            return reduce(loss, rows, reduction, logits.shape)
        total: Tensor = NKDLinear.apply(
            *student, *teacher, *(rows or (None, None)), cap, teacher_cap, bool(teacher_top_k), ce_weight, gamma,
            None if temperature == 1 else temperature, torch.is_grad_enabled(),
        )  # fmt: skip
    if reduction == "sum":
        return total
    count = rows.valid.sum() if rows else torch.full_like(total, len(student[0]))
    # as cross_entropy, NaN with a gradient of 0 where every target is ignored
    return torch.where(count > 0, total / count.clamp(min=1), math.nan)


def target_shape(target: Tensor) -> torch.Size:
    check_tensors(target=target)
    check_integers(target, "target")
    return target.shape


def as_indices(target: Tensor, student: Linear, ignore_index: int) -> ClassIndices:
    like_logits = student[0].new_empty(target.numel(), 1).expand(-1, len(student[1]))
    rows = read_target(target, like_logits, ignore_index)
    assert isinstance(rows, ClassIndices)
    return rows


def read_top_k(
    target_logprob: Tensor | None, logprobs: Tensor, indices: Tensor, target: Tensor | None, shape: torch.Size,
    ignore_index: int,
) -> tuple[TopK, Tensor, int]:  # fmt: skip
    """The teacher as rows; the target, or its largest classes, of which none is ignored."""
    check_top_k(target_logprob, logprobs, indices, target, shape, dim=len(shape))
    if target_logprob is None or target is None:
        target_logprob, target = largest(logprobs, indices, -1)
        ignore_index = -100
    k = logprobs.shape[-1]
    return (target_logprob.reshape(-1), logprobs.reshape(-1, k), indices.reshape(-1, k)), target, ignore_index


def cast(classifier: Linear, dtype: torch.dtype) -> Linear:
    hidden, weight, bias = classifier
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: torch.Size, prefix: str) -> Linear:
    """The arguments of a classifier as rows; raise unless they fit each other and a target of that shape."""
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{prefix}{name} must be floating point, got {tensor.dtype}")
    fits = weight.ndim == 2 and hidden.ndim >= 1 and hidden.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            f"{prefix}hidden must be (..., D), {prefix}weight (C, D) and {prefix}bias (C,) or None; got "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}"
        )
    if hidden.shape[:-1] != shape:
        raise ValueError(
            f"target must have the shape of {prefix}hidden without its last dimension, {tuple(hidden.shape[:-1])}; got "
            f"{tuple(shape)}"
        )
    if len(weight) < 2:
        raise ValueError(f"{prefix}weight must have at least 2 classes, got {tuple(weight.shape)}")
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias


def check_as_many(weight: Tensor, teacher_weight: Tensor) -> None:
    classes, teacher_classes = len(weight), len(teacher_weight)
    if classes != teacher_classes:
        longer = "weight" if classes > teacher_classes else "teacher_weight"
        raise ValueError(
            f"weight and teacher_weight must have one number of classes; got {tuple(weight.shape)} and "
            f"{tuple(teacher_weight.shape)}: if the classes beyond are padding, pass "
            f"{longer}[:{min(classes, teacher_classes)}]"
        )


class NKDLinear(torch.autograd.Function):
    """The sum over rows; its gradients, of that sum, are made in the forward, while the logits of a row exist."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_1: Tensor, teacher_2: Tensor,
        teacher_3: Tensor | None, label: Tensor | None, valid: Tensor | None, cap: Cap, teacher_cap: Cap, sparse: bool,
        ce_weight: float, gamma: float, temperature: float | None, grad_enabled: bool,
    ) -> Tensor:  # fmt: skip
        """The teacher's three are those of a Linear, or of a TopK where ``sparse``."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden, d_weight, d_bias = (
            torch.empty_like(x, dtype=wide) if want and x is not None else None
            for x, want in zip((hidden, weight, bias), wanted)
        )
        total = hidden.new_zeros((), dtype=wide)
        size = max(1, LOGITS_AT_A_TIME // len(weight))
        # preallocate the logits: allocating per chunk costs more than the loss
        buffer = hidden.new_empty(min(size, len(hidden)), len(weight))
        teacher_buffer = None if sparse else teacher_1.new_empty(buffer.shape)
        for start in range(0, max(len(hidden), 1), size):
            i = slice(start, start + size)
            student = linear_out(buffer, hidden[i], weight, bias, cap)
            slope = cap_slope(student, *cap)
            if teacher_buffer is None:
                assert label is not None
                assert valid is not None
                assert teacher_3 is not None
                rows, top_k = ClassIndices(label[i], valid[i]), (teacher_1[i], teacher_2[i], teacher_3[i])
                loss, d_logits = topk_with_gradient(student, rows, top_k, gamma, ce_weight)
            else:
                teacher = linear_out(teacher_buffer, teacher_1[i], teacher_2, teacher_3, teacher_cap)
                labels = teacher.argmax(1) if label is None else label[i]
                included = torch.ones_like(labels, dtype=wide) if valid is None else valid[i].to(wide)
                loss, *stats = in_chunks(nkd_forward, [student, teacher, labels], gamma, temperature, ce_weight)
                loss = loss.squeeze(1).where(included > 0, 0.0).sum()
                if any(wanted):  # the gradient takes the place of the student's logits
                    saved = [student, teacher, labels, included.unsqueeze(1), *stats]
                    (d_logits,) = in_chunks(nkd_backward, saved, gamma, temperature, into=(student,))
            total = total + loss
            if not any(wanted):
                continue
            d_logits = d_logits if slope is None else d_logits.mul_(slope)
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
        return *grads, *[None] * 12


def linear_out(buffer: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, cap: Cap) -> Tensor:
    """Logits in the first rows of ``buffer``."""
    logits = torch.mm(hidden, weight.T, out=buffer[: len(hidden)])
    logits = logits if bias is None else logits.add_(bias)
    scale, softcap = cap
    logits = logits if scale == 1 else logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = logits if scale == 1 else scale * logits
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def cap_slope(logits: Tensor, scale: float, softcap: float | None) -> Tensor | float | None:
    """d logits / d linear(...), from the logits; None: 1."""
    if softcap is None:
        return None if scale == 1 else scale
    return scale * (1 - (logits / softcap).square_())


def topk_with_gradient(
    student: Tensor, rows: ClassIndices, top_k: TopK, gamma: float, ce_weight: float
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, and its gradient for their logits."""
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        loss = nkd_rows_topk(logits, rows, *top_k, gamma)
        loss = loss + ce_weight * F.cross_entropy(logits.to(loss.dtype), rows.label, reduction="none")
        loss = loss.where(rows.valid, 0.0).sum()
        (d_logits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), d_logits
