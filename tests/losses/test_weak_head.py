"""Test WithWeakHead, which joins a model and its weak head, and the pooling of the feature."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from nets import (
    Entry,
    Net,
    Permute,
    Returning,
    Second,
    Transpose,
    TwoInputs,
    classifier,
    fixed_size,
    images,
    train_step,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kdlite import FeatureTap, Teacher, WithWeakHead, uskd_loss


def test_training_mode_returns_both_logits_and_eval_mode_those_of_the_model():
    student = WithWeakHead(Net(), "layer1", num_classes=5, example_input=images())
    logits, weak_logits = student(images())
    assert logits.shape == weak_logits.shape == (2, 5)
    torch.testing.assert_close(weak_logits, student.head(student.model.layer1(images()).mean((2, 3))))
    torch.testing.assert_close(student.eval()(images()), student.model(images()))
    assert student.tap == "layer1"


def test_the_head_is_in_the_checkpoint_but_not_in_the_plain_student():
    model = Net()
    names = set(model.state_dict())
    student = WithWeakHead(model, "layer1", example_input=images())
    assert set(student.state_dict()) == {f"model.{n}" for n in names} | {"head.weight", "head.bias"}
    assert set(student.model.state_dict()) == names
    assert student.close() is model
    assert len(model.layer1._forward_hooks) == 0


def test_the_forward_that_measures_the_feature_changes_nothing():
    """Compare the state dict, the modes and the gradients before and after."""
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
    [("unused", "does not run; these layers do: layer1"), ("layer9", "near matches: layer")],
)
def test_a_bad_layer_is_refused_and_leaves_no_hook(layer, message):
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
        ValueError, match=r"'2' must return a feature for a batch of 2, but returns shape \(4, 2, 48\); these layers do"
    ):
        WithWeakHead(transposed, "2", example_input=images())
    grouped = nn.Sequential(Returning(lambda x: {"x": x}), Returning(lambda x: x))
    grouped[1].net = Entry("x")
    with pytest.raises(ValueError, match=r"layer '0' must return a feature .* but returns dict of 'x'"):
        WithWeakHead(grouped, "0", example_input=images())
    with pytest.raises(ValueError, match=r"must return \(N, C\) logits, got shape \(2, 8, 8, 8\)"):
        WithWeakHead(Net().layer1, "0", example_input=images())


def test_a_student_with_its_tap_can_be_exported():
    """Compare the exported program with the student, and train the student afterwards."""
    student = WithWeakHead(Net(), "layer1", example_input=images())
    program = torch.export.export(student.eval(), (images(),))
    torch.testing.assert_close(program.module()(images()), student(images()))
    train_step(student.train(), images())


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


def test_a_deepcopy_has_its_own_tap():
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


def test_a_student_pickles_with_its_tap():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    train_step(student, images())
    loaded = pickle.loads(pickle.dumps(student))
    torch.testing.assert_close(loaded(images())[1], student(images())[1])


def test_the_head_has_the_type_and_device_of_the_feature():
    half = WithWeakHead(Net().bfloat16(), "layer1", example_input=images().bfloat16())
    assert half.head.weight.dtype == torch.bfloat16
    assert half(images().bfloat16())[1].dtype == torch.bfloat16
    with torch.device("meta"):
        assert WithWeakHead(Net(), "layer1").head.weight.is_meta


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
    checkpointed.model.reentrant = False
    for _ in range(2):
        train_step(plain, images())
        train_step(checkpointed, images())
        assert checkpointed._tap._capture.output is None  # because the tap ignores the forward that backward repeats
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_checkpoint_around_the_whole_student_changes_nothing():
    plain = WithWeakHead(Net(), "layer1", example_input=images())
    whole = copy.deepcopy(plain)
    target = torch.tensor([1, 3])
    for student, run in ((plain, plain), (whole, lambda x: checkpoint(whole, x, use_reentrant=False))):
        logits, weak_logits = run(images())
        (F.cross_entropy(logits, target) + uskd_loss(logits, weak_logits, target)).backward()
        assert student._tap._capture.output is None
    for a, b in zip(whole.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_a_forward_that_fails_leaves_no_feature():
    net = Net()
    student = WithWeakHead(net, "layer1", example_input=images())

    def fail(*_):
        raise torch.OutOfMemoryError("a later layer")

    handle = net.layer2.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        student(images())
    assert student._tap._capture.output is None
    handle.remove()
    assert len(student(images())) == 2


def test_reentrant_checkpointing_is_refused():
    student = WithWeakHead(Net(), "layer1", example_input=images())
    student.model.reentrant = True
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        student(images())


@pytest.mark.trial
def test_checkpointing_works_under_compile():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = WithWeakHead(Net(), "layer1", example_input=images())
    checkpointed = copy.deepcopy(plain)
    checkpointed.model.reentrant = False
    compiled = torch.compile(checkpointed, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(train_step(compiled, images()), train_step(plain, images()))
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_timm_grad_checkpointing_changes_nothing():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=5)
    plain = WithWeakHead(model, example_input=images(size=32))
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


@pytest.mark.trial
def test_a_compiled_student_trains_as_the_plain_student():
    torch._dynamo.reset()
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    compiled = torch.compile(copy.deepcopy(student), fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(train_step(compiled, images()), train_step(student, images()))
    for a, b in zip(compiled.parameters(), student.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(compiled.eval()(images()), student.eval()(images()))


# ---- the pooling ----


def test_the_dimension_that_does_not_grow_with_the_input_has_the_channels():
    example = torch.randn(1, 2, 100)
    conv = classifier(nn.Conv1d(2, 16, 3), nn.ReLU(), width=16)
    assert WithWeakHead(conv, "0", example_input=example).head.in_features == 16
    assert WithWeakHead(conv, "1", example_input=example).head.in_features == 16  # a layer without parameters
    linear = classifier(nn.Linear(6, 16), nn.GELU(), Permute(0, 2, 1), width=16)  # (N, L, C)
    student = WithWeakHead(linear, "1", example_input=torch.randn(1, 100, 6))
    assert student.head.in_features == 16
    _, weak = student(torch.randn(3, 50, 6))
    assert weak.shape == (3, 5)


def test_a_video_is_averaged_over_time_and_place():
    net = nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5))
    assert WithWeakHead(net, "0", example_input=torch.zeros(1, 3, 4, 8, 8)).head.in_features == 8


@pytest.mark.parametrize("shape", [(16, 4, 64), (8, 8, 8)])
def test_an_ambiguous_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"is ambiguous: pass pooling="):
        WithWeakHead(fixed_size(*shape), "1", example_input=images())
    for pooling, width in (("channels first", shape[0]), ("channels last", shape[-1])):
        student = WithWeakHead(fixed_size(*shape), "1", example_input=images(), pooling=pooling)
        assert student.head.in_features == width
        assert student(images())[1].shape == (2, 5)
    with pytest.raises(ValueError, match='pooling must be "class token", "channels first" or "channels last", got 2'):
        WithWeakHead(fixed_size(*shape), "1", example_input=images(), pooling=2)


@pytest.mark.parametrize(("shape", "width"), [((6, 10), 10), ((8, 4, 4), 8), ((4, 4, 8), 8)])
def test_the_shape_of_the_images_shows_the_channels_if_the_model_takes_only_one_size(shape, width):
    student = WithWeakHead(fixed_size(*shape), "1", example_input=images())
    assert student.head.in_features == width


@pytest.mark.parametrize(("height", "width"), [(16, 32), (32, 16)])
def test_the_proportions_of_an_image_show_the_channel_dimension(height, width):
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        Permute(0, 2, 3, 1),
        nn.Flatten(),
        nn.Linear(6 * height * width // 4, 5),
    )
    example = torch.zeros(1, 1, height, width)
    assert WithWeakHead(model, "0", example_input=example).pooling == "channels first"
    assert WithWeakHead(model, "1", example_input=example).pooling == "channels last"


class Tokens(nn.Module):
    """Run four blocks on a class token, register tokens and patches of 4 px."""

    def __init__(self, class_tokens=1, registers=0, late=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8)) if class_tokens else None
        self.reg_token = nn.Parameter(torch.randn(1, registers, 8)) if registers else None
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.late, self.fc = late, nn.Linear(8, 5)

    def prepend(self, x):
        tokens = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        return torch.cat([*tokens, x], 1)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x if self.late else self.prepend(x)
        for block in self.blocks:
            x = block(x)
        return self.fc((self.prepend(x) if self.late else x)[:, 0])


@pytest.mark.parametrize(
    ("options", "size", "pooling", "read"),
    [
        ({}, (16, 16), "class token", lambda x: x[:, 0]),
        ({}, (12, 20), "class token", lambda x: x[:, 0]),  # 1 + 15 tokens, a square number
        (dict(registers=4), (8, 8), "class token", lambda x: x[:, 0]),  # 1 + 4 + 4 tokens, a square number
        (dict(registers=8), (16, 16), "class token", lambda x: x[:, 0]),  # 1 + 8 + 16 tokens, a square number
        (dict(late=True), (16, 16), "channels last", lambda x: x.mean(1)),
        (dict(late=True), (12, 20), "channels last", lambda x: x.mean(1)),
        (dict(class_tokens=0), (16, 16), "channels last", lambda x: x.mean(1)),
        (dict(class_tokens=0, registers=4), (8, 8), "channels last", lambda x: x[:, 4:].mean(1)),
    ],
)
def test_the_class_token_is_found_by_counting_the_positions(options, size, pooling, read):
    model = Tokens(**options)
    student = WithWeakHead(model, example_input=torch.zeros(1, 3, *size))
    assert (student.tap, student.pooling) == ("blocks.1", pooling)
    x = torch.randn(2, 3, *size)
    _, weak_logits = student(x)
    with FeatureTap(model, "blocks.1") as tap:
        model(x)
        torch.testing.assert_close(weak_logits, student.head(read(tap.pop())))


@pytest.mark.parametrize("pooling", ["none", "class token", "channels first", "channels last"])
def test_a_later_in_place_layer_does_not_change_the_pooled_feature(pooling):
    torch.manual_seed(0)
    shape = {"none": (8,), "class token": (4, 8), "channels first": (8, 4, 4), "channels last": (4, 4, 8)}[pooling]
    layers = fixed_size(*shape)
    model = nn.Sequential(*layers[:2], nn.ReLU(inplace=True), *layers[2:])
    asked = None if pooling == "none" else pooling
    student = WithWeakHead(model, "1", example_input=images(), pooling=asked)
    _, weak_logits = student(images())
    feature = layers[:2](images())
    if pooling == "class token":
        feature = feature[:, 0]
    elif pooling != "none":
        feature = feature.flatten(2).mean(2) if pooling == "channels first" else feature.flatten(1, 2).mean(1)
    torch.testing.assert_close(weak_logits, student.head(feature))
    weak_logits.sum().backward()
    assert layers[0][1].weight.grad.abs().sum() > 0


def test_the_error_asks_for_the_pooling_if_tokens_cannot_be_counted():
    class Unfolded(Tokens):
        """Make the patches without a convolution, so that their number is unknown."""

        def __init__(self):
            super().__init__()
            self.patches = nn.Sequential(nn.Unfold(4, stride=4), Permute(0, 2, 1), nn.Linear(48, 8), Permute(0, 2, 1))

    with pytest.raises(ValueError, match=r"'blocks.1', shape \(2, 17, 8\), is ambiguous: pass pooling="):
        WithWeakHead(Unfolded(), example_input=torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r'pooling="class token" needs \(N, L, C\), but layer .* \(2, 8, 8, 8\)'):
        WithWeakHead(Net(), "layer1", example_input=images(), pooling="class token")
    student = WithWeakHead(Unfolded(), example_input=torch.zeros(1, 3, 16, 16), pooling="class token")
    assert student(torch.zeros(2, 3, 16, 16))[1].shape == (2, 5)


def test_print_shows_the_layer_and_the_pooling():
    assert "tap='layer1', the head reads the mean of (N, C, ...) over positions" in repr(
        WithWeakHead(Net(), "layer1", example_input=images())
    )
    assert "'1', the head reads the mean of (N, ..., C)" in repr(
        WithWeakHead(fixed_size(6, 10), "1", example_input=images())
    )
    registers = WithWeakHead(Tokens(class_tokens=0, registers=4), example_input=torch.zeros(1, 3, 8, 8))
    assert "over positions, without the first 4 tokens" in repr(registers)


def test_the_first_entry_of_a_tuple_is_read():
    model = Returning(lambda x: x)
    model.net = nn.Sequential(nn.Flatten(2), nn.LSTM(64, 8, batch_first=True), Second(), nn.Linear(8, 5))
    student = WithWeakHead(model, "net.1", example_input=images())
    with FeatureTap(model, "net.1") as tap:
        _, weak_logits = student(images())
        hidden, _states = tap.pop()
    torch.testing.assert_close(weak_logits, student.head(hidden.mean(1)))


# ---- parallel models and forwarded attributes ----


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


def test_replication_by_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        WithWeakHead(Net(), "layer1", example_input=images())._replicate_for_data_parallel()


def test_timms_optimizers_find_the_parameter_groups_of_the_model():
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    student = WithWeakHead(model, example_input=images(size=32))
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
    assert wrapped.pop("head.weight") == wrapped.pop("head.bias") == 1  # the weak head has the scale of the classifier
    assert wrapped == scales(model)
    assert len(set(wrapped.values())) > 6


def test_the_trainer_of_hugging_face_finds_config_and_checkpointing():
    model = Net()
    model.config, model.gradient_checkpointing_enable = SimpleNamespace(use_cache=True), lambda: "enabled"
    student = WithWeakHead(model, "layer1", example_input=images())
    assert student.config is model.config
    assert student.gradient_checkpointing_enable() == "enabled"


@pytest.mark.parametrize("name", ["no_weight_decay", "group_matcher", "config", "weights"])
def test_an_attribute_that_the_model_lacks_is_not_forwarded(name):
    assert not hasattr(WithWeakHead(Net(), "layer1", example_input=images()), name)


# ---- outputs that contain the logits, and several inputs ----


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
    assert type(output) is type(pack(logits))  # unchanged in eval mode
    torch.testing.assert_close(Teacher(model, logits=where)(images()), model.net(images()))


@pytest.mark.parametrize(
    ("pack", "where", "message"),
    [
        (lambda x: {"aux": x, "out": x}, None, "got dict of 'aux', 'out': pass logits='aux'"),
        (lambda x: {"out": x}, "logits", "got dict of 'out'"),
        (lambda x: {"logits": None, "loss": x}, None, "got dict of 'logits', 'loss'"),
        (lambda x: (x, x), None, "got tuple: pass logits=0"),
        (lambda x: (x, x), 2, "got tuple"),
        (lambda x: x.tolist(), None, "got list"),
    ],
)
def test_the_error_for_an_output_without_logits_names_the_argument(pack, where, message):
    with pytest.raises(TypeError, match=f"the model must return logits, {message}"):
        WithWeakHead(Returning(pack), "net.layer1", logits=where, example_input=images())
    with pytest.raises(TypeError, match=f"the model must return logits, {message}"):
        Teacher(Returning(pack), logits=where)(images())


def test_the_error_for_a_model_with_an_output_per_pixel_points_to_the_page():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1))
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 6, 6\): see kdlite/README.md#questions"):
        WithWeakHead(model, "0", example_input=images())


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_model_with_several_inputs_takes_an_example_of_each(as_dict):
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


def test_the_error_for_a_wrong_guess_of_the_input_asks_for_an_example():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(ValueError, match=r"does not run on a guessed shape \(2, 3, 224, 224\): pass example_input"):
        WithWeakHead(model, "0")
    assert WithWeakHead(model, "0", example_input=images()).head.in_features == 4


@pytest.mark.slow
def test_usual_input_sizes_are_found_without_an_example():
    timm = pytest.importorskip("timm")
    for model, channels in (
        (timm.create_model("deit_tiny_patch16_224", num_classes=7), 192),
        (timm.create_model("mixer_s32_224", num_classes=7), 512),
    ):
        assert WithWeakHead(model).head.in_features == channels


@pytest.mark.slow
def test_auxiliary_outputs_are_refused_in_training():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.googlenet(num_classes=5, init_weights=False)
    with pytest.raises(TypeError, match="GoogLeNetOutputs: pass logits=0, or disable auxiliary outputs"):
        WithWeakHead(model)(torch.zeros(2, 3, 96, 96))
    model = torchvision.models.googlenet(num_classes=5, init_weights=False, aux_logits=False)
    assert WithWeakHead(model)(torch.zeros(2, 3, 96, 96))[1].shape == (2, 5)


# ---- two ranks ----


def train_on_a_rank(path):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    ddp = nn.parallel.DistributedDataParallel(student)
    train_step(ddp, images(8)[rank * 4 : rank * 4 + 4])
    torch.save([p.grad for p in ddp.parameters()], f"{path}/grads{rank}.pt")
    with pytest.raises(ValueError, match=r"inside DistributedDataParallel already.*WithWeakHead first"):
        WithWeakHead(nn.parallel.DistributedDataParallel(Net()), "layer1", example_input=images())
    with FeatureTap(ddp, "model.layer2") as tap:  # the path starts at the model inside DDP
        ddp(images())
        assert tap.pop().shape == (2, 16, 4, 4)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_under_ddp_have_equal_gradients(tmp_path, forks):
    forks.run(train_on_a_rank, tmp_path, processes=2)
    first, second = (torch.load(tmp_path / f"grads{rank}.pt") for rank in range(2))
    for a, b in zip(first, second):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    torch.manual_seed(0)
    student = WithWeakHead(Net(), "layer1", example_input=images())
    losses = [train_step(student, half) for half in images(8).chunk(2)]
    assert len(losses) == 2
    for grad, parameter in zip(first, student.parameters()):  # DDP averages the gradients, accumulation adds them
        torch.testing.assert_close(grad, parameter.grad / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_resizes_images_of_low_precision(dtype):
    images = torch.rand(2, 3, 8, 6).to(dtype)
    resized = Teacher(nn.Identity(), size=4)(images)
    assert resized.dtype == dtype
    torch.testing.assert_close(resized.float(), Teacher(nn.Identity(), size=4)(images.float()), atol=1e-2, rtol=1e-2)


def test_a_teacher_whose_size_is_one_number_resizes_to_a_square():
    assert Teacher(nn.Identity(), size=4)(torch.zeros(2, 3, 8, 6)).shape == (2, 3, 4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_teacher_of_low_precision_normalises_images_of_its_type(dtype):
    teacher = Teacher(nn.Flatten(), [0.5] * 3, [0.25] * 3, [0.4] * 3, [0.2] * 3).to(dtype)
    images = torch.rand(2, 3, 4, 4, dtype=dtype)
    expected = (images.double() * 0.2 + 0.4 - 0.5) / 0.25
    torch.testing.assert_close(teacher(images).double(), expected.flatten(1), atol=2e-2, rtol=2e-2)
    assert teacher(images).dtype == dtype


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"columns": [2, -1]}, ValueError, "columns has -1: expected the index of a class of the teacher"),
        ({"std": [1.0, 0.0, 1.0]}, ValueError, "std .* must be above 0"),
        ({"student_std": [0.0] * 3}, ValueError, "student_std .* must be above 0"),
    ],
)
def test_wrong_arguments_of_a_teacher_are_refused(options, error, message):
    norm = dict(mean=[0.5] * 3, std=[0.25] * 3, student_mean=[0.4] * 3, student_std=[0.2] * 3)
    with pytest.raises(error, match=message):
        Teacher(nn.Identity(), **norm | options)


def test_a_teacher_refuses_images_of_integers_if_it_normalises():
    teacher = Teacher(nn.Identity(), [0.5] * 3, [0.25] * 3, [0.4] * 3, [0.2] * 3)
    with pytest.raises(TypeError, match=r"the images are torch\.uint8: pass images that are normalised"):
        teacher(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
