"""Test nkd_loss and uskd_loss: values, gradients, inputs and errors.

Most tests run for both losses: ``loss(a, b, target)`` is nkd_loss with student and teacher logits, or uskd_loss with
strong and weak logits.
"""

import functools
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from kdlite import nkd_linear_loss, nkd_loss, uskd_loss

BOTH = pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
DEVICES = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))],
)


def inputs(n, c, *trailing, std=2.0, dtype=torch.float64, seed=0, device="cpu"):
    """Return two logits tensors and class indices."""
    g = torch.Generator().manual_seed(seed)
    a, b = (std * torch.randn(n, c, *trailing, generator=g, dtype=torch.float64) for _ in range(2))
    target = torch.randint(c, (n, *trailing), generator=g)
    return a.to(device, dtype), b.to(device, dtype), target.to(device)


def mixed_targets(target, c, seed=0):
    """Return targets like mixup's: most rows have two labels, and the first row is one-hot."""
    g = torch.Generator().manual_seed(seed)
    lam = torch.rand(len(target), 1, generator=g, dtype=torch.float64)
    lam[0] = 1.0
    return lam * F.one_hot(target, c) + (1 - lam) * F.one_hot(target.flip(0), c)


def gradients(loss, a, b, target, **options):
    """Return the loss and its gradients: two for USKD, one for NKD, whose teacher has no gradient."""
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = loss(a, b, target, **options)
    grads = torch.autograd.grad(value.sum(), (a, b), allow_unused=True)
    return value.detach(), [grad for grad in grads if grad is not None]


def relative_l2(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


# ---- the formulas ----


@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("c", [2, 3, 50])
def test_nkd_equals_the_formula(c, temperature, std):
    student, teacher, target = inputs(16, c, std=std)
    actual = nkd_loss(student, teacher, target, gamma=1.7, temperature=temperature, reduction="none")
    expected = [
        oracle.nkd_row(s, t, y, 1.7, temperature)
        for s, t, y in zip(student.tolist(), teacher.tolist(), target.tolist())
    ]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize("c", [2, 3, 50])
def test_uskd_equals_the_formula(c, std):
    strong, weak, target = inputs(16, c, std=std)
    options = dict(alpha=0.9, beta=0.3, mu=0.2, label_smoothing=0.15)
    actual = uskd_loss(strong, weak, target, **options, reduction="none")
    expected = oracle.uskd_rows(strong.tolist(), weak.tolist(), F.one_hot(target, c).tolist(), *options.values())
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [2, 3, 50])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["mixed", "smoothed", "dense"])
def test_nkd_of_soft_targets_is_the_expectation_over_the_label(c, temperature, kind):
    student, teacher, target = inputs(16, c, std=4.0)
    soft = {
        "mixed": mixed_targets(target, c),
        "smoothed": 0.9 * F.one_hot(target, c) + 0.1 / c,
        "dense": inputs(16, c, seed=1)[0].softmax(1),
    }[kind]
    actual = nkd_loss(student, teacher, soft, gamma=1.7, temperature=temperature, reduction="none")
    expected = [
        sum(v * oracle.nkd_row(s, t, k, 1.7, temperature) for k, v in enumerate(row) if v)
        for s, t, row in zip(student.tolist(), teacher.tolist(), soft.tolist())
    ]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("c", [2, 3, 50])
def test_uskd_of_soft_targets_is_the_documented_formula(c):
    strong, weak, target = inputs(16, c)
    soft = 0.97 * mixed_targets(target, c) + 0.03 / c
    options = dict(alpha=0.9, beta=0.3, mu=0.2, label_smoothing=0.15)
    actual = uskd_loss(strong, weak, soft, **options, reduction="none")
    expected = oracle.uskd_rows(strong.tolist(), weak.tolist(), soft.tolist(), *options.values())
    # skip rows in which two classes share the second largest probability, because the formula allows either class
    rows = torch.tensor([sorted(row)[-2] > sorted([-1.0, *row])[-3] for row in soft.tolist()])
    assert rows.sum() >= 10
    torch.testing.assert_close(actual[rows], torch.tensor(expected, dtype=torch.float64)[rows], rtol=1e-9, atol=1e-9)


@BOTH
@pytest.mark.parametrize("margin", [0.0, 20.0])  # 20: both models are nearly certain of a right or wrong class
def test_one_hot_targets_give_the_hard_label_loss(loss, margin):
    a, b, target = inputs(32, 10)
    a, b = a + margin * F.one_hot(target.roll(3), 10), b + margin * F.one_hot(target.roll(5), 10)
    a[:8] += 2 * margin * F.one_hot(target[:8], 10)
    hard, hard_grads = gradients(loss, a, b, target, reduction="none")
    soft, soft_grads = gradients(loss, a, b, F.one_hot(target, 10).double(), reduction="none")
    torch.testing.assert_close(soft, hard, rtol=1e-9, atol=1e-9)
    for s, h in zip(soft_grads, hard_grads):
        torch.testing.assert_close(s, h, rtol=1e-9, atol=1e-9)


def test_nkd_of_mixup_is_the_mix_of_two_losses():
    student, teacher, target = inputs(8, 20)
    other = target.flip(0)
    mixed = 0.3 * F.one_hot(target, 20) + 0.7 * F.one_hot(other, 20)
    torch.testing.assert_close(
        nkd_loss(student, teacher, mixed),
        0.3 * nkd_loss(student, teacher, target) + 0.7 * nkd_loss(student, teacher, other),
    )


def test_uskd_of_mixup_ranks_the_classes_once_for_each_label():
    strong, weak, target = inputs(8, 20)
    other = (target + 1) % 20
    mixed = 0.3 * F.one_hot(target, 20) + 0.7 * F.one_hot(other, 20)
    only_ranking = functools.partial(uskd_loss, strong, weak, alpha=0.0, beta=1.0, mu=0.0)
    torch.testing.assert_close(only_ranking(mixed), 0.3 * only_ranking(target) + 0.7 * only_ranking(other))


def test_uskd_ranks_by_probabilities_instead_of_log_probabilities():
    """Use a row where class 1 comes before class 2 by probabilities, and after class 2 by log-probabilities."""
    strong = torch.tensor([[4.5, -0.5, 1.0, 1.5]], dtype=torch.float64)
    weak = torch.tensor([[-1.0, 0.0, -1.5, -1.0]], dtype=torch.float64)
    s, w = strong.softmax(1)[0], weak.softmax(1)[0]
    by_probability = [w[i] / (1 - w[0]) + s[i] / (1 - s[0]) for i in (1, 2, 3)]
    by_log_probability = [w[i] / (1 - w[0]) + s[i].log() / (1 - s[0].log()) for i in (1, 2, 3)]
    assert by_probability[0] > by_probability[1]
    assert by_log_probability[0] < by_log_probability[1]

    ranks = 1 + torch.stack(by_probability).argsort(descending=True).argsort()
    target_rank = 1 + sum(r > w[0] / (1 - w[0]) + s[0] / (1 - s[0]) for r in by_probability)
    reciprocal = 1 / (ranks + (ranks >= target_rank))  # the ranking includes the target
    expected = -(reciprocal / reciprocal.sum() * strong[0, 1:].log_softmax(0)).sum()
    torch.testing.assert_close(uskd_loss(strong, weak, torch.tensor([0]), alpha=0.0, beta=1.0, mu=0.0), expected)


@pytest.mark.parametrize("c", [2, 10])
def test_the_non_target_term_is_zero_only_with_two_classes(c):
    student, teacher, target = inputs(8, c)
    with_non_target = nkd_loss(student, teacher, target, gamma=100.0)
    assert (with_non_target == nkd_loss(student, teacher, target, gamma=0.0)).item() is (c == 2)


def test_uskd_target_weights_average_to_one():
    """Use equal rows: every weight is 1, so the target term is the cross-entropy."""
    strong, weak, _ = inputs(1, 10)
    target = torch.full((6,), 3)
    strong, weak = strong.expand(6, -1), weak.expand(6, -1)
    torch.testing.assert_close(
        uskd_loss(strong, weak, target, alpha=1.0, beta=0.0, mu=0.0), F.cross_entropy(strong, target)
    )


def test_uskd_weak_term_is_label_smoothed_cross_entropy():
    strong, weak, target = inputs(8, 10)
    torch.testing.assert_close(
        uskd_loss(strong, weak, target, alpha=0.0, beta=0.0, mu=0.5, label_smoothing=0.2),
        0.5 * F.cross_entropy(weak, target, label_smoothing=0.2),
    )


# ---- gradients ----


@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_nkd_gradient_is_exact_in_float32(std, offset, temperature):
    student, teacher, target = inputs(64, 200, std=std, dtype=torch.float32)
    student, teacher = student + offset, teacher + offset
    _, (actual,) = gradients(nkd_loss, student, teacher, target, temperature=temperature)
    rows = zip(student.double().tolist(), teacher.double().tolist(), target.tolist())
    expected = [oracle.nkd_row_gradient(s, t, y, 1.5, temperature) for s, t, y in rows]
    assert relative_l2(actual, torch.tensor(expected, dtype=torch.float64) / 64) < 1e-6


@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_the_uskd_gradient_is_exact_in_float32(std, offset):
    strong, weak, target = inputs(64, 200, std=std, dtype=torch.float32)
    strong, weak = strong + offset, weak + offset
    _, actual = gradients(uskd_loss, strong, weak, target)
    expected = oracle.uskd_gradient(
        strong.double().tolist(), weak.double().tolist(), target.tolist(), 1.0, 0.1, 0.005, 0.1
    )
    for a, e in zip(actual, expected):
        assert relative_l2(a, torch.tensor(e, dtype=torch.float64)) < 1e-6


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_nkd_passes_gradcheck_and_gradgradcheck(soft, temperature):
    student, teacher, target = inputs(4, 5, std=1.0)
    target = mixed_targets(target, 5) if soft else target

    def of_student(s):
        return nkd_loss(s, teacher, target, temperature=temperature)

    student.requires_grad_()
    assert torch.autograd.gradcheck(of_student, student)
    assert torch.autograd.gradgradcheck(of_student, student)


def test_uskd_gradient_treats_weights_and_ranking_as_constants():
    strong, weak, target = inputs(8, 10)
    _, actual = gradients(uskd_loss, strong, weak, target, alpha=0.7, beta=0.4, mu=0.3)
    expected = oracle.uskd_gradient(strong.tolist(), weak.tolist(), target.tolist(), 0.7, 0.4, 0.3, 0.1)
    for a, e in zip(actual, expected):
        torch.testing.assert_close(a, torch.tensor(e, dtype=torch.float64))


def test_a_teacher_that_requires_grad_gets_no_gradient():
    student, teacher, target = inputs(4, 5)
    student.requires_grad_(), teacher.requires_grad_()
    nkd_loss(student, teacher, target).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@BOTH
def test_logits_may_be_made_under_inference_mode(loss):
    a, b, target = inputs(4, 5)
    with torch.inference_mode():
        constant, constant_target, constant_soft = b + 0, target + 0, mixed_targets(target, 5)
    for tgt, plain in ((constant_target, target), (constant_soft, mixed_targets(target, 5))):
        student = a.clone().requires_grad_()
        weak = constant if loss is nkd_loss else b
        value = loss(student, weak, tgt)
        value.backward()
        torch.testing.assert_close(value, loss(student, b, plain))
        assert student.grad.isfinite().all()


# ---- targets, shapes, reductions ----


@BOTH
def test_sum_and_mean_are_those_of_the_rows(loss):
    a, b, target = inputs(8, 5)
    rows = loss(a, b, target, reduction="none")
    assert rows.shape == (8,)
    torch.testing.assert_close(loss(a, b, target, reduction="sum"), rows.sum())
    torch.testing.assert_close(loss(a, b, target), rows.mean())


@BOTH
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_dense_logits_have_the_loss_of_flattened_logits(loss, soft, reduction):
    a, b, target = inputs(2, 7, 3, 4)
    flat = [x.movedim(1, -1).reshape(-1, 7) for x in (a, b)]
    if soft:
        flat_target = mixed_targets(target.flatten(), 7)
        target = flat_target.reshape(2, 3, 4, 7).movedim(-1, 1)
    else:
        target[0, 0] = -100
        flat_target = target.flatten()
    actual = loss(a, b, target, reduction=reduction)
    expected = loss(*flat, flat_target, reduction=reduction)
    torch.testing.assert_close(actual, expected.reshape(2, 3, 4) if reduction == "none" else expected)


@BOTH
def test_one_sample_needs_no_batch_dimension(loss):
    a, b, target = inputs(1, 5)
    actual = loss(a[0], b[0], target[0], reduction="none")
    assert actual.shape == ()
    torch.testing.assert_close(actual, loss(a, b, target, reduction="none")[0])


@BOTH
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_rows_have_no_loss_and_no_gradient(loss, ignore_index):
    a, b, target = inputs(10, 5)
    target[target == 3] = 4
    target[[0, 4, 5]] = ignore_index
    kept = target != ignore_index
    for reduction in ("mean", "sum"):
        value, grads = gradients(loss, a, b, target, reduction=reduction, ignore_index=ignore_index)
        expected, expected_grads = gradients(loss, a[kept], b[kept], target[kept], reduction=reduction)
        torch.testing.assert_close(value, expected)
        for g, e in zip(grads, expected_grads):
            torch.testing.assert_close(g[kept], e)
            assert (g[~kept] == 0).all()
    rows = loss(a, b, target, reduction="none", ignore_index=ignore_index)
    torch.testing.assert_close(rows[kept], loss(a[kept], b[kept], target[kept], reduction="none"))
    assert (rows[~kept] == 0).all()


@BOTH
@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_if_all_targets_are_ignored_the_loss_equals_cross_entropy(loss, n, reduction):
    a, b, target = inputs(n, 5)
    target = torch.full_like(target, -100)
    value, grads = gradients(loss, a, b, target, reduction=reduction)
    torch.testing.assert_close(value, F.cross_entropy(a, target, reduction=reduction), equal_nan=True)
    for grad in grads:
        assert (grad == 0).all()


@BOTH
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_class_indices_may_have_any_integer_type(loss, dtype):
    a, b, target = inputs(4, 5)
    assert loss(a, b, target.to(dtype)) == loss(a, b, target)


@BOTH
def test_memory_layout_does_not_matter(loss):
    a, b, target = inputs(2, 8, 4, 4, dtype=torch.float32)
    expected, expected_grads = gradients(loss, a, b, target)
    channels_last = [x.to(memory_format=torch.channels_last) for x in (a, b)]
    strided = [torch.stack([x, x], dim=-1)[..., 0] for x in (a, b)]
    transposed = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (a, b)]
    for layout in (channels_last, strided, transposed):
        assert layout is channels_last or not layout[0].is_contiguous()
        value, grads = gradients(loss, *layout, target)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        for g, e in zip(grads, expected_grads):
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-8)


# ---- numbers ----


@BOTH
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_loss_is_float32_and_the_gradient_has_the_inputs_type(loss, soft, dtype):
    a, b, target = inputs(16, 10, dtype=dtype)
    target = mixed_targets(target, 10).float() if soft else target
    value, grads = gradients(loss, a, b, target)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert value.dtype == wide
    expected, expected_grads = gradients(loss, a.to(wide), b.to(wide), target)
    torch.testing.assert_close(value, expected)
    for g, e in zip(grads, expected_grads):
        assert g.dtype == dtype
        torch.testing.assert_close(g, e.to(dtype))


def test_student_and_teacher_may_differ_in_precision():
    student, teacher, target = inputs(4, 5, dtype=torch.float32)
    expected = nkd_loss(student, teacher, target)
    torch.testing.assert_close(nkd_loss(student, teacher.double(), target), expected)
    assert nkd_loss(student.bfloat16(), teacher, target).dtype == torch.float32


@BOTH
@DEVICES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(loss, device, dtype):
    a, b, target = inputs(16, 10, dtype=torch.float32, device=device)
    expected, expected_grads = gradients(loss, a, b, target)
    with torch.autocast(device, dtype):
        value, grads = gradients(loss, a, b, target)
    assert value == expected
    for g, e in zip(grads, expected_grads):
        assert torch.equal(g, e)


@BOTH
@DEVICES
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(
    "case",
    ["opposite", "equal", "agree", "offset", "certain", "hopeless", "constant", "two classes", "two classes opposite"],
)
def test_value_and_gradient_stay_finite(loss, case, soft, device):
    c = 2 if case.startswith("two") else 10
    a, b, target = inputs(8, c, dtype=torch.float32)
    if "opposite" in case:
        a, b = 1e4 * a.sign(), -1e4 * a.sign()
    elif case == "equal":
        a = b = 1e4 * a.sign()
    elif case == "agree":
        a = b = 1e4 * F.one_hot(target, c).float()
    elif case == "offset":
        a, b = a + 1e4, b - 1e4
    elif case == "certain":  # S_t = T_t = 1 - 1e-8
        a = b = math.log(1e8 * (c - 1)) * F.one_hot(target, c).float()
    elif case == "hopeless":  # S_t = T_t = 1e-30
        a = b = math.log(1e-30) * F.one_hot(target, c).float()
    elif case == "constant":
        a, b = torch.zeros_like(a), torch.zeros_like(b)
    target = mixed_targets(target, c).float() if soft else target
    value, grads = gradients(loss, a.to(device), b.to(device), target.to(device))
    assert value.isfinite()
    for grad in grads:
        assert grad.isfinite().all()


def test_nkd_is_exact_at_the_extremes_of_confidence():
    """Compare the float32 loss with the float64 formula at S_t = 1 - 1e-8 and at 1e-30."""
    for log_odds in (math.log(1e8), math.log(1e-30)):
        student = torch.tensor([[log_odds, 0.0, -0.5, 0.3]])
        teacher = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
        expected = oracle.nkd_row(student[0].tolist(), teacher[0].tolist(), 0, 1.5, 1.0)
        assert nkd_loss(student, teacher, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-6)
        _, (grad,) = gradients(nkd_loss, student, teacher, torch.tensor([0]), gamma=0.0)
        expected = oracle.nkd_row_gradient(student[0].tolist(), teacher[0].tolist(), 0, 0.0, 1.0)
        torch.testing.assert_close(grad[0].tolist(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("soft", [False, True])
def test_nkd_of_a_mix_is_exact_with_a_certain_teacher_and_student(soft):
    """Compare with the float64 expectation; in float32, 1 - S_k and 1 - T_k underflow."""
    c = 6
    student, teacher, target = inputs(4, c, std=1.0, dtype=torch.float32)
    teacher = teacher + 30 * F.one_hot(target, c)
    student = student + 30 * F.one_hot(target.flip(0), c)
    mixed = 0.6 * F.one_hot(target, c) + 0.4 * F.one_hot((target + 1) % c, c)
    actual = nkd_loss(student, teacher, mixed.float(), reduction="none")
    expected = [
        sum(v * oracle.nkd_row(s, t, k, 1.5, 1.0) for k, v in enumerate(row) if v)
        for s, t, row in zip(student.double().tolist(), teacher.double().tolist(), mixed.tolist())
    ]
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@BOTH
@DEVICES
def test_a_vocabulary_of_128_256_classes_works(loss, device):
    a, b, target = inputs(4, 128_256, dtype=torch.float32)
    value, grads = gradients(loss, a.to(device), b.to(device), target.to(device))
    expected, expected_grads = gradients(loss, a.double(), b.double(), target)
    torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=0)
    for g, e in zip(grads, expected_grads):
        # USKD: with this number of classes, float32 and float64 rank a few near-ties differently
        assert relative_l2(g.cpu(), e) < (1e-6 if loss is nkd_loss else 1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_nkd_ignores_a_class_that_student_and_teacher_both_mask(soft):
    """Mask three classes, as in a padded vocabulary."""
    student, teacher, target = inputs(4, 9)
    padded = [torch.cat([x, torch.full((4, 3), -torch.inf)], dim=1) for x in (student, teacher)]
    soft_target = mixed_targets(target, 9)
    value, (grad,) = gradients(nkd_loss, *padded, F.pad(soft_target, (0, 3)) if soft else target)
    expected, (expected_grad,) = gradients(nkd_loss, student, teacher, soft_target if soft else target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, F.pad(expected_grad, (0, 3)))


def test_uskd_ranks_ties_by_class_index_including_the_target():
    """Use equal logits: all classes tie, so the target has the rank of its index."""
    for c, t in ((7, 3), (10, 0), (33, 32)):
        for dtype in (torch.float32, torch.float64):
            strong = weak = torch.zeros(1, c, dtype=dtype)
            reciprocal = 1 / torch.arange(1, c + 1, dtype=torch.float64)
            reciprocal[t] = 0
            logits = strong.clone().requires_grad_()
            uskd_loss(logits, weak, torch.tensor([t]), alpha=0.0, beta=1.0, mu=0.0).backward()
            expected = (1 / (c - 1) - reciprocal / reciprocal.sum()).double()
            expected[t] = 0
            torch.testing.assert_close(logits.grad[0].double(), expected, rtol=1e-5, atol=1e-7)


def test_uskd_of_a_soft_target_row_of_zeros_is_zero():
    strong, weak, target = inputs(3, 5)
    soft = F.one_hot(target, 5).double()
    soft[1] = 0
    assert uskd_loss(strong, weak, soft, label_smoothing=0.0, reduction="none")[1] == 0


# ---- under torch's transforms ----


class NoSync(TorchDispatchMode):
    """Fail on an operation that reads a value on the host, or whose shape depends on the data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "index.Tensor", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        assert not any(word in name for word in self.FORBIDDEN), f"{name} makes the host wait for the device"
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("soft", [False, True])
def test_forward_and_backward_do_not_wait_for_the_device(loss, soft):
    a, b, target = inputs(8, 10)
    target = mixed_targets(target, 10) if soft else target
    with NoSync():
        gradients(loss, a, b, target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@BOTH
@pytest.mark.parametrize("soft", [False, True])
def test_forward_and_backward_do_not_synchronise_on_cuda(loss, soft):
    a, b, target = inputs(8, 10, device="cuda")
    target = mixed_targets(target.cpu(), 10).cuda() if soft else target
    gradients(loss, a, b, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(loss, a, b, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("soft", [False, pytest.param(True, marks=pytest.mark.trial)])
def test_the_loss_compiles_as_one_graph_with_dynamic_shapes(loss, soft):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n, c in ((4, 10), (6, 10), (5, 7)):
        a, b, target = inputs(n, c, dtype=torch.float32)
        target = mixed_targets(target, c).float() if soft else target.index_fill(0, torch.tensor([2]), -100)
        value, grads = gradients(compiled, a, b, target)
        expected, expected_grads = gradients(loss, a.double(), b.double(), target)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
        assert len(grads) == len(expected_grads)
        for g, e in zip(grads, expected_grads):
            assert relative_l2(g, e) < (1e-6 if soft else 3e-7)


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("soft", [False, True])
def test_the_loss_exports_with_a_dynamic_batch(loss, soft):
    class Loss(torch.nn.Module):
        def forward(self, a, b, target):
            return loss(a, b, target)

    def example(n):
        a, b, target = inputs(n, 10, dtype=torch.float32)
        return a, b, mixed_targets(target, 10).float() if soft else target

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Loss(), example(2), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    for n in (1, 2, 5, 64):
        torch.testing.assert_close(program.module()(*example(n)), loss(*example(n)))


@BOTH
def test_batched_gradients_equal_one_gradient_after_the_other(loss):
    """Use is_grads_batched, as jacobian(vectorize=True) does."""
    student, other, target = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.tensor([0, 5, 2, 2])
    rows = loss(student, other, target, reduction="none")
    (batched,) = torch.autograd.grad(rows, student, torch.eye(4), is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(rows, student, row, retain_graph=True)[0] for row in torch.eye(4)]
    torch.testing.assert_close(batched, torch.stack(single))


@BOTH
def test_torch_func_gives_the_same_numbers(loss):
    a, b, target = inputs(4, 10)
    grad = torch.func.grad(lambda x: loss(x, b, target))(a)
    torch.testing.assert_close(grad, gradients(loss, a, b, target)[1][0])
    per_sample = torch.func.vmap(loss)(a, b, target)
    torch.testing.assert_close(per_sample, torch.stack([loss(*sample) for sample in zip(a, b, target)]))
    per_batch = torch.func.vmap(loss)(a.view(2, 2, 10), b.view(2, 2, 10), target.view(2, 2))
    torch.testing.assert_close(per_batch[1], loss(a[2:], b[2:], target[2:]))
    per_sample_grad = torch.func.vmap(torch.func.grad(loss))(a, b, target)
    torch.testing.assert_close(per_sample_grad[2], torch.func.grad(loss)(a[2], b[2], target[2]))


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(b=torch.zeros(4, 6)), ValueError, r"\(4, 5\) and \(4, 6\)"),
        (dict(b=torch.zeros(3, 5)), ValueError, r"\(4, 5\) and \(3, 5\)"),
        (dict(a=torch.zeros(4, 1), b=torch.zeros(4, 1)), ValueError, "at least 2 classes"),
        (dict(a=torch.zeros(4, 5).long()), TypeError, "16 bits or more, got torch.int64"),
        (dict(a=torch.tensor(1.0), b=torch.tensor(1.0)), ValueError, "scalar"),
        (dict(target=torch.zeros(4)), TypeError, r"integers of shape \(4,\).* got torch.float32 of shape \(4,\)"),
        (dict(target=torch.zeros(4, dtype=torch.bool)), TypeError, "got torch.bool"),
        (dict(target=torch.zeros(3).long()), ValueError, r"integers of shape \(4,\).* got torch.int64 of shape \(3,\)"),
        (dict(target=torch.zeros(4, 1).long()), ValueError, r"got torch.int64 of shape \(4, 1\)"),
        (dict(target=torch.zeros(4, 5).long()), TypeError, r"floating point of shape \(4, 5\); got torch.int64"),
        (dict(target=torch.zeros(4, 4)), ValueError, r"shape \(4, 5\); got torch.float32 of shape \(4, 4\)"),
        (dict(target=torch.full((4, 5), 0.2), ignore_index=1), ValueError, "ignore_index=1 needs class indices"),
        (dict(reduction="average"), ValueError, "none, mean, sum, got 'average'"),
        (dict(b=torch.zeros(4, 5).to_sparse()), TypeError, "must be a dense tensor, got a sparse_coo one"),
        (
            dict(b=torch.nested.nested_tensor([torch.zeros(5)] * 4, layout=torch.jagged)),
            TypeError,
            "dense tensor, got a nested one",
        ),
        (dict(a=torch.zeros(4, 5).to(torch.float8_e4m3fn)), TypeError, "16 bits or more, got torch.float8_e4m3fn"),
        (dict(ignore_index=2**70), TypeError, "ignore_index must be an integer of 64 bits, got 1180591620717411303424"),
        (dict(ignore_index=1.5), TypeError, "ignore_index must be an integer of 64 bits, got 1.5"),
    ],
)
@BOTH
def test_the_error_for_bad_input_shows_the_input(loss, change, error, message):
    call = dict(a=torch.zeros(4, 5), b=torch.zeros(4, 5), target=torch.zeros(4).long()) | change
    with pytest.raises(error, match=message):
        loss(call.pop("a"), call.pop("b"), call.pop("target"), **call)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (nkd_loss, dict(gamma=-1.0)),
        (nkd_loss, dict(gamma=math.nan)),
        (nkd_loss, dict(gamma=math.inf)),
        (nkd_loss, dict(temperature=0.0)),
        (nkd_loss, dict(temperature=-2.0)),
        (nkd_loss, dict(temperature=math.inf)),
        (uskd_loss, dict(alpha=-1.0)),
        (uskd_loss, dict(beta=-0.1)),
        (uskd_loss, dict(mu=-0.1)),
        (uskd_loss, dict(label_smoothing=1.5)),
        (uskd_loss, dict(label_smoothing=-0.5)),
    ],
)
def test_bad_weights_are_refused(loss, options):
    a, b, target = inputs(4, 5)
    with pytest.raises(ValueError, match=next(iter(options))):
        loss(a, b, target, **options)


@pytest.mark.parametrize("value", [torch.tensor(1.5), torch.nn.Parameter(torch.ones(4)), np.ones(4), None, "1"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_weight_that_is_not_a_number_is_a_type_error(value, soft):
    """Refuse tensors too, because the losses have no gradient for a weight or a temperature."""
    a, b, target = inputs(4, 5)
    target = mixed_targets(target, 5) if soft else target
    calls = [(nkd_loss, a, b, name) for name in ("gamma", "temperature")]
    calls += [(uskd_loss, a, b, name) for name in ("alpha", "beta", "mu", "label_smoothing")]
    for loss, *tensors, name in calls:
        with pytest.raises(TypeError, match=f"{name} must be a Python number, got"):
            loss(*tensors, target, **{name: value})
    if not soft and value is not None:  # None disables the cap
        for name in ("gamma", "temperature", "ce_weight", "logit_scale", "softcap", "teacher_softcap"):
            with pytest.raises(TypeError, match=f"{name} must be a Python number, got"):
                nkd_linear_loss(a, a, b, b, torch.zeros(4).long(), **{name: value})


@pytest.mark.slow
@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_a_class_out_of_range_is_an_error(loss, compiled):
    a, b, target = inputs(4, 5, dtype=torch.float32)
    if compiled:
        torch._dynamo.reset()
        loss = torch.compile(loss)
    for bad in (5, -1):
        target[2] = bad
        with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
            loss(a, b, target)


# ---- one batch over two processes ----


def _part_of_a_batch(rank, path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    grads = {}
    for kind, (x, weight, target) in shared_batch().items():
        part = slice(0, 4) if rank == 0 else slice(4, 10)  # unequal, because the mean is over rows, not ranks
        weight.requires_grad_()
        logits = x[part] @ weight
        uskd_loss(logits, logits * 0.5, target[part], reduction="sum", group=dist.group.WORLD).backward()
        grads[kind] = weight.grad
    torch.save(grads, f"{path}/{rank}.pt")
    dist.destroy_process_group()


def shared_batch():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(10, 8, generator=generator), torch.randn(8, 7, generator=generator)
    labels = torch.randint(0, 7, (10,), generator=generator)
    ignored = torch.cat([labels[:8], torch.tensor([-100, -100])])
    soft = torch.rand(10, 7, generator=generator).softmax(1)
    return {kind: (x, weight.clone(), t) for kind, t in (("hard", labels), ("ignored", ignored), ("soft", soft))}


@pytest.mark.trial
def test_uskd_with_a_group_uses_the_batch_of_all_processes(tmp_path):
    mp.spawn(_part_of_a_batch, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind, (x, weight, target) in shared_batch().items():
        weight.requires_grad_()
        logits = x @ weight
        uskd_loss(logits, logits * 0.5, target, reduction="sum").backward()
        torch.testing.assert_close(first[kind] + second[kind], weight.grad, rtol=1e-5, atol=1e-6)


# ---- other objects instead of tensors ----


@pytest.mark.parametrize("value", [np.zeros((2, 3)), [[0.0] * 3] * 2, OrderedDict(out=torch.zeros(2, 3)), None, 1.0])
def test_the_type_error_for_another_object_names_the_argument(value):
    logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    kind = type(value).__name__
    with pytest.raises(TypeError, match=f"student_logits must be a tensor, got {kind}"):
        nkd_loss(value, logits, target)
    with pytest.raises(TypeError, match=f"teacher_logits must be a tensor, got {kind}"):
        nkd_loss(logits, value, target)
    with pytest.raises(TypeError, match=f"weak_logits must be a tensor, got {kind}"):
        uskd_loss(logits, value, target)
    with pytest.raises(TypeError, match=f"target must be a tensor, got {kind}"):
        uskd_loss(logits, logits, value)
    if value is None:  # nkd_loss accepts target=None; nkd_linear_loss accepts teacher_weight=None with a top-k
        return
    with pytest.raises(TypeError, match=f"target must be a tensor, got {kind}"):
        nkd_loss(logits, logits, value)
    with pytest.raises(TypeError, match=f"teacher_weight must be a tensor, got {kind}"):
        nkd_linear_loss(logits, torch.zeros(4, 3), logits, value, target)


def test_the_error_for_a_dict_names_its_entries():
    output, target = OrderedDict(out=torch.zeros(2, 3), aux=torch.zeros(2, 3)), torch.tensor([0, 1])
    with pytest.raises(
        TypeError, match="student_logits must be a tensor, got OrderedDict of 'out', 'aux': pass one of its entries"
    ):
        nkd_loss(output, output["out"], target)


@pytest.mark.parametrize(
    ("shape", "target"),
    [((2, 4, 9), (2, 4)), ((2, 4, 5, 9), (2, 4, 5))],
)
def test_the_error_for_classes_in_the_last_dimension_names_dimension_1(shape, target):
    logits, target = torch.zeros(shape), torch.zeros(target).long()
    for loss in (nkd_loss, uskd_loss):
        with pytest.raises(ValueError, match=r"target must be .*: move the classes to dimension 1$"):
            loss(logits, logits, target)
    moved = logits.movedim(-1, 1)
    assert nkd_loss(moved, moved, target).isfinite()


def test_the_error_for_a_padded_vocabulary_names_the_number_of_classes():
    target = torch.zeros(2, 4).long()
    with pytest.raises(ValueError, match=r": remove padded classes to leave 5$"):
        nkd_loss(torch.zeros(2, 5, 4), torch.zeros(2, 8, 4), target)
    with pytest.raises(ValueError, match=r": remove padded classes to leave 5$"):
        nkd_loss(torch.zeros(2, 4, 8), torch.zeros(2, 4, 5), target)
    # no advice, because the batches differ
    with pytest.raises(ValueError, match=r"got \(2, 5\) and \(3, 5\)$"):
        nkd_loss(torch.zeros(2, 5), torch.zeros(3, 5), torch.zeros(2).long())
    hidden, target = torch.zeros(2, 3), torch.zeros(2).long()
    with pytest.raises(ValueError, match=r": remove padded classes to leave 5$"):
        nkd_linear_loss(hidden, torch.zeros(5, 3), hidden, torch.zeros(8, 3), target)


def test_the_error_for_an_output_of_hugging_face_names_its_logits():
    output = SimpleNamespace(logits=torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"teacher_logits must be a tensor, got SimpleNamespace: pass its \.logits"):
        nkd_loss(torch.zeros(2, 3), output, torch.tensor([0, 1]))
