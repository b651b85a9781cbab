"""FeatureTap, WithWeakHead and default_tap: every promise of their docstrings, on real architectures."""

import copy
import gc
import io
import itertools
import math
import os
import pickle
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdlite import FeatureTap, Teacher, WithWeakHead, default_tap, uskd_loss


class Net(nn.Module):
    """A small CNN with two stages and a layer that never runs."""

    def __init__(self, checkpointed=None):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
        self.unused = nn.Identity()
        self.fc = nn.Linear(16, 5)
        self.checkpointed = checkpointed  # None, or use_reentrant

    def forward(self, x):
        if self.checkpointed is None:
            x = self.layer2(self.layer1(x))
        else:
            x = checkpoint(lambda x: self.layer2(self.layer1(x)), x.requires_grad_(), use_reentrant=self.checkpointed)
        return self.fc(x.mean((2, 3)))


class Entry(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.key = key

    def forward(self, output):
        return output[self.key]


class Transpose(nn.Module):
    """(N, L, C) -> (L, N, C) and, called again, back: tokens first, as nn.TransformerEncoder has them."""

    def forward(self, x):
        return x.transpose(0, 1)


class Returning(nn.Module):
    """A model whose output is what ``pack`` makes of its logits."""

    def __init__(self, pack):
        super().__init__()
        self.net, self.pack = Net(), pack

    def forward(self, x):
        return self.pack(self.net(x))


class TwoInputs(Net):
    """Logits of images of which a mask, as large as they are, hides a part."""

    def forward(self, x, mask, *, scale):
        return super().forward(x * mask) * scale


class Second(nn.Module):
    def forward(self, x):
        return x[0].mean(1)


def images(n=2, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def train_step(student, x):
    logits, weak_logits = student(x)
    target = torch.arange(len(x)) % logits.shape[1]
    loss = F.cross_entropy(logits, target) + uskd_loss(logits, weak_logits, target)
    loss.backward()
    return loss.detach()


# ---- the tap ----


def test_pop_returns_the_last_output_once():
    model = Net()
    with FeatureTap(model, "layer1") as tap:
        model(images(3))
        model(images(2))
        torch.testing.assert_close(tap.pop(), model.layer1(images(2)))
        tap.pop()
        with pytest.raises(RuntimeError, match="has not run since the last pop"):
            tap.pop()


def test_a_layer_that_never_ran_is_an_error():
    model = Net()
    with FeatureTap(model, "unused") as tap:
        model(images())
        with pytest.raises(RuntimeError, match="'unused' has not run"):
            tap.pop()


def test_a_misspelt_layer_lists_the_nearest():
    with pytest.raises(ValueError, match=r"no layer 'layer_1' in Net; near matches: layer1"):
        FeatureTap(Net(), "layer_1")
    with pytest.raises(ValueError, match=r"near matches: layer1"):  # nothing is near: the first names
        FeatureTap(Net(), "zzzzzzzzz")


def test_after_close_nothing_is_left():
    model = Net()
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    tap = FeatureTap(model, "layer1")
    model(images())
    tap.close()
    tap.close()
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before
    with pytest.raises(RuntimeError, match="the tap is closed"):
        tap.pop()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images()), model(images()))
    torch.testing.assert_close(copy.deepcopy(model)(images()), model(images()))


@pytest.mark.slow
def test_after_close_the_model_exports_to_onnx():
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    student = WithWeakHead(Net(), "layer1", example_input=images())
    train_step(student, images())
    model = student.close().eval()
    batch = torch.export.Dim("batch", min=1, max=8)
    buffer = io.BytesIO()
    torch.onnx.export(
        model, (images(),), dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False
    ).save(buffer)
    graph = onnx.load_from_string(buffer.getvalue()).graph
    assert [output.type.tensor_type.shape.dim[1].dim_value for output in graph.output] == [5]
    torch.jit.trace(model, images())


def test_export_of_the_plain_student_with_a_live_tap():
    """Forgotten close(): the exported program is the plain student all the same, and training goes on."""
    student = WithWeakHead(Net(), "layer1", example_input=images())
    program = torch.export.export(student.eval(), (images(),))
    torch.testing.assert_close(program.module()(images()), student(images()))
    train_step(student.train(), images())


def test_a_deepcopy_of_a_tapped_model_has_no_live_tap():
    model = Net()
    with FeatureTap(model, "layer1") as tap:
        model(images())  # an output is held, which is no leaf and could not be copied
        ema = copy.deepcopy(model)
        expected = tap.pop()
        model(images())
        ema(torch.zeros(1, 3, 8, 8))
        torch.testing.assert_close(tap.pop(), expected)


def test_a_deepcopy_of_a_student_with_weak_head_has_its_own_tap():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    ema = copy.deepcopy(student)
    grand_ema = copy.deepcopy(ema)
    with torch.no_grad():
        ema.model.layer1[0].weight.zero_(), ema.model.layer1[0].bias.zero_()
    assert not torch.equal(student(images())[1], ema(images())[1])
    torch.testing.assert_close(student(images())[1], grand_ema(images())[1])
    assert len(grand_ema.model.layer1._forward_hooks) == 1
    assert len(grand_ema.close().layer1._forward_hooks) == 0
    averaged = torch.optim.swa_utils.AveragedModel(student)
    averaged.update_parameters(student)
    train_step(student, images())
    assert averaged(images())[1].shape == (2, 5)


def test_a_tapped_model_pickles_whole():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    train_step(student, images())
    loaded = pickle.loads(pickle.dumps(student))
    torch.testing.assert_close(loaded(images())[1], student(images())[1])


@pytest.mark.slow
def test_no_memory_grows_over_1000_steps():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    features = []
    handle = student.model.layer1.register_forward_hook(lambda m, a, out: features.append(weakref.ref(out)))

    def tensors_alive():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def steps(n):
        for _ in range(n):
            train_step(student, images())
            student.zero_grad(set_to_none=False)

    steps(1)
    before = tensors_alive()
    steps(1000)
    assert tensors_alive() <= before
    assert sum(ref() is not None for ref in features) == 0
    handle.remove()


def test_gradient_accumulation_equals_one_batch():
    student = WithWeakHead(Net(), "layer1", example_input=images())

    def weak_grads(chunks):
        student.zero_grad()
        for chunk in images(4).chunk(chunks):
            _, weak_logits = student(chunk)
            (F.cross_entropy(weak_logits, torch.zeros(len(chunk)).long()) / chunks).backward()
        return [p.grad.clone() for p in (*student.head.parameters(), *student.model.layer1.parameters())]

    for accumulated, whole in zip(weak_grads(2), weak_grads(1)):
        torch.testing.assert_close(accumulated, whole)


def test_activation_checkpointing_changes_nothing():
    torch.manual_seed(0)
    plain = WithWeakHead(Net(), "layer1", example_input=images())
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.checkpointed = False
    for _ in range(2):
        train_step(plain, images())
        train_step(checkpointed, images())
        assert checkpointed._tap._capture.output is None  # the recomputation in backward was not kept
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_reentrant_checkpointing_is_refused_as_it_would_train_nothing():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    student.model.checkpointed = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        student(images())


@pytest.mark.trial
def test_checkpointing_under_compile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = WithWeakHead(Net(), "layer1", example_input=images())
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.checkpointed = False
    compiled = torch.compile(checkpointed)
    for _ in range(2):
        torch.testing.assert_close(train_step(compiled, images()), train_step(plain, images()))
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_timm_grad_checkpointing_changes_nothing():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=5)
    plain = WithWeakHead(model)
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.set_grad_checkpointing()
    x = images(size=32)
    torch.testing.assert_close(train_step(checkpointed, x), train_step(plain, x))
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast_the_feature_has_the_lower_precision(dtype):
    student = WithWeakHead(Net(), "layer1", example_input=images())
    with torch.autocast("cpu", dtype):
        logits, weak_logits = student(images())
        assert weak_logits.dtype == dtype
        loss = uskd_loss(logits, weak_logits, torch.zeros(2).long())
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.head.weight.grad.abs().sum() > 0


# ---- torch.compile ----


@pytest.mark.slow
def test_tapped_then_compiled_runs_whole_and_trains_the_same():
    torch._dynamo.reset()
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    compiled = torch.compile(copy.deepcopy(student), fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(train_step(compiled, images()), train_step(student, images()))
    for a, b in zip(compiled.parameters(), student.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(compiled.eval()(images()), student.eval()(images()))


@pytest.mark.slow
def test_a_bare_tap_works_when_it_was_there_before_the_first_compiled_call():
    torch._dynamo.reset()
    model = Net()
    with FeatureTap(model, "layer1") as tap:
        torch.compile(model)(images())
        torch.testing.assert_close(tap.pop(), model.layer1(images()))


@pytest.mark.slow
def test_tapping_a_compiled_model_is_refused():
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="compiled already"):
        FeatureTap(torch.compile(Net()), "layer1")
    in_place = Net()
    in_place.compile()
    with pytest.raises(RuntimeError, match="compiled already"):
        FeatureTap(in_place, "layer1")
    part = Net()
    part.layer1 = torch.compile(part.layer1)
    with pytest.raises(RuntimeError, match="compiled already"):
        FeatureTap(part, "layer1")
    FeatureTap(part, "layer2")  # not compiled: fine


@pytest.mark.slow
def test_a_tap_made_behind_a_compiled_models_back_is_an_error_at_pop():
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model)
    compiled(images())
    with FeatureTap(model, "layer1") as tap:
        compiled(images())
        with pytest.raises(RuntimeError, match="tap first and compile after"):
            tap.pop()


# ---- the output as the layer returned it ----


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_what_a_later_layer_does_in_place_does_not_reach_the_tap(mode, context, compiled):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False, affine=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)).train(mode)
    with FeatureTap(net, "1") as tap, context():
        run = torch.compile(net) if compiled else net
        for i in range(3):
            run(images() + i)
            feature = tap.pop()
            torch.testing.assert_close(feature, norm(net[0](images() + i)))
            assert (feature < 0).any()


def test_a_layer_whose_output_nothing_changes_is_not_copied_after_its_first_forward():
    net, outputs = Net(), []
    net.layer1.register_forward_hook(lambda module, args, output: outputs.append(output))
    with FeatureTap(net, "layer1") as tap:
        for _ in range(3):
            net(images())
            assert tap.pop() is outputs[-1]  # the first time as well: the copy was for nothing


def test_an_output_that_is_changed_only_later_is_an_error_then_a_copy():
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity())
    with FeatureTap(net, "0") as tap:
        net(torch.ones(2, 3))
        tap.pop()
        net[1] = nn.ReLU(inplace=True)
        net(torch.ones(2, 3))
        with pytest.raises(RuntimeError, match=r"changed in place.*run the model again"):
            tap.pop()
        net(torch.ones(2, 3))
        torch.testing.assert_close(tap.pop(), net[0](torch.ones(2, 3)))


def test_gradients_through_a_changed_output_are_those_of_the_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 5))
    x = torch.randn(6, 3)
    with FeatureTap(net, "0") as tap:
        for _ in range(2):
            net.zero_grad()
            (net(x).sum() + tap.pop().square().sum()).backward()
            weight = net[0].weight.detach().requires_grad_()
            hidden = F.linear(x, weight, net[0].bias)
            (net[2](hidden.relu()).sum() + hidden.square().sum()).backward()
            torch.testing.assert_close(net[0].weight.grad, weight.grad)


# ---- which dimension holds the channels ----


class Permute(nn.Module):
    def __init__(self, *dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


def classifier(*layers, width):
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(width, 5))


def test_a_sequence_has_its_channels_where_the_layer_puts_them():
    example = torch.randn(1, 2, 100)
    conv = classifier(nn.Conv1d(2, 16, 3), nn.ReLU(), width=16)
    assert WithWeakHead(conv, "0", example_input=example).head.in_features == 16
    assert WithWeakHead(conv, "1", example_input=example).head.in_features == 16  # a layer that has no width of its own
    linear = classifier(nn.Linear(6, 16), nn.GELU(), Permute(0, 2, 1), width=16)  # (N, L, C)
    student = WithWeakHead(linear, "1", example_input=torch.randn(1, 100, 6))
    assert student.head.in_features == 16
    _, weak = student(torch.randn(3, 50, 6))
    assert weak.shape == (3, 5)


def test_a_video_is_averaged_over_time_and_place():
    net = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))
    assert WithWeakHead(net, "0", example_input=torch.zeros(1, 3, 4, 8, 8)).head.in_features == 8


def fixed_size(*shape):
    """A model of 8 px images alone, whose layer "1" returns (N, *shape)."""
    size = math.prod(shape)
    return nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(192, size)), nn.Unflatten(1, shape), nn.Flatten(),
                         nn.Linear(size, 5))  # fmt: skip


@pytest.mark.parametrize("shape", [(16, 4, 64), (8, 8, 8), (6, 10)])
def test_a_shape_with_two_readings_is_asked_for(shape):
    with pytest.raises(ValueError, match=r"can be read in two ways: say channels=1 for \(N, C, ...\) or channels=-1"):
        WithWeakHead(fixed_size(*shape), "1", example_input=images())
    for channels, width in ((1, shape[0]), (-1, shape[-1])):
        student = WithWeakHead(fixed_size(*shape), "1", example_input=images(), channels=channels)
        assert student.head.in_features == width
        assert student(images())[1].shape == (2, 5)
    with pytest.raises(ValueError, match="channels must be 1 or -1"):
        WithWeakHead(fixed_size(*shape), "1", example_input=images(), channels=2)


# ---- what is parallel already, and the model's own hints ----


@pytest.fixture
def one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("where", ["", "layer1"])
@pytest.mark.parametrize("wrapper", ["ddp", "fully_shard", "replicate", "tensor parallel", "data parallel"])
def test_a_model_that_is_parallel_already_is_refused(wrapper, where, one_process):
    from torch.distributed._composable.replicate_with_fsdp import replicate
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = Net()
    mesh = init_device_mesh("cpu", (1,))
    wrap = {
        "ddp": nn.parallel.DistributedDataParallel,
        "data parallel": nn.DataParallel,
        "fully_shard": lambda m: fully_shard(m, mesh=mesh),
        "replicate": lambda m: replicate(m, mesh=mesh),
        "tensor parallel": lambda m: parallelize_module(m, mesh, {"": ColwiseParallel()}),
    }[wrapper]
    if wrapper == "tensor parallel":
        model.fc = wrap(model.fc)
    elif where:
        model.layer1 = wrap(model.layer1)
    else:
        model = wrap(model)
    with pytest.raises(ValueError, match=r"inside .* already.*wrap the plain model in WithWeakHead first"):
        WithWeakHead(model, "layer1", example_input=images())


def test_the_models_hints_reach_the_optimizer_through_the_weak_head():
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    student = WithWeakHead(model)
    names = {parameter: name for name, parameter in student.named_parameters()}

    def decay(module, prefix=""):
        return {
            names[p].removeprefix(prefix): group["weight_decay"]
            for group in create_optimizer_v2(module, "adamw", weight_decay=0.05).param_groups
            for p in group["params"]
        }

    plain = decay(model, "model.")
    assert plain["pos_embed"] == 0
    assert {k: v for k, v in decay(student, "model.").items() if not k.startswith("head.") or k in plain} == plain

    def scales(module):
        return {
            names[p]: group["lr_scale"]
            for group in param_groups_layer_decay(module, 0.05, layer_decay=0.5)
            for p in group["params"]
        }

    wrapped = scales(student)
    assert wrapped.pop("head.weight") == wrapped.pop("head.bias") == 1  # the weak head, like the classifier
    assert wrapped == scales(model)
    assert len(set(wrapped.values())) > 6
    student.set_grad_checkpointing()
    assert model.grad_checkpointing


@pytest.mark.parametrize("name", ["no_weight_decay", "group_matcher", "set_grad_checkpointing", "weights"])
def test_a_hint_that_the_model_has_not_is_no_attribute(name):
    assert not hasattr(WithWeakHead(Net(), "layer1", example_input=images()), name)


# ---- the weak head ----


def test_training_returns_both_logits_and_eval_the_plain_ones():
    student = WithWeakHead(Net(), "layer1", num_classes=5, example_input=images())
    logits, weak_logits = student(images())
    assert logits.shape == weak_logits.shape == (2, 5)
    torch.testing.assert_close(weak_logits, student.head(student.model.layer1(images()).mean((2, 3))))
    torch.testing.assert_close(student.eval()(images()), student.model(images()))
    assert student.tap == "layer1"


def test_head_is_in_parameters_and_checkpoint_but_not_in_the_plain_student():
    model = Net()
    names = set(model.state_dict())
    student = WithWeakHead(model, "layer1", example_input=images())
    assert set(student.state_dict()) == {f"model.{n}" for n in names} | {"head.weight", "head.bias"}
    assert set(student.model.state_dict()) == names
    assert student.close() is model
    assert len(model.layer1._forward_hooks) == 0


def test_the_dry_forward_leaves_no_trace():
    """BatchNorm statistics, the mode of a frozen layer, the random state and the caller's grads stay as they were."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(144, 5))
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    WithWeakHead(model, "1", example_input=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert model.training
    assert not model[1].training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("layer", "message"),
    [("unused", "has not run"), ("layer9", "near matches: layer")],
)
def test_a_bad_layer_is_refused_and_the_model_left_as_it_was(layer, message):
    model = Net()
    with pytest.raises((ValueError, RuntimeError), match=message):
        WithWeakHead(model, layer, example_input=images())
    assert all(len(m._forward_hooks) == 0 for m in model.modules())


def test_class_count_and_feature_shape_are_checked():
    with pytest.raises(ValueError, match=r"num_classes=7.*\(2, 5\)"):
        WithWeakHead(Net(), "layer1", num_classes=7, example_input=images())
    transposed = nn.Sequential(
        nn.Flatten(), nn.Unflatten(1, (4, 48)), Transpose(), Transpose(), nn.Flatten(), nn.Linear(192, 5)
    )
    with pytest.raises(
        ValueError, match=r"'2' returns shape \(4, 2, 48\) for a batch of 2: its first dimension is not"
    ):
        WithWeakHead(transposed, "2", example_input=images())
    grouped = nn.Sequential(Returning(lambda x: {"x": x}), Returning(lambda x: x))
    grouped[1].net = Entry("x")
    with pytest.raises(ValueError, match=r"layer '0' must return a feature .* for the batch.* got a dict of 'x'"):
        WithWeakHead(grouped, "0", example_input=images())
    with pytest.raises(ValueError, match=r"must return \(N, C\) logits, got shape \(2, 8, 8, 8\)"):
        WithWeakHead(Net().layer1, "0", example_input=images())


# ---- outputs that hold the logits, and inputs that are not one tensor ----


@pytest.mark.parametrize(
    ("pack", "where"),
    [
        (lambda x: {"logits": x, "hidden_states": x.T}, None),
        (lambda x: SimpleNamespace(logits=x), None),
        (lambda x: {"out": x}, None),  # the only entry
        (lambda x: {"aux": 2 * x, "out": x}, "out"),
        (lambda x: SimpleNamespace(scores=x), "scores"),
        (lambda x: (x, 2 * x), 0),
        (lambda x: [2 * x, x], 1),
    ],
)
def test_the_logits_are_found_in_the_models_output(pack, where):
    model = Returning(pack)
    student = WithWeakHead(model, "net.layer1", logits=where, example_input=images())
    logits, weak_logits = student(images())
    torch.testing.assert_close(logits, model.net(images()))
    assert weak_logits.shape == (2, 5)
    output = student.eval()(images())
    assert type(output) is type(pack(logits))  # what the model's user reads, as it was
    torch.testing.assert_close(Teacher(model, logits=where)(images()), model.net(images()))


@pytest.mark.parametrize(
    ("pack", "where", "message"),
    [
        (lambda x: {"aux": x, "out": x}, None, "got a dict of 'aux', 'out'.*say which .* as logits='aux'"),
        (lambda x: {"out": x}, "logits", "got a dict of 'out'"),
        (lambda x: {"logits": None, "loss": x}, None, "got a dict of 'logits', 'loss'"),
        (lambda x: (x, x), None, "got a tuple: .* as logits=0"),
        (lambda x: (x, x), 2, "got a tuple"),
        (lambda x: x.tolist(), None, "got a list"),
    ],
)
def test_an_output_without_the_logits_says_what_to_pass(pack, where, message):
    with pytest.raises(TypeError, match=f"the model must return logits, {message}"):
        WithWeakHead(Returning(pack), "net.layer1", logits=where, example_input=images())
    with pytest.raises(TypeError, match=f"the model must return logits, {message}"):
        Teacher(Returning(pack), logits=where)(images())


def test_a_dense_model_is_told_the_way():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1))
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 6, 6\): .*FeatureTap .*examples/loops/segmentation\.py"):
        WithWeakHead(model, "0", example_input=images())
    assert (Path(__file__).parents[2] / "examples/loops/segmentation.py").exists()


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_model_of_several_inputs_takes_an_example_of_them(as_dict):
    class Positional(TwoInputs):
        def forward(self, x, mask):
            return super().forward(x, mask, scale=2.0)

    x, mask = images(), images() > 0
    if as_dict:
        student = WithWeakHead(TwoInputs(), "layer1", example_input={"x": x, "mask": mask, "scale": 2.0})
        logits, weak_logits = student(x, mask=mask, scale=2.0)
    else:
        student = WithWeakHead(Positional(), "layer1", example_input=(x, mask))
        logits, weak_logits = student(x, mask)
    torch.testing.assert_close(
        logits, 2 * student.model.fc(student.model.layer2(student.model.layer1(x * mask)).mean((2, 3)))
    )
    assert weak_logits.shape == (2, 5)


@pytest.mark.parametrize("config", [{"image_size": 12}, {"image_size": [9, 12]}, {"vision_config": {"image_size": 12}}])
def test_the_image_size_of_a_config_is_taken(config):
    def namespace(value):
        return SimpleNamespace(**{k: namespace(v) for k, v in value.items()}) if isinstance(value, dict) else value

    sizes = []
    model = Net()
    model.config = namespace(config)
    model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    student = WithWeakHead(model, "layer1")
    assert sizes[0] == ((9, 12) if config.get("image_size") == [9, 12] else (12, 12))
    assert student.config is model.config


def test_of_a_layer_that_returns_a_tuple_the_first_entry_is_read():
    model = Returning(lambda x: x)
    model.net = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 8, batch_first=True), Second(), nn.Linear(8, 5))
    student = WithWeakHead(model, "net.1", example_input=images(), channels=-1)
    with FeatureTap(model, "net.1") as tap:
        _, weak_logits = student(images())
        hidden, _states = tap.pop()
    torch.testing.assert_close(weak_logits, student.head(hidden.mean(1)))


def test_print_tells_what_is_read():
    assert "tap='layer1', the head reads the mean of (N, C, ...) over positions" in repr(
        WithWeakHead(Net(), "layer1", example_input=images())
    )
    assert "'1', the head reads the mean of (N, ..., C)" in repr(
        WithWeakHead(fixed_size(6, 10), "1", example_input=images(), channels=-1)
    )


def test_a_backbone_is_looked_into():
    torchvision = pytest.importorskip("torchvision")
    backbone = torchvision.models.resnet18()
    assert default_tap(nn.Sequential(backbone, nn.Linear(1000, 5))) == "0.layer3"
    assert default_tap(nn.ModuleDict({"model": nn.ModuleDict({"backbone": backbone})})) == "model.backbone.layer3"
    unknown = nn.Sequential(nn.Linear(4, 8), nn.ModuleDict({f"layer{i}": nn.Linear(64, 64) for i in (1, 2, 3)}))
    with pytest.raises(ValueError, match="no default tap for Sequential"):  # the large part comes last: a stage, say
        default_tap(unknown)


def test_an_unknown_structure_asks_for_the_layer():
    with pytest.raises(ValueError, match="no default tap for Sequential: name a layer"):
        WithWeakHead(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), example_input=images())


# ---- two ranks ----


def _rank(rank, world, path):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=world)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    ddp = nn.parallel.DistributedDataParallel(student)
    train_step(ddp, images(8)[rank * 4 : rank * 4 + 4])
    torch.save([p.grad for p in ddp.parameters()], f"{path}/grads{rank}.pt")
    with pytest.raises(ValueError, match=r"inside DistributedDataParallel already.*WithWeakHead first"):
        WithWeakHead(nn.parallel.DistributedDataParallel(Net()), "layer1", example_input=images())
    with FeatureTap(ddp, "model.layer2") as tap:  # a path of the model inside DDP, as its user knows it
        ddp(images())
        assert tap.pop().shape == (2, 16, 4, 4)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_under_ddp_have_equal_gradients(tmp_path):
    mp.spawn(_rank, (2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"grads{rank}.pt") for rank in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    losses = [train_step(student, half) for half in images(8).chunk(2)]
    assert len(losses) == 2
    for grad, parameter in zip(first, student.parameters()):  # DDP averages what accumulation sums
        torch.testing.assert_close(grad, parameter.grad / 2)


# ---- architectures ----

# library, model, image size, default tap, channels. The first nine are the layers of the paper's official configs.
ARCHITECTURES = [
    ("torchvision", "resnet18", 64, "layer3", 256),
    ("torchvision", "resnet50", 64, "layer3", 1024),
    ("torchvision", "mobilenet_v2", 64, "features.17", 320),
    ("timm", "mobilenetv2_100", 64, "blocks.6", 320),
    ("timm", "mobilenetv1_100", 64, "blocks.3", 512),
    ("torchvision", "shufflenet_v2_x1_0", 64, "stage4", 464),
    ("torchvision", "regnet_x_1_6gf", 64, "trunk_output.block3", 408),
    ("torchvision", "swin_t", 64, "features.5", 384),
    ("timm", "deit_tiny_patch16_224", 64, "blocks.5", 192),
    ("torchvision", "mobilenet_v3_small", 64, "features.11", 96),
    ("torchvision", "efficientnet_b0", 64, "features.7", 320),
    ("torchvision", "densenet121", 64, "features.denseblock3", 1024),
    ("torchvision", "vgg11_bn", 64, "features.20", 512),
    ("torchvision", "convnext_tiny", 64, "features.5", 384),
    ("torchvision", "swin_v2_t", 64, "features.5", 384),
    ("torchvision", "vit_b_16", 64, "encoder.layers.encoder_layer_5", 768),
    ("torchvision", "maxvit_t", 224, "blocks.2", 256),
    ("torchvision", "mnasnet0_5", 64, "layers.13", 160),
    ("torchvision", "squeezenet1_1", 64, "features.11", 512),
    ("torchvision", "alexnet", 64, "features.11", 256),
    ("timm", "resnet18", 64, "layer3", 256),
    ("timm", "mobilenetv3_small_100", 64, "blocks.3", 48),
    ("timm", "efficientnet_b0", 64, "blocks.6", 320),
    ("timm", "convnext_atto", 64, "stages.2", 160),
    ("timm", "swin_tiny_patch4_window7_224", 224, "layers.2", 384),
    ("timm", "deit3_small_patch16_224", 64, "blocks.5", 384),
    ("timm", "maxvit_pico_rw_256", 256, "stages.2", 128),
    ("timm", "edgenext_xx_small", 64, "stages.2", 88),
    ("timm", "regnetx_002", 64, "s3", 152),
    ("timm", "ghostnet_100", 64, "blocks.5", 80),
    ("timm", "mixer_s32_224", 64, "blocks.3", 512),
    ("timm", "mobilevit_xxs", 64, "stages.3", 64),
    ("timm", "levit_128s", 224, "stages.1", 256),
    ("timm", "pvt_v2_b0", 64, "stages.2", 160),
    ("timm", "poolformer_s12", 64, "stages.2", 320),
    ("timm", "efficientvit_b0", 64, "stages.2", 64),
    ("timm", "repvgg_a0", 64, "stages.2", 192),
    ("timm", "fastvit_t8", 64, "stages.2", 192),
    ("timm", "tiny_vit_5m_224", 224, "stages.2", 160),
    ("timm", "vit_small_patch16_dinov3", 64, "blocks.5", 384),
]


def build(library, name, size):
    if library == "timm":
        timm = pytest.importorskip("timm")
        fixed = timm.get_pretrained_cfg(name).fixed_input_size and size < 224
        return timm.create_model(name, num_classes=7, **(dict(img_size=size) if fixed else {}))
    torchvision = pytest.importorskip("torchvision")
    options = dict(image_size=size) if name.startswith("vit") else {}
    return torchvision.models.get_model(name, num_classes=7, **options)


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size", "tap", "channels"), ARCHITECTURES)
def test_one_uskd_step_of_an_architecture(library, name, size, tap, channels):
    torch.manual_seed(0)
    model = build(library, name, size)
    assert default_tap(model) == tap
    student = WithWeakHead(model, num_classes=7, example_input=torch.zeros(1, 3, size, size))
    assert student.head.in_features == channels
    logits, weak_logits = student(images(2, size))
    loss = uskd_loss(logits, weak_logits, torch.tensor([1, 2]), mu=0.1)
    loss.backward()
    assert loss.isfinite()
    assert student.head.weight.grad.abs().sum() > 0
    # the weak loss alone reaches the layers before the tap
    weak_only = torch.autograd.grad(
        F.cross_entropy(student(images(2, size))[1], torch.tensor([1, 2])),
        [p for p in student.model.parameters() if p.requires_grad],
        allow_unused=True,
    )
    assert any(g is not None and g.abs().sum() > 0 for g in weak_only)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "read"),
    [
        ("deit_tiny_patch16_224", 64, lambda f: f[:, 0]),  # the class token
        ("cait_xxs24_224", 64, lambda f: f.mean(1)),  # its class token comes after the tap
        ("mixer_s32_224", 64, lambda f: f.mean(1)),
        ("swin_tiny_patch4_window7_224", 224, lambda f: f.mean((1, 2))),
        ("convnext_atto", 64, lambda f: f.mean((2, 3))),
    ],
)
def test_what_the_head_reads(name, size, read):
    student = WithWeakHead(build("timm", name, size), example_input=torch.zeros(1, 3, size, size))
    student.model.eval()  # no drop path: two forwards are equal
    _, weak_logits = student(images(2, size))
    with FeatureTap(student.model, student.tap) as tap:
        student.model(images(2, size))
        torch.testing.assert_close(weak_logits, student.head(read(tap.pop())))


@pytest.mark.slow
@pytest.mark.parametrize(("height", "width"), [(224, 448), (448, 224)])
def test_channels_are_told_from_the_inputs_proportions(height, width):
    torchvision = pytest.importorskip("torchvision")
    student = WithWeakHead(torchvision.models.swin_t(num_classes=5), example_input=torch.zeros(1, 3, height, width))
    assert student.head.in_features == 384
    wide = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)
    )
    assert WithWeakHead(wide, "0", example_input=torch.zeros(1, 1, height // 7, width // 7)).head.in_features == 32


def test_half_precision_and_meta_models():
    half = WithWeakHead(Net().bfloat16(), "layer1", example_input=images().bfloat16())
    assert half.head.weight.dtype == torch.bfloat16
    assert half(images().bfloat16())[1].dtype == torch.bfloat16
    with torch.device("meta"):
        assert WithWeakHead(Net(), "layer1").head.weight.is_meta


def test_models_whose_structure_says_too_little_are_refused_not_guessed():
    class MobileNet(nn.Module):  # thirteen blocks of growing width: no stages to see
        def __init__(self):
            super().__init__()
            widths = [32 * 2 ** (i // 3) for i in range(14)]
            self.layers = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))

    with pytest.raises(ValueError, match="no default tap for MobileNet"):
        default_tap(MobileNet())
    cifar = nn.ModuleDict({f"layer{i}": nn.Identity() for i in (1, 2, 3)})
    assert default_tap(cifar) == "layer2"
    timm = pytest.importorskip("timm")
    assert default_tap(timm.create_model("convit_tiny")) == "blocks.5"


def test_an_input_that_was_guessed_wrong_asks_for_an_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(
        ValueError, match=r"does not take shape \(2, 3, 224, 224\), which is a guess: pass example_input"
    ):
        WithWeakHead(model, "0")
    assert WithWeakHead(model, "0", example_input=images()).head.in_features == 4


@pytest.mark.slow
def test_auxiliary_outputs_are_refused_in_training():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.googlenet(num_classes=5, init_weights=False)
    with pytest.raises(TypeError, match="GoogLeNetOutputs: switch its auxiliary outputs off"):
        WithWeakHead(model)(torch.zeros(2, 3, 96, 96))
    model = torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=False)
    assert WithWeakHead(model)(torch.zeros(2, 3, 96, 96))[1].shape == (2, 5)


def test_data_parallel_and_ddp_on_the_inside_are_refused():
    with pytest.raises(ValueError, match="wrap the plain model in WithWeakHead first"):
        WithWeakHead(nn.DataParallel(Net()), "layer1", example_input=images())
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        WithWeakHead(Net(), "layer1", example_input=images())._replicate_for_data_parallel()


@pytest.mark.slow
def test_usual_input_sizes_are_found_without_an_example():
    timm = pytest.importorskip("timm")
    for model, channels in (
        (timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=7), 192),
        (timm.create_model("resnet18", in_chans=1, num_classes=7), 256),
        (build("torchvision", "vit_b_16", 64), 768),
    ):
        assert WithWeakHead(model).head.in_features == channels
