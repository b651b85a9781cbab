"""Classify images with a run's student: python examples/predict.py runs/001-.../student photo.jpg ..."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train import UserError, eval_transform, load_student, open_image

parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
parser.add_argument("student", type=Path, help="a run's student/ folder")
parser.add_argument("images", nargs="+", help="image files")
args = parser.parse_args()

try:
    model, config = load_student(args.student)
except UserError as error:
    parser.error(str(error))
transform = eval_transform(config)
mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
model.eval()
for file in args.images:
    try:
        image = transform(open_image(file))
    except OSError as error:
        parser.error(f"cannot read {file}: {error}")
    with torch.no_grad():
        probs = model((image.float() / 255 - mean).div(std).unsqueeze(0)).softmax(1)[0]
    top = probs.topk(min(5, len(probs)))
    answers = (f"{config['label_names'][i]} {p:.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist()))
    print(f"{file}: {', '.join(answers)}")
