"""Define NKD and USKD as tasks of timm. In a copy of timm's train.py use one of these lines:

    task = NKDTask(student_model=model, teacher_model=args.kd_model_name, criterion=train_loss_fn, device=device)
    task = USKDTask(WithWeakHead(model), train_loss_fn, device=device)  # if images do not have 224 px: example_input=

python examples/loops/timm_task.py [OUTPUT]
"""

import sys

import timm
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, LogitDistillationTask
from timm.utils import CheckpointSaver, get_outdir, unwrap_model
from torch import nn

from kdlite import WithWeakHead, nkd_loss, uskd_loss


class NKDTask(LogitDistillationTask):
    def forward(self, input, target):
        logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        task_loss, kd_loss = self.criterion(logits, target), nkd_loss(logits, teacher_logits, target)
        return {"loss": task_loss + kd_loss, "output": logits, "task_loss": task_loss, "kd_loss": kd_loss}


class USKDTask(ClassificationTask):  # trains WithWeakHead(...); evaluates and saves the plain student
    def forward(self, input, target):
        logits, weak_logits = self.trainable_module(input)
        task_loss = self.criterion(logits, target)
        kd_loss = uskd_loss(logits, weak_logits, target, group=dist.group.WORLD)
        return {"loss": task_loss + kd_loss, "output": logits, "task_loss": task_loss, "kd_loss": kd_loss}

    def get_eval_model(self, module=None, ema=False):
        student = unwrap_model(model := super().get_eval_model(module, ema))
        return student.model if isinstance(student, WithWeakHead) else model

    def get_task_state(self, module=None, ema=False):  # stores the head, for a resume
        return {"head": unwrap_model(module or self.get_trainable_module(ema)).head.state_dict()}

    def load_task_state(self, state, strict=True, module=None, ema=False):
        unwrap_model(module or self.get_trainable_module(ema)).head.load_state_dict(state["head"], strict)


images, labels = (torch.tensor(x) for x in (load_digits().images / 8 - 1, load_digits().target))
images = images.float().unsqueeze(1)  # (1797, 1, 8, 8)


def vit(width):
    return timm.create_model("test_vit", img_size=8, patch_size=4, in_chans=1, embed_dim=width, num_classes=10)


def fit(task, output, epochs=2):  # in the order of timm's train.py
    model = task.get_trainable_module()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=get_outdir(output, type(task).__name__), task=task)
    for epoch in range(epochs):
        task.train()
        for batch in torch.randperm(1400).split(64):
            task(images[batch], labels[batch])["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()
        student = task.get_eval_model(ema=True).eval()
        accuracy = (student(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
        saver.save_checkpoint(epoch, accuracy)  # last.pth.tar has the plain student, and the head for a resume
    print(f"{type(task).__name__:<18} {accuracy:.1%}")


if __name__ == "__main__":
    output = sys.argv[1] if len(sys.argv) > 1 else "runs/timm"
    torch.manual_seed(0)
    fit(ClassificationTask(teacher := vit(96), nn.CrossEntropyLoss()), output)
    fit(NKDTask(vit(48), teacher, nn.CrossEntropyLoss()), output)
    fit(USKDTask(WithWeakHead(vit(48), example_input=images[:2]), nn.CrossEntropyLoss()), output)
