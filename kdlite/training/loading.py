"""Load batches of images from workers or from the device's memory; normalise and mix them on the device.

The random numbers of each image (of each batch with --cache device) have their own seed. So the images of a run depend
on its seed and epoch, but not on the number of workers or on the step at which a run resumes.
"""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from deploy.cli import ProgressBar, UserError, printable
from deploy.config import Metadata
from deploy.preprocess import RESAMPLING, UnreadableImage, prepare, resize, to_rgb, upright_size
from deploy.reference import evenly
from kdlite.training.data import Digits, Fold
from kdlite.training.distributed import IS_MAIN, RANK, STOP_SIGNALS, WORLD_SIZE, start_fork_server

Transform = Callable[[Image.Image], Tensor]

# ---- from an opened image to a tensor -----------------------------------------------------------------------------


def eval_view(image: Image.Image, metadata: Metadata) -> Tensor:
    """Return an opened image as uint8 (C, H, W), prepared as a student's config.json describes; not normalised."""
    return torch.from_numpy(prepare(image, metadata).copy()).permute(2, 0, 1)


@dataclass(frozen=True)
class View:
    """Describe the random transform of a training image. The class Augment later erases and mixes whole batches."""

    input_size: Sequence[int]  # (channels, H, W)
    crop: str  # resized, pad or none
    hflip: float  # probability
    interpolation: str
    randaugment: Sequence[int] | None = None  # operations and magnitude

    def transform(self) -> v2.Transform:
        """Return the transform: opened image -> augmented uint8 (C, H, W)."""
        mode = v2.InterpolationMode(self.interpolation)
        channels, *size = self.input_size
        height, width = size
        if self.crop == "resized":
            steps: list[Any] = [RandomResizedCrop(size, interpolation=mode)]
        else:
            steps = [functools.partial(to_rgb, needed=(width, height))]
            steps += [functools.partial(resize, size=(width, height), interpolation=self.interpolation)]
        if self.crop == "pad":
            steps += [v2.RandomCrop(size, padding=(width // 8, height // 8))]
        if self.hflip:
            steps += [v2.RandomHorizontalFlip(self.hflip)]
        if self.randaugment and self.randaugment[0]:
            steps += [v2.RandAugment(*self.randaugment, interpolation=mode)]
        return v2.Compose([*steps, *[v2.Grayscale()] * (channels == 1), v2.PILToTensor()])

    def describe(self) -> dict[str, Any]:
        """Return the settings of the transform; H and W are among them only if the crop depends on them."""
        size = list(self.input_size) if self.crop == "pad" else list(self.input_size[:1])
        settings = {"crop": self.crop, "hflip": self.hflip, "randaugment": self.randaugment or [0, 0]}
        return settings | {"interpolation": self.interpolation, "size": size}


class RandomResizedCrop(v2.RandomResizedCrop):
    """Crop as torchvision does, but decode a large JPEG only at the resolution that the crop needs."""

    def forward(self, image: Image.Image) -> Image.Image:
        whole_width, whole_height = upright_size(image)
        upright = torch.empty(1, whole_height, whole_width, device="meta")  # EXIF may swap height and width
        top, left, height, width = self.make_params([upright]).values()
        image = to_rgb(image, (self.size[1] * whole_width / width, self.size[0] * whole_height / height))
        if image.size == (whole_width, whole_height):
            return v2.functional.resized_crop(image, top, left, height, width, self.size, self.interpolation)
        x, y = image.width / whole_width, image.height / whole_height
        box = left * x, top * y, min((left + width) * x, image.width), min((top + height) * y, image.height)
        return image.resize((self.size[1], self.size[0]), RESAMPLING[self.interpolation.value], box)


# ---- samples and batches ------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Hold a batch, or one sample without the dimension B."""

    images: Any  # uint8 (B, C, H, W), later normalised float; None if no image of the batch could be read
    labels: Any  # class indices (B,); class probabilities (B, classes) after mixup or cutmix
    corrupt: list[tuple[str, str]]  # name and reason for each image that cannot be read
    teacher: tuple[Tensor, ...] = ()  # a teacher's stored labels


class Samples(Dataset):
    """Return the sample of (epoch, index).

    With stored labels the seed is theirs, and the images repeat after as many epochs as there are stored views.
    """

    def __init__(self, source: Any, transform: Transform, seed: int = 0, stored: Any = None) -> None:
        self.source, self.transform, self.stored = source, transform, stored
        self.seed = stored.seed if stored else seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Batch:
        epoch, index = key
        epoch = epoch % self.stored.views if self.stored else epoch
        number, count = index, len(self)
        if isinstance(self.source, Fold):
            number, count = self.source.indices[index], len(self.source.dataset)  # type: ignore[arg-type]
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(((self.seed * 1_000_003 + epoch) * count + number) % 2**63)
        try:
            image, label = self.source[index]
            return Batch(self.transform(image), label, [], self.stored(epoch, number) if self.stored else ())
        except UnreadableImage as error:
            samples = getattr(self.source, "samples", None)
            return Batch(None, None, [(str(samples[index][0]) if samples else f"sample {index}", str(error))])
        finally:
            torch.set_rng_state(state)


class EpochSampler(DistributedSampler):
    """Yield (epoch, index) instead of index, because the seed of an augmentation depends on both."""

    start = 0  # number of this rank's samples before the step at which a run resumes

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        super().set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Any:
        return ((self.epoch, index) for index in itertools.islice(super().__iter__(), self.start, None))


def collate(samples: list[Batch]) -> Batch:
    corrupt = [unreadable for sample in samples for unreadable in sample.corrupt]
    whole = [sample for sample in samples if sample.images is not None]
    if not whole:
        return Batch(None, None, corrupt)
    images, labels, _, answers = zip(*whole)
    return Batch(torch.stack(images), torch.tensor(labels), corrupt, tuple(map(torch.stack, zip(*answers))))


def train_loader(
    source: Any, transform: Transform, batch_size: int, seed: int, workers: int | None, pin_memory: bool, stored: Any
) -> DataLoader:
    """Return batches of this rank's shuffled images, without an incomplete last one. stored: a teacher's labels."""
    dataset = Samples(source, transform, seed, stored)
    sampler = EpochSampler(dataset, WORLD_SIZE, RANK, seed=seed, drop_last=True)
    return data_loader(dataset, sampler, batch_size, workers, pin_memory, drop_last=True)


def eval_loader(
    source: Any, transform: Transform, batch_size: int, workers: int | None, pin: bool = False, most: int | None = None
) -> DataLoader:
    """Return batches of all samples, or of `most` evenly spaced samples; each sample is on exactly one rank."""
    indices = evenly(len(source), most or len(source))[RANK::WORLD_SIZE]
    return data_loader(Samples(source, transform), [(0, index) for index in indices], batch_size, workers, pin)


def data_loader(
    dataset: Samples, sampler: Any, batch_size: int, workers: int | None, pin_memory: bool, drop_last: bool = False
) -> DataLoader:
    """Return batches of the sampler's samples. workers: data loading processes; None: one per core (Digits: 0)."""
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        own = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = 0 if isinstance(getattr(dataset.source, "dataset", dataset.source), Digits) else own
    options: dict[str, Any] = {"pin_memory": pin_memory, "drop_last": drop_last, "collate_fn": collate}
    # without its own generator, the loader changes the random state that --resume restores
    options["generator"] = torch.Generator()
    if workers:
        options |= {"persistent_workers": True, "worker_init_fn": start_worker}
        options |= {"multiprocessing_context": start_fork_server(), "num_workers": workers}
    return DataLoader(dataset, batch_size, sampler=sampler, **options)


def start_worker(_worker: int) -> None:
    """Ignore signals to the whole job, and end with the training process.

    A worker's parent is the fork server, which remains while it has workers, even if the run is killed. So a thread of
    each worker waits for the end of the training process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # replaces a handler that torch has set
    threading.Thread(target=wait_for_parent, daemon=True).start()


def wait_for_parent() -> None:
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)


class DeviceLoader:
    """Return batches of images that are decoded once and stored in the device's memory (--cache device).

    Each process has its share of the data set, every WORLD_SIZE-th image. In training (with a view) the share is
    shuffled, and each image gets its own crop and flip. The random numbers depend only on seed, epoch, batch and rank,
    so a resumed run repeats them. decoded: a loader of the images without crop and flip
    """

    def __init__(
        self, decoded: DataLoader, batch_size: int, device: torch.device, view: View | None = None, seed: int = 0
    ) -> None:
        self.batch_size, self.view, self.seed = batch_size, view, seed
        batches = list(image_progress(decoded, "decode"))
        self.corrupt = [unreadable for batch in batches for unreadable in batch.corrupt]
        whole = [batch for batch in batches if batch.images is not None]
        if not whole:
            raise UserError(f"--cache device: all images are unreadable; the first is {self.corrupt[0][0]}")
        self.images, self.labels = (torch.cat(tensors).to(device) for tensors in list(zip(*whole))[:2])
        self.count, self.share = len(self.labels), len(decoded.dataset) // WORLD_SIZE  # type: ignore
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.share // self.batch_size if self.view else math.ceil(self.count / self.batch_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[Batch]:
        device, seed = self.images.device, (self.seed * 1_000_003 + self.epoch) * WORLD_SIZE + RANK
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.arange(self.count, device=device)
        # every rank needs the same number of batches, so readable images repeat to fill the gaps
        if self.view:
            shuffled = torch.randperm(self.count, generator=generator, device=device)
            order = shuffled[torch.arange(len(self) * self.batch_size, device=device) % self.count]
        batches = order.split(self.batch_size)
        for i in range(self.start // self.batch_size, len(batches)):
            images = self.images[batches[i]]
            generator.manual_seed((seed * 1_000_003 + i + 1) % 2**63)
            if self.view:
                images = crop_and_flip(images, self.view.crop, self.view.hflip, generator)
            yield Batch(images, self.labels[batches[i]], self.corrupt)


def crop_and_flip(images: Tensor, crop: str, hflip: float, generator: torch.Generator) -> Tensor:
    """Crop (pad or none) and flip each image of a uint8 (B, C, H, W) batch on its device."""
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


# ---- on the device ------------------------------------------------------------------------------------------------


class ToDevice:
    """Copy a batch of uint8 (B, C, H, W) images to the device, and normalise its images there."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.device = device
        self.mean, self.std = (255 * torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))

    def __call__(self, batch: Batch) -> Batch:
        assert batch.images is not None
        images = self.normalise(batch.images)
        labels, *teacher = (x.to(self.device, non_blocking=True) for x in (batch.labels, *batch.teacher))
        return batch._replace(images=images, labels=labels, teacher=tuple(teacher))

    def normalise(self, images: Tensor) -> Tensor:
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return (images.float() - self.mean) / self.std

    def undo(self, images: Tensor) -> Any:
        """Return normalised images, (B, C, H, W), as a uint8 array, (B, H, W, C)."""
        pixels = (images * self.std + self.mean).round().clamp(0, 255)
        return pixels.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


class Augment:
    """Augment a normalised batch on the device: random erasing, then mixup or cutmix, which make the labels soft."""

    def __init__(self, erasing: float, mixup: float, cutmix: float, num_classes: int, device: torch.device) -> None:
        self.erase = RandomErasing(erasing, mode="pixel", device=device) if erasing else None
        mixers = [mixer(alpha=a, num_classes=num_classes) for mixer, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
        self.mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, batch: Batch) -> Batch:
        images, labels = self.erase(batch.images) if self.erase else batch.images, batch.labels
        if self.mix:
            images, labels = self.mix(images, labels)
        return batch._replace(images=images, labels=labels)


# ---- images that cannot be read, and progress ---------------------------------------------------------------------


class CorruptCount:
    """Print each unreadable image once; raise UserError if they are two or more, and more than 1 % of a part."""

    def __init__(self, part: str, total: int) -> None:
        self.part, self.total, self.seen = part, total, set[str]()

    def report(self, batch: Batch) -> None:
        for name, reason in batch.corrupt:
            if name in self.seen:
                continue
            self.seen.add(name)
            count = len(self.seen)
            line = f"skipped a corrupt image ({count} so far in {self.part}): {name}: {reason}"
            print(printable(line), file=sys.stderr)
            if count > max(1, 0.01 * self.total):
                share = f"{count} of {self.total} {self.part} images cannot be read, more than 1 %"
                raise UserError(f"{share}: repair or remove them; the last one is {name}")


def image_progress(loader: Any, label: str, total: int | None = None, each: int = 0, first: int = 0) -> ProgressBar:
    """Return the loader with a progress bar on rank 0 that counts images of all ranks. each: images in a batch."""
    each = WORLD_SIZE * (each or getattr(loader, "batch_size", None) or 1)
    if total is None and hasattr(loader, "sampler"):
        total = WORLD_SIZE * len(loader.sampler)
    return ProgressBar(loader, label, total, each, first, "images", IS_MAIN)


def epoch_batches(batches: Any, epoch: int, first: int, last: int) -> ProgressBar:
    """Return the batches of an epoch from `first` until before `last`, with a progress bar."""
    each = batches.batch_size
    getattr(batches, "sampler", batches).set_epoch(epoch, first * each)
    chosen = itertools.islice(batches, last - first)
    return image_progress(chosen, f"epoch {epoch + 1}", last * each * WORLD_SIZE, each, first)
