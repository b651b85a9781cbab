"""Run a student in torch: from a student/ folder, a TorchScript file or a torch.export file.

deploy.runtimes.load imports this module when it loads one of them.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export.passes import move_to_device_pass
from torch.nn import functional as F

from deploy.cli import UserError, first_line
from deploy.config import ARTEFACT, UINT8, Metadata, read_json
from deploy.runtimes import RunOn, Runtime, as_input, pick_device, source_of, usable_cpus
from deploy.student import load_student

EPS = 1e-5  # epsilon of the batch norm that normalises; ONNX and cuDNN require an epsilon


class ImageClassifier(nn.Module):
    """Normalise images, run a student, and return float32 logits, also from a float16 student."""

    mean: Tensor
    variance: Tensor

    def __init__(self, model: nn.Module, metadata: Metadata, half: bool = False, channels_last: bool = False) -> None:
        super().__init__()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.model = (model.half() if half else model.float()).eval().requires_grad_(False)
        self.model.to(memory_format=self.memory_format)
        self.layout = metadata.input
        self.dtype = torch.float16 if half else torch.float32
        self.register_buffer("mean", 255 * torch.tensor(metadata.mean))
        self.register_buffer("variance", (255 * torch.tensor(metadata.std)) ** 2 - EPS)

    def forward(self, images: Tensor) -> Tensor:
        if self.layout == UINT8:
            # Cast first, because TensorRT's parser cannot permute uint8. Normalise by a batch norm: ONNX Runtime would
            # move a product and a sum before the permute, where they take a quarter of an INT8 MobileNetV2's time.
            images = images.float().permute(0, 3, 1, 2)
            # Make it contiguous, because the pooling of a permuted tensor is exported to ONNX as a Gather.
            images = images.contiguous(memory_format=self.memory_format)
            images = F.batch_norm(images, self.mean, self.variance, eps=EPS)
        return self.model(images.to(self.dtype)).float()


def load(path: Path, on: RunOn) -> Runtime:
    """Load a student/ folder, a .ts or a .pt2 file; see deploy.runtimes.load."""
    device = pick_device(on.device, torch.cuda.is_available(), on.allow_fallback)
    torch.set_num_threads(on.threads or min(torch.get_num_threads(), usable_cpus()))
    if path.is_dir():
        return load_torch(path, device, on)
    extra, script = {"metadata.json": ""}, path.suffix == ".ts"
    try:
        if script:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch.jit is deprecated, but works
                module: Any = torch.jit.load(str(path), map_location=device, _extra_files=extra)
        else:
            program = torch.export.load(path, extra_files=extra)
            module = (program if device == "cpu" else move_to_device_pass(program, device)).module()
    except Exception as error:  # torch raises a dozen exception classes here
        kind = "TorchScript" if script else "a torch.export program"
        raise UserError(f"{path} cannot be read as {kind}: {first_line(error)}") from error
    metadata = Metadata.from_json(read_json(extra["metadata.json"], path), f"the metadata of {path}", ARTEFACT)
    name = "torchscript" if script else "torch.export"
    return Runtime(name, f"torch {device}", metadata, functools.partial(run_torch, module, device, metadata))


def load_torch(path: Path, device: str, on: RunOn) -> Runtime:
    model, config = load_student(path, on.model_files)
    metadata = dataclasses.replace(config, precision="fp32", input=UINT8, source=source_of(path))
    module: Any = ImageClassifier(model, metadata, channels_last=True).to(device)
    name, module = ("torch.compile", torch.compile(module)) if on.compile else ("torch", module)
    return Runtime(name, f"torch {device}", metadata, functools.partial(run_torch, module, device, metadata))


@torch.inference_mode()
def run_torch(module: Any, device: str, metadata: Metadata, images: np.ndarray) -> np.ndarray:
    batch = np.require(as_input(images, metadata), requirements="W")  # torch needs a writable array
    logits: np.ndarray = module(torch.from_numpy(batch).to(device)).cpu().numpy()
    return logits
