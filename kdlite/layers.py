"""Choose the layer that USKD reads by default."""

from __future__ import annotations

import re

from torch import nn

# Class name -> layer, for models whose structure does not show the layer; -k is the k-th child from the end. First come
# the paper's layers (official configs, checked by channel count), then those of other models, then Hugging Face's.
_DEFAULT_TAPS = {
    "MobileNetV2": "features.-2",  # features.17, 320 channels
    "ShuffleNetV2": "stage4",  # 464 channels
    "SwinTransformer": "features.-3",  # features.5, 384 channels
    "ConvNeXt": "features.-3",
    "EfficientNet": "features.-2",
    "MobileNetV3": "features.-2",
    "MNASNet": "layers.-4",
    "GoogLeNet": "inception4e",
    "Inception3": "Mixed_6e",
    "AlexNet": "features.-2",
    "SqueezeNet": "features.-2",
    "MobileNetV1Model": "layer.-5",
    "MobileNetV2Model": "layer.-1",
    "EfficientNetModel": "encoder.blocks.-1",
    "SwinModel": "encoder.layers.-2.blocks.-1",  # before the layer's own downsampling
    "Swinv2Model": "encoder.layers.-2.blocks.-1",
}


def default_tap(model: nn.Module) -> str:
    """Return the layer that USKD reads by default: the end of the second-to-last stage, or block L/2 of a transformer.

    Args:
        model: a classifier of torchvision, timm or Hugging Face; or a model whose stages have the same names; or a
            model with such a backbone.

    Returns:
        The layer's dotted path, as :class:`FeatureTap` takes it. For a stage that is a plain ``nn.Sequential`` it is
        the path of its last block. Both return the same tensor, but activation checkpointing calls only the blocks.

    Raises:
        ValueError: the model does not have a known structure.

    Source: the paper's choices (official configs of yzd-v/cls_KD), extended to other models by structure.

    Example:
        >>> stages = {f"layer{i}": nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for i in (1, 2, 3, 4)}
        >>> default_tap(nn.ModuleDict(stages))
        'layer3.1'
    """
    return default_taps(model)[0]


def default_taps(model: nn.Module) -> list[str]:
    """Return the default layer, then the other layers that the structure suggests."""
    layers = list(dict.fromkeys(_last_block(model, layer) for layer in _candidates(model)))
    if not layers:
        children = ", ".join(name for name, _ in model.named_children())
        raise ValueError(f"no default tap for {type(model).__name__}: pass tap=, a layer in {children}")
    return layers


def _candidates(model: nn.Module) -> list[str]:
    layers = [
        _from_feature_info(model),
        _from_table(model),
        _middle_block(model),
        _last_stage_but_one(model),
        _before_last_pool_but_one(model),
        *_in_backbone(model),
    ]
    return [layer for layer in layers if layer]


def _last_block(model: nn.Module, layer: str) -> str:
    module = model.get_submodule(layer)
    while type(module) in (nn.Sequential, nn.ModuleList) and len(names := list(module._modules)):
        layer = f"{layer}.{names[-1]}"
        module = model.get_submodule(layer)
    return layer


def _in_backbone(model: nn.Module) -> list[str]:
    """Find layers in the backbone: the child that Hugging Face names, else the first child that has parameters.

    The first child counts as a backbone only if it has more than half of the model's parameters.
    """
    sizes = {name: sum(p.numel() for p in child.parameters()) for name, child in model.named_children()}
    first = next((name for name, size in sizes.items() if size), "")
    backbone = getattr(model, "base_model_prefix", "")
    if backbone not in sizes:
        backbone = first
        if not first or 2 * sizes[first] <= sum(sizes.values()):
            return []
    return [f"{backbone}.{layer}" for layer in _candidates(model.get_submodule(backbone))]


def _from_feature_info(model: nn.Module) -> str | None:
    """Find the layer among the stages that a timm model lists."""
    info = getattr(model, "feature_info", None)
    stages = list(getattr(info, "info", info) or [])
    if len(stages) < 2:
        return None
    if len({stage.get("reduction") for stage in stages}) == 1:
        return None  # a plain transformer: _middle_block finds the layer
    if isinstance(getattr(model, "conv_head", None), nn.Conv2d) and hasattr(model, "bn2"):
        # MobileNetV2 and EfficientNet: the 1x1 convolution after timm's stages is the last stage
        return str(stages[-1]["module"])
    name = str(stages[-2]["module"])
    return name if name in dict(model.named_modules()) else None


def _from_table(model: nn.Module) -> str | None:
    path = next((_DEFAULT_TAPS[c.__name__] for c in type(model).__mro__ if c.__name__ in _DEFAULT_TAPS), None)
    module, names = model, []
    for part in path.split(".") if path else []:
        children = dict(module.named_children())
        if part.startswith("-"):
            part = list(children)[int(part)] if len(children) >= -int(part) else part
        if part not in children:
            return None
        module = children[part]
        names.append(part)
    return ".".join(names) or None


def _middle_block(model: nn.Module) -> str | None:
    """Return block L/2 of a container of L >= 4 blocks of one kind and width."""
    for container in ("blocks", "encoder.layers", "layers", "encoder.layer"):
        try:
            blocks = list(model.get_submodule(container).named_children())
        except AttributeError:
            continue
        kinds = {type(block) for _, block in blocks}
        are_stages = nn.Sequential in kinds and len(blocks) <= 6
        if len(blocks) >= 4 and len(kinds) == 1 and not are_stages and _keeps_width(blocks):
            return f"{container}.{blocks[len(blocks) // 2 - 1][0]}"
    return None


def _keeps_width(blocks: list[tuple[str, nn.Module]]) -> bool:
    return len({next((p.shape for p in block.parameters() if p.ndim == 1), None) for _, block in blocks}) == 1


def _last_stage_but_one(model: nn.Module) -> str | None:
    """Find the last but one of layer1..4, stage1..4, block1..4 or denseblock1..4, or of a container's stages."""
    for container in ("", "features", "trunk_output"):
        try:
            children = [name for name, _ in model.get_submodule(container).named_children()]
        except AttributeError:
            continue
        numbered = [name for name in children if re.fullmatch(r"(layer|stage|block|denseblock|s)_?\d+", name)]
        numbered = [name for name in numbered if name.rstrip("0123456789") == numbered[-1].rstrip("0123456789")]
        if len(numbered) >= 2:
            return f"{container}.{numbered[-2]}".lstrip(".")
    for container in ("stages", "layers", "blocks", "levels", "encoder.stages", "encoder.layers", "encoder.layer"):
        try:
            module = model.get_submodule(container)
        except AttributeError:
            continue
        # a longer container holds blocks, not stages
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and 2 <= len(module) <= 6:
            return f"{container}.{len(module) - 2}"
    return None


def _before_last_pool_but_one(model: nn.Module) -> str | None:
    """Find the layer before the second-to-last max-pool of VGG, which ends each stage with a max-pool."""
    features = getattr(model, "features", None)
    pools = (
        [i for i, m in enumerate(features) if isinstance(m, nn.MaxPool2d)]
        if isinstance(features, nn.Sequential)
        else []
    )
    return f"features.{pools[-2] - 1}" if len(pools) >= 2 and pools[-2] else None
