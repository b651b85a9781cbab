"""Test the fused evaluation of the losses, and nkd_linear_loss.

test_losses.py compares the values with the formulas. These tests run the fused evaluation in chunks and compiled, and
compare it with plain autograd. They also check its precision, its memory, and the cases that use plain autograd.
"""

import math

import pytest
import torch
from test_losses import BOTH, gradients, inputs, relative_l2
from torch.autograd import forward_ad
from torch.nn import functional as F

import kdlite.linear
from examples.benchmark_losses import nkd_by_masks, peak_bytes, uskd_by_masks
from kdlite import fused, nkd_linear_loss, nkd_loss, nkd_topk_loss, terms, top_k_logprobs, uskd_loss


@pytest.fixture
def plain(monkeypatch):
    """Return a function that makes every loss use plain autograd."""
    return lambda: monkeypatch.setattr(fused, "can_fuse", lambda *logits: False)


# ---- the same numbers ----


@BOTH
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("chunk_elements", [1, 40, 70, 10**6])  # with 35 classes: 1 row, 1 row, 2 rows, all rows
def test_a_loss_in_chunks_of_rows_equals_the_plain_loss(loss, temperature, chunk_elements, monkeypatch, plain):
    a, b, target = inputs(7, 35)
    target[2] = -100
    options = dict(temperature=temperature) if loss is nkd_loss else {}
    monkeypatch.setitem(fused.CHUNK_ELEMENTS, "cpu", chunk_elements)
    value, grads = gradients(loss, a, b, target, **options)
    plain()
    expected, expected_grads = gradients(loss, a, b, target, **options)
    torch.testing.assert_close(value, expected)
    assert len(grads) == len(expected_grads) == (1 if loss is nkd_loss else 2)
    for grad, e in zip(grads, expected_grads):
        torch.testing.assert_close(grad, e)


@pytest.mark.trial
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_equals_the_plain_loss(loss, dtype, plain):
    a, b, target = inputs(6, 35, dtype=dtype)
    target[2] = -100
    torch._dynamo.reset()
    value, grads = gradients(torch.compile(loss, fullgraph=True), a, b, target)
    plain()
    expected, expected_grads = gradients(loss, a.double(), b.double(), target)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for grad, e in zip(grads, expected_grads):
        assert grad.dtype == dtype
        assert relative_l2(grad, e) < (3e-7 if dtype == torch.float32 else 2.5e-3)


@BOTH
@pytest.mark.parametrize("std", [1.0, 4.0])
@pytest.mark.parametrize(
    ("dtype", "scale", "bound"), [("float32", 1.0, 3e-7), ("float16", 65536.0, 3e-4), ("bfloat16", 1.0, 2.5e-3)]
)
def test_the_gradient_is_rounded_once(loss, std, dtype, scale, bound):
    """Use AMP's loss scale in fp16: gradients that are rounded before they are scaled would often be 0."""
    a, b, target = inputs(256, 1000, std=std, dtype=getattr(torch, dtype))
    # beta=0: float64 may rank near-ties differently.
    # label_smoothing=0: with smoothing all classes have nearly the same gradient, and so the same rounding error.
    options = {} if loss is nkd_loss else dict(beta=0.0, label_smoothing=0.0)
    _, grads = gradients(lambda *args: scale * loss(*args, **options), a, b, target)
    _, expected = gradients(lambda *args: scale * loss(*args, **options), a.double(), b.double(), target)
    for grad, e in zip(grads, expected):
        assert relative_l2(grad, e) < bound


@BOTH
@pytest.mark.parametrize("margin", [-40.0, -5.0, 5.0, 40.0])  # the target's logit minus the others
def test_a_target_with_a_probability_near_0_or_1_loses_no_digits(loss, margin):
    a, b, target = inputs(16, 50, std=1.0, dtype=torch.float32)
    a, b = (x + margin * F.one_hot(target, 50) for x in (a, b))
    value, grads = gradients(loss, a, b, target)
    expected, expected_grads = gradients(loss, a.double(), b.double(), target)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)
    for grad, e in zip(grads, expected_grads):
        assert relative_l2(grad, e) < 1e-6
        # the target's gradient may be tiny next to the others; at a margin of 40 its relative error is 2e-6
        rows = torch.arange(16), target
        torch.testing.assert_close(grad.double()[rows], e[rows], rtol=1e-5, atol=0)


@pytest.mark.parametrize(("loss", "by_masks"), [(nkd_loss, nkd_by_masks), (uskd_loss, uskd_by_masks)])
def test_the_formulas_of_the_benchmark_equal_the_losses(loss, by_masks):
    a, b, target = inputs(16, 50)
    value, grads = gradients(by_masks, a, b, target)
    expected, expected_grads = gradients(loss, a, b, target)
    torch.testing.assert_close(value, expected)
    for grad, e in zip(grads, expected_grads):
        torch.testing.assert_close(grad, e)


# ---- memory ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "compiled", "bound"),
    [
        (nkd_loss, False, 2.1),
        (nkd_loss, True, 1.1),
        (uskd_loss, False, 6.0),
        pytest.param(uskd_loss, True, 4.1, marks=pytest.mark.trial),  # a second compilation
    ],
)
@pytest.mark.parametrize("shape", [(1024, 1000), pytest.param((100, 12000), marks=pytest.mark.trial)])
def test_the_peak_memory_is_a_few_times_that_of_the_logits(loss, compiled, bound, shape):
    a, b, target = inputs(*shape, dtype=torch.float32)
    a.requires_grad_(), b.requires_grad_()
    torch._dynamo.reset()
    loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
    loss(a, b, target).backward()
    a.grad = b.grad = None
    assert 1.0 <= peak_bytes(loss, (a, b, target)) / a.nbytes <= bound


@BOTH
def test_the_backward_keeps_no_tensor_as_large_as_the_logits_except_zipf_weights(loss):
    a, b, target = inputs(64, 500, dtype=torch.float32)
    a.requires_grad_(), b.requires_grad_()
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(x.data_ptr(), x), lambda x: x):
        loss(a, b, target)
    mine = [x for x in kept.values() if x.data_ptr() not in (a.data_ptr(), b.data_ptr())]
    as_large = [x for x in mine if x.numel() >= a.numel()]
    assert len(as_large) == (0 if loss is nkd_loss else 1)  # USKD's Zipf weights


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@BOTH
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_can_capture_the_loss(loss, compiled):
    a, b, target = inputs(64, 1000, dtype=torch.float32, device="cuda")
    a.requires_grad_(), b.requires_grad_()
    expected, expected_grads = gradients(loss, a, b, target)
    torch._dynamo.reset()
    run = torch.compile(loss, fullgraph=True) if compiled else loss
    for _ in range(3):
        run(a, b, target).backward()
    a.grad = b.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = run(a, b, target)
        value.backward()
    graph.replay()
    torch.testing.assert_close(value.detach(), expected)
    for grad, e in zip((a.grad, b.grad), expected_grads):
        torch.testing.assert_close(grad, e)


# ---- the cases that use plain autograd ----


def test_uskd_can_be_differentiated_twice():
    strong, weak, target = inputs(4, 6, std=1.0)
    strong.requires_grad_(), weak.requires_grad_()
    # alpha = beta = 0, because a numerical derivative would vary P_t and Z, which the formula holds constant
    assert torch.autograd.gradgradcheck(lambda w: uskd_loss(strong, w, target, alpha=0.0, beta=0.0), weak)
    (grad,) = torch.autograd.grad(uskd_loss(strong, weak, target), strong, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), strong)
    plain_rows = terms.uskd_rows(
        strong, weak, target, torch.ones(4, dtype=torch.bool), terms.USKDWeights(1.0, 0.1, 0.005, 0.1)
    )
    (grad,) = torch.autograd.grad(plain_rows.mean(), strong, create_graph=True)
    (expected,) = torch.autograd.grad(grad.square().sum(), strong)
    torch.testing.assert_close(second, expected)


@BOTH
def test_forward_mode_derivatives_are_right(loss):
    a, b, target = inputs(4, 6)
    tangent = torch.randn_like(a)
    with forward_ad.dual_level():
        directional = forward_ad.unpack_dual(loss(forward_ad.make_dual(a, tangent), b, target)).tangent
    torch.testing.assert_close(directional, (gradients(loss, a, b, target)[1][0] * tangent).sum())


@BOTH
def test_the_hessian_of_torch_func_is_right(loss):
    a, b, target = inputs(2, 4)
    hessian = torch.func.hessian(lambda x: loss(x, b, target))(a)
    jacobian = torch.func.jacrev(lambda x: torch.func.grad(lambda y: loss(y, b, target))(x))(a)
    torch.testing.assert_close(hessian, jacobian)


@BOTH
def test_the_loss_of_fake_tensors_has_the_right_shape(loss):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rows = loss(torch.empty(4, 6), torch.empty(4, 6), torch.zeros(4, dtype=torch.long), reduction="none")
    assert rows.shape == (4,)


@pytest.mark.slow
def test_a_compiled_loss_takes_a_teacher_made_under_inference_mode():
    student, teacher, target = inputs(4, 6, dtype=torch.float32)
    expected, (expected_grad,) = gradients(nkd_loss, student, teacher, target)
    torch._dynamo.reset()
    compiled = torch.compile(nkd_loss, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        constant = teacher + 0
    for logits in (constant, teacher, constant):
        student.requires_grad_()
        value = compiled(student, logits, target)
        (grad,) = torch.autograd.grad(value, student)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grad, expected_grad)
        student = student.detach()


@BOTH
def test_the_logits_may_be_parameters(loss):
    a, b, target = inputs(4, 6, dtype=torch.float32)
    parameter = torch.nn.Parameter(a)
    loss(parameter, b, target).backward()
    torch.testing.assert_close(parameter.grad, gradients(loss, a, b, target)[1][0])


# ---- nkd_linear_loss ----


def linear_inputs(n=21, classes=20, width=8, teacher_width=5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    sizes = [(n, width), (classes, width), (n, teacher_width), (classes, teacher_width), (classes,), (classes,)]
    tensors = [torch.randn(*size, generator=g, dtype=torch.float64).to(dtype) for size in sizes]
    target = torch.randint(classes, (n,), generator=g)
    target[[1, 5]] = -100
    return [*tensors[:4], target], dict(bias=tensors[4], teacher_bias=tensors[5])


def unfused(hidden, weight, teacher_hidden, teacher_weight, target, *, bias, teacher_bias, ce_weight=0.0, **options):
    logits, teacher_logits = F.linear(hidden, weight, bias), F.linear(teacher_hidden, teacher_weight, teacher_bias)
    reduction = dict(reduction=options.get("reduction", "mean"))
    cross_entropy = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, **reduction)
    return nkd_loss(logits, teacher_logits, target, **options) + ce_weight * cross_entropy


def linear_gradients(loss, args, biases, **options):
    hidden, weight, bias = (x.clone().requires_grad_() for x in (args[0], args[1], biases["bias"]))
    value = loss(hidden, weight, *args[2:], bias=bias, teacher_bias=biases["teacher_bias"], **options)
    return value.detach(), torch.autograd.grad(value, (hidden, weight, bias))


@pytest.mark.parametrize("logits_at_a_time", [1, 100, 10**6])
@pytest.mark.parametrize(
    "options", [{}, dict(ce_weight=1.0), dict(reduction="sum", gamma=0.5), dict(temperature=2.0, ce_weight=0.5)]
)
def test_linear_loss_equals_the_loss_of_the_logits(options, logits_at_a_time, monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", logits_at_a_time)
    args, biases = linear_inputs()
    value, grads = linear_gradients(nkd_linear_loss, args, biases, **options)
    expected, expected_grads = linear_gradients(unfused, args, biases, **options)
    torch.testing.assert_close(value, expected)
    for grad, e in zip(grads, expected_grads):
        torch.testing.assert_close(grad, e)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_linear_loss_takes_lower_precision(dtype, bound, monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", 100)
    args, biases = linear_inputs(dtype=dtype)
    value, grads = linear_gradients(nkd_linear_loss, args, biases)
    assert value.dtype == torch.float32
    wide = [x.double() if x.is_floating_point() else x for x in args]
    expected, expected_grads = linear_gradients(unfused, wide, {name: x.double() for name, x in biases.items()})
    assert value.item() == pytest.approx(expected.item(), rel=bound)
    for grad, e in zip(grads, expected_grads):
        assert grad.dtype == dtype
        assert relative_l2(grad, e) < bound


def test_linear_loss_under_autocast_equals_the_loss_of_cast_inputs():
    args, biases = linear_inputs(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = linear_gradients(nkd_linear_loss, args, biases)
    low = [x.bfloat16() if x.is_floating_point() else x for x in args]
    expected, expected_grads = linear_gradients(
        nkd_linear_loss, low, {name: x.bfloat16() for name, x in biases.items()}
    )
    assert value == expected
    for grad, e in zip(grads, expected_grads):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, e.float())


def test_in_fp16_a_large_sum_of_rows_does_not_overflow():
    """Use many rows of one class, so that the gradient of the sum is above 65504, and that of the mean is small."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(16_000, 16, generator=g) + 8, 0.05 * torch.randn(50, 16, generator=g)
    teacher_hidden, teacher_weight = torch.randn(16_000, 16, generator=g), torch.randn(50, 16, generator=g)
    target = torch.zeros(16_000, dtype=torch.long)
    grads = []
    for dtype in (torch.float16, torch.float32):
        ours = weight.to(dtype).requires_grad_()
        rest = [x.to(dtype) for x in (teacher_hidden, teacher_weight)]
        nkd_linear_loss(hidden.to(dtype), ours, *rest, target, ce_weight=1.0).backward()
        grads.append(ours.grad.float())
    assert (grads[1] * len(target)).abs().max() > 65504
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


def test_linear_loss_takes_any_leading_dimensions_and_needs_no_bias():
    args, _ = linear_inputs()
    hidden, weight, teacher_hidden, teacher_weight, target = args
    expected = nkd_linear_loss(*args)
    folded = nkd_linear_loss(
        hidden.view(3, 7, -1), weight, teacher_hidden.view(3, 7, -1), teacher_weight, target.view(3, 7)
    )
    assert folded == expected
    one = nkd_linear_loss(hidden[0], weight, teacher_hidden[0], teacher_weight, target[0])
    torch.testing.assert_close(one, nkd_loss(hidden[:1] @ weight.T, teacher_hidden[:1] @ teacher_weight.T, target[:1]))


@pytest.mark.parametrize("n", [0, 4])
def test_linear_loss_is_nan_if_all_targets_are_ignored(n):
    args, biases = linear_inputs(n=max(n, 6))
    args = [x if i in (1, 3) else x[:n] for i, x in enumerate(args)]
    args[4] = torch.full_like(args[4], -100)
    value, grads = linear_gradients(nkd_linear_loss, args, biases)
    assert value.isnan()
    for grad in grads:
        assert (grad == 0).all()


def test_linear_loss_works_with_a_frozen_classifier_and_without_gradients():
    args, biases = linear_inputs()
    args[0].requires_grad_()
    nkd_linear_loss(*args, **biases).backward()
    assert args[0].grad is not None
    assert args[1].grad is None
    with torch.no_grad():
        assert nkd_linear_loss(*args, **biases) == nkd_linear_loss(*args, **biases)


@pytest.mark.slow
def test_linear_loss_compiles_as_one_graph_and_works_under_torch_func():
    args, biases = linear_inputs(dtype=torch.float32)
    expected, expected_grads = linear_gradients(nkd_linear_loss, args, biases)
    torch._dynamo.reset()
    value, grads = linear_gradients(torch.compile(nkd_linear_loss, fullgraph=True), args, biases)
    torch.testing.assert_close(value, expected)
    for grad, e in zip(grads, expected_grads):
        torch.testing.assert_close(grad, e)
    by_func = torch.func.grad(lambda hidden: nkd_linear_loss(hidden, *args[1:], **biases))(args[0])
    torch.testing.assert_close(by_func, expected_grads[0])


CAPS = dict(logit_scale=1.5, softcap=2.0, teacher_logit_scale=0.5, teacher_softcap=3.0)


def unfused_capped(hidden, weight, teacher_hidden, teacher_weight, target, *, bias, teacher_bias, **options):
    logits = 2.0 * (1.5 * F.linear(hidden, weight, bias) / 2.0).tanh()
    teacher_logits = 3.0 * (0.5 * F.linear(teacher_hidden, teacher_weight, teacher_bias) / 3.0).tanh()
    return nkd_loss(logits, teacher_logits, target, **options) + F.cross_entropy(logits, target)


@pytest.mark.parametrize("logits_at_a_time", [100, 10**6])
def test_linear_loss_applies_the_softcap(logits_at_a_time, monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", logits_at_a_time)
    args, biases = linear_inputs()
    actual = linear_gradients(nkd_linear_loss, args, biases, **CAPS, ce_weight=1.0)
    torch.testing.assert_close(actual, linear_gradients(unfused_capped, args, biases))
    by_func = torch.func.grad(lambda hidden: nkd_linear_loss(hidden, *args[1:], **biases, **CAPS, ce_weight=1.0))
    torch.testing.assert_close(by_func(args[0]), actual[1][0])  # computed with all logits in memory


def top_k_of(args, biases):
    teacher_logits = F.linear(args[2], args[3], biases["teacher_bias"])
    return top_k_logprobs(teacher_logits, args[4], 4)


@pytest.mark.parametrize("logits_at_a_time", [1, 100, 10**6])
@pytest.mark.parametrize("options", [{}, dict(ce_weight=1.0), dict(reduction="sum", gamma=0.5), dict(softcap=2.0)])
def test_linear_loss_takes_a_teachers_top_k(options, logits_at_a_time, monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", logits_at_a_time)
    args, biases = linear_inputs()
    top_k, target = top_k_of(args, biases), args[4]

    def whole(hidden, weight, *, bias, ce_weight=0.0, softcap=None, **options):
        logits = F.linear(hidden, weight, bias)
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return nkd_topk_loss(logits, *top_k, target, **options) + ce_weight * F.cross_entropy(logits, target)

    def gradients(loss, *more, **options):
        inputs = [x.clone().requires_grad_() for x in (args[0], args[1], biases["bias"])]
        value = loss(inputs[0], inputs[1], *more, bias=inputs[2], **options)
        return value.detach(), torch.autograd.grad(value, inputs)

    expected = gradients(whole, **options)
    actual = gradients(nkd_linear_loss, None, None, target, teacher_top_k=top_k, **options)
    torch.testing.assert_close(actual, expected)
    served = (
        top_k[0].view(3, 7),
        *(x.view(3, 7, 4) for x in top_k[1:]),
    )  # the k classes are in the last dimension, like the width of hidden states
    folded = nkd_linear_loss(
        args[0].view(3, 7, -1),
        args[1],
        None,
        None,
        target.view(3, 7),
        bias=biases["bias"],
        teacher_top_k=served,
        **options,
    )
    torch.testing.assert_close(folded, expected[0])


@pytest.mark.parametrize("logits_at_a_time", [100, 10**6])
def test_linear_loss_uses_the_teachers_largest_class_without_a_target(logits_at_a_time, monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", logits_at_a_time)
    args, biases = linear_inputs()
    teacher_logits = F.linear(args[2], args[3], biases["teacher_bias"])
    args[4] = teacher_logits.argmax(1)
    expected = linear_gradients(nkd_linear_loss, args, biases)
    torch.testing.assert_close(linear_gradients(nkd_linear_loss, [*args[:4], None], biases), expected)
    served, index = teacher_logits.log_softmax(1).topk(20)
    value = nkd_linear_loss(*args[:2], None, None, None, bias=biases["bias"], teacher_top_k=(None, served, index))
    torch.testing.assert_close(value, expected[0])


@pytest.mark.slow
def test_linear_loss_of_a_top_k_compiles_as_one_graph():
    args, biases = linear_inputs(dtype=torch.float32)
    top_k = top_k_of(args, biases)

    def loss(hidden, weight, *_, bias, teacher_bias):
        return nkd_linear_loss(hidden, weight, None, None, args[4], bias=bias, teacher_top_k=top_k, ce_weight=1.0)

    torch._dynamo.reset()
    actual = linear_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager"), args, biases)
    torch.testing.assert_close(actual, linear_gradients(loss, args, biases))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher_top_k=None), "a teacher is missing"),
        (dict(teacher_hidden=torch.zeros(4, 2)), "replaces the teacher's other arguments"),
        (dict(teacher_softcap=30.0), "replaces"),
        (dict(temperature=2.0), "requires temperature=1"),
        (dict(teacher_logit_scale=2.0), "requires temperature=1"),
        (dict(softcap=0.0), "softcap must be > 0 and finite, got 0"),
        (dict(logit_scale=math.inf), "logit_scale must be > 0 and finite, got inf"),
        (dict(weight=torch.zeros(1, 3)), "at least 2"),
        (
            dict(teacher_top_k=(torch.zeros(4), torch.zeros(4, 2), torch.zeros(4, 3).long())),
            r"must be \(4, k\) with k >= 1, got \(4, 2\) and \(4, 3\)",
        ),
    ],
)
def test_linear_loss_refuses_a_top_k_that_does_not_fit(change, message):
    call = (
        dict(
            hidden=torch.zeros(4, 3),
            weight=torch.zeros(5, 3),
            teacher_hidden=None,
            teacher_weight=None,
            target=torch.zeros(4).long(),
            teacher_top_k=(torch.zeros(4), torch.zeros(4, 2), torch.ones(4, 2).long()),
        )
        | change
    )
    with pytest.raises(ValueError, match=message):
        nkd_linear_loss(**call)


def test_linear_loss_refuses_a_second_derivative_and_a_second_backward():
    args, biases = linear_inputs()
    args[0].requires_grad_()
    (grad,) = torch.autograd.grad(nkd_linear_loss(*args, **biases), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(grad.sum(), args[0])
    loss = nkd_linear_loss(*args, **biases)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_linear_loss_never_stores_all_logits(monkeypatch):
    monkeypatch.setattr(kdlite.linear, "LOGITS_AT_A_TIME", 20000)
    args, _ = linear_inputs(n=400, classes=2000, dtype=torch.float32)
    args[0].requires_grad_(), args[1].requires_grad_()
    assert peak_bytes(nkd_linear_loss, tuple(args)) < 400 * 2000 * 4 / 2
    top_k = torch.full((400,), -1.0), torch.full((400, 3), -3.0), torch.arange(3).expand(400, 3)

    def loss(hidden, weight):
        return nkd_linear_loss(hidden, weight, None, None, args[4], teacher_top_k=top_k)

    assert peak_bytes(loss, tuple(args[:2])) < 400 * 2000 * 4 / 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(hidden=torch.zeros(4, 9)), ValueError, r"hidden must be \(..., D\).* got \(4, 9\), \(5, 3\) and None"),
        (dict(weight=torch.zeros(6, 3)), ValueError, r"same number of classes.* \(6, 3\) and \(5, 2\)"),
        (dict(weight=torch.zeros(5)), ValueError, r"weight \(C, D\)"),
        (dict(teacher_hidden=torch.zeros(3, 2)), ValueError, r"teacher_hidden without its last dimension, \(3,\)"),
        (dict(bias=torch.zeros(4)), ValueError, r"bias \(C,\) or None"),
        (dict(target=torch.zeros(4, 5)), TypeError, "class indices, integers, got torch.float32"),
        (
            dict(target=torch.zeros(3).long()),
            ValueError,
            r"shape of hidden without its last dimension, \(4,\); got \(3,\)",
        ),
        (dict(hidden=torch.zeros(4, 3).long()), TypeError, "hidden must be floating point"),
        (dict(hidden=torch.zeros(4, 3).half()), TypeError, "hidden and weight must have one dtype"),
        (dict(reduction="none"), ValueError, '"mean" or "sum"'),
        (dict(reduction="average"), ValueError, "none, mean, sum, got 'average'"),
        (dict(temperature=0.0), ValueError, "temperature"),
        (dict(ce_weight=-1.0), ValueError, "ce_weight"),
        (dict(gamma=-1.0), ValueError, "gamma"),
    ],
)
def test_linear_loss_refuses_bad_input(change, error, message):
    call = (
        dict(
            hidden=torch.zeros(4, 3),
            weight=torch.zeros(5, 3),
            teacher_hidden=torch.zeros(4, 2),
            teacher_weight=torch.zeros(5, 2),
            target=torch.zeros(4).long(),
        )
        | change
    )
    with pytest.raises(error, match=message):
        nkd_linear_loss(**call)


def test_linear_loss_refuses_a_class_out_of_range():
    args, biases = linear_inputs()
    args[4][3] = 20
    with pytest.raises((RuntimeError, IndexError), match=r"out of (bounds|range)"):
        nkd_linear_loss(*args, **biases)
