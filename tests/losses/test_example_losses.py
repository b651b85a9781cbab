"""Compare examples/losses.py with loops over floats, written from the papers."""

import math
import sys
from pathlib import Path

import pytest
import torch
from oracle import log_softmax, softmax
from test_losses import inputs

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import losses


def kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)


def dkd(s, t, y):
    s, t = softmax(s, 4.0), softmax(t, 4.0)
    others = [i for i in range(len(s)) if i != y]
    target = kl((t[y], 1 - t[y]), (s[y], 1 - s[y]))
    non_target = kl([t[i] / (1 - t[y]) for i in others], [s[i] / (1 - s[y]) for i in others])
    return 16 * (target + 8 * non_target)


def standardised(row):
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row))
    return [(x - mean) / deviation for x in row]


def standardised_kd(s, t, y):
    return 9 * 4 * kl(softmax(standardised(t), 2.0), softmax(standardised(s), 2.0))


def wttm(s, t, y):
    powers = [p ** (1 / 4) for p in softmax(t)]
    total = math.fsum(powers)
    return total * kl([p / total for p in powers], softmax(s))


def tf_kd(s, t, y):
    made = [math.log(0.99 if i == y else 0.01 / (len(s) - 1)) for i in range(len(s))]
    return 400 * kl(softmax(made, 20.0), softmax(s, 20.0))


def ps_kd(s, t, y):
    """Return the cross-entropy with the paper's soft targets, minus the cross-entropy with the label."""
    log_s = log_softmax(s)
    soft = [0.8 * p + 0.2 * (i == y) for i, p in enumerate(softmax(t))]
    return -math.fsum(a * b for a, b in zip(soft, log_s)) + log_s[y]


@pytest.mark.parametrize("expected", [dkd, standardised_kd, wttm, tf_kd, ps_kd])
@pytest.mark.parametrize("classes", [2, 7])
def test_a_loss_equals_its_formula(expected, classes):
    student, teacher, target = inputs(9, classes)
    actual = getattr(losses, expected.__name__)(student, teacher, target)
    rows = zip(student.tolist(), teacher.tolist(), target.tolist())
    torch.testing.assert_close(actual, torch.tensor([expected(*row) for row in rows], dtype=torch.float64))


def pearson(a, b):
    a, b = ([x - math.fsum(v) / len(v) for x in v] for v in (a, b))
    return math.fsum(x * y for x, y in zip(a, b)) / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def test_dist_equals_its_formula():
    student, teacher, target = inputs(6, 5)
    s, t = ([softmax(row, 2.0) for row in x.tolist()] for x in (student, teacher))
    rows = math.fsum(1 - pearson(a, b) for a, b in zip(s, t)) / 6
    columns = math.fsum(1 - pearson(a, b) for a, b in zip(zip(*s), zip(*t))) / 5
    loss = losses.dist(student, teacher, target, beta=2.0, gamma=3.0, temperature=2.0)
    assert loss.item() == pytest.approx(4 * (2 * rows + 3 * columns), rel=1e-9)


@pytest.mark.parametrize("name", ["dkd", "standardised_kd", "wttm", "dist", "tf_kd", "ps_kd"])
def test_losses_and_gradients_are_finite_for_probabilities_near_1(name):
    student = (1e4 * torch.eye(4)).requires_grad_()
    teacher = 1e4 * torch.eye(4).flip(0)
    loss = getattr(losses, name)(student, teacher, torch.tensor([0, 1, 2, 0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert student.grad.isfinite().all()


def test_a_loss_is_short_and_cites_its_paper():
    import inspect

    for name in ("dkd", "standardised_kd", "wttm", "dist", "tf_kd", "ps_kd"):
        function = getattr(losses, name)
        lines = [
            line for line in inspect.getsource(function).replace(function.__doc__, "").splitlines() if line.strip()
        ]
        assert len(lines) <= 15
        assert "arXiv" in function.__doc__
