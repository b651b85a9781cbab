"""Train with NKD and USKD together in a LightningModule, on one device or two, with the checkpoint callback.

python examples/loops/lightning_module.py [OUTPUT [DEVICES]]
"""

import sys

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdlite import Teacher, WithWeakHead, nkd_loss, uskd_loss

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
train, val = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def cnn(width: int) -> nn.Module:
    model = nn.Sequential()
    model.layer1 = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GELU())
    model.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GELU())
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.fc = nn.Linear(8 * width, 10)
    return model


class Classifier(L.LightningModule):
    """Train a classifier with the cross-entropy; with ``distil`` add NKD and USKD.

    The checkpoint does not contain the teacher; load_from_checkpoint(path) restores the student.
    """

    def __init__(self, width: int, distil: bool = False, teacher: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters("width", "distil")
        self.student = WithWeakHead(cnn(width), example_input=images[:2]) if distil else cnn(width)
        self.teacher = (Teacher(teacher),) if teacher is not None else ()  # a tuple, so that it is not a submodule

    def training_step(self, batch, _):
        x, y = batch
        if not self.hparams.distil:
            return F.cross_entropy(self.student(x), y)
        logits, weak_logits = self.student(x)
        teacher_logits = self.teacher[0].to(self.device)(x)
        losses = {
            "ce": F.cross_entropy(logits, y),
            "nkd": nkd_loss(logits, teacher_logits, y),
            "uskd": uskd_loss(logits, weak_logits, y, group=dist.group.WORLD),
        }
        self.log_dict(losses)
        return sum(losses.values())

    def validation_step(self, batch, _):
        x, y = batch
        self.log("accuracy", (self.student(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=5e-3)


def fit(model: Classifier, output: str, devices: int, batch_size: int = 64) -> ModelCheckpoint:
    name = str(model.hparams.width)  # name of the file, which a second run replaces
    best = ModelCheckpoint(output, name, "accuracy", mode="max", enable_version_counter=False)
    quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False)
    place = dict(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
    trainer = L.Trainer(max_epochs=4, callbacks=[best], **place, **quiet)
    trainer.fit(model, DataLoader(train, batch_size // devices, shuffle=True), DataLoader(val, batch_size=128))
    trainer.print(f"width {model.hparams.width}: {best.best_model_score:.1%}")
    return best


if __name__ == "__main__":
    output = sys.argv[1] if len(sys.argv) > 1 else "runs/lightning"
    devices = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    L.seed_everything(0)
    fit(teacher := Classifier(32), output, devices)
    fit(Classifier(8, distil=True, teacher=teacher.student), output, devices)
