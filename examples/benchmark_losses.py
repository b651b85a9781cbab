"""Measure time and memory of the losses and of the same formulas with boolean masks: make bench

    python examples/benchmark_losses.py                     # every shape and dtype, eager and compiled: about 8 minutes
    python examples/benchmark_losses.py --shapes 256x1000 --dtypes float32

A call is forward and backward. The rows of a table take turns in one process, in random order, one call each, until
every row has run for --seconds. The table shows medians. "x" is the speed relative to the same formula with boolean
masks; for cross-entropy and KL-based KD it is relative to NKD with boolean masks. Memory is the peak of one call. Its
unit u is the bytes of one (N, C) tensor in the logits' dtype. It includes gradients, but not inputs. On a GPU the table
also shows the number of kernels, and whether the host waited for the device. NKD moves at least 5 u. The column "5u
copied" is 5 u divided by the row's time, in percent of the bandwidth of a copy.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from kdlite import nkd_linear_loss, nkd_loss, terms, uskd_loss

os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler, which measures memory, prints less

SHAPES = [(128, 100), (256, 1000), (1024, 1000), (256, 21841), (64, 128256)]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (student or strong logits, teacher or weak logits, class indices)


# ---- the losses to compare with -----------------------------------------------------------------------------------


def others(x: Tensor, target: Tensor) -> Tensor:
    """Return the C - 1 columns except the target's, by a boolean mask."""
    mask = torch.ones_like(x, dtype=torch.bool).scatter_(1, target[:, None], False)
    return x[mask].view(len(x), -1)


def nkd_by_masks(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return NKD at temperature 1, by boolean masks."""
    index = target[:, None]
    log_s, t = student.log_softmax(1), teacher.detach().softmax(1)
    target_term = -(t.gather(1, index) * log_s.gather(1, index)).mean()
    log_n_s = others(student, target).log_softmax(1)
    n_t = others(teacher.detach(), target).softmax(1)
    return target_term - 1.5 * (n_t * log_n_s).sum(1).mean()


def uskd_by_masks(strong: Tensor, weak: Tensor, target: Tensor) -> Tensor:
    """Return USKD with its default weights, by boolean masks."""
    index = target[:, None]
    log_s, s, w = strong.log_softmax(1), strong.detach().softmax(1), weak.detach().softmax(1)
    s_t, w_t = s.gather(1, index), w.gather(1, index)
    target_term = -((s_t**2 + 1 - (s_t**2).mean()) * log_s.gather(1, index)).mean()
    r = w / (1 - w_t) + s / (1 - s_t)
    rank = r.argsort(1, descending=True).argsort(1) + 1
    z = others(1 / rank, target)
    non_target_term = -(z / z.sum(1, keepdim=True) * others(strong, target).log_softmax(1)).sum(1).mean()
    smoothed = 0.9 * F.one_hot(target, weak.shape[1]) + 0.1 / weak.shape[1]
    weak_term = -(smoothed * weak.log_softmax(1)).sum(1).mean()
    return target_term + 0.1 * non_target_term + 0.005 * weak_term


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(student, target)


def kl_based_kd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return KD in its usual form, with F.kl_div."""
    return F.kl_div(student.log_softmax(1), teacher.detach().softmax(1), reduction="batchmean")


def nkd_by_terms(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return nkd_loss without kdlite.fused."""
    return terms.nkd_rows(student, teacher, target, 1.5, 1.0).mean()


def uskd_by_terms(strong: Tensor, weak: Tensor, target: Tensor) -> Tensor:
    weights = terms.USKDWeights(1.0, 0.1, 0.005, 0.1)
    return terms.uskd_rows(strong, weak, target, torch.ones_like(target, dtype=torch.bool), weights).mean()


# ---- measuring ----------------------------------------------------------------------------------------------------


def call(loss: Loss, inputs: tuple[Tensor, ...]) -> None:
    loss(*inputs).backward()
    for x in inputs:
        x.grad = None


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def median_seconds(losses: dict[str, Loss], inputs: tuple[Tensor, ...], seconds: float) -> dict[str, float]:
    """Return the median seconds of a call for each loss. The losses take turns until each has run for ``seconds``."""
    device = inputs[0].device.type
    taken: dict[str, list[float]] = {name: [] for name in losses}
    while waiting := [name for name, times in taken.items() if sum(times) < seconds or len(times) < 5]:
        for name in random.sample(waiting, len(waiting)):  # random, because an earlier call warms the cache
            wait_for(device)
            started = time.perf_counter()
            call(losses[name], inputs)
            wait_for(device)
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_of_call(function: Callable[[], object], device: str) -> int:
    """Return the peak memory of a call in bytes, above the memory before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_bytes(loss: Loss, inputs: tuple[Tensor, ...]) -> int:
    return peak_of_call(lambda: call(loss, inputs), inputs[0].device.type)


def kernels_of(loss: Loss, inputs: tuple[Tensor, ...]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call(loss, inputs)
        torch.cuda.synchronize()
    return sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")


def waits_for_the_device(loss: Loss, inputs: tuple[Tensor, ...]) -> bool:
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(loss, inputs)
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def copy_bandwidth() -> float:
    """Return the bytes per second (reads plus writes) for a copy of 1 GiB on the GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * source.numel() / statistics.median(times)


# ---- the tables ---------------------------------------------------------------------------------------------------


def make_inputs(rows: int, classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a, b = ((2 * torch.randn(rows, classes, generator=generator)).to(device, dtype) for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator).to(device)
    return a.requires_grad_(), b.requires_grad_(), target


def bench_shape(rows: int, classes: int, dtype: torch.dtype, args: argparse.Namespace, bandwidth: float) -> None:
    inputs = make_inputs(rows, classes, dtype, args.device)
    u = rows * classes * dtype.itemsize
    eager: dict[str, tuple[Loss, str]] = {
        "NKD by boolean masks": (nkd_by_masks, "NKD by boolean masks"),
        "cross-entropy": (cross_entropy, "NKD by boolean masks"),
        "KL-based KD": (kl_based_kd, "NKD by boolean masks"),
        "NKD by terms.py": (nkd_by_terms, "NKD by boolean masks"),
        "nkd_loss": (nkd_loss, "NKD by boolean masks"),
        "USKD by boolean masks": (uskd_by_masks, "USKD by boolean masks"),
        "USKD by terms.py": (uskd_by_terms, "USKD by boolean masks"),
        "uskd_loss": (uskd_loss, "USKD by boolean masks"),
    }
    torch.compiler.reset()
    compiled = {
        f"{name}, compiled": (torch.compile(loss, fullgraph=True, dynamic=False), base)
        for name, (loss, base) in eager.items()
        if "masks" not in name
    }
    table = eager | (compiled if args.compile else {})
    losses = {name: loss for name, (loss, _) in table.items()}
    for loss in losses.values():
        call(loss, inputs)  # the first call compiles
    seconds = median_seconds(losses, inputs, args.seconds)
    print(f"\n{rows} x {classes}, {str(dtype).removeprefix('torch.')}, u = {u / 2**20:.2f} MiB")
    on_gpu = "   5u copied  kernels  waits" if args.device == "cuda" else ""
    print(f"  {'':25}{'ms':>9}{'x':>7}{'peak':>9}{on_gpu}")
    for name, (loss, base) in table.items():
        line = f"  {name:25}{1e3 * seconds[name]:9.3f}{seconds[base] / seconds[name]:6.1f}x"
        line += f"{peak_bytes(loss, inputs) / u:8.2f}u"
        if on_gpu:
            line += f"{100 * 5 * u / bandwidth / seconds[name]:10.0f} %{kernels_of(loss, inputs):9}"
            line += f"{'yes' if waits_for_the_device(loss, inputs) else 'no':>7}"
        print(line, flush=True)


def bench_linear(rows: int, classes: int, width: int, args: argparse.Namespace) -> None:
    """Print the cost of nkd_linear_loss, and of the classifiers followed by nkd_loss."""
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(rows, width, generator=generator).to(args.device) for _ in range(2))
    weight, teacher_weight = (torch.randn(classes, width, generator=generator).to(args.device) / 8 for _ in range(2))
    target = torch.randint(classes, (rows,), generator=generator).to(args.device)
    inputs = hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, target

    def unfused(
        hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, target: Tensor
    ) -> Tensor:
        return nkd_loss(hidden @ weight.T, (teacher_hidden @ teacher_weight.T).detach(), target)

    losses = {"classifiers, then nkd_loss": unfused, "nkd_linear_loss": nkd_linear_loss}
    for loss in losses.values():
        call(loss, inputs)
    seconds = median_seconds(losses, inputs, args.seconds)
    print(f"\n{rows} x {classes}, hidden {width}, float32: classifiers of student and teacher included")
    print(f"  {'':27}{'ms':>9}{'x':>7}{'peak MiB':>10}")
    for name, loss in losses.items():
        ratio = seconds["classifiers, then nkd_loss"] / seconds[name]
        print(f"  {name:27}{1e3 * seconds[name]:9.1f}{ratio:6.2f}x{peak_bytes(loss, inputs) / 2**20:10.0f}", flush=True)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    if device == "cpu" and (cpuinfo := Path("/proc/cpuinfo")).exists():
        name += next(
            (f", {line.split(': ')[1]}" for line in cpuinfo.read_text().splitlines() if "model name" in line), ""
        )
    return f"{name}, {platform.machine()}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def shape(text: str) -> tuple[int, int]:
    rows, x, classes = text.partition("x")
    if not (x and rows.isdigit() and classes.isdigit() and int(rows) >= 1 and int(classes) >= 2):
        raise argparse.ArgumentTypeError(f"{text!r} is not rows x classes: expected for example 256x1000, at least 1x2")
    return int(rows), int(classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, type=shape, metavar="NxC", help="rows x classes")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds for each row of a table")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="also time the compiled rows"
    )
    parser.add_argument("--linear", action=argparse.BooleanOptionalAction, default=True, help="nkd_linear_loss too")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    print(machine(args.device))
    bandwidth = copy_bandwidth() if args.device == "cuda" else 0.0
    if bandwidth:
        print(f"copying reaches {bandwidth / 1e12:.2f} TB/s")
    for dtype in args.dtypes:
        for rows_and_classes in args.shapes:
            bench_shape(*rows_and_classes, getattr(torch, dtype), args, bandwidth)
    if args.linear:
        bench_linear(512, 128256, 256, args)


if __name__ == "__main__":
    main()
