"""What a target may be, and what the losses do with it.

A target is given as to :func:`torch.nn.functional.cross_entropy`: class indices, with ``ignore_index``, or
class probabilities (mixup, cutmix, smoothed labels); logits have their classes in dimension 1 and any number
of trailing dimensions. Inside, everything is rows: ``(R, C)`` logits in float32, one row per target.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class ClassIndices(NamedTuple):
    """A target of class indices, one row per prediction."""

    label: Tensor  # (R,) int64, 0 where ignored
    kept: Tensor  # (R,) bool, False where the index is ignore_index


class ClassProbabilities(NamedTuple):
    """A target of class probabilities, one row per prediction."""

    probs: Tensor  # (R, C)


def check_logits(logits: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Raise unless both are floating point, of one shape, with at least two classes."""
    for tensor, label in ((logits, name), (other, other_name)):
        if not tensor.is_floating_point():
            raise TypeError(f"{label} must be floating point, got {tensor.dtype}")
    if logits.ndim == 0:
        raise ValueError(f"{name} must be (N, C), (N, C, d1, ...) or (C,), got a scalar")
    if logits.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(logits.shape)} and {tuple(other.shape)}"
        )
    classes = logits.shape[class_dim(logits)]
    if classes < 2:
        raise ValueError(
            f"{name} must have at least 2 classes in dimension {class_dim(logits)}, got shape {tuple(logits.shape)}: "
            "with one class nothing is left once the target is taken out"
        )


def check_options(reduction: str, **non_negative: float) -> None:
    """Raise unless the reduction is known and every weight is a non-negative number."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    for name, value in non_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} must be >= 0, got {value}")


def class_dim(logits: Tensor) -> int:
    return 0 if logits.ndim == 1 else 1


def as_rows(logits: Tensor) -> Tensor:
    """(N, C, d1, ...) or (C,) -> (R, C): float32 at least, the largest logit of a row at 0.

    Every loss here is unchanged by a shift common to a row, so the shift carries no gradient; it keeps float32
    exact where all logits share a large offset.
    """
    rows = logits.movedim(class_dim(logits), -1).reshape(-1, logits.shape[class_dim(logits)])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows - rows.detach().amax(1, keepdim=True)


def read_target(target: Tensor, logits: Tensor, ignore_index: int) -> ClassIndices | ClassProbabilities:
    """Check ``target`` against ``logits`` and bring it to rows; told apart by the number of dimensions."""
    shape = tuple(logits.shape)
    if target.ndim == logits.ndim:
        if tuple(target.shape) != shape or not target.is_floating_point():
            raise (TypeError if tuple(target.shape) == shape else ValueError)(
                f"class probabilities must be floating point of the logits' shape {shape}, "
                f"got {target.dtype} of shape {tuple(target.shape)}"
            )
        if ignore_index >= 0:
            raise ValueError(f"ignore_index={ignore_index} needs class indices; the target holds class probabilities")
        probs = target.detach().movedim(class_dim(logits), -1).reshape(-1, shape[class_dim(logits)])
        return ClassProbabilities(probs.to(torch.promote_types(logits.dtype, torch.float32)))

    expected = shape[:1] + shape[2:] if logits.ndim > 1 else ()
    if tuple(target.shape) != expected:
        raise ValueError(
            f"target must be class indices of shape {expected} or class probabilities of shape {shape}, "
            f"got shape {tuple(target.shape)}"
        )
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"class indices must be integers, got {target.dtype}")
    label = target.reshape(-1).long()
    kept = label != ignore_index
    return ClassIndices(label.where(kept, 0), kept)


def is_class(logits: Tensor, label: Tensor) -> Tensor:
    """(R, C) bool: True in the column of each row's label."""
    return torch.arange(logits.shape[1], device=logits.device) == label.unsqueeze(1)


def log_odds(logits: Tensor, label: Tensor) -> Tensor:
    """log(p / (1 - p)) of each row's label, (R,): log p is its logsigmoid, p its sigmoid, however near 0 or 1."""
    others = logits.masked_fill(is_class(logits, label), -torch.inf)
    # gather is what refuses a label out of range: with an error on CPU, a device assert on CUDA
    return logits.gather(1, label.unsqueeze(1)).squeeze(1) - others.logsumexp(1)


def log_normalized(logits: Tensor, label: Tensor) -> Tensor:
    """log N(.) of the paper, (R, C): the log-softmax over the classes other than the label, -inf at the label."""
    return logits.masked_fill(is_class(logits, label), -torch.inf).log_softmax(1)


def normalized_cross_entropy(q: Tensor, log_p: Tensor, label: Tensor) -> Tensor:
    """- sum_{i != label} q_i log p_i, (R,), for a ``log_p`` made by :func:`log_normalized`."""
    return -(q * log_p.masked_fill(is_class(log_p, label), 0.0)).sum(1)


def reduce(loss: Tensor, target: ClassIndices | ClassProbabilities, reduction: str, logits_shape: torch.Size) -> Tensor:
    """Rows of loss to what ``reduction`` asks for, as cross_entropy does it: 0/0 is NaN for "mean"."""
    if isinstance(target, ClassIndices):
        loss = loss.where(target.kept, 0.0)
    if reduction == "none":
        return loss.reshape(logits_shape[:1] + logits_shape[2:] if len(logits_shape) > 1 else ())
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / target.kept.sum() if isinstance(target, ClassIndices) else loss.mean()
