"""Reading a mid-level feature of any model, and the weak head that USKD trains on it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .layers import default_tap


class FeatureTap:
    """Keeps the last output of one layer of a model; changes nothing else about the model.

    The output is kept as the layer returned it, whatever a later layer does to it in place: a layer whose output is
    changed, as by ``ReLU(inplace=True)`` after it, is found in its first forward and copied; others are not.

    Works on any ``nn.Module``, under DistributedDataParallel, autocast, gradient accumulation and (non-reentrant)
    activation checkpointing. Tap first, compile after (with checkpointing inside, without ``fullgraph``). A deepcopy
    of a tapped model carries no live tap, so an EMA copy never writes into this one. After :meth:`close` the model
    pickles and exports as before.

    Args:
        module: the model, or a DistributedDataParallel around it.
        layer: dotted path of the layer, a name in ``module.named_modules()``.

    Raises:
        ValueError: no such layer; the message lists the nearest names.
        RuntimeError: the model, or a part of it that holds the layer, was compiled already: hooks registered after
            the first compiled call never fire.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with FeatureTap(model, "1") as tap:
        ...     _ = model(torch.zeros(5, 4))
        ...     print(tuple(tap.pop().shape))
        (5, 3)
    """

    def __init__(self, module: nn.Module, layer: str) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        _refuse_compiled(module, "")
        names = [name for name, _ in module.named_modules()]
        if layer not in names:
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or names[1:6] or ["none, it has no layers"]
            raise ValueError(f"no layer {layer!r} in {type(module).__name__}; near matches: {', '.join(near)}")
        _refuse_compiled(module, layer)
        self.layer = layer
        self._capture = _Capture()
        self._handle: Any = module.get_submodule(layer).register_forward_hook(self._capture)

    def pop(self) -> Any:
        """The layer's last output, which is then forgotten, so that nothing pins its memory.

        Raises:
            RuntimeError: the layer has not run since the last pop, or it ran without gradient in training mode
                (reentrant checkpointing), where its feature would silently train nothing; or a layer that left its
                output alone so far has let it be changed in place.
        """
        capture = self._capture
        output = capture.take()
        if output is None:
            raise RuntimeError(
                f"layer {self.layer!r} has not run since the last pop(): "
                + (
                    "run the model first; if it was compiled before the tap was made, tap first and compile after"
                    if capture.live
                    else "the tap is closed"
                )
            )
        if capture.lost_gradient and torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {self.layer!r} ran without gradient though it is in training mode; "
                "if it is checkpointed, use torch.utils.checkpoint with use_reentrant=False; "
                "if it is frozen, put it in eval mode"
            )
        return output

    def forget(self) -> None:
        """Drop the layer's last output, if there is one."""
        self._capture.drop()

    def close(self) -> None:
        """Remove the tap from the model. Closing twice is harmless."""
        self._handle.remove()
        self._capture.live = False
        self.forget()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # a copy (deepcopy, pickle) of the tap itself, as inside WithWeakHead, is a live tap of the copied model
        self.__dict__.update(state)
        self._capture.live = True


class _Capture:
    """The forward hook: holds one output. Its copies are dead, unless a FeatureTap was copied with them.

    Whether a later layer changes the output in place shows when it is taken, too late to copy it. So the first output
    of each mode (training, eval) is copied, and the version counter of the original decides about the next ones.
    """

    def __init__(self) -> None:
        self.live = True
        self.output: Any = None
        self.lost_gradient = False
        self.original: Any = None  # beside its copy in output, until it is known which of them is needed
        self.versions: list[int] | None = None  # of the output when it was returned; None: output is a copy
        self.changes: dict[bool, bool] = {}  # by module.training: whether outputs are changed in place
        self.mode = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.live:
            return
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            # a compiler leaves out a copy that is not needed; inference tensors do not count their changes
            self.output, self.original, self.versions = _copy(output), None, None
        elif torch._C._current_graph_task_id() != -1:
            # activation checkpointing runs the layer a second time, inside backward: that output is not wanted
            return
        else:
            self.mode = module.training
            changes = self.changes.get(self.mode)
            self.output = output if changes is False else _copy(output)
            self.original = output if changes is None else None
            self.versions = _versions(output) if not changes else None
        self.lost_gradient = module.training and not torch.is_grad_enabled()

    def take(self) -> Any:
        output, original = self.output, self.original
        self.output = self.original = None
        if original is not None:
            changed = self.changes[self.mode] = _versions(original) != self.versions
            return output if changed else original
        if output is not None and self.versions is not None and _versions(output) != self.versions:
            self.changes[self.mode] = True
            raise RuntimeError(
                "the layer's output was changed in place after the layer had returned it, for the first time in this "
                "mode: the next forwards copy it; run the model again"
            )
        return output

    def drop(self) -> None:
        """Forget the output, but not what it shows."""
        if self.original is not None:
            self.changes[self.mode] = _versions(self.original) != self.versions
        self.output = self.original = None

    def __getstate__(self) -> dict[str, Any]:
        return _Capture().__dict__ | {"live": False, "changes": self.changes.copy()}


def _copy(output: Any) -> Any:
    return _each_tensor(Tensor.clone, output)


def _versions(output: Any) -> list[int]:
    """How often each tensor of an output was changed in place."""
    return [x._version for x in tree_leaves(output) if isinstance(x, Tensor)]


def _refuse_compiled(module: nn.Module, layer: str) -> None:
    """Raise when any module from the root down to the layer is compiled."""
    path = [module]
    for name in layer.split(".") if layer else []:
        path.append(path[-1].get_submodule(name))
    for part in path:
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            raise RuntimeError(
                f"{type(module).__name__} is compiled already, and a tap made now may never fire: "
                f"make the tap of {layer!r} first, then compile"
            )


class WithWeakHead(nn.Module):
    """A model and the weak classifier that USKD needs, as one module.

    In training mode the forward returns ``(logits, weak_logits)``, in eval mode what the model itself returns. It takes
    the model's own arguments. Because head and model are one module, DistributedDataParallel, the optimizer and the
    checkpoint have both; ``.model`` is the plain student, without the head. Wrap before compiling. A deepcopy (EMA)
    has a tap of its own.

    The head is a linear layer on the pooled feature: the mean over all positions, or the class token of (N, L, C)
    where there is one; of a layer that returns a tuple, on its first entry. Which dimension holds the channels is found
    by one more dry forward, of a larger input: what grows is no channel. Where the model takes one size alone, its
    shape and the layer's own widths must leave one reading, else ``channels`` is asked for. Dry forwards run in eval
    mode and without gradient. ``print`` tells which layer is read, and how.

    Optimizers and trainers find the model's own hints here (``no_weight_decay``, ``group_matcher``, ``config``,
    ``set_grad_checkpointing`` and the like), with "model." before the parameters' names.

    Wrap this module in DistributedDataParallel or fully_shard, not the reverse: a model that is parallel already is
    refused, and so is DataParallel, whose threads would share one tap.

    Args:
        model: classifier whose output is, or holds, (N, C) logits.
        tap: dotted path of the layer to read; None takes :func:`default_tap`.
        num_classes: C; None takes it from the dry forward.
        logits: where the logits are in an output that is no tensor: a key, an attribute, or an index of a tuple. None
            takes "logits", as a ModelOutput of Hugging Face has them, or the only entry of a dict.
        example_input: a batch for the dry forward, a tuple of arguments or a dict of keyword arguments; None takes
            zeros of the model's usual input size.
        channels: the dimension of the feature that holds its channels, 1 or -1; None finds out.

    Raises:
        ValueError: no such layer, no default for this model, a feature or logits of a shape that does not fit or
            can be read in two ways, a model that does not take the guessed example, a model that is parallel already.
        RuntimeError: the model was compiled already, or the layer did not run in the dry forward.
        TypeError: an output in which the logits are not found (auxiliary outputs in training, say).

    Source: Yang et al., ICCV 2023, arXiv 2303.13005, section 3.3 (weak logits).

    Example:
        >>> student = WithWeakHead(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "1",
        ...                        example_input=torch.zeros(1, 4))
        >>> logits, weak_logits = student(torch.zeros(2, 4))
        >>> student.head
        Linear(in_features=8, out_features=3, bias=True)
        >>> student.extra_repr()
        "tap='1', the head reads (N, C) as it is"
    """

    def __init__(
        self,
        model: nn.Module,
        tap: str | None = None,
        num_classes: int | None = None,
        *,
        logits: str | int | None = None,
        example_input: Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
        channels: int | None = None,
    ) -> None:
        super().__init__()
        _refuse_parallel(model)
        if channels not in (None, 1, -1):
            raise ValueError(f"channels must be 1 or -1, a dimension of the feature, or None, got {channels!r}")
        layer = default_tap(model) if tap is None else tap
        self.model = model
        self._logits = logits
        self._tap = FeatureTap(model, layer)
        try:
            example: Any = _example(model) if example_input is None else example_input
            example = dict(example) if isinstance(example, Mapping) else example
            example = _each_tensor(lambda x: torch.cat([x, x])[:2] if x.ndim else x, example)
            try:
                output, feature = _dry_forward(model, self._tap, example)
            except Exception as error:
                if example_input is not None:
                    raise
                raise ValueError(
                    f"{type(model).__name__} does not take {_describe(example)}, which is a guess: pass "
                    f"example_input; {error}"
                ) from error
            class_logits = find_logits(output, logits)
            if class_logits.ndim != 2:
                raise ValueError(
                    f"the model must return (N, C) logits, got {_describe(class_logits)}: a dense or a language model "
                    "needs weak logits at every position, which FeatureTap and a classifier of your own give "
                    "(examples/loops/segmentation.py)"
                )
            if num_classes is not None and class_logits.shape[1] != num_classes:
                raise ValueError(
                    f"num_classes={num_classes}, but the model returns logits of {_describe(class_logits)}"
                )
            if isinstance(feature, Tensor) and feature.ndim and len(feature) != len(class_logits):
                raise ValueError(
                    f"layer {layer!r} returns {_describe(feature)} for a batch of {len(class_logits)}: its first "
                    "dimension is not the batch; name another layer"
                )
            self._pool = _pooling(feature, example, model, self._tap, channels)
            pooled = _pool(feature, self._pool)
        except BaseException:
            self._tap.close()  # a model that was refused is left as it was
            raise
        self.head = nn.Linear(pooled.shape[1], class_logits.shape[1], device=pooled.device, dtype=pooled.dtype)

    @property
    def tap(self) -> str:
        """Dotted path, in ``.model``, of the layer the weak head reads."""
        return self._tap.layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.model(*args, **kwargs)
        if not self.training:
            self._tap.forget()
            return output
        return find_logits(output, self._logits), self.head(_pool(_first(self._tap.pop()), self._pool))

    def extra_repr(self) -> str:
        return f"tap={self.tap!r}, the head reads {_POOLINGS[self._pool]}"

    def __getattr__(self, name: str) -> Any:
        """The hints of the wrapped model, where it has them."""
        if name not in _HINTS:
            return super().__getattr__(name)
        hint = getattr(super().__getattr__("model"), name)
        if name == "no_weight_decay":
            return lambda: {f"model.{parameter}" for parameter in hint()}
        if name == "group_matcher":
            return lambda *args, **kwargs: {key: _below_model(spec) for key, spec in hint(*args, **kwargs).items()}
        return hint

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("DataParallel's threads would share one tap: use DistributedDataParallel")

    def close(self) -> nn.Module:
        """Remove the tap and return the plain student; this module cannot run afterwards."""
        self._tap.close()
        return self.model


# What optimizers and trainers ask a model for: timm's, then Hugging Face's.
_HINTS = frozenset({
    "no_weight_decay", "no_weight_decay_keywords", "group_matcher", "set_grad_checkpointing", "get_classifier",
    "pretrained_cfg", "default_cfg", "num_classes", "num_features", "in_chans",
    "config", "gradient_checkpointing_enable", "gradient_checkpointing_disable", "supports_gradient_checkpointing",
    "activation_checkpointing_enable", "activation_checkpointing_disable",
})  # fmt: skip


def find_logits(output: Any, where: str | int | None) -> Tensor:
    """The logits in what a model returned: ``where``, or where there is one place for them.

    Raises:
        TypeError: they are not there
    """
    if isinstance(output, Tensor):
        return output
    found = None
    if isinstance(output, Mapping):
        key = next(iter(output), None) if where is None and len(output) == 1 else where
        found = output.get("logits" if key is None else key)
    elif isinstance(where, int):
        found = output[where] if isinstance(output, (tuple, list)) and len(output) > where else None
    elif where or not isinstance(output, tuple):  # a tuple of logits and auxiliary ones is the user's to decide
        found = getattr(output, where or "logits", None)
    if isinstance(found, Tensor):
        return found
    raise TypeError(
        f"the model must return logits, got {_describe(output)}: switch its auxiliary outputs off (aux_logits=False in "
        "torchvision), or say which entry holds the logits, as logits="
        + (repr(next(iter(output), "logits")) if isinstance(output, Mapping) else "0")
    )


def _below_model(spec: Any) -> Any:
    """A pattern of a group_matcher for names that begin with "model."; beside it there may be an order."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(_below_model(part) for part in spec)
    if not isinstance(spec, str):
        return spec
    unanchored = re.sub(r"(?<![\[\\])[\^]", "", spec)  # match() anchors it already; not the ^ of a [^class]
    return rf"^model\.(?:{unanchored})"


# Wrappers by class name, so that none of them need be imported; fully_shard and replicate change the class in place.
_PARALLEL = {
    "DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "FSDPModule", "ReplicateModule",
    "DeepSpeedEngine",
}  # fmt: skip


def _refuse_parallel(model: nn.Module) -> None:
    """Raise when the model, or a part of it, is split or copied over ranks: the head would not be."""
    for name, module in model.named_modules():
        wrapper = next((c.__name__ for c in type(module).__mro__ if c.__name__ in _PARALLEL), None)
        if wrapper is None and any(type(p).__name__ == "DTensor" for p in module.parameters(recurse=False)):
            wrapper = "a tensor-parallel wrapper"
        if wrapper:
            raise ValueError(
                f"{f'layer {name!r}' if name else 'the model'} is inside {wrapper} already, and the head's gradients "
                "would differ between ranks: wrap the plain model in WithWeakHead first, then make that parallel"
            )


def _dry_forward(model: nn.Module, tap: FeatureTap, example: Any) -> tuple[Any, Any]:
    """Output and feature."""
    with _eval_mode(model), torch.no_grad():
        if isinstance(example, dict):
            output = model(**example)
        else:
            output = model(*example) if isinstance(example, tuple) else model(example)
    return output, _first(tap.pop())


def _first(output: Any) -> Any:
    """What a layer returns, without the attention weights, sizes or states that may come after it."""
    while isinstance(output, tuple) and output:
        output = output[0]
    return output


def _pooling(feature: Any, example: Any, model: nn.Module, tap: FeatureTap, channels: int | None) -> str:
    """How a feature of this shape becomes (N, C), as a key of _POOLINGS.

    Raises:
        ValueError: it is no batch of vectors, or can be read in two ways
    """
    if not isinstance(feature, Tensor) or feature.ndim < 2:
        raise ValueError(
            f"layer {tap.layer!r} must return a feature of a dimension for the batch and one for the channels, got "
            f"{_describe(feature)}; name another layer"
        )
    if feature.ndim == 2:
        return "none"
    if channels is None:
        channels = _channels_dim(feature, example, model, tap)
    if feature.ndim == 3 and channels == -1 and _has_class_token(model, feature.shape[1]):
        return "class token"
    return "channels first" if channels == 1 else "channels last"


def _channels_dim(feature: Tensor, example: Any, model: nn.Module, tap: FeatureTap) -> int:
    """1 or -1, whichever evidence comes first: what grows with the input, the proportions, the layer's widths."""
    for larger in _larger(example):
        try:
            _, other = _dry_forward(model, tap, larger)
        except Exception:  # a model of one size says so in its own way
            continue
        grown = [isinstance(other, Tensor) and other.ndim == feature.ndim and
                 other.shape[dim] != feature.shape[dim] for dim in (1, -1)]  # fmt: skip
        if grown[0] != grown[1]:
            return -1 if grown[0] else 1
    patches = {getattr(module, "num_patches", None) for module in model.modules()}
    if feature.ndim == 3 and (_has_class_token(model, feature.shape[1]) or feature.shape[1] in patches):
        return -1
    fits = [False, False]
    inputs = next(x for x in tree_leaves(example) if isinstance(x, Tensor))
    if feature.ndim == inputs.ndim == 4:
        height, width = inputs.shape[2:]
        fits = [h * width == w * height for h, w in (feature.shape[2:], feature.shape[1:3])]
    if fits[0] == fits[1]:
        widths = {p.shape[0] for p in model.get_submodule(tap.layer).parameters() if p.ndim}
        fits = [feature.shape[dim] in widths for dim in (1, -1)]
    if fits[0] == fits[1]:
        raise ValueError(
            f"the feature of layer {tap.layer!r}, {_describe(feature)}, can be read in two ways: say channels=1 for "
            "(N, C, ...) or channels=-1 for (N, ..., C)"
        )
    return 1 if fits[0] else -1


def _larger(example: Any) -> list[Any]:
    """Inputs of twice the size, for each way to read it: images, (N, C, L), (N, L, C), or (N, L) of indices."""
    inputs = next(x for x in tree_leaves(example) if isinstance(x, Tensor))
    if inputs.ndim == 2:
        ways = [] if inputs.is_floating_point() else [[1]]
    else:
        ways = [list(range(2, inputs.ndim))] + ([[1]] if inputs.ndim == 3 else [])

    def double(x: Tensor, dims: list[int]) -> Tensor:
        for dim in dims if x.ndim == inputs.ndim else []:  # a mask grows with its tokens
            x = torch.cat([x, x], dim)
        return x

    return [_each_tensor(partial(double, dims=dims), example) for dims in ways]


def _each_tensor(function: Callable[[Tensor], Tensor], inputs: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, inputs)


def _has_class_token(model: nn.Module, tokens: int) -> bool:
    """Whether the first of so many tokens is the class token: some models (CaiT) add theirs only after the tap."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    only_patches = tokens == patches or math.isqrt(tokens) ** 2 == tokens
    return bool(names & {"cls_token", "class_token", "class_embedding"}) and not only_patches


# How a feature becomes (N, C), and how that is told.
_POOLINGS = {
    "none": "(N, C) as it is",
    "class token": "the class token, [:, 0] of (N, L, C)",
    "channels first": "the mean of (N, C, ...) over positions",
    "channels last": "the mean of (N, ..., C) over positions",
}


def _pool(feature: Tensor, pooling: str) -> Tensor:
    if pooling == "none":
        return feature
    if pooling == "class token":
        return feature[:, 0]
    positions = range(2, feature.ndim) if pooling == "channels first" else range(1, feature.ndim - 1)
    return feature.mean(tuple(positions))


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    entries = f" of {', '.join(map(repr, value))}" if isinstance(value, Mapping) else ""
    return f"a {type(value).__name__}{entries}"


def _example(model: nn.Module) -> Tensor:
    """Zeros of the (channels, height, width) a model says it takes, else 224 px and its first layer's channels."""
    config = getattr(model, "pretrained_cfg", None)
    channels, height, width = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    hugging_face = getattr(model, "config", None)
    owners = (model, getattr(model, "patch_embed", None), hugging_face, getattr(hugging_face, "vision_config", None))
    sizes = (getattr(owner, name, None) for owner in owners for name in ("image_size", "img_size"))
    size = next((size for size in sizes if size), None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size[-2:]
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Conv2d):
        channels = first.in_channels
    return next(model.parameters(), torch.empty(0)).new_zeros(1, channels, height, width)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every module's own mode back afterwards (a frozen BatchNorm stays frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
