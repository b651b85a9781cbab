"""Test the device placement of the losses and modules on a fake GPU (tests/fake_cuda.py).

The losses use plain autograd for a subclass of Tensor, such as a fake tensor. So the fixture `way`
forces the fused evaluation, or the plain one (terms).
"""

import own_models
import pytest
import torch
from fake_cuda import CUDA, fake_gpu, on_gpu, walk_backward
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from kdlite import (
    Teacher,
    WithWeakHead,
    fused,
    linear,
    nkd_linear_loss,
    nkd_loss,
    nkd_topk_loss,
    terms,
    top_k_logprobs,
    uskd_loss,
)

BOTH = pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])


@pytest.fixture
def cuda(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


@pytest.fixture(params=["fused", "terms"])
def way(request, monkeypatch):
    for module in (fused, linear):
        monkeypatch.setattr(module, "can_fuse", lambda *logits: request.param == "fused")
    return request.param


def logits(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, device=CUDA, requires_grad=True)


def labels(*shape, classes=10):
    return torch.randint(classes, shape, device=CUDA)


# ---- the fake GPU finds planted faults -------------------------------------------------------------------------------


class Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.zeros(10)


def test_a_planted_fault_is_caught(cuda, way):
    a, b, target = logits(4, 10), logits(4, 10), labels(4)
    with pytest.raises(FakeTensorDeviceMismatchError):
        nkd_loss(a + torch.zeros(10), b, target)
    with pytest.raises(FakeTensorDeviceMismatchError):
        nkd_loss(a, b, torch.zeros(4, dtype=torch.long))
    with pytest.raises(DataDependentOutputException):
        nkd_loss(a, b, target) * a.sum().item()
    with pytest.raises(FakeTensorDeviceMismatchError):
        Faulty.apply(a).sum().backward()


def test_the_fake_backward_gives_the_gradients_of_autograd():
    """Compare the gradients of a small CNN with a weak head and both losses, on real tensors of the host."""
    torch.manual_seed(0)
    net = WithWeakHead(own_models.tiny(10), "layer2", example_input=torch.zeros(2, 3, 16, 16))
    images, target, teacher = torch.randn(8, 3, 16, 16), torch.randint(10, (8,)), torch.randn(8, 10)
    found = []
    for backward in (torch.Tensor.backward, walk_backward):
        net.zero_grad()
        strong, weak = net(images)
        backward(nkd_loss(strong, teacher, target) + uskd_loss(strong, weak, target))
        found.append([parameter.grad.clone() for parameter in net.parameters()])
    for engine, walk in zip(*found):
        torch.testing.assert_close(walk, engine)


# ---- losses -------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("shape", "dtype"), [((4, 10), torch.float32), ((4, 10, 3, 2), torch.bfloat16)])
def test_a_loss_of_class_indices_stays_on_the_device(cuda, way, loss, shape, dtype):
    a, b = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    target = labels(*shape[:1], *shape[2:])
    value = loss(a, b, target, ignore_index=3)
    assert on_gpu(value)
    value.backward()
    assert on_gpu(a.grad, dtype)
    assert b.grad is None if loss is nkd_loss else on_gpu(b.grad, dtype)


@BOTH
def test_a_loss_of_class_probabilities_stays_on_the_device(cuda, loss):
    a = logits(4, 10, 3)
    value = loss(a, logits(4, 10, 3), torch.rand(4, 10, 3, device=CUDA))
    assert on_gpu(value)
    value.backward()
    assert on_gpu(a.grad)


def test_nkd_with_a_temperature_and_chunks_stays_on_the_device(cuda, way, monkeypatch):
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS_ELSEWHERE", 20)
    a = logits(5, 10)
    nkd_loss(a, logits(5, 10), labels(5), temperature=3.0).backward()
    assert on_gpu(a.grad)


@pytest.mark.parametrize("bias", [False, True])
def test_nkd_linear_loss_stays_on_the_device(cuda, way, monkeypatch, bias):
    monkeypatch.setattr(linear, "LOGITS_AT_A_TIME", 20)
    hidden, weight, b = logits(5, 6), logits(10, 6), logits(10) if bias else None
    value = nkd_linear_loss(hidden, weight, logits(5, 7), logits(10, 7), labels(5), bias=b, ce_weight=1.0)
    assert on_gpu(value)
    value.backward()
    assert all(on_gpu(x.grad) for x in (hidden, weight, b) if x is not None)


def test_a_top_k_stays_on_the_device(cuda, monkeypatch):
    student, teacher, target = logits(4, 10, 3), logits(4, 10, 3), labels(4, 3)
    top_k = top_k_logprobs(teacher, target, 3)
    assert all(x.device == CUDA for x in top_k)
    value = nkd_topk_loss(student, *top_k, target, ignore_index=3)
    value.backward()
    assert on_gpu(student.grad)
    # plain terms from here: the fused evaluation of a top-k needs autograd's engine
    monkeypatch.setattr(linear, "can_fuse", lambda *logits: False)
    hidden, weight = logits(5, 6), logits(10, 6)
    top_k = top_k_logprobs(logits(5, 10), labels(5), 3)
    nkd_linear_loss(hidden, weight, None, None, labels(5), teacher_top_k=top_k, softcap=30.0, ce_weight=1.0).backward()
    assert all(on_gpu(x.grad) for x in (hidden, weight))


def test_the_forced_evaluation_is_the_one_that_runs(cuda, way, monkeypatch):
    ran = []
    monkeypatch.setattr(fused, "nkd_rows", lambda *args: ran.append("fused") or terms.nkd_rows(*args))
    nkd_loss(logits(4, 10), logits(4, 10), labels(4))
    assert ran == (["fused"] if way == "fused" else [])


# ---- modules ------------------------------------------------------------------------------------------------------


def test_a_teacher_normalises_and_resizes_on_the_device(cuda):
    teacher = Teacher(own_models.tiny(10), [0.5] * 3, [0.2] * 3, [0.4] * 3, [0.3] * 3, size=(24, 24)).to(CUDA)
    out = teacher(torch.rand(4, 3, 16, 16, device=CUDA))
    assert on_gpu(out)
    assert out.shape == (4, 10)
    with pytest.raises(ValueError, match="the teacher is on cpu, the images are on cuda:0"):
        Teacher(own_models.tiny(10), size=(24, 24))(torch.rand(4, 3, 16, 16, device=CUDA))


@pytest.mark.parametrize("moved", ["before", "after"])
def test_the_weak_head_is_on_the_device_of_the_model(cuda, moved):
    model = own_models.tiny(10).to(CUDA if moved == "before" else "cpu")
    example = torch.zeros(2, 3, 16, 16, device=CUDA if moved == "before" else "cpu")
    net = WithWeakHead(model, "layer2", example_input=example).train()
    net = net if moved == "before" else net.to(CUDA)
    strong, weak = net(torch.rand(4, 3, 16, 16, device=CUDA))
    assert on_gpu(strong)
    assert on_gpu(weak)
    (strong + weak).sum().backward()
    assert all(on_gpu(parameter.grad) for parameter in net.parameters())
