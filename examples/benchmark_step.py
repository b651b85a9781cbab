"""What distillation adds to a training step: train.py's own step beside a minimal loop, and beside its own floor.

    python examples/benchmark_step.py                    # 224 px, synthetic: about 5 minutes on a CPU
    python examples/benchmark_step.py --models resnet18 --img-size 64 --batch-size 128 --data photos/

Of each model these take a step in turn: a minimal loop written here (cross-entropy, no kdlite, no train.py), train.py's
step for cross-entropy, for USKD, for NKD with the teacher and from its stored top-10, and the teacher's forward pass
alone. A ratio is the median over the rounds of the ratio within a round: "minimal" is the minimal loop's time over
train.py's cross-entropy, "USKD" and "stored" their times over cross-entropy, "NKD" its time over the floor, which is
cross-entropy and then the teacher's forward pass. Memory is the peak of a step above what lies there before it. Weights
and images are random: neither changes the time. Then, by itself, how many images a second the data pipeline delivers:
``--data`` as train.py takes it.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import FakeData

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from deploy.student import build_model, find_architecture
from examples.benchmark_losses import machine, peak_of_call, wait_for
from kdlite import Teacher, top_k_logprobs

TEACHERS = {"resnet18": "resnet34", "mobilenet_v2": "resnet50", "deit_tiny_patch16_224": "deit3_small_patch16_224"}
CLASSES = 1000
Batch = tuple[Tensor, Tensor]


def parse(model: str, args: argparse.Namespace, *method: str) -> argparse.Namespace:
    recipe = "imagenet-vit" if "deit" in model else "imagenet-cnn"
    flags = ["--model", model, "--recipe", recipe, "--img-size", str(args.img_size), "--amp", args.amp]
    flags += ["--batch-size", str(args.batch_size), "--device", args.device, "--workers", "0"]
    return train.parse_args([*flags, *(["--compile"] if args.compile else []), *method])


def imaginary_data(args: argparse.Namespace) -> train.Data:
    """As many images and classes as a run needs to be built; none is ever looked at."""
    images = FakeData(2 * args.batch_size, (3, args.img_size, args.img_size), CLASSES)
    return train.Data(images, images, [str(i) for i in range(CLASSES)], IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def compiled(net: nn.Module, flags: argparse.Namespace) -> nn.Module:
    return torch.compile(net) if flags.compile else net


def make_teacher(name: str, flags: argparse.Namespace) -> Teacher:
    """A network of random weights with the student's own preprocessing."""
    teacher = Teacher(build_model(find_architecture(name), CLASSES, [3, *flags.img_size])).to(
        flags.device, memory_format=torch.channels_last
    )
    teacher.model = compiled(teacher.model, flags)
    return teacher


def step_of_train(
    batch: Batch, teacher: Teacher | None, flags: argparse.Namespace, data: train.Data, stored: Any = None
) -> Callable:
    """train.py's step, optimizer and all; stored: what stands in the teacher's place."""
    run = train.build(flags, data, teacher)
    log = train.LossLog(skips_steps=False)
    net = compiled(run.net, flags).train()

    def step() -> None:
        losses = train.forward_backward(net, stored or run.teacher, *batch, run.objective, run.amp, run.scaler)
        log.add(0, losses)
        train.update(run.net, run.optimizer, run.scaler, flags.clip_grad)
        log.waiting.clear()

    return step


def minimal_step(model: str, batch: Batch, flags: argparse.Namespace) -> Callable[[], None]:
    """What anyone would write for the same model, optimizer and precision."""
    images, target = batch
    net = build_model(find_architecture(model), CLASSES, [3, *flags.img_size])
    net = net.to(images.device, memory_format=torch.channels_last).train()
    amp = train.pick_amp(flags.amp, images.device)
    choice = torch.optim.AdamW if flags.opt == "adamw" else torch.optim.SGD
    options = {} if flags.opt == "adamw" else dict(momentum=0.9)
    optimizer = choice(net.parameters(), lr=flags.lr, weight_decay=flags.weight_decay, **options)
    scaler = torch.amp.GradScaler(images.device.type, enabled=amp == torch.float16)
    run = compiled(net, flags)

    def step() -> None:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            loss = F.cross_entropy(run(images), target, label_smoothing=flags.label_smoothing)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def teacher_forward(teacher: nn.Module, images: Tensor, amp: torch.dtype | None) -> Callable[[], None]:
    def forward() -> None:
        with torch.autocast(images.device.type, amp, enabled=amp is not None):
            teacher(images)

    return forward


def bench_model(model: str, args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    batch = images.to(memory_format=torch.channels_last), torch.randint(CLASSES, (args.batch_size,), device=device)
    plain, name, data = parse(model, args), TEACHERS[model], imaginary_data(args)
    teacher = make_teacher(name, plain)
    with_kd = parse(model, args, "--kd", "nkd", "--teacher", name)
    stored = top_k_logprobs(torch.randn(args.batch_size, CLASSES, device=device), batch[1], k=10)
    steps = {
        "minimal loop, cross-entropy": minimal_step(model, batch, plain),
        "train.py, cross-entropy": step_of_train(batch, None, plain, data),
        "train.py, USKD": step_of_train(batch, None, parse(model, args, "--self-kd", "uskd"), data),
        f"train.py, NKD with {name}": step_of_train(batch, teacher, with_kd, data),
        "train.py, NKD from stored labels": step_of_train(batch, teacher, with_kd, data, stored),
        f"{name} forward": teacher_forward(teacher, batch[0], train.pick_amp(plain.amp, device)),
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
    """Images a second to a normalised batch on the device, from files and, if they are small, from its memory."""
    data_flags = ["--data", args.data, "--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
    workers = [] if args.workers is None else ["--workers", str(args.workers)]
    print(f"\ndata pipeline: {args.data} at {args.img_size} px")
    for cache in ("none", "device"):
        crop = ["--crop", "pad"] if cache == "device" else []
        flags = train.parse_args([*data_flags, "--device", args.device, "--cache", cache, *crop, *workers])
        data = train.open_data(flags.data)
        if cache == "device" and len(data.train) * 3 * args.img_size**2 > 2**31:
            continue
        began = time.perf_counter()
        run = train.build(flags, data)
        decoding = time.perf_counter() - began
        loader, to_device = run.train_loader, run.to_device
        seen, started = 0, 0.0
        while seen == 0 or time.perf_counter() < started + args.seconds:
            for images, *_ in loader:
                to_device(images)
                if not started:  # the workers have started
                    started = time.perf_counter()
                    continue
                seen += len(images)
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
    parser.add_argument("--rounds", type=int, default=15, help="steps of each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="as train.py's")
    parser.add_argument("--compile", action="store_true", help="torch.compile students and teacher")
    parser.add_argument("--data", default="digits", help="for the data pipeline, as train.py's")
    parser.add_argument("--workers", type=int, help="for the data pipeline, as train.py's")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the data pipeline")
    args = parser.parse_args()
    if args.batch_size is None:
        args.batch_size = 256 if args.device == "cuda" else 16
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    try:
        train.pick_device(args.device)
        parse(args.models[0], args)  # refuses bad sizes before anything is built
        print(machine(args.device))
        for model in args.models:
            bench_model(model, args)
        bench_data(args)
    except train.UserError as error:
        print(f"benchmark_step.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
