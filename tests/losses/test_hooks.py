"""Test FeatureTap: the returned output, the model after close(), and the errors."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from nets import Net, Returning, images, train_step
from torch import nn
from torch.nn import functional as F

from kdlite import FeatureTap, WithWeakHead


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


def test_the_error_for_a_misspelt_layer_lists_near_names():
    with pytest.raises(ValueError, match=r"no layer 'layer_1' in Net; near matches: layer1"):
        FeatureTap(Net(), "layer_1")
    with pytest.raises(ValueError, match=r"near matches: layer1"):  # the first names, because no name is near
        FeatureTap(Net(), "zzzzzzzzz")


def test_close_removes_the_hook():
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


def test_the_hook_does_nothing_in_a_deepcopy_of_a_tapped_model():
    model = Net()
    with FeatureTap(model, "layer1") as tap:
        model(images())  # the tap now stores an output, which deepcopy cannot copy because it is not a leaf tensor
        ema = copy.deepcopy(model)
        expected = tap.pop()
        model(images())
        ema(torch.zeros(1, 3, 8, 8))
        torch.testing.assert_close(tap.pop(), expected)


# ---- the stored output ----


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_a_later_in_place_layer_does_not_change_the_feature(mode, context, compiled):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False, affine=False)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5)).train(mode)
    with FeatureTap(net, "1") as tap, context():
        run = torch.compile(net, backend="aot_eager") if compiled else net
        for i in range(3):
            run(images() + i)
            feature = tap.pop()
            torch.testing.assert_close(feature, norm(net[0](images() + i)))
            assert (feature < 0).any()


def test_a_new_in_place_layer_does_not_change_the_feature():
    net = nn.Sequential(nn.Linear(3, 4), nn.Identity())
    with FeatureTap(net, "0") as tap:
        net(torch.ones(2, 3))
        tap.pop()
        net[1] = nn.ReLU(inplace=True)
        net(torch.ones(2, 3))
        torch.testing.assert_close(tap.pop(), net[0](torch.ones(2, 3)))


def test_gradients_through_a_cloned_feature_are_those_of_the_layer():
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


def test_transform_replaces_the_clone():
    net, outputs = Net(), []
    net.layer1.register_forward_hook(lambda module, args, output: outputs.append(output))
    with FeatureTap(net, "layer1") as tap:
        net(images())
        assert tap.pop() is not outputs[-1]
    with FeatureTap(net, "layer1", transform=lambda output: output) as tap:
        net(images())
        assert tap.pop() is outputs[-1]


def test_each_name_of_a_layer_with_two_names_is_accepted():
    net = Net()
    net.again = net.layer1
    with FeatureTap(net, "again") as tap:
        net(images())
        assert tap.pop().shape[1] == 8


def test_a_feature_is_freed_after_the_forward_pass_if_the_transform_pools_it():
    net, features = Net(), []
    net.layer1.register_forward_hook(lambda module, args, output: features.append(weakref.ref(output)))
    with torch.no_grad(), FeatureTap(net, "layer1", transform=lambda output: output.mean((2, 3))) as tap:
        net(images())
        assert features[0]() is None
        assert tap.pop().shape == (2, 8)


def test_a_transform_that_saves_tensors_works_under_checkpointing():
    torch.manual_seed(0)
    plain, checkpointed = Net(), Net(reentrant=False)
    checkpointed.load_state_dict(plain.state_dict())
    for net in (plain, checkpointed):
        with FeatureTap(net, "layer1", transform=lambda output: output.square().mean((2, 3)).exp()) as tap:
            (net(images()).sum() + tap.pop().sum()).backward()
    for a, b in zip(checkpointed.parameters(), plain.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


def test_every_tensor_of_an_output_is_cloned_and_an_unknown_object_is_refused():
    net = nn.Sequential(nn.Identity(), Returning(lambda x: {"a": [x, None], "n": 3}))
    with FeatureTap(net, "1") as tap:
        output = net(images())
        kept = tap.pop()
        assert kept["n"] == 3
        assert kept["a"][0] is not output["a"][0]
        assert torch.equal(kept["a"][0], output["a"][0])
    net[1].pack = lambda x: SimpleNamespace(x=x)
    with FeatureTap(net, "1"), pytest.raises(TypeError, match="a SimpleNamespace, which FeatureTap cannot clone: pass"):
        net(images())


@pytest.mark.slow
def test_memory_does_not_grow_over_1000_steps():
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


# ---- torch.compile ----


@pytest.mark.slow
def test_a_tap_made_before_the_first_compiled_call_works():
    torch._dynamo.reset()
    model = Net()
    with FeatureTap(model, "layer1") as tap:
        torch.compile(model, backend="aot_eager")(images())
        torch.testing.assert_close(tap.pop(), model.layer1(images()))


@pytest.mark.slow
def test_tapping_a_compiled_model_is_refused():
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match=r"is compiled already: make the FeatureTap or WithWeakHead first, then call torch.compile"
    ):
        FeatureTap(torch.compile(Net()), "layer1")
    in_place = Net()
    in_place.compile()
    with pytest.raises(RuntimeError, match="compiled already"):
        FeatureTap(in_place, "layer1")
    part = Net()
    part.layer1 = torch.compile(part.layer1)
    with pytest.raises(RuntimeError, match="compiled already"):
        FeatureTap(part, "layer1")
    FeatureTap(part, "layer2")  # this part is not compiled


@pytest.mark.slow
def test_a_tap_made_after_the_first_compiled_call_is_an_error_at_pop():
    torch._dynamo.reset()
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(images())
    with FeatureTap(model, "layer1") as tap:
        compiled(images())
        with pytest.raises(RuntimeError, match="tap before compiling"):
            tap.pop()
