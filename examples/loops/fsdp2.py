"""Train with USKD under FSDP2, which splits student and weak head over processes.

python examples/loops/fsdp2.py [OUTPUT]
torchrun --nproc-per-node 2 examples/loops/fsdp2.py [OUTPUT]
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from kdlite import WithWeakHead, uskd_loss

digits = load_digits()
images, labels = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16, torch.tensor(digits.target)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:  # one process, without torchrun
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fsdp2")

    torch.manual_seed(0)
    student = WithWeakHead(Network(), example_input=images[:2])  # first add the head
    for block in student.model.blocks:  # then shard each block, then the whole student
        fully_shard(block, mesh=dist.init_device_mesh("cpu", (world,)))
    fully_shard(student, mesh=dist.init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)

    for batch in torch.randperm(1400).split(64)[:-1] * 2:
        x, y = (data[batch].chunk(world)[rank] for data in (images, labels))
        logits, weak_logits = student(x)
        loss = F.cross_entropy(logits, y) + uskd_loss(logits, weak_logits, y, group=dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    accuracy = (student.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()
    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        print(f"USKD {accuracy:.1%}")
        output.mkdir(parents=True, exist_ok=True)
        plain = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
        torch.save(plain, output / "student.pt")  # the plain network's load_state_dict reads it
    dist.destroy_process_group()
