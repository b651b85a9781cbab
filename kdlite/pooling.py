"""Find with dry forwards of the model how to pool a layer's feature to (N, C), and pool it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .inputs import describe

POOLINGS = {
    "none": "(N, C) as it is",
    "class token": "the class token, [:, 0] of (N, L, C)",
    "channels first": "the mean of (N, C, ...) over positions",
    "channels last": "the mean of (N, ..., C) over positions",
}
# If a parameter holds class or register tokens, the last part of its name matches this pattern.
TOKENS = re.compile(r"(cls|class|reg|register|storage|dist|distillation)_(tokens?|embedding)(_?\d+)?")


# ---- the dry forward ----------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """Describe a layer's output in a dry forward."""

    text: str
    shape: tuple[int, ...]  # () if the output is not a tensor
    dtype: torch.dtype | None
    device: torch.device | None
    positions: frozenset[int]  # H * W of the output of each convolution so far


def dry_forward(model: nn.Module, example: Any) -> tuple[Any, dict[str, Seen]]:
    """Run the model in eval mode and without gradient; return its output and the output of each layer that ran."""
    seen: dict[str, Seen] = {}
    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(see, seen, name)).remove)
        if isinstance(example, dict):
            return model(**example), seen
        return (model(*example) if isinstance(example, tuple) else model(example)), seen


def see(seen: dict[str, Seen], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """Record a layer's output; this function is the layer's forward hook."""
    output = first_entry(output)
    positions = next(reversed(seen.values())).positions if seen else frozenset()
    if not isinstance(output, Tensor):
        seen[name] = Seen(describe(output), (), None, None, positions)
        return
    if isinstance(module, nn.Conv2d):
        positions |= {math.prod(output.shape[2:])}
    seen.pop(name, None)  # the last run of a layer decides its place
    seen[name] = Seen(describe(output), tuple(output.shape), output.dtype, output.device, positions)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode, then restore each module's own mode (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def guess_example(model: nn.Module) -> Tensor:
    """Return zeros of the size in timm's pretrained_cfg, or of 224 pixels."""
    config = getattr(model, "pretrained_cfg", None)
    size = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    return next(model.parameters(), torch.empty(0)).new_zeros(1, *size)


def two_samples(example: Any) -> Any:
    """Return the example as a batch of two."""
    example = dict(example) if isinstance(example, Mapping) else example
    return tree_map(lambda x: torch.cat([x, x])[:2] if isinstance(x, Tensor) and x.ndim else x, example)


def larger_inputs(example: Any) -> list[Any]:
    """Return the example enlarged in each way that its shape allows: images, (N, C, L), (N, L, C) or indices (N, L)."""
    inputs = next(x for x in tree_leaves(example) if isinstance(x, Tensor))
    if inputs.ndim == 2:
        ways = [] if inputs.is_floating_point() else [[1]]
    else:
        ways = [list(range(2, inputs.ndim))] + ([[1]] if inputs.ndim == 3 else [])
    return [tree_map(partial(double, ndim=inputs.ndim, dims=dims), example) for dims in ways]


def double(value: Any, ndim: int, dims: list[int]) -> Any:
    """Double a tensor of ``ndim`` dimensions along each of ``dims``, so that a mask grows with its tokens."""
    if isinstance(value, Tensor) and value.ndim == ndim:
        for dim in dims:
            value = torch.cat([value, value], dim)
    return value


# ---- from the dry forward to a layer and its pooling --------------------------------------------------------------


def choose_layer(layers: list[str], seen: dict[str, Seen], batch: int) -> str:
    """Return the first layer that ran and returned a feature for each sample."""
    for layer in layers:
        if layer in seen and len(seen[layer].shape) >= 2 and seen[layer].shape[0] == batch:
            return layer
    usable = [name for name, output in seen.items() if name and len(output.shape) > 2 and output.shape[0] == batch]
    middle = usable[len(usable) // 4 :]
    middle = middle[: len(middle) - len(usable) // 4]  # the middle half, in the order of the forward
    middle.sort(key=lambda name: name.count("."))
    found = f"returns {seen[layers[0]].text}" if layers[0] in seen else "does not run"
    raise ValueError(
        f"layer {layers[0]!r} must return a feature for a batch of {batch}, but {found}; these layers do: "
        + (", ".join(middle[:6]) or "none")
    )


def find_pooling(model: nn.Module, layer: str, example: Any, feature: Seen, pooling: str | None) -> tuple[str, int]:
    """Return the key of POOLINGS, and the number of tokens at the start that the mean skips."""
    if len(feature.shape) == 2:
        return "none", 0
    if pooling == "class token" and len(feature.shape) != 3:
        raise ValueError(f'pooling="class token" needs (N, L, C), but layer {layer!r} returns {feature.text}')
    if pooling:
        return pooling, 0
    if not has_channels_last(model, layer, example, feature.shape):
        return "channels first", 0
    if len(feature.shape) > 3:
        return "channels last", 0
    # parameter name -> number of class or register tokens that it adds to a sequence
    tokens = {name.rpartition(".")[2]: p.shape[-2] if p.ndim > 1 else 1 for name, p in model.named_parameters()}
    tokens = {name: count for name, count in tokens.items() if TOKENS.fullmatch(name)}
    extra = {feature.shape[1] - n for n in feature.positions}
    extra = {n for n in extra if 0 <= n <= sum(tokens.values())}
    if tokens and len(extra) != 1:
        raise two_readings(layer, feature.shape)
    leading = extra.pop() if tokens else 0
    if leading and any(name.startswith("cl") for name in tokens):
        return "class token", 0
    return "channels last", leading


def has_channels_last(model: nn.Module, layer: str, example: Any, shape: tuple[int, ...]) -> bool:
    """Return whether the last dimension holds the channels, which do not grow with the input.

    If the model takes only one size, the shape of the feature decides.
    """
    for larger in larger_inputs(example):
        try:
            _, seen = dry_forward(model, larger)
        except Exception:  # models of one size raise errors of many kinds
            continue
        other = seen[layer].shape if layer in seen else ()
        grown = [len(other) == len(shape) and other[dim] != shape[dim] for dim in (1, -1)]
        if grown[0] != grown[1]:
            return grown[0]
    inputs = next(x for x in tree_leaves(example) if isinstance(x, Tensor))
    if inputs.ndim == 4 and len(shape) == 3:
        return True
    if inputs.ndim == 4 and len(shape) == 4:
        height, width = inputs.shape[2:]
        first, last = (h * width == w * height for h, w in (shape[2:], shape[1:3]))
        if first != last:
            return last
    raise two_readings(layer, shape)


def two_readings(layer: str, shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"the feature of layer {layer!r}, shape {shape}, is ambiguous: pass pooling=")


def pool(pooling: str, skip: int, output: Any) -> Tensor:
    """Return the pooled feature, (N, C), as a copy that a later in-place layer does not change."""
    feature: Tensor = first_entry(output)
    if pooling == "none":
        return feature.clone()
    if pooling == "class token":
        return feature[:, 0].clone()
    if pooling == "channels first":
        return feature.mean(tuple(range(2, feature.ndim)))
    feature = feature[:, skip:] if skip else feature
    return feature.mean(tuple(range(1, feature.ndim - 1)))


def first_entry(output: Any) -> Any:
    """Return a layer's output without the attention weights, sizes or states that follow it in a tuple."""
    while isinstance(output, tuple) and output:
        output = output[0]
    return output
