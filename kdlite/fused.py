"""Compute the hard-label terms of :mod:`kdlite.terms` with less memory.

A forward saves its inputs and a few numbers per row. The backward computes the probabilities again from them. So the
only stored tensors as large as the logits are the inputs, the gradients and USKD's Zipf weights. ``torch.compile``
turns each forward and each backward into one or two passes over the logits; eager code works on chunks of rows that fit
in the cache. The backward multiplies by the incoming gradient in float32 before it rounds to the logits' dtype. ``make
bench`` compares the speed and the memory of this module with those of :mod:`kdlite.terms`.

Each row is shifted by its largest logit other than the label's. So the result loses no digits if all logits share an
offset, or if a probability is near 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn import Parameter
from torch.nn import functional as F

from . import terms
from .terms import USKDWeights, is_class, zipf_weights

# Logits in a chunk. CPU: 1 MiB in float32, the size of a core's L2 cache. Other devices: a limit on the memory.
CHUNK_ELEMENTS = {"cpu": 2**18}
CHUNK_ELEMENTS_ELSEWHERE = 2**24


def can_fuse(*logits: Tensor) -> bool:
    """Return False under torch.func, forward-mode AD and export, and for tensor subclasses: these need kdlite.terms."""
    if torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not any(is_export_or_inference(x) for x in logits)
    return all(type(x) in (Tensor, Parameter) and unpack_dual(x).tangent is None for x in logits)  # type: ignore


def is_export_or_inference(x: Tensor) -> bool:
    """Return True under export and for inference tensors.

    A compiler cannot trace ``is_inference``. So it calls this function while it compiles, and stores the result as a
    constant.
    """
    return torch.compiler.is_exporting() or x.is_inference()


# torch.compiler.assume_constant_result does the same, but loads the compiler at each import of kdlite (1.4 s of CPU).
is_export_or_inference._dynamo_marked_constant = True  # type: ignore[attr-defined]


def saveable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if it is an inference tensor, which cannot be saved for backward."""
    return x if torch.compiler.is_compiling() or not x.is_inference() else x.clone()


def needs_terms(d_loss: Tensor) -> bool:
    """Return whether a backward runs with create_graph, or with is_grads_batched: both differentiate kdlite.terms."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(d_loss)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]], rows: list[Tensor], *options: Any, into: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """Return ``function(*rows, *options)``, computed in chunks of rows; each result has one row per input row.

    A compiler gets all rows at once, because it makes its own loops. ``into``: tensors that receive the results; an
    input tensor of ``rows`` may be among them.
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


def nkd_rows(student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float) -> Tensor:
    """Return :func:`kdlite.terms.nkd_rows`; requires :func:`can_fuse`."""
    # None instead of 1: with dynamic shapes the compiler replaces 1 by a symbol, which a Function cannot compare
    loss: Tensor = NKDRows.apply(student, teacher, label, gamma, None if temperature == 1 else temperature)
    return loss


class NKDSaved(NamedTuple):
    """Hold the numbers that the gradient needs for each row; all are (R, 1)."""

    target_slope: Tensor  # T_t (1 - S_t)
    student_max: Tensor  # largest logit other than the label's
    teacher_max: Tensor
    s_max: Tensor  # N(S) of the class of student_max, at temperature 1
    s_max_at_temperature: Tensor
    t_max_at_temperature: Tensor


class NKDRows(torch.autograd.Function):
    """Compute the loss of each row, (R,), with a gradient for the student's logits only."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float | None
    ) -> Tensor:
        loss, *saved = in_chunks(nkd_forward, [student, teacher, label], gamma, temperature)
        ctx.save_for_backward(student, saveable(teacher), label, *saved)
        ctx.options = gamma, temperature
        return loss.squeeze(1)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        student, teacher, label, *saved = ctx.saved_tensors
        gamma, temperature = ctx.options
        if needs_terms(d_loss):
            with torch.enable_grad():
                loss = terms.nkd_rows(student, teacher, label, gamma, temperature or 1.0)
            grads = torch.autograd.grad(loss, student, d_loss, create_graph=torch.is_grad_enabled())
            return *grads, None, None, None, None
        rows = [student, teacher, label, d_loss.unsqueeze(1), *saved]
        return *in_chunks(nkd_backward, rows, gamma, temperature), None, None, None, None


def nkd_forward(
    student: Tensor, teacher: Tensor, label: Tensor, gamma: float, temperature: float | None, ce_weight: float = 0.0
) -> tuple[Tensor, ...]:
    """Return the loss plus ``ce_weight`` times the cross-entropy, (R, 1), then the fields of NKDSaved."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, student_t, student_max = mask_label(student, label, dtype)
    teacher, teacher_t, teacher_max = mask_label(teacher, label, dtype)
    n_s, n_t = normalize(student, student_max), normalize(teacher, teacher_max)
    s_max = n_s.of_max
    log_odds = student_t - student_max + s_max.log()
    t_t = (teacher_t - teacher_max + n_t.of_max.log()).sigmoid()
    t_t = t_t + ce_weight if ce_weight else t_t
    target_term = t_t * F.softplus(-log_odds)
    target_slope = t_t * (-log_odds).sigmoid()
    student = student.sub_(student_max)
    if temperature is not None:
        zero = torch.zeros_like(student_max)
        n_s = normalize(student.div_(temperature), zero)
        n_t = normalize(teacher.sub_(teacher_max).div_(temperature), zero)
        gamma = gamma * temperature**2
    # - sum_i N(T)_i log N(S)_i; without the clamp the label's column would give 0 * -inf = NaN
    dot = n_t.scale * n_t.weights.mul_(student.clamp_(min=-1e30)).sum(1, keepdim=True)
    loss = target_term - gamma * (n_s.of_max.log() + dot)
    return loss, *NKDSaved(target_slope, student_max, teacher_max, s_max, n_s.of_max, n_t.of_max)


def nkd_backward(
    student: Tensor, teacher: Tensor, label: Tensor, d_loss: Tensor, *saved_and_options: Any
) -> tuple[Tensor]:
    """Return d loss / d student, (R, C); the options are gamma and the temperature.

    ``target_slope`` holds T_t (1 - S_t), with ce_weight added to T_t. The gradients of the two terms are::

        d target / d s_i     =  T_t (1 - S_t) N(S)_i      d target / d s_t  =  - T_t (1 - S_t)
        d non_target / d s_i =  (N(S^temperature)_i - N(T^temperature)_i) / temperature
    """
    saved = NKDSaved(*saved_and_options[:-2])
    gamma, temperature = saved_and_options[-2:]
    d_target, d_non_target = d_loss * saved.target_slope, d_loss * gamma
    if temperature is None:
        grad = recompute_n(student, label, saved.student_max, saved.s_max).mul_(d_target + d_non_target)
    else:
        d_non_target = d_non_target * temperature
        grad = recompute_n(student, label, saved.student_max, saved.s_max).mul_(d_target)
        n_s = recompute_n(student, label, saved.student_max, saved.s_max_at_temperature, temperature)
        grad = grad.addcmul_(n_s, d_non_target)
    n_t = recompute_n(teacher, label, saved.teacher_max, saved.t_max_at_temperature, temperature)
    grad = grad.addcmul_(n_t, d_non_target, value=-1)
    return (cast_with_label_column(grad, label, -d_target, student.dtype),)


# ---- USKD ---------------------------------------------------------------------------------------------------------


def uskd_rows(strong: Tensor, weak: Tensor, label: Tensor, valid: Tensor, weights: USKDWeights) -> Tensor:
    """Return :func:`kdlite.terms.uskd_rows`; requires :func:`can_fuse`."""
    loss: Tensor = USKDRows.apply(strong, weak, label, valid, weights)
    return loss


class USKDSaved(NamedTuple):
    """Hold the numbers that the gradient needs for each row; all are (R, 1) except z."""

    one_minus_s: Tensor  # 1 - S_t
    one_minus_w: Tensor  # 1 - W_t
    strong_max: Tensor  # largest logit other than the label's
    weak_max: Tensor
    s_max: Tensor  # N(S) of that logit
    w_max: Tensor
    z_sum: Tensor  # sum of Z over the classes other than t
    z: Tensor  # (R, C)


class USKDRows(torch.autograd.Function):
    """Compute the loss of each row, (R,), with gradients for the strong and the weak logits."""

    @staticmethod
    def forward(ctx: Any, strong: Tensor, weak: Tensor, label: Tensor, valid: Tensor, weights: USKDWeights) -> Tensor:
        alpha, beta, mu, smoothing, group = weights
        minus_log_s, non_target, weak_term, *saved = in_chunks(uskd_forward, [strong, weak, label], smoothing)
        alpha_p = alpha * terms.target_weight(minus_log_s.squeeze(1), valid, group).unsqueeze(1)
        ctx.save_for_backward(saveable(strong), saveable(weak), label, valid, alpha_p, *saved)
        ctx.weights = weights
        return (alpha_p * minus_log_s + beta * non_target + mu * weak_term).squeeze(1)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        strong, weak, label, valid, alpha_p, *saved = ctx.saved_tensors
        _, beta, mu, smoothing, _ = ctx.weights
        grads: tuple[Tensor | None, ...]
        if needs_terms(d_loss):
            logits = [x for x, wanted in zip((strong, weak), ctx.needs_input_grad) if wanted]
            with torch.enable_grad():
                loss = terms.uskd_rows(strong, weak, label, valid, ctx.weights)
            found = iter(torch.autograd.grad(loss, logits, d_loss, create_graph=torch.is_grad_enabled()))
            grads = tuple(next(found) if wanted else None for wanted in ctx.needs_input_grad[:2])
        else:
            d_loss = d_loss.unsqueeze(1)
            rows = [strong, weak, label, d_loss * alpha_p, d_loss * beta, d_loss * mu, *saved]
            grads = in_chunks(uskd_backward, rows, smoothing)
        return *grads, None, None, None


def uskd_forward(strong: Tensor, weak: Tensor, label: Tensor, smoothing: float) -> tuple[Tensor, ...]:
    """Return - log S_t, the non-target and the weak term, each (R, 1), then the fields of USKDSaved."""
    dtype = torch.promote_types(strong.dtype, torch.float32)
    strong, strong_t, strong_max = mask_label(strong, label, dtype)
    weak, weak_t, weak_max = mask_label(weak, label, dtype)
    n_s, n_w = normalize(strong, strong_max), normalize(weak, weak_max)
    s_max, w_max = n_s.of_max, n_w.of_max
    r = (n_s.weights * n_s.scale).add_(n_w.weights * n_w.scale)
    strong = set_label_column(strong.sub_(strong_max), label, 0.0)
    strong_t, log_s_max = strong_t - strong_max, s_max.log()
    weak_t, log_w_max = weak_t - weak_max, w_max.log()
    weak_mean = set_label_column(weak.sub_(weak_max), label, weak_t).mean(1, keepdim=True)
    del n_s, n_w, weak  # free them: each is as large as the logits

    z = zipf_weights(set_label_column(r, label, strong_t.exp() * s_max + weak_t.exp() * w_max))
    del r
    z_sum = z.sum(1, keepdim=True) - z.gather(1, label.unsqueeze(1))
    non_target = -log_s_max - strong.mul_(z).sum(1, keepdim=True) / z_sum  # the label's logit is 0 here
    # - sum_i V~_i log W_i, V~ one-hot, with `smoothing` spread over all classes
    weak_term = torch.logaddexp(weak_t, -log_w_max) - (1 - smoothing) * weak_t - smoothing * weak_mean

    minus_log_odds = -strong_t - log_s_max
    one_minus_s, one_minus_w = minus_log_odds.sigmoid(), (-weak_t - log_w_max).sigmoid()
    saved = USKDSaved(one_minus_s, one_minus_w, strong_max, weak_max, s_max, w_max, z_sum, z)
    return F.softplus(minus_log_odds), non_target, weak_term, *saved


def uskd_backward(
    strong: Tensor,
    weak: Tensor,
    label: Tensor,
    d_target: Tensor,
    d_non_target: Tensor,
    d_weak_term: Tensor,
    *saved_and_options: Any,
) -> tuple[Tensor, Tensor]:
    """Return d loss / d strong and d loss / d weak, (R, C); the option is the smoothing.

    The gradients of the three terms, before their weights, are::

        d target / d s_i      =  (1 - S_t) N(S)_i          d target / d s_t  =  - (1 - S_t)
        d non_target / d s_i  =  N(S)_i - N(Z)_i
        d weak / d w_i        =  W_i - V~_i,  and W_i = (1 - W_t) N(W)_i
    """
    saved, smoothing = USKDSaved(*saved_and_options[:-1]), saved_and_options[-1]
    d_target = d_target * saved.one_minus_s
    d_strong = recompute_n(strong, label, saved.strong_max, saved.s_max).mul_(d_target + d_non_target)
    d_strong = d_strong.addcmul_(saved.z, d_non_target / saved.z_sum, value=-1)
    spread = d_weak_term * (smoothing / weak.shape[1])
    d_weak = recompute_n(weak, label, saved.weak_max, saved.w_max).mul_(d_weak_term * saved.one_minus_w).sub_(spread)
    d_weak_t = d_weak_term * (smoothing - saved.one_minus_w) - spread
    return (
        cast_with_label_column(d_strong, label, -d_target, strong.dtype),
        cast_with_label_column(d_weak, label, d_weak_t, weak.dtype),
    )


# ---- rows ---------------------------------------------------------------------------------------------------------


def mask_label(rows: Tensor, label: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return a copy of the rows with -inf at the label, the label's logit (R, 1) and the largest other logit (R, 1)."""
    rows = rows.to(dtype, copy=True)
    # a label out of range fails in gather: with an error on CPU, with a device assert on CUDA
    target = rows.gather(1, label.unsqueeze(1))
    rows = set_label_column(rows, label, -math.inf)
    return rows, target, rows.amax(1, keepdim=True)


def set_label_column(rows: Tensor, label: Tensor, value: Tensor | float) -> Tensor:
    """Return the rows with ``value``, (R, 1), in the label's column; modifies ``rows`` in place."""
    # under a compiler a mask costs little, but a scatter stores the rows in memory
    if torch.compiler.is_compiling():
        return torch.where(is_class(rows, label), value, rows)
    return rows.scatter_(1, label.unsqueeze(1), value)


class Normalized(NamedTuple):
    """Hold N(.) of masked rows as ``weights * scale``. Under a compiler this avoids a pass for the division."""

    weights: Tensor  # (R, C)
    scale: Tensor | float  # (R, 1)
    of_max: Tensor  # (R, 1), N(.) of the largest logit


def normalize(rows: Tensor, row_max: Tensor) -> Normalized:
    """Return N(.) of rows with a masked label and the largest logit ``row_max``."""
    if torch.compiler.is_compiling():
        exp = (rows - row_max).exp()
        of_max = 1 / exp.sum(1, keepdim=True)
        return Normalized(exp, of_max, of_max)
    n = rows.softmax(1)  # one kernel, twice as fast as its steps
    return Normalized(n, 1.0, n.amax(1, keepdim=True))


def recompute_n(
    rows: Tensor, label: Tensor, row_max: Tensor, of_max: Tensor, temperature: float | None = None
) -> Tensor:
    """Compute N(.) of the rows again, for the backward; the caller sets the label's column."""
    if torch.compiler.is_compiling():
        rows = rows.to(row_max.dtype) - row_max
        return (rows if temperature is None else rows / temperature).exp() * of_max
    rows = set_label_column(rows.to(row_max.dtype, copy=True), label, -math.inf)
    return (rows if temperature is None else rows.sub_(row_max).div_(temperature)).softmax(1)


def cast_with_label_column(grad: Tensor, label: Tensor, at_label: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient in the logits' dtype, with ``at_label`` in the label's column."""
    return grad.to(dtype).scatter_(1, label.unsqueeze(1), at_label.to(dtype))
