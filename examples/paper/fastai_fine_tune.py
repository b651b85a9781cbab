"""Fine-tune with fastai's defaults, and print the top-1 on the test images. fine_tuning.py runs this file.

python examples/paper/fastai_fine_tune.py FOLDER/data WEIGHTS SIZE EPOCHS SEED
"""

import functools
import sys
from pathlib import Path

import timm
import torch
from fastai.vision.all import (
    ImageDataLoaders,
    Normalize,
    Resize,
    accuracy,
    aug_transforms,
    get_image_files,
    set_seed,
    vision_learner,
)
from safetensors.torch import load_file

MODEL = "tf_efficientnet_lite0"


def create_with_weights(create, weights: str, name: str, pretrained: bool = False, **options):
    """Create a model of timm with the weights in a file instead of a download."""
    model = create(name, pretrained=False, **options)
    values = {key: value for key, value in load_file(weights).items() if key in model.state_dict()}
    model.load_state_dict(values, strict=False)
    return model


def main(folder: Path, weights: str, size: int, epochs: int, seed: int) -> None:
    set_seed(seed, reproducible=True)
    torch.set_num_threads(1)
    timm.create_model = functools.partial(create_with_weights, timm.create_model, weights)
    transforms = {"item_tfms": Resize(size), "batch_tfms": aug_transforms(size=size)}
    data = ImageDataLoaders.from_folder(folder, valid="val", num_workers=0, **transforms)
    data.add_tfms([Normalize.from_stats([0.5] * 3, [0.5] * 3, cuda=False)], "after_batch")
    learner = vision_learner(data, MODEL, metrics=accuracy, normalize=False)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(epochs)
        files = get_image_files(folder.parent / "test")
        answers, _ = learner.get_preds(dl=data.test_dl(files))
    right = [data.vocab[int(i)] == file.parent.name for i, file in zip(answers.argmax(1), files)]
    print("top1", 100 * sum(right) / len(right))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6]))
