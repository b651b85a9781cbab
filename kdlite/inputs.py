"""Check logits and targets, and flatten them to rows.

Targets have the forms of :func:`torch.nn.functional.cross_entropy`: class indices, with ``ignore_index``, or class
probabilities (mixup, cutmix, smoothed labels). Logits have their classes in dimension 1 and any number of trailing
dimensions. The losses work on rows: ``(R, C)`` logits, one row per target.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")


class ClassIndices(NamedTuple):
    """Hold a target of class indices, one row per prediction."""

    label: Tensor  # (R,) int64, 0 where ignored
    valid: Tensor  # (R,) bool, False where the index is ignore_index


class ClassProbabilities(NamedTuple):
    """Hold a target of class probabilities, one row per prediction."""

    probs: Tensor  # (R, C)


# ---- logits -------------------------------------------------------------------------------------------------------


def check_tensors(**values: object) -> None:
    """Raise unless each value is a dense tensor; the keywords are the names of the caller's arguments."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            hint = ": pass its .logits" if hasattr(value, "logits") else ""
            hint = ": pass one of its entries" if not hint and isinstance(value, (Mapping, tuple)) else hint
            raise TypeError(f"{name} must be a tensor, got {describe(value)}{hint}")
        if value.is_nested or value.layout != torch.strided:
            kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
            raise TypeError(f"{name} must be a dense tensor, got a {kind} one: pad it, or use .to_dense()")


def check_logits(logits: Tensor, other: Tensor, name: str, other_name: str) -> None:
    """Raise unless both logits are floating point, of one shape, on one device, with at least two classes."""
    check_tensors(**{name: logits, other_name: other})
    check_floating(logits, name)
    check_floating(other, other_name)
    if logits.shape != other.shape:
        raise ValueError(
            f"{name} and {other_name} must have one shape, got {tuple(logits.shape)} and {tuple(other.shape)}"
            + cut_hint(logits.shape, other.shape)
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
    """Raise unless the logits have at least two classes."""
    if logits.ndim == 0:
        raise ValueError(f"{name} must be (N, C), (N, C, d1, ...) or (C,), got a scalar")
    if logits.shape[class_dim(logits)] < 2:
        raise ValueError(
            f"{name} must have at least 2 classes in dimension {class_dim(logits)}, got shape {tuple(logits.shape)}"
        )


def cut_hint(shape: torch.Size, other: torch.Size) -> str:
    """Return a hint if two shapes differ only in the number of classes, as after padding of a vocabulary."""
    different = [d for d, (a, b) in enumerate(zip(shape, other)) if a != b] if len(shape) == len(other) else []
    # dimension 1, or the last dimension, where other libraries have the classes
    if different in ([min(1, len(shape) - 1)], [len(shape) - 1]):
        return f": remove padded classes to leave {min(shape[different[0]], other[different[0]])}"
    return ""


def find_logits(output: Any, where: str | int | None) -> Tensor:
    """Return the logits in a model's output.

    Args:
        output: a tensor; or a dict, tuple, list or object that holds the logits.
        where: key, index or attribute of the logits; None: "logits", or the only entry of a dict.

    Raises:
        TypeError: the output does not hold the logits.
    """
    if isinstance(output, Tensor):
        return output
    found = None
    if isinstance(output, Mapping):
        key = next(iter(output), None) if where is None and len(output) == 1 else where
        found = output.get("logits" if key is None else key)
    elif isinstance(where, int):
        found = output[where] if isinstance(output, (tuple, list)) and len(output) > where else None
    elif where or not isinstance(output, tuple):  # the entries of a tuple have no names: the caller must choose
        found = getattr(output, where or "logits", None)
    if isinstance(found, Tensor):
        return found
    entry = repr(next(iter(output), "logits")) if isinstance(output, Mapping) else "0"
    raise TypeError(
        f"the model must return logits, got {describe(output)}: pass logits={entry}, or disable auxiliary outputs"
    )


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    entries = f" of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else ""
    return f"{type(value).__name__}{entries}"


# ---- options ------------------------------------------------------------------------------------------------------


def check_options(reduction: str, **non_negative: float) -> None:
    """Raise unless the reduction exists and every weight is a finite number >= 0."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    for name, value in non_negative.items():
        check_number(name, value)
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be >= 0 and finite, got {value}")


def check_positive(**positive: float) -> None:
    """Raise unless every value is a finite number > 0."""
    for name, value in positive.items():
        check_number(name, value)
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")


def check_number(name: str, value: object) -> None:
    if not isinstance(value, numbers.Real):  # a tensor, for example, which would get no gradient
        raise TypeError(f"{name} must be a Python number, got {describe(value)}")


# ---- targets and rows ---------------------------------------------------------------------------------------------


def class_dim(logits: Tensor) -> int:
    return 0 if logits.ndim == 1 else 1


def label_shape_of(logits: Tensor) -> torch.Size:
    """Return (N, d1, ...) of (N, C, d1, ...): the shape of class indices."""
    dim = class_dim(logits)
    return logits.shape[:dim] + logits.shape[dim + 1 :]


def as_rows(logits: Tensor) -> Tensor:
    """Return (N, C, d1, ...) or (C,) as (R, C)."""
    if logits.ndim == 2:
        return logits
    return logits.movedim(class_dim(logits), -1).reshape(-1, logits.shape[class_dim(logits)])


def read_target(target: Tensor, logits: Tensor, ignore_index: int) -> ClassIndices | ClassProbabilities:
    """Check ``target`` against ``logits`` and return it as rows; its number of dimensions decides its kind."""
    check_tensors(target=target)
    if not isinstance(ignore_index, int) or not -(2**63) <= ignore_index < 2**63:
        raise TypeError(f"ignore_index must be an integer of 64 bits, got {ignore_index!r}")
    probs_shape, label_shape = tuple(logits.shape), tuple(label_shape_of(logits))
    as_probs = target.ndim == logits.ndim  # sizes may be symbols under torch.compile
    fits = tuple(target.shape) == (probs_shape if as_probs else label_shape)
    if not fits or not (target.is_floating_point() if as_probs else is_integer(target)):
        classes_last = logits.ndim > 2 and tuple(target.shape) == probs_shape[:-1]
        raise (TypeError if fits else ValueError)(
            f"target must be class indices, integers of shape {label_shape}, or class probabilities, floating point "
            f"of shape {probs_shape}; got {target.dtype} of shape {tuple(target.shape)}"
            + (": move the classes to dimension 1" if classes_last else "")
        )
    if as_probs:
        if ignore_index >= 0:
            raise ValueError(f"ignore_index={ignore_index} needs class indices; the target holds class probabilities")
        return ClassProbabilities(as_rows(target.detach()).to(torch.promote_types(logits.dtype, torch.float32)))
    label = target.reshape(-1).long()
    valid = label != ignore_index
    if torch.compiler.is_compiling():  # torch 2.11 counts negative indices from the end: put them out of range
        label = label.where(label >= 0, probs_shape[class_dim(logits)])
    return ClassIndices(label * valid, valid)


def reduce(loss: Tensor, target: ClassIndices | ClassProbabilities, reduction: str, logits_shape: torch.Size) -> Tensor:
    """Reduce the rows of a loss as cross_entropy does; the "mean" over no target is NaN."""
    if isinstance(target, ClassIndices):
        loss = loss.where(target.valid, 0.0)
    if reduction == "none":
        return loss.reshape(logits_shape[:1] + logits_shape[2:] if len(logits_shape) > 1 else ())
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / target.valid.sum() if isinstance(target, ClassIndices) else loss.mean()
