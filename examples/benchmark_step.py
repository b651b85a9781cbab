"""Measure the cost of distillation in a step of train.py, compared with a minimal loop and the teacher's forward pass.

    python examples/benchmark_step.py                    # 224 px, synthetic: about 5 minutes on a CPU
    python examples/benchmark_step.py --models resnet18 --img-size 64 --batch-size 128 --data photos/

In each round, for each model, these run one step in turn:

- a minimal loop in this file, with cross-entropy, without kdlite and train.py;
- train.py's step for cross-entropy, for USKD, for NKD with the teacher, and for NKD from the teacher's stored top-10;
- the teacher's forward pass.

A ratio is the median over the rounds. "minimal", "USKD" and "stored" are divided by train.py's cross-entropy. "NKD" is
divided by the sum of cross-entropy and the teacher's forward pass. Memory is the peak of a step above the memory before
it. Weights and images are random, which does not change the time. At the end the script prints how many images per
second the data pipeline prepares (``--data`` is the flag of train.py).
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import FakeData

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from deploy.cli import run_command
from deploy.flags import settle_flags
from deploy.student import build_model, find_architecture
from examples.benchmark_losses import machine, peak_of_call, wait_for
from kdlite import Teacher, top_k_logprobs
from kdlite.training.checkpoint import LossLog
from kdlite.training.data import Data, open_run
from kdlite.training.distributed import pick_amp, pick_device
from kdlite.training.loading import Batch, ToDevice

TEACHERS = {"resnet18": "resnet34", "mobilenet_v2": "resnet50", "deit_tiny_patch16_224": "deit3_small_patch16_224"}
CLASSES = 1000


def settle(model: str, args: argparse.Namespace, *method: str) -> argparse.Namespace:
    """Return train.py's flags for a run with this model."""
    recipe = "imagenet-vit" if "deit" in model else "imagenet-cnn"
    flags = ["--model", model, "--recipe", recipe, "--img-size", str(args.img_size), "--amp", args.amp]
    flags += ["--batch-size", str(args.batch_size), "--device", args.device, "--workers", "0"]
    typed = train.parse_flags([*flags, *(["--compile"] if args.compile else []), *method])
    return settle_flags(train.FLAGS, typed)[0]


def imaginary_data(args: argparse.Namespace) -> Data:
    """Return a data set from which a run can be built; no step reads its images."""
    images = FakeData(2 * args.batch_size, (3, args.img_size, args.img_size), CLASSES)
    return Data(images, images, [str(i) for i in range(CLASSES)], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def compiled(net: nn.Module, flags: argparse.Namespace) -> nn.Module:
    return torch.compile(net) if flags.compile else net


def make_teacher(name: str, flags: argparse.Namespace) -> Teacher:
    """Return a teacher with random weights and the student's preprocessing."""
    teacher = Teacher(build_model(find_architecture(name), CLASSES, [3, *flags.img_size])).to(
        flags.device, memory_format=torch.channels_last
    )
    teacher.model = compiled(teacher.model, flags)
    return teacher


class TrainStep:
    """Run train.py's step with its optimizer. A batch with stored answers needs no teacher."""

    def __init__(self, batch: Batch, teacher: Teacher | None, flags: argparse.Namespace, data: Data) -> None:
        device = batch.images.device
        _, net, _ = train.build_student(flags, data)
        self.net = net.to(device).to(memory_format=torch.channels_last)
        self.parallel = compiled(self.net, flags).train()
        self.optimizer = train.build_optimizer(self.net, flags)
        self.method, self.amp = train.build_method(flags, data, device), pick_amp(flags.amp, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == torch.float16)
        self.batch, self.teacher, self.clip_grad = batch, teacher, flags.clip_grad
        self.log = LossLog(skips_steps=False)

    def __call__(self) -> None:
        losses = train.train_step(self.parallel, self.teacher, self.batch, self.method, self.amp, self.scaler)
        self.log.add(0, losses)
        train.optimizer_step(self.net, self.optimizer, self.scaler, self.clip_grad)
        self.log.waiting.clear()


class MinimalStep:
    """Run a step without kdlite and train.py, with the same model, optimizer and precision."""

    def __init__(self, model: str, batch: Batch, flags: argparse.Namespace) -> None:
        net = build_model(find_architecture(model), CLASSES, [3, *flags.img_size])
        self.net = compiled(net.to(batch.images.device, memory_format=torch.channels_last).train(), flags)
        self.images, self.target, self.smoothing = batch.images, batch.labels, flags.label_smoothing
        self.amp = pick_amp(flags.amp, self.images.device)
        choice, options = (torch.optim.AdamW, {}) if flags.opt == "adamw" else (torch.optim.SGD, {"momentum": 0.9})
        self.optimizer = choice(net.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, **options)
        self.scaler = torch.amp.GradScaler(self.images.device.type, enabled=self.amp == torch.float16)

    def __call__(self) -> None:
        with torch.autocast(self.images.device.type, self.amp, enabled=self.amp is not None):
            loss = F.cross_entropy(self.net(self.images), self.target, label_smoothing=self.smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


class TeacherForward:
    """Run a teacher's forward pass alone."""

    def __init__(self, teacher: nn.Module, images: Tensor, amp: torch.dtype | None) -> None:
        self.teacher, self.images, self.amp = teacher, images, amp

    def __call__(self) -> None:
        with torch.autocast(self.images.device.type, self.amp, enabled=self.amp is not None):
            self.teacher(self.images)


def bench_model(model: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    labels = torch.randint(CLASSES, (args.batch_size,), device=device)
    batch = Batch(images.to(memory_format=torch.channels_last), labels, [])
    answers = top_k_logprobs(torch.randn(args.batch_size, CLASSES, device=device), labels, k=10)
    plain, name, data = settle(model, args), TEACHERS[model], imaginary_data(args)
    with_nkd, with_uskd = (
        settle(model, args, "--kd", "nkd", "--teacher", name),
        settle(model, args, "--self-kd", "uskd"),
    )
    teacher = make_teacher(name, plain)
    steps: dict[str, Callable[[], None]] = {
        "minimal loop, cross-entropy": MinimalStep(model, batch, plain),
        "train.py, cross-entropy": TrainStep(batch, None, plain, data),
        "train.py, USKD": TrainStep(batch, None, with_uskd, data),
        f"train.py, NKD with {name}": TrainStep(batch, teacher, with_nkd, data),
        "train.py, NKD from stored labels": TrainStep(batch._replace(teacher=answers), None, with_nkd, data),
        f"{name} forward": TeacherForward(teacher, batch.images, pick_amp(plain.amp, device)),
    }
    for step in steps.values():
        step(), step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name in random.sample(list(steps), len(steps)):
            wait_for(args.device)
            started = time.perf_counter()
            steps[name]()
            wait_for(args.device)
            times[name].append(time.perf_counter() - started)
    peaks = {name: peak_of_call(step, args.device) for name, step in steps.items()}

    print(f"\n{model}, {args.img_size} px, batch {args.batch_size}, {args.rounds} rounds")
    print(f"  {'':44}{'ms':>9}{'images/s':>10}{'peak MiB':>10}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:44}{1e3 * median:9.1f}{args.batch_size / median:10.1f}{peaks[name] / 2**20:10.1f}")
    minimal, plain_ce, uskd, with_nkd, from_stored, teachers = times.values()
    minimal_peak, ce_peak, uskd_peak, _, stored_peak, _ = peaks.values()
    ratios = {
        "minimal": [a / b for a, b in zip(minimal, plain_ce)],
        "USKD": [a / b for a, b in zip(uskd, plain_ce)],
        "stored": [a / b for a, b in zip(from_stored, plain_ce)],
        "NKD": [a / (b + c) for a, b, c in zip(with_nkd, plain_ce, teachers)],
    }
    for name, values in ratios.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"  ratio {name:8} {statistics.median(values):.3f} (quartiles {low:.3f} to {high:.3f})")
    print(
        f"  memory   USKD    {uskd_peak / ce_peak:.3f} of cross-entropy; stored {stored_peak / ce_peak:.3f}; "
        f"minimal {minimal_peak / ce_peak:.3f}",
        flush=True,
    )


def bench_data(args: argparse.Namespace) -> None:
    """Print how many images per second the data pipeline prepares, from files, and from the cache if they fit there."""
    argv = ["--data", args.data, "--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
    argv += ["--device", args.device, *([] if args.workers is None else ["--workers", str(args.workers)])]
    print(f"\ndata pipeline: {args.data} at {args.img_size} px")
    for cache in ("none", "device"):
        crop = ["--crop", "pad"] if cache == "device" else []
        flags, _, data = open_run(train.FLAGS, train.parse_flags([*argv, "--cache", cache, *crop]))
        if cache == "device" and len(data.train) * 3 * args.img_size**2 > 2**31:
            continue
        device, (_, _, config) = pick_device(flags.device), train.build_student(flags, data)
        began = time.perf_counter()
        loader, _ = train.build_loaders(flags, data, config, None, device)
        decoding = time.perf_counter() - began
        to_device = ToDevice(config.mean, config.std, device)
        seen, started = 0, 0.0
        while seen == 0 or time.perf_counter() < started + args.seconds:
            for batch in loader:
                to_device(batch)
                if not started:  # the clock starts after the workers
                    started = time.perf_counter()
                    continue
                seen += len(batch.labels)
                if time.perf_counter() > started + args.seconds:
                    break
        wait_for(args.device)
        rate = seen / (time.perf_counter() - started)
        how = f"{loader.num_workers} workers" if cache == "none" else f"--cache device, after {decoding:.1f} s"
        print(f"  {how:32}{rate:9.0f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, help="default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind, at least 2 (default: 15)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="as train.py's")
    parser.add_argument("--compile", action="store_true", help="torch.compile students and teacher")
    parser.add_argument("--data", default="digits", help="for the data pipeline, as train.py's")
    parser.add_argument("--workers", type=int, help="for the data pipeline, as train.py's")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the data pipeline (default: 10)")
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 256 if args.device == "cuda" else 16
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    pick_device(args.device)  # raises an error for a missing device
    print(machine(args.device))
    for model in args.models:
        bench_model(model, args)
    bench_data(args)


if __name__ == "__main__":
    sys.exit(run_command("benchmark_step.py", main))
