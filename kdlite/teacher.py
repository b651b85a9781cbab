"""Run a frozen teacher: in eval mode, without gradient, with its own normalisation and input size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inputs import find_logits


class Teacher(nn.Module):
    """Wrap a classifier as a frozen teacher for :func:`kdlite.nkd_loss`; call it with the student's own batch.

    The teacher computes no gradient. It stays in eval mode, even if ``.train()`` is called on it or on a module around
    it. It converts the images to the normalisation and the size of its own training.

    Args:
        model: classifier of images (N, channels, H, W); its output is, or holds, the logits (N, C).
        mean: the teacher's mean, one value per channel, for pixels from 0 to 1.
        std: the teacher's standard deviation, one value per channel.
        student_mean: the mean with which the student's batch is normalised.
        student_std: the standard deviation with which that batch is normalised. Without these four arguments the
            teacher does not change the normalisation.
        size: (H, W) in pixels to which the batch is resized, or one side of a square; None: the batch is not resized.
        columns: for each class of the student, the index of the teacher's class. Pass it if the teacher has more
            classes or another order; the softmax of the loss is then over these classes. None: all classes in order.
        logits: key, attribute or index of the logits in the output, as in :class:`WithWeakHead`.

    Raises:
        ValueError: only some of the means and deviations are given; a deviation is not above 0; a column is negative;
            the batch is on another device than the teacher.
        TypeError: the output of the model does not hold the logits; the images are integers, although the means and
            deviations are given.

    Example:
        >>> teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), size=(2, 2)).train()
        >>> logits = teacher(torch.zeros(7, 3, 8, 8))
        >>> tuple(logits.shape), logits.requires_grad, teacher.training
        ((7, 5), False, False)
    """

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        student_mean: Sequence[float] | None = None,
        student_std: Sequence[float] | None = None,
        size: int | Sequence[int] | None = None,
        columns: Sequence[int] | None = None,
        logits: str | int | None = None,
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.logits = logits
        self.size = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if columns is not None and min(columns) < 0:
            raise ValueError(f"columns has {min(columns)}: expected the index of a class of the teacher, at least 0")
        given = [x for x in (mean, std, student_mean, student_std) if x is not None]
        if len(given) not in (0, 4):
            raise ValueError("mean, std, student_mean and student_std go together: pass all four, or leave all out")
        self.scale: Tensor | None
        self.shift: Tensor | None
        scale = shift = None
        if given:
            m, s, student_m, student_s = (torch.as_tensor(x, dtype=torch.float64).view(-1, 1, 1) for x in given)
            if (s <= 0).any() or (student_s <= 0).any():
                raise ValueError(f"std {std} and student_std {student_std} must be above 0")
            scale, shift = (student_s / s).float(), ((student_m - m) / s).float()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.columns: Tensor | None
        self.register_buffer("columns", None if columns is None else torch.as_tensor(columns))
        self.train()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode for any ``mode``."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        here = next(self.model.parameters(), images).device
        if images.device != here:
            raise ValueError(f"the teacher is on {here}, the images are on {images.device}: move the teacher")
        if self.scale is not None and self.shift is not None:
            if not images.is_floating_point():
                raise TypeError(f"the images are {images.dtype}: pass images that are normalised for the student")
            images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            # a CPU resizes no 16-bit floating point
            low = images.device.type == "cpu" and images.dtype in (torch.float16, torch.bfloat16)
            wide = images.float() if low else images
            images = F.interpolate(wide, self.size, mode="bicubic", antialias=True).to(images.dtype)
        logits = find_logits(self.model(images), self.logits)
        return logits if self.columns is None else logits.index_select(1, self.columns)
