"""How images reach a process that trains or evaluates: from workers, or kept in the device's memory. Needs torch.

Every sample's augmentation has a seed of its own: what a run sees depends on its seed and its epoch, neither on the
workers nor on where a resume began.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from tqdm import tqdm

from deploy.cli import UserError
from deploy.datasets import Digits
from deploy.preprocess import UnreadableImage, prepare
from deploy.ranks import IS_MAIN, RANK, WORLD_SIZE


def eval_view(image: Image.Image, config: dict[str, Any]) -> Tensor:
    """Opened PIL image -> uint8 (C, H, W) as a student's config.json says; normalisation comes after, on the device."""
    return torch.from_numpy(prepare(image, config).copy()).permute(2, 0, 1)


Corrupt = tuple[str, str]  # the name of an image that cannot be read, and why


class Samples(Dataset):
    """(epoch, index) -> (uint8 (C, H, W), class index, None), or (None, -1, Corrupt).

    Each sample's augmentation has a seed of its own, so it depends neither on the worker nor on the rank, and a resumed
    run sees the same images.
    """

    def __init__(self, source: Any, view: Callable[[Image.Image], Tensor], seed: int = 0) -> None:
        self.source, self.view, self.seed = source, view, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, Corrupt | None]:
        epoch, index = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * len(self) + index) % 2**63)
        try:
            image, label = self.source[index]
            return self.view(image), label, None
        except UnreadableImage as error:
            samples = getattr(self.source, "samples", None)
            return None, -1, (str(samples[index][0]) if samples else f"sample {index}", str(error))
        finally:
            torch.set_rng_state(state)


class EpochSampler(DistributedSampler):
    """DistributedSampler that hands the epoch on with each index, for the seed of the sample's augmentation."""

    start = 0  # samples of this rank that a resumed epoch has had

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Any:
        return ((self.epoch, index) for index in itertools.islice(super().__iter__(), self.start, None))


class Batch(NamedTuple):
    images: Tensor | None  # uint8 (B, C, H, W); None when not one of the batch could be read
    labels: Tensor | None
    corrupt: list[Corrupt]


def collate(samples: list[tuple[Tensor | None, int, Corrupt | None]]) -> Batch:
    corrupt = [unreadable for _, _, unreadable in samples if unreadable]
    images = [image for image, _, _ in samples if image is not None]
    labels = torch.tensor([label for image, label, _ in samples if image is not None])
    return Batch(torch.stack(images), labels, corrupt) if images else Batch(None, None, corrupt)


def make_loader(
    source: Any, view: Callable[[Image.Image], Tensor], batch_size: int, train: bool, seed: int = 0,
    workers: int | None = None, pin_memory: bool = False, indices: Sequence[int] | None = None,
) -> DataLoader:  # fmt: skip
    """Training: each rank a part of the shuffle, whole batches only. Evaluation: each sample on exactly one rank.

    indices: evaluate on these alone
    """
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if isinstance(source, Digits) else max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dataset = Samples(source, view, seed)
    sampler: Any = [(0, index) for index in (indices or range(len(dataset)))[RANK::WORLD_SIZE]]
    if train:
        sampler = EpochSampler(dataset, WORLD_SIZE, RANK, seed=seed, drop_last=True)
    context = None
    if workers:  # processes that come from a clean one: forks of this one may hang on the locks its threads held
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["timm", "torchvision"])
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=train,
        pin_memory=pin_memory, persistent_workers=workers > 0, multiprocessing_context=context,
        worker_init_fn=end_with_the_training_process,
        generator=torch.Generator(),  # else starting workers would draw from the state that --resume restores
    )  # fmt: skip


def end_with_the_training_process(_worker: int) -> None:
    """Workers watch their parent, here the fork server, which waits for them: without this a killed run's stay."""

    def wait() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class DeviceLoader:
    """Batches of images that were decoded once and are kept in the device's memory (--cache device).

    Each process has its share of the data set, every WORLD_SIZE-th image. In training the share is shuffled, and each
    image cropped and flipped by itself; what is drawn depends on seed, epoch and rank alone, so that a resume agrees.
    """

    def __init__(
        self, decoded: DataLoader, batch_size: int, device: torch.device, train: bool, seed: int = 0,
        crop: str = "none", hflip: float = 0.0,
    ) -> None:  # fmt: skip
        self.batch_size, self.train, self.seed, self.crop, self.hflip = batch_size, train, seed, crop, hflip
        batches = list(progress_bar(decoded, "decode"))
        self.corrupt = [unreadable for batch in batches for unreadable in batch.corrupt]
        whole = [batch for batch in batches if batch.images is not None]
        if not whole:
            raise UserError(f"--cache device: not one image could be read, the first is {self.corrupt[0][0]}")
        self.images, self.labels = (torch.cat([batch[i] for batch in whole]).to(device) for i in (0, 1))  # type: ignore
        self.count, self.share = len(self.labels), len(decoded.dataset) // WORLD_SIZE  # type: ignore
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.share // self.batch_size if self.train else math.ceil(self.count / self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        device, seed = self.images.device, (self.seed * 1_000_003 + self.epoch) * WORLD_SIZE + RANK
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.arange(self.count, device=device)
        if self.train:  # every rank needs as many batches: for unreadable images others come twice
            shuffled = torch.randperm(self.count, generator=generator, device=device)
            order = shuffled[torch.arange(len(self) * self.batch_size, device=device) % self.count]
        batches = order.split(self.batch_size)
        for i in range(self.start // self.batch_size, len(batches)):
            picked = batches[i]
            images = self.images[picked]
            generator.manual_seed((seed * 1_000_003 + i + 1) % 2**63)
            images = crop_and_flip(images, self.crop, self.hflip, generator) if self.train else images
            yield Batch(images, self.labels[picked], self.corrupt)


def crop_and_flip(images: Tensor, crop: str, hflip: float, generator: torch.Generator) -> Tensor:
    """--crop pad or none and --hflip of a uint8 (B, C, H, W) batch on its device, drawn for each image by itself."""
    n, _, height, width = images.shape
    draws = (torch.rand(n, 1, generator=generator, device=images.device) for _ in range(3))
    flip = next(draws) < hflip
    row, column = (torch.arange(side, device=images.device).expand(n, side) for side in (height, width))
    column = torch.where(flip, width - 1 - column, column)
    if crop == "pad":
        pads = height // 8, width // 8
        images = F.pad(images, [pads[1], pads[1], pads[0], pads[0]])
        row, column = (side + ((2 * pad + 1) * draw).long() for side, pad, draw in zip((row, column), pads, draws))
    sample = torch.arange(n, device=images.device).view(n, 1, 1)
    return images[sample, :, row.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2)


class CorruptCount:
    """Names each image that could not be read once, and stops the run when they are more than one in a hundred."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.seen = what, total, set[str]()

    def add(self, corrupt: list[Corrupt]) -> None:
        for name, reason in corrupt:
            if name in self.seen:
                continue
            self.seen.add(name)
            count = len(self.seen)
            print(f"skipped a corrupt image ({count} so far in {self.what}): {name}: {reason}", file=sys.stderr)
            if count > max(1, 0.01 * self.total):
                share = f"{count} of {self.total} {self.what} images cannot be read, more than 1 %"
                raise UserError(f"{share}: mend or remove them; the last one is {name}")


def progress_bar(loader: Any, what: str, total: int | None = None, first: int = 0) -> Any:
    shown = IS_MAIN and sys.stdout.isatty()
    return tqdm(loader, what, total=total, initial=first, leave=False, disable=not shown)
