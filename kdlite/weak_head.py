"""Join a model and USKD's weak classifier, which reads a mid-level feature of the model, in one module."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import FeatureTap
from .inputs import describe, find_logits
from .layers import default_taps
from .pooling import POOLINGS, choose_layer, dry_forward, find_pooling, guess_example, pool, two_samples

# attributes that timm's optimizers and Hugging Face's Trainer read from a model
FORWARDED = (
    "no_weight_decay",
    "group_matcher",
    "config",
    "activation_checkpointing_enable",
    "gradient_checkpointing_enable",
)
# class names, because fully_shard and replicate change a module's class in place
PARALLEL = {
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "ReplicateModule",
    "DeepSpeedEngine",
    "DTensor",
}


class WithWeakHead(nn.Module):
    """Join in one module a model and the weak classifier of USKD.

    The forward takes the model's own arguments. In training mode it returns ``(logits, weak_logits)``, in eval mode it
    returns the model's own output. Head and model are one module, so DistributedDataParallel, the optimizer and the
    checkpoint contain both; ``.model`` is the plain student. Wrap the model before torch.compile,
    DistributedDataParallel or fully_shard. A deepcopy (EMA) works independently of the original.

    The head is a linear layer on the pooled feature: the class token of (N, L, C) if the layer returns a class token,
    else the mean over positions. If the layer returns a tuple, its first entry is the feature. The attribute
    ``pooling`` stores the choice. A dry forward (eval mode, no gradient) finds the shape of the feature. Further dry
    forwards on larger inputs find its channels, the dimension that does not grow. If the model takes only one size, a
    feature of three dimensions counts as (N, L, C). Of four dimensions, the two with the proportions of the image are
    the positions. If register tokens stand before the positions, the mean skips them.

    Args:
        model: classifier whose output is, or holds, (N, C) logits.
        tap: dotted path of the layer to read; None: :func:`default_tap`, or the next layer that the
            structure suggests, if that one does not run or returns no feature.
        num_classes: the number of classes, C; None: as in the logits of the dry forward.
        logits: key, attribute or index of the logits in an output that is not a tensor. None: "logits", or the only
            entry of a dict.
        example_input: a batch for the dry forward, a tuple of arguments or a dict of keyword arguments; None: zeros of
            the size in timm's ``pretrained_cfg``, or of 224 pixels.
        pooling: "class token", "channels first" or "channels last", whose mean skips no token; None: as above.

    Raises:
        ValueError: the layer does not exist, does not run or does not return a feature; its shape is ambiguous; the
            model does not run on the guessed example, is parallel already or does not return (N, C) logits; a wrong
            pooling or num_classes.
        RuntimeError: the model is compiled already.
        TypeError: the output does not hold the logits (with auxiliary outputs in training, for example).

    Source: Yang et al., ICCV 2023, arXiv 2303.13005, section 3.3 (weak logits).

    Example:
        >>> import torch
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
        pooling: str | None = None,
    ) -> None:
        super().__init__()
        refuse_parallel(model)
        if pooling not in (None, "class token", "channels first", "channels last"):
            raise ValueError(f'pooling must be "class token", "channels first" or "channels last", got {pooling!r}')
        layers = default_taps(model) if tap is None else [tap]
        for layer in layers:
            FeatureTap(model, layer).close()  # raise for a misspelt or a compiled layer
        example = two_samples(guess_example(model) if example_input is None else example_input)
        try:
            output, seen = dry_forward(model, example)
        except Exception as error:
            if example_input is not None:
                raise
            raise ValueError(
                f"{type(model).__name__} does not run on a guessed {describe(example)}: pass example_input; {error}"
            ) from error
        class_logits = find_logits(output, logits)
        if class_logits.ndim != 2:
            raise ValueError(
                f"the model must return (N, C) logits, got {describe(class_logits)}: see kdlite/README.md#questions"
            )
        if num_classes is not None and class_logits.shape[1] != num_classes:
            raise ValueError(f"num_classes={num_classes}, but the model returns logits of {describe(class_logits)}")
        layer = choose_layer(layers, seen, len(class_logits))
        feature = seen[layer]
        self.model = model
        self.pooling, self._skip = find_pooling(model, layer, example, feature, pooling)
        self._logits = logits
        self._tap = FeatureTap(model, layer, partial(pool, self.pooling, self._skip))
        width = feature.shape[1 if self.pooling in ("none", "channels first") else -1]
        self.head = nn.Linear(width, class_logits.shape[1], device=feature.device, dtype=feature.dtype)

    @property
    def tap(self) -> str:
        """Return the dotted path, in ``.model``, of the layer that the weak head reads."""
        return self._tap.layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if torch.compiler.is_compiling() else self._tap._in_forward():
            output = self.model(*args, **kwargs)
        if not self.training:
            self._tap.forget()
            return output
        return find_logits(output, self._logits), self.head(self._tap.pop())

    def extra_repr(self) -> str:
        skipped = f", without the first {self._skip} tokens" if self._skip else ""
        return f"tap={self.tap!r}, the head reads {POOLINGS[self.pooling]}{skipped}"

    def __getattr__(self, name: str) -> Any:
        if name not in FORWARDED:
            return super().__getattr__(name)
        value = getattr(super().__getattr__("model"), name)
        if name == "no_weight_decay":
            return lambda: {f"model.{parameter}" for parameter in value()}
        if name == "group_matcher":
            return lambda *args, **kwargs: {key: below_model(spec) for key, spec in value(*args, **kwargs).items()}
        return value

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("DataParallel's threads would share one tap: use DistributedDataParallel")

    def close(self) -> nn.Module:
        """Remove the hook and return the plain student; this module cannot train afterwards."""
        self._tap.close()
        return self.model


def below_model(spec: Any) -> Any:
    """Return timm's patterns of parameter names, changed to match names that begin with "model."."""
    if isinstance(spec, (list, tuple)):
        return type(spec)(below_model(part) for part in spec)
    if not isinstance(spec, str):
        return spec
    unanchored = re.sub(r"(?<![\[\\])[\^]", "", spec)  # keep the ^ of [^...]; match() needs no other ^
    return rf"^model\.(?:{unanchored})"


def refuse_parallel(model: nn.Module) -> None:
    """Raise if a part of the model is split or copied over ranks already: the head would stay whole."""
    for module in model.modules():
        kinds = [*type(module).__mro__, *map(type, module.parameters(recurse=False))]
        parallel = next((kind.__name__ for kind in kinds if kind.__name__ in PARALLEL), None)
        if parallel:
            raise ValueError(f"the model is inside {parallel} already: wrap the plain model in WithWeakHead first")
