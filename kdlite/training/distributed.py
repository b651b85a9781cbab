"""The processes of one run: they meet and agree, a signal asks for a stop, one that is lost is noticed and named.

For train.py, which knows of torchrun what stands in the environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from deploy.cli import UserError, show_error

RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
IS_MAIN = RANK == 0

STOP_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGHUP")
BEAT = 1.0  # seconds between two signs of life
GRACE = 10.0  # seconds a process has to end by itself once another has failed
ENDED = 2**40  # beats of a process that has ended as it should


class StopRequest:
    """Whether a signal has asked the run to stop: its name, or None. A second signal does what it always did."""

    def __init__(self) -> None:
        self.name: str | None = None


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Catch the signals with which schedulers and terminals say goodbye; a SIGHUP that is ignored (nohup) stays so."""
    request = StopRequest()
    numbers = [getattr(signal, name) for name in STOP_SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def receive(number: int, _frame: Any) -> None:
        request.name = signal.Signals(number).name
        signal.signal(number, signal.SIG_DFL)

    if before.get(signal.SIGHUP) == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, receive)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Ranks:
    """What the processes of a run know of one another, through a store, in a thread of each.

    The thread ends its process, with one line that names the reason, when the launcher has ended, when another process
    has given no sign of life for `patience` seconds, and when one has failed and this one does not end by itself.
    """

    here: Ranks | None = None  # of this process, where there are others
    control: Any = None  # group of all processes, for what stays on the host

    def __init__(self, store: Any, patience: float, rank: int = RANK, world_size: int = WORLD_SIZE) -> None:
        """store: a connection of its own to torch.distributed's store, as its calls may block."""
        self.store, self.rank, self.world_size, self.patience = store, rank, world_size, patience
        self.prefix = f"kdlite/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/"
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.watched = range(1, world_size) if rank == 0 else range(1)
        self.thread = threading.Thread(target=self.watch, args=(os.getppid(),), daemon=True)
        self.thread.start()

    def count(self, key: str, more: int = 0) -> int:
        """A counter that all processes share, after adding to it."""
        with self.lock:
            return int(self.store.add(self.prefix + key, more))

    def first_to_say(self, message: str) -> bool:
        """Whether no other process has said this yet; from now on the run counts as failed."""
        try:
            self.count("errors", 1)
            return self.count("said/" + hashlib.sha256(message.encode()).hexdigest(), 1) == 1
        except Exception:  # the store is gone, and with it whoever could have said it
            return True

    def silent(self, seconds: float = 3.5 * BEAT) -> list[int] | None:
        """The other processes without a sign of life for so long; None where one has failed and says why itself."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        with contextlib.suppress(Exception):
            before = {rank: self.count(f"beat/{rank}") for rank in others}
            time.sleep(seconds)
            if self.count("errors"):
                return None
            return [rank for rank in others if self.count(f"beat/{rank}") == before[rank] < ENDED]
        return [0] if self.rank else []  # the store is on the machine of rank 0

    def end(self) -> None:
        """This process is done, and its silence means nothing."""
        self.ended.set()
        self.thread.join(2 * BEAT)
        with contextlib.suppress(Exception):
            self.count(f"beat/{self.rank}", ENDED)

    def watch(self, parent: int) -> None:
        now = time.monotonic()
        beats, heard, failed = dict.fromkeys(self.watched, -1), dict.fromkeys(self.watched, now), None
        while not self.ended.wait(BEAT):
            if os.getppid() != parent:
                self.give_up("the launcher has ended")
            now = time.monotonic()
            with contextlib.suppress(Exception):  # without the store nobody is heard of
                self.count(f"beat/{self.rank}", 1)
                for rank in self.watched:
                    beat = self.count(f"beat/{rank}")
                    if beat != beats[rank] or beat >= ENDED:
                        beats[rank], heard[rank] = beat, now
                if self.count("errors"):
                    failed = failed or now
            for rank in self.watched:
                if now - heard[rank] > self.patience:
                    self.give_up(f"lost rank {rank}: no sign of life for {now - heard[rank]:.0f} s (--timeout)")
            if failed and now - failed > GRACE:
                os._exit(2)  # waits for one that is gone; that one has said why

    def give_up(self, message: str) -> None:
        if self.first_to_say(message):
            show_error("train.py", f"rank {self.rank}: {message}")
        sys.stderr.flush()
        os._exit(2)


def connect(minutes: float) -> None:
    """Meet the other processes; none that is lost keeps the rest waiting for longer than this."""
    if WORLD_SIZE == 1:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
        return
    patience = timedelta(minutes=minutes)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=patience)
    Ranks.control = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # waits as long as a download takes
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False
    )
    Ranks.here = Ranks(store, patience.total_seconds())


def end_with(launcher: int) -> None:
    """Of a single process: without its launcher nobody would know that it still runs."""
    while os.getppid() == launcher:
        time.sleep(BEAT)
    show_error("train.py", "the launcher has ended")
    os._exit(2)


def disconnect() -> None:
    if Ranks.here:
        Ranks.here.end()
        dist.destroy_process_group()
    Ranks.here = Ranks.control = None


def from_rank_zero(function: Callable[[], Any]) -> Any:
    """What the function returns, or the UserError it raises, on rank 0, where alone it is called."""
    answer: list[Any] = [None]
    if IS_MAIN:
        try:
            answer[0] = function()
        except UserError as error:
            answer[0] = error
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(answer, group=Ranks.control)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]


@contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """For what may download: one rank of a machine fetches, then the others find it."""
    if WORLD_SIZE > 1 and LOCAL_RANK > 0:
        dist.barrier(group=Ranks.control)
    yield
    if WORLD_SIZE > 1 and LOCAL_RANK == 0:
        dist.barrier(group=Ranks.control)


class Agreement:
    """What any rank wants, known to all after the same step: the answer to one step's question comes with the next,
    so that nobody waits."""

    def __init__(self) -> None:
        self.work: Any = None

    def ask(self, *wanted: bool) -> list[bool]:
        if WORLD_SIZE == 1:
            return list(wanted)
        answer = self.read() if self.work else [False] * len(wanted)
        self.wanted = torch.tensor(wanted, dtype=torch.int32)
        self.work = dist.all_reduce(self.wanted, dist.ReduceOp.MAX, group=Ranks.control, async_op=True)
        return answer

    def read(self) -> list[bool]:
        self.work.wait()
        self.work = None
        return [bool(x) for x in self.wanted.tolist()]


def gather(columns: Any) -> Any:
    """The tensors (2, N) of all ranks beside one another."""
    if WORLD_SIZE == 1:
        return columns
    parts: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(parts, columns, group=Ranks.control)
    return torch.cat(parts, 1)


def check_shared_memory(needed: int) -> None:
    """Raise if /dev/shm, through which workers hand over their batches, is too small: 64 MiB in a container."""
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else needed
    if free < needed:
        raise UserError(
            f"/dev/shm has {free >> 20} MiB free, and the workers hold up to {needed >> 20} MiB of images in it: "
            "docker run --shm-size 8g, or --workers 0, or fewer"
        )


def pick_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; leave it out to train on the CPU")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise UserError(f"{torch.cuda.device_count()} GPUs, but local rank {LOCAL_RANK}: lower --nproc-per-node")
    torch.cuda.set_device(LOCAL_RANK)
    return torch.device("cuda", LOCAL_RANK)
