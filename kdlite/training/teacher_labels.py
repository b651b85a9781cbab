"""A teacher's answers, stored once and trained from many times: train.py --write-labels and --teacher-labels.

A view is a training image as one epoch crops and flips it. What is drawn for it depends on a seed, the view's number
and the image's alone, so that a student sees the images again that the teacher saw. A folder of labels holds

    labels.json          what the answers are of: files, transform, seed, teacher, k, views
    000-00000000.npy     view 0, from image 0 on, up to 16,384 rows: log T_t of the label, float32; the k largest of
    000-00016384.npy     the other classes: log T_i, float16; which they are, uint16 or int32 (fields target, logprobs,
                         indices). Then the CRC-32 of all that, 4 bytes, least significant first, which numpy ignores

A log-probability of -inf is no class; a whole row of them is an image that could not be read, which is then left out,
and counted, in training too. Needs torch; knows no model.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deploy.cli import UserError, write_whole
from deploy.config import check_fields, is_count, read_json
from deploy.preprocess import UnreadableImage
from deploy.run_directory import locked
from kdlite.training.distributed import IS_MAIN, RANK, WORLD_SIZE, Ranks, StopRequest, from_rank_zero
from kdlite.training.loading import CorruptCount, Samples, data_loader, image_progress

HEADER = "labels.json"
ROWS = 2**14  # of a file: what a writer that is stopped loses at most

# What must agree where a student trains from labels, and what labels.json calls it.
OF_IMAGES = {"images": "number of training images", "files": "digest of their names and classes", "classes": "classes",
             "view": "transform", "draws": "how a view is drawn from its seed"}  # fmt: skip
OF_TEACHER = {"teacher": "teacher", "seed": "seed of the views", "views": "number of views", "k": "k"}
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "images": (lambda x: is_count(x, 10**10), "a number from 1 on"),
    "files": (lambda x: isinstance(x, str), "a digest"),
    "classes": (lambda x: is_count(x, 2**31 - 1) and x > 1, "a number from 2 on"),
    "view": (lambda x: isinstance(x, dict), "a dictionary"),
    "draws": (lambda x: isinstance(x, str), "a formula"),
    "teacher": (lambda x: isinstance(x, dict) and {"name", "digest"} <= x.keys(), "a dictionary with name and digest"),
    "seed": (lambda x: is_count(x) or x == 0, "a number from 0 on"),
    "views": (lambda x: is_count(x, 10**5), "a number from 1 to 100,000"),
    "k": (lambda x: is_count(x, 10**5), "a number from 1 on"),
}
DRAWS = "((seed * 1000003 + view) * images + index) % 2**63, torch.manual_seed"


def row_type(k: int, classes: int) -> np.dtype[Any]:
    index = "<u2" if classes <= 2**16 else "<i4"
    return np.dtype([("target", "<f4"), ("logprobs", "<f2", (k,)), ("indices", index, (k,))])


def describe_images(source: Any, label_names: list[str], view: dict[str, Any]) -> dict[str, Any]:
    """The fields of labels.json that the images and their transform give."""
    names = source.files() if hasattr(source, "files") else map(str, range(len(source)))
    digest = hashlib.sha256()
    for name, target in zip(names, source.targets):
        digest.update(f"{name}\0{label_names[int(target)]}\n".encode())
    return {"images": len(source), "files": digest.hexdigest(), "classes": len(label_names), "view": view,
            "draws": DRAWS}  # fmt: skip


def digest_of(model: nn.Module) -> str:
    """Of the weights and buffers, whatever device they are on."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def read_header(folder: Path) -> dict[str, Any]:
    file = folder / HEADER
    try:
        header = read_json(file.read_bytes(), file)
    except OSError as error:
        reason = f"{error.strerror}: {HEADER}"
        raise UserError(f"no teacher's labels in {folder}: {reason}; --write-labels makes them") from error
    check_fields(header, FIELDS, str(file))
    return header


def compare(folder: Path, header: dict[str, Any], ours: dict[str, Any], fields: dict[str, str]) -> None:
    """Raise at the first field that differs from what this run has."""
    for name, words in fields.items():
        theirs, mine = header[name], ours[name]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            words += "".join(f", {key}" for key in differing)
            theirs, mine = ({key: values.get(key) for key in differing} for values in (theirs, mine))
        if theirs != mine:
            raise UserError(f"the labels in {folder} are of another {words}: {theirs} there, {mine} here")


class StoredLabels:
    """(view, index) -> log T_t, log T_i (k,) and indices (k,), read from the files as they are asked for."""

    def __init__(self, folder: Path, ours: dict[str, Any]) -> None:
        """ours: what describe_images says of this run's images.

        Raises:
            UserError: no labels, of other images or another transform, or not all of them
        """
        self.folder, self.header = folder, read_header(folder)
        compare(folder, self.header, ours, OF_IMAGES)
        self.seed, self.views = self.header["seed"], self.header["views"]
        self.dtype = row_type(self.header["k"], self.header["classes"])
        self.files: dict[tuple[int, int], np.ndarray] = {}  # of the view that was asked for last
        missing = from_rank_zero(
            lambda: [p.name for p in parts(self.header) if not is_whole(folder / p.name, self.dtype, p.rows)]
        )
        if missing:
            raise UserError(
                f"{len(missing)} files of labels are missing or not whole in {folder}, the first is {missing[0]}: "
                "the same --write-labels goes on"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"files": {}}  # each process opens its own

    def __call__(self, view: int, index: int) -> tuple[Tensor, ...]:
        start = index // ROWS * ROWS
        if (view, start) not in self.files:
            self.files = {key: file for key, file in self.files.items() if key[0] == view}
            self.files[view, start] = np.load(self.folder / file_name(view, start), mmap_mode="r")
        row = self.files[view, start][index - start]
        if row["target"] == -np.inf and not np.isfinite(row["logprobs"]).any():
            raise UnreadableImage("it could not be read when its labels were written")
        return (
            torch.tensor(float(row["target"])),
            torch.from_numpy(row["logprobs"].astype(np.float32)),
            torch.from_numpy(row["indices"].astype(np.int64)),
        )

    def __str__(self) -> str:
        k, views, teacher = (self.header[name] for name in ("k", "views", "teacher"))
        return f"{teacher['name']} ({teacher['digest'][:8]}), top-{k} of {views} views drawn from seed {self.seed}"


def file_name(view: int, start: int) -> str:
    return f"{view:03}-{start:08}.npy"


class Part(NamedTuple):
    """A file, and what its rows are of."""

    view: int
    start: int  # its first image
    rows: int

    @property
    def name(self) -> str:
        return file_name(self.view, self.start)


def parts(header: dict[str, Any]) -> Iterator[Part]:
    for view in range(header["views"]):
        for start in range(0, header["images"], ROWS):
            yield Part(view, start, min(ROWS, header["images"] - start))


class Keys:
    """(view, index) of each row of some files: what a DataLoader samples."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(part.rows for part in self.parts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((part.view, part.start + i) for part in self.parts for i in range(part.rows))


def is_whole(file: Path, dtype: np.dtype[Any], rows: int) -> bool:
    """Whether these rows are there, as they were written."""
    try:
        content = file.read_bytes()
        array = np.load(io.BytesIO(content))
        return array.dtype == dtype and array.shape == (rows,) and content[-4:] == checksum(content[:-4])
    except Exception:  # whatever numpy raises of a file that is damaged
        return False


def checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


class Position:
    """In place of stored labels where they are written: which view and image a sample is."""

    def __init__(self, seed: int, views: int) -> None:
        self.seed, self.views = seed, views

    def __call__(self, view: int, index: int) -> tuple[Tensor, ...]:
        return (torch.tensor([view, index]),)


@contextmanager
def begin_labels(folder: Path, header: dict[str, Any]) -> Iterator[None]:
    """Make the folder and hold it, or raise where it has labels of something else, or another writer."""
    with ExitStack() as at_the_end:

        def begin() -> None:
            check_fields(header, FIELDS, str(folder / HEADER))
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make {folder}: {error.strerror}") from error
            at_the_end.enter_context(locked(folder))
            if (folder / HEADER).exists():
                compare(folder, read_header(folder), header, OF_IMAGES | OF_TEACHER)
            else:
                write_whole(folder / HEADER, json.dumps(header, indent=1))

        from_rank_zero(begin)
        yield


def write_labels(
    folder: Path, header: dict[str, Any], source: Any, view: Callable[..., Tensor],
    ask: Callable[[Tensor, Tensor], tuple[Tensor, ...]], batch_size: int, workers: int | None, pin_memory: bool,
    images_per_s: float | None, stop: StopRequest,
) -> bool:  # fmt: skip
    """Ask the teacher about every view of every image, a share of the files each rank; False: a rank was asked to stop.

    Files that are there and whole stay as they are: so a writer goes on that was stopped.

    Args:
        view: opened PIL image -> uint8 (C, H, W), with what is drawn for it
        ask: (images uint8 (B, C, H, W), labels (B,)) -> log T_t (B,), log T_i (B, k), indices (B, k)
        images_per_s: what the processes of this run were seen to do, for the time that is said
    """
    dtype = row_type(header["k"], header["classes"])
    # asked of one process alone: the others may write already
    todo = from_rank_zero(lambda: [p for p in parts(header) if not is_whole(folder / p.name, dtype, p.rows)])
    rows, rows_in_all = sum(part.rows for part in todo), header["images"] * header["views"]
    if IS_MAIN:
        minutes = f", about {rows / images_per_s / 60:.0f} min" if images_per_s else ""
        there = f", {rows_in_all - rows} there already" if rows < rows_in_all else ""
        print(f"labels of {rows_in_all} views ({header['images']} images x {header['views']}){there}: "
              f"{rows_in_all * dtype.itemsize / 1e6:.1f} MB{minutes}", flush=True)  # fmt: skip
    mine = todo[RANK::WORLD_SIZE]
    dataset = Samples(source, view, stored=Position(header["seed"], header["views"]))
    corrupt, seen, done = CorruptCount("training", header["images"]), 0, 0
    ends, files = list(itertools.accumulate(part.rows for part in mine)), dict[tuple[int, int], np.ndarray]()
    loader = data_loader(dataset, Keys(mine), batch_size, workers, pin_memory)
    for batch in image_progress(loader, "ask the teacher", rows):
        corrupt.add(batch.corrupt)
        seen += len(batch.corrupt)
        if batch.images is not None:
            positions: Any = batch.beside[0].tolist()
            seen += len(positions)
            answers = [x.cpu().numpy() for x in ask(batch.images, batch.labels)]
            check_answers(answers[0], answers[1], answers[2], header["classes"])
            for (number, index), *row in zip(positions, *answers):
                start = index // ROWS * ROWS
                if (number, start) not in files:
                    files[number, start] = nothing_known(min(ROWS, header["images"] - start), dtype)
                files[number, start][index - start] = tuple(row)
        while done < len(ends) and seen >= ends[done]:
            part = mine[done]
            content = io.BytesIO()
            np.save(content, files.pop((part.view, part.start), nothing_known(part.rows, dtype)))
            write_whole(folder / part.name, content.getvalue() + checksum(content.getvalue()))
            done += 1
        if stop.name:
            break
    whole = torch.tensor(done == len(ends), dtype=torch.int32)
    if WORLD_SIZE > 1:  # one may have a file less than another, and waits for it
        dist.all_reduce(whole, dist.ReduceOp.MIN, group=Ranks.control)
    return bool(whole)


def check_answers(log_t: np.ndarray, top: np.ndarray, indices: np.ndarray, classes: int) -> None:
    """Raise unless they are log-probabilities of classes; NaN is none."""
    with np.errstate(over="ignore"):
        together = np.exp(log_t.astype(np.float64)) + np.exp(top.astype(np.float64)).sum(1)
    if not (together <= 1.01).all() or not ((indices >= 0) & (indices < classes)).all():
        raise UserError(
            f"the teacher's answers are no probabilities of {classes} classes, which sum to {together.max():.4g} in an "
            "image: of NaN the cause may be --amp, which --amp off leaves out"
        )


def nothing_known(rows: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Of images that cannot be read: no class has a probability."""
    file = np.zeros(rows, dtype)
    file["target"] = file["logprobs"] = -np.inf
    return file
