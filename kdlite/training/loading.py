"""How images reach a process that trains or evaluates: from workers, or kept in the device's memory. Needs torch.

Every sample's augmentation has a seed of its own: what a run sees depends on its seed and its epoch, neither on the
workers nor on where a resume began.
"""

from __future__ import annotations

import functools
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
from torchvision.transforms import v2

from deploy.cli import ProgressBar, UserError
from deploy.config import Metadata
from deploy.preprocess import RESAMPLING, UnreadableImage, prepare, to_rgb, upright_size
from kdlite.training.data import Digits
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE


def eval_view(image: Image.Image, metadata: Metadata) -> Tensor:
    """Opened PIL image -> uint8 (C, H, W) as a student's config.json says; normalisation comes after, on the device."""
    return torch.from_numpy(prepare(image, metadata).copy()).permute(2, 0, 1)


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, of an image that is not decoded yet: of a large JPEG no more is decoded than the crop needs."""

    def forward(self, image: Image.Image) -> Image.Image:
        whole_width, whole_height = upright_size(image)
        upright = torch.empty(1, whole_height, whole_width, device="meta")  # the file may lie on its side
        top, left, height, width = self.make_params([upright]).values()
        image = to_rgb(image, (self.size[1] * whole_width / width, self.size[0] * whole_height / height))
        if image.size == (whole_width, whole_height):
            return v2.functional.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        x, y = image.width / whole_width, image.height / whole_height
        box = left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)
        return image.resize((self.size[1], self.size[0]), RESAMPLING[self.interpolation.value], box)


def train_view(
    input_size: Sequence[int], crop: str, hflip: float, interpolation: str, randaugment: Any = None
) -> v2.Transform:
    """Opened PIL image -> augmented uint8 (C, H, W). What can be done to whole batches is done on the device."""
    mode = v2.InterpolationMode(interpolation)
    channels, height, width = input_size
    if crop == "resized":
        steps: list[Any] = [RandomResizedCrop((height, width), interpolation=mode)]
    else:
        steps = [functools.partial(to_rgb, needed=(width, height)), v2.Resize((height, width), interpolation=mode)]
    if crop == "pad":
        steps += [v2.RandomCrop((height, width), padding=(width // 8, height // 8))]
    if hflip:
        steps += [v2.RandomHorizontalFlip(hflip)]
    if randaugment and randaugment[0]:
        steps += [v2.RandAugment(*randaugment, interpolation=mode)]
    return v2.Compose([*steps, *[v2.Grayscale()] * (channels == 1), v2.PILToTensor()])


def describe_view(
    input_size: Sequence[int], crop: str, hflip: float, interpolation: str, randaugment: Any = None
) -> dict[str, Any]:
    """What decides which view of an image train_view draws: not its size, unless the size decides what is cropped."""
    size = list(input_size) if crop == "pad" else input_size[:1]
    return {"crop": crop, "hflip": hflip, "randaugment": randaugment or [0, 0], "interpolation": interpolation,
            "size": list(size)}  # fmt: skip


Corrupt = tuple[str, str]  # the name of an image that cannot be read, and why


class Sample(NamedTuple):
    image: Tensor | None  # uint8 (C, H, W); None where it cannot be read
    label: int
    corrupt: Corrupt | None
    beside: tuple[Tensor, ...] = ()  # what a teacher's stored labels say of it


class Samples(Dataset):
    """(epoch, index) -> Sample.

    Each sample's augmentation has a seed of its own, so it depends neither on the worker nor on the rank, and a resumed
    run sees the same images. With stored labels (teacher_labels.py) the seed and the views are theirs, again and again.
    """

    def __init__(self, source: Any, view: Callable[[Image.Image], Tensor], seed: int = 0, stored: Any = None) -> None:
        self.source, self.view, self.stored = source, view, stored
        self.seed = stored.seed if stored else seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        epoch = epoch % self.stored.views if self.stored else epoch
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * len(self) + index) % 2**63)
        try:
            image, label = self.source[index]
            return Sample(self.view(image), label, None, self.stored(epoch, index) if self.stored else ())
        except UnreadableImage as error:
            samples = getattr(self.source, "samples", None)
            return Sample(None, -1, (str(samples[index][0]) if samples else f"sample {index}", str(error)))
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
    beside: tuple[Tensor, ...] = ()


def collate(samples: list[Sample]) -> Batch:
    corrupt = [sample.corrupt for sample in samples if sample.corrupt]
    whole = [sample for sample in samples if sample.image is not None]
    if not whole:
        return Batch(None, None, corrupt)
    beside = tuple(torch.stack(values) for values in zip(*(sample.beside for sample in whole)))
    images = torch.stack([sample.image for sample in whole if sample.image is not None])
    return Batch(images, torch.tensor([sample.label for sample in whole]), corrupt, beside)


def make_loader(
    source: Any, view: Callable[[Image.Image], Tensor], batch_size: int, train: bool, seed: int = 0,
    workers: int | None = None, pin_memory: bool = False, indices: Sequence[int] | None = None, stored: Any = None,
) -> DataLoader:  # fmt: skip
    """Training: each rank a part of the shuffle, whole batches only. Evaluation: each sample on exactly one rank.

    indices: evaluate on these alone
    stored: a teacher's labels, of Samples
    """
    dataset = Samples(source, view, seed, stored)
    sampler: Any = [(0, index) for index in (indices or range(len(dataset)))[RANK::WORLD_SIZE]]
    if train:
        sampler = EpochSampler(dataset, WORLD_SIZE, RANK, seed=seed, drop_last=True)
    return data_loader(dataset, sampler, batch_size, workers, pin_memory, drop_last=train)


def data_loader(
    dataset: Samples, sampler: Any, batch_size: int, workers: int | None, pin_memory: bool, drop_last: bool = False
) -> DataLoader:
    """Batches of what the sampler names; where ``workers`` is None, by as many processes as this one has cores."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = 0 if isinstance(dataset.source, Digits) else own
    context = None
    if workers:  # processes that come from a clean one: forks of this one may hang on the locks its threads held
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["timm", "torchvision"])
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=drop_last,
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
        batches = list(image_progress(decoded, "decode"))
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


def image_progress(loader: Any, what: str, total: int | None = None, each: int = 0, first: int = 0) -> ProgressBar:
    """How far the first process is, in images of all processes; each: of its batch, where the loader does not say."""
    each = WORLD_SIZE * (each or getattr(loader, "batch_size", None) or 1)
    if total is None and hasattr(loader, "sampler"):
        total = WORLD_SIZE * len(loader.sampler)
    return ProgressBar(loader, what, total, each, first, "images", IS_MAIN)
