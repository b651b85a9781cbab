"""The runtimes that need torch: a student/ folder, TorchScript and torch.export files.

deploy.runtimes.load imports this module when it is asked for one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deploy.cli import UserError, first_line
from deploy.config import read_json
from deploy.runtimes import UINT8, Loaded, as_input, pick_device, source_of
from deploy.student import load_student

EPS = 1e-5  # of the batch norm that normalises; ONNX and cuDNN want one


class ImageClassifier(nn.Module):
    """A student with its normalisation in front: images -> float32 logits, whatever precision lies between."""

    mean: Tensor
    variance: Tensor

    def __init__(
        self,
        model: nn.Module,
        mean: Any,
        std: Any,
        layout: str = UINT8,
        half: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = (model.half() if half else model.float()).eval().requires_grad_(False)
        self.model.to(memory_format=self.memory_format)
        self.layout = layout
        self.dtype = torch.float16 if half else torch.float32
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("variance", (255 * torch.tensor(std)) ** 2 - EPS)

    def forward(self, images: Tensor) -> Tensor:
        if self.layout == UINT8:
            # The cast comes first: TensorRT's parser refuses to permute uint8. And a batch norm, not a product and a
            # sum: those ONNX Runtime moves in front of the permute, where they cost a quarter of an INT8 MobileNetV2.
            images = images.float().permute(0, 3, 1, 2)
            # In contiguous format: pooling exports an as_strided, in ONNX a Gather, for a permuted tensor.
            images = images.contiguous(memory_format=self.memory_format)
            images = F.batch_norm(images, self.mean, self.variance, eps=EPS)
        return self.model(images.to(self.dtype)).float()


def load(
    path: Path, device: str, threads: int, allow_fallback: bool, compile: bool, model_files: Sequence[str]
) -> Loaded:
    """A student/ folder, .ts or .pt2; see deploy.runtimes.load."""
    device = pick_device(device, torch.cuda.is_available(), allow_fallback)
    if threads:
        torch.set_num_threads(threads)
    if path.is_dir():
        return load_torch(path, device, compile, model_files)
    return {".ts": load_torchscript, ".pt2": load_exported}[path.suffix](path, device)


def load_torch(path: Path, device: str, compile: bool, model_files: Sequence[str]) -> Loaded:
    model, config = load_student(path, model_files)
    metadata = config | {"precision": "fp32", "input": UINT8, "source": source_of(path)}
    classifier: Any = ImageClassifier(model, config["mean"], config["std"], channels_last=True).to(device)
    if compile:
        classifier = torch.compile(classifier)
    return Loaded("torch.compile" if compile else "torch", f"torch {device}", metadata, caller(classifier, device))


def load_torchscript(path: Path, device: str) -> Loaded:
    extra = {"metadata.json": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, and works
            classifier = torch.jit.load(str(path), map_location=device, _extra_files=extra)
    except Exception as error:  # a dozen kinds
        raise UserError(f"{path} cannot be read as TorchScript: {first_line(error)}") from error
    metadata = read_json(extra["metadata.json"], path)
    return Loaded("torchscript", f"torch {device}", metadata, caller(classifier, device, metadata))


def load_exported(path: Path, device: str) -> Loaded:
    extra = {"metadata.json": ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        if device != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        classifier = program.module()
    except Exception as error:  # a dozen kinds
        raise UserError(f"{path} cannot be read as a torch.export program: {first_line(error)}") from error
    metadata = read_json(extra["metadata.json"], path)
    return Loaded("torch.export", f"torch {device}", metadata, caller(classifier, device, metadata))


def caller(classifier: Any, device: str, metadata: dict[str, Any] | None = None) -> Callable[..., np.ndarray]:
    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        batch = np.require(
            as_input(images, metadata) if metadata else images, requirements="W"
        )  # torch wants to own it
        return classifier(torch.from_numpy(batch).to(device)).cpu().numpy()

    return run
