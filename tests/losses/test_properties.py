"""Test properties of the losses with random inputs from hypothesis. `make test-all` draws more inputs."""

import math
import os
import subprocess
import sys

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch.nn import functional as F

from kdlite import nkd_loss, uskd_loss

BOTH = pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
PROFILE = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.register_profile("few", max_examples=25, **PROFILE)
settings.register_profile("many", max_examples=500, **PROFILE)
settings.load_profile(os.environ.get("KDLITE_EXAMPLES", "few"))
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
IGNORED = -100


# ---- drawn inputs --------------------------------------------------------------------------------------------------


@st.composite
def cases(draw, dtypes=DTYPES, largest=1e4, ranks=(1, 2, 3)):
    """Draw two logits tensors of one shape, class indices, and a mask of the indices that are not ignored."""
    rank, n, c, d = draw(st.sampled_from(ranks)), *(draw(st.integers(low, 5)) for low in (1, 2, 1))
    shape = {1: (c,), 2: (n, c), 3: (n, c, d)}[rank]
    label_shape = {1: (), 2: (n,), 3: (n, d)}[rank]
    dtype = draw(st.sampled_from(dtypes))
    scale = draw(st.sampled_from([0.0, 1.0, 30.0, largest]))
    size, count = math.prod(shape), math.prod(label_shape)
    # multiples of scale / 64, so that ties are frequent
    values = st.lists(st.integers(-64, 64), min_size=size, max_size=size)
    a, b = (scale / 64 * torch.tensor(draw(values), dtype=torch.float64).reshape(shape) for _ in range(2))
    target = draw(st.lists(st.integers(0, c - 1), min_size=count, max_size=count))
    valid = torch.tensor([draw(st.sampled_from([True, True, i % 2 == 0, i > 0, False])) for i in range(count)])
    target, valid = torch.tensor(target).reshape(label_shape), valid.reshape(label_shape)
    return a.to(dtype), b.to(dtype), target.where(valid, IGNORED), valid


def gradients(loss, a, b, target, **options):
    """Return the loss and its gradients: two for USKD, one for NKD, whose teacher has no gradient."""
    a, b = a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_()
    value = loss(a, b, target, **options)
    grads = torch.autograd.grad(value.sum(), (a, b), allow_unused=True)
    return value.detach(), [grad for grad in grads if grad is not None]


def attempt(call, *refusals):
    """Return (result, None) of a call, or (None, error) if the call raises one of `refusals`."""
    try:
        return call(), None
    except refusals as error:
        return None, error


def one_hot(target, valid, c):
    return F.one_hot(target.where(valid, 0), c).movedim(-1, min(1, target.ndim)).double()


# ---- losses -------------------------------------------------------------------------------------------------------


@BOTH
@given(cases(), st.sampled_from(["none", "sum"]))
def test_a_loss_and_its_gradients_are_finite(loss, case, reduction):
    a, b, target, valid = case
    value, grads = gradients(loss, a, b, target, reduction=reduction)
    assert value.isfinite().all()
    assert value.dtype == torch.promote_types(a.dtype, torch.float32)
    assert all(grad.isfinite().all() and grad.dtype == a.dtype for grad in grads)
    for grad in grads:
        rows = grad.movedim(min(1, grad.ndim - 1), -1).reshape(-1, a.shape[min(1, a.ndim - 1)])
        assert not rows[~valid.reshape(-1)].any(), "an ignored target has a gradient"


HALF_IGNORED = (torch.eye(2, 3), torch.ones(2, 3), torch.tensor([1, IGNORED]), torch.tensor([True, False]))


@BOTH
@given(cases(), st.booleans())
@example(HALF_IGNORED, False)
def test_reductions_are_the_sum_and_the_mean_of_the_rows(loss, case, soft):
    a, b, target, valid = case
    c = a.shape[min(1, a.ndim - 1)]
    target = one_hot(target, valid, c) if soft else target
    rows, total, mean = (loss(a, b, target, reduction=how).double() for how in ("none", "sum", "mean"))
    count = valid.numel() if soft else int(valid.sum())
    assert rows.shape == valid.shape
    torch.testing.assert_close(total, rows.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, total / count, rtol=1e-5, atol=1e-5, equal_nan=True)
    if not soft:
        assert not rows[~valid].any()


@BOTH
@given(cases(dtypes=[torch.float32, torch.float64], largest=100), st.integers(-10, 10))
def test_a_shift_common_to_all_classes_changes_nothing(loss, case, shift):
    a, b, target, _ = case
    value, grads = gradients(loss, a, b, target, reduction="none")
    moved, moved_grads = gradients(loss, a + shift, b - 2 * shift, target, reduction="none")
    # because float32 rounds a + shift to 2^-17
    tolerance = dict(rtol=1e-4, atol=1e-4) if a.dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(moved, value, **tolerance)
    for one, other in zip(moved_grads, grads):
        torch.testing.assert_close(one, other, **tolerance)


@BOTH
@given(cases(dtypes=[torch.float64], largest=200))
def test_a_one_hot_target_gives_the_loss_of_its_class_index(loss, case):
    a, b, target, _ = case
    target = target.clamp(min=0)
    soft = one_hot(target, target >= 0, a.shape[min(1, a.ndim - 1)])
    value, grads = gradients(loss, a, b, target, reduction="none")
    same, same_grads = gradients(loss, a, b, soft, reduction="none")
    torch.testing.assert_close(same, value, rtol=1e-9, atol=1e-9)
    for one, other in zip(same_grads, grads):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@given(cases(dtypes=[torch.float64], ranks=(2,)), st.sampled_from([0.0, 1.5]), st.sampled_from([0.5, 1.0, 3.0]))
def test_nkd_equals_the_formula(case, gamma, temperature):
    a, b, target, valid = case
    rows, (grad,) = gradients(nkd_loss, a, b, target, gamma=gamma, temperature=temperature, reduction="none")
    for i in range(len(a)):
        expected = oracle.nkd_row(a[i].tolist(), b[i].tolist(), target[i], gamma, temperature) if valid[i] else 0
        assert rows[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
        if valid[i]:
            expected = oracle.nkd_row_gradient(a[i].tolist(), b[i].tolist(), target[i], gamma, temperature)
            assert grad[i].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(cases(dtypes=[torch.float64], largest=30, ranks=(2,)), st.sampled_from([0.0, 0.1, 1.0]))
def test_uskd_of_the_rows_that_are_not_ignored_equals_the_formula(case, smoothing):
    a, b, target, valid = case
    # make the logits differ, because the formula does not order classes that tie
    a = a + 0.01 * torch.arange(a.shape[1]) + 0.003 * torch.arange(len(a)).unsqueeze(1)
    options = dict(alpha=0.9, beta=0.3, mu=0.2, label_smoothing=smoothing)
    rows = uskd_loss(a, b, target, **options, reduction="none")
    targets = one_hot(target, valid, a.shape[1])[valid].tolist()
    if not targets:
        assert not rows.any()
        return
    expected = oracle.uskd_rows(a[valid].tolist(), b[valid].tolist(), targets, *options.values())
    assert rows[valid].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


# ---- targets ------------------------------------------------------------------------------------------------------


EVERY_DTYPE = [*DTYPES, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64]
SHAPES = st.lists(st.integers(0, 3), max_size=4)
ARRAYS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, st.sampled_from(EVERY_DTYPE))
OBJECTS = st.one_of(
    ARRAYS,
    st.none(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 2), max_size=3),
    st.builds(dict),
    st.builds(lambda array: array.tolist(), ARRAYS),
    st.builds(lambda array: array.numpy() if array.dtype != torch.bfloat16 else array, ARRAYS),
)


@BOTH
@given(st.sampled_from([(3,), (2, 3), (2, 3, 2), (0, 3), (2, 1)]), OBJECTS, st.sampled_from(["none", "mean", "sum"]))
def test_any_target_is_computed_or_refused(loss, shape, target, reduction):
    logits = torch.zeros(shape)
    value, refusal = attempt(lambda: loss(logits, logits, target, reduction=reduction), TypeError, ValueError)
    assert str(refusal) if refusal else value.dtype == torch.float32


@BOTH
@given(OBJECTS, OBJECTS, OBJECTS)
def test_any_logits_are_computed_or_refused(loss, a, b, target):
    value, refusal = attempt(lambda: loss(a, b, target), TypeError, ValueError)
    assert str(refusal) if refusal else value.isfinite() | value.isnan()  # the mean over no target is NaN


@BOTH
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=4))
def test_a_loss_refuses_each_class_index_that_cross_entropy_refuses(loss, target):
    target, logits = torch.tensor(target), torch.zeros(len(target), 3)
    try:
        expected = F.cross_entropy(logits, target, reduction="sum").shape
    except (IndexError, RuntimeError):
        with pytest.raises((IndexError, RuntimeError)):
            loss(logits, logits, target, reduction="sum")
    else:
        assert loss(logits, logits, target, reduction="sum").shape == expected


@pytest.mark.trial
def test_the_properties_hold_for_many_examples():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "not trial", __file__]
    done = subprocess.run(command, env=os.environ | {"KDLITE_EXAMPLES": "many"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
