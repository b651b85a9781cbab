"""What a run goes on from: its whole state, copied, written and read again. Needs torch; for train.py."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deploy.cli import UserError, write_whole
from deploy.student import load_weights
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE, Ranks, from_rank_zero

LAST, PREVIOUS = "last.pt", "previous.pt"  # the two newest checkpoints
MARK = b"kdlite sha256 "  # and 64 digits, which end a checkpoint


@dataclass
class Progress:
    """How far a run is; a checkpoint keeps it."""

    epoch: int = 0  # epochs that are done
    step: int = 0  # optimizer steps done of the next
    executed: int = 0  # of those; GradScaler leaves some out
    seconds: float = 0.0  # that they took
    lr: float = 0.0  # of the first
    best: float = -1.0  # top-1
    rows: list[dict[str, Any]] = field(default_factory=list)  # of metrics.csv
    answers: torch.Tensor | None = None  # labels and answers on the validation images, (2, N), at the best

    def __str__(self) -> str:
        return f"at step {self.step} of epoch {self.epoch + 1}" if self.step else f"after epoch {self.epoch}"

    def next_epoch(self, best: float) -> None:
        self.epoch, self.step, self.executed, self.seconds, self.lr, self.best = self.epoch + 1, 0, 0, 0.0, 0.0, best


class LossLog:
    """Keeps each step's losses on the device and reads them at intervals, so that no step waits for the device."""

    def __init__(self, skips_steps: bool) -> None:
        self.skips_steps = skips_steps  # fp16: GradScaler skips a step whose gradients are not finite
        self.waiting: list[tuple[int, Tensor]] = []
        self.sums: dict[str, float] = {}  # with count, what a checkpoint keeps
        self.count = self.skipped_in_a_row = 0

    def add(self, step: int, losses: dict[str, Tensor]) -> None:
        self.sums = self.sums or dict.fromkeys(losses, 0.0)
        self.waiting.append((step, torch.stack([loss.detach() for loss in losses.values()])))

    def read(self) -> float:
        """Take in the steps since the last call and return their mean loss; stop the run at one that is not finite."""
        steps = [step for step, _ in self.waiting]
        values = torch.stack([value for _, value in self.waiting]).double().cpu() if steps else torch.empty(0, 1)
        self.waiting = []
        finite = values.isfinite().all(1)
        self.skipped_in_a_row = 0 if finite.any() else self.skipped_in_a_row + len(set(steps))
        if not finite.all() and (not self.skips_steps or self.skipped_in_a_row > 20):
            first = int(finite.int().argmin())
            terms = ", ".join(f"{name} {value:g}" for name, value in zip(self.sums, values[first].tolist()))
            raise UserError(
                f"the loss is not finite at step {steps[first]}: {terms}; try a lower --lr, --clip-grad 5, "
                "longer --warmup-epochs, or --amp off; the last checkpoint is kept"
            )
        for name, value in zip(self.sums, values[finite].sum(0).tolist()):
            self.sums[name] += value
        self.count += int(finite.sum())
        return float(values[finite].sum(1).mean())

    def means(self, device: torch.device) -> dict[str, float]:
        """Mean of each term over all ranks since the last call, and of their sum."""
        totals = torch.tensor([*self.sums.values(), self.count], dtype=torch.float64, device=device)
        if WORLD_SIZE > 1:
            dist.all_reduce(totals)
        *sums, count = totals.tolist()
        means = {f"loss_{name}": value / max(count, 1) for name, value in zip(self.sums, sums)}
        self.sums, self.count = {}, 0
        return {"train_loss": sum(means.values())} | means


@dataclass
class State:
    """The parts of a run that change while it trains."""

    net: nn.Module  # the student, with USKD's weak head where there is one
    ema: nn.Module | None  # average of the student's weights
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress
    log: LossLog  # of the losses of this epoch on this rank

    def copy(self, flags: dict[str, Any], config: dict[str, Any]) -> bytearray:
        """All of it, for a thread to write. Called on every rank, whose own part is gathered; empty but on rank 0.

        Raises:
            UserError: a weight that is not finite
        """
        for name, model in (("weights", self.net), ("averaged weights", self.ema)):
            values = [x for x in model.state_dict().values() if x.is_floating_point()] if model else []
            if values and not torch.stack([x.isfinite().all() for x in values]).all():
                raise UserError(
                    f"the {name} are not finite {self.progress}: try a lower --lr or --clip-grad 5; "
                    "the last checkpoint is kept"
                )
        own: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "sums": self.log.sums}
        own |= {"count": self.log.count, "buffers": [dict(model.named_buffers()) for model in self.models()]}
        if torch.cuda.is_initialized():
            own["cuda"] = torch.cuda.get_rng_state()
        parts = [own] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.gather_object(own, parts if IS_MAIN else None, group=Ranks.control)
        buffer = io.BytesIO()
        if IS_MAIN:
            whole = {
                "model": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(), "ema": self.ema.state_dict() if self.ema else None,
                "progress": asdict(self.progress), "ranks": parts, "args": flags, "config": config,
            }  # fmt: skip
            torch.save(whole, buffer)
        return bytearray(buffer.getbuffer())

    def models(self) -> list[nn.Module]:
        return [model for model in (self.net, self.ema) if model is not None]

    def restore(self, saved: dict[str, Any], opt: str, label_names: list[str], where: str) -> None:
        """Take all of it from a checkpoint; options such as --weight-decay stay ours.

        Raises:
            UserError: it is of another model, optimizer or data set, or the ranks are not where rank 0 is
        """
        theirs = saved["config"]["label_names"]
        if theirs != label_names:
            differing = next((pair for pair in zip(theirs, label_names) if pair[0] != pair[1]), None)
            what = "{} and not {}".format(*differing) if differing else f"{len(theirs)} and not {len(label_names)}"
            raise UserError(f"{where} was trained on other classes than --data holds: {what}")
        load_weights(self.net, saved["model"], where)
        if self.ema and saved["ema"]:
            load_weights(self.ema, saved["ema"], where)
        elif self.ema:
            self.ema.load_state_dict(getattr(self.net, "model", self.net).state_dict())
        if saved["args"]["opt"] != opt:
            raise UserError(f"{where} was saved with --opt {saved['args']['opt']}, not {opt}")
        groups, ours = saved["optimizer"]["param_groups"], self.optimizer.param_groups
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in ours]:
            raise UserError(
                f"{where} was saved with other groups of parameters: take the same --weight-decay and --tap"
            )
        for group, now in zip(groups, ours):
            group.update({name: value for name, value in now.items() if name != "params"})
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.progress.__dict__.update(saved["progress"])
        if len(saved["ranks"]) == WORLD_SIZE:
            self.restore_own(saved["ranks"][RANK])
        elif self.progress.step and IS_MAIN:  # the same images in the same order, however many share them
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
        for model, buffers in zip(self.models(), own["buffers"]):  # batch norms see each rank's own images
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])

    def check_agreement(self) -> None:
        """Raise unless every rank goes on from the same place: epoch, step, weights and number of processes."""
        digest = hashlib.sha256()
        for value in self.net.parameters():
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        own = (self.progress.epoch, self.progress.step, digest.hexdigest()[:16], WORLD_SIZE)
        everyone: list[Any] = [own] * WORLD_SIZE
        if WORLD_SIZE > 1:
            dist.all_gather_object(everyone, own, group=Ranks.control)
        for rank, other in enumerate(everyone):
            if other != everyone[0]:
                raise UserError(f"rank {rank} is at epoch, step, weights, processes {other}, rank 0 at {everyone[0]}")


def load_checkpoint(output: Path, older: bool) -> tuple[str, dict[str, Any]] | None:
    """The newest checkpoint of a run, read by rank 0 and sent to all, who need not see the file."""
    found = from_rank_zero(lambda: read_checkpoint(output, older))
    if found is None:
        return None
    file, content = found
    try:
        return str(file), torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds
        raise UserError(f"{file} cannot be read as a checkpoint: {type(error).__name__}") from error


def write_run(output: Path, content: bytearray, others: Sequence[Callable[[], Any]], best: bool) -> None:
    """The other files, then last.pt, so that what a resume starts from knows of them."""
    sealed = seal(content)
    for write in others:
        write()
    write_checkpoint(output, sealed, best)


# ---- as bytes -----------------------------------------------------------------------------------------------------


def seal(content: bytearray) -> bytearray:
    """Append a digest to a zip archive, as its comment: torch.load reads it as before, and no bit changes unseen."""
    comment = len(MARK) + 64
    content[-2:] = comment.to_bytes(2, "little")  # the archive's last field
    return content + MARK + hashlib.sha256(content).hexdigest().encode()


def is_whole(content: bytes) -> bool:
    """Whether the bytes are those that seal() made."""
    body, mark = memoryview(content)[: -len(MARK) - 64], bytes(content[-len(MARK) - 64 :])
    return mark == MARK + hashlib.sha256(body).hexdigest().encode()


def write_checkpoint(folder: Path, content: bytes | bytearray, best: bool = False) -> None:
    """The newest checkpoint; the one before it is kept. best: it is also that of the best epoch."""
    if best:
        write_whole(folder / "best.pt", content)
    write_whole(folder / LAST, content, keep=folder / PREVIOUS)


def read_checkpoint(folder: Path, older: bool = False) -> tuple[Path, bytes] | None:
    """The newest checkpoint of a run; None where there is none. older: take the one before if the newest is damaged.

    Raises:
        UserError: it is damaged, or no checkpoint of train.py; what else there is, is named
    """
    files = [file for file in (folder / LAST, folder / PREVIOUS) if file.exists()]
    damaged: list[Path] = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file} cannot be read: {error.strerror}") from error
        if is_whole(content):
            if damaged and not older:
                raise UserError(f"{damaged[0]} is damaged or no checkpoint of train.py; {file} is whole: "
                                f"--resume auto takes it")  # fmt: skip
            return file, content
        damaged.append(file)
    if damaged:
        names = " and ".join(map(str, damaged))
        raise UserError(f"{names}: damaged, or no checkpoint of train.py; --overwrite starts anew")
    return None
