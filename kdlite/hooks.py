"""Read a mid-level feature of any model with a forward hook."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class FeatureTap:
    """Store the last output of one layer; leave the rest of the model unchanged.

    The hook clones the output, so a later in-place layer never changes the feature. With ``transform`` the hook stores
    ``transform(output)`` instead; a transform that pools the output leaves no feature map in memory.

    It works on any ``nn.Module``, under DistributedDataParallel, autocast, gradient accumulation and (non-reentrant)
    activation checkpointing. Make the tap before ``torch.compile``; with checkpointing, compile without ``fullgraph``.
    In a deepcopy of a tapped model the hook does nothing. After :meth:`close` the model pickles and exports as before.

    Args:
        module: the model, or a DistributedDataParallel around it.
        layer: dotted path of the layer, a name in ``module.named_modules()``.
        transform: function of the layer's output; None: clone every tensor in it. A result that shares memory with
            the output changes when a later layer works in place.

    Raises:
        ValueError: the layer does not exist; the message lists the nearest names.
        RuntimeError: the model, or a part of it that holds the layer, is compiled. A hook that is registered after
            the first compiled call never runs.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with FeatureTap(model, "1") as tap:
        ...     _ = model(torch.zeros(5, 4))
        ...     print(tuple(tap.pop().shape))
        (5, 3)
    """

    def __init__(self, module: nn.Module, layer: str, transform: Callable[[Any], Any] | None = None) -> None:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            module = module.module
        refuse_compiled(module, "")
        names = [name for name, _ in module.named_modules(remove_duplicate=False)]
        if layer not in names:
            near = difflib.get_close_matches(layer, names, n=5, cutoff=0.4) or names[1:6] or ["none"]
            raise ValueError(f"no layer {layer!r} in {type(module).__name__}; near matches: {', '.join(near)}")
        refuse_compiled(module, layer)
        self.layer = layer
        self._capture = _Capture(transform or clone_tensors)
        self._handle: Any = module.get_submodule(layer).register_forward_hook(self._capture)

    def pop(self) -> Any:
        """Return the layer's last output, transformed, and drop it to free memory.

        Raises:
            RuntimeError: the layer has not run since the last pop; or it ran in training mode without gradient
                (reentrant checkpointing), so that a loss on its feature cannot train it.
        """
        capture = self._capture
        output, capture.output = capture.output, None
        if output is None:
            reason = "run the model first, and tap before compiling" if capture.live else "the tap is closed"
            raise RuntimeError(f"layer {self.layer!r} has not run since the last pop(): {reason}")
        if capture.lost_gradient and torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {self.layer!r} ran without gradient in training mode: checkpoint it with use_reentrant=False, "
                "or put a frozen layer in eval mode"
            )
        return output

    def forget(self) -> None:
        """Drop the layer's last output."""
        self._capture.output = None

    @contextlib.contextmanager
    def _in_forward(self) -> Iterator[None]:
        """Store the output of a forward also if checkpointing recomputes it; drop it if the forward fails."""
        self._capture.in_forward = True
        try:
            yield
        except BaseException:
            self.forget()
            raise
        finally:
            self._capture.in_forward = False

    def close(self) -> None:
        """Remove the hook from the model. A second call does nothing."""
        self._handle.remove()
        self._capture.live = False
        self.forget()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # deepcopy and pickle of WithWeakHead copy the tap too: switch the copied hook on
        self.__dict__.update(state)
        self._capture.live = True


class _Capture:
    """Store the last output of a layer, as its forward hook. A copy works only if its FeatureTap is copied with it."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform
        self.live = True
        self.output: Any = None
        self.lost_gradient = False
        self.in_forward = False  # in WithWeakHead's forward, which pops the output also in a recomputation

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.live:
            return
        # checkpointing compares the tensors saved in its second run (inside backward) with those of the first:
        # apply the transform in both
        kept = self.transform(output)
        if self.in_forward or torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self.output = kept
            self.lost_gradient = module.training and not torch.is_grad_enabled()

    def __getstate__(self) -> dict[str, Any]:
        return _Capture(self.transform).__dict__ | {"live": False}


def clone_tensors(output: Any) -> Any:
    """Return the output with every tensor in it cloned."""
    return tree_map(_clone, output)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the layer returns a {type(value).__name__}, which FeatureTap cannot clone: pass transform=")


def refuse_compiled(module: nn.Module, layer: str) -> None:
    """Raise RuntimeError if a module on the path from the root to the layer is compiled."""
    advice = "make the FeatureTap or WithWeakHead first, then call torch.compile"
    path = [module]
    for name in layer.split(".") if layer else []:
        path.append(path[-1].get_submodule(name))
    for part in path:
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            raise RuntimeError(f"{type(part).__name__} is compiled already: {advice}")
