"""Is your own NKD the paper's? Compare a function's gradient with the formula's, on twenty cases.

    python -m kdlite.check my_file.py:nkd_loss
    python -m kdlite.check my_file.py:nkd_loss --gamma 3.5 --temperature 3     # if these are fixed inside

The function is called as (student_logits, teacher_logits, target), with gamma= and temperature= where it takes them, on
(N, C) float32 logits and (N,) class indices, and returns the mean over the batch. Its value may differ by a constant (a
KL divergence in place of the cross-entropy): training follows the gradient. Prints a line a case and ends with status 0
where all are right, 1 where one is not, with the mistake by name where it is a known one, and 2 where it cannot be run.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .terms import is_class, nkd_rows

Loss = Callable[..., Tensor]


class Case(NamedTuple):
    name: str
    student: Tensor  # (N, C), float32
    teacher: Tensor
    target: Tensor
    gamma: float
    temperature: float


def cases(gamma: float | None = None, temperature: float | None = None) -> list[Case]:
    """Twenty; with gamma or temperature given, of these alone."""
    g = torch.Generator().manual_seed(0)
    found = []
    settings = [(1.5, 1.0), (1.0, 1.0), (3.5, 3.0), (1.5, 2.0)]
    for index, (own_gamma, own_temperature) in enumerate(settings):
        for name, n, c, std, offset in (
            ("ten classes", 8, 10, 2.0, 0.0),
            ("two classes", 4, 2, 2.0, 0.0),
            ("a hundred classes, peaked", 4, 100, 6.0, 0.0),
            ("logits around 1,000", 4, 10, 2.0, 1000.0),
            ("a certain student and teacher", 4, 10, 60.0, 0.0),
        ):
            student, teacher = (offset + std * torch.randn(n, c, generator=g) for _ in range(2))
            target = torch.randint(c, (n,), generator=g)
            options = own_gamma if gamma is None else gamma, own_temperature if temperature is None else temperature
            if (gamma, temperature) != (None, None) and index:
                name = f"{name}, other draws"
            found.append(Case(name, student, teacher, target, *options))
    return found


# ---- the formula, and what is often written for it ----------------------------------------------------------------


def right(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return nkd_rows(s, t, y, gamma, temperature).mean()


def parts(s: Tensor, t: Tensor, y: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The target term, and log-softmaxes at the temperature, (N, C)."""
    target = -(t.softmax(1) * s.log_softmax(1)).gather(1, y.unsqueeze(1)).squeeze(1)
    return target, (s / temperature).log_softmax(1), (t / temperature).softmax(1)


def target_kept(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    target, log_s, p = parts(s, t, y, temperature)
    return (target - gamma * temperature**2 * (p * log_s).sum(1)).mean()


def not_normalised(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    target, log_s, p = parts(s, t, y, temperature)
    return (target - gamma * temperature**2 * (p * log_s).masked_fill(is_class(s, y), 0.0).sum(1)).mean()


def without_power(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return right(s, t, y, gamma / temperature**2, temperature)


def single_power(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return right(s, t, y, gamma / temperature, temperature)


def target_at_temperature(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    _, log_s, p = parts(s, t, y, temperature)
    target = -(p * log_s).gather(1, y.unsqueeze(1)).squeeze(1)
    return (target + nkd_rows(s, t, y, gamma, temperature) - nkd_rows(s, t, y, 0.0, temperature)).mean()


def no_target(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return (nkd_rows(s, t, y, gamma, temperature) - nkd_rows(s, t, y, 0.0, temperature)).mean()


def with_cross_entropy(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return right(s, t, y, gamma, temperature) + torch.nn.functional.cross_entropy(s, y)


def plain_kd(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    _, log_s, p = parts(s, t, y, temperature)
    return -(temperature**2) * (p * log_s).sum(1).mean()


def batch_sum(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return nkd_rows(s, t, y, gamma, temperature).sum()


def mean_over_classes(s: Tensor, t: Tensor, y: Tensor, gamma: float, temperature: float) -> Tensor:
    return right(s, t, y, gamma, temperature) / s.shape[1]


MISTAKES: dict[str, Loss] = {
    "the target is kept in the non-target part: mask its logit by -inf before the softmax": target_kept,
    "the non-target part is not normalised: divide both sides by 1 minus the target's probability": not_normalised,
    "the non-target part lacks the temperature squared": without_power,
    "the non-target part has the temperature once, not squared": single_power,
    "the target term is at the temperature; it is at 1": target_at_temperature,
    "the target term has no gradient: it must weigh the student's own log-probability": no_target,
    "the cross-entropy is in it: NKD is compared without it, and added to it": with_cross_entropy,
    "this is classic temperature KD, not NKD": plain_kd,
    "the sum over the batch is returned, not its mean": batch_sum,
    "the mean is over rows and classes: sum over the classes, then take the mean over the batch": mean_over_classes,
}


# ---- comparing ----------------------------------------------------------------------------------------------------


def gradient(loss: Loss, case: Case, dtype: torch.dtype, **options: float) -> tuple[Tensor, Tensor | None]:
    """For the student's logits, and for the teacher's where there is one."""
    student, teacher = (x.to(dtype).requires_grad_() for x in (case.student, case.teacher))
    value = loss(student, teacher, case.target, **options)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise TypeError(f"the function must return the mean over the batch, got {what}")
    found = torch.autograd.grad(value, (student, teacher), allow_unused=True)
    return found[0] if found[0] is not None else torch.zeros_like(student), found[1]


def is_close(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual.double() - expected).norm() <= 1e-3 * expected.norm() + 1e-7).item())


def check(loss: Loss, gamma: float | None = None, temperature: float | None = None) -> tuple[list[str], str | None]:
    """A line a case, and what is wrong; None: nothing.

    Args:
        loss: (student_logits, teacher_logits, target) -> mean; may take gamma= and temperature=
        gamma: that is fixed inside; None: 1.5, or what it is told
        temperature: likewise, 1

    Raises:
        TypeError: it does not return one value.
    """
    names = inspect.signature(loss).parameters
    takes = {name for name in ("gamma", "temperature") if name in names}
    gamma = gamma if "gamma" in takes or gamma is not None else 1.5
    temperature = temperature if "temperature" in takes or temperature is not None else 1.0
    lines, wrong, into_teacher, not_finite = [], [], False, False
    for number, case in enumerate(cases(gamma, temperature), start=1):
        told = {name: getattr(case, name) for name in takes}
        actual, teachers = gradient(loss, case, torch.float32, **told)
        expected, _ = gradient(right, case, torch.float64, gamma=case.gamma, temperature=case.temperature)
        into_teacher |= teachers is not None and bool((teachers != 0).any())
        finite = bool(actual.isfinite().all())
        not_finite |= not finite
        verdict = "right"
        if not is_close(actual, expected):
            off = (actual.double() - expected).norm() / expected.norm()
            verdict = f"wrong: the gradient is off by {off:.1%}" if finite else "wrong: the gradient is not finite"
            wrong.append((case, actual))
        lines.append(f"{number:2} gamma {case.gamma:g}, temperature {case.temperature:g}, {case.name}: {verdict}")
    if not wrong:
        return lines, "gradient flows into the teacher: detach its logits" if into_teacher else None
    for words, mistake in MISTAKES.items():
        theirs = [gradient(mistake, c, torch.float64, gamma=c.gamma, temperature=c.temperature)[0] for c, _ in wrong]
        seen = [is_close(actual, e) for (_, actual), e in zip(wrong, theirs) if actual.isfinite().all()]
        if seen and all(seen):
            return lines, words
    if not_finite or all("certain" in c.name or "1,000" in c.name for c, _ in wrong):
        return (
            lines,
            "it loses its digits where a probability is near 0 or 1: take log_softmax, not the log of a softmax",
        )
    return lines, "no mistake that is known here: compare it with kdlite/README.md, term by term"


def load(name: str) -> Loss:
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path or name}: expected path/to/file.py:function")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    spec.loader.exec_module(module)
    found: Any = getattr(module, function, None)
    if not callable(found):
        raise AttributeError(f"{path} has no function {function!r}")
    return found  # type: ignore[no-any-return]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("function", help="path/to/file.py:function")
    parser.add_argument("--gamma", type=float, help="that the function has inside (default: 1.5)")
    parser.add_argument("--temperature", type=float, help="that the function has inside (default: 1)")
    args = parser.parse_args(argv)
    try:
        lines, mistake = check(load(args.function), args.gamma, args.temperature)
    except Exception as error:  # of the user's file, whatever it is
        if os.environ.get("KDLITE_TRACEBACK") == "1":
            traceback.print_exc()
        print(f"kdlite.check: error: {args.function}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(*lines, sep="\n")
    print(f"wrong: {mistake}" if mistake else "right: the gradient is the paper's in all cases")
    return 1 if mistake else 0


if __name__ == "__main__":
    sys.exit(main())
