"""Store a teacher's answers once, and train from them many times: train.py --kd nkd --teacher-labels FOLDER.

    python -m kdlite.training.teacher_labels --data photos/ --teacher resnet50 --output labels/ --views 10
    python train.py --data photos/ --kd nkd --teacher-labels labels/ --model mobilenet_v2

A view is the crop and the flip of every training image in one epoch. The random numbers depend only on the seed, the
number of images, the view and the image, so a student gets the same crops as the teacher. A folder of labels holds

    labels.json          the origin of the answers: files, transform, seed, teacher, k, views
    000-00000000.npy     up to 16,384 rows of view 0, from image 0 on
    000-00016384.npy     the next rows of view 0

The fields of a row are target (float32), log T_t of the label; logprobs (float16), log T_i of the k largest other
classes; indices (uint16 or int32), the indices of those classes. The last 4 bytes of a file are the CRC-32 of the bytes
before them, least significant byte first; numpy.load ignores them. A log-probability of -inf is padding. A row with
-inf everywhere stands for an image that could not be read; training skips that image too.

The command takes train.py's flags for data, model and teacher. Give it the data and model flags of the training that
follows.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shlex
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deploy.cli import UserError, number, read_file, run_command, write_whole
from deploy.config import check_fields, is_count, read_json
from deploy.flags import BY_RECIPE, RECIPES, Flag, Table, read_flags, settle_flags
from deploy.preprocess import UnreadableImage
from deploy.reference import evenly
from deploy.run_directory import locked
from kdlite import Teacher, top_k_logprobs
from kdlite.training import distributed
from kdlite.training.checkpoint import digest_of
from kdlite.training.data import NO_LABEL, Data, open_run
from kdlite.training.distributed import RANK, WORLD_SIZE, StopRequest, from_rank_zero, gather, log
from kdlite.training.loading import Batch, CorruptCount, Samples, ToDevice, Transform, View, data_loader, image_progress
from kdlite.training.teacher_classes import warn_of_teacher
from kdlite.training.weights import load_teacher, open_student

HEADER = "labels.json"
ROWS = 2**14  # rows of a file; a process that stops loses at most these
BATCH = 64  # images in a batch of the teacher
FIRST = 2000  # the teacher's top-1 is printed after this number of labelled images
SAMPLED = 1000  # number of files whose contents the digest in labels.json covers

# The fields that must agree with a student's run, and their names in messages.
OF_IMAGES = {"images": "number of training images", "files": "digest of file names and classes", "classes": "classes"}
OF_IMAGES |= {"view": "transform", "draws": "formula of a view's seed"}
OF_TEACHER = {"teacher": "teacher", "seed": "seed of the views", "views": "number of views", "k": "k"}
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "images": (lambda x: is_count(x, 10**10), "a number of at least 1"),
    "files": (lambda x: isinstance(x, str), "a digest"),
    "classes": (lambda x: is_count(x, 2**31 - 1) and x > 1, "a number of at least 2"),
    "view": (lambda x: isinstance(x, dict), "a dictionary"),
    "draws": (lambda x: isinstance(x, str), "a formula"),
    "teacher": (lambda x: isinstance(x, dict) and {"name", "digest"} <= x.keys(), "a dictionary with name and digest"),
    "seed": (lambda x: is_count(x) or x == 0, "a number of at least 0"),
    "views": (lambda x: is_count(x, 10**5), "a number from 1 to 100,000"),
    "k": (lambda x: is_count(x, 10**5), "a number of at least 1"),
}
DRAWS = "((seed * 1000003 + view) * images + index) % 2**63, torch.manual_seed"
Header = dict[str, Any]  # labels.json
Answers = tuple[Tensor, Tensor, Tensor]  # log T_t (B,), log T_i (B, k), indices (B, k)
Ask = Callable[[Tensor, Tensor], Answers]  # images, uint8 (B, C, H, W), and labels (B,) -> answers


# ---- labels.json --------------------------------------------------------------------------------------------------


def row_type(k: int, classes: int) -> np.dtype[Any]:
    index = "<u2" if classes <= 2**16 else "<i4"
    return np.dtype([("target", "<f4"), ("logprobs", "<f2", (k,)), ("indices", index, (k,))])


def describe_images(data: Data, view: View) -> Header:
    """Return the fields of labels.json that describe the training images and their transform."""
    content = from_rank_zero(digest_of_content, data.before_fold)
    header = {"images": len(data.before_fold), "files": data.digest(data.before_fold), "classes": len(data.label_names)}
    return header | {"content": content, "view": view.describe(), "draws": DRAWS}


def digest_of_content(images: Any) -> str:
    """Return a digest of the sizes of all files and of the contents of an even sample of them.

    A file of another size changes the digest; a replaced file of the same size changes it only if it is in the sample.
    """
    paths = [path for path, _ in getattr(images, "samples", [])]
    digest = hashlib.sha256()
    for path in paths:
        size = os.stat(path).st_size if os.path.exists(path) else -1  # a link to a missing file counts as corrupt
        digest.update(f"{size}\n".encode())
    for index in evenly(len(paths), SAMPLED):
        if os.path.isfile(paths[index]):  # a pipe would block
            digest.update(hashlib.sha256(Path(paths[index]).read_bytes()).digest())
    return digest.hexdigest()


def read_header(folder: Path) -> Header:
    file = folder / HEADER
    try:
        header = read_json(read_file(file), file)
    except UserError as error:
        raise UserError(f"{error}; write the labels with python -m kdlite.training.teacher_labels") from error
    check_fields(header, FIELDS, str(file))
    return header


def compare(folder: Path, header: Header, ours: Header, fields: dict[str, str]) -> None:
    """Raise UserError at the first field that differs from this run's."""
    if "content" in header and "images" in fields:  # labels written before 2026-11-28 lack this field
        fields = {**fields, "content": "digest of the files' contents"}
    for name, words in fields.items():
        theirs, mine = header[name], ours[name]
        if isinstance(mine, dict) and isinstance(theirs, dict):
            differing = sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))
            words += "".join(f", {key}" for key in differing)
            theirs, mine = ({key: values.get(key) for key in differing} for values in (theirs, mine))
        if theirs != mine:
            fault = f"the labels in {folder} differ from this run in the {words}: {theirs} there, {mine} here"
            raise UserError(f"{fault}; use the flags and files of these labels, or another folder")


# ---- files of rows ------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Describe a file by its view and the images of its rows."""

    view: int
    start: int  # index of its first image
    rows: int

    @property
    def name(self) -> str:
        return f"{self.view:03}-{self.start:08}.npy"


def parts(header: Header) -> Iterator[Part]:
    for view in range(header["views"]):
        for start in range(0, header["images"], ROWS):
            yield Part(view, start, min(ROWS, header["images"] - start))


def find_faults(folder: Path, header: Header) -> list[tuple[Part, str]]:
    """Return the files that are damaged or whose values are not log-probabilities, with the fault of each."""
    found = ((part, find_fault(folder / part.name, header, part.rows)) for part in parts(header))
    return [(part, fault) for part, fault in found if fault]


def find_fault(file: Path, header: Header, rows: int) -> str | None:
    """Return the fault of a file of labels, or None if the file is valid."""
    try:
        content = file.read_bytes()
        array = np.load(io.BytesIO(content))
        whole = array.dtype == row_type(header["k"], header["classes"]) and array.shape == (rows,)
        if not whole or content[-4:] != checksum(content[:-4]):
            return "damaged"
    except Exception:  # numpy raises errors of many kinds for a damaged file
        return "missing or damaged"
    return find_invalid(array["target"], array["logprobs"], array["indices"], header["classes"])


def find_invalid(log_t: np.ndarray, top: np.ndarray, indices: np.ndarray, classes: int) -> str | None:
    """Return the fault of answers, or None if they are valid.

    Valid answers are log-probabilities, finite or -inf, of distinct classes whose probabilities sum to at most 1.01.
    """
    log_t, top, indices = log_t.astype(np.float64), top.astype(np.float64), indices.astype(np.int64)
    with np.errstate(over="ignore"):
        total = np.exp(log_t) + np.exp(top).sum(1)
    if not (total <= 1.01).all():
        return f"the probabilities of an image sum to {total.max():.4g}, expected at most 1.01"
    stored = top > -np.inf
    if (stored & ((indices < 0) | (indices >= classes))).any():
        return f"a class index is out of range: expected 0 to {classes - 1}"
    distinct = np.sort(np.where(stored, indices, -1 - np.arange(indices.shape[1])), 1)
    return "an image has a class twice" if (distinct[:, 1:] == distinct[:, :-1]).any() else None


def checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def write_part(file: Path, rows: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, rows)
    write_whole(file, content.getvalue() + checksum(content.getvalue()))


class StoredLabels:
    """Return log T_t, log T_i (k,) and indices (k,) of (view, index). The first call for a row opens its file.

    Raise UserError if the labels are missing or damaged, or if their images or transform differ from `ours`, the
    result of describe_images for this run.
    """

    def __init__(self, folder: Path, ours: Header) -> None:
        self.folder, self.header = folder, read_header(folder)
        compare(folder, self.header, ours, OF_IMAGES)
        self.seed, self.views, self.k = (self.header[name] for name in ("seed", "views", "k"))
        self.files: dict[tuple[int, int], np.ndarray] = {}  # (view, first image) -> rows; only of the current view
        if faults := from_rank_zero(find_faults, folder, self.header):
            part, fault = faults[0]
            fault = f"{len(faults)} files of labels in {folder} are invalid, the first is {part.name}: {fault}"
            raise UserError(f"{fault}; run the same kdlite.training.teacher_labels command again to replace them")

    def __getstate__(self) -> Header:
        return self.__dict__ | {"files": {}}  # each process opens the files itself

    def __call__(self, view: int, index: int) -> tuple[Tensor, ...]:
        start = index // ROWS * ROWS
        if (view, start) not in self.files:
            self.files = {key: file for key, file in self.files.items() if key[0] == view}
            self.files[view, start] = np.load(self.folder / Part(view, start, ROWS).name, mmap_mode="r")
        log_t, top, indices = self.files[view, start][index - start]
        if log_t == -np.inf and not np.isfinite(top).any():
            raise UnreadableImage("it could not be read when its labels were written")
        top, indices = torch.from_numpy(top.astype(np.float32)), torch.from_numpy(indices.astype(np.int64))
        return torch.tensor(float(log_t)), top, indices

    def __str__(self) -> str:
        teacher = self.header["teacher"]
        views = f"{self.views} views drawn from seed {self.seed}"
        return f"{teacher['name']} ({teacher['digest'][:8]}), top-{self.k} of {views}"


# ---- writing ------------------------------------------------------------------------------------------------------


class Position(NamedTuple):
    """Stand in for StoredLabels while labels are written: return the view and the index of a sample."""

    seed: int
    views: int

    def __call__(self, view: int, index: int) -> tuple[Tensor, ...]:
        return (torch.tensor([view, index]),)


class Writer:
    """Fill the rows of this rank's files, and write each file when all its images are processed."""

    def __init__(self, folder: Path, header: Header, todo: Sequence[Part]) -> None:
        self.folder, self.header, self.todo = folder, header, list(todo)
        self.rows: dict[tuple[int, int], np.ndarray] = {}  # (view, start) -> rows of a file
        self.seen = 0  # processed images of files that are not written yet

    def unread_rows(self, rows: int) -> np.ndarray:
        """Return rows that stand for images that cannot be read: -inf everywhere."""
        file = np.zeros(rows, row_type(self.header["k"], self.header["classes"]))
        file["target"] = file["logprobs"] = -np.inf
        return file

    def add(self, positions: list[list[int]], answers: Answers) -> None:
        """Store the answers about images at (view, index)."""
        log_t, top, indices = (x.cpu().numpy() for x in answers)
        if fault := find_invalid(log_t, top, indices, self.header["classes"]):
            fault = f"the teacher's answers are invalid: {fault}"
            raise UserError(f"{fault}; if the sum is nan, try --amp off: mixed precision may be the cause")
        self.seen += len(positions)
        for (view, index), *row in zip(positions, log_t, top, indices):
            start = index // ROWS * ROWS
            if (view, start) not in self.rows:
                self.rows[view, start] = self.unread_rows(min(ROWS, self.header["images"] - start))
            self.rows[view, start][index - start] = tuple(row)

    def write(self) -> None:
        while self.todo and self.seen >= self.todo[0].rows:
            part = self.todo.pop(0)
            self.seen -= part.rows
            write_part(self.folder / part.name, self.rows.pop((part.view, part.start), self.unread_rows(part.rows)))


@contextmanager
def lock_labels(folder: Path, header: Header) -> Iterator[None]:
    """Create and lock the folder; raise UserError if it has other labels, or if another process writes to it."""
    with ExitStack() as at_the_end:
        from_rank_zero(begin_labels, folder, header, at_the_end)
        yield


def begin_labels(folder: Path, header: Header, at_the_end: ExitStack) -> None:
    check_fields(header, FIELDS, str(folder / HEADER))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}; give another folder with --output") from error
    at_the_end.enter_context(locked(folder))
    if (folder / HEADER).exists():
        compare(folder, read_header(folder), header, OF_IMAGES | OF_TEACHER)
    else:
        write_whole(folder / HEADER, json.dumps(header, indent=1))


def write_labels(
    folder: Path, header: Header, images: Any, transform: Transform, ask: Ask, workers: int | None, stop: StopRequest
) -> bool:
    """Run the teacher on every view of every training image; return whether all files are written (False after a stop).

    The ranks share the files. The function keeps finished files, so that the same call continues after a stop.
    """
    todo = [part for part, _ in from_rank_zero(find_faults, folder, header)]
    rows, all_rows = sum(part.rows for part in todo), header["images"] * header["views"]
    there = f", {all_rows - rows} written already" if rows < all_rows else ""
    size = all_rows * row_type(header["k"], header["classes"]).itemsize / 1e6
    log(f"labels of {all_rows} views ({header['images']} images x {header['views']}){there}: {size:.1f} MB")
    mine = todo[RANK::WORLD_SIZE]
    keys = ((part.view, part.start + i) for part in mine for i in range(part.rows))
    dataset = Samples(images, transform, stored=Position(header["seed"], header["views"]))
    writer = Writer(folder, header, mine)
    corrupt, pin = CorruptCount("training", header["images"]), torch.cuda.is_available()
    for batch in image_progress(data_loader(dataset, keys, BATCH, workers, pin), "ask the teacher", rows):
        corrupt.report(batch)
        writer.seen += len(batch.corrupt)
        if batch.images is not None:
            writer.add(batch.teacher[0].tolist(), ask(batch.images, batch.labels))
        writer.write()
        if stop.name:
            break
    return not any(gather(writer.todo))  # a rank with fewer files waits here for the others


# ---- the command --------------------------------------------------------------------------------------------------

COUNT = number(int, 1)
FLAGS: Table = {  # a flag with the name of a train.py flag has the same meaning
    "labels": {
        "output": Flag(None, "the folder of labels; the same command continues after a stop", required=True),
        "views": Flag(10, "views of each image to store; each has its own crop and flip", type=COUNT),
        "top_k": Flag(None, "classes of each answer to store (default: 10; all with --unlabelled)", type=COUNT),
        "seed": Flag(0, "seed of the views", type=number(int, 0, 2**32 - 1)),
    },
    "teacher": {
        "teacher": Flag(None, "the teacher, as in train.py", path=True, required=True),
        "teacher_classes": Flag(None, "CSV file, as in train.py", path=True),
    },
    "the training that follows": {
        "data": Flag("digits", "digits, cifar10, cifar100 or a folder", path=True),
        "unlabelled": Flag(None, "a folder of more photographs, without labels", path=True),
        "val_split": Flag(None, "share of each class to validate on", type=number(float, 0, 1, above=True)),
        "img_size": Flag(BY_RECIPE, "pixels a side, or height and width", type=COUNT, nargs="+"),
        "in_chans": Flag(3, "channels of the student's images", type=int, choices=[1, 3]),
        "crop": Flag(BY_RECIPE, "random crop", choices=["resized", "pad", "none"]),
        "hflip": Flag(BY_RECIPE, "probability of a horizontal flip", type=number(float, 0, 1)),
        "randaugment": Flag(None, "operations (0: off) and magnitude", type=number(int, 0, 30), nargs=2),
        "model": Flag("mobilenet_v2", "the student: its weights may decide size and preprocessing", path=True),
        "model_args": Flag([], "arguments of the student", nargs="+", metavar="KEY=VALUE"),
        "model_file": Flag([], "file.py:build that makes a student/ folder's model; it is run", path=True, nargs="+"),
        "pretrained": Flag(False, "as in train.py", path=True, nargs="?", const=True, metavar="FILE"),
        "recipe": Flag(None, "as in train.py", choices=sorted(RECIPES)),
    },
    "machine": {
        "workers": Flag(None, "data loading workers per rank", type=number(int, 0)),
        "device": Flag("auto", "device that the teacher runs on", choices=["auto", "cpu", "cuda"]),
        "amp": Flag("auto", "mixed precision", choices=["auto", "bf16", "fp16", "off"]),
    },
}  # fmt: skip


class Asker:
    """Return the teacher's answers about a batch; print its top-1 after FIRST labelled images, or at the end."""

    def __init__(self, teacher: Teacher, to_device: ToDevice, amp: torch.dtype | None, k: int, classes: int) -> None:
        self.teacher, self.to_device, self.amp, self.k, self.classes = teacher, to_device, amp, k, classes
        self.seen: list[Tensor] = []  # labels and predictions, (2, N), until they are reported
        self.count = 0

    @torch.inference_mode()
    def __call__(self, images: Tensor, labels: Tensor) -> Answers:
        """Return the answers about a batch. If an image has no label, the teacher's most probable class replaces it."""
        images, labels, *_ = self.to_device(Batch(images, labels, []))
        with torch.autocast(images.device.type, self.amp, enabled=self.amp is not None):
            logits = self.teacher(images)
        best, labelled = logits.argmax(1), labels != NO_LABEL
        if self.count < FIRST:
            self.seen.append(torch.stack([labels, best])[:, labelled].cpu())
            self.count += self.seen[-1].shape[1]
            if self.count >= FIRST:
                self.report()
        labels = labels.where(labelled, best)
        return top_k_logprobs(logits, labels, self.k)

    def report(self) -> None:
        """Print the teacher's top-1 on the labelled images since the start, and warn if it is suspicious; only once."""
        if not self.seen or not sum(part.shape[1] for part in self.seen):
            return
        labels, predictions = torch.cat(self.seen, 1).numpy()
        self.seen = []
        log(f"the teacher is right on {100 * (labels == predictions).mean():.2f} % of the first {len(labels)} views")
        warn_of_teacher(labels, predictions, self.classes)


def run(argv: list[str] | None = None) -> None:
    with distributed.reported_once():
        typed = read_flags(FLAGS, argv, __doc__ or "", "teacher_labels")
        settle_flags(FLAGS, typed)
    with distributed.stop_signals() as stop, distributed.process_group(), distributed.reported_once():
        args, _, data = open_run(FLAGS, typed)
        classes = len(data.label_names)
        k = (classes - 1 if args.unlabelled else min(10, classes - 1)) if args.top_k is None else args.top_k
        if args.unlabelled and k < classes - 1:
            fault = "--unlabelled needs the teacher's answer about every class"
            raise UserError(f"{fault}: give --top-k {classes - 1}, or omit --top-k")
        if k >= classes:
            raise UserError(f"--top-k {k} is too large: give at most {classes - 1}, all classes except the label")
        args.small_stem = False  # only the student's preprocessing matters here
        images = data.preprocessing(args.in_chans, args.interpolation, args.eval_crop)
        _, config, _ = open_student(args, data.label_names, images, args.pretrained)
        device = distributed.pick_device(args.device)
        teacher = load_teacher(args.teacher, config, args.model_file, args.teacher_classes).wrap(config)
        teacher.to(device=device).to(memory_format=torch.channels_last)
        view = View(config.input_size, args.crop, args.hflip, config.interpolation, args.randaugment)
        source = {"name": os.path.basename(args.teacher), "digest": digest_of(sorted(teacher.state_dict().items()))}
        source |= {"size": list(teacher.size or ()), "seen_at": list(config.input_size)}
        header = describe_images(data, view) | {"teacher": source, "seed": args.seed, "views": args.views, "k": k}
        to_device, amp = ToDevice(config.mean, config.std, device), distributed.pick_amp(args.amp, device)
        folder, ask = Path(os.path.expanduser(args.output)), Asker(teacher, to_device, amp, k, classes)
        with lock_labels(folder, header):
            whole = write_labels(folder, header, data.train, view.transform(), ask, args.workers, stop)
            ask.report()
        kept = f"stopped by {stop}: the complete files in {folder} are kept; run the same command again to continue"
        done = (
            f"all labels are written: add --kd nkd --teacher-labels {shlex.quote(str(folder))} to the flags of train.py"
        )
        log(done if whole else kept)


def main(argv: list[str] | None = None) -> int:
    return run_command("teacher_labels", functools.partial(run, argv))


if __name__ == "__main__":
    sys.exit(main())
