"""Compare the gradient of your own NKD loss with that of the paper's formula in twenty cases.

    python -m kdlite.check my_file.py:nkd_loss
    python -m kdlite.check my_file.py:NKDLoss --gamma 3.5 --temperature 3     # if they are constants in it

The loss is a function, a class, an instance or a functools.partial that returns the mean over the batch, without the
cross-entropy. The check calls it with the (N, C) float32 logits of student and teacher, and (N,) class indices. It
tries the orders of these three arguments that agree with "student" and "teacher" in their names. It varies the numeric
arguments, and identifies gamma and temperature by their effect, not by their names. If gamma or temperature is a
constant in the loss, the check estimates it from the gradient, unless --gamma or --temperature gives it. The loss may
differ from the formula by a constant, as a KL divergence differs from a cross-entropy, because training uses only the
gradient.

The check prints the verdict (which names a known mistake), then how it called the loss, then a line for each case. The
exit status is 0 if the loss is right, 1 if it is wrong, 2 if the check cannot run.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import inspect
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from .terms import is_class, nkd_rows

Formula = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]  # s, t, y, gamma, temperature -> mean over the batch
Order = tuple[str, ...]  # the order in which the loss takes "student", "teacher", "target"

# ---- cases --------------------------------------------------------------------------------------------------------

GRID = (1.0, 0.5, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 10.0, 12.0, 15.0, 16.0, 20.0)  # temperatures
SETTINGS = [(1.5, 1.0), (1.0, 1.0), (3.5, 3.0), (1.5, 2.0)]  # gamma, temperature
EXTREME = ("logits around 1,000", "student and teacher are certain")


class Case(NamedTuple):
    name: str
    student: Tensor  # (N, C), float32
    teacher: Tensor
    target: Tensor
    gamma: float
    temperature: float


@functools.cache
def cases() -> list[Case]:
    """Return five kinds of logits for each setting."""
    g = torch.Generator().manual_seed(0)
    found = []
    for gamma, temperature in SETTINGS:
        for name, n, c, std, offset in (
            ("ten classes", 8, 10, 2.0, 0.0),
            ("two classes", 4, 2, 2.0, 0.0),
            ("a hundred classes, peaked", 4, 100, 6.0, 0.0),
            (EXTREME[0], 4, 10, 2.0, 1000.0),
            (EXTREME[1], 4, 10, 60.0, 0.0),
        ):
            student, teacher = (offset + std * torch.randn(n, c, generator=g) for _ in range(2))
            target = torch.randint(c, (n,), generator=g)
            # In half of the rows the teacher is right, as in training. Not in the peaked case: there a loss with a
            # known mistake would also lose digits, so that the check could not name the mistake.
            if c < 100:
                target[::2] = teacher[::2].argmax(1)
            found.append(Case(name, student, teacher, target, gamma, temperature))
    return found


# ---- the formula and frequent mistakes ----------------------------------------------------------------------------


def right(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    return nkd_rows(s, t, y, g, T).mean()


def target_rows(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return - T_t log S_t of each row."""
    return nkd_rows(s, t, y, 0.0, 1.0)


def other_rows(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    """Return the non-target part of each row, with its factor gamma T^2."""
    return nkd_rows(s, t, y, g, T) - target_rows(s, t, y)


def p_of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)


def ce(p: Tensor, q: Tensor) -> Tensor:
    """Return the cross-entropy of two binary distributions."""
    return -(p * q.log() + (1 - p) * (1 - q).log())


def with_epsilon(s: Tensor, t: Tensor, y: Tensor, g: float, T: float, target: float, others: float) -> Tensor:
    """Return NKD with log(p + epsilon) instead of log p; `target` and `others` are the epsilons of the two terms."""
    n_t, n_s = ((x / T).masked_fill(is_class(x, y), -torch.inf).softmax(1) for x in (t, s))
    other_terms = -(n_t * (n_s + others).log()).masked_fill(is_class(s, y), 0.0).sum(1)
    return (-p_of(t, y) * (p_of(s, y) + target).log() + g * T**2 * other_terms).mean()


def target_kept(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    return (target_rows(s, t, y) - g * T**2 * ((t / T).softmax(1) * (s / T).log_softmax(1)).sum(1)).mean()


def target_zero(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    s_0, t_0 = (x.masked_fill(is_class(x, y), 0.0) / T for x in (s, t))
    return (target_rows(s, t, y) - g * T**2 * (t_0.softmax(1) * s_0.log_softmax(1)).sum(1)).mean()


def not_normalised(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    products = ((t / T).softmax(1) * (s / T).log_softmax(1)).masked_fill(is_class(s, y), 0.0)
    return (target_rows(s, t, y) - g * T**2 * products.sum(1)).mean()


def one_divided(s: Tensor, t: Tensor, y: Tensor, g: float, T: float) -> Tensor:
    """Return NKD with only the teacher's logits divided by the temperature."""
    return (target_rows(s, t, y) + T**2 * other_rows(s, t / T, y, g, 1.0)).mean()


PARTS = "the non-target part"
FORMULAS: list[tuple[str, Formula]] = [
    (f"the target is kept in {PARTS}: mask its logit by -inf before the softmax", target_kept),
    (
        f"the target's logit is 0 in {PARTS}, as after a multiplication by a mask: mask it by -inf before the softmax",
        target_zero,
    ),
    (f"{PARTS} is not normalised: divide each probability by 1 minus the target's", not_normalised),
    (f"{PARTS} lacks the temperature squared", lambda s, t, y, g, T: right(s, t, y, g / T**2, T)),
    (f"{PARTS} has the temperature once, not squared", lambda s, t, y, g, T: right(s, t, y, g / T, T)),
    ("only the teacher's logits are divided by the temperature: divide the student's too", one_divided),
    (
        "only the teacher's logits are divided by the temperature, without its square: divide the student's too",
        lambda s, t, y, g, T: one_divided(s, t, y, g / T**2, T),
    ),
    (
        "only the student's logits are divided by the temperature: divide the teacher's too",
        lambda s, t, y, g, T: (target_rows(s, t, y) + T**2 * other_rows(s / T, t, y, g, 1.0)).mean(),
    ),
    (f"{PARTS} is missing", lambda s, t, y, g, T: target_rows(s, t, y).mean()),
    (
        "the target term is at the temperature: compute it at temperature 1",
        lambda s, t, y, g, T: (target_rows(s / T, t / T, y) + other_rows(s, t, y, g, T)).mean(),
    ),
    (
        "the target term is at the temperature, with its square: compute it at temperature 1",
        lambda s, t, y, g, T: (T**2 * target_rows(s / T, t / T, y) + other_rows(s, t, y, g, T)).mean(),
    ),
    (
        "the target term has no gradient: it must contain the student's log-probability of the target",
        lambda s, t, y, g, T: other_rows(s, t, y, g, T).mean(),
    ),
    (
        "the target term is the cross-entropy: multiply it by the teacher's probability of the target",
        lambda s, t, y, g, T: F.cross_entropy(s, y) + other_rows(s, t, y, g, T).mean(),
    ),
    (
        "the target term has the batch mean of the teacher's probability as its factor: use each row's own probability",
        lambda s, t, y, g, T: p_of(t, y).mean() * F.cross_entropy(s, y) + other_rows(s, t, y, g, T).mean(),
    ),
    (
        "the target term is DKD's binary KL at the temperature: use -T_t log S_t at temperature 1",
        lambda s, t, y, g, T: (T**2 * ce(p_of(t / T, y), p_of(s / T, y)) + other_rows(s, t, y, g, T)).mean(),
    ),
    (
        "the target term is a binary KL: use -T_t log S_t",
        lambda s, t, y, g, T: (ce(p_of(t, y), p_of(s, y)) + other_rows(s, t, y, g, T)).mean(),
    ),
    (
        "the loss contains the cross-entropy: return NKD alone, and add it to the cross-entropy in training",
        lambda s, t, y, g, T: right(s, t, y, g, T) + F.cross_entropy(s, y),
    ),
    (
        "this is classic temperature KD, not NKD",
        lambda s, t, y, g, T: -(T**2) * ((t / T).softmax(1) * (s / T).log_softmax(1)).sum(1).mean(),
    ),
    ("the loss returns the sum over the batch: return the mean", lambda s, t, y, g, T: nkd_rows(s, t, y, g, T).sum()),
    (
        "the mean is over rows and classes: sum over the classes, then take the mean over the batch",
        lambda s, t, y, g, T: right(s, t, y, g, T) / s.shape[1],
    ),
    (
        f'{PARTS} is a mean over the classes, as by kl_div(reduction="mean"): use "batchmean"',
        lambda s, t, y, g, T: (target_rows(s, t, y) + other_rows(s, t, y, g, T) / s.shape[1]).mean(),
    ),
    (
        f'{PARTS} is a mean over the non-target classes, as by kl_div(reduction="mean"): use "batchmean"',
        lambda s, t, y, g, T: (target_rows(s, t, y) + other_rows(s, t, y, g, T) / (s.shape[1] - 1)).mean(),
    ),
    *(
        ("log(p + epsilon) changes the gradient: use log_softmax", functools.partial(with_epsilon, target=a, others=b))
        for epsilon in (10.0**-power for power in range(2, 13))
        for a, b in ((epsilon, epsilon), (epsilon, 0.0), (0.0, epsilon))
    ),
]
DIGITS_LOST = (
    "the loss loses digits if a probability is near 0 or 1: use log_softmax, not the log of a softmax; mask the target "
    "by -inf, instead of a division by 1 minus its probability"
)
NO_GRADIENT = "the student's logits get no gradient: remove no_grad, detach, item or a new tensor from the loss"
UNKNOWN = "the mistake is not a known one: compare each term with kdlite/README.md"


# ---- the loss to check --------------------------------------------------------------------------------------------

ROLES = ("student", "teacher")
TARGETS = {"target", "targets", "label", "labels", "gt", "gt_label", "gt_labels", "y", "y_true", "ground_truth"}
# usual names of gamma and of the temperature, the most likely first
GAMMAS = ("gamma", "alpha", "beta", "weight", "lam", "lamb", "lambda_")
TEMPERATURES = ("temperature", "temp", "tau", "t", "kd_t", "lam", "lamb", "lambda_")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def role_in(name: str) -> str | None:
    """Return "student" or "teacher" if the name of an argument of logits contains it."""
    name = name.lower()
    return None if "label" in name or "target" in name else next((x for x in ROLES if x in name), None)


class Subject:
    """Hold the loss to check, find its tensor and number arguments, and call it with other numbers."""

    def __init__(self, loss: Any) -> None:
        self.loss = loss
        self.is_object = not isinstance(loss, type) and not inspect.isroutine(loss)
        self.is_object &= not isinstance(loss, functools.partial)
        call = getattr(loss, "forward", loss.__call__) if isinstance(loss, type) or self.is_object else loss
        parameters = list(inspect.signature(call).parameters.values())[isinstance(loss, type) :]  # without self
        names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        target = next((name for name in names if name.lower() in TARGETS), None)
        logits = [name for name in names if name != target][: 3 if target is None else 2]
        self.tensors = sorted(logits if target is None else [*logits, target], key=names.index)
        keyword_only = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        self.by_position = self.tensors == names[:3] or len(self.tensors) < 3
        self.by_position &= keyword_only.isdisjoint(self.tensors)
        orders = [
            order
            for order in itertools.permutations((*ROLES, "target"))
            if target is None or order.index("target") == self.tensors.index(target)
        ]
        named = [order for order in orders if all(role_in(x) in (None, y) for x, y in zip(self.tensors, order))]
        self.orders = named or orders
        self.exchanged = [order for order in orders if order not in self.orders]
        self.built = inspect.signature(loss).parameters if isinstance(loss, type) else {}
        self.called = {p.name: p for p in parameters if p.name in names and p.name not in self.tensors}
        attributes = {name: x for name, x in getattr(loss, "__dict__", {}).items() if name[0] != "_" and self.is_object}
        defaults = {name: p.default for name, p in [*self.built.items(), *self.called.items()]} | attributes
        # an argument without a default gets 1.0, to test whether it acts as gamma or temperature
        defaults = {name: 1.0 if x is inspect.Parameter.empty else x for name, x in defaults.items()}
        self.numbers: dict[str, float] = {name: x for name, x in defaults.items() if is_number(x)}
        self.others = {name: x for name, x in defaults.items() if isinstance(x, (bool, str)) and name != "training"}

    def __call__(self, order: Order, tensors: dict[str, Tensor], numbers: dict[str, float]) -> Any:
        loss = self.loss
        if isinstance(loss, type):
            loss = loss(**{name: numbers[name] for name in self.built if name in numbers})
        elif self.is_object:
            loss = copy.copy(loss)
            own = getattr(loss, "__dict__", {})  # also of a frozen dataclass
            own.update({name: x for name, x in numbers.items() if name in own})
        options = {name: numbers[name] for name in self.called if name in numbers}
        if self.by_position:
            return loss(*(tensors[role] for role in order), **options)
        return loss(**{name: tensors[role] for name, role in zip(self.tensors, order)}, **options)

    def gradient(self, order: Order, case: Case, numbers: dict[str, float]) -> tuple[Tensor, bool]:
        """Return the gradient of the student's logits, and whether the teacher's logits get a gradient."""
        leaves = [x.clone().requires_grad_() for x in (case.student, case.teacher)]
        tensors = dict(student=leaves[0].clone(), teacher=leaves[1].clone(), target=case.target.clone())
        value = self(order, tensors, numbers)
        if not isinstance(value, Tensor) or value.numel() != 1:
            returned = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"the loss must return the mean over the batch, one value, got {returned}")
        if not value.requires_grad:
            return torch.zeros_like(leaves[0]), False
        found = torch.autograd.grad(value, leaves, allow_unused=True)
        teacher = found[1] is not None and bool((found[1] != 0).any())
        return found[0] if found[0] is not None else torch.zeros_like(leaves[0]), teacher


class Numbers(NamedTuple):
    """Group the numbers of the loss by their effect on the gradient."""

    base: dict[str, float]
    live: list[str]  # the numbers that may be gamma or temperature
    without_effect: list[str]
    weights: dict[str, float]  # defaults of weights of the loss or of its target term; 1.0 in `base`


def find_roles(subject: Subject, order: Order, probe: Case) -> Numbers:
    base = dict(subject.numbers)
    live: list[str] = []
    without_effect: list[str] = []
    weights: dict[str, float] = {}
    before, _ = subject.gradient(order, probe, base)
    target = gradient(right, probe, 0.0, 1.0)
    for name, value in subject.numbers.items():
        if value == 0 and name.lower() not in GAMMAS:  # it turns a part off, such as a dropout or another loss
            continue
        changed = 2.0 * value if value else 1.0
        try:
            after, _ = subject.gradient(order, probe, base | {name: changed})
        except Exception:  # the number has another meaning, such as the number of classes
            continue
        if is_close(after, before):
            without_effect.append(name)
        elif value and (is_close(after, before * (changed / value)) or is_close(after - before, target * value)):
            weights[name], base[name] = value, 1.0
        else:
            live.append(name)
    return Numbers(base, live, without_effect, weights)


# ---- comparing ----------------------------------------------------------------------------------------------------


class Attempt(NamedTuple):
    """Hold the gradients of the loss for one order of its tensors and one choice of gamma and temperature."""

    order: Order
    gamma: str | None
    temperature: str | None
    numbers: Numbers
    actual: list[tuple[Case, Tensor]]
    into_teacher: bool


def is_close(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual.double() - expected.double()).norm() <= 1e-3 * expected.norm() + 1e-7).item())


def gradient(formula: Formula, case: Case, gamma: float, temperature: float) -> Tensor:
    return formula_gradient(formula, case.student, case.teacher, case.target, gamma, temperature)


@functools.lru_cache(4096)  # several attempts are compared with one formula
def formula_gradient(
    formula: Formula, student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float
) -> Tensor:
    student = student.double().requires_grad_()
    value = formula(student, teacher.double(), target, gamma, temperature)
    if not value.requires_grad:
        return torch.zeros_like(student)
    return torch.autograd.grad(value, student)[0]


def attempts(subject: Subject, order: Order) -> list[Attempt]:
    """Return one attempt for each pair of numbers that may be gamma and temperature."""
    numbers = find_roles(subject, order, cases()[0])
    pairs: list[tuple[str | None, str | None]] = list(itertools.permutations(numbers.live, 2))
    if len(numbers.live) == 1:
        pairs = [(numbers.live[0], None), (None, numbers.live[0])]
    pairs.sort(key=lambda pair: likelihood(pair[0], GAMMAS) + likelihood(pair[1], TEMPERATURES))
    found: list[Attempt] = []
    failure: Exception | None = None
    for pair in pairs or [(None, None)]:
        try:
            found.append(attempt(subject, order, numbers, *pair))
        except Exception as error:  # one of the two numbers has another meaning
            failure = failure or error
    if not found and failure is not None:
        raise failure
    return found


def likelihood(name: str | None, names: tuple[str, ...]) -> int:
    return names.index(name.lower()) if name and name.lower() in names else len(names)


def attempt(subject: Subject, order: Order, numbers: Numbers, gamma: str | None, temperature: str | None) -> Attempt:
    actual, into_teacher = [], False
    for case in cases():
        values = dict(numbers.base)
        values |= {} if gamma is None else {gamma: case.gamma}
        values |= {} if temperature is None else {temperature: case.temperature}
        found, flows = subject.gradient(order, case, values)
        actual.append((case, found))
        into_teacher |= flows
    return Attempt(order, gamma, temperature, numbers, actual, into_teacher)


def estimate(formula: Formula, tried: Attempt, gamma: float | None, temperature: float | None) -> tuple[float, float]:
    """Return gamma and temperature of the first case: each is varied by the check, given by the user, or fitted."""
    case, actual = tried.actual[0]
    gamma = case.gamma if tried.gamma else gamma
    temperature = case.temperature if tried.temperature else temperature
    if gamma is not None and temperature is not None:
        return gamma, temperature
    best, smallest = (gamma or 1.5, temperature or 1.0), torch.inf
    ratios = (1.0, 1.04, 1.004, 1.0004) if formula is right and temperature is None else (1.0,)
    for ratio in ratios:  # first the grid, then ever smaller steps around its best temperature
        grid = GRID if ratio == 1 else tuple(best[1] * ratio**k for k in range(-10, 11))
        for candidate in grid if temperature is None else (temperature,):
            fitted = gamma
            if fitted is None:  # the gradient is linear in gamma
                zero, one = (gradient(formula, case, g, candidate) for g in (0.0, 1.0))
                slope = one - zero
                squared = float(slope.square().sum())
                fitted = float(((actual.double() - zero) * slope).sum()) / squared if squared > 1e-12 else 1.5
            distance = float((gradient(formula, case, fitted, candidate) - actual.double()).norm())
            if distance < smallest * (1 - 1e-6):
                best, smallest = (fitted, candidate), distance
        if smallest <= 1e-5 * float(actual.norm()):
            break
    return best


def compare(formula: Formula, tried: Attempt, constants: tuple[float, float]) -> Iterator[tuple[Case, float]]:
    """Yield each case, with the loss's gamma and temperature, and the gradient's relative error (0: close enough)."""
    for case, actual in tried.actual:
        gamma = case.gamma if tried.gamma else constants[0]
        temperature = case.temperature if tried.temperature else constants[1]
        expected = gradient(formula, case, gamma, temperature)
        error = float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12))
        right_here = is_close(actual, expected)
        yield case._replace(gamma=gamma, temperature=temperature), 0.0 if right_here else error


class Result(NamedTuple):
    mistake: str | None  # None: the loss is right
    notes: list[str]  # how the loss was called
    lines: list[str]  # one for each case


def check(loss: Any, gamma: float | None = None, temperature: float | None = None) -> Result:
    """Compare the gradient of a loss with that of the paper's NKD.

    Args:
        loss: function, class, instance or partial of student logits, teacher logits and target, in any order.
        gamma: value of gamma, if it is a constant in the loss; None: estimate that constant.
        temperature: value of the temperature, if it is a constant in the loss; None: estimate that constant.

    Raises:
        TypeError: the loss does not return one value.
        Exception: an error of the loss itself.
    """
    subject = Subject(loss)
    tried: list[Attempt] = []
    failure: Exception | None = None
    for order in subject.orders:
        try:
            tried += attempts(subject, order)
        except Exception as error:  # the loss may accept another order of the arguments
            failure = failure or error
    if not tried and failure is not None:
        raise failure
    for words, formula in [("", right), *FORMULAS]:
        for one in tried:
            constants = estimate(formula, one, gamma, temperature)
            skip = EXTREME if words else ()  # a loss with a known mistake may also lose digits in these cases
            found = compare(formula, one, constants)
            if constants[0] > 1e-3 and all(not error for case, error in found if case.name not in skip):
                return report(subject, one, constants, words or side_mistake(one))
        if not words and subject.is_object and (result := by_its_class(subject, gamma, temperature)):
            return result
    constants = estimate(right, tried[0], gamma, temperature)
    errors = list(compare(right, tried[0], constants))
    finite = all(bool(actual.isfinite().all()) for _, actual in tried[0].actual)
    digits = not finite or all(not error or case.name in EXTREME for case, error in errors)
    mistake = DIGITS_LOST if digits else UNKNOWN
    if not any(bool(actual.count_nonzero()) for _, actual in tried[0].actual):
        mistake = NO_GRADIENT
    for order in subject.exchanged:
        with contextlib.suppress(Exception):  # the loss may refuse this order
            if any(is_right(one, gamma, temperature) for one in attempts(subject, order)):
                mistake = "the arguments with the names of student and teacher are exchanged"
    if mistake == UNKNOWN and (factor := common_factor(tried[0], constants)):
        mistake = f"the loss is {factor:.4g} times NKD"
    return report(subject, tried[0], constants, mistake)


def is_right(tried: Attempt, gamma: float | None, temperature: float | None) -> bool:
    constants = estimate(right, tried, gamma, temperature)
    return constants[0] > 1e-3 and not any(error for _, error in compare(right, tried, constants))


def by_its_class(subject: Subject, gamma: float | None, temperature: float | None) -> Result | None:
    """Return the result of an object's class if the class and the object itself are right, else None.

    The constructor may have computed other attributes from gamma and temperature; a change of these two misses those.
    The object is right if its gradient is that of NKD with two of its numbers.
    """
    own = Numbers(dict(subject.numbers), [], [], {})
    try:
        found = check(type(subject.loss), gamma, temperature)
        tried = [attempt(subject, order, own, None, None) for order in subject.orders]
    except Exception:  # the constructor may need other arguments
        return None
    for one in tried:
        constants = estimate(right, one, gamma, temperature)
        known = all(any(abs(x - number) < 1e-3 * x for number in subject.numbers.values()) for x in constants)
        if known and not found.mistake and is_right(one, gamma, temperature):
            note = f"each case has a new {type(subject.loss).__name__}"
            return found._replace(notes=[note, *found.notes])
    return None


def common_factor(tried: Attempt, constants: tuple[float, float]) -> float | None:
    """Return the number by which the right gradient is multiplied in every case, else None."""
    factors = []
    for case, actual in tried.actual:
        gamma = case.gamma if tried.gamma else constants[0]
        expected = gradient(right, case, gamma, case.temperature if tried.temperature else constants[1])
        factors.append(float((actual * expected).sum() / expected.square().sum()))
        if not is_close(actual, factors[0] * expected):
            return None
    return factors[0]


def side_mistake(tried: Attempt) -> str | None:
    """Return the mistake of a loss whose gradient is right, or None if it has no mistake."""
    if tried.into_teacher:
        return "gradient flows into the teacher: detach the teacher's logits"
    for name, default in tried.numbers.weights.items():
        if default != 1:
            return f"the default {name}={default:g} multiplies the loss or its target term: the paper's weight is 1"
    idle = [name for name in tried.numbers.without_effect if name.lower() in GAMMAS + TEMPERATURES]
    return f"{idle[0]} has no effect" if idle and not (tried.gamma and tried.temperature) else None


def report(subject: Subject, tried: Attempt, constants: tuple[float, float], mistake: str | None) -> Result:
    notes = [f"called as ({', '.join(tried.order)})"]
    for role, name, constant in zip(("gamma", "temperature"), (tried.gamma, tried.temperature), constants):
        notes.append(f"{role}: argument {name}" if name else f"{role}: {constant:.4g}, a constant in the loss")
    if mistake is None and tried.gamma is None and constants[1] != 1:
        squared = constants[0] * constants[1] ** 2
        notes.append(f"if gamma should be {squared:.4g}, the temperature squared is missing")
    weights = {name: default for name, default in tried.numbers.weights.items() if default != 1}
    notes += [f"{name}: {default:g} by default, 1 in the cases below" for name, default in weights.items()]
    varied = {tried.gamma, tried.temperature, *tried.numbers.without_effect, *weights}
    rest = {name: tried.numbers.base[name] for name in subject.numbers if name not in varied} | subject.others
    if rest:
        notes.append("not varied: " + ", ".join(f"{name}={value!r}" for name, value in rest.items()))
    lines = []
    for number, ((case, error), (_, actual)) in enumerate(zip(compare(right, tried, constants), tried.actual), 1):
        off = f"off by {error:.1%}" if actual.isfinite().all() else "not finite"
        verdict = f"wrong: the gradient is {off}" if error else "right"
        lines.append(f"{number:2} gamma {case.gamma:.4g}, temperature {case.temperature:g}, {case.name}: {verdict}")
    return Result(mistake, notes, lines)


# ---- the command --------------------------------------------------------------------------------------------------


def load(name: str) -> Any:
    path, _, function = name.rpartition(":")
    if not path and Path(name).is_file():
        raise FileNotFoundError(f"{name} without a function: expected path/to/file.py:function")
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
        raise AttributeError(f"{path} has no function or class {function!r}")
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", help="path/to/file.py:name of a function, class, instance or partial")
    parser.add_argument("--gamma", type=float, help="gamma, if it is a constant in the loss (default: estimated)")
    parser.add_argument(
        "--temperature", type=float, help="temperature, if it is a constant in the loss (default: estimated)"
    )
    args = parser.parse_args(argv)
    try:
        result = check(load(args.loss), args.gamma, args.temperature)
    except Exception as error:  # the user's file may raise any error
        if os.environ.get("KDLITE_TRACEBACK") == "1":
            traceback.print_exc()
        message = " ".join(str(error).split())
        print(f"kdlite.check: error: {args.loss}: {type(error).__name__}: {message}", file=sys.stderr)
        return 2
    right_everywhere = f"right: the gradient is the paper's in all {len(result.lines)} cases"
    print(f"wrong: {result.mistake}" if result.mistake else right_everywhere)
    print(*result.notes, *result.lines, sep="\n")
    return 1 if result.mistake else 0


if __name__ == "__main__":
    sys.exit(main())
