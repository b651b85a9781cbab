"""Test the device placement of a training step and an evaluation on a fake GPU (tests/fake_cuda.py)."""

import types

import own_models
import pytest
import torch
from fake_cuda import CUDA, fake_gpu, on_gpu
from timm.utils import ModelEmaV3
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorDeviceMismatchError

import train
from kdlite import Teacher, WithWeakHead
from kdlite.training import loading
from kdlite.training.checkpoint import LossLog
from kdlite.training.loading import Batch

MEAN, STD = [0.5] * 3, [0.2] * 3


@pytest.fixture
def cuda(monkeypatch):
    with fake_gpu(monkeypatch):
        yield


def host_batch(n=4):
    return Batch(torch.zeros(n, 3, 16, 16, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), [])


def gpu_batch(soft=False):
    images = torch.rand(4, 3, 16, 16, device=CUDA)
    return Batch(images, torch.rand(4, 10, device=CUDA) if soft else torch.randint(10, (4,), device=CUDA), [])


def step(amp, scaler, soft=False, kd="nkd", opt="momentum", clip_grad=1.0):
    """Run one train_step and one optimizer_step; return the network and the losses."""
    net = WithWeakHead(own_models.tiny(10), "layer2", example_input=torch.zeros(2, 3, 16, 16)).to(CUDA).train()
    teacher = Teacher(own_models.tiny(10)).to(CUDA)
    args = types.SimpleNamespace(
        opt=opt,
        lr=0.1,
        weight_decay=0.01,
        layer_decay=None,
        schedule="cosine",
        epochs=2,
        warmup_epochs=0,
        step_epochs=[1],
        step_factor=0.1,
    )
    optimizer = train.build_optimizer(net, args)
    dtypes = []
    net.head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    losses = train.train_step(net, teacher, gpu_batch(soft), train.Method(kd=kd), amp, scaler, 2)
    assert all(on_gpu(parameter.grad) for parameter in net.parameters())
    assert dtypes == [amp or torch.float32]
    train.optimizer_step(net, optimizer, scaler, clip_grad)
    return net, losses


@pytest.mark.parametrize(("kd", "soft", "amp"), [("nkd", False, None), ("kd", True, torch.bfloat16)])
def test_a_step_stays_on_the_device(cuda, kd, soft, amp):
    net, losses = step(amp, torch.amp.GradScaler("cuda", enabled=False), soft, kd)
    assert sorted(losses) == sorted(["ce", kd, "uskd"])
    assert all(map(on_gpu, losses.values()))
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
def test_an_optimizer_does_not_wait_for_the_device(cuda, opt):
    step(None, torch.amp.GradScaler("cuda", enabled=False), clip_grad=None, opt=opt)


def test_in_an_fp16_step_only_gradscaler_reads_a_value_on_the_host(cuda, monkeypatch):
    """Expect an error of GradScaler.step, which reads a value on the host; then replace the part that reads it."""
    with pytest.raises(DataDependentOutputException):
        step(torch.float16, torch.amp.GradScaler("cuda"))
    reads = []

    def answered(self, optimizer, state, *args, **options):
        reads.append([found.device for found in state["found_inf_per_device"].values()])
        return optimizer.step(*args, **options)

    monkeypatch.setattr(torch.amp.GradScaler, "_maybe_opt_step", answered)
    # on the fake GPU an operation cannot mix devices, and this one does
    monkeypatch.setattr(torch, "_amp_update_scale_", lambda scale, *args: scale)
    step(torch.float16, torch.amp.GradScaler("cuda"))
    assert reads == [[CUDA]]


def test_the_log_of_losses_stays_on_the_device_until_it_is_read(cuda):
    log = LossLog(skips_steps=False)
    log.add(0, {"ce": torch.rand((), device=CUDA), "nkd": torch.rand((), device=CUDA)})
    assert all(on_gpu(values) for _, values in log.waiting)
    with pytest.raises(DataDependentOutputException):
        log.read()


@pytest.mark.parametrize("foreach", [True, False])
def test_the_ema_of_the_weights_is_computed_on_the_device(cuda, foreach):
    student = own_models.tiny(10).to(CUDA)
    ema = ModelEmaV3(own_models.tiny(10), decay=0.9, use_warmup=True, foreach=foreach)
    ema.module.to(CUDA)
    ema.update(student, 1)
    assert all(value.device == CUDA for value in ema.module.state_dict().values())


def test_a_batch_is_normalised_and_augmented_on_the_device(cuda):
    to_device = loading.ToDevice(MEAN, STD, CUDA)
    batch = to_device(host_batch())
    assert on_gpu(batch.images)
    assert batch.labels.device == CUDA
    for options in ((1.0, 0, 0), (0, 0.8, 0), (0.5, 0, 1.0)):
        mixed = loading.Augment(*options, 10, CUDA)(gpu_batch())
        assert on_gpu(mixed.images)
        assert mixed.labels.device == CUDA
    for crop in ("pad", "none"):  # generator=None is the default generator of the device; a new one needs a driver
        images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8, device=CUDA)
        assert on_gpu(loading.crop_and_flip(images, crop, 0.5, generator=None), torch.uint8)
    to_device.mean = to_device.mean.cpu()
    with pytest.raises(FakeTensorDeviceMismatchError):
        to_device(host_batch())


def test_in_an_evaluation_the_host_reads_from_the_device_once_at_the_end(cuda, monkeypatch):
    read = []

    def tolist(tensor):
        read.append(tensor)
        raise StopIteration

    monkeypatch.setattr(FakeTensor, "tolist", tolist, raising=False)
    to_device = loading.ToDevice(MEAN, STD, CUDA)
    corrupt = loading.CorruptCount("validation", 12)
    with pytest.raises(StopIteration):
        train.evaluate(own_models.tiny(10).to(CUDA), [host_batch()] * 3, to_device, torch.bfloat16, corrupt)
    assert [on_gpu(tensor, torch.float64) for tensor in read] == [True]
