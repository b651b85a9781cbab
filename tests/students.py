"""Write students of any architecture, with random weights whose predictions differ between images."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from deploy import runtimes
from deploy.config import Metadata
from deploy.preprocess import prepare
from deploy.reference import keep_reference
from deploy.student import build_model, find_architecture, load_student
from kdlite.training.outputs import save_student


def write_student(folder, name, img_size, label_names=10, arguments=()):
    """Write a student/ folder of an architecture, with calibrated batch norms and logits that differ."""
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
        classifier.weight.normal_(0, 0.1)  # because with logits near 1e-9 every comparison passes
    config = Metadata(
        label_names=label_names,
        input_size=input_size,
        mean=[0.485, 0.456, 0.406][: input_size[0]],
        std=[0.229, 0.224, 0.225][: input_size[0]],
        interpolation="bilinear",
        crop=1.0,
        num_classes=len(label_names),
        **architecture,
    )
    save_student(folder, model, config)
    return folder


def write_run(folder, name, img_size, label_names=10, arguments=(), images=40):
    """Write a run directory with a student and its reference.npz.

    The images are crops of photographs, labelled with the student's predictions. The function skips images whose two
    largest logits are nearly equal, because fp16 and INT8 may change their class.
    """
    student = write_student(folder / "student", name, img_size, label_names, arguments)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    corners = np.random.default_rng(0).integers(0, 340, (6 * images, 2)).tolist()
    pieces = [photos[i % 2].crop((x, y, x + 90, y + 80)) for i, (x, y) in enumerate(corners)]
    model, metadata = load_student(student, model_files(student))
    prepared = np.stack([prepare(piece, metadata) for piece in pieces])
    *_, classifier = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    with torch.no_grad():  # centre the logits, because otherwise most images get the same class
        classifier.bias -= torch.from_numpy(load(student, device="cpu").run(prepared).mean(0))
    save_student(student, model, metadata)
    logits = load(student, device="cpu").run(prepared)
    second, first = np.sort(logits)[:, -2:].T
    clear = np.sort(np.argsort(second - first)[: 2 * images])
    samples = [(pieces[i], int(logits[i].argmax())) for i in clear]
    keep_reference(folder, samples[:images], samples[images:], images, model_files(student))
    return folder


OWN = {
    "own_models.py": Path(__file__).with_name("own_models.py"),
    "cifar_models.py": Path(__file__).resolve().parents[1] / "examples/paper/cifar_models.py",
}


def model_files(path):
    """Return the --model-file of a run directory or a student/ folder, if its model comes from OWN."""
    folder = path / "student" if (path / "student").is_dir() else path
    try:
        name = json.loads((folder / "config.json").read_text())["architecture"]
    except (OSError, ValueError, KeyError, TypeError):  # a test has damaged the file
        return []
    file, _, function = name.partition(":")
    return [f"{OWN[file]}:{function}"] if file in OWN else []


def load(path, **options):
    """Call deploy.runtimes.load with the model file of the student; the options are those of RunOn."""
    return runtimes.load(path, runtimes.RunOn(**options, model_files=tuple(model_files(path))))
