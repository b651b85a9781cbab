"""Fit the new classifier of a pretrained network to its frozen features, before the training of all layers.

A random classifier sends useless gradients into the features; a linear probe does not (Kumar et al. 2022,
arXiv 2202.10054).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdlite.training.distributed import from_rank_zero, gather
from kdlite.training.loading import CorruptCount, ToDevice, image_progress

MOST_IMAGES = 20_000  # limit on the images of a fit; their features take 200 MB at 2,560 features an image
ITERATIONS = 100  # iterations of L-BFGS
WEIGHT_DECAY = 0.1  # for features with deviation 1; 0.03 to 1 give the same accuracy (examples/paper/LOG.md, 21)


class Inputs:
    """Store the inputs of a layer, as its forward pre-hook."""

    def __init__(self, layer: nn.Module) -> None:
        self.rows: list[Tensor] = []
        self.handle = layer.register_forward_pre_hook(self)

    def __call__(self, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.rows.append(inputs[0].float().cpu())


@torch.no_grad()
def fit_classifiers(
    model: nn.Module,
    classifiers: dict[str, nn.Module],
    loader: Any,
    to_device: ToDevice,
    corrupt: CorruptCount,
    class_weights: Tensor | None = None,
) -> str:
    """Fit each classifier to the features of a loader's images, and return a report.

    Every process calls this function with its own images. A classifier keeps its weights, which the caller has
    set to zero, if it is not linear or if its input is not one row for each image. The call leaves the model in eval
    mode.

    Args:
        model: the network, on its device
        classifiers: layers of the model by name
        loader: batches of labelled training images without augmentation
        to_device: normalises a batch
        corrupt: counts the images that cannot be read
        class_weights: (C,), the class weights of the loss; None: equal weights
    """
    linear = {name: layer for name, layer in classifiers.items() if isinstance(layer, nn.Linear)}
    lines = [f"{name} starts at zero: it is not a linear layer" for name in classifiers.keys() - linear.keys()]
    if not linear:
        return "; ".join(lines)
    hooks = {name: Inputs(layer) for name, layer in linear.items()}
    labels: list[Tensor] = []
    model.eval()
    for batch in image_progress(loader, "linear probe"):
        corrupt.report(batch)
        if batch.images is not None:
            images, target, *_ = to_device(batch)
            model(images)
            labels.append(target.cpu())
    for name, layer in linear.items():
        hooks[name].handle.remove()
        found = gather((hooks[name].rows, labels))
        rows, targets = (torch.cat([batch for part in parts for batch in part]) for parts in zip(*found))
        if rows.shape != (len(targets), layer.in_features):
            lines.append(f"{name} starts at zero: its input has the shape {list(rows.shape)}")
            continue
        weight, bias, top1 = from_rank_zero(fit_linear, rows, targets, layer.out_features, class_weights)
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
        lines.append(f"{name} starts as a linear probe of {len(targets)} training images ({top1:.1f} % of them right)")
    return "; ".join(lines)


@torch.enable_grad()
def fit_linear(
    features: Tensor, target: Tensor, classes: int, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, float]:
    """Fit a softmax regression to features (N, D); return weight (C, D), bias (C,) and top-1 in percent.

    The fit uses features that are centred and divided by their deviation; weight and bias are for the original
    features.
    """
    mean, scale = features.mean(0), features.std(0, correction=0).clamp(min=1e-3)
    rows = (features - mean) / scale
    head = nn.Linear(features.shape[1], classes)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")
    weights = None if class_weights is None else class_weights.float().cpu()
    optimizer.step(functools.partial(backward, head, rows, target, weights))  # type: ignore[arg-type]
    with torch.no_grad():
        top1 = 100 * (head(rows).argmax(1) == target).float().mean().item()
        weight = head.weight / scale
        return weight, head.bias - weight @ mean, top1


def backward(head: nn.Linear, rows: Tensor, target: Tensor, class_weights: Tensor | None) -> Tensor:
    """Compute the gradients of cross-entropy + WEIGHT_DECAY / 2 * |weight|^2, and return this loss."""
    head.zero_grad()
    loss = F.cross_entropy(head(rows), target, weight=class_weights) + WEIGHT_DECAY / 2 * head.weight.square().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss
