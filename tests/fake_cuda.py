"""Fake a GPU, to find tensors that stay on the host and operations that read a value.

CUDA tensors are torch's fake tensors: they have a shape, a dtype and a device, but no values. An operation that reads a
value raises an error. Host tensors stay real. Three parts of torch need a CUDA driver:

- autograd's engine uses CUDA's streams, so ``walk_backward`` replaces Tensor.backward and calls the graph's nodes;
- torch.autocast and GradScaler are disabled if torch.cuda.is_available() returns False, so here it returns True;
- torch.Generator("cuda") has no replacement, so pass generator=None.
"""

import warnings
from contextlib import contextmanager

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)


class FakeCuda(FakeTensorMode):
    """Make GPU tensors and the results of their operations fake; run operations of host tensors as usual."""

    faking = False  # True inside a fake operation, which makes its host tensors fake too

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
    """Run Tensor.backward without the engine: call each node once, with the sum of its gradients.

    Like the engine, check each gradient's device, sum it over broadcast dimensions, and cast it. An autograd.Function
    must take its tensors before its other arguments.
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


@contextmanager
def fake_gpu(monkeypatch):
    """Enter FakeCuda and yield it."""
    torch._C._ensureCUDADeviceGuardSet()  # because FakeTensorMode does this only if is_available() is False
    lifts = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # for torch.tensor(..., device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **options: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda *args: None)  # the original makes a real tensor
    monkeypatch.setattr(torch.Tensor, "backward", walk_backward)
    with FakeCuda() as mode, warnings.catch_warnings():
        # because this warning means that autocast or GradScaler is disabled
        warnings.filterwarnings("error", ".*CUDA is not available")
        yield mode
    torch._C._set_only_lift_cpu_tensors(lifts)


def on_gpu(tensor, dtype=torch.float32):
    return tensor is not None and tensor.device == CUDA and tensor.dtype == dtype
