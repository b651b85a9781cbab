"""Compute USKD (universal self-knowledge distillation): the soft labels come from the student and its weak head."""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from . import fused, terms
from .inputs import ClassIndices, as_rows, check_logits, check_options, read_target, reduce


def uskd_loss(
    logits: Tensor,
    weak_logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.1,
    mu: float = 0.005,
    label_smoothing: float = 0.1,
    ignore_index: int = -100,
    reduction: str = "mean",
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""Return the universal self-KD loss; ADD it to the cross-entropy, which it does not replace.

    S is the softmax of ``logits``, W the softmax of ``weak_logits``, t the target class, and N(.) renormalises over the
    C - 1 classes other than t::

        P_t      = S_t^2 + 1 - mean_batch(S_t^2)                                              (no gradient)
        R_i      = W_i / (1 - W_t) + S_i / (1 - S_t)                                          (no gradient)
        Z_i      = rank_i^-1 / sum_j rank_j^-1, ranks by descending R over all C classes      (no gradient)
        L_uskd   = - alpha * P_t log S_t  -  beta * sum_{i != t} N(Z)_i log N(S)_i
                   - mu * sum_i V~_i log W_i,    V~: the label, smoothed by label_smoothing

    R is computed from probabilities, as in the paper; the official code since July 2023 uses log-probabilities. The
    batch mean is over the targets that are not ignored; with ``group``, over the targets of all its processes. Ties in
    R are ranked by class index. Z gives every class a weight, so a class masked by a logit of -inf makes the loss
    infinite: remove such classes from the logits.

    For class probabilities V the loss is the expectation over the label. The first term becomes ``- alpha * sum_k V_k
    P_k log S_k`` with ``P_k = S_k^2 + 1 - mean_batch(sum_k V_k S_k^2)``. The second term needs a ranking for each
    label, so it uses only the two most probable labels of a row, renormalised to sum to 1 (with ties, any two of them).
    The third term is linear in V already. For a one-hot row each term equals the hard-label term.

    Args:
        logits: (N, C), (N, C, d1, ...) or (C,), any floating dtype; C >= 2.
        weak_logits: the same shape; the output of a linear classifier on a pooled mid-level feature (see
            ``WithWeakHead``).
        target: class indices, (N,), (N, d1, ...) or (); or class probabilities of the logits' shape, without gradient.
        alpha: weight of the target term. The paper uses 1.0 on ImageNet, 0.1 on CIFAR-100.
        beta: weight of the non-target term. The paper uses 0.1.
        mu: weight of the weak head's own cross-entropy. The paper uses 0.005 on ImageNet, 0.1 on CIFAR-100.
        label_smoothing: smoothing of the weak head's target, in [0, 1].
        ignore_index: class index of the targets to ignore: they add 0, and "mean" does not count them.
        reduction: "none" (the target's shape), "mean" (over the targets that are not ignored) or "sum".
        group: processes that share one batch, such as ``torch.distributed.group.WORLD``. Under DDP, if each process has
            the same number of targets that are not ignored, the gradients then equal those of the whole batch on one
            process. It costs one all-reduce of two numbers. None: this process alone.

    Returns:
        The loss, float32 (float64 for float64 logits); gradients have the dtypes of ``logits`` and ``weak_logits``.

    Raises:
        ValueError: shapes that do not fit, fewer than two classes, a negative weight, label_smoothing outside [0, 1],
            an unknown reduction.
        TypeError: logits that are not floating point, class indices that are not integers, a weight that is not a
            Python number (a tensor would get no gradient).

    Source: Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with
    Normalized Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> logits, weak_logits = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.5]])
        >>> loss = uskd_loss(logits, weak_logits, torch.tensor([0]))
        >>> print(f"{loss:.4f}")
        0.4826
    """
    check_logits(logits, weak_logits, "logits", "weak_logits")
    check_options(reduction, alpha=alpha, beta=beta, mu=mu, label_smoothing=label_smoothing)
    if label_smoothing > 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    rows = read_target(target, logits, ignore_index)
    weights = terms.USKDWeights(alpha, beta, mu, label_smoothing, group)
    strong, weak = as_rows(logits), as_rows(weak_logits)
    if isinstance(rows, ClassIndices):
        uskd_rows = fused.uskd_rows if fused.can_fuse(strong, weak) else terms.uskd_rows
        loss = uskd_rows(strong, weak, rows.label, rows.valid, weights)
    else:
        loss = terms.uskd_rows_soft(strong, weak, rows.probs, weights)
    return reduce(loss, rows, reduction, logits.shape)
