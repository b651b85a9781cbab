"""Test python -m kdlite.check, which compares a loss with NKD."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlite import check, nkd_loss

HAND = '''
import torch
import torch.nn.functional as F

def nkd_loss(student_logits, teacher_logits, target, gamma=1.5, temperature=1.0):
    """Compute NKD with a mask that removes the target."""
    teacher_logits = teacher_logits.detach()
    s, t = F.log_softmax(student_logits, 1), F.softmax(teacher_logits, 1)
    rows = torch.arange(len(target))
    target_term = -t[rows, target] * s[rows, target]
    others = torch.ones_like(s, dtype=torch.bool)
    others[rows, target] = False
    n = len(s), s.shape[1] - 1
    log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)
    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)
    return (target_term + gamma * temperature**2 * F.kl_div(log_n, n_t, reduction="none").sum(1)).mean()
'''
CHANGES = {  # code -> its replacement, and the mistake that the check prints
    "view(n) / temperature, 1)\n    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)": (
        "view(n) / temperature, 1)\n    log_n = F.log_softmax(student_logits / temperature, 1)\n"
        "    n_t = F.softmax(teacher_logits / temperature, 1)",
        "the target is kept in the non-target part",
    ),
    "log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)\n"
    "    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)": (
        "log_n = F.log_softmax(student_logits / temperature, 1)[others].view(n)\n"
        "    n_t = F.softmax(teacher_logits / temperature, 1)[others].view(n)",
        "the non-target part is not normalised",
    ),
    "log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)": (
        "log_n = F.softmax(student_logits[others].view(n) / temperature, 1).log()",
        "use log_softmax, not the log of a softmax",
    ),
    "gamma * temperature**2": ("gamma", "the non-target part lacks the temperature squared"),
    "temperature**2 *": ("temperature *", "has the temperature once, not squared"),
    "teacher_logits.detach()": ("teacher_logits", "gradient flows into the teacher"),
    ".mean()": (".sum()", "the loss returns the sum over the batch"),
    "-t[rows, target] * s[rows, target]": (
        "-t[rows, target] * s[rows, target].detach()",
        "the target term has no gradient",
    ),
    "s, t = F.log_softmax(student_logits, 1), F.softmax(teacher_logits, 1)": (
        "s, t = F.log_softmax(student_logits / temperature, 1), F.softmax(teacher_logits / temperature, 1)",
        "the target term is at the temperature",
    ),
    ".sum(1)).mean()\n": (".sum(1)).mean() / s.shape[1]\n", "the mean is over rows and classes"),
    "return (target_term": (
        "return F.cross_entropy(student_logits, target) + (target_term",
        "the loss contains the cross-entropy",
    ),
    "target_term + ": ("0.5 * target_term + ", "the mistake is not a known one"),
}


def function(text):
    names = {}
    exec(text, names)
    return names["nkd_loss"]


hand = function(HAND)


class Official(nn.Module):
    """Compute NKD in the form of the official code: a class, with two arguments that the loss ignores."""

    def __init__(self, name, use_this, temp=1.0, gamma=1.5):
        super().__init__()
        self.temp, self.gamma = temp, gamma

    def forward(self, logit_s, logit_t, gt_label):
        return hand(logit_s, logit_t, gt_label, self.gamma, self.temp)


class Callable:
    def __init__(self, T=4.0):
        self.T = T

    def __call__(self, teacher, student, y):
        return hand(student, teacher, y, 1.5, self.T)


class Product:
    """Compute gamma T^2 only once."""

    def __init__(self, gamma=1.5, temperature=1.0):
        self.gamma, self.temperature, self.factor = gamma, temperature, gamma * temperature**2

    def __call__(self, student, teacher, target):
        return hand(student, teacher, target, self.factor / self.temperature**2, self.temperature)


class Twice:
    """Write T * 2 for T ** 2, which is right only for T = 2."""

    def __init__(self, temperature):
        self.temperature = temperature

    def __call__(self, student, teacher, target):
        gamma = 1.5 * (self.temperature * 2) / self.temperature**2
        return hand(student, teacher, target, gamma, self.temperature)


@dataclasses.dataclass(frozen=True)
class Frozen:
    gamma: float = 1.5
    temperature: float = 2.0

    def __call__(self, student, teacher, target):
        return hand(student, teacher, target, self.gamma, self.temperature)


class Slots:
    __slots__ = ("temperature",)

    def __init__(self):
        self.temperature = 2.0

    def __call__(self, student, teacher, target):
        return hand(student, teacher, target, 1.5, self.temperature)


def divided(s, t, y, gamma, temperature, smallest):
    """Divide the teacher's probabilities by 1 - T_t, or by the smallest divisor, instead of masking the label."""
    mask = F.one_hot(y, s.shape[1]).bool()
    p = (t.detach() / temperature).softmax(1)
    n_t = (p / (1 - p[mask]).clamp(min=smallest)[:, None]).masked_fill(mask, 0)
    log_n = (s / temperature).masked_fill(mask, -1e9).log_softmax(1)
    return hand(s, t, y, 0.0) - gamma * temperature**2 * (n_t * log_n).sum(1).mean()


def reverse_kl(student, teacher, target, gamma=1.5, temperature=1.0):
    mask = F.one_hot(target, student.shape[1]).bool()
    s, t = ((x / temperature).masked_fill(mask, -1e9).log_softmax(1) for x in (student, teacher))
    rest = F.kl_div(t, s, log_target=True, reduction="batchmean")
    return hand(student, teacher, target, 0.0) + gamma * temperature**2 * rest


RIGHT = {  # a right loss, and the notes about its call
    "kdlite": (nkd_loss, ["gamma: argument gamma", "temperature: argument temperature"]),
    "a function": (hand, ["called as (student, teacher, target)"]),
    "a class": (Official, ["gamma: argument gamma", "temperature: argument temp"]),
    "an instance": (Official("nkd", True, 3.0, 3.5), ["gamma: argument gamma", "temperature: argument temp"]),
    "an object": (Callable(), ["called as (teacher, student, target)", "gamma: 1.5, a constant in the loss"]),
    "a partial": (functools.partial(hand, gamma=3.5, temperature=3.0), ["gamma: argument gamma"]),
    "other names": (lambda a, b, y, tau=1.0, lam=1.0: hand(a, b, y, lam, tau), ["gamma: argument lam"]),
    "unknown names": (lambda a, b, c, w=1.0, k=1.0: hand(a, b, c, w, k), ["temperature: argument k"]),
    "by position": (lambda s, t, y, alpha, T: hand(s, t, y, alpha, T), ["gamma: argument alpha"]),
    "other defaults": (lambda s, t, y, gamma=3.5, temp=3: hand(s, t, y, gamma, temp), ["temperature: argument temp"]),
    "the teacher first": (lambda a, b, target: hand(b, a, target), ["called as (teacher, student, target)"]),
    "the target first": (lambda label, a, b: hand(a, b, label), ["called as (target, student, teacher)"]),
    "a later target": (lambda a, b, T=1.0, target=None: hand(a, b, target, 1.5, T), ["temperature: argument T"]),
    "constants": (lambda s, t, y: hand(s, t, y, 3.5, 3.0), ["gamma: 3.5, a constant in the loss"]),
    "a weight": (lambda s, t, y, weight=1.0, T=1.0, g=1.5: weight * hand(s, t, y, g, T), ["not varied: weight=1.0"]),
    "a weight of the target term": (
        lambda s, t, y, alpha=1.0, gamma=1.5: alpha * hand(s, t, y, 0.0) + hand(s, t, y, gamma) - hand(s, t, y, 0.0),
        ["gamma: argument gamma", "not varied: alpha=1.0"],
    ),
    "a reduction": (lambda s, t, y, reduction="mean": hand(s, t, y), ["not varied: reduction='mean'"]),
    "keywords only": (
        lambda *, student, teacher, target, tau=1.0: hand(student, teacher, target, 1.5, tau),
        ["called as (student, teacher, target)", "temperature: argument tau"],
    ),
    "a cross-entropy that is off by default": (
        lambda s, t, y, gamma=1.5, ce_weight=0.0: hand(s, t, y, gamma) + ce_weight * F.cross_entropy(s, y),
        ["gamma: argument gamma", "temperature: 1, a constant in the loss", "not varied: ce_weight=0.0"],
    ),
    "a dropout": (
        lambda s, t, y, gamma=1.5, tau=1.0, p=0.0: hand(F.dropout(s, p), t, y, gamma, tau),
        ["gamma: argument gamma", "temperature: argument tau", "not varied: p=0.0"],
    ),
    "a constant temperature between those of the grid": (
        lambda s, t, y: hand(s, t, y, 1.5, 2.2),
        ["gamma: 1.5, a constant in the loss", "temperature: 2.2, a constant in the loss"],
    ),
    "an object with a product of its numbers": (
        Product(3.5, 3.0),
        ["each case has a new Product", "gamma: argument gamma", "temperature: argument temperature"],
    ),
    "an object with a product at temperature 1": (Product(), ["each case has a new Product"]),
    "labels with a teacher in their name": (
        lambda student_logits, teacher_logits, teacher_labels: hand(student_logits, teacher_logits, teacher_labels),
        ["called as (student, teacher, target)"],
    ),
    "a frozen dataclass": (Frozen(), ["gamma: argument gamma", "temperature: argument temperature"]),
    "an object with slots": (Slots(), ["gamma: 1.5, a constant in the loss", "temperature: 2, a constant in the loss"]),
    "positional only": (lambda *tensors: hand(*tensors), ["gamma: 1.5, a constant in the loss"]),
}


def test_an_object_with_a_wrong_option_is_wrong_if_its_class_is_right_by_default():
    class Optional:
        def __init__(self, gamma=1.5, temperature=2.0, square=True):
            self.gamma, self.temperature = gamma, temperature
            self.power = 2 if square else 1

        def __call__(self, student, teacher, target):
            gamma = self.gamma * self.temperature ** (self.power - 2)
            return hand(student, teacher, target, gamma, self.temperature)

    assert check.check(Optional).mistake is None
    assert "once, not squared" in check.check(Optional(square=False)).mistake


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_loss_is_right_in_all_twenty_cases(kind):
    loss, notes = RIGHT[kind]
    result = check.check(loss)
    assert result.mistake is None
    assert len(result.lines) == 20
    assert all(line.endswith(": right") for line in result.lines)
    assert set(notes) <= set(result.notes)


def half_of_the_target_term(s, t, y, alpha=0.5, gamma=1.5):
    return alpha * hand(s, t, y, 0.0) + hand(s, t, y, gamma) - hand(s, t, y, 0.0)


@pytest.mark.parametrize(
    ("loss", "weight"),
    [
        (lambda s, t, y, weight=2.0, T=1.0, g=1.5: weight * hand(s, t, y, g, T), "weight=2"),
        (half_of_the_target_term, "alpha=0.5"),
        (functools.partial(half_of_the_target_term, alpha=3.0), "alpha=3"),
    ],
)
def test_a_default_weight_other_than_1_is_a_mistake_even_if_weight_1_gives_the_right_gradient(loss, weight):
    result = check.check(loss)
    assert result.mistake == f"the default {weight} multiplies the loss or its target term: the paper's weight is 1"
    assert f"{weight.replace('=', ': ')} by default, 1 in the cases below" in result.notes
    assert not any(note.startswith("not varied: ") for note in result.notes)
    assert all(line.endswith(": right") for line in result.lines)


@pytest.mark.slow
@pytest.mark.parametrize("written", CHANGES)
def test_the_check_prints_the_name_of_a_mistake(written):
    instead, named = CHANGES[written]
    assert HAND.count(written) == 1
    result = check.check(function(HAND.replace(written, instead)))
    assert named in result.mistake
    assert len(result.lines) == 20


def others(s, t, y, gamma, temperature):
    return hand(s, t, y, gamma, temperature) - hand(s, t, y, 0.0, temperature)


def target_of(s, y):
    return s.softmax(1).gather(1, y[:, None]).squeeze(1)


def binary_kl(s, t, y, epsilon=1e-7):
    p, q = target_of(s, y), target_of(t, y).detach()
    return (q * (q / p.clamp(min=epsilon)).log() + (1 - q) * ((1 - q) / (1 - p).clamp(min=epsilon)).log()).mean()


def mean_of_classes(s, t, y, gamma, temperature):
    mask = ~F.one_hot(y, s.shape[1]).bool()
    s, t = (x[mask].view(len(y), -1) / temperature for x in (s, t.detach()))
    log_s, t = s.log_softmax(1), t.softmax(1)
    return gamma * temperature**2 * F.kl_div(log_s, t, reduction="none").mean()


def with_epsilon(s, t, y, gamma, temperature, epsilon=1e-6):
    mask = F.one_hot(y, s.shape[1]).bool()
    n_s, n_t = ((x / temperature).masked_fill(mask, -torch.inf).softmax(1) for x in (s, t.detach()))
    rest = (n_t * (n_s + epsilon).log()).masked_fill(mask, 0.0).sum(1)
    return (-target_of(t, y).detach() * (target_of(s, y) + epsilon).log() - gamma * temperature**2 * rest).mean()


WRONG = {  # losses with other argument names, and the mistake of each
    "no square": (lambda a, b, y, temp=1.0: hand(a, b, y, 1.5 / temp**2, temp), "lacks the temperature squared"),
    "no square, unknown names": (
        lambda a, b, c, w=1.5, k=1.0: hand(a, b, c, w / k**2, k),
        "lacks the temperature squared",
    ),
    "only the teacher": (
        lambda s, t, y, lam=1.0, alpha=1.5: hand(s, t, y, 0.0) + lam**2 * others(s, t / lam, y, alpha, 1.0),
        "only the teacher's logits are divided by the temperature",
    ),
    "gamma ignored": (lambda s, t, y, tau=1.0, gamma=1.5: hand(s, t, y, 1.5, tau), "gamma has no effect"),
    "temperature ignored": (lambda s, t, y, T=4.0: hand(s, t, y), "T has no effect"),
    "one term": (lambda s, t, y: hand(s, t, y, 0.0), "the non-target part is missing"),
    "fasterai": (
        lambda pred, teacher_pred, T=4, alpha=1.0, beta=8.0, target=None: (
            alpha * T**2 * binary_kl(pred / T, teacher_pred / T, target) + others(pred, teacher_pred, target, beta, T)
        ),
        "DKD's binary KL at the temperature",
    ),
    "DeepKD": (
        lambda s, t, y, gamma=1.5: (
            target_of(t, y).mean().detach() * F.cross_entropy(s, y) + others(s, t, y, gamma, 1.0)
        ),
        "the batch mean of the teacher's probability as its factor",
    ),
    "cross-entropy": (
        lambda s, t, y, gamma=1.5: F.cross_entropy(s, y) + others(s, t, y, gamma, 1.0),
        "the target term is the cross-entropy",
    ),
    "epsilon": (lambda s, t, y, gamma=1.5, temp=1.0: with_epsilon(s, t, y, gamma, temp), "log(p + epsilon)"),
    "kl mean": (
        lambda s, t, y, gamma=1.5, temp=1.0: hand(s, t, y, 0.0) + mean_of_classes(s, t, y, gamma, temp),
        'a mean over the non-target classes, as by kl_div(reduction="mean")',
    ),
    "an unknown use of a number": (
        lambda s, t, y, gamma=1.5, k=1.0: hand(s, t, y, gamma, 1.0) + (k - 1) * s.square().mean(),
        "not a known one",
    ),
    "a division by 1 - T_t": (lambda s, t, y, g=1.5, T=1.0: divided(s, t, y, g, T, 0.0), "loses digits"),
    "a division by at least 0.01": (lambda s, t, y, g=1.5, T=1.0: divided(s, t, y, g, T, 0.01), "loses digits"),
    "multiplied by a mask": (
        lambda s, t, y, gamma=1.5, T=1.0: (
            hand(s, t, y, 0.0)
            + gamma
            * T**2
            * F.kl_div(
                *((x.scatter(1, y[:, None], 0.0) / T).log_softmax(1) for x in (s, t.detach())),
                log_target=True,
                reduction="batchmean",
            )
        ),
        "the target's logit is 0 in the non-target part",
    ),
    "an object that is right only with its own numbers": (Twice(2.0), "has the temperature once, not squared"),
    "exchanged names": (lambda teacher, student, y: hand(teacher, student, y), "are exchanged"),
    "half": (lambda s, t, y, gamma=1.5, T=1.0: 0.5 * hand(s, t, y, gamma, T), "the loss is 0.5 times NKD"),
    "a reverse KL, with the teacher's gradient": (reverse_kl, "not a known one"),
    "no_grad": (torch.no_grad()(hand), "the student's logits get no gradient"),
    "a detached student": (lambda s, t, y: hand(s.detach(), t, y), "the student's logits get no gradient"),
    "a detached student, not the teacher": (
        lambda s, t, y: check.right(s.detach(), t, y, 1.5, 1.0) + 0 * t.sum(),
        "the student's logits get no gradient",
    ),
    "a new tensor": (lambda s, t, y: torch.tensor(hand(s, t, y).item()), "the student's logits get no gradient"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", WRONG)
def test_the_names_of_the_arguments_do_not_hide_a_mistake(kind):
    loss, mistake = WRONG[kind]
    assert mistake in check.check(loss).mistake


def test_no_two_formulas_of_the_table_have_the_same_gradient():
    probe = check.cases()[0]
    found = [(words, check.gradient(formula, probe, 3.5, 2.0)) for words, formula in check.FORMULAS]
    found.append(("right", check.gradient(check.right, probe, 3.5, 2.0)))
    for i, (words, gradient) in enumerate(found):
        same = [name for name, other in found[:i] if name != words and check.is_close(gradient, other)]
        # two may be close if one has an epsilon, which hardly changes the gradient
        assert not same or "epsilon" in words + same[0], (words, same)


def test_classic_distillation_is_recognised():
    def kd(student, teacher, target, temperature=4.0):
        log_s, t = (student / temperature).log_softmax(1), (teacher.detach() / temperature).softmax(1)
        return temperature**2 * F.kl_div(log_s, t, reduction="batchmean")

    assert check.check(kd).mistake == "this is classic temperature KD, not NKD"


def test_constants_that_are_given_are_not_estimated():
    loss = RIGHT["constants"][0]
    assert check.check(loss, gamma=3.5, temperature=3.0).mistake is None
    assert check.check(loss, gamma=3.5, temperature=1.0).mistake is not None
    without_square = functools.partial(lambda s, t, y: hand(s, t, y, 3.5 / 9, 3.0))
    assert "if gamma should be 3.5, the temperature squared is missing" in check.check(without_square).notes
    assert "lacks the temperature squared" in check.check(without_square, gamma=3.5, temperature=3.0).mistake


@pytest.mark.slow
def test_the_command_prints_the_verdict_first_and_exits_with_0_for_a_right_loss(tmp_path):
    (tmp_path / "mine.py").write_text(HAND)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    command = [sys.executable, "-m", "kdlite.check", "mine.py:nkd_loss"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "right: the gradient is the paper's in all 20 cases"
    assert lines[1] == "called as (student, teacher, target)"
    assert sum(line.endswith(": right") for line in lines) == 20


def test_the_command_exits_with_1_after_a_mistake_and_with_2_if_it_cannot_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.py").write_text(HAND.replace("gamma * temperature**2", "gamma"))
    assert check.main(["wrong.py:nkd_loss"]) == 1
    assert capsys.readouterr().out.splitlines()[0] == "wrong: the non-target part lacks the temperature squared"
    assert check.main(["wrong.py:nothing"]) == 2
    error = "AttributeError: wrong.py has no function or class 'nothing'\n"
    assert capsys.readouterr().err == f"kdlite.check: error: wrong.py:nothing: {error}"


def test_a_loss_that_returns_rows_is_an_error(tmp_path, capsys):
    (tmp_path / "rows.py").write_text("import torch\ndef loss(s, t, y): return s.sum(1)\n")
    assert check.main([f"{tmp_path}/rows.py:loss"]) == 2
    assert "must return the mean over the batch, one value, got shape (8,)" in capsys.readouterr().err


def test_a_loss_that_is_wrong_in_one_case_is_wrong():
    def almost(student, teacher, target, gamma, temperature):
        loss = nkd_loss(student, teacher, target, gamma=gamma, temperature=temperature)
        return loss * (1.01 if student.shape[1] == 100 and temperature == 3 else 1.0)

    result = check.check(almost)
    assert [line for line in result.lines if "wrong: the gradient is off by 1.0%" in line]
    assert result.mistake is not None
