"""Connect the processes of a run: they start together, agree, stop on a signal and end with their launcher.

torchrun starts the processes, detects a process that has ended and ends the others; this file relies on that.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from multiprocessing import forkserver
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import distribute_bn
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from deploy.cli import UserError, explain, first_line, printable

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
MEET = timedelta(minutes=10)  # how long a process waits for the others at the start
# How long a process waits for another in a step: long, because a suspended job (SLURM, a paused machine) continues
# later, and torchrun detects a process that has ended.
WAIT = timedelta(days=1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Error texts of a collective after another process has ended.
LOST_PEER = re.compile("(?i)closed by peer|reset by peer|broken pipe|NCCL|gloo|timed out|timeout")


def read_launch() -> tuple[int, int, int, str | None]:
    """Return rank, local rank, number of processes, and the error in the launcher's environment, or None."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    found = [os.environ.get(name, default) for name, default in defaults.items()]

    if not all(value.isdecimal() for value in found):
        return 0, 0, 1, "RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, got " + ", ".join(found)
    rank, local_rank, size = map(int, found)
    if rank >= size:
        return 0, 0, 1, f"RANK must be below WORLD_SIZE, got {rank} and {size}: start with torchrun"
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        tasks = os.environ.get(name, "1")
        if tasks.isdecimal() and int(tasks) > 1 and "RANK" not in os.environ:
            error = f"{name} is {tasks}, but torchrun did not start this process: {tasks} separate runs would begin. "
            return 0, 0, 1, error + f"Start torchrun (examples/slurm.sh), or unset {name} for one process"
    return rank, local_rank, size, None


RANK, LOCAL_RANK, WORLD_SIZE, LAUNCH_ERROR = read_launch()
IS_MAIN = RANK == 0


class Group:
    """Hold the process groups of this run; None with one process."""

    steps: Any = None  # for gradients, losses and statistics: gloo on CPU, NCCL on CUDA
    control: Any = None  # for objects and decisions of the host: gloo
    store: Any = None


# ---- signals ------------------------------------------------------------------------------------------------------


class StopRequest:
    """Store the name of the signal that asked the run to stop, or None."""

    name: str | None = None

    def receive(self, number: int, _frame: Any) -> None:
        """Store the first signal; a launcher may forward the same one again."""
        self.name = self.name or signal.Signals(number).name

    def __str__(self) -> str:
        return self.name or "a signal to another rank"


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Store the first stop signal of a scheduler or terminal; an already ignored SIGHUP (nohup) stays ignored."""
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for number in before:
            signal.signal(number, request.receive)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start_fork_server() -> Any:
    """Return the context that starts data loading processes; a signal to the whole job does not end them.

    A clean process forks them, because a fork of this process may hang on locks that its threads hold. The fork server
    inherits the signals that are ignored here, and its children inherit them from the server.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["timm", "torchvision"])
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (*STOP_SIGNALS, signal.SIGINT)}

    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return context


def end_with_launcher() -> None:
    """Have the kernel send SIGTERM to this process when its parent ends, so that a run saves and stops. Only Linux."""
    launcher = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # the launcher ended before the call
        os.kill(os.getpid(), signal.SIGTERM)


# ---- meeting and agreeing -----------------------------------------------------------------------------------------


@contextmanager
def process_group() -> Iterator[None]:
    """Connect to the other processes, and leave the group at the end; raise UserError if they do not connect."""
    if LAUNCH_ERROR:
        raise UserError(LAUNCH_ERROR)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    if WORLD_SIZE == 1:
        yield
        return
    try:
        store, _, _ = next(rendezvous("env://", timeout=MEET))
        store.set(f"kdlite/{RANK}", "here")
        store.wait([f"kdlite/{rank}" for rank in range(WORLD_SIZE)], MEET)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE, timeout=WAIT)
        Group.store, Group.steps = store, dist.group.WORLD
        Group.control = dist.new_group(backend="gloo", timeout=WAIT)
    except (RuntimeError, ValueError, KeyError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        fault = f"the {WORLD_SIZE} processes could not connect at {address}: {str(error)[:200]}"
        raise UserError(f"{fault}; check MASTER_ADDR and MASTER_PORT, and that all processes start") from error
    try:
        yield
    finally:
        dist.destroy_process_group()
        # a reference that remains here would abort the process at its exit
        Group.store = Group.steps = Group.control = None


@contextmanager
def reported_once() -> Iterator[None]:
    """Let the first process with a user's error raise it; end the others with status 2 and without a message.

    The errors of the others follow from the first error.
    """
    try:
        yield
    except Exception as error:
        lost = WORLD_SIZE > 1 and isinstance(error, (RuntimeError, ConnectionError)) and LOST_PEER.search(str(error))
        if not lost and explain(error) is None:
            raise
        if not is_first_error():
            raise SystemExit(2) from error
        if not lost:
            raise
        fault = f"rank {RANK}: another process has ended, or does not answer ({first_line(error)[:120]})"
        raise UserError(f"{fault}; --resume continues from the last checkpoint") from error


def is_first_error() -> bool:
    """Return True if this process is the first of the run with an error."""
    if Group.store is None:
        if not IS_MAIN:
            time.sleep(2)  # let rank 0 print the error: torchrun ends it as soon as this process ends
        return IS_MAIN
    try:
        return int(Group.store.add("kdlite/errors", 1)) == 1
    except RuntimeError:  # the process with the store has ended
        return True


def from_rank_zero(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function on rank 0 only; return its result, or raise its UserError, on every rank."""
    result: list[Any] = [None]
    if IS_MAIN:
        try:
            result[0] = function(*args)
        except UserError as error:
            result[0] = error
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(result, group=Group.control)
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the block on the first rank of a machine, then on the others, which find the downloaded files."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier(group=Group.control)
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier(group=Group.control)


class Agreement:
    """Let all ranks decide after the same step, without waiting.

    Each call of ask() returns the answers to the questions of the call before.
    """

    work: Any = None
    asked: torch.Tensor

    def ask(self, *asked: bool) -> list[bool]:
        """Return for each question of the previous call whether a rank passed True.

        With one process, return the answers of this call.
        """
        if WORLD_SIZE == 1:
            return list(asked)
        answer = [False] * len(asked)
        if self.work:
            self.work.wait()
            answer = self.asked.bool().tolist()
        self.asked = torch.tensor(asked, dtype=torch.int32)
        self.work = dist.all_reduce(self.asked, dist.ReduceOp.MAX, group=Group.control, async_op=True)
        return answer

    def finish(self) -> None:
        """Wait for the answers to the last questions.

        A rank that leaves the group before it has the answers causes an error.
        """
        if self.work:
            self.work.wait()


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks."""
    values = [value] * WORLD_SIZE
    if WORLD_SIZE > 1:
        dist.all_gather_object(values, value, group=Group.control)
    return values


def log(line: str | None) -> None:
    """Print a line on stdout, on rank 0 only; print nothing for None."""
    if IS_MAIN and line:
        print(*(printable(part) for part in line.split("\n")), sep="\n", flush=True)


def warn(line: str) -> None:
    """Print a warning on stderr, on rank 0 only."""
    if IS_MAIN:
        print(printable(f"warning: {line}"), file=sys.stderr, flush=True)


class Exchanging(DistributedDataParallel):
    """Turn DistributedDataParallel's error about a parameter without a gradient into a UserError that names it."""

    def forward(self, *inputs: Any, **options: Any) -> Any:
        try:
            return super().forward(*inputs, **options)
        except RuntimeError as error:
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            if not found:
                raise
            names = [name for name, parameter in self.module.named_parameters() if parameter.requires_grad]
            unused = ", ".join(names[int(index)] for index in found[1].split()[:3])
            fault = f"the model does not use its parameter {unused}"
            advice = "with several processes each parameter needs a gradient: remove it, or set requires_grad to False"
            raise UserError(f"{fault}; {advice}") from error


def exchange_gradients(net: Any, device: torch.device) -> Any:
    """Wrap the network so that the processes exchange gradients, if there are several."""
    if WORLD_SIZE == 1:
        return net
    ids = [device.index] if device.type == "cuda" else None
    return Exchanging(net, device_ids=ids, gradient_as_bucket_view=True)


def gradient_sync(net: nn.Module, last_pass: bool) -> AbstractContextManager[None]:
    """Return the context of a pass: DDP exchanges the gradients only in the last pass of a step."""
    return nullcontext() if last_pass or not isinstance(net, DistributedDataParallel) else net.no_sync()


def average_batch_norm(*models: nn.Module) -> None:
    """Average the ranks' batch-norm statistics, so that all evaluate the same model."""
    if WORLD_SIZE > 1:
        for model in models:
            distribute_bn(model, WORLD_SIZE, reduce=True)


# ---- the machine --------------------------------------------------------------------------------------------------


def check_shared_memory(needed: int) -> None:
    """Raise if /dev/shm (64 MiB in a container by default) is too small for the batches of the data loading workers."""
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else needed
    if free < needed:
        fault = f"/dev/shm has {free >> 20} MiB free, but the workers need up to {needed >> 20} MiB"
        raise UserError(f"{fault}: use docker run --shm-size 8g, fewer --workers, or --workers 0")


def pick_device(name: str) -> torch.device:
    """Return the device that --device names, and make it current; raise UserError if it does not exist."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device; leave the flag out to train on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(f"{torch.cuda.device_count()} GPUs, but the local rank is {LOCAL_RANK}: lower --nproc-per-node")
    torch.cuda.set_device(LOCAL_RANK)
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda", LOCAL_RANK)


def pick_amp(name: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype that --amp names, or None for full precision."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in MiB: that of the GPU; if the device is a CPU, that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak >> (20 if sys.platform == "darwin" else 10)
