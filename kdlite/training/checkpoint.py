"""Save the state of a run in a thread, and restore it: weights, optimizer, progress and losses so far."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deploy.cli import UserError, read_file, write_whole
from deploy.config import Metadata
from deploy.flags import option
from deploy.run_directory import read_csv
from deploy.student import load_weights
from kdlite.training import distributed
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE, StopRequest, from_rank_zero, gather, log

LAST, PREVIOUS = "last.pt", "previous.pt"  # the two newest checkpoints
MARK = b"kdlite sha256 "  # a checkpoint ends with this and 64 digits


@dataclass
class Progress:
    """Hold the position of a run and its results so far."""

    epoch: int = 0  # finished epochs
    step: int = 0  # optimizer steps of the unfinished epoch
    executed: int = 0  # steps that GradScaler did not skip
    seconds: float = 0.0  # time spent in the unfinished epoch
    lr: float = 0.0  # learning rate in its first step
    epochs: int = 0  # epochs of the run if --epochs is a time; else 0
    steps: int = 0  # steps of an epoch if --epochs is a time; 0: an epoch uses all images
    time_limit: float = 0.0  # the time in seconds to which epochs and steps were fitted
    best: float = -1.0  # best top-1 in %
    rows: list[dict[str, Any]] = field(default_factory=list)  # rows of metrics.csv
    answers: Tensor | None = None  # (2, N): labels and predictions of the validation images in the best epoch
    validated: str = ""  # digest of the validation images
    is_best: bool = False  # whether the last epoch was the best so far

    def __str__(self) -> str:
        return f"at step {self.step} of epoch {self.epoch + 1}" if self.step else f"after epoch {self.epoch}"

    def count_executed(self, *_: Any) -> None:
        """Count a step, as a hook of the optimizer. If GradScaler skips a step, the hook does not run."""
        self.executed += 1

    def end_epoch(self, row: dict[str, Any], answers: Tensor) -> None:
        """Store the row of an epoch; store its answers too if it is the best so far; start the next epoch."""
        self.rows.append(row)
        self.is_best = math.isfinite(row["val_loss"]) and row["val_top1"] >= self.best
        if self.is_best:
            self.best, self.answers = row["val_top1"], answers
        self.epoch, self.step, self.executed, self.seconds, self.lr = self.epoch + 1, 0, 0, 0.0, 0.0

    def check_validation(self, digest: str) -> None:
        """Reset the best epoch if it was measured on other validation images."""
        if self.validated not in ("", digest):
            best = f"the best top-1 of those epochs, {self.best:.2f} %, is ignored"
            fault = f"the validation images differ from those of the earlier epochs: {best}"
            log(f"{fault}, and student/ will be replaced by the best of the coming epochs")
            self.best, self.answers = -1.0, None
        self.validated = digest


class LossLog:
    """Collect the losses on the device and read them later, so that a step does not wait for the device."""

    def __init__(self, skips_steps: bool) -> None:
        self.skips_steps = skips_steps  # fp16: GradScaler skips a step whose gradients are not finite
        self.waiting: list[tuple[int, Tensor]] = []
        self.sums: dict[str, float] = {}  # term -> sum; a checkpoint stores sums and count
        self.count = self.skipped_in_a_row = 0

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        self.sums = self.sums or dict.fromkeys(losses, 0.0)
        self.waiting.append((step, torch.stack([loss.detach() for loss in losses.values()])))

    def read(self) -> float:
        """Read the losses since the last call and return their mean; raise UserError if a loss is not finite.

        With fp16, GradScaler skips such steps, so the error needs more than 20 of them in a row.
        """
        steps = [step for step, _ in self.waiting]
        values = torch.stack([value for _, value in self.waiting]).double().cpu() if steps else torch.empty(0, 1)
        self.waiting = []
        finite = values.isfinite().all(1)
        self.skipped_in_a_row = 0 if finite.any() else self.skipped_in_a_row + len(set(steps))
        if not finite.all() and (not self.skips_steps or self.skipped_in_a_row > 20):
            first = int(finite.int().argmin())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self.sums, values[first].tolist()))
            advice = "try a lower --lr, --clip-grad 5, longer --warmup-epochs, or --amp off"
            fault = f"the loss is not finite at step {steps[first]}: {terms}"
            raise UserError(f"{fault}; {advice}; the last checkpoint is kept")
        for name, value in zip(self.sums, values[finite].sum(0).tolist()):
            self.sums[name] += value
        self.count += int(finite.sum())
        return float(values[finite].sum(1).mean())

    def means(self, device: torch.device) -> dict[str, float]:
        """Return the mean of each term, and of their sum, over all ranks and the steps since the last call."""
        self.read()
        totals = torch.tensor([*self.sums.values(), self.count], dtype=torch.float64, device=device)
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        *sums, count = totals.tolist()
        means = {f"loss_{name}": value / max(count, 1) for name, value in zip(self.sums, sums)}
        self.sums, self.count = {}, 0
        return {"train_loss": sum(means.values())} | means


class Checkpoint(NamedTuple):
    """Hold the content of a checkpoint file."""

    file: str
    content: dict[str, Any]
    config: Metadata  # the student's config.json
    written: int  # time of the file's last change in nanoseconds


@dataclass
class State:
    """Hold the parts of a run that change during training."""

    net: nn.Module  # the student, with USKD's weak head if it has one
    ema: nn.Module | None  # average of the student's weights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    log: LossLog  # losses of this epoch on this rank

    def copy(self, flags: dict[str, Any], config: Metadata) -> bytearray:
        """Return a checkpoint's bytes on rank 0; raise UserError if a weight is not finite. Every rank calls this."""
        for name, model in (("weights", self.net), ("averaged weights", self.ema)):
            values = [x for x in model.state_dict().values() if x.is_floating_point()] if model else []
            if values and not torch.stack([x.isfinite().all() for x in values]).all():
                fault = f"the {name} are not finite {self.progress}: try a lower --lr or --clip-grad 5"
                raise UserError(f"{fault}; the last checkpoint is kept")
        own: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "sums": self.log.sums}
        own |= {"count": self.log.count, "buffers": [dict(model.named_buffers()) for model in self.models()]}
        if torch.cuda.is_initialized():
            own["cuda"] = torch.cuda.get_rng_state()
        parts = [own] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.gather_object(own, parts if IS_MAIN else None, group=distributed.Group.control)
        buffer = io.BytesIO()
        if IS_MAIN:
            live: dict[str, Any] = {"model": self.net, "optimizer": self.optimizer, "scaler": self.scaler}
            whole: dict[str, Any] = {name: value.state_dict() for name, value in live.items()}
            whole["ema"] = self.ema.state_dict() if self.ema else None
            whole |= {"progress": asdict(self.progress), "ranks": parts, "args": flags, "config": config.to_json()}
            torch.save(whole, buffer)
        return bytearray(buffer.getbuffer())

    def models(self) -> list[nn.Module]:
        return [model for model in (self.net, self.ema) if model is not None]

    def restore(self, checkpoint: Checkpoint, flags: dict[str, Any], config: Metadata) -> None:
        """Load the state from a checkpoint; options such as --weight-decay come from this run's flags.

        Raises:
            UserError: the checkpoint has another model, optimizer or set of classes; the rest of the unfinished epoch
                would get other batches; or the ranks resume from different steps
        """
        file, saved, before, _ = checkpoint
        if before.label_names != config.label_names:
            pairs: Any = zip(before.label_names, config.label_names)
            sizes = [f"{len(names)} classes" for names in (before.label_names, config.label_names)]
            theirs, now = next((pair for pair in pairs if pair[0] != pair[1]), sizes)
            fault = f"the classes of {file} differ from those of --data: {theirs} there, {now} here"
            raise UserError(f"{fault}; use the classes of that run, or start a new run")
        load_weights(self.net, saved["model"], file)
        if self.ema and saved["ema"]:
            load_weights(self.ema, saved["ema"], file)
        elif self.ema:
            self.ema.load_state_dict(getattr(self.net, "model", self.net).state_dict())
        if saved["args"]["opt"] != flags["opt"]:
            fault = f"{file} was saved with --opt {saved['args']['opt']}, not {flags['opt']}"
            raise UserError(f"{fault}: give the same --opt")
        groups, ours = saved["optimizer"]["param_groups"], self.optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in ours]:
            fault = f"{file} was saved with other groups of parameters"
            raise UserError(f"{fault}: give the same --weight-decay, --layer-decay and --tap")
        for group, now in zip(groups, ours):
            group.update({name: value for name, value in now.items() if name != "params"})
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.progress.__dict__.update(saved["progress"])
        if self.progress.step:  # within an epoch, which must continue with the same batches
            names = ("batch_size", "seed", "cache", "kd", "self_kd")
            theirs = {name: saved["args"].get(name) for name in names}
            changed = [
                f"no {option(name)}" if value is None else f"{option(name)} {value}"
                for name, value in theirs.items()
                if value != flags[name]
            ]
            if flags["cache"] == "device" and len(saved["ranks"]) != WORLD_SIZE:
                changed += [f"{len(saved['ranks'])} processes, because of --cache device"]
            if before.training["train_images"] != config.training["train_images"]:
                changed += [f"the same {before.training['train_images']} training images"]
            if changed:
                raise UserError(f"{file} is {self.progress}: until that epoch ends, use {' and '.join(changed)}")
        if len(saved["ranks"]) == WORLD_SIZE:
            self.restore_own(saved["ranks"][RANK])
        elif self.progress.step and IS_MAIN:  # another number of ranks: rank 0 takes the sums of all
            self.log.sums = {k: sum(part["sums"][k] for part in saved["ranks"]) for k in saved["ranks"][0]["sums"]}
            self.log.count = sum(part["count"] for part in saved["ranks"])
        self.check_agreement()

    def restore_own(self, own: dict[str, Any]) -> None:
        torch.set_rng_state(own["torch"])
        random.setstate(own["python"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        if not self.progress.step:
            return
        self.log.sums, self.log.count = own["sums"], own["count"]
        # the batch norms of each rank have their own statistics
        for model, buffers in zip(self.models(), own["buffers"]):
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])

    def check_agreement(self) -> None:
        """Raise unless every rank resumes with the same epoch, step, weights and number of processes."""
        digest = digest_of(self.net.named_parameters())[:16]
        everyone = gather((self.progress.epoch, self.progress.step, digest, WORLD_SIZE))
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                fault = "the ranks differ in epoch, step, weights or number of processes"
                raise UserError(f"{fault}: rank {rank} has {other}, rank 0 has {everyone[0]}")


class Saver:
    """Save a checkpoint when it is due or after a signal; a thread writes it while training continues.

    The checkpoint stores flags and config with the state. flags["save_every"]: minutes between two checkpoints within
    an epoch; 0: checkpoints only after epochs
    """

    def __init__(self, folder: Path, state: State, flags: dict[str, Any], config: Metadata, stop: StopRequest) -> None:
        self.folder, self.state, self.flags, self.config = folder, state, flags, config
        self.seconds, self.stop = 60 * flags["save_every"], stop
        self.agreement, self.saved_at = distributed.Agreement(), time.monotonic()
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def after_step(self) -> bool:
        """Save if a checkpoint is due or a signal has reached a rank; return whether the run must stop."""
        due = IS_MAIN and 0 < self.seconds < time.monotonic() - self.saved_at
        stopping, saving = self.agreement.ask(self.stop.name is not None, due)
        if saving or stopping:
            self.save()
        return stopping

    def save(self, *others: Callable[[], Any], best: bool = False) -> None:
        """Copy the state; the thread calls `others`, which write other files, and then writes the checkpoint."""
        self.saved_at = time.monotonic()
        self.state.log.read()
        content = self.state.copy(self.flags, self.config)
        if IS_MAIN:
            self.wait()
            self.writing = self.thread.submit(write_run, self.folder, content, others, best)

    def wait(self) -> None:
        """Wait for the thread, and raise its error."""
        if self.writing:
            self.writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.wait()
                self.agreement.finish()
        finally:
            self.thread.shutdown()


def write_run(folder: Path, content: bytearray, others: tuple[Callable[[], Any], ...], best: bool) -> None:
    """Write the other files before last.pt, so that they have each of its epochs. Keep the previous checkpoint."""
    sealed = seal(content)
    for write in others:
        write()
    if best:
        write_whole(folder / "best.pt", sealed)
    write_whole(folder / LAST, sealed, keep=folder / PREVIOUS)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the newest whole checkpoint of a run on rank 0, and send it to all ranks; None if it is missing."""
    found = from_rank_zero(read_checkpoint, folder)
    if found is None:
        return None
    file, content, written = found
    try:
        read = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises errors of many kinds
        raise UserError(f"{file} cannot be read as a checkpoint: {type(error).__name__}") from error
    parts = ("model", "optimizer", "scaler", "ema", "progress", "ranks", "args", "config")
    if not isinstance(read, dict) or not set(parts) <= read.keys() or not isinstance(read["config"], dict):
        raise UserError(f"{file} is not a checkpoint of train.py: expected a dictionary of {', '.join(parts)}")
    return Checkpoint(str(file), read, Metadata.from_json(read["config"], str(file)), written)


def changed_since(checkpoint: Checkpoint | None, folder: Path) -> bool:
    """Return whether a run has written a checkpoint after `checkpoint` was read.

    checkpoint: None if the folder had none
    """
    if checkpoint is None:
        return (folder / LAST).exists()
    try:
        return os.stat(checkpoint.file).st_mtime_ns != checkpoint.written
    except FileNotFoundError:
        return True


# ---- bytes --------------------------------------------------------------------------------------------------------


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of tensors and their names, the same on every device."""
    digest = hashlib.sha256()
    for name, value in tensors:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def seal(content: bytearray) -> bytearray:
    """Append a SHA-256 digest to a zip archive as its comment, which torch.load ignores."""
    comment = len(MARK) + 64
    content[-2:] = comment.to_bytes(2, "little")  # the archive's last field, the length of its comment
    return content + MARK + hashlib.sha256(content).hexdigest().encode()


def is_whole(content: bytes) -> bool:
    """Return whether the bytes end with the digest that seal() appends."""
    body, mark = memoryview(content)[: -len(MARK) - 64], bytes(content[-len(MARK) - 64 :])
    return mark == MARK + hashlib.sha256(body).hexdigest().encode()


def read_checkpoint(folder: Path) -> tuple[Path, bytes, int] | None:
    """Return the newest whole checkpoint of a run, and its time; None if the run has not written one.

    Raise UserError if all checkpoints are damaged, or missing although the run has saved one.
    """
    damaged: list[str] = []
    for file in (folder / LAST, folder / PREVIOUS):
        if not file.exists():
            continue
        written = file.stat().st_mtime_ns
        content = read_file(file)
        if is_whole(content):
            if damaged:
                log(f"{damaged[0]} is damaged or not a checkpoint of train.py: {file} is used")
            return file, content, written
        damaged.append(str(file))
    if damaged:
        raise UserError(f"{' and '.join(damaged)}: damaged, or not a checkpoint of train.py; start in a new --output")
    # a run that ends while it saves its first epoch leaves a header and one row in metrics.csv, and no curves.png
    rows = len(read_csv(folder / "metrics.csv", "metrics")) if (folder / "metrics.csv").exists() else 0
    if rows > 2 or (rows and (folder / "curves.png").exists()):
        fault = f"{folder} has finished epochs (metrics.csv), but neither {LAST} nor {PREVIOUS}"
        raise UserError(f"{fault}: restore one, or start in a new --output")
    return None
