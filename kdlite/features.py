"""Reading a mid-level feature of any model, and the weak head that USKD trains on it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .taps import default_tap


class FeatureTap:
    """Keeps the last output of one layer of a model; changes nothing else about the model.

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
                (reentrant checkpointing), where its feature would silently train nothing.
        """
        capture = self._capture
        output, capture.output = capture.output, None
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
        self._capture.output = None

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
    """The forward hook: holds one output. Its copies are dead, unless a FeatureTap was copied with them."""

    def __init__(self) -> None:
        self.live = True
        self.output: Any = None
        self.lost_gradient = False

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.live:
            return
        # activation checkpointing runs the layer a second time, inside backward: that output is not wanted
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self.output = output
        self.lost_gradient = module.training and not torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return {"live": False, "output": None, "lost_gradient": False}


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

    In training mode the forward returns ``(logits, weak_logits)``, in eval mode ``logits`` alone. Because head and
    model are one module, DistributedDataParallel, the optimizer and the checkpoint have both; ``.model`` is the
    plain student, without the head. Wrap before compiling. A deepcopy (EMA) has a tap of its own.

    The head is a linear layer on the pooled feature: global average for (N, C, H, W) and (N, H, W, C), told apart by
    the input's proportions; of (N, L, C) the class token, if there is one, else the mean over tokens. The channels
    come from one dry forward, in eval mode and without gradient.

    Wrap this module in DistributedDataParallel, not the reverse; DataParallel, whose threads would share one tap, is
    refused.

    Args:
        model: classifier from a batch of images to (N, C) logits.
        tap: dotted path of the layer to read; None takes :func:`default_tap`.
        num_classes: C; None takes it from the dry forward.
        example_input: a batch for the dry forward; None takes zeros of the model's usual input size.

    Raises:
        ValueError: no such layer, no default for this model, a feature or logits of a shape that does not fit, a
            model that does not take the guessed example, a model inside DistributedDataParallel.
        RuntimeError: the model was compiled already, or the layer did not run in the dry forward.
        TypeError: in training, when the model returns something else than logits (auxiliary outputs, say).

    Source: Yang et al., ICCV 2023, arXiv 2303.13005, section 3.3 (weak logits).

    Example:
        >>> student = WithWeakHead(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "1",
        ...                        example_input=torch.zeros(1, 4))
        >>> logits, weak_logits = student(torch.zeros(2, 4))
        >>> student.head
        Linear(in_features=8, out_features=3, bias=True)
    """

    def __init__(
        self,
        model: nn.Module,
        tap: str | None = None,
        num_classes: int | None = None,
        *,
        example_input: Tensor | None = None,
    ) -> None:
        super().__init__()
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            raise ValueError(
                f"the model is inside {type(model).__name__}, where the head's gradients would differ between ranks: "
                "wrap the plain model in WithWeakHead first, then that in DistributedDataParallel"
            )
        layer = default_tap(model) if tap is None else tap
        self.model = model
        self._tap = FeatureTap(model, layer)
        try:
            logits, feature, input_shape = _dry_forward(model, self._tap, example_input)
            if not isinstance(logits, Tensor) or logits.ndim != 2:
                raise ValueError(f"the model must return (N, C) logits, got {_describe(logits)}")
            if num_classes is not None and logits.shape[1] != num_classes:
                raise ValueError(f"num_classes={num_classes}, but the model returns logits of {_describe(logits)}")
            self._pool = _pooling(feature, input_shape, model, layer)
            pooled = _pool(feature, self._pool)
            if pooled.shape[0] != logits.shape[0]:
                raise ValueError(
                    f"layer {layer!r} returns {_describe(feature)} for a batch of {logits.shape[0]}: its first "
                    "dimension is not the batch; name another layer"
                )
        except BaseException:
            self._tap.close()  # a model that was refused is left as it was
            raise
        self.head = nn.Linear(pooled.shape[1], logits.shape[1], device=pooled.device, dtype=pooled.dtype)

    @property
    def tap(self) -> str:
        """Dotted path, in ``.model``, of the layer the weak head reads."""
        return self._tap.layer

    def forward(self, x: Tensor) -> Any:
        logits = self.model(x)
        if not self.training:
            self._tap.forget()
            return logits
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"the model must return logits alone in training, got a {type(logits).__name__}: "
                "switch its auxiliary outputs off (aux_logits=False in torchvision)"
            )
        return logits, self.head(_pool(self._tap.pop(), self._pool))

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("DataParallel's threads would share one tap: use DistributedDataParallel")

    def close(self) -> nn.Module:
        """Remove the tap and return the plain student; this module cannot run afterwards."""
        self._tap.close()
        return self.model


def _dry_forward(model: nn.Module, tap: FeatureTap, example: Tensor | None) -> tuple[Any, Any, torch.Size]:
    """Logits and feature of two samples, and the input's shape."""
    guessed = example is None
    if example is None:
        example = next(model.parameters(), torch.empty(0)).new_zeros(1, *_usual_input_size(model))
    example = torch.cat([example, example])[:2]
    try:
        with _eval_mode(model), torch.no_grad():
            logits = model(example)
    except Exception as error:
        if not guessed:
            raise
        raise ValueError(
            f"{type(model).__name__} does not take {_describe(example)}, which is a guess: pass example_input; {error}"
        ) from error
    return logits, tap.pop(), example.shape


def _pooling(feature: Any, input_shape: torch.Size, model: nn.Module, layer: str) -> str:
    """How a feature of this shape becomes (N, C)."""
    if isinstance(feature, Tensor):
        if feature.ndim == 2:
            return "none"
        if feature.ndim == 3:
            return "class token" if _has_class_token(model, feature.shape[1]) else "tokens"
        if feature.ndim == 4:
            # of the two readings, the one whose height and width are in the input's proportion
            proportion = input_shape[2] / input_shape[3] if len(input_shape) == 4 else 1.0
            _, a, b, c = feature.shape
            nchw, nhwc = (abs(math.log(height / width / proportion)) for height, width in ((b, c), (a, b)))
            return "NCHW" if nchw <= nhwc else "NHWC"
    raise ValueError(
        f"layer {layer!r} must return (N, C), (N, L, C), (N, C, H, W) or (N, H, W, C), "
        f"got {_describe(feature)}; name another layer"
    )


def _has_class_token(model: nn.Module, tokens: int) -> bool:
    """Whether the first of so many tokens is the class token: some models (CaiT) add theirs only after the tap."""
    names = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    only_patches = tokens == patches or math.isqrt(tokens) ** 2 == tokens
    return bool(names & {"cls_token", "class_token"}) and not only_patches


def _pool(feature: Tensor, how: str) -> Tensor:
    if how == "none":
        return feature
    if how == "class token":
        return feature[:, 0]
    if how == "tokens":
        return feature.mean(1)
    return feature.mean((2, 3) if how == "NCHW" else (1, 2))


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _usual_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) a model says it takes, else 224 px and its first layer's channels."""
    config = getattr(model, "pretrained_cfg", None)
    channels, height, width = config.get("input_size", (3, 224, 224)) if isinstance(config, dict) else (3, 224, 224)
    size = getattr(model, "image_size", None) or getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size[-2:]
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))), None)
    if isinstance(first, nn.Conv2d):
        channels = first.in_channels
    return channels, height, width


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
