"""The terms of :mod:`kdlite.terms` without their memory: logits are read once forward, and once more for the gradient.

Each forward keeps a few numbers of a row, each backward is elementwise in the logits, so nothing as large as the logits
is stored but gradients (and USKD's Zipf weights). ``torch.compile`` turns each into a pass or two; eager
walks over chunks of rows that stay in the cache. Both apply the incoming gradient in float32, before it is rounded to
the logits' dtype. What looks inside a function (``torch.func``, forward-mode derivatives, double backward,
``torch.export``, tensor subclasses) gets the plain terms.

Within a row everything is a difference to the largest logit other than the label's: exact however large a common offset
is, and however certain the label.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter
from torch.nn import functional as F

from . import terms
from .terms import is_class
from .zipf import zipf_weights

# Elements of a chunk. CPU: 1 MiB in float32, the size of a core's L2 cache. Elsewhere a chunk only bounds the memory.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**24


def nkd_rows(student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float) -> Tensor:
    """:func:`kdlite.terms.nkd_rows`, by the fastest way that serves the caller."""
    if not can_fuse(student, teacher):
        return terms.nkd_rows(student, teacher, label, gamma, temperature)
    # None, not 1: under a compiler with dynamic shapes a number is a symbol, on which a Function cannot branch
    loss: Tensor = NKDRows.apply(student, teacher, label, gamma, None if temperature == 1 else temperature)
    return loss


def uskd_rows(
    strong: Tensor, weak: Tensor, label: Tensor, counted: Tensor, alpha: float, beta: float, mu: float, smoothing: float
) -> Tensor:
    """:func:`kdlite.terms.uskd_rows`, by the fastest way that serves the caller."""
    rows = USKDRows.apply if can_fuse(strong, weak) else terms.uskd_rows
    loss: Tensor = rows(strong, weak, label, counted, alpha, beta, mu, smoothing)
    return loss


def can_fuse(*logits: Tensor) -> bool:
    """Whether nobody looks inside."""
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not any(is_export_or_inference(x) for x in logits)
    return all(type(x) in (Tensor, Parameter) and unpack_dual(x).tangent is None for x in logits)  # type: ignore


@torch.compiler.assume_constant_result  # type: ignore  # asked while tracing, again where another kind of tensor comes
def is_export_or_inference(x: Tensor) -> bool:
    """A compiler cannot trace is_inference, and that of torch 2.11 takes itself for an export."""
    return torch.compiler.is_exporting() or x.is_inference()


def keepable(x: Tensor) -> Tensor:
    """``x``, or a copy if it was made under inference_mode: such a tensor cannot be kept for backward."""
    return x if torch.compiler.is_compiling() or not x.is_inference() else x.clone()


def wants_second_gradient() -> bool:
    """In a backward: whether it is run with create_graph."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: list[Tensor], *options: Any, into: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """``function(*rows, *options)``, eagerly a chunk of rows at a time; each result has a row for a row.

    A compiler gets all rows at once, and makes loops of its own. ``into``: where results may be written, one of the
    rows even.
    """
    count, classes = rows[0].shape
    size = max(1, CHUNK_ELEMENTS.get(rows[0].device.type, CHUNK_ELEMENTS_ELSEWHERE) // classes)
    if torch.compiler.is_compiling() or count <= size:
        return function(*rows, *options)
    for start in range(0, count, size):
        i = slice(start, start + size)
        parts = function(*(x[i] for x in rows), *options)
        into = into or tuple(part.new_empty(count, *part.shape[1:]) for part in parts)
        for whole, part in zip(into, parts):
            whole[i] = part
    return into


# ---- NKD ----------------------------------------------------------------------------------------------------------


class NKDRows(torch.autograd.Function):
    """The loss of each row, (R,), with a gradient for the student's logits alone."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float | None
    ) -> Tensor:
        loss, *kept = in_chunks(nkd_forward, [student, teacher, label], gamma, temperature)
        ctx.save_for_backward(student, keepable(teacher), label, *kept)
        ctx.options = gamma, temperature
        return loss.squeeze(1)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, label, *kept = ctx.saved_tensors
        gamma, temperature = ctx.options
        if wants_second_gradient():
            loss = terms.nkd_rows(student, teacher, label, gamma, temperature or 1.0)
            return *torch.autograd.grad(loss, student, d_loss, create_graph=True), None, None, None, None
        rows = [student, teacher, label, d_loss.unsqueeze(1), *kept]
        return *in_chunks(nkd_backward, rows, gamma, temperature), None, None, None, None


def nkd_forward(
    student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float | None, ce_weight: float = 0.0
) -> tuple[Tensor, ...]:
    """The loss, with ``ce_weight`` times the cross-entropy, and what the gradient needs of a row, each (R, 1)."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, student_t, student_top = others(student, label, dtype)
    teacher, teacher_t, teacher_top = others(teacher, label, dtype)
    _, _, s_top = softmax(student, student_top)
    n_t, scale, t_top = softmax(teacher, teacher_top)
    log_odds = student_t - student_top + s_top.log()
    t_t = (teacher_t - teacher_top + t_top.log()).sigmoid()
    t_t = t_t + ce_weight if ce_weight else t_t
    target_term = t_t * F.softplus(-log_odds)
    kept = t_t * (-log_odds).sigmoid(), student_top, teacher_top, s_top
    student = student.sub_(student_top)
    if temperature is not None:
        zero = torch.zeros_like(student_top)
        _, _, s_top = softmax(student.div_(temperature), zero)
        n_t, scale, t_top = softmax(teacher.sub_(teacher_top).div_(temperature), zero)
        gamma = gamma * temperature**2
    # - sum_i N(T)_i log N(S)_i; finite, so that a weight of 0 takes a class out: 0 * -inf would be NaN
    dot = times(n_t.mul_(student.clamp_(min=-1e30)).sum(1, keepdim=True), scale)
    return target_term - gamma * (s_top.log() + dot), *kept, s_top, t_top


def nkd_backward(
    student: Tensor, teacher: Tensor, label: Tensor, d_loss: Tensor, target_slope: Tensor, student_top: Tensor,
    teacher_top: Tensor, s_top: Tensor, temperature_s_top: Tensor, temperature_t_top: Tensor, gamma: float,
    temperature: float | None,
) -> tuple[Tensor]:  # fmt: skip
    """d loss / d student, (R, C).

    Of the two terms, where T_t (1 - S_t) is ``target_slope``::

        d target / d s_i     =  T_t (1 - S_t) N(S)_i      d target / d s_t  =  - T_t (1 - S_t)
        d non_target / d s_i =  (N(S^temperature)_i - N(T^temperature)_i) / temperature
    """
    d_target, d_non_target = d_loss * target_slope, d_loss * gamma
    if temperature is None:
        grad = softmax_again(student, label, student_top, s_top).mul_(d_target + d_non_target)
    else:
        d_non_target = d_non_target * temperature
        grad = softmax_again(student, label, student_top, s_top).mul_(d_target)
        grad = grad.addcmul_(softmax_again(student, label, student_top, temperature_s_top, temperature), d_non_target)
    n_t = softmax_again(teacher, label, teacher_top, temperature_t_top, temperature)
    return (finished(grad.addcmul_(n_t, d_non_target, value=-1), label, -d_target, student.dtype),)


# ---- USKD ---------------------------------------------------------------------------------------------------------


class USKDRows(torch.autograd.Function):
    """The loss of each row, (R,), with gradients for the strong and the weak logits."""

    @staticmethod
    def forward(
        ctx: Any, strong: Tensor, weak: Tensor, label: Tensor, counted: Tensor,
        alpha: float, beta: float, mu: float, smoothing: float,
    ) -> Tensor:  # fmt: skip
        minus_log_s, non_target, weak_term, *kept = in_chunks(uskd_forward, [strong, weak, label], smoothing)
        alpha_p = alpha * terms.target_weight(minus_log_s.squeeze(1), counted).unsqueeze(1)
        ctx.save_for_backward(keepable(strong), keepable(weak), label, counted, alpha_p, *kept)
        ctx.options = alpha, beta, mu, smoothing
        return (alpha_p * minus_log_s + beta * non_target + mu * weak_term).squeeze(1)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        strong, weak, label, counted, alpha_p, *kept = ctx.saved_tensors
        _, beta, mu, smoothing = ctx.options
        grads: tuple[Tensor | None, ...]
        if wants_second_gradient():
            loss = terms.uskd_rows(strong, weak, label, counted, *ctx.options)
            logits = [x for x, wanted in zip((strong, weak), ctx.needs_input_grad) if wanted]
            found = iter(torch.autograd.grad(loss, logits, d_loss, create_graph=True))
            grads = tuple(next(found) if wanted else None for wanted in ctx.needs_input_grad[:2])
        else:
            d_loss = d_loss.unsqueeze(1)
            rows = [strong, weak, label, d_loss * alpha_p, d_loss * beta, d_loss * mu, *kept]
            grads = in_chunks(uskd_backward, rows, smoothing)
        return *grads, None, None, None, None, None, None


def uskd_forward(strong: Tensor, weak: Tensor, label: Tensor, smoothing: float) -> tuple[Tensor, ...]:
    """- log S_t, the two other terms, what the gradient needs of a row, each (R, 1), and Z without its sum, (R, C)."""
    dtype = torch.promote_types(strong.dtype, torch.float32)
    strong, strong_t, strong_top = others(strong, label, dtype)
    weak, weak_t, weak_top = others(weak, label, dtype)
    r, scale, s_top = softmax(strong, strong_top)
    n_w, weak_scale, w_top = softmax(weak, weak_top)
    r = times(r, scale).add_(times(n_w, weak_scale))
    strong, strong_t, log_s_top = put(strong.sub_(strong_top), label, 0.0), strong_t - strong_top, s_top.log()
    weak_t, log_w_top = weak_t - weak_top, w_top.log()
    weak_mean = put(weak.sub_(weak_top), label, weak_t).mean(1, keepdim=True)
    del n_w, weak  # as large as the logits

    z = zipf_weights(put(r, label, strong_t.exp() * s_top + weak_t.exp() * w_top))
    del r
    z_sum = z.sum(1, keepdim=True) - z.gather(1, label.unsqueeze(1))
    non_target = -log_s_top - strong.mul_(z).sum(1, keepdim=True) / z_sum  # where the label's logit is 0
    # - sum_i V~_i log W_i, V~ one-hot but for `smoothing`, spread over all classes
    weak_term = torch.logaddexp(weak_t, -log_w_top) - (1 - smoothing) * weak_t - smoothing * weak_mean

    minus_log_odds = -strong_t - log_s_top
    one_minus_s, one_minus_w = minus_log_odds.sigmoid(), (-weak_t - log_w_top).sigmoid()
    kept = one_minus_s, one_minus_w, strong_top, weak_top, s_top, w_top, z_sum
    return F.softplus(minus_log_odds), non_target, weak_term, *kept, z


def uskd_backward(
    strong: Tensor, weak: Tensor, label: Tensor, d_target: Tensor, d_non_target: Tensor, d_weak_term: Tensor,
    one_minus_s: Tensor, one_minus_w: Tensor, strong_top: Tensor, weak_top: Tensor, s_top: Tensor, w_top: Tensor,
    z_sum: Tensor, z: Tensor, smoothing: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d loss / d strong and d loss / d weak, (R, C).

    Of the three terms, before their weights::

        d target / d s_i      =  (1 - S_t) N(S)_i          d target / d s_t  =  - (1 - S_t)
        d non_target / d s_i  =  N(S)_i - N(Z)_i
        d weak / d w_i        =  W_i - V~_i,  and W_i = (1 - W_t) N(W)_i
    """
    d_target = d_target * one_minus_s
    d_strong = softmax_again(strong, label, strong_top, s_top).mul_(d_target + d_non_target)
    d_strong = d_strong.addcmul_(z, d_non_target / z_sum, value=-1)
    spread = d_weak_term * (smoothing / weak.shape[1])
    d_weak = softmax_again(weak, label, weak_top, w_top).mul_(d_weak_term * one_minus_w).sub_(spread)
    d_weak_t = d_weak_term * (smoothing - one_minus_w) - spread
    return finished(d_strong, label, -d_target, strong.dtype), finished(d_weak, label, d_weak_t, weak.dtype)


# ---- rows ---------------------------------------------------------------------------------------------------------


def others(rows: Tensor, label: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A copy of the rows with -inf for the label's logit, that logit, and the largest of the others, (R, 1)."""
    rows = rows.to(dtype, copy=True)
    # gather is what refuses a label out of range: with an error on CPU, a device assert on CUDA
    target = rows.gather(1, label.unsqueeze(1))
    rows = put(rows, label, -math.inf)
    return rows, target, rows.amax(1, keepdim=True)


def put(rows: Tensor, label: Tensor, value: Tensor | float) -> Tensor:
    """Rows, changed in place, with ``value``, (R, 1), in the label's column."""
    if torch.compiler.is_compiling():  # a mask costs little there, while a scatter would store the rows
        return torch.where(is_class(rows, label), value, rows)
    return rows.scatter_(1, label.unsqueeze(1), value)


def softmax(rows: Tensor, top: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of rows whose largest is ``top``: weights, what to multiply them with, and the softmax of the largest, (R, 1)."""
    if torch.compiler.is_compiling():  # one pass to sum, and no second one to divide
        exp = (rows - top).exp()
        n_top = 1 / exp.sum(1, keepdim=True)
        return exp, n_top, n_top
    n = rows.softmax(1)  # one kernel, twice as fast as its steps
    return n, None, n.amax(1, keepdim=True)


def times(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def softmax_again(rows: Tensor, label: Tensor, top: Tensor, n_top: Tensor, temperature: float | None = None) -> Tensor:
    """N(.) of the rows again, in the backward; the label's column is left to the caller."""
    if torch.compiler.is_compiling():
        rows = rows.to(top.dtype) - top
        return (rows if temperature is None else rows / temperature).exp() * n_top
    rows = put(rows.to(top.dtype, copy=True), label, -math.inf)
    return (rows if temperature is None else rows.sub_(top).div_(temperature)).softmax(1)


def finished(grad: Tensor, label: Tensor, at_label: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient in the logits' dtype, with its value in the label's column."""
    return grad.to(dtype).scatter_(1, label.unsqueeze(1), at_label.to(dtype))
