"""Train an Ultralytics classifier with NKD, then another with USKD. Both use Ultralytics' trainer, on one device.

python examples/loops/ultralytics_trainer.py [OUTPUT]
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from ultralytics import YOLO
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.utils.loss import v8ClassificationLoss

from kdlite import FeatureTap, Teacher, nkd_loss, uskd_loss


class KDLoss(v8ClassificationLoss):
    def __init__(self, head=None):
        self.head = head

    def __call__(self, preds, batch):
        loss, items = super().__call__(preds, batch)
        if "teacher_logits" in batch:
            kd_loss = nkd_loss(preds, batch["teacher_logits"], batch["cls"])
        elif "tap" in batch:
            weak_logits = self.head(batch["tap"].pop().mean((2, 3)))
            kd_loss = uskd_loss(preds, weak_logits, batch["cls"], group=torch.distributed.group.WORLD)
        else:  # validation
            return loss, items
        return loss + kd_loss, {**items, "kd_loss": kd_loss.detach()}


class NKDTrainer(ClassificationTrainer):
    teacher: Teacher  # set it before you make the trainer

    def get_model(self, *args, **kwargs):
        model = super().get_model(*args, **kwargs)
        model.criterion = KDLoss()
        self.teacher.to(self.device)
        return model

    def preprocess_batch(self, batch):
        batch = super().preprocess_batch(batch)
        return {**batch, "teacher_logits": self.teacher(batch["img"])}


class USKDTrainer(ClassificationTrainer):
    layer, tap = 6, None  # the second-to-last stage in yolov8-cls, yolo11-cls and yolo26-cls

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = super().get_model(cfg, weights, verbose)
        model.weak_head = nn.Linear(model.model[self.layer + 1].conv.in_channels, self.data["nc"])
        if self.resume:
            model.weak_head.load_state_dict(weights.weak_head.state_dict())
        model.criterion = KDLoss(model.weak_head)
        return model

    def preprocess_batch(self, batch):
        if self.tap is None:  # here the EMA copy exists, without a hook: a saved model with a hook cannot be loaded
            self.tap = FeatureTap(self.model, f"model.{self.layer}")
        return {**super().preprocess_batch(batch), "tap": self.tap}

    def final_eval(self):
        for file in filter(Path.exists, (self.last, self.best)):
            checkpoint = torch.load(file, weights_only=False)  # written by this run
            del checkpoint["ema"].weak_head  # the plain student remains
            torch.save(checkpoint, file)
        super().final_eval()


def write_digits(folder):
    for i, (image, label) in enumerate(zip(load_digits().images[:600], load_digits().target)):
        file = folder / ("train" if i < 400 else "val") / str(label) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * image).astype("uint8")).resize((32, 32)).save(file)


if __name__ == "__main__":
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/ultralytics").resolve()
    write_digits(output / "digits")
    options = dict(data=output / "digits", project=output, device="cpu", exist_ok=True, plots=False, amp=False)
    options |= dict(epochs=3, imgsz=32, batch=32, nbs=32, optimizer="AdamW", lr0=3e-3, fliplr=0.0)
    (teacher := YOLO("yolov8s-cls.yaml")).train(name="teacher", **options)
    NKDTrainer.teacher = Teacher(teacher.model.float(), logits=1)
    for trainer in (ClassificationTrainer, NKDTrainer, USKDTrainer):
        metrics = YOLO("yolov8n-cls.yaml").train(trainer=trainer, name=trainer.__name__, **options)
        print(f"{trainer.__name__:<22} {metrics.top1:.1%}")
