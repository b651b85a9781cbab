"""Students for tests: any architecture with random weights that tell images apart."""

import json
from pathlib import Path

import torch

from deploy import runtimes
from deploy.config import Metadata
from deploy.student import build_model, find_architecture
from kdlite.training.outputs import save_student


def write_student(folder, name, img_size, label_names=10, arguments=()):
    """A student/ folder of a library's architecture, its batch norms calibrated and its logits well apart."""
    torch.manual_seed(0)
    if isinstance(label_names, int):
        label_names = [f"class {i}" for i in range(label_names)]
    input_size = [3, img_size, img_size] if isinstance(img_size, int) else list(img_size)
    architecture = find_architecture(str(name), arguments, input_size=input_size)
    model = build_model(architecture, len(label_names), input_size, [str(name)])
    with torch.no_grad():
        for _ in range(10):
            model(torch.randn(16, *input_size))
        *_, classifier = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
        classifier.weight.normal_(0, 0.1)  # else the logits of some are 1e-9 and all agree for nothing
    config = {
        **architecture,
        "num_classes": len(label_names),
        "label_names": label_names,
        "mean": [0.485, 0.456, 0.406][: input_size[0]],
        "std": [0.229, 0.224, 0.225][: input_size[0]],
        "input_size": input_size,
        "interpolation": "bilinear",
        "crop": 1.0,
    }
    save_student(folder, model, Metadata.from_json(config, str(folder)))
    return folder


OWN = {
    "own_models.py": Path(__file__).with_name("own_models.py"),
    "cifar_models.py": Path(__file__).resolve().parents[1] / "examples/paper/cifar_models.py",
}


def model_files(path):
    """What a user says as --model-file of a run directory or a student/ folder, if its model is one of ours."""
    folder = path / "student" if (path / "student").is_dir() else path
    try:
        name = json.loads((folder / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):  # a test has spoilt it
        return []
    file, _, function = name.partition(":")
    return [f"{OWN[file]}:{function}"] if file in OWN else []


def load(path, **options):
    """deploy.runtimes.load with the model file that the student needs; options: of RunOn."""
    return runtimes.load(path, runtimes.RunOn(**options, model_files=tuple(model_files(path))))
