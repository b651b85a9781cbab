"""What a target may be, and what the losses do with it.

A target is given as to :func:`torch.nn.functional.cross_entropy`: class indices, with ``ignore_index``, or
class probabilities (mixup, cutmix, smoothed labels); logits have their classes in dimension 1 and any number
of trailing dimensions. Inside, everything is rows: ``(R, C)`` logits, one row per target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class ClassIndices(NamedTuple):
    """A target of class indices, one row per prediction."""

    label: Tensor  # (R,) int64, 0 where ignored
    valid: Tensor  # (R,) bool, False where the index is ignore_index


class ClassProbabilities(NamedTuple):
    """A target of class probabilities, one row per prediction."""

    probs: Tensor  # (R, C)


def check_tensors(**values: object) -> None:
    """Raise unless each is a tensor; the names are those of the caller's arguments."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.is_nested or value.layout != torch.strided:
                kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
                raise TypeError(f"{name} must be a dense tensor, got a {kind} one: pad it, or use .to_dense()")
            continue
        hint = "use torch.as_tensor(...)"
        if hasattr(value, "logits"):
            hint = f"pass its .logits, not the whole {type(value).__name__}"
        elif isinstance(value, Mapping):
            hint = f"pick one of its entries, as {name}[{next(iter(value), 'out')!r}]"
        elif isinstance(value, tuple):
            hint = "pick the tensor of logits out of it"
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}: {hint}")


def check_logits(logits: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Raise unless both are tensors, floating point, of one shape, with at least two classes."""
    check_tensors(**{name: logits, other_name: other})
    for tensor, label in ((logits, name), (other, other_name)):
        check_floating(tensor, label)
    if logits.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(logits.shape)} and {tuple(other.shape)}"
            + _how_to_match(logits, other, name, other_name)
        )
    if logits.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device, got {logits.device} and {other.device}")
    check_classes(logits, name)


def check_floating(tensor: Tensor, name: str) -> None:
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        raise TypeError(f"{name} must be floating point of 16 bits or more, got {tensor.dtype}")


def is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def check_integers(tensor: Tensor, name: str) -> None:
    if not is_integer(tensor):
        raise TypeError(f"{name} must be class indices, integers, got {tensor.dtype}")


def check_classes(logits: Tensor, name: str) -> None:
    """Raise unless there are classes, two at least."""
    if logits.ndim == 0:
        raise ValueError(f"{name} must be (N, C), (N, C, d1, ...) or (C,), got a scalar")
    if logits.shape[class_dim(logits)] < 2:
        raise ValueError(
            f"{name} must have at least 2 classes in dimension {class_dim(logits)}, got shape {tuple(logits.shape)}: "
            "with one class nothing is left once the target is taken out"
        )


def _how_to_match(logits: Tensor, other: Tensor, name: str, other_name: str) -> str:
    """What to pass where one of two logits has more classes, as the padded vocabulary of a language model."""
    different = [d for d in range(logits.ndim) if logits.ndim == other.ndim and logits.shape[d] != other.shape[d]]
    if different not in ([1], [logits.ndim - 1]):
        return ""
    (dim,) = different
    wide = other_name if other.shape[dim] > logits.shape[dim] else name
    kept = f"[{':, ' if dim == 1 else '..., '}:{min(logits.shape[dim], other.shape[dim])}]"
    hint = f": if the classes beyond are padding, pass {wide}{kept}"
    return hint if dim == 1 else f"{hint}, and both with their classes in dimension 1, {_move_classes(logits)}"


def _move_classes(logits: Tensor) -> str:
    """How logits with their classes last are passed."""
    return "as logits.transpose(1, 2)" if logits.ndim == 3 else "as logits.movedim(-1, 1)"


def check_options(reduction: str, **non_negative: float) -> None:
    """Raise unless the reduction is known and every weight is a non-negative, finite number."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    for name, value in non_negative.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def class_dim(logits: Tensor) -> int:
    return 0 if logits.ndim == 1 else 1


def label_shape_of(logits: Tensor) -> torch.Size:
    """(N, C, d1, ...) -> (N, d1, ...): of class indices."""
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def as_rows(logits: Tensor) -> Tensor:
    """(N, C, d1, ...) or (C,) -> (R, C)."""
    if logits.ndim == 2:
        return logits
    return logits.movedim(class_dim(logits), -1).reshape(-1, logits.shape[class_dim(logits)])


def read_target(target: Tensor, logits: Tensor, ignore_index: int) -> ClassIndices | ClassProbabilities:
    """Check ``target`` against ``logits`` and bring it to rows; told apart by the number of dimensions."""
    check_tensors(target=target)
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index must be an integer of 64 bits, got {ignore_index!r}")
    probs_shape, label_shape = tuple(logits.shape), tuple(label_shape_of(logits))
    as_probs = target.ndim == logits.ndim  # decided without the sizes, which may be symbols under torch.compile
    fits = tuple(target.shape) == (probs_shape if as_probs else label_shape)
    if not fits or not (target.is_floating_point() if as_probs else is_integer(target)):
        raise (TypeError if fits else ValueError)(
            f"target must be class indices, integers of shape {label_shape}, or class probabilities, floating point "
            f"of shape {probs_shape}; got {target.dtype} of shape {tuple(target.shape)}"
            + (
                f": the classes must be in dimension 1, pass them {_move_classes(logits)}"
                if logits.ndim > 2 and tuple(target.shape) == probs_shape[:-1]
                else ""
            )
        )
    if as_probs:
        if ignore_index >= 0:
            raise ValueError(f"ignore_index={ignore_index} needs class indices; the target holds class probabilities")
        return ClassProbabilities(as_rows(target.detach()).to(torch.promote_types(logits.dtype, torch.float32)))
    label = target.reshape(-1).long()
    valid = label != ignore_index
    if torch.compiler.is_compiling():  # torch 2.11 would count a negative index from the end: out of range it goes
        label = label.where(label >= 0, probs_shape[class_dim(logits)])
    return ClassIndices(label * valid, valid)


def reduce(loss: Tensor, target: ClassIndices | ClassProbabilities, reduction: str, logits_shape: torch.Size) -> Tensor:
    """Rows of loss to what ``reduction`` asks for, as cross_entropy does it: 0/0 is NaN for "mean"."""
    if isinstance(target, ClassIndices):
        loss = loss.where(target.valid, 0.0)
    if reduction == "none":
        return loss.reshape(logits_shape[:1] + logits_shape[2:] if len(logits_shape) > 1 else ())
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / target.valid.sum() if isinstance(target, ClassIndices) else loss.mean()
