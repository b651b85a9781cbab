"""Train with USKD under Accelerate, on one process or several, with gradient accumulation.

python examples/loops/accelerate_loop.py [OUTPUT]
torchrun --nproc-per-node 2 examples/loops/accelerate_loop.py [OUTPUT]
"""

import sys

import torch
import torch.distributed as dist
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from kdlite import WithWeakHead, uskd_loss

output = sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate"
digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
train, val = TensorDataset(images[:1400], labels[:1400]), TensorDataset(images[1400:], labels[1400:])


def cnn() -> nn.Module:
    model = nn.Sequential()
    model.layer1 = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.GELU())
    model.layer2 = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU())
    model.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.fc = nn.Linear(128, 10)
    return model


if __name__ == "__main__":
    set_seed(0)
    # one seed gives all processes the same order, and they divide each batch
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=loading)
    student = WithWeakHead(cnn(), example_input=images[:2])  # before prepare, which makes the model parallel
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    loader, val_loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(val, batch_size=128)
    student, optimizer, loader, val_loader = accelerator.prepare(student, optimizer, loader, val_loader)

    for _ in range(6):
        student.train()
        for x, y in loader:
            with accelerator.accumulate(student):
                logits, weak_logits = student(x)
                loss = F.cross_entropy(logits, y) + uskd_loss(logits, weak_logits, y, group=dist.group.WORLD)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.save_state(f"{output}/state")  # student and head; load_state restores them

    student.eval()  # in eval mode it returns only the logits
    with torch.no_grad():
        right = [accelerator.gather_for_metrics(student(x).argmax(1) == y) for x, y in val_loader]
    accelerator.print(f"USKD {torch.cat(right).float().mean().item():.1%}")
    accelerator.save_model(accelerator.unwrap_model(student).close(), output)  # the plain student
