"""What only a GPU would show, on a machine without one: a tensor left on the host, a step that waits for the device.

CUDA tensors are torch's fake ones, which know their shape, dtype and device, hold no values, and refuse to be read.
Host tensors stay real. Three things cannot be had without a driver, and are put in their place here:

- autograd's engine asks CUDA for its streams, so Tensor.backward walks the graph's nodes itself (``walk_backward``);
- torch.autocast and GradScaler switch themselves off where torch.cuda.is_available() is False, so it says True;
- torch.Generator("cuda") cannot be made, so what takes a generator gets None. That leaves DeviceLoader to a GPU.

A fake tensor is a subclass of Tensor, for which kdlite.fused steps aside: tests of the losses run both ways.
"""

import functools
import warnings

import own_models
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.nn import functional as F
from torch.utils._pytree import tree_map

import train
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
from kdlite.training import loading

CUDA = torch.device("cuda", 0)
BOTH = pytest.mark.parametrize("loss", [nkd_loss, uskd_loss])
WAYS = pytest.mark.parametrize("way", ["fused", "terms"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


class FakeCuda(FakeTensorMode):
    """Fakes what is on the GPU, and what comes from there, and runs what is on the host."""

    faking = False  # what a fake operation makes on the host on its way is fake as well

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.arg_tree_leaves(*args, **kwargs)
        on_gpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if not on_gpu and not self.faking and not any(isinstance(x, FakeTensor) for x in leaves):
            return func(*args, **kwargs)
        args, kwargs = tree_map(self.fake_of, (args, kwargs))
        before, self.faking = self.faking, True
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self.faking = before

    def fake_of(self, x):
        return self.from_tensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) else x


def walk_backward(root, gradient=None):
    """Tensor.backward without the engine: each node is called once, after all that it gets is summed.

    As the engine does, it demands every gradient's device, sums what was broadcast, and casts. Of the arguments of a
    Function, those that are no tensors come last.
    """
    users, nodes = {root.grad_fn: 0}, [root.grad_fn]
    for node in nodes:
        for after, _ in node.next_functions:
            if after is not None:
                nodes += [after] if after not in users else []
                users[after] = users.get(after, 0) + 1
    waiting = {root.grad_fn: {0: torch.ones_like(root) if gradient is None else gradient}}
    ready = [root.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            given = waiting.pop(node, {})
            for i, expected in enumerate(node._input_metadata):
                if i in given:
                    assert given[i].device == expected.device, node
                    given[i] = given[i].sum_to_size(expected.shape).to(expected.dtype)
            if hasattr(node, "variable"):
                leaf = node.variable
                if given:
                    leaf.grad = given[0] if leaf.grad is None else leaf.grad + given[0]
                continue
            call = node.apply if isinstance(node, torch.autograd.function.BackwardCFunction) else node
            results = call(*(given.get(i) for i in range(len(node._input_metadata)))) if given else None
            results = results if isinstance(results, tuple) else (results,) * len(node.next_functions)
            for (after, i), result in zip(node.next_functions, results):
                if after is None:
                    continue
                if result is not None:
                    sums = waiting.setdefault(after, {})
                    sums[i] = sums[i] + result if i in sums else result
                users[after] -= 1
                if not users[after]:
                    ready.append(after)


@pytest.fixture
def cuda(monkeypatch):
    """The mode, entered."""
    torch._C._ensureCUDADeviceGuardSet()  # FakeTensorMode does it itself where is_available says False
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") likewise
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *args: None)  # would make a real tensor
    monkeypatch.setattr(torch.Tensor, "backward", walk_backward)
    with FakeCuda() as mode, warnings.catch_warnings():
        warnings.filterwarnings("error", ".*CUDA is not available")  # autocast and GradScaler are off
        yield mode
    torch._C._set_only_lift_cpu_tensors(lifts)


@pytest.fixture
def choose(monkeypatch):
    """Take the fast path of the losses, or the plain one."""

    def choose(way):
        for module in (fused, linear):
            monkeypatch.setattr(module, "can_fuse", lambda *logits: way == "fused")

    return choose


def logits(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, device=CUDA, requires_grad=True)


def labels(*shape, classes=10):
    return torch.randint(classes, shape, device=CUDA)


def on_gpu(tensor, dtype=torch.float32):
    return tensor is not None and tensor.device == CUDA and tensor.dtype == dtype


# ---- the harness finds what it is for -----------------------------------------------------------------------------


def planted(fault):
    def loss(a, b, target, **options):
        if fault == "host tensor":
            return nkd_loss(a + torch.zeros(10), b, target, **options)
        if fault == "item":
            return nkd_loss(a, b, target, **options) * a.sum().item()
        if fault == "copy":
            return nkd_loss(a, b, target, **options) * float(a.detach().sum().cpu())
        if fault == "branch":
            return nkd_loss(a, b, target, **options) if a.sum() > 0 else a.sum()
        return nkd_loss(a, b, target.to("cpu"), **options)

    return loss


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("host tensor", FakeTensorDeviceMismatchError),
        ("host target", FakeTensorDeviceMismatchError),
        ("item", DataDependentOutputException),
        ("copy", DataDependentOutputException),
        ("branch", DataDependentOutputException),
    ],
)
@WAYS
def test_a_planted_fault_in_a_loss_is_caught(cuda, choose, way, fault, error):
    choose(way)
    with pytest.raises(error):
        planted(fault)(logits(4, 10), logits(4, 10), labels(4))


@pytest.mark.parametrize("fault", ["host tensor", "item"])
def test_a_planted_fault_in_a_backward_is_caught(cuda, fault):
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad + torch.zeros(10) if fault == "host tensor" else grad * grad.sum().item()

    loss = Faulty.apply(logits(4, 10)).sum()
    with pytest.raises((FakeTensorDeviceMismatchError, DataDependentOutputException)):
        loss.backward()


def test_the_walk_gives_the_engines_gradients(monkeypatch):
    """On the host, with real numbers: a small CNN with its weak head, and both losses."""
    torch.manual_seed(0)
    net = WithWeakHead(own_models.tiny(10), "layer2", example_input=torch.zeros(2, 3, 16, 16))
    images, target, teacher = torch.randn(8, 3, 16, 16), torch.randint(10, (8,)), torch.randn(8, 10)
    found = []
    for backward in (torch.Tensor.backward, walk_backward):
        net.zero_grad()
        strong, weak = net(images)
        backward(nkd_loss(strong, teacher, target) + uskd_loss(strong, weak, target))
        found.append([parameter.grad.clone() for parameter in net.parameters()])
    for engines, walks in zip(*found):
        torch.testing.assert_close(walks, engines)


# ---- losses -------------------------------------------------------------------------------------------------------


@BOTH
@WAYS
@DTYPES
@pytest.mark.parametrize("shape", [(4, 10), (4, 10, 3, 2), (10,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_loss_of_class_indices_stays_on_the_device(cuda, choose, loss, way, dtype, shape, reduction):
    choose(way)
    a, b = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    target = labels(*shape[:1], *shape[2:]) if len(shape) > 1 else labels()
    value = loss(a, b, target, ignore_index=3, reduction=reduction)
    assert on_gpu(value)
    assert value.shape == (target.shape if reduction == "none" else ())
    value.sum().backward()
    assert on_gpu(a.grad, dtype)
    assert b.grad is None if loss is nkd_loss else on_gpu(b.grad, dtype)


@BOTH
@DTYPES
@pytest.mark.parametrize("shape", [(4, 10), (4, 10, 3, 2)])
def test_a_loss_of_class_probabilities_stays_on_the_device(cuda, loss, dtype, shape):
    a, b = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    value = loss(a, b, torch.rand(shape, device=CUDA))
    assert on_gpu(value)
    value.backward()
    assert on_gpu(a.grad, dtype)


@WAYS
def test_nkd_with_a_temperature_and_chunks_stays_on_the_device(cuda, choose, monkeypatch, way):
    choose(way)
    monkeypatch.setattr(fused, "CHUNK_ELEMENTS_ELSEWHERE", 20)
    a = logits(5, 10)
    nkd_loss(a, logits(5, 10), labels(5), temperature=3.0).backward()
    assert on_gpu(a.grad)


@WAYS
@DTYPES
@pytest.mark.parametrize("bias", [False, True])
def test_nkd_linear_loss_stays_on_the_device(cuda, choose, monkeypatch, way, dtype, bias):
    choose(way)
    monkeypatch.setattr(linear, "LOGITS_AT_A_TIME", 20)
    hidden, weight, b = logits(5, 6, dtype=dtype), logits(10, 6, dtype=dtype), logits(10, dtype=dtype) if bias else None
    value = nkd_linear_loss(hidden, weight, logits(5, 7, dtype=dtype), logits(10, 7, dtype=dtype), labels(5), bias=b,
                            ce_weight=1.0)  # fmt: skip
    assert on_gpu(value)
    value.backward()
    assert all(on_gpu(x.grad, dtype) for x in (hidden, weight, b) if x is not None)


@DTYPES
@pytest.mark.parametrize("shape", [(4, 10), (4, 10, 3, 2), (10,)])
def test_nkd_topk_loss_stays_on_the_device(cuda, dtype, shape):
    student, teacher = logits(*shape, dtype=dtype), logits(*shape, dtype=dtype)
    target = labels(*shape[:1], *shape[2:]) if len(shape) > 1 else labels()
    top_k = top_k_logprobs(teacher, target, 3)
    assert all(x.device == CUDA for x in top_k)
    value = nkd_topk_loss(student, *top_k, target, ignore_index=3)
    assert on_gpu(value)
    value.backward()
    assert on_gpu(student.grad, dtype)


def test_nkd_linear_loss_of_a_top_k_stays_on_the_device(cuda, choose):
    choose("terms")  # the fused way calls autograd's engine in its forward, which needs a driver
    hidden, weight = logits(5, 6), logits(10, 6)
    top_k = top_k_logprobs(logits(5, 10), labels(5), 3)
    value = nkd_linear_loss(hidden, weight, None, None, labels(5), teacher_top_k=top_k, softcap=30.0, ce_weight=1.0)
    assert on_gpu(value)
    value.backward()
    assert all(on_gpu(x.grad) for x in (hidden, weight))


def test_each_way_is_the_one_that_runs(cuda, choose, monkeypatch):
    ran = []
    for module in (fused, terms):
        row_loss = module.nkd_rows
        monkeypatch.setattr(
            module, "nkd_rows", lambda *args, row_loss=row_loss, module=module: ran.append(module) or row_loss(*args)
        )
    for way in ("fused", "terms"):
        choose(way)
        nkd_loss(logits(4, 10), logits(4, 10), labels(4))
    assert ran == [fused, terms]


@BOTH
def test_a_host_target_is_refused(cuda, loss):
    with pytest.raises(FakeTensorDeviceMismatchError):
        loss(logits(4, 10), logits(4, 10), torch.zeros(4, dtype=torch.long))


# ---- modules ------------------------------------------------------------------------------------------------------


def tiny():
    return own_models.tiny(10).to(CUDA)


def with_weak_head():
    net = WithWeakHead(own_models.tiny(10), "layer2", example_input=torch.zeros(2, 3, 16, 16))
    return net.to(CUDA).train()


def test_a_teacher_normalises_and_resizes_on_the_device(cuda):
    teacher = Teacher(own_models.tiny(10), [0.5] * 3, [0.2] * 3, [0.4] * 3, [0.3] * 3, size=(24, 24)).to(CUDA)
    out = teacher(torch.rand(4, 3, 16, 16, device=CUDA))
    assert on_gpu(out)
    assert out.shape == (4, 10)
    with pytest.raises(ValueError, match="the teacher is on cpu, the images are on cuda:0"):
        Teacher(own_models.tiny(10), size=(24, 24))(torch.rand(4, 3, 16, 16, device=CUDA))


@pytest.mark.parametrize("moved", ["before", "after"])
def test_the_weak_head_is_where_the_model_is(cuda, moved):
    if moved == "before":
        example = torch.zeros(2, 3, 16, 16, device=CUDA)
        net = WithWeakHead(tiny(), "layer2", example_input=example).train()
    else:
        net = with_weak_head()
    for _ in range(3):  # the tap copies in the first forward alone
        strong, weak = net(torch.rand(4, 3, 16, 16, device=CUDA))
        assert on_gpu(strong)
        assert on_gpu(weak)
        (strong + weak).sum().backward()
    assert all(on_gpu(parameter.grad) for parameter in net.parameters())


# ---- a step of train.py -------------------------------------------------------------------------------------------


def objective(**options):
    return functools.partial(train.named_losses, **options)


def step(amp, scaler, soft=False, clip_grad=1.0, kd="nkd", opt="momentum", loss=None):
    """One forward_backward and one update, both as train.py does them; the net and the losses."""
    net = with_weak_head()
    teacher = Teacher(own_models.tiny(10)).to(CUDA)
    optimizer, _ = train.make_optimizer(net, opt, 0.1, 0.01, 0.9, "cosine", 2, 0, [1], 0.1, 5)
    images = torch.rand(4, 3, 16, 16, device=CUDA)
    target = torch.rand(4, 10, device=CUDA) if soft else labels(4)
    for _ in range(2):
        losses = train.forward_backward(net, teacher, images, target, loss or objective(kd=kd), amp, scaler, 2)
    assert all(on_gpu(parameter.grad) for parameter in net.parameters())
    train.update(net, optimizer, scaler, clip_grad)
    return net, losses


@WAYS
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kd", ["nkd", "kd"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_step_does_not_wait_for_the_device(cuda, choose, way, soft, kd, amp):
    choose(way)
    net, losses = step(amp, torch.amp.GradScaler("cuda", enabled=False), soft, kd=kd)
    assert sorted(losses) == sorted(["ce", kd, "uskd"])
    assert all(map(on_gpu, losses.values()))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("opt", ["momentum", "sgd", "adamw", "lamb"])
def test_an_optimizer_does_not_wait_for_the_device(cuda, opt):
    step(None, torch.amp.GradScaler("cuda", enabled=False), clip_grad=None, opt=opt)


def test_autocast_gives_the_losses_half_precision_logits(cuda):
    seen = []

    def spy(strong, weak, teacher, target):
        seen.extend(x.dtype for x in (strong, weak, teacher))
        return objective(kd="nkd")(strong, weak, teacher, target)

    step(torch.bfloat16, torch.amp.GradScaler("cuda", enabled=False), loss=spy)
    assert set(seen) == {torch.bfloat16}


def test_a_planted_read_in_the_objective_of_a_step_is_caught(cuda):
    def reads(*args):
        losses = objective(kd="nkd")(*args)
        return losses if losses["ce"].isfinite() else {}

    with pytest.raises(DataDependentOutputException):
        step(None, torch.amp.GradScaler("cuda", enabled=False), loss=reads)


@pytest.mark.slow
@WAYS
def test_a_step_in_fp16_waits_once_for_gradscalers_own_look_at_the_gradients(cuda, choose, monkeypatch, way):
    """GradScaler.step reads on the host whether a gradient was not finite, which no fake tensor can answer."""
    choose(way)
    scaler = torch.amp.GradScaler("cuda")
    assert scaler.is_enabled()
    with pytest.raises(DataDependentOutputException):
        step(torch.float16, scaler)
    reads = []

    def answered(self, optimizer, state, *args, **options):
        reads.append([found.device for found in state["found_inf_per_device"].values()])
        return optimizer.step(*args, **options)

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", answered)
    monkeypatch.setattr(torch, "_amp_update_scale_", lambda scale, *args: scale)  # its fake is of one device alone
    scaler = torch.amp.GradScaler("cuda")
    net, _ = step(torch.float16, scaler)
    assert reads == [[CUDA]]
    assert on_gpu(scaler._scale)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_log_of_losses_is_read_at_intervals_alone(cuda):
    log = train.LossLog(skips_steps=False)
    for i in range(3):
        log.add(i, {"ce": logits(), "nkd": logits()})
    assert all(on_gpu(values) for _, values in log.waiting)
    with pytest.raises(DataDependentOutputException):
        log.read()


@pytest.mark.parametrize("foreach", [True, False])
def test_the_average_of_the_weights_is_made_on_the_device(cuda, foreach):
    """Made on the host and then moved: it makes a generator of its own, for averages in bfloat16."""
    student = tiny()
    ema = ModelEmaV3(own_models.tiny(10), decay=0.9, use_warmup=True, foreach=foreach)
    ema.module.to(CUDA)
    for i in range(3):
        ema.update(student, i)
    assert all(value.device == CUDA for value in ema.module.state_dict().values())
    if not foreach:  # the fake of a foreach kernel looks at no devices
        with pytest.raises(FakeTensorDeviceMismatchError):
            ema.update(own_models.tiny(10), 4)


# ---- batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_are_normalised_on_the_device(cuda, layout):
    to_device = train.ToDevice([0.5] * 3, [0.2] * 3, CUDA, layout)
    images = to_device(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    assert on_gpu(images)
    assert images.is_contiguous(memory_format=layout)
    to_device.mean = to_device.mean.cpu()
    with pytest.raises(FakeTensorDeviceMismatchError):
        to_device(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize("crop", ["pad", "none"])
def test_a_batch_is_cropped_and_flipped_on_the_device(cuda, crop):
    """generator=None, the default generator of the device: one of its own needs a driver."""
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=CUDA)
    cropped = loading.crop_and_flip(images, crop, 0.5, generator=None)
    assert on_gpu(cropped, torch.uint8)
    assert cropped.shape == images.shape


@pytest.mark.parametrize(("erasing", "mixup", "cutmix"), [(1.0, 0, 0), (0, 0.8, 0), (0, 0, 1.0), (0.5, 0.8, 1.0)])
def test_a_batch_is_augmented_on_the_device(cuda, erasing, mixup, cutmix):
    augment = train.batch_augmentation(erasing, mixup, cutmix, 10, CUDA)
    images, target = augment(torch.rand(4, 3, 16, 16, device=CUDA), labels(4))
    assert on_gpu(images)
    assert target.device == CUDA
    assert target.shape == ((4, 10) if mixup or cutmix else (4,))


# ---- evaluation ---------------------------------------------------------------------------------------------------


def evaluate(model):
    batches = [train.Batch(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), [])] * 3
    to_device = train.ToDevice([0.5] * 3, [0.2] * 3, CUDA, torch.contiguous_format)
    return train.evaluate(model, batches, to_device, torch.bfloat16, train.CorruptCount("validation", 12))


def test_evaluation_reads_once_at_its_end(cuda, monkeypatch):
    with pytest.raises(DataDependentOutputException):
        evaluate(tiny())
    read = []

    def tolist(tensor):
        read.append(tensor)
        return [12.0, 6.0, 9.0, 12.0, 0.0]

    monkeypatch.setattr(FakeTensor, "tolist", tolist, raising=False)
    assert evaluate(tiny()) == {"val_loss": 1.0, "val_top1": 50.0, "val_top5": 75.0}
    assert [on_gpu(tensor, torch.float64) for tensor in read] == [True]


def test_a_planted_read_in_evaluation_is_caught(cuda, monkeypatch):
    class Reads(nn.Module):
        def forward(self, images):
            out = images.flatten(1)[:, :10]
            return out if out.isfinite().all() else F.relu(out)

    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [12.0, 6.0, 9.0, 12.0, 0.0], raising=False)
    with pytest.raises(DataDependentOutputException):
        evaluate(Reads())
