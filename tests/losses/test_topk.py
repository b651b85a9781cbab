"""Test nkd_topk_loss: NKD from a teacher's log-probabilities of the target and of k classes."""

import math

import oracle
import pytest
import torch
from test_losses import NoSync, inputs
from torch.nn import functional as F

from kdlite import nkd_from_logprobs, nkd_loss, nkd_topk_loss, top_k_logprobs
from kdlite.topk import log1mexp


def value_and_gradient(loss, student, *args, **options):
    student = student.detach().requires_grad_()
    value = loss(student, *args, **options)
    (grad,) = torch.autograd.grad(value.sum(), student)
    return value.detach(), grad


def topk(student, teacher, target, k=3, **options):
    """Return nkd_topk_loss of a teacher with known logits."""
    return nkd_topk_loss(student, *top_k_logprobs(teacher, target, k), target, **options)


# ---- the formula ----


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("std", [0.5, 5.0])
def test_the_loss_equals_the_formula(k, std):
    student, teacher, target = inputs(12, 10, std=std)
    actual = topk(student, teacher, target, k, gamma=2.5, reduction="none")
    for row, s, t, y in zip(actual, student.tolist(), teacher.tolist(), target.tolist()):
        log_t = oracle.log_softmax(t)
        largest = sorted((i for i in range(10) if i != y), key=lambda i: -t[i])[:k]
        expected = oracle.nkd_topk_row(s, y, log_t[y], {i: log_t[i] for i in largest}, gamma=2.5)
        assert row.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(), (7,), (4, 3), (2, 3, 2)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_a_top_k_of_all_classes_gives_the_loss_of_nkd(shape, reduction):
    n, *trailing = shape or (1,)
    student, teacher, target = inputs(n, 9, *trailing)
    if not shape:
        student, teacher, target = student[0], teacher[0], target[0]
    target.view(-1)[:-1:3] = -100
    actual = value_and_gradient(topk, student, teacher, target, k=8, reduction=reduction)
    expected = value_and_gradient(nkd_loss, student, teacher, target, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# The table of kdlite/README.md. The non-target probabilities of each teacher follow a power law of the rank.
# The last two columns are the cosines to NKD's gradient: that of a renormalised top-k, and that of nkd_topk_loss.
TEACHERS = {  # classes, T_t, exponent, k, sum of the k probabilities, cosine, cosine
    "C 1,000, flat, k 10": (1000, 0.56, 1.08, 10, 0.46, 0.929, 0.996),
    "C 1,000, peaked, k 10": (1000, 0.84, 1.67, 10, 0.86, 0.997, 0.9997),
    "C 1,000, flat, k 50": (1000, 0.56, 1.12, 50, 0.70, 0.986, 0.9996),
    "C 32,000, flat, k 50": (32000, 0.51, 1.135, 50, 0.59, 0.968, 0.9996),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_the_gradient_is_closer_to_that_of_nkd_than_with_a_renormalised_top_k(name):
    classes, t_t, exponent, k, kept, renormalised_cosine, cosine = TEACHERS[name]
    g = torch.Generator().manual_seed(0)
    others = torch.arange(1, classes, dtype=torch.float64) ** -exponent
    others /= others.sum()
    assert others[:k].sum().item() == pytest.approx(kept, abs=0.01)
    rows = torch.stack([others[torch.randperm(classes - 1, generator=g)] for _ in range(16)])
    teacher = torch.cat([torch.full((16, 1), t_t), (1 - t_t) * rows], 1).log()
    student = 0.5 * torch.randn(16, classes, generator=g, dtype=torch.float64)
    target = torch.zeros(16, dtype=torch.long)
    target_logprob, top, index = top_k_logprobs(teacher, target, k)
    renormalised = torch.full_like(teacher, -torch.inf).scatter(1, index, top.log_softmax(1) + math.log(1 - t_t))
    renormalised[:, 0] = target_logprob

    def gradient(*args):
        return value_and_gradient(*args)[1].flatten()

    whole = gradient(nkd_loss, student, teacher, target)
    ours = gradient(nkd_topk_loss, student, target_logprob, top, index, target)
    theirs = gradient(nkd_loss, student, renormalised, target)
    ours, theirs = (F.cosine_similarity(x, whole, dim=0).item() for x in (ours, theirs))
    assert ours == pytest.approx(cosine, abs=0.002)
    assert theirs == pytest.approx(renormalised_cosine, abs=0.002)


def test_without_labels_the_most_probable_class_is_the_target():
    student, teacher, _ = inputs(6, 8)
    target = teacher.argmax(1)
    served, index = teacher.log_softmax(1).topk(4)
    actual = value_and_gradient(nkd_topk_loss, student, None, served, index, None)
    torch.testing.assert_close(actual, value_and_gradient(topk, student, teacher, target, k=3))
    dense = value_and_gradient(nkd_loss, student, teacher, None)
    torch.testing.assert_close(dense, value_and_gradient(nkd_loss, student, teacher, target))


# ---- the answers of a server ----


def test_the_target_in_the_top_k_and_padding_are_ignored():
    student, teacher, _ = inputs(5, 8)
    target = teacher.argmax(1)
    logprobs = teacher.log_softmax(1)
    target_logprob = logprobs.gather(1, target[:, None])[:, 0]
    served, index = logprobs.topk(4)  # the first of the four is the target
    expected = topk(student, teacher, target, k=3)
    torch.testing.assert_close(nkd_topk_loss(student, target_logprob, served, index, target), expected)
    wider = F.pad(served, (0, 2), value=-torch.inf), F.pad(index, (0, 2), value=0)  # padding: -inf
    torch.testing.assert_close(nkd_topk_loss(student, target_logprob, *wider, target), expected)
    wider = F.pad(served, (0, 2), value=-0.1), F.pad(index, (0, 2), value=-1)  # padding: the index -1
    torch.testing.assert_close(nkd_topk_loss(student, target_logprob, *wider, target), expected)


def test_a_top_k_of_padding_alone_gives_the_target_term():
    student, teacher, target = inputs(5, 8)
    target_logprob, top, index = top_k_logprobs(teacher, target, 1)
    rows = nkd_topk_loss(student, target_logprob, top, torch.full_like(index, -1), target, reduction="none")
    torch.testing.assert_close(rows, target_logprob.exp() * F.cross_entropy(student, target, reduction="none"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.uint32, torch.uint64])
def test_indices_may_have_any_integer_type(dtype):
    """Use the integer types of stored labels. In uint8, 255 is a class, but torch finds it equal to -1."""
    student, teacher, target = inputs(6, 300)
    target_logprob, top, index = top_k_logprobs(teacher, target, 3)
    index[:, 0], index[:, 1:] = 255, index[:, 1:] % 250
    expected = nkd_topk_loss(student, target_logprob, top, index, target)
    assert torch.equal(nkd_topk_loss(student, target_logprob, top, index.to(dtype), target), expected)


def test_without_labels_padding_is_never_the_target():
    student, teacher, _ = inputs(5, 8)
    top, index = teacher.log_softmax(1).topk(3)
    expected = nkd_topk_loss(student[1:], None, top[1:], index[1:], None)
    padded = F.pad(top, (1, 0), value=0.0), F.pad(index, (1, 0), value=-1)
    padded[1][0] = -1  # a row of padding alone, as in a padded sequence, is ignored
    value, grad = value_and_gradient(nkd_topk_loss, student, None, *padded, None)
    torch.testing.assert_close(value, expected)
    assert (grad[0] == 0).all()
    padded[0][0], padded[1][0] = -torch.inf, 0
    torch.testing.assert_close(nkd_topk_loss(student, None, *padded, None), expected)


def test_the_teachers_values_at_an_ignored_target_change_nothing():
    student, teacher, target = inputs(6, 8)
    served = top_k_logprobs(teacher, target, 3)
    expected, expected_grad = value_and_gradient(nkd_topk_loss, student[1:], *(x[1:] for x in served), target[1:])
    target[0] = -100
    for x, filler in zip(served, (math.nan, math.nan, 77)):
        x[0] = filler
    value, grad = value_and_gradient(nkd_topk_loss, student, *served, target)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad[1:], expected_grad)
    assert (grad[0] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, 5.0, 0.1])
@pytest.mark.parametrize("where", ["the target", "the top-k", "the target in the top-k"])
def test_values_that_are_not_log_probabilities_make_the_loss_nan(where, bad):
    """Use NaN, values above 0 and sums above 1. The other rows stay the same, and no operation waits for the device."""
    student, teacher, _ = inputs(6, 8)
    target = teacher.argmax(1)
    logprobs = teacher.log_softmax(1)
    # the first class of the top-k is the target
    target_logprob, (top, index) = logprobs.gather(1, target[:, None])[:, 0], logprobs.topk(4)
    expected = nkd_topk_loss(student, target_logprob, top, index, target, reduction="none")
    target_logprob, top = target_logprob.clone(), top.clone()
    if where == "the target":
        target_logprob[2] = bad
    else:
        top[2, 1 if where == "the top-k" else 0] = bad
    with NoSync():
        rows = nkd_topk_loss(student, target_logprob, top, index, target, reduction="none")
    if where == "the target in the top-k" and bad == bad:  # the loss ignores that entry
        torch.testing.assert_close(rows, expected)
        return
    assert rows[2].isnan()
    torch.testing.assert_close(rows[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    without_labels = nkd_topk_loss(student, None, top, index, None, reduction="none")
    assert without_labels[2].isnan() == (where != "the target")
    alone = nkd_from_logprobs(student[:, 0], student[:, 1:5], target_logprob, top[:, :4])
    assert alone[2].isnan()


def test_a_log_probability_that_rounding_moved_above_0_counts_as_0():
    student, teacher, target = inputs(4, 8)
    target_logprob, top, index = top_k_logprobs(teacher, target, 3)
    certain = torch.full_like(target_logprob, 1e-6), top - 20, index
    expected = torch.zeros_like(target_logprob), top - 20, index
    torch.testing.assert_close(nkd_topk_loss(student, *certain, target), nkd_topk_loss(student, *expected, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounded_log_probabilities_change_the_loss_little(dtype):
    """Use rounded values, whose probabilities may sum to more than 1. The error is as small as the rounding."""
    student, teacher, target = inputs(64, 20, std=3.0)
    target_logprob, top, index = top_k_logprobs(teacher, target, 10)
    expected = nkd_topk_loss(student, target_logprob, top, index, target)
    actual = nkd_topk_loss(student, target_logprob.float(), top.to(dtype), index.int(), target)
    torch.testing.assert_close(actual, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ---- numbers ----


def test_the_loss_is_exact_if_the_teachers_probability_is_near_1():
    """Use T_t = 1 - 1e-7, and k classes that share the other 1e-7 except a millionth of it."""
    others = [0.6e-7, 0.3e-7, 0.1e-7 * (1 - 1e-5), 0.1e-12]
    log_t = [math.log1p(-1e-7), *map(math.log, others)]
    student = [4.0, 1.0, 0.0, -1.0, 2.0]
    expected = oracle.nkd_topk_row(student, 0, log_t[0], {1: log_t[1], 2: log_t[2], 3: log_t[3]}, 1.5)
    for dtype, rel in ((torch.float64, 1e-8), (torch.float32, 1e-6)):
        served = torch.tensor(log_t[:1], dtype=dtype), torch.tensor([log_t[1:4]], dtype=dtype)
        loss = nkd_topk_loss(
            torch.tensor([student], dtype=dtype), *served, torch.tensor([[1, 2, 3]]), torch.tensor([0])
        )
        assert loss.item() == pytest.approx(expected, rel=rel)
    teacher = torch.tensor([[20.0, 0.0, 1.0, 2.0]])  # in float32, with 1 - T_t = 2e-8
    narrow, wide = (top_k_logprobs(x, torch.tensor([0]), 2) for x in (teacher, teacher.double()))
    torch.testing.assert_close(narrow[0], wide[0].float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_value_and_gradient_stay_finite(k, dtype, scale):
    student = scale * torch.tensor([[1.0, 0, 0, 0, 0], [0, 1, 0, 0, -1], [1, 1, 1, 1, 1]]).to(dtype)
    teacher = scale * torch.tensor([[0.0, 0, 1, 0, 0], [0, 1, 0, 0, -1], [1, -1, 1, -1, 1]])
    target = torch.tensor([0, 1, 4])
    value, grad = value_and_gradient(topk, student, teacher, target, k=k)
    assert value.isfinite()
    assert value.dtype == torch.float32
    assert grad.isfinite().all()
    assert grad.dtype == dtype


def test_a_class_that_the_student_masks_and_the_top_k_lacks_is_ignored():
    student, teacher, target = inputs(4, 6)
    student[:, 5] = teacher[:, 5] = -torch.inf
    target = target.clamp(max=4)
    value, grad = value_and_gradient(topk, student, teacher, target, k=4)
    expected, expected_grad = value_and_gradient(topk, student[:, :5], teacher[:, :5], target, k=4)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, F.pad(expected_grad, (0, 1)))


def test_two_classes_and_an_empty_batch_work():
    student, teacher, target = inputs(4, 2)
    torch.testing.assert_close(topk(student, teacher, target, k=1), nkd_loss(student, teacher, target))
    value, grad = value_and_gradient(topk, torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))
    assert value.isnan()  # 0/0, as in cross_entropy
    assert grad.shape == (0, 5)


def test_gradcheck_passes_and_the_teacher_has_no_gradient():
    student, teacher, target = inputs(4, 6)
    target_logprob, top, index = top_k_logprobs(teacher, target, 3)
    top.requires_grad_()
    torch.autograd.gradcheck(
        lambda s: nkd_topk_loss(s, target_logprob, top.detach(), index, target), student.requires_grad_()
    )
    nkd_topk_loss(student, target_logprob, top, index, target).backward()
    assert top.grad is None


def test_nkd_from_logprobs_equals_the_loss_from_logits():
    student, teacher, target = inputs(16, 12)
    target_logprob, top, index = top_k_logprobs(teacher, target, 4)

    def from_logprobs(student, dtype):
        logprobs = student.to(dtype).log_softmax(1)
        student_target = logprobs.gather(1, target[:, None])[:, 0]
        return nkd_from_logprobs(student_target, logprobs.gather(1, index), target_logprob, top, gamma=2.0).mean()

    expected = value_and_gradient(nkd_topk_loss, student, target_logprob, top, index, target, gamma=2.0)
    torch.testing.assert_close(value_and_gradient(from_logprobs, student, torch.float64), expected)
    value, grad = value_and_gradient(from_logprobs, student, torch.float32)
    torch.testing.assert_close(value, expected[0].float(), rtol=1e-4, atol=0)
    torch.testing.assert_close(grad, expected[1], rtol=1e-2, atol=1e-4)
    certain = value_and_gradient(from_logprobs, 1e4 * F.one_hot(target, 12).double(), torch.float32)
    assert all(x.isfinite().all() for x in certain)


def test_log1mexp_is_exact_at_both_ends():
    x = [-1e-12, -1e-3, -0.5, -math.log(2), -1.0, -20.0, -1e4]
    expected = [math.log(-math.expm1(v)) if v > -1 else math.log1p(-math.exp(v)) for v in x]
    torch.testing.assert_close(log1mexp(torch.tensor(x)), torch.tensor(expected), rtol=1e-6, atol=0)
    assert log1mexp(torch.tensor([0.0, -math.inf])).tolist() == [-math.inf, 0.0]
    nothing = torch.tensor(-math.inf, requires_grad=True)
    assert torch.autograd.grad(log1mexp(nothing), nothing)[0] == 0


# ---- under torch's transforms ----


def test_forward_and_backward_do_not_wait_for_the_device():
    student, teacher, target = inputs(8, 10)
    with NoSync():
        value_and_gradient(topk, student, teacher, target)
        served, index = teacher.log_softmax(1).topk(3)
        value_and_gradient(nkd_topk_loss, student, None, served, index, None)


@pytest.mark.slow
def test_the_loss_compiles_as_one_graph_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(topk, fullgraph=True, dynamic=True, backend="aot_eager")
    for n, c in ((4, 10), (6, 10), (5, 7)):
        student, teacher, target = inputs(n, c, dtype=torch.float32)
        target[0] = -100
        actual = value_and_gradient(compiled, student, teacher, target)
        expected = value_and_gradient(topk, student, teacher, target)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("margin", [10.0, 14.0, 17.0, 30.0])
def test_log_probabilities_of_a_certain_student_give_no_negative_loss_and_no_large_gradient(margin):
    """In float32, S_t rounds to 1; the loss is then inexact, but its gradient must not lead away from the target."""
    student = torch.tensor([margin, 0.0, 0.0, 0.0], requires_grad=True)
    teacher = torch.tensor([0.9, 0.04, 0.03, 0.03]).log()
    s = student.log_softmax(0)
    loss = nkd_from_logprobs(s[0], s[1:3], teacher[0], teacher[1:3])
    (grad,) = torch.autograd.grad(loss, student)
    assert 0 <= loss < 10
    assert grad[0] < 0.02
    assert grad.abs().max() < 0.5


def test_torch_func_gives_the_same_numbers():
    student, teacher, target = inputs(4, 10)
    grad = torch.func.grad(topk)(student, teacher, target)
    torch.testing.assert_close(grad, value_and_gradient(topk, student, teacher, target)[1])
    each = torch.func.vmap(topk)(student, teacher, target)
    torch.testing.assert_close(each, topk(student, teacher, target, reduction="none"))


# ---- errors ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(teacher_logprobs=torch.zeros(4, 3, 5)), ValueError, r"must be \(4, k\) with k >= 1, got \(4, 3, 5\)"),
        (dict(teacher_indices=torch.zeros(4, 2).long()), ValueError, r"got \(4, 3\) and \(4, 2\)"),
        (dict(teacher_indices=torch.zeros(4, 3)), TypeError, "teacher_indices must be class indices, integers, got"),
        (dict(teacher_logprobs=torch.zeros(4, 3).long()), TypeError, "teacher_logprobs must be floating point"),
        (dict(teacher_target_logprob=torch.zeros(4, 1)), ValueError, "teacher_target_logprob must have the shape"),
        (dict(teacher_target_logprob=None), ValueError, "go together: pass both, or None for both"),
        (dict(target=None), ValueError, "go together"),
        (dict(target=torch.full((4, 8), 0.125)), ValueError, "target must be class indices"),
        (dict(target=torch.zeros(3).long()), ValueError, "target must be class indices, integers of shape"),
        (dict(student_logits=torch.zeros(4, 1)), ValueError, "at least 2 classes"),
        (dict(student_logits=torch.zeros(4, 8).long()), TypeError, "student_logits must be floating point"),
        (dict(teacher_logprobs=[0.0]), TypeError, "teacher_logprobs must be a tensor, got list"),
        (dict(gamma=-1.0), ValueError, "gamma must be >= 0"),
        (dict(reduction="avg"), ValueError, "reduction must be one of"),
        (dict(temperature=2.0), TypeError, "temperature"),
    ],
)
def test_the_error_for_bad_input_shows_the_input(change, error, message):
    call = dict(
        student_logits=torch.zeros(4, 8),
        teacher_target_logprob=torch.zeros(4),
        teacher_logprobs=torch.zeros(4, 3),
        teacher_indices=torch.arange(3).expand(4, 3),
        target=torch.zeros(4).long(),
    )
    with pytest.raises(error, match=message):
        nkd_topk_loss(**call | change)


def test_the_error_for_a_top_k_in_the_last_dimension_names_dimension_1():
    student, teacher, target = inputs(2, 9, 5)
    served, index = (x.transpose(1, 2) for x in top_k_logprobs(teacher, target, 3)[1:])
    with pytest.raises(
        ValueError, match=r"must be \(2, k, 5\) .* got \(2, 5, 3\) .*: move the k classes to dimension 1$"
    ):
        nkd_topk_loss(student, torch.zeros(2, 5), served, index, target)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(teacher_target=torch.zeros(4, 1)), ValueError, r"got \[\(4,\), \(4, 3\), \(4, 1\), \(4, 3\)\]"),
        (dict(student_top=torch.zeros(4, 2)), ValueError, r"got \[\(4,\), \(4, 2\)"),
        (dict(student_target=[0.0]), TypeError, "student_target must be a tensor, got list"),
        (dict(teacher_top=torch.zeros(4, 3).long()), TypeError, "teacher_top must be floating point"),
        (dict(gamma=-1.0), ValueError, "gamma must be >= 0"),
    ],
)
def test_log_probabilities_that_do_not_fit_are_refused(change, error, message):
    call = dict(
        student_target=torch.zeros(4),
        student_top=torch.zeros(4, 3),
        teacher_target=torch.zeros(4),
        teacher_top=torch.zeros(4, 3),
    )
    with pytest.raises(error, match=message):
        nkd_from_logprobs(**call | change)


@pytest.mark.parametrize("bad", [8, -2])
def test_a_class_out_of_range_is_an_error(bad):
    student, teacher, target = inputs(4, 8)
    target_logprob, top, index = top_k_logprobs(teacher, target, 3)
    index[0, 0] = bad
    with pytest.raises((IndexError, RuntimeError)):
        nkd_topk_loss(student, target_logprob, top, index, target)


@pytest.mark.parametrize("k", [0, 8])
def test_a_k_below_1_or_above_the_number_of_other_classes_is_refused(k):
    with pytest.raises(ValueError, match=f"k must be from 1 to C - 1 = 7, got {k}"):
        top_k_logprobs(torch.zeros(4, 8), torch.zeros(4).long(), k)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_a_top_k_accepts_targets_of_any_integer_type(dtype):
    teacher, target = torch.randn(4, 1000), torch.tensor([0, 3, 99, 127])
    for actual, expected in zip(top_k_logprobs(teacher, target.to(dtype), 2), top_k_logprobs(teacher, target, 2)):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(5, 2).long(), ValueError, r"class indices of shape \(2, 5\), got \(5, 2\)"),
        (torch.zeros(3).long(), ValueError, r"got \(3,\)"),
        (torch.zeros(2, 5), TypeError, "target must be class indices, integers, got torch.float32"),
    ],
)
def test_a_target_that_does_not_fit_the_teacher_is_refused(target, error, message):
    with pytest.raises(error, match=message):
        top_k_logprobs(torch.zeros(2, 8, 5), target, 3)
